"""The tokenizer that belongs to a checkpoint, as a `transformers` fast tokenizer.

The one idea: a tokenizer is its serialised rules, not its class. A folder's `tokenizer.json` is
taken as it stands. (`AutoTokenizer` would prefer the class that the config names and rebuild its
rules from the vocabulary; with transformers 5 this loses SmolLM2's splitting of digits.) A GGUF
file has no such rules, only a name for them (`gguf_tokenizer`).
"""

import logging
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from early_exit.pretrained import generation, gguf_tokenizer
from early_exit.storage import extras

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
        with extras.needed("gguf"):
            from early_exit.pretrained import gguf_file

        return gguf_tokenizer.read(path, gguf_file.read_header(path)[0], _fast_tokenizer)
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
