"""Attention over long rows: in chunks, and by the kernels of platforms that are not here."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from early_exit.backbones import chunked_attention, fused_attention, layers
from early_exit.backbones.scoring import USUAL, Scoring
from early_exit.backbones.visibility import Visibility
from early_exit.cost import multiply_adds

ROOT = Path(__file__).parents[2]
SMALL = 16  # a chunk, so that few positions are several


def draw(rng, batch, length, heads, kv_heads, width, dtype=jnp.float32):
    """(query, key, value, a weight of every result)."""
    shapes = [(batch, length, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def packed(rng, batch, length):
    """Documents of random lengths, the last of each row being padding."""
    edges = np.sort(rng.integers(0, length + 1, (batch, 4)), axis=1)
    documents = 1 + (np.arange(length)[None, :, None] >= edges[:, None]).sum(-1)
    return jnp.asarray(np.where(documents == 5, 0, documents), jnp.int32)


def plain(
    query, key, value, *, causal=False, window=None, documents=None, real=None, scale=None, cap=None
):
    """The whole softmax, by the definition; rules as of `Visibility` and `Scoring`."""
    batch, length, heads, width = query.shape
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    seen = np.ones((batch, length, length), bool)
    behind = np.arange(length)[:, None] - np.arange(length)[None]
    if causal:
        seen &= (behind >= 0)[None]
    if window is not None:
        seen &= (np.abs(behind) < window)[None]
    if documents is not None:
        seen &= np.asarray(documents)[:, :, None] == np.asarray(documents)[:, None]
    if real is not None:
        seen &= np.asarray(real)[:, None]
    scores = jnp.einsum("bqhd,bshd->bhqs", query, key) * (scale or width**-0.5)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqs,bshd->bqhd", weights, value)


def with_gradients(attention):
    def run(query, key, value, weight):
        def total(*arrays):
            out = attention(*arrays)
            return (out * weight).sum(), out

        gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(query, key, value)
        return out, *gradients

    return jax.jit(run)


def agree(got, want, atol=1e-5):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


@pytest.mark.parametrize(
    ("length", "rules"),
    [
        (33, ()),
        (48, ("causal",)),
        (41, ("causal", "documents")),
        (64, ("causal", "documents", ("window", 5))),
        (70, ("causal", "documents", ("window", SMALL))),
        (70, ("causal", ("window", SMALL + 1))),
        (70, ("causal", ("window", 40))),
        (70, ("causal", ("window", 1))),
        (50, ("documents",)),
        (50, ("real",)),
        (64, ("causal", "real")),
        (70, (("window", SMALL),)),
        (61, ("documents", ("window", 40))),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_chunks_are_plain_attention(monkeypatch, length, rules, heads, kv_heads):
    monkeypatch.setattr(chunked_attention, "CHUNK", SMALL)
    rng = np.random.default_rng(length + heads)
    rules = dict(rule if isinstance(rule, tuple) else (rule, True) for rule in rules)
    if "documents" in rules:
        rules["documents"] = packed(rng, 2, length)
    if "real" in rules:
        rules["real"] = jnp.asarray(rng.random((2, length)) < 0.6).at[:, 0].set(True)
    arrays = draw(rng, 2, length, heads, kv_heads, 8)
    attention = functools.partial(chunked_attention.chunked, visibility=Visibility(**rules))
    got = with_gradients(attention)(*arrays)
    agree(got, with_gradients(functools.partial(plain, **rules))(*arrays))


SCORINGS = [Scoring(scale=0.9), Scoring(cap=1.3), Scoring(scale=0.7, cap=0.8)]


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
@pytest.mark.parametrize("length", [SMALL - 3, 45])
def test_scales_and_caps_forwards_and_backwards(monkeypatch, scoring, length):
    """In fewer positions than a chunk has, where other networks need no chunks, and in more."""
    for module in (chunked_attention, layers):
        monkeypatch.setattr(module, "CHUNK", SMALL)
    rng = np.random.default_rng(length)
    rules = {"causal": True, "window": 20, "documents": packed(rng, 2, length)}
    arrays = draw(rng, 2, length, 4, 2, 8)
    attention = functools.partial(layers.attend, visibility=Visibility(**rules), scoring=scoring)
    got = with_gradients(attention)(*arrays)
    how = rules | {"scale": scoring.scale, "cap": scoring.cap}
    want = with_gradients(functools.partial(plain, **how))(*arrays)
    agree(got, want)
    others = with_gradients(functools.partial(plain, **rules))(*arrays)
    assert all(np.abs(a - b).max() > 0.05 for a, b in zip(got, others, strict=True))


def test_one_chunk_more_is_no_other_attention():
    """Where `attend` changes its way, at the real size of a chunk."""
    rng = np.random.default_rng(0)
    length = layers.CHUNK + 1
    documents = packed(rng, 1, length)
    visibility = Visibility(causal=True, window=300, documents=documents)
    arrays = draw(rng, 1, length, 2, 1, 4)
    got = with_gradients(functools.partial(layers.attend, visibility=visibility))(*arrays)
    rules = {"causal": True, "window": 300, "documents": documents}
    agree(got, with_gradients(functools.partial(plain, **rules))(*arrays))
    short = [x[:, :-1] for x in arrays[:3]]
    visibility = Visibility(causal=True, window=300, documents=documents[:, :-1])
    agree([layers.attend(*short, visibility)], [got[0][:, :-1]])


@pytest.mark.parametrize("size", [1e2, 1e-2])
def test_large_and_small_scores(monkeypatch, size):
    monkeypatch.setattr(chunked_attention, "CHUNK", SMALL)
    arrays = draw(np.random.default_rng(1), 2, 40, 2, 2, 4)
    arrays[0] = arrays[0] * size
    visibility = Visibility(causal=True)
    got = with_gradients(functools.partial(chunked_attention.chunked, visibility=visibility))
    want = with_gradients(functools.partial(plain, causal=True))(*arrays)
    agree(got(*arrays), want, atol=1e-5 * max(size, 1))


def test_who_sees_nothing_gets_finite_numbers_and_gives_no_gradient(monkeypatch):
    monkeypatch.setattr(chunked_attention, "CHUNK", SMALL)
    arrays = draw(np.random.default_rng(1), 2, 40, 2, 2, 4)
    visibility = Visibility(real=jnp.zeros((2, 40), bool).at[0].set(True))
    attention = functools.partial(chunked_attention.chunked, visibility=visibility)
    got = with_gradients(attention)(*arrays)
    assert all(not x[1].any() and x[0].all() for x in got)


def test_half_precision_is_summed_in_float32(monkeypatch):
    monkeypatch.setattr(chunked_attention, "CHUNK", SMALL)
    arrays = draw(np.random.default_rng(2), 1, 64, 2, 1, 128, jnp.bfloat16)
    visibility = Visibility(causal=True)
    run = with_gradients(functools.partial(chunked_attention.chunked, visibility=visibility))
    got, want = run(*arrays), run(*(x.astype(jnp.float32) for x in arrays))
    assert all(x.dtype == jnp.bfloat16 for x in got)
    for a, b in zip(got, want, strict=True):  # 8 bits: of the weights, and of the result
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2**-7 * np.abs(b).max())


@pytest.mark.parametrize(
    ("window", "causal", "pairs"),
    [
        *((None, True, 36), (1, True, 8), (2, True, 15), (512, True, 15), (514, True, 21)),
        *((1, False, 8), (2, False, 22), (512, False, 22), (514, False, 34)),
    ],
)
def test_chunks_that_cannot_see_each_other_are_not_computed(window, causal, pairs):
    """Products of n chunks, forwards: two of each pair that is left of n²."""
    length, width = 8 * layers.CHUNK, 4
    array = jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32)
    visibility = Visibility(causal=causal, window=window)
    attention = functools.partial(layers.attend, visibility=visibility)
    one = layers.CHUNK**2 * width
    assert multiply_adds.multiply_adds(attention, array, array, array) == 2 * pairs * one

    def gradient(*arrays):
        return jax.grad(lambda *x: attention(*x).sum(), argnums=(0, 1, 2))(*arrays)

    # Forwards, then backwards: the scores again, and a product for each of four gradients.
    assert multiply_adds.multiply_adds(gradient, array, array, array) == (2 + 5) * pairs * one


CLEAN = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def in_process(script: str, **environment) -> dict:
    """What a script prints, in a process of its own, compiled as users' programs are."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=CLEAN | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MEMORY = """
import json
import jax, jax.numpy as jnp
from early_exit.backbones import base
from early_exit.backbones.decoder import DecoderConfig

def used(length, scan, dtype, gradient):
    config = DecoderConfig(
        vocab_size=64, width=64, depth=1, heads=8, kv_heads=2, head_dim=16, mlp_width=64,
        context_length=4096, scan=scan, window=None if scan else 600, remat="block",
    )
    definition, params = base.abstract(config.build)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    array = jax.ShapeDtypeStruct((1, length), jnp.int32)
    batch = dict.fromkeys(("tokens", "documents", "positions"), array)

    def total(params, batch, run):
        network = base.merge(definition, params)
        hidden, context = network.stem(batch)
        return run(network, hidden, context).astype(jnp.float32).sum()

    def forward(params, batch):
        return total(params, batch, lambda net, *x: net.run_blocks(x[0], 0, 1, x[1]))

    def backward(params, batch):
        learn = lambda net, *x: net.run_blocks_training(x[0], 0, 1, x[1])[0]
        return jax.grad(total)(params, batch, learn)

    lowered = jax.jit(backward if gradient else forward).lower(params, batch)
    return lowered.compile().memory_analysis().temp_size_in_bytes

print(json.dumps({
    f"scan={scan} {dtype.__name__} gradient={gradient}": [
        used(length, scan, dtype, gradient) for length in (1024, 2048, 4096)
    ]
    for scan, dtype, gradient in (
        (False, jnp.float32, False), (False, jnp.float32, True), (True, jnp.bfloat16, True)
    )
}))
"""


@pytest.mark.long
def test_memory_grows_with_the_length_and_not_its_square():
    for case, bytes_of in in_process(MEMORY).items():
        scores = 4096**2 * 8 * 2  # of one row of eight heads, in bfloat16
        assert bytes_of[-1] < scores, (case, bytes_of)
        for shorter, longer in zip(bytes_of[:-1], bytes_of[1:], strict=True):
            assert longer <= 2.2 * shorter, (case, bytes_of)


SHARDED = """
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from early_exit import sharding
from early_exit.settings.sections import MeshSettings
from early_exit.backbones import layers
from early_exit.backbones.visibility import Visibility

mesh = sharding.make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
rng = np.random.default_rng(0)

def run(query, key, value, documents):
    visibility = Visibility(causal=True, window=400, documents=documents)
    def total(*arrays):
        out = layers.attend(*arrays, visibility)
        return (out.astype(jnp.float32) ** 2).mean(), out
    return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(query, key, value)

def case(kv_heads, dtype):
    length = 2 * layers.CHUNK
    shapes = [(4, length, heads, 64) for heads in (4, kv_heads, kv_heads)]
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    documents = jnp.asarray(np.sort(rng.integers(0, 3, (4, length)), axis=1), jnp.int32)
    places = [P(("data", "fsdp"), None, "tensor" if x.shape[2] > 1 else None) for x in arrays]
    spread = [jax.device_put(x, NamedSharding(mesh, at)) for x, at in zip(arrays, places)]
    spread.append(jax.device_put(documents, sharding.batch_sharding(mesh)))
    program = jax.jit(sharding.under(mesh, run))
    want, got = jax.jit(run)(*arrays, documents), program(*spread)
    text = program.lower(*spread).compile().as_text()
    found = {
        "error": max(
            float(jnp.abs(a.astype(jnp.float32) - jax.device_get(b).astype(jnp.float32)).max())
            for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got))
        ),
        "moved": re.findall("all-gather|all-to-all|collective-permute", text),
    }
    if dtype == jnp.bfloat16:
        exported = jax.export.export(program, platforms=["tpu"])(*spread)
        found["kernel"] = "tpu_custom_call" in exported.mlir_module()
    return found

cases = [(1, jnp.float32), (2, jnp.bfloat16)]
print(json.dumps([case(*which) for which in cases]))
"""


def test_eight_devices_are_one():
    """Rows and heads stay where they are; a TPU's kernel is given its device's part."""
    for found in fake_devices.found(SHARDED):
        assert found["error"] <= 1e-5 and not found["moved"] and found.get("kernel", True), found


def lowered(platform, dtype, width, length, *, gradient=True, **rules):
    """The program for a platform that need not be here."""
    arrays = [jax.ShapeDtypeStruct((2, length, heads, width), dtype) for heads in (4, 2, 2)]
    documents = rules.pop("documents", False)
    if documents:
        arrays.append(jax.ShapeDtypeStruct((2, length), jnp.int32))

    def total(query, key, value, *documents):
        visibility = Visibility(**rules, documents=documents[0] if documents else None)
        return layers.attend(query, key, value, visibility).astype(jnp.float32).sum()

    function = jax.grad(total, argnums=(0, 1, 2)) if gradient else total
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("window", [None, 200])
def test_a_tpu_has_its_kernel(width, window):
    case = {"documents": True, "causal": True, "window": window}
    text = lowered("tpu", jnp.bfloat16, width, 1024, **case)
    assert "tpu_custom_call" in text and "x1024x1024x" not in text


@pytest.mark.parametrize("documents", [False, True])
def test_a_gpu_has_its_kernel_where_rows_are_one_document(monkeypatch, documents):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)
    fused_attention._cudnn_takes.cache_clear()
    try:
        case = {"documents": documents, "causal": True, "window": 200}
        text = lowered("cuda", jnp.bfloat16, 64, 1024, **case)
    finally:
        fused_attention._cudnn_takes.cache_clear()
    assert ("__cudnn$fmhaSoftmaxBackward" in text) != documents
    assert ("stablehlo.while" in text) == documents
    assert "x1024x1024x" not in text


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
@pytest.mark.parametrize(
    ("dtype", "length", "rules"),
    [
        (jnp.float32, 1024, {"causal": True}),  # kernels would round it
        (jnp.bfloat16, 1000, {"causal": True}),  # not whole blocks of a kernel
        (jnp.bfloat16, 1024, {}),
    ],
)
def test_what_no_kernel_takes_goes_in_chunks(platform, dtype, length, rules):
    text = lowered(platform, dtype, 64, length, **rules, documents=True)
    assert "stablehlo.while" in text and "custom_call @tpu" not in text and "cudnn" not in text


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_one_chunk_is_one_product(platform):
    text = lowered(platform, jnp.bfloat16, 64, layers.CHUNK, causal=True, gradient=False)
    assert "stablehlo.while" not in text and "custom_call" not in text


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("scoring", [USUAL, Scoring(scale=0.3, cap=1.1)], ids=str)
def test_a_tpus_kernel_is_plain_attention(window, scoring):
    """Run step by step on this machine."""
    rng = np.random.default_rng(3)
    arrays = draw(rng, 1, 256, 2, 1, 64)
    documents = packed(rng, 1, 256)
    visibility = Visibility(causal=True, window=window, documents=documents)
    kernel = functools.partial(
        fused_attention.on_tpu, visibility=visibility, scoring=scoring, interpret=True
    )
    rules = {"causal": True, "window": window, "documents": documents}
    rules |= {"scale": scoring.scale, "cap": scoring.cap}
    want = with_gradients(functools.partial(plain, **rules))(*arrays)
    agree(with_gradients(kernel)(*arrays), want)
