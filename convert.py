"""Turn a ratings file into a split: ``python convert.py ratings.csv ml-20m``.

This is ``neural-cf convert`` under the name it has beside ``ncf.py``. The code is in neural_cf/commands/convert.py.
"""

from __future__ import annotations

import sys

from distiller.system.cli import run
from neural_cf.__main__ import COMMANDS
from neural_cf.commands import convert

PROG = "convert.py"


def main() -> None:
    """Run the process's command line."""
    convert.main(prog=PROG)


if __name__ == "__main__":
    sys.exit(run(PROG, main, COMMANDS["convert"].less_memory))
