"""How to decode, as flags: the same in every command that decodes, or plans it."""

from absl import flags

from early_exit.decoding import mode as modes
from early_exit.decoding.mode import Mode
from launch import usage

MODE = flags.DEFINE_enum(
    "mode",
    "lossy",
    list(modes.NAMES),
    "lossy: early tokens stand, skipped blocks get projected keys and values; deferred: those "
    "blocks run later; verified: the full model checks what --drafters propose.",
)
DRAFTERS = flags.DEFINE_multi_enum(
    "drafters",
    list(modes.DRAFTERS),
    list(modes.DRAFTERS),
    "What proposes tokens with --mode=verified, of what there is; once for each.",
)
usage.group("how to decode", MODE, DRAFTERS)


def mode() -> Mode:
    """The mode that the flags name."""
    return modes.named(MODE.value, tuple(d for d in modes.DRAFTERS if d in DRAFTERS.value))
