import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.data import shards

ABOUT = {"model": "tiny", "points": (1, 2)}


def filled(folder, *contents):
    shards.begin(folder, ABOUT)
    for number, records in enumerate(contents):
        shards.write(folder, number, records, {"tokens": len(records)})
    return folder


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.binary(), max_size=5), min_size=1, max_size=4))
def test_what_was_written_is_read(tmp_path_factory, contents):
    folder = filled(tmp_path_factory.mktemp("shards"), [b"first"], *contents)
    store = shards.Store(folder)
    assert list(store) == [b"first", *(record for records in contents for record in records)]
    assert [shard["tokens"] for shard in store.shards.values()] == [1, *map(len, contents)]
    store.verify()


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    def breaks_off():
        yield b"one"
        raise KeyboardInterrupt

    filled(tmp_path, [b"zero"])
    with pytest.raises(KeyboardInterrupt):
        shards.write(tmp_path, 1, breaks_off(), {})
    assert shards.is_finished(tmp_path, 0) and not shards.is_finished(tmp_path, 1)
    assert list(shards.Store(tmp_path)) == [b"zero"]
    assert len(list(tmp_path.iterdir())) == 3


def test_going_on_needs_the_same_settings(tmp_path):
    filled(tmp_path, [b"zero"])
    shards.begin(tmp_path, ABOUT)
    with pytest.raises(ValueError, match="holds records with another points; name another folder"):
        shards.begin(tmp_path, ABOUT | {"points": [1]})


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.999])
def test_damage_is_found(tmp_path, place):
    path = filled(tmp_path, [b"some record"], [b"another"]) / "00001.array_record"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged.*; remove its \.json"):
        shards.Store(tmp_path).verify()


def test_a_missing_shard_is_found(tmp_path):
    path = filled(tmp_path, [b"some record"], [b"another"]) / "00001.array_record"
    path.unlink()
    with pytest.raises(ValueError, match=r"00001.array_record is missing; remove its \.json"):
        shards.Store(tmp_path)


def test_a_shard_put_back_from_another_run_is_found(tmp_path):
    folder = filled(tmp_path / "a", [b"one", b"two"])
    other = filled(tmp_path / "b", [b"one"])
    (other / "00000.array_record").replace(folder / "00000.array_record")
    with pytest.raises(ValueError, match="has lost records"):
        shards.Store(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"about\.json is missing"):
        shards.Store(tmp_path)
    shards.begin(tmp_path, ABOUT)
    with pytest.raises(FileNotFoundError, match="no finished shard yet"):
        shards.Store(tmp_path)
