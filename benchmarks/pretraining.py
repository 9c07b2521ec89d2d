"""Measure what pre-training gains: GMF and MLP alone, joined, and trained on as NeuMF, over several seeds.

    python -m benchmarks.pretraining ratings.csv|DIRECTORY [--seeds 1 2 3] ...

Every step is a command line of ncf.py that a user could type, and is shown as it is run. The published figures are from
splits with 99 negatives, which is also what a ratings file is converted to. A run that is already in --out is used; if
it was interrupted, it is finished.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import recipe
from distiller.system.cli import InputError, run
from distiller.system.tables import markdown_table
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.commands.flags import PRETRAIN_EPOCHS
from neural_cf.runs.directory import CHECKPOINT, CONFIG, RESULTS
from neural_cf.runs.hardware import machine
from neural_cf.runs.log import LOG
from neural_cf.split import Split, described, load_split

JOINED = re.compile(r"Joined: HR@10 = ([\d.]+), NDCG@10 = ([\d.]+)")
HEADER = ("Model", "HR@10", "NDCG@10", "epochs", "training, s")
SETTINGS = (
    *("epochs", "factors", "layers", "batch_size", "negative_samples", "learning_rate"),
    *("pretrain", "pretrain_rate", "l2"),
)


@dataclass(frozen=True)
class Figures:
    """The figures of one model: GMF, MLP, both joined, or NeuMF.

    Attributes:
        hr: HR@10 in percent.
        ndcg: NDCG@10 in percent.
        epochs: The number of epochs of training; None for a model that was not trained itself.
        train_time_s: The seconds that these epochs took, without evaluations.
    """

    hr: float
    ndcg: float
    epochs: int | None = None
    train_time_s: float = 0.0


def words(split: Path, out: Path, seed: int, args: argparse.Namespace) -> list[object]:
    """Return the arguments of ncf.py that train a seed's model."""
    rates = ["-l", args.learning_rate, "-e", args.epochs]
    branches = ["--pretrain", *args.pretrain, "--pretrain-rate", args.pretrain_rate]
    samples = ["-n", args.negative_samples, "--l2", args.l2]
    common = recipe.common_flags(split, seed, args)
    return [*common, *samples, *branches, *rates, "--overwrite", "-o", out]


def train(split: Path, out: Path, seed: int, args: argparse.Namespace) -> None:
    """Train a seed's model, or finish its training, unless it is trained already.

    Raises:
        InputError: ``out`` has a run with other settings.
    """
    if args.overwrite or not (out / CONFIG).exists():
        recipe.execute("ncf.py", *words(split, out, seed, args))
        return
    config = json.loads((out / CONFIG).read_text())
    for key, value in {"seed": seed, **{key: getattr(args, key) for key in SETTINGS}}.items():
        if config.get(key) != value:
            raise InputError(
                f"--out: {out} has {key} {config.get(key)}, not {value}: --overwrite trains anew"
            )
    last = out / CHECKPOINT
    if not last.exists() or load_checkpoint(last)["progress"]["epoch"] < args.epochs:
        recipe.execute("ncf.py", split, "--resume", "-o", out)


def figures_of(out: Path) -> dict[str, Figures]:
    """Return the figures of a seed's run: after the last epoch for a branch, at its best for NeuMF."""
    joined = JOINED.search((out / LOG).read_text())
    start = {"hr@10": float(joined[1]), "ndcg@10": float(joined[2])}
    return {
        "GMF": figures_of_rows(results(out / "gmf")[-1:], results(out / "gmf")),
        "MLP": figures_of_rows(results(out / "mlp")[-1:], results(out / "mlp")),
        "joined": Figures(100 * start["hr@10"], 100 * start["ndcg@10"]),
        "NeuMF": figures_of_rows([start, *results(out)], results(out)),
    }


def results(directory: Path) -> list[dict[str, float]]:
    """Return a run's results, with a row for each epoch or part of one."""
    with open(directory / RESULTS, newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def figures_of_rows(choice: list[dict[str, float]], trained: list[dict[str, float]]) -> Figures:
    """Return the figures of the row of ``choice`` with the highest HR, and epochs and time of ``trained``."""
    best = max(choice, key=lambda row: row["hr@10"])
    seconds = sum(row["train_time_s"] for row in trained)
    return Figures(100 * best["hr@10"], 100 * best["ndcg@10"], int(trained[-1]["epoch"]) + 1, seconds)


def markdown(figures: list[dict[str, Figures]]) -> str:
    """Return the table in Markdown: means over seeds, with standard deviations if there are several seeds."""
    rows = []
    for model in figures[0]:
        of_seeds = [of_seed[model] for of_seed in figures]
        epochs = of_seeds[0].epochs
        rows.append(
            (
                model,
                recipe.over_seeds([each.hr for each in of_seeds]),
                recipe.over_seeds([each.ndcg for each in of_seeds]),
                "" if epochs is None else str(epochs),
                "" if epochs is None else recipe.over_seeds([each.train_time_s for each in of_seeds]),
            )
        )
    return markdown_table(HEADER, rows)


def protocol(split: Split, args: argparse.Namespace) -> str:
    """Return a text on what the figures mean and how they were made."""
    spread = ": mean ± standard deviation" if len(args.seeds) > 1 else ""
    return (
        f"{described(split)} Layers {' '.join(map(str, args.layers))}, {args.factors} factors, batch "
        f"{args.batch_size}, {args.negative_samples} training negatives, L2 {args.l2}; GMF and MLP "
        f"at rate {args.pretrain_rate}, NeuMF at {args.learning_rate}, the best of its epochs by HR@10 of the test "
        f"item; seeds {' '.join(map(str, args.seeds))}{spread}. {machine()}."
    )


def parse_args() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = recipe.build_parser(
        "pretraining.py", __doc__.split("\n\n")[0], "run/pretraining", [1, 2, 3], epochs=1
    )
    add = parser.add_argument
    epochs = "epochs of GMF and MLP (default: %(default)s)"
    add("--pretrain", type=int, nargs=2, default=PRETRAIN_EPOCHS, metavar="EPOCHS", help=epochs)
    add("--pretrain-rate", type=float, default=0.001, help="(default: %(default)s)")
    add("--negative-samples", type=int, default=8, help="(default: %(default)s)")
    add("--l2", type=float, default=0.002, help="(default: %(default)s)")
    parser.set_defaults(learning_rate=0.00001)
    return parser.parse_args()


def main() -> None:
    """Run the script."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    split = recipe.converted(args.data, args.out, nb_negatives=99)
    figures = []
    for seed in args.seeds:
        out = args.out / f"seed-{seed}"
        train(split, out, seed, args)
        figures.append(figures_of(out))
    print(f"{markdown(figures)}\n\n{protocol(load_split(split), args)}")


if __name__ == "__main__":
    sys.exit(run("pretraining.py", main))
