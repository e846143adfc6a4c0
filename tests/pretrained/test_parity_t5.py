"""Our import of encoder–decoders against torch and transformers, in one process."""

import json
import pathlib

import jax
import numpy as np
import pytest

from early_exit.backbones import base
from early_exit.decoding.generate import generate
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained.export import export_backbone
from early_exit.pretrained.load import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SIZES = dict(vocab_size=71, d_model=20, d_kv=5, d_ff=36, num_heads=3, num_layers=2)
SIZES |= dict(decoder_start_token_id=0)
# Of a model type, and whether it has an output matrix of its own.
CASES = [
    ("T5", {}, False),
    ("T5", dict(feed_forward_proj="gelu", num_layers=3, layer_norm_epsilon=1e-2), False),
    ("T5", dict(feed_forward_proj="gated-silu", d_kv=8, num_heads=6), False),
    ("T5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False), True),
    ("T5", dict(relative_attention_num_buckets=12, relative_attention_max_distance=9), False),
    ("MT5", dict(decoder_start_token_id=3), True),
    ("MT5", dict(feed_forward_proj="relu"), False),
]


def run(found, inputs):
    definition, _ = base.described(found.config)

    @jax.jit
    def forward(params):
        network = base.merge(definition, params)
        hidden, context = network.stem(inputs)
        return network.readout(network.run_blocks(hidden, 0, found.config.depth, context))

    return forward(found.params)


@pytest.mark.parametrize(("kind", "changes", "own"), CASES)
def test_logits_and_answers_are_torch_s(kind, changes, own, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    network = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    if own:
        network.lm_head.weight = torch.nn.Parameter(torch.randn(71, 20))
    for parameter in network.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    network.eval().save_pretrained(tmp_path / "theirs")
    found = load(str(tmp_path / "theirs"))
    assert found.config.tied != own
    rng = np.random.default_rng(0)
    prompt, real = rng.integers(2, 71, (3, 40)), np.arange(40)[None] < np.array([[40], [13], [2]])
    tokens = rng.integers(2, 71, (3, 30))
    asked = dict(input_ids=torch.tensor(prompt), attention_mask=torch.tensor(real).long())
    with torch.no_grad():
        want = network(**asked, decoder_input_ids=torch.tensor(tokens)).logits.numpy()
        answers = network.generate(**asked, max_new_tokens=12, do_sample=False).numpy()
    got = run(found, {"tokens": tokens, "prompt": prompt, "prompt_real": real})
    np.testing.assert_allclose(got, want, atol=1e-4)
    model = MultiExit(found.config, ExitConfig(()))
    prompts = [row[here].tolist() for row, here in zip(prompt, real, strict=True)]
    ours = generate(
        model,
        {"backbone": found.params, "exits": {}},
        prompts,
        policy=None,
        max_new_tokens=12,
        stop_ids=(1,),
    )
    for answer, want in zip(ours, answers, strict=True):
        assert want[0] == found.config.start_id
        assert answer.tokens.tolist() == want[1 : len(answer.tokens) + 1].tolist()
    # And what goes out again is the same network to transformers.
    export_backbone(tmp_path / "ours", found.config, found.params, None)
    again, said = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not [key for keys in said.values() for key in keys]
    with torch.no_grad():
        exported = again.eval()(**asked, decoder_input_ids=torch.tensor(tokens)).logits
    np.testing.assert_allclose(exported.numpy(), got, atol=1e-4)


def test_a_file_of_older_transformers(tmp_path):
    """Flan-T5's: it says that nothing is tied, has copies of the embedding, and one bias more."""
    torch.manual_seed(1)
    sizes = SIZES | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    network = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    network.lm_head.weight = torch.nn.Parameter(torch.randn(71, 20))
    network.eval().save_pretrained(tmp_path)
    tensors = {name: x.clone() for name, x in network.state_dict().items()}
    bias = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[bias] = torch.randn(32, 3)
    import safetensors.torch

    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    about = json.loads(pathlib.Path(tmp_path / "config.json").read_text())
    del about["scale_decoder_outputs"]
    (tmp_path / "config.json").write_text(json.dumps(about | {"tie_word_embeddings": False}))
    found = load(str(tmp_path))
    assert (found.config.tied, found.config.scaled) == (False, False)
    tokens = np.arange(2, 14).reshape(2, 6)
    real = np.ones_like(tokens, bool)
    with torch.no_grad():
        want = network(
            input_ids=torch.tensor(tokens), decoder_input_ids=torch.tensor(tokens)
        ).logits
    got = run(found, {"tokens": tokens, "prompt": tokens, "prompt_real": real})
    np.testing.assert_allclose(got, want.numpy(), atol=1e-4)
