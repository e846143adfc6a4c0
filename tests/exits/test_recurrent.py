"""Recurrent exits: what is unrolled at all positions at once is what each chain does alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_chain import slow_chain

from conftest import TINY
from early_exit.backbones import base
from early_exit.exits import edit, recurrent
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit

LENGTHS = (20, 9, 3, 1, 31)
STEPS = 4


def with_recurrent(network=TINY, **exits):
    given = {"points": (2, 4), "head": "norm", "recurrent_taps": (2, 5, 6)} | exits
    model = MultiExit(network, ExitConfig(**given))
    backbone = base.init(network, jax.random.key(0))
    return model, backbone


def drawn(model, backbone, source="random"):
    return {
        "backbone": backbone,
        "exits": model.init_exits(jax.random.key(1), backbone, source, None),
    }


def packed(rows=2, seed=0):
    """Rows of several documents of other lengths."""
    rng = np.random.default_rng(seed)
    total = sum(LENGTHS)
    documents = np.repeat(np.arange(1, len(LENGTHS) + 1), LENGTHS)
    positions = np.concatenate([np.arange(length) for length in LENGTHS])
    return {
        "tokens": jnp.asarray(rng.integers(0, TINY.vocab_size, (rows, total)), jnp.int32),
        "documents": jnp.asarray(np.tile(documents, (rows, 1)), jnp.int32),
        "positions": jnp.asarray(np.tile(positions, (rows, 1)), jnp.int32),
    }


def observed(model, bound, batch):
    embedded, context = bound.backbone.stem(batch)
    taps = list(bound.hidden_at_exits(embedded, context, model.exits.recurrent_taps))
    return taps, embedded, context


NETWORKS = {
    "plain": TINY,
    "window": dataclasses.replace(TINY, window=5),
    "learned positions": dataclasses.replace(TINY, rotary_fraction=0.0),
    "layer norm, parallel": dataclasses.replace(
        TINY, norm="layer", parallel=True, gated=False, mlp_bias=True, qkv_bias=True
    ),
    "norms behind parts": dataclasses.replace(
        TINY, norms="after", qk_norm=True, qk_norm_whole=True
    ),
    "caps, turned by a window's frequencies": dataclasses.replace(
        TINY,
        norm="rms_offset",
        norms="both",
        attention_scale=0.3,
        attention_cap=2.0,
        window=5,
        local_rope_theta=50.0,
    ),
    "scales, not turned": dataclasses.replace(
        TINY, embedding_scale=3.0, residual_scale=0.6, unturned_blocks=(5,)
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_every_position_s_chain_is_what_it_would_be_alone(network, blocks):
    model, backbone = with_recurrent(network, recurrent_blocks=blocks)
    params, batch = drawn(model, backbone), packed()
    begins = recurrent.starts(batch["documents"])
    found = jax.jit(
        lambda params: model.bind(params).recurrent.unrolled(
            *observed(model, model.bind(params), batch), begins, STEPS
        )
    )(params)
    row, first = 1, 0
    for length in LENGTHS:
        tokens = np.zeros(max(LENGTHS) + 1, np.int32)
        tokens[:length] = batch["tokens"][row, first : first + length]
        for anchor in range(1, length - STEPS + 1, 4):
            expected, _ = slow_chain(params, tokens, anchor, model=model, steps=STEPS)
            got = [found[k][row, first + anchor + k] for k in range(STEPS)]
            np.testing.assert_allclose(np.stack(got), expected, atol=2e-4, rtol=2e-4)
        first += length
    assert begins[0, -1] == sum(LENGTHS[:-1])


def test_gradients_go_through_the_chain():
    """The first step learns from what the third says, and taps of other documents have no part."""
    model, backbone = with_recurrent()
    params, batch = drawn(model, backbone), packed()
    bound = model.bind(params)
    taps, embedded, context = observed(model, bound, batch)
    begins = recurrent.starts(batch["documents"])
    at = sum(LENGTHS[:2]) - 1  # the last of the second document

    def last(taps):
        states = bound.recurrent.unrolled(taps, embedded, context, begins, 3)
        return states[2][0, at].sum()

    gradients = jax.grad(last)(taps)
    touched = np.flatnonzero(np.abs(sum(gradients))[0].sum(-1))
    # The chain begins two positions earlier, with the taps before that; attention has all earlier.
    assert touched.tolist() == list(range(LENGTHS[0], at - 2))


def test_first_weights_are_copied_where_there_is_a_like():
    model, backbone = with_recurrent(recurrent_blocks=2)
    head = drawn(model, backbone, "copy")["exits"]["recurrent"]
    for block in head["blocks"].values():
        jax.tree.map(np.testing.assert_array_equal, block, backbone["blocks"]["5"])
    np.testing.assert_array_equal(head["norm"]["scale"], backbone["final_norm"]["scale"])
    width = TINY.width
    for name in ("fuse", "join"):
        np.testing.assert_array_equal(head[name]["kernel"][-width:], np.eye(width))


@pytest.mark.parametrize(
    ("exits", "problem"),
    [
        ({"recurrent_taps": (0, 3)}, "lie outside 1…6"),
        ({"recurrent_taps": (7,)}, "lie outside 1…6"),
        ({"recurrent_taps": (4, 2)}, "must rise"),
        ({"recurrent_taps": (1.5,)}, "must be ints"),
        ({"recurrent_blocks": -1}, "must be 0 or more"),
    ],
)
def test_what_is_no_recurrent_exit_is_refused(exits, problem):
    with pytest.raises(ValueError, match=problem):
        with_recurrent(**exits)


def test_other_exits_are_edited_beside_it():
    model, backbone = with_recurrent()
    params = drawn(model, backbone, "copy")
    moved, held = edit.move(model, params, {2: 3})
    assert moved.exits.points == (3, 4) and set(held["exits"]) == {"3", "4", "recurrent"}
    added, held = edit.add(moved, held, [1], jax.random.key(2), "copy")
    alone, held = edit.drop(added, held, [1, 3, 4])
    assert alone.exits.points == () and set(held["exits"]) == {"recurrent"}
    same = jax.tree.map(np.array_equal, held["exits"]["recurrent"], params["exits"]["recurrent"])
    assert all(jax.tree.leaves(same))
