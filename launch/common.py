"""What every command shares: the run's folder, and errors that are a sentence, not a stack."""

import collections
import contextlib
import math
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from early_exit.runs import lock, progress
from early_exit.settings.read import read
from early_exit.settings.sections import Settings
from early_exit.storage import buckets, programs, traces
from early_exit.training import preemption
from launch import usage

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Settings: a file of configs/; --config.<section>.<setting>=… changes one (all: "
    "`launch.inspect --settings`). After tuning, the run has them.",
)
# Of all --seed flags; larger ones are no seeds for JAX.
SEEDS = {"lower_bound": 0, "upper_bound": 2**32 - 1}

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, here or in a bucket (gs://…).")
DEBUG = flags.DEFINE_bool("debug", False, "Show the whole stack of an error.")
usage.group("what it works on", CONFIG, WORKDIR, DEBUG)

# What users meet: bad settings, missing files, damaged weights, a full disk, a diverged run.
EXPECTED = (ValueError, OSError, RuntimeError, FloatingPointError)


_until_the_end = contextlib.ExitStack()


def workdir() -> Path:
    return buckets.place(WORKDIR.value)


def settings() -> Settings | None:
    """Those of --config and its flags, checked; None without the flag.

    Raises:
      SettingsError: they make no run.
      OSError: no such file.
    """
    if not CONFIG.present:
        return None
    getattr(CONFIG.value, "keys", None)  # one that could not be loaded says why
    return read(CONFIG.value)


def own(folder: Path) -> None:
    """Makes a folder this command's own until it ends, however it ends.

    Raises:
      RuntimeError: another command is at work there.
      OSError: the folder cannot be written to.
    """
    _until_the_end.enter_context(lock.held(folder))


def tell_devices() -> None:
    """Says what this command computes on, such as `on 8 × NVIDIA H100 80GB HBM3`; once for all."""
    if not jax.process_index():
        kinds = collections.Counter(device.device_kind for device in jax.devices())
        told = ", ".join(f"{n} × {kind}" if n > 1 else kind for kind, n in kinds.items())
        print(f"on {told}", file=sys.stderr)


def no_arguments(argv: list[str]) -> None:
    """Refuses words that are no flag: a misspelt flag must not be ignored."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")


def run(main, *, on_run: bool = True, configured: bool = False, untuned: bool = False) -> None:
    """Runs an absl main, printing expected errors as one message (exit status 1).

    Asked to leave by SIGTERM, it does so at once with status 75, unless `main` listens by itself.

    Args:
      on_run: the command works on a run's folder; else it has no --workdir, and --config only
        where it is `configured`. With both, either of the two says what it works on.
      untuned: it works on a run's folder, or, without --workdir, on the network that --config
        names, as it is before anything is tuned.
    """
    if untuned:
        needed = "give --workdir, a run's folder, or --config, for a network without exits"
        flags.register_multi_flags_validator(["config", "workdir"], _has_one, needed)
    elif on_run and configured:
        flags.mark_flags_as_mutual_exclusive(["config", "workdir"], required=True)
    elif on_run:
        flags.mark_flag_as_required("workdir")
    else:
        del flags.FLAGS.workdir
        if not configured:
            del flags.FLAGS.config

    for name in ("config", "workdir", "debug"):  # what --help of any command lists, too
        if name in flags.FLAGS:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def guarded(argv):
        if not flags.FLAGS["verbosity"].present:  # Orbax tells its every step at level INFO
            absl_logging.set_verbosity(absl_logging.WARNING)
        programs.keep()
        traces.keep()
        try:
            with progress.shown(), _until_the_end:
                main(argv)
        except KeyboardInterrupt:
            _fail("\ninterrupted; the same command goes on from the last save", 130)
        except Exception as error:
            told = isinstance(error, EXPECTED) and not DEBUG.value
            if not told and not jax.distributed.is_initialized():
                raise
            sentence = f"{type(error).__name__}: {error}\n(--debug shows where)"
            _fail(sentence if told else traceback.format_exc(), 1)

    try:
        preemption.leave_at_once()
        app.run(guarded, flags_parser=_parse_flags)
    except preemption.Preempted as left:
        if not (jax.distributed.is_initialized() and jax.process_index()):
            print(f"{left}; the same command goes on with what is saved", file=sys.stderr)
        sys.exit(preemption.EXIT_STATUS)


def _has_one(given: dict) -> bool:
    return any(value is not None for value in given.values())


def _fail(message: str, status: int) -> NoReturn:
    """Ends this process, and does not wait for others that may be waiting for it."""
    if not jax.distributed.is_initialized():
        print(message, file=sys.stderr)
        sys.exit(status)
    print(f"{message}\n(one of several processes; the first to end says why)", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _parse_flags(argv: list[str]) -> list[str]:
    if usage.ASKED & set(argv[1:]):
        print(usage.text(sys.modules["__main__"].__doc__))
        sys.exit()
    _refuse_numbers_beyond_use()
    try:
        return app.parse_flags_with_usage(argv)
    except OSError as error:  # a config file that is not there, or that could not read another one
        if not _is_of_the_parser(error):
            raise
        sys.exit(str(error))
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        if not _is_of_the_parser(error):  # of the config file itself: its stack says where
            raise
        given = [arg for arg in argv if arg.lstrip("-").startswith(("config.", "noconfig."))]
        sys.exit(f"no such setting in the config: {_cause(error)}\n(given: {' '.join(given)})")


def _is_of_the_parser(error: Exception) -> bool:
    """Whether only the parser of flags was running, and no config file, nor anything it called."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    rooms = {frame.f_globals["__name__"].partition(".")[0] for frame in frames}
    return rooms - {__name__.partition(".")[0]} <= {"absl", "ml_collections"}


def _cause(error: BaseException) -> object:
    """What the innermost error says; ml_collections wraps one in another."""
    said = error.args[0] if error.args else type(error).__name__
    return _cause(said) if isinstance(said, BaseException) else said


def _refuse_numbers_beyond_use() -> None:
    """Flags that are numbers must be finite, and ints must fit into 64 bits."""
    for name in flags.FLAGS:
        parser = flags.FLAGS[name].parser
        if isinstance(parser, flags.FloatParser):
            flags.register_validator(name, _is_finite, "must be a finite number")
        elif isinstance(parser, flags.IntegerParser):
            flags.register_validator(name, _fits, "must lie between −2⁶³ and 2⁶³")


def _is_finite(number: float | None) -> bool:
    return number is None or math.isfinite(number)


def _fits(number: int | None) -> bool:
    return number is None or -(2**63) <= number < 2**63
