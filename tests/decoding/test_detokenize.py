import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from early_exit.decoding import detokenize


def byte_level():
    """Every byte is a token; one merge; two special tokens at the end of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "Ġa"])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|a|>", "<|b|>")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|b|>")


def byte_fallback():
    """Words start with ▁, unknown characters are bytes, the first space is dropped (Llama 2)."""
    known = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc"]
    bpe = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(known)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
SPECIAL = BYTE_LEVEL.eos_token_id
texts = st.text(st.characters(exclude_characters="�▁", exclude_categories=["Cs"]), max_size=12)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, SPECIAL), max_size=20))
def test_joined_pieces_are_the_decoded_text_whatever_the_tokens(ids):
    assert "".join(detokenize.pieces(BYTE_LEVEL, ids)) == decode(BYTE_LEVEL, ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["level", "fallback"])
@given(text=texts, special_at=st.integers(0, 12))
def test_joined_pieces_are_the_decoded_text_of_any_tokenizer(tokenizer, text, special_at):
    ids = tokenizer.encode(text, add_special_tokens=False)
    # Not inside a character, which would no longer be one.
    special_at = len(tokenizer.encode(text[:special_at], add_special_tokens=False))
    if special_at <= len(ids):
        ids.insert(special_at, tokenizer.eos_token_id)
    assert "".join(detokenize.pieces(tokenizer, np.array(ids, np.int32))) == decode(tokenizer, ids)


@given(texts)
def test_every_token_is_given_the_characters_it_completes(text):
    ids = BYTE_LEVEL.encode(text)
    pieces = detokenize.pieces(BYTE_LEVEL, ids)
    for end in range(len(ids) + 1):
        assert "".join(pieces[:end]) == decode(BYTE_LEVEL, ids[:end]).rstrip("�")


def test_a_character_of_several_tokens_belongs_to_the_last():
    ids = BYTE_LEVEL.encode("é🎉!")
    assert detokenize.pieces(BYTE_LEVEL, ids) == ["", "é", "", "", "", "🎉", "!"]
    assert detokenize.pieces(BYTE_LEVEL, ids[:4]) == ["", "é", "", "�"]
    assert detokenize.Detokenizer(BYTE_LEVEL).add(ids[:4]) == ["", "é", "", ""]


@given(st.lists(st.integers(0, SPECIAL), max_size=20), st.data())
def test_portions_of_any_size_add_what_the_whole_adds(ids, data):
    whole = detokenize.Detokenizer(BYTE_LEVEL).add(ids)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=5).map(sorted))
    streamed, added = detokenize.Detokenizer(BYTE_LEVEL), []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        portion = streamed.add(np.array(ids[start:end], np.int32))
        assert len(portion) == end - start
        added += portion
    assert added == whole


@given(st.lists(st.integers(0, SPECIAL), min_size=1, max_size=20), st.data())
def test_portions_of_a_stream_join_to_the_whole(ids, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids) - 1)))) if len(ids) > 1 else []
    detokenizer, shown = detokenize.Detokenizer(BYTE_LEVEL), []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        shown += detokenizer.add(ids[start:end], complete=end == len(ids))
        assert decode(BYTE_LEVEL, ids[:end]).startswith("".join(shown))
    assert "".join(shown) == decode(BYTE_LEVEL, ids)


def test_an_unfinished_character_is_held_back_until_it_is_whole():
    party = BYTE_LEVEL.encode("🎉")
    detokenizer = detokenize.Detokenizer(BYTE_LEVEL)
    assert detokenizer.add(BYTE_LEVEL.encode("a") + party[:1]) == ["a", ""]
    assert detokenizer.add(party[1:3]) == ["", ""]
    assert detokenizer.add([]) == []
    assert detokenizer.add(party[3:]) == ["🎉"]
    # Where the text ends within a character, what there is of it is given out.
    assert detokenizer.add(party[:2]) == ["", ""]
    assert detokenizer.add(BYTE_LEVEL.encode("!"), complete=True) == ["�!"]
    assert "".join(detokenize.pieces(BYTE_LEVEL, party[:2])) == "�"


def test_no_long_text_is_decoded_again_and_again():
    lengths = []

    class Counting:
        def decode(self, ids, **kwargs):
            lengths.append(len(ids))
            return BYTE_LEVEL.decode(ids, **kwargs)

    ids = BYTE_LEVEL.encode("naïve 日本語 text, " * 30)
    detokenize.pieces(Counting(), ids)
    assert sum(lengths) < 12 * len(ids)
