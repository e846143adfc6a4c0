"""Streams of random numbers: named, the same everywhere, and none that meets another."""

import itertools
import pathlib
import re

import jax
import numpy as np

from early_exit.streams import stream

ROOM = pathlib.Path(__file__).parents[1] / "early_exit"
NAMES = re.findall(
    r'(?<!def )stream\([\w.]+, "([^"]+)"\)',
    "".join(path.read_text(encoding="utf-8") for path in sorted(ROOM.rglob("*.py"))),
)


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_names_give_the_same_keys_in_every_process_and_version():
    """Python's own `hash` would not: it is salted."""
    assert data(stream(0, "heads")) == (518088923, 1964660043)
    assert data(stream(2**32 - 1, "heads")) != data(stream(0, "heads"))


def test_no_two_things_of_a_run_are_drawn_from_one_key():
    """Nor from what is derived of them: a key for each block, parameter or step."""
    assert {"heads", "network", "layer dropout"} <= {*NAMES} and len({*NAMES}) == len(NAMES)
    keys = {}
    for name, seed in itertools.product(NAMES, (0, 1)):
        key = stream(seed, name)
        keys[name, seed] = data(key)
        keys |= {(name, seed, i): data(jax.random.fold_in(key, i)) for i in range(200)}
    for seed in (0, 1):
        keys["root", seed] = data(jax.random.key(seed))
    assert len({*keys.values()}) == len(keys)


def test_a_run_roots_no_stream_by_hand():
    """The seed of a run becomes keys in one place."""
    for path in sorted(ROOM.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"random\.key\((self\.)?(config|recipe)\.", text), path
