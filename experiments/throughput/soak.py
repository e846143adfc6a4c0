"""A session under random requests for a long time: nothing lost, nothing grows, nothing compiles.

    python -m experiments.throughput.soak --source=FOLDER --tokens=1000000 --check

Requests come and go at random: of any length, greedy and sampled, some cancelled, some with stops
and thresholds of their own. One in so many is decoded alone, too, and must have got the same.
"""

import gc
import os
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

import early_exit as ee
from early_exit.decoding import decode as programs
from early_exit.decoding.decoder import Decoder
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import VERIFIED, served
from early_exit.decoding.sampling import GREEDY, Sampling
from early_exit.decoding.session import CANCELLED, Request, Session
from early_exit.runs.metrics import table
from experiments import bars

SOURCE = flags.DEFINE_string("source", None, "A run, or weights without exits.", required=True)
TOKENS = flags.DEFINE_integer("tokens", 1_000_000, "Tokens of answers.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 8, "Most answers decoded together.", lower_bound=1)
LONGEST = flags.DEFINE_integer("longest", 96, "Tokens of a prompt, and of an answer.")

# Part of the tokens after which all has been compiled, and that is decoded alone, too.
WARM, CHECKED = 0.2, 0.01
# Answers at the beginning that are all decoded alone, too: their programs are compiled then.
FIRST = 20


def main(argv):
    del argv
    total = 2_000 if bars.QUICK.value else TOKENS.value
    model = ee.load(SOURCE.value)
    if not model.points:
        middle = max(model.depth // 2, 1)
        model = ee.attach(model, ee.ExitConfig((middle,), head="norm"))
    thresholds = [0.5] * len(model.points)
    policy = model.policy or ee.make_policy(thresholds)
    mode = served(VERIFIED, model.static)
    decoder = Decoder(model.static, model.params, policy, model.stop_ids, mode)
    session = Session(decoder, ROWS.value, prefix_bytes=1 << 21)
    rng = np.random.default_rng(0)
    asked, ended, lost, wrong, checked = {}, 0, 0, 0, 0
    got, began, warm, seen = 0, time.perf_counter(), None, []
    told = 0
    while got < total or session.busy:
        while got < total and session.waiting < ROWS.value:
            request = _request(rng, model, len(model.points))
            asked[session.add(request)] = request, 0
        if asked and rng.random() < 0.02:
            session.cancel(int(rng.choice(list(asked))))
        for event in session.step(8):
            request, had = asked[event.id]
            now = 0 if event.answer is None else len(event.answer.tokens)
            lost += event.first != had
            got += now - had
            asked[event.id] = request, now
            if event.ended:
                del asked[event.id]
                ended += 1
                if event.ended != CANCELLED and (ended < FIRST or rng.random() < CHECKED):
                    checked += 1
                    wrong += not _same(decoder, request, event.answer)
        if warm is None and got > WARM * total:
            warm = _state()
        if got >= told:
            told += total // 10
            seen.append((got, ended, *_state(), got / (time.perf_counter() - began)))
            print(f"{got} tokens, {seen[-1][-1]:.0f} a second", flush=True)
    after = _state()
    header = ("tokens", "answers", "programs", "MB", "MB in arrays", "tokens/s")
    print("\n" + table(seen, header=header))
    print(f"\n{ended} answers, {checked} of them decoded alone, too; {wrong} differed")
    bars.conclude(
        {"seen": seen},
        [
            bars.Bar("requests without an end", float(len(asked)), 0),
            bars.Bar("tokens told twice or never", float(lost), 0),
            bars.Bar("answers that differ from those alone", float(wrong), 0),
            bars.Bar("programs compiled after the first fifth", float(after[0] - warm[0]), 0),
            bars.Bar("memory at the end ÷ after the first fifth", after[1] / warm[1], 1.02),
            bars.Bar("bytes in arrays ÷ after the first fifth", after[2] / warm[2], 1.02),
        ],
    )


def _request(rng: np.random.Generator, model, exits: int) -> Request:
    longest = min(LONGEST.value, model.static.config.context_length // 2 - 8)
    size, new = rng.integers(1, longest, 2)
    prompt = rng.integers(0, model.static.config.vocab_size, size)
    if rng.random() < 0.3:  # begins like others
        prompt = np.concatenate([np.arange(longest // 2) % 61, prompt])[:longest]
    return Request(
        prompt.tolist(),
        int(new),
        Sampling(float(rng.uniform(0.5, 1.5)), 20) if rng.random() < 0.5 else GREEDY,
        thresholds=rng.random(exits).tolist() if rng.random() < 0.3 else None,
        seed=int(rng.integers(2**31)),
    )


def _same(decoder: Decoder, request: Request, answer) -> bool:
    """Whether a request gets the same alone."""
    (alone,) = generate(
        decoder.model,
        decoder.params,
        [request.prompt],
        policy=None,  # the answer is the full model's, whoever drafts
        max_new_tokens=request.max_new_tokens,
        stop_ids=decoder.stop_ids,
        sampling=request.sampling,
        seed=request.seed,
    )
    return alone.tokens.tolist() == answer.tokens.tolist()


def _state() -> tuple[int, float, float]:
    """(programs, megabytes of this process, megabytes of live arrays)."""
    gc.collect()
    compiled = programs.decode._cache_size() + programs.prefill._cache_size()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = sum(x.nbytes for x in jax.live_arrays())
    return compiled, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, held / 1e6


if __name__ == "__main__":
    bars.run(main)
