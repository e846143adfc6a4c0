"""What proposes tokens: every drafter by its name, in the order in which they are asked.

Adding one: a class that fulfils `base.Drafter`, and a line here, or a call of `register`.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from early_exit.decoding.drafters.base import Drafter
from early_exit.decoding.drafters.exits import Exits
from early_exit.decoding.drafters.lookup import Lookup
from early_exit.decoding.drafters.recurrent import Recurrent
from early_exit.exits.multi_exit import MultiExit

if TYPE_CHECKING:
    from early_exit.decoding.mode import Mode

BY_NAME: dict[str, Drafter] = {
    drafter.name: drafter for drafter in (Exits(), Lookup(), Recurrent())
}


def register(drafter: Drafter) -> Drafter:
    """Adds a source of drafts, asked after the others; it gets its `place`.

    Raises:
      ValueError: it lacks a name or its credit, or another one has that name.
    """
    kind = type(drafter).__name__
    if lacking := [name for name in ("name", "credit") if not hasattr(drafter, name)]:
        raise ValueError(f"the drafter {kind} lacks {', '.join(lacking)} (see drafters.base)")
    if BY_NAME.get(drafter.name, drafter) is not drafter:
        raise ValueError(f"there is a drafter {drafter.name!r} already; choose another name")
    if drafter.name not in BY_NAME:
        drafter.place = len(BY_NAME)
        BY_NAME[drafter.name] = drafter
    return drafter


def of(model: MultiExit, mode: "Mode") -> tuple[Drafter, ...]:
    """A mode's drafters; where early tokens stand, exits of all kinds.

    Those that the model cannot serve are left out.
    """
    found = [BY_NAME[name] for name in mode.drafters or ("exits", "recurrent")]
    return tuple(drafter for drafter in found if drafter.serves(model, mode))


def taps(model: MultiExit, mode: "Mode") -> tuple[int, ...]:
    """The blocks (1-based) whose output a mode's drafters read, rising."""
    read = [drafter.taps(model) for drafter in of(model, mode)]
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
