"""Texts for studies: of labelled examples, or of any source of text, none of which was tuned on."""

from early_exit.data import sources
from early_exit.data.examples import examples


def texts_of(source: str) -> list[tuple[str, str]]:
    """(name, text) pairs: all labelled texts (`rows:…`); of others, all but the training split."""
    if source.startswith("rows:"):
        splits = ("train", "validation", "calibration", "test")
        found = [example for split in splits for example in examples(source, split)]
        return [(str(i), example["text"]) for i, example in enumerate(found)]
    return [pair for split in list(sources.SPLITS)[1:] for pair in sources.documents(source, split)]
