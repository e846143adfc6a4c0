"""Rates, the share of the peak and memory, against counts made by hand."""

import time
import types

import jax
import jax.numpy as jnp
import pytest

from configs import tiny
from conftest import SHORT_RUN
from early_exit.cost import chips
from early_exit.runs.metrics import SPEED, read_metrics
from early_exit.settings.overrides import override
from early_exit.settings.read import read
from early_exit.training import loop, pace, plan
from early_exit.training import step as steps
from early_exit.training.observe import observe


def saved_every_other(steps):
    """A short run of so many steps."""
    changes = {
        "exits.head": "embedding",
        "exits.points": (3,),
        "data.sequence_length": 16,
        "tune.steps": steps,
        "tune.checkpoint_every": 2,
        "tune.validation_batches": 1,
    }
    return read(override(tiny.get_config(), changes))


def device(kind, **stats):
    memory = {"memory_stats": lambda: stats or None}
    return types.SimpleNamespace(device_kind=kind, platform="tpu", **memory)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("TPU7x", 1153.5),  # half a chip
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks(kind, teraflops):
    assert pace.peak([device(kind)] * 4) == pytest.approx(4e12 * teraflops)
    assert pace.unknown([device(kind)]) is None


def test_no_peak_is_made_up():
    assert pace.peak(jax.devices()) is None
    assert pace.peak([device("TPU v5e"), device("TPU v9")]) is None
    assert pace.peak([device("TPU v4 lite")]) is None
    assert {chip.flops for chip in chips.CHIPS.values()} <= {peak for _, peak in pace.PEAKS}


def test_what_has_no_peak_is_named_once():
    devices = [device("TPU v5e"), device("TPU v9"), device("Abacus"), device("Abacus")]
    assert pace.unknown(devices).startswith("MFU unknown: the peak of Abacus, TPU v9 is not in")
    assert pace.unknown(jax.devices()) is None


def test_a_run_says_that_its_mfu_is_unknown(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pace, "unknown", lambda devices: "MFU unknown: the peak of Abacus")
    short = SHORT_RUN | {"tune.steps": 2, "tune.warmup_steps": 1}
    config = read(override(tiny.get_config(), short))
    with caplog.at_level("WARNING"):
        loop.tune(config, tmp_path)
    assert [r.getMessage() for r in caplog.records].count("MFU unknown: the peak of Abacus") == 1


def test_what_is_computed_again_is_no_model_flop():
    """Of y = f(x W) three products: one forward, two backward, in a loop and out of it."""
    weights, x = jnp.ones((5, 8, 8)), jnp.ones((4, 8))

    def loss(weights, x, body):
        x, _ = jax.lax.scan(lambda x, w: (body(x, w), None), x, weights)
        return body(x, weights[0]).sum()

    def counted(body):
        step = jax.jit(jax.grad(lambda *args: loss(*args, body), argnums=(0, 1)))
        traced = step.trace(weights, x)
        return pace.flops(traced), 2 * pace.multiply_adds.traced_multiply_adds(traced.jaxpr)

    def body(x, w):
        return jnp.tanh(x @ w)

    wanted = 6 * 3 * 2 * 4 * 8 * 8
    assert counted(body) == (wanted, wanted)
    assert counted(jax.checkpoint(body)) == (wanted, wanted * 4 // 3)


def test_memory_is_the_fullest_devices():
    devices = [
        device("TPU v4", bytes_in_use=3, peak_bytes_in_use=9),
        device("TPU v4", bytes_in_use=5, peak_bytes_in_use=7),
    ]
    assert pace.memory(devices) == {"memory_bytes": 5, "memory_peak_bytes": 9}
    host = pace.memory([device("cpu")])
    assert 2**20 < host["host_memory_bytes"] <= host["host_memory_peak_bytes"] < 2**40


def test_rates_leave_out_what_is_no_step(monkeypatch):
    now = iter([10.0, 10.5, 30.0, 30.25])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(now))
    clock = pace.Pace("tokens", 1000, utilised=0.1)
    assert "tokens_per_second" not in clock.lap()  # compiled
    lap = clock.lap()
    assert (lap["tokens_per_second"], lap["mfu"]) == (2000, pytest.approx(0.2))
    clock.start()  # after a validation
    assert clock.lap()["tokens_per_second"] == 4000


@pytest.mark.parametrize("waits", [True, False])
def test_no_step_is_told_faster_than_it_was(tmp_path, monkeypatch, waits):
    """Also those after which a run is saved; whether a call waits for its step or not.

    What is noted late of one step is missing from the next, so there is much slack.
    """
    config = saved_every_other(steps=5)
    step_of, least = plan.step, 0.1

    def slow(*args):
        step = step_of(*args)

        def called(*args):
            out = step(*args)
            if waits:
                time.sleep(least)
                return jax.block_until_ready(out)
            state, metrics = out
            return state, metrics | {"loss": Late(metrics["loss"], least)}

        called.trace = step.trace
        called._cache_size = step._cache_size
        return called

    monkeypatch.setattr(plan, "step", slow)
    loop.tune(config, tmp_path)
    lines = read_metrics(tmp_path, SPEED)
    rates = [line["tokens_per_second"] for line in lines[1:]]
    assert len(rates) == 4 and "tokens_per_second" not in lines[0]
    assert max(rates) <= 10 * config.data.batch_size * 16 / least


class Late:
    """A number that is not there before some time has passed, since the one before it was."""

    last = 0.0

    def __init__(self, value, seconds):
        Late.last = self._at = max(Late.last, time.monotonic()) + seconds
        self._value = value

    def is_ready(self):
        return time.monotonic() >= self._at

    def __float__(self):
        time.sleep(max(self._at - time.monotonic(), 0))
        return float(self._value)


def test_a_run_writes_them_for_every_step(tmp_path, monkeypatch):
    config = saved_every_other(steps=3)
    monkeypatch.setattr(pace, "PEAKS", (("cpu", 1e12),))
    traces = []
    monkeypatch.setattr(
        steps, "observe", lambda *args, **kwargs: traces.append(1) or observe(*args, **kwargs)
    )
    loop.tune(config, tmp_path)
    assert len(traces) == 1  # counting takes no tracing of its own
    lines = read_metrics(tmp_path, SPEED)
    assert [line.pop("step") for line in lines] == [1, 2, 3]
    assert all("host_memory_bytes" in line for line in lines)
    assert "tokens_per_second" not in lines[0] and "mfu" not in lines[0]
    ratios = [line["mfu"] / line["tokens_per_second"] for line in lines[1:]]
    assert ratios[0] == pytest.approx(ratios[1])
    flops = ratios[0] * 1e12  # of a token

    # By hand, per token: all six blocks and the output matrix forward, for the teacher; the head's
    # 129 rows forward, and backward to its weights and its input, or one of these.
    width, keys, wide, length = 32, 16, 64, 16
    block = 2 * width * width + 2 * width * keys + 3 * width * wide + 2 * length * width
    teacher = 6 * block + 320 * width + 128 * width
    head = 129 * width
    assert 2 * (teacher + 2 * head) <= flops <= 2 * (teacher + 3 * head)
