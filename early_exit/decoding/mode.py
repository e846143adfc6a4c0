"""How a decode treats the depth it skips: the static half of decoding, chosen once per program."""

import dataclasses

from early_exit.decoding import drafters
from early_exit.exits.multi_exit import MultiExit

SKIPPED = ("propagate", "defer")
# What can propose tokens to verified decoding.
DRAFTERS = tuple(drafters.BY_NAME)

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
      drafters: what proposes tokens that the full model then checks; empty where early tokens
        stand. With drafters the answer is the full model's. They need `defer`. `exits`: what an
        exit says where its policy lets it. `lookup`: what followed the longest earlier match of
        the newest tokens (Saxena 2023, prompt lookup decoding). `recurrent`: what the recurrent
        exit says, token after token. Those that a model cannot serve are left out.
      pending: with `defer`, how many positions of a row may wait for their deeper blocks, and so
        the most in one pass; where no more may wait, the deep pass is made.

    Raises:
      ValueError: unknown names, drafters without `defer`, or `pending` out of range.

    Example:
      >>> ee.Mode("defer", drafters=("exits", "lookup")).name
      'verified: exits + lookup'
    """

    skipped: str = "propagate"
    drafters: tuple[str, ...] = ()
    pending: int = 8

    def __post_init__(self):
        if self.skipped not in SKIPPED:
            raise ValueError(
                f"skipped blocks can be handled by {' or '.join(SKIPPED)}, not {self.skipped!r}"
            )
        known = tuple(drafters.BY_NAME)
        if [name for name in known if name in self.drafters] != list(self.drafters):
            raise ValueError(
                f"drafters={self.drafters} must be some of {', '.join(known)}, in this order"
            )
        if self.drafters and self.propagates:
            raise ValueError(
                "verified decoding needs the full model's keys and values; use skipped='defer'"
            )
        if not 2 <= self.pending <= _WIDTHS[-1]:
            raise ValueError(f"pending must be 2 to {_WIDTHS[-1]} positions, not {self.pending}")

    @property
    def propagates(self) -> bool:
        """Whether skipped blocks get projected keys and values, and nothing waits."""
        return self.skipped == "propagate"

    @property
    def verified(self) -> bool:
        """Whether the full model checks what was proposed, so that the answer is its own."""
        return bool(self.drafters)

    @property
    def asks_policy(self) -> bool:
        """Whether exits of any kind are asked, by a policy: for tokens that stand, or drafts."""
        return self.drafters != ("lookup",)

    @property
    def name(self) -> str:
        """What the mode is called everywhere: `lossy`, `deferred`, `verified: exits + lookup`."""
        if self.drafters:
            return f"verified: {' + '.join(self.drafters)}"
        return "lossy" if self.propagates else "deferred"

    @property
    def capacity(self) -> int:
        """Positions of a row that may be under way at once, W."""
        return 1 if self.propagates else self.pending

    @property
    def widths(self) -> tuple[int, ...]:
        """Positions of a row in one pass, one compiled branch each; the last is the capacity."""
        return (*(width for width in _WIDTHS if width < self.capacity), self.capacity)


def verified(*drafters: str) -> Mode:
    """Decoding in which the full model checks what these drafters propose."""
    return Mode("defer", drafters)


LOSSY = Mode()
DEFERRED = Mode("defer")
VERIFIED = verified(*DRAFTERS)
NAMES = ("lossy", "deferred", "verified")


def named(name: str, drafters: tuple[str, ...] = DRAFTERS) -> Mode:
    """`lossy`, `deferred`, or `verified` by some drafters.

    Raises:
      ValueError: no such mode, or no such drafters.
    """
    if name not in NAMES:
        raise ValueError(f"unknown mode {name!r}; choose one of {', '.join(NAMES)}")
    if name != "verified":
        return LOSSY if name == "lossy" else DEFERRED
    if not drafters:
        raise ValueError(f"verified decoding needs drafters: some of {', '.join(DRAFTERS)}")
    return verified(*drafters)


def served(mode: Mode, model: MultiExit) -> Mode:
    """The mode with only those drafters that a model has what they need for.

    Raises:
      ValueError: none is left of those that the mode names, or the model's blocks keep no cache.
    """
    if not model.config.decodes:
        raise ValueError(
            "this network's blocks keep no cache, so that it cannot be decoded from; make them "
            "backbones.base.CachedBlocks, or use early_exit.score, which runs whole rows"
        )
    if not mode.verified:
        return mode
    names = tuple(drafter.name for drafter in drafters.of(model, mode))
    if not names:
        raise ValueError(
            f"this model has nothing to draft with by {' or '.join(mode.drafters)}: exits stand "
            "where exits.points says, a recurrent exit reads exits.recurrent_taps"
        )
    return dataclasses.replace(mode, drafters=names)
