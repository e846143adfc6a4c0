"""Where arrays live: a declared mesh and one ordered regex table from path to axes.

The one idea: the same step runs on one CPU and on a pod. Parameters are placed by the rules,
batches are split over `data` and `fsdp`, and the compiler derives the rest. Where parameters are,
their arrays say (`mesh_of`), so a program that is given them (`laid_out`) needs no mesh beside
them. With several processes, each has its share of a batch's rows, and what one of them alone can
know, it tells the others (`agreed`).
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from early_exit import tree
from early_exit.settings.sections import MeshSettings

AXES = ("data", "fsdp", "tensor", "expert")
_BY_ROW = ("data", "fsdp")
_ROWS = P(_BY_ROW)

# First match wins. Kernels are [in, out]: the wide side of each pair is split over `tensor`, so
# that a block needs one reduction after attention and one after the feed-forward part. Those of
# experts have one more axis in front.
RULES: tuple[tuple[str, P], ...] = (
    (r"experts/(gate|up)/kernel$", P("expert", "fsdp", "tensor")),
    (r"experts/down/kernel$", P("expert", "tensor", "fsdp")),
    (r"(query|key|value|gate|up|fuse|join)/kernel$", P("fsdp", "tensor")),
    (r"attention/output/kernel$|down/kernel$", P("tensor", "fsdp")),
    (r"embedding$", P("tensor", "fsdp")),
    (r"", P()),
)


def make_mesh(axes: MeshSettings, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices; one axis may be −1 and takes the devices that are left.

    Args:
      axes: sizes, and `slices`, if the devices are several groups with a slower network in between
        (TPU slices, GPU hosts). Only `data` goes over it: its neighbours are in one slice.
      devices: those of a topology that is not here; jax's own if not given.

    Raises:
      ValueError: sizes that do not multiply to the number of devices, or slices that are not those
        of the devices or do not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [getattr(axes, axis) for axis in AXES], len(devices)
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count or min(sizes) < 1:
        given = ", ".join(f"{axis}={getattr(axes, axis)}" for axis in AXES)
        raise ValueError(
            f"mesh {given} does not use exactly the {count} devices there are; set other sizes "
            "(-1 takes what is left)"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    slices, by_process = _checked_slices(axes.slices, sizes[0], devices)
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=devices)
    arranged = mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]),
        (slices, *[1] * (len(AXES) - 1)),
        devices,
        process_is_granule=by_process,
        # As `jax.make_mesh` has it.
        allow_split_physical_axes=devices[0].device_kind in ("TPU v5 lite", "TPU v5e"),
    )
    return Mesh(arranged, AXES, axis_types=kinds)


def own_mesh(axes: MeshSettings) -> tuple[Mesh, bool]:
    """(a mesh, whether it is of all processes): of this one's devices if the sizes fit them.

    For work that processes can share out: each does a part of its own, or, where one has too few
    devices for the model, all do all of it together.

    Raises:
      ValueError: the sizes fit neither these devices nor all; says so of all.
    """
    try:
        return make_mesh(axes, jax.local_devices()), False
    except ValueError:
        return make_mesh(axes), jax.process_count() > 1


def _checked_slices(asked: int, data: int, devices: Sequence[Any]) -> tuple[int, bool]:
    """(how many slices, whether each process stands for one, as on CPUs that are in no slices)."""
    found = {getattr(device, "slice_index", 0) for device in devices}
    by_process = asked > 1 and len(found) == 1 and devices[0].platform == "cpu"
    if by_process:
        found = {device.process_index for device in devices}
    if asked != len(found):
        raise ValueError(
            f"mesh.slices={asked}, but the devices are of {len(found)} "
            f"{'processes' if by_process else 'slices'}; set mesh.slices={len(found)}"
        )
    if data % asked:
        raise ValueError(
            f"mesh.slices={asked} does not divide mesh.data={data}: between slices, only data is "
            "split; make it a multiple"
        )
    return asked, by_process


def shardings(params: Any, mesh: Mesh) -> Any:
    """A tree like `params` (arrays or shapes) of `NamedSharding`s by `RULES`.

    An axis that does not divide its dimension is dropped for that array: reduced heads have an
    odd number of rows.
    """

    def place(path: str, leaf) -> NamedSharding:
        spec = tree.match(RULES, path)
        if 0 < len(spec) < leaf.ndim:  # the leading axis of stacked blocks stays whole
            spec = P(*[None] * (leaf.ndim - len(spec)), *spec)
        kept = [
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, P(*kept))

    placed = {path: place(path, leaf) for path, leaf in tree.flatten(params).items()}
    return jax.tree.unflatten(jax.tree.structure(params), placed.values())


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over `data` and `fsdp`."""
    return NamedSharding(mesh, _ROWS)


def row_spec(mesh: Any, rows: int) -> P:
    """How so many rows are split: over `data` and `fsdp`, over the one that divides them, or not.

    Rows that are not split are on every device: decoding one prompt on many is no error.
    """
    for axes in (_BY_ROW, _BY_ROW[:1], _BY_ROW[1:]):
        if rows % math.prod(mesh.shape[axis] for axis in axes) == 0:
            return P(axes)
    return P(None)


def by_row(x: jax.Array) -> jax.Array:
    """Keeps a value whose first axis is that of a batch's rows where its rows are (`row_spec`).

    Left free, the compiler moves it to where a matrix that it meets has its columns. Outside
    `under`, nothing is done.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, row_spec(mesh, x.shape[0]))


def everywhere(arrays: Any) -> Any:
    """Keeps values whole on every device. Outside `under`, nothing is done."""
    if jax.sharding.get_abstract_mesh().empty:
        return arrays
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), arrays)


def map_rows(function: Callable, arrays: Any, table: jax.Array, chunk: int) -> Any:
    """`function(row, table)` of every row, so many of each device's at a time (`jax.lax.map`).

    Taken as they come, a chunk would be of one device's rows, and all others would wait, or do the
    same. And each turn of the loop would bring together what of the table lies along `fsdp`: that
    is done once, before it.

    Args:
      arrays: a tree of arrays, their first axis that of the rows.
      table: an output matrix [C, D], which all rows meet.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = len(jax.tree.leaves(arrays)[0])
    if not mesh.empty:
        split = "tensor" if len(table) % mesh.shape["tensor"] == 0 else None
        table = jax.lax.with_sharding_constraint(table, P(split))
    rows = P(None) if mesh.empty else row_spec(mesh, count)

    def meet(row):
        return function(row, table)

    if rows == P(None):
        return jax.lax.map(meet, arrays, batch_size=chunk)
    parts = math.prod(mesh.shape[axis] for axis in rows[0])

    def cut(x):
        x = x.reshape(parts, count // parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, P(None, *rows))

    def joined(x):
        return by_row(x.swapaxes(0, 1).reshape(count, *x.shape[2:]))

    cuts = jax.tree.map(cut, arrays)
    found = jax.lax.map(jax.vmap(meet), cuts, batch_size=chunk)
    return jax.tree.map(joined, found)


def is_known() -> bool:
    """Whether it is clear where the rows of a batch are: on a mesh (`under`), or on one device."""
    return not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1


def by_row_and_head(function: Callable, heads: int) -> Callable:
    """The function run by each device on its own part, for kernels that no compiler can split.

    Its first arguments and its result are [B, T, heads or a multiple, d], its last a tree of
    arrays [B, …]. Outside `under`, it is run as it is.

    Args:
      heads: the least that there are; they are split over `tensor` if it divides them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def run(*args):
        rows = row_spec(mesh, args[0].shape[0])
        split = P(*rows, None, "tensor" if heads % mesh.shape["tensor"] == 0 else None)
        return jax.shard_map(
            function,
            in_specs=(*[split] * (len(args) - 1), rows),
            out_specs=split,
            check_vma=False,  # kernels do not say over which axes their results vary
        )(*args)

    return run


def by_expert(function: Callable, experts: int, inner: int) -> Callable:
    """The function run by each device on its own rows and its own experts, and summed over experts.

    `function(first, x [N, …], ids, weights, gate, up [E, D, F], down [E, F, D])` gives float32
    [N, D] of the experts from `first` on, as many as it is given. Outside `under`, it is given all.

    Args:
      experts, inner: E and F, split over `expert` and `tensor` if these divide them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return functools.partial(function, 0)
    expert = "expert" if experts % mesh.shape["expert"] == 0 else None
    tensor = "tensor" if inner % mesh.shape["tensor"] == 0 else None

    def local(x, ids, weights, gate, up, down):
        first = 0 if expert is None else jax.lax.axis_index(expert) * gate.shape[0]
        partial = function(first, x, ids, weights, gate, up, down)
        return jax.lax.psum(partial, tuple(axis for axis in (expert, tensor) if axis))

    wide, back = P(expert, None, tensor), P(expert, tensor, None)

    def run(x, *rest):
        rows = row_spec(mesh, x.shape[0])
        return jax.shard_map(
            local,
            in_specs=(rows, rows, rows, wide, wide, back),
            out_specs=rows,
            check_vma=False,
        )(x, *rest)

    return run


def under(mesh: Any, function: Callable) -> Callable:
    """The function with its values laid out on the mesh (`by_row`); to be jitted.

    Args:
      mesh: a `Mesh`, or the abstract one of it.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
            return function(*args, **kwargs)

    return wrapped


def mesh_of(arrays: Any) -> Mesh | None:
    """The mesh that arrays, or shapes with shardings, lie on; None for those of one device.

    Of values inside a program, it is the abstract one.
    """
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, jax.core.Tracer):
            where = jax.typeof(leaf).sharding
        else:
            where = getattr(leaf, "sharding", None)
        if isinstance(where, NamedSharding) and not where.mesh.empty and where.mesh.size > 1:
            return where.mesh
    return None


def laid_out(program: Callable) -> Callable:
    """A program whose values lie where its parameters are (`under`); to be jitted.

    Args:
      program: its first argument is the parameters, a tree of arrays.
    """

    @functools.wraps(program)
    def wrapped(params, *args, **kwargs):
        mesh = mesh_of(params)
        run = program if mesh is None else under(mesh, program)
        return run(params, *args, **kwargs)

    return wrapped


def cache_spec(mesh: Any, rows: int, heads: int) -> P:
    """Of keys and values [B, K, S, d] in a cache: rows like a batch's, heads over `tensor`.

    Heads that `tensor` does not divide are on all of its devices.
    """
    split = "tensor" if heads % mesh.shape["tensor"] == 0 else None
    return P(*row_spec(mesh, rows), split)


def as_cached(x_BKTd: jax.Array) -> jax.Array:
    """Keeps new keys or values [B, K, T, d] where the cache that they go to has its own.

    Left free, the compiler splits what `tensor` does not divide by another axis, the cache with it,
    and brings all of that together again in every step. Outside `under`, nothing is done.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x_BKTd
    return jax.lax.with_sharding_constraint(x_BKTd, cache_spec(mesh, *x_BKTd.shape[:2]))


def place(params: Any, placed: Any, donate: bool = False) -> Any:
    """Arrays that every process has, or that lie on the mesh, put where `placed` says.

    `jax.device_put`, except that processes do not compare what they put.

    Args:
      placed: a tree like `params`.
    """
    if jax.process_count() == 1:
        return jax.device_put(params, placed, donate=donate)

    def put(array, sharding: NamedSharding) -> jax.Array:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return jax.device_put(array, sharding, donate=donate)
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(put, params, placed)


def fetch(arrays: Any) -> Any:
    """A tree of whole numpy arrays, in every process, of arrays that may lie in several.

    Unlike `np.asarray`, it leaves no copy with the arrays.
    """
    return jax.tree.map(whole, arrays)


def whole(array: Any) -> np.ndarray:
    """`fetch` of one array."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    # Of an array that is split, JAX keeps the whole that it was asked for, as long as the array
    # lives: every weight would be there twice. This one lives as long as it takes.
    parts = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts))


def agreed(value: Any) -> Any:
    """What the first of several processes has, in all of them: JSON-able, and the same elsewhere.

    What is looked up on a disk, or measured, can differ from one to the other, and processes that
    run different programs wait for each other for ever.
    """
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text)] = text[:size]
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))


def row_rank(mesh: Mesh, rows: int) -> tuple[int, int]:
    """(index, count): which of how many equal shares of a batch's rows this process needs.

    Processes between which only `tensor` is split need the same rows.

    Raises:
      ValueError: the devices along `data` and `fsdp` cannot have the same number of rows.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise ValueError(
            f"a batch of {rows} rows cannot be split over {parts} devices (data × fsdp); set "
            "data.batch_size to a multiple, or use another mesh"
        )
    spans = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    edges = {span.indices(rows)[:2] for (span,) in spans}
    first, last = min(edges)[0], max(edges)[1]
    size = last - first
    if size != sum(end - start for start, end in edges) or first % size:
        return 0, 1  # rows from here and there: all of them
    return first // size, rows // size


def place_rows(batch: Any, mesh: Mesh | None) -> Any:
    """A tree of arrays [B, …] that every process has whole, split by row (`row_spec`).

    Without a mesh, or where they lie on it already, they stay as they are.
    """

    def put(x):
        if mesh is None or isinstance(x, jax.Array) and mesh_of(x) is not None:
            return x
        return place(x, NamedSharding(mesh, row_spec(mesh, len(x))))

    return jax.tree.map(put, batch)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, rows: int) -> dict[str, jax.Array]:
    """A batch of so many rows on the mesh, of this process's share or of the whole batch."""
    where = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(where, array, (rows, *array.shape[1:]))
        for name, array in batch.items()
    }
