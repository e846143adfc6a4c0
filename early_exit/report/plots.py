"""The report's plots, as SVG text to stand inside a page.

The one idea: a plot takes its colours and its font from the page around it, so it follows light
and dark with it. What is drawn in a stand-in colour becomes a CSS variable of the page.
"""

import io
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
    "font.size": 9.5,
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
_LINE_HEIGHT = 12  # of a label, in points


def quality_against_speed(decoding: Sequence[dict[str, Any]]) -> str:
    """Share of tokens equal to the full model's against tokens a second; SVG.

    Args:
      decoding: rows with `tokens_per_second`, `agreement` (0 … 1) and `epsilon`, which is None
        for the full model.
    """
    dense = [row for row in decoding if row["epsilon"] is None]
    dynamic = sorted(
        (row for row in decoding if row["epsilon"] is not None), key=lambda row: row["epsilon"]
    )

    def place(rows):
        return [r["tokens_per_second"] for r in rows], [100 * r["agreement"] for r in rows]

    def draw(axes: Axes):
        axes.plot(*place(dynamic), color=_ACCENT, linewidth=1.2, marker="o", markersize=6)
        for speed in place(dense)[0]:
            axes.axvline(speed, color=_MUTED, linewidth=0.8, dashes=(4, 3))
        axes.plot(*place(dense), linestyle="none", marker="D", markersize=7, color=_INK)
        labels = ["full model"] * len(dense) + [f"ε {row['epsilon']:.2f}" for row in dynamic]
        axes.margins(x=0.18, y=0.12)
        _label(axes, *place([*dense, *dynamic]), labels)
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
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8.5)
        axes.set_xticks(middles, [f"block {row['exit']}" for row in early])
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, 100)
        axes.set_ylabel("% of positions")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0)

    return _svg("exits", "agreement and coverage of each exit", draw)


def training_curves(lines: Sequence[dict[str, Any]], full_depth: int) -> str | None:
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
            curve = [(line["step"], line[name]) for line in steps if line.get(name) is not None]
            x, y = _thinned(np.array(curve, float).reshape(-1, 2))
            colour = tokens.hex_colour(tokens.background(point, full_depth))
            axes.plot(x, y, color=colour, linewidth=1.8)
            ends.append((x[-1], y[-1]))
        _label(axes, *zip(*ends, strict=True), [f"block {point}" for point in points])
        axes.margins(x=0.02)
        axes.set_xlim(right=axes.get_xlim()[1] * 1.12)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats")

    return _svg("training", "training loss of each exit by step", draw)


_EXIT_LOSS = r"loss/exit_(\d+)"


def _thinned(curve: np.ndarray) -> np.ndarray:
    """A curve [N, 2] as at most `_CURVE_POINTS` means of neighbours: [2, n]."""
    parts = np.array_split(curve, min(len(curve), _CURVE_POINTS))
    return np.stack([part.mean(axis=0) for part in parts], axis=1)


def _label(axes: Axes, x: Sequence[float], y: Sequence[float], labels: Sequence[str]) -> None:
    """Writes labels to the right of their points, moved down where they would overlap."""
    axes.figure.draw_without_rendering()  # settles the limits
    to_points = 72 / axes.figure.dpi
    at = axes.transData.transform(np.column_stack([x, y])) * to_points
    placed: list[tuple[float, float]] = []
    for i in np.argsort(-at[:, 1], kind="stable"):
        height = at[i, 1]
        for left, taken in placed:
            if abs(left - at[i, 0]) < 60 and height > taken - _LINE_HEIGHT:
                height = taken - _LINE_HEIGHT
        placed.append((at[i, 0], height))
        axes.annotate(
            labels[i],
            (x[i], y[i]),
            xytext=(8, height - at[i, 1]),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
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
