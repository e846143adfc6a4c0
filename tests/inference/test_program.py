"""What the compiled decoding loop does, read off the program instead of a clock."""

import re

import jax
import jax.numpy as jnp
import pytest

from conftest import build
from early_exit import policy as policies
from early_exit.inference.decode import decode, prefill
from early_exit.inference.sampling import GREEDY
from early_exit.inference.state import initial_state

SLOTS = 512


def arguments(head, batch, slots=SLOTS):
    model, params = build(head=head)
    state = jax.eval_shape(
        lambda key: initial_state(model, [[1, 2]] * batch, 9, key=key, slots=slots),
        jax.random.key(0),
    )
    return model, params, state


def lowered(stage, head, batch, policy=None, slots=SLOTS):
    model, params, state = arguments(head, batch, slots)
    stop_ids = jnp.array([-1])
    if stage is prefill:
        return prefill.lower(params, state, stop_ids, model=model, sampling=GREEDY)
    return decode.lower(params, state, policy, stop_ids, jnp.int32(4), model=model, sampling=GREEDY)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("head", ["mlp", "layer"])
@pytest.mark.parametrize(
    ("stage", "policy"),
    [
        (prefill, None),
        (decode, None),
        (decode, policies.never(2)),
        (decode, policies.never(2, "similarity")),
    ],
    ids=["prefill", "full model", "max_prob", "similarity"],
)
def test_the_cache_is_never_copied(stage, policy, head, batch):
    """Copying it once a token costs as much as the weights do, long before the context is full."""
    compiled = lowered(stage, head, batch, policy).compile()
    cache_shape = re.escape(f"f32[{batch},2,{SLOTS},6]")
    text = compiled.as_text()
    assert re.search(cache_shape, text), "the cache has another shape than this test looks for"
    assert not re.findall(rf"= {cache_shape}\S* copy\(", text)


def test_temporary_memory_does_not_grow_with_the_allocated_cache():
    small, large = (
        lowered(decode, "mlp", 1, policies.never(2), slots).compile().memory_analysis()
        for slots in (256, 512)
    )
    one_cache_array = 4 * 2 * 256 * 6
    assert large.temp_size_in_bytes - small.temp_size_in_bytes < one_cache_array
    # Donated: all that the state holds, the caches first of all, is updated in place.
    assert large.alias_size_in_bytes > 0.99 * large.output_size_in_bytes - 1024


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_lowers_for_every_platform(batch):
    model, params, state = arguments("layer", batch)
    stop_ids, steps = jnp.array([-1]), jnp.int32(4)

    def run(params, state):
        state = prefill(params, state, stop_ids, model=model, sampling=GREEDY)
        return decode(
            params, state, policies.never(2), stop_ids, steps, model=model, sampling=GREEDY
        ).tokens_BS

    exported = jax.export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(params, state)
    assert exported.platforms == ("cpu", "cuda", "tpu")
