"""Measure the speed of training: against plain PyTorch, against the hardware's limit, and at several sizes.

    python -m benchmarks.training [SPLIT] [--json] [--sizes 1 5 20 100]

The first table is measured on the given split, or on random pairs at ml-20m's size. It compares the steps of ncf.py,
including the time to draw their batches, with a plain loop that uses torch.optim.Adam(fused=True) and nn.Embedding and
has its batches ready. All of them take turns in one run. The second table is measured on random pairs at several sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distiller.system.cli import ArgumentParser, InputError, run
from neural_cf.data.batches import Batch, TrainingBatches
from neural_cf.model import NeuMF
from neural_cf.runs.hardware import PRECISIONS, machine, native_bf16, why_not_compiled
from neural_cf.split import Split, id_dtype, load_split
from neural_cf.training.lazy_adam import DENSE_STEPS, LazyAdam
from neural_cf.training.step import Step

FACTORS, LAYERS, LEARNING_RATE, NEGATIVES = 64, [256, 256, 128, 64], 0.0005, 4
WIDTH = FACTORS + LAYERS[0] // 2  # values in the row of a user or an item
# Users, items and ratings by millions of ratings. 1 and 20 are MovieLens 1M and 20M; the others have about as many
# ratings a user.
SIZES = {
    1: (6_040, 3_706, 1_000_209),
    5: (34_600, 13_400, 5_000_000),
    20: (138_493, 26_744, 20_000_263),
    100: (692_000, 80_000, 100_000_000),
}
PREPARED = 64  # batches that the plain loop uses over and over


@dataclass(frozen=True)
class Contender:
    """A way to train: a ``step`` function and the endless ``batches`` for it."""

    batches: Iterator[Batch]
    step: Callable[[Batch], Tensor]

    def seconds(self, steps: int) -> float:
        """Return the seconds that one step takes, on average over ``steps`` steps."""
        finish()
        start = time.perf_counter()
        for batch in islice(self.batches, steps):
            self.step(batch)
        finish()
        return (time.perf_counter() - start) / steps


def finish() -> None:
    """Wait until the GPU has finished its work, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_split(users: int, items: int, ratings: int, negatives: int = 1) -> Split:
    """Return a split with uniformly random training pairs and candidates."""
    random = np.random.default_rng(0)
    return Split(
        nb_users=users,
        nb_items=items,
        train_users=np.sort(random.integers(0, users, ratings, dtype=id_dtype(users))),
        train_items=random.integers(0, items, ratings, dtype=id_dtype(items)),
        test_items=random.integers(0, items, users, dtype=id_dtype(items)),
        negatives=random.integers(0, items, (users, negatives), dtype=id_dtype(items)),
        distinct_negatives=None,
        seed=0,
        digest="",
        user_ids=None,
        item_ids=None,
    )


def new_model(split: Split, device: torch.device) -> NeuMF:
    """Return a NeuMF of the published sizes, with initial weights, for the users and items of a split."""
    torch.manual_seed(0)
    with device:
        return NeuMF(split.nb_users, split.nb_items, FACTORS, LAYERS)


def plain(split: Split, batches: list[Batch], device: torch.device) -> Contender:
    """Return the loop that a user of PyTorch would write, over batches that are ready."""
    model = new_model(split, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    loss_of = nn.BCEWithLogitsLoss()

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(batch.users, batch.items).squeeze(1), batch.labels)
        loss.backward()
        optimizer.step()
        return loss

    return Contender(cycle(batches), step)


def ours(
    split: Split, source: TrainingBatches, precision: str, compiled: bool, device: torch.device
) -> Contender:
    """Return the steps of ncf.py after its first, dense ones, over the batches that it draws."""
    model = new_model(split, device)
    optimizer = LazyAdam(model.parameters(), model.tables(), lr=LEARNING_RATE)
    step = Step(model, optimizer, precision, compiled)
    step(next(source.epoch(0)))
    state = optimizer.state_dict()
    for moments in state["state"].values():
        moments["step"].fill_(DENSE_STEPS)
    optimizer.load_state_dict(state)
    return Contender((batch for epoch in range(1_000_000) for batch in source.epoch(epoch)), step)


def take_turns(contenders: dict[str, Contender], rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds per step of each contender in each round, after a warm-up."""
    for contender in contenders.values():
        contender.seconds(max(10, steps // 4))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds[name].append(contender.seconds(steps))
    return seconds


def matrix_shapes(batch_size: int) -> list[tuple[int, int, int]]:
    """Return the shapes (m, k, n) of a step's matrix products.

    Each linear layer has one in the forward pass and two in the backward pass, for its inputs and its weights.
    """
    widths = [*pairwise(LAYERS), (FACTORS + LAYERS[-1], 1)]
    return [
        shape for k, n in widths for shape in ((batch_size, k, n), (batch_size, n, k), (n, batch_size, k))
    ]


def matrix_seconds(batch_size: int, precision: str, device: torch.device) -> float:
    """Return the seconds of a step's matrix products alone in PyTorch, which no step can be faster than."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    pairs = [
        (torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype))
        for m, k, n in matrix_shapes(batch_size)
    ]
    seconds = []
    for _ in range(30):
        finish()
        start = time.perf_counter()
        for left, right in pairs:
            left @ right
        finish()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def parts(split: Split, source: TrainingBatches, compiled: bool, device: torch.device) -> dict[str, float]:
    """Return the seconds per step to draw a batch, to fetch rows and to update rows, each measured alone."""
    contender = ours(split, source, "fp32", compiled, device)
    optimizer = contender.step.optimizer
    batches = list(islice(contender.batches, PREPARED))
    gradients = [torch.zeros(len(batches[0][i].rows), WIDTH, device=device) for i in (4, 5)]
    fetch, update = [], []
    for batch in batches * 2:
        finish()
        start = time.perf_counter()
        fetched = optimizer.fetch([batch.distinct_users, batch.distinct_items])
        finish()
        between = time.perf_counter()
        optimizer.update(fetched, gradients)
        finish()
        fetch.append(between - start)
        update.append(time.perf_counter() - between)
    start = time.perf_counter()
    drawn = sum(1 for _ in islice(source.epoch(1), 1000))
    finish()
    return {
        "draw a batch": (time.perf_counter() - start) / drawn,
        "fetch rows": median(fetch),
        "update rows": median(update),
    }


def work(split: Split, source: TrainingBatches) -> dict[str, float]:
    """Return the floating-point operations of a step's matrix products, and the bytes its optimizer moves."""
    batch = next(source.epoch(0))
    rows = sum(len(ids.rows.unique()) for ids in (batch.distinct_users, batch.distinct_items))
    parameters = (split.nb_users + split.nb_items) * WIDTH
    return {
        "flop": 2 * sum(m * k * n for m, k, n in matrix_shapes(source.batch_size)),
        # Weights and moments are read to catch up, and read and written to update; the gradient is written and read.
        "bytes_lazy": rows * WIDTH * 4 * (3 + 3 + 3 + 2),
        # The gradient is cleared, added to and read; weights and moments are read and written.
        "bytes_dense": parameters * 4 * (3 + 6),
    }


def compare(split: Split, args: argparse.Namespace, compiled: bool, device: torch.device) -> dict[str, Any]:
    """Measure all figures of the first table."""
    source = TrainingBatches(split, args.batch_size, NEGATIVES, 0, device)
    batches = list(islice(source.epoch(0), min(PREPARED, len(source) - 1)))
    contenders = {"plain": plain(split, batches, device)} | {
        precision: ours(split, source, precision, compiled, device) for precision in PRECISIONS
    }
    seconds = take_turns(contenders, args.rounds, args.steps)
    return {
        "seconds": seconds,
        "matrix_seconds": {
            precision: matrix_seconds(source.batch_size, precision, device) for precision in PRECISIONS
        },
        "parts": parts(split, source, compiled, device),
        "work": work(split, source),
        "batch_size": source.batch_size,
    }


def by_size(millions: int, args: argparse.Namespace, compiled: bool, device: torch.device) -> dict[str, Any]:
    """Measure a row of the second table."""
    torch.compiler.reset()  # because the shapes differ from those before
    users, items, ratings = SIZES[millions]
    split = random_split(users, items, ratings)
    source = TrainingBatches(split, args.batch_size, NEGATIVES, 0, device)
    batches = list(islice(source.epoch(0), PREPARED))
    precision = "bf16" if native_bf16(device) else "fp32"
    contenders = {
        "plain": plain(split, batches, device),
        "ours": ours(split, source, precision, compiled, device),
    }
    seconds = take_turns(contenders, rounds=3, steps=args.steps)
    sizes = {"ratings": ratings, "users": users, "items": items, "precision": precision}
    return sizes | {"seconds": {name: median(values) for name, values in seconds.items()}}


def speed_table(figures: dict[str, Any]) -> str:
    """Return the first table in Markdown, with a text that explains its figures."""
    batch, seconds, limits = (figures[key] for key in ("batch_size", "seconds", "matrix_seconds"))
    lines = [
        "| step | ms, median (least to greatest) | samples/s | times plain | matrix products alone, ms | times that |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        middle, limit = median(values), limits["fp32" if name == "plain" else name]
        lines.append(
            f"| {name} | {1e3 * middle:.2f} ({1e3 * min(values):.2f} to {1e3 * max(values):.2f}) "
            f"| {batch / middle:,.0f} | {median(seconds['plain']) / middle:.1f} "
            f"| {1e3 * limit:.2f} | {middle / limit:.1f} |"
        )
    flop = figures["work"]["flop"]
    rates = ", ".join(f"{name} {flop / limit / 1e9:,.0f} GFLOP/s" for name, limit in limits.items())
    apart = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in figures["parts"].items())
    dense, lazy = (figures["work"][key] / 1e6 for key in ("bytes_dense", "bytes_lazy"))
    return "\n".join(
        [
            *lines,
            "",
            f"A step of {batch} samples is {flop / 1e9:.2f} GFLOP of matrix products ({rates}); its optimizer moves "
            f"{dense:,.0f} MB of tables where it is dense, {lazy:,.0f} MB where it is lazy. Alone: {apart}.",
        ]
    )


def size_table(rows: list[dict[str, Any]], batch_size: int) -> str:
    """Return the second table in Markdown."""
    lines = [
        "| ratings | users | items | plain, samples/s | ours, samples/s | times plain |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        dense, lazy = row["seconds"]["plain"], row["seconds"]["ours"]
        lines.append(
            f"| {row['ratings']:,} | {row['users']:,} | {row['items']:,} | {batch_size / dense:,.0f} "
            f"| {batch_size / lazy:,.0f} | {dense / lazy:.1f} |"
        )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    """Return the command line's arguments.

    Raises:
        InputError: one of them is out of its range.
    """
    parser = ArgumentParser(prog="training.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    number = {"type": int, "metavar": "N"}
    add("split", type=Path, nargs="?", help="directory of a split (default: random pairs at ml-20m's size)")
    add("--json", action="store_true", help="print figures as JSON")
    add("--batch-size", **number, default=2048, help="(default: %(default)s)")
    add("--rounds", **number, default=7, help="turns that each step gets (default: %(default)s)")
    add("--steps", **number, default=100, help="steps in a turn (default: %(default)s)")
    add("--no-compile", action="store_true", help="as in ncf.py")
    add(
        "--sizes",
        type=int,
        nargs="*",
        choices=SIZES,
        default=list(SIZES),
        metavar="M",
        help="millions of ratings in the second table: of 1 5 20 100 (default: all)",
    )
    args = parser.parse_args()
    for flag in ("batch_size", "rounds", "steps"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(args, flag)}")
    return args


def main() -> None:
    """Run the script."""
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why = "--no-compile" if args.no_compile else why_not_compiled(device)
    split = load_split(args.split) if args.split else random_split(*SIZES[20])
    where = str(args.split) if args.split else "random pairs"
    figures = compare(split, args, why is None, device)
    rows = [by_size(millions, args, why is None, device) for millions in args.sizes]
    about = {
        "data": f"{where}: {split.nb_users} users, {split.nb_items} items, {len(split.train_users)} training pairs",
        "compiled": "compiled" if why is None else f"not compiled: {why}",
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }
    if args.json:
        print(json.dumps(about | figures | {"sizes": rows}, indent=2))
        return
    print(f"{speed_table(figures)}\n")
    if rows:
        print(f"{size_table(rows, figures['batch_size'])}\n")
    print(f"{about['data']}. {about['threads']} threads, {about['compiled']}. {about['machine']}.")


if __name__ == "__main__":
    sys.exit(run("training.py", main))
