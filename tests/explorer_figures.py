"""Looking into answers or examples: what should be shown, by what decides in Python; what is."""

import numpy as np

from early_exit import policy as policies

WORDS = {"never": policies.NEVER, None: -np.inf}


def numbers(rows):
    return np.array([[WORDS.get(x, x) for x in row] for row in rows], np.float32)


def expected(found, answer, thresholds, first=1):
    """The figures of all from the first that may leave, by what decides in Python."""
    (limits,) = numbers([thresholds])
    scores, said = (numbers(answer[name])[:, first:] for name in ("scores", "said"))
    exits = policies.first_exit(scores[:-1], limits)
    return figures_of(found, answer, exits, said), exits


def figures_of(found, answer, exits, said, given=slice(None)):
    taken = said[exits, np.arange(len(exits))]
    equal, leavers = taken == said[-1], exits < len(said) - 1
    time = found["speed"]["fixed"] + found["speed"]["slope"] * np.take(found["costs"], exits).mean()
    figures = {
        "agreement": f"{equal.mean():.1%}",
        "leavers": f"{equal[leavers].mean():.1%}" if leavers.any() else "–",
        "speed": f"{1 / time:.2f}×",
    }
    depth = np.take(found["depths"], exits).mean()
    if "labels" not in answer:
        return figures | {"saved": f"{1 - depth / found['depths'][-1]:.1%}"}
    right = (taken == answer["labels"])[given].mean()
    return figures | {"depth": f"{depth:.2f}", "accuracy": f"{right:.1%}"}


def shown(window):
    """{name: text} of the figures that the page has."""
    return window.ask(
        "Object.fromEntries([...document.querySelectorAll('#explorer .figures dd')]"
        ".map(d => [d.id.slice(2), d.textContent.replace('\\u00a0', '')]))"
    )


def slide(window, by, step):
    window.ask(f"document.querySelector('#explorer [value={by}]').click()")
    window.ask(
        f"(s => {{ s.value = {step}; s.dispatchEvent(new Event('input')); }})"
        "(document.getElementById('x-slider'))"
    )
