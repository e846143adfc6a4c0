"""Small models and texts that stand where the real ones do, for commands that are run whole."""

import json
import pathlib
import re
import shutil

import numpy as np
import safetensors.numpy
import tokenizers
import transformers

from configs import news_minilm, tiny
from early_exit.pretrained.tokenizer import load_tokenizer
from early_exit.settings.overrides import ConfigDict, override

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
WORDS = [f"word{i}" for i in range(61)]
TOPICS = ("art", "law", "sea")
# Whose pairs are no tokens: what is drawn is what its text encodes to.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def make_talkative(model: pathlib.Path) -> None:
    """Changes a copy of the tiny model: it draws letters, and now and then the end of a turn."""
    *letters, end = load_tokenizer(model).encode(f"{LETTERS}<|im_end|>")
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    # A part of the hidden states that is always there, for biases.
    tensors["model.embed_tokens.weight"][:, 0] = 8
    output = np.zeros_like(tensors["lm_head.weight"])
    output[:, 0] = -4
    output[letters] = np.random.default_rng(0).normal(0, 0.35, (len(letters), output.shape[1]))
    output[[*letters, end], 0] = [*[0] * len(letters), 0.6]
    tensors["lm_head.weight"] = output
    safetensors.numpy.save_file(tensors, model / "model.safetensors", {"format": "pt"})


def deep_chat(folder: pathlib.Path, blocks: int = 9) -> None:
    """Writes the tiny chat model with more blocks, its own over and over."""
    shutil.copytree(FIXTURES / "tiny_chat", folder)
    about = json.loads((folder / "config.json").read_text())
    own = about["num_hidden_layers"]
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.startswith("model.layers.")]:
        *_, block, part = re.match(r"(model\.layers)\.(\d+)\.(.*)", name).groups()
        for further in range(int(block) + own, blocks, own):
            tensors[f"model.layers.{further}.{part}"] = tensors[name]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(about | {"num_hidden_layers": blocks}))


def answering(root: pathlib.Path, count: int) -> ConfigDict:
    """A config for a small encoder–decoder and so many prompts, which are answered backwards.

    Args:
      root: where both are written.
    """
    model, rows = root / "model", root / "rows.jsonl"
    shutil.copytree(FIXTURES / "tiny_t5_gated", model)
    # As T5's: a token that ends texts stands behind each of them.
    names = ["<pad>", "</s>", *WORDS[2:]]
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(names)}, WORDS[2])
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(model)
    rng = np.random.default_rng(0)
    with rows.open("w") as file:
        for _ in range(count):
            said = rng.choice(WORDS[3:], rng.integers(2, 9)).tolist()
            row = {"prompt": " ".join(said), "answer": " ".join(said[::-1])}
            file.write(json.dumps(row) + "\n")
    return override(
        tiny.get_config(),
        {
            "model.source": str(model),
            "exits.points": (1, 2),
            "exits.classes": 0,
            "data.source": str(rows),
            "data.sequence_length": 12,
            "data.prompt_length": 16,
            "calibrate.batches": 8,
            "evaluate.new_tokens": 8,
            "evaluate.sample_tokens": 8,
        },
    )


def topics(root: pathlib.Path, count: int, **arg) -> ConfigDict:
    """A config like `configs/news_minilm.py` for a small BERT and so many texts of three topics.

    Args:
      root: where both are written.
      arg: what goes behind the config's colon.
    """
    model, rows = root / "model", root / "rows.jsonl"
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(FIXTURES / "tiny_bert", model)
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, WORDS[1])
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=WORDS[0]
    ).save_pretrained(model)
    rng = np.random.default_rng(0)
    with rows.open("w") as file:
        for i in range(count):
            text = " ".join(rng.choice(WORDS, rng.integers(2, 12)))
            file.write(json.dumps({"text": text, "label": TOPICS[i % len(TOPICS)]}) + "\n")
    words = ",".join(f"{name}={value}" for name, value in ({"data": f"rows:{rows}"} | arg).items())
    config = news_minilm.get_config(words)
    config.model.source, config.model.changes = str(model), {}
    config.exits.points = (1, 2)
    config.data.sequence_length = 16
    return config
