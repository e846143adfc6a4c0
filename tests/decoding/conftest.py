import pytest
from slow_decoder import mixed_policy

from early_exit.decoding.mode import LOSSY

PROMPT = [7, 3, 52, 11, 29]


@pytest.fixture(scope="session")
def mixed(tiny):
    """With it the positions after PROMPT leave at every exit of the tiny model."""
    return mixed_policy(*tiny, PROMPT, LOSSY)
