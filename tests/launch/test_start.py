"""How a command starts: with what it needs, and not with all that the others need."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Each takes a tenth of a second or more; most commands need none, or one much later.
LATE = ("grain", "scipy.optimize", "scipy.special", "transformers", "matplotlib", "PIL", "gguf")
LATE += ("tensorflow_datasets", "sklearn")


@pytest.mark.parametrize("command", ["generate", "classify", "calibrate", "tune", "report"])
def test_what_is_needed_late_is_imported_late(command):
    code = f"import sys, launch.{command}; print(*sorted(set({LATE}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not done.stdout.split()
