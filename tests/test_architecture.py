"""Imports flow one way; this reads them from the source, those inside functions included."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room may import rooms further down, and itself.
FLOORS = (
    ("launch", "configs", "command"),
    ("serving",),
    ("library",),
    ("training",),
    ("distillation", "evaluation", "report"),
    ("runs", "decoding", "classifying"),
    ("calibration", "cost", "consult"),
    ("exits", "losses", "policy", "pretrained"),
    ("backbones", "confidence"),
    ("data", "sharding"),
    ("precision", "settings", "storage", "streams", "tree"),
)
# Beside the standard library, these rooms import nothing but this.
ONLY = {
    "settings": {"ml_collections"},
    "losses": {
        "jax",
        "numpy",
        "early_exit.backbones.base.LogitRule",
        "early_exit.backbones.base.PLAIN",
        "early_exit.backbones.base.logits",
    },
    "confidence": {"jax", "numpy"},
    "policy": {"jax", "numpy", "early_exit.confidence", "early_exit.storage"},
    "calibration": {
        "jax",
        "numpy",
        "scipy",
        "early_exit.confidence",
        "early_exit.policy",
        "early_exit.settings",
        "early_exit.storage",
    },
}
# Libraries that only some rooms know.
KEEPERS = {
    "orbax": {"runs"},
    "flax": {"backbones", "exits"},
    "pickle": set(),
    "torch": set(),
    "tensorflow": set(),
}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# `early_exit` itself: loaded with every room, it may import none, but for what type checkers read.
GROUND = len(FLOORS)


def room_of(module):
    """`early_exit.data.sources` → `data`; None for what is not ours."""
    top, *rest = module.split(".")
    if top == "early_exit":
        return rest[0] if rest else None
    return top if top in FLOOR_OF else None


def imports(source, module):
    """(line, dotted name) of everything imported, `from a import b` being a.b.

    The surface imports nothing for type checkers alone (`if TYPE_CHECKING:`).
    """
    parsed = ast.parse(source)
    if module == "early_exit":
        parsed.body = [node for node in parsed.body if not _is_for_checkers(node)]
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{parent}.{alias.name}") for alias in node.names)


def _is_for_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def problem_of(room, name):
    """What is wrong with a room's importing `name`; None if nothing is."""
    top, target = name.split(".")[0], room_of(name)
    if name.startswith("."):
        return "which should be spelt in full"
    if target == room is not None:
        return None
    if target is not None and target not in FLOOR_OF:
        return "which has no floor; add it to FLOORS"
    if target is not None and FLOOR_OF[target] <= FLOOR_OF.get(room, GROUND):
        return "which does not stand below it"
    if room not in KEEPERS.get(top, {room}):
        return f"which is for {sorted(KEEPERS[top]) or 'nobody'}"
    allowed = ONLY.get(room, {name}) | sys.stdlib_module_names
    if not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed):
        return f"but may only import {sorted(ONLY[room])}"
    return None


def violations(source, module):
    """Lines such as `12: data imports early_exit.exits.heads, which does not stand below it`."""
    room = room_of(module)
    for line, name in imports(source, module):
        problem = problem_of(room, name)
        if problem:
            yield f"{line}: {room} imports {name}, {problem}"


def modules():
    """(path, dotted name) of everything in the three packages."""
    for top in ("early_exit", "launch", "configs"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield path, name.removesuffix(".__init__")


def test_imports_flow_one_way():
    problems = [
        f"{path.relative_to(ROOT)}:{problem}"
        for path, name in modules()
        for problem in violations(path.read_text(), name)
    ]
    assert not problems, "\n" + "\n".join(problems)


def test_every_room_has_a_floor():
    assert {room_of(name) for _, name in modules()} - {None} == FLOOR_OF.keys()


@pytest.mark.parametrize(
    ("module", "line", "problem"),
    [
        ("early_exit.data.x", "import early_exit.exits.heads", "not stand below"),
        ("early_exit.tree", "from early_exit import sharding", "not stand below"),
        ("early_exit.decoding.x", "from early_exit.classifying import rows", "not stand below"),
        ("early_exit.policy", "def f():\n  from launch import common", "not stand below"),
        ("early_exit.decoding.x", "from early_exit.runs.assemble import Tuned", "not stand below"),
        ("early_exit.exits.x", "from ..tree import flatten", "spelt in full"),
        ("early_exit.losses", "from early_exit.backbones import layers", "may only import"),
        ("early_exit.losses", "from early_exit.backbones import base", "may only import"),
        ("early_exit.losses", "import optax", "may only import"),
        ("early_exit.calibration.x", "from early_exit.exits import heads", "may only import"),
        ("early_exit.settings.x", "import jax.numpy as jnp", "may only import"),
        ("early_exit.training.x", "from orbax import checkpoint", "is for ['runs']"),
        (
            "early_exit.decoding.x",
            "from flax import nnx",
            "is for ['backbones', 'exits']",
        ),
        ("early_exit.data.x", "import pickle", "is for nobody"),
        ("launch.x", "import torch.nn", "is for nobody"),
        ("early_exit", "from early_exit import tree", "not stand below"),
        ("early_exit", "if fast:\n  from early_exit import tree", "not stand below"),
        ("early_exit.library.x", "from launch import common", "not stand below"),
        ("early_exit.training.x", "from early_exit.library import model", "not stand below"),
        ("early_exit.training.x", "from early_exit import bodge", "has no floor"),
    ],
)
def test_the_rules_catch(module, line, problem):
    (found,) = violations(line, module)
    assert problem in found


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("early_exit.losses", "from early_exit.backbones.base import logits"),
        ("early_exit.training.x", "from early_exit.evaluation import exits"),
        ("early_exit.evaluation.x", "from early_exit.calibration import thresholds"),
        ("early_exit.exits.x", "from early_exit.exits import heads, init"),
        ("early_exit.policy", "import os, json, numpy as np"),
        ("early_exit", "if TYPE_CHECKING:\n  from early_exit.library import model"),
        ("launch.x", "from early_exit.library import model"),
    ],
)
def test_the_rules_let_pass(module, line):
    assert not list(violations(line, module))
