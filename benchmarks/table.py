"""The README's benchmark table for a data set: convert, train, calibrate, evaluate, by the command lines there.

    python benchmarks/table.py ratings.csv|DIRECTORY [--epochs 20] [--seed 1] ...

Everything goes through ncf.py as a user would type it; each command is shown as it is run. The defaults are the
published recipe. An already trained run in --out is used as it is.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from dataset import Split, load_split  # noqa: E402
from distiller.cli import ArgumentParser, InputError, run  # noqa: E402

METRICS = re.compile(r"Initial HR@(\d+) = ([\d.]+), NDCG@\d+ = ([\d.]+), val_time = ([\d.]+)")
MODES = {"asym_u": "Asymmetric", "sym": "Symmetric"}
FP32 = ("FP32", "N/A", "N/A", "N/A")


def execute(*command: object) -> str:
    """Run one of the project's scripts, its progress on stderr; what it prints on stdout.

    Raises:
        InputError: it failed.
    """
    words = [str(word) for word in command]
    print(f"$ python {shlex.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", file=sys.stderr, flush=True)
    if done.returncode:
        raise InputError(f"{words[0]} ended with exit code {done.returncode}")
    return done.stdout


def converted(data: Path, out: Path) -> Path:
    """The directory of the split: ``data`` itself, or what convert.py makes of it."""
    if data.is_dir():
        return data
    directory = out / "split"
    execute("convert.py", data, directory, "--negatives", 999)
    return directory


def evaluations(split: Path, out: Path, args: argparse.Namespace) -> list[tuple[tuple[str, ...], list[str]]]:
    """Train and calibrate; the table's rows, each with the command line that gives its figures."""
    common = [split, "-b", args.batch_size, "--layers", *args.layers, "-f", args.factors, "--seed", args.seed]
    trained = out / "base_fp32"
    if args.overwrite or not (trained / "best.pth.tar").exists():
        training = ["-l", args.learning_rate, "-e", args.epochs, "--overwrite", "-o", trained]
        execute("ncf.py", *common, *training)
    load = [*common, "--load", trained / "best.pth.tar"]
    statistics = {}
    for flags in ((), ("--split-final",)):
        statistics[flags] = out / f"quantization_stats_{'split' if flags else 'no_split'}.yaml"
        stats_out = ["--qe-stats-out", statistics[flags], "-o", out / "calibration"]
        execute("ncf.py", *load, "--qe-calibration", 0.1, *flags, *stats_out)
    rows = [(FP32, [*load, "--evaluate"])]
    for mode, per_channel, flags in itertools.product(MODES, (("--qepc",), ()), statistics):
        quantize = ["--qeba", 8, "--qebw", 8, "--qem", mode, *per_channel, *flags]
        command = [*load, "--evaluate", "--quantize-eval", *quantize, "--qe-stats-file", statistics[flags]]
        yes_no = ("Yes" if per_channel else "No", "Yes" if flags else "No")
        rows.append((("INT8", MODES[mode], *yes_no), command))
    return rows


def processor() -> str:
    """The processor's name, as Linux or Python knows it."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def protocol(split: Split, args: argparse.Namespace) -> str:
    """What the figures mean and how they came about."""
    drawn = {None: "as in the CSV files", True: "without replacement", False: "with replacement"}
    return (
        f"{split.nb_users} users, {split.nb_items} items, {len(split.train_users)} training pairs "
        f"({split.digest[:19]}). Leave one out; {split.negatives.shape[1]} negatives per user, drawn "
        f"{drawn[split.distinct_negatives]}; ties count against the test item. Layers "
        f"{' '.join(map(str, args.layers))}, {args.factors} factors, batch {args.batch_size}, learning rate "
        f"{args.learning_rate}, seed {args.seed}, the best of {args.epochs} epochs by HR@10. Calibrated on 10 % of the "
        f"test users. {processor()}, {os.cpu_count()} processors, torch {torch.__version__}, "
        f"{datetime.date.today().isoformat()}."
    )


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="table.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path, help="ratings file, or directory of a split")
    parser.add_argument("--out", type=Path, default=Path("run/table"), help="(default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="train anew")
    parser.add_argument("--epochs", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--factors", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[256, 256, 128, 64], help="(default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.0005, help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    directory = converted(args.data, args.out)
    table = [
        "| Precision | Mode | Per-Channel | Split Final Layer | HR@10 | NDCG@10 | Evaluation (s) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, command in evaluations(directory, args.out, args):
        _, hr, ndcg, seconds = METRICS.search(
            execute("ncf.py", *command, "-o", args.out / "evaluation")
        ).groups()
        table.append(f"| {' | '.join(row)} | {100 * float(hr):.2f} | {100 * float(ndcg):.2f} | {seconds} |")
    print("\n".join([*table, "", protocol(load_split(directory), args)]))


if __name__ == "__main__":
    sys.exit(run("table.py", main))
