"""Make the README's benchmark table for a data set: convert, train, calibrate, evaluate.

    python -m benchmarks.table ratings.csv|DIRECTORY [--epochs 20] [--seeds 1] ...

Every step is a command line of ncf.py that a user could type, and is shown as it is run. The defaults are the published
recipe. A model that is already in --out is used; if its training was interrupted, it is finished.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from pathlib import Path

from benchmarks import recipe
from distiller.system.cli import run
from distiller.system.tables import markdown_table
from neural_cf.split import load_split

METRICS = re.compile(r"^(?:Initial )?HR@10 = ([\d.]+), NDCG@10 = ([\d.]+)", re.MULTILINE)
MODES = {"asym_u": "Asymmetric", "sym": "Symmetric"}
HEADER = ("Precision", "Mode", "Per-Channel", "Split Final Layer", "HR@10", "NDCG@10")

Row = tuple[str, ...]
Figures = tuple[float, float]  # HR@10 and NDCG@10 in percent


def figures_of_seed(split: Path, out: Path, seed: int, args: argparse.Namespace) -> dict[Row, Figures]:
    """Train and calibrate with a seed, and return the figures of each row's evaluation."""
    recipe.train(split, out, seed, args)
    load = recipe.loading_words(split, out, seed, args)
    for split_final in recipe.STATISTICS:
        recipe.execute("ncf.py", *load, *recipe.calibration_words(out, split_final))

    evaluate = ["ncf.py", *load, "--evaluate", "-o", out / "evaluation"]
    figures = {("FP32", "N/A", "N/A", "N/A"): figures_in(recipe.execute(*evaluate))}
    for mode, per_channel, split_final in itertools.product(MODES, (True, False), recipe.STATISTICS):
        quantize = ["--quantize-eval", "--qeba", 8, "--qebw", 8, "--qem", mode]
        quantize += [*(["--qepc"] * per_channel), *(["--split-final"] * split_final)]
        statistics = ["--qe-stats-file", out / recipe.STATISTICS[split_final]]
        row = ("INT8", MODES[mode], "Yes" if per_channel else "No", "Yes" if split_final else "No")
        figures[row] = figures_in(recipe.execute(*evaluate, *quantize, *statistics))
    return figures


def figures_in(output: str) -> Figures:
    """Return the figures that an evaluation printed."""
    hr, ndcg = METRICS.search(output).groups()
    return 100 * float(hr), 100 * float(ndcg)


def markdown(figures: list[dict[Row, Figures]]) -> str:
    """Return the table in Markdown: means over seeds, with standard deviations if there are several seeds."""
    rows = []
    for row in figures[0]:
        hr, ndcg = zip(*(of_seed[row] for of_seed in figures), strict=True)
        rows.append((*row, recipe.over_seeds(hr), recipe.over_seeds(ndcg)))
    return markdown_table(HEADER, rows)


def parse_args() -> argparse.Namespace:
    """Return the command line's arguments."""
    return recipe.build_parser("table.py", __doc__.split("\n\n")[0], "run/table", [1], 20).parse_args()


def main() -> None:
    """Run the script."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    split = recipe.converted(args.data, args.out)
    figures = [figures_of_seed(split, args.out / f"seed-{seed}", seed, args) for seed in args.seeds]
    print(f"{markdown(figures)}\n\n{recipe.protocol(load_split(split), args, 'the best by HR@10')}")


if __name__ == "__main__":
    sys.exit(run("table.py", main))
