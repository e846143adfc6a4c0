"""What the compiled decoding loop does, read off the program instead of a clock."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from conftest import TINY, build
from early_exit import policy as policies
from early_exit.backbones import cached_attention
from early_exit.decoding.costs import Costs
from early_exit.decoding.decode import decode, prefill
from early_exit.decoding.mode import DEFERRED, LOSSY, VERIFIED, verified
from early_exit.decoding.rules import Rules
from early_exit.decoding.state import initial_state

SLOTS = 512
# Segments of one block and of two.
CONFIG, POINTS = dataclasses.replace(TINY, depth=4), (1, 3)
MODES = {
    "lossy": LOSSY,
    "deferred": DEFERRED,
    "verified": verified("exits", "lookup"),
    "recurrent": VERIFIED,
}
RECURRENT = (VERIFIED,)
CHUNKS = jnp.int32(9)


def arguments(head, batch, mode, slots=SLOTS):
    taps = {"recurrent_taps": (2, 4)} if mode in RECURRENT else {}
    model, params = build(CONFIG, points=POINTS, head=head, gate=True, **taps)
    state = jax.eval_shape(
        lambda key: initial_state(model, [[1, 2]] * batch, 9, mode=mode, key=key, slots=slots),
        jax.random.key(0),
    )
    return model, params, state


@functools.cache  # two tests share programs
def compiled(stage, mode, head, batch, confidence=None, slots=SLOTS):
    model, params, state = arguments(head, batch, MODES[mode], slots)
    static = {"model": model, "mode": MODES[mode]}
    if stage == "prefill":
        return prefill.lower(params, state, Rules.same(batch), CHUNKS, **static).compile()
    rules = Rules.same(batch, confidence and policies.never(2, confidence))
    counts = jnp.int32(4), jnp.int32(1)
    costs = Costs.assumed(MODES[mode], batch)
    return decode.lower(params, state, rules, costs, *counts, **static).compile()


# Every mode with one row and with several, every kind of head, both kinds of confidence.
PROGRAMS = [
    ("prefill", "lossy", "mlp", 1),
    ("prefill", "verified", "layer", 3),
    ("decode", "lossy", "mlp", 1, None),
    ("decode", "lossy", "mlp", 1, "similarity"),
    ("decode", "lossy", "layer", 3, "max_prob"),
    ("decode", "deferred", "layer", 1, "patience"),
    ("decode", "deferred", "mlp", 3, "gate"),
    ("decode", "verified", "mlp", 1, None),
    ("decode", "verified", "layer", 1, "max_prob"),
    ("decode", "verified", "layer", 3, "max_prob"),
    ("prefill", "recurrent", "mlp", 3),
    ("decode", "recurrent", "mlp", 1, None),
    ("decode", "recurrent", "layer", 3, "max_prob"),
]


@pytest.mark.production
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: "-".join(map(str, p)))
def test_the_cache_is_never_copied(program):
    """Copying it once a token costs as much as the weights do, long before the context is full."""
    text = compiled(*program).as_text()
    cache_shape = re.escape(f"f32[{program[3]},2,{SLOTS},6]")
    assert re.search(cache_shape, text), "the cache has another shape than this test looks for"
    assert not re.findall(rf"= {cache_shape}\S* copy\(", text)


@pytest.mark.production
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: "-".join(map(str, p)))
def test_what_the_state_holds_is_updated_in_place(program):
    """Donated: the caches, first of all."""
    memory = compiled(*program).memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes - 1024


@pytest.mark.production
@pytest.mark.parametrize(
    "program", [PROGRAMS[i] for i in (2, 5, 9, 11)], ids=lambda p: "-".join(map(str, p))
)
def test_temporary_memory_does_not_grow_with_the_allocated_cache(program):
    """But for the scores of the few positions that read it whole."""
    small = compiled(*program, slots=256).memory_analysis()
    large = compiled(*program).memory_analysis()
    rows, one_cache_array = program[3], 4 * program[3] * 2 * 256 * 6
    asking = max(w for w in MODES[program[1]].widths if w <= cached_attention._FEW)
    # As they come, turned, and as weights.
    scores = 3 * 4 * rows * CONFIG.heads * asking * 256
    assert large.temp_size_in_bytes - small.temp_size_in_bytes < one_cache_array + scores


@pytest.mark.parametrize(
    ("mode", "batch"), [("lossy", 1), ("deferred", 3), ("verified", 3), ("recurrent", 2)]
)
def test_decoding_lowers_for_every_platform(mode, batch):
    model, params, state = arguments("layer", batch, MODES[mode])
    static = {"model": model, "mode": MODES[mode]}
    counts = jnp.int32(4), jnp.int32(batch)

    def run(params, state):
        state = prefill(params, state, Rules.same(batch), CHUNKS, **static)
        costs = Costs.assumed(MODES[mode], batch)
        rules = Rules.same(batch, policies.never(2))
        state = decode(params, state, rules, costs, *counts, **static)
        return state.tokens_BS

    exported = jax.export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(params, state)
    assert exported.platforms == ("cpu", "cuda", "tpu")
