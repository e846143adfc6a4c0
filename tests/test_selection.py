"""What is named as quick is there."""

import pathlib

import pytest
import selection

TESTS = pathlib.Path(__file__).parent


@pytest.mark.parametrize("part", selection.QUICK)
def test_what_is_quick_exists(part):
    file, _, test = part.partition("::")
    assert (TESTS / file).exists()
    if test:
        assert f"\ndef {test.partition('[')[0]}(" in (TESTS / file).read_text()


def test_a_part_is_a_whole_name():
    assert selection.is_quick("tests/data/test_feed.py::test_a[1-2]")
    assert selection.is_quick("tests/test_tree.py::test_b")
    assert not selection.is_quick("tests/database/test_feed.py::test_a")
    whole = "tests/launch/test_commands.py::test_generate_at_full_depth"
    assert selection.is_quick(whole) and not selection.is_quick(f"{whole}_and_more")
