import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import TINY, build
from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.decoder import Decoder, DecoderConfig
from early_exit.data.transforms import next_token_targets
from early_exit.exits import recurrent
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.training import step as steps
from early_exit.training.observe import observe
from early_exit.training.recipe import LOSSES, Recipe
from early_exit.training.schedule import ExitWeights

# As in `training.loop`: the state is donated.
step = jax.jit(
    steps.tune_step, static_argnames=("model", "recipe", "optimizer"), donate_argnames="state"
)
ADAM = optax.adamw(1e-2, weight_decay=0.0)
# The parameters after a step of this are those before it less the gradient.
PLAIN = optax.sgd(1.0)
RECIPES = {loss: Recipe(loss, ExitWeights((1.0, 0.25))) for loss in LOSSES}
HEADS = {
    "embedding": {"head": "embedding"},
    "norm": {"head": "norm"},
    "mlp": {"head": "mlp"},
    "layer": {"head": "layer", "classes": 20, "output": "shared"},
}


def packed(rows=4, length=12, seed=0):
    """Rows of two segments, the last of them followed by padding."""
    rng = np.random.default_rng(seed)
    edges = rng.integers(3, length - 3, rows)
    at = np.arange(length)[None]
    segments = 1 + (at >= edges[:, None]).astype(np.int32)
    segments[-1, -4:] = 0
    positions = np.where(at >= edges[:, None], at - edges[:, None], at)
    return {
        "tokens": rng.integers(0, TINY.vocab_size, (rows, length)).astype(np.int32),
        "documents": segments,
        "positions": positions.astype(np.int32),
    }


def parts(params, optimizer):
    """A tuning state of its own and the frozen rest."""
    frozen = {name: value for name, value in params.items() if name != "exits"}
    exits = jax.tree.map(jnp.copy, params["exits"])
    return steps.init_state({"exits": exits}, optimizer), frozen


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnames="model")
def whole_logits(params, batch, *, model):
    bound = model.bind(params)
    hidden, context = bound.backbone.stem(batch)
    states = list(bound.hidden_at_exits(hidden, context, model.exit_depths.tolist()))
    exits = [
        base.logits(head.features(h, context)[0], table, rule=model.config.logit_rule)
        for head, h, table in zip(bound.heads, states, bound.exit_tables(), strict=False)
    ]
    return exits, bound.backbone.readout(states[-1])


def reference_losses(model, params, batch, loss):
    """Mean loss of every exit, position by position, from whole logits in float64."""
    if loss == "both":
        parts = [reference_losses(model, params, batch, x) for x in ("kl", "cross_entropy")]
        return sum(parts) / 2
    exits, final = jax.tree.map(log_softmax, whole_logits(params, batch, model=model))
    kept = np.asarray(params.get("token_ids", np.arange(TINY.vocab_size)))
    totals, count = np.zeros(len(exits)), 0
    rows, length = batch["tokens"].shape
    for b in range(rows):
        for t in range(length - 1):
            segment, following = batch["documents"][b, t : t + 2]
            if segment == 0 or following != segment:
                continue
            count += 1
            target = np.exp(final[b, t])
            if loss == "cross_entropy":
                target = np.eye(TINY.vocab_size)[batch["tokens"][b, t + 1]]
            if "token_ids" in params:
                rest = np.delete(target, kept).sum(keepdims=True)
                target = np.append(target[kept], rest)
            some = target > 0
            for e, log_probs in enumerate(exits):
                totals[e] += (target[some] * (np.log(target[some]) - log_probs[b, t][some])).sum()
    return totals / count


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("heads", ["mlp", "layer", "mlp, capped"])
def test_the_loss_is_the_weighted_sum_of_masked_means(heads, loss):
    """Of logits as the network's rule makes them."""
    heads, _, capped = heads.partition(", ")
    rule = {"logit_divisor": 0.5, "logit_cap": 2.0} if capped else {}
    model, params = build(dataclasses.replace(TINY, **rule), **HEADS[heads])
    state, frozen = parts(params, ADAM)
    batch = packed()
    new, metrics = step(state, frozen, batch, model=model, recipe=RECIPES[loss], optimizer=ADAM)
    want = reference_losses(model, params, batch, loss)
    got = [metrics["loss/exit_2"], metrics["loss/exit_4"]]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], want[0] + 0.25 * want[1], rtol=1e-4)
    assert new["step"] == 1


DRAFTS = (1.0, 0.5, 0.25)


@pytest.mark.long
@pytest.mark.parametrize("points", [(), (2, 4)], ids=["alone", "beside exits"])
@pytest.mark.parametrize("loss", LOSSES)
def test_each_step_of_a_chain_has_its_share_of_the_loss(loss, points):
    """Over the positions that a chain can reach at that step, in their own document."""
    model, params = build(**HEADS["layer"] | {"points": points, "recurrent_taps": (3, 6)})
    recipe = Recipe(loss, ExitWeights((1.0, 0.25)[: len(points)]), draft_weights=DRAFTS)
    state, frozen = parts(params, ADAM)
    batch = packed()
    _, metrics = step(state, frozen, batch, model=model, recipe=recipe, optimizer=ADAM)

    bound = model.bind(params)
    embedded, context = bound.backbone.stem(batch)
    taps = list(bound.hidden_at_exits(embedded, context, model.exits.recurrent_taps))
    starts = recurrent.starts(jnp.asarray(batch["documents"]))
    states = bound.recurrent.unrolled(taps, embedded, context, starts, len(DRAFTS))
    table = bound.draft_table()
    said = [log_softmax(base.logits(bound.recurrent.features(x), table)) for x in states]
    final = log_softmax(whole_logits(params, batch, model=model)[1])
    kept = np.asarray(params["token_ids"])
    wanted = []
    for k, log_probs in enumerate(said):
        found = []
        for b, t in np.ndindex(4, batch["tokens"].shape[1] - 1):
            documents = batch["documents"][b]
            begins = t - k - 1  # where the taps are that the chain began with
            inside = begins >= 0 and documents[begins] == documents[t] == documents[t + 1] != 0
            if not inside:
                continue
            targets = [np.exp(final[b, t]), np.eye(TINY.vocab_size)[batch["tokens"][b, t + 1]]]
            targets = {"kl": targets[:1], "cross_entropy": targets[1:]}.get(loss, targets)
            for target in targets:
                rest = np.delete(target, kept).sum(keepdims=True)
                target = np.append(target[kept], rest)
                some = target > 0
                difference = np.log(target[some]) - log_probs[b, t][some]
                found.append((target[some] * difference).sum() / len(targets))
        wanted.append(np.sum(found) / (len(found) / len(targets)))
    got = [metrics[f"loss/draft_{k + 1}"] for k in range(len(DRAFTS))]
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    others = sum(
        weight * float(metrics[f"loss/exit_{p}"])
        for weight, p in zip((1.0, 0.25), points, strict=False)
    )
    np.testing.assert_allclose(metrics["loss"], others + np.dot(DRAFTS, wanted), rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_halves_of_a_batch_accumulate_to_the_whole(tiny, loss):
    model, params = tiny

    def token_gradients(rows):
        """Gradient of the mean loss over the positions of some rows, times their number."""
        batch = packed()
        batch["documents"] = np.where(np.isin(range(4), rows)[:, None], batch["documents"], 0)
        state, frozen = parts(params, PLAIN)
        new, metrics = step(
            state, frozen, batch, model=model, recipe=RECIPES[loss], optimizer=PLAIN
        )
        gradients = jax.tree.map(lambda a, b: a - b, params["exits"], new["params"]["exits"])
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-3)
        count = next_token_targets(batch)[1].sum()
        return jax.tree.map(lambda x: count * x, gradients)

    halves = [jax.tree.leaves(token_gradients(rows)) for rows in ([0, 1], [2, 3])]
    whole = jax.tree.leaves(token_gradients(range(4)))
    for a, b, c in zip(whole, *halves, strict=True):
        # Differences of parameters, which are of size 1 and have seven digits.
        np.testing.assert_allclose(a, b + c, atol=1e-4, rtol=1e-3)


def test_padding_and_the_order_of_rows_change_nothing(tiny):
    model, params = tiny
    batch = packed()
    changed = {name: array[::-1].copy() for name, array in batch.items()}
    changed["tokens"][0, -4:] = 5  # padding
    results = []
    for data in (batch, changed):
        state, frozen = parts(params, PLAIN)
        results.append(
            step(state, frozen, data, model=model, recipe=RECIPES["kl"], optimizer=PLAIN)
        )
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_frozen_means_frozen(loss):
    model, params = build(**HEADS["layer"])
    state, frozen = parts(params, ADAM)
    before = tree.fingerprint(frozen)
    state, metrics = step(
        state, frozen, packed(), model=model, recipe=RECIPES[loss], optimizer=ADAM
    )
    assert tree.fingerprint(frozen) == before
    # What comes back is the exits, twice more in the optimizer, and scalars: nothing else.
    assert state.keys() == {"params", "opt_state", "step"}
    assert state["params"].keys() == {"exits"}
    assert jax.tree.structure(state["params"]["exits"]) == jax.tree.structure(params["exits"])
    shapes = [x.shape for x in jax.tree.leaves(state["params"]["exits"])]
    opt_shapes = [x.shape for x in jax.tree.leaves(state["opt_state"])]
    assert sorted(shape for shape in opt_shapes if shape) == sorted(shapes * 2)
    assert all(x.shape == () for x in metrics.values())
    for a, b in zip(
        *map(jax.tree.leaves, (params["exits"], state["params"]["exits"])), strict=True
    ):
        assert (a != b).any()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_backbone_is_not_differentiated(tiny, monkeypatch, loss):
    """Its blocks are replaced by ones that refuse to be."""
    model, params = tiny
    original = Decoder.run_blocks

    def refuse(*_):
        raise AssertionError("a block of the backbone was differentiated")

    def guarded(self, hidden, start, stop, context):
        run = jax.custom_vjp(lambda hidden: original(self, hidden, start, stop, context))
        run.defvjp(refuse, refuse)
        return run(hidden)

    monkeypatch.setattr(Decoder, "run_blocks", guarded)
    state, frozen = parts(params, PLAIN)
    run = functools.partial(steps.tune_step, model=model, recipe=RECIPES[loss], optimizer=PLAIN)
    jax.eval_shape(run, state, frozen, packed())

    def loss_of_backbone(backbone):
        return run(state, {**frozen, "backbone": backbone}, packed())[1]["loss"]

    with pytest.raises(AssertionError, match="was differentiated"):
        jax.eval_shape(jax.grad(loss_of_backbone), frozen["backbone"])


def test_cross_entropy_stops_after_the_last_exit(tiny):
    """Broken deeper weights reach the loss only where the final distribution is the teacher."""
    model, params = tiny
    backbone = dict(params["backbone"])
    backbone["blocks"] = {
        i: jax.tree.map(lambda x: x * jnp.nan, block) if int(i) >= 4 else block
        for i, block in backbone["blocks"].items()
    }
    for loss, finite in [("cross_entropy", True), ("kl", False)]:
        state, frozen = parts(params | {"backbone": backbone}, PLAIN)
        new, metrics = step(
            state, frozen, packed(), model=model, recipe=RECIPES[loss], optimizer=PLAIN
        )
        assert bool(jnp.isfinite(metrics["loss"])) == finite
        assert all(
            bool(jnp.isfinite(x).all()) == finite for x in jax.tree.leaves(new["params"]["exits"])
        )


def test_an_exit_of_weight_zero_is_left_alone(tiny):
    model, params = tiny
    state, frozen = parts(params, ADAM)
    recipe = Recipe("cross_entropy", ExitWeights((0.0, 1.0)))
    new, _ = step(state, frozen, packed(), model=model, recipe=recipe, optimizer=ADAM)
    assert tree.fingerprint(new["params"]["exits"]["2"]) == tree.fingerprint(params["exits"]["2"])
    assert tree.fingerprint(new["params"]["exits"]["4"]) != tree.fingerprint(params["exits"]["4"])


@pytest.mark.parametrize("heads", HEADS)
def test_the_loss_falls_on_a_fixed_batch(heads):
    model, params = build(**HEADS[heads])
    state, frozen = parts(params, ADAM)
    batch, seen = packed(), []
    for _ in range(30):
        state, metrics = step(
            state, frozen, batch, model=model, recipe=RECIPES["kl"], optimizer=ADAM
        )
        seen.append([float(metrics["loss/exit_2"]), float(metrics["loss/exit_4"])])
    assert (np.array(seen[-1]) < 0.5 * np.array(seen[0])).all(), (seen[0], seen[-1])
    assert state["step"] == 30


@pytest.mark.parametrize("heads", ["mlp", "layer"])
def test_gates_leave_what_the_heads_learn_alone(heads):
    """Their loss is beside the heads' and has no part in it, nor the heads' in theirs."""
    gated, params = build(**HEADS[heads], gate=True)
    bare = MultiExit(gated.config, dataclasses.replace(gated.exits, gate=False))
    exits = {
        point: {name: part for name, part in head.items() if name != "gate"}
        for point, head in params["exits"].items()
    }

    def slope(model, exits):
        _, frozen = parts(params, PLAIN)
        given = {"model": model, "recipe": RECIPES["kl"]}

        @jax.jit
        def run(exits, frozen, batch):
            observed = observe(frozen, batch, **given)
            return jax.grad(functools.partial(steps.heads_loss, step=0, **given), has_aux=True)(
                exits, frozen, observed
            )

        gradients, per_exit = run(exits, frozen, packed())
        return tree.flatten(gradients), per_exit

    without, losses = slope(bare, exits)
    with_gates, same_losses = slope(gated, params["exits"])
    np.testing.assert_allclose(same_losses, losses, rtol=1e-6)
    for path, gradient in without.items():
        np.testing.assert_allclose(with_gates[path], gradient, rtol=1e-5, atol=1e-6)
    of_gates = {path: g for path, g in with_gates.items() if path not in without}
    assert of_gates and all("/gate/" in path and g.any() for path, g in of_gates.items())


@pytest.mark.parametrize("loss", LOSSES)
def test_gates_learn_where_their_heads_are_right(loss):
    """Judged as they are used: gates alone are tuned, and their scores tell right from wrong."""
    model, params = build(gate=True, classes=30)
    state, frozen = parts(params, ADAM)
    batch = packed(rows=8)
    recipe = Recipe(loss, ExitWeights((0.0, 0.0)))
    seen = []
    for _ in range(60):
        state, metrics = step(state, frozen, batch, model=model, recipe=recipe, optimizer=ADAM)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.5 * seen[0], seen
    bound = model.bind(frozen | {"exits": state["params"]["exits"]})
    hidden, context = bound.backbone.stem(batch)
    states = list(bound.hidden_at_exits(hidden, context, model.exit_depths.tolist()))
    exits, final = whole_logits(frozen | {"exits": state["params"]["exits"]}, batch, model=model)
    labels, mask = (np.asarray(x) for x in next_token_targets(batch))
    target = labels if loss != "kl" else np.asarray(final).argmax(-1)
    said = np.append(params["token_ids"], -1)
    for head, h, logits in zip(bound.heads, states, exits, strict=False):
        right = said[np.asarray(logits).argmax(-1)] == target
        scores, right = (np.asarray(x)[mask > 0] for x in (head.gate_score(h), right))
        assert right.any() and not right.all()
        assert scores[right].mean() > scores[~right].mean() + 0.5


def test_unknown_loss():
    with pytest.raises(
        ValueError, match="unknown loss 'mse'; choose one of kl, cross_entropy, both"
    ):
        Recipe("mse", ExitWeights((1.0,)))


@functools.cache  # two tests share a compiled step
def temporary_bytes(points, vocab_size, drafts=0):
    """Of a compiled step at a small real model's proportions; nothing is allocated or run."""
    config = DecoderConfig(
        vocab_size=vocab_size,
        width=576,
        depth=8,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        context_length=512,
    )
    taps = (2, 5, 7) if drafts else ()
    exits = ExitConfig(points, head="norm", output="shared", recurrent_taps=taps)
    model = MultiExit(config, exits)
    optimizer = optax.adamw(1e-3)
    exits = model.abstract_exits()
    state = jax.eval_shape(
        functools.partial(steps.init_state, optimizer=optimizer), {"exits": exits}
    )
    frozen = {"backbone": base.abstract(config.build)[1]}
    array = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    batch = dict.fromkeys(("tokens", "documents", "positions"), array)
    recipe = Recipe("kl", ExitWeights((1.0,) * len(points)), draft_weights=(1.0,) * drafts)
    lowered = step.lower(state, frozen, batch, model=model, recipe=recipe, optimizer=optimizer)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.production
def test_more_exits_take_little_more_memory():
    one, six = temporary_bytes((4,), 49152), temporary_bytes((1, 2, 3, 4, 5, 7), 49152)
    assert six <= 1.25 * one, (one, six)


@pytest.mark.production
def test_a_larger_vocabulary_takes_no_more_memory():
    small, large = temporary_bytes((4,), 12288), temporary_bytes((4,), 49152)
    assert large <= 1.02 * small, (small, large)


@pytest.mark.production
def test_chains_take_memory_by_their_steps_and_none_for_the_vocabulary():
    two, four, six = (temporary_bytes((), 49152, drafts=steps) for steps in (2, 4, 6))
    assert six - four <= 1.1 * (four - two), (two, four, six)
    assert four <= 1.02 * temporary_bytes((), 12288, drafts=4)
