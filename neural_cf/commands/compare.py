"""``neural-cf compare``: compare two evaluation reports user by user."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from distiller.system.cli import ArgumentParser
from neural_cf.reporting.compare import (
    comparison,
)
from neural_cf.reporting.report_reader import read_report

PROG = "neural-cf compare"


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Return the command line's arguments."""
    parser = ArgumentParser(
        prog=PROG, description="Compare two evaluation reports of the same data user by user."
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="what ncf.py --report wrote")
    parser.add_argument(
        "b", type=Path, metavar="B.json", help="the same of another model; differences are B - A"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, by default the process's own."""
    args = parse_args(argv)
    print(comparison(read_report(args.a), read_report(args.b)))
