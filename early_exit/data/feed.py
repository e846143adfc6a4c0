"""What a run reads: text for a language model, labelled examples for a classifier.

The one idea: which of the two follows from the network, so that the training loop, calibration
and evaluation ask for batches of a split and never for what is in them.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

from early_exit.data import examples, excerpts, inputs, labelled, pipeline, sources, tokenising
from early_exit.data.stream import ALONE, Rank, TrainingBatches
from early_exit.data.transforms import Batch
from early_exit.settings.overrides import ConfigDict


class Network(Protocol):
    """What a feed asks of a backbone's config (`backbones.base.BackboneConfig`)."""

    reads: str
    classifies: bool
    num_classes: int


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


def make(config: ConfigDict, network: Network, tokenizer: Any) -> Feed:
    """The feed of a run for such a network."""
    if not network.classifies:
        return TextFeed(config.data, tokenizer)
    return ExampleFeed(config.data, network, tokenizer)


@dataclasses.dataclass(frozen=True)
class TextFeed:
    """Documents, packed into rows.

    Raises:
      ValueError: no tokenizer, or one that does not say what ends a text.
    """

    data: ConfigDict
    tokenizer: Any
    unit: str = "tokens"

    def __post_init__(self):
        tokenising.end_of_text(self.tokenizer)  # not only when the first batch is asked for

    @property
    def per_batch(self) -> int:
        return self.data.batch_size * self.data.sequence_length

    def training(self, seed, rank=ALONE):
        return pipeline.training_batches(
            sources.documents(self.data.source, "train"),
            seed=seed,
            rank=rank,
            **self._packing(),
        )

    def held_out(self, split, num_batches, rank=ALONE):
        return pipeline.evaluation_batches(
            sources.documents(self.data.source, split),
            num_batches=num_batches,
            rank=rank,
            **self._packing(),
        )

    def calibration(self, num_batches):
        documents = sources.documents(self.data.source, "calibration")
        return excerpts.batches(documents, num_batches=num_batches, **self._packing())

    def data_hash(self, split):
        return sources.data_hash(sources.documents(self.data.source, split))

    def _packing(self) -> dict[str, Any]:
        return {
            "tokenise": tokenising.encoder(self.tokenizer, self.data.source),
            "end_of_text": tokenising.end_of_text(self.tokenizer),
            "sequence_length": self.data.sequence_length,
            "batch_size": self.data.batch_size,
        }


@dataclasses.dataclass(frozen=True)
class ExampleFeed:
    """Labelled images for a ResNet, labelled texts for an encoder.

    Raises:
      ValueError: texts without a tokenizer, or one that does not say what fills rows; on use, data
        with another number of classes than the network's.
    """

    data: ConfigDict
    network: Network
    tokenizer: Any
    unit: str = "examples"

    def __post_init__(self):
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
        )

    def held_out(self, split, num_batches, rank=ALONE):
        return labelled.evaluation_batches(
            self.examples(split),
            self.prepare(),
            batch_size=self.data.batch_size,
            num_batches=num_batches,
            rank=rank,
        )

    def calibration(self, num_batches):
        return self.held_out("calibration", num_batches)

    def data_hash(self, split):
        return examples.data_hash(self.examples(split))

    def examples(self, split: str) -> examples.Examples:
        found = examples.examples(self.data.source, split)
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
            return inputs.image_inputs(
                data.mean,
                data.std,
                size=tuple(data.image_size) or None,
                channels=3 if self.network.channels == 3 else None,
                augment=data.augment,
            )
        return inputs.text_inputs(
            tokenising.as_text(self.tokenizer),
            sequence_length=data.sequence_length,
            pad_id=tokenising.padding(self.tokenizer),
        )
