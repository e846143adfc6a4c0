"""On a mesh of eight devices, weights go straight to their shards, and nothing else changes."""

import json
import pathlib

import fake_devices
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {
    "exits.head": "norm",
    "exits.points": (3,),
    "exits.recurrent_taps": (2, 6),
    "data.sequence_length": 16,
    "data.batch_size": 8,
    "tune.steps": 2,
    "tune.warmup_steps": 1,
    "tune.checkpoint_every": 1,
    "tune.validate_every": 1,
    "tune.validation_batches": 1,
}
RECIPES = {
    "exits": {},
    "exits, looped": {"model.scan": True},
    "joint": {"tune.train": "all", "tune.loss": "cross_entropy"},
    "joint, looped": {"tune.train": "all", "tune.loss": "cross_entropy", "model.scan": True},
}
MESHES = {"whole": {"data": 8}, "split": {"data": 1, "fsdp": 4, "tensor": 2}}
# Loads by every recipe on both meshes; watches, whenever an array has been placed, how much lies on
# the fullest device. Then a run on the mesh, and the same run resumed.
SCRIPT = """
import json, pathlib, shutil, sys, weakref
import jax, numpy as np
from configs import tiny
from early_exit.runs import assemble
from early_exit import tree
from early_exit.settings.overrides import override
from early_exit.settings.read import read
from early_exit.pretrained import load
from early_exit.training import loop

folder, settings, recipes, meshes = pathlib.Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
for name in ("exits.points", "exits.recurrent_taps"):
    settings[name] = tuple(settings[name])
assert jax.device_count() == 8
most, hosts, met = [], [], []

def fullest():
    held = {}  # views of a buffer are arrays, too
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            held[shard.device, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return max(
        sum(size for (where, _), size in held.items() if where == device)
        for device in jax.devices()
    )

place, read_tensor = load._place, load._read

def watched_place(array, sharding):
    placed = place(array, sharding)
    most.append(fullest())
    return placed

def watched_read(*args):
    pairs = list(read_tensor(*args))
    met.extend(weakref.ref(array) for _, array in pairs)
    hosts.append(sum(r().nbytes for r in met if r() is not None))
    return pairs

load._place, load._read = watched_place, watched_read
found = {}
for recipe, changes in recipes.items():
    states = {}
    for name, axes in meshes.items():
        axes = {f"mesh.{axis}": axes.get(axis, 1) for axis in ("data", "fsdp", "tensor")}
        config = read(override(tiny.get_config(), settings | changes | axes))
        most, hosts = [], []
        run = loop.Run(config, folder / f"{recipe}-{name}")
        most.append(fullest())
        loaded = tree.size_in_bytes(run.loaded)
        state = run.state()
        most.append(fullest())
        backbone = state["params"].get("backbone", run.frozen.get("backbone"))
        shards = {
            path: len({str(s.index) for s in x.addressable_shards})
            for path, x in tree.flatten(backbone).items()
        }
        states[name] = jax.device_get(state["params"]), jax.device_get(backbone)
        found[f"{recipe}/{name}"] = {
            "fingerprint": run.metadata["backbone"],
            "loading": max(most[:-2]) / loaded,
            "loaded": most[-2] / loaded,
            "started": most[-1] / tree.size_in_bytes([state, run.frozen]),
            "host": max(hosts) / loaded,
            "largest": max(x.nbytes for x in jax.tree.leaves(run.loaded)) / loaded,
            "shards": shards,
        }
        del run, state, backbone
    for a, b in zip(*(jax.tree.leaves(states[name]) for name in meshes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)

runs, init = [], loop.Run.__init__
def kept(run, *args):
    init(run, *args)
    runs.append(run)
loop.Run.__init__ = kept
rows = {}
for name, axes in meshes.items():
    axes = {f"mesh.{axis}": axes.get(axis, 1) for axis in ("data", "fsdp", "tensor")}
    config = read(override(tiny.get_config(), settings | recipes["joint, looped"] | axes))
    rows[name] = [loop.tune(config, folder / name)]
    shutil.rmtree(folder / name / "checkpoints" / "2")
    rows[name].append(loop.tune(config, folder / name))
found["rows"] = rows
found["programs"] = [run.step._cache_size() for run in runs]
(folder / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    given = [json.dumps(given) for given in (SETTINGS, RECIPES, MESHES)]
    fake_devices.python("-c", SCRIPT, folder, *given)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_device_ever_holds_the_whole(found, recipe):
    """An eighth, and what is not split: vectors."""
    split, whole = found[f"{recipe}/split"], found[f"{recipe}/whole"]
    for path, shards in split["shards"].items():
        assert shards == (1 if path.endswith("scale") else 8), path
    assert set(whole["shards"].values()) == {1}
    assert max(split[when] for when in ("loading", "loaded", "started")) < 0.2
    assert min(whole[when] for when in ("loading", "loaded", "started")) > 0.99  # it is measured
    # One tensor at a time.
    assert split["host"] <= 2 * split["largest"]


@pytest.mark.long
def test_the_weights_are_the_same(found):
    """Bit for bit; the states before the first step were compared where they were made."""
    runs = [f"{recipe}/{mesh}" for recipe in RECIPES for mesh in MESHES]
    assert len({found[run]["fingerprint"] for run in runs}) == 1


@pytest.mark.long
def test_a_run_on_the_mesh_compiles_once_resumed_or_not_and_learns_the_same(found):
    assert found["programs"] == [1, 1, 1, 1]
    (fresh, resumed), (other, again) = found["rows"]["split"], found["rows"]["whole"]
    assert fresh == resumed and other == again
    for a, b in zip(fresh, other, strict=True):
        (kind, number), *_ = a.items()  # an exit, or a draft of the recurrent one
        assert b[kind] == number and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
