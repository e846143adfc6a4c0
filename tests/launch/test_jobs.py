import json
import pathlib
import runpy
import sys

import pytest

from early_exit.settings import read
from early_exit.training import preemption
from launch import jobs

BASE = read.defaults(
    model={"source": "weights"},
    exits={"points": (2, 4)},
    data={"source": "texts"},
    tune={"steps": 3, "warmup_steps": 2},
)


def runs_of(*asked, workdir):
    def add_all(add):
        for overrides in asked:
            add(**overrides)

    return jobs.expand(add_all, BASE, workdir)


def test_every_run_has_its_settings_and_a_folder_that_says_what_it_changes(tmp_path):
    asked = [
        {},
        {"tune.steps": 5, "exits.points": [1, 3]},
        {"data.batch_size": 4, "data.source": "a folder/or: two"},
        {"calibrate.batches": 1},
        {"evaluate.batches": 2},
    ]
    runs = runs_of(*asked, workdir=tmp_path)
    assert [str(run.folder.relative_to(tmp_path)) for run in runs] == [
        "base",
        "steps=5,points=1-3",
        "batch_size=4,source=a_folder_or__two",
        "calibrate.batches=1",
        "evaluate.batches=2",
    ]
    assert [run.overrides for run in runs] == asked
    assert runs[0].config == read.read(BASE)
    assert runs[1].config.exits.points == (1, 3) and runs[1].config.tune.steps == 5
    assert not any(run.is_finished for run in runs)
    assert not list(tmp_path.iterdir())


def test_everything_wrong_with_a_sweep_is_said_at_once(tmp_path):
    asked = [
        {"tune.stepz": 1, "tune.learning_rate": "fast"},
        {"tune.steps": 1},
        {"tune.steps": 1},
        {"tune.stepz": 1},
    ]
    with pytest.raises(ValueError, match="the sweep cannot start") as caught:
        runs_of(*asked, workdir=tmp_path)
    assert str(caught.value).split("\n  ")[1:] == [
        "config has no 'tune.stepz'; did you mean 'tune.steps'?",
        "config.tune.learning_rate is float (0.001), not str ('fast')",
        "steps=1: more than one run has this name",
    ]
    with pytest.raises(ValueError, match="adds no run"):
        runs_of(workdir=tmp_path)


def test_runs_that_cannot_be_are_refused_before_any_starts(tmp_path):
    with pytest.raises(ValueError, match="the sweep cannot start") as caught:
        runs_of({"tune.steps": 9}, {"tune.steps": 2}, {"tune.clip_norm": 0.0}, workdir=tmp_path)
    first, second = str(caught.value).split("\n  ")[1:]
    assert first.startswith("steps=2: tune.warmup_steps=2 must be below tune.steps=2")
    assert second.startswith("clip_norm=0.0: tune.clip_norm=0.0 must be above 0")


@pytest.mark.parametrize("value", ["a" * 251, "é" * 130, [10] * 100])
def test_a_name_too_long_for_a_folder_is_refused_before_anything_runs(tmp_path, value):
    """A file system counts bytes, and not characters."""
    overrides = {"data.source" if isinstance(value, str) else "exits.points": value}
    with pytest.raises(ValueError, match=r"… is a name of \d+ bytes, and a folder's has 255 at m"):
        runs_of(overrides, workdir=tmp_path)
    (run,) = runs_of({"data.source": "é" * 120}, workdir=tmp_path)
    run.folder.mkdir()


@pytest.mark.parametrize("name", ["smollm2_135m", "tiny"])
def test_the_sweeps_beside_the_configs_fit_them(name, tmp_path):
    file = runpy.run_path(pathlib.Path(__file__).parents[2] / "configs" / f"{name}.py")
    runs = jobs.expand(file["sweep"], file["get_config"](), tmp_path)
    assert len({json.dumps(read.as_dict(run.config)) for run in runs}) == len(runs) > 1


def job(folder, script):
    return jobs.Job([sys.executable, "-SEc", script], folder)


def test_a_failed_job_does_not_stop_the_next(tmp_path, capsys):
    started = [
        job(tmp_path / "a", "import sys; print('one'); sys.exit('two')"),
        job(tmp_path / "b", "print('three')"),
        job(tmp_path / "c", f"import sys; sys.exit({preemption.EXIT_STATUS})"),
        job(tmp_path / "d", "import os; os.kill(os.getpid(), 15)"),  # before it had an ear for it
    ]
    jobs.run_local(started)
    texts = [each.log.read_text() for each in started]
    assert [sorted(text.split()) for text in texts] == [["one", "two"], ["three"], [], []]
    printed = capsys.readouterr().out
    assert "[1/4] a: failed with status 1" in printed and "[2/4] b: finished" in printed
    assert "[3/4] c: saved and left" in printed and "[4/4] d: saved and left" in printed
    jobs.run_local(started[1:2])
    assert started[1].log.read_text() == "three\nthree\n"  # what an earlier start said is kept


# Ends when `needed` have begun, and says from when to when it ran.
MEETS = """
import pathlib, sys, time
began = time.monotonic()
here, name, needed = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(here / name).touch()
while len(list(here.iterdir())) < needed:
    time.sleep(0.01)
print(began, time.monotonic())
"""


def test_so_many_jobs_run_at_a_time(tmp_path):
    """The first two wait for each other, then the next two; never are there three."""
    (met := tmp_path / "met").mkdir()
    started = []
    for name, needed in ("a", 2), ("b", 2), ("c", 4), ("d", 4):
        command, folder = job(tmp_path / name, MEETS)
        started.append(jobs.Job([*command, str(met), name, str(needed)], folder))
    jobs.run_local(started, parallel=2)
    spans = [tuple(map(float, each.log.read_text().split())) for each in started]
    assert max(sum(a <= began <= b for a, b in spans) for began, _ in spans) == 2


def test_a_sweep_that_ends_early_lets_its_jobs_save(tmp_path):
    (met := tmp_path / "met").mkdir()
    saves = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))\n"
        "(pathlib.Path(sys.argv[1]) / 'ready').touch()\n"
        "time.sleep(100)"
    )
    command, folder = job(tmp_path / "long", saves)
    long = jobs.Job([*command, str(met)], folder)
    command, folder = job(tmp_path / "short", MEETS)
    short = jobs.Job([*command, str(met), "short", "2"], folder)
    impossible = jobs.Job([str(tmp_path / "no such program")], tmp_path / "impossible")
    with pytest.raises(FileNotFoundError, match="no such program"):
        jobs.run_local([long, short, impossible], parallel=2)
    assert long.log.read_text() == "saved\n"
