"""Filling a cache and tuning from it: what the backbone would have given, and no more of it."""

import functools
import hashlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import tiny
from early_exit import tree
from early_exit.data import shards
from early_exit.data.stream import Rank
from early_exit.distillation import hidden_states
from early_exit.runs import assemble, checkpoint, layout
from early_exit.settings.overrides import override
from early_exit.settings.read import changed, read
from early_exit.training import loop
from early_exit.training.observe import observe

ROOT = pathlib.Path(__file__).parents[2]
MODEL = str(ROOT / "tests/fixtures/tiny_chat")
TOP_K = 24


@pytest.fixture(scope="module")
def config():
    settings = {
        "model.source": MODEL,
        "data.sequence_length": 32,
        "tune.steps": 6,
        "tune.checkpoint_every": 2,
        "tune.validate_every": 6,
        "tune.validation_batches": 1,
    }
    return read(override(tiny.get_config(), settings))


@pytest.fixture(scope="module")
def cache(config, tmp_path_factory):
    """Two shards of four batches of four rows."""
    folder = tmp_path_factory.mktemp("cache") / "states"
    hidden_states.fill(config, folder, batches=7, top_k=TOP_K)
    return folder


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def batch_of(store, numbers, points):
    rows = [hidden_states.unpack(store[i], points) for i in numbers]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_rows_are_the_training_stream_and_what_the_backbone_makes_of_it(config, cache, tmp_path):
    store = shards.Store(cache)
    assert len(store) == 32
    run = loop.Run(config, tmp_path)
    stream = run.batches()
    for number in range(2):
        batch = next(stream)
        found = batch_of(store, range(4 * number, 4 * number + 4), run.model.exits.points)
        for name in batch:
            np.testing.assert_array_equal(found[name], batch[name])
        observed = observe(run.frozen, batch, model=run.model, recipe=run.recipe)
        for point, hidden in zip(run.model.exits.points, observed["hidden"], strict=True):
            got = found[f"hidden_{point}"]
            assert got.dtype == ml_dtypes.bfloat16
            np.testing.assert_allclose(got.astype(np.float32), hidden, rtol=2**-8, atol=1e-5)
        final = run.model.bind(run.frozen).backbone.readout(observed["last"], observed["context"])
        log_probs = np.asarray(jax.nn.log_softmax(final))
        best = np.sort(log_probs)[..., ::-1][..., :TOP_K]
        np.testing.assert_allclose(found["teacher_log_probs"], best, atol=0.01)
        at_ids = np.take_along_axis(log_probs, found["teacher_ids"].astype(int), axis=-1)
        np.testing.assert_allclose(at_ids, best, atol=1e-4)
    stream.close()


def test_what_others_made_or_an_interruption_left_is_not_made_again(
    config, cache, tmp_path, monkeypatch
):
    fill = functools.partial(
        hidden_states.fill, config, tmp_path / "states", batches=8, top_k=TOP_K
    )
    made = []
    fill(rank=Rank(1, 2), done=made.append)
    assert list(shards.Store(tmp_path / "states").shards) == [1] and made == [4 * 32] * 4

    def interrupted(row, pack=hidden_states.pack, seen=[]):  # noqa: B006
        seen.append(row)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return pack(row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hidden_states, "pack", interrupted)
        fill()
    fill(done=made.append)
    assert made == [4 * 32] * 8
    assert digests(tmp_path / "states") == digests(cache)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A cache with the teacher's distribution whole."""
    folder = tmp_path_factory.mktemp("whole") / "states"
    vocab_size = assemble.abstract_model(config).config.vocab_size
    hidden_states.fill(config, folder, batches=4, top_k=vocab_size)
    return folder


@pytest.mark.parametrize(
    "heads",
    [
        {"exits.head": "layer", "exits.gate": True},
        {"exits.output": "shared", "exits.points": (4,), "tune.loss": "both", "model.scan": True},
        {"exits.head": "norm", "exits.classes": 0, "exits.init": "random"},
    ],
)
def test_a_step_from_states_is_a_step_with_the_backbone(config, whole, tmp_path, heads):
    """On the same rows in the same order, but for the rounding of what is stored."""
    config = changed(config, heads)
    runs = [
        loop.Run(changed(config, {"tune.hidden_states": name}), tmp_path / f"{bool(name)}")
        for name in ("", str(whole))
    ]
    assert "blocks" not in runs[1].given["backbone"]
    store, points, found = shards.Store(whole), config.exits.points, []
    for run in runs:
        state, seen = run.state(), []
        for number in range(4):
            batch = batch_of(store, range(4 * number, 4 * number + 4), points)
            if run is runs[0]:
                batch = {name: batch[name] for name in ("tokens", "documents", "positions")}
            state, metrics = run.step(state, run.given, run.place_batch(batch))
            seen.append(metrics)
        found.append((state["params"], seen))
    (params, metrics), (from_states, cached_metrics) = found
    for a, b in zip(metrics, cached_metrics, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=0.02)
    start = tree.flatten(runs[0].state()["params"])
    params, from_states = tree.flatten(params), tree.flatten(from_states)
    moved = sum(float(jnp.sum((params[path] - start[path]) ** 2)) for path in start)
    apart = sum(float(jnp.sum((params[path] - from_states[path]) ** 2)) for path in start)
    assert apart < 0.1**2 * moved


def test_no_block_is_run(config, cache, tmp_path):
    """What is left is the heads' work: it does not grow with the backbone's depth."""
    flops = []
    for name in ("", str(cache)):
        run = loop.Run(changed(config, {"tune.hidden_states": name}), tmp_path / f"{bool(name)}")
        stream = run.batches()
        lowered = run.step.lower(run.state(), run.given, run.place_batch(next(stream)))
        stream.close()
        flops.append(lowered.cost_analysis()["flops"])
    block = tree.count(run.frozen["backbone"]["blocks"]["0"])
    tokens, depth = run.feed.per_batch, run.model.config.depth
    # The blocks, and the teacher's output matrix.
    assert flops[0] - flops[1] > 2 * block * depth * tokens


def test_a_run_from_states_resumes_bit_equal_and_is_a_run(config, cache, tmp_path, monkeypatch):
    config = changed(config, {"tune.hidden_states": str(cache), "exits.points": (4,)})
    rows = loop.tune(config, tmp_path / "whole")
    assert [row["exit"] for row in rows] == [4, 6] and rows[1]["agreement"] == 1

    def broken(run, batch, place=loop.Run.place_batch, seen=[]):  # noqa: B006
        seen.append(batch)
        if len(seen) == 4:
            raise OSError("gone")
        return place(run, batch)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr(loop.Run, "place_batch", broken)
        loop.tune(config, tmp_path / "broken")
    assert checkpoint.latest_step(tmp_path / "broken" / layout.CHECKPOINTS) == 2
    assert loop.tune(config, tmp_path / "broken") == rows
    tuned = [assemble.load_tuned(tmp_path / name) for name in ("whole", "broken")]
    assert tuned[0].metadata == tuned[1].metadata


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits.points": (1, 2, 5)}, r"no hidden states after blocks \[1, 5\], only after \[2, 4"),
        ({"data.sequence_length": 64}, "have 32 tokens, but data.sequence_length=64; set it"),
        ({"data.batch_size": 64}, "has 32 rows, fewer than data.batch_size=64; cache more"),
        ({"model.dtype": "bfloat16"}, "of a backbone with fingerprint .* in bfloat16; name the"),
        ({"tune.hidden_states": "nowhere"}, "no records in nowhere"),
    ],
)
def test_settings_that_do_not_suit_the_states(config, cache, tmp_path, changes, message):
    config = changed(config, {"tune.hidden_states": str(cache)} | changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loop.Run(config, tmp_path)


def test_states_that_know_their_backbone_by_its_weights_alone_are_taken(config, cache, tmp_path):
    """As all did before fingerprints were of the config, too."""
    old = shutil.copytree(cache, tmp_path / "old")
    about = json.loads((old / "about.json").read_text())
    known = assemble.load_backbone(config)[0].identity
    assert about["backbone"] == str(known)
    (old / "about.json").write_text(json.dumps(about | {"backbone": known.weights}))
    hidden_states.fill(config, old, batches=4, top_k=TOP_K)
    loop.Run(changed(config, {"tune.hidden_states": str(old)}), tmp_path / "run")


def test_another_text_does_not_suit_the_states(config, cache, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(ROOT / "early_exit", text)
    settings = {"tune.hidden_states": str(cache), "data.source": str(text)}
    with pytest.raises(ValueError, match="of another text than the train split of data.source="):
        loop.Run(changed(config, settings), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {"top_k": 0}, r"top_k must lie in 1…\d+, not 0"),
        ({}, {"batches": 0}, "batches must be at least 1, not 0"),
        ({"exits.points": ()}, {}, "neither exits.points nor exits.recurrent_taps names"),
        ({"exits.points": (3,)}, {"cached": True}, "holds records with another points; name"),
        ({"seed": 1}, {"cached": True}, "holds records with another seed; name another folder"),
    ],
)
def test_what_makes_no_states(config, cache, tmp_path, changes, given, message):
    folder = cache if given.pop("cached", False) else tmp_path
    given = {"batches": 4, "top_k": TOP_K} | given
    with pytest.raises(ValueError, match=message):
        hidden_states.fill(changed(config, changes), folder, **given)
