"""Writes one page about a run: what its exits are worth, in quality and in measured time.

    python -m launch.report --workdir=runs/smollm2

The page is `report.html` in that folder; it needs no other file and no network.
"""

from early_exit.storage import extras
from launch import common


def main(argv):
    common.no_arguments(argv)
    with extras.needed("report"):
        from early_exit.report import page

    print(page.write(common.workdir()))


if __name__ == "__main__":
    common.run(main)
