"""Many runs of one config: what its `sweep(add)` asks for, started one by one, and their results.

The one idea: a run is its folder, named after what the run overrides. Whether it is finished and
what it found is read there and nowhere else, so an interrupted sweep goes on when started again,
and it does not matter which engine ran it.
"""

import collections
import dataclasses
import json
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from early_exit import assemble, checkpoint
from early_exit import config as configs
from early_exit.config import ConfigDict, Overrides
from early_exit.metrics import read_metrics

# A command line, and the file that takes what it prints.
Job = tuple[list[str], Path]

_VALIDATION = r"validation/(?P<figure>\w+)/exit_(?P<exit>\d+)"
_UNFIT_FOR_A_NAME = r"[^-+.\w]"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep: its folder, what it overrides, and the config that this makes."""

    folder: Path
    overrides: Overrides
    config: ConfigDict

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds the end of a run with exactly these settings."""
        if checkpoint.latest_step(self.folder / assemble.CHECKPOINTS) != self.config.tune.steps:
            return False
        settings = assemble.load_config(self.folder).to_json()
        return json.loads(settings) == json.loads(self.config.to_json())

    def results(self) -> list[dict[str, Any]]:
        """A row per exit on the validation text, after the last step: overrides and figures."""
        rows: dict[str, dict[str, Any]] = collections.defaultdict(dict)
        for line in read_metrics(self.folder):
            if line["step"] == self.config.tune.steps:
                for name, value in line.items():
                    if found := re.fullmatch(_VALIDATION, name):
                        rows[found["exit"]][found["figure"]] = value
        return [self.overrides | row for row in rows.values()]


def expand(sweep: Callable, base: ConfigDict, workdir: Path) -> list[Run]:
    """The runs that `sweep(add)` adds to `base`, each in its own folder of `workdir`.

    Raises:
      ValueError: no run, two runs of one name, or overrides that `base` does not take (unknown
        keys, other types); all are listed.
    """
    asked: list[Overrides] = []
    sweep(lambda **overrides: asked.append(overrides))
    if not asked:
        raise ValueError("the config's sweep(add) adds no run")
    problems = []
    for key, value in {(key, repr(run[key])): run[key] for run in asked for key in run}.items():
        try:
            configs.override(base, {key[0]: value})
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    names = _names(asked)
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    problems += [f"{name}: more than one run has this name" for name in twice]
    if problems:
        raise ValueError("the sweep cannot start:\n  " + "\n  ".join(problems))
    return [
        Run(workdir / name, overrides, configs.override(base, overrides))
        for name, overrides in zip(names, asked, strict=True)
    ]


def _names(asked: Sequence[Overrides]) -> list[str]:
    """`points=2-4,learning_rate=0.001` for each run; longer keys where the last part is unclear."""
    keys = {key for overrides in asked for key in overrides}
    ends = collections.Counter(key.rpartition(".")[2] for key in keys)

    def name(key: str, value: Any) -> str:
        end = key.rpartition(".")[2]
        text = "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return f"{end if ends[end] == 1 else key}={re.sub(_UNFIT_FOR_A_NAME, '_', text)}"

    return [",".join(name(*item) for item in overrides.items()) or "base" for overrides in asked]


def run_local(jobs: Sequence[Job]) -> None:
    """Runs the jobs on this machine, one after the other; a failed one does not stop the rest."""
    for number, (command, log) in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {log.parent.name}: ", end="", flush=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with log.open("a") as file:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        outcome = f"failed with status {status}" if status else "finished"
        print(f"{outcome} after {time.perf_counter() - began:.0f} s", flush=True)


# An engine takes jobs and returns when they have ended, whether they succeeded or not.
ENGINES: dict[str, Callable[[Sequence[Job]], None]] = {"local": run_local}
