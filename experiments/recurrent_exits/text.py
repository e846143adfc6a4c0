"""On which text a recurrent exit knows what comes: runs tuned on some, measured on others.

    python -m experiments.recurrent_exits.text --run=runs/own --run=runs/foreign \\
        --on=made:data/answers --on=stdlib --check

Agreement of the first, second, third and seventh draft with the full model, on held-out text of
each source, chains begun at every position. The bar is about the first run and the first source: it
knows that text better than the others do.
"""

from pathlib import Path

from absl import flags

from early_exit.data import feed
from early_exit.evaluation import drafts
from early_exit.runs import assemble
from early_exit.runs.metrics import table
from early_exit.settings.read import changed
from experiments import bars

RUNS = flags.DEFINE_multi_string("run", None, "Folders of runs.", required=True)
ON = flags.DEFINE_multi_string("on", None, "Sources of text, as `data.source`.", required=True)
BATCHES = flags.DEFINE_integer("batches", 8, "Of each source.", lower_bound=1)

SHOWN = (1, 2, 3, 7)


def main(argv):
    del argv
    rows, first = [], {}
    for folder in RUNS.value:
        tuned = assemble.load_tuned(Path(folder))
        for source in ON.value:
            settings = changed(tuned.config, {"data.source": source})
            text = feed.make(settings, tuned.model.config, tuned.tokenizer)
            batches = text.calibration(1 if bars.QUICK.value else BATCHES.value)
            found = drafts.summary(drafts.record(tuned.model, tuned.params, batches))
            agreement = [row["agreement"] for row in found]
            first[folder, source] = agreement[0]
            shown = [agreement[step - 1] for step in SHOWN]
            rows.append((Path(folder).name, source, *shown, found[-1]["tokens"]))
    steps = [f"draft {step}" for step in SHOWN]
    print(table(rows, header=("run", "text", *steps, "tokens a pass of 8")))
    own, source = RUNS.value[0], ON.value[0]
    others = [first[other, source] for other in RUNS.value[1:]]
    ahead = first[own, source] - max(others, default=0.0)
    name = f"agreement of the first draft on {source}: {Path(own).name} before the others"
    bars.conclude({"rows": rows}, [bars.Bar(name, ahead, 0.05, True)])


if __name__ == "__main__":
    bars.run(main)
