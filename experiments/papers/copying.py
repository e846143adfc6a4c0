"""Copying out of noise: prompts whose answers are the words that are no noise, in their order.

A word after `skip` is left out, one after `twice` comes twice. Two numbers behind a word, such as
`w7 = 4 8 + 3 5`, are answered by their sum, digit by digit: `w7 8 3`. So most of an answer is
copied, and some places have to be worked out. No word comes twice in a prompt: what follows it is a
matter of the prompt, not of counting.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import transformers

from early_exit.backbones import base
from early_exit.backbones.t5 import T5Config
from early_exit.pretrained.export import write_backbone
from early_exit.storage import files

PAD, END, UNKNOWN, SKIP, TWICE = "<pad>", "</s>", "<unk>", "skip", "twice"
WORDS = [f"w{i}" for i in range(48)]
NOISE = [f"n{i}" for i in range(12)]
VOCABULARY = [PAD, END, UNKNOWN, SKIP, TWICE, "=", "+", *"0123456789", *WORDS, *NOISE]
LONGEST_PROMPT, LONGEST_ANSWER = 48, 24
_WORDS, _NOISE = (3, 7), (2, 7)  # how many of each a prompt has, from the one to below the other
# What becomes of a word, and how often.
_KINDS = {"copied": 0.5, SKIP: 0.1, TWICE: 0.1, "sum": 0.3}


def pair(rng: np.random.Generator) -> dict[str, str]:
    """A prompt and its answer."""
    pieces, answer = [], []
    for word in rng.choice(WORDS, rng.integers(*_WORDS), replace=False):
        kind = rng.choice(list(_KINDS), p=list(_KINDS.values()))
        if kind == "sum":
            one, other = map(int, rng.integers(10, 100, 2))
            pieces.append(f"{word} = {' '.join(str(one))} + {' '.join(str(other))}")
            answer += [word, *str(one + other)]
        elif kind == "copied":
            pieces.append(word)
            answer.append(word)
        else:
            pieces.append(f"{kind} {word}")
            answer += [word] * (2 * (kind == TWICE))
    for noise in rng.choice(NOISE, rng.integers(*_NOISE)):
        pieces.insert(rng.integers(len(pieces) + 1), noise)
    return {"prompt": " ".join(pieces), "answer": " ".join(answer)}


def write(folder: Path, count: int, network: T5Config) -> tuple[Path, Path]:
    """(a folder with such a network, drawn at random; a file of `count` pairs)."""
    model, rows = folder / "network", folder / "pairs.jsonl"
    files.make_folder(model)
    known = {word: i for i, word in enumerate(VOCABULARY)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, UNKNOWN))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        f"$A {END}", special_tokens=[(END, known[END])]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )
    write_backbone(model, network, base.init(network, jax.random.key(0), jnp.float32), tokenizer)
    rng = np.random.default_rng(0)
    lines = (files.json_text(pair(rng)) for _ in range(count))
    files.write_text(rows, "".join(f"{line}\n" for line in lines))
    return model, rows
