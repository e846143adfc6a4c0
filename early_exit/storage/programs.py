"""Where compiled programs are kept, so that only a first run on a machine pays for them.

The one idea: the folder's name says what its programs depend on, and JAX's own key does not. For
CPUs that is what the processor can do: a home that unlike machines share would otherwise serve
one of them instructions that only the other has.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Iterable

import jax

from early_exit.storage.packages import cache_folder

_PLACE = "JAX_COMPILATION_CACHE_DIR"  # of the environment; JAX's setting has it in small letters
_CPUINFO = pathlib.Path("/proc/cpuinfo")
# Of x86 and of ARM, as the kernel spells them; the others, such as the clock, change all the time.
_OF_A_KIND = {
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "flags",
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
    "Features",
}


def folder() -> pathlib.Path:
    """In `cache_folder()`, of these versions of JAX and this kind of processor."""
    versions = "-".join(f"{name}{importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    return cache_folder() / "xla" / f"{versions}-{_processor()}"


def keep(path: pathlib.Path | str | None = None) -> pathlib.Path:
    """From now on, JAX keeps what it compiles there, by default in `folder()`; returns where.

    So the next process on this machine need not compile it again. Without a path, the environment
    decides where it has a JAX_COMPILATION_CACHE_DIR. Commands do this when they start.

    Example:
      >>> ee.keep_programs()  # doctest: +SKIP
      PosixPath('/home/me/.cache/early_exit/xla/jax0.10.2-jaxlib0.10.2-5f0c3a9b1c2d')
    """
    if path is None and _PLACE in os.environ:
        return pathlib.Path(os.environ[_PLACE])
    place = folder() if path is None else pathlib.Path(path)
    jax.config.update(_PLACE.lower(), str(place))
    return place


def _processor() -> str:
    """Twelve digits that differ where processors do."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    described = [platform.machine(), platform.processor(), *sorted(set(_told(lines)))]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]


def _told(lines: Iterable[str]) -> Iterable[str]:
    """What tells one kind of processor from another; its features in whatever order."""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in _OF_A_KIND:
            yield f"{name.strip()}: {' '.join(sorted(value.split()))}"
