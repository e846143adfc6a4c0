"""Tokenizers of GGUF files by the names of their rules, and those of SentencePiece."""

import pathlib

import pytest

from early_exit.pretrained import gguf_tokenizer
from early_exit.pretrained.tokenizer import _fast_tokenizer

PATH = pathlib.Path("x.gguf")
TEXT = "We'LL add 12345 HelloWorld's  /\n\n//x"
CUT = {
    "llama-bpe": [
        *("We", "'LL", "Ġadd", "Ġ", "123", "45", "ĠHelloWorld", "'s", "Ġ", "Ġ/ĊĊ", "//", "x")
    ],
    "qwen2": [
        *("We", "'LL", "Ġadd", "Ġ", "1", "2", "3", "4", "5"),
        *("ĠHelloWorld", "'s", "Ġ", "Ġ/ĊĊ", "//", "x"),
    ],
    "gpt-4o": ["We'LL", "Ġadd", "Ġ", "123", "45", "ĠHello", "World's", "Ġ", "Ġ/ĊĊ//", "x"],
    "refact": [
        *("We", "'", "LL", "Ġadd", "Ġ", "1", "2", "3", "4", "5"),
        *("ĠHelloWorld", "'s", "Ġ", "Ġ/", "Ċ", "Ċ", "//", "x"),
    ],
}
CUT |= {"dbrx": CUT["llama-bpe"], "smaug-bpe": CUT["llama-bpe"], "smollm": CUT["refact"]}


def keys(**entries):
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items()}


def byte_level(pre, tokens=("<s>", "a", "b", "ab", "aba"), merges=("a b",), **more):
    types = [3] + [1] * (len(tokens) - 1)
    said = keys(model="gpt2", pre=pre, tokens=list(tokens), token_type=types, bos_token_id=0)
    metadata = said | keys(merges=list(merges), **more)
    return gguf_tokenizer.read(PATH, metadata, _fast_tokenizer)


@pytest.mark.parametrize("pre", CUT)
def test_text_is_cut_by_the_rules_of_that_name(pre):
    cut = byte_level(pre).backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [piece for piece, _ in cut] == CUT[pre]


@pytest.mark.parametrize("merge", ["a c", "b a", "ab", ""])
def test_merges_of_what_is_no_token_are_refused(merge):
    with pytest.raises(ValueError, match=f"merges '{merge}' .*, of which not all are tokens"):
        byte_level("qwen2", merges=["a b", merge])


def test_words_that_are_pieces_are_taken_whole_by_llama3_alone():
    """The last piece is no result of merges."""
    assert byte_level("llama-bpe", add_bos_token=False).tokenize("aba") == ["aba"]
    assert byte_level("dbrx").tokenize("aba") == ["ab", "a"]


@pytest.mark.parametrize(
    ("pre", "more", "begins"),
    [
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
        ("qwen2", {}, False),
        ("qwen2", {"add_bos_token": True}, True),
    ],
)
def test_texts_begin_with_a_token_where_the_rules_or_a_key_say_so(pre, more, begins):
    ids = byte_level(pre, **more)("ab")["input_ids"]
    assert ids == [0] * begins + [3]


# Pieces with scores, the best of which are merged first; bytes for what no piece has.
PIECES = {
    "<unk>": (0.0, 2),
    "<s>": (0.0, 3),
    "</s>": (0.0, 3),
    "▁": (-9.0, 1),
    "t": (-8.0, 1),
    "h": (-7.0, 1),
    "e": (-6.0, 1),
    "th": (-2.0, 1),
    "he": (-1.0, 1),
    "▁t": (-3.0, 1),
    "▁the": (-4.0, 1),
    "<tag>": (0.0, 4),
}
BYTES = {f"<0x{byte:02X}>": (0.0, 6) for byte in range(256)}


def sentence_pieces(**more):
    pieces = PIECES | BYTES
    scores, types = (list(x) for x in zip(*pieces.values(), strict=True))
    metadata = keys(
        model="llama",
        tokens=list(pieces),
        scores=scores,
        token_type=types,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    return gguf_tokenizer.read(PATH, metadata | keys(**more), _fast_tokenizer)


def test_pieces_are_merged_in_the_order_of_their_scores():
    """`he` comes before `th`, which comes before `▁t`."""
    tokenizer = sentence_pieces(add_bos_token=False)
    assert tokenizer.tokenize("the") == ["▁the"]
    assert tokenizer.tokenize("th he") == ["▁", "th", "▁", "he"]
    assert tokenizer.tokenize("he<tag>th")[2] == "<tag>"


def test_what_no_piece_has_falls_apart_into_bytes_and_comes_back():
    tokenizer = sentence_pieces()
    ids = tokenizer("the ŋ")["input_ids"]
    assert ids[0] == 1
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["<0xC5>", "<0x8B>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the ŋ"


def test_a_text_s_first_space_is_added_where_the_file_says():
    """Gemma's says not."""
    tokenizer = sentence_pieces(add_space_prefix=False, add_bos_token=False)
    assert tokenizer.tokenize("the") == ["t", "he"]
    assert tokenizer.decode(tokenizer(" the")["input_ids"]) == " the"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (keys(scores=[0.0]), "gives 1 scores .* to 268 tokens"),
        (keys(scores=None), "gives 0 scores"),
        (keys(model="t5"), "tokenizer model 't5'; only byte-level BPE"),
        (keys(model="gpt2", pre="qwen2"), "a byte-level tokenizer without merges"),
        (keys(token_type=None), "with tokens and their types"),
    ],
)
def test_what_is_no_tokenizer_is_refused(said, message):
    with pytest.raises(ValueError, match=message):
        sentence_pieces(**{key.removeprefix("tokenizer.ggml."): x for key, x in said.items()})
