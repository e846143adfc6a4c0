"""Recipes are carried out with stand-ins for clouds: each command in them is one that there is."""

import json
import os
import pathlib
import re
import shlex
import subprocess

import in_process
import pytest

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch/recipes").glob("*.sh"))
CHAT = ROOT / "tests/fixtures/tiny_chat"
# Notes what it was given; of what prints a job's number, the number.
STAND_IN = """#!/usr/bin/env bash
python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$(basename "$0")" "$@" >> "$CALLS"
echo 7
"""
GIVEN = {
    "SOURCE": str(CHAT),
    "TEXT": "/data/**/*.jsonl with a space",
    "BUCKET": "gs://bucket",
    "ZONE": "us-west4-a",
    "REPOSITORY": "https://example.org/early_exit",
    "CLUSTER": "exits",
    "IMAGE": "image",
    "CLAIM": "claim",
    "STEPS": "200",
}
# Where a word behind an option is a command line of its own.
INNER = re.compile(r"--command=(.*)", re.DOTALL)


@pytest.fixture
def carried_out(tmp_path):
    """A recipe → the command lines that it gave."""
    stand_ins, calls = tmp_path / "bin", tmp_path / "calls"
    stand_ins.mkdir()
    for name in ("python", "sbatch", "xpk", "gcloud", "kubectl"):
        (stand_ins / name).write_text(STAND_IN)
        (stand_ins / name).chmod(0o755)

    def carry_out(recipe, **changes):
        calls.write_text("")
        given = GIVEN | changes
        given = {name: value for name, value in given.items() if value is not None}
        environment = {"PATH": f"{stand_ins}:{os.environ['PATH']}", "CALLS": str(calls), **given}
        done = subprocess.run(
            ["bash", recipe], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done, [json.loads(line) for line in calls.read_text().splitlines()]

    return carry_out


def ours(words):
    """The commands of this project in a command line, however deep."""
    for start, word in enumerate(words):
        if inner := INNER.fullmatch(word):
            yield from ours(shlex.split(inner[1].rpartition("&&")[2]))
        elif word == "--" and "launch.tpu.pod" in words:
            yield words[:start]
            yield from ours(shlex.split(words[start + 1].rpartition("&&")[2]))
            return
    if "-m" in words:
        yield words[words.index("-m") - 1 :]


def settings_of(recipe, tmp_path):
    if recipe.stem == "gke":
        return {"CONFIG": "configs/tiny.py", "RUN": str(tmp_path / "runs")}
    return {}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_all_that_a_recipe_gives_is_a_command_with_flags_that_it_has(
    recipe, carried_out, tmp_path, capsys
):
    assert os.access(recipe, os.X_OK)
    subprocess.run(["bash", "-n", recipe], check=True)
    done, lines = carried_out(recipe, **settings_of(recipe, tmp_path))
    assert done.returncode == 0, done.stderr
    found = [command for line in lines for command in ours(line)]
    assert found and all(command[0] == "python" for command in found)
    for _, _, module, *flags in found:
        if module == "launch.tpu.pod":
            flags = flags[1:]
        done = in_process.run(module.removeprefix("launch."), *flags, "--only_check_args")
        assert done.returncode == 0, (module, flags, done.stderr)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_needs_is_asked_for_before_it_does_anything(recipe, carried_out, tmp_path):
    needed = re.findall(r"\{([A-Z]+):\?", recipe.read_text())
    assert needed
    for name in needed:
        done, lines = carried_out(recipe, **settings_of(recipe, tmp_path) | {name: None})
        assert done.returncode and not lines
        assert re.search(rf"{name}: name ", done.stderr)


def test_jobs_of_slurm_wait_for_each_other_and_words_stay_whole(carried_out):
    _, lines = carried_out(ROOT / "launch/recipes/slurm_gpu.sh")
    waits = [[word for word in line if word.startswith("--dependency")] for line in lines]
    assert waits == [[], *[["--dependency=afterok:7"]] * 3]
    assert f"--source={GIVEN['TEXT']}" in lines[0]


def test_a_slice_is_given_one_command_line_for_its_hosts(carried_out):
    _, lines = carried_out(ROOT / "launch/recipes/tpu_vm.sh")
    tokenize, run, delete = lines
    assert "launch.tokenize" in tokenize and delete[3] == "delete"
    assert run[run.index("--") + 1 :] == [run[-1]]
    assert run[-1].startswith("cd early_exit && python -m launch.tune --multihost --config=")
    _, lines = carried_out(ROOT / "launch/recipes/tpu_vm.sh", TEXT=None)
    assert [line[3] for line in lines] == ["run", "delete"]
