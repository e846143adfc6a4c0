"""A run that breaks keeps the batch; run again, it says whether the batch or the steps did it."""

import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_resnet, tiny
from conftest import SHORT_RUN
from early_exit import tree
from early_exit.runs import checkpoint
from early_exit.runs.layout import CHECKPOINTS
from early_exit.runs.metrics import read_metrics
from early_exit.settings.overrides import override
from early_exit.settings.read import changed, read
from early_exit.training import bad_batch, loop, replay

SETTINGS = SHORT_RUN | {
    "tune.steps": 9,
    "tune.validate_every": 99,
    "tune.checkpoint_every": 2,
}


def broken(config, folder, monkeypatch, step, break_):
    """Tunes with a batch of that step that `break_` changes; (what is said, the batch)."""
    met, place = [], loop.Run.place_batch

    def place_batch(run, batch):
        met.append(break_(dict(batch)) if len(met) + 1 == step else batch)
        return place(run, met[-1])

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as error:
        patch.setattr(loop.Run, "place_batch", place_batch)
        loop.tune(config, folder)
    return str(error.value), met[step - 1]


def test_a_batch_that_is_not_finite(tmp_path, monkeypatch):
    config = read(
        override(
            digits_resnet.get_config("width=4,head=linear"),
            {
                "data.batch_size": 4,
                "tune.steps": 4,
                "tune.warmup_steps": 1,
                "tune.checkpoint_every": 1,
            },
        )
    )

    def nan(batch):
        images = np.array(batch["images"])
        images[1, 2, 3] = math.nan
        return batch | {"images": images}

    # The batch of step 3 is placed before step 2 is looked at, and that of step 4 before step 3 is.
    said, batch = broken(config, tmp_path, monkeypatch, 3, nan)
    path = tmp_path / "bad_batch_3.npz"
    assert said.startswith("step 3: the loss is nan") and str(path) in said
    assert f"python -m launch.replay --workdir={tmp_path}" in said
    assert bad_batch.newest(tmp_path) == path
    step, saved = bad_batch.read(path)
    assert step == 3 and saved.keys() == batch.keys()
    for name, x in batch.items():
        np.testing.assert_array_equal(saved[name], x)
        assert saved[name].dtype == x.dtype

    found = replay.replay(config, tmp_path, path)
    assert (found.step, found.checkpoint, found.inputs) == (3, 2, ["images"])
    assert found.parameter is None and found.gradient is not None
    assert found.verdict() == "the batch itself is not finite (images): mend the data"


def test_steps_that_ruined_the_parameters(tmp_path):
    """Step 2 moves them beyond all measure, and step 3 shows it; nothing was saved before."""
    changes = {"exits.head": "norm", "tune.learning_rate": 1e30, "tune.checkpoint_every": 5}
    config = read(override(tiny.get_config(), SETTINGS | changes))
    with pytest.raises(FloatingPointError, match="step 3"):
        loop.tune(config, tmp_path)
    found = replay.replay(config, tmp_path, bad_batch.newest(tmp_path))
    assert (found.step, found.checkpoint, found.inputs) == (3, 0, [])
    assert found.parameter is None and found.gradient is None
    assert "with the parameters of step 0 all is finite: the 2 steps after them" in found.verdict()
    # The batch of step 3, on the parameters of step 0, which those of step 1 still are.
    assert found.losses.keys() == {"loss", "loss/exit_3"} and found.gradient_norms.keys() == {
        "exits/3"
    }
    assert all(map(math.isfinite, [*found.losses.values(), *found.gradient_norms.values()]))
    still = changed(config, {"tune.learning_rate": 1e-30, "tune.steps": 3})
    loop.tune(still, tmp_path / "still")
    third = next(line for line in read_metrics(tmp_path / "still") if line["step"] == 3)
    assert found.losses["loss"] == pytest.approx(third["loss"], rel=1e-6)

    # From the checkpoint right before it, it happens again.
    config = changed(config, {"tune.checkpoint_every": 1})
    folder = tmp_path / "saved"
    with pytest.raises(FloatingPointError, match="step 3"):
        loop.tune(config, folder)
    again = replay.replay(config, folder, bad_batch.newest(folder))
    assert (again.checkpoint, again.parameter) == (2, None)
    assert not math.isfinite(again.losses["loss"]) and again.largest[1] > 1e25
    assert again.largest[0].startswith("exits/3/") and again.largest[0] in again.verdict()


def test_a_replay_is_the_runs_own_step(tmp_path):
    """Loss, and the norm of all gradients, are those that the run wrote; nothing is changed."""
    config = read(override(tiny.get_config(), SETTINGS | {"tune.steps": 3}))
    loop.tune(config, tmp_path)
    run = loop.Run(config, tmp_path)
    batches = run.batches()
    third = [next(batches) for _ in range(3)][2]
    batches.close()
    path = bad_batch.save(tmp_path, 3, run.place_batch(third))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    found = replay.replay(config, tmp_path, path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert found.checkpoint == 2  # that of step 3 came after the batch
    assert checkpoint.latest_step(tmp_path / CHECKPOINTS) == 3
    line = next(line for line in read_metrics(tmp_path) if line["step"] == 3)
    assert found.losses["loss"] == pytest.approx(line["loss"], rel=1e-6)
    whole = math.hypot(*found.gradient_norms.values())
    assert whole == pytest.approx(line["grad_norm"], rel=1e-5)
    assert found.largest[0] in tree.flatten({**run.frozen, **run.state()["params"]})


def test_verdicts_name_what_to_look_at():
    fine = replay.Replay(9, 4, {"loss": 1.0}, {"exits/3": 1.0}, [], None, None, ("exits/3/a", 2.0))
    assert "the 4 steps after them have ruined" in fine.verdict()
    gone = dataclasses.replace(fine, parameter="exits/3/a")
    assert gone.verdict().startswith("the parameters of step 4 are not finite: lower tune.learn")
    steep = dataclasses.replace(fine, gradient="exits/3/a")
    assert "look at the batch, or, if exits/3/a with a value of 2 has grown" in steep.verdict()


def test_hidden_states_of_a_cache_are_kept_as_they_are(tmp_path):
    hidden = jnp.array([[1.0, -3.1416], [jnp.inf, 1e-20]], jnp.bfloat16)
    path = bad_batch.save(tmp_path, 7, {"hidden_8": hidden, "tokens": np.zeros((2, 3), np.int32)})
    step, saved = bad_batch.read(path)
    assert step == 7 and saved.keys() == {"hidden_8", "tokens"}
    np.testing.assert_array_equal(saved["hidden_8"], hidden.astype(jnp.float32))


def test_what_is_no_batch(tmp_path):
    with pytest.raises(FileNotFoundError, match="no bad_batch_<step>.npz in .*: no batch broke"):
        bad_batch.newest(tmp_path)
    for step in (9, 10):
        bad_batch.save(tmp_path, step, {"tokens": np.zeros((2, 3), np.int32)})
    assert bad_batch.newest(tmp_path).name == "bad_batch_10.npz"
    path = tmp_path / "bad_batch_11.npz"
    path.write_bytes((tmp_path / "bad_batch_9.npz").read_bytes()[:50])
    with pytest.raises(ValueError, match="bad_batch_11.npz holds no batch of a tuning run"):
        bad_batch.read(path)
    np.savez(path, tokens=np.zeros(2))
    with pytest.raises(ValueError, match="bad_batch_11.npz holds no batch of a tuning run"):
        bad_batch.read(path)


def test_a_batch_that_cannot_be_written_does_not_hide_why_the_run_ended(tmp_path):
    told = bad_batch.keep(tmp_path / "gone", 9, {"tokens": np.zeros(2, np.int32)})
    assert re.match(
        r"The last good checkpoint is kept, but the batch could not be \(.*No such file", told
    )


def test_a_batch_of_another_run(tmp_path):
    config = read(override(tiny.get_config(), SETTINGS))
    path = bad_batch.save(tmp_path, 9, {"tokens": np.zeros((3, 4), np.int32)})
    with pytest.raises(ValueError, match="bad_batch_9.npz does not fit the run in"):
        replay.replay(config, tmp_path, path)
