"""Examples as pages show them: a text cut short, or a picture of few pixels.

The one idea: what a page shows stands in the page, so it is made small here, where it is known what
it is made of.
"""

import base64
import io
from collections.abc import Iterable, Iterator

import numpy as np

from early_exit.data.parts import Example
from early_exit.storage import extras

_TEXT, _PIXELS = 300, 96
# Of what can be looked into, there are many.
_SHORT_TEXT, _FEW_PIXELS = 160, 64


def cut(text: str, length: int = _TEXT) -> str:
    """A text's first words, at most so many letters, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length].rsplit(' ', 1)[0]} …"


def png(image: np.ndarray) -> str:
    """A picture of uint8 [H, W, C], in base64."""
    return base64.b64encode(_written(image, _PIXELS, "png")).decode()


def pieces(examples: Iterable[Example], bytes_in_all: int, beside: int = 0) -> Iterator[str]:
    """Each example as it is looked into: a text, or a picture's `data:` address.

    Ends before there is more than so much of them.

    Args:
      beside: bytes that go with each.
    """
    for example in examples:
        piece = _piece(example)
        bytes_in_all -= len(piece.encode()) + beside
        if bytes_in_all < 0:
            return
        yield piece


def _piece(example: Example) -> str:
    if "text" in example:
        return cut(example["text"], _SHORT_TEXT)
    # Drawings are shorter without losses, and photographs with some.
    written = {kind: _written(example["image"], _FEW_PIXELS, kind) for kind in ("png", "jpeg")}
    kind = min(written, key=lambda kind: len(written[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(written[kind]).decode()}"


def _written(image: np.ndarray, pixels: int, kind: str) -> bytes:
    with extras.needed("images"):
        from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((pixels, pixels))
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()
