"""Lets a model make the text that its exits are tuned on: its own answers, to its own questions.

    python -m launch.distill --config=configs/smollm2_135m.py --made=data/smollm2 --tokens=200_000
    python -m launch.distill --workdir=runs/smollm2 --made=data/asked --input=prompts.txt
    python -m launch.tune --config=… --config.data.source=made:data/smollm2 --workdir=…

Questions are the model's, from the user's turn of its chat template, or those of a file (a prompt
on each line, as text, or in `.jsonl` as an object with a "prompt"). The full model answers; what is
kept of it, see `data.conversations`. Killed, it goes on after the last finished shard. Several
processes share the shards out, or make each together, where the model needs the devices of several
(see `launch.processes` and `mesh.*`). At the end, prints what became of all questions.
"""

import functools

import jax
from absl import flags
from jax.sharding import Mesh

from early_exit import sharding
from early_exit.data import conversations, text_files
from early_exit.data.stream import ALONE, Rank
from early_exit.decoding.sampling import Sampling
from early_exit.distillation.converse import Settings, Speaker, converse
from early_exit.runs import assemble, metrics
from early_exit.runs.progress import Progress
from early_exit.settings import sections
from early_exit.storage import buckets, copies
from launch import common, on_mesh, usage

DEFAULT = Settings()

MADE = flags.DEFINE_string("made", None, "Folder for the conversations.", required=True)
INPUT = flags.DEFINE_string("input", None, "File of prompts, instead of questions of its own.")
RAW = flags.DEFINE_bool("raw", DEFAULT.raw, "Continue --input as it is, without a chat template.")
TOKENS = flags.DEFINE_integer(
    "tokens", None, "Tokens to keep, questions and all; with --input, at most.", lower_bound=1
)
BATCH = flags.DEFINE_integer("batch", 32, "Conversations at a time.", lower_bound=1)
PER_SHARD = flags.DEFINE_integer(
    "per_shard", DEFAULT.per_shard, "Questions in a shard; what an interruption may lose."
)
QUESTION_TOKENS = flags.DEFINE_integer(
    "max_question_tokens", DEFAULT.max_question_tokens, "Most tokens of a question of its own."
)
NEW = flags.DEFINE_integer("max_new_tokens", DEFAULT.max_new_tokens, "Most tokens of an answer.")
QUESTION_TEMPERATURE = flags.DEFINE_float(
    "question_temperature", DEFAULT.question.temperature, "Of questions of its own."
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", DEFAULT.answer.temperature, "Of answers; 0 is greedy."
)
TOP_P = flags.DEFINE_float(
    "top_p", DEFAULT.answer.top_p, "Sample answers among tokens of this total probability."
)
SHORTEST = flags.DEFINE_integer("shortest", DEFAULT.rules.shortest, "Least tokens of an answer.")
REPEATED = flags.DEFINE_float(
    "repeated", DEFAULT.rules.repeated, "Most 4-grams that stood there before, as a rank."
)
UNFINISHED = flags.DEFINE_bool(
    "unfinished", DEFAULT.rules.unfinished, "Keep answers that were cut off."
)
SEED = flags.DEFINE_integer("seed", DEFAULT.seed, "Of everything that is drawn.", **common.SEEDS)

usage.group("what is kept", SHORTEST, REPEATED, UNFINISHED)
usage.group("how tokens are drawn", QUESTION_TEMPERATURE, TEMPERATURE, TOP_P, SEED)
flags.adopt_module_key_flags(on_mesh)  # what --help lists


def main(argv):
    on_mesh.begin(argv)
    settings = Settings(
        question=Sampling(QUESTION_TEMPERATURE.value),
        answer=Sampling(TEMPERATURE.value, top_p=TOP_P.value),
        max_question_tokens=QUESTION_TOKENS.value,
        max_new_tokens=NEW.value,
        rules=conversations.Rules(SHORTEST.value, REPEATED.value, UNFINISHED.value),
        raw=RAW.value,
        seed=SEED.value,
        per_shard=PER_SHARD.value,
    )
    folder = buckets.place(MADE.value)
    config = on_mesh.settings()
    mesh, together = sharding.own_mesh(config.mesh)
    common.own(folder)
    common.tell_devices()
    prompts = text_files.listed(copies.fetched(INPUT.value), "prompt") if INPUT.value else None
    made = converse(
        _speaker(config, mesh),
        folder,
        settings,
        prompts=prompts,
        tokens=TOKENS.value,
        batch=BATCH.value,
        together=together,
        rank=ALONE if together else Rank(jax.process_index(), jax.process_count()),
    )
    with Progress(TOKENS.value, "tokens", description="answering") as bar:
        for shard in made:
            bar.update(shard["tokens"])
    first = not jax.process_index()
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # waits for the others
    if not first:
        return
    rows, tokens = conversations.summary(folder)
    print(metrics.table(rows, header=("conversations", "count", "share")))
    print(f"{tokens} tokens in {folder}; to use them, --config.data.source=made:{folder}")


def _speaker(config: sections.Settings, mesh: Mesh) -> Speaker:
    on = None if mesh.size == 1 else mesh
    where = on and functools.partial(sharding.shardings, mesh=on)
    if common.WORKDIR.value is None:
        pretrained, _ = assemble.load_backbone(config, where)
        return Speaker(pretrained)
    return Speaker(assemble.load_tuned(common.workdir(), config, on).backbone)


if __name__ == "__main__":
    common.run(main, configured=True)
