"""The page of a classifier: what was measured, said as it is, from nothing but its own file."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from early_exit.report import page, plots

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def shown(classifier_evaluation, tmp_path):
    """What the page shows, its tags left out, after a change of the evaluation."""

    def write(change=lambda evaluation: None):
        change(classifier_evaluation)
        (tmp_path / "evaluation.json").write_text(json.dumps(classifier_evaluation))
        html = page.write(tmp_path).read_text(encoding="utf-8")
        body = html.split("<body>")[1].replace("\xa0", " ").replace("&nbsp;", " ")
        return html, " ".join(re.sub(r"<[^>]*>", " ", body).split())

    return write


def test_everything_measured_is_on_the_page(shown):
    html, text = shown()
    for words in (
        "runs 6 blocks for every example, and is right about 92.0 % of them",
        "exits after blocks 2 and 4 and the policy ε = 0.99, it ran 3.1 blocks",
        "was right about 91.7 %. An answer took 1.6 ms instead of 4 ms: 2.50 times as fast",
        "In batches of 64 it was 1.80 times as fast",
        "Measured on the 10,000 examples of the test split of idx:data",
        "ε 0.95 90.0 % 97.0 % 3.1 4 0.2",
        "small 89.0 % 97.0 % 3.1 4.5 0.2 no exits",
        "oracle exits 96.0 % 2.5 4",
        "ε 0.99 1.6 ms 1.6 ms 3.2 ms 4.8 ms 2.50× 900/s 1.80×",
        "modelled, not measured: 4.6 pJ a multiply-add and 160 pJ",
        "hard b, said c ; block 6, 0.40",
        "2 0.300 80.0 % 85.0 % 70.0 % 0.045 1 4 33.3 %",
    ):
        assert words in text, words
    assert html.count("<svg ") == 3


def test_texts_cannot_do_anything(shown):
    html, _ = shown()
    assert "<script" not in html and "&lt;script&gt;alert" in html


def test_pictures_are_in_the_page(shown):
    def change(evaluation):
        for found in evaluation["examples"].values():
            found[0]["png"] = "iVBORw0KGgo="
            del found[0]["text"]

    html, _ = shown(change)
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert [a for a in addresses if not a.startswith("#")] == [
        "data:image/png;base64,iVBORw0KGgo="
    ] * 2


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(0.8, "1.25 times as fast"), (1.0, "no faster"), (1.25, "slower , 0.80 times the speed")],
)
def test_the_result_is_said_as_it_is(shown, ratio, said):
    def change(evaluation):
        evaluation["classification"]["rows"][1]["latency_ratio"] = ratio

    assert said in shown(change)[1]


def test_metered_energy_is_named_after_its_meter(shown):
    _, text = shown(lambda evaluation: evaluation["classification"].update(energy="RAPL"))
    assert "is measured (RAPL)" in text and "modelled" not in text


def test_answers_withheld_are_told(shown):
    def change(evaluation):
        evaluation["classification"]["rows"][1]["abstained"] = 0.031

    assert "of those it answered, all but 3.1 %" in shown(change)[1]


def test_a_network_without_exits_has_a_page(shown):
    def change(evaluation):
        evaluation["model"]["exit_points"] = []
        evaluation["exits"], evaluation["parts"] = (
            evaluation["exits"][-1:],
            evaluation["parts"][-1:],
        )
        evaluation["policy"] = None
        of = evaluation["classification"]
        of |= {"chosen": None, "rows": [of["rows"][0] | {"exit_shares": [1]}], "curve": []}

    html, text = shown(change)
    assert "nothing can be said yet" in text and "oracle" not in text
    assert html.count("<svg ") == 2


@pytest.mark.parametrize("part", ["parts", "explorer"])
def test_a_lacking_part_is_named(shown, part):
    with pytest.raises(ValueError, match=f"lacks what the report needs.*{part}"):
        shown(lambda evaluation: evaluation.pop(part))


def test_points_stand_where_their_numbers_say(classifier_evaluation):
    of = classifier_evaluation["classification"]
    svg = plots.accuracy_against_cost(of["rows"], of["static"], of["curve"])
    root = ElementTree.fromstring(svg)
    texts = {"".join(e.itertext()).strip() for e in root.iter(f"{SVG}text")}
    assert {"full model", "ε 0.99", "ε 0.95", "small", "million multiply-adds"} <= texts
    lines = [g for g in root.iter(f"{SVG}g") if "-line2d_" in g.get("id", "")]
    marks = [u for g in lines for u in g.iter(f"{SVG}use") if "fill: var" in u.get("style")]
    data = [u for u in marks if any(f"--{c}" in u.get("style") for c in ("accent", "ink"))]
    at = np.array([(float(u.get("x")), float(u.get("y"))) for u in data])
    wanted = np.array([(5.0, 91.7), (4.0, 90.0), (12.0, 92.0)])
    for axis in (0, 1):
        slope, offset = np.polyfit(wanted[:, axis], at[:, axis], 1)
        np.testing.assert_allclose(slope * wanted[:, axis] + offset, at[:, axis], atol=1e-3)
        assert (slope > 0) == (axis == 0)  # SVG's y points down


def test_a_curve_that_falls_far_does_not_hide_the_rest(classifier_evaluation):
    of = classifier_evaluation["classification"]
    of["curve"].append({"accuracy": 0.1, "multiply_adds": 1e6})
    low = plots.accuracy_against_cost(of["rows"], of["static"], of["curve"])
    ticks = {"".join(e.itertext()).strip() for e in ElementTree.fromstring(low).iter(f"{SVG}text")}
    assert not ticks & {"20", "40", "60"}
