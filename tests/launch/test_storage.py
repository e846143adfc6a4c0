"""Whole runs in buckets of real servers: every command, a kill in the middle, faults on the way.

Each command is told nothing of buckets but their names.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import bucket_servers
import jax
import numpy as np
import pytest
from forks import Launcher

from early_exit.runs import checkpoint, layout
from early_exit.runs.metrics import FILE
from early_exit.storage import buckets, files
from early_exit.training import plan

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    "--config=configs/tiny.py:head=norm,classes=0",
    f"--config.model.source={ROOT / 'tests/fixtures/tiny_chat'}",
    "--config.data.sequence_length=16",
    "--config.data.batch_size=2",
]
RUN = [*TINY, "--config.tune.steps=40", "--config.tune.checkpoint_every=4"]

pytestmark = pytest.mark.storage


@pytest.fixture(scope="module", params=["gcs", "s3"])
def served(request, tmp_path_factory):
    """(root of a bucket, faults, runs commands that find it, their environment)."""
    libraries = {"gcs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto")}
    for library in libraries[request.param]:
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("served")
    with getattr(bucket_servers, request.param)() as (root, faults, environment):
        environment |= {"JAX_PLATFORMS": "cpu", "EARLY_EXIT_CACHE": str(folder / "cache")}
        launcher = Launcher(folder, environment)
        yield buckets.place(root), faults, launcher, os.environ | environment
        launcher.close()


@pytest.fixture(scope="module")
def local(launch, tmp_path_factory):
    """A run that nothing has happened to."""
    folder = tmp_path_factory.mktemp("local") / "run"
    done = launch("tune", *RUN, f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def run(served, local):
    """A run in a bucket that was killed, and went on through faults; one of here beside s3://."""
    root, faults, launcher, environment = served
    if _keeps_no_runs(root):
        return local
    folder = root / "runs/a"
    command = [sys.executable, "-m", "launch.tune", *RUN, f"--workdir={folder}"]
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 120
    while checkpoint.latest_step(folder / layout.CHECKPOINTS) is None:
        assert first.poll() is None and time.monotonic() < give_up
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert checkpoint.latest_step(folder / layout.CHECKPOINTS) < 40
    for fault in ("503", "drop", "drop after", "lost"):
        faults.plan(fault, lambda method, path: method in ("PUT", "POST") and "metrics" in path)
    for fault in ("503", "drop"):
        faults.plan(fault, lambda method, path: method in ("PUT", "POST") and "/state" in path)
    done = launcher("tune", *RUN, f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    assert len(faults.happened) >= 4
    faults.planned.clear()
    return folder


def _keeps_no_runs(root):
    """Orbax writes no checkpoints to s3://, which is told (see the refusals)."""
    return str(root).startswith("s3://")


def test_killed_and_gone_on_through_faults_it_is_the_run_that_it_would_have_been(run, local):
    if run == local:
        pytest.skip("there are no runs in s3://")
    assert (run / FILE).read_text() == (local / FILE).read_text()
    config = layout.load_config(run)
    assert config == layout.load_config(local)
    found, expected = (
        checkpoint.restore(folder / layout.CHECKPOINTS, _like(config)) for folder in (run, local)
    )
    jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
    assert found[1] == expected[1]
    assert not (run / "in_use.json").exists()


def _like(config):
    from early_exit import sharding
    from early_exit.runs import assemble

    model = assemble.abstract_model(config)
    return plan.state(config, assemble.for_tuning(config, model), sharding.make_mesh(config.mesh))


def test_what_comes_after_tuning(served, run, tmp_path):
    root, _, launcher, _ = served
    runs = tmp_path if _keeps_no_runs(root) else root / "runs"
    files.write_text(root / "prompts.txt", "one\ntwo\n")
    generate = ["--max_new_tokens=4", f"--input={root / 'prompts.txt'}"]
    commands = [
        ("calibrate", f"--workdir={run}"),
        ("generate", f"--workdir={run}", *generate, f"--output={root / 'answers.jsonl'}"),
        ("export", f"--workdir={run}", f"--to={root / 'exported'}"),
        ("inspect", str(root / "exported")),
        ("generate", f"--workdir={root / 'exported'}", "--max_new_tokens=4", "--prompt=one"),
        ("tune", *TINY, "--config.tune.steps=3", f"--config.model.source={root / 'exported'}")
        + ("--config.tune.warmup_steps=1", f"--workdir={runs / 'again'}"),
    ]
    for command in commands:
        done = launcher(*command)
        assert done.returncode == 0, (command, done.stderr)
    for name in ("policy.json", "records.npz"):
        assert (run / name).exists()
    assert (root / "answers.jsonl").read_text().count("\n") == 2


def test_text_tokens_and_hidden_states(served, tmp_path):
    root, _, launcher, _ = served
    for number in range(3):
        rows = "".join(f'{{"text": "row {number} {i} and so on"}}\n' for i in range(200))
        files.write_text(root / f"text/{number}.jsonl", rows)
    text, packed, states = root / "text", root / "packed", root / "states"
    runs = tmp_path / "runs" if _keeps_no_runs(root) else root / "runs"
    short = ["--config.tune.steps=3", "--config.tune.warmup_steps=1"]
    commands = [
        ("tokenize", *TINY, f"--source={text}/*.jsonl", f"--packed={packed}", "--processes=1"),
        ("tune", *TINY, *short, f"--config.data.source=packed:{packed}")
        + (f"--workdir={runs / 'packed'}",),
        ("cache", *TINY, f"--config.data.source={text}", f"--hidden_states={states}")
        + ("--batches=8", "--top_k=4"),
        ("tune", *TINY, *short, f"--config.data.source={text}")
        + (f"--config.tune.hidden_states={states}", f"--workdir={runs / 'states'}"),
    ]
    for command in commands:
        done = launcher(*command)
        assert done.returncode == 0, (command, done.stderr)
    here = [
        ("tokenize", *TINY, f"--source={text}", f"--packed={tmp_path / 'here'}", "--processes=1")
    ]
    assert launcher(*here[0]).returncode == 0
    for path in (tmp_path / "here").rglob("*.array_record"):
        assert (packed / str(path.relative_to(tmp_path / "here"))).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("tune", *RUN, "--workdir={nowhere}/run"),
            "cannot write to gs://nowhere.*does the bucket|kept in s3://nowhere/run: Orbax",
        ),
        (("tune", *RUN, "--workdir=gs:/bucket/run"), "gs:/bucket/run is no place that is known"),
        (
            ("tune", *RUN, "--workdir=s3://bucket/run"),
            "Orbax writes them to disks and to gs:// only",
        ),
        (("sweep", *TINY[:1], "--workdir={root}/sweep"), "the folder of a sweep cannot be in a"),
        (("tune", *RUN, "--workdir={root}/x", "--profile=1:2"), "traced cannot be in a bucket"),
        (("calibrate", "--workdir={root}/none"), "no run in .*none"),
        (("tune", *TINY, "--config.data.source={root}/none", "--workdir={tmp}/y"), "there is no"),
    ],
)
def test_what_cannot_be_is_told_before_work(served, tmp_path, command, message):
    import re

    root, _, launcher, _ = served
    places = {"root": root, "tmp": tmp_path, "nowhere": str(root).replace("bucket", "nowhere")}
    done = launcher(*(word.format(**places) for word in command))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert not pathlib.Path("gs:").exists() and not pathlib.Path("s3:").exists()
