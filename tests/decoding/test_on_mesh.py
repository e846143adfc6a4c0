"""Decoding on a mesh: what one device says, every mode and drafter, no device with all of a cache.

Eight devices need a process of their own, in which all cases run one after the other.
"""

import json
import pathlib

import fake_devices
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
CLOSE = 1e-4  # two tokens whose log-probabilities are nearer may change places
MESHES = {"2x2x2": {"data": 2, "fsdp": 2, "tensor": 2}, "1x1x8": {"data": 1, "tensor": 8}}
# Four query and two key heads: eight devices along `tensor` divide neither.
MODES = {"lossy": [], "verified": ["exits", "lookup", "recurrent"]}
# What takes no minutes; all on all is a study.
SOON = {"2x2x2": "verified", "1x1x8": "lossy"}
ALL_MODES = {
    "full": [],
    "deferred": [],
    "verified: exits": ["exits"],
    "verified: lookup": ["lookup"],
    "verified: recurrent": ["recurrent"],
}
SCRIPT = """
import dataclasses, json, re, sys, types
import jax, numpy as np
from conftest import TINY, build
from decoder_kinds import CONFIGS
from early_exit import policy as policies
from early_exit import sharding
from early_exit.decoding import decode, decoder, generate, mode as modes, state as states
from early_exit.cost import chips, programs
from early_exit.evaluation import exits
from early_exit.settings.sections import MeshSettings
from early_exit.training import ahead

kind, meshes, names, rows, batch, soon = map(json.loads, sys.argv[1:])
assert jax.device_count() == 8
taps = {} if CONFIGS[kind].mixture else {"recurrent_taps": (1, 3)}
model, params = build(CONFIGS[kind], points=(1, 2), head="norm", **taps)
text = np.random.default_rng(0).integers(0, 61, (2, 32)).astype(np.int32)
batch_of = {"tokens": text, "documents": np.ones_like(text), "positions": np.zeros_like(text)}
scores = exits.record(model, params, [batch_of]).scores["max_prob"]
policy = policies.make([np.quantile(x, 0.6) for x in scores[:-1]], "max_prob")
prompts = [[7, 3, 52, 11, 29, 7, 3], [5] * 40, [1], [9, 8, 9, 8, 9]][:rows]

lies, run = {}, decoder.Decoder.run
def kept(decoder, state, *args, **how):
    state = run(decoder, state, *args, **how)
    for (path, x), wanted in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(states.placed(state, mesh)) if mesh else (),
    ):
        found = lies.setdefault(jax.tree_util.keystr(path), [])
        parts = len({str(shard.index) for shard in x.addressable_shards})
        found.append([x.sharding.is_equivalent_to(wanted, x.ndim), parts])
    return state
decoder.Decoder.run = kept

planned, run_program = [], decode.decode
def told(*args, **static):
    planned.append(run_program.lower(*args, **static).as_text())
    return run_program(*args, **static)
exchanged, run_prompt = [], decode.prefill
def looked_at(*args, **static):
    if soon and name == "1x1x8" and not exchanged:
        text = run_prompt.lower(*args, **static).compile().as_text()
        exchanged.extend(each.shape.dims for each in programs.read(text, mesh.shape).collectives)
    return run_prompt(*args, **static)
decoder.prefill = looked_at
chips.estimate = lambda traced, *rest: traced.lower().as_text()
settings = types.SimpleNamespace(
    model=types.SimpleNamespace(dtype="float32"),
    exits=model.exits,
    calibrate=types.SimpleNamespace(confidence="max_prob"),
)

found = {}
for name, axes in {"one": None, **meshes}.items():
    mesh = axes and sharding.make_mesh(MeshSettings(**axes))
    where = mesh and sharding.shardings(params, mesh)
    placed = sharding.place(params, where) if mesh else jax.device_put(params, jax.devices()[0])
    for mode, drafters in names.items():
        if soon and mesh and soon[name] != mode:
            continue
        name_of = "lossy" if mode == "full" else mode.partition(":")[0]
        how = modes.served(modes.named(name_of, tuple(drafters)), model)
        lies.clear(), planned.clear()
        before = decode.decode._cache_size()
        decoder.decode = told if name == "2x2x2" else run_program
        answers = generate.generate(
            model, placed, prompts, policy=None if mode == "full" else policy, mode=how,
            max_new_tokens=[12, 10, 9, 11][:rows], batch=batch, slots=256,
        )
        found[f"{name}/{mode}"] = {
            "tokens": [answer.tokens.tolist() for answer in answers],
            "exits": [answer.exits.tolist() for answer in answers],
            "log_probs": [answer.log_probs.tolist() for answer in answers],
            "programs": decode.decode._cache_size() - before,
            "lies": dict(lies),
        }
        if name == "2x2x2" and mode != "full":
            found[f"{name}/{mode}"]["planned"] = planned[0] == ahead.decoding(
                settings, model, mesh, None, batch or rows, 60, how
            )
        if name == "1x1x8":
            found[f"{name}/{mode}"]["exchanged"] = exchanged
print(json.dumps(found))
"""


def decoded(kind="llama", meshes=MESHES, modes=MODES, rows=4, batch=None, soon=None):
    given = (kind, meshes, modes, rows, batch, soon)
    return fake_devices.found(SCRIPT, *map(json.dumps, given))


def assert_same(found, wanted):
    """Token for token, up to the first that was nearly another one."""
    for tokens, others, ours, theirs in zip(
        found["tokens"], wanted["tokens"], found["log_probs"], wanted["log_probs"], strict=True
    ):
        assert len(tokens) == len(others)
        differ = [i for i, pair in enumerate(zip(tokens, others, strict=True)) if len({*pair}) > 1]
        first = differ[0] if differ else len(tokens)
        np.testing.assert_allclose(ours[:first], theirs[:first], atol=1e-5, rtol=1e-5)
        if differ:
            assert abs(ours[first] - theirs[first]) < CLOSE, (tokens, others)


@pytest.fixture(scope="module")
def found():
    return decoded(soon=SOON)


@pytest.mark.long
@pytest.mark.parametrize(("mesh", "mode"), SOON.items())
def test_a_mesh_says_what_one_device_says(found, mesh, mode):
    one, on_mesh = found[f"one/{mode}"], found[f"{mesh}/{mode}"]
    assert_same(on_mesh, one)
    if mode == "lossy":
        assert on_mesh["exits"] == one["exits"]
        assert len({e for exits in one["exits"] for e in exits}) == 3  # all are taken


@pytest.mark.long
@pytest.mark.parametrize(("mesh", "mode"), SOON.items())
def test_the_state_lies_where_it_is_planned_and_nothing_compiles_twice(found, mesh, mode):
    on_mesh = found[f"{mesh}/{mode}"]
    assert on_mesh["programs"] == found[f"one/{mode}"]["programs"]
    assert all(equal for runs in on_mesh["lies"].values() for equal, _ in runs), on_mesh["lies"]
    shards = {name: runs[0][1] for name, runs in on_mesh["lies"].items()}
    caches = {parts for name, parts in shards.items() if "cache" in name or "rows" in name}
    # Four rows over four devices and two heads over two; or two heads over eight: whole.
    assert caches == ({8} if mesh == "2x2x2" else {1})
    assert shards[".tokens_BS"] == (4 if mesh == "2x2x2" else 1)


@pytest.mark.long
def test_no_cache_is_exchanged_while_a_prompt_is_read(found):
    """Of two heads, each of eight devices has both (decoding: `launch/test_compile.py`)."""
    exchanged = found["1x1x8/lossy"]["exchanged"]
    assert exchanged and not any(256 in dims for dims in exchanged)


@pytest.mark.long
def test_what_is_planned_is_the_program_that_runs(found):
    assert found["2x2x2/verified"]["planned"]


EVERY = MODES | ALL_MODES
CASES = {
    "rows that no axis divides": ("llama", 3, None, [*EVERY], ["2x2x2", "1x1x8", "4x1x2"]),
    "one row on many devices": ("llama", 1, None, ["lossy", "verified"], ["2x2x2", "4x1x2"]),
    "a queue": ("llama", 4, 2, ["deferred", "verified"], ["2x2x2"]),
    "experts": ("mixtral", 2, None, ["lossy", "verified: lookup"], ["2x2x2", "1x1x8"]),
    "windows": ("gemma2", 4, None, ["deferred", "verified"], ["2x2x2"]),
}


@pytest.mark.studies
@pytest.mark.parametrize("case", CASES)
def test_every_mode_on_every_mesh(case):
    kind, rows, batch, modes, meshes = CASES[case]
    meshes = {name: (MESHES | {"4x1x2": {"data": 4, "tensor": 2}})[name] for name in meshes}
    everything = decoded(kind, meshes, {mode: EVERY[mode] for mode in modes}, rows, batch)
    assert len(everything) == (1 + len(meshes)) * len(modes)
    for name, of_case in everything.items():
        mesh, _, mode = name.partition("/")
        assert_same(of_case, everything[f"one/{mode}"])
        assert all(equal for runs in of_case["lies"].values() for equal, _ in runs)
