"""What the study of tokens' difficulty computes, against slower ways to the same."""

import itertools
import pathlib
import types

import jax
import numpy as np
import pytest
from scipy import stats

from early_exit.data import transforms
from early_exit.evaluation import tradeoff
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained.load import load
from experiments import figures
from experiments.token_difficulty import samples, tokens
from experiments.token_difficulty.tokens import INSIDE, NUMBER, OTHER, PUNCTUATION, SPACE, WORD

TEXT = [
    "def",
    " foo",
    "bar",
    "(",
    "x",
    ")",
    ":\n",
    "    ",
    "return",
    " 12",
    " a",
    "lphab",
    "et",
    "",
]
KINDS = [WORD, WORD, INSIDE, PUNCTUATION, WORD, PUNCTUATION, PUNCTUATION, SPACE, WORD, NUMBER]
KINDS += [WORD, INSIDE, INSIDE, OTHER]


def pieces_of(words):
    return tokens.Pieces(lambda ids: words[ids[0]], special=[len(words) - 1])


def described(ids, words, first=1, begin=0):
    return tokens.described(ids, first, ids[first:], pieces_of(words), begin)


def test_tokens_are_of_their_kinds_and_at_their_places():
    found = described(range(len(TEXT)), TEXT)
    assert found["kind"].tolist() == KINDS[1:]
    assert found["in_word"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0]
    assert found["in_line"].tolist() == [1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6]
    assert found["in_text"].tolist() == list(range(1, 14))
    assert found["rank"].tolist() == list(range(1, 14)) and not found["repeated"].any()


def test_a_piece_of_a_letter_is_no_word():
    assert pieces_of(["\N{REPLACEMENT CHARACTER}", "é", ""]).kind(0, False) == OTHER
    assert pieces_of(["x", "é", ""]).kind(1, True) == INSIDE


def test_what_is_said_in_another_s_place_is_judged_in_that_place():
    """Of given text, the full model's token, not the one that the text goes on with."""
    words = [*"abc", " d", ""]
    said = tokens.described([0, 1, 2], 1, [3, 0], pieces_of(words), begin=0)
    assert said["kind"].tolist() == [WORD, INSIDE]
    assert said["rank"].tolist() == [3, 0] and said["repeated"].tolist() == [0, 1]
    later = tokens.described([0, 1, 2], 1, [3, 0], pieces_of(words), begin=1)
    assert later["repeated"].tolist() == [0, 0]  # what stands before the answer does not count


@pytest.mark.parametrize("seed", range(5))
def test_what_is_known_before_a_token_is_told_by_earlier_ones(seed):
    rng = np.random.default_rng(seed)
    words = [" a", "b", "c\n", "1", ", ", ""]
    ids = rng.integers(0, 5, 40).tolist()
    before = described(ids, words)["before"]
    for at in (1, 7, 25, 38):
        other = [*ids[:at], *rng.integers(0, 5, 40 - at).tolist()]
        np.testing.assert_array_equal(described(other, words)["before"][:at], before[:at])
    alike = tokens.BEFORE.index("latest tokens that were there before")
    for at in range(1, 40):
        text = ids[:at]
        suffixes = [k for k in range(1, at) if text[-k:] in
                    (text[i : i + k] for i in range(at - k))]  # fmt: skip
        assert before[at - 1, alike] == min(max(suffixes, default=0), tokens.LONGEST)
        assert before[at - 1, alike + 1] == (text[-1] in text[:-1])


def test_areas_and_correlations_are_those_of_the_books():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 60).astype(float)
    scores[:5] = -np.inf
    right = rng.random(60) < 0.4
    pairs = itertools.product(scores[right], scores[~right])
    won = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])
    assert figures.auc(scores, right) == pytest.approx(won)
    assert np.isnan(figures.auc(scores, np.ones(60, bool)))
    x, y = rng.integers(0, 5, (2, 60))
    assert figures.rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(figures.rank_correlation(x, np.zeros(60)))


def test_intervals_are_of_texts_not_of_positions():
    """Saying every word of each text ten times makes nothing better known."""
    rng = np.random.default_rng(0)
    values, texts = rng.random(40), np.arange(40)
    of = figures.intervals(lambda i: values[i].mean(keepdims=True), texts, 400)
    many = np.repeat(values, 10)
    of_many = figures.intervals(lambda i: many[i].mean(keepdims=True), np.repeat(texts, 10), 400)
    np.testing.assert_allclose(of, of_many)
    (mean,), (low,), (high,) = of
    half = 1.96 * values.std() / np.sqrt(40)
    assert mean == values.mean()
    assert low == pytest.approx(mean - half, abs=0.2 * half)
    assert high == pytest.approx(mean + half, abs=0.2 * half)


def test_a_figure_that_a_draw_lacks_is_left_out():
    values = np.array([1.0, np.nan, np.nan])

    def of(chosen):
        with np.errstate(invalid="ignore"):
            return np.array([np.nansum(values[chosen]) / np.isfinite(values[chosen]).sum(), np.nan])

    value, low, high = figures.intervals(of, np.arange(3), 50)
    assert (value[0], low[0], high[0]) == (1, 1, 1)
    assert np.isnan([value[1], low[1], high[1]]).all()


def test_a_regression_finds_what_made_the_data():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (20_000, 3))
    odds = 0.5 + x @ [0.8, -0.4, 0.0]
    right = rng.random(20_000) < 1 / (1 + np.exp(-odds))
    np.testing.assert_allclose(figures.logistic(x, right)(x), odds, atol=0.35)
    constant = figures.logistic(np.ones((10, 1)), np.arange(10) < 5)
    np.testing.assert_allclose(constant(np.ones((2, 1))), 0, atol=1e-6)


def test_a_text_is_foretold_by_others_alone():
    rng = np.random.default_rng(0)
    x, texts = rng.normal(size=(60, 2)), np.repeat(np.arange(12), 5)
    right = rng.random(60) < 0.5
    found = figures.crossed(x, right, texts)
    for text in range(12):
        own = texts == text
        changed = figures.crossed(x, np.where(own, ~right, right), texts)
        np.testing.assert_array_equal(found[own], changed[own])
        assert (found != changed).any()


CHAT = pathlib.Path(__file__).parents[1] / "fixtures" / "tiny_chat"
SIZES = samples.Sizes(seeds=range(1, 3), texts=3, new_tokens=9, batch=4)


@pytest.fixture(scope="module")
def tuned():
    pretrained = load(str(CHAT))
    model = MultiExit(pretrained.config, ExitConfig(points=(2, 4), head="norm", classes=200))
    ids = jax.numpy.arange(200, dtype="int32")
    heads = model.init_exits(jax.random.key(0), pretrained.params, "copy", ids)
    return types.SimpleNamespace(
        model=model,
        params={"backbone": pretrained.params, "exits": heads, "token_ids": ids},
        tokenizer=pretrained.tokenizer,
        encode=pretrained.tokenizer.encode,
    )


def test_every_position_is_joined_with_its_own_token(tuned):
    rng = np.random.default_rng(0)
    texts = [
        [samples.Text(rng.integers(0, 300, int(n)).tolist(), int(first), 0) for n, first in of_seed]
        for of_seed in ([(12, 3), (20, 17)], [(9, 9), (30, 1), (11, 4), (25, 20)])
    ]
    found = samples.positions(tuned, texts, SIZES)
    everything = [text for of_seed in texts for text in of_seed]
    at = 0
    for number, text in enumerate(everything):
        batch = transforms.one_a_row([text.ids], 64)
        said = np.asarray(tradeoff.full_choices(tuned.params, batch, model=tuned.model))[0]
        count = len(text.ids) - text.first
        own = slice(at, at + count)
        assert found["rank"][own].tolist() == said[text.first - 1 : len(text.ids) - 1].tolist()
        assert set(found["text"][own]) <= {number}
        assert set(found["seed"][own]) <= {1 if number < 2 else 2}
        assert found["known"][own].tolist() == (found["rank"][own] < 200).tolist()
        scores, last = found["scores"][:, own], found["last_scores"][:, own]
        np.testing.assert_array_equal(np.maximum(scores, 0)[:, :-1], last[:, 1:])
        at += count
    assert at == len(found["text"])
    agree = found["agree"]
    assert not agree[:, ~found["known"]].any()
    needed = np.where(agree[0], 2, np.where(agree[1], 4, 6))
    assert found["needed"].tolist() == needed.tolist()
    assert (found["entropy"] >= 0).all() and found["before"].shape == (len(tokens.BEFORE), at)


def test_seeds_have_no_text_in_common(tuned, tmp_path):
    lines = tmp_path / "texts.jsonl"
    lines.write_text(
        "".join(f'{{"text": "{i} words of text number {i} {"and " * 20}"}}\n' for i in range(400))
    )
    found = samples.given(tuned, SIZES, str(lines))
    texts = [tuple(text.ids) for of_seed in found for text in of_seed]
    assert [len(of_seed) for of_seed in found] == [3, 3] and len(set(texts)) == 6
    assert all(len(ids) == samples.CONTEXT + 9 for ids in texts)
    more = samples.given(tuned, SIZES._replace(seeds=range(2, 4)), str(lines))
    assert [text.ids for text in more[0]] == [text.ids for text in found[1]]
    with pytest.raises(ValueError, match="have 25 tokens, not 3000"):
        samples.given(tuned, SIZES._replace(texts=1000), str(lines))


def test_answers_to_other_flags_are_refused(tmp_path):
    path = tmp_path / "said.json"
    path.write_text('{"asked_for": {"seeds": [0], "texts": 3, "new_tokens": 9}, "texts": []}')
    with pytest.raises(ValueError, match="said.json holds answers to other flags; name another"):
        samples.answered(None, SIZES, path)


def test_too_few_questions_are_refused(monkeypatch):
    monkeypatch.setattr(samples, "questions", lambda *_, held_out: ["one", "two"])
    tuned = types.SimpleNamespace(chat=list)
    with pytest.raises(ValueError, match="too few questions for seed 1; lower --texts"):
        samples.answered(tuned, SIZES, None)


def test_a_network_that_encodes_its_prompt_is_refused():
    model = types.SimpleNamespace(config=types.SimpleNamespace(encodes_prompts=True))
    with pytest.raises(ValueError, match="encodes its prompt.*give a decoder"):
        samples.positions(types.SimpleNamespace(model=model), [], SIZES)
