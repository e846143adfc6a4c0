"""Measuring what the steps of decoding cost on this device: once, for each model and batch.

The one idea: the program that is measured is the one that decodes. A state in which tokens stand
behind the last checked one, as if they had been drafted, makes its next pass so wide; so nothing is
compiled for measuring alone, and everything that a step does is in the time.
"""

import dataclasses
import hashlib
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import policy as policies
from early_exit.decoding.costs import Costs
from early_exit.decoding.generate import Decoder
from early_exit.decoding.state import DecodeState
from early_exit.storage import files, programs

# Times that each kind of step is run, in turns; the median is kept.
ROUNDS = 7
# Tokens before what is measured.
PROMPT = 32


def costs(decoder: Decoder, batch: int, slots: int | None = None) -> Costs:
    """What steps cost, measured now if they never were: on this device, for this model and batch.

    Args:
      slots: of the cache that decoding is to have, so that its program serves.
    """
    found = known_seconds(decoder, batch, slots)
    passes = np.array(found["passes"])
    return Costs(
        jnp.asarray(passes / passes[0], jnp.float32), jnp.float32(found["draft"] / passes[0])
    )


def known_seconds(decoder: Decoder, batch: int, slots: int | None = None) -> dict:
    """What `seconds` found; kept beside the compiled programs (`storage.programs`)."""
    path = programs.folder() / "costs" / f"{_name(decoder, batch)}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, seconds(decoder, batch, slots))
    return files.read_json(path)


def _name(decoder: Decoder, batch: int) -> str:
    """Differs where costs may."""
    mode, dtype = decoder.mode, jax.tree.leaves(decoder.params["backbone"])[0].dtype
    device, flags = jax.devices()[0].device_kind, os.environ.get("XLA_FLAGS", "")
    told = device, flags, decoder.model, mode.widths, mode.drafters, str(dtype), batch
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def seconds(decoder: Decoder, batch: int, slots: int | None = None) -> dict:
    """Seconds of a pass of each of the mode's widths, and of a step of a recurrent exit.

    Returns:
      `passes`, one for each width, `draft`, 0 where there is no recurrent exit; and of what:
      `device`, `batch`, `widths`.
    """
    mode, most = decoder.mode, decoder.mode.capacity
    silent = decoder.policy
    if silent is not None:  # no exit is asked, and drafts are taken to stand
        silent = dataclasses.replace(
            silent, thresholds=jnp.full_like(silent.thresholds, policies.NEVER)
        )
    decoder = dataclasses.replace(
        decoder, policy=silent, costs=Costs(jnp.ones(len(mode.widths)), jnp.float32(0))
    )
    tokens = np.random.default_rng(0).integers(0, decoder.model.config.vocab_size, PROMPT)
    keys = jax.random.split(jax.random.key(0), batch)
    state = decoder.start([tokens.tolist()] * batch, [2 * most] * batch, keys, slots)
    times: dict[int, list[float]] = {width: [] for width in mode.widths}
    drafts = []
    for _ in range(ROUNDS + 1):  # the first compiles
        for width, found in times.items():
            taken, _ = _step(decoder, _waiting(state, width))
            found.append(taken)
        if "recurrent" in state.kept:
            drafts.append(_step(decoder, _copied(state)))
    passes = {width: float(np.median(found[1:])) for width, found in times.items()}
    return {
        "passes": [passes[width] for width in mode.widths],
        "draft": float(np.median([_of_drafts(*draft, passes) for draft in drafts[1:]] or [0.0])),
        "device": jax.devices()[0].device_kind,
        "batch": batch,
        "widths": list(mode.widths),
    }


def _copied(state: DecodeState) -> DecodeState:
    """A state of its own, for programs are given theirs to keep."""
    return jax.block_until_ready(jax.tree.map(jnp.copy, state))


def _waiting(state: DecodeState, width: int) -> DecodeState:
    """As if `width` − 1 tokens had been drafted in each row."""
    state = _copied(state)
    return state.change(newest_B=state.newest_B + (width - 1))


def _step(decoder: Decoder, state: DecodeState) -> tuple[float, DecodeState]:
    began = time.perf_counter()
    after = decoder.run(state, steps=1)
    return time.perf_counter() - began, after


def _of_drafts(taken: float, after: DecodeState, passes: dict[int, float]) -> float:
    """Seconds of one draft, of a step that made some and then a pass; 0 if it made none."""
    steps = float(after.counts.draft_steps_B.sum())
    width = list(passes)[int(np.argmax(np.asarray(after.counts.passes_BEN)[:, -1].sum(axis=0)))]
    return max(taken - passes[width], 0) / steps if steps else 0.0
