"""What a run reads: text for a language model, labelled examples for a classifier.

The one idea: which of the two follows from the network, so that the training loop, calibration
and evaluation ask for batches of a split and never for what is in them.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from absl import logging

from early_exit.data import (
    examples,
    excerpts,
    inputs,
    labelled,
    packed,
    pairs,
    pipeline,
    sources,
    tokenising,
)
from early_exit.data.stream import ALONE, Rank, TrainingBatches
from early_exit.data.transforms import Batch
from early_exit.settings.sections import DataSettings, Settings
from early_exit.storage import buckets


class Network(pairs.Network, Protocol):
    """What a feed asks of a backbone's config (`backbones.base.BackboneConfig`)."""

    @property
    def reads(self) -> str: ...

    @property
    def classifies(self) -> bool: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def context_length(self) -> int:
        """Where it reads text."""


# JSON-able. Of text: `train`, the SHA-256 of the training split. Of labelled examples: `classes`,
# their names in the order of the network's outputs, and of images `image_size`, [H, W].
About = Mapping[str, Any]


class Feed(Protocol):
    """Batches of the four splits of a run's data (config section `data`).

    Attributes:
      unit: what is counted, `tokens` or `examples`.
      per_batch: units in a batch of all processes.
    """

    unit: str
    per_batch: int

    def training(self, seed: int, rank: Rank = ALONE) -> TrainingBatches:
        """Batches without end; see `data.pipeline` and `data.labelled`."""

    def held_out(self, split: str, num_batches: int | None, rank: Rank = ALONE) -> Iterable[Batch]:
        """The first batches of a split, always the same ones; None for all of them.

        Of each, the rows of one of so many processes, in order.
        """

    def calibration(self, num_batches: int | None) -> Iterable[Batch]:
        """The first batches to calibrate on: as many texts, or examples, as go into them."""

    def data_hash(self, split: str) -> str:
        """SHA-256 (hex) of a split."""

    def about(self) -> About:
        """What a run keeps of the data it is trained on, so that later commands know it again."""


def make(config: Settings, network: Network, tokenizer: Any, known: About | None = None) -> Feed:
    """The feed of a run for such a network.

    Args:
      known: what `Feed.about` gave when the run was trained; None for a run that begins, or one
        that has not kept it.

    Raises:
      ValueError: as `check_length`.
    """
    check_length(config.data, network)
    if network.encodes_prompts:
        return PairFeed(config.data, tokenizer, known or {}, network=network)
    if not network.classifies:
        kind = PackedFeed if config.data.source.startswith(packed.PACKED) else TextFeed
        return kind(config.data, tokenizer, known or {})
    return ExampleFeed(config.data, network, tokenizer, known or {})


def check_length(data: DataSettings, network: Network) -> None:
    """Raises ValueError where rows are longer than the network was made for.

    Rotary positions go on beyond that, but the network has never seen them: what exits learned
    there, and what a policy was calibrated on, would be worth nothing.
    """
    if network.reads != "tokens":
        return
    for name in ("sequence_length", "prompt_length"):
        if (length := getattr(data, name)) > network.context_length:
            raise ValueError(
                f"data.{name}={length} is beyond the {network.context_length} positions that the "
                "network was made for, and it knows nothing of later ones; set it to "
                f"{network.context_length} at most"
            )


@dataclasses.dataclass(frozen=True)
class TextFeed:
    """Documents, packed into rows: those that `data.source` names, or that were `given`, by split.

    Raises:
      ValueError: no tokenizer, or one that does not say what ends a text.
    """

    data: DataSettings
    tokenizer: Any
    known: About
    given: Mapping[str, pipeline.Documents] | None = None
    unit: str = "tokens"

    def __post_init__(self):
        tokenising.end_of_text(self.tokenizer)  # not only when the first batch is asked for

    @property
    def per_batch(self) -> int:
        return self.data.batch_size * self.data.sequence_length

    def documents(self, split: str) -> pipeline.Documents:
        """The texts of a split, each with its name."""
        if self.given is not None:
            return self.given[split]
        return sources.documents(self.data.source, split)

    @property
    def encode(self) -> tokenising.Encode:
        """What makes tokens of a document, without the one that ends it."""
        return tokenising.encoder(self.tokenizer, self.data.source)

    def training(self, seed, rank=ALONE):
        return pipeline.training_batches(
            self.documents("train"),
            seed=seed,
            rank=rank,
            num_threads=self.data.num_threads,
            **self._packing(),
        )

    def held_out(self, split, num_batches, rank=ALONE):
        return pipeline.evaluation_batches(
            self.documents(split),
            num_batches=num_batches,
            rank=rank,
            num_threads=self.data.num_threads,
            **self._packing(),
        )

    def calibration(self, num_batches):
        self._tell_of_changes()
        documents = self.documents("calibration")
        return excerpts.batches(documents, num_batches=num_batches, **self._packing())

    def _tell_of_changes(self) -> None:
        if "train" in self.known and self.known["train"] != self.data_hash("train"):
            logging.warning(
                "%s has changed since the run was tuned on it; text that was added does no harm, "
                "but tuned-on text that was edited may now be among what is calibrated on",
                self.data.source,
            )

    def data_hash(self, split):
        return sources.data_hash(self.documents(split))

    def about(self):
        return {"train": self.data_hash("train")}

    def _packing(self) -> dict[str, Any]:
        return {
            "tokenise": self.encode,
            "end_of_text": tokenising.end_of_text(self.tokenizer),
            "sequence_length": self.data.sequence_length,
            "batch_size": self.data.batch_size,
        }


@dataclasses.dataclass(frozen=True)
class PackedFeed(TextFeed):
    """Text that `launch.tokenize` has made tokens of, `packed:FOLDER` (`data.packed`).

    Raises:
      FileNotFoundError: no such folder, or it is not finished.
      ValueError: tokens of another tokenizer, rows of another length, or a shard that is missing
        or cut short.
    """

    def __post_init__(self):
        super().__post_init__()
        self._packed.check(self.tokenizer, self.data.sequence_length)
        self._packed.store(packed.TRAIN)

    @functools.cached_property
    def _packed(self) -> packed.Packed:
        folder = self.data.source.removeprefix(packed.PACKED)
        return packed.Packed(buckets.place(folder).expanduser())

    def documents(self, split):
        return self._packed.documents(split)

    @property
    def encode(self):
        return list  # they are tokens

    def training(self, seed, rank=ALONE):
        return self._packed.training(
            batch_size=self.data.batch_size,
            seed=seed,
            num_threads=self.data.num_threads,
            rank=rank,
        )

    def held_out(self, split, num_batches, rank=ALONE):
        if split != packed.TRAIN:
            return super().held_out(split, num_batches, rank)
        size, threads = self.data.batch_size, self.data.num_threads
        return self._packed.first_rows(size, num_batches, threads, rank)

    def data_hash(self, split):
        return self._packed.data_hash(split)


@dataclasses.dataclass(frozen=True)
class PairFeed(TextFeed):
    """Prompts and their answers (`data.pairs`), for a network that encodes prompts.

    Raises:
      ValueError: no tokenizer, or one that does not say what ends a text.
    """

    network: Network = dataclasses.field(kw_only=True)

    def rows(self, split: str) -> Sequence[tuple[str, str]]:
        """(prompt, answer) of a split."""
        return pairs.pairs(self.data.source, split) if self.given is None else self.given[split]

    @property
    def encoding(self) -> pairs.Encode:
        """What makes tokens of a pair."""
        length, longest = self.data.sequence_length, self.data.prompt_length
        return pairs.Encode(self.tokenizer, length, longest or length)

    def training(self, seed, rank=ALONE):
        return pairs.training_batches(
            self.rows("train"),
            self.encoding,
            self.network,
            batch_size=self.data.batch_size,
            seed=seed,
            num_threads=self.data.num_threads,
            rank=rank,
        )

    def held_out(self, split, num_batches, rank=ALONE):
        return pairs.evaluation_batches(
            self.rows(split),
            self.encoding,
            self.network,
            batch_size=self.data.batch_size,
            num_batches=num_batches,
            num_threads=self.data.num_threads,
            rank=rank,
        )

    def calibration(self, num_batches):
        self._tell_of_changes()
        return self.held_out("calibration", num_batches)

    def data_hash(self, split):
        return sources.data_hash(self.rows(split))


@dataclasses.dataclass(frozen=True)
class ExampleFeed:
    """Labelled images or texts, as the network reads them; `given` as in `TextFeed`.

    Raises:
      ValueError: texts without a tokenizer, or one that does not say what fills rows; names for
        another number of classes than the network's; on use, a network that reads something else,
        data with other classes than those the run was trained with, or with another number of them
        than the network's, and images of another size.
    """

    data: DataSettings
    network: Network
    tokenizer: Any
    known: About
    given: Mapping[str, examples.Examples] | None = None
    unit: str = "examples"

    def __post_init__(self):
        kept = self.known.get("classes")
        if kept is not None and len(kept) != self.network.num_classes:
            raise ValueError(
                f"the run keeps the names of {len(kept)} classes, but its network has "
                f"{self.network.num_classes}; its files are damaged, or of two runs"
            )
        if self.network.reads == "tokens":
            tokenising.padding(self.tokenizer)

    @property
    def per_batch(self) -> int:
        return self.data.batch_size

    def training(self, seed, rank=ALONE):
        return labelled.training_batches(
            self.examples("train"),
            self.prepare(),
            batch_size=self.data.batch_size,
            seed=seed,
            rank=rank,
            num_threads=self.data.num_threads,
        )

    def held_out(self, split, num_batches, rank=ALONE):
        return labelled.evaluation_batches(
            self.examples(split),
            self.prepare(),
            batch_size=self.data.batch_size,
            num_batches=num_batches,
            rank=rank,
            num_threads=self.data.num_threads,
        )

    def calibration(self, num_batches):
        return self.held_out("calibration", num_batches)

    def data_hash(self, split):
        return examples.data_hash(self.examples(split))

    def about(self):
        train = self.examples("train")
        about = {"classes": list(train.classes)}
        if self.network.reads == "images":
            about["image_size"] = list(self.data.image_size or train[0]["image"].shape[:2])
        return about

    @property
    def classes(self) -> Sequence[str]:
        """Names of the network's outputs; numbers where neither the run nor its data has them."""
        if "classes" in self.known:
            return self.known["classes"]
        try:
            return self.examples("train").classes
        except (ValueError, OSError, RuntimeError, ImportError):  # need not be at hand any more
            return [str(number) for number in range(self.network.num_classes)]

    def examples(self, split: str) -> examples.Examples:
        """A split, whose labels are the network's outputs."""
        if self.given is not None:
            return self.given[split]
        found = examples.examples(self.data.source, split)
        if "classes" in self.known:
            return found.with_classes(self.known["classes"], self.data.source)
        if len(found.classes) != self.network.num_classes:
            raise ValueError(
                f"{self.data.source} has {len(found.classes)} classes, but the network "
                f"{self.network.num_classes}; set num_classes in the config's section `model`"
            )
        return found

    def prepare(self) -> inputs.Prepare:
        """What makes batches of examples, as the network reads them."""
        data = self.data
        if self.network.reads == "images":
            if not data.mean and not data.std:
                raise ValueError(
                    "nobody says how images are made ready for this network: its weights came "
                    "without a preprocessor_config.json; give data.mean and data.std, of each "
                    "channel, where white is 1"
                )
            return inputs.image_inputs(
                data.mean or (0.0,) * len(data.std),
                data.std or (1.0,) * len(data.mean),
                size=data.image_size or None,
                resize=data.resize,
                resample=data.resample,
                channels=3 if self.network.channels == 3 else None,
                augment=data.augment,
                expected=tuple(self.known.get("image_size", ())) or None,
            )
        if self.network.reads != "tokens":
            raise ValueError(
                f"this network reads {self.network.reads}, which are made of no text or image; "
                f"give batches, with {self.network.reads} and labels"
            )
        return inputs.text_inputs(
            tokenising.as_text(self.tokenizer),
            sequence_length=data.sequence_length,
            pad_id=tokenising.padding(self.tokenizer),
        )
