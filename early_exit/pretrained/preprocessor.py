"""How images were made ready for a network: its `preprocessor_config.json`, as settings of `data`.

The one idea: whatever a file asks for is a resize, a cut out of the middle, and one straight line
from a pixel to a number for each channel; or it is refused by name.
"""

from pathlib import Path
from typing import Any

from early_exit.settings.sections import RESAMPLE
from early_exit.storage import files

FILE = "preprocessor_config.json"
_CONVNEXT_WARPS = 384  # from here on, transformers' ConvNeXt cuts nothing off
_CLASSES = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")


def read(folder: Path) -> dict[str, Any] | None:
    """What is in a folder's file; None if there is no such file.

    Raises:
      ValueError: it is damaged.
    """
    path = folder / FILE
    return files.read_json(path) if path.exists() else None


def settings(said: dict[str, Any]) -> dict[str, Any]:
    """What it says, as settings: `mean`, `std` and, if images are resized, `image_size`, `resize`
    and `resample`.

    Raises:
      ValueError: it asks for what is not done (all is named), or has entries of a wrong kind.
    """
    try:
        return _settings(said)
    except ValueError as error:
        raise ValueError(f"the {FILE} of the weights cannot be used: {error}") from error
    except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"the {FILE} of the weights lacks an entry, or has one of a wrong kind: {error!r}"
        ) from error


def _settings(said: dict[str, Any]) -> dict[str, Any]:
    odd = ("do_pad", "do_flip_channel_order")
    refused = [f"{name} = {said[name]!r}" for name in odd if said.get(name)]
    kind = said.get("image_processor_type", said.get("feature_extractor_type", ""))
    for ending in _CLASSES:
        kind = kind.removesuffix(ending)
    resizes = _resized(said, kind, refused) if said.get("do_resize", True) else {}
    if refused:
        raise ValueError(f"it asks for {'; '.join(refused)}, which is not done here")
    return resizes | _line(said, kind)


def _line(said: dict[str, Any], kind: str) -> dict[str, Any]:
    """`mean` and `std`, where white is 1."""
    factor = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0
    shift = 1.0 if said.get("rescale_offset", False) else 0.0
    mean, std = [0.0] * 3, [1.0] * 3
    if said.get("do_normalize", True):
        mean, std = said["image_mean"], said["image_std"]
    if isinstance(mean, (int, float)):
        mean, std = [mean], [std]
    # EfficientNets for classification divide by the deviations a second time.
    twice = kind == "EfficientNet" and said.get("include_top", True)
    white = 255 * factor
    return {
        "mean": tuple((m + shift) / white for m in mean),
        "std": tuple(s**2 / white if twice else s / white for s in std),
    }


def _resized(said: dict[str, Any], kind: str, refused: list[str]) -> dict[str, Any]:
    """`image_size`, `resize` and `resample`; notes what is not done."""
    resample, size = said.get("resample", 2), said.get("size")
    if resample not in range(len(RESAMPLE)):
        refused.append(f"resample = {resample!r}")
    if isinstance(size, int):
        square = said.get("default_to_square", True)
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    cut = said.get("crop_size") if said.get("do_center_crop", False) else None
    cut = {"height": cut, "width": cut} if isinstance(cut, int) else cut
    image_size = (cut["height"], cut["width"]) if cut else ()
    found: dict[str, Any] = {"resize": (), "image_size": image_size}
    match sorted(size or {}):
        case ["height", "width"]:
            found["resize"] = (size["height"], size["width"])
            found["image_size"] = image_size or found["resize"]
        case ["shortest_edge"] if kind == "ConvNext":
            edge = size["shortest_edge"]
            whole = edge >= _CONVNEXT_WARPS
            share = said.get("crop_pct") or 224 / 256
            found["resize"] = (edge, edge) if whole else (int(edge / share),)
            found["image_size"] = (edge, edge)
        case ["shortest_edge"] if image_size:
            found["resize"] = (size["shortest_edge"],)
        case _:
            refused.append(f"size = {size!r}, crop_size = {cut!r}")
    return found | {"resample": RESAMPLE[resample] if not refused else ""}
