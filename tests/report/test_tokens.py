import html.parser
import itertools
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_exit.report import tokens

DEPTHS = range(1, 31)
SGR = re.compile(r"\x1b\[[0-9;]*m")
depths_and_pieces = st.lists(st.tuples(st.integers(1, 30), st.text(max_size=8)), max_size=12)


def luminance(colour):
    """Relative luminance as WCAG 2.2 defines it."""
    channels = np.asarray(colour) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear, linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("exits", [1, 2, 6, 30, 80])
def test_text_has_contrast_at_every_exit(exits):
    for depth in range(exits):
        behind = tokens.background(depth, range(exits))
        levels = sorted(luminance(c)[1] + 0.05 for c in (behind, tokens.foreground(behind)))
        assert levels[1] / levels[0] >= 4.5


# Machado, Oliveira & Fernandes 2009, severity 1.0, on linear RGB.
PROTANOPIA = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
DEUTERANOPIA = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]


@pytest.mark.parametrize("vision", [np.eye(3), PROTANOPIA, DEUTERANOPIA], ids=["", "p", "d"])
def test_deeper_is_visibly_darker_to_any_eye(vision):
    seen = [
        np.clip(vision @ luminance(tokens.background(depth, range(30)))[0], 0, 1)
        @ [0.2126, 0.7152, 0.0722]
        for depth in range(30)
    ]
    lightness = 116 * np.cbrt(seen) - 16  # CIE L*
    assert (np.diff(lightness) < 0).all()
    # Five exits are told apart: 2.3 is a just noticeable difference.
    assert (np.diff(lightness[[5, 11, 17, 23, 29]]) < -8).all()


def test_a_model_of_one_block_has_a_colour():
    assert tokens.background(1, [1]) == tokens.background(1, [1, 30])


def test_exits_share_the_scale_wherever_they_are():
    assert tokens.background(28, [8, 28, 30]) == tokens.background(2, [1, 2, 3])


@given(depths_and_pieces)
def test_nothing_of_the_text_can_steer_a_terminal(drawn):
    depths, pieces = [d for d, _ in drawn], [p for _, p in drawn]
    bare = SGR.sub("", tokens.ansi(pieces, depths, DEPTHS))
    assert not [c for c in bare if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert len(bare) == len("".join(pieces))
    plain = [c for c in "".join(pieces) if unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp")]
    assert plain == [c for c in bare if c in plain]


def test_an_escape_sequence_is_shown_instead_of_obeyed():
    shown = tokens.ansi(["\x1b", "]0;title\x07", "\x9b2J", "\u202ea"], [1] * 4, DEPTHS)
    assert SGR.sub("", shown) == "␛]0;title␇�2J�a"


def test_newlines_and_tabs_stay_and_no_colour_crosses_a_line():
    shown = tokens.ansi(["a\n\n\tb", "\n", "c"], [1, 2, 3], [1, 2, 3])
    assert SGR.sub("", shown) == "a\n\n\tb\nc"
    for line in shown.split("\n"):
        assert not line or (line.startswith("\x1b[38;2;") and line.endswith("\x1b[0m"))


@given(depths_and_pieces, depths_and_pieces)
def test_a_terminal_may_be_given_the_text_in_portions(first, second):
    def shown(drawn):
        return tokens.ansi([p for _, p in drawn], [d for d, _ in drawn], DEPTHS)

    assert shown(first + second) == shown(first) + shown(second)


def test_the_legend_has_the_colour_of_each_exit():
    legend = tokens.legend_ansi([6, 18, 30])
    assert SGR.sub("", legend).split() == ["blocks", "run:", "6", "18", "30"]
    for depth in (6, 18, 30):
        assert tokens.ansi([f" {depth} "], [depth], [6, 18, 30]) in legend


class Spans(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        assert tag == "span"
        self.found.append([dict(attributes), ""])

    def handle_data(self, data):
        self.found[-1][1] += data


@given(depths_and_pieces)
def test_spans_hold_the_text_and_nothing_but_the_text(drawn):
    depths = [d for d, _ in drawn]
    pieces = [f"<b>&amp;'\"{p}" for _, p in drawn]
    spans = Spans(tokens.html_spans(pieces, depths, DEPTHS)).found
    assert [len(text) for _, text in spans] == [len(piece) for piece in pieces]
    for (_, text), piece in zip(spans, pieces, strict=True):
        differing = [a for a, b in zip(piece, text, strict=True) if a != b]
        assert all(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") for c in differing)
        assert "\n" not in differing


def test_spans_say_where_the_token_left():
    text = tokens.html_spans(["a", "\n", "b"], [6, 12, 30], [6, 12, 30])
    titles = [attributes["title"] for attributes, _ in Spans(text).found]
    assert titles == ["exit after block 6 of 30", "exit after block 12 of 30", "all 30 blocks"]
    styles = [attributes["style"] for attributes, _ in Spans(text).found]
    assert all(a != b for a, b in itertools.pairwise(styles))


@pytest.mark.parametrize("show", [tokens.ansi, tokens.html_spans])
def test_tokens_without_a_depth_are_an_error(show):
    with pytest.raises(ValueError, match="shorter"):
        show(["a", "b"], [6], [6, 30])


@pytest.mark.parametrize(
    ("depth", "title"),
    [
        (tokens.LOOKED_UP, "from earlier text"),
        (tokens.RECURRENT, "from the recurrent exit"),
        (5, "from no exit of this model"),
        (31, "from no exit of this model"),
        (-7, "from no exit of this model"),
    ],
)
def test_what_comes_from_no_exit_has_a_colour_of_its_own(depth, title):
    """Of each source that there is, and whatever else may come to propose tokens."""
    behind = tokens.background(depth, [6, 18, 30])
    assert behind not in {tokens.background(d, [6, 18, 30]) for d in (6, 18, 30)}
    levels = sorted(luminance(c)[1] + 0.05 for c in (behind, tokens.foreground(behind)))
    assert levels[1] / levels[0] >= 4.5
    assert "a" in tokens.ansi(["a"], [depth], [6, 18, 30])
    ((attributes, _),) = Spans(tokens.html_spans(["a"], [depth], [6, 18, 30])).found
    assert attributes["title"] == title


def test_the_legend_names_other_sources_where_there_are_some():
    legend = tokens.legend_ansi([6, 30], [tokens.LOOKED_UP, tokens.RECURRENT])
    assert SGR.sub("", legend) == "blocks run:  6  30   looked up   recurrent "
    assert tokens.ansi([" looked up "], [tokens.LOOKED_UP], [6, 30]) in legend
    assert tokens.ansi([" recurrent "], [tokens.RECURRENT], [6, 30]) in legend
