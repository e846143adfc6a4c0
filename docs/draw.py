"""Draws the pictures of the pages, from a small model's real decodes and records.

    python -m docs.draw           # into docs/pictures

The one idea: a picture has no colours of its own. They are variables of the page around it, so it
follows light and dark with it.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

import early_exit as ee
from early_exit.data.sources import documents
from early_exit.decoding.generate import Decoder
from early_exit.decoding.mode import DEFERRED
from early_exit.decoding.state import DecodeState

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests/fixtures/tiny_chat"
INK, MUTED, RULE = "var(--ink, #1c2226)", "var(--muted, #5c666d)", "var(--rule, #dfe3e6)"
ACCENT, SOFT = "var(--accent, #1b6fa8)", "var(--soft, #8bd38f)"
CELL, GAP = 22, 3
PENDING = 4  # positions that may wait in the picture of the deferral table


@dataclasses.dataclass
class Picture:
    """What has been drawn so far, and how large it is."""

    says: str
    width: float
    height: float
    parts: list[str] = dataclasses.field(default_factory=list)

    def box(self, x: float, y: float, kind: str, width: float = CELL, height: float = CELL) -> None:
        """A cell; its `kind` is one of `KINDS`."""
        style = " ".join(f'{name}="{value}"' for name, value in KINDS[kind].items())
        size = f'width="{width:g}" height="{height:g}" rx="3"'
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" {size} {style}/>')

    def words(
        self, x: float, y: float, text: str, anchor: str = "middle", colour: str = MUTED, size=12
    ) -> None:
        how = f'text-anchor="{anchor}" fill="{colour}" font-size="{size}"'
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {how}>{text}</text>')

    def line(self, points: Iterable[tuple[float, float]], colour: str, dashed=False) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
        )

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} '
            f'{self.height:g}" width="{self.width:g}" role="img" aria-label="{self.says}">'
        )
        return "\n".join([head, *self.parts, "</svg>", ""])


KINDS = {
    "run": {"fill": SOFT},
    "now": {"fill": ACCENT},
    "waits": {"fill": "none", "stroke": ACCENT, "stroke-width": 1.5, "stroke-dasharray": "3 3"},
    "skipped": {"fill": "none", "stroke": RULE, "stroke-width": 1.5},
    "projected": {"fill": SOFT, "fill-opacity": 0.25, "stroke": SOFT, "stroke-width": 1.5},
    "checked": {"fill": ACCENT, "stroke": INK, "stroke-width": 2},
}


def at(column: float, row: float, rows: int, left=0.0, top=0.0) -> tuple[float, float]:
    """The corner of a cell; row 0 is at the bottom."""
    return left + column * (CELL + GAP), top + (rows - 1 - row) * (CELL + GAP)


def depth(depths: Sequence[int], points: Sequence[int], blocks: int) -> Picture:
    """Tokens × blocks: what was run."""
    left, top = 96, 8
    width, height = left + len(depths) * (CELL + GAP) + 8, top + blocks * (CELL + GAP) + 26
    picture = Picture("Tokens leave after different numbers of blocks", width, height)
    for column, deepest in enumerate(depths):
        for row in range(blocks):
            kind = "skipped" if row >= deepest else "now" if row + 1 == deepest else "run"
            picture.box(*at(column, row, blocks, left, top), kind)
    for row in range(blocks):
        _, y = at(0, row, blocks, left, top)
        where = " → exit" if row + 1 in points else ""
        picture.words(left - 10, y + 15, f"block {row + 1}{where}", "end")
    picture.words(left, height - 8, "tokens of the answer, one after the other →", "start")
    return picture


def threshold(records: ee.Records, exit_index: int) -> Picture:
    """Agreement and coverage of one exit at each threshold."""
    scores, agrees = records.scores["max_prob"][exit_index], records.agrees[exit_index]
    levels = np.linspace(0, np.quantile(scores, 0.98), 60)
    covered = np.array([(scores >= level).mean() for level in levels])
    agreed = np.array([agrees[scores >= level].mean() for level in levels])
    left, top, width, height = 56, 12, 400, 180
    picture = Picture("Agreement rises and coverage falls with the threshold", 560, 244)

    def place(xs: Iterable[float], ys: Iterable[float]) -> list[tuple[float, float]]:
        both = zip(xs, ys, strict=True)
        return [(left + x / levels[-1] * width, top + (1 - y) * height) for x, y in both]

    for share in (0, 0.25, 0.5, 0.75, 1):
        (start, end) = place([0, levels[-1]], [share, share])
        picture.line([start, end], RULE)
        picture.words(left - 8, start[1] + 4, f"{share:.0%}", "end")
    for name, values, colour, dashed in (
        ("leave here", covered, MUTED, True),
        ("of these agree", agreed, ACCENT, False),
    ):
        points = place(levels, values)
        picture.line(points, colour, dashed)
        picture.words(points[-1][0] + 8, points[-1][1] + 4, name, "start", colour)
    for level in (0, levels[-1] / 2, levels[-1]):
        picture.words(place([level], [0])[0][0], top + height + 20, f"{level:.2f}")
    picture.words(left + width / 2, top + height + 42, "threshold of the confidence")
    return picture


def modes() -> Picture:
    """Three tokens, of which the second leaves early, in each mode."""
    panels = {
        "lossy": ("run projected run", "its rows are projected"),
        "deferred": ("run now now", "run later, in one pass"),
        "verified": ("run checked checked", "and checked by the full model"),
    }
    picture = Picture("What becomes of skipped blocks in each mode", 620, 150)
    for i, (name, (upper, says)) in enumerate(panels.items()):
        left = 40 + i * 200
        for column, kind in enumerate(upper.split()):
            picture.box(*at(column * 1.6, 0, 3, left, 28), "run", CELL * 1.4)
            for row in (1, 2):
                picture.box(*at(column * 1.6, row, 3, left, 28), kind, CELL * 1.4)
        picture.words(left + 56, 18, name, colour=INK, size=14)
        picture.words(left + 56, 122, says)
    picture.words(310, 144, "lowest row: blocks before the exit; above: the blocks that it skips")
    return picture


def trace(decoder: Decoder, prompt: Sequence[int], new: int) -> list[tuple[np.ndarray, int]]:
    """(filled [E + 1], newest) of a row after its prompt, and after every step."""
    state = decoder.start([list(prompt)], [new], jax.random.key(0), None)
    found = [_of(state)]
    while not bool(state.finished_B.all()):
        state = decoder.run(state, steps=1)
        found.append(_of(state))
    return found


def _of(state: DecodeState) -> tuple[np.ndarray, int]:
    return np.array(state.filled_BE[0]), int(state.newest_B[0])


def deferral(found: Sequence[tuple[np.ndarray, int]], prompt: int) -> Picture:
    """The table `filled` after each step: positions × segments."""
    segments, last = len(found[0][0]), found[-1][1]
    columns = last - prompt + 1
    wide, high = columns * (CELL + GAP) + 40, segments * (CELL + GAP) + 40
    across = 2
    rows = -(-(len(found) - 1) // across)
    picture = Picture("The deferral table, step by step", across * wide, rows * high)
    for step, ((before, _), (after, newest)) in enumerate(zip(found, found[1:], strict=False)):
        left, top = step % across * wide + 20, step // across * high + 24
        picture.words(left, top - 8, f"step {step + 1}", "start", INK)
        for column in range(columns):
            position = prompt + column
            for segment in range(segments):
                kind = "skipped"
                if position < after[segment]:
                    kind = "now" if position >= before[segment] else "run"
                elif position < newest:
                    kind = "waits"
                picture.box(*at(column, segment, segments, left, top), kind)
    return picture


def model() -> tuple[ee.Model, ee.Records]:
    """A small model whose exits know something, and what they say of other text."""
    texts = [text for _, text in documents("stdlib", "validation")][:40]
    tuned = ee.attach(ee.load(MODEL), ee.ExitConfig((2, 4), head="mlp"))
    how = {"batch_size": 4, "sequence_length": 64}
    tuned = ee.tune(tuned, texts[:30], steps=60, learning_rate=3e-3, progress=False, **how)
    records = ee.record(tuned, texts[30:], batches=8, **how)
    middle = [float(np.median(row)) for row in records.scores["max_prob"][:-1]]
    return dataclasses.replace(tuned, policy=ee.make_policy(middle)), records


def main(folder: Path) -> None:
    leaving, records = model()
    prompt = leaving.tokenizer.encode("def square(x):\n    return")
    answer = ee.generate(leaving, [prompt], max_new_tokens=16)[0]
    mode = dataclasses.replace(DEFERRED, pending=PENDING)
    decoder = Decoder(leaving.static, leaving.params, leaving.policy, (), mode)
    pictures = {
        "depth": depth(answer.depths[1:].tolist(), leaving.points, leaving.depth),
        "threshold": threshold(records, 0),
        "modes": modes(),
        "deferral": deferral(trace(decoder, prompt, 10), len(prompt)),
    }
    for name, picture in pictures.items():
        (folder / f"{name}.svg").write_text(picture.svg(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/pictures")
