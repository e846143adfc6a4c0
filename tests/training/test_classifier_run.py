"""A classifier's run, interrupted or on eight devices, is the same; so are its statistics."""

import pathlib
import re

import fake_devices
import jax
import numpy as np
import pytest

from configs import digits_resnet
from early_exit.backbones.image_parts import STATISTICS
from early_exit.runs import checkpoint
from early_exit.runs.layout import CHECKPOINTS
from early_exit.runs.metrics import FILE, MetricsWriter
from early_exit.settings.overrides import override
from early_exit.settings.read import read
from early_exit.training import loop

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {
    "data.batch_size": 16,
    "tune.steps": 6,
    "tune.warmup_steps": 1,
    # Adam divides by small squares, and so shows the order in which a batch was summed.
    "tune.optimizer": "sgd",
    "tune.learning_rate": 0.05,
    "tune.checkpoint_every": 2,
    "tune.validate_every": 6,
    "tune.validation_batches": 1,
}
CONFIG = read(override(digits_resnet.get_config("width=4,head=grid"), SETTINGS))


def leaves_of(folder, config=CONFIG):
    """Path → array of everything in the newest checkpoint, and the data iterator's state."""
    like = loop.Run(config, folder).state()
    state, iterator_state = checkpoint.restore(folder / CHECKPOINTS, like)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}, iterator_state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, rows) of a run from its first step to its last, on one device."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, loop.tune(CONFIG, folder)


def test_an_interrupted_run_goes_on_bit_equal(whole, tmp_path, monkeypatch):
    write = MetricsWriter.write

    def interrupted(self, step, scalars):
        if step == 5:
            raise KeyboardInterrupt
        write(self, step, scalars)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsWriter, "write", interrupted)
        loop.tune(CONFIG, tmp_path)
    assert checkpoint.latest_step(tmp_path / CHECKPOINTS) == 4
    folder, rows = whole
    assert loop.tune(CONFIG, tmp_path) == rows
    (found, found_iterator), (wanted, wanted_iterator) = map(leaves_of, (tmp_path, folder))
    assert found.keys() == wanted.keys()
    assert not [path for path in wanted if found[path].tobytes() != wanted[path].tobytes()]
    assert found_iterator == wanted_iterator
    assert (tmp_path / FILE).read_text() == (folder / FILE).read_text()


def test_eight_devices_train_as_one(whole, tmp_path):
    flags = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    settings = "configs/digits_resnet.py:width=4,head=grid"
    fake_devices.python(
        "-m", "launch.tune", f"--config={settings}", *flags, f"--workdir={tmp_path}"
    )
    (found, _), (wanted, _) = (leaves_of(folder) for folder in (tmp_path, whole[0]))
    statistics = 0
    for path, leaf in wanted.items():
        if "params" in path:
            np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path)
            statistics += bool(re.search(STATISTICS, path.replace("']['", "/").rstrip("']")))
    assert statistics >= 8
