"""Measure evaluation in INT8 (integers and simulated), bf16 and FP32: pairs a second, memory, model size.

    python -m benchmarks.evaluation [SPLIT] [--json] [--users 2000]

All of them evaluate the same users of the given split, or of random candidates at ml-20m's size, including the ranking,
and take turns in one run. The model has the published sizes and random weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.training import SIZES, finish, new_model, random_split
from distiller.calibration import collect_quant_stats
from distiller.quantization import PostTrainLinearQuantizer
from distiller.system.cli import ArgumentParser, InputError, run
from neural_cf.int8.engine import IntegerNeuMF
from neural_cf.ranking.candidates import score_all
from neural_cf.ranking.places import evaluate
from neural_cf.ranking.scorers import FactoredScorer, PairScorer, Scorer
from neural_cf.runs.hardware import machine, why_not_compiled
from neural_cf.split import Split, load_split

CONTENDERS = ("FP32 plain", "FP32", "bf16", "INT8 simulated", "INT8")
NEGATIVES, CALIBRATION_USERS = 999, 50
TABLE_GAIN = 30  # scales initial embeddings, of deviation 0.01, to about the size of trained ones


def split_of(args: argparse.Namespace) -> Split:
    """Return the split with the users to evaluate."""
    split = load_split(args.split) if args.split else random_split(*SIZES[20], NEGATIVES)
    return replace(split, nb_users=min(args.users, split.nb_users))


def float_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Return a float model for all users and items of the split."""
    whole = load_split(args.split) if args.split else random_split(*SIZES[20])
    model = new_model(whole, device).eval().requires_grad_(False)
    for tables in model.tables():
        for table in tables:
            table.mul_(TABLE_GAIN)
    return model


def quantized(model: nn.Module, split: Split, device: torch.device) -> nn.Module:
    """Return a copy of the model in asymmetric INT8, per channel, calibrated on some users."""
    users = min(CALIBRATION_USERS, split.nb_users)
    test_fn = partial(score_all, split=split, nb_users=users, device=device)
    statistics = collect_quant_stats(model, test_fn, rows_per_batch=split.nb_candidates)
    result = copy.deepcopy(model)
    quantizer = PostTrainLinearQuantizer(
        result, mode="asym_u", per_channel_wts=True, model_activation_stats=statistics
    )
    index = torch.zeros(1, dtype=torch.int64, device=device)
    quantizer.prepare_model((index, index, True))
    return result


def scorer_of(name: str, model: nn.Module, compiled: bool) -> Scorer:
    """Return the scorer of a contender; the model must be quantized for INT8 and in float otherwise."""
    return {
        "FP32 plain": lambda: PairScorer(model),
        "FP32": lambda: FactoredScorer(model),
        "bf16": lambda: FactoredScorer(model, torch.bfloat16, compiled),
        "INT8 simulated": lambda: PairScorer(model),
        "INT8": lambda: IntegerNeuMF(model, compiled),
    }[name]()


def take_turns(
    scorers: dict[str, Scorer], split: Split, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the pairs a second of each scorer in each round, after a warm-up."""
    pairs = split.nb_users * split.nb_candidates
    speeds: dict[str, list[float]] = {name: [] for name in scorers}
    for number in range(rounds + 1):
        for name, scorer in scorers.items():
            start = time.perf_counter()
            evaluate(scorer, split, device=device)
            finish()
            if number:
                speeds[name].append(pairs / (time.perf_counter() - start))
    return speeds


def peak_memory(name: str, args: argparse.Namespace, compiled: bool) -> int:
    """Return the peak memory in bytes of a separate process that prepares the model and evaluates."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_evaluate_alone, name, args, compiled).result()


def _evaluate_alone(name: str, args: argparse.Namespace, compiled: bool) -> int:
    """Evaluate once and return the peak memory of this process in bytes."""
    device, split = choose_device(), split_of(args)
    model = float_model(args, device)
    if name.startswith("INT8"):
        model = quantized(model, split, device)
    evaluate(scorer_of(name, model, compiled), split, device=device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # which Linux gives in KiB


def nb_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights and of their scales."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def choose_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a table in Markdown."""
    plain = median(figures["pairs_per_s"]["FP32 plain"])
    lines = [
        "| evaluation | M pairs/s, median (least to greatest) | times plain | largest memory, GB | model, MB |",
        "|---|---|---|---|---|",
    ]
    for name, speeds in figures["pairs_per_s"].items():
        middle = median(speeds)
        lines.append(
            f"| {name} | {middle / 1e6:.2f} ({min(speeds) / 1e6:.2f} to {max(speeds) / 1e6:.2f}) "
            f"| {middle / plain:.1f} | {figures['peak_bytes'][name] / 1e9:.1f} "
            f"| {figures['model_bytes'][name] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    """Return the command line's arguments.

    Raises:
        InputError: one of them is out of its range.
    """
    parser = ArgumentParser(prog="evaluation.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    number = {"type": int, "metavar": "N"}
    add(
        "split", type=Path, nargs="?", help="directory of a split (default: random candidates, ml-20m's size)"
    )
    add("--json", action="store_true", help="print figures as JSON")
    add("--users", **number, default=2000, help="users that each turn evaluates (default: %(default)s)")
    add("--rounds", **number, default=7, help="turns that each gets (default: %(default)s)")
    add("--no-compile", action="store_true", help="as in ncf.py")
    args = parser.parse_args()
    for flag in ("users", "rounds"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    return args


def main() -> None:
    """Run the script."""
    args = parse_args()
    device = choose_device()
    why = "--no-compile" if args.no_compile else why_not_compiled(device)
    compiled = why is None and device.type == "cpu"
    split = split_of(args)
    model = float_model(args, device)
    integers = quantized(model, split, device)
    models = {name: integers if name.startswith("INT8") else model for name in CONTENDERS}
    scorers = {name: scorer_of(name, models[name], compiled) for name in CONTENDERS}
    figures = {
        "data": f"{split.nb_users} users of {args.split or 'random candidates'}, {split.nb_candidates} pairs each",
        "compiled": "bf16 and INT8 compiled" if compiled else f"not compiled: {why}",
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "pairs_per_s": take_turns(scorers, split, args.rounds, device),
        "peak_bytes": {name: peak_memory(name, args, compiled) for name in CONTENDERS},
        "model_bytes": {name: nb_bytes(models[name]) for name in CONTENDERS},
    }
    if args.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{table(figures)}\n")
    print(f"{figures['data']}. {figures['threads']} threads, {figures['compiled']}. {figures['machine']}.")


if __name__ == "__main__":
    sys.exit(run("evaluation.py", main))
