"""Export a model to ONNX or torch.export, and check the file's scores against the model's own."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distiller.cli import ArgumentParser, InputError, run
from distiller.files import atomic_write
from distiller.graph import leaf_modules, module_graph
from exported import INPUTS, OUTPUT, ExportedScorer, OnnxScorer, TorchScorer, require_onnx, save_exported
from loading import dummy_input
from neumf_int8 import TABLES
from recording import show_messages
from saved import SavedModel, load_saved
from scoring import Scorer

PROG = "export.py"
FORMATS = {".onnx": "onnx", ".pt2": "torch"}
SAMPLE_USERS, SAMPLE_ITEMS, SAMPLE_SEED = 100, 100, 0  # 10,000 pairs: a second's work
# The greatest difference of probabilities that passes. In float32, sums in another order: 1.4e-6 of 6 M scores of
# ml-1m. Of a quantized model, a value between two levels that comes to lie on the other one: that changed 1 of 60,000
# of these scores, by up to 0.031, which is two levels of a logit in [-8, 8] where the sigmoid is steepest.
FLOAT_TOLERANCE, QUANTIZED_TOLERANCE = 1e-5, 0.05
ALIKE = 1e-6  # float32 has no fewer levels than that of probabilities


@dataclass(frozen=True)
class Differences:
    """Absolute differences between two models' probabilities.

    Attributes:
        max: Greatest.
        mean: Mean.
        equal: Share that is at most ``ALIKE``.
        pairs: How many.
    """

    max: float
    mean: float
    equal: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.pairs} pairs: max {self.max:.2g}, mean {self.mean:.2g}, {100 * self.equal:.2f} % equal"


def compare(model: Scorer, exported: Scorer, users: Tensor, items: Tensor) -> Differences:
    """Compare scores of items (B, C) for users (B,): the exported model's of the first pair alone, then of all."""
    expected, found = model(users, items), exported(users, items)
    found[:1, :1] = exported(users[:1], items[:1, :1])
    difference = (expected.double() - found.double()).abs().nan_to_num(nan=torch.inf)
    equal = (difference <= ALIKE).double().mean().item()
    return Differences(difference.max().item(), difference.mean().item(), equal, difference.numel())


def sample(saved: SavedModel) -> tuple[Tensor, Tensor]:
    """Users (B,) and items (B, C), drawn with replacement."""
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    users = torch.randint(saved.nb_users, (SAMPLE_USERS,), generator=generator)
    return users, torch.randint(saved.nb_items, (SAMPLE_USERS, SAMPLE_ITEMS), generator=generator)


def write_onnx(saved: SavedModel, path: Path) -> ExportedScorer:
    """Write a model as ONNX; what scores with the file."""
    import onnx

    from distiller.onnx_graph import onnx_model

    inputs = {table: next(x for x in INPUTS if f"_{x}_" in table) for table in TABLES}
    if saved.quantizer is None:
        graph = module_graph(saved.model, dummy_input(torch.device("cpu")))
        model = onnx_model(graph, leaf_modules(saved.model), inputs, OUTPUT)
    else:
        quantizer = saved.quantizer
        model = onnx_model(quantizer.graph, quantizer.modules, inputs, OUTPUT, quantizer.weights)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return OnnxScorer(path)


def write_torch(saved: SavedModel, path: Path) -> ExportedScorer:
    """Write a model by ``torch.export``; what scores with the file."""
    save_exported(saved.model, path)
    return TorchScorer(path)


def export(saved: SavedModel, out: Path, kind: str, tolerance: float) -> Differences:
    """Write a model and check it; the file gets its name only if it passes.

    Args:
        saved: The model.
        out: The file.
        kind: One of ``FORMATS``' values.
        tolerance: The greatest difference of probabilities that passes.

    Raises:
        InputError: the format cannot hold the model.
        SystemExit: 1, after a line on stderr: a difference is greater than that.
    """
    with atomic_write(out) as temporary:
        scorer = (write_onnx if kind == "onnx" else write_torch)(saved, temporary)
        differences = compare(saved.scorer(), scorer, *sample(saved))
        print(f"{out}: against the checkpoint, {differences}")
        if not differences.max <= tolerance:
            print(
                f"{PROG}: error: {out} is not written: its scores differ by up to {differences.max:.2g}, "
                f"more than --tolerance {tolerance:g}",
                file=sys.stderr,
            )
            raise SystemExit(1)
    return differences


def exportable(path: Path, kind: str) -> SavedModel:
    """The model of a checkpoint.

    Raises:
        InputError: not a checkpoint, or of a model that only quantizing it makes exportable.
    """
    saved = load_saved(path)
    if saved.quantization_aware:
        raise InputError(
            f"{path} rounds as it was trained to: ncf.py --evaluate --quantize-eval makes a quantized.pth.tar of it, "
            "which can be exported"
        )
    if saved.quantizer is not None and saved.quantizer.dynamic:
        layers = saved.model.named_modules()
        layer = next(name for name, module in layers if getattr(module, "dynamic", False))
        raise InputError(
            f"{path}: layer {layer} finds its ranges on every batch, which {kind} has no form for"
        )
    return saved


def parse_args() -> Namespace:
    parser = ArgumentParser(prog=PROG, description=__doc__)
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
    args = parser.parse_args()
    if args.format is None and args.out.suffix not in FORMATS:
        raise InputError(f"OUT {args.out}: ends in neither .onnx nor .pt2: --format says what it is to be")
    if args.out.is_dir():
        raise InputError(f"OUT {args.out}: is a directory")
    if args.out.exists() and args.checkpoint.exists() and args.out.samefile(args.checkpoint):
        raise InputError(f"OUT {args.out}: is the checkpoint itself")
    if args.tolerance is not None and not 0 <= args.tolerance <= 1:
        raise InputError(f"--tolerance must be from 0 to 1, not {args.tolerance}")
    return args


def main() -> None:
    args = parse_args()
    show_messages(PROG)
    kind = args.format or FORMATS[args.out.suffix]
    if kind == "onnx":
        require_onnx("--format onnx")
    saved = exportable(args.checkpoint, kind)
    tolerance = args.tolerance
    if tolerance is None:
        tolerance = FLOAT_TOLERANCE if saved.quantizer is None else QUANTIZED_TOLERANCE
    export(saved, args.out, kind, tolerance)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, inputs {', '.join(INPUTS)}, output {OUTPUT}")


if __name__ == "__main__":
    sys.exit(run(PROG, main))
