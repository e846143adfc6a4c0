import sys
import types

import pytest

from early_exit.cost import energy

CPU, TPU = (types.SimpleNamespace(platform=name, local_hardware_id=0) for name in ("cpu", "tpu"))
GPU = types.SimpleNamespace(platform="gpu", local_hardware_id=3)


@pytest.fixture
def powercap(tmp_path):
    """Two processors as Linux shows them: memory apart from one, and parts of the whole."""
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }
    for folder, name in zones.items():
        (tmp_path / folder).mkdir()
        for file, text in (("name", name), ("energy_uj", "0"), ("max_energy_range_uj", "999999")):
            (tmp_path / folder / file).write_text(f"{text}\n")
    (tmp_path / "intel-rapl").mkdir()  # the kind of control, no zone
    return tmp_path


def test_processors_and_memory_are_counted_once(powercap):
    meter = energy.meter(CPU, powercap)
    before = meter.read()
    counters = {"0": 500_000, "0:0": 400_000, "0:1": 70_000, "1": 200_000, "2": 900_000}
    for zone, count in counters.items():
        (powercap / f"intel-rapl:{zone}/energy_uj").write_text(f"{count}\n")
    (powercap / "intel-rapl-mmio:0/energy_uj").write_text("500000\n")
    assert meter.name == "RAPL"
    assert meter.between(before, meter.read()) == pytest.approx(0.77)


def test_a_counter_may_begin_again(powercap):
    meter = energy.meter(CPU, powercap)
    (powercap / "intel-rapl:1/energy_uj").write_text("999990\n")
    before = meter.read()
    (powercap / "intel-rapl:1/energy_uj").write_text("10\n")
    assert meter.between(before, meter.read()) == pytest.approx(20e-6)


def test_counters_that_may_not_be_read_are_none(powercap):
    (powercap / "intel-rapl:1/energy_uj").unlink()
    (powercap / "intel-rapl:1/energy_uj").mkdir()  # root reads whatever has no permissions
    assert energy.meter(CPU, powercap) is None


def test_without_a_meter_there_is_none(tmp_path):
    assert energy.meter(CPU, tmp_path) is None
    assert energy.meter(TPU, tmp_path) is None


@pytest.fixture
def nvml(monkeypatch):
    """nvidia-ml-py on a machine whose fourth GPU counts millijoules."""

    class NVMLError(Exception):
        pass

    fake = types.ModuleType("pynvml")
    fake.NVMLError, fake.count = NVMLError, 5_000
    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetHandleByIndex = lambda index: f"device {index}"
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: {"device 3": fake.count}[handle]
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_a_gpu_counts_itself(nvml, tmp_path):
    meter = energy.meter(GPU, tmp_path)
    before = meter.read()
    nvml.count += 1_500
    assert (meter.name, meter.between(before, meter.read())) == ("NVML", pytest.approx(1.5))


def test_a_gpu_that_cannot_count_has_no_meter(nvml, tmp_path):
    def refuse(handle):
        raise nvml.NVMLError

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert energy.meter(GPU, tmp_path) is None


def test_without_the_library_a_gpu_has_no_meter(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.meter(GPU, tmp_path) is None


def test_the_model_counts_arithmetic_and_reading():
    """A thousand million multiply-adds are 4.6 mJ, and a megabyte from memory 0.16 mJ."""
    assert energy.modelled(1e9, 0) == pytest.approx(4.6e-3)
    assert energy.modelled(0, 1e6) == pytest.approx(0.16e-3)
    assert energy.modelled(1e9, 1e6) == pytest.approx(4.76e-3)
