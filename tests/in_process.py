"""Commands in this process, so that many of them share imports and compiled programs.

The one idea: a command is a module that defines flags when it is run. Each run defines its own, and
takes them back; `launch.common` and whatever else defines flags when it is imported stays.
"""

import contextlib
import importlib
import io
import runpy
import signal
import subprocess
import sys
from unittest import mock

from absl import flags
from absl.testing import flagsaver

# They, or what they import, define flags when they are imported, which happens once.
for _name in ("common", "decoding_flags", "processes", "on_mesh", "slurm.submit", "tpu.jobset"):
    importlib.import_module(f"launch.{_name}")
for _name in ("training.loop", "evaluation.run_decoder", "data.labelled", "report.page"):
    importlib.import_module(f"early_exit.{_name}")
# It enters what it counts into a registry in which nothing may stand twice.
importlib.import_module("grain")


def run(command: str, *given) -> subprocess.CompletedProcess:
    """What `python -m launch.<command> <given>` prints, and its exit status.

    Errors that a command does not tell in a sentence come through as they are.
    """
    arguments = [f"launch.{command}", *map(str, given)]
    printed, status = [io.StringIO(), io.StringIO()], 0
    terminate = signal.getsignal(signal.SIGTERM)
    defined = {name: flags.FLAGS[name] for name in flags.FLAGS}
    module = f"launch.{command}"
    for flag in flags.FLAGS.get_flags_for_module(module):  # a test has imported it
        delattr(flags.FLAGS, flag.name)
    with (
        mock.patch.dict(sys.modules),
        flagsaver.flagsaver(),
        mock.patch.object(sys, "argv", list(arguments)),
        mock.patch.dict("os.environ", JAX_COMPILATION_CACHE_DIR=""),
        mock.patch("early_exit.storage.traces.keep"),  # as of the programs themselves
        contextlib.redirect_stdout(printed[0]),
        contextlib.redirect_stderr(printed[1]),
    ):
        sys.modules.pop(module, None)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as left:
            status = left.code
            if isinstance(status, str):
                printed[1].write(status)
                status = 1
        finally:
            signal.signal(signal.SIGTERM, terminate)
            for name in defined.keys() - set(flags.FLAGS):  # some commands leave flags out
                flags.FLAGS[name] = defined[name]
    return subprocess.CompletedProcess(arguments, status or 0, *(p.getvalue() for p in printed))
