"""Writes the runs of a sweep as manifests for GKE, and hands them over if asked to.

The one idea: Kubernetes restarts what was preempted, and the run goes on from its folder. So the
folder is on a volume that outlives the pods, under the same path as here.
"""

import hashlib
import json
import math
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from string import Template

from absl import flags

from early_exit.storage import files
from early_exit.training import preemption
from launch import usage
from launch.jobs import Job

TEMPLATE = Path(__file__).with_name("jobset.yaml")
MANIFEST = "jobset.yaml"

IMAGE = flags.DEFINE_string("image", None, "GKE: container that starts in this repository.")
CLAIM = flags.DEFINE_string("claim", None, "GKE: PersistentVolumeClaim of the --workdir.")
ACCELERATOR = flags.DEFINE_string("accelerator", "tpu-v5p-slice", "GKE: name of the chips.")
TOPOLOGY = flags.DEFINE_string("slice", "2x2x1", "GKE: chips of a slice.")
CHIPS = flags.DEFINE_integer("chips", 4, "GKE: chips of a host.", lower_bound=1)
SLICES = flags.DEFINE_integer("slices", 1, "GKE: slices of a run.", lower_bound=1)
RESTARTS = flags.DEFINE_integer(
    "restarts", 3, "GKE: after failures; preempted runs always restart."
)
APPLY = flags.DEFINE_bool("apply", False, "GKE: hand the manifests to kubectl.")
usage.group("GKE", IMAGE, CLAIM, ACCELERATOR, TOPOLOGY, CHIPS, SLICES, RESTARTS, APPLY)

# JobSet names its pods <name>-slice-<index>-<index>-<suffix>, all within 63 characters.
_LONGEST_NAME = 40


def manifest(job: Job, workdir: Path) -> str:
    """The JobSet of one run as YAML; `workdir` is where the volume is mounted.

    Raises:
      ValueError: flags that are missing, or a topology that hosts do not add up to.
    """
    for flag in (IMAGE, CLAIM):
        if not flag.value:
            raise ValueError(f"--{flag.name} is missing")
    if not re.fullmatch(r"\d+(x\d+){1,2}", TOPOLOGY.value):
        raise ValueError(f"--slice={TOPOLOGY.value} is not like 4x4 or 4x4x8")
    chips = math.prod(map(int, TOPOLOGY.value.split("x")))
    hosts, rest = divmod(chips, CHIPS.value)
    if rest:
        raise ValueError(
            f"the {chips} chips of --slice={TOPOLOGY.value} are no whole number of hosts with "
            f"--chips={CHIPS.value}"
        )
    values = {
        "name": _name(job.folder),
        "image": IMAGE.value,
        "claim": CLAIM.value,
        "accelerator": ACCELERATOR.value,
        "topology": TOPOLOGY.value,
        "chips": CHIPS.value,
        "hosts": hosts,
        "slices": SLICES.value,
        "restarts": RESTARTS.value,
        "left": preemption.EXIT_STATUS,
        "command": job.command,
        "workdir": str(workdir.absolute()),
    }
    # YAML reads JSON, whatever the text holds.
    written = {name: json.dumps(value) for name, value in values.items()}
    return Template(TEMPLATE.read_text()).substitute(written)


def run(jobs: Sequence[Job], workdir: Path) -> None:
    """Writes a manifest into the folder of every run; with --apply, `kubectl` takes it.

    Raises:
      ValueError: see `manifest`.
      RuntimeError: `kubectl` fails.
    """
    manifests = [manifest(job, workdir) for job in jobs]
    for job, text in zip(jobs, manifests, strict=True):
        job.folder.mkdir(parents=True, exist_ok=True)
        path = job.folder / MANIFEST
        files.write_text(path, text)
        command = ["kubectl", "apply", f"--filename={path}"]
        print(" ".join(command), flush=True)
        if APPLY.value and (status := subprocess.run(command).returncode):
            raise RuntimeError(f"kubectl ended with status {status}")


def _name(folder: Path) -> str:
    """A name that Kubernetes takes, unlike that of any other folder."""
    digest = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]
    plain = re.sub(r"[^a-z0-9]+", "-", f"{folder.parent.name}-{folder.name}".lower()).strip("-")
    return f"run-{plain}"[: _LONGEST_NAME - len(digest) - 1].rstrip("-") + f"-{digest}"
