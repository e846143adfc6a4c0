"""A check that cannot fail shows nothing: these make bars fall short."""

import json
import math

import pytest
from absl.testing import flagsaver

from experiments import bars


@pytest.fixture(autouse=True)
def parsed_flags():
    if not bars.flags.FLAGS.is_parsed():
        bars.flags.FLAGS(["test"])


@pytest.mark.parametrize(
    ("figure", "limit", "at_least", "kept"),
    [
        (0.8, 0.8, False, True),
        (0.81, 0.8, False, False),
        (0.8, 0.8, True, True),
        (0.79, 0.8, True, False),
        (math.nan, 0.8, False, False),
        (math.nan, 0.8, True, False),
    ],
)
def test_a_bar_is_kept_or_not(figure, limit, at_least, kept):
    assert bars.Bar("time", figure, limit, at_least).kept is kept


def test_check_names_what_falls_short_and_only_that(capsys):
    both = [bars.Bar("slow part", 1.5, 1.1), bars.Bar("fast part", 0.5, 1.1)]
    with flagsaver.flagsaver(check=True), pytest.raises(SystemExit) as stopped:
        bars.conclude({}, both)
    assert stopped.value.code == "fall short: slow part: 1.500"
    printed = capsys.readouterr().out
    assert "FALLS SHORT" in printed and printed.count("kept") == 1
    with flagsaver.flagsaver(check=True):
        bars.conclude({}, both[1:])
    bars.conclude({}, both)  # without --check it only prints


def test_figures_are_written(tmp_path):
    path = tmp_path / "new" / "figures.json"
    with flagsaver.flagsaver(out=str(path)):
        bars.conclude({"a": 1.5}, [bars.Bar("slow part", 1.5, 1.1)])
    written = json.loads(path.read_text())
    assert written["figures"] == {"a": 1.5}
    assert written["bars"][0]["kept"] is False
