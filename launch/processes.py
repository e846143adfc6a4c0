"""A command as one process of several: how they find each other, and how they end.

    srun python -m launch.tune …                       # Slurm: nothing to say
    python -m launch.tune --multihost …                # on every host of a TPU slice
    python -m launch.tune --coordinator=localhost:8476 --num_processes=2 --process_id=0 … &
    python -m launch.tune --coordinator=localhost:8476 --num_processes=2 --process_id=1 …

The one idea: processes depend on each other in every step, so when one is gone the others end,
too, with an error; the same command then goes on from the last checkpoint.
"""

import os
from collections.abc import Mapping

import jax
from absl import flags

from launch import usage

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for processes started by hand."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is.", lower_bound=0)
MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "One of the hosts of a TPU slice; under Slurm and on GKE no need to say."
)

usage.brief("one of several processes", COORDINATOR, NUM_PROCESSES, PROCESS_ID, MULTIHOST)

# A process that has not been heard of for so long is taken for dead, and all end.
HEARTBEAT_SECONDS = 60
# One that is done waits for the others as long as they live.
SHUTDOWN_SECONDS = 7 * 24 * 3600


def initialize() -> None:
    """Connects this process with its fellows, if it has any; to be called before any computation.

    Raises:
      ValueError: flags that leave open which process this is.
      RuntimeError: the others were not found.
    """
    by_hand = [flag.value for flag in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)]
    if by_hand.count(None) not in (0, len(by_hand)):
        raise ValueError("--coordinator, --num_processes and --process_id go together")
    timeouts = {
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    if None not in by_hand:
        jax.distributed.initialize(*by_hand, **timeouts)
    elif MULTIHOST.value or has_fellows(os.environ):
        jax.distributed.initialize(**timeouts)
    elif jax.process_count() > 1:
        raise ValueError("this is one of several hosts of a TPU slice; add --multihost")


def has_fellows(environment: Mapping[str, str]) -> bool:
    """Whether Slurm (in `srun`) or GKE has started other processes beside this one."""
    under_srun = "SLURM_STEP_NODELIST" in environment
    return (
        (under_srun and int(environment["SLURM_NTASKS"]) > 1)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
    )
