"""A network of one's own in the `Backbone` contract: any NNX module, told where its parts lie.

The one idea: nothing is written anew. The parameters are arranged as this project has them, blocks
apart from the rest, and the network is put together from them wherever a part of it is called.

A Linen network comes through `flax.nnx.bridge.ToNNX`: whole, its methods being the parts, or as one
such module for each part.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit import tree
from early_exit.backbones import base, image_parts, own_parts
from early_exit.backbones.own_parts import Make, Places, Pool


@dataclasses.dataclass(frozen=True)
class OwnConfig(base.BackboneConfig):
    """Describes a network by where its parts lie; `wrap` makes one.

    Attributes:
      places: the network, and where its parts lie.
      name: what its files call it.
      stop: the block after which it is cut off, for heads; None for nowhere.
      bare: whether it is the stem and the readout alone.
    """

    places: Places
    name: str = "own"
    stop: int | None = None
    bare: bool = False

    incidental = ("name",)

    def __post_init__(self):
        _ = self.plan  # all that does not fit is found here

    @property
    def plan(self) -> own_parts.Plan:
        """What an abstract run has found of it."""
        return own_parts.plan(self.places)

    @property
    def classifies(self) -> bool:
        return self.places.classifies

    @property
    def reads(self) -> str:
        return self.places.reads

    @property
    def depth(self) -> int:
        return len(self.plan.hidden)

    @property
    def width(self) -> int:
        return self.plan.width if self.stop is None else self.plan.hidden[self.stop - 1].shape[-1]

    @property
    def num_classes(self) -> int:
        return self.plan.num_classes

    @property
    def vocab_size(self) -> int:
        """Of a language model."""
        return 0 if self.classifies else self.num_classes

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.places.shapes["images"].shape[-1]

    @property
    def context_length(self) -> int:
        """The most tokens of a row: as many as the example has; 0 where it reads none."""
        return self.places.shapes["tokens"].shape[1] if self.reads == "tokens" else 0

    @property
    def decodes(self) -> bool:
        return any(self.plan.rows)

    @property
    def head_kinds(self) -> tuple[str, ...]:
        if not self.classifies:
            return "embedding", "norm", "mlp"
        maps = all(hidden.ndim == 4 for hidden in self.plan.hidden)
        return ("linear", "norm", "mlp", "grid") if maps else ("linear", "norm", "mlp")

    @property
    def grid_width(self) -> int:
        return image_parts.grid_width(self.width)

    def example_inputs(self):
        return self.places.shapes if self.classifies else super().example_inputs()

    def cached_rows(self, index):
        return self.plan.rows[index]

    def without_blocks(self):
        return dataclasses.replace(self, bare=True)

    def at(self, point):
        return dataclasses.replace(self, stop=point)

    def pool(self, hidden, context):
        return self.places.pool(hidden, context)

    def build(self, rngs):
        return Own(self, rngs=rngs)

    def build_norm(self, rngs):
        """For heads."""
        return image_parts.layer_norm(self.width, rngs)

    def build_mlp(self, rngs):
        """For heads."""
        return image_parts.MLP(self.width, rngs=rngs)

    def build_grid(self, point, rngs):
        return image_parts.Grid(self.at(point).width, 2 * self.width, rngs=rngs)

    def params_of(self, network: nnx.Module) -> base.Params:
        """The parameters of such a network, arranged as this project has them.

        Raises:
          ValueError: it has other variables than the network that `make` gives.
        """
        found, plan = dict(nnx.to_flat_state(nnx.state(network))), self.plan
        if apart := {leaf.theirs for leaf in plan.leaves} ^ (found.keys() - plan.idle.keys()):
            names = ", ".join(sorted(map(own_parts.spelt, apart)))
            raise ValueError(f"the network is not such as `make` gives: they differ by {names}")
        flat = {}
        for leaf in plan.leaves:
            value = found[leaf.theirs].get_value()
            if value.shape != leaf.like.shape:
                raise ValueError(
                    f"{own_parts.spelt(leaf.theirs)} of the network is {list(value.shape)}, but "
                    f"{list(leaf.like.shape)} in one that `make` gives"
                )
            flat[leaf.ours] = value.T if leaf.transposed else value
        return tree.unflatten(flat)

    def network_of(self, params: base.Params) -> nnx.Module:
        """The inverse of `params_of`: the network in evaluation mode, with these parameters."""
        flat = tree.flatten(params)
        values = [flat[leaf.ours] for leaf in self.plan.leaves]
        turned = [
            x.T if leaf.transposed else x for leaf, x in zip(self.plan.leaves, values, strict=True)
        ]
        return own_parts.merged(self.plan, turned)


def wrap(
    make: Make,
    inputs: Mapping[str, Any],
    *,
    blocks: str | Sequence[str],
    stem: str,
    output: str,
    features: str = "",
    pooling: str | Pool = "mean",
    classifies: bool = True,
    name: str = "own",
) -> OwnConfig:
    """Describes a network of one's own, so that exits can be attached to it.

    Each part is named by where it lies, as in `"encoder.layers.0"`: a submodule, or a method. The
    network is used in evaluation mode: dropout does nothing, and running statistics stay as they
    are, in training too.

    Args:
      make: `nnx.Rngs` → the network; only traced where shapes are asked for.
      inputs: what the stem takes: arrays, or shapes, with the rows in front, as
        `{"images": jax.ShapeDtypeStruct((1, 28, 28, 1), "float32")}`. A language model's `tokens`
        int32 [1, T] are as long as rows may be.
      blocks: where a list of blocks lies, or where each lies, or each list. A block maps hidden
        states to hidden states; it gets the context too, if the stem gives one. Blocks of other
        forms than a list's, as of `nnx.scan`, are none.
      stem: what makes hidden states of inputs. A submodule gets the one array; a method gets all
        inputs, a dict, and may return (hidden states, context for the blocks); a classifier's
        context has the rows in front. A language model's is a method: rows hold several texts, and
        `inputs` says which (`documents`, `positions`).
      output: the last layer: a linear one (`kernel` [D, C], `bias`), or a table (`embedding`
        [C, D]), which may be the one that tokens are looked up in.
      features: what stands between the last block and the last layer; empty for nothing. A method
        of a classifier gets the context too, if the stem gives one.
      pooling: what a classifier does with hidden states, or features, of more axes than [B, D]:
        `mean` over all places, the `first` place, or a function of hidden states and context.
      classifies: whether it tells classes apart; else it is a language model, which predicts at
        every position. It can be decoded from if its blocks are `backbones.base.CachedBlock`s.
      name: what its files call it (`register.network`).

    Returns:
      what `Model.of` takes, beside parameters: `base.init` draws some, `params_of(network)` are
      those of a network that there is, and `network_of(params)` is its inverse.

    Raises:
      ValueError: a part that is not there, that does not run, or that is of another kind.

    Example:
      >>> from flax import nnx
      >>> class Small(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.entry = nnx.Linear(3, 8, rngs=rngs)
      ...         self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
      ...         self.last = nnx.Linear(8, 2, rngs=rngs)
      >>> rows = {"rows": np.zeros((1, 3), np.float32)}
      >>> small = ee.wrap(Small, rows, stem="entry", blocks="layers", output="last")
      >>> small.depth, small.width, small.num_classes
      (3, 8, 2)
      >>> params = small.params_of(Small(nnx.Rngs(0)))
      >>> ee.attach(ee.Model.of(small, params), ee.ExitConfig((1, 2), head="linear")).points
      (1, 2)
    """
    given = tuple((key, tuple(x.shape), str(jnp.dtype(x.dtype))) for key, x in inputs.items())
    listed = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    return OwnConfig(Places(make, given, listed, stem, output, features, pooling, classifies), name)


class Own(base.Backbone):
    """The parameters in this project's layout; the network is put together for each call."""

    def __init__(self, config: OwnConfig, *, rngs: nnx.Rngs):
        self.config = config
        params = config.params_of(config.places.make(nnx.Rngs(rngs.params())))
        for name, part in params.items():
            if not (config.bare and name == "blocks"):
                setattr(self, name, _held(part))

    def _network(self, learns: bool = False) -> nnx.Module:
        values = []
        for leaf in self.config.plan.leaves:
            # What no part reads is not turned either, or programs would seem to read it.
            if not leaf.is_read or (self.config.bare and leaf.ours.startswith("blocks/")):
                values.append(None)
                continue
            held = functools.reduce(getattr, leaf.ours.split("/"), self)[...]
            value = held.T if leaf.transposed else held
            values.append(value if leaf.learns or not learns else jax.lax.stop_gradient(value))
        return own_parts.merged(self.config.plan, values)

    def stem(self, inputs):
        """Inputs: those that the config names, and for a language model also positions and
        documents, where it reads them."""
        return self.config.places.enter(self._network(), inputs)

    def stem_training(self, inputs):
        return *self.config.places.enter(self._network(learns=True), inputs), {}

    def run_blocks(self, hidden, start, stop, context):
        for block in self.config.places.list_blocks(self._network())[start:stop]:
            hidden, _ = own_parts.run(block, hidden, context)
        return hidden

    def run_blocks_training(self, hidden, start, stop, context, kept=None):
        assert kept is None
        for block in self.config.places.list_blocks(self._network(learns=True))[start:stop]:
            hidden, _ = own_parts.run(block, hidden, context)
        return hidden, {}

    def cached_block(self, index):
        return self.config.places.list_blocks(self._network())[index]

    def features(self, hidden, context=None):
        return self.config.places.read_out(self._network(), hidden, context)

    def output_table(self):
        return self.output["embedding"][...]

    def output_bias(self):
        return self.output["bias"][...] if hasattr(self.output, "bias") else None


def _held(part: base.Params) -> nnx.Dict:
    return nnx.Dict(
        {key: _held(x) if isinstance(x, dict) else nnx.Param(x) for key, x in part.items()}
    )
