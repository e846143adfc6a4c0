"""Who packs text into shards of tokens: this process, several of this machine, or Apache Beam.

The one idea: a worker needs the job, which is a few names, and the number of a part. All of them
load the tokenizer by its name, and do the same (`data.packing.pack`).
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from early_exit.data import corpus, packing, tokenising
from early_exit.pretrained import sources
from early_exit.pretrained.tokenizer import load_tokenizer
from early_exit.runs import checkpoint, layout
from early_exit.storage import buckets, extras, files


@dataclasses.dataclass(frozen=True)
class Job:
    """What every part is packed with; can be pickled.

    Attributes:
      tokenizer: the source of the model whose tokenizer it is (`tokenizer_of`).
      source: what the text is called.
      folder: of the shards.
      about: what they follow from (`data.packed.about`).
    """

    tokenizer: str
    source: str
    folder: str
    about: dict[str, Any]

    def pack(self, number: int, part: corpus.Part) -> dict[str, Any]:
        """Makes the shards of a part; their description."""
        encode = tokenising.batch_encoder(tokenizer_of(self.tokenizer), self.source)
        return packing.pack(part, number, buckets.place(self.folder), self.about, encode)


@functools.lru_cache(maxsize=1)
def tokenizer_of(source: str) -> Any:
    """The tokenizer of a model, which may be a run whose backbone was trained; no weights are read.

    Raises:
      FileNotFoundError, RuntimeError: the source cannot be had.
      ValueError: no readable tokenizer, or none at all.
    """
    folder = buckets.place(source)
    if checkpoint.latest_step(folder / layout.CHECKPOINTS) is not None:
        return tokenizer_of(layout.load_config(folder).model.source)
    path = sources.fetch(source)
    config = path / "config.json"
    told = files.read_json(config) if path.is_dir() and config.exists() else {}
    return tokenising.needed(load_tokenizer(path, told))


def here(
    job: Job, parts: Sequence[corpus.Part], numbers: Sequence[int], processes: int
) -> Iterator[dict[str, Any]]:
    """Packs parts on this machine; yields the description of each when it is made.

    Args:
      numbers: which of the parts.
      processes: how many work at a time. With one, it is this one.
    """
    if processes == 1:
        for number in numbers:
            yield job.pack(number, parts[number])
        return
    # Anew, and not as a copy of this process, which has threads. What is killed is noticed.
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with concurrent.futures.ProcessPoolExecutor(processes, context, _begin_worker) as pool:
        made = [pool.submit(job.pack, number, parts[number]) for number in numbers]
        try:
            for done in concurrent.futures.as_completed(made):
                yield done.result()
        except BaseException:  # the parts at work are made again, and nobody waits for them
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


def _begin_worker() -> None:
    """One thread for each worker; and none that goes on when the command is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends them
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def by_beam(
    job: Job, parts: Sequence[corpus.Part], numbers: Sequence[int], flags: Sequence[str]
) -> None:
    """Packs parts by an Apache Beam pipeline, and returns when all are made.

    Args:
      flags: options of the pipeline, such as `--runner=DataflowRunner`.

    Raises:
      RuntimeError: Beam is not installed, or the pipeline failed.
    """
    with extras.needed("beam"):
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

    with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
        _ = (
            pipeline
            | "parts" >> beam.Create([(number, parts[number]) for number in numbers])
            # Or one worker gets them all: the runner may fuse what stands in a row.
            | "to all workers" >> beam.Reshuffle()
            | "pack" >> beam.MapTuple(job.pack)
        )
