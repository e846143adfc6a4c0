"""A check that cannot fail shows nothing: these make bars fall short."""

import json
import math

import pytest
from absl.testing import flagsaver
from scipy import stats

from experiments import bars
from experiments.decoding_speed import mode_bars


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


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (7, 20), (428, 437), (20, 20)])
def test_an_interval_of_a_share_ends_where_its_count_would_be_a_surprise(successes, trials):
    """At either end, so few or so many are found with a chance of 2.5 %: Clopper and Pearson."""
    low, high = bars.share_interval(successes, trials)
    assert low <= successes / trials <= high
    if successes:
        assert stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.025)
    else:
        assert low == 0
    if successes < trials:
        assert stats.binom.cdf(successes, trials, high) == pytest.approx(0.025)
    else:
        assert high == 1


def test_an_interval_of_a_mean_over_seeds():
    """Student's table: 4.303 for three values."""
    mean, half = bars.mean_interval([0.99, 1.0, 1.01])
    assert mean == pytest.approx(1) and half == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    found = stats.ttest_1samp([0.99, 1.0, 1.01], 1).confidence_interval()
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))
    assert math.isnan(bars.mean_interval([1.0])[1])


NO_LOSS = dict.fromkeys([(kind, b) for kind in ("code", "prose", "copy") for b in (1, 8)], 1.3)


def speedups(**modes):
    """By (text, batch, mode): 1.3 but for what is given as {mode: {(text, batch): value}}."""
    found = {}
    for mode in mode_bars.CHECKED:
        changed = modes.get(mode.name.removeprefix("verified: ").replace(" + ", "_"), {})
        found |= {(*key, mode.name): value for key, value in (NO_LOSS | changed).items()}
    return found | {("copy", 1, "verified: lookup"): 3.0}


def short(found):
    return [bar.name for bar in mode_bars.of(found) if not bar.kept]


def test_no_mode_keeps_another_modes_bar():
    """Lookup may gain what it will: exits alone, and both together, have bars of their own."""
    assert not short(speedups())
    lossy = dict.fromkeys(NO_LOSS, 0.98)
    assert short(speedups(exits=lossy)) == ["verified: exits, mean of all texts (geometric)"]
    assert short(speedups(exits_lookup={("code", 1): 1.2})) == [
        "verified: exits + lookup, on code",
        "verified: exits + lookup ÷ verified: lookup, on code: what exits add",
    ]
    assert short(speedups(lookup={("prose", 8): 0.96})) == [
        "verified: lookup, batch 8, slowest (prose)"
    ]
