"""How to decode, as flags: the same in every command that decodes, or plans it."""

from absl import flags

from early_exit.decoding import mode as modes
from early_exit.decoding.mode import Mode

MODE = flags.DEFINE_enum(
    "mode",
    "lossy",
    list(modes.NAMES),
    "lossy: early tokens stand, and skipped blocks get projected keys and values; deferred: they "
    "stand, and skipped blocks are caught up with, exactly; verified: the full model checks what "
    "--drafters propose, and the answer is its own.",
)
DRAFTERS = flags.DEFINE_multi_enum(
    "drafters",
    list(modes.DRAFTERS),
    list(modes.DRAFTERS),
    "What proposes tokens with --mode=verified: exits, earlier text, a recurrent exit; those that "
    "there are. Give it once for each.",
)


def mode() -> Mode:
    """The mode that the flags name."""
    return modes.named(MODE.value, tuple(d for d in modes.DRAFTERS if d in DRAFTERS.value))
