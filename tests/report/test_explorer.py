"""Looking into answers in a browser: what the figures are, and that keys and pointers move."""

import json

import browser
import numpy as np
import pytest
from explorer_figures import expected, shown, slide

from early_exit.report import page

pytestmark = browser.needed


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def long_answer(rng, count, exits):
    """An answer as `evaluation.explore` gives it, with scores as coarse as to be often equal."""
    scores = rng.integers(0, 20, (exits + 1, count)) / 20
    said = rng.integers(1, 4, (exits + 1, count))
    return {
        "prompt": "Write.",
        "pieces": [f" w{i}" for i in range(count)],
        "said": said.tolist(),
        "scores": [[x or None for x in row] for row in scores.tolist()],
        "exits": [exits] * count,
    }


@pytest.fixture
def report(write_run):
    """Writes the page of three exits and an answer of so many tokens; (path, explorer's data)."""

    def write(count=300):
        rng = np.random.default_rng(count)
        kept = {}

        def change(evaluation):
            found = evaluation["explorer"]
            found |= {
                "depths": [6, 18, 24, 30],
                "costs": [0.25, 0.65, 0.8, 1.0],
                "epsilons": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
                "thresholds": [
                    *np.sort(rng.integers(0, 20, (5, 3)) / 20, axis=0).tolist(),
                    ["never"] * 3,
                ],
                "policy": ["never", 0.8, None],
                "words": {str(i): f"said {i}" for i in range(1, 4)},
                "answers": [long_answer(rng, count, 3), long_answer(rng, 5, 3)],
            }
            kept.update(found)

        return page.write(write_run(change)), kept

    return write


def exits_shown(window):
    letters = (
        "[...document.querySelectorAll('#x-list span')].map(s => s.className.match(/x(\\d)/)[1])"
    )
    return list(map(int, window.ask(letters)))


def test_the_slider_moves_what_python_computes(window, report):
    path, found = report()
    window.show(path)
    answer = found["answers"][0]
    assert exits_shown(window) == answer["exits"]  # of the policy, as they were recorded
    seen = set()
    for step, thresholds in enumerate(found["thresholds"]):
        slide(window, "epsilon", step)
        figures, exits = expected(found, answer, thresholds)
        assert shown(window) == figures
        assert exits_shown(window) == [3, *exits.tolist()]
        value = window.ask("document.getElementById('x-value').textContent")
        assert value == f"{found['epsilons'][step]:.2f}"
        seen.add(tuple(figures.values()))
    assert len(seen) == 6
    scores = np.array([x for row in answer["scores"][:-1] for x in row if x])
    both = np.concatenate(
        [scores, [x for row in found["answers"][1]["scores"][:-1] for x in row if x]]
    )
    low, high = both.min(), both.max()
    for step in (0, 77, 200, 201):
        limit = "never" if step == 201 else low + (high - low) * step / 200
        slide(window, "threshold", step)
        figures, exits = expected(found, answer, [limit] * 3)
        assert exits_shown(window) == [3, *exits.tolist()] and shown(window) == figures
    assert not window.said


def test_moving_the_slider_leaves_the_policy(window, report):
    path, found = report()
    window.show(path)
    window.ask(
        "(s => { s.value = 0; s.dispatchEvent(new Event('input')); })"
        "(document.getElementById('x-slider'))"
    )
    figures, _ = expected(found, found["answers"][0], found["thresholds"][0])
    assert window.ask("document.querySelector('#explorer [value=epsilon]').checked")
    assert shown(window) == figures


def test_keys_and_pointer_show_what_every_exit_would_have_said(window, report):
    path, found = report()
    window.show(path)
    answer, detail = found["answers"][0], "document.getElementById('x-detail').textContent"
    assert "prompt's pass" in window.ask(detail)
    window.ask("document.getElementById('x-list').focus()")
    for key, at in [("ArrowRight", 1), ("ArrowRight", 2), ("End", 299), ("ArrowLeft", 298)]:
        window.press(key)
        chosen = window.ask(
            "document.getElementById('x-list').getAttribute('aria-activedescendant')"
        )
        assert chosen == f"x-item-{at}"
        rows = window.ask(
            "[...document.querySelectorAll('#x-detail tbody tr')]"
            ".map(r => [...r.children].map(c => c.textContent))"
        )
        for e, (depth, said, score, *_) in enumerate(rows):
            differs = answer["said"][e][at] != answer["said"][-1][at]
            assert depth == str(found["depths"][e])
            assert said == f"said␣{answer['said'][e][at]}" + ("  ≠" if differs else "")
            kept = answer["scores"][e][at]
            assert score == ("–" if kept is None else f"{kept:.3f}")
        assert [row[-1] for row in rows].count("leaves here") == 1
    window.press("ArrowUp")
    above = int(window.ask("document.querySelector('#x-list .at').id").rpartition("-")[2])
    assert 0 < above < 298
    window.press("ArrowDown")
    assert window.ask("document.querySelector('#x-list .at').id") == "x-item-298"
    window.point("#x-item-7")
    assert window.ask("document.querySelector('#x-list .at').id") == "x-item-7"
    assert "w7" in window.ask(detail)


def test_a_screen_reader_is_told(window, report):
    path, found = report()
    window.show(path)
    slide(window, "epsilon", 0)
    _, exits = expected(found, found["answers"][0], found["thresholds"][0])
    labels = window.ask(
        "[...document.querySelectorAll('#x-list [role=option]')].map(s => s.ariaLabel)"
    )
    for i, e in enumerate(exits.tolist(), start=1):
        said = [row[i] for row in found["answers"][0]["said"]]
        differs = ", differs from the full model" if said[e] != said[-1] else ""
        assert labels[i] == f"␣w{i}, block {found['depths'][e]}{differs}"
    assert window.ask("document.getElementById('x-slider').ariaValueText") == "ε 0.50"


def test_another_answer_can_be_chosen(window, report):
    path, found = report()
    window.show(path)
    slide(window, "epsilon", 1)
    window.ask(
        "(s => { s.value = 1; s.dispatchEvent(new Event('change')); })"
        "(document.getElementById('x-answer'))"
    )
    figures, exits = expected(found, found["answers"][1], found["thresholds"][1])
    assert exits_shown(window) == [3, *exits.tolist()] and shown(window) == figures


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_the_file_is_small(window, report, dark):
    path, _ = report()
    assert path.stat().st_size < 2**20
    window.show(path, width=360, height=740, dark=dark)
    assert window.ask("document.documentElement.scrollWidth") <= 360
    assert window.ask("document.getElementById('x-detail').getBoundingClientRect().height") <= 370
    # Light letters in the dark.
    (r, g, b) = json.loads(
        window.ask(
            "'[' + getComputedStyle(document.getElementById('x-saved')).color.match(/\\d+/g) + ']'"
        )
    )
    assert (r + g + b > 384) == dark


def test_text_cannot_become_markup(window, write_run):
    attack = "</script><img src=x onerror=document.title='broken'><!--"

    def change(evaluation):
        evaluation["explorer"]["words"] |= {"1": attack, "2": attack}
        evaluation["explorer"]["answers"][0] |= {"prompt": attack, "pieces": [attack] * 5}

    window.show(page.write(write_run(change)))
    assert window.ask("document.querySelectorAll('#explorer img').length") == 0
    assert window.ask("document.title") == "Early exits of tiny==1.0"
    assert window.ask("document.querySelector('#x-item-0').textContent") == attack
