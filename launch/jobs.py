"""Many runs of one config: what its `sweep(add)` asks for, started one by one, and their results.

The one idea: a run is its folder, named after what the run overrides. Whether it is finished and
what it found is read there and nowhere else, so an interrupted sweep goes on when started again,
and it does not matter what started it.
"""

import collections
import dataclasses
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from early_exit.runs import checkpoint, layout
from early_exit.runs.metrics import read_metrics
from early_exit.settings.fields import SettingsError
from early_exit.settings.overrides import ConfigDict, Overrides, override
from early_exit.settings.read import read
from early_exit.settings.sections import Settings
from early_exit.training import preemption

_VALIDATION = r"validation/(?P<figure>\w+)/exit_(?P<exit>\d+)"
_UNFIT_FOR_A_NAME = r"[^-+.\w]"
_LONGEST_NAME = 255  # bytes, of every usual file system

# Between looks at what is running.
_POLL_SECONDS = 0.2


class Job(NamedTuple):
    """A command line, and the folder of the run that it makes."""

    command: list[str]
    folder: Path

    @property
    def log(self) -> Path:
        """The file that takes what the command prints."""
        return self.folder / "log.txt"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep: its folder, what it overrides, and the settings that this makes."""

    folder: Path
    overrides: Overrides
    config: Settings

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds the end of a run with exactly these settings."""
        config = layout.as_fitted(self.config, self.folder) or self.config
        if checkpoint.latest_step(self.folder / layout.CHECKPOINTS) != config.tune.steps:
            return False
        return layout.load_config(self.folder) == config

    def results(self) -> list[dict[str, Any]]:
        """A row per exit on the validation text, after the last step: overrides and figures."""
        rows: dict[str, dict[str, Any]] = collections.defaultdict(dict)
        for line in read_metrics(self.folder):
            if line["step"] == layout.load_config(self.folder).tune.steps:
                for name, value in line.items():
                    if found := re.fullmatch(_VALIDATION, name):
                        rows[found["exit"]][found["figure"]] = value
        return [self.overrides | row for row in rows.values()]


def expand(sweep: Callable, base: ConfigDict, workdir: Path) -> list[Run]:
    """The runs that `sweep(add)` adds to `base`, each in its own folder of `workdir`.

    Raises:
      ValueError: no run, two runs of one name, a name too long for a folder, overrides that `base`
        does not take (unknown keys, other types), or settings that make no run; all are listed.
    """
    asked: list[Overrides] = []
    sweep(lambda **overrides: asked.append(overrides))
    if not asked:
        raise ValueError("the config's sweep(add) adds no run")
    problems = []
    for key, value in {(key, repr(run[key])): run[key] for run in asked for key in run}.items():
        try:
            override(base, {key[0]: value})
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    names = _names(asked)
    problems += [
        f"{name[:40]}… is a name of {size} bytes, and a folder's has {_LONGEST_NAME} at most; let "
        "the sweep set less of it, or shorter values"
        for name in names
        if (size := len(name.encode())) > _LONGEST_NAME
    ]
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    problems += [f"{name}: more than one run has this name" for name in twice]
    runs = []
    for name, overrides in zip(names, asked, strict=True) if not problems else ():
        try:
            runs.append(Run(workdir / name, overrides, read(override(base, overrides))))
        except SettingsError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    if problems:
        raise ValueError("the sweep cannot start:\n  " + "\n  ".join(problems))
    return runs


def _names(asked: Sequence[Overrides]) -> list[str]:
    """`points=2-4,learning_rate=0.001` for each run; longer keys where the last part is unclear."""
    keys = {key for overrides in asked for key in overrides}
    ends = collections.Counter(key.rpartition(".")[2] for key in keys)

    def name(key: str, value: Any) -> str:
        end = key.rpartition(".")[2]
        text = "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return f"{end if ends[end] == 1 else key}={re.sub(_UNFIT_FOR_A_NAME, '_', text)}"

    return [",".join(name(*item) for item in overrides.items()) or "base" for overrides in asked]


def run_local(jobs: Sequence[Job], parallel: int = 1) -> None:
    """Runs the jobs on this machine, `parallel` at a time; a failed one does not stop the rest.

    Returns when all have ended. Whatever ends it earlier has the running ones save and leave.
    """
    waiting, running = list(enumerate(jobs, 1)), []
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                number, job = waiting.pop(0)
                name = f"[{number}/{len(jobs)}] {job.folder.name}"
                print(f"{name}: started", flush=True)
                job.folder.mkdir(parents=True, exist_ok=True)
                with job.log.open("a") as log:
                    process = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT)
                running.append((name, process, time.perf_counter()))
            time.sleep(_POLL_SECONDS)
            for name, process, began in running:
                if process.poll() is not None:
                    seconds = time.perf_counter() - began
                    print(f"{name}: {_outcome(process)} after {seconds:.0f} s", flush=True)
            running = [entry for entry in running if entry[1].returncode is None]
    finally:
        for _, process, _ in running:
            process.terminate()
        for _, process, _ in running:
            process.wait()


def _outcome(process: subprocess.Popen) -> str:
    if process.returncode in (preemption.EXIT_STATUS, -signal.SIGTERM):  # the latter: just begun
        return "saved and left"
    return f"failed with status {process.returncode}" if process.returncode else "finished"
