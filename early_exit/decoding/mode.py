"""How a decode treats the depth it skips: the static half of decoding, chosen once per program."""

import dataclasses

from early_exit.decoding.sampling import GREEDY, Sampling

SKIPPED = ("propagate", "defer")

# Positions in one pass for which a branch is compiled; a pass takes the first that holds all.
_WIDTHS = (1, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Mode:
    """What happens to skipped blocks, and whether early tokens stand.

    Attributes:
      skipped: `propagate`: blocks that a position skips get keys and values projected from the
        state it left with (Schuster et al. 2022, CALM, §3.3). `defer`: it keeps its hidden state,
        and the next position that goes deeper takes all waiting ones along in the same pass; keys
        and values are then those of the full model.
      verified: the tokens of exits are drafts, which the full model checks when the positions that
        emitted them have reached its end. The answer is the full model's. Needs `defer`.
      lookup: propose what followed the longest earlier match of the newest tokens (Saxena 2023,
        prompt lookup decoding). Needs `verified`.
      window: with `defer`, how many positions one pass may take; a full window forces the deep
        pass.
      row_cost: what one more position costs in a pass, relative to the pass with one: how verified
        decoding weighs whether drafts pay. 0.1 is measured for SmolLM2-135M on two cores
        (`experiments/decoding_speed`).
      sampling: how tokens are drawn.
    """

    skipped: str = "propagate"
    verified: bool = False
    lookup: bool = False
    window: int = 8
    row_cost: float = 0.1
    sampling: Sampling = GREEDY

    def __post_init__(self):
        if self.skipped not in SKIPPED:
            raise ValueError(
                f"skipped blocks can be handled by {' or '.join(SKIPPED)}, not {self.skipped!r}"
            )
        if self.verified and self.skipped != "defer":
            raise ValueError(
                "verified decoding needs the full model's keys and values; use skipped='defer'"
            )
        if self.lookup and not self.verified:
            raise ValueError("lookup proposes tokens that nobody has checked; use verified=True")
        if not 2 <= self.pending <= _WIDTHS[-1]:
            raise ValueError(f"window must be 2 to {_WIDTHS[-1]} positions, not {self.pending}")
        if self.row_cost < 0:
            raise ValueError(f"row_cost must be ≥ 0, not {self.row_cost}")

    @property
    def propagates(self) -> bool:
        """Whether skipped blocks get projected keys and values, and nothing waits."""
        return self.skipped == "propagate"

    @property
    def capacity(self) -> int:
        """Positions of a row that may be under way at once, W."""
        return 1 if self.propagates else self.pending

    @property
    def widths(self) -> tuple[int, ...]:
        """Positions of a row in one pass, one compiled branch each; the last is the capacity."""
        return (*(width for width in _WIDTHS if width < self.capacity), self.capacity)

    def widths_of(self, segment: int, exits: bool) -> tuple[int, ...]:
        """The widths that a segment can meet.

        Args:
          segment: index of the segment.
          exits: whether positions can leave early at all.
        """
        # Positions wait for each other in front of deeper segments; the first one sees several at
        # once only where they were looked up.
        return self.widths if self.lookup or (exits and segment) else (1,)


LOSSY = Mode()
DEFERRED = Mode(skipped="defer")
VERIFIED = Mode(skipped="defer", verified=True)
LOOKUP = Mode(skipped="defer", verified=True, lookup=True)
BY_NAME = {"lossy": LOSSY, "deferred": DEFERRED, "verified": VERIFIED, "lookup": LOOKUP}
