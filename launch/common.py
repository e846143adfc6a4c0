"""What every command shares: the run's folder, and errors that are a sentence, not a stack."""

import logging
import os
import sys
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
DEBUG = flags.DEFINE_bool("debug", False, "Show the whole stack of an error.")

# What users meet: bad settings, missing files, damaged weights, a full disk, a diverged run.
EXPECTED = (ValueError, TypeError, KeyError, OSError, RuntimeError, FloatingPointError)


def workdir() -> Path:
    return Path(WORKDIR.value)


def no_arguments(argv: list[str]) -> None:
    """Refuses words that are no flag: a misspelt flag must not be ignored."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")


def run(main) -> None:
    """Runs an absl main, printing expected errors as one message (exit status 1)."""

    def guarded(argv):
        if not flags.FLAGS["verbosity"].present:  # Orbax tells its every step at level INFO
            absl_logging.set_verbosity(absl_logging.WARNING)
        # Compiled programs outlive the process, so that only a first run pays for them.
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        if cache is None:
            from early_exit.pretrained.sources import cache_folder

            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        try:
            main(argv)
        except EXPECTED as error:
            if DEBUG.value:
                raise
            sys.exit(f"{type(error).__name__}: {error}")

    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    app.run(guarded)
