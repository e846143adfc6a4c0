"""The tokenizer that belongs to a checkpoint, as a `transformers` fast tokenizer.

The one idea: a tokenizer is its serialised rules, not its class. A folder's `tokenizer.json` is
taken as it stands. (`AutoTokenizer` would prefer the class that the config names and rebuild its
rules from the vocabulary; with transformers 5 this loses SmolLM2's splitting of digits.) A GGUF
file has no such rules, only a name for them.
"""

import logging
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from early_exit.pretrained import generation
from early_exit.storage import extras

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
# `tokenizer.ggml.pre` → how text is cut before merging (llama.cpp, src/llama-vocab.cpp). What it
# calls "default" is a rule of its own, and what files of before May 2024 were cut by, none says.
_PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
}
_CONTROL, _USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`


def load_tokenizer(
    path: pathlib.Path, config: Mapping[str, Any] | None = None
) -> "PreTrainedTokenizerFast | None":
    """The tokenizer of a model folder or a GGUF file; None if a folder has none.

    Args:
      config: the folder's `config.json`. Folders as old as GPT-2's and BERT's say only there, or
        in `generation_config.json`, which token ends a text and which fills rows.

    Raises:
      ValueError: a tokenizer that cannot be read, or of a kind that is not supported.
    """
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if (path / "tokenizer.json").exists():
        try:
            tokenizer = _fast_tokenizer().from_pretrained(path, local_files_only=True)
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise ValueError(
                f"{path / 'tokenizer.json'} is not a readable tokenizer ({error}); "
                "download it again"
            ) from error
        _name_tokens(tokenizer, path, config or {})
        return tokenizer
    others = [n for n in ("tokenizer.model", "vocab.json", "vocab.txt") if (path / n).exists()]
    if others:
        raise ValueError(
            f"{path} has {', '.join(others)} but no tokenizer.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return None


def _fast_tokenizer() -> "type[PreTrainedTokenizerFast]":
    """The class, imported when it is needed: it takes most of a second, and tells each time that
    there is no PyTorch, which nobody here asked for."""
    logging.getLogger("transformers").addFilter(_is_no_advice)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


def _is_no_advice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")


def _name_tokens(
    tokenizer: "PreTrainedTokenizerFast", path: pathlib.Path, config: Mapping[str, Any]
) -> None:
    """Names the tokens that the tokenizer's own files leave without a name."""
    for name in ("eos", "pad"):
        if getattr(tokenizer, f"{name}_token") is not None:
            continue
        told = generation.token_ids(config, name, f"the config of {path}")
        file = path / generation.FILE
        told += generation.token_ids(generation.stored_in(path), name, str(file))
        known = [token for token in told if token < len(tokenizer)]
        if known:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(known[0]))


def _from_gguf(path: pathlib.Path) -> "PreTrainedTokenizerFast":
    with extras.needed("gguf"):
        from early_exit.pretrained import gguf_file

    metadata, _ = gguf_file.read_header(path)

    def get(key, default=None):
        return metadata.get(f"tokenizer.ggml.{key}", default)

    tokens, merges, types = (get(key) for key in ("tokens", "merges", "token_type"))
    if get("model") != "gpt2" or not (tokens and merges and types):
        raise ValueError(
            f"{path} has the tokenizer model {get('model')!r}; only byte-level BPE ('gpt2') with "
            "tokens, types and merges is read. Use the model's safetensors folder"
        )
    if (kind := get("pre")) not in _PRE_TOKENIZERS:
        said = "does not say (tokenizer.ggml.pre)" if kind is None else f"says by {kind!r}"
        raise ValueError(
            f"{path} {said} how text is cut before its pieces are merged; supported are "
            f"{', '.join(map(repr, _PRE_TOKENIZERS))}. Use the model's safetensors folder"
        )
    if len(types) != len(tokens):
        raise ValueError(
            f"{path} gives {len(types)} types (tokenizer.ggml.token_type) to {len(tokens)} tokens "
            "(tokenizer.ggml.tokens); the file is damaged, download it again"
        )
    bpe = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
        )
    )
    bpe.pre_tokenizer = _PRE_TOKENIZERS[kind]
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens(
        [
            AddedToken(token, special=type_ == _CONTROL, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (_CONTROL, _USER_DEFINED)
        ]
    )
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{ours}_token": get(f"{theirs}_token_id") for ours, theirs in named.items()}
    for token, i in ids.items():
        if i is not None and not (isinstance(i, int) and 0 <= i < len(tokens)):
            raise ValueError(
                f"{path} has the {token} {i!r}, which is none of its {len(tokens)} tokens; the "
                "file is damaged, download it again"
            )
    return _fast_tokenizer()(
        tokenizer_object=bpe,
        add_bos_token=get("add_bos_token", False),
        add_eos_token=get("add_eos_token", False),
        chat_template=metadata.get("tokenizer.chat_template"),
        **{name: tokens[i] for name, i in ids.items() if i is not None},
    )
