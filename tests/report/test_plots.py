import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from early_exit.report import plots

DEPTHS = [6, 12, 18, 24, 30]
EXACT = ["verified: exits", "verified: exits + lookup", "verified: lookup"]
LABELS = {"full model", "deferred", "ltt 0.05", "ε 0.8", *EXACT}

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"


def texts(svg):
    """{text: (x, y)} of a plot's labels."""
    return {
        "".join(e.itertext()).strip(): (float(e.get("x")), float(e.get("y")))
        for e in ElementTree.fromstring(svg).iter(f"{SVG}text")
    }


def training_lines(count, **curves):
    return [
        {"step": step, "loss": 1.0, "grad_norm": 1.0}
        | {f"loss/exit_{name[1:]}": curve(step) for name, curve in curves.items()}
        for step in range(1, count + 1)
    ]


CURVES = {
    "search": [(2.0, 0.8), (1.0, 0.6), (4.0, 0.9)],
    "eero": [(1.0, 0.5), (3.0, 0.85)],
}
RISKS = {"6": (np.array([0.1, 1.0]), np.array([0.0, 0.2]))}


KEPT = {"ltt": [(0.2, 0.1, 0.15), (0.1, 0.05, 0.07)]}


@pytest.fixture(params=["speed", "exits", "training", "budget", "rejection", "achieved"])
def svg(request, evaluation):
    return {
        "speed": lambda: plots.quality_against_speed(evaluation["decoding"]["rows"]),
        "exits": lambda: plots.exit_bars(evaluation["exits"]),
        "training": lambda: plots.training_curves(training_lines(9, _6=float, _18=float), DEPTHS),
        "budget": lambda: plots.quality_against_cost(CURVES, "blocks a token", "agreement"),
        "rejection": lambda: plots.risk_against_coverage(RISKS),
        "achieved": lambda: plots.target_against_achieved(KEPT),
    }[request.param]()


def test_a_plot_is_an_element_without_needs(svg):
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg" and root.get("viewBox") and root.get("aria-label")
    assert root.get("width") is None  # as wide as its place
    ids = {e.get("id") for e in root.iter() if e.get("id")}
    links = [e.get(LINK) for e in root.iter() if e.get(LINK)] + re.findall(r"url\((.*?)\)", svg)
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)


def test_a_plot_takes_colours_and_font_from_the_page(svg):
    assert "var(--ink," in svg and "var(--muted," in svg
    assert not re.search("#0[1-5]0[1-5]0[1-5]|font-family|DejaVu", svg)


def test_two_plots_share_no_id(evaluation):
    one = plots.quality_against_speed(evaluation["decoding"]["rows"])
    other = plots.exit_bars(evaluation["exits"])
    ids = [set(re.findall(r'\bid="(.*?)"', svg)) for svg in (one, other)]
    assert all(ids) and not ids[0] & ids[1]


def test_the_same_data_gives_the_same_plot(evaluation):
    drawn = {plots.quality_against_speed(evaluation["decoding"]["rows"]) for _ in range(2)}
    assert len(drawn) == 1


def test_points_stand_where_their_numbers_say(evaluation):
    svg = plots.quality_against_speed(evaluation["decoding"]["rows"])
    assert texts(svg).keys() >= LABELS
    # Markers that are not ticks: those of the lines, drawn last.
    root = ElementTree.fromstring(svg)
    lines = [g for g in root.iter(f"{SVG}g") if "-line2d_" in g.get("id", "")]
    marks = [u for g in lines for u in g.iter(f"{SVG}use") if "--accent" in u.get("style")]
    marks += [u for g in lines for u in g.iter(f"{SVG}use") if "--ink" in u.get("style")]
    at = np.array([(float(mark.get("x")), float(mark.get("y"))) for mark in marks])
    rows = evaluation["decoding"]["rows"]
    early = ("lossy", "deferred")  # drawn first
    drawn = [row for mode in early for row in rows if row["mode"] == mode]
    drawn += [row for row in rows if row["mode"] not in early]
    expected = np.array([(row["tokens_per_second"], 100 * row["agreement"]) for row in drawn])
    for axis in (0, 1):
        slope, offset = np.polyfit(expected[:, axis], at[:, axis], 1)
        np.testing.assert_allclose(slope * expected[:, axis] + offset, at[:, axis], atol=1e-3)
        assert (slope > 0) == (axis == 0)  # SVG's y points down


def test_the_dashed_line_is_the_full_models_speed(evaluation):
    """Whatever else is lossless: left of it is slower than doing nothing."""
    both = plots.quality_against_speed(evaluation["decoding"]["rows"])
    alone = plots.quality_against_speed(evaluation["decoding"]["rows"][:-1])
    dashed = [len(re.findall("stroke-dasharray: ?[1-9]", svg)) for svg in (both, alone)]
    assert dashed == [1, 1]


def test_equal_points_get_labels_apart(evaluation):
    for row in evaluation["decoding"]["rows"]:
        row |= {"tokens_per_second": 50.0, "agreement": 1.0}
    at = texts(plots.quality_against_speed(evaluation["decoding"]["rows"]))
    heights = sorted(at[label][1] for label in LABELS)
    assert np.diff(heights).min() > 10


def test_the_full_model_alone_can_be_drawn(evaluation):
    assert "full model" in texts(plots.quality_against_speed(evaluation["decoding"]["rows"][:1]))


def test_bars_show_early_exits_only(evaluation):
    labels = texts(plots.exit_bars(evaluation["exits"])).keys()
    assert {"block 6", "block 18", "31", "7", "44", "22"} <= labels
    assert "block 30" not in labels


def test_a_curve_goes_through_its_points_from_cheap_to_dear():
    svg = plots.quality_against_cost(CURVES, "blocks a token", "agreement")
    assert {"search", "eero", "blocks a token", "agreement, %"} <= texts(svg).keys()
    root = ElementTree.fromstring(svg)
    lines = [g for g in root.iter(f"{SVG}g") if "-line2d_" in g.get("id", "")]
    marks = [u for g in lines for u in g.iter(f"{SVG}use") if "--accent" in u.get("style")]
    x, y = np.array([(float(mark.get("x")), float(mark.get("y"))) for mark in marks[:3]]).T
    # Positions in the plot are linear in the figures, and sorted by cost.
    np.testing.assert_allclose(np.diff(x) / np.ptp(x), [1 / 3, 2 / 3], atol=1e-3)
    np.testing.assert_allclose(np.diff(y) / np.ptp(y), [-2 / 3, -1 / 3], atol=1e-3)


def test_risks_that_came_out_stand_over_those_asked_for():
    svg = plots.target_against_achieved(KEPT)
    assert {"ltt", "risk asked for, %", "risk that came out, %"} <= texts(svg).keys()
    root = ElementTree.fromstring(svg)
    lines = [g for g in root.iter(f"{SVG}g") if "-line2d_" in g.get("id", "")]
    marks = [u for g in lines for u in g.iter(f"{SVG}use") if "--accent" in u.get("style")]
    (x_low, y_low), (x_high, y_high) = [(float(m.get("x")), float(m.get("y"))) for m in marks[:2]]
    (diagonal,) = [
        path.get("d").replace("M", "").replace("L", "").split()
        for path in root.iter(f"{SVG}path")
        if "4" in path.get("style", "") and "dasharray" in path.get("style", "")
    ]
    x0, y0, x1, y1 = map(float, diagonal)
    # From (0, 0) to the greatest risk asked for; up is a smaller y.
    assert x_high == pytest.approx(x1, abs=0.1)
    assert x_low == pytest.approx((x0 + x1) / 2, abs=0.1)
    assert y_low == pytest.approx(y0 + (y1 - y0) / 4, abs=0.1)
    assert y_high == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_a_long_curve_of_risks_makes_no_large_plot():
    many = np.linspace(1e-5, 1, 100_000)
    svg = plots.risk_against_coverage({"max_prob": (many, many / 2)})
    assert "wrong among them, %" in texts(svg) and len(svg) < 30_000


def test_curves_are_of_training_steps_alone():
    lines = training_lines(20, _6=lambda step: 1.0, _12=lambda step: 2.0)
    validated = [*lines, {"step": 20, "loss/exit_6": 99.0, "agreement/exit_6": 0.5}]
    assert plots.training_curves(validated, DEPTHS) == plots.training_curves(lines, DEPTHS)
    assert {"block 6", "block 12"} <= texts(plots.training_curves(lines, DEPTHS)).keys()


def test_a_step_without_an_exit_has_no_point_of_it():
    """Curricula leave exits out of steps, and what was not finite is None."""
    lines = training_lines(8, _6=float, _12=float)
    for line in lines[::2]:
        del line["loss/exit_6"]
    lines[1]["loss/exit_12"] = None
    alone = [{k: v for k, v in line.items() if k != "loss/exit_12"} for line in lines]
    assert {"block 6", "block 12"} <= texts(plots.training_curves(lines, DEPTHS)).keys()
    # As if the steps without it had not been.
    svg = plots.training_curves(alone, DEPTHS)
    assert svg == plots.training_curves(alone[1::2], DEPTHS)


@pytest.mark.parametrize("lines", [[], [{"step": 1, "agreement/exit_6": 0.5}]])
def test_without_training_steps_there_is_no_curve(lines):
    assert plots.training_curves(lines, DEPTHS) is None


def test_a_long_run_makes_no_large_plot():
    svg = plots.training_curves(training_lines(20_000, _6=lambda step: 1 + 1 / step), DEPTHS)
    assert len(svg) < 30_000
