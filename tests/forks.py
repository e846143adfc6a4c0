"""Commands in processes of their own, without the seconds that imports take.

The one idea: a process that has imported what commands import forks for each of them. The child
then does what `python -m launch.<command>` does, and ends as that would.
"""

import gc
import importlib
import json
import os
import pathlib
import runpy
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

# Nothing that defines flags: a command does when it is run, and each its own.
PRELOADED = (
    "early_exit.evaluation.run_decoder",
    "early_exit.report.page",
    "early_exit.training.loop",
    "launch.jobs",
    "ml_collections.config_flags",
)


class Launcher:
    """Runs commands one after the other; close it when they are done."""

    def __init__(self, folder: pathlib.Path, environment: dict[str, str], cwd: pathlib.Path = ROOT):
        """Keeps what commands print in `folder`; they are run in `cwd`."""
        self._printed = [folder / name for name in ("stdout", "stderr")]
        self._parent = subprocess.Popen(
            [sys.executable, __file__, *self._printed],
            cwd=cwd,
            env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, command: str, *flags) -> subprocess.CompletedProcess:
        """What `python -m launch.<command> <flags>` printed, and its exit status."""
        return self.module(f"launch.{command}", *flags)

    def module(self, name: str, *flags) -> subprocess.CompletedProcess:
        """What `python -m <name> <flags>` printed, and its exit status."""
        arguments = [name, *map(str, flags)]
        print(json.dumps(arguments), file=self._parent.stdin, flush=True)
        status = int(self._parent.stdout.readline())
        printed = (path.read_text() for path in self._printed)
        return subprocess.CompletedProcess(arguments, status, *printed)

    def close(self):
        self._parent.stdin.close()
        self._parent.wait()
        self._parent.stdout.close()


def _serve(*printed: str) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # or each child goes through all of it as it ends, and copies it
    for line in sys.stdin:
        if not (child := os.fork()):
            return _become(json.loads(line), printed)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(arguments: list[str], printed: tuple[str, ...]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv[:] = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
