"""What makes a token easy? Where each could have left, joined with what it is.

    python -m experiments.token_difficulty.run --workdir=runs/demo --answers=runs/said.json --check
    python -m experiments.token_difficulty.run --workdir=runs/demo --quick

Two domains: the model's own greedy answers to maths problems and programming tasks, and news as it
was written. At each place the question is where an exit first says what the full model says there.
A seed is another sample of prompts and of articles, with none in common; the exits are the same.
Intervals are of the bootstrap over texts (95 %). Answers are kept in --answers, and not decoded
again.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from configs import news_minilm
from early_exit.runs import assemble
from early_exit.runs.metrics import table
from experiments import bars, figures
from experiments.token_difficulty import samples, tokens
from experiments.token_difficulty.samples import CONFIDENCE, Sizes, Table
from experiments.token_difficulty.tokens import INSIDE, PUNCTUATION, SPACE, WORD

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a tuned run.", required=True)
ANSWERS = flags.DEFINE_string("answers", None, "File for the answers; read if it is there.")
SOURCE = flags.DEFINE_string("source", None, "Texts of the second domain; BBC News if absent.")
TEXTS = flags.DEFINE_integer("texts", 40, "Prompts, and articles, of a seed.", lower_bound=4)
NEW = flags.DEFINE_integer("new_tokens", 64, "Tokens looked at in each, at most.", lower_bound=4)
SEEDS = flags.DEFINE_integer("seeds", 3, "How many samples.", lower_bound=2)
FIRST = flags.DEFINE_integer("first_seed", 1, "The first of them.", lower_bound=0)
BATCH = flags.DEFINE_integer("batch", 8, "Texts that run together.", lower_bound=1)
DRAWS = flags.DEFINE_integer("draws", 500, "Of texts, for an interval.", lower_bound=1)

OWN, GIVEN = "own answers", "given text"


def main(argv):
    del argv
    tuned = assemble.load_tuned(Path(WORKDIR.value))
    sizes = Sizes(
        range(FIRST.value, FIRST.value + SEEDS.value), TEXTS.value, NEW.value, BATCH.value
    )
    if bars.QUICK.value:
        sizes = sizes._replace(seeds=range(2), texts=8, new_tokens=12)
    of_domains = {
        OWN: samples.answered(tuned, sizes, ANSWERS.value and Path(ANSWERS.value)),
        GIVEN: samples.given(tuned, sizes, SOURCE.value or news_minilm.DATA),
    }
    found = {name: samples.positions(tuned, texts, sizes) for name, texts in of_domains.items()}
    depths, results = tuned.model.exit_depths, {}
    for name, of in found.items():
        texts = len(np.unique(of["text"]))
        print(f"\n{name}: {len(of['text'])} tokens of {texts} texts, {len(sizes.seeds)} seeds\n")
        results[name] = {
            "levels": _levels(of, depths, sizes.seeds),
            "correlations": _correlations(of),
            "exits": _between_exits(of, depths),
            "foretold": _foretold(of, depths),
        }
    results["stability"] = _stability(found, sizes.seeds)
    bars.conclude(results, list(_bars(found, sizes.seeds)))


def _draws() -> int:
    return 20 if bars.QUICK.value else DRAWS.value


# Tables.


def _of_levels(positions: Table) -> dict[tuple[str, str], np.ndarray]:
    """(feature, level) → bool [N], which tokens are of it."""
    kind, ranks, entropy = (positions[name] for name in ("kind", "rank", "entropy"))
    of_word = np.isin(kind, (WORD, INSIDE))

    def between(name, x, edges, unit=""):
        for low, high in itertools.pairwise(edges):
            if high == np.inf:
                level = f"{low:g} and more{unit}"
            else:
                level = f"{low:g} to below {high:g}{unit}"
            yield (name, level), (x >= low) & (x < high)

    return {
        **{("kind", name): kind == k for k, name in enumerate(tokens.KINDS)},
        ("place in its word", "first"): of_word & (positions["in_word"] == 0),
        ("place in its word", "second"): of_word & (positions["in_word"] == 1),
        ("place in its word", "later"): of_word & (positions["in_word"] > 1),
        **dict(between("place in its line", positions["in_line"], (0, 1, 4, 16, np.inf))),
        **dict(between("place in the text", positions["in_text"], (0, 8, 32, np.inf))),
        **dict(between("rank in the vocabulary", ranks, (0, 512, 4096, 16384, np.inf))),
        ("in the text before", "yes"): positions["repeated"] == 1,
        ("in the text before", "no"): positions["repeated"] == 0,
        ("among the heads' tokens", "yes"): positions["known"],
        ("among the heads' tokens", "no"): ~positions["known"],
        **dict(between("full model's entropy", entropy, (0, 0.1, 0.5, 1.5, np.inf), unit=" nats")),
    }


def _depths_of(positions: Table) -> tuple[list, figures.Figures]:
    """(the levels, positions → the mean depth that each level's tokens need)."""
    levels = _of_levels(positions)
    masks = np.array(list(levels.values()), np.float64)

    def depths(chosen):
        own = masks[:, chosen]
        with np.errstate(invalid="ignore"):
            return own @ positions["needed"][chosen] / own.sum(axis=1)

    return list(levels), depths


def _levels(positions: Table, depths: np.ndarray, seeds: range) -> list[dict]:
    levels, of = _depths_of(positions)
    values, low, high = figures.intervals(of, positions["text"], _draws())
    of_seeds = np.array([of(np.flatnonzero(positions["seed"] == seed)) for seed in seeds])
    rows = []
    for k, (level, mask) in enumerate(_of_levels(positions).items()):
        if mask.any():
            rows.append(
                {
                    "feature": level[0],
                    "level": level[1],
                    "share": mask.mean(),
                    "needed": values[k],
                    "from": low[k],
                    "to": high[k],
                    "seeds": of_seeds[:, k].tolist(),
                    "agree": positions["agree"][:, mask].mean(axis=1).tolist(),
                }
            )
    print("blocks needed, on average, until an exit says what the full model says:")
    print(
        table(
            [
                (
                    *(row[name] for name in ("feature", "level", "share", "needed", "from", "to")),
                    *(np.nanmin(row["seeds"]), np.nanmax(row["seeds"])),
                    *row["agree"],
                )
                for row in rows
            ],
            header=(
                *("what", "which", "share", "needed", "from", "to (95 %)"),
                *("least seed", "most"),
                *(f"same at {depth}" for depth in depths[:-1]),
            ),
        )
    )
    return rows


ORDERED = ("entropy", "rank", "in_word", "in_line", "in_text", "repeated")


def _with_needed(positions: Table, names: Sequence[str]) -> figures.Figures:
    """Positions → rank correlations of these with the depth needed."""

    def of(chosen):
        needed = positions["needed"][chosen]
        return np.array([figures.rank_correlation(positions[x][chosen], needed) for x in names])

    return of


def _correlations(positions: Table) -> dict[str, list[tuple]]:
    """Rank correlations of the depth needed with what can be put in an order."""
    known = samples.take(positions, positions["known"])
    found = {}
    for among, table_of in (("all", positions), ("the heads' own", known)):
        of = figures.intervals(_with_needed(table_of, ORDERED), table_of["text"], _draws())
        found[among] = list(zip(ORDERED, *of, strict=True))
    print("\nrank correlation (Spearman) of the depth needed, among tokens:")
    rows = [(among, *row) for among, of in found.items() for row in of]
    print(table(rows, header=("among", "with", "", "from", "to (95 %)")))
    return found


def _between_exits(positions: Table, depths: np.ndarray) -> dict:
    """Do exits find the same tokens easy? Rank correlations of what they say of themselves."""
    pairs = list(itertools.combinations(range(len(depths) - 1), 2))

    def of(chosen):
        scores, agree = positions["scores"][:, chosen], positions["agree"][:, chosen]
        return np.array(
            [figures.rank_correlation(x[a], x[b]) for x in (scores, agree) for a, b in pairs]
        )

    values, low, high = figures.intervals(of, positions["text"], _draws())
    kinds = [name for name in (CONFIDENCE, "same as the full model") for _ in pairs]
    rows = [
        (kind, f"{depths[a]} and {depths[b]}", *row)
        for kind, (a, b), *row in zip(kinds, pairs * 2, values, low, high, strict=True)
    ]
    print("\nrank correlation between exits:")
    print(table(rows, header=("of", "exits", "", "from", "to")))
    return {"rows": rows}


# What foretells whether an exit says what the full model says; the last two are differences.
PREDICTORS = (
    *("text before", "text and exits before", "gate", "gate and text before"),
    *("gate − text before", "gate and text before − gate"),
)
GAIN = PREDICTORS.index("gate − text before")


def _auc_of(positions: Table, e: int) -> figures.Figures:
    """Positions → how well each of `PREDICTORS` foretells it of exit e, by AUC."""
    right, texts = positions["agree"][e], positions["text"]
    text, gate = positions["before"].T, positions["scores"][e]
    foretold = [
        figures.crossed(text, right, texts),
        figures.crossed(np.column_stack([text, positions["last_scores"].T]), right, texts),
        gate,
        figures.crossed(np.column_stack([text, np.maximum(gate, 0)]), right, texts),
    ]

    def of(chosen):
        plain, with_exits, alone, both = (figures.auc(x[chosen], right[chosen]) for x in foretold)
        return np.array([plain, with_exits, alone, both, alone - plain, both - alone])

    return of


def _foretold(positions: Table, depths: np.ndarray) -> list[dict]:
    rows = []
    for e, depth in enumerate(depths[:-1]):
        of = figures.intervals(_auc_of(positions, e), positions["text"], _draws())
        for name, value, *interval in zip(PREDICTORS, *of, strict=True):
            rows.append({"exit": int(depth), "by": name, "auc": value, "interval": interval})
    print("\nhow well it is foretold that an exit says what the full model says (AUC):")
    print(
        table(
            [(row["exit"], row["by"], row["auc"], *row["interval"]) for row in rows],
            header=("exit", "by", "AUC", "from", "to (95 %)"),
        )
    )
    return rows


def _stability(found: dict[str, Table], seeds: range) -> dict:
    """Whether the levels come in the same order in other samples, and in the other domain."""
    of_seeds = {
        name: np.array(
            [_depths_of(positions)[1](np.flatnonzero(positions["seed"] == seed)) for seed in seeds]
        )
        for name, positions in found.items()
    }

    def order(a, b):
        both = np.isfinite(a) & np.isfinite(b)
        return figures.rank_correlation(a[both], b[both])

    rows = [
        (name, min((order(a, b) for a, b in itertools.combinations(x, 2)), default=np.nan))
        for name, x in of_seeds.items()
    ]
    across = min(order(a, b) for a, b in itertools.product(*of_seeds.values()))
    rows.append(("one domain and the other", across))
    print("\nrank correlation of the levels' depths, the least between two seeds:")
    print(table(rows, header=("", "")))
    return dict(rows)


# Claims.


def _bars(found: dict[str, Table], seeds: range) -> Iterator[bars.Bar]:
    """Claims that must hold in both domains and in each seed, by the lower ends of intervals."""
    claims = {
        "blocks that words need more than white space and punctuation": _of_words,
        "rank correlation of blocks needed with the rank, heads' tokens": _with_rank,
        "rank correlation of blocks needed with the entropy": _with_entropy,
        "AUC, gate − text before, behind the first exit": _gain,
    }
    for claim, of in claims.items():
        ends = []
        for positions, seed in itertools.product(found.values(), seeds):
            sample = samples.take(positions, positions["seed"] == seed)
            _, low, _ = figures.intervals(of(sample), sample["text"], _draws())
            ends.append(low.min())
        yield bars.Bar(f"{claim}: least lower end", float(min(ends)), 0.0, True)


def _of_words(positions: Table) -> figures.Figures:
    easy = np.isin(positions["kind"], (PUNCTUATION, SPACE))
    words = np.isin(positions["kind"], (WORD, INSIDE))

    def of(chosen):
        needed = positions["needed"][chosen]
        return np.array([needed[words[chosen]].mean() - needed[easy[chosen]].mean()])

    return of


def _with_rank(positions: Table) -> figures.Figures:
    own = np.flatnonzero(positions["known"])
    return lambda chosen: _with_needed(positions, ("rank",))(chosen[np.isin(chosen, own)])


def _with_entropy(positions: Table) -> figures.Figures:
    return _with_needed(positions, ("entropy",))


def _gain(positions: Table) -> figures.Figures:
    later = [_auc_of(positions, e) for e in range(1, len(positions["agree"]))]
    return lambda chosen: np.array([of(chosen)[GAIN] for of in later])


if __name__ == "__main__":
    bars.run(main)
