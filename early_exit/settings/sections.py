"""Every setting of a run, by section: name, type, default, range, and what it does.

The one idea: this is the only list. Config files say what differs from it, `launch.inspect
--settings` prints it, and every other room gets the section that it needs, checked.

Names of what other rooms offer (losses, heads, methods, …) are repeated here, because settings
stand below all rooms; a test keeps both lists equal.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from early_exit.settings.fields import Section, setting

# Of an int32, which counts the steps.
_MOST_STEPS = 2**31 - 1
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # as Pillow counts them


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    """Where the network comes from."""

    prefix: ClassVar[str] = "model."

    source: str = setting(
        "", "Pretrained weights (a folder, .gguf file, hub id, pip:…), or a run; '' with model.new."
    )
    dtype: str = setting(
        "float32",
        "What the network computes in; what is trained is kept in float32.",
        choices=("float32", "bfloat16", "float16"),
    )
    scan: bool = setting(
        False, "Run a decoder's blocks in a loop: they compile once, however many they are."
    )
    remat: str = setting(
        "none",
        "What a trained decoder computes again in its backward pass, to save memory.",
        choices=("none", "attention", "block"),
    )
    new: dict[str, Any] = setting(
        {}, "A network made anew: its family and its sizes; {} with model.source."
    )
    changes: dict[str, Any] = setting(
        {}, "What the source leaves open, such as num_classes of an encoder; {} for nothing."
    )

    def conflicts(self) -> Iterator[str]:
        if bool(self.source) == bool(self.new):
            yield "give either model.source, where weights are, or model.new, and not both"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitSettings(Section):
    """Where the exits are, and their heads."""

    prefix: ClassVar[str] = "exits."

    points: tuple[int, ...] = setting(
        (), "Blocks (from 1) after which there is an exit; () for none.", least=1
    )
    head: str = setting(
        "mlp",
        "What stands before a head's output matrix; a network carries some of these.",
        choices=("embedding", "linear", "norm", "mlp", "layer", "grid"),
    )
    output: str = setting(
        "own",
        "Whether each head has an output matrix of its own, or shares the backbone's.",
        choices=("shared", "own"),
    )
    classes: int = setting(
        0, "Tokens that a head can predict, the most frequent ones; 0 for all.", least=0
    )
    gate: bool = setting(False, "Whether each head learns to tell whether it will be right.")
    cascade: bool = setting(
        False, "Whether a classifier's head sees the logits of the head before it."
    )
    ensemble: bool = setting(
        False, "Whether a classifier's exit answers with all heads up to it, weighted."
    )
    recurrent_taps: tuple[int, ...] = setting(
        (), "Blocks (from 1) whose output a recurrent exit reads; () for no such exit.", least=1
    )
    recurrent_blocks: int = setting(
        1, "Blocks of the recurrent exit; 0 for a feed-forward part.", least=0
    )
    init: str = setting(
        "copy",
        "A head's first weights: copied from the backbone, or drawn.",
        choices=("copy", "random"),
    )

    def conflicts(self) -> Iterator[str]:
        for name in ("points", "recurrent_taps"):
            if list(blocks := getattr(self, name)) != sorted(set(blocks)):
                yield f"exits.{name}={blocks} must rise without repeats"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
    """What is read, and how it becomes batches."""

    prefix: ClassVar[str] = "data."

    source: str = setting(
        "", "Always needed: texts (see data.sources), labelled texts or images (data.examples)."
    )
    batch_size: int = setting(8, "Rows of a batch, over all devices and processes.", least=1)
    sequence_length: int = setting(
        256, "Tokens of a row of text; the model's context at most.", least=2
    )
    prompt_length: int = setting(
        0,
        "Tokens of a prompt, where an encoder reads it: longer ones are cut. 0 for as many as "
        "data.sequence_length, which is of answers then.",
        least=0,
    )
    num_threads: int = setting(
        2, "Threads that read and tokenise, or make images ready, ahead of training.", least=1
    )
    frequency_batches: int = setting(
        64, "Batches of training text in which the most frequent tokens are counted.", least=1
    )
    mean: tuple[float, ...] = setting(
        (),
        "Of each channel of an image, where white is 1; subtracted from it. () for what the "
        "weights came with, and 0 for new ones.",
    )
    std: tuple[float, ...] = setting(
        (), "Of each channel, which is divided by it after that; () likewise, and 1.", above=0
    )
    image_size: tuple[int, ...] = setting(
        (), "Height and width to bring images to; () likewise, or if they agree.", least=1
    )
    resize: tuple[int, ...] = setting(
        (),
        "Height and width, or the shorter side, that images are resized to before their middle, of "
        "image_size, is cut out; () to cut out its shape first.",
        least=1,
    )
    resample: str = setting("bilinear", "How images are resized.", choices=RESAMPLE)
    augment: str = setting(
        "",
        "What is done at random to training images; '' for nothing.",
        choices=("", "crop", "crop_flip"),
    )

    def conflicts(self) -> Iterator[str]:
        if not self.source:
            yield "data.source names no data; give a folder, a file or a data set"
        if self.mean and self.std and len(self.mean) != len(self.std):
            yield (
                f"data.mean={self.mean} and data.std={self.std} must hold one number each for "
                "every channel"
            )
        if len(self.image_size) not in (0, 2):
            yield f"data.image_size={self.image_size} must be (height, width), or ()"
        yield from self._resizes()

    def _resizes(self) -> Iterator[str]:
        if not self.resize:
            return
        if len(self.resize) > 2 or len(self.image_size) != 2:
            yield (
                f"data.resize={self.resize} must be (height, width) or (shorter side,), and needs "
                "data.image_size, which is cut out after that"
            )
        elif any(a < b for a, b in zip(self.resize * 2, self.image_size, strict=False)):
            yield f"data.image_size={self.image_size} does not fit into data.resize={self.resize}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings(Section):
    """How devices share the work."""

    prefix: ClassVar[str] = "mesh."

    data: int = setting(
        -1, "Groups of devices with other rows of a batch; -1 for what is left.", least=-1
    )
    fsdp: int = setting(
        1, "Devices with other rows, too, that split parameters; -1 for what is left.", least=-1
    )
    tensor: int = setting(
        1, "Devices that split each matrix product; -1 for what is left.", least=-1
    )
    expert: int = setting(
        1,
        "Devices with other experts of a mixture, and the same rows; -1 for what is left.",
        least=-1,
    )
    slices: int = setting(
        1, "Groups of devices with a slower network between; only data goes over it.", least=1
    )

    def conflicts(self) -> Iterator[str]:
        axes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor", "expert")}
        for name, size in axes.items():
            if not size:
                yield f"mesh.{name}=0 leaves no device; give a number, or -1 for what is left"
        if [*axes.values()].count(-1) > 1:
            names = ", ".join(f"mesh.{name}" for name in axes)
            yield f"only one of {names} can be -1, what is left"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneSettings(Section):
    """How the exits, and perhaps the network, are trained."""

    prefix: ClassVar[str] = "tune."

    train: str = setting(
        "exits", "What learns: the exits, or all, jointly.", choices=("exits", "all")
    )
    hidden_states: str = setting(
        "", "A folder that launch.cache filled: no block is run; '' to run them."
    )
    loss: str = setting(
        "kl",
        "What an exit learns from: the full model, the labels, or the mean of both.",
        choices=("kl", "cross_entropy", "both"),
    )
    weights: tuple[float, ...] = setting(
        (), "What each exit's loss counts; () for 1, a 0 for an exit that does not learn.", least=0
    )
    start_weights: tuple[float, ...] = setting(
        (), "The weights at the first step, if others; 0 for nothing yet.", least=0
    )
    weight_steps: int = setting(
        0, "Steps from start_weights to weights; 0 for weights that stay.", least=0
    )
    weight_path: str = setting(
        "linear", "How weights go from the first to the others.", choices=("linear", "cosine")
    )
    by_confidence: bool = setting(
        False, "Whether each position counts by the exit's confidence in it."
    )
    curriculum: str = setting(
        "all",
        "Which exits learn: all, some in turn, or one more at a time from the last.",
        choices=("all", "rotational", "gradual"),
    )
    curriculum_period: int = setting(
        1, "One exit in so many takes its turn; a further exit joins after so many steps.", least=1
    )
    recurrent_steps: int = setting(
        3, "Tokens that a recurrent exit drafts in a row while it is tuned.", least=1
    )
    recurrent_decay: float = setting(
        0.8, "What each of these counts, relative to the one before.", above=0, most=1
    )
    layer_dropout: float = setting(
        0.0,
        "How often the last block is left out, earlier ones less; 0 for never.",
        least=0,
        below=1,
    )
    accumulate: int = setting(1, "Parts in which a batch goes through the network.", least=1)
    steps: int = setting(1000, "Steps of the whole run.", least=1, most=_MOST_STEPS)
    minutes: float = setting(
        0.0,
        "For its steps at most: fewer of them where this machine is slower; 0 for any.",
        least=0,
    )
    optimizer: str = setting("adamw", "What makes steps of gradients.", choices=("adamw", "sgd"))
    learning_rate: float = setting(1e-3, "The highest, after the warm-up.", above=0)
    backbone_rate: float = setting(
        1.0, "The backbone's share of it where it learns, too; 0 for none.", least=0
    )
    warmup_steps: int = setting(0, "Steps in which the rate rises; 0 for none.", least=0)
    final_fraction: float = setting(
        0.1, "Share of the learning rate at the last step; 0 to fall to nothing.", least=0, most=1
    )
    b1: float = setting(
        0.9, "Decay of the mean of gradients (momentum); 0 for none.", least=0, below=1
    )
    b2: float = setting(0.99, "Decay of the mean of their squares, of adamw.", least=0, below=1)
    weight_decay: float = setting(
        0.0, "Of matrices; norms and biases never decay; 0 for none.", least=0
    )
    clip_norm: float = setting(
        1.0, "The largest norm of a gradient; to clip nothing, give a huge one.", above=0
    )
    checkpoint_every: int = setting(
        500, "Steps between checkpoints; the last step has one in any case.", least=1
    )
    keep_checkpoints: int = setting(2, "How many checkpoints stay, the newest ones.", least=1)
    validate_every: int = setting(
        500, "Steps between validations; the last step has one in any case.", least=1
    )
    validation_batches: int = setting(
        8, "Batches of a validation; all, if there are fewer.", least=1
    )

    def conflicts(self) -> Iterator[str]:
        if self.warmup_steps >= self.steps:
            yield f"tune.warmup_steps={self.warmup_steps} must be below tune.steps={self.steps}"
        if self.weights and not any(self.weights):
            yield "tune.weights are all 0, so that nothing is learned; leave () for equal weights"
        if bool(self.start_weights) != bool(self.weight_steps):
            yield "tune.start_weights and tune.weight_steps belong together; set both or neither"
        if self.layer_dropout and self.train != "all":
            yield "tune.layer_dropout is for a backbone that is trained: tune.train=all"
        if self.hidden_states and self.train != "exits":
            yield (
                f"tune.train={self.train} changes the backbone, and tune.hidden_states holds what "
                "it was; use tune.train=exits, or leave tune.hidden_states empty"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateSettings(Section):
    """What is asked of the policy that decides who leaves where."""

    prefix: ClassVar[str] = "calibrate."

    batches: int = setting(8, "Batches of calibration data; all, if it has fewer.", least=1)
    method: str = setting(
        "epsilon",
        "epsilon: agreement on the records; ltt, clopper_pearson, ucb: a risk of at most alpha "
        "with probability 1 − delta; the others: the best for a budget.",
        choices=(
            *("epsilon", "ltt", "clopper_pearson", "ucb"),
            *("eero", "eero_tight", "geometric", "search", "joint"),
        ),
    )
    confidence: str = setting(
        "max_prob",
        "The score that is compared with thresholds.",
        choices=("max_prob", "margin", "entropy", "patience", "similarity", "gate"),
    )
    epsilon: float = setting(
        0.95, "Share of leavers that agree with the full model.", above=0, most=1
    )
    alpha: float = setting(0.05, "The risk at most.", above=0, below=1)
    delta: float = setting(0.1, "Probability with which the promise may fail.", above=0, below=1)
    risk: str = setting(
        "disagreement", "What alpha bounds.", choices=("disagreement", "accuracy_drop")
    )
    among: str = setting("all", "Whom the risk is averaged over.", choices=("all", "leavers"))
    unit: str = setting(
        "group", "What is independent of each other.", choices=("group", "position")
    )
    design: float = setting(
        0.3, "Share of groups on which to choose what is tested on the others.", above=0, below=1
    )
    budget: float | None = setting(
        None, "Mean cost of a position, in costs; None without.", above=0
    )
    costs: str = setting(
        "blocks", "What a budget is counted in.", choices=("blocks", "multiply_adds")
    )
    against: str = setting("agreement", "What a budget should buy.", choices=("agreement", "label"))
    temperature: bool = setting(False, "Whether each head gets a temperature.")
    abstain: float | None = setting(
        None, "Share of positions that may stay without an answer; None for none.", least=0, most=1
    )
    reject_risk: float | None = setting(
        None, "Share of wrong answers at most, but for delta; None for any.", above=0, below=1
    )
    allow_never: bool = setting(
        False, "Take a policy that never leaves where the data are too few for what is asked."
    )
    seed: int = setting(0, "Of what calibration draws at random.", least=0, below=2**32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Section):
    """What `launch.evaluate` measures."""

    prefix: ClassVar[str] = "evaluate."

    epsilons: tuple[float, ...] = setting(
        (0.9, 0.95, 0.99), "Policies to measure beside the run's own, by epsilon.", above=0, most=1
    )
    rounds: int = setting(3, "Turns of each policy on the clock.", least=1)
    prompts: int = setting(4, "Decoders: prompts cut from the test text.", least=1)
    prompt_tokens: int = setting(96, "Decoders: tokens of a prompt.", least=1)
    new_tokens: int = setting(64, "Decoders: tokens of an answer that is timed.", least=1)
    questions: tuple[str, ...] = setting(
        (), "Decoders: answered for the report, beside two prompts; () for none."
    )
    sample_tokens: int = setting(160, "Decoders: tokens of an answer that is shown.", least=1)
    batches: int = setting(
        64, "Classifiers: batches of the test split; all, if it has fewer.", least=1
    )
    singles: int = setting(100, "Classifiers: examples timed one by one.", least=1)
    rows: int = setting(384, "Classifiers: examples timed in batches.", least=1)
    sizes: tuple[int, ...] = setting((64,), "Classifiers: sizes of these batches.", least=1)
    examples: int = setting(
        4, "Classifiers: shown of those that left first and last; 0 for none.", least=0
    )
    explored: int = setting(
        400, "Classifiers: examples to look into on the page, at most; 0 for none.", least=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """All settings of a run."""

    seed: int = setting(
        0,
        "Of everything drawn at random: weights, order of the data, dropout.",
        least=0,
        below=2**32,
    )
    model: ModelSettings
    exits: ExitSettings = ExitSettings()
    data: DataSettings
    mesh: MeshSettings = MeshSettings()
    tune: TuneSettings = TuneSettings()
    calibrate: CalibrateSettings = CalibrateSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    def conflicts(self) -> Iterator[str]:
        tune, exits = self.tune, len(self.exits.points)
        for name in ("weights", "start_weights"):
            if (given := getattr(tune, name)) and len(given) != exits:
                yield (
                    f"tune.{name} has {len(given)} values for {exits} exits; give one per exit, or "
                    "none for equal weights"
                )
        if self.data.batch_size % tune.accumulate:
            yield (
                f"tune.accumulate={tune.accumulate} parts cannot share the {self.data.batch_size} "
                "rows of data.batch_size equally"
            )
