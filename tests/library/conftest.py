import dataclasses
from pathlib import Path

import jax
import pytest
import stand_ins

import early_exit as ee
from early_exit import confidence
from early_exit.data import examples, sources
from early_exit.decoding import drafters
from early_exit.exits import heads

FIXTURES = Path(__file__).parents[1] / "fixtures"
TEXTS = [f"The {n}th text says: {' '.join(map(str, range(n, n + 30)))}." for n in range(24)]


@pytest.fixture(scope="session")
def chat():
    """A small language model's folder."""
    return str(FIXTURES / "tiny_chat")


@pytest.fixture(scope="session")
def bare(chat):
    return ee.load(chat)


@pytest.fixture(scope="session")
def tuned(bare):
    """Two exits after a few steps."""
    model = ee.attach(bare, ee.ExitConfig((2, 4), head="norm"))
    how = {"steps": 4, "batch_size": 2, "sequence_length": 32, "progress": False}
    return ee.tune(model, TEXTS, **how)


@pytest.fixture(scope="session")
def leaving(tuned):
    """Thresholds in the middle of what its exits say, so that some positions leave at each."""
    records = ee.record(tuned, TEXTS[:8], batch_size=2, sequence_length=32)
    middle = [sorted(row)[len(row) // 2] for row in records.scores["max_prob"][:-1].tolist()]
    return dataclasses.replace(tuned, policy=ee.make_policy(middle))


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """A small BERT that reads words, for two classes."""
    source = stand_ins.topics(tmp_path_factory.mktemp("topics") / "of", 1).model.source
    model = ee.load(source, changes={"num_classes": 2})
    return ee.attach(model, ee.ExitConfig((1,), head="linear"), init="random")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Costs are measured once, and kept nowhere else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EARLY_EXIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def forgotten():
    """What is registered in a test is gone after it, programs that knew it, too."""
    tables = (confidence._registered, heads._registered, sources._registered)
    tables += (examples.READERS, drafters.BY_NAME)
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)
    jax.clear_caches()
