"""Mixtures of experts: exact routing, what it costs, and how routers learn balance."""

import dataclasses

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_kinds import LLAMA, random_params

from conftest import build
from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.mixture import Mixture
from early_exit.cost import multiply_adds
from early_exit.cost.traffic import traffic
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit

E, K, F, D = 6, 2, 10, LLAMA.width
CONFIG = dataclasses.replace(LLAMA, mixture=Mixture(E, K, F))
SHARED = dataclasses.replace(LLAMA, mixture=Mixture(E, 3, F, renormalised=False, shared_width=7))
DENSE = dataclasses.replace(LLAMA, mixture=Mixture(E, K, F, dense_blocks=(1,)))


def silu(x):
    return x / (1 + np.exp(-x))


def gated(x, kernels):
    gate, up, down = (np.asarray(kernels[name], np.float64) for name in ("gate", "up", "down"))
    return (silu(x @ gate) * (x @ up)) @ down


def plain(x_ND, mlp, mixture):
    """Position after position, expert after expert, in float64."""
    out = np.zeros((len(x_ND), D))
    kernel = tree.flatten(mlp)
    logits = x_ND.astype(np.float64) @ np.asarray(kernel["router/kernel"], np.float64)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    for n, x in enumerate(x_ND.astype(np.float64)):
        best = np.argsort(-probs[n])[: mixture.chosen]
        weights = probs[n, best] / (probs[n, best].sum() if mixture.renormalised else 1)
        for e, weight in zip(best, weights, strict=True):
            own = {name: kernel[f"experts/{name}/kernel"][e] for name in ("gate", "up", "down")}
            out[n] += weight * gated(x, own)
        if mixture.shared_width:
            own = {name: kernel[f"shared/{name}/kernel"] for name in ("gate", "up", "down")}
            gate = 1 / (1 + np.exp(-(x @ np.asarray(kernel["shared_gate/kernel"], np.float64))))
            out[n] += gate * gated(x, own)
    return out


def part(config, block=0):
    """(the feed-forward part of a block as a function, its parameters)."""
    params = random_params(config)
    definition, _ = base.abstract(config.build)

    @jax.jit
    def run(mlp, x):
        blocks = params["blocks"] | {str(block): params["blocks"][str(block)] | {"mlp": mlp}}
        return base.merge(definition, params | {"blocks": blocks}).blocks[str(block)].mlp(x)

    return run, params["blocks"][str(block)]["mlp"]


@pytest.mark.parametrize("config", [CONFIG, SHARED], ids=["renormalised", "shared"])
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_every_position_runs_its_experts(config, count):
    """In fewer rows than there are experts, and in more."""
    run, mlp = part(config)
    x = np.random.default_rng(count).normal(size=(count, D)).astype(np.float32)
    np.testing.assert_allclose(run(mlp, x), plain(x, mlp, config.mixture), atol=2e-4, rtol=1e-4)
    alone = jnp.concatenate([run(mlp, row[None]) for row in x])
    np.testing.assert_allclose(run(mlp, x), alone, atol=2e-4, rtol=1e-4)


def test_an_expert_that_all_choose_drops_none():
    run, mlp = part(CONFIG)
    x = np.abs(np.random.default_rng(0).normal(size=(50, D))).astype(np.float32)
    mlp["router"]["kernel"] = jnp.zeros((D, E)).at[:, 4].set(3.0).at[:, 1].set(1.0)
    np.testing.assert_allclose(run(mlp, x), plain(x, mlp, CONFIG.mixture), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [2, 30])
def test_gradients_are_those_of_the_experts_that_run(count):
    """Against differences, in a direction; experts that no position chooses have none."""
    run, mlp = part(CONFIG)
    rng = np.random.default_rng(1)
    x, weights = (rng.normal(size=(count, D)).astype(np.float32) for _ in range(2))
    gradient = jax.jit(jax.grad(lambda mlp: (run(mlp, x) * weights).sum()))(mlp)
    logits = x @ np.asarray(mlp["router"]["kernel"])
    ran = set(np.argsort(-logits)[:, :K].ravel().tolist())
    for name in ("gate", "up", "down"):
        of = np.asarray(gradient["experts"][name]["kernel"])
        assert {e for e in range(E) if np.abs(of[e]).max() > 0} == ran
        step = rng.normal(size=of.shape).astype(np.float64)

        def value(by, name=name, step=step):
            moved = dict(mlp["experts"])
            moved[name] = {"kernel": np.asarray(mlp["experts"][name]["kernel"]) + by * step}
            return (plain(x, mlp | {"experts": moved}, CONFIG.mixture) * weights).sum()

        slope = (value(1e-5) - value(-1e-5)) / 2e-5
        np.testing.assert_allclose((of * step).sum(), slope, rtol=1e-3, atol=1e-2)


def test_routers_learn_the_balancing_loss_and_nothing_else_changes():
    """Fedus et al. 2021, eq. 4, in what is learned, though no loss says it."""
    coefficient = 0.3
    balanced = dataclasses.replace(CONFIG, mixture=Mixture(E, K, F, balance=coefficient))
    x = np.random.default_rng(2).normal(size=(32, D)).astype(np.float32)

    def gradients(config):
        run, mlp = part(config)
        return run(mlp, x), jax.grad(lambda mlp: run(mlp, x).sum())(mlp), mlp

    plainly, without, mlp = gradients(CONFIG)
    out, got, _ = gradients(balanced)
    np.testing.assert_array_equal(out, plainly)

    def loss(kernel):
        probs = jax.nn.softmax(x @ kernel)
        _, ids = jax.lax.top_k(probs, K)
        assigned = jnp.bincount(ids.ravel(), length=E) / len(x)
        return coefficient * E * (assigned * probs.mean(0)).sum()

    more = jax.grad(loss)(mlp["router"]["kernel"])
    assert np.abs(more).max() > 1e-3
    for path, gradient in tree.flatten(got).items():
        want = tree.flatten(without)[path] + (more if path == "router/kernel" else 0)
        np.testing.assert_allclose(gradient, want, atol=1e-4, rtol=1e-4, err_msg=path)


def test_what_a_token_reads_is_counted_by_hand():
    """The router, and of the experts those that it runs."""
    model, params = build(CONFIG, points=(1,))
    attention = 2 * D + D * 24 + 2 * D * 12 + 24 * D
    block = attention + D * E + K * 3 * D * F
    got = traffic(model, params)
    assert got.segments.tolist() == [4 * block, 8 * block]
    assert got.heads[0] == 4 * (D + D * E + K * 3 * D * F + D + LLAMA.vocab_size * D)
    cost = multiply_adds.backbone(CONFIG).blocks[0]
    assert cost.bytes == 4 * block
    # Attention to itself alone: a score and a value of each head.
    assert cost.multiply_adds == block - 2 * D + 2 * 24


def test_a_wide_pass_computes_what_its_positions_run():
    run, mlp = part(CONFIG)
    few, many = (
        multiply_adds.multiply_adds(run, mlp, jax.ShapeDtypeStruct((count, D), jnp.float32))
        for count in (2, 64)
    )
    assert many == 32 * few == 64 * (D * E + K * 3 * D * F)


def test_heads_have_the_part_of_the_block_they_stand_after():
    model = MultiExit(DENSE, ExitConfig((1, 2), head="mlp"))
    backbone = base.init(DENSE, jax.random.key(0))
    exits = model.init_exits(jax.random.key(1), backbone, "copy", None)
    for point in (1, 2):
        of, own = exits[str(point)]["mlp"], backbone["blocks"][str(point - 1)]["mlp"]
        assert tree.fingerprint(of) == tree.fingerprint(own)
        assert ("router" in of) == (point == 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture(4, 5, 8), "runs 1 to 4 of 4 experts, not 5"),
        (lambda: Mixture(4, 0, 8), "runs 1 to 4 of 4 experts, not 0"),
        (lambda: dataclasses.replace(DENSE, scan=True), "cannot be one stack"),
    ],
)
def test_what_is_no_mixture_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# A loss and its gradients on one device and on meshes of eight, all of one program each.
SHARDED = """
import dataclasses, json
import jax, jax.numpy as jnp, numpy as np
from decoder_kinds import CONFIGS, random_params
from early_exit import sharding, tree
from early_exit.backbones import base
from early_exit.settings.sections import MeshSettings

assert jax.device_count() == 8
found = {}
for kind, experts in (("mixtral", 8), ("qwen2_moe", 4), ("mixtral", 6)):
    config = CONFIGS[kind]
    mixture = dataclasses.replace(config.mixture, experts=experts, balance=0.1)
    config = dataclasses.replace(config, mixture=mixture, vocab_size=64, mlp_width=40)
    params = random_params(config)
    definition, _ = base.abstract(config.build)
    batch = {"tokens": np.random.default_rng(0).integers(0, 64, (8, 12), np.int32)}

    def loss(params, batch):
        network = base.merge(definition, params)
        hidden, context = network.stem(batch)
        hidden, _ = network.run_blocks_training(hidden, 0, config.depth, context)
        return (network.readout(hidden) ** 2).mean()

    run = jax.value_and_grad(loss)
    want = tree.flatten(dict(zip("vg", jax.jit(run)(params, batch))))
    for axes in ({"data": 2, "expert": 4}, {"data": 1, "fsdp": 2, "tensor": 2, "expert": 2}):
        mesh = sharding.make_mesh(MeshSettings(**axes))
        placed = jax.device_put(params, sharding.shardings(params, mesh))
        rows = sharding.place_batch(batch, mesh, 8)
        program = jax.jit(sharding.under(mesh, run))
        got = tree.flatten(dict(zip("vg", program(placed, rows))))
        size = {path: max(np.abs(x).max(), 1e-6) for path, x in want.items()}
        apart = [np.abs(got[path] - x).max() / size[path] for path, x in want.items()]
        kernel = placed["blocks"]["0"]["mlp"]["experts"]["up"]["kernel"]
        parts = len({str(shard.index) for shard in kernel.addressable_shards})
        found[f"{kind} {experts} {axes}"] = max(map(float, apart)), parts
print(json.dumps(found))
"""


@pytest.mark.long
def test_experts_on_several_devices_are_those_of_one():
    """Four groups of experts; experts, matrices and rows split at once; and what does not divide,
    which every device has whole."""
    found = fake_devices.found(SHARDED)
    for case, (apart, _) in found.items():
        assert apart < 1e-4, case
    assert [parts for _, parts in found.values()] == [4, 8, 4, 8, 1, 8]
