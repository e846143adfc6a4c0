"""Commands in this process, so that many of them share imports and compiled programs.

The one idea: a command is a module that defines flags when it is run. Each run defines its own, and
takes them back; what it imports stays imported, and so do the flags of that.
"""

import contextlib
import importlib
import io
import runpy
import signal
import subprocess
import sys
from unittest import mock

from absl import app, flags
from absl.testing import flagsaver

importlib.import_module("launch.common")  # a run may leave out flags of this, which must come back


def run(command: str, *given) -> subprocess.CompletedProcess:
    """What `python -m launch.<command> <given>` prints, and its exit status.

    Errors that a command does not tell in a sentence come through as they are.
    """
    module = f"launch.{command}"
    arguments, status = [module, *map(str, given)], 0
    printed = [io.StringIO(), io.StringIO()]
    terminate = signal.getsignal(signal.SIGTERM)
    with (
        _undone(),
        # absl does once a process what each command has done in its own.
        mock.patch.object(app._run_init, "done", False),
        mock.patch.object(app._register_and_parse_flags_with_usage, "done", False),
        mock.patch.object(sys, "argv", list(arguments)),
        mock.patch.dict("os.environ", JAX_COMPILATION_CACHE_DIR=""),
        mock.patch("early_exit.storage.traces.keep"),  # as of the programs themselves
        contextlib.redirect_stdout(printed[0]),
        contextlib.redirect_stderr(printed[1]),
    ):
        imported = sys.modules.pop(module, None)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as left:
            status = left.code
            if isinstance(status, str):
                printed[1].write(status)
                status = 1
        finally:
            signal.signal(signal.SIGTERM, terminate)
            if imported:
                sys.modules[module] = imported
    return subprocess.CompletedProcess(arguments, status or 0, *(p.getvalue() for p in printed))


@contextlib.contextmanager
def _undone():
    """Flags of no command; afterwards those of before, and of what was imported meanwhile."""
    known, modules = vars(flags.FLAGS)["__flags"], set(sys.modules)
    tables = (
        flags.FLAGS.flags_by_module_dict(),
        flags.FLAGS.flags_by_module_id_dict(),
        flags.FLAGS.key_flags_by_module_dict(),
    )
    before, values = dict(known), flagsaver.save_flag_values()
    whose = [{module: list(defined) for module, defined in table.items()} for table in tables]
    for name, module in list(sys.modules.items()):
        if name.startswith("launch.") and hasattr(module, "main"):  # a test has imported a command
            for flag in flags.FLAGS.get_flags_for_module(name):
                delattr(flags.FLAGS, flag.name)
    for flag in before.values():
        flag.allow_override = True  # by one of that name in a command that does not import it
    try:
        yield
    finally:
        imported = sys.modules.keys() - modules
        for name in set(known):
            if flags.FLAGS.find_module_defining_flag(name) not in imported:
                del known[name]
        for flag in known.values():
            flag.unparse()
        known.update(before)
        for name, flag in before.items():
            flag.__dict__ = values[name]
        for table, of_modules in zip(tables, whose, strict=True):
            for module in table.keys() - imported:
                del table[module]
            table.update(of_modules)
