"""Packed tokens: the same text as from its files, in rows that are read once an epoch each."""

import collections
import itertools
import json
import os
import pathlib
import shutil
import signal
import types
import warnings

import numpy as np
import pytest

from configs import tiny
from early_exit.data import corpus, feed, packed, packing, shards, sources, tokenising
from early_exit.data.stream import BATCHES_AHEAD, Rank, shuffled
from early_exit.pretrained.tokenizer import load_tokenizer
from early_exit.settings.read import changed, read

CHAT = pathlib.Path(__file__).parents[1] / "fixtures/tiny_chat"
LENGTH = 16
NETWORK = types.SimpleNamespace(
    reads="tokens", classifies=False, encodes_prompts=False, context_length=LENGTH
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHAT)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A tokenizer with the same vocabulary, and other rules."""
    folder = tmp_path_factory.mktemp("tokenizer") / "other"
    shutil.copytree(CHAT, folder)
    rules = json.loads((CHAT / "tokenizer.json").read_text())
    rules["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(150):
        ending = "<|im_end|>" * (i % 10 == 0)  # letters, in a text
        (folder / f"{i}.txt").write_text(f"text {i} {'and so on ' * (i % 9)}{ending}")
    return folder


def pack(text, folder, tokenizer, part_bytes=1500, numbers=None):
    parts = corpus.parts(str(text), part_bytes=part_bytes)
    about = packed.about(tokenizer, LENGTH, corpus.identity(parts), len(parts))
    encode = tokenising.batch_encoder(tokenizer, str(text))
    left = packing.begin(folder, about)
    for number in left if numbers is None else numbers:
        packing.pack(parts[number], number, folder, about, encode)
    return packing.finish(folder, about, str(text))


@pytest.fixture(scope="module")
def folder(text, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    manifest = pack(text, folder, tokenizer)
    assert manifest["parts"]["count"] > 4
    return folder


def feed_of(source, tokenizer, **settings):
    settings = {"data.source": str(source), "data.sequence_length": LENGTH} | settings
    return feed.make(changed(read(tiny.get_config()), settings), NETWORK, tokenizer)


def assert_same(batches, expected):
    batches, expected = list(batches), list(expected)
    assert len(batches) == len(expected) > 0
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_held_out_splits_are_those_of_the_text(text, folder, tokenizer):
    plain, found = feed_of(text, tokenizer), feed_of(f"packed:{folder}", tokenizer)
    for split in ("validation", "calibration", "test"):
        assert_same(found.held_out(split, None), plain.held_out(split, None))
        assert [found.encode(tokens) for _, tokens in found.documents(split)] == [
            plain.encode(text) for _, text in plain.documents(split)
        ]
    assert_same(found.calibration(3), plain.calibration(3))


def test_rows_hold_all_training_text_once_and_say_where_documents_begin(text, folder, tokenizer):
    store = packed.Packed(folder).store("train")
    found, cut = [], []
    for record in store:
        row = packed.row(record, LENGTH)
        assert all(x.shape == (LENGTH,) and x.dtype == np.int32 for x in row.values())
        filled = row["documents"] > 0
        assert filled[: filled.sum()].all() and not row["tokens"][~filled].any()
        for document in range(1, row["documents"].max() + 1):
            inside = row["documents"] == document
            np.testing.assert_array_equal(row["positions"][inside], np.arange(inside.sum()))
            cut += row["tokens"][inside].tolist()
            if cut[-1] == tokenizer.eos_token_id:
                found.append(cut)
                cut = []
    plain = feed_of(text, tokenizer)
    expected = [plain.encode(text) for _, text in plain.documents("train")]
    assert found == [[*tokens, tokenizer.eos_token_id] for tokens in expected]


def rows_of(batch):
    return [
        tuple(map(bytes, row)) for row in zip(*(batch[name] for name in sorted(batch)), strict=True)
    ]


def test_every_row_once_an_epoch_over_restarts_with_other_numbers_of_processes(folder, tokenizer):
    """1 → 2 → 4 → 3 processes of a batch of 12, each going on from the state of the one before."""
    found = feed_of(f"packed:{folder}", tokenizer, **{"data.batch_size": 12})
    store = packed.Packed(folder).store("train")
    everything = collections.Counter(
        rows_of({k: v[None] for k, v in packed.row(record, LENGTH).items()})[0] for record in store
    )
    epochs, taken, state = 3, [], None
    stops = itertools.cycle([(1, 2), (2, 3), (4, 1), (3, 2)])
    while len(taken) < epochs * len(store):
        count, batches = next(stops)
        ranks = [found.training(5, Rank(i, count)) for i in range(count)]
        for iterator in ranks:
            if state is not None:
                iterator.set_state(json.loads(state))
        for _ in range(batches):
            taken += [row for iterator in ranks for row in rows_of(next(iterator))]
        (state,) = {json.dumps(iterator.get_state()) for iterator in ranks}
        for iterator in ranks:
            iterator.close()
    orders = [taken[i * len(store) : (i + 1) * len(store)] for i in range(epochs)]
    for order in orders:
        assert collections.Counter(order) == everything
    assert orders[0] != orders[1] != orders[2]


def watched(folder):
    """(packed tokens, the numbers of rows that are read of them from now on)."""
    found, seen = packed.Packed(folder), []
    store = found.store("train")

    class Watched:
        def __len__(self):
            return len(store)

        def __getitem__(self, index):
            seen.append(int(index))
            return store[index]

    found._stores["train"] = Watched()
    return found, seen


def test_a_process_reads_no_rows_but_its_own(folder):
    for rank in (Rank(0, 4), Rank(3, 4)):
        found, seen = watched(folder)
        batches = found.training(batch_size=8, seed=0, num_threads=0, rank=rank)
        list(itertools.islice(batches, 5))
        batches.close()
        order = shuffled(len(found.store("train")), 8, 0, rank)
        own = {int(row) for number in range(20) for row in order[number]["rows"]}
        assert len(seen) >= 5 * 2 and own.issuperset(seen)


def many_rows(folder, tokenizer, links):
    """A folder whose shards are one, over and over; its rows are read like any."""
    about = packed.about(tokenizer, LENGTH, "many", links)
    (folder / "train").mkdir(parents=True)
    with shards.writing(shards.data(folder / "train", 0)) as new:
        for number in range(10_000):
            tokens = np.full(LENGTH, number % 200, np.uint16)
            new.add(next(packed.Packer(LENGTH, np.uint16).add(tokens)))
    for number in range(1, links):
        os.symlink(shards.data(folder / "train", 0), shards.data(folder / "train", number))
    described = {"records": 10_000 * links, "shards": [new.described] * links}
    manifest = about | {"splits": {"train": described}}
    (folder / packed.MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_the_first_batch_asks_for_as_much_of_any_amount(tokenizer, tmp_path):
    """10⁴ rows and 10⁷: as many records read, as many files opened for them, and no lists made."""
    import tracemalloc

    sizes = {}
    for links in (1, 1000):
        folder = many_rows(tmp_path / str(links), tokenizer, links)
        tracemalloc.start()
        found, reads = watched(folder)
        batches = found.training(batch_size=4, seed=0, num_threads=0)
        assert next(batches)["tokens"].shape == (4, LENGTH)
        batches.close()
        sizes[links] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 4 <= len(reads) <= 4 * (2 + 2 * BATCHES_AHEAD)
    assert sizes[1000] - sizes[1] < 4 << 20  # what there is to say of 999 more shards


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def killed_at(step, make):
    """Whether a copy of this process came to its step-th touch of the disk, and was killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX has threads, and the copy has no use for it
        child = os.fork()
    if not child:
        try:
            touched = itertools.count(1)
            for module, name in ((os, "replace"), (os, "fsync"), (packed, "pack_document")):
                _dies_at(module, name, touched, step)
            make()
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _dies_at(module, name, touched, step):
    original = getattr(module, name)

    def dying(*arguments):
        if next(touched) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(module, name, dying)


def test_killed_anywhere_it_goes_on_to_the_same_shards(text, tokenizer, tmp_path):
    tokenising.as_text(tokenizer)("ready")  # not anew in each copy of this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    expected = tmp_path / "expected"
    pack(text, expected, tokenizer, part_bytes=3000)
    folder, steps = tmp_path / "killed", itertools.count(1, 3)
    kills = 0
    while killed_at(next(steps), lambda: pack(text, folder, tokenizer, part_bytes=3000)):
        kills += 1
    assert kills > 8
    assert contents(folder) == contents(expected)


def test_parts_may_be_made_in_any_order_and_twice(text, folder, tokenizer, tmp_path):
    count = packed.Packed(folder).manifest["parts"]["count"]
    numbers = [*reversed(range(count)), 1, 0]
    pack(text, tmp_path, tokenizer, numbers=numbers)
    assert contents(tmp_path) == contents(folder)


def test_what_does_not_belong_together_is_refused(text, folder, tokenizer, other, tmp_path):
    with pytest.raises(ValueError, match="made by another tokenizer than this model's"):
        feed_of(f"packed:{folder}", other)
    with pytest.raises(ValueError, match="have 16 tokens, but data.sequence_length=8; set it to"):
        feed_of(f"packed:{folder}", tokenizer, **{"data.sequence_length": 8})
    with pytest.raises(FileNotFoundError, match="no packed tokens in .*manifest.json is missing"):
        feed_of(f"packed:{tmp_path}", tokenizer)
    with pytest.raises(ValueError, match="holds records with another parts; name another"):
        pack(text / "1.txt", folder, tokenizer)
    with pytest.raises(ValueError, match="holds records with another tokenizer"):
        about = packed.about(other, LENGTH, "x", 1)
        shards.begin(folder, shards.about(folder) | {"tokenizer": about["tokenizer"]})


def test_a_folder_that_is_not_finished_says_so(text, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks parts \[1, 2, "):
        pack(text, tmp_path, tokenizer, numbers=[0])
    with pytest.raises(FileNotFoundError, match="is not finished; give its launch.tokenize again"):
        feed_of(f"packed:{tmp_path}", tokenizer)


def test_damaged_shards_are_told_before_training(text, tokenizer, tmp_path):
    pack(text, tmp_path, tokenizer)
    path = shards.data(tmp_path / "train", 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(
        ValueError, match=rf"00002.array_record has {len(whole) - 5} bytes, and had"
    ):
        feed_of(f"packed:{tmp_path}", tokenizer)
    path.unlink()
    with pytest.raises(ValueError, match=r"00002.array_record is missing; remove its \.json"):
        feed_of(f"packed:{tmp_path}", tokenizer)
    shards.description(tmp_path, 2).unlink()
    pack(text, tmp_path, tokenizer)
    assert path.read_bytes() == whole


def test_a_split_without_documents_is_named(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (split,) = {sources.split_of(b"one")}
    pack(tmp_path / "a.jsonl", tmp_path / "packed", tokenizer)
    for name in sources.SPLITS.keys() - {split}:
        with pytest.raises(ValueError, match=f"the {name} split in .* is empty"):
            packed.Packed(tmp_path / "packed").store(name)


def test_wide_vocabularies_and_short_documents(tmp_path):
    about = {"vocabulary": 70_000}
    packer = packed.Packer(4, packed.dtype(about))
    documents = [[69_999], [], [1, 2, 3, 4, 5, 6, 7], [8]]
    rows = [row for ids in documents for row in packer.add(np.array(ids, packed.dtype(about)))]
    rows = [packed.row(row, 4) for row in [*rows, *packer.rest(), *packer.rest()]]
    assert [row["tokens"].tolist() for row in rows] == [
        [69_999, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 0, 0, 0],
    ]
    assert [row["documents"].tolist() for row in rows] == [[1, 2, 2, 2], [1] * 4, [1, 0, 0, 0]]
    assert [row["positions"].tolist() for row in rows] == [[0, 0, 1, 2], [0, 1, 2, 3], [0] * 4]


def test_many_texts_at_a_time_are_encoded_as_each_alone(tokenizer, other):
    texts = ["", "a b", "<|im_end|> is text", "naïve 🙂" * 50, "\n\n  x"]
    for found in (tokenizer, other):
        encode = tokenising.as_text(found)
        assert encode.all(texts) == [encode(text) for text in texts]


def test_a_tokenizer_is_known_by_what_it_does(tokenizer, other, tmp_path):
    copied = load_tokenizer(shutil.copytree(CHAT, tmp_path / "copied"))
    assert tokenising.fingerprint(copied) == tokenising.fingerprint(tokenizer)
    assert other.get_vocab() == tokenizer.get_vocab()
    assert tokenising.fingerprint(other) != tokenising.fingerprint(tokenizer)
    copied.eos_token = "<|im_start|>"
    assert tokenising.fingerprint(copied) != tokenising.fingerprint(tokenizer)
