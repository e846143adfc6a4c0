"""What can be added from a module of one's own: import that module, and it is there by name.

The one idea: each kind has one contract and one call. What is added has the name that settings,
policies and modes call it by; a saved model that names it loads where it has been added before.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from early_exit import confidence as confidences
from early_exit.backbones.own import OwnConfig
from early_exit.confidence import Summary
from early_exit.data import examples as labelled
from early_exit.data import sources
from early_exit.decoding import drafters
from early_exit.decoding.drafters.base import Drafter
from early_exit.exits import heads
from early_exit.pretrained import families
from early_exit.pretrained.own import OwnFamily
from early_exit.settings.read import offer


def head(name: str, build: heads.Builder) -> None:
    """Adds a kind of exit head, `ExitConfig(points, head=name)`, for any network.

    Args:
      build: (the network where the exit stands, what to draw from) → a module that maps hidden
        states [..., D] (a classifier's: pooled, [B, D]) to the features [..., D] that the output
        matrix reads. It holds `nnx.Param`s only; `network.width` is D, and `network.build_norm` and
        `network.build_mlp` make parts like the network's own. It is always drawn at random.

    Raises:
      ValueError: another one has that name.

    Example:
      >>> ee.register.head("normed", lambda network, rngs: network.build_norm(rngs))
      >>> ee.attach(model, ee.ExitConfig((3,), head="normed")).points
      (3,)
    """
    heads.register(name, build)
    offer("exits.head", name)


def confidence(name: str, score: Callable[[Summary], jax.Array]) -> None:
    """Adds a score by which exits leave, `calibrate(…, confidence=name)`.

    Args:
      score: a function of what a head says (`prediction`, `top` and `second`, log-probabilities,
        `entropy` in units of the uniform one; all [...]) to float32 [...], larger where surer. It
        is traced.

    Raises:
      ValueError: another one has that name.

    Example:
      >>> ee.register.confidence("odds", lambda said: said.top - said.second)
      >>> "odds" in tuned.static.confidences
      True
    """
    known = confidences.registered()
    confidences.register(name, score)
    offer("calibrate.confidence", name)
    if confidences.registered() != known:
        jax.clear_caches()  # type: ignore[no-untyped-call]  # programs that record all scores know nothing of this one


def drafter(drafter: Drafter) -> Drafter:
    """Adds a source of drafts, `Mode("defer", drafters=(drafter.name,))`; returns it.

    Args:
      drafter: see `early_exit.decoding.drafters.base.Drafter`, which it extends. Whatever it
        proposes, the answer is the full model's.

    Raises:
      ValueError: it lacks what the contract asks for, or another one has that name.

    Example:
      >>> from early_exit.decoding.drafters.base import Drafter
      >>> class Silent(Drafter):
      ...     name, credit = "silent", 0.0
      >>> ee.register.drafter(Silent()).place
      3
    """
    return drafters.register(drafter)


def family(family: Any) -> Any:
    """Adds a family of pretrained networks: files whose `model_type` it names load with `load`.

    Args:
      family: a module or an object, see `early_exit.pretrained.families.Family`.

    Raises:
      ValueError: it lacks what the contract asks for, or serves what another one serves.

    Example:
      >>> from early_exit.pretrained import llama
      >>> ee.register.family(llama) is llama  # known already
      True
    """
    return families.register(family)


def network(network: OwnConfig) -> OwnConfig:
    """Makes a network of one's own known by its name, so that `save` and `load` work; returns it.

    Args:
      network: what `wrap` gives, with a `name` that no other family has.

    Raises:
      ValueError: another network has that name.

    Example:
      >>> named = ee.register.network(dataclasses.replace(small, name="small"))
      >>> saved = ee.save(ee.Model.of(named, params), folder_to_be.with_name("own"))
      >>> ee.load(saved).static.config == named
      True
    """
    families.register(OwnFamily(network))
    return network


def texts(name: str, read: Callable[[str], Sequence[str]]) -> None:
    """Adds a source of texts, `tune(model, f"{name}:{rest}")` or `--config.data.source=name:rest`.

    Args:
      read: what stands behind the colon → texts, in a fixed order. Tuning, validation, calibration
        and test take 85, 5, 5 and 5 % of them, by a hash of each.

    Raises:
      ValueError: no word, or one that another source has.

    Example:
      >>> ee.register.texts("counting", lambda upto: [f"{n} sheep" for n in range(int(upto))])
      >>> ee.record(tuned, "counting:200", batch_size=2, sequence_length=32).groups.size > 0
      True
    """
    sources.register(name, read)


def examples(
    name: str, read: Callable[[str], tuple[Sequence[str], Sequence[dict[str, Any]]]]
) -> None:
    """Adds a source of labelled examples for classifiers, named as in `texts`.

    Args:
      read: what stands behind the colon → (the names of the classes, the examples in a fixed order:
        `{"text": str}` or `{"image": uint8 [H, W, C]}`, and `label`, the number of a class). The
        four splits take 60, 10, 10 and 20 %.

    Raises:
      ValueError: another one has that name.

    Example:
      >>> rows = [{"text": f"{n} is a number", "label": n % 2} for n in range(100)]
      >>> ee.register.examples("parity", lambda rest: (("even", "odd"), rows))
      >>> ee.record(classifier, "parity:", sequence_length=16).labels.max()
      np.int32(1)
    """
    labelled.register(name, read)
