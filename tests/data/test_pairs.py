"""Prompts with their answers: what a batch holds, who gets which rows, and what is refused."""

import json
import pathlib

import numpy as np
import pytest
import stand_ins

from early_exit.data import feed as feeds
from early_exit.data import pairs
from early_exit.data.stream import Rank
from early_exit.data.transforms import next_token_targets
from early_exit.pretrained.load import load
from early_exit.settings.overrides import override
from early_exit.settings.read import changed, read


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(settings, network with its tokenizer)."""
    config = read(stand_ins.answering(tmp_path_factory.mktemp("pairs") / "root", 300))
    return config, load(config.model.source)


@pytest.fixture(scope="module")
def feed(run):
    config, network = run
    return feeds.make(config, network.config, network.tokenizer)


def words(tokenizer, ids):
    return tokenizer.decode(ids).split()


def test_a_row_is_an_answer_beside_its_prompt(run, feed):
    config, network = run
    batch = next(feed.training(seed=0))
    rows, length = config.data.batch_size, config.data.sequence_length
    assert batch["tokens"].shape == (rows, length) and batch["prompt"].shape == (rows, 16)
    targets, counts = next_token_targets(batch)
    for row in range(rows):
        prompt = batch["prompt"][row][batch["prompt_real"][row]]
        assert batch["tokens"][row, 0] == network.config.start_id
        said = words(network.tokenizer, targets[row][counts[row]])
        asked = words(network.tokenizer, prompt)
        assert said[-1] == asked[-1] == "</s>"
        assert said[:-1] == asked[-2::-1]  # what the stand-in's answers are
        assert not batch["documents"][row, counts[row].sum() + 1 :].any()


def test_splits_share_no_prompt_and_hold_all(run, feed):
    found = [{feed.rows(split)[i] for i in range(len(feed.rows(split)))} for split in pairs.SPLITS]
    lines = pathlib.Path(run[0].data.source).read_text().splitlines()
    everything = {tuple(json.loads(line).values()) for line in lines}
    assert set.union(*found) == everything
    prompts = [{prompt for prompt, _ in part} for part in found]
    assert sum(map(len, prompts)) == len(set.union(*prompts))


def test_processes_have_each_pair_once_and_go_on_where_they_were(run, feed):
    config, _ = run
    whole, halves = feed.training(3), [feed.training(3, Rank(i, 2)) for i in range(2)]
    for _ in range(3):
        all_rows, parts = next(whole), [next(half) for half in halves]
        for name, want in all_rows.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), want)
    again = feed.training(3)
    again.set_state(json.loads(json.dumps(whole.get_state())))
    np.testing.assert_array_equal(next(again)["prompt"], next(whole)["prompt"])
    count = len(feed.rows("train"))
    one = feed.training(5)
    seen = np.concatenate([next(one)["tokens"] for _ in range(count // config.data.batch_size)])
    kept = {row.tobytes() for row in seen}
    assert len(kept) > 0.9 * len(seen)  # a few answers are alike, no pair comes twice
    for batches in (whole, *halves, again, one):
        batches.close()


def test_what_is_calibrated_on_is_numbered_by_pair(feed):
    rows = len(feed.rows("calibration"))
    batches = list(feed.calibration(None))
    real = np.concatenate([batch["documents"].any(axis=1) for batch in batches])
    assert real.sum() == rows and not real[rows:].any()
    groups = np.concatenate([batch["groups"][:, 0] for batch in batches])
    assert groups[:rows].tolist() == list(range(rows))
    assert len(list(feed.calibration(1))) == 1


def test_what_is_too_long_is_cut_before_its_end(run):
    config, network = run
    encode = pairs.Encode(network.tokenizer, length=5, prompt_length=4)
    text = " ".join(stand_ins.WORDS[10:20])
    assert words(network.tokenizer, encode.prompt(text)) == ["word10", "word11", "word12", "</s>"]
    assert words(network.tokenizer, encode.answer(text)) == [f"word{i}" for i in (10, 11, 12, 13)]
    assert words(network.tokenizer, encode.answer("word7")) == ["word7", "</s>"]
    # A name of the end in a text is a word that is not known, and ends nothing.
    long = pairs.Encode(network.tokenizer, length=20, prompt_length=4)
    assert long.answer("word7 </s> word8").count(1) == 1


def test_a_decoder_s_prompt_stands_in_front_of_the_answer(run):
    class Plain:
        encodes_prompts = False

    batch = pairs.batch(Plain, [([5, 6], [7]), ([8], [9, 3])], 4, 3)
    assert batch["tokens"].tolist() == [[5, 6, 7, 0], [8, 9, 3, 0], [0, 0, 0, 0]]
    assert "prompt" not in batch


WRONG = [
    ('{"prompt": "a"}', 'rows.jsonl:1 has no "answer" string'),
    ('{"prompt": 3, "answer": "b"}', 'rows.jsonl:1 has no "prompt" string'),
    ('["a", "b"]', "rows.jsonl:1 is no JSON object"),
    ('{"prompt": "a", "answer": "b"}', "the test split of .* is empty: it has 1 pairs"),
]


@pytest.mark.parametrize(("line", "said"), WRONG)
def test_rows_that_are_no_pairs_are_refused(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{line}\n".lstrip("\n"))
    with pytest.raises(ValueError, match=said):
        pairs.pairs(str(path), "test")


def test_other_sources_and_lengths_are_refused(run, tmp_path):
    config, network = run
    (tmp_path / "a.txt").write_text("text")
    for source in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match="this network answers prompts, and .* has none"):
            pairs.pairs(str(source), "train")
    with pytest.raises(FileNotFoundError, match="no prompts and answers: "):
        pairs.pairs(str(tmp_path / "none.jsonl"), "train")
    with pytest.raises(ValueError, match="data.prompt_length=65 is beyond the 64 positions"):
        longer = changed(config, {"data.prompt_length": 65})
        feeds.make(longer, network.config, network.tokenizer)
    with pytest.raises(ValueError, match="prompt_length"):
        read(override(stand_ins.answering(tmp_path / "more", 3), {"data.prompt_length": -1}))
