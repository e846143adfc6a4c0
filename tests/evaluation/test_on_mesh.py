"""On a mesh, a run is evaluated and serves as on one device.

Eight devices need a process of their own, in which one run does both on each mesh in turn.
"""

import json

import fake_devices
import meshes
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
import json, pathlib, sys
import meshes, uvicorn
from starlette.testclient import TestClient

folder, settings = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
commands, found = meshes.Commands(), {}
commands.tune("configs/tiny.py", folder / "run", settings)
PROMPTS = ["One", "Why are there so many of them? " * 2, "a"]

def asked(app, **_):
    "What clients of the server are answered, instead of listening."
    with TestClient(app) as client:
        how = {"model": "small", "prompt": PROMPTS, "max_tokens": 6, "seed": 7}
        for drawn in ({"temperature": 0, "logprobs": 1}, {"temperature": 1.5, "logprobs": 0}):
            answer = client.post("/v1/completions", json={**how, **drawn})
            assert answer.status_code == 200, answer.text
            for choice in answer.json()["choices"]:
                said = choice["logprobs"]
                served.append([said["tokens"], said["token_logprobs"]])

uvicorn.run = asked
for name, work, mesh in commands.each(folder / "run"):
    flags, served = [f"--workdir={work}", *mesh], []
    commands.run("calibrate", *flags)
    commands.run("serve", *flags, "--mode=lossy", "--rows=2", "--positions=256", "--name=small")
    commands.run("evaluate", *flags)
    found[name] = {"served": served,
                   "evaluation": json.loads((work / "evaluation.json").read_text())}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    given = folder, json.dumps(SETTINGS)
    return fake_devices.found(SCRIPT, *given, EARLY_EXIT_CACHE=str(folder / "cache"))


@pytest.mark.parametrize("mesh", meshes.SHARED)
def test_clients_of_a_server_are_answered_as_by_one_device(found, mesh):
    served = found["one"]["served"]
    assert len(served) == 6 and len({tuple(tokens) for tokens, _ in served}) > 3
    for ours, theirs in zip(found[mesh]["served"], served, strict=True):
        assert ours[0] == theirs[0]
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)


@pytest.mark.parametrize("mesh", meshes.SHARED)
def test_an_evaluation_says_what_it_says_of_one_device(found, mesh):
    """But for what is timed, and for modes in which that decides what is drafted."""
    ours, theirs = (found[of]["evaluation"] for of in (mesh, "one"))
    for exit, other in zip(ours["exits"], theirs["exits"], strict=True):
        assert exit == pytest.approx(other, abs=1e-5)
    rows, others = (
        [row for row in of["decoding"]["rows"] if row["mode"] in UNTIMED] for of in (ours, theirs)
    )
    assert {row["mode"] for row in rows} == {*UNTIMED}
    for row, other in zip(rows, others, strict=True):
        for name in ("agreement", "blocks_per_token", "exit_shares"):
            assert row[name] == pytest.approx(other[name], abs=1e-5), name
