"""Python on several devices, which the CPU plays: in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def python(*words, devices: int = 8, **environment: str) -> str:
    """What `python <words>` prints; modules of the tests are there to import."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        }
        | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def found(script: str, *given, **how):
    """What a script's last line says, in JSON."""
    return json.loads(python("-c", script, *given, **how).splitlines()[-1])
