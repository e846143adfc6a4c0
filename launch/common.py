"""What every command shares: the run's folder, and errors that are a sentence, not a stack."""

import logging
import os
import sys
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from early_exit.pretrained.sources import cache_folder

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The run's settings; after tuning, the run's folder has them."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
DEBUG = flags.DEFINE_bool("debug", False, "Show the whole stack of an error.")

# What users meet: bad settings, missing files, damaged weights, a full disk, a diverged run.
EXPECTED = (ValueError, OSError, RuntimeError, FloatingPointError)


def workdir() -> Path:
    return Path(WORKDIR.value)


def no_arguments(argv: list[str]) -> None:
    """Refuses words that are no flag: a misspelt flag must not be ignored."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")


def run(main, *, on_run: bool = True) -> None:
    """Runs an absl main, printing expected errors as one message (exit status 1).

    Args:
      on_run: the command works on a run's folder; else it has no --config and no --workdir.
    """
    if on_run:
        flags.mark_flag_as_required("workdir")
    else:
        del flags.FLAGS.config, flags.FLAGS.workdir

    def guarded(argv):
        if not flags.FLAGS["verbosity"].present:  # Orbax tells its every step at level INFO
            absl_logging.set_verbosity(absl_logging.WARNING)
        # Compiled programs outlive the process, so that only a first run pays for them.
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        try:
            main(argv)
        except EXPECTED as error:
            if DEBUG.value:
                raise
            sys.exit(f"{type(error).__name__}: {error}\n(--debug shows where)")
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from the last save", file=sys.stderr)
            sys.exit(130)

    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # ml_collections: a key that the config lacks
        cause = error.args[0].args[0] if isinstance(error, AttributeError) else error.args[0]
        settings = [arg for arg in argv if arg.lstrip("-").startswith(("config.", "noconfig."))]
        sys.exit(f"no such setting in the config: {cause}\n(given: {' '.join(settings)})")
