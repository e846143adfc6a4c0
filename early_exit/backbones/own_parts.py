"""The parts of somebody's NNX module: where they lie, how they are called, which weights they read.

The one idea: which weights are a block's is not asked of the module tree but read from the trace of
that block: what it alone reads is its own. So blocks may be modules or methods, and widths, classes
and weights are found by one abstract run.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal

from early_exit.backbones import base

Make = Callable[[nnx.Rngs], nnx.Module]
# (hidden states, context) → what one prediction is made from, [B, D].
Pool = Callable[[jax.Array, Any], jax.Array]
_POOLS = ("mean", "first")

_Path = tuple[str | int, ...]  # as NNX spells where a variable is


@dataclasses.dataclass(frozen=True)
class Places:
    """A network, and where its parts lie; see `own.wrap`.

    Attributes:
      make: draws the network.
      inputs: (name, shape, dtype) of the arrays that the stem takes.
      blocks, stem, output, features: where the parts lie.
      pooling: how a prediction is made from hidden states with more axes than [B, D].
      classifies: whether there is one for a whole row.
    """

    make: Make
    inputs: tuple[tuple[str, tuple[int, ...], str], ...]
    blocks: tuple[str, ...]
    stem: str
    output: str
    features: str
    pooling: str | Pool
    classifies: bool

    incidental: ClassVar[tuple[str, ...]] = ("make", "inputs")

    def __post_init__(self):
        if isinstance(self.pooling, str) and self.pooling not in _POOLS:
            raise ValueError(
                f"unknown pooling {self.pooling!r}; choose one of {', '.join(_POOLS)}, or give a "
                "function of hidden states and context"
            )
        if not self.classifies and self.reads != "tokens":
            raise ValueError("a language model reads tokens; name them among the inputs")
        if not (self.blocks and self.inputs):
            raise ValueError("a network needs inputs, and blocks to stop between; name them")

    @property
    def reads(self) -> str:
        """`tokens`, `images`, or what else its first input is called."""
        names = [name for name, _, _ in self.inputs]
        return next((kind for kind in ("tokens", "images") if kind in names), names[0])

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the inputs."""
        return {name: jax.ShapeDtypeStruct(*rest) for name, *rest in self.inputs}

    def pool(self, hidden: jax.Array, context: Any) -> jax.Array:
        """Hidden states → what one prediction is made from."""
        if not self.classifies or hidden.ndim == 2:
            return hidden
        if callable(self.pooling):
            return self.pooling(hidden, context)
        if self.pooling == "first":
            return hidden.reshape(len(hidden), -1, hidden.shape[-1])[:, 0]
        between = tuple(range(1, hidden.ndim - 1))
        return hidden.mean(between, dtype=jnp.float32).astype(hidden.dtype)

    def list_blocks(self, network: nnx.Module) -> list[Callable]:
        """Every block, first to last."""
        blocks = []
        for where in self.blocks:
            part = found(network, where)
            if isinstance(part, nnx.Sequential):
                part = part.layers
            if isinstance(part, (dict, nnx.Dict)):
                if not all(key.isdecimal() for key in part):
                    raise ValueError(
                        f"{where!r} of the network keeps no order; name its parts, "
                        f"{', '.join(part)}, one by one"
                    )
                part = [part[key] for key in sorted(part, key=int)]
            blocks += part if isinstance(part, (nnx.List, list, tuple)) else [part]
        return blocks

    def enter(self, network: nnx.Module, inputs: Mapping[str, jax.Array]) -> tuple[Any, Any]:
        """(hidden states, context) of the inputs; the context is None where there is none."""
        stem = found(network, self.stem)
        is_module = isinstance(stem, nnx.Module)
        out = stem(inputs[self.reads]) if is_module else stem(dict(inputs))
        return out if isinstance(out, tuple) else (out, None)

    def read_out(self, network: nnx.Module, hidden: jax.Array, context: Any) -> jax.Array:
        """Hidden states after the last block → features."""
        if self.features:
            part = found(network, self.features)
            alone = context is None or not self.classifies or isinstance(part, nnx.Module)
            hidden = part(hidden) if alone else part(hidden, context)
        return self.pool(hidden, context)


class Leaf(NamedTuple):
    """A variable of the network, and where it stands among our parameters.

    Attributes:
      theirs: path in the network's state.
      ours: path as `tree.flatten` spells it.
      transposed: whether ours is the transpose: the kernel [D, C] of the last layer.
      learns: whether it is a weight; running statistics are none.
      is_read: whether a part of the network reads it.
    """

    theirs: _Path
    ours: str
    transposed: bool
    learns: bool
    is_read: bool
    like: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an abstract run has found of a network.

    Attributes:
      definition: the network without its variables.
      leaves: its variables.
      idle: path → shape of what no part reads: random numbers, for dropout.
      hidden: after each block, shapes.
      width: of the features.
      num_classes: rows of the output matrix.
      rows: (K, d) of each array that a block leaves of a position; () for blocks without a cache.
    """

    definition: nnx.GraphDef
    leaves: tuple[Leaf, ...]
    idle: Mapping[_Path, jax.ShapeDtypeStruct]
    hidden: tuple[jax.ShapeDtypeStruct, ...]
    width: int
    num_classes: int
    rows: tuple[tuple[tuple[int, int], ...], ...]


def merged(plan: Plan, values: Sequence[jax.Array | None]) -> nnx.Module:
    """The network with these values of its leaves; zeros for None, of what is left out."""
    state = {
        leaf.theirs: jnp.zeros(leaf.like.shape, leaf.like.dtype) if value is None else value
        for leaf, value in zip(plan.leaves, values, strict=True)
    }
    return _together(plan.definition, state, plan.idle)


def _together(definition: nnx.GraphDef, state: dict, idle: Mapping) -> nnx.Module:
    """The network with this state; of random numbers, which nobody draws, it has some."""
    state = state | {path: _idle(like) for path, like in idle.items()}
    return nnx.merge(definition, nnx.from_flat_state(state))


def _idle(like: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), like.shape)
    return jnp.zeros(like.shape, like.dtype)


def found(network: nnx.Module, where: str) -> Any:
    """What lies there.

    Raises:
      ValueError: nothing does.
    """
    node = network
    for key in where.split("."):
        try:
            node = node[int(key)] if key.isdecimal() else _named(node, key)
        except (AttributeError, KeyError, IndexError, TypeError):
            there = ", ".join(sorted(name for name in vars(network) if not name.startswith("_")))
            raise ValueError(
                f"the network has no {where!r}; at its top it has {there}, and methods"
            ) from None
    return node


def _named(node: Any, key: str) -> Any:
    return node[key] if isinstance(node, (dict, nnx.Dict)) else getattr(node, key)


def run(block: Callable, hidden: jax.Array, context: Any) -> tuple[jax.Array, base.Rows]:
    """(hidden states after the block, the rows that it leaves in a cache, if it does)."""
    if isinstance(block, base.CachedBlock):
        return block(hidden, context)
    return (block(hidden) if context is None else block(hidden, context)), ()


def spelt(path: _Path) -> str:
    return ".".join(map(str, path))


@functools.lru_cache(maxsize=16)
def plan(places: Places) -> Plan:
    """The abstract run: every part, on shapes, and what each reads."""
    network = nnx.eval_shape(lambda: places.make(nnx.Rngs(0)))
    network.eval()
    definition, state = nnx.split(network)
    variables = dict(nnx.to_flat_state(state))
    _check_kinds(variables)
    like = {path: variable.get_value() for path, variable in variables.items()}
    idle = {path: like.pop(path) for path, x in variables.items() if isinstance(x, nnx.RngState)}
    matrix = _matrix(places, like)

    def traced(what: str, part: Callable, *args) -> tuple[Any, set[_Path]]:
        """(what a part returns, as shapes; which variables it reads)."""

        def run(values, *args):
            return part(_together(definition, dict(zip(like, values, strict=True)), idle), *args)

        try:
            program, out = jax.make_jaxpr(run, return_shape=True)(list(like.values()), *args)
        except Exception as error:  # whatever is wrong with somebody's network
            raise ValueError(f"{what} of the network does not run: {error}") from error
        used = {x for e in program.jaxpr.eqns for x in e.invars if not isinstance(x, Literal)}
        return out, {path for path, x in zip(like, program.jaxpr.invars, strict=False) if x in used}

    (hidden, context), shared = traced(
        f"the stem {places.stem!r}", lambda network, x: places.enter(network, x), places.shapes
    )
    _check_stem(places, network, hidden)
    _check_context(places, traced, context)
    shapes, rows, reads = [], [], []
    for index in range(len(places.list_blocks(network))):

        def block(network, *x, index=index):
            return run(places.list_blocks(network)[index], *x)

        (hidden, left), read = traced(f"block {index + 1}", block, hidden, context)
        _check_block(places, index + 1, hidden, context)
        shapes.append(hidden)
        rows.append(tuple(x.shape[2:] for x in left))
        reads.append(read)
    features, read = traced(
        "the readout", lambda network, *x: places.read_out(network, *x), hidden, context
    )
    table = like[matrix[0]].shape
    classes, width = table[::-1] if matrix[0][-1] == "kernel" else table
    _check_readout(places, features, width, rows)
    leaves = _arranged(variables, like, matrix, reads, shared | read)
    return Plan(definition, leaves, idle, tuple(shapes), width, classes, tuple(rows))


def _matrix(places: Places, like: Mapping[_Path, jax.ShapeDtypeStruct]) -> list[_Path]:
    """Where the variables of the last layer are, its matrix first."""
    where = tuple(places.output.split("."))
    there = {path[-1]: path for path in like if tuple(map(str, path[:-1])) == where}
    for names in (("kernel", "bias"), ("kernel",), ("embedding",)):
        if there.keys() == set(names) and len(like[there[names[0]]].shape) == 2:
            return [there[name] for name in names]
    listed = ", ".join(f"{name} {list(like[path].shape)}" for name, path in there.items())
    raise ValueError(
        f"the output {places.output!r} is no linear layer (kernel [D, C], bias [C]) and no table "
        f"(embedding [C, D]); it has {listed or 'nothing'}"
    )


def _arranged(
    variables: Mapping[_Path, nnx.Variable],
    like: Mapping[_Path, jax.ShapeDtypeStruct],
    matrix: Sequence[_Path],
    reads: Sequence[set[_Path]],
    shared: set[_Path],
) -> tuple[Leaf, ...]:
    """Where every variable stands among our parameters.

    Args:
      reads: what each block does.
      shared: what stem and readout do.

    Raises:
      ValueError: a block that has nothing of its own.
    """
    everywhere = shared.union(*reads)
    ours = {matrix[0]: "output/embedding"} | {path: "output/bias" for path in matrix[1:]}
    for index, read in enumerate(reads):
        others = set().union(shared, matrix, *(x for i, x in enumerate(reads) if i != index))
        own = sorted(read - others, key=spelt)
        if not own:
            raise ValueError(
                f"block {index + 1} of the network has no weights of its own; name it and its "
                "neighbour as one block"
            )
        heads = [path[:-1] for path in own]
        skip = next(
            (k for k, keys in enumerate(zip(*heads, strict=False)) if len(set(keys)) > 1),
            min(map(len, heads)),
        )
        ours |= {path: "/".join(("blocks", str(index), *map(str, path[skip:]))) for path in own}
    return tuple(
        Leaf(
            theirs=path,
            ours=ours.get(path) or "/".join(("network", *map(str, path))),
            transposed=path == matrix[0] and path[-1] == "kernel",
            learns=isinstance(variables[path], nnx.Param),
            is_read=path in everywhere,
            like=shape,
        )
        for path, shape in like.items()
    )


def _check_kinds(variables: Mapping[_Path, nnx.Variable]) -> None:
    for path, variable in variables.items():
        kind, dtype = type(variable).__name__, variable.get_value().dtype
        state = isinstance(variable, (nnx.Cache, nnx.Intermediate))
        if state or not (isinstance(variable, nnx.RngState) or jnp.issubdtype(dtype, jnp.floating)):
            raise ValueError(
                f"{spelt(path)} of the network is a {kind} of {dtype}, which is neither a weight "
                "nor a statistic; a network here keeps nothing from call to call"
            )


def _check_stem(places: Places, network: nnx.Module, hidden: Any) -> None:
    axes = None if places.classifies else 3
    _check_hidden(places, f"the stem {places.stem!r}", hidden, axes)
    if not places.classifies and isinstance(found(network, places.stem), nnx.Module):
        raise ValueError(
            f"the stem {places.stem!r} is a submodule, which gets the tokens alone; a row of a "
            "language model's holds several texts, so let it be a method of all inputs, which "
            "reads `documents` and `positions` where they are given"
        )


def _check_context(places: Places, traced: Callable, context: Any) -> None:
    """Classifying, rows part ways, and each takes along its part of the context."""
    if not (places.classifies and jax.tree.leaves(context)):
        return
    more = {
        name: jax.ShapeDtypeStruct((x.shape[0] + 1, *x.shape[1:]), x.dtype)
        for name, x in places.shapes.items()
    }
    (_, wider), _ = traced("the stem", lambda network, x: places.enter(network, x), more)
    shared = [
        str(list(before.shape))
        for before, after in zip(jax.tree.leaves(context), jax.tree.leaves(wider), strict=True)
        if after.shape[:1] != (before.shape[0] + 1 if before.shape else None,)
    ]
    if shared:
        raise ValueError(
            f"the stem {places.stem!r} gives context of the shapes {', '.join(shared)}, which does "
            "not have the rows in front; what is the same for all rows, let blocks make or hold"
        )


def _check_hidden(places: Places, what: str, hidden: Any, axes: int | None = None) -> None:
    rows, shape = places.inputs[0][1][0], getattr(hidden, "shape", ())
    if len(shape) < 2 or shape[0] != rows or (axes and len(shape) != axes):
        wanted = "[B, T, D]" if axes else "[B, …, D]"
        raise ValueError(
            f"{what} of the network gives {hidden} for {rows} rows; hidden states are one array, "
            f"{wanted}"
        )


def _check_block(places: Places, number: int, hidden: Any, context: Any) -> None:
    _check_hidden(places, f"block {number}", hidden, None if places.classifies else 3)
    if not places.classifies:
        return
    try:
        pooled = jax.eval_shape(places.pool, hidden, context).shape
    except Exception as error:  # whatever is wrong with somebody's function
        raise ValueError(f"pooling does not run after block {number}: {error}") from error
    if pooled != (hidden.shape[0], hidden.shape[-1]):
        raise ValueError(
            f"pooling makes {list(pooled)} of the hidden states {list(hidden.shape)} after block "
            f"{number}; heads there read [B, {hidden.shape[-1]}]"
        )


def _check_readout(places: Places, features: Any, width: int, rows: Sequence[tuple]) -> None:
    if features.ndim != (2 if places.classifies else 3) or features.shape[-1] != width:
        wanted = f"[B, {width}]" if places.classifies else f"[B, T, {width}]"
        raise ValueError(
            f"the output {places.output!r} reads {wanted}, but gets {list(features.shape)}; name "
            "the part in between as features, or give another pooling"
        )
    if any(rows) and not all(rows):
        raise ValueError("some blocks are CachedBlocks and some are not; let all be, or none")
