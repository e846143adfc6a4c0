"""The texts that are looked at, and what is known of each of their tokens.

The one idea: the full model's answer is given text, so one pass says where each of its tokens could
have left; and other people's text is read the same way.
"""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from early_exit.data import transforms
from early_exit.evaluation import exits
from early_exit.evaluation.answers import Questions
from early_exit.runs import progress
from early_exit.runs.assemble import Tuned
from early_exit.storage import files
from experiments.recurrent_exits.questions import KINDS, questions
from experiments.texts import texts_of
from experiments.token_difficulty import tokens

# Tokens of an article before those that are looked at.
CONTEXT = 16
CONFIDENCE = "max_prob"

Table = dict[str, np.ndarray]  # of N positions, the last axis of each


class Sizes(NamedTuple):
    """How much there is of everything.

    Attributes:
      seeds: each has texts of its own.
      texts: of a seed.
      new_tokens: of a text that are looked at, at most.
      batch: texts that run together.
    """

    seeds: range
    texts: int
    new_tokens: int
    batch: int


class Text(NamedTuple):
    """A text, the first token that is looked at, and where one begins to count."""

    ids: list[int]
    first: int
    begin: int


def answered(tuned: Tuned, sizes: Sizes, path: Path | None) -> list[list[Text]]:
    """The full model's greedy answers to maths problems and programming tasks, by seed.

    The first token of an answer comes out of the prompt's pass, and is not looked at.

    Args:
      path: where they are kept, and read if they are there.

    Raises:
      ValueError: those that are kept are of other sizes, or there are too few questions.
    """
    asked_for = {"seeds": list(sizes.seeds), "texts": sizes.texts, "new_tokens": sizes.new_tokens}
    if path and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked_for"] != asked_for:
            raise ValueError(f"{path} holds answers to other flags; name another file")
        return [[Text(*text) for text in of_seed] for of_seed in kept["texts"]]
    of_kind = -(-sizes.texts // len(KINDS))
    known = [questions(kind, of_kind * sizes.seeds.stop, held_out=True) for kind in KINDS]
    found = []
    for seed in sizes.seeds:
        own = itertools.chain(*(texts[of_kind * seed :][:of_kind] for texts in known))
        prompts = [tuned.chat(text) for text in own][: sizes.texts]
        if len(prompts) < sizes.texts:
            raise ValueError(f"there are too few questions for seed {seed}; lower --texts")
        asked = Questions.ask(tuned, prompts, sizes.new_tokens, sizes.batch, seed=seed)
        found.append(
            [
                Text([*map(int, prompt), *answer.tolist()], len(prompt) + 1, len(prompt))
                for prompt, answer in zip(asked.prompts, asked.references, strict=True)
            ]
        )
    if path:
        files.write_json(path, {"asked_for": asked_for, "texts": found})
    return found


def given(tuned: Tuned, sizes: Sizes, source: str) -> list[list[Text]]:
    """Beginnings of texts that are long enough, by seed.

    Raises:
      ValueError: too few.
    """
    length, wanted, found = CONTEXT + sizes.new_tokens, sizes.texts * sizes.seeds.stop, []
    for _, text in texts_of(source):
        ids = tuned.encode(text)[:length]
        if len(ids) == length:
            found.append(Text([int(token) for token in ids], CONTEXT + 1, 0))
        if len(found) == wanted:
            return [found[sizes.texts * seed :][: sizes.texts] for seed in sizes.seeds]
    raise ValueError(f"only {len(found)} texts of {source} have {length} tokens, not {wanted}")


def positions(tuned: Tuned, texts: list[list[Text]], sizes: Sizes) -> Table:
    """What is known of every place that is looked at.

    Returns:
      `agree` bool [E, N], whether an early exit says what the full model says there; `needed`
      [N], blocks until one does; `scores` [E, N], how sure each is, −inf where it declines, and
      `last_scores`, how sure it was at the place before (0 where it declined); `entropy` [N] of
      the full model, in nats; `known` bool [N], whether heads have the token that it says among
      their classes; `text` and `seed` [N]; and of `tokens.described` all, of that token, `before`
      being [F, N].

    Raises:
      ValueError: a network in which texts do not stand alone.
    """
    if tuned.model.config.encodes_prompts:
        raise ValueError("the network encodes its prompt; give a decoder that reads texts as rows")
    everything = list(itertools.chain(*texts))
    seeds = np.repeat(list(sizes.seeds), [len(of_seed) for of_seed in texts])
    rows = sizes.batch
    chunks = [everything[i : i + rows] for i in range(0, len(everything), rows)]
    longest = max(len(text.ids) for text in everything)
    length = longest + -longest % 64
    batches = (transforms.one_a_row([x.ids for x in c], length, rows) for c in chunks)
    counted = progress.counted(batches, "reading", total=len(chunks))
    records = exits.record(tuned.model, tuned.params, counted)
    scores, final = records.score(CONFIDENCE)[:-1], records.predictions[-1]
    heads = tuned.params.get("token_ids")  # none where they have the whole vocabulary
    whole = {
        "known": np.ones(len(final), bool) if heads is None else np.isin(final, heads),
        "agree": records.agrees & (scores > -np.inf),
        "scores": scores,
        "entropy": (1 - records.score("entropy")[-1]) * np.log(tuned.model.config.vocab_size),
    }
    pieces = tokens.Pieces(tuned.tokenizer.decode, tuned.tokenizer.all_special_ids)
    # A text has a position for each token but the last.
    starts = np.cumsum([0, *(len(text.ids) - 1 for text in everything)])[:-1]
    parts = []
    for number, (text, start) in enumerate(zip(everything, starts, strict=True)):
        at = start + np.arange(text.first - 1, len(text.ids) - 1)
        if not len(at):  # it ended at once
            continue
        what = tokens.described(text.ids, text.first, final[at].tolist(), pieces, text.begin)
        parts.append(
            what
            | {name: x[..., at] for name, x in whole.items()}
            | {
                "before": what["before"].T,
                "last_scores": np.maximum(scores[:, at - 1], 0),
                "text": np.full(len(at), number),
                "seed": np.full(len(at), seeds[number]),
            }
        )
    found = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    first = np.where(found["agree"].any(0), found["agree"].argmax(0), len(scores))
    return found | {"needed": records.exit_depths[first]}


def take(table: Table, chosen: np.ndarray) -> Table:
    """Some positions, by index or by a mask."""
    return {name: x[..., chosen] for name, x in table.items()}
