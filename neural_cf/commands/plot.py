"""``neural-cf plot``: draw training curves of runs, or the precision table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from distiller.system.cli import ArgumentParser, InputError
from neural_cf.reporting.plot import KINDS, draw
from neural_cf.runs.recorder import require_matplotlib

PROG = "neural-cf plot"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments.

    Raises:
        InputError: the picture's name has another ending.
    """
    parser = ArgumentParser(
        prog=PROG, description="Draw loss and HR@k of runs by epoch, or what each precision costs."
    )
    add = parser.add_argument
    add(
        "sources",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="directories of runs, or a precision table as JSON",
    )
    add("-o", "--out", type=Path, required=True, metavar="FILE", help="the picture, .png or .svg")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in KINDS:
        raise InputError(f"-o/--out: {args.out} ends in neither {' nor '.join(KINDS)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, by default the process's own."""
    args = parse_args(argv)
    require_matplotlib(PROG)
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # names between dollars are no formulas
        draw(args.sources, args.out)
