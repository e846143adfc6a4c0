"""Runs tasks of lm-evaluation-harness on a run: their scores, and the depth and time they took.

    python -m launch.lm_eval --workdir=runs/a --tasks=arc_easy,hellaswag --limit=200 --full
    python -m launch.lm_eval --workdir=runs/a --include=experiments/tasks \\
        --tasks=local_human_eval_solutions
    python -m launch.lm_eval --workdir=runs/a --tasks=gsm8k --mode=verified --drafters=lookup

It needs the extra `lm-eval`. Given texts are scored token by token as the mode would have judged
them; answers are decoded in it. --exit=8 takes every token from the exit after block 8 instead. The
first token of a given text, as of an answer, runs every block; where a task compares single tokens,
--first_leaves lets it leave, too.
"""

import sys

from absl import flags

from early_exit.calibration import promise
from early_exit.runs import assemble
from early_exit.storage import buckets, files
from launch import common, decoding_flags

TASKS = flags.DEFINE_list("tasks", None, "Names of tasks (`lm-eval ls tasks`).", required=True)
INCLUDE = flags.DEFINE_string("include", None, "Folder with further task files.")
POLICY = flags.DEFINE_string("policy", "own", "The run's own, or the file of another one.")
FULL = flags.DEFINE_bool("full", False, "Consult no exit.")
EXIT = flags.DEFINE_integer("exit", None, "Every token from the exit after this block.")
BATCH = flags.DEFINE_integer("batch", 8, "Texts together.", lower_bound=1)
LIMIT = flags.DEFINE_integer("limit", None, "Examples of each task.", lower_bound=1)
FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Solved examples in front.", lower_bound=0)
CHAT = flags.DEFINE_bool("chat", False, "Put prompts into the model's chat template.")
NEW = flags.DEFINE_integer(
    "max_new_tokens", 256, "Most tokens of an answer, where a task says none.", lower_bound=1
)
FIRST = flags.DEFINE_bool(
    "first_leaves", False, "Of a given text, the first scored token may come from an exit, too."
)
UNSAFE = flags.DEFINE_bool("run_code", False, "Tasks may run what the model has written.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file for all that is found.")

flags.adopt_module_key_flags(decoding_flags)  # what --help lists


def main(argv):
    common.no_arguments(argv)
    try:
        from early_exit.evaluation import harness, tasks
    except ModuleNotFoundError as error:
        raise ValueError(
            f"tasks need lm-evaluation-harness ({error}); pip install '.[lm-eval]'"
        ) from error
    if FULL.value and EXIT.value is not None:
        raise ValueError("give one of --full and --exit")
    common.tell_devices()
    tuned = assemble.load_tuned(common.workdir(), common.settings())
    how = harness.how_of(
        tuned,
        policy="none" if FULL.value else POLICY.value,
        exit_after=EXIT.value,
        mode=decoding_flags.mode(),
    )
    policy, mode = how["policy"], how["mode"]
    told = policy and mode and promise.elsewhere(policy.provenance, mode.name, NEW.value)
    if told:
        print(f"warning: {told}", file=sys.stderr)
    model = harness.RunLM(
        tuned,
        **{"first_leaves": FIRST.value} | how,
        batch_size=BATCH.value,
        max_gen_toks=NEW.value,
    )
    results = tasks.evaluate(
        model,
        TASKS.value,
        include=INCLUDE.value and buckets.here(INCLUDE.value, "a folder of tasks"),
        limit=LIMIT.value,
        num_fewshot=FEWSHOT.value,
        chat=CHAT.value,
        unsafe=UNSAFE.value,
    )
    print("\n\n".join(tasks.tables(results)))
    if OUTPUT.value:
        files.write_json(buckets.place(OUTPUT.value), results)
        print(OUTPUT.value)


if __name__ == "__main__":
    common.run(main)
