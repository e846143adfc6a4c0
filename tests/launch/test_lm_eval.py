"""`launch.lm_eval` as a user types it, and what it says where its library is not installed."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

HERE = importlib.util.find_spec("lm_eval") is not None
ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(HERE, reason="lm-eval is installed")
def test_without_the_library_it_is_named(launch, tmp_path):
    done = launch("lm_eval", f"--workdir={tmp_path}", "--tasks=arc_easy")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "tasks need lm-evaluation-harness" in done.stderr
    assert "pip install '.[lm-eval]'" in done.stderr


@pytest.mark.lm_eval
@pytest.mark.skipif(not HERE, reason="needs lm-eval")
def test_tasks_of_a_run_from_both_sides(launch, tmp_path):
    """By our command, and by the harness's own with our model among its models."""
    folder, out = tmp_path / "run", tmp_path / "found.json"
    for command in (
        ("tune", "--config=configs/tiny.py", f"--workdir={folder}"),
        ("calibrate", f"--workdir={folder}", "--epsilon=0.6"),
    ):
        assert launch(*command).returncode == 0
    flags = [f"--workdir={folder}", "--include=experiments/tasks", "--limit=2"]
    task = "local_standard_library"
    done = launch("lm_eval", *flags, f"--tasks={task}", "--mode=deferred", f"--output={out}")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    ((score,), (taken,)) = found["scores"], found["usage"]
    assert (score["task"], score["metric"]) == (task, "bits_per_byte")
    assert taken["blocks_per_token"] < 6 and taken["tokens"] > 500
    assert "epsilon 0.6, deferred:" in done.stdout
    assert f"{score['value']:.3f}" in done.stdout

    model = f"workdir={folder},mode=deferred,policy=own"
    arguments = ["run", "--model", "early_exit", "--model_args", model, "--tasks", task]
    arguments += ["--include_path", "experiments/tasks", "--limit", "2"]
    arguments += ["--output_path", str(tmp_path / "theirs")]
    module = [sys.executable, "-m", "early_exit.evaluation.harness"]
    theirs = subprocess.run([*module, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    (path,) = (tmp_path / "theirs").rglob("results_*.json")
    results = json.loads(path.read_text())["results"][task]
    assert results["bits_per_byte,none"] == pytest.approx(score["value"], rel=1e-5)


@pytest.mark.lm_eval
@pytest.mark.skipif(not HERE, reason="needs lm-eval")
def test_an_exit_and_the_full_model_are_one_too_many(launch, tmp_path):
    done = launch("lm_eval", f"--workdir={tmp_path}", "--tasks=x", "--full", "--exit=2")
    assert done.returncode == 1 and "give one of --full and --exit" in done.stderr
