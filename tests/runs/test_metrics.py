import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from early_exit.runs import metrics


def write_steps(folder, steps, resumed_step=None, value=0.5):
    with metrics.MetricsWriter(folder, resumed_step) as writer:
        for step in steps:
            writer.write(step, {"loss": value})


def steps_of(folder):
    return [line["step"] for line in metrics.read_metrics(folder)]


def test_lines_are_json_and_keep_integers_and_precision(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(np.int64(3), {"loss": jnp.float32(0.1), "tokens": 2**40, "rate": 1 / 3})
        writer.write(4, {"loss": math.nan, "norm": math.inf})
    first, second = (tmp_path / metrics.FILE).read_text().splitlines()
    assert json.loads(first) == {
        "step": 3,
        "loss": float(np.float32(0.1)),
        "tokens": 2**40,
        "rate": 1 / 3,
    }
    assert second == '{"step": 4, "loss": null, "norm": null}'


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    script = (
        "import os, sys; from early_exit.runs import metrics\n"
        "metrics.MetricsWriter(sys.argv[1]).write(1, {'loss': 2.0}); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert done.returncode == 9
    assert metrics.read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_resumed_run_has_each_step_once(tmp_path):
    write_steps(tmp_path, [0, 10, 20, 30])
    write_steps(tmp_path, [20, 30, 40], resumed_step=10)
    assert steps_of(tmp_path) == [0, 10, 20, 30, 40]
    write_steps(tmp_path, [0, 10])
    assert steps_of(tmp_path) == [0, 10]


def test_what_depends_on_the_machine_has_a_file_of_its_own(tmp_path):
    for resumed, speed in [(None, 5.0), (1, 6.0)]:
        with metrics.MetricsWriter(tmp_path, resumed) as writer:
            for step in (1, 2):
                if step > (resumed or 0):
                    writer.write(step, {"loss": 0.5})
                    writer.write_speed(step, {"tokens_per_second": speed})
    assert metrics.read_metrics(tmp_path) == [{"step": step, "loss": 0.5} for step in (1, 2)]
    assert metrics.read_metrics(tmp_path, metrics.SPEED) == [
        {"step": 1, "tokens_per_second": 5.0},
        {"step": 2, "tokens_per_second": 6.0},
    ]


def test_the_half_line_of_a_killed_run_is_dropped(tmp_path):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    assert steps_of(tmp_path) == [1, 2]
    write_steps(tmp_path, [3, 4], resumed_step=2)
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert (tmp_path / metrics.FILE).read_text().count("\n") == 4


def test_tensorboard_has_the_same_scalars(tmp_path):
    # tensorboardX's own protocol buffers read what it wrote: length, crc, event, crc.
    from tensorboardX.proto.event_pb2 import Event

    write_steps(tmp_path, [1, 2], value=0.25)
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + length :]
    assert found == [(1, "loss", 0.25), (2, "loss", 0.25)]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        metrics.MetricsWriter(tmp_path / "file")


def test_tables_align_numbers_right_and_words_left():
    rows = [("mlp", 6, 0.31049, None), ("embedding", np.int32(120), jnp.float32(0.5), 1e-6)]
    rows.append(("norm", 7, 12345.6, 0.0))
    assert metrics.table(rows, ("head", "after", "agreement", "rate")).splitlines() == [
        "head       after  agreement   rate",
        "---------  -----  ---------  -----",
        "mlp            6      0.310      –",
        "embedding    120      0.500  1e-06",
        "norm           7      12346  0.000",
    ]


def test_an_empty_table_is_its_header():
    assert metrics.table([], ("exit", "loss")) == "exit  loss\n----  ----"


def test_a_ragged_table_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        metrics.table([(1, 2), (3,)], ("a", "b"))
