"""One page that shows what a run's exits are worth: `report.html`, written from the run's folder.

The one idea: the page is made from saved files alone and holds everything it needs (styles,
plots, text), so it can be mailed, archived or printed, and made again without the model.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from early_exit import policy as policies
from early_exit.calibration import methods
from early_exit.decoding.mode import LOSSY
from early_exit.exits import artefact
from early_exit.report import explorer, plots, tokens
from early_exit.runs.metrics import read_metrics
from early_exit.storage import files

FILE = "report.html"


def write(workdir: Path) -> Path:
    """Writes the page and returns its path.

    Reads `evaluation.json` and, where they are there, `policy.json`, `metrics.jsonl` and
    `config.json`. The policy shown is the one that was measured, whatever `policy.json` now holds.

    Raises:
      FileNotFoundError: no `evaluation.json`, naming the command that writes it.
      ValueError: a file that cannot be read, or a policy for another number of exits.
    """
    path = workdir / "evaluation.json"
    if not path.exists():
        raise FileNotFoundError(f"no evaluation at {path}; write one with `launch.evaluate`")
    found = _read_json(path, "write it again with `launch.evaluate`")
    # A policy is compared as it was saved.
    evaluation = {name: x if name == "policy" else _with_nan(x) for name, x in found.items()}
    config, metrics = _config_of(workdir), read_metrics(workdir)
    try:
        policy = _measured(evaluation)
        shown = _evaluated(evaluation, policy)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _lacking(path, repr(error)) from error
    training = plots.training_curves(metrics, shown["depths"])
    shown |= {
        "unmeasured": _unmeasured(workdir / "policy.json", policy, shown["depths"]),
        "training_plot": training and Markup(training),
    }
    try:
        text = _render(evaluation, config, shown)
    except jinja2.UndefinedError as error:
        raise _lacking(path, str(error)) from error
    files.write_text(workdir / FILE, text)
    return workdir / FILE


def _read_json(path: Path, mend: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {mend}") from error


def _lacking(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} lacks what the report needs ({what}); write it again with `launch.evaluate`"
    )


def _config_of(workdir: Path) -> dict[str, Any]:
    """The run's settings; none where it has no file of them."""
    if artefact.is_in(workdir):
        return artefact.describe(workdir).config
    if not (workdir / "config.json").exists():
        return {}
    return _read_json(workdir / "config.json", "restore it, or tune in another --workdir")


def _measured(evaluation: dict[str, Any]) -> policies.ExitPolicy | None:
    """The policy that the figures are of."""
    fields = evaluation["policy"]
    return None if fields is None else policies.from_json(fields)


def _unmeasured(
    path: Path, measured: policies.ExitPolicy | None, depths: Sequence[int]
) -> str | None:
    """A sentence where the run's policy is no longer the one that was measured."""
    if not path.exists():
        return None
    saved = policies.load(path, exit_depths=np.array(depths))
    if saved is None or _text_of(saved) == _text_of(measured):
        return None
    return (
        f"{path.name} now holds another policy, {methods.described(saved)}, which is not the one "
        "that was measured here; launch.evaluate measures it."
    )


def _text_of(policy: policies.ExitPolicy | None) -> str:
    return json.dumps(policy and policies.as_json(policy), sort_keys=True)


def _evaluated(evaluation: dict[str, Any], policy: policies.ExitPolicy | None) -> dict[str, Any]:
    """All that is drawn or worded for the page."""
    model = evaluation["model"]
    depths = [*model["exit_points"], model["depth"]]
    classifies = "classification" in evaluation
    own = _classification(evaluation) if classifies else _decoding(evaluation, depths)
    return {
        "name": _name(model["source"]),
        "classifies": classifies,
        "points": model["exit_points"],
        "depths": depths,
        "policy": policy and _policy_facts(policy),
        "legend": Markup(tokens.html_spans([f" {d} " for d in depths], depths, depths)),
        **own,
    }


def _render(evaluation: dict[str, Any], config: dict[str, Any], shown: dict[str, Any]) -> str:
    depths = shown["depths"]
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
        "source": tokens.named,
        "colour": lambda depth: tokens.hex_colour(tokens.background(depth, depths)),
    }
    template = "classifier.html" if shown["classifies"] else "decoding.html"
    return environment.get_template(template).render(
        evaluation,
        settings=_settings(config),
        training_loss=config.get("tune", {}).get("loss"),
        **shown,
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


def _decoding(evaluation: dict[str, Any], depths: list[int]) -> dict[str, Any]:
    """What the page of a language model shows beside what all show."""
    of = evaluation["decoding"]
    full, *others = rows = of["rows"]
    own = [row for row in others if row["policy"] is not None and row["policy"] == of["chosen"]]
    # Behind the exits' shares stand those of other drafters; files of earlier versions have fewer.
    places = max(len(row["exit_shares"]) for row in rows)
    for row in rows:
        row["exit_shares"] += [0.0] * (places - len(row["exit_shares"]))
    sources = [tokens.LOOKED_UP, tokens.RECURRENT][: places - len(depths)]
    drafted = [depth for sample in evaluation["samples"] for depth in sample["depths"] if depth < 1]
    return {
        "drafts": evaluation.get("drafts", []),  # files of earlier versions have none
        "samples_drafted": bool(drafted),
        "full": full,
        "rows": rows,
        "chosen": next((row for row in own if row["mode"] == LOSSY.name), None),
        # Of one policy, or of none: those whose answer is the full model's.
        "lossless": [row for row in others if row["mode"].startswith("verified")],
        "sources": sources,
        "legend_with_sources": Markup(
            tokens.html_spans(
                [f" {name} " for name in (*depths, *map(tokens.named, sources))],
                [*depths, *sources],
                depths,
            )
        ),
        "speed_plot": Markup(plots.quality_against_speed(rows)),
        "exits_plot": Markup(plots.exit_bars(evaluation["exits"])),
        "heat_maps": [
            Markup(tokens.html_spans(sample["pieces"], sample["depths"], depths))
            for sample in evaluation["samples"]
        ],
        "explorer": _explorer(evaluation["explorer"], of["chosen"]),
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
        "explorer": _explorer(evaluation["explorer"], of["chosen"]),
    }


def _explorer(found: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    return found and explorer.shown(found, name)


def _name(source: str) -> str:
    """A model's source without the marks that only a loader needs."""
    return source.partition("#")[0].removeprefix("pip:")


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
