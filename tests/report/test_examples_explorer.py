"""Looking into a classifier's examples in a browser: they lie as they leave, and figures follow."""

import json

import browser
import numpy as np
import pytest
from explorer_figures import expected, figures_of, numbers, shown, slide

from early_exit.evaluation import shown as pictures
from early_exit.report import page

pytestmark = browser.needed

COUNT, CLASSES, DEPTHS = 120, 4, [2, 4, 6]


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def looked_into(pieces, **changes):
    """As `explore.examples` gives it, with scores as coarse as to be often equal."""
    rng = np.random.default_rng(0)
    count = len(pieces)
    labels = rng.integers(0, CLASSES, count)
    right = rng.random((3, count)) < [[0.6], [0.75], [0.9]]
    said = np.where(right, labels, rng.integers(0, CLASSES, (3, count)))
    scores = rng.integers(0, 20, (3, count)) / 20
    ladder = [*np.sort(rng.integers(0, 20, (4, 2)) / 20, axis=0).tolist(), ["never"] * 2]
    return {
        "confidence": "margin",
        "depths": DEPTHS,
        "costs": [0.3, 0.7, 1.0],
        "epsilons": [0.5, 0.8, 0.95, 0.995, 1.0],
        "thresholds": ladder,
        "policy": [0.75, "never"],
        "reject": None,
        "speed": {"fixed": 0.1, "slope": 0.9, "points": 2},
        "words": {str(i): f"kind {i}" for i in range(CLASSES)},
        "pictures": str(pieces[0]).startswith("data:"),
        "answers": [
            {
                "pieces": list(pieces),
                "labels": labels.tolist(),
                "said": said.tolist(),
                "scores": [[x or None for x in row] for row in scores.tolist()],
                "exits": np.where(scores[0] >= 0.75, 0, 2).tolist(),
            }
        ],
        **changes,
    }


def texts(count=COUNT):
    return [f"text number {i} of a few words" for i in range(count)]


def images(count=COUNT):
    drawn = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)
    return list(pictures.pieces(({"image": image} for image in drawn), 10**6))


@pytest.fixture
def report(classifier_evaluation, tmp_path):
    """Writes the page of what is looked into; its path."""

    def write(found):
        classifier_evaluation["explorer"] = found
        (tmp_path / "evaluation.json").write_text(json.dumps(classifier_evaluation))
        return page.write(tmp_path)

    return write


def groups_shown(window):
    """[(heading, numbers of the examples, in their order)] of the exits at which any left."""
    found = window.ask(
        "[...document.querySelectorAll('#x-list [role=group]')].map(g => "
        "[g.querySelector('h3').textContent.replaceAll('\\u00a0', ' '), "
        "[...g.querySelectorAll('[role=option]')].map(o => Number(o.id.slice(7)))])"
    )
    return [tuple(group) for group in found]


def groups_of(answer, exits):
    scores, said = numbers(answer["scores"]), np.array(answer["said"])
    for e, depth in enumerate(DEPTHS):
        those = np.flatnonzero(exits == e)
        if not those.size:
            continue
        right, equal = (
            said[e, those] == x for x in (np.array(answer["labels"])[those], said[-1, those])
        )
        heading = (
            f"block {depth} {those.size} {right.mean():.1%} right, {equal.mean():.1%} equal to full"
        )
        yield (
            heading.replace("%", " %"),
            those[np.argsort(-scores[e, those], kind="stable")].tolist(),
        )


@pytest.mark.parametrize("pieces", [texts, images])
def test_the_slider_moves_examples_to_where_python_says(window, report, pieces):
    found = looked_into(pieces())
    window.show(report(found))
    (answer,) = found["answers"]
    said = np.array(answer["said"])
    exits = np.array(answer["exits"])  # of the policy, as they were recorded
    assert groups_shown(window) == list(groups_of(answer, exits))
    assert shown(window) == figures_of(found, answer, exits, said)
    seen = set()
    for step, thresholds in enumerate(found["thresholds"]):
        slide(window, "epsilon", step)
        figures, exits = expected(found, answer, thresholds, first=0)
        assert shown(window) == figures
        assert groups_shown(window) == list(groups_of(answer, exits))
        seen.add(tuple(figures.values()))
    assert len(seen) == 5
    assert window.ask("document.getElementById('x-value').textContent") == "1.00"
    slide(window, "epsilon", 3)
    assert window.ask("document.getElementById('x-value').textContent") == "0.995"
    scores = numbers(answer["scores"])[:-1]
    low, high = scores[np.isfinite(scores)].min(), scores.max()
    for step in (0, 77, 200, 201):
        limit = "never" if step == 201 else float(low) + float(high - low) * step / 200
        slide(window, "threshold", step)
        figures, exits = expected(found, answer, [limit] * 2, first=0)
        assert shown(window) == figures
        assert groups_shown(window) == list(groups_of(answer, exits))
    assert not window.said


def test_what_the_policy_withholds_is_not_judged(window, report):
    found = looked_into(texts(), reject=0.5)
    window.show(report(found))
    (answer,) = found["answers"]
    exits, said = np.array(answer["exits"]), np.array(answer["said"])
    held = (exits == 2) & (numbers(answer["scores"])[2] < 0.5)
    assert 0 < held.sum() < len(held)
    assert shown(window) == figures_of(found, answer, exits, said, given=~held)
    window.point(f"#x-item-{np.flatnonzero(held)[0]}")
    detail = "document.getElementById('x-detail').textContent"
    assert "the answer is withheld" in window.ask(detail)
    slide(window, "epsilon", 4)  # thresholds alone withhold nothing
    assert shown(window) == expected(found, answer, ["never"] * 2, first=0)[0]
    assert "withheld" not in window.ask(detail)


def test_keys_and_pointer_go_through_them_in_their_order(window, report):
    found = looked_into(images())
    window.show(report(found))
    (answer,) = found["answers"]
    slide(window, "epsilon", 1)
    order = [i for _, those in groups_shown(window) for i in those]
    chosen = "document.getElementById('x-list').getAttribute('aria-activedescendant')"
    window.ask("document.getElementById('x-list').focus()")
    for key, at in [
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("End", -1),
        ("ArrowLeft", -2),
    ]:
        window.press(key)
        assert window.ask(chosen) == f"x-item-{order[at]}"
        rows = window.ask(
            "[...document.querySelectorAll('#x-detail tbody tr')]"
            ".map(r => [...r.children].map(c => c.textContent))"
        )
        for e, (depth, said, score, *_) in enumerate(rows):
            of = answer["said"][e][order[at]]
            differs = of != answer["said"][-1][order[at]]
            assert depth == str(DEPTHS[e])
            assert said == f"kind {of}" + ("  ≠" if differs else "")
            kept = answer["scores"][e][order[at]]
            assert score == ("–" if kept is None else f"{kept:.3f}")
        assert [row[-1] for row in rows].count("leaves here") == 1
    window.press("Home")
    window.press("ArrowDown")
    below = int(window.ask(chosen).rpartition("-")[2])
    assert order.index(below) > 3  # a line further down, not the next
    window.press("ArrowUp")
    assert window.ask(chosen) == f"x-item-{order[0]}"
    window.point(f"#x-item-{order[7]}")
    assert window.ask(chosen) == f"x-item-{order[7]}"
    slide(window, "epsilon", 2)  # the one that is looked at stays so, wherever it goes
    assert window.ask(chosen) == f"x-item-{order[7]}"
    assert window.ask("document.querySelector('#x-list .at').id") == f"x-item-{order[7]}"


@pytest.mark.parametrize("pieces", [texts, images])
def test_a_screen_reader_is_told(window, report, pieces):
    found = looked_into(pieces())
    window.show(report(found))
    slide(window, "epsilon", 0)
    (answer,) = found["answers"]
    _, exits = expected(found, answer, found["thresholds"][0], first=0)
    for i, e in enumerate(exits.tolist()):
        said, label = [row[i] for row in answer["said"]], answer["labels"][i]
        told = f"kind {label}" + ("" if said[e] == label else f", said kind {said[e]}")
        told += f", block {DEPTHS[e]}"
        told += ", differs from the full model" if said[e] != said[-1] else ""
        prefix = "" if found["pictures"] else f"{answer['pieces'][i]}: "
        assert window.ask(f"document.getElementById('x-item-{i}').ariaLabel") == prefix + told


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("pieces", [texts, images])
def test_it_fits_a_phone_and_the_file_is_small(window, report, pieces, dark):
    path = report(looked_into(pieces(400)))
    assert path.stat().st_size < 2**20
    window.show(path, width=360, height=740, dark=dark)
    assert window.ask("document.documentElement.scrollWidth") <= 360
    for part, most in (("detail", 370), ("list", 420)):
        box = f"document.getElementById('x-{part}').getBoundingClientRect().height"
        assert window.ask(box) <= most


def test_pictures_are_drawn_and_texts_do_nothing(window, report):
    window.show(report(looked_into(images(20))))
    widths = "[...document.querySelectorAll('#x-list img')].map(i => i.naturalWidth)"
    assert window.ask(widths) == [8] * 20
    attack = "</script><img src=x onerror=document.title='broken'><!--"
    found = looked_into([attack] * 5, words={str(i): attack for i in range(CLASSES)})
    window.show(report(found))
    assert window.ask("document.querySelectorAll('#explorer img').length") == 0
    assert window.ask("document.title").startswith("Early exits of resnet")
    assert window.ask("document.querySelector('#x-item-0 span').textContent") == attack


def test_how_many_of_the_split_are_shown_is_said(window, report, classifier_evaluation):
    said = "document.querySelector('#explorer .note').textContent.replace(/\\s+/g, ' ')"
    window.show(report(looked_into(texts(40))))
    assert window.ask(said).startswith("The first 40 of the 10,000 examples of the test split")
    classifier_evaluation["data"]["count"] = 40
    window.show(report(looked_into(texts(40))))
    assert window.ask(said).startswith("All 40 examples of the test split")


def test_pictures_from_elsewhere_are_refused(report):
    found = looked_into(texts(5), pictures=True)
    found["answers"][0]["pieces"] = ["https://example.org/a.png"] * 5
    with pytest.raises(ValueError, match="is not one that stands in the page"):
        report(found)
