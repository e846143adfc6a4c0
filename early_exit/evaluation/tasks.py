"""Tasks that others know, run by lm-evaluation-harness on a run of ours (extra `lm-eval`).

The one idea: a score alone says nothing about early exits. So beside each stands what its answers
took: blocks per token, where the tokens came from, and seconds.
"""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from early_exit.evaluation import run
from early_exit.evaluation.harness import RunLM
from early_exit.runs.metrics import table


def evaluate(
    model: RunLM,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    unsafe: bool = False,
) -> dict[str, Any]:
    """Scores of `tasks`, and what they took.

    Args:
      include: folder with task files of one's own.
      limit: examples of each task; all if None.
      num_fewshot: solved examples in front; a task's own number if None.
      chat: whether prompts are turns of the model's chat template.
      unsafe: whether tasks may run what the model has written.

    Returns:
      `scores`, a row for each task and metric (`task`, `metric`, `value`, `stderr`, None where
      there is none); `usage` (`RunLM.rows`); `model`, `policy`, `mode`, `limit` and `machine`.

    Raises:
      ValueError: unknown tasks, or tasks that ask for what the model has not.
    """
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        where = "" if include is None else f", nor in {include}"
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}{where}; its own are listed by `lm-eval ls "
            "tasks`, those of a folder by --include"
        )
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=chat,
        confirm_run_unsafe_code=unsafe,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return {
        "scores": list(_scores(found["results"])),
        "usage": model.rows(),
        "model": model.tuned.config.model.source,
        "policy": model.told_policy,
        "mode": model.mode and model.mode.name,
        "limit": limit,
        "machine": run.machine(),
    }


def _scores(results: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each metric; lm-eval calls them `acc,none` and `acc_stderr,none`."""
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            yield {
                "task": task,
                "metric": metric if kind == "none" else f"{metric} ({kind})",
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            }


def tables(results: dict[str, Any]) -> Iterator[str]:
    """What `evaluate` found, as text of at most 100 columns."""
    taken = {row["task"]: row for row in results["usage"]}
    rows = []
    for row in results["scores"]:
        of = taken.get(row["task"], {})
        rows.append(
            (
                *(row["task"], row["metric"], row["value"], row["stderr"]),
                *(of.get("blocks_per_token"), of.get("tokens"), of.get("seconds")),
            )
        )
    header = ("task", "metric", "score", "±", "blocks", "tokens", "seconds")
    yield f"{results['policy']}, {results['mode'] or 'given text'}:\n" + table(rows, header=header)
    for row in results["usage"]:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in row["exits"].items())
        yield textwrap.fill(f"{row['task']}: tokens from {shares}", 100)
    yield textwrap.fill(
        "±: standard error; blocks: for each token, of an answer those run, of a given text those "
        "that decoding it would run; seconds: given texts are scored with every block, at the full "
        "model's speed.",
        100,
    )
