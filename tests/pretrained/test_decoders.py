"""Every kind of decoder, as transformers wrote it, against what torch says of it."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit.backbones import base
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained.load import load

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
NAMES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "gpt2", "neox", "neox_serial")
NAMES += ("olmo2", "smollm3", "granite", "phi3", "gemma2", "gemma3")
NAMES += ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """(pretrained, what torch says)."""
    folder = FIXTURES / f"tiny_{request.param}"
    with np.load(folder / "expected.npz", allow_pickle=False) as expected:
        return load(str(folder)), dict(expected)


def test_hidden_states_and_logits_equal_torch_block_by_block(case):
    pretrained, expected = case
    definition, _ = base.abstract(pretrained.config.build)

    @jax.jit
    def forward(params, tokens):
        backbone = base.merge(definition, params)
        hidden, context = backbone.stem({"tokens": tokens})
        states = [hidden]
        for block in range(backbone.config.depth):
            states.append(backbone.run_blocks(states[-1], block, block + 1, context))
        return jnp.stack(states), backbone.readout(states[-1])

    hidden, logits = forward(pretrained.params, expected["tokens"])
    np.testing.assert_allclose(hidden, expected["hidden"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)


def test_every_composition_of_segments_is_the_full_forward_pass(case):
    pretrained, expected = case
    definition, _ = base.abstract(pretrained.config.build)
    depth = pretrained.config.depth
    inner = range(1, depth)
    splits = [
        (0, *points, depth) for n in range(depth) for points in itertools.combinations(inner, n)
    ]

    @jax.jit
    def forward(params, tokens):
        backbone = base.merge(definition, params)
        first, context = backbone.stem({"tokens": tokens})
        results = []
        for edges in splits:
            hidden = first
            for start, stop in itertools.pairwise(edges):
                hidden = backbone.run_blocks(hidden, start, stop, context)
            results.append(hidden)
        return results

    whole, *pieces = forward(pretrained.params, expected["tokens"])
    assert len(pieces) == 2 ** (depth - 1) - 1
    for hidden in pieces:
        np.testing.assert_allclose(hidden, whole, atol=1e-5)


def test_the_last_block_copied_into_a_head_before_it_says_what_the_model_says(case):
    """So the copied block, norm and output matrix are all there, biases and window included."""
    pretrained, expected = case
    depth = pretrained.config.depth
    model = MultiExit(pretrained.config, ExitConfig(points=(depth - 1,), head="layer"))
    exits = model.init_exits(jax.random.key(0), pretrained.params, "copy", None)
    assert jax.tree.structure(exits) == jax.tree.structure(model.abstract_exits())

    @jax.jit
    def logits(params, tokens):
        bound = model.bind(params)
        hidden, context = bound.backbone.stem({"tokens": tokens})
        hidden = bound.backbone.run_blocks(hidden, 0, depth - 1, context)
        features, _ = bound.heads[0].features(hidden, context)
        table, rule = bound.heads[0].output.embedding[...], model.config.logit_rule
        return base.logits(features, table, rule=rule)

    params = {"backbone": pretrained.params, "exits": exits}
    np.testing.assert_allclose(logits(params, expected["tokens"]), expected["logits"], atol=1e-4)


def test_a_copied_mlp_head_has_the_parts_of_its_block(case):
    pretrained, _ = case
    model = MultiExit(pretrained.config, ExitConfig(points=(1,), head="mlp", output="shared"))
    exits = model.init_exits(jax.random.key(0), pretrained.params, "copy", None)
    block = pretrained.params["blocks"]["0"]
    parts = {name: block[name] for name in ("mlp", "mlp_norm") if name in block}
    want = {"1": parts | {"norm": pretrained.params["final_norm"]}}
    jax.tree.map(np.testing.assert_array_equal, exits, want)
