"""Writes one page about a run: what its exits are worth, in quality and in measured time.

    python -m launch.report --workdir=runs/smollm2
"""

from pathlib import Path

from early_exit.report import page
from launch import common


def main(argv):
    common.no_arguments(argv)
    print(page.write(Path(common.WORKDIR.value)))


if __name__ == "__main__":
    common.run(main)
