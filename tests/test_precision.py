"""Programs that promise numbers multiply float32 as float32, on devices that by default do not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import build
from early_exit import policy as policies
from early_exit import precision
from early_exit.backbones import base, cached_attention
from early_exit.backbones.encoder import EncoderConfig
from early_exit.backbones.resnet import ResNetConfig
from early_exit.classifying import rows
from early_exit.decoding.costs import Costs
from early_exit.decoding.decode import decode, prefill
from early_exit.decoding.mode import DEFERRED, VERIFIED
from early_exit.decoding.rules import Rules
from early_exit.decoding.state import initial_state
from early_exit.evaluation import classes, exits, tradeoff
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit

TOKENS = jax.ShapeDtypeStruct((2, 8), jnp.int32)
ENCODER = EncoderConfig(
    vocab_size=61, width=24, depth=3, heads=4, mlp_width=40, context_length=16, num_classes=3
)
RESNET = ResNetConfig.cifar(8, width=4)


def in_dtype(params, dtype):
    return jax.tree.map(
        lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(dtype), params
    )


def decoding(stage, mode, dtype):
    model, params = build(head="layer", gate=True, classes=20)
    params = in_dtype(params, dtype)
    size = {"slots": 2 * cached_attention.CACHE_CHUNK, "dtype": dtype}
    state = initial_state(model, [[1, 2]] * 2, 9, mode=mode, key=jax.random.key(0), **size)
    static = {"model": model, "mode": mode}
    if stage == "prefill":
        return prefill.lower(params, state, Rules.same(2), jnp.int32(9), **static)
    counts = jnp.int32(4), jnp.int32(1)
    rules = Rules.same(2, policies.never(2, "max_prob"))
    costs = Costs.assumed(mode, 2)
    return decode.lower(params, state, rules, costs, *counts, **static)


def scoring(dtype):
    model, params = build(gate=True)
    batch = dict.fromkeys(("tokens", "documents", "positions"), TOKENS)
    return exits.score_batch.lower(in_dtype(params, dtype), batch, model=model)


def choosing(dtype):
    model, params = build()
    return tradeoff.full_choices.lower(in_dtype(params, dtype), {"tokens": TOKENS}, model=model)


def classifier(config, dtype):
    model = MultiExit(config, ExitConfig((1, 2), head="mlp"))
    backbone = base.init(config, jax.random.key(0))
    heads = model.init_exits(jax.random.key(1), backbone, "random", None)
    params = in_dtype({"backbone": backbone, "exits": heads}, dtype)
    inputs = {
        name: jnp.zeros((2, *x.shape[1:]), x.dtype) for name, x in config.example_inputs().items()
    }
    return model, params, inputs


def classifying(program, config, dtype):
    model, params, inputs = classifier(config, dtype)
    policy = policies.never(2, "max_prob")
    if program is classes.score_batch:
        batch = inputs | {"labels": jnp.zeros(2, jnp.int32), "valid": jnp.ones(2, bool)}
        return program.lower(params, batch, model=model)
    if program is rows.run_whole:
        return program.lower(params, policy, inputs, model=model)
    if program is rows.run_alone:
        one = {name: x[:1] for name, x in inputs.items()}
        return program.lower(params, policy, one, model=model, early=True)
    (_, *pools) = rows.empty_pools(params, policy, inputs, model=model, size=4)
    at = jnp.arange(2)
    return program.lower(
        params, policy, inputs, at, pools[0], at, jnp.bool_(True), model=model, segment=0
    )


PROGRAMS = {
    "prefill": functools.partial(decoding, "prefill", VERIFIED),
    "decode": functools.partial(decoding, "decode", VERIFIED),
    "decode deferred": functools.partial(decoding, "decode", DEFERRED),
    "score": scoring,
    "choose": choosing,
} | {
    f"{program.__module__.rsplit('.')[-1]}.{program.__name__} {type(config).__name__}": (
        functools.partial(classifying, program, config)
    )
    for config in (ENCODER, RESNET)
    for program in (classes.score_batch, rows.run_whole, rows.run_alone, rows.run_segment)
}


def products(lowered) -> list[str]:
    found = re.findall(r".*stablehlo\.(?:dot_general|convolution).*", lowered.as_text())
    assert found
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_float32_is_multiplied_as_float32_and_half_precision_as_ever(name):
    assert all("HIGHEST" in line for line in products(PROGRAMS[name](jnp.float32)))
    assert not any("HIGH" in line for line in products(PROGRAMS[name](jnp.bfloat16)))


def test_a_caller_may_still_ask_for_more():
    """And what is around a program is left as it is."""

    @jax.jit
    @precision.exact
    def program(params, x):
        return params["w"] @ x

    square = jnp.ones((2, 2), jnp.bfloat16)
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in products(program.lower({"w": square}, square))[0]
        program({"w": np.ones((2, 2), np.float32)}, square)
        assert "HIGHEST" in products(jax.jit(jnp.matmul).lower(square, square))[0]
    assert "HIGHEST" not in products(program.lower({"w": square}, square))[0]
