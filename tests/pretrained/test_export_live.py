"""What was imported and exported again, in the hands of transformers."""

import json
import pathlib

import numpy as np
import pytest

from early_exit.pretrained.export import export_backbone
from early_exit.pretrained.load import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
# Weights under torchvision's names have no class in transformers.
MODELS = sorted(
    path.parent.name
    for path in FIXTURES.glob("*/config.json")
    if "architectures" in json.loads(path.read_text())
)


# Counts training steps of a BatchNorm, and is no weight.
COUNTER = "num_batches_tracked"


def opened(folder):
    """(network, what did not fit) by the class that the folder's config names."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    network, report = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    return network.eval(), [key for keys in report.values() for key in keys if COUNTER not in key]


def sides(size):
    return (size, size) if isinstance(size, int) else size


def answer(network):
    """The network's outputs for some input of its kind."""
    rng, config = np.random.default_rng(0), network.config
    if hasattr(config, "num_channels"):
        height, width = sides(getattr(config, "image_size", (40, 48)))
        images = rng.normal(size=(2, config.num_channels, height, width))
        inputs = {"pixel_values": torch.from_numpy(images).float()}
    else:
        inputs = {"input_ids": torch.from_numpy(rng.integers(2, config.vocab_size, (2, 17)))}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        outputs = network(**inputs).to_tuple()
    return [x.numpy() for x in outputs if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_export_and_says_the_same(name, tmp_path):
    pretrained = load(str(FIXTURES / name))
    folder = tmp_path / "out"
    export_backbone(folder, pretrained.config, pretrained.params, pretrained.tokenizer)
    (source, _), (target, misfits) = opened(FIXTURES / name), opened(folder)
    assert not misfits and type(target) is type(source)
    weights, expected = target.state_dict(), source.state_dict()
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        if COUNTER not in key:
            assert torch.equal(weights[key], tensor), key
    outputs = answer(target)
    assert outputs and all(np.ptp(output) > 0 for output in outputs)
    for ours, theirs in zip(outputs, answer(source), strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


def test_transformers_loads_the_tokenizer(tmp_path):
    pretrained = load(str(FIXTURES / "tiny_chat"))
    export_backbone(tmp_path / "out", pretrained.config, pretrained.params, pretrained.tokenizer)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("def name(self):\n    return 12", "The year 2024, ŋ", "<|im_start|>user\n"):
        assert tokenizer.encode(text) == pretrained.tokenizer.encode(text)
    turn = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == (
        pretrained.tokenizer.apply_chat_template(turn, tokenize=False)
    )
