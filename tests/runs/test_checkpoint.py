import json
import os
import pathlib
import signal
import subprocess
import sys

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from early_exit.runs import checkpoint

METADATA = {"config": {"points": [6, 12], "rate": 1e-4, "name": None}, "backbone": "ab12"}
ITERATOR = {"parent_state": {"next_index": 10}, "remainder_slices": {"tokens": [-1, -1]}}


def example_state(key=0):
    a, b = jax.random.split(jax.random.key(key))
    params = {
        "exits": {
            "6": {"kernel": jax.random.normal(a, (8, 16), jnp.bfloat16)},
            "12": {"kernel": jax.random.normal(b, (8, 16))},
        },
        "token_ids": jnp.arange(5),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {"params": params, "opt_state": optimizer.init(params["exits"]), "step": jnp.int32(7)}


def save(folder, step, state):
    with checkpoint.Saver(folder) as saver:
        saver.save(step, state, ITERATOR, METADATA)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def python(script, *args, **environment):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )


def test_everything_comes_back_bit_for_bit(tmp_path):
    state = example_state()
    save(tmp_path, 7, state)
    restored, iterator_state = checkpoint.restore(tmp_path, jax.eval_shape(example_state))
    assert_same(restored, state)
    assert iterator_state == ITERATOR
    assert checkpoint.metadata(tmp_path) == METADATA
    assert checkpoint.latest_step(tmp_path) == 7


def test_unusual_numbers_come_back_bit_for_bit(tmp_path):
    bits = np.array([0x7FC1, 0xFF80, 0x8000, 0x0001, 0x7F80], np.uint16)  # NaN payload, −0, …
    state = {"bits": jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)}
    save(tmp_path, 0, state)
    assert_same(checkpoint.restore(tmp_path, state)[0], state)


def test_the_state_may_be_donated_once_save_returns(tmp_path):
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"kernel": jnp.ones((512, 1024))}
    with checkpoint.Saver(tmp_path) as saver:
        saver.save(1, state, None, {})
        state = jax.block_until_ready(update(state))
    restored, _ = checkpoint.restore(tmp_path, state)
    np.testing.assert_array_equal(restored["kernel"], 1.0)


def test_only_the_latest_are_kept_and_any_of_them_restores(tmp_path):
    with checkpoint.Saver(tmp_path, keep=2) as saver:
        for step in (2, 4, 10):
            saver.save(step, {"x": jnp.full(3, step)}, {"at": step}, {"run": step})
    like = {"x": jax.ShapeDtypeStruct((3,), jnp.int32)}
    assert checkpoint.latest_step(tmp_path) == 10
    for step in (4, 10):
        state, iterator_state = checkpoint.restore(tmp_path, like, step)
        assert state["x"].tolist() == [step] * 3 and iterator_state == {"at": step}
        assert checkpoint.metadata(tmp_path, step) == {"run": step}
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 2 in .*; it has 4, 10"):
        checkpoint.restore(tmp_path, like, 2)


def test_parts_of_the_state_can_be_left_unread(tmp_path):
    state = example_state()
    save(tmp_path, 7, state)
    restored, _ = checkpoint.restore(tmp_path, {"params": state["params"]})
    assert_same(restored, {"params": state["params"]})


def test_a_state_that_does_not_fit_is_refused_with_every_difference(tmp_path):
    save(tmp_path, 7, example_state())
    like = jax.eval_shape(example_state)
    exits = like["params"]["exits"]
    exits["6"]["kernel"] = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    exits["18"] = exits.pop("12")
    like["params"]["token_ids"] = jax.ShapeDtypeStruct((6,), jnp.int32)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        checkpoint.restore(tmp_path, like)
    assert str(caught.value).split("\n")[1:] == [
        "  params/exits/12/kernel: checkpoint has float32 (8, 16), model has nothing",
        "  params/exits/18/kernel: checkpoint has nothing, model has float32 (8, 16)",
        "  params/exits/6/kernel: checkpoint has bfloat16 (8, 16), model has float32 (8, 16)",
        "  params/token_ids: checkpoint has int32 (5,), model has int32 (6,)",
    ]
    with pytest.raises(ValueError, match="ema: checkpoint has nothing, model has float32"):
        checkpoint.restore(tmp_path, {"ema": jax.ShapeDtypeStruct((), jnp.float32)})


def test_no_checkpoint_is_an_error_and_reading_leaves_no_trace(tmp_path):
    folder = tmp_path / "nowhere"
    assert checkpoint.latest_step(folder) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*nowhere"):
        checkpoint.restore(folder, {"x": jnp.ones(1)})
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*nowhere"):
        checkpoint.metadata(folder)
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write checkpoints to .*file"):
        checkpoint.Saver(tmp_path / "file")
    with pytest.raises(ValueError, match="keep must be at least 1, not 0"):
        checkpoint.Saver(tmp_path, keep=0)


KILLED = """
import os, signal, sys, jax, jax.numpy as jnp
from early_exit.runs import checkpoint
saver = checkpoint.Saver(sys.argv[1])
saver.save(1, {"x": jnp.ones(1 << 24)}, {"at": 1}, {})
saver.wait()
saver.save(2, {"x": jax.random.normal(jax.random.key(0), (1 << 24,))}, {"at": 2}, {})
while not any(name.startswith("2.") for name in os.listdir(sys.argv[1])):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
    done = python(KILLED, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    leftovers = {path.name for path in tmp_path.iterdir()} - {"1"}
    assert leftovers and "2" not in leftovers  # else it was not killed in the middle
    assert checkpoint.latest_step(tmp_path) == 1
    state, iterator_state = checkpoint.restore(tmp_path, {"x": jnp.zeros(1 << 24)})
    assert iterator_state == {"at": 1} and bool((state["x"] == 1).all())

    save(tmp_path, 2, {"x": jnp.zeros(3)})
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


FULL = """
import resource, sys, jax, jax.numpy as jnp
from early_exit.runs import checkpoint
with checkpoint.Saver(sys.argv[1], keep=1) as saver:
    saver.save(1, {"x": jnp.ones(4)}, {"at": 1}, {})
    saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    saver.save(2, {"x": jax.random.normal(jax.random.key(0), (1 << 18,))}, {"at": 2}, {})
    saver.wait()
"""


def test_a_disk_that_takes_no_more_is_an_error_and_keeps_the_checkpoint_before(tmp_path):
    done = python(FULL, tmp_path)
    assert done.returncode == 1
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("OSError: the checkpoint could not be written to")
    assert last_line.endswith("last good one is of step 1. Free some space and start again")
    state, iterator_state = checkpoint.restore(tmp_path, {"x": jnp.zeros(4)})
    assert state["x"].tolist() == [1.0] * 4 and iterator_state == {"at": 1}


OTHER_MESH = """
import sys, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from early_exit.runs import checkpoint
def mesh(*shape):
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
def like(mesh, spec):
    return {"x": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, spec))}
x = jnp.arange(128.0).reshape(8, 16)
saved_as = like(mesh(2, 4), P("data", "fsdp"))
with checkpoint.Saver(sys.argv[1]) as saver:
    saver.save(1, {"x": jax.device_put(x, saved_as["x"].sharding)}, None, {})
for other in (saved_as, like(mesh(8, 1), P("data")), like(mesh(1, 8), P(None, "fsdp"))):
    got, _ = checkpoint.restore(sys.argv[1], other)
    assert got["x"].sharding == other["x"].sharding and (got["x"] == x).all()
"""


def test_arrays_come_back_under_another_mesh(tmp_path):
    fake_devices.python("-c", OTHER_MESH, tmp_path)
    # And on a single device, here.
    state, _ = checkpoint.restore(tmp_path, {"x": jax.ShapeDtypeStruct((8, 16), jnp.float32)})
    np.testing.assert_array_equal(state["x"], np.arange(128.0).reshape(8, 16))


def test_what_is_written_beside_the_arrays_is_plain_json(tmp_path):
    save(tmp_path, 3, {"x": jnp.ones(2)})
    found = json.loads(pathlib.Path(tmp_path, "3", "info", "data.json").read_text())
    assert found == {"iterator_state": ITERATOR, "metadata": METADATA}
