"""Programs as they were traced, kept beside the compiled ones: a second start traces none of them.

The one idea: JAX finds a compiled program again by its text, and making that text out of Python is
what takes the time. So the text is kept, too (`jax.export`), under a name of all that it follows
from: the function, what is static of it, the shapes, the versions, and this package's own sources.
Where somebody else's code has a part in it, the program is traced anew: nothing here would see that
code change.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.export

from early_exit.storage import files, programs

_PACKAGE = pathlib.Path(__file__).parents[1]
_on = False
_loaded: dict[Hashable, Callable[..., list]] = {}


def keep() -> None:
    """From now on, `call` keeps what it traces. Commands do this when they start.

    Where flatbuffers is missing, which `jax.export` writes with, programs are traced as ever.
    """
    global _on
    _on = importlib.util.find_spec("flatbuffers") is not None


def call(function: Callable, *args: Any, like: int, **static: Any) -> Any:
    """What `function(*args, **static)` returns; where programs are kept, by a kept one.

    Args:
      function: jitted, of this package, and named like no other one in its module.
      like: which argument the result has the structure of; it is donated.
      static: the function's static arguments, whose `repr` is all that they are.
    """
    if not _on:
        return function(*args, **static)
    leaves, tree = jax.tree.flatten(args)
    shapes = tuple(jax.api_util.shaped_abstractify(x) for x in leaves)
    key = function, tree, shapes, tuple(static.items())
    program = _loaded.get(key)
    if program is None:
        program = _loaded[key] = _program(function, args, tree, shapes, like, static)
    return jax.tree.unflatten(jax.tree.structure(args[like]), program(*leaves))


def is_ours(*parts: Any) -> bool:
    """Whether the classes of all of these are this package's own."""
    return all(type(part).__module__.startswith(f"{_PACKAGE.name}.") for part in parts)


def _program(function, args, tree, shapes, like: int, static: dict[str, Any]) -> Callable:
    path = programs.folder() / "traces" / _name(function, tree, shapes, static)
    before = len(jax.tree.leaves(args[:like]))
    donated = tuple(range(before, before + len(jax.tree.leaves(args[like]))))
    exported = _read(path)
    if exported is None:

        def flat(*leaves):
            out = function(*jax.tree.unflatten(tree, leaves), **static)
            return jax.tree.leaves(out)

        exported = jax.export.export(jax.jit(flat, donate_argnums=donated))(*shapes)
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as partial:
            partial.write_bytes(exported.serialize())
    return jax.jit(exported.call, donate_argnums=donated)


def _read(path: pathlib.Path) -> jax.export.Exported | None:
    """What is kept there; None where there is nothing, or nothing that can be read."""
    try:
        return jax.export.deserialize(bytearray(path.read_bytes()))
    except Exception:  # whatever a damaged file makes it raise, it is made anew
        return None


def _name(function, tree, shapes, static: dict[str, Any]) -> str:
    told = (
        f"{function.__module__}.{function.__name__}",
        str(tree),
        [(x.shape, str(x.dtype), x.weak_type) for x in shapes],
        sorted((name, repr(value)) for name, value in static.items()),
        jax.devices()[0].device_kind,
        os.environ.get("XLA_FLAGS", ""),
        [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")],
        [jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64],
        sources(),
    )
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


@functools.cache
def sources() -> str:
    """SHA-256 (hex) of this package's own sources."""
    found = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        found.update(str(path.relative_to(_PACKAGE)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()
