"""What can be added, from a module that the project does not know."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import early_exit as ee
from early_exit.data import sources
from early_exit.decoding.drafters import base
from early_exit.exits import heads

SMALL = {"batch_size": 2, "sequence_length": 32}
TEXTS = [f"Number {n}: {n + 1} {n + 2} {n + 3}" for n in range(16)]


pytestmark = pytest.mark.usefixtures("forgotten")


class Scaled(nnx.Module):
    def __init__(self, network, rngs):
        self.scale = nnx.Param(jnp.ones(network.width))

    def __call__(self, hidden):
        return hidden * jnp.broadcast_to(self.scale[...], hidden.shape)


@pytest.mark.parametrize("output", ["own", "shared"])
def test_a_head_is_tuned_saved_and_decoded_with(bare, tmp_path, output):
    ee.register.head("scaled", Scaled)
    model = ee.attach(bare, ee.ExitConfig((2, 4), head="scaled", output=output))
    assert model.heads["2"]["custom"]["scale"].shape == (model.static.config.width,)
    tuned = ee.tune(model, TEXTS, steps=3, **SMALL, progress=False)
    assert not np.array_equal(tuned.heads["2"]["custom"]["scale"], np.ones(32))
    tuned = ee.calibrate(tuned, TEXTS, epsilon=0.3, **SMALL)
    loaded = ee.load(ee.save(tuned, tmp_path / "model"))
    one, other = (ee.generate(m, "Why?", max_new_tokens=8) for m in (tuned, loaded))
    assert one.tokens.tolist() == other.tokens.tolist()


def test_a_head_serves_classifiers_and_reduced_vocabularies(bare, classifier):
    ee.register.head("scaled", Scaled)
    rows = [{"text": f"number {n}", "label": n % 2} for n in range(8)]
    model = ee.attach(classifier, ee.ExitConfig((1,), head="scaled"), init="random")
    how = {"steps": 2, "batch_size": 4, "sequence_length": 16, "loss": "cross_entropy"}
    tuned = ee.tune(model, rows, **how, progress=False)
    assert ee.classify(tuned, ["a", "b"]).labels.shape == (2,)
    ids = ee.frequent_tokens(bare, TEXTS, 8)
    exits = ee.ExitConfig((2,), head="scaled", classes=8)
    reduced = ee.tune(
        ee.attach(bare, exits, token_ids=ids), TEXTS, steps=2, **SMALL, progress=False
    )
    assert ee.record(reduced, TEXTS, **SMALL).predictions.shape[0] == 2


def test_a_saved_model_with_a_head_that_was_not_added_says_which(bare, tmp_path):
    ee.register.head("odd", Scaled)
    folder = ee.save(ee.attach(bare, ee.ExitConfig((2,), head="odd")), tmp_path / "model")
    heads._registered.clear()
    with pytest.raises(ValueError, match="carries no head 'odd'"):
        ee.load(folder)


def test_a_confidence_decides_in_records_and_in_decoding_alike(tuned):
    """In records as calibrated, at run time as in records; also where records were made before."""
    ee.record(tuned, TEXTS, **SMALL)  # its program knows nothing of what comes
    ee.register.confidence("log_odds", lambda said: said.top - said.second)
    records = ee.record(tuned, TEXTS, **SMALL)
    margin = records.score("margin")
    odds = records.score("log_odds")
    assert odds.shape == margin.shape and ((odds >= 0) == (margin >= 0)).all()
    middle = np.median(odds[:-1], axis=1)
    model = dataclasses.replace(tuned, policy=ee.make_policy(middle, "log_odds"))
    answer = ee.generate(model, "1 2 3 4", raw=True, max_new_tokens=24)
    assert 0 < (answer.depths < model.depth).sum() < len(answer.depths)
    calibrated = ee.calibrate(tuned, records, epsilon=0.5, confidence="log_odds")
    assert calibrated.policy.confidence == "log_odds"
    with pytest.raises(ValueError, match="temperatures are known for .*, not for log_odds"):
        ee.calibrate(tuned, TEXTS, **SMALL, epsilon=0.5, confidence="log_odds", temperature=True)


def test_a_confidence_serves_classifiers(classifier):
    ee.register.confidence("sureness", lambda said: -said.entropy)
    rows = [{"text": f"number {n}", "label": n % 2} for n in range(8)]
    records = ee.record(classifier, rows, batch_size=4, sequence_length=16)
    np.testing.assert_allclose(records.score("sureness"), records.score("entropy") - 1, atol=1e-6)
    model = ee.calibrate(classifier, records, epsilon=0.2, confidence="sureness")
    assert ee.classify(model, ["a", "b", "c"]).scores.max() <= 0


class Constant(base.Drafter):
    """Always proposes the same token."""

    name, credit = "constant", 1.0

    def __init__(self, token):
        self.token = token

    def propose(self, engine, state, proposed):
        drafts = jnp.full((len(state.newest_B), engine.mode.pending - 1), self.token)
        usable = base.free(state)[:, None] & base.draftable(engine, state, drafts)
        return base.drafted(engine, state, proposed, self, drafts, usable.astype(jnp.float32))


def test_a_drafter_is_asked_by_name_and_changes_no_answer(tuned):
    whole = ee.generate(dataclasses.replace(tuned, policy=None), "Why?", max_new_tokens=16)
    drafter = ee.register.drafter(Constant(int(whole.tokens[5])))
    assert drafter.place == 3
    for names in (("constant",), ("lookup", "constant")):
        mode = ee.Mode("defer", drafters=names, pending=4)
        answer = ee.generate(tuned, "Why?", max_new_tokens=16, mode=mode)
        assert answer.tokens.tolist() == whole.tokens.tolist()
    assert mode.name == "verified: lookup + constant"
    assert answer.counts.drafted_BW.sum() > 0


def test_sources_are_split_and_named_in_settings(tuned, classifier):
    ee.register.texts("count", lambda rest: [f"{n} {n + 1} {n + 2}" for n in range(int(rest))])
    parts = [sources.documents("count:300", split) for split in sources.SPLITS]
    assert sum(map(len, parts)) == 300 and min(map(len, parts)) > 0
    assert len({text for part in parts for _, text in part}) == 300
    model = ee.tune(tuned, "count:300", steps=2, **SMALL, progress=False)
    assert model.settings.data.source == "count:300"
    assert ee.record(model, "count:300", **SMALL).groups.max() + 1 == len(parts[2])

    rows = [{"text": f"{n}", "label": n % 2} for n in range(100)]
    ee.register.examples("parity", lambda rest: (("even", "odd"), rows))
    how = {"steps": 2, "batch_size": 4, "sequence_length": 16, "loss": "cross_entropy"}
    tuned = ee.tune(classifier, "parity:", **how, progress=False)
    assert tuned.classes == ("even", "odd")


@pytest.mark.parametrize(
    ("kind", "name", "thing"),
    [
        ("head", "norm", Scaled),
        ("confidence", "gate", lambda said: said.top),
        ("texts", "made", lambda rest: []),
        ("texts", "two words", lambda rest: []),
        ("examples", "tfds", lambda rest: ((), [])),
    ],
)
def test_names_that_are_taken(kind, name, thing):
    with pytest.raises(ValueError, match=f"{name}"):
        getattr(ee.register, kind)(name, thing)


def test_the_same_twice_is_once_and_another_is_refused():
    def first(said):
        return said.top

    for kind, one, other in (
        ("confidence", first, lambda said: said.top),
        ("head", Scaled, nnx.Linear),
        ("texts", list, tuple),
        ("examples", list, tuple),
    ):
        add = getattr(ee.register, kind)
        add("mine", one)
        add("mine", one)
        with pytest.raises(ValueError, match="mine"):
            add("mine", other)
    drafter = Constant(1)
    assert ee.register.drafter(drafter) is ee.register.drafter(drafter)
    with pytest.raises(ValueError, match="there is a drafter 'constant' already"):
        ee.register.drafter(Constant(2))
    with pytest.raises(ValueError, match="Drafter lacks name, credit"):
        ee.register.drafter(type("Drafter", (base.Drafter,), {})())
