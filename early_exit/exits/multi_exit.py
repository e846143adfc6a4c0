"""A backbone with exits: one static description, one dict of arrays.

    params = {"backbone": …, "exits": {"6": …, "12": …, "recurrent": …, if there is one},
              "token_ids": [R], if heads are reduced,
              "few": …, if few positions are multiplied in a way of their own}

The one idea: exits read the backbone and nothing reads the exits, so attaching, tuning or
dropping them cannot change what the full model says.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from early_exit import confidence, sharding
from early_exit.backbones import base, few
from early_exit.exits import heads, init
from early_exit.exits.recurrent import Recurrent
from early_exit.streams import stream

Params = base.Params
# The recurrent exit among the parameters of the exits, which are else named by their blocks.
RECURRENT = "recurrent"


@dataclasses.dataclass(frozen=True)
class MultiExit:
    """The static half of a multi-exit model: hashable, no arrays, safe to close a jit over."""

    config: base.BackboneConfig
    exits: heads.ExitConfig

    def __post_init__(self):
        self.exits.check(self.config)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the blocks before each exit, then those before the final exit."""
        edges = (0, *self.exits.points, self.config.depth)
        return tuple(zip(edges[:-1], edges[1:], strict=True))

    @property
    def exit_depths(self) -> np.ndarray:
        """int [E + 1]: blocks run at each exit, the final one last."""
        return np.array([*self.exits.points, self.config.depth])

    @property
    def confidences(self) -> tuple[str, ...]:
        """The scores (`confidence.names`) that its exits have."""
        hidden = () if self.config.classifies else ("similarity",)
        said = confidence.FROM_LOGITS + confidence.registered()
        return said + hidden + (("gate",) if self.exits.gate else ())

    def bind(self, params: Params) -> "Bound":
        """The modules, holding `params`; no heads if `exits` is not among them.

        A decoder without `blocks` among its parameters has its stem and readout alone. Call it
        inside the jitted function.
        """
        network = self.config
        if not network.classifies and "blocks" not in params["backbone"]:
            network = network.without_blocks()
        backbone_definition, _ = base.described(network)
        backbone = base.merge(backbone_definition, params["backbone"])
        if params.get("few") is not None:
            few.attach(backbone, params["few"])
        return Bound(
            backbone=backbone,
            heads=tuple(
                base.merge(_abstract_head(self, point)[0], params["exits"][str(point)])
                for point in self.exits.points
                if "exits" in params
            ),
            token_ids=params.get("token_ids"),
            recurrent=base.merge(_abstract_head(self, RECURRENT)[0], params["exits"][RECURRENT])
            if self.exits.recurrent_taps and "exits" in params
            else None,
        )

    def for_few(self, params: Params) -> Params:
        """The parameters, and what it takes to multiply few positions fast (`backbones.few`)."""
        if self.config.scan:
            return params
        backbone = {"backbone": params["backbone"]}
        return params | {"few": few.prepared(backbone, lambda: self.bind(backbone).backbone)}

    @property
    def head_names(self) -> tuple[int | str, ...]:
        """Of all heads: the blocks they stand after, and the recurrent one if there is one."""
        return (*self.exits.points, *([RECURRENT] if self.exits.recurrent_taps else []))

    def abstract_exits(self, dtype=jnp.float32) -> Params:
        """The exits' parameters as shapes of the given dtype."""
        return {
            str(name): jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, dtype), _abstract_head(self, name)[1]
            )
            for name in self.head_names
        }

    def first_exits(
        self, seed: int, backbone: Params, source: str, token_ids: jax.Array | None
    ) -> Params:
        """What `init_exits` gives by the seed of a run."""
        return self.init_exits(stream(seed, "heads"), backbone, source, token_ids)

    def init_exits(
        self, key: jax.Array, backbone: Params, source: str, token_ids: jax.Array | None
    ) -> Params:
        """Parameters of every head, `source` being `copy` or `random` (see `exits.init`).

        What the backbone has no like of (gates, what one head takes from others) is drawn at random
        in any case.

        Raises:
          ValueError: unknown `source`, `token_ids` that do not fit `exits.classes`, or parts of
            heads for which the backbone has nothing to copy.
        """
        if source not in init.INITS:
            raise ValueError(f"unknown init {source!r}; choose one of {', '.join(init.INITS)}")
        given = 0 if token_ids is None else len(token_ids)
        if given != self.exits.classes:
            raise ValueError(f"exits.classes={self.exits.classes} but {given} token ids were given")
        params, mesh = {}, sharding.mesh_of(backbone)
        for name, shapes in self.abstract_exits().items():
            make = functools.partial(self._first_exit, name, source)
            if mesh is not None:  # as one program, so that no device has a whole head
                make = jax.jit(make, out_shardings=sharding.shardings(shapes, mesh))
            params[name] = make(key, backbone, token_ids)
        return params

    def _first_exit(
        self, name: str, source: str, key: jax.Array, backbone: Params, token_ids: jax.Array | None
    ) -> Params:
        """The parameters of one head, of the backbone's type."""
        dtype, recurrent = jax.tree.leaves(backbone)[0].dtype, name == RECURRENT
        # No block has the number 0.
        rngs = nnx.Rngs(jax.random.fold_in(key, 0 if recurrent else int(name)))
        _, drawn = base.split(_head(self, name if recurrent else int(name), rngs))
        drawn = jax.tree.map(lambda x: x.astype(dtype), drawn)
        if source == "random":
            return drawn
        if recurrent:
            return init.copied_recurrent(drawn, backbone, self.config.depth, token_ids)
        like = {part: x for part, x in drawn.items() if part not in init.DRAWN}
        return drawn | init.copied(like, backbone, int(name), self.config.depth, token_ids)


def _head(model: MultiExit, name: int | str, rngs: nnx.Rngs) -> nnx.Module:
    network, exits = model.config, model.exits
    if name != RECURRENT:
        return heads.Head(network, exits, name, rngs=rngs)
    rows = exits.own_rows(network.num_classes)
    return Recurrent(network, exits.recurrent_taps, exits.recurrent_blocks, rows, rngs=rngs)


@functools.lru_cache(maxsize=256)  # binding is done in every program, and tracing a head is slow
def _abstract_head(model: MultiExit, name: int | str) -> tuple[nnx.GraphDef, Params]:
    return base.abstract(lambda rngs: _head(model, name, rngs))


@dataclasses.dataclass(frozen=True)
class Bound:
    """A multi-exit model with its parameters, inside a jitted function.

    Attributes:
      backbone: the pretrained network.
      heads: one per exit, shallow to deep.
      token_ids: int32 [R], what the rows of a reduced head's output matrix stand for; else None.
      recurrent: the recurrent exit; None if there is none.
    """

    backbone: base.Backbone
    heads: tuple[heads.Head, ...]
    token_ids: jax.Array | None
    recurrent: Recurrent | None

    def exit_logits(
        self, e: int, hidden: jax.Array, context: Any, earlier: Sequence[jax.Array]
    ) -> jax.Array:
        """A classifier's head on the hidden states at its exit: logits float32 [B, C].

        Args:
          e: which exit, from 0.
          earlier: the logits of the heads before it; only cascaded heads read them, and none
            learns from this one through them.
        """
        head = self.heads[e]
        features, _ = head.features(hidden, context)
        output = getattr(head, "output", self.backbone)
        if hasattr(head, "output"):
            own = base.logits(features, output.embedding[...], output.bias[...])
        else:
            own = base.logits(features, output.output_table(), output.output_bias())
        if hasattr(head, "cascade"):
            own = own + head.cascade(jax.lax.stop_gradient(earlier[-1]))
        return own

    def answer(self, logits: Sequence[jax.Array]) -> jax.Array:
        """What an exit of a classifier says, [B, C], from the logits of its head and all before.

        That is its head's logits, unless there are ensembles; those learn from heads, and no head
        from them.
        """
        head = self.heads[len(logits) - 1]
        if not hasattr(head, "ensemble"):
            return logits[-1]
        return head.ensemble([jax.lax.stop_gradient(x) for x in logits])

    def exit_tables(self) -> tuple[jax.Array, ...]:
        """Each head's output matrix [C, D]: C = V, or R + 1 with "none of these" last.

        Cheap when the matrix is the head's own or the whole of the backbone's. A reduced shared
        one is gathered: call this once, outside any loop.
        """
        return self._tables(self.heads)

    def draft_table(self) -> jax.Array:
        """The same of the recurrent exit."""
        return self._tables([self.recurrent])[0]

    def _tables(self, of: Sequence[heads.Head | Recurrent]) -> tuple[jax.Array, ...]:
        shared = self.backbone.output_table()
        if self.token_ids is not None:
            shared = shared[self.token_ids]

        def table(head):
            if not hasattr(head, "output"):
                return shared
            own = head.output.embedding[...]
            is_rest_row_only = self.token_ids is not None and own.shape[0] == 1
            return jnp.concatenate([shared, own]) if is_rest_row_only else own

        return tuple(map(table, of))

    def hidden_at_exits(self, hidden, context, points) -> Iterator[jax.Array]:
        """Runs the backbone and yields the hidden states after each of the rising `points`.

        Nothing deeper than the last point asked for is run.
        """
        start = 0
        for stop in points:
            hidden = self.backbone.run_blocks(hidden, start, stop, context)
            yield hidden
            start = stop
