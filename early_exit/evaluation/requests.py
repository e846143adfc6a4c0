"""What tasks of lm-evaluation-harness ask of an answer, and which requests go together."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from early_exit.decoding.sampling import GREEDY, Sampling

# What a task may ask of an answer; `until` says where it stops.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SETTINGS = ("until", *_LENGTHS, "do_sample", "temperature", "top_k", "top_p")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a task asks of an answer.

    Attributes:
      new_tokens: at most.
      stops: texts before the first of which it ends.
      sampling: how its tokens are drawn.
    """

    new_tokens: int
    stops: tuple[str, ...]
    sampling: Sampling

    @classmethod
    def of(cls, request: Any, new_tokens: int) -> "Asked":
        """What a request (`lm_eval.api.instance.Instance`) asks for.

        Args:
          new_tokens: where it says none.

        Raises:
          ValueError: it shows more than text, or asks for what is not known here.
        """
        task = task_of(request)
        if len(request.args) > 2:
            raise ValueError(f"{task} shows more than text, and this model reads text alone")
        asked: Mapping[str, Any] = request.args[1]
        if unknown := [name for name in asked if name not in SETTINGS]:
            raise ValueError(
                f"{task} asks for {', '.join(unknown)}; of the ways to write an answer, "
                f"{', '.join(SETTINGS)} are known here"
            )
        until = asked.get("until") or ()
        temperature = asked.get("temperature", 1.0 if asked.get("do_sample") else 0.0)
        drawn = asked.get("do_sample", temperature > 0) and temperature > 0
        lengths = [asked[name] for name in _LENGTHS if asked.get(name) is not None]
        return cls(
            new_tokens=int([*lengths, new_tokens][0]),
            stops=(until,) if isinstance(until, str) else tuple(until),
            sampling=Sampling(temperature, asked.get("top_k", 0), asked.get("top_p", 1.0))
            if drawn
            else GREEDY,
        )

    def stopped(self, text: str) -> bool:
        """Whether there is a stop in the text."""
        return any(stop in text for stop in self.stops if stop)

    def cut(self, text: str) -> str:
        """What stands before the first stop."""
        for stop in filter(None, self.stops):
            text = text.partition(stop)[0]
        return text


def task_of(request: Any) -> str:
    """The name of the task that a request is of."""
    return request.task_name or "no task"


def grouped(keys: Iterable[Any]) -> Iterator[tuple[Any, list[int]]]:
    """(key, the places at which it stands), in the order of the first."""
    places: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    yield from places.items()
