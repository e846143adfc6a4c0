"""Adds, moves and drops exits of a model that has some.

The one idea: a head is known by the block it stands after, and nothing else depends on it. So the
other heads, the backbone and the tokens that reduced heads predict stay as they are, bit for bit.
An exit policy is fitted to one set of heads and does not outlive the change: calibrate again.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax

from early_exit import tree
from early_exit.backbones import base
from early_exit.exits.multi_exit import RECURRENT, MultiExit


def add(
    model: MultiExit, params: base.Params, points: Iterable[int], key: jax.Array, source: str
) -> tuple[MultiExit, base.Params]:
    """The model with new exits after the blocks `points`.

    The new heads are of the same kind as the others, and start as `MultiExit.init_exits` would
    start them with this `key` and `source`.

    Raises:
      ValueError: a block that has an exit, or one outside 1…depth − 1.
    """
    new = sorted(points)
    if taken := sorted(set(new) & set(model.exits.points)):
        raise ValueError(f"there are exits after blocks {taken} already; move or drop those first")
    exits = dataclasses.replace(model.exits, points=tuple(new), recurrent_taps=())
    only_new = dataclasses.replace(model, exits=exits)
    heads = only_new.init_exits(key, params["backbone"], source, params.get("token_ids"))
    return _with_heads(model, params, params["exits"] | heads)


def move(
    model: MultiExit, params: base.Params, points: Mapping[int, int]
) -> tuple[MultiExit, base.Params]:
    """The model with heads standing elsewhere, as they are: `{6: 8}` moves one from 6 to 8.

    Raises:
      ValueError: no exit there, another one where it should go, a block outside 1…depth − 1, or
        one where the network is of another width.
    """
    _check_present(model, points)
    targets = [points.get(point, point) for point in model.exits.points]
    if twice := sorted({target for target in targets if targets.count(target) > 1}):
        raise ValueError(f"two exits would stand after blocks {twice}; move or drop one of them")
    heads = params["exits"] | {
        str(target): params["exits"][str(point)]
        for point, target in zip(model.exits.points, targets, strict=True)
    }
    heads = {name: x for name, x in heads.items() if name == RECURRENT or int(name) in targets}
    return _with_heads(model, params, heads)


def drop(
    model: MultiExit, params: base.Params, points: Iterable[int]
) -> tuple[MultiExit, base.Params]:
    """The model without the exits after the blocks `points`.

    Raises:
      ValueError: no exit there, or none would be left.
    """
    gone = set(points)
    _check_present(model, gone)
    if gone == set(model.exits.points) and not model.exits.recurrent_taps:
        raise ValueError("no exit would be left; use the backbone alone")
    heads = {name: x for name, x in params["exits"].items() if name not in map(str, gone)}
    return _with_heads(model, params, heads)


def _check_present(model: MultiExit, points: Iterable[int]) -> None:
    if absent := sorted(set(points) - set(model.exits.points)):
        raise ValueError(
            f"there is no exit after blocks {absent}; the exits are after {model.exits.points}"
        )


def _with_heads(
    model: MultiExit, params: base.Params, heads: base.Params
) -> tuple[MultiExit, base.Params]:
    changed = _with_points(model, sorted(int(name) for name in heads if name != RECURRENT))
    for point, wanted in changed.abstract_exits().items():
        if tree.shapes(heads[point]) != tree.shapes(wanted):
            raise ValueError(
                f"the head after block {point} would not fit there: its parameters have other "
                "shapes (networks change width, cascades and ensembles count the heads before)"
            )
    return changed, params | {"exits": heads}


def _with_points(model: MultiExit, points: Iterable[int]) -> MultiExit:
    exits = dataclasses.replace(model.exits, points=tuple(points))
    return dataclasses.replace(model, exits=exits)
