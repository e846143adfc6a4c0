"""The bodies of `launch.calibrate` and `launch.evaluate`: from a run's folder to its results.

The one idea: everything is derived from the newest checkpoint and saved beside it, marked with
the fingerprint of the heads it came from, so results of an older checkpoint are never reused.
"""

import os
import platform

import jax

from early_exit import policy as policies
from early_exit import tree
from early_exit.calibration import methods, thresholds
from early_exit.calibration.records import Records
from early_exit.data import sources, tokenising
from early_exit.decoding import detokenize
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import LOSSY, VERIFIED, Mode
from early_exit.evaluation import exits, tradeoff
from early_exit.policy import ExitPolicy
from early_exit.runs import assemble, lock
from early_exit.runs.assemble import Tuned
from early_exit.settings.sections import CalibrateSettings
from early_exit.storage import files


def records_of(tuned: Tuned, *, soften: bool = False) -> Records:
    """The model on the run's calibration data; read back if this model has been recorded on it.

    Args:
      soften: whether temperatures are to be fitted.
    """
    path = tuned.workdir / "records.npz"
    feed = tuned.feed
    metadata = tuned.metadata | {
        "data": feed.data_hash("calibration"),
        "num_batches": tuned.config.calibrate.batches,
    }
    if path.exists():
        records = Records.load(path)
        if records.metadata == metadata and (records.softened or not soften):
            return records
    batches = feed.calibration(metadata["num_batches"])
    records = exits.record(tuned.model, tuned.params, batches, soften=soften, **metadata)
    records.save(path)
    return records


def calibrate(
    tuned: Tuned, settings: CalibrateSettings | None = None
) -> tuple[ExitPolicy, Records]:
    """Fits a policy, as the settings (or the config's) ask, and saves it as `policy.json`.

    Raises:
      RuntimeError: another command is at work in the run's folder.
    """
    settings = tuned.config.calibrate if settings is None else settings
    with lock.held(tuned.workdir):
        records = records_of(tuned, soften=settings.temperature)
        policy = methods.fit(records, settings)
        policies.save(policy, tuned.workdir / assemble.POLICY)
    return policy, records


def evaluate(tuned: Tuned) -> dict:
    """Measures the exits and what decoding with them gains; saves `evaluation.json`.

    Speed and agreement are measured on prompts cut from the test split of the run's text, at
    several ε, with the confidence of the run's policy (config section `evaluate`).

    Raises:
      RuntimeError: another command is at work in the run's folder.
    """
    with lock.held(tuned.workdir):
        results = _measured(tuned)
        files.write_json(tuned.workdir / "evaluation.json", results)
    return results


def _measured(tuned: Tuned) -> dict:
    settings = tuned.config.evaluate
    policy = assemble.load_policy(tuned)
    records = records_of(tuned)
    confidence = policy.confidence if policy else tuned.config.calibrate.confidence
    cases: dict[str, tuple[ExitPolicy | None, Mode]] = {"full model": (None, LOSSY)}
    epsilons: dict[str, float | None] = {"full model": None}
    for epsilon in settings.epsilons:
        fitted = thresholds.fit(records, confidence, epsilon)
        name = methods.described(fitted)
        cases[name] = fitted, LOSSY
        epsilons[name] = epsilon
    # Lossless: the surest exits and the text itself propose, the full model decides.
    cases["verified"] = cases[name][0], VERIFIED
    epsilons["verified"] = None
    prompts = cut_prompts(tuned, settings.prompts, settings.prompt_tokens)
    rows, generations = tradeoff.compare(
        tuned.model,
        tuned.params,
        prompts,
        cases,
        new_tokens=settings.new_tokens,
        rounds=settings.rounds,
    )
    samples = []
    if policy is not None:
        name = methods.described(policy)
        continued = [(tuned.tokenizer.decode(prompt), prompt) for prompt in prompts[:2]]
        answered = [(f"{text}\n\n", tuned.chat(text)) for text in settings.questions]
        for text, prompt in answered + continued:
            (answer,) = generate(
                tuned.model,
                tuned.params,
                [prompt],
                policy=policy,
                max_new_tokens=settings.sample_tokens,
                stop_ids=tuned.stop_ids,
            )
            samples.append(
                {
                    "prompt": text,
                    "policy": name,
                    "pieces": detokenize.pieces(tuned.tokenizer, answer.tokens),
                    "depths": answer.depths.tolist(),
                }
            )
    return {
        "model": {
            "source": tuned.config.model.source,
            "depth": tuned.model.config.depth,
            "exit_points": list(tuned.model.exits.points),
            "head": tuned.model.exits.head,
            "output": tuned.model.exits.output,
            "classes": tuned.model.exits.classes,
            "init": tuned.config.exits.init,
            "backbone_parameters": tree.count(tuned.params["backbone"]),
            "exit_parameters": tree.count(tuned.params["exits"]),
        },
        "exits": exits.summary(records),
        "decoding": [
            {**row, "epsilon": epsilons[row["policy"]], "confidence": confidence} for row in rows
        ],
        "prompts": len(prompts),
        "new_tokens": settings.new_tokens,
        "text": f"{tuned.config.data.source} (test split)",
        "samples": samples,
        "machine": {
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "system": platform.system(),
        },
    }


def cut_prompts(tuned: Tuned, count: int, length: int) -> list[list[int]]:
    """`count` stretches of `length` tokens, each from another document of the test split.

    Raises:
      ValueError: too few documents long enough.
    """
    prompts = []
    encode = tokenising.encoder(tuned.tokenizer, tuned.config.data.source)
    for _, text in sources.documents(tuned.config.data.source, "test"):
        tokens = encode(text)
        if len(tokens) >= 3 * length:
            prompts.append(tokens[length : 2 * length])
        if len(prompts) == count:
            return prompts
    raise ValueError(
        f"the test split of {tuned.config.data.source} has only {len(prompts)} documents of "
        f"{3 * length} tokens; lower evaluate.prompts or evaluate.prompt_tokens"
    )
