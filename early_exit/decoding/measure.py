"""Measuring what the steps of decoding cost on this device: once, for each model and batch.

The one idea: the program that is measured is the one that decodes. A state in which tokens stand
behind the last checked one, as if they had been drafted, makes its next pass so wide; so nothing is
compiled for measuring alone, and everything that a step does is in the time.
"""

import dataclasses
import functools
import hashlib
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from early_exit import policy as policies
from early_exit import sharding
from early_exit.cost.traffic import traffic
from early_exit.decoding.costs import Costs, by_weights
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.state import DecodeState
from early_exit.storage import files, programs

# Of what is kept; another one is measured anew.
FORM = 2
# Times that each kind of step is run, in turns; the median is kept.
ROUNDS = 7
# Tokens before what is measured, at most: of the prompt, and of the model's own.
PROMPT, WRITTEN = 32, 16
# Of a position in a pass: what nothing is worth, and float32 still counts from 1.
_DEAR = 1e6
# A threshold that no score reaches, of exits that are asked all the same.
_NOBODY = 1e30


def costs(decoder: Decoder, batch: int, slots: int | None = None) -> Costs:
    """What steps cost, measured now if they never were: on this device, for this model and batch.

    Assumed where the model's context has no room to measure in.

    Args:
      slots: of the cache that decoding is to have, so that its program serves.
    """
    if not _has_room(decoder):
        return Costs.assumed(decoder.mode, batch)
    found = known_seconds(decoder, batch, slots)
    passes = np.array(found["passes"])
    return Costs(
        jnp.asarray(passes / passes[0], jnp.float32),
        jnp.float32(found["draft"] / passes[0]),
        jnp.float32(found["heads"]),
        jnp.asarray(found["saved"] / passes[0], jnp.float32) if found["saved"] else None,
    )


def measured(decoder: Decoder, slots: int | None = None) -> Decoder:
    """The decoder, which knows what steps cost; measured when it first has so many rows."""
    return dataclasses.replace(decoder, costs=functools.cache(lambda n: costs(decoder, n, slots)))


def _has_room(decoder: Decoder) -> bool:
    return decoder.model.config.context_length >= 8 * decoder.mode.capacity


def pass_seconds(decoder: Decoder) -> float | None:
    """Seconds of the full model's pass for one token of one row; None where `costs` assumes."""
    return known_seconds(decoder, 1)["passes"][0] if _has_room(decoder) else None


def known_seconds(decoder: Decoder, batch: int, slots: int | None = None) -> dict:
    """What `seconds` found; kept beside the compiled programs (`storage.programs`)."""
    path = programs.folder() / "costs" / f"{_name(decoder, batch)}.json"
    known = sharding.agreed(files.read_json(path) if path.exists() else None)
    if known is None:
        known = sharding.agreed(seconds(decoder, batch, slots))
        if not jax.process_index():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, known)
    return known


def _name(decoder: Decoder, batch: int) -> str:
    """Differs where costs may."""
    mode, dtype = decoder.mode, jax.tree.leaves(decoder.params["backbone"])[0].dtype
    device, flags = jax.devices()[0].device_kind, os.environ.get("XLA_FLAGS", "")
    score = decoder.policy and decoder.policy.confidence
    draws = decoder.sampling.temperature > 0
    told = FORM, device, flags, decoder.model, mode.widths, mode.drafters, score, str(dtype)
    told = *told, batch, draws
    if (prepared := decoder.params_for(batch).get("few")) is not None:
        told = *told, "panels" if prepared else "bands"
    if (mesh := sharding.mesh_of(decoder.params)) is not None:
        told = *told, tuple(mesh.shape.items())
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def seconds(decoder: Decoder, batch: int, slots: int | None = None) -> dict:
    """Seconds of a pass of each of the mode's widths, and of a step of a recurrent exit.

    Returns:
      `passes`, one for each width, `draft`, 0 where there is no recurrent exit; `heads`, as in
      `Costs`, 1 where no exit is asked; `saved`, one for each exit, none where none is asked; and
      of what: `device`, `batch`, `widths`.
    """
    mode, most = decoder.mode, decoder.mode.capacity
    asks = "exits" in mode.drafters and decoder.policy is not None
    exits = len(decoder.model.exits.points) if asks else 0

    def weighing(draft: float, thresholds=policies.NEVER, heads: float = 1.0) -> Decoder:
        passes = 1 + _DEAR * (jnp.array(mode.widths, jnp.float32) - 1)
        saved = jnp.zeros(exits, jnp.float32) if exits else None
        costs = Costs(passes, jnp.float32(draft), jnp.float32(heads), saved)
        policy = decoder.policy
        if policy is not None:
            each = jnp.broadcast_to(jnp.float32(thresholds), policy.thresholds.shape)
            policy = dataclasses.replace(policy, thresholds=each)
        return dataclasses.replace(decoder, policy=policy, costs=costs)

    # So dear a position that no draft is handed on. Made are none, or all, if each seems to save
    # what its position costs. Exits are asked if that seems to be worth more: in vain, or with one
    # where all leave.
    quiet, eager = weighing(_DEAR), weighing(-_DEAR)
    asking = weighing(_DEAR, _NOBODY, heads=-(_DEAR**2))
    alone = np.where(np.eye(exits, dtype=bool), policies.ALWAYS, policies.NEVER)
    leaving = [weighing(_DEAR, thresholds, heads=-(_DEAR**2)) for thresholds in alone]
    config = decoder.model.config
    prompt, written = (min(size, config.context_length // 8) for size in (PROMPT, WRITTEN))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, prompt)
    keys = jax.random.split(jax.random.key(0), batch)
    new = written + 2 * most
    state = decoder.start([tokens.tolist()] * batch, [new] * batch, keys, slots)
    # What is drafted goes on from words of the model's own.
    state = quiet.run(state, steps=written)
    # Also where the model has met a stop token: what has ended costs nothing.
    state = state.change(finished_B=jnp.zeros_like(state.finished_B))
    times: dict[int, list[float]] = {width: [] for width in mode.widths}
    drafts, heads, calls = [], [], []
    early: list[list[float]] = [[] for _ in leaving]
    newest = sharding.fetch(state.newest_B)
    for _ in range(ROUNDS + 1):  # the first compiles
        for width, found in times.items():
            taken, _ = _timed(quiet, _waiting(state, width), 1)
            found.append(taken)
        calls.append(_timed(quiet, _copied(state), 0)[0])
        if "recurrent" in state.kept:
            drafts.append(_timed(eager, _copied(state), 1))
        if asks:
            heads.append(_timed(asking, _copied(state), 1)[0])
        for found, at_one in zip(early, leaving, strict=True):
            taken, left = _timed(at_one, _copied(state), 1)
            # Nobody leaves with a token that ends the answer: then by weights.
            all_left = bool((sharding.fetch(left.filled_BE)[:, -1] <= newest).all())
            found.append(taken + _timed(quiet, left, 1)[0] if all_left else math.nan)
    # What a call takes is no part of its steps, of which others make many. (Of the smallest models
    # it takes nearly all.)
    call = float(np.median(calls[1:]))
    timed = [float(np.median(found[1:])) for found in times.values()]
    passes = [max(taken - call, taken / 10) for taken in timed]
    draft, of_heads, reads = 0.0, 1.0, traffic(decoder.model, decoder.params)
    if asks:  # beside a pass without; never less than their weights would
        expected = passes[0] * reads.shares()[1][:-1].sum()
        of_heads = max((float(np.median(heads[1:])) - call - passes[0]) / expected, 1.0)
    prices = passes[0] * of_heads * reads.shares()[1]
    saved = [
        2 * passes[0] + price - (float(np.median(found[1:])) - 2 * call)
        for found, price in zip(early, prices, strict=False)
    ]
    if any(map(math.isnan, saved)):
        shares = by_weights(reads.shares()[0][:exits], np.array(passes) / passes[0])
        saved = [passes[0] * float(share) for share in shares]
    if drafts:  # each time as many, and then a pass of one position
        steps = float(drafts[0][1].counts.draft_steps_B.sum())
        with_drafts = float(np.median([taken for taken, _ in drafts[1:]]))
        draft = (with_drafts - call - passes[0]) / steps
        if draft <= 0:  # lost in the noise: what its weights are of the model's
            draft = passes[0] * reads.draft / reads.full
    return {
        "passes": passes,
        "draft": draft,
        "heads": of_heads,
        "saved": saved,
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


def _timed(decoder: Decoder, state: DecodeState, steps: int) -> tuple[float, DecodeState]:
    began = time.perf_counter()
    after = decoder.run(state, steps=steps)
    return time.perf_counter() - began, after
