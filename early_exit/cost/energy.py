"""What an answer costs in energy: metered where the machine has a meter, else modelled.

The one idea: a figure goes with the name of where it comes from, `RAPL`, `NVML` or `modelled`, so
that nobody takes the second kind for the first. Meters count all that the device does, idle power
included; a model counts only what it is made of.
"""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path

import jax

POWERCAP = Path("/sys/class/powercap")
MODELLED = "modelled"

# Joules. A 32-bit multiplication and addition take 3.7 + 0.9 pJ, and 32 bits from DRAM 640 pJ, at
# 45 nm (Horowitz 2014, "Computing's energy problem"; Han et al. 2016, EIE, table I).
PER_MULTIPLY_ADD = 4.6e-12
PER_BYTE = 160e-12


@dataclasses.dataclass(frozen=True)
class Meter:
    """A counter of energy.

    Attributes:
      name: `RAPL` or `NVML`.
      read: → the counters.
      between: (counters before, counters after) → joules.
    """

    name: str
    read: Callable[[], list[int]]
    between: Callable[[list[int], list[int]], float]


def modelled(multiply_adds: float, bytes_read: float) -> float:
    """Joules for arithmetic and for reading parameters from memory, once; nothing else."""
    return PER_MULTIPLY_ADD * multiply_adds + PER_BYTE * bytes_read


def meter(device: jax.Device | None = None, powercap: Path = POWERCAP) -> Meter | None:
    """What meters the device (by default, the one that programs run on); None for nothing."""
    device = jax.devices()[0] if device is None else device
    if device.platform == "cpu":
        return _rapl(powercap)
    return _nvml(device.local_hardware_id) if device.platform == "gpu" else None


def _rapl(powercap: Path) -> Meter | None:
    """Intel's and AMD's counters of the processors and, where they are apart, of the memory."""
    zones = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        name = (zone / "name").read_text().strip()
        if name.startswith("package") or name == "dram":
            zones.append(zone)

    def read():
        return [int((zone / "energy_uj").read_text()) for zone in zones]

    try:
        read()
        ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
    except (OSError, ValueError):  # only root may read them on most machines
        return None

    def between(before, after):
        # A counter that was full began again at 0.
        pairs = zip(before, after, ranges, strict=True)
        return 1e-6 * sum((end - start) % (size + 1) for start, end, size in pairs)

    return Meter("RAPL", read, between) if zones else None


def _nvml(index: int) -> Meter | None:
    """A GPU's own counter, through the package nvidia-ml-py if it is installed."""
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return None
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:  # no driver, or a GPU from before it could count
        return None

    def read():
        return [nvml.nvmlDeviceGetTotalEnergyConsumption(handle)]

    return Meter("NVML", read, lambda before, after: 1e-3 * (after[0] - before[0]))
