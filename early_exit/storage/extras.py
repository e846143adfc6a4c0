"""Libraries that only some of the work needs: imported when it is done, and named if they lack."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
    """Around imports of what comes with an extra of the package.

    Raises:
      RuntimeError: it is not installed; says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"this needs {error.name}, which is not installed; pip install 'early_exit[{extra}]'"
        ) from error
