import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import TINY, build
from early_exit import policy as policies
from early_exit.cost.traffic import traffic
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import Mode
from early_exit.exits.heads import Gate

# Numbers of the tiny model, counted by hand: width 24, 4 heads and 2 key/value heads of 6, MLP 40.
D, V = 24, 61
PROJECTION = D * 12  # of keys, or of values
BLOCK = (D + D * 24 + 2 * PROJECTION + 24 * D) + (D + 3 * D * 40)
TABLE = V * D
POSITION = 2 * 12  # a key and a value, of both key/value heads
PARTS = {"embedding": 0, "norm": D, "mlp": D + 3 * D * 40 + D, "layer": BLOCK + D}
GATE = D + (D * Gate.WIDTH + Gate.WIDTH) + (Gate.WIDTH + 1)


@pytest.mark.parametrize("classes", [0, 20])
@pytest.mark.parametrize("output", ["own", "shared"])
@pytest.mark.parametrize("head", PARTS)
def test_weights_are_counted_as_by_hand(head, output, classes):
    model, params = build(points=(1, 4), head=head, output=output, classes=classes)
    # What a head reads of an output matrix, its own or the backbone's: its classes' rows.
    rows = (classes + 1 if classes else V) * D
    got = traffic(model, params)
    assert got.segments.tolist() == [4 * BLOCK, 12 * BLOCK, 8 * BLOCK]
    assert got.heads.tolist() == [4 * (PARTS[head] + rows)] * 2 + [4 * (D + TABLE)]
    # Both projections, and the norm before them.
    assert got.propagated.tolist() == [4 * SKIPPED * blocks for blocks in (1, 3, 2)]
    assert got.cached.tolist() == [4 * POSITION * blocks for blocks in (1, 3, 2)]
    assert got.full == 4 * (6 * BLOCK + D + TABLE)
    depths, heads = got.shares()
    np.testing.assert_allclose(depths, np.array([1, 4, 6]) * 4 * BLOCK / got.full)
    np.testing.assert_allclose(heads, got.heads / got.full)


def test_a_gate_belongs_to_its_head():
    without, with_gate = (traffic(*build(gate=gate)).heads for gate in (False, True))
    assert (with_gate - without).tolist() == [4 * GATE, 4 * GATE, 0]


def test_an_untied_readout_is_the_output_matrix():
    """The embedding, of which a token needs one row, is not read."""
    tied, untied = (
        traffic(*build(dataclasses.replace(TINY, tied=tied))).heads for tied in (True, False)
    )
    assert tied.tolist() == untied.tolist()


def test_shapes_are_enough_and_half_floats_half_as_much():
    model, params = build(head="layer", classes=20, output="shared", gate=True)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for field in dataclasses.fields(traffic(model, params)):
        exact, of_whole, of_half = (
            getattr(traffic(model, p), field.name) for p in (params, whole, half)
        )
        np.testing.assert_array_equal(of_whole, exact)
        np.testing.assert_array_equal(of_half * 2, exact)


def test_a_model_without_heads_costs_its_backbone(tiny):
    model, params = tiny
    got = traffic(model, {"backbone": params["backbone"]})
    assert got.heads.tolist() == [0, 0, 4 * (D + TABLE)] and got.full == traffic(model, params).full


PROMPT = [7, 3, 52, 11, 29]
SKIPPED = 2 * PROJECTION + D  # and the norm before them
HEAD = 4 * (PARTS["mlp"] + TABLE)
READOUT = 4 * (D + TABLE)
BLOCKS = 4 * BLOCK


def bytes_of(tiny, policy, mode, factors=None):
    """For seven tokens: the first out of the prompt's pass, six of their own."""
    model, params = tiny
    (got,) = generate(model, params, [PROMPT], policy=policy, mode=mode, max_new_tokens=7)
    if factors is None:
        return got.bytes_read
    return read(traffic(model, params), got, mode, factors)


def read(of, got, mode, factors):
    """Bytes by the cost model, after the first token."""
    how = {"propagates": mode.propagates, "verifies": mode.verified}
    return of.bytes_read(got.counts, got.exits[1:], **how, factors=factors)


def read_at(position, blocks):
    """The cache that one pass through so many blocks reads: all positions before this one."""
    return 4 * POSITION * position * blocks


def test_bytes_of_the_full_model_are_counted_by_hand(tiny):
    expected = sum(6 * BLOCKS + READOUT + read_at(5 + n, 6) for n in range(6))
    assert bytes_of(tiny, None, Mode()) == pytest.approx(expected, rel=1e-6)
    # Exits that can let nobody leave are not evaluated.
    assert bytes_of(tiny, policies.never(2), Mode()) == pytest.approx(expected, rel=1e-6)


def test_bytes_of_propagated_exits_are_counted_by_hand(tiny):
    """Every token reads two blocks, the head, and the projections of the four blocks skipped."""
    projections = 4 * 4 * SKIPPED
    expected = sum(2 * BLOCKS + HEAD + projections + read_at(5 + n, 2) for n in range(6))
    assert bytes_of(tiny, policies.forced(2, 0), Mode()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("factor", [1, 1.5])
def test_bytes_of_deferred_exits_are_counted_by_hand(tiny, factor):
    """Two tokens leave after two blocks, the third takes them along through the last four.

    These four are read once for all three positions, at a factor if that takes longer; no head is
    asked in front of a full window, and the readout is for the third alone.
    """
    expected = 6 * 2 * BLOCKS + 4 * HEAD + 2 * (factor * 4 * BLOCKS + READOUT)
    expected += sum(read_at(5 + n, 2) for n in range(6))
    expected += read_at(5, 4) + read_at(8, 4)  # as far as the last four blocks had come
    mode = Mode("defer", pending=3)
    assert mode.widths == (1, 3)
    factors = None if factor == 1 else np.array([1, factor])
    got = bytes_of(tiny, policies.forced(2, 0), mode, factors)
    assert got == pytest.approx(expected, rel=1e-6)


def test_a_check_of_drafts_reads_as_wide_as_the_last_segment(tiny):
    """Verified decoding: the readout takes all the positions of the pass."""
    model, params = tiny
    mode, policy = Mode("defer", ("exits",), pending=3), policies.forced(2, 0)
    (got,) = generate(model, params, [PROMPT], policy=policy, mode=mode, max_new_tokens=7)
    of_widths = (np.array(factors) for factors in ([1, 1], [1, 2]))
    plain, wide = (read(traffic(model, params), got, mode, factors) for factors in of_widths)
    checks = got.counts.passes_BEN[:, 1]
    assert checks[0] == 0 < checks[2]
    assert wide - plain == pytest.approx(checks @ [2 * BLOCKS, 2 * BLOCKS, 2 * BLOCKS + READOUT])
