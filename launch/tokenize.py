"""Packs text of any size into shards of tokens, which training reads row by row.

    python -m launch.tokenize --config=configs/llama3_8b.py --packed=packed/pile \\
        --source='/data/pile/**/*.jsonl.zst' --processes=32
    python -m launch.tune --config=configs/llama3_8b.py \\
        --config.data.source=packed:packed/pile --workdir=runs/a
    python -m launch.tokenize … --beam -- --runner=FlinkRunner --flink_master=…

The tokenizer is that of model.source, and rows have data.sequence_length tokens. The source is a
folder, a file or a glob of .txt, .py, .md, .rst, .jsonl(.gz, .zst) and .parquet files; `hf:NAME` or
`tfds:NAME`, or folders with copies of these; or whatever data.source may be. Killed, the same
command goes on with the parts that are not made yet; what it makes is the same, bit for bit,
whatever the number of processes, and by Beam, too (behind `--`, options of its pipeline).
"""

import os
import time

from absl import flags

from early_exit.data import corpus, packed, packing
from early_exit.runs import packing as workers
from early_exit.runs.metrics import table
from early_exit.runs.progress import Progress
from early_exit.storage import buckets
from launch import common

PACKED = flags.DEFINE_string("packed", None, "Folder for the shards.")
SOURCE = flags.DEFINE_string("source", None, "The text; data.source if absent.")
TEXT = flags.DEFINE_string("text", "text", "What holds the text, in a row of JSON or of a table.")
PROCESSES = flags.DEFINE_integer(
    "processes", None, "That work at a time; one a core if absent.", lower_bound=1
)
PART_MIB = flags.DEFINE_integer(
    "part_mib",
    corpus.PART_BYTES >> 20,
    "Text, roughly, in a part, which is what an interruption may lose.",
    lower_bound=1,
)
BEAM = flags.DEFINE_bool("beam", False, "Have Apache Beam do it, with its options behind `--`.")


def main(argv):
    if argv[1:] and not BEAM.value:
        common.no_arguments(argv)
    config, folder = common.settings(), buckets.place(PACKED.value)
    source = SOURCE.value or config.data.source
    if source.startswith(packed.PACKED):
        raise ValueError(f"{source} holds tokens, no text; give --source")
    if not config.model.source:
        raise ValueError("a new network has no tokenizer; the config needs model.source")
    tokenizer = workers.tokenizer_of(config.model.source)
    parts = corpus.parts(source, TEXT.value, PART_MIB.value << 20)
    length = config.data.sequence_length
    about = packed.about(tokenizer, length, corpus.identity(parts), len(parts))
    common.own(folder)
    left = packing.begin(folder, about)
    at = folder if buckets.is_remote(folder) else folder.absolute()
    job = workers.Job(config.model.source, source, str(at), about)
    began, made = time.perf_counter(), 0
    if BEAM.value:
        workers.by_beam(job, parts, left, argv[1:])
    else:
        processes = min(PROCESSES.value or os.cpu_count() or 1, len(left) or 1)
        done = len(parts) - len(left)
        with Progress(len(parts), "parts", done=done, description="tokenising") as bar:
            for described in workers.here(job, parts, left, processes):
                made += sum(split["tokens"] for split in described.values())
                bar.update(1)
    seconds = time.perf_counter() - began
    manifest = packing.finish(folder, about, source)
    names = ("documents", "tokens", "records", "bytes")
    rows = [(split, *(of[name] for name in names)) for split, of in manifest["splits"].items()]
    print(table(rows, header=("split", "documents", "tokens", "records", "bytes")))
    if made:
        print(f"{made / seconds:.0f} tokens/s")
    print(f"packed in {folder}; to use it, --config.data.source={packed.PACKED}{folder}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "packed"])
    common.run(main, on_run=False, configured=True)
