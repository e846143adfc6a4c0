"""On a mesh, a run is evaluated and serves as on one device.

Eight devices need a process of their own, which does both with the same run.
"""

import json

import fake_devices
import numpy as np
import pytest

pytestmark = pytest.mark.studies

SETTINGS = {
    "exits.head": "norm",
    "exits.points": "(3,)",
    "data.sequence_length": 16,
    "data.batch_size": 8,
    "tune.steps": 2,
    "tune.warmup_steps": 1,
    "tune.validation_batches": 1,
    "calibrate.batches": 2,
    "calibrate.epsilon": 0.3,
    "evaluate.epsilons": "(0.3,)",
    "evaluate.new_tokens": 6,
    "evaluate.sample_tokens": 4,
}
# Modes in which what is timed decides nothing.
UNTIMED = ("lossy", "deferred", None)
SCRIPT = """
import json, pathlib, shutil, sys
import in_process, jax, numpy.fft, scipy.optimize, transformers  # commands import them late
from early_exit.decoding import mode as modes
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.session import Request, Session
from early_exit.runs import assemble
from launch import on_mesh

folder, settings = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
assert jax.device_count() == 8
loaded, load, mesh_of = [], assemble.load_tuned, on_mesh.mesh_of

def kept(*args):
    loaded.append(load(*args))
    return loaded[-1]

assemble.load_tuned = kept

def run(command, *flags):
    done = in_process.run(command, *flags)
    assert done.returncode == 0, (command, flags, done.stderr)

def served(tuned):
    "Answers to requests that come while others run, as `launch.serve` has them."
    decoder = Decoder(tuned.model, tuned.params, assemble.load_policy(tuned), (), modes.LOSSY)
    session, answers = Session(decoder, 4, sizes=(4,), slots=256, draws=False), {}
    def step():
        answers.update({event.id: event.answer for event in session.step(2) if event.ended})
    for prompt in ([7, 3, 52, 11], [5] * 40, [1], [9, 8, 9]):
        session.add(Request(prompt, max_new_tokens=6))
        step()
    while session.busy:
        step()
    return [[answers[id].tokens.tolist(), answers[id].log_probs.tolist()] for id in sorted(answers)]

given = [f"--config.{name}={value}" for name, value in settings.items()]
run("tune", "--config=configs/tiny.py", *given, f"--workdir={folder / 'run'}")
found = {}
shared = [f"--mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
for name, axes in {"one": [], "mesh": shared}.items():
    on_mesh.mesh_of = mesh_of if axes else (lambda config: None)
    work = shutil.copytree(folder / "run", folder / name)
    run("calibrate", f"--workdir={work}", *axes)
    run("evaluate", f"--workdir={work}", *axes)
    assert (loaded[-1].mesh is not None) == bool(axes)
    found[name] = {"served": served(loaded[-1])}
    found[name]["evaluation"] = json.loads((work / "evaluation.json").read_text())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    given = folder, json.dumps(SETTINGS)
    return fake_devices.found(SCRIPT, *given, EARLY_EXIT_CACHE=str(folder / "cache"))


def test_requests_that_come_one_after_the_other_are_answered_as_on_one_device(found):
    assert len(found["one"]["served"]) == 4
    for ours, theirs in zip(found["mesh"]["served"], found["one"]["served"], strict=True):
        assert ours[0] == theirs[0]
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)


def test_an_evaluation_says_what_it_says_of_one_device(found):
    """But for what is timed, and for modes in which that decides what is drafted."""
    ours, theirs = (found[of]["evaluation"] for of in ("mesh", "one"))
    for exit, other in zip(ours["exits"], theirs["exits"], strict=True):
        assert exit == pytest.approx(other, abs=1e-5)
    rows, others = (
        [row for row in of["decoding"]["rows"] if row["mode"] in UNTIMED] for of in (ours, theirs)
    )
    assert {row["mode"] for row in rows} == {*UNTIMED}
    for row, other in zip(rows, others, strict=True):
        for name in ("agreement", "blocks_per_token", "exit_shares"):
            assert row[name] == pytest.approx(other[name], abs=1e-5), name
