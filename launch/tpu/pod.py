"""A TPU slice of one's own: made, used until a command has finished on all its hosts, deleted.

    python -m launch.tpu.pod create --name=v5p --zone=us-east5-a --type=v5p-256 --spot
    python -m launch.tpu.pod run --name=v5p --zone=us-east5-a --type=v5p-256 --spot \
        --setup="git clone … && pip install -e 'early-exit[tpu]'" -- \
        "cd early-exit && python -m launch.tune --multihost --config=… --workdir=/mnt/runs/a"
    python -m launch.tpu.pod delete --name=v5p --zone=us-east5-a

The one idea: commands go on where they were. So `run` makes the slice if there is none, makes it
again when it was taken away, and gives the command again, until that ends by itself. The --workdir
has to outlive the hosts. --dry_run shows the gcloud commands instead of giving them.
"""

import shlex
import subprocess
import time
from collections.abc import Sequence

from absl import app, flags

from early_exit.training import preemption
from launch import common

NAME = flags.DEFINE_string("name", None, "Of the slice and of the request for it.")
ZONE = flags.DEFINE_string("zone", None, "Such as us-east5-a.")
PROJECT = flags.DEFINE_string("project", None, "gcloud's own if absent.")
TYPE = flags.DEFINE_string("type", None, "Accelerator type, such as v5p-256.")
RUNTIME = flags.DEFINE_string("runtime", "v2-alpha-tpuv5", "Software of the hosts.")
SPOT = flags.DEFINE_bool("spot", False, "Cheaper, and taken away when wanted elsewhere.")
SETUP = flags.DEFINE_string("setup", None, "Command for all hosts of a slice just made.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show commands instead of giving them.")

# States of a request in which it stays: https://cloud.google.com/tpu/docs/queued-resources
USABLE, ABSENT, LOST = "ACTIVE", "", ("SUSPENDED", "FAILED")

_POLL_SECONDS = 30
# For so long a slice may seem to be there after its hosts have gone.
_POLLS_FOR_LOSS = 6


def main(argv):
    verbs = {"create": create, "run": run_to_the_end, "delete": delete}
    if len(argv) < 2 or argv[1] not in verbs:
        raise app.UsageError(f"say what to do: {', '.join(verbs)}")
    verb, words = argv[1], argv[2:]
    if bool(words) != (verb == "run"):
        raise app.UsageError("a command for the hosts goes behind `run`, and only there")
    if verb != "delete" and not TYPE.value:
        raise app.UsageError("--type is missing")
    # One word is a command line; several are a command's own words, spaces within them and all.
    command = words if len(words) < 2 else [shlex.join(words)]
    verbs[verb](*command)


def create() -> None:
    """Asks for a slice, waits until it is there, and sets it up.

    Raises:
      RuntimeError: the request fails.
    """
    spot = ["--spot"] if SPOT.value else []
    _give(
        _gcloud("queued-resources", "create")
        + [f"--node-id={NAME.value}", f"--accelerator-type={TYPE.value}"]
        + [f"--runtime-version={RUNTIME.value}", *spot]
    )
    if not DRY_RUN.value and (state := _settled_state()) != USABLE:
        raise RuntimeError(f"the request for {NAME.value} ended as {state or 'deleted'}")
    if SETUP.value:
        _give(_on_all_hosts(SETUP.value))


def delete() -> None:
    """Gives the slice back, with all that is on its disks."""
    _give([*_gcloud("queued-resources", "delete"), "--force", "--quiet"])


def run_to_the_end(command: str) -> None:
    """Gives the command to all hosts, and again when it left early or the slice was lost.

    Raises:
      RuntimeError: the command failed, or there is no slice to be had.
    """
    while True:
        state = ABSENT if DRY_RUN.value else _settled_state()
        if state in LOST:
            delete()
        if state != USABLE:
            create()
        status = _give(_on_all_hosts(command), may_fail=True)
        if not status:
            return
        if status != preemption.EXIT_STATUS and not _is_lost():
            raise RuntimeError(f"the command failed with status {status}")
        print("the hosts were wanted elsewhere; going on", flush=True)


def _settled_state() -> str:
    """Waits as long as the request is on its way from one state to another."""
    shown = None
    while (state := _state()) not in (USABLE, ABSENT, *LOST):
        if state != shown:
            print(f"{NAME.value}: {state.lower()}", flush=True)
        shown = state
        time.sleep(_POLL_SECONDS)
    return state


def _is_lost() -> bool:
    for _ in range(_POLLS_FOR_LOSS):
        if _state() != USABLE:
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _state() -> str:
    """State of the request for the slice, such as ACTIVE; empty without one."""
    describe = [*_gcloud("queued-resources", "describe"), "--format=value(state.state)"]
    done = subprocess.run(describe, capture_output=True, text=True)
    if done.returncode and "NOT_FOUND" in done.stderr:
        return ABSENT
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout.strip()


def _gcloud(*words: str) -> list[str]:
    project = [f"--project={PROJECT.value}"] if PROJECT.value else []
    return ["gcloud", "compute", "tpus", *words, NAME.value, f"--zone={ZONE.value}", *project]


def _on_all_hosts(command: str) -> list[str]:
    return [*_gcloud("tpu-vm", "ssh"), "--worker=all", f"--command={command}"]


def _give(command: Sequence[str], may_fail: bool = False) -> int:
    print(shlex.join(command), flush=True)
    if DRY_RUN.value:
        return 0
    status = subprocess.run(command).returncode
    if status and not may_fail:
        raise RuntimeError(f"gcloud ended with status {status}")
    return status


if __name__ == "__main__":
    flags.mark_flags_as_required(["name", "zone"])
    common.run(main, on_run=False)
