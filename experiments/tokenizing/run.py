"""What does packing cost beside the tokenizer itself?

    python -m experiments.tokenizing.run --check

The same documents go through `tokenizers`, which does nothing but tokenise, and through what
`launch.tokenize` does in each of its processes: read the text, tokenise, keep held-out documents
apart, pack rows, write shards. In turns, on one core each.
"""

import os
import tempfile
import time
from pathlib import Path

from absl import flags

from configs import smollm2_135m
from early_exit.data import corpus, packed, packing, sources
from early_exit.runs import packing as workers
from early_exit.runs.metrics import table
from early_exit.storage import files
from experiments import bars

SOURCE = flags.DEFINE_string("source", "stdlib", "The text.")
MODEL = flags.DEFINE_string("model", None, "Whose tokenizer; SmolLM2's if absent.")
MEGABYTES = flags.DEFINE_integer("megabytes", 16, "Of text.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns; the median is kept.", lower_bound=1)

LEAST = 0.8
LENGTH = 512


def main(argv):
    del argv
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    size, rounds = (1, 1) if bars.QUICK.value else (MEGABYTES.value, ROUNDS.value)
    model = MODEL.value or smollm2_135m.SOURCE
    tokenizer = workers.tokenizer_of(model)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        documents = _written(text, size << 20)
        parts = corpus.parts(str(text), "text", 4 << 20)
        about = packed.about(tokenizer, LENGTH, corpus.identity(parts), len(parts))
        rates = {"tokenizers": [], "launch.tokenize": []}
        for turn in range(rounds + 1):  # the first warms both up
            bare = _rate(lambda: _tokenised(tokenizer, documents))
            shards = Path(folder) / f"packed_{turn}"
            ours = _rate(lambda at=shards: _packed(model, str(text), at, parts, about))
            if turn:
                rates["tokenizers"].append(bare)
                rates["launch.tokenize"].append(ours)
    medians = {name: sorted(found)[len(found) // 2] for name, found in rates.items()}
    print(table(list(medians.items()), header=("", "tokens/s a core")))
    share = medians["launch.tokenize"] / medians["tokenizers"]
    bars.conclude(medians, [bars.Bar("launch.tokenize ÷ tokenizers", share, LEAST, True)])


def _written(path: Path, size: int) -> list[str]:
    """The first documents of the text, in a file of about so many bytes."""
    documents, written = [], 0
    for part in corpus.parts(SOURCE.value, "text", size):
        for document in part.documents():
            documents.append(document.text)
            written += len(document.text)
            if written >= size:
                break
        else:
            continue
        break
    files.write_text(path, "".join(files.json_text({"text": text}) + "\n" for text in documents))
    return documents


def _rate(work) -> float:
    began = time.perf_counter()
    return work() / (time.perf_counter() - began)


def _tokenised(tokenizer, documents: list[str]) -> int:
    """Tokens, and the end that each document has."""
    bare = tokenizer.backend_tokenizer
    count = 0
    for start in range(0, len(documents), 64):
        found = bare.encode_batch_fast(documents[start : start + 64])
        count += sum(len(encoding.ids) + 1 for encoding in found)
    return count


def _packed(model: str, source: str, folder: Path, parts, about) -> int:
    numbers = packing.begin(folder, about)
    job = workers.Job(model, source, str(folder), about)
    made = list(workers.here(job, parts, numbers, processes=1))
    return sum(described[split]["tokens"] for described in made for split in sources.SPLITS)


if __name__ == "__main__":
    bars.run(main)
