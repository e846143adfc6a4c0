"""Our import and decoder against torch and transformers, in one process."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit.backbones import base
from early_exit.pretrained import sources
from early_exit.pretrained.load import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"


def run(pretrained, tokens):
    """(hidden [L + 1, B, T, D], logits [B, T, V]), both numpy."""
    definition, _ = base.abstract(pretrained.config.build)

    @jax.jit
    def forward(params, tokens):
        backbone = base.merge(definition, params)
        hidden, context = backbone.stem({"tokens": tokens})
        states = [hidden]
        for block in range(backbone.config.depth):
            states.append(backbone.run_blocks(states[-1], block, block + 1, context))
        return jnp.stack(states), backbone.readout(states[-1])

    return jax.tree.map(np.asarray, forward(pretrained.params, jnp.asarray(tokens)))


@pytest.mark.parametrize(
    "sizes",
    [
        dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4),
        dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=1, rms_norm_eps=1e-2),
        dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=5),
        dict(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=20),
        dict(hidden_size=32, num_attention_heads=2, tie_word_embeddings=True),
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_random_llamas(sizes, tmp_path):
    helpers = runpy.run_path(str(FIXTURES / "make_tiny_llama.py"))
    defaults = dict(vocab_size=83, intermediate_size=70, num_hidden_layers=2)
    rope = {"rope_theta": 300.0, "rope_type": "default"}
    config = transformers.LlamaConfig(**defaults | sizes, rope_parameters=rope)
    model = helpers["random_llama"](config, seed=1)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()

    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (3, 25), np.int32)
    hidden, logits = helpers["evaluate"](model, tokens)
    our_hidden, our_logits = run(load(str(tmp_path)), tokens)
    np.testing.assert_allclose(our_hidden, hidden, rtol=0, atol=1e-4)
    np.testing.assert_allclose(our_logits, logits, rtol=0, atol=1e-4)


@pytest.mark.smollm2
def test_every_logit_of_smollm2(smollm2):
    pytest.importorskip("accelerate")  # transformers' GGUF importer wants it
    path = sources.fetch(smollm2.source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokens = np.load(FIXTURES / "smollm2_golden.npz", allow_pickle=False)["tokens"]
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long()).logits.numpy()
    _, our_logits = run(smollm2, tokens)
    np.testing.assert_allclose(our_logits, logits, rtol=0, atol=1e-3)
