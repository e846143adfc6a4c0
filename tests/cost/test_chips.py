"""Whether a program fits, and what it says where it does not."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from early_exit import sharding
from early_exit.cost import chips, programs
from early_exit.settings.sections import MeshSettings

MESH = sharding.make_mesh(MeshSettings())
CHIP = chips.Chip(memory=10_000, flops=1e12, bandwidth=1e12, hertz=1e9, ring=1e9)


def estimate(chip, rows=16):
    """Of a product with a [16, 16] matrix, 1024 bytes."""
    where = jax.sharding.NamedSharding(MESH, P())
    args = tuple(jax.ShapeDtypeStruct((n, 16), jnp.float32, sharding=where) for n in (rows, 16))
    return chips.estimate(jax.jit(jnp.dot).trace(*args), args, MESH, chip)


def test_what_fits_has_its_memory_and_its_work_counted():
    found = estimate(CHIP)
    assert found.arguments == 2 * 1024
    assert found.needed >= found.arguments + 1024  # and what comes out
    assert found.spare == CHIP.memory - found.needed > 0
    assert found.traced_flops == found.program.flops == 2 * 16**3
    assert found.flops_ratio == 1
    assert estimate(None).spare > 1e300


def test_arguments_that_do_not_fit_need_no_compiler():
    found = estimate(CHIP, rows=1000)
    assert found.program is None and found.temporaries is None
    assert found.needed == found.arguments == (1000 + 16) * 64
    assert found.spare == CHIP.memory - found.needed < 0
    assert "split them further" in found.advice()
    assert "fewer rows" in dataclasses.replace(found, arguments=100).advice()


def test_seconds_are_of_cycles_and_of_what_is_sent():
    def collective(kind, shape, times, group, axes):
        return programs.Collective(kind, programs.Shape("bf16", shape), times, group, axes, "")

    compiled = programs.Program(
        flops=10**9,
        cycles=2 * 10**9,
        product_cycles=5 * 10**8,
        collectives=(
            collective("all-reduce", (500,), 10, 4, ("tensor",)),
            collective("all-reduce", (500,), 2, 4, ("tensor",)),
            collective("all-gather", (1000,), 1, 2, ("data",)),
        ),
        open_loops=0,
    )
    found = dataclasses.replace(estimate(CHIP), program=compiled)
    sent = 2 * 3 / 4 * 12_000
    assert found.exchanged() == [
        ("all-reduce", "tensor", 12, 12_000, sent),
        ("all-gather", "data", 1, 2000, 1000),
    ]
    assert found.compute_seconds == 2
    assert found.parts == {"products": 0.5, "memory": 1.5, "network": (sent + 1000) / 1e9}
    assert found.bound == "memory"
    assert found.seconds == pytest.approx(2 + (sent + 1000) / 1e9)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (1.00T) exceeds available HBM (95.73G).",
            1024**4,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 37.50G of 15.75G hbm.",
            int(37.5 * 1024**3),
        ),
        ("INTERNAL: something else (1.00T) exceeds", None),
        ("RESOURCE_EXHAUSTED: out of threads", None),
    ],
)
def test_what_would_have_been_needed_is_in_the_compilers_message(message, needed):
    assert chips._needed(message) == needed
