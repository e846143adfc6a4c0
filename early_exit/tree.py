"""Parameter trees as flat path → leaf tables, and ordered regex rules over the paths.

The one idea: every room that treats parameters by name (sharding, freezing, fingerprints,
weight import) sees the same slash-joined path, such as `backbone/blocks/3/mlp/up/kernel`.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

Tree = Any


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dicts with string keys → {"a/b/c": leaf}, in the order of jax's leaves.

    Raises:
      TypeError: a container is not a dict, or a key is not a string.
    """
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        for key in path:
            if not isinstance(key, jax.tree_util.DictKey) or not isinstance(key.key, str):
                raise TypeError(
                    f"parameters are nested dicts with string keys; found {key!r} in "
                    f"{jax.tree_util.keystr(path)}"
                )
        flat["/".join(key.key for key in path)] = leaf
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def match(rules: Iterable[tuple[str, Any]], path: str) -> Any:
    """Value of the first rule whose regex is found in `path`.

    Raises:
      KeyError: no rule matches, naming the path.
    """
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    raise KeyError(f"no rule matches parameter {path!r}; add one (order matters, first match wins)")


def fingerprint(tree: Tree, read: Callable[[Any], np.ndarray] = np.asarray) -> str:
    """SHA-256 (hex) over paths, shapes, dtypes and bytes: the identity of a set of weights.

    Args:
      read: leaf → the whole array; called for one after the other.
    """
    digest = hashlib.sha256()
    for path, leaf in flatten(tree).items():
        array = read(leaf)
        digest.update(f"{path}:{array.dtype}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Path → shape of every array."""
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def count(tree: Tree) -> int:
    """How many numbers the leaves hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def size_in_bytes(tree: Tree) -> int:
    """Sum of the leaves' sizes; works on arrays and on `jax.ShapeDtypeStruct`s."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
