"""The cache of hidden states as a user makes it, tunes from it, and finds it damaged."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TINY = ["--config=configs/tiny.py", f"--config.model.source={ROOT / 'tests/fixtures/tiny_chat'}"]


@pytest.fixture(scope="module")
def cache(launch, tmp_path_factory):
    """(folder, what was printed) of a cache of eight batches."""
    folder = tmp_path_factory.mktemp("cache") / "states"
    done = launch("cache", *TINY, f"--hidden_states={folder}", "--batches=5", "--top_k=8")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_cache_prints_what_it_made(cache):
    folder, printed = cache
    *facts, path = printed.splitlines()[2:]
    facts = dict(re.split(" {2,}", line) for line in facts)
    assert facts["hidden states after"] == "2, 4"
    assert (facts["rows"], facts["tokens"]) == ("32", "2048")
    size = sum(file.stat().st_size for file in folder.glob("*.array_record"))
    assert float(facts["bytes per token"]) == pytest.approx(size / 2048, abs=5e-4)
    assert float(facts["tokens/s"]) > 0
    assert path == f"states in {folder}"


def test_a_finished_cache_is_checked(cache, launch):
    folder, _ = cache
    flags = ["cache", *TINY, f"--hidden_states={folder}", "--batches=5"]
    again = launch(*flags, "--top_k=8")
    assert again.returncode == 0 and re.search(r"tokens/s +–", again.stdout)
    other = launch(*flags, "--top_k=9")
    assert other.returncode == 1
    assert "holds records with another top_k; name another folder" in other.stderr
    shard = folder / "00001.array_record"
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
        damaged = launch(*flags, "--top_k=8")
        assert damaged.returncode == 1
        assert re.search(r"damaged.*; remove its \.json and run the command", damaged.stderr)
        assert "Traceback" not in damaged.stderr
    finally:
        shard.write_bytes(whole)


def test_tune_from_a_cache(cache, launch, tmp_path):
    folder, _ = cache
    flags = [*TINY, "--config.tune.steps=3", f"--config.tune.hidden_states={folder}"]
    tuned = launch("tune", *flags, f"--workdir={tmp_path}")
    assert tuned.returncode == 0, tuned.stderr
    assert [row.split()[0] for row in tuned.stdout.splitlines()[2:5]] == ["2", "4", "6"]


def test_classifiers_have_no_cache(launch, tmp_path):
    refused = launch("cache", "--config=configs/digits_resnet.py", f"--hidden_states={tmp_path}")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "cached for language models; this is a classifier" in refused.stderr
