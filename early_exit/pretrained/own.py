"""Networks of one's own as files: a family for each, made from what describes it.

The one idea: a network in Python is described by its code, so that its `config.json` holds no more
than its name and the sizes by which one notices that the code has changed since.
"""

from collections.abc import Collection
from typing import Any

from early_exit.backbones import base
from early_exit.backbones.own import OwnConfig
from early_exit.pretrained.table import Entry

_SIZES = ("depth", "width", "num_classes")


class OwnFamily:
    """The family of one network, for `families.register`."""

    PREFIXES: Collection[str] = ("",)
    IGNORED: Collection[str] = ()

    def __init__(self, network: OwnConfig):
        self.network = network
        self.MODEL_TYPES: Collection[str] = (network.name,)
        self.__name__ = f"of {network.name}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OwnFamily) and self.network == other.network

    def __hash__(self) -> int:
        return hash(self.network)

    def config(self, hf: dict[str, Any]) -> OwnConfig:
        """The network that was registered.

        Raises:
          ValueError: the file is of one with other sizes.
        """
        changed = [
            f"{name} = {hf[name]}, not {getattr(self.network, name)}"
            for name in _SIZES
            if hf.get(name, getattr(self.network, name)) != getattr(self.network, name)
        ]
        if changed:
            raise ValueError(
                f"this {self.network.name} was saved with {'; '.join(changed)}; register the "
                "network that it was"
            )
        return self.network

    def to_hf(self, config: base.BackboneConfig) -> dict[str, Any]:
        if config != self.network:
            raise ValueError(f"it is not the registered {self.network.name}")
        return {"model_type": config.name} | {name: getattr(config, name) for name in _SIZES}

    def entries(self, config: base.BackboneConfig) -> list[Entry]:
        """Every parameter, by its own name."""
        paths = [leaf.ours for leaf in self.network.plan.leaves]
        return [Entry(path.replace("/", "."), (path,)) for path in paths]
