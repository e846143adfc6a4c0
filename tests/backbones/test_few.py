"""Products of few positions: the same, used where few positions are; panels are cut once."""

import dataclasses
import gc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_kinds import CONFIGS
from flax import nnx

from conftest import TINY, build
from early_exit.backbones import few
from early_exit.decoding.generate import generate

FAMILIES = ("llama", "gpt2", "olmo2")
OF_PROCESSORS = {"panels": few.WIDE, "bands": few.NARROW}


@pytest.fixture(params=OF_PROCESSORS, autouse=True)
def kind(request, monkeypatch):
    """On either kind of processor."""
    monkeypatch.setattr(few, "kind", lambda: OF_PROCESSORS[request.param])
    return OF_PROCESSORS[request.param]


@pytest.fixture
def panels(monkeypatch):
    """Where there are any."""
    monkeypatch.setattr(few, "kind", lambda: few.WIDE)


def drawn(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("outputs", [1, 64, 100, 128])
@pytest.mark.parametrize("positions", [(1,), (7,), (2, 5)])
def test_products_are_those_of_the_matrix(outputs, positions):
    x, matrix = drawn(*positions, 48), drawn(48, outputs, seed=1)
    cut = few.cut(matrix)
    assert cut.shape == (-(-outputs // 64), 48, 64)
    np.testing.assert_allclose(few.by_panels(x, cut, outputs), x @ matrix, atol=1e-5)
    np.testing.assert_allclose(few.by_bands(x, matrix), x @ matrix, atol=1e-5)


@pytest.mark.parametrize("outputs", [512, 1200, 2 * 577, 3 * 4096])
@pytest.mark.parametrize("positions", [(1,), (7,), (2, 3)])
def test_products_with_parts_of_an_output_matrix_stand_side_by_side(outputs, positions):
    x, table = drawn(*positions, 24), drawn(outputs, 24, seed=1)
    np.testing.assert_allclose(few.by_parts(x, table), x @ table.T, atol=1e-5)


def test_parts_are_of_a_size_that_divides():
    for outputs in (49152, 50257, 151936, 128256, 32000, 262144, 512):
        assert outputs % few.part_of(outputs) == 0
        assert few.LEAST_PART <= few.part_of(outputs) <= few.MOST_PART
    assert few.part_of(511) is None and few.part_of(4099) is None  # a prime


@pytest.mark.parametrize(
    "says, found", [("avx2 fma\n", few.NARROW), ("avx2 avx512f\n", few.WIDE), (None, few.NARROW)]
)
def test_the_processor_decides(says, found, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(few, "PROCESSOR", tmp_path / "cpuinfo")
    if says:
        (tmp_path / "cpuinfo").write_text(f"processor: 0\nflags: sse {says}")
    few.kind.cache_clear()
    assert few.kind() == found
    few.kind.cache_clear()


def block_and_readout(model, params, tokens_BT):
    network = model.bind(params).backbone
    hidden, context = network.stem({"tokens": tokens_BT})
    hidden, _ = network.cached_block(0)(hidden, context)
    return network.readout(hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_and_the_readout_say_the_same(kind, family):
    """Also after all parameters have changed."""
    model, params = build(CONFIGS[family], points=(1, 2))
    tokens = jnp.arange(kind.most).reshape(2, -1)
    for factor in (1, 1.5):
        new = jax.tree.map(lambda x, factor=factor: factor * x, params)
        want = block_and_readout(model, new, tokens)
        got = block_and_readout(model, model.for_few(new), tokens)
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_position_and_many_meet_the_matrices(kind, family):
    model, params = build(CONFIGS[family], points=(1, 2))
    params = model.for_few(params)

    def matrices_met(positions):
        """Products with something that has no batch: one for each matrix that is not in parts."""
        tokens = jnp.zeros((1, positions), jnp.int32)
        jaxpr = jax.make_jaxpr(lambda p: block_and_readout(model, p, tokens))(params)
        dots = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
        return sum(not e.params["dimension_numbers"][1][0] for e in dots)

    all_of_them = 7 - (family == "gpt2")
    for positions in (2, kind.most):
        assert matrices_met(positions) == (not kind.panels)  # so small a readout has no parts
    for positions in (1, kind.most + 1):
        assert matrices_met(positions) >= all_of_them


def test_few_positions_meet_a_large_output_matrix_in_parts(kind):
    model, params = build(dataclasses.replace(TINY, vocab_size=1024))
    params = model.for_few(params)
    hidden = {n: drawn(1, n, TINY.width) for n in (1, 2, kind.most, kind.most + 1)}
    for positions, given in hidden.items():
        network = model.bind(params).backbone
        jaxpr = jax.make_jaxpr(lambda x, net=network: net.readout(x))(given)
        (dot,) = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"][:1]
        batched = bool(dot.params["dimension_numbers"][1][0])
        assert batched == (1 < positions <= kind.most)
        want = model.bind(params | {"few": None}).backbone.readout(given)
        np.testing.assert_allclose(network.readout(given), want, atol=1e-4)


class OneLayer(nnx.Module):
    """The least that panels are cut of."""

    config = types.SimpleNamespace(depth=1)

    def __init__(self, **how):
        self.layer = nnx.Linear(48, 64, **how, rngs=nnx.Rngs(0))

    def cached_block(self, index):
        return self

    def output_table(self):
        return self.layer.kernel[...].T


def doubled(*args, **how):
    return 2 * jax.lax.dot_general(*args, **how)


@pytest.mark.parametrize(
    "how",
    [{}, {"dtype": jnp.bfloat16}, {"dot_general": doubled}, {"preferred_element_type": "float64"}],
    ids=["plain", "in another type", "in a way of its own", "to another type"],
)
def test_a_layer_says_what_it_said(how):
    """Whatever it computes in, and by."""
    network, x = OneLayer(**how), drawn(3, 48)
    with jax.enable_x64(True):
        want = network.layer(x)
        params = nnx.to_pure_dict(nnx.state(network))
        few.attach(network, few.prepared(params, lambda: network))
        got = network.layer(x)
    assert network.layer.dot_general is not jax.lax.dot_general or "dot_general" in how
    assert got.dtype == want.dtype
    np.testing.assert_allclose(np.float32(got), np.float32(want), atol=1e-5)


def test_they_are_cut_once_and_anew_where_any_array_is_another(panels):
    """A tree with one matrix replaced shares all other arrays with the one before."""
    model, params = build(TINY)
    first = model.for_few(params)["few"]
    assert model.for_few(dict(params))["few"] is first
    leaves, tree = jax.tree.flatten(params["backbone"])
    for place in (1, len(leaves) - 1):
        changed = [2 * x if i == place else x for i, x in enumerate(leaves)]
        other = model.for_few({"backbone": jax.tree.unflatten(tree, changed)})["few"]
        assert other is not first


def test_they_live_as_long_as_what_they_were_cut_from(panels):
    gc.collect()
    before = len(few._known)
    model, params = build(TINY, seed=7)
    model.for_few(params)
    assert len(few._known) == before + 1
    del params
    gc.collect()
    assert len(few._known) == before


def test_there_is_nothing_where_it_would_not_be_used():
    model, params = build(TINY)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert model.for_few(halves)["few"] is None
    assert model.for_few(jax.tree.map(np.asarray, params))["few"] is None


def test_there_are_no_panels_where_memory_has_no_room(panels, tmp_path, monkeypatch):
    model, params = build(TINY, seed=3)
    size = sum(x.nbytes for x in jax.tree.leaves(params["backbone"]))
    monkeypatch.setattr(few, "MEMORY", tmp_path / "meminfo")
    for left, cut in ((size // 1024, False), (4 * size // 1024, True)):
        (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {left} kB\n")
        fresh = jax.tree.map(jnp.copy, params)
        assert bool(model.for_few(fresh)["few"]) == cut


def test_batches_of_as_many_as_pay_and_of_more_say_what_single_rows_say(kind):
    """Steps of the larger batch are products with the matrices."""
    model, params = build(CONFIGS["llama"], points=(1, 2))
    prompts = [[5 + i, 3, 11] for i in range(kind.most + 1)]
    single = [generate(model, params, [p], policy=None, max_new_tokens=12)[0] for p in prompts]
    for rows in (kind.most, kind.most + 1):
        answers = generate(model, params, prompts[:rows], policy=None, max_new_tokens=12)
        for got, want in zip(answers, single, strict=False):
            assert got.tokens.tolist() == want.tokens.tolist()
            np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-4)
