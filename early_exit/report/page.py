"""One page that shows what a run's exits are worth: `report.html`, written from the run's folder.

The one idea: the page is made from saved files alone and holds everything it needs (styles,
plots, text), so it can be mailed, archived or printed, and made again without the model.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from early_exit import policy as policies
from early_exit.report import plots, tokens
from early_exit.runs.metrics import read_metrics
from early_exit.storage import files

FILE = "report.html"


def write(workdir: Path) -> Path:
    """Writes the page and returns its path.

    Reads `evaluation.json` and, where they are there, `policy.json`, `metrics.jsonl` and
    `config.json`.

    Raises:
      FileNotFoundError: no `evaluation.json`, naming the command that writes it.
      ValueError: a file that cannot be read, or a policy for another number of exits.
    """
    path = workdir / "evaluation.json"
    if not path.exists():
        raise FileNotFoundError(f"no evaluation at {path}; write one with `launch.evaluate`")
    evaluation = _with_nan(_read_json(path, "write it again with `launch.evaluate`"))
    try:
        text = _render(workdir, evaluation)
    except (KeyError, jinja2.UndefinedError) as error:
        raise ValueError(
            f"{path} lacks what the report needs ({error}); write it again with `launch.evaluate`"
        ) from error
    files.write_text(workdir / FILE, text)
    return workdir / FILE


def _read_json(path: Path, mend: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {mend}") from error


def _render(workdir: Path, evaluation: dict[str, Any]) -> str:
    model = evaluation["model"]
    depths = [*model["exit_points"], model["depth"]]
    policy = None
    if (workdir / "policy.json").exists():
        policy = policies.load(workdir / "policy.json", exit_depths=np.array(depths))
    config = {}
    if (workdir / "config.json").exists():
        config = _read_json(workdir / "config.json", "restore it, or tune in another --workdir")
    training = plots.training_curves(read_metrics(workdir), depths)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("early_exit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _or_dash(lambda share: f"{100 * share:.1f}\N{NO-BREAK SPACE}%"),
        "ms": _or_dash(lambda milliseconds: f"{milliseconds:.3g}\N{NO-BREAK SPACE}ms"),
        "figures": _or_dash(lambda x: f"{x:.3g}" if x < 1000 else f"{x:,.0f}"),
        "name": _name,
        "colour": lambda depth: tokens.hex_colour(tokens.background(depth, depths)),
    }
    classifies = "classification" in evaluation
    own = _classification(evaluation) if classifies else _decoding(evaluation, depths, policy)
    template = "classifier.html" if classifies else "decoding.html"
    return environment.get_template(template).render(
        evaluation,
        name=_name(model["source"]),
        classifies=classifies,
        points=model["exit_points"],
        depths=depths,
        policy=policy and _policy_facts(policy),
        settings=_settings(config),
        training_plot=training and Markup(training),
        training_loss=config.get("tune", {}).get("loss"),
        legend=Markup(tokens.html_spans([f" {d} " for d in depths], depths, depths)),
        **own,
    )


def _or_dash(written: Callable[[float], str]) -> Callable[[float], str]:
    """The same, with a dash for a figure that there is not."""
    return lambda figure: "–" if math.isnan(figure) else written(figure)


# What is measured of any row, and is NaN where there was nothing to measure it on.
_MEASURED = ("accuracy", "agreement", "abstained", "correct", "coverage", "loss")


def _with_nan(found: Any) -> Any:
    """Undoes what `files.json_text` makes of NaN, for what is measured."""
    if isinstance(found, list):
        return [_with_nan(item) for item in found]
    if isinstance(found, dict):
        return {
            name: math.nan if item is None and name in _MEASURED else _with_nan(item)
            for name, item in found.items()
        }
    return found


def _decoding(
    evaluation: dict[str, Any], depths: list[int], policy: policies.ExitPolicy | None
) -> dict[str, Any]:
    """What the page of a language model shows beside what all show."""
    decoding = evaluation["decoding"]
    full = next((row for row in decoding if row["epsilon"] is None), None)
    if full is None:
        raise KeyError("a decoding row of the full model")
    dynamic = [row for row in decoding if row["epsilon"] is not None]
    return {
        "full": full,
        "lossless": [row for row in decoding if row["epsilon"] is None and row is not full],
        "chosen": _chosen(dynamic, policy),
        "fastest": max(dynamic, key=lambda row: row["tokens_per_second"], default=None),
        "speed_plot": Markup(plots.quality_against_speed(decoding)),
        "exits_plot": Markup(plots.exit_bars(evaluation["exits"])),
        "heat_maps": [
            Markup(tokens.html_spans(sample["pieces"], sample["depths"], depths))
            for sample in evaluation["samples"]
        ],
    }


def _classification(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What the page of a classifier shows beside what all show."""
    of = evaluation["classification"]
    full, *dynamic = own = of["rows"]
    exits_plot = None
    if evaluation["model"]["exit_points"]:
        exits_plot = Markup(plots.exit_bars(evaluation["exits"], ("correct", "coverage")))
    return {
        "full": full,
        "own": own,
        "rows": [*own, *of["static"]],
        "chosen": next((row for row in dynamic if row["policy"] == of["chosen"]), None),
        "cost_plot": Markup(plots.accuracy_against_cost(own, of["static"], of["curve"])),
        "latency_plot": Markup(plots.accuracy_against_latency(own, of["static"])),
        "exits_plot": exits_plot,
    }


def _name(source: str) -> str:
    """A model's source without the marks that only a loader needs."""
    return source.partition("#")[0].removeprefix("pip:")


def _chosen(dynamic: list[dict], policy: policies.ExitPolicy | None) -> dict | None:
    """The row that the run's own policy stands for; without one, the fastest."""
    epsilon = policy.provenance.get("epsilon") if policy else None
    for row in dynamic:
        if epsilon is not None and math.isclose(row["epsilon"], epsilon):
            return row
    return max(dynamic, key=lambda row: row["tokens_per_second"], default=None)


def _policy_facts(policy: policies.ExitPolicy) -> dict[str, Any]:
    words = {policies.NEVER: "never", policies.ALWAYS: "always"}
    thresholds = np.asarray(policy.thresholds).astype(float).tolist()
    return {
        "thresholds": [words.get(x, f"{x:.4f}") for x in thresholds],
        "facts": {
            "confidence": policy.confidence,
            **{
                name: f"{float(value):g}"
                for name in ("decay", "budget")
                if (value := getattr(policy, name)) is not None
            },
            **dict(_facts(policy.provenance)),
        },
    }


def _facts(stated: Mapping[str, Any], prefix: str = ""):
    """(name, text) of what a provenance states, nested or not."""
    for name, value in stated.items():
        if isinstance(value, Mapping):
            yield from () if name == "drift" else _facts(value, f"{name}: ")
        else:
            yield f"{prefix}{name}", _text(value)


def _settings(config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Nested settings → {section: {name: text}}; those outside any section are under ""."""
    sections: dict[str, dict[str, str]] = {"": {}}
    for name, value in config.items():
        if isinstance(value, dict):
            sections[name] = {key: _text(item) for key, item in value.items()}
        else:
            sections[""][name] = _text(value)
    return sections


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{64}", text) else text
