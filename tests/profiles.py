"""How hypothesis draws its examples: the same in every run, or new ones to find what is wrong.

The one idea: a test states how many examples it is worth, and the profile says how they are drawn.
So `make test` fails only for what was changed, and `make fuzz` looks where nobody has looked yet.
"""

from collections.abc import Iterable

import hypothesis
import pytest
from hypothesis import settings

FIXED, FUZZ = "fixed", "fuzz"
# Examples of `fuzz` for each one of `fixed`.
TIMES = 10


def register_profiles() -> None:
    """Makes both profiles known, and loads `fixed`; `--hypothesis-profile=fuzz` loads the other."""
    settings.register_profile(FIXED, derandomize=True, database=None, deadline=None)
    settings.register_profile(FUZZ, derandomize=False, deadline=None, print_blob=True)
    settings.load_profile(FIXED)


def keep_to_profile(items: Iterable[pytest.Item]) -> None:
    """Leaves a test's own settings no say in how its examples are drawn."""
    profile = settings.default
    times = TIMES if settings.get_current_profile_name() == FUZZ else 1
    functions = {item.function for item in items if isinstance(item, pytest.Function)}
    for function in filter(hypothesis.is_hypothesis_test, functions):
        own = function._hypothesis_internal_use_settings
        function._hypothesis_internal_use_settings = settings(
            own,
            derandomize=profile.derandomize,
            database=profile.database,
            max_examples=own.max_examples * times,
        )
