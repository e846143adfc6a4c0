"""What the families of image classifiers share between their configs and transformers'.

The one idea: `config.json` says the same of classes, images and activations whatever the network.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from early_exit.backbones.image_parts import ImageConfig
from early_exit.pretrained.table import Entry

# transformers' names of the activations → ours; of several the first is written back.
ACTIVATIONS = {
    "relu6": "relu6",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}

_CLASSIFICATION = "ForImageClassification"


def check(
    hf: Mapping[str, Any],
    family: str,
    asked: Mapping[str, tuple[Any, Collection]],
    tasks: Collection[str] = ("Model", _CLASSIFICATION),
) -> None:
    """Raises ValueError naming all that a `config.json` asks for and the backbone does not do.

    Args:
      family: what the names of its classes in `transformers` begin with.
      asked: entry → (what it asks for, what is supported).
      tasks: what the names end with of those that are supported.
    """
    classes = [family + task for task in tasks]
    asked = {"architectures": (architecture(hf) or classes[0], classes)} | dict(asked)
    asked |= {"quantization_config": (hf.get("quantization_config"), [None])}
    problems = [
        f"{name} = {value!r} (supported: {', '.join(map(str, supported))})"
        for name, (value, supported) in asked.items()
        if value not in list(supported)
    ]
    if problems:
        raise ValueError(
            f"this {family} needs what the backbone does not do: {'; '.join(problems)}"
        )


def architecture(hf: Mapping[str, Any]) -> str | None:
    return (hf.get("architectures") or [None])[0]


def num_classes(hf: Mapping[str, Any], tasks: Collection[str] = (_CLASSIFICATION,)) -> int:
    """Of a checkpoint for classification; 0 for any other."""
    if not (architecture(hf) or "").endswith(tuple(tasks)):
        return 0
    # transformers leaves its default, two classes, out of the file.
    return len(hf.get("id2label") or ()) or hf.get("num_labels", 2)


def task_hf(config: ImageConfig, family: str, task: str = _CLASSIFICATION) -> dict[str, Any]:
    """The inverse of `num_classes`. The classes have no names of their own."""
    if not config.num_classes:
        return {"architectures": [f"{family}Model"]}
    labels = [f"LABEL_{i}" for i in range(config.num_classes)]
    return {
        "architectures": [family + task],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def new(kind: Callable[..., ImageConfig]) -> Callable[..., ImageConfig]:
    """For `NEW`: makes a config of settings, which have lists, and one number for both sides."""

    def make(**settings: Any) -> ImageConfig:
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        sides = ("image_size", "patch_size")
        return kind(**{k: pair(v) if k in sides else v for k, v in given.items()})

    return make


def pair(size: Any) -> tuple[int, ...]:
    """(H, W) of an entry that is one number for both, or two."""
    return (size, size) if isinstance(size, int) else tuple(size)


def side(size: tuple[int, ...]) -> int | list[int]:
    """The inverse of `pair`."""
    return size[0] if len(set(size)) == 1 else list(size)


def classifier(config: ImageConfig, theirs: str = "classifier") -> list[Entry]:
    """The last layer, where there is one."""
    if not config.num_classes:
        return []
    return [
        Entry(f"{theirs}.weight", ("output/embedding",)),
        Entry(f"{theirs}.bias", ("output/bias",)),
    ]
