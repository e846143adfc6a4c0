"""Text that is given out as it comes, up to a stop string, and never taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_exit.serving.words import Words


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids, **how):
        return "".join(chr(i) for i in ids)


def told(text, stops, cuts):
    """The portions that are given out, and the writer."""
    words, portions = Words(Letters(), stops), []
    ids = [ord(letter) for letter in text]
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    for start, end in zip(edges, edges[1:], strict=False):
        portions.append(words.add(ids[start:end], complete=end == len(ids)))
    return portions, words


@given(
    text=st.text("ab#", min_size=1, max_size=30),
    stops=st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_what_is_given_out_is_the_text_up_to_the_first_stop(text, stops, cuts):
    portions, words = told(text, stops, cuts)
    ends = [text.index(stop) for stop in stops if stop in text]
    whole = "".join(portions)
    assert words.stopped == bool(ends)
    # In one piece it is the earliest; in portions, one that is complete earlier cuts first.
    assert text.startswith(whole) and not any(stop in whole for stop in stops)
    if not ends:
        assert whole == text
    elif not cuts:
        assert whole == text[: min(ends)]
    else:
        assert len(whole) in {text.index(stop) for stop in stops if stop in text}
    assert "".join(words.pieces) == text


@pytest.mark.parametrize(
    ("text", "stops", "first"),
    [("abcab", ["cd"], "ab"), ("aaab", ["aaab"], ""), ("a\n\nb", ["\n\n"], "a"), ("ab", [], "a")],
)
def test_what_may_begin_a_stop_is_held_back(text, stops, first):
    words = Words(Letters(), stops)
    out = ""
    for letter in text[: len(first) + 1]:
        out += words.add([ord(letter)])
        assert text.startswith(out)
    assert out == first if stops else out == text[: len(first) + 1]


def test_nothing_comes_after_a_stop():
    words = Words(Letters(), ["b"])
    assert [words.add([ord(x)]) for x in "abc"] == ["a", "", ""]
    assert words.stopped and words.pieces == ["a", "b", "c"]
