"""The report's plots, as SVG text to stand inside a page.

The one idea: a plot takes its colours and its font from the page around it, so it follows light
and dark with it. What is drawn in a stand-in colour becomes a CSS variable of the page.
"""

import io
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
_LABEL_WIDTH, _LABEL_HEIGHT = 55, 12  # in points


def quality_against_speed(decoding: Sequence[dict[str, Any]]) -> str:
    """Share of tokens equal to the full model's against tokens a second; SVG.

    Args:
      decoding: rows with `policy`, `tokens_per_second`, `agreement` (0 … 1) and `epsilon`, which
        is None for the full model, the first such row, and for lossless decoding.
    """
    dense = [row for row in decoding if row["epsilon"] is None]
    dynamic = sorted(
        (row for row in decoding if row["epsilon"] is not None), key=lambda row: row["epsilon"]
    )

    def place(rows):
        return [r["tokens_per_second"] for r in rows], [100 * r["agreement"] for r in rows]

    def draw(axes: Axes):
        axes.plot(*place(dynamic), color=_ACCENT, linewidth=1.2, marker="o", markersize=6)
        for speed in place(dense)[0][:1]:
            axes.axvline(speed, color=_MUTED, linewidth=0.8, dashes=(4, 3))
        axes.plot(*place(dense), linestyle="none", marker="D", markersize=7, color=_INK)
        labels = [row["policy"] for row in dense] + [f"ε {row['epsilon']:.2f}" for row in dynamic]
        axes.margins(x=0.18, y=0.12)
        # Quality falls with speed: above and to the right of a point there is no line, but left of
        # the full model there may be its own point.
        speeds, shares = place([*dense, *dynamic])
        slower = [speed < speeds[0] for speed in speeds]
        _label(axes, speeds, shares, labels, on_left=slower, rise=7)
        axes.set_xlabel("tokens a second")
        axes.set_ylabel("equal to the full model's, %")

    return _svg("speed", "quality against speed", draw)


def exit_bars(exits: Sequence[dict[str, Any]]) -> str:
    """Agreement and coverage of every early exit, side by side; SVG.

    Args:
      exits: rows with `exit`, `agreement` and `coverage` (0 … 1), the final exit's last.
    """
    early = exits[:-1]

    def draw(axes: Axes):
        middles = np.arange(len(early))
        width = 0.36
        for name, shift, colour in (("agreement", -1, _ACCENT), ("coverage", 1, _SOFT)):
            values = [100 * row[name] for row in early]
            label = "coverage at 95 %" if name == "coverage" else name
            bars = axes.bar(
                middles + shift * width / 2, values, width * 0.94, color=colour, label=label
            )
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
        axes.set_xticks(middles, [f"block {row['exit']}" for row in early])
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, 100)
        axes.set_ylabel("% of positions")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0)

    return _svg("exits", "agreement and coverage of each exit", draw)


def training_curves(lines: Sequence[dict[str, Any]], exit_depths: Sequence[int]) -> str | None:
    """Training loss of every exit by step; SVG, or None where no line has any.

    Args:
      lines: of `metrics.jsonl`. Those of the training steps have `loss` and, for every exit,
        `loss/exit_<point>`; validation lines are left out.
    """
    steps = [line for line in lines if "loss" in line]
    points = sorted(
        {int(m[1]) for line in steps for name in line if (m := re.fullmatch(_EXIT_LOSS, name))}
    )
    if not points:
        return None

    def draw(axes: Axes):
        ends = []
        for point in points:
            name = f"loss/exit_{point}"
            x, y = _thinned(np.array([(line["step"], line[name]) for line in steps], float))
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
    starts = at[:, 0] + np.where(on_left, -_LABEL_WIDTH, 0)
    heights = at[:, 1] + rise
    near = np.abs(starts[:, None] - starts[None, :]) < _LABEL_WIDTH
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
