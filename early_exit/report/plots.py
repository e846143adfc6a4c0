"""The report's plots, as SVG text to stand inside a page.

The one idea: a plot takes its colours and its font from the page around it, so it follows light
and dark with it. What is drawn in a stand-in colour becomes a CSS variable of the page.
"""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from early_exit.decoding.mode import DEFERRED, LOSSY
from early_exit.report import tokens

# Stand-in colour → the page's variable, and what to do without one.
_INK, _MUTED, _RULE, _ACCENT, _SOFT = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {
    _INK: "var(--ink, #1c2226)",
    _MUTED: "var(--muted, #5c666d)",
    _RULE: "var(--rule, #dfe3e6)",
    _ACCENT: "var(--accent, #1b6fa8)",
    _SOFT: "var(--soft, #8bd38f)",
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "early_exit",  # the same data gives the same bytes
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}
# A curve of more points is averaged down: nobody sees more, and the page stays small.
_CURVE_POINTS = 300
_EXIT_LOSS = r"loss/exit_(\d+)"
_BARS = {"agreement": "agreement", "coverage": "coverage at 95 %", "correct": "accuracy"}
# Curves side by side differ in line as well as in colour.
_LINES = (
    (_ACCENT, "-"),
    (_INK, "--"),
    (_MUTED, ":"),
    (_SOFT, "-"),
    (_ACCENT, "--"),
    (_INK, ":"),
    (_MUTED, "-"),
    (_SOFT, "--"),
)
_LABEL_WIDTH, _LETTER_WIDTH, _LABEL_HEIGHT = 55, 4.5, 12  # in points


def quality_against_speed(decoding: Sequence[dict[str, Any]]) -> str:
    """Share of tokens equal to the full model's against tokens a second; SVG.

    Args:
      decoding: rows with `policy`, `mode`, `tokens_per_second`, `agreement` (0 … 1) and `epsilon`;
        the first is the full model. Lossy rows are called by their policy, others by their mode,
        and by their policy, too, where several have it; a line joins those of an ε.
    """
    full, *others = decoding
    dynamic = {
        mode.name: [row for row in others if row["mode"] == mode.name] for mode in (LOSSY, DEFERRED)
    }
    checked = [full, *(row for row in others if row["mode"] not in dynamic)]

    def label(row):
        if row["mode"] not in dynamic:
            return row["mode"] or "full model"
        policy = row["policy"].replace("epsilon", "ε")
        if row["mode"] == LOSSY.name:
            return policy
        return f"{row['mode']}, {policy}" if len(dynamic[row["mode"]]) > 1 else row["mode"]

    def place(rows):
        return [r["tokens_per_second"] for r in rows], [100 * r["agreement"] for r in rows]

    def draw(axes: Axes):
        for rows, colour in zip(dynamic.values(), (_ACCENT, _INK), strict=True):
            of_epsilon = [row for row in rows if row["epsilon"] is not None]
            axes.plot(
                *place(sorted(of_epsilon, key=lambda row: row["epsilon"])),
                color=colour,
                linewidth=1.2,
            )
            axes.plot(*place(rows), color=colour, linestyle="none", marker="o", markersize=6)
        axes.axvline(full["tokens_per_second"], color=_MUTED, linewidth=0.8, dashes=(4, 3))
        axes.plot(*place(checked), linestyle="none", marker="D", markersize=7, color=_INK)
        drawn = [*checked, *itertools.chain(*dynamic.values())]
        labels = [label(row) for row in drawn]
        axes.margins(x=0.2, y=0.12)
        # Quality falls with speed: above and to the right of a point there is no line, but left of
        # the full model there may be its own point, and far to the right there is no room.
        speeds, shares = place(drawn)
        middle = (min(speeds) + max(speeds)) / 2
        on_left = [speed < speeds[0] or speed > middle for speed in speeds]
        _label(axes, speeds, shares, labels, on_left=on_left, rise=7)
        axes.set_xlabel("tokens a second")
        axes.set_ylabel("equal to the full model's, %")

    return _svg("speed", "quality against speed", draw)


def accuracy_against_cost(
    rows: Sequence[dict[str, Any]],
    static: Sequence[dict[str, Any]],
    curve: Sequence[dict[str, Any]],
) -> str:
    """A classifier's accuracy against its multiply-adds, beside networks without exits; SVG.

    Args:
      rows: with `policy`, `accuracy` and `multiply_adds`; the first is the full model.
      static: the same, of the networks without exits.
      curve: the same but for `policy`, of a policy's every level.
    """

    def cost(row):
        return row["multiply_adds"] / 1e6

    return _accuracy("cost", cost, "million multiply-adds", rows, static, curve)


def accuracy_against_latency(
    rows: Sequence[dict[str, Any]], static: Sequence[dict[str, Any]]
) -> str:
    """A classifier's accuracy against the mean time of one answer; SVG.

    Args:
      rows, static: as for `accuracy_against_cost`, with `latency`.
    """

    def latency(row):
        return row["latency"]["mean"]

    return _accuracy("latency", latency, "ms an answer, mean", rows, static, [])


def _accuracy(name, place, unit, rows, static, curve) -> str:
    full, *dynamic = rows
    curve = sorted(curve, key=place)
    static = sorted(static, key=place)

    def places(rows):
        return [place(row) for row in rows], [100 * row["accuracy"] for row in rows]

    def draw(axes: Axes):
        axes.plot(*places(curve), color=_ACCENT, linewidth=1.2)
        axes.plot(*places(dynamic), color=_ACCENT, linestyle="none", marker="o", markersize=6)
        axes.plot(
            *places(static), color=_MUTED, linewidth=0.8, dashes=(4, 3), marker="s", markersize=5
        )
        axes.plot(*places([full]), color=_INK, linestyle="none", marker="D", markersize=7)
        axes.margins(x=0.18, y=0.14)
        # The curve goes down to where everything leaves first, which is of no interest.
        pointed = [*dynamic, *static, full]
        lowest, highest = (f(100 * row["accuracy"] for row in pointed) for f in (min, max))
        room = max(0.25 * (highest - lowest), 0.1)
        axes.set_ylim(lowest - room, highest + room)
        names = [row["policy"].replace("epsilon", "ε") for row in pointed]
        _label(axes, *places(pointed), names, on_left=[False] * len(pointed), rise=-8)
        axes.set_xlim(left=0)
        axes.set_xlabel(unit)
        axes.set_ylabel("accuracy, %")

    return _svg(name, f"accuracy against {unit}", draw)


def quality_against_cost(
    curves: Mapping[str, Sequence[tuple[float, float]]], cost: str, quality: str
) -> str:
    """What methods make of their budgets, mean cost spent against quality; SVG.

    Args:
      curves: method → points (cost, quality in 0 … 1), at most eight methods.
      cost, quality: what the axes say.
    """

    def draw(axes: Axes):
        for (name, points), (colour, line) in zip(curves.items(), _LINES, strict=False):
            x, y = np.array(sorted(points)).T
            axes.plot(x, 100 * y, line, color=colour, marker="o", markersize=4, label=name)
        axes.set_xlabel(cost)
        axes.set_ylabel(f"{quality}, %")
        axes.legend(loc="lower right")

    return _svg("budget", "quality against cost", draw)


def target_against_achieved(curves: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """The risk that methods were asked to keep against the risk that came out; SVG.

    Args:
      curves: method → points (risk asked for, mean risk of its policies, the risk that most of them
        stay below), each in 0 … 1, at most four methods. The last is drawn as a line from the
        mean; below the diagonal, the promise is kept.
    """

    def draw(axes: Axes):
        most = 100 * max(asked for points in curves.values() for asked, *_ in points)
        axes.plot([0, most], [0, most], color=_MUTED, linewidth=0.8, dashes=(4, 3))
        for (name, points), (colour, line) in zip(curves.items(), _LINES, strict=False):
            asked, mean, high = 100 * np.array(sorted(points)).T
            axes.plot(asked, mean, line, color=colour, marker="o", markersize=4, label=name)
            axes.vlines(asked, mean, high, color=colour, linewidth=1.2)
        axes.set_xlabel("risk asked for, %")
        axes.set_ylabel("risk that came out, %")
        axes.legend(loc="upper left")

    return _svg("achieved", "target against achieved", draw)


def risk_against_coverage(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Share of wrong answers against the share of positions answered; SVG.

    Args:
      curves: name → (coverage [K], risk [K]), both in 0 … 1.
    """

    def draw(axes: Axes):
        for (name, curve), (colour, line) in zip(
            curves.items(), itertools.cycle(_LINES), strict=False
        ):
            x, y = 100 * _thinned(np.column_stack(curve))
            axes.plot(x, y, line, color=colour, label=name)
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("answered, %")
        axes.set_ylabel("wrong among them, %")
        axes.legend(loc="upper left")

    return _svg("rejection", "risk against coverage", draw)


def exit_bars(
    exits: Sequence[dict[str, Any]], shown: Sequence[str] = ("agreement", "coverage")
) -> str:
    """Two figures of every early exit, side by side; SVG.

    Args:
      exits: rows with `exit` and what is `shown` (0 … 1), the final exit's last.
      shown: two of `agreement`, `coverage` and `correct`.
    """
    early = exits[:-1]

    def draw(axes: Axes):
        middles = np.arange(len(early))
        width = 0.36
        for name, shift, colour in zip(shown, (-1, 1), (_ACCENT, _SOFT), strict=True):
            values = [100 * row[name] for row in early]
            bars = axes.bar(
                middles + shift * width / 2, values, width * 0.94, color=colour, label=_BARS[name]
            )
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
        axes.set_xticks(middles, [f"block {row['exit']}" for row in early])
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, 100)
        axes.set_ylabel("% of examples" if "correct" in shown else "% of positions")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0)

    described = " and ".join(_BARS[name].removesuffix(" at 95 %") for name in shown)
    return _svg("exits", f"{described} of each exit", draw)


def training_curves(lines: Sequence[dict[str, Any]], exit_depths: Sequence[int]) -> str | None:
    """Training loss of every exit by step; SVG, or None where no line has any.

    Args:
      lines: of `metrics.jsonl`. Those of the training steps have `loss` and, for every exit that
        took part in the step, `loss/exit_<point>`, None where it was not finite. Validation lines
        are left out.
    """
    steps = [line for line in lines if "loss" in line]
    curves: dict[int, list[tuple[float, float]]] = {}
    for line in steps:
        for name, value in line.items():
            if value is not None and (match := re.fullmatch(_EXIT_LOSS, name)):
                curves.setdefault(int(match[1]), []).append((line["step"], value))
    points = sorted(curves)
    if not points:
        return None

    def draw(axes: Axes):
        ends = []
        for point in points:
            x, y = _thinned(np.array(curves[point], float))
            colour = tokens.hex_colour(tokens.background(point, exit_depths))
            axes.plot(x, y, color=colour, linewidth=1.8)
            ends.append((x[-1], y[-1]))
        axes.margins(x=0.02)
        axes.set_xlim(right=axes.get_xlim()[1] * 1.12)
        axes.set_ylim(bottom=0)
        labels = [f"block {point}" for point in points]
        _label(axes, *zip(*ends, strict=True), labels, on_left=[False] * len(points))
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats")

    return _svg("training", "training loss of each exit by step", draw)


def _thinned(curve: np.ndarray) -> np.ndarray:
    """A curve [N, 2] as at most `_CURVE_POINTS` means of neighbours: [2, n]."""
    parts = np.array_split(curve, min(len(curve), _CURVE_POINTS))
    return np.stack([part.mean(axis=0) for part in parts], axis=1)


def _label(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    labels: Sequence[str],
    on_left: Sequence[bool],
    rise: float = 0,
) -> None:
    """Writes labels beside their points and `rise` points up, apart from one another.

    The axes must have their final limits.
    """
    axes.figure.draw_without_rendering()  # settles the places
    at = axes.transData.transform(np.column_stack([x, y])) * 72 / axes.figure.dpi
    heights = at[:, 1] + rise
    widths = np.array([max(_LABEL_WIDTH, _LETTER_WIDTH * len(label)) for label in labels])
    left = at[:, 0] - np.where(on_left, widths, 0)
    near = (left[:, None] < (left + widths)[None, :]) & (left[None, :] < (left + widths)[:, None])
    # Neighbours too close to each other move apart, by as little as it takes.
    order = np.argsort(heights, kind="stable")
    for _ in range(100):
        for low, high in itertools.combinations(order, 2):
            overlap = _LABEL_HEIGHT - (heights[high] - heights[low])
            if near[low, high] and overlap > 0:
                heights[[low, high]] += -overlap / 2, overlap / 2
    for i, label in enumerate(labels):
        axes.annotate(
            label,
            (x[i], y[i]),
            xytext=(-8 if on_left[i] else 8, heights[i] - at[i, 1]),
            textcoords="offset points",
            ha="right" if on_left[i] else "left",
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def _svg(name: str, described: str, draw: Callable[[Axes], None]) -> str:
    """Draws on new axes; ids get the plot's name in front, to be unique within a page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    # What a file needs and an element of a page does not: prologue, size, metadata, font.
    start, end = file.getvalue().split("<svg", 1)[1].split(">", 1)
    start = re.sub(r' (width|height)="[^"]*"', "", start)
    end = re.sub(r"<metadata>.*?</metadata>\s*", "", end, flags=re.DOTALL)
    end = re.sub(r"font-family: [^;\"]*;? ?", "", end)
    end = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{name}-", end)
    for colour, variable in _VARIABLES.items():
        end = end.replace(colour, variable)
    return f'<svg role="img" aria-label="{described}"{start}>{end.strip()}'
