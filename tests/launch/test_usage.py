"""--help: on one screen, with every flag, in groups."""

import pathlib
import re
import subprocess
import sys

import in_process
import pytest
from absl import flags

from early_exit import command
from launch import usage

ROOT = pathlib.Path(__file__).parents[2]
LINES, WIDTH = 50, 100


def help_of(name):
    if name in ("lm_eval", "serve"):  # which have flags of others, too; these are here already
        code = [sys.executable, "-m", f"launch.{name}", "--help"]
        return subprocess.run(code, cwd=ROOT, capture_output=True, text=True)
    return in_process.run(name, "--help")


@pytest.mark.parametrize("name", sorted(command.commands()))
def test_it_fits_a_screen(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    done = help_of(name)
    shown = done.stdout.splitlines()
    assert done.returncode == 0 and not done.stderr
    assert len(shown) <= LINES and max(map(len, shown)) <= WIDTH
    assert shown[0] == command.commands()[name][: len(shown[0])]
    assert any(line.startswith("    python -m launch.") for line in shown)


def test_flags_stand_in_their_groups_with_their_defaults():
    shown = in_process.run("generate", "--help").stdout
    groups = dict(re.findall(r"^([a-z ]+):\n((?:  .*\n)+)", shown, re.MULTILINE))
    expected = ["flags", "how tokens are drawn", "how to decode", "how devices share the model"]
    assert list(groups) == [*expected, "what it works on"]
    assert "--prompt=" in groups["flags"] and "--workdir=" in groups["what it works on"]
    drawn = groups["how tokens are drawn"]
    assert re.findall(r"--(\w+)=", drawn) == ["temperature", "top_k", "top_p", "seed"]
    assert "(1.0)" in drawn and "(lossy)" in groups["how to decode"]
    assert "--raw " in groups["flags"] and "--raw=" not in groups["flags"]


def test_every_flag_of_a_command_is_there_once():
    """Of the one with the most."""
    shown = in_process.run("calibrate", "--help").stdout
    lines = [line for line in shown.splitlines() if line.startswith("  --")]
    names = [name for line in lines for name in re.findall(r"(?:^|  )--([\w.]+)", line)]
    assert len(set(names)) == len(names) > 20
    some = {"config", "mesh.tensor", "workdir", "debug", "mode", "prompts", "alpha", "reject_risk"}
    assert some <= set(names)


def test_only_what_leads_to_the_flags_is_told(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nobody"])
    told = usage.text("What it does.\n\n    python -m it\n\nHow it does that, at length.", 60)
    assert told.splitlines()[:3] == ["What it does.", "", "    python -m it"]
    assert "at length" not in told and "flags:" not in told
    flag = flags.Flag(flags.ArgumentParser(), None, "n", "x", "A  long\nsentence" + 20 * " on")
    lines = usage._line(flag, 60).splitlines()
    assert lines[0].startswith("  --n=" + " " * 20 + "A long sentence on")
    assert all(line.startswith(" " * 26) for line in lines[1:]) and lines[-1].endswith("on (x)")
