"""``neural-cf export``: write a model as ONNX or for torch.export, and check its scores."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from distiller.system.cli import ArgumentParser, InputError
from neural_cf.runs.log import show_messages
from neural_cf.serving.export import (
    FLOAT_TOLERANCE,
    FORMATS,
    QUANTIZED_TOLERANCE,
    ScoresDifferError,
    export,
    exportable,
)
from neural_cf.serving.exported_scorers import (
    INPUTS,
    OUTPUT,
    require_onnx,
)

PROG = "neural-cf export"


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Return the command line's arguments.

    Raises:
        InputError: one of them is out of its range.
    """
    parser = ArgumentParser(
        prog=PROG,
        description="Write a model as ONNX or for torch.export, and check its scores against the checkpoint's.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="best.pth.tar, or quantized.pth.tar for integers")
    add("out", type=Path, help="file to write, in place of what is there")
    add("--format", choices=sorted(FORMATS.values()), help="(default: by OUT's suffix, .onnx or .pt2)")
    add(
        "--tolerance",
        type=float,
        metavar="X",
        help="greatest difference of probabilities from the checkpoint's that passes "
        f"(default: {FLOAT_TOLERANCE:g}, of a quantized model {QUANTIZED_TOLERANCE:g})",
    )
    args = parser.parse_args(argv)
    if args.format is None and args.out.suffix not in FORMATS:
        raise InputError(f"OUT {args.out}: ends in neither .onnx nor .pt2: --format says what it is to be")
    if args.out.is_dir():
        raise InputError(f"OUT {args.out}: is a directory")
    if args.out.exists() and args.checkpoint.exists() and args.out.samefile(args.checkpoint):
        raise InputError(f"OUT {args.out}: is the checkpoint itself")
    if args.tolerance is not None and not 0 <= args.tolerance <= 1:
        raise InputError(f"--tolerance must be from 0 to 1, not {args.tolerance}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, by default the process's own."""
    args = parse_args(argv)
    show_messages(PROG)
    kind = args.format or FORMATS[args.out.suffix]
    if kind == "onnx":
        require_onnx("--format onnx")
    saved = exportable(args.checkpoint, kind)
    tolerance = args.tolerance
    if tolerance is None:
        tolerance = FLOAT_TOLERANCE if saved.quantizer is None else QUANTIZED_TOLERANCE
    try:
        export(saved, args.out, kind, tolerance)
    except ScoresDifferError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, inputs {', '.join(INPUTS)}, output {OUTPUT}")
