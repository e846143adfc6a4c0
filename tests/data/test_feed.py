"""What processes read of held-out data: each its own rows, and together the whole batches."""

import dataclasses

import numpy as np
import pytest

from configs import digits_resnet, tiny
from early_exit.data import examples, feed
from early_exit.data.stream import Rank
from early_exit.runs import assemble
from early_exit.settings.read import changed, read

COUNT, ROWS, BATCHES = 4, 8, 3


def feed_of(config):
    config = changed(config, {"data.batch_size": ROWS})
    pretrained, model = assemble.load_backbone(config)
    return feed.make(config, model.config, pretrained.tokenizer)


def assert_shares_make_the_whole(feed):
    whole = list(feed.held_out("validation", BATCHES))
    shares = [list(feed.held_out("validation", BATCHES, Rank(i, COUNT))) for i in range(COUNT)]
    assert len(whole) == BATCHES and all(len(rows) == BATCHES for rows in shares)
    for batch, *parts in zip(whole, *shares, strict=True):
        for name, array in batch.items():
            assert all(len(part[name]) == ROWS // COUNT for part in parts)
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_processes_share_held_out_text():
    assert_shares_make_the_whole(feed_of(read(tiny.get_config())))


def test_processes_share_held_out_examples_and_read_no_others(monkeypatch):
    found = feed_of(read(digits_resnet.get_config("width=4")))
    assert_shares_make_the_whole(found)
    seen, open_ = [], examples.examples

    def watched(source, split):
        opened = open_(source, split)
        return dataclasses.replace(opened, read=lambda i: seen.append(i) or opened.read(i))

    monkeypatch.setattr(examples, "examples", watched)
    for i in range(COUNT):
        seen.clear()
        list(found.held_out("validation", BATCHES, Rank(i, COUNT)))
        assert len(seen) == BATCHES * ROWS // COUNT


@pytest.mark.parametrize(
    "config", [read(tiny.get_config()), read(digits_resnet.get_config("width=4"))]
)
def test_a_batch_that_processes_cannot_share(config):
    with pytest.raises(ValueError, match="batch_size=8 is not a positive multiple of the 3"):
        feed_of(config).held_out("validation", BATCHES, Rank(0, 3))
