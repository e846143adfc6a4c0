"""What proposes tokens: every drafter by its name, in the order in which they are asked.

Adding one: a class that fulfils `base.Drafter`, and a line here.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from early_exit.decoding.drafters.base import Drafter
from early_exit.decoding.drafters.exits import Exits
from early_exit.decoding.drafters.lookup import Lookup
from early_exit.exits.multi_exit import MultiExit

if TYPE_CHECKING:
    from early_exit.decoding.mode import Mode

BY_NAME: dict[str, Drafter] = {drafter.name: drafter for drafter in (Exits(), Lookup())}


def of(mode: "Mode", exits: bool) -> tuple[Drafter, ...]:
    """A mode's drafters; where early tokens stand, its exits.

    Args:
      exits: whether there is a policy to ask exits by.
    """
    names = mode.drafters or ("exits",)
    return tuple(BY_NAME[name] for name in names if exits or name != "exits")


def taps(model: MultiExit, mode: "Mode") -> tuple[int, ...]:
    """The blocks (1-based) whose output a mode's drafters read, rising."""
    read = [BY_NAME[name].taps(model) for name in mode.drafters]
    return tuple(sorted({block for blocks in read for block in blocks}))


def credits(exits: int) -> jax.Array:
    """float32 [N], what each source of drafts is worth before it was ever asked, by its mark."""
    # The dtype is spelt out: after a weakly typed state, the next would be another program.
    worth = np.zeros(exits + 1 + max(drafter.place for drafter in BY_NAME.values()), np.float32)
    worth[:exits] = BY_NAME["exits"].credit
    for drafter in BY_NAME.values():
        if drafter.place:
            worth[exits + drafter.place] = drafter.credit
    return jnp.asarray(worth)


def places(exit_depths: np.ndarray) -> list[str]:
    """What each mark says: `block 8`, …, `block 30`, `lookup`."""
    others = sorted((d for d in BY_NAME.values() if d.place), key=lambda drafter: drafter.place)
    return [*(f"block {depth}" for depth in exit_depths), *(drafter.name for drafter in others)]
