"""How fast a run goes, what share of the chips' peak that is, and the memory it takes.

The one idea: nothing is measured that the loop does not wait for anyway. It reads the metrics of
one step while the next one runs, and the time between two such readings is that of a step, with
the wait for its batch.
"""

import dataclasses
import re
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from early_exit.cost import multiply_adds
from early_exit.cost.chips import CHIPS

# Regex of jax's `device_kind` → dense bfloat16 FLOP/s of one device; the first match wins.
# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, as in `cost.chips`, and /tpu7x (Ironwood),
# where a chip has 2307e12 and is two devices to JAX.
# NVIDIA's data sheets of the A100 (2021), the H100 (2023), the H200 (2024), and the DGX B200 and
# GB200 NVL72 (2024), by 8 and 72 GPUs; but for the A100 they say what is so "with sparsity", twice
# the dense rate. AMD's data sheet of the Instinct MI300X (2023), without sparsity.
PEAKS = (
    (r"^TPU v4$", 275e12),
    (r"^TPU v5( lite|e)$", CHIPS["v5e"].flops),
    (r"^TPU v5p?$", CHIPS["v5p"].flops),
    (r"^TPU v6( lite|e)$", CHIPS["v6e"].flops),
    (r"^TPU7x$", 2307e12 / 2),
    (r"A100", 312e12),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100", 989e12),
    (r"H200 NVL", 835e12),
    (r"H200", 989e12),
    (r"GB200", 2500e12),
    (r"B200", 2250e12),
    (r"MI300X", 1307.4e12),
)
_STATM = Path("/proc/self/statm")


def peak(devices: Sequence[Any]) -> float | None:
    """Of all the devices together, dense bfloat16 FLOP/s; None if a kind of them is not known."""
    found = [_peak(device.device_kind) for device in devices]
    return None if None in found else sum(found)


def unknown(devices: Sequence[Any]) -> str | None:
    """What to say of accelerators without a peak; None where all is known, or all are CPUs.

    Of CPUs no share of a peak is ever told.
    """
    kinds = {d.device_kind for d in devices if d.platform != "cpu" and _peak(d.device_kind) is None}
    if not kinds:
        return None
    return f"MFU unknown: the peak of {', '.join(sorted(kinds))} is not in training.pace.PEAKS"


def _peak(kind: str) -> float | None:
    return next((peak for pattern, peak in PEAKS if re.search(pattern, kind)), None)


def flops(traced: Any) -> int:
    """Model FLOPs of a traced step, on all devices together.

    Those of matrix products and convolutions, forward and backward; what is computed again to save
    memory does not count (Chowdhery et al. 2022, PaLM, appendix B).

    Args:
      traced: `jax.jit(…).trace(*args)`.
    """
    return 2 * multiply_adds.traced_multiply_adds(traced.jaxpr, again=False)


def memory(devices: Sequence[Any]) -> dict[str, int]:
    """Bytes in use, and the most there have been, on the fullest of this process's devices.

    Of the process itself (`host_…`) where devices do not say, as CPUs.
    """
    known = [found for device in devices if (found := device.memory_stats())]
    if known:
        return {
            "memory_bytes": max(found["bytes_in_use"] for found in known),
            "memory_peak_bytes": max(found.get("peak_bytes_in_use", 0) for found in known),
        }
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if not _STATM.exists():
        return {"host_memory_peak_bytes": most}
    now = int(_STATM.read_text().split()[1]) * resource.getpagesize()
    # The kernel updates the two at different moments.
    return {"host_memory_bytes": now, "host_memory_peak_bytes": max(now, most)}


@dataclasses.dataclass
class Pace:
    """A clock that is read once a step.

    Attributes:
      unit: what is counted, `tokens` or `examples`.
      per_step: how many, of all processes.
      utilised: what a step makes of a second of the peak: its model FLOPs ÷ the peak of all
        devices. None where that is not known.
    """

    unit: str
    per_step: int
    utilised: float | None = None
    _since: float | None = None

    def start(self) -> None:
        """A step begins now, after something else."""
        self._since = time.perf_counter()

    def lap(self) -> dict[str, float]:
        """A step has ended: `<unit>_per_second`, `mfu` (0 to 1) where it is known, and memory.

        The first step of a process is compiled within it, and so has no rate.
        """
        since, self._since = self._since, time.perf_counter()
        found = {}
        if since is not None:
            rate = 1 / (self._since - since)
            found[f"{self.unit}_per_second"] = rate * self.per_step
            if self.utilised is not None:
                found["mfu"] = rate * self.utilised
        return found | memory(jax.local_devices())
