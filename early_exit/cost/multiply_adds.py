"""What the parts of a model cost: multiply-adds and bytes, from shapes alone.

The one idea: the cost is read from the traced program. Every matrix product and convolution in it
is counted, whatever the family, and the parameters that it uses are what must be read. No weight
is needed, and nothing runs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from early_exit import tree
from early_exit.backbones import base
from early_exit.exits import heads
from early_exit.exits.multi_exit import MultiExit
from early_exit.exits.recurrent import Recurrent

# How jax names what `jax.checkpoint` computes again.
_AGAIN = "rematted_computation"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one part for one input.

    Attributes:
      multiply_adds: of matrix products and convolutions; elementwise work is not counted.
      bytes: of the parameters that are read.
    """

    multiply_adds: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.multiply_adds + other.multiply_adds, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class BackboneCost:
    """Of one input: a token (without attention to others), or an image.

    Attributes:
      stem: what comes before the first block; nothing where that is a look-up.
      blocks: each block, first to last.
      readout: what follows the last block; nothing for a network without an output matrix.
      hidden: shapes of the hidden states after each block.
      context: what the blocks need beside them, as shapes.
    """

    stem: Cost
    blocks: tuple[Cost, ...]
    readout: Cost
    hidden: tuple[Any, ...]
    context: Any

    @property
    def full(self) -> Cost:
        return sum(self.blocks, self.stem + self.readout)

    @property
    def mean_block(self) -> tuple[float, float]:
        """(multiply-adds, bytes)."""
        total, depth = sum(self.blocks, Cost()), len(self.blocks)
        return total.multiply_adds / depth, total.bytes / depth

    def before(self, point: int) -> Cost:
        """What has been run when the hidden states after block `point` are there."""
        return sum(self.blocks[:point], self.stem)


def multiply_adds(function: Callable, *args) -> int:
    """In one call of `function`; `args` may be shapes. Loops of unknown length count once."""
    return traced_multiply_adds(jax.make_jaxpr(function)(*args))


def traced_multiply_adds(traced: jax.extend.core.ClosedJaxpr, *, again: bool = True) -> int:
    """The same of a program that has been traced.

    Args:
      again: whether to count what a backward pass computes a second time (`jax.checkpoint`).
    """
    return _multiply_adds(traced.jaxpr, again)


def _multiply_adds(jaxpr, again: bool = True) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if not again and _AGAIN in str(equation.source_info.name_stack):
            continue
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "ragged_dot_general":  # a row meets the matrix of its own group alone
            total += equation.outvars[0].aval.size * equation.invars[0].aval.shape[-1]
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += equation.outvars[0].aval.size * kernel.size // outputs
        else:
            subs = jax.extend.core.jaxprs_in_params(params)
            inner = [_multiply_adds(sub, again) for sub in subs]
            times = params["length"] if name == "scan" else 1
            total += times * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def cost_of(
    function: Callable,
    params: base.Params,
    *args,
    share_read: Callable[[str], float] = lambda path: 1.0,
) -> Cost:
    """Of `function(params, *args)`: only the parameters that it uses are read.

    Args:
      share_read: path → what is read of a parameter (`BackboneConfig.share_read`).
    """
    traced = jax.make_jaxpr(function)(params, *args).jaxpr
    used = {
        variable
        for equation in traced.eqns
        for variable in equation.invars
        if not isinstance(variable, jax.extend.core.Literal)
    }
    leaves = zip(tree.flatten(params).items(), traced.invars, strict=False)
    read = {path: leaf for (path, leaf), var in leaves if var in used}
    return Cost(_multiply_adds(traced), bytes_read(read, share_read))


def bytes_read(params: base.Params, share_read: Callable[[str], float]) -> int:
    """Of parameters, arrays or shapes, what one position reads; see `cost_of`."""
    sizes = {path: tree.size_in_bytes([leaf]) for path, leaf in tree.flatten(params).items()}
    return round(sum(size * share_read(f"/{path}") for path, size in sizes.items()))


def backbone(
    config: base.BackboneConfig, dtype=jnp.float32, inputs: dict | None = None
) -> BackboneCost:
    """The cost of a backbone with parameters of that dtype.

    Args:
      inputs: what the stem takes, as shapes; the config's `example_inputs` if not given.
    """
    if config.scan:  # how the blocks are run does not change what one costs
        config = dataclasses.replace(config, scan=False)
    definition, params = base.described(config)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)

    def stem(params, inputs):
        return base.merge(definition, params).stem(inputs)

    inputs = config.example_inputs() if inputs is None else inputs
    first = cost_of(stem, params, inputs)
    if not first.multiply_adds:  # a look-up reads rows of its tables, not the tables
        first = Cost()
    hidden, context = jax.eval_shape(stem, params, inputs)
    blocks, shapes, known = [], [], {}
    for index in range(config.depth):
        # Blocks of the same parameters and input cost the same, and tracing is slow.
        own = tree.flatten(params["blocks"][str(index)])
        like = tuple((name, leaf.shape) for name, leaf in own.items()), hidden.shape
        if like not in known:

            def block(params, hidden, context, index=index):
                network = base.merge(definition, params)
                return network.run_blocks(hidden, index, index + 1, context)

            out = jax.eval_shape(block, params, hidden, context)
            cost = cost_of(block, params, hidden, context, share_read=config.share_read)
            known[like] = cost, out
        cost, hidden = known[like]
        blocks.append(cost)
        shapes.append(hidden)

    def readout(params, hidden, context):
        return base.merge(definition, params).readout(hidden, context)

    last = cost_of(readout, params, hidden, context) if config.num_classes else Cost()
    return BackboneCost(first, tuple(blocks), last, tuple(shapes), context)


def head(
    config: base.BackboneConfig, exits: heads.ExitConfig, of: BackboneCost, point: int, dtype
) -> tuple[Cost, int]:
    """(cost of evaluating the head after block `point`, how many parameters it has of its own)."""
    definition, params = base.abstract(lambda rngs: heads.Head(config, exits, point, rngs=rngs))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    rows = exits.classes + 1 if exits.classes else config.num_classes
    table = jax.ShapeDtypeStruct((rows, exits.width(config, point)), dtype)
    earlier = [jax.ShapeDtypeStruct((1, rows), jnp.float32)] * exits.points.index(point)

    def call(params, hidden, context, earlier):
        head = base.merge(definition, params["head"])
        features, _ = head.features(hidden, context)
        found = [base.logits(features, params["table"])]
        if hasattr(head, "cascade"):
            found[0] += head.cascade(earlier[-1])
        if hasattr(head, "ensemble"):
            found.append(head.ensemble([*earlier, found[0]]))
        if hasattr(head, "gate"):
            found.append(head.gate_score(hidden, context))
        return found

    everything = {"head": params, "table": table}
    inputs = of.hidden[point - 1], of.context, earlier
    cost = cost_of(call, everything, *inputs, share_read=config.share_read)
    return cost, tree.count(params)


def draft(
    config: base.BackboneConfig, exits: heads.ExitConfig, of: BackboneCost, dtype
) -> tuple[Cost, int]:
    """(cost of a step of the recurrent exit, how many parameters it has of its own)."""
    rows = exits.own_rows(config.num_classes)
    how = config, exits.recurrent_taps, exits.recurrent_blocks, rows
    definition, params = base.abstract(lambda rngs: Recurrent(*how, rngs=rngs))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    rows = exits.classes + 1 if exits.classes else config.num_classes
    table = jax.ShapeDtypeStruct((rows, config.width), dtype)

    def call(params, before, embedded, context):
        head = base.merge(definition, params["head"])
        hidden = head.joined(before, embedded)
        for block in head.own_blocks:
            hidden, _ = block(hidden, context)
        return base.logits(head.features(head.deeper(hidden)), params["table"])

    hidden = of.hidden[-1]
    inputs = {"head": params, "table": table}, hidden, hidden, of.context
    cost = cost_of(call, *inputs, share_read=config.share_read)
    return cost, tree.count(params)


def leaving(model: MultiExit, of: BackboneCost) -> np.ndarray:
    """Multiply-adds of all that is run for an input that leaves at each exit: float64 [E + 1].

    The heads that it passed on the way are among it.

    Args:
      of: the backbone's.
    """
    passed, costs = Cost(), []
    for point in model.exits.points:
        passed += head(model.config, model.exits, of, point, jnp.float32)[0]
        costs.append((of.before(point) + passed).multiply_adds)
    return np.array([*costs, (of.full + passed).multiply_adds], np.float64)
