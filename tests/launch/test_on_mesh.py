"""Commands on a mesh do what they do on one device; what they refuse, before work begins.

Eight devices need a process of their own, in which one run of each kind is calibrated, answers and
is exported or evaluated on each mesh in turn.
"""

import json
import pathlib

import fake_devices
import in_process
import meshes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from configs import tiny
from early_exit.calibration.chains import Chains
from early_exit.calibration.records import Records
from early_exit.runs import layout
from early_exit.settings.read import changed, read

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {
    "exits.head": "norm",
    "exits.points": "(3,)",
    "exits.recurrent_taps": "(2,6)",
    "exits.classes": 64,
    "data.sequence_length": 16,
    "data.batch_size": 8,
    "tune.steps": 2,
    "tune.warmup_steps": 1,
    "tune.checkpoint_every": 2,
    "tune.validate_every": 2,
    "tune.validation_batches": 1,
    "calibrate.batches": 2,
    "calibrate.epsilon": 0.3,
}
DIGITS = {
    "tune.steps": 20,
    "tune.warmup_steps": 2,
    "tune.validation_batches": 1,
    "calibrate.epsilon": 0.1,
    "evaluate.epsilons": "(0.6,)",
    "evaluate.rounds": 1,
    "evaluate.singles": 4,
    "evaluate.rows": 32,
    "evaluate.sizes": "(16,)",
}
SCRIPT = """
import json, pathlib, sys
import meshes
from early_exit import tree
from early_exit.runs import assemble

folder, settings = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
commands, found = meshes.Commands(), {}
commands.tune("configs/tiny.py", folder / "run", settings)
joint = {"tune.train": "all", "tune.loss": "cross_entropy", "model.scan": True, "exits.classes": 0}
commands.tune("configs/tiny.py", folder / "joint", settings | joint)
(folder / "prompts.txt").write_text("word\\nthe other one\\nand\\n")
for name, work, mesh in commands.each(folder / "run"):
    flags = [f"--workdir={work}", *mesh]
    commands.run("calibrate", *flags)
    asked = [f"--input={folder / 'prompts.txt'}", f"--output={work}/answers.jsonl", "--raw"]
    commands.run("generate", *flags, *asked, "--mode=deferred", "--max_new_tokens=6", "--batch=2")
    commands.run("export", *flags, f"--to={folder / name}_out")
    commands.run("export", f"--workdir={folder / 'joint'}", *mesh, f"--to={folder / name}_joint")
    shards = [
        {path: len({str(s.index) for s in x.addressable_shards}) for path, x in flat.items()}
        for flat in (tree.flatten(tuned.params) for tuned in commands.loaded)
    ]
    assemble.load_tuned(folder / f"{name}_out", None, commands.loaded[-1].mesh)  # kept, too
    found[name] = {"shards": shards, "identity": [str(x.identity) for x in commands.loaded],
                   "heads": [x.metadata["heads"] for x in commands.loaded]}
digits = folder / "digits" / "run"
commands.tune("configs/digits_resnet.py:width=4", digits, json.loads(sys.argv[3]))
for name, work, mesh in commands.each(digits):
    flags = [f"--workdir={work}", *mesh]
    for command in ("calibrate", "evaluate"):
        commands.run(command, *flags)
    commands.run("classify", *flags, "--split=test", "--batch=24", f"--output={work}/answers.jsonl")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def found(folder):
    given = json.dumps(SETTINGS), json.dumps(DIGITS)
    return fake_devices.found(SCRIPT, folder, *given, EARLY_EXIT_CACHE=str(folder / "cache"))


@pytest.mark.studies
@pytest.mark.parametrize("mesh", meshes.SHARED)
def test_records_and_policies_are_those_of_one_device(found, folder, mesh):
    for kind, name in ((Records, "records.npz"), (Chains, "chains.npz")):
        ours, theirs = (kind.load(folder / of / name) for of in (mesh, "one"))
        assert ours.metadata == theirs.metadata
        for score, values in theirs.scores.items():
            np.testing.assert_allclose(ours.scores[score], values, atol=1e-5, err_msg=score)
        np.testing.assert_allclose(ours.losses, theirs.losses, atol=1e-5)
        np.testing.assert_array_equal(ours.groups, theirs.groups)
    ours, theirs = (json.loads((folder / of / "policy.json").read_text()) for of in (mesh, "one"))
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(ours["thresholds"], theirs["thresholds"], atol=1e-5)


@pytest.mark.studies
@pytest.mark.parametrize("mesh", meshes.SHARED)
def test_answers_are_those_of_one_device(found, folder, mesh):
    ours, theirs = (
        [json.loads(line) for line in (folder / of / "answers.jsonl").read_text().splitlines()]
        for of in (mesh, "one")
    )
    for answer, other in zip(ours, theirs, strict=True):
        assert answer["tokens"] == other["tokens"]
        np.testing.assert_allclose(answer["log_probs"], other["log_probs"], atol=1e-5)


@pytest.mark.studies
@pytest.mark.parametrize("mesh", meshes.SHARED)
def test_what_is_exported_is_the_same_bit_for_bit(found, folder, mesh):
    for what in ("out", "joint"):
        for name in ("model.safetensors", "exits.safetensors"):
            ours, theirs = (
                safetensors.load_file(folder / f"{of}_{what}" / name) for of in (mesh, "one")
            )
            assert ours.keys() == theirs.keys() and theirs
            for array, values in theirs.items():
                np.testing.assert_array_equal(ours[array], values)
    for name in ("identity", "heads"):
        assert found[mesh][name] == found["one"][name]


@pytest.mark.studies
@pytest.mark.parametrize("mesh", meshes.SHARED)
def test_every_command_has_the_weights_in_shards(found, mesh):
    """Vectors apart, and what no axis divides."""
    assert len(found[mesh]["shards"]) == 4
    for shards in found[mesh]["shards"]:
        split = {path for path, parts in shards.items() if parts > 1}
        wide = {path for path in shards if path.endswith(("embedding", "down/kernel"))}
        if mesh == "1x1x8":  # which divides no head's classes and its "none of these"
            wide = {path for path in wide if not path.startswith("exits/") or "kernel" in path}
        assert wide <= split
        assert max(shards.values()) == (4 if mesh == "2x2x2" else 8)


@pytest.mark.studies
@pytest.mark.parametrize("mesh", meshes.SHARED)
def test_a_classifier_answers_as_on_one_device(found, folder, mesh):
    """Calibrated, evaluated and asked there."""
    ours, theirs = (folder / "digits" / of for of in (mesh, "one"))
    records, others = (Records.load(run / "records.npz") for run in (ours, theirs))
    for score, values in others.scores.items():
        np.testing.assert_allclose(records.scores[score], values, atol=1e-5, err_msg=score)
    evaluated, others = (
        json.loads((run / "evaluation.json").read_text()) for run in (ours, theirs)
    )
    for exit, other in zip(evaluated["exits"], others["exits"], strict=True):
        assert exit == pytest.approx(other, abs=1e-5)
    answers, others = (
        [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
        for run in (ours, theirs)
    )
    assert len({other["depth"] for other in others}) > 1
    for answer, other in zip(answers, others, strict=True):
        assert (answer["label"], answer["depth"]) == (other["label"], other["depth"])
        np.testing.assert_allclose(answer["probabilities"], other["probabilities"], atol=1e-5)


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "generate", "export", "classify"])
def test_a_mesh_that_is_not_here_is_refused_before_work(tmp_path, command):
    """Before anything is looked for but the settings."""
    run, flags = tmp_path / "run", {"generate": ["--prompt=word"], "classify": ["--split=test"]}
    layout.save_config(read(tiny.get_config()), run)
    flags |= {"export": [f"--to={tmp_path / 'new'}"]}
    done = in_process.run(command, f"--workdir={run}", "--mesh.tensor=3", *flags.get(command, ()))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "does not use exactly the 1 devices there are" in done.stderr
    assert sorted(path.name for path in run.iterdir()) == ["config.json"]


def test_one_device_has_nothing_to_share(tmp_path):
    """A run tuned on eight devices is looked for where there is one, with no flag."""
    run = tmp_path / "run"
    layout.save_config(changed(read(tiny.get_config()), {"mesh.tensor": 8}), run)
    done = in_process.run("generate", f"--workdir={run}", "--prompt=a", "--raw")
    assert done.returncode == 1 and "no checkpoint" in done.stderr
    done = in_process.run("generate", f"--workdir={run}", "--prompt=a", "--mesh.data=2")
    assert "mesh data=2, fsdp=-1, tensor=8, expert=1 does not use" in done.stderr
