"""What the tables share: the published recipe as command lines of ncf.py, and the places of its models."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from distiller.system.cli import ArgumentParser, InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.runs.directory import BEST, CHECKPOINT, CONFIG
from neural_cf.runs.hardware import machine
from neural_cf.split import Split, described, load_split

ROOT = Path(__file__).resolve().parent.parent
TRAINED = "base_fp32"  # directory of the training run, in the seed's directory
FLOAT = f"{TRAINED}/{BEST}"  # the best model of that run
STATISTICS = {False: "quantization_stats_no_split.yaml", True: "quantization_stats_split.yaml"}


def execute(*command: object) -> str:
    """Run one of the project's scripts with its progress on stderr. Return what it prints on stdout.

    Raises:
        InputError: the script failed.
    """
    words = [str(word) for word in command]
    print(f"$ python {shlex.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", file=sys.stderr, flush=True)
    if done.returncode:
        raise InputError(f"{words[0]} ended with exit code {done.returncode}")
    return done.stdout


def converted(data: Path, out: Path, nb_negatives: int = 999) -> Path:
    """Return the directory of the split: ``data`` itself, or what convert.py makes of a ratings file."""
    if data.is_dir():
        return data
    directory = out / "split"
    execute("convert.py", data, directory, "--negatives", nb_negatives)
    return directory


def common_flags(split: Path | str, seed: int | str, args: argparse.Namespace) -> list[object]:
    """Return the split and the flags that every step of the recipe has."""
    return [split, "-b", args.batch_size, "--layers", *args.layers, "-f", args.factors, "--seed", seed]


def training_words(
    split: Path | str, out: Path | str, seed: int | str, args: argparse.Namespace
) -> list[object]:
    """Return the arguments of ncf.py that train a seed's model; ``out`` is the seed's directory."""
    training = ["-l", args.learning_rate, "-e", args.epochs, "--overwrite", "-o", f"{out}/{TRAINED}"]
    return [*common_flags(split, seed, args), *training]


def loading_words(
    split: Path | str, out: Path | str, seed: int | str, args: argparse.Namespace, model: str = FLOAT
) -> list[object]:
    """Return the arguments of ncf.py that load a seed's ``model``, a file in the seed's directory ``out``."""
    return [*common_flags(split, seed, args), "--load", f"{out}/{model}"]


def calibration_words(out: Path | str, split_final: bool) -> list[object]:
    """Return the arguments of ncf.py that calibrate a model, to follow ``loading_words``."""
    flags = ["--split-final"] if split_final else []
    stats_out = ["--qe-stats-out", f"{out}/{STATISTICS[split_final]}", "-o", f"{out}/calibration"]
    return ["--qe-calibration", 0.1, *flags, *stats_out]


def train(split: Path, out: Path, seed: int, args: argparse.Namespace) -> None:
    """Train a seed's model in its directory ``out``, or finish its training, unless it is trained already.

    Raises:
        InputError: ``out`` has a run with other settings.
    """
    if args.overwrite or not (out / TRAINED / CHECKPOINT).exists():
        execute("ncf.py", *training_words(split, out, seed, args))
    else:
        finish_training(split, out / TRAINED, seed, args)


def finish_training(split: Path, trained: Path, seed: int, args: argparse.Namespace) -> None:
    """Resume the run in the directory ``trained`` if it was interrupted.

    Raises:
        InputError: the run has other settings.
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


def over_seeds(values: list[float]) -> str:
    """Return the mean as text, with the standard deviation if there are several values."""
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def protocol(split: Split, args: argparse.Namespace, epoch: str) -> str:
    """Return a text on what the figures mean and how they were made; ``epoch`` names the model's epoch."""
    spread = ": mean ± standard deviation" if len(args.seeds) > 1 else ""
    return (
        f"{described(split)} Layers {' '.join(map(str, args.layers))}, {args.factors} factors, "
        f"batch {args.batch_size}, learning rate {args.learning_rate}, {epoch} of {args.epochs} epochs, "
        f"seeds {' '.join(map(str, args.seeds))}{spread}. Calibrated on 10 % of the test users. {machine()}."
    )


def build_parser(prog: str, description: str, out: str, seeds: list[int], epochs: int) -> ArgumentParser:
    """Return the parser of a table's command line.

    Args:
        prog: The program's name.
        description: What the program does, for its help.
        out: The default of ``--out``.
        seeds: The default of ``--seeds``.
        epochs: The default of ``--epochs``.
    """
    parser = ArgumentParser(prog=prog, description=description)
    add = parser.add_argument
    add("data", type=Path, help="ratings file, or directory of a split")
    add("--out", type=Path, default=Path(out), help="models, statistics, logs (default: %(default)s)")
    add("--overwrite", action="store_true", help="train anew, evaluate anew")
    add("--epochs", type=int, default=epochs, help="(default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=seeds, help="a model for each (default: %(default)s)")
    add("--factors", type=int, default=64, help="(default: %(default)s)")
    add("--layers", type=int, nargs="+", default=[256, 256, 128, 64], help="(default: %(default)s)")
    add("--batch-size", type=int, default=2048, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=0.0005, help="(default: %(default)s)")
    return parser
