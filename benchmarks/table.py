"""The README's benchmark table for a data set: convert, train, calibrate, evaluate, by the command lines there.

    python -m benchmarks.table ratings.csv|DIRECTORY [--epochs 20] [--seeds 1] ...

Everything goes through ncf.py as a user would type it; each command is shown as it is run. The defaults are the
published recipe. A model that is already in --out is used, and trained to its end where it was interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from benchmarks.machine import machine
from dataset import Split, load_split
from distiller.checkpoint import load_checkpoint
from distiller.cli import ArgumentParser, InputError, run
from recording import BEST, CHECKPOINT, CONFIG

ROOT = Path(__file__).resolve().parent.parent
METRICS = re.compile(r"Initial HR@10 = ([\d.]+), NDCG@10 = ([\d.]+)")
MODES = {"asym_u": "Asymmetric", "sym": "Symmetric"}
HEADER = ("Precision", "Mode", "Per-Channel", "Split Final Layer", "HR@10", "NDCG@10")

Row = tuple[str, ...]
Figures = tuple[float, float]  # HR@10 and NDCG@10 in percent


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


def figures_of_seed(split: Path, out: Path, seed: int, args: argparse.Namespace) -> dict[Row, Figures]:
    """Train and calibrate with a seed, and evaluate: each row's figures."""
    common = [split, "-b", args.batch_size, "--layers", *args.layers, "-f", args.factors, "--seed", seed]
    trained = out / "base_fp32"
    if args.overwrite or not (trained / CHECKPOINT).exists():
        training = ["-l", args.learning_rate, "-e", args.epochs, "--overwrite", "-o", trained]
        execute("ncf.py", *common, *training)
    else:
        finish_training(split, trained, seed, args)
    load = [*common, "--load", trained / BEST]
    statistics = {}
    for flags in ((), ("--split-final",)):
        statistics[flags] = out / f"quantization_stats_{'split' if flags else 'no_split'}.yaml"
        stats_out = ["--qe-stats-out", statistics[flags], "-o", out / "calibration"]
        execute("ncf.py", *load, "--qe-calibration", 0.1, *flags, *stats_out)

    evaluate = ["ncf.py", *load, "--evaluate", "-o", out / "evaluation"]
    figures = {("FP32", "N/A", "N/A", "N/A"): figures_in(execute(*evaluate))}
    for mode, per_channel, flags in itertools.product(MODES, (("--qepc",), ()), statistics):
        quantize = ["--quantize-eval", "--qeba", 8, "--qebw", 8, "--qem", mode, *per_channel, *flags]
        row = ("INT8", MODES[mode], "Yes" if per_channel else "No", "Yes" if flags else "No")
        figures[row] = figures_in(execute(*evaluate, *quantize, "--qe-stats-file", statistics[flags]))
    return figures


def finish_training(split: Path, trained: Path, seed: int, args: argparse.Namespace) -> None:
    """Resume a run that is there already, if it was interrupted.

    Raises:
        InputError: it is the run of another table.
    """
    config = json.loads((trained / CONFIG).read_text())
    wanted = {"seed": seed, "data_digest": load_split(split).digest} | {
        key: getattr(args, key) for key in ("epochs", "factors", "layers", "batch_size", "learning_rate")
    }
    for key, value in wanted.items():
        if config.get(key) != value:
            raise InputError(
                f"--out: {trained} has {key} {config.get(key)}, not {value}: --overwrite trains anew"
            )
    if load_checkpoint(trained / CHECKPOINT)["progress"]["epoch"] < args.epochs:
        execute("ncf.py", split, "--resume", "-o", trained)


def figures_in(output: str) -> Figures:
    """The figures in what an evaluation printed."""
    hr, ndcg = METRICS.search(output).groups()
    return 100 * float(hr), 100 * float(ndcg)


def markdown(figures: list[dict[Row, Figures]]) -> str:
    """The table: means over seeds, with standard deviations where there are several."""

    def cell(values: list[float]) -> str:
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        return f"{mean(values):.2f}{spread}"

    lines = [HEADER, ["---"] * len(HEADER)]
    for row in figures[0]:
        hr, ndcg = zip(*(of_seed[row] for of_seed in figures), strict=True)
        lines.append((*row, cell(hr), cell(ndcg)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def protocol(split: Split, args: argparse.Namespace) -> str:
    """What the figures mean and how they came about."""
    drawn = {None: "as in the CSV files", True: "without replacement", False: "with replacement"}
    spread = ": mean ± standard deviation" if len(args.seeds) > 1 else ""
    return (
        f"{split.nb_users} users, {split.nb_items} items, {len(split.train_users)} training pairs "
        f"({split.digest[:19]}). Leave one out; {split.negatives.shape[1]} negatives per user, drawn "
        f"{drawn[split.distinct_negatives]}; ties count against the test item. Layers "
        f"{' '.join(map(str, args.layers))}, {args.factors} factors, batch {args.batch_size}, learning rate "
        f"{args.learning_rate}, the best of {args.epochs} epochs by HR@10, seeds "
        f"{' '.join(map(str, args.seeds))}{spread}. Calibrated on 10 % of the test users. {machine()}."
    )


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="table.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("data", type=Path, help="ratings file, or directory of a split")
    add("--out", type=Path, default=Path("run/table"), help="models, statistics, logs (default: %(default)s)")
    add("--overwrite", action="store_true", help="train anew")
    add("--epochs", type=int, default=20, help="(default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[1], help="a model for each (default: %(default)s)")
    add("--factors", type=int, default=64, help="(default: %(default)s)")
    add("--layers", type=int, nargs="+", default=[256, 256, 128, 64], help="(default: %(default)s)")
    add("--batch-size", type=int, default=2048, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=0.0005, help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    split = converted(args.data, args.out)
    figures = [figures_of_seed(split, args.out / f"seed-{seed}", seed, args) for seed in args.seeds]
    print(f"{markdown(figures)}\n\n{protocol(load_split(split), args)}")


if __name__ == "__main__":
    sys.exit(run("table.py", main))
