"""The contract every pretrained network fulfils, and the border between NNX and plain pytrees.

The one idea: a network is `stem → block 1 … block L → readout`, and any code that stops it
half-way, runs it in pieces or puts heads between the pieces needs nothing else. Decoding needs one
thing more of a language model: blocks that run against a past (`CachedBlock`). Outside
`backbones/` and `exits/` a model is a hashable graph definition and a dict of arrays.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from early_exit import tree
from early_exit.backbones import few
from early_exit.backbones.scoring import soft_cap

Params = dict[str, Any]
# Slash-joined path of a running statistic → float32 [C], a batch's.
Moments = dict[str, jax.Array]
# What a block leaves for later positions to look at, such as keys and values: each [B, T, K, d] for
# new positions, [B, K, S, d] in a cache of S slots.
Rows = tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What a decoder's blocks look at of a prompt that an encoder has read.

    Attributes:
      rows: by block, `block/<index from 0>`: keys and values, each [B, K, S, d].
      real_BS: bool, where the prompt has a token.
    """

    rows: dict[str, Rows]
    real_BS: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """What drafted positions look at beside themselves: rows that are exact, then earlier drafts'.

    Each position is at the end of a chain of its own, so none sees another of the same call.

    Attributes:
      past: exact rows, each [B, K, S, d].
      first_BT, length_BT: int32; position t of row b sees the slots from first to length − 1.
      drafted: rows of the drafts before each position, each [B, T, J, K, d], the oldest first.
      counts_BTJ: bool, which of these there are.
      learns: whether gradients are taken; all of `past` is read then.
    """

    past: Rows
    first_BT: jax.Array
    length_BT: jax.Array
    drafted: Rows
    counts_BTJ: jax.Array
    learns: bool = dataclasses.field(default=False, metadata={"static": True})


class CachedBlock(nnx.Module):
    """A block of a language model that decodes: it runs new positions against earlier ones.

    It only reads the past, and returns the new positions' rows; the caller stores them.
    """

    @abc.abstractmethod
    def __call__(
        self,
        hidden_BTD: jax.Array,
        context: Any,
        past: Rows | None = None,
        past_length_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Rows]:
        """Hidden states → (hidden states after the block, the new positions' rows).

        Args:
          past: a cache, read up to `past_length_B` slots in each row; None for no past. New
            position t of row b is the one that slot past_length[b] + t will hold.
        """

    @abc.abstractmethod
    def draft(self, hidden_BTD: jax.Array, context: Any, chain: Chain) -> tuple[jax.Array, Rows]:
        """The same of drafted positions, which see a chain each and not one another."""

    @abc.abstractmethod
    def keys_values(self, hidden_BTD: jax.Array, context: Any) -> Rows:
        """The new positions' rows alone, as if the block had been given these hidden states."""


class Backbone(nnx.Module):
    """A network in blocks. Holds only `nnx.Param`; everything else is an argument.

    `context` is whatever every block needs beside the hidden states (rotary angles, masks);
    the stem makes it from the inputs and the caller passes it on unopened. A classifier's rows part
    ways: each of its arrays has the rows in front.
    """

    config: "BackboneConfig"
    # How positions are multiplied by the output matrix; see `few`.
    output_product: Callable[..., jax.Array] = staticmethod(few.table_product)

    @abc.abstractmethod
    def stem(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        """Inputs → (hidden states before block 1, context for the blocks)."""

    @abc.abstractmethod
    def run_blocks(self, hidden: jax.Array, start: int, stop: int, context: Any) -> jax.Array:
        """Hidden states after block `start` → hidden states after block `stop`.

        Blocks count from 1, so `start=0` is the stem's output and `stop=depth` the last block's.
        Composing segments gives the full forward pass.
        """

    def remember(self, prompt_BS: jax.Array, real_BS: jax.Array) -> Memory:
        """What the blocks of a network that `encodes_prompts` look at of a prompt.

        Args:
          prompt_BS: int32, its tokens.
          real_BS: bool, where there are any.
        """
        raise NotImplementedError

    def cached_block(self, index: int) -> CachedBlock:
        """Block `index` (from 0) of a network that `decodes`."""
        return self.blocks[str(index)]

    def stem_training(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, Any, Moments]:
        """Like `stem` where it is trained: networks with running statistics return a batch's."""
        return *self.stem(inputs), {}

    def run_blocks_training(
        self,
        hidden: jax.Array,
        start: int,
        stop: int,
        context: Any,
        kept: jax.Array | None = None,
    ) -> tuple[jax.Array, Moments]:
        """Like `run_blocks` where they are trained; see `stem_training`.

        Args:
          kept: bool [L, B], which blocks each row runs; None for all. Only networks that
            `drops_blocks` take it.
        """
        assert kept is None
        return self.run_blocks(hidden, start, stop, context), {}

    @abc.abstractmethod
    def features(self, hidden: jax.Array, context: Any = None) -> jax.Array:
        """Hidden states after the last block → what the output matrix reads, [..., D]."""

    @abc.abstractmethod
    def output_table(self) -> jax.Array:
        """The output matrix, [classes, D]: logits are `features @ table.T + output_bias`.

        Raises:
          ValueError: the network has none (`num_classes` is 0).
        """

    def output_bias(self) -> jax.Array | None:
        """What is added to the logits, [classes]; None for nothing (language models)."""
        return None

    def readout(self, hidden: jax.Array, context: Any = None) -> jax.Array:
        """Hidden states after the last block → logits [..., classes], float32.

        Raises:
          ValueError: the network has no output matrix.
        """
        read = self.features(hidden, context), self.output_table(), self.output_bias()
        return logits(*read, self.config.logit_rule, self.output_product)


@dataclasses.dataclass(frozen=True)
class LogitRule:
    """How a network's logits follow from the products of features with its output matrix.

    Its exits' do in the same way: what is copied from its readout then says what the readout says.

    Attributes:
      divisor: products are divided by it (Granite).
      cap: the soft cap of what is then the logit (Gemma 2); None for none.
    """

    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, products: jax.Array) -> jax.Array:
        return soft_cap(products if self.divisor == 1 else products / self.divisor, self.cap)


PLAIN = LogitRule()


class BackboneConfig(abc.ABC):
    """Frozen description of a backbone; builds it and the parts that exit heads are made of.

    Attributes:
      depth: number of blocks.
      width: of the hidden states and of the features, D.
      num_classes: rows of the output matrix; 0 if the network has none and ends in features.
      reads: what its stem takes, `tokens` or `images`.
      classifies: whether it tells classes apart, one prediction for a whole input; a language model
        predicts at every position.
      decodes: whether its blocks are `CachedBlock`s, so that it can be decoded from; it has a
        `context_length` then, and a `vocab_size`.
      encodes_prompts: whether an encoder reads the prompt, and the blocks the answer alone; its
        stem takes that prompt, or what `Backbone.remember` made of it. It has a `start_id` then,
        the token that answers are written behind.
      head_kinds: the exit heads that it can carry (see `exits.heads`).
      grid_width: of the features of heads of the kind `grid`.
      scan: whether its blocks run in a loop, their parameters stacked (see `stack_blocks`).
      drops_blocks: whether rows can leave blocks out in training.
      logit_rule: how logits follow from the products of features with the output matrix.
      incidental: settings that do not change what it computes (see `identity`).
    """

    depth: int
    width: int
    num_classes: int
    context_length: int  # where it reads text, and so the next
    vocab_size: int
    reads: ClassVar[str] = "tokens"
    classifies: ClassVar[bool]
    decodes: ClassVar[bool] = False
    encodes_prompts: ClassVar[bool] = False
    start_id: int
    head_kinds: ClassVar[tuple[str, ...]]
    drops_blocks: ClassVar[bool] = False
    incidental: ClassVar[tuple[str, ...]] = ()
    logit_rule: LogitRule = PLAIN
    grid_width = 0
    scan = False

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> Backbone: ...

    def example_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The least that the stem takes, as shapes: one token, or one image of a usual size."""
        return {"tokens": jax.ShapeDtypeStruct((1, 1), jnp.int32)}

    def cached_rows(self, index: int) -> tuple[tuple[int, int], ...]:
        """(K, d) of each array that block `index` (from 0) leaves of a position; see `Rows`."""
        raise NotImplementedError

    def without_blocks(self) -> "BackboneConfig":
        """Describes the stem and the readout alone."""
        raise NotImplementedError

    def share_read(self, path: str) -> float:
        """Of a block's or a head's parameter, by its path, what one position reads."""
        return 1.0

    def at(self, point: int) -> "BackboneConfig":
        """What describes heads after block `point`: itself, unless width changes with depth."""
        return self

    def pool(self, hidden: jax.Array, context: Any) -> jax.Array:
        """Hidden states → what one prediction is made from: a row per input in classifiers."""
        return hidden

    @abc.abstractmethod
    def build_norm(self, rngs: nnx.Rngs) -> nnx.Module:
        """The normalisation in front of the readout."""

    def build_input_norm(self, rngs: nnx.Rngs) -> nnx.Module:
        """What stands in front of the feed-forward part of heads, as in blocks."""
        return self.build_norm(rngs)

    @abc.abstractmethod
    def build_mlp(self, rngs: nnx.Rngs) -> nnx.Module:
        """The feed-forward part of one block; what it returns is added to the hidden states."""

    def build_head_mlp(self, point: int, rngs: nnx.Rngs) -> nnx.Module:
        """The feed-forward part of a head after block `point`: such as that block has."""
        return self.at(point).build_mlp(rngs)

    def build_block(self, rngs: nnx.Rngs) -> nnx.Module:
        """One whole block, for heads of the kind `layer`."""
        raise NotImplementedError

    def build_grid(self, point: int, rngs: nnx.Rngs) -> nnx.Module:
        """Hidden states after block `point` → [B, `grid_width`], for heads of the kind `grid`."""
        raise NotImplementedError


class Classifier(nnx.Module):
    """The output matrix [C, D] and bias [C] of a network that tells classes apart."""

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (num_classes, width)))
        self.bias = nnx.Param(jnp.zeros(num_classes))


def logits(
    features: jax.Array,
    table: jax.Array,
    bias: jax.Array | None = None,
    rule: LogitRule = PLAIN,
    product: Callable[..., jax.Array] = few.table_product,
) -> jax.Array:
    """`rule(features @ table.T + bias)` in float32: [..., D] × [C, D] + [C] → [..., C].

    Args:
      product: what multiplies them.
    """
    out = product(features, table, preferred_element_type=jnp.float32)
    if bias is not None:
        out = out + jnp.broadcast_to(bias.astype(jnp.float32), out.shape)
    return rule(out)


def update_statistics(
    params: Params, moments: Mapping[str, jax.Array], momentum: float = 0.1
) -> Params:
    """The parameters with each statistic moved towards the batch's by the share `momentum`.

    Args:
      params: a network's (or any tree's whose paths `moments` has); they are not changed.
      moments: path → the batch's, as the training calls return them; others stay as they are.

    Raises:
      KeyError: a path that is not in `params`.
    """
    flat = tree.flatten(params)
    moved = {
        path: ((1 - momentum) * flat[path] + momentum * new).astype(flat[path].dtype)
        for path, new in moments.items()
    }
    return tree.unflatten(flat | moved)


def stack_blocks(params: Params, where: Params | None = None) -> Params:
    """A backbone's parameters with those of all its blocks, which are alike, in one: [L, …] each.

    The layout of a network that runs its blocks in a loop (`DecoderConfig.scan`), made one
    parameter at a time.

    Args:
      where: a tree like the result, of the shardings that it gets.
    """
    blocks = [tree.flatten(params["blocks"][str(i)]) for i in range(len(params["blocks"]))]
    places = {} if where is None else tree.flatten(where["blocks"])
    stack = {}
    for name in blocks[0]:
        stacked = jax.jit(_stacked, out_shardings=places.get(name))
        stack[name] = stacked([block[name] for block in blocks])
    return params | {"blocks": tree.unflatten(stack)}


def _stacked(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack(leaves)


def unstack_blocks(params: Params, chosen: Iterable[int] | None = None) -> Params:
    """The inverse of `stack_blocks`; of all blocks, or of those `chosen` (from 0)."""
    if chosen is None:
        chosen = range(jax.tree.leaves(params["blocks"])[0].shape[0])
    blocks = {str(i): jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in chosen}
    return params | {"blocks": blocks}


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A module → (hashable graph definition, nested dict of arrays)."""
    definition, state = nnx.split(module)
    return definition, nnx.to_pure_dict(state)


def abstract(build, *args) -> tuple[nnx.GraphDef, Params]:
    """Like `split(build(rngs))`, with `jax.ShapeDtypeStruct` leaves and no memory or compute."""
    return split(nnx.eval_shape(lambda: build(nnx.Rngs(0), *args)))


def described(config: BackboneConfig) -> tuple[nnx.GraphDef, Params]:
    """`abstract` of a whole network."""
    definition, params = _described(config)
    return definition, jax.tree.map(lambda x: x, params)  # dicts of the caller's own


@functools.lru_cache(maxsize=16)  # every program asks
def _described(config: BackboneConfig) -> tuple[nnx.GraphDef, Params]:
    if config.scan:  # whose blocks are one, drawn from split keys
        return abstract(config.build)
    return split(nnx.eval_shape(lambda: config.build(_Undrawn())))


class _Undrawn:
    """`nnx.Rngs` where only shapes are asked for: it gives one key, and does not count.

    Counting under a trace takes time that grows with the square of what was drawn; of a network of
    30 blocks, most of a second.
    """

    def __init__(self):
        self._key = jax.random.key(0)

    def __call__(self) -> jax.Array:
        return self._key

    def __getattr__(self, name: str) -> "_Undrawn":
        return self


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def init(config: BackboneConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Parameters drawn at random."""
    _, params = split(config.build(nnx.Rngs(key)))
    return jax.tree.map(lambda x: x.astype(dtype), params)


def merge(definition: nnx.GraphDef, params: Params) -> nnx.Module:
    """The inverse of `split`; call it inside the jitted function."""
    return nnx.merge(definition, params)
