"""Our import and decoder against torch and transformers, in one process."""

import copy
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


ROPE = {"rope_theta": 300.0, "rope_type": "default"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 3.0, 6.0, 9.0]}
ORIGINAL = {"original_max_position_embeddings": 25}
LLAMA = dict(vocab_size=83, hidden_size=32, intermediate_size=70, num_hidden_layers=2)
LLAMA |= dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=ROPE)
GPT2 = dict(vocab_size=71, n_embd=30, n_layer=2, n_head=5, n_positions=40)
GPT2 |= dict(bos_token_id=0, eos_token_id=0)
NEOX = dict(vocab_size=71, hidden_size=40, intermediate_size=60, num_hidden_layers=2)
NEOX |= dict(num_attention_heads=5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", dict(num_key_value_heads=4)),
        ("Llama", dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=1)),
        ("Llama", dict(num_hidden_layers=5, attention_bias=True, rms_norm_eps=1e-2)),
        ("Llama", dict(head_dim=20, mlp_bias=True, hidden_act="gelu_pytorch_tanh")),
        ("Llama", dict(num_attention_heads=2, tie_word_embeddings=True)),
        ("Llama", dict(rope_parameters=ROPE | LLAMA3, max_position_embeddings=16)),
        ("Llama", dict(rope_parameters=ROPE | YARN | {"truncate": False, "beta_fast": 3.0})),
        ("Llama", dict(rope_parameters=ROPE | YARN | {"mscale": 0.7, "mscale_all_dim": 1.3})),
        ("Llama", dict(rope_parameters=ROPE | YARN | {"attention_factor": 1.4})),
        ("Mistral", dict(sliding_window=7, head_dim=6)),
        ("Mistral", dict(sliding_window=None, num_key_value_heads=1)),
        ("Mistral", dict(sliding_window=1)),
        ("Qwen2", dict(hidden_size=36, num_attention_heads=3, num_key_value_heads=3)),
        ("Qwen2", dict(rope_parameters=ROPE | YARN, tie_word_embeddings=True)),
        (
            "Qwen2",
            dict(
                num_hidden_layers=3,
                use_sliding_window=True,
                sliding_window=6,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            ),
        ),
        ("Qwen3", dict(head_dim=14, attention_bias=True)),
        ("Qwen3", dict(head_dim=6, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
        ("Olmo2", dict()),
        ("Olmo2", dict(attention_bias=True, num_attention_heads=2, tie_word_embeddings=True)),
        ("SmolLM3", dict(num_hidden_layers=5)),
        ("SmolLM3", dict(no_rope_layers=[0, 1], mlp_bias=True, attention_bias=True)),
        ("SmolLM3", dict(no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=6)),
        ("Granite", dict(attention_multiplier=0.3, embedding_multiplier=5.0)),
        ("Granite", dict(residual_multiplier=0.4, logits_scaling=3.0, mlp_bias=True)),
        ("Granite", dict(rope_parameters=ROPE | YARN, attention_bias=True)),
        ("Phi3", dict(sliding_window=7)),
        ("Phi3", dict(rope_parameters=ROPE | {"partial_rotary_factor": 0.5}, num_hidden_layers=3)),
        (
            "Phi3",
            dict(
                rope_parameters=ROPE | {"rope_type": "su"} | LONG | ORIGINAL,
                max_position_embeddings=200,
                original_max_position_embeddings=25,
            ),
        ),
        ("Gemma2", dict(head_dim=6)),
        ("Gemma2", dict(attn_logit_softcapping=2.0, final_logit_softcapping=5.0, head_dim=14)),
        ("Gemma2", dict(attn_logit_softcapping=None, sliding_window=6, num_hidden_layers=4)),
        ("Gemma2", dict(query_pre_attn_scalar=11, layer_types=["full_attention"] * 2)),
        ("Gemma3Text", dict(num_hidden_layers=7, sliding_window=6, head_dim=6)),
        ("Gemma3Text", dict(final_logit_softcapping=4.0, attention_bias=True, head_dim=12)),
        (
            "Gemma3Text",
            dict(
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 800.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
                },
                layer_types=["full_attention", "sliding_attention"],
                sliding_window=9,
            ),
        ),
        ("Mixtral", dict(num_local_experts=7, num_experts_per_tok=3, intermediate_size=12)),
        ("Mixtral", dict(num_local_experts=2, num_experts_per_tok=1, intermediate_size=68)),
        (
            "Qwen2Moe",
            dict(moe_intermediate_size=8, shared_expert_intermediate_size=12, num_experts=5),
        ),
        (
            "Qwen2Moe",
            dict(
                moe_intermediate_size=20,
                shared_expert_intermediate_size=12,
                num_experts=4,
                num_hidden_layers=4,
                decoder_sparse_step=2,
                norm_topk_prob=True,
                qkv_bias=False,
            ),
        ),
        ("Qwen3Moe", dict(moe_intermediate_size=8, num_experts=9, head_dim=6)),
        ("Qwen3Moe", dict(moe_intermediate_size=8, num_experts=8, mlp_only_layers=[0], head_dim=6)),
        ("Olmoe", dict(num_experts=12, attention_bias=True, intermediate_size=16)),
        ("GPT2", dict()),
        ("GPT2", dict(n_inner=50, tie_word_embeddings=False, activation_function="relu")),
        ("GPTNeoX", dict()),
        ("GPTNeoX", dict(use_parallel_residual=False, rotary_pct=0.5, rotary_emb_base=50)),
        ("GPTNeoX", dict(attention_bias=False, hidden_act="gelu_new", tie_word_embeddings=True)),
        ("GPTNeoX", dict(rope_parameters={"rope_type": "linear", "factor": 3.0})),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_random_decoders(family, changes, tmp_path):
    helpers = runpy.run_path(str(FIXTURES / "make_decoders.py"))
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes = {"GPT2": GPT2, "GPTNeoX": NEOX}.get(family, LLAMA | ids)
    if family == "Gemma3Text":  # which has others by layer type
        sizes = {name: value for name, value in sizes.items() if name != "rope_parameters"}
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy(sizes | changes))
    model = helpers["random_model"](config, seed=1)
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
