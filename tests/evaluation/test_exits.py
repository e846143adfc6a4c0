import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from conftest import TINY, build
from early_exit import confidence, tree
from early_exit import policy as policies
from early_exit.backbones import base
from early_exit.calibration import temperature
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import Mode
from early_exit.evaluation import exits


def packed(seed=0):
    """Two rows: one document, then two documents and padding."""
    tokens = np.random.default_rng(seed).integers(0, 61, (2, 12)).astype(np.int32)
    segments = np.array([[1] * 12, [1] * 5 + [2] * 4 + [0] * 3], np.int32)
    positions = np.array([range(12), [*range(5), *range(4), 0, 0, 0]], np.int32)
    return {"tokens": tokens, "documents": segments, "positions": positions}


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def gate_by_definition(gate, hidden):
    """RMS norm, one hidden layer with SiLU, and a sigmoid."""
    gate = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(gate).items()}
    normed = hidden / np.sqrt((hidden**2).mean() + TINY.norm_eps) * gate["norm/scale"]
    inner = normed @ gate["hidden/kernel"] + gate["hidden/bias"]
    logit = inner / (1 + np.exp(-inner)) @ gate["logit/kernel"] + gate["logit/bias"]
    return 1 / (1 + np.exp(-logit[0]))


CAPPED = dataclasses.replace(TINY, logit_divisor=0.5, logit_cap=2.0)


@pytest.mark.parametrize(
    ("network", "head"),
    [(TINY, {}), (TINY, {"head": "layer", "classes": 20, "gate": True}), (CAPPED, {"classes": 20})],
    ids=["all", "reduced", "capped"],
)
def test_records_equal_a_position_by_position_count(network, head):
    model, params = build(network, **head)
    batch = packed()
    records = exits.record(model, params, [batch], soften=True, origin="here")
    bound = model.bind(params)
    hidden, context = bound.backbone.stem({k: jnp.asarray(v) for k, v in batch.items()})
    states = [hidden, *bound.hidden_at_exits(hidden, context, (2, 4, 6))]
    final = np.asarray(bound.backbone.readout(states[-1]))
    ids = np.arange(61) if bound.token_ids is None else np.asarray(bound.token_ids)

    # Every position whose next token is of the same document, row by row.
    where = [(0, t) for t in range(11)] + [(1, t) for t in (0, 1, 2, 3, 5, 6, 7)]
    assert records.predictions.shape == (3, len(where))
    names = {"max_prob", "margin", "entropy", "patience", "similarity"}
    assert records.scores.keys() == names | ({"gate"} if model.exits.gate else set())
    said = [[] for _ in where]
    for e, (head, table) in enumerate(zip(bound.heads, bound.exit_tables(), strict=True)):
        features, _ = head.features(states[e + 1], context)
        logits = np.asarray(base.logits(features, table, rule=network.logit_rule))
        for n, (b, t) in enumerate(where):
            probs, label = softmax(logits[b, t]), batch["tokens"][b, t + 1]
            best = ids[probs[: len(ids)].argmax()]
            position = ids.tolist().index(label) if label in ids else len(ids)
            assert records.predictions[e, n] == best and records.labels[n] == label
            np.testing.assert_allclose(records.losses[e, n], -np.log(probs[position]), atol=1e-4)
            softer = softmax(logits[b, t] / confidence.TEMPERATURES[-1])[: len(ids)].max()
            normalizer = records.softened.log_normalizers[-1, e, n]
            np.testing.assert_allclose(np.exp(-normalizer), softer, atol=1e-5)
            declines = probs.argmax() == len(ids)
            expected = -np.inf if declines else probs[: len(ids)].max()
            np.testing.assert_allclose(records.scores["max_prob"][e, n], expected, atol=1e-5)
            same = [before == best for before in reversed(said[n])]
            expected = -np.inf if declines else [*same, False].index(False)
            assert records.scores["patience"][e, n] == expected
            said[n].append(None if declines else best)
            before, after = np.asarray(states[e])[b, t], np.asarray(states[e + 1])[b, t]
            cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
            np.testing.assert_allclose(records.scores["similarity"][e, n], cosine, atol=1e-5)
            if model.exits.gate:
                expected = gate_by_definition(params["exits"][str(2 * e + 2)]["gate"], after)
                np.testing.assert_allclose(records.scores["gate"][e, n], expected, atol=1e-5)
    for n, (b, t) in enumerate(where):
        label = batch["tokens"][b, t + 1]
        loss = -np.log(softmax(final[b, t])[label])
        np.testing.assert_allclose(records.losses[2, n], loss, atol=1e-4)
        probs, best = softmax(final[b, t]), final[b, t].argmax()
        assert records.predictions[2, n] == best
        np.testing.assert_allclose(records.scores["max_prob"][2, n], probs.max(), atol=1e-5)
        same = [before == best for before in reversed(said[n])]
        assert records.scores["patience"][2, n] == [*same, False].index(False)
    # The final exit has no gate; of three documents, each is a group.
    assert not model.exits.gate or (records.scores["gate"][2] == -np.inf).all()
    assert len(set(zip(records.groups.tolist(), [0] * 11 + [1] * 4 + [2] * 3, strict=True))) == 3
    assert records.metadata == {"origin": "here"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "temperatures"),
    [("max_prob", None), ("patience", None), ("gate", None), ("margin", [2**1.5, 0.5, 2, 1])],
)
def test_decoding_leaves_where_the_records_say(name, temperatures):
    """What is fitted on records does in the loop exactly what it did on paper."""
    model, params = build(points=(1, 2, 4), head="layer", classes=4, gate=True)
    prompts = np.random.default_rng(0).integers(0, 61, (6, 5)).tolist()

    def decoded(policy):
        """(scores [E, n] of the positions that gave tokens, the exits these came from)."""
        mode = Mode("defer", pending=16)  # never full
        rows = generate(model, params, prompts, policy=policy, mode=mode, max_new_tokens=12)
        tokens = np.array([[*p, *row.tokens] for p, row in zip(prompts, rows, strict=True)])
        positions = np.broadcast_to(np.arange(17), tokens.shape)
        batch = {"tokens": tokens, "positions": positions, "documents": np.ones_like(tokens)}
        records = exits.record(model, params, [batch], soften=temperatures is not None)
        if temperatures:
            records = temperature.apply(records, np.array(temperatures))
        scores = records.scores[name][:-1].reshape(3, 6, 16)
        # The first token comes out of the prompt's pass.
        return scores[:, :, 5:].reshape(3, -1), np.concatenate([row.exits[1:] for row in rows])

    thresholds = np.ones(3)
    if name != "patience":
        scores, _ = decoded(policies.never(3, name))
        thresholds = np.nanquantile(np.where(np.isfinite(scores), scores, np.nan), 0.7, axis=1)
    policy = policies.make(thresholds, name, temperatures=temperatures)
    scores, left = decoded(policy)
    assert len(set(left.tolist())) > 2
    np.testing.assert_array_equal(left, policy.exit_index(scores, model.exit_depths))


def test_batches_are_joined_in_order(tiny):
    model, params = tiny
    first, second = packed(1), packed(2)
    both = exits.record(model, params, [first, second])
    parts = [exits.record(model, params, [batch]) for batch in (first, second)]
    np.testing.assert_array_equal(both.losses, np.concatenate([p.losses for p in parts], axis=1))
    predictions = np.concatenate([p.predictions for p in parts], axis=1)
    np.testing.assert_array_equal(both.predictions, predictions)
    assert len(set(both.groups.tolist())) == 6


def test_positions_of_one_group_may_lie_in_several_rows(tiny):
    groups = np.repeat([[7], [2]], 12, axis=1).astype(np.int32)
    batches = [packed(seed) | {"groups": groups} for seed in (1, 2)]
    found = exits.record(*tiny, batches).groups
    assert found.tolist() == ([7] * 11 + [2] * 7) * 2


def test_leaving_later_costs_more(tiny):
    """By hand: the blocks of the tiny model, an mlp and a matrix of 61 rows for each head."""
    costs = exits.record(*tiny, [packed()]).costs
    block = 24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40 + 2 * 24
    head, readout = 3 * 24 * 40 + 61 * 24, 61 * 24
    expected = [2 * block + head, 4 * block + 2 * head, 6 * block + 2 * head + readout]
    np.testing.assert_array_equal(costs, expected)


def test_no_batch_is_an_error(tiny):
    with pytest.raises(ValueError, match="no batch to record; give more held-out text"):
        exits.record(*tiny, [])


def test_summary_has_a_row_per_exit_and_counts_shares(tiny):
    records = exits.record(*tiny, [packed()])
    predictions = np.tile(np.arange(3, dtype=np.int32)[:, None], (1, 18))
    predictions[0, :9] = 2
    scores = records.scores | {"max_prob": np.tile(np.linspace(1, 0, 18, dtype="f"), (3, 1))}
    rows = exits.summary(dataclasses.replace(records, predictions=predictions, scores=scores))
    assert [row["exit"] for row in rows] == [2, 4, 6]
    assert [row["agreement"] for row in rows] == [0.5, 0.0, 1.0]
    assert [row["coverage"] for row in rows] == [0.5, 0.0, 1.0]
    np.testing.assert_allclose([row["loss"] for row in rows], records.losses.mean(1), rtol=1e-6)
