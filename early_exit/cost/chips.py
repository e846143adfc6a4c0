"""What a program costs on chips that need not be here: does it fit, and how long does it take?

The one idea: the compiler for a TPU runs on any host, and what it compiles says all that is asked:
bytes of each chip's memory, matrix products, what goes between chips, and cycles.
"""

import collections
import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

from early_exit.cost import multiply_adds, programs

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip.

    Attributes:
      memory: bytes that the compiler may use of its HBM.
      flops: dense bfloat16, a second.
      bandwidth: of its HBM, bytes a second.
      hertz: of the clock that XLA's cycles are of.
      ring: bytes a second that a ring of chips passes on, both ways round, along one axis of the
        torus (Austin et al. 2025, How to Scale Your Model, ch. 2).
    """

    memory: int
    flops: float
    bandwidth: float
    hertz: float
    ring: float


CHIPS = {
    "v5e": Chip(int(15.75 * GIB), 197e12, 0.82e12, 1.5e9, 0.9e11),
    "v5p": Chip(int(95.73 * GIB), 459e12, 2.77e12, 1.75e9, 1.8e11),
    "v6e": Chip(int(31.24 * GIB), 918e12, 1.64e12, 1.75e9, 1.8e11),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one call of a program costs each chip.

    Attributes:
      chips: how many there are.
      chip: their kind; None for devices without a known peak, such as CPUs.
      arguments: bytes of what the program is given: parameters, state and batch.
      needed: bytes it needs in all.
      temporaries: bytes for what is made and dropped on the way; None where it does not fit.
      traced_flops: of the matrix products in the program as it was traced, on all chips together.
      program: what the compiled program does; None where it does not fit.
    """

    chips: int
    chip: Chip | None
    arguments: int
    needed: int
    temporaries: int | None
    traced_flops: int
    program: programs.Program | None

    @property
    def spare(self) -> float:
        """Bytes of memory that are left; below 0 where the program does not fit."""
        return math.inf if self.chip is None else self.chip.memory - self.needed

    @property
    def flops_ratio(self) -> float:
        """Matrix products compiled ÷ traced; above 1 where chips do the same work twice."""
        return self.program.flops * self.chips / self.traced_flops

    @property
    def compute_seconds(self) -> float:
        """XLA's estimate without what goes between chips, loops counted as often as they turn.

        Kernels written for the chip, such as that of attention, have no cycles in it.
        """
        return self.program.cycles / self.chip.hertz

    @property
    def exchange_seconds(self) -> float:
        """What goes between chips, one after the other, each in one ring."""
        return sum(each.sent for each in self.program.collectives) / self.chip.ring

    @property
    def seconds(self) -> float:
        """Of one call, if nothing is sent while something is computed."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """These seconds by what they hang on.

        `products` are XLA's for instructions with matrix products, at whatever part of the peak;
        `memory` all else that a chip does, which is reading, writing and its vector unit; `network`
        what goes between chips. The largest bounds the program.
        """
        products = self.program.product_cycles / self.chip.hertz
        return {
            "products": products,
            "memory": self.compute_seconds - products,
            "network": self.exchange_seconds,
        }

    @property
    def bound(self) -> str:
        """Which of the `parts` is the largest."""
        return max(self.parts, key=self.parts.get)

    def exchanged(self) -> list[tuple[str, str, int, float, float]]:
        """(kind, axes, runs, bytes of the results on a chip, bytes it sends), most bytes first."""
        totals = collections.defaultdict(lambda: [0, 0, 0.0])
        for each in self.program.collectives:
            total = totals[each.kind, " × ".join(each.axes) or "?"]
            for index, more in enumerate((each.times, each.bytes, each.sent)):
                total[index] += more
        rows = [(*key, *total) for key, total in totals.items()]
        return sorted(rows, key=lambda row: -row[-1])

    def advice(self) -> str:
        """What to change where it does not fit."""
        if self.arguments > 0.7 * self.chip.memory:
            return (
                "parameters and state alone take that much: split them further (mesh.tensor, or "
                "mesh.fsdp in place of mesh.data), or take more chips"
            )
        return (
            "most of it is made on the way: take fewer rows a chip (data.batch_size, mesh.data), "
            "split each further (mesh.tensor), or recompute more (model.remat=block)"
        )


def estimate(traced: Any, args: Any, mesh: Mesh, chip: Chip | None) -> Estimate:
    """Compiles a traced program for a mesh and reads what it costs.

    Args:
      traced: `jax.jit(…).trace(*args)`.
      args: shapes with shardings.
    """
    arguments = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(args))
    flops = 2 * multiply_adds.traced_multiply_adds(traced.jaxpr)
    known = {"chips": mesh.size, "chip": chip, "arguments": arguments, "traced_flops": flops}
    if chip is not None and arguments > chip.memory:  # no need to compile
        return Estimate(**known, needed=arguments, temporaries=None, program=None)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return Estimate(**known, needed=needed, temporaries=None, program=None)
    memory = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # All arguments, also those that the program does not look at: they are there.
    fixed = arguments + memory.generated_code_size_in_bytes
    return Estimate(
        **known,
        needed=fixed + new + memory.temp_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        program=programs.read(compiled.as_text(), dict(mesh.shape)),
    )


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _needed(message: str) -> int | None:
    """Bytes that a program would have needed, from what XLA says where they are not there."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", message)
    if not found:
        return None
    number, unit = found[1] or found[3], found[2] or found[4]
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))
