"""What a tuning step minimises, and what learns from it."""

import dataclasses

from early_exit.training import schedule

# What each loss compares an exit with; their mean where there are two.
LOSSES = {"kl": ("teacher",), "cross_entropy": ("labels",), "both": ("labels", "teacher")}
TRAINED = {"exits": ("exits",), "all": ("backbone", "exits")}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The loss: Σ_e weight_e · mean over positions of L_e, and what learns from it.

    Attributes:
      loss: `kl`, KL(final ‖ exit), self-distillation from the final exit; `cross_entropy` against
        the next token or the class; or `both`, their mean.
      weights: of the exits, step by step.
      train: `exits`, or `all`: the backbone as well, whose own cross-entropy then joins the sum
        with weight 1. No exit's teacher learns from its pupils.
      dtype: what the network computes in. Whatever is trained is kept in float32.
      table_parts: over how many devices the rows of the output matrices are split (`mesh.tensor`).
      by_confidence: an exit's loss at each position counts by the highest probability that the exit
        gives there, which learns nothing from that (token-wise dynamic weights, EE-LLM).
      layer_dropout: how often the last block is left out (LayerSkip, see `schedule.drop_rates`),
        in each row of a batch by itself; what is left out is computed and not used.
      accumulate: in how many parts a batch goes through the network, one after the other.
      seed: of what is left out.
      draft_weights: of the steps of a recurrent exit, one for each that is unrolled.

    Raises:
      ValueError: unknown names, or blocks left out of a network that is not trained.

    Example:
      >>> ee.Recipe("kl", ee.ExitWeights((1.0, 0.5))).runs_all_blocks
      True
    """

    loss: str
    weights: schedule.ExitWeights
    train: str = "exits"
    dtype: str = "float32"
    table_parts: int = 1
    by_confidence: bool = False
    layer_dropout: float = 0.0
    accumulate: int = 1
    seed: int = 0
    draft_weights: tuple[float, ...] = ()

    def __post_init__(self):
        for name, known in (("loss", LOSSES), ("train", TRAINED)):
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise ValueError(f"unknown {name} {given!r}; choose one of {', '.join(known)}")
        if self.layer_dropout and self.train != "all":
            raise ValueError("tune.layer_dropout is for a backbone that is trained: tune.train=all")

    @property
    def runs_all_blocks(self) -> bool:
        return self.train == "all" or "teacher" in LOSSES[self.loss]
