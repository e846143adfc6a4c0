"""The tokenizer of a GGUF file, as a `transformers` fast tokenizer.

The one idea: a file has pieces, and a name for the rules by which text becomes pieces. What a name
stands for is llama.cpp's (src/llama-vocab.cpp); one that is not known is refused, since other rules
give other pieces.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Values of `tokenizer.ggml.token_type`.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "▁"  # what stands for a space in the pieces of SentencePiece

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cut(*alternatives: str) -> pre_tokenizers.PreTokenizer:
    """Cuts out what one of the patterns matches, the first that does."""
    pattern = Regex("|".join([*alternatives, _REST]))
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), as_bytes])


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    """Words with what stands before them, numbers in pieces, everything else."""
    word, others = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return _cut(_ENDINGS, word, digits, others)


_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])
_THREE = _words(r"\p{N}{1,3}")
_GPT4O = _cut(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
)
# `tokenizer.ggml.pre` → how text is cut before merging. What llama.cpp calls "default" is a rule of
# its own, and what files of before May 2024 were cut by, none says.
_PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "refact": _DIGITS,  # Granite
    "llama-bpe": _THREE,
    "dbrx": _THREE,  # OLMo 2
    "smaug-bpe": _THREE,  # SmolLM3
    "qwen2": _words(r"\p{N}"),
    "gpt-4o": _GPT4O,  # Phi-4-mini
}
# Of these, a word that is a piece is taken whole, and texts begin with a token if no key says not.
_LLAMA3 = "llama-bpe"


def read(
    path: pathlib.Path,
    metadata: Mapping[str, Any],
    fast: Callable[[], "type[PreTrainedTokenizerFast]"],
) -> "PreTrainedTokenizerFast":
    """The tokenizer that a file's metadata describes.

    Args:
      fast: gives the class, which is slow to import.

    Raises:
      ValueError: a kind that is not supported, or a damaged file.
    """

    def get(key, default=None):
        return metadata.get(f"tokenizer.ggml.{key}", default)

    make = {"gpt2": _byte_level, "llama": _sentence_pieces}.get(get("model"))
    tokens, types = get("tokens"), get("token_type")
    if make is None or not (tokens and types):
        raise ValueError(
            f"{path} has the tokenizer model {get('model')!r}; only byte-level BPE ('gpt2') and "
            "SentencePiece's BPE ('llama'), with tokens and their types, are read. Use the model's "
            "safetensors folder"
        )
    if len(types) != len(tokens):
        raise ValueError(
            f"{path} gives {len(types)} types (tokenizer.ggml.token_type) to {len(tokens)} tokens "
            "(tokenizer.ggml.tokens); the file is damaged, download it again"
        )
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{ours}_token": get(f"{theirs}_token_id") for ours, theirs in named.items()}
    for token, i in ids.items():
        if i is not None and not (isinstance(i, int) and 0 <= i < len(tokens)):
            raise ValueError(
                f"{path} has the {token} {i!r}, which is none of its {len(tokens)} tokens; the "
                "file is damaged, download it again"
            )
    specials = {name: tokens[i] for name, i in ids.items() if i is not None}
    bpe, begins = make(path, get, tokens, types, specials.get("unk_token"))
    bpe.add_tokens(
        [
            AddedToken(token, special=type_ == _CONTROL, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (_CONTROL, _USER_DEFINED)
        ]
    )
    return fast()(
        tokenizer_object=bpe,
        add_bos_token=get("add_bos_token", begins),
        add_eos_token=get("add_eos_token", False),
        chat_template=metadata.get("tokenizer.chat_template"),
        **specials,
    )


def _byte_level(path, get, tokens: Sequence[str], types: Sequence[int], unknown: str | None):
    """(a tokenizer of bytes that are merged, whether texts begin with a token)."""
    merges, kind = get("merges"), get("pre")
    if not merges:
        raise ValueError(
            f"{path} has a byte-level tokenizer without merges (tokenizer.ggml.merges); the file "
            "is damaged, download it again"
        )
    if kind not in _PRE_TOKENIZERS:
        said = "does not say (tokenizer.ggml.pre)" if kind is None else f"says by {kind!r}"
        raise ValueError(
            f"{path} {said} how text is cut before its pieces are merged; supported are "
            f"{', '.join(map(repr, _PRE_TOKENIZERS))}. Use the model's safetensors folder"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise ValueError(
                f"{path} merges {' '.join(pair)!r} (tokenizer.ggml.merges), of which not all are "
                "tokens; the file is damaged, download it again"
            )
    bpe = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=pairs,
            ignore_merges=kind == _LLAMA3,
        )
    )
    bpe.pre_tokenizer = _PRE_TOKENIZERS[kind]
    bpe.decoder = decoders.ByteLevel()
    return bpe, kind == _LLAMA3


def _sentence_pieces(path, get, tokens: Sequence[str], types: Sequence[int], unknown: str | None):
    """The same of SentencePiece's: characters are merged, in the order of the pieces' scores.

    What is in no piece falls apart into bytes.
    """
    scores = get("scores")
    if not scores or len(scores) != len(tokens):
        raise ValueError(
            f"{path} gives {len(scores or ())} scores (tokenizer.ggml.scores) to {len(tokens)} "
            "tokens (tokenizer.ggml.tokens); the file is damaged, download it again"
        )
    bpe = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if get("add_space_prefix", True):
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        bpe.normalizer = spaces
    bpe.decoder = decoders.Sequence(steps)
    return bpe, True


def _merges(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, those of the highest score first."""
    ids = {t: i for i, (t, type_) in enumerate(zip(tokens, types, strict=True)) if type_ == _NORMAL}
    found = []
    for piece, i in ids.items():
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(-scores[i], pair) for pair in known]
    return [pair for _, pair in sorted(found, key=lambda item: item[0])]
