"""What a compiled program does on each chip: matrix products, collectives, cycles; from its text.

The one idea: XLA's own cost analysis counts the body of a loop once, and says nothing of what goes
between chips. Both stand in the text of the compiled program (HLO): here it is read instruction by
instruction, and each one counted as often as the loops around it turn.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b(pred|token|opaque|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(?:ENTRY )?%?([^\s(]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D.*", "", self.dtype[1:]) or 0)
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shapes: of the result; several where it is a tuple.
      operands: names of instructions of the same computation.
      rest: everything behind the operands.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    constant: str
    rest: str

    def attribute(self, name: str) -> str:
        """`name=…`, braces off; empty if there is none."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.rest)
        return found[1].strip("{}") if found else ""

    def numbers(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in self.attribute(name).split(",") if n)


@dataclasses.dataclass(frozen=True)
class Computation:
    instructions: Mapping[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that sends data between chips.

    Attributes:
      kind: one of `COLLECTIVES`.
      shape: the largest array it yields, on each chip.
      times: how often it runs.
      group: how many chips take part in each exchange.
      axes: along which axes of the mesh these differ; empty if they are not known.
      source: the operation of the program that it belongs to.
    """

    kind: str
    shape: Shape
    times: int
    group: int
    axes: tuple[str, ...]
    source: str

    @property
    def bytes(self) -> int:
        """Of its results on each chip, all runs together."""
        return self.shape.bytes * self.times

    @property
    def sent(self) -> float:
        """Bytes that each chip sends, in a ring, all runs together."""
        others = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * others, "reduce-scatter": self.group * others}
        factor |= {"collective-permute": 1.0}
        return self.bytes * factor.get(self.kind, others)


@dataclasses.dataclass(frozen=True)
class Program:
    """What one chip does in one call.

    Attributes:
      flops: of matrix products and convolutions, two for a multiply-add.
      cycles: XLA's estimate for everything but collectives; 0 where the compiler gives none.
      product_cycles: of these, the ones of instructions with a matrix product in them.
      collectives: what goes between chips.
      open_loops: loops that turn until some condition holds; what is in them is counted once.
    """

    flops: int
    cycles: int
    product_cycles: int
    collectives: tuple[Collective, ...]
    open_loops: int


def read(text: str, mesh: Mapping[str, int]) -> Program:
    """What a compiled program does.

    Args:
      text: of the optimised HLO, `compiled.as_text()`.
      mesh: sizes of its axes, in the order of the devices.
    """
    return _Reader(*_parsed(text), mesh).program()


def _parsed(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, the name of the entry)."""
    found, entry, name = {}, "", None
    for line in _COMMENT.sub("", text).splitlines():
        if head := _HEAD.match(line):
            name, lines, root = head[1], {}, ""
            entry = name if line.startswith("ENTRY") else entry
        elif line == "}" and name is not None:
            found[name], name = Computation(lines, root), None
        elif name is not None and (parts := _LINE.match(line)):
            instruction = _instruction(parts[2], parts[3])
            lines[instruction.name] = instruction
            root = instruction.name if parts[1] else root
    return found, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    result, text = text[:end], text[end:].lstrip()
    opening = text.index("(")
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing]
    return Instruction(
        name=name,
        shapes=tuple(
            Shape(dtype, tuple(int(d) for d in dims.split(",") if d))
            for dtype, dims in _SHAPE.findall(result)
        ),
        opcode=text[:opening],
        operands=tuple(re.findall(r"%([^\s,()]+)", inside)),
        constant=inside,
        rest=text[closing + 1 :],
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens there closes."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index
    raise ValueError(f"not HLO: a parenthesis is not closed in {text[:200]!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    computations: dict[str, Computation]
    entry: str
    mesh: Mapping[str, int]

    def program(self) -> Program:
        flops = cycles = product_cycles = open_loops = 0
        collectives = []
        for computation, instruction, times, fused in self._walk(self.entry):
            flops += 2 * self._multiply_adds(computation, instruction) * times
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                if _begins(instruction, computation):
                    collectives.append(self._collective(kind, instruction, times))
            elif not fused:
                cycles += _cycles(instruction) * times
                if self._has_product(computation, instruction):
                    product_cycles += _cycles(instruction) * times
            if instruction.opcode == "while" and self._turns(instruction) is None:
                open_loops += 1
        return Program(flops, cycles, product_cycles, tuple(collectives), open_loops)

    def _walk(self, name: str, times: int = 1, fused: bool = False) -> Iterator:
        """(computation, instruction, how often it runs, whether it is part of a fused one)."""
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield computation, instruction, times, fused
            if instruction.opcode == "while":
                turns = self._turns(instruction)
                turns = 1 if turns is None else turns
                yield from self._walk(_name(instruction.attribute("body")), times * turns, fused)
            elif instruction.opcode == "conditional":
                # One branch runs: the one that takes longest stands for all.
                branches = self._branches(instruction)
                yield from self._walk(max(branches, key=self._weight), times, fused)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                inside = fused or instruction.opcode == "fusion"
                called = instruction.attribute("calls") or instruction.attribute("to_apply")
                yield from self._walk(_name(called), times, inside)

    def _branches(self, instruction: Instruction) -> list[str]:
        listed = instruction.attribute("branch_computations").split(",")
        pair = [instruction.attribute(f"{which}_computation") for which in ("true", "false")]
        return [_name(branch) for branch in listed + pair if branch]

    @functools.cache  # noqa: B019 - a reader lives as long as one call
    def _weight(self, name: str) -> tuple[int, int]:
        """(cycles, which not every compiler estimates, multiply-adds)."""
        cycles = multiply_adds = 0
        for computation, instruction, times, fused in self._walk(name):
            cycles += 0 if fused else times * _cycles(instruction)
            multiply_adds += times * self._multiply_adds(computation, instruction)
        return cycles, multiply_adds

    def _has_product(self, computation: Computation, instruction: Instruction) -> bool:
        """Whether it, or what is fused into it, multiplies matrices."""
        if instruction.opcode == "fusion":
            return self._weight(_name(instruction.attribute("calls")))[1] > 0
        return self._multiply_adds(computation, instruction) > 0

    def _multiply_adds(self, computation: Computation, instruction: Instruction) -> int:
        if instruction.opcode not in ("dot", "convolution"):
            return 0
        lhs, rhs = (computation.instructions[name].shapes[0] for name in instruction.operands)
        if instruction.opcode == "dot":
            contracted = instruction.numbers("lhs_contracting_dims")
            out = math.prod(instruction.shapes[0].dims)
            return out * math.prod(lhs.dims[axis] for axis in contracted)
        return _convolution(instruction, lhs, rhs)

    def _collective(self, kind: str, instruction: Instruction, times: int) -> Collective:
        shape = max(instruction.shapes, key=lambda shape: shape.bytes)
        if kind == "reduce-scatter" and instruction.opcode != kind:
            shape = instruction.shapes[-1]  # of (operand, result)
        members = _first_group(instruction, math.prod(self.mesh.values()))
        places = np.stack(np.unravel_index(members, tuple(self.mesh.values())))
        axes = [name for name, along in zip(self.mesh, places, strict=True) if np.ptp(along)]
        if kind == "all-reduce" and len(instruction.shapes) > 1 and instruction.opcode == kind:
            # Several arrays reduced together.
            size = sum(part.bytes for part in instruction.shapes)
            shape = Shape("u8", (size,))
        source = re.search(r'op_name="([^"]*)"', instruction.rest)
        return Collective(
            kind, shape, times, len(members), tuple(axes), source[1] if source else ""
        )

    def _turns(self, loop: Instruction) -> int | None:
        """How often a loop turns; None where no constant says so.

        Loops count up from 0 to a constant in their condition: those of `lax.scan` by 1, those
        that the compiler has unrolled by more.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if known:
            return int(known[1])
        condition = _name(loop.attribute("condition"))
        limits = {
            int(instruction.constant)
            for name in self._within(condition)
            for instruction in self.computations[name].instructions.values()
            if instruction.opcode == "constant" and instruction.constant.isdecimal()
        }
        counters = [
            int(instruction.attribute("index"))
            for instruction in self.computations[condition].instructions.values()
            if instruction.opcode == "get-tuple-element"
        ]
        if len(limits) != 1 or len(counters) != 1:
            return None
        body = self.computations[_name(loop.attribute("body"))]
        return limits.pop() // _step(body, counters[0])

    def _within(self, name: str) -> list[str]:
        """A computation and those that it has fused."""
        fused = [
            _name(instruction.attribute("calls"))
            for instruction in self.computations[name].instructions.values()
            if instruction.opcode == "fusion"
        ]
        return [name, *fused]


def _begins(collective: Instruction, computation: Computation) -> bool:
    """Whether data is sent because of it, and not under way already.

    A TPU's compiler fuses parts of what it computes meanwhile with a collective: this then stands
    where it is started, in each of those, and where it is done, as links of a chain.
    """
    if "chain_id" not in collective.attribute("frontend_attributes"):
        return True
    return any(
        collective.name in other.operands and "AsyncCollectiveStart" in other.rest
        for other in computation.instructions.values()
    )


def _cycles(instruction: Instruction) -> int:
    estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
    return int(estimate[1]) if estimate else 0


def _step(body: Computation, index: int) -> int:
    """By how much a turn of a loop raises the number at that place of what it carries."""
    total, found = 0, body.instructions[body.root]
    while found.operands:
        if found.opcode == "get-tuple-element":
            break
        at = index if found.opcode == "tuple" else 0
        if found.opcode == "add":
            parts = [body.instructions[name] for name in found.operands]
            constants = [int(part.constant) for part in parts if part.opcode == "constant"]
            if len(constants) != 1:
                break
            total += constants[0]
            at = next(i for i, part in enumerate(parts) if part.opcode != "constant")
        found = body.instructions[found.operands[at]]
    return total or 1


def _name(attribute: str) -> str:
    return attribute.strip().lstrip("%")


def _first_group(instruction: Instruction, devices: int) -> np.ndarray:
    """Devices, by their place in the mesh, that exchange data with one another."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.rest):
        numbers = np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
        return max(numbers, key=lambda pair: abs(pair[0] - pair[1]))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.rest)
    if listed:
        return np.array([int(n) for n in listed[1].split(",")])
    # [groups, members]<=[dims]T(order): the devices in that shape, transposed, in rows.
    tiled = re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.rest
    )
    if not tiled:
        return np.arange(devices)
    dims = [int(n) for n in tiled[3].split(",")]
    order = [int(n) for n in tiled[4].split(",")] if tiled[4] else range(len(dims))
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    return ids.reshape(int(tiled[1]), int(tiled[2]))[0]


def _convolution(instruction: Instruction, lhs: Shape, rhs: Shape) -> int:
    """Multiply-adds; products with padding and with what dilation inserts do not count.

    So a batched matrix product, which a TPU has as a convolution, costs what it should.
    """
    lhs_labels, rhs_labels, out_labels = re.match(
        r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels")
    ).groups()
    out = instruction.shapes[0]
    total = rhs.dims[rhs_labels.index("i")] * rhs.dims[rhs_labels.index("o")]
    total *= lhs.dims[lhs_labels.index("b")]
    total //= int(instruction.attribute("batch_group_count") or 1)
    window = dict(re.findall(r"(\w+)=([\w\-]+)", instruction.attribute("window")))

    def along(name: str, axis: int, default: int) -> int:
        return int(window[name].split("x")[axis]) if name in window else default

    for axis, label in enumerate(sorted(filter(str.isdecimal, out_labels))):
        size = lhs.dims[lhs_labels.index(label)]
        dilation = along("lhs_dilate", axis, 1)
        low = int(window["pad"].split("x")[axis].split("_")[0]) if "pad" in window else 0
        outputs = np.arange(out.dims[out_labels.index(label)])[:, None]
        taps = np.arange(along("size", axis, 1))[None]
        at = outputs * along("stride", axis, 1) + taps * along("rhs_dilate", axis, 1) - low
        total *= int(((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)).sum())
    return total
