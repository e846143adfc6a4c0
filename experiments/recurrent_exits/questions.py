"""Questions of two kinds for a model to answer: maths word problems, and functions to be written.

Maths: GSM-Symbolic's templates (Mirzadeh et al. 2024) as `reasoning-gym` has them (extra
`studies`), with names and numbers drawn anew. Code: what the functions of the standard library say
of themselves, as a task. Held out are templates and modules of which the other questions have none.
"""

import ast
import random
from collections.abc import Callable, Iterator

from early_exit.data.sources import SPLITS, documents, hash_position

KINDS = ("maths", "code")
# Share of templates and of modules that are held out.
HELD_OUT = 0.15


def questions(kind: str, count: int, *, held_out: bool) -> list[str]:
    """So many questions, or all there are; the same ones every time."""
    rng = random.Random(f"{kind} {held_out}")
    if kind == "code":
        found = sorted({text for name, text in _tasks() if _is_held_out(name) == held_out})
        rng.shuffle(found)
        return found[:count]
    generators = [
        generate
        for name, generate in sorted(_templates().items())
        if _is_held_out(name) == held_out
    ]
    return [generators[i % len(generators)](rng) for i in range(count)]


def _is_held_out(name: str) -> bool:
    return hash_position(name.encode()) < HELD_OUT


def _templates() -> dict[str, Callable[[random.Random], str]]:
    """Name → a function that draws a question."""
    try:
        from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic
    except ImportError as error:
        raise SystemExit("maths questions need reasoning-gym; pip install '.[studies]'") from error
    config = gsm_symbolic.GSMSymbolicDatasetConfig(size=1)
    generators = gsm_symbolic.GSMSymbolicDataset(config).generators

    def drawing(generate):
        return lambda rng: generate(rng, config.difficulty)["question"]

    # Of some templates the answers are doubtful; these are left out there, too.
    return {f"template {i}": drawing(generators[i]) for i in gsm_symbolic.tasks_ok}


def _tasks() -> Iterator[tuple[str, str]]:
    """(module, task) of every public function of the standard library that says what it does."""
    for split in SPLITS:
        for module, text in documents("stdlib", split):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    said = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                    if 24 <= len(said) <= 240:
                        names = [a.arg for a in node.args.args if a.arg not in ("self", "cls")]
                        task = f"Write a Python function {node.name}({', '.join(names)})."
                        yield module, f"{task} {said}"
