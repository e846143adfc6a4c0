"""A run as lm-evaluation-harness sees it: any exit, policy and mode (extra `lm-eval`).

    python -m early_exit.evaluation.harness run --model early_exit --model_args workdir=runs/a …

is `lm-eval` itself, which looks for no models but its own, with this one among them.

The one idea: the harness asks three things of a model: how likely a continuation is, how likely a
whole text is, and what it writes until it stops. The first two are `scoring.score`, the third is
`decoding.generate.stream`; and what each took is booked for the task that asked.
"""

import dataclasses
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from early_exit import policy as policies
from early_exit.calibration import methods
from early_exit.data import tokenising
from early_exit.decoding import cache as caches
from early_exit.decoding import drafters, measure
from early_exit.decoding import mode as modes
from early_exit.decoding.costs import Costs
from early_exit.decoding.decoder import Decoder, Generation
from early_exit.decoding.generate import stream
from early_exit.decoding.mode import LOSSY, Mode
from early_exit.decoding.sampling import Sampling
from early_exit.evaluation import scoring
from early_exit.evaluation.requests import Asked, grouped, task_of
from early_exit.policy import ExitPolicy
from early_exit.runs import assemble
from early_exit.runs.assemble import Tuned
from early_exit.storage import buckets

# Steps of decoding between two looks for a stop string.
PORTION = 8


@dataclasses.dataclass
class Usage:
    """What a task has taken.

    Attributes:
      places: int [E + 3], tokens by where they came from (`drafters.places`).
      blocks: run for these tokens, drafts that were not kept included; of a text that was scored,
        what decoding it would have run.
      seconds: of scoring (which runs every block), or of decoding, prompts included.
    """

    places: np.ndarray
    blocks: float = 0.0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return int(self.places.sum())


class RunLM(LM):
    """A language model with exits, under one policy and mode.

    Attributes:
      usage: task → `Usage`.
    """

    def __init__(
        self,
        tuned: Tuned,
        *,
        policy: ExitPolicy | None,
        mode: Mode | None,
        batch_size: int = 8,
        max_gen_toks: int = 256,
        first_leaves: bool = False,
    ):
        """See `scoring.score`; answers are decoded in lossy mode where there is no mode.

        Args:
          max_gen_toks: most tokens of an answer, where a task says none.

        Raises:
          ValueError: a classifier, or a policy for other exits.
        """
        super().__init__()
        if tuned.model.config.classifies:
            raise ValueError(f"{tuned.workdir} holds a classifier, and tasks ask a language model")
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size is a number of texts, not {batch_size!r}")
        self.tuned, self.policy, self.mode = tuned, policy, mode
        self.batch_size, self.max_gen_toks = int(batch_size), int(max_gen_toks)
        self.first_leaves = first_leaves
        self.usage: dict[str, Usage] = {}
        self._costs: dict[tuple, Costs | None] = {}  # of programs that have run
        self._batches = 0
        self._tokenizer = tokenising.needed(tuned.tokenizer)
        if policy is not None:
            policy.check(tuned.model.exit_depths, tuned.model.confidences)

    @property
    def told_policy(self) -> str:
        """What decides where tokens leave, in words."""
        if self.policy is None:
            return "full model"
        if self.mode is None:
            (e,) = np.flatnonzero(np.asarray(self.policy.thresholds) == policies.ALWAYS)
            return f"exit after block {self.tuned.model.exits.points[e]}"
        return methods.described(self.policy)

    @property
    def prefix_id(self) -> int:
        """The token in front of a text that nothing stands before."""
        first = self._tokenizer.bos_token_id
        return tokenising.end_of_text(self._tokenizer) if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return self.tuned.config.model.source.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self._tokenizer.chat_template or ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would say it) of continuations."""
        pairs = [[self._pair(*request.args)] for request in requests]
        return [
            (_total(found), all(x.chosen.all() for x in found))
            for found in self._scored(requests, pairs)
        ]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts."""
        context = self.tuned.model.config.context_length
        pairs = [
            list(scoring.rolling(self._encode(request.args[0]), self.prefix_id, context))
            for request in requests
        ]
        return [_total(found) for found in self._scored(requests, pairs)]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What is written after each prompt, up to the first of its stop strings.

        Raises:
          ValueError: a task that shows more than text, or settings that are not known here.
        """
        asked = [Asked.of(request, self.max_gen_toks) for request in requests]
        written: dict[int, str] = {}
        for (task, how), rows in grouped(zip(map(task_of, requests), asked, strict=True)):
            prompts = {i: self._prompt(requests[i].args[0], how.new_tokens) for i in rows}
            # The longest first, so that what does not fit is known at once.
            rows = sorted(rows, key=lambda i: -len(prompts[i]))
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                longest = len(prompts[rows[0]])
                texts = self._write(task, [prompts[i] for i in batch], how, longest)
                written |= dict(zip(batch, texts, strict=True))
        return [written[i] for i in range(len(requests))]

    def rows(self) -> list[dict]:
        """What each task has taken, as `Usage` says: means per token, and shares."""
        names = drafters.places(self.tuned.model.exit_depths)
        return [
            {
                "task": task,
                "tokens": taken.tokens,
                "blocks_per_token": taken.blocks / max(taken.tokens, 1),
                "exits": {
                    name: count / taken.tokens
                    for name, count in zip(names, taken.places.tolist(), strict=True)
                    if count
                },
                "seconds": taken.seconds,
            }
            for task, taken in self.usage.items()
        ]

    def _encode(self, text: str, whole: bool = True) -> list[int]:
        """Token ids; what the tokenizer puts around a whole text by itself, if it is not there."""
        first = self._tokenizer.decode([self.prefix_id])
        added = whole and not text.startswith(first)
        return self._tokenizer.encode(text, add_special_tokens=added)

    def _pair(self, context: str, continuation: str) -> scoring.Pair:
        """Token ids of a context, cut on the left where there is no room, and a continuation.

        Spaces at the end of a context belong to what follows: that is how tokens have them.
        """
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        if context:
            given = self._encode(context)
            scored = self._encode(context + continuation)[len(given) :]
        else:
            given, scored = [self.prefix_id], self._encode(continuation, whole=False)
            scored = scored[scored[:1] == given :]
        room = self.tuned.model.config.context_length + 1 - len(scored)
        return given[-max(room, 1) :], scored

    def _scored(self, requests, pairs: list[list[scoring.Pair]]) -> list[list[scoring.Scores]]:
        found: dict[int, list[scoring.Scores]] = {}
        for task, rows in grouped(map(task_of, requests)):
            began = perf_counter()
            texts = [pair for i in rows for pair in pairs[i]]
            flat = texts and scoring.score(
                self.tuned.model,
                self.tuned.params,
                texts,
                policy=self.policy,
                mode=self.mode,
                batch=self.batch_size,
                first_leaves=self.first_leaves,
            )
            seconds, left = perf_counter() - began, iter(flat)
            found |= {i: [next(left) for _ in pairs[i]] for i in rows}
            exits = np.concatenate([np.zeros(0, np.int32), *(x.exits for x in flat)])
            blocks = float(self.tuned.model.exit_depths[exits].sum())
            self._book(task, exits, blocks, seconds)
        return [found[i] for i in range(len(requests))]

    def _prompt(self, text: str, new_tokens: int) -> list[int]:
        """Token ids, cut on the left where there is no room."""
        room = self.tuned.model.config.context_length - new_tokens
        if room < 1:
            raise ValueError(
                f"a task asks for answers of {new_tokens} tokens, which leave no room for a prompt "
                f"in a context of {room + new_tokens}; lower max_gen_toks"
            )
        return (self._encode(text) or [self.prefix_id])[-room:]

    def _write(self, task: str, prompts: list[list[int]], how: Asked, longest: int):
        """The answers to at most a batch of prompts, each cut where it should stop."""
        mode = self.mode or LOSSY
        slots = caches.bucket(longest + how.new_tokens + mode.capacity - 1)
        # As many rows in every batch, so that one program serves; some are answered by one token.
        count, empty = len(prompts), self.batch_size - len(prompts)
        prompts = prompts + [prompts[-1]] * empty
        limits = [how.new_tokens] * count + [1] * empty
        self._batches += 1
        for answers in self._stream(prompts, limits, mode, slots, how.sampling, self._batches):
            texts = [self._decode(answer) for answer in answers[:count]]
            if all(
                how.stopped(text) or self._ended(answer, limit)
                for text, answer, limit in zip(texts, answers, limits, strict=False)
            ):
                break
        answers = answers[:count]
        self._book(
            task,
            np.concatenate([answer.exits for answer in answers]),
            # The first token comes out of the prompt's pass, and is counted like any other.
            sum(answer.layer_tokens + self.tuned.model.config.depth for answer in answers),
            answers[0].seconds + answers[0].prefill_seconds,
        )
        return [how.cut(text) for text in texts]

    def _stream(self, prompts, limits, mode: Mode, slots: int, sampling: Sampling, seed: int):
        """`stream` with all that stays the same; its programs are compiled off the clock."""
        tuned, policy, how = self.tuned, self.policy, (mode, slots, sampling.temperature > 0)
        settings = {"policy": policy, "mode": mode, "stop_ids": tuned.stop_ids, "slots": slots}
        settings["sampling"] = sampling
        if how not in self._costs:
            stop_ids = tuned.stop_ids
            decoder = Decoder(tuned.model, tuned.params, policy, stop_ids, mode, sampling=sampling)
            self._costs[how] = (
                measure.costs(decoder, len(prompts), slots) if mode.verified else None
            )
            list(stream(tuned.model, tuned.params, prompts, max_new_tokens=1, **settings))
        return stream(
            tuned.model,
            tuned.params,
            prompts,
            max_new_tokens=limits,
            portion=PORTION,
            seed=seed,
            costs=self._costs[how],
            **settings,
        )

    def _decode(self, answer: Generation) -> str:
        return self._tokenizer.decode(answer.tokens, skip_special_tokens=True)

    def _ended(self, answer: Generation, limit: int) -> bool:
        return len(answer.tokens) >= limit or answer.tokens[-1] in self.tuned.stop_ids

    def _book(self, task: str, exits: np.ndarray, blocks: float, seconds: float) -> None:
        places = len(drafters.places(self.tuned.model.exit_depths))
        taken = self.usage.setdefault(task, Usage(np.zeros(places, np.int64)))
        taken.places += np.bincount(exits, minlength=places)
        taken.blocks += blocks
        taken.seconds += seconds


@register_model("early_exit")
class EarlyExitLM(RunLM):
    """A run by the name of its folder, for `lm-eval --model early_exit`."""

    def __init__(
        self,
        workdir: str,
        *,
        policy: str | None = "own",
        exit: int | None = None,
        mode: str = "lossy",
        drafters: str | None = None,
        pending: int = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings,
    ):
        """See `RunLM`; `max_batch_size` and `device` are for other models.

        Args:
          policy: `own` is the run's, `none` the full model, else a policy's file.
          exit: a block after which every token is taken from the exit there; instead of a policy.
          mode: `lossy`, `deferred` or `verified`, with `drafters`, joined by +.
          pending: see `Mode`.
        """
        tuned = assemble.load_tuned(buckets.place(workdir))
        super().__init__(
            tuned,
            **how_of(tuned, policy=policy, exit_after=exit, mode=named(mode, drafters, pending)),
            **settings,
        )


def named(mode: str, drafters: str | None = None, pending: int = 8) -> Mode:
    """A mode by its words.

    Raises:
      ValueError: they name none.
    """
    names = modes.DRAFTERS if drafters is None else tuple(drafters.split("+"))
    return dataclasses.replace(modes.named(mode, names), pending=int(pending))


def how_of(
    tuned: Tuned, *, policy: str | None, exit_after: int | None, mode: Mode
) -> dict[str, Any]:
    """The arguments of `RunLM` for a policy by name, or an exit by its block.

    Raises:
      ValueError: no such exit, or a policy of other heads.
      FileNotFoundError: no such policy.
    """
    points = tuned.model.exits.points
    if exit_after is not None:
        if exit_after not in points:
            raise ValueError(
                f"{tuned.workdir} has no exit after block {exit_after}; it has some after "
                f"{', '.join(map(str, points)) or 'none'}"
            )
        forced = policies.forced(len(points), points.index(exit_after))
        return {"policy": forced, "mode": None, "first_leaves": True}
    mode = modes.served(mode, tuned.model)
    if policy in (None, "none") or not mode.asks_policy:
        return {"policy": None, "mode": mode}
    own = None if policy == "own" else buckets.place(policy)
    return {"policy": assemble.load_policy(tuned, own), "mode": mode}


def _total(found: Sequence[scoring.Scores]) -> float:
    return float(sum(x.log_probs.sum(dtype=np.float64) for x in found))


if __name__ == "__main__":
    cli_evaluate()
