"""Exports a run: the backbone as transformers has it, and beside it the heads and the policy.

    python -m launch.export --workdir=runs/smollm2 --to=exported
    python -m launch.export --workdir=runs/smollm2 --to=heads --exits_only

Every command takes the new folder for --workdir. The first loads with transformers, too; the
second needs the backbone that the run's config names. Of several processes each brings its parts of
the weights, one matrix after the other, and the first one writes.
"""

import jax
from absl import flags

from early_exit import sharding
from early_exit.runs import assemble
from early_exit.runs.metrics import table
from early_exit.storage import buckets, files
from launch import common, on_mesh

TO = flags.DEFINE_string("to", None, "The folder to write; there must be nothing of that name.")
EXITS_ONLY = flags.DEFINE_bool("exits_only", False, "Leave the backbone out.")

flags.adopt_module_key_flags(on_mesh)  # what --help lists


def main(argv):
    on_mesh.begin(argv)
    folder = buckets.place(TO.value)
    if sharding.agreed(folder.exists()):  # before a model is loaded for nothing
        raise FileExistsError(f"{folder} exists already; name a new folder")
    tuned = on_mesh.load_tuned()
    assemble.export(tuned, folder, exits_only=EXITS_ONLY.value)
    if jax.process_index():
        return
    sizes = [(path.name, f"{files.size(path) / 1e6:.3f}") for path in sorted(folder.iterdir())]
    print(table(sizes, header=("file", "MB")))
    print(f"exported to {folder}")


if __name__ == "__main__":
    flags.mark_flag_as_required("to")
    common.run(main)
