"""Text coloured by the depth each token needed, for a terminal and for a page.

The one idea: one colour scale, from light green (shallow) to dark blue (deep), whose lightness
falls steadily with depth, so the order survives grey printing and any kind of colour vision.
"""

import html
from collections.abc import Sequence

RGB = tuple[int, int, int]

# Shallowest to deepest, with lightness (CIE L*) falling by about 14 from stop to stop.
_STOPS: tuple[RGB, ...] = (
    (217, 237, 146),
    (139, 211, 143),
    (69, 175, 158),
    (27, 133, 168),
    (32, 91, 142),
    (24, 58, 104),
)
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
# Of tokens that no depth proposed: what stands for their depth, what they are called, whence they
# are, and a colour that nothing on the scale has (grey, and one warm and light).
LOOKED_UP, RECURRENT = 0, -1
_SOURCES: dict[int, tuple[str, str, RGB]] = {
    LOOKED_UP: ("looked up", "from earlier text", (122, 126, 130)),
    RECURRENT: ("recurrent", "from the recurrent exit", (244, 178, 102)),
}
_UNKNOWN = ("other", "from no exit of this model", (122, 126, 130))

# What would move a terminal's cursor, change its state or reverse its text → a visible stand-in.
_VISIBLE = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
    | dict.fromkeys([0x061C, 0x200E, 0x200F, 0x2028, 0x2029], 0xFFFD)
    | dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
)


def background(depth: int, exit_depths: Sequence[int]) -> RGB:
    """The colour of a token that left after `depth` blocks, one of the rising `exit_depths`.

    The exits share the scale evenly, wherever in the model they are: all can be told apart. What
    comes from none of them, as looked-up tokens do, has a colour of its own.
    """
    if depth not in exit_depths:
        return _SOURCES.get(depth, _UNKNOWN)[2]
    place = exit_depths.index(depth) / max(len(exit_depths) - 1, 1) * (len(_STOPS) - 1)
    stop = min(int(place), len(_STOPS) - 2)
    return tuple(
        round(a + (place - stop) * (b - a))
        for a, b in zip(_STOPS[stop], _STOPS[stop + 1], strict=True)
    )


def foreground(behind: RGB) -> RGB:
    """Black or white, whichever stands out more; the contrast is at least √21 ≈ 4.58."""
    # WCAG 2.2, relative luminance. Both contrasts are equal where (Y + 0.05)² = 1.05 · 0.05.
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in behind)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _BLACK if (luminance + 0.05) ** 2 > 1.05 * 0.05 else _WHITE


def hex_colour(colour: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def printable(text: str) -> str:
    """The text with control characters as visible pictures, except newlines and tabs."""
    return text.translate(_VISIBLE)


def ansi(pieces: Sequence[str], depths: Sequence[int], exit_depths: Sequence[int]) -> str:
    """The text for a terminal, on 24-bit backgrounds; portions may be printed one after another.

    Control characters of the text itself become visible pictures, except newlines and tabs.

    Args:
      depths: blocks run to propose each token; `LOOKED_UP` or `RECURRENT` for none.
      exit_depths: blocks run at each exit, the full model's last.
    """
    out = []
    for piece, depth in zip(pieces, depths, strict=True):
        behind = background(depth, exit_depths)
        on = "\x1b[38;2;{};{};{};48;2;{};{};{}m".format(*foreground(behind), *behind)
        # Coloured line by line: a background open at a newline would fill the next line's rest.
        lines = printable(piece).split("\n")
        out.append("\n".join(f"{on}{line}\x1b[0m" if line else "" for line in lines))
    return "".join(out)


def legend_ansi(exit_depths: Sequence[int], sources: Sequence[int] = ()) -> str:
    """One line that explains the colours, those of such `sources` as there may be among them."""
    names = [f" {depth} " for depth in exit_depths]
    line = f"blocks run: {ansi(names, exit_depths, exit_depths)}"
    others = [f" {ansi([f' {named(source)} '], [source], exit_depths)}" for source in sources]
    return line + "".join(others)


def named(source: int) -> str:
    """What tokens are called that no depth proposed."""
    return _SOURCES[source][0]


def html_spans(pieces: Sequence[str], depths: Sequence[int], exit_depths: Sequence[int]) -> str:
    """The text as HTML, a `<span>` per token; its place must have `white-space: pre-wrap`.

    Args:
      depths: blocks run to propose each token; `LOOKED_UP` or `RECURRENT` for none.
      exit_depths: blocks run at each exit, the full model's last.
    """
    out, full_depth = [], exit_depths[-1]
    for piece, depth in zip(pieces, depths, strict=True):
        behind = background(depth, exit_depths)
        title = f"exit after block {depth} of {full_depth}"
        if depth not in exit_depths:
            title = _SOURCES.get(depth, _UNKNOWN)[1]
        elif depth == full_depth:
            title = f"all {full_depth} blocks"
        colours = f"background:{hex_colour(behind)};color:{hex_colour(foreground(behind))}"
        out.append(
            f'<span title="{title}" style="{colours}">{html.escape(printable(piece))}</span>'
        )
    return "".join(out)
