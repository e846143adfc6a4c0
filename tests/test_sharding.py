"""The mesh, the placing of parameters, and one tuning step on eight devices as on one."""

import json
from pathlib import Path

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from early_exit import sharding, tree
from early_exit.settings.sections import MeshSettings

ROOT = Path(__file__).parents[1]


def specs(shapes, **axes):
    """Path → the spec of an array of that shape."""
    sizes = tuple(axes.get(axis, 1) for axis in sharding.AXES)
    mesh = AbstractMesh(sizes, sharding.AXES)
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    placed = sharding.shardings(tree.unflatten(leaves), mesh)
    return {path: leaf.spec for path, leaf in tree.flatten(placed).items()}


def test_the_rules_place_a_blocks_parameters():
    """In front of a sum over `tensor` stands a split of what it sums over."""
    wide = P("fsdp", "tensor")
    back = P("tensor", "fsdp")
    want = {
        "backbone/blocks/3/attention/query/kernel": ((64, 64), wide),
        "backbone/blocks/3/attention/key/kernel": ((64, 32), wide),
        "backbone/blocks/3/attention/value/kernel": ((64, 32), wide),
        "backbone/blocks/3/attention/output/kernel": ((64, 64), back),
        "backbone/blocks/3/mlp/gate/kernel": ((64, 128), wide),
        "backbone/blocks/3/mlp/up/kernel": ((64, 128), wide),
        "backbone/blocks/3/mlp/down/kernel": ((128, 64), back),
        "backbone/blocks/3/mlp_norm/scale": ((64,), P()),
        "backbone/embedding/embedding": ((512, 64), back),
        "backbone/final_norm/scale": ((64,), P()),
        "backbone/blocks/mlp/up/kernel": ((6, 64, 128), P(None, "fsdp", "tensor")),
        "backbone/blocks/mlp_norm/scale": ((6, 64), P()),
        "exits/12/mlp/up/kernel": ((64, 128), wide),
        "exits/12/output/embedding": ((512, 64), back),
        "backbone/blocks/3/mlp/experts/up/kernel": ((6, 64, 128), P("expert", "fsdp", "tensor")),
        "backbone/blocks/3/mlp/experts/down/kernel": ((6, 128, 64), P("expert", "tensor", "fsdp")),
        "backbone/blocks/mlp/experts/gate/kernel": (
            (2, 6, 64, 128),
            P(None, "expert", "fsdp", "tensor"),
        ),
        "exits/12/mlp/router/kernel": ((64, 6), P()),
        "token_ids": ((500,), P()),
    }
    shapes = {path: shape for path, (shape, _) in want.items()}
    assert specs(shapes, fsdp=4, tensor=2, expert=3) == {
        path: spec for path, (_, spec) in want.items()
    }


def test_what_an_axis_does_not_divide_is_replicated():
    got = specs({"a/embedding": (4097, 64), "b/embedding": (4096, 63)}, fsdp=2, tensor=4)
    assert got == {"a/embedding": P(None, "fsdp"), "b/embedding": P("tensor", None)}


def test_the_tree_comes_back_in_its_own_structure():
    params = {"b": {"10": {"kernel": np.ones((2, 2))}, "9": {}}, "a": np.ones(3)}
    placed = sharding.shardings(params, sharding.make_mesh(MeshSettings()))
    assert jax.tree.structure(placed) == jax.tree.structure(params)
    on_mesh = jax.device_put(params, placed)
    np.testing.assert_array_equal(on_mesh["a"], params["a"])


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 999}, "mesh data=999, fsdp=1, tensor=1, expert=1 does not use exactly the"),
        ({"data": -1, "fsdp": 999}, "mesh data=-1, fsdp=999, tensor=1, expert=1 does not use"),
    ],
)
def test_meshes_that_do_not_fit(axes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(MeshSettings(**axes))


@pytest.mark.parametrize(
    ("rows", "spec"),
    [
        (8, P(("data", "fsdp"))),
        (6, P(("data",))),
        (9, P(("fsdp",))),
        (5, P(None)),  # on every device
        (1, P(None)),
    ],
)
def test_rows_are_split_over_what_divides_them(rows, spec):
    mesh = AbstractMesh((2, 3 if rows == 9 else 4, 1, 1), sharding.AXES)
    assert sharding.row_spec(mesh, rows) == spec


def test_heads_that_do_not_divide_are_on_all_devices():
    mesh = AbstractMesh((2, 2, 8, 1), sharding.AXES)
    assert sharding.cache_spec(mesh, 1, 8) == P(None, "tensor")
    assert sharding.cache_spec(mesh, 1, 4) == P(None, None)


class Chip:
    """What a layout is made of."""

    device_kind = "fake"

    def __init__(self, id, process_index, slice_index=0, platform="gpu"):
        self.id, self.process_index = id, process_index
        self.slice_index, self.platform = slice_index, platform

    def __repr__(self):
        return str(self.id)


def chips(slices, each):
    """Out of order, as they may come: even ones first."""
    made = [Chip(i, process_index=i, slice_index=i // each) for i in range(slices * each)]
    return made[::2] + made[1::2]


def ids(mesh):
    return np.vectorize(lambda chip: chip.id)(mesh.devices)


def test_only_data_goes_from_slice_to_slice():
    devices = chips(slices=3, each=8)
    mesh = sharding.make_mesh(MeshSettings(fsdp=2, tensor=2, slices=3), devices)
    assert dict(mesh.shape) == {"data": 6, "fsdp": 2, "tensor": 2, "expert": 1}
    of_slice = ids(mesh) // 8
    # Each place along data is in one slice, and slices follow each other.
    np.testing.assert_array_equal(of_slice[:, 0, 0, 0], [0, 0, 1, 1, 2, 2])
    assert (of_slice == of_slice[:, :1, :1]).all()
    assert sorted(ids(mesh).flat) == list(range(24))


def test_a_process_stands_for_a_slice_where_there_are_only_cpus():
    devices = [Chip(i, process_index=i // 4, platform="cpu") for i in range(8)]
    mesh = sharding.make_mesh(MeshSettings(data=2, fsdp=4, slices=2), devices)
    np.testing.assert_array_equal(ids(mesh)[..., 0, 0], [range(4), range(4, 8)])
    # Nobody has to say so.
    plain = sharding.make_mesh(MeshSettings(data=2, fsdp=4), devices)
    np.testing.assert_array_equal(ids(plain), ids(mesh))


def test_one_slice_is_laid_out_as_without_slices():
    devices = chips(slices=1, each=8)
    axes = {"data": 2, "fsdp": 2, "tensor": 2}
    found, plain = (
        sharding.make_mesh(MeshSettings(**axes, slices=1), devices),
        sharding.make_mesh(MeshSettings(**axes), devices),
    )
    np.testing.assert_array_equal(ids(found), ids(plain))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 8}, "mesh.slices=1, but the devices are of 2 slices; set mesh.slices=2"),
        ({"data": 8, "slices": 4}, "mesh.slices=4, but the devices are of 2 slices; set"),
        (
            {"data": 1, "fsdp": 8, "slices": 2},
            "mesh.slices=2 does not divide mesh.data=1",
        ),
    ],
)
def test_slices_that_do_not_fit(axes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(MeshSettings(**axes), chips(slices=2, each=4))


def test_slices_where_there_is_one_process():
    with pytest.raises(ValueError, match="slices=2, but the devices are of 1 processes; set"):
        sharding.make_mesh(MeshSettings(slices=2))


def test_a_batch_must_split_evenly():
    mesh = AbstractMesh((2, 2, 2, 1), sharding.AXES)
    with pytest.raises(ValueError, match=r"6 rows cannot be split over 4 devices .*batch_size"):
        sharding.row_rank(mesh, 6)


# Both losses, on one device and on the meshes; the results go into a file.
MESHES = {
    "data": {"data": 8},
    "all": {"data": 2, "fsdp": -1, "tensor": 2},
    "fsdp": {"fsdp": 8},
}
LOSSES = {"kl": {"head": "mlp", "classes": 20}, "cross_entropy": {"head": "layer"}}
SCRIPT = """
import dataclasses, functools, json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from conftest import TINY, build
from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.settings.sections import MeshSettings
from early_exit.exits.multi_exit import MultiExit
from early_exit.training import step as steps
from early_exit.training.recipe import Recipe
from early_exit.training.schedule import ExitWeights

path, meshes, losses = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
assert jax.device_count() == 8
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
rng = np.random.default_rng(0)
batch = {
    "tokens": rng.integers(0, 64, (8, 16), np.int32),
    "documents": np.repeat(np.repeat([[1, 2]], 8, 1), 8, 0).astype(np.int32),
    "positions": np.repeat(np.tile(np.arange(8), 2)[None], 8, 0).astype(np.int32),
}
config = dataclasses.replace(TINY, vocab_size=64, depth=2)
results = {}

def shards(params):  # of those there are
    return sum(len({str(s.index) for s in x.addressable_shards}) for x in jax.tree.leaves(params))

for loss, options in losses.items():
    model, params = build(config, points=(1,), **options)
    exits = params.pop("exits")
    looped = MultiExit(dataclasses.replace(config, scan=True), model.exits)
    stacked = params | {"backbone": base.stack_blocks(params["backbone"])}
    for name, axes in [("one", None), *meshes.items()]:
        state, frozen, rows = steps.init_state({"exits": exits}, optimizer), params, batch
        recipe = Recipe(loss, ExitWeights((1.0,)))
        step = functools.partial(
            steps.tune_step, model=model, recipe=recipe, optimizer=optimizer
        )
        run = jax.jit(step)
        if axes is not None:  # blocks in a loop, and output matrices in parts, as on a pod
            mesh = sharding.make_mesh(MeshSettings(**axes))
            recipe = dataclasses.replace(recipe, table_parts=mesh.shape["tensor"])
            step = functools.partial(
                steps.tune_step, model=looped, recipe=recipe, optimizer=optimizer
            )
            placed, everywhere = sharding.shardings(exits, mesh), sharding.replicated(mesh)
            opt_state = optax.tree_map_params(
                optimizer, lambda _, spec: spec, state["opt_state"], {"exits": placed},
                transform_non_params=lambda _: everywhere,
            )
            where = {"params": {"exits": placed}, "opt_state": opt_state, "step": everywhere}
            run = jax.jit(sharding.under(mesh, step), out_shardings=(where, everywhere))
            state = jax.device_put(state, where)
            frozen = jax.device_put(stacked, sharding.shardings(stacked, mesh))
            rows = jax.device_put(batch, sharding.batch_sharding(mesh))
        new, metrics = run(state, frozen, rows)
        results[f"{loss}/{name}/loss"] = metrics["loss"]
        found = shards(new["params"]["exits"])
        results[f"{loss}/{name}/shards"] = found / len(jax.tree.leaves(exits))
        for leaf, value in tree.flatten(new["params"]["exits"]).items():
            results[f"{loss}/{name}/exits/{leaf}"] = value
np.savez(path, **results)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharding") / "results.npz"
    fake_devices.python("-c", SCRIPT, path, json.dumps(MESHES), json.dumps(LOSSES))
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_on_eight_devices_is_the_step_on_one(results, loss, mesh):
    one, many = (
        {
            name.removeprefix(f"{loss}/{where}/"): value
            for name, value in results.items()
            if name.startswith(f"{loss}/{where}/")
        }
        for where in ("one", mesh)
    )
    assert one.pop("shards") == 1
    # The comparison must be between different programs.
    assert (many.pop("shards") > 1) == (mesh != "data")
    assert one.keys() == many.keys() and len(one) > 5
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
