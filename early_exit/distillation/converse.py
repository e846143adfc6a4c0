"""A model talks with itself: it thinks of questions and answers them, in shards that can go on.

The one idea (Xu et al. 2024, "Magpie", https://arxiv.org/abs/2406.08464): fed its chat template up
to where the user's words begin, a chat model writes what users write. So it needs no data to make
data. Questions may come from a file instead; they are answered the same way. Everything in a shard
follows from its number: what is drawn, by keys of the seed and the number, to rounding whatever the
batch; see `data.conversations` for what is kept of it.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from early_exit import sharding
from early_exit.data import conversations, shards, tokenising
from early_exit.data.conversations import Conversation, Fault, Words
from early_exit.data.stream import ALONE, Rank
from early_exit.decoding.generate import generate
from early_exit.decoding.sampling import Sampling
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained import chat
from early_exit.pretrained.load import Pretrained
from early_exit.runs import lock


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the conversations follow from, beside the model and the questions of a file.

    Attributes:
      question, answer: how the tokens of each are drawn.
      max_question_tokens, max_new_tokens: tokens after which a question, or an answer, is cut off.
      rules: which conversations are kept.
      raw: whether questions stand for themselves, without a chat template.
      seed: of everything that is drawn.
      per_shard: questions in a shard.
    """

    question: Sampling = Sampling(temperature=0.8)
    answer: Sampling = Sampling(temperature=0.6)
    max_question_tokens: int = 128
    max_new_tokens: int = 256
    rules: conversations.Rules = conversations.Rules()
    raw: bool = False
    seed: int = 0
    per_shard: int = 128

    def __post_init__(self):
        for name in ("max_question_tokens", "max_new_tokens", "per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class Speaker:
    """A model with all its depth, and its tokenizer."""

    def __init__(self, network: Pretrained):
        """
        Raises:
          ValueError: a model that writes no text, or has no tokenizer.
        """
        if network.config.classifies:
            raise ValueError("this model reads text or images but writes no text")
        if network.config.encodes_prompts:
            raise ValueError(
                "an encoder reads this model's prompts, and it asks itself none; let "
                "launch.generate answer those that you have (--input, --output)"
            )
        self.network = network
        self.model = MultiExit(network.config, ExitConfig(points=()))
        self.params = {"backbone": network.params}
        if sharding.mesh_of(self.params) is None:
            # Committed to the device: a mixture would compile every program twice.
            self.params = jax.device_put(self.params, jax.local_devices()[0])
        self.tokenizer = tokenising.needed(network.tokenizer)
        self.special = tokenising.special_ids(self.tokenizer)
        self.stop_ids = list(network.generation.stop_ids)

    def write(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        seed: int,
        batch: int,
    ) -> list[Words]:
        """What follows each prompt."""
        written = generate(
            self.model,
            self.params,
            prompts,
            policy=None,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
            seed=seed,
            batch=batch,
        )
        return [self._words(answer.tokens.tolist(), stop_ids) for answer in written]

    def _words(self, tokens: list[int], stop_ids: Sequence[int]) -> Words:
        if tokens[-1] not in stop_ids:
            return Words(self.tokenizer.decode(tokens), tokens, ended=False)
        *tokens, end = tokens
        return Words(self.tokenizer.decode(tokens), tokens, ended=True, end=end)


def converse(
    speaker: Speaker,
    folder: Path,
    settings: Settings,
    *,
    prompts: Sequence[str] | None = None,
    tokens: int | None = None,
    batch: int = 32,
    rank: Rank = ALONE,
    together: bool = False,
) -> Iterator[dict[str, Any]]:
    """Makes the shards that are missing, and yields the description of each when it is written.

    Of several processes each makes its share of the shards; all they have in common is the folder.

    Args:
      prompts: questions; without them, the model thinks of its own.
      tokens: stop when so many have been kept, by whatever processes; else at the last prompt.
      batch: conversations at a time.
      together: whether all processes make each shard together, with a model that lies in all of
        them; the first one writes it.

    Raises:
      ValueError: neither prompts nor tokens, a model that cannot think of questions, a first shard
        of which nothing can be kept, or a folder that holds other conversations.
      RuntimeError: another command is at work in the folder.
    """
    with lock.held(folder):
        yield from _converse(speaker, folder, settings, prompts, tokens, batch, rank, together)


def _converse(
    speaker: Speaker,
    folder: Path,
    settings: Settings,
    prompts: Sequence[str] | None,
    tokens: int | None,
    batch: int,
    rank: Rank,
    together: bool,
) -> Iterator[dict[str, Any]]:
    def known() -> dict[int, dict[str, Any]]:
        found = shards.finished(folder)
        return dict(sharding.agreed([*found.items()])) if together else found

    if prompts is None:
        if tokens is None:
            raise ValueError("say how many tokens to make, or give prompts to answer")
        if settings.raw:
            raise ValueError("without a chat template there is no user; give prompts to continue")
        chat.user_turn(speaker.tokenizer)
    elif not settings.raw:
        chat.prompt(speaker.tokenizer, prompts[0])
    known_as = speaker.network.identity.known_as(shards.about(folder).get("backbone"))
    shards.begin(folder, _about(known_as, settings, prompts))
    for number in itertools.count(*rank):
        start = number * settings.per_shard
        if prompts is not None and start >= len(prompts):
            return
        finished = known()
        so_far = sum(shard["tokens"] for shard in finished.values())
        if tokens is not None and so_far >= tokens:
            return
        if number in finished:
            continue
        asked = None if prompts is None else prompts[start : start + settings.per_shard]
        kept, dropped = _shard(speaker, settings, number, asked, batch)
        if prompts is None and not kept and not so_far:  # it would go on for ever
            raise ValueError(conversations.none_kept(dropped))
        counted = {"tokens": sum(c.tokens for c in kept), "dropped": dropped}
        if not (together and jax.process_index()):
            shards.write(folder, number, [c.pack() for c in kept], counted)
        yield known()[number]


def _about(backbone: str, settings: Settings, prompts: Sequence[str] | None) -> dict[str, Any]:
    digest = prompts and hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    model = {"backbone": backbone, "prompts": digest}
    return {"kind": conversations.KIND} | model | dataclasses.asdict(settings)


def _shard(
    speaker: Speaker, settings: Settings, number: int, prompts: Sequence[str] | None, batch: int
) -> tuple[list[Conversation], dict[Fault, int]]:
    """What is kept of a shard, and how many conversations were dropped for which fault."""
    seeds = np.random.SeedSequence((settings.seed, number)).generate_state(2).tolist()
    if prompts is None:
        questions = _thought_of(speaker, settings, seeds[0], batch)
    else:
        encode = speaker.tokenizer.encode
        questions = [Words(text, encode(text, add_special_tokens=False), True) for text in prompts]
    asked, faults = _asked(speaker, settings, questions)
    kept = []
    if asked:
        answers = speaker.write(
            [opening for _, opening in asked],
            settings.answer,
            settings.max_new_tokens,
            speaker.stop_ids,
            seeds[1],
            batch,
        )
        for (question, opening), answer in zip(asked, answers, strict=True):
            fault = settings.rules.fault_of_answer(answer, speaker.special)
            whole = opening + answer.tokens
            if answer.end not in (None, speaker.tokenizer.eos_token_id):  # such as a turn's own end
                whole = [*whole, answer.end]
            text = conversations.text_of(speaker.tokenizer, whole)
            if fault is None and text is None:
                fault = Fault.OTHER_TOKENS
            if fault is None:
                size = len(whole) + 1
                kept.append(Conversation(text, question, answer.text, size))
            else:
                faults.append(fault)
    return kept, dict(collections.Counter(faults))


def _thought_of(speaker: Speaker, settings: Settings, seed: int, batch: int) -> list[Words]:
    """As many questions as a shard has."""
    before, end = chat.user_turn(speaker.tokenizer)
    return speaker.write(
        [before] * settings.per_shard,
        settings.question,
        settings.max_question_tokens,
        sorted({end, *speaker.stop_ids}),
        seed,
        batch,
    )


def _asked(
    speaker: Speaker, settings: Settings, questions: Sequence[Words]
) -> tuple[list[tuple[str, list[int]]], list[Fault]]:
    """(question, tokens up to its answer) of those without a fault; the faults of the others."""
    tokenizer, context = speaker.tokenizer, speaker.model.config.context_length
    asked, faults = {}, []
    for question in questions:
        if settings.raw:
            text, opening = question.text, tokenizer.encode(question.text)
        else:  # many templates strip it, too
            text = question.text.strip()
            opening = chat.prompt(tokenizer, text)
        identity = conversations.hash_of(text)
        fault = settings.rules.fault_of_question(question, speaker.special)
        if fault is None and identity in asked:
            fault = Fault.ASKED_BEFORE
        if fault is None and len(opening) + settings.max_new_tokens > context:
            fault = Fault.LONG_QUESTION
        if fault is None:
            asked[identity] = text, opening
        else:
            faults.append(fault)
    return list(asked.values()), faults
