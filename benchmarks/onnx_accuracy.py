"""An exported ONNX model in onnxruntime beside the checkpoint that it is from: HR@10, NDCG@10, scores and top-10 lists.

    python -m benchmarks.onnx_accuracy SPLIT CHECKPOINT MODEL.onnx

Both score every user's candidates of the split. A list is a user's ten best, where scores tie in the order of
candidates, as in evaluation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from distiller.system.cli import ArgumentParser, InputError, run
from distiller.system.tables import markdown_table
from neural_cf.int8.scorer import scorer_of
from neural_cf.ranking.candidates import score_sampled, users_per_block
from neural_cf.ranking.metrics import metrics_of_ranks
from neural_cf.ranking.places import place_last
from neural_cf.ranking.scorers import Scorer
from neural_cf.runs.hardware import machine
from neural_cf.runs.models import load_saved
from neural_cf.serving.export import ALIKE
from neural_cf.serving.exported_scorers import OnnxScorer, require_onnx
from neural_cf.split import Split, load_split

TOP = 10  # of HR, NDCG and lists


@dataclass(frozen=True)
class Agreement:
    """How two scorers agree on all candidates, the checkpoint's first where there are two figures.

    Attributes:
        hr: HR@10.
        ndcg: NDCG@10.
        equal: Share of scores that differ by at most ``export.ALIKE``.
        mean: Mean absolute difference of scores.
        max: Greatest likewise.
        overlap: Mean over users of the share of the checkpoint's list that is in the other one.
        same_lists: Share of users whose lists have the same items.
        tied: Share of users whose last item of the checkpoint's list scores as the next one does.
        distinct: Mean over users of the number of different scores that the checkpoint gives.
        seconds: That scoring took.
    """

    hr: tuple[float, float]
    ndcg: tuple[float, float]
    equal: float
    mean: float
    max: float
    overlap: float
    same_lists: float
    tied: float
    distinct: float
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Scored:
    """A block of users' candidates as one scorer has them.

    Attributes:
        ranks: (B,) int64, of the test items.
        scores: (B, C).
        lists: (B, 10) int64, items.
        tied: (B,) bool, whether a list's last item and the next one score alike.
        distinct: (B,) int64, the number of different scores.
        seconds: That scoring took.
    """

    ranks: Tensor
    scores: Tensor
    lists: Tensor
    tied: Tensor
    distinct: Tensor
    seconds: float


def scored(scorer: Scorer, split: Split) -> Iterator[Scored]:
    """Score all users' candidates, block by block. Items that repeat count once, at their first place."""
    blocks = score_sampled(scorer, split, range(split.nb_users))
    start = time.perf_counter()
    for candidates in blocks:
        seconds = time.perf_counter() - start
        places = place_last(candidates, TOP)
        ordered = candidates.scores.masked_fill(~candidates.counted, -1.0).sort(dim=1, descending=True).values
        yield Scored(
            places.ranks,
            candidates.scores,
            places.best,
            (ordered[:, TOP - 1] == ordered[:, TOP]) & (ordered[:, TOP] >= 0),
            1 + ((ordered.diff(dim=1) != 0) & (ordered[:, 1:] >= 0)).sum(1),
            seconds,
        )
        start = time.perf_counter()


def nb_shared(one: Tensor, other: Tensor) -> Tensor:
    """How many items of each list, (B, 10), are in the other one: (B,) int64."""
    return (one[:, :, None] == other[:, None, :]).any(2).sum(1)


def compare(ours: Scorer, theirs: Scorer, split: Split) -> Agreement:
    """Score all candidates with both."""
    blocks = zip(scored(ours, split), scored(theirs, split), strict=True)
    bar = tqdm(blocks, total=-(-split.nb_users // users_per_block(split)), desc="Score", unit="block")
    ranks, parts = [], []
    for one, other in bar:
        ranks.append(torch.stack([one.ranks, other.ranks]))
        difference = (one.scores.double() - other.scores).abs_()
        of_users = (difference <= ALIKE).double().mean(1), difference.mean(1), difference.amax(1)
        counts = nb_shared(one.lists, other.lists), one.tied, one.distinct
        parts.append((torch.stack([*of_users, *(x.double() for x in counts)]), one.seconds, other.seconds))
    metrics = [metrics_of_ranks(x, TOP) for x in torch.cat(ranks, dim=1)]
    equal, mean, largest, shared, tied, distinct = torch.cat([part[0] for part in parts], dim=1)
    return Agreement(
        hr=(metrics[0].hr, metrics[1].hr),
        ndcg=(metrics[0].ndcg, metrics[1].ndcg),
        equal=equal.mean().item(),
        mean=mean.mean().item(),
        max=largest.max().item(),
        overlap=shared.mean().item() / TOP,
        same_lists=(shared == TOP).double().mean().item(),
        tied=tied.mean().item(),
        distinct=distinct.mean().item(),
        seconds=(sum(part[1] for part in parts), sum(part[2] for part in parts)),
    )


def table(found: Agreement) -> str:
    """The figures as a table."""
    rows = [
        (f"HR@{TOP}", *(f"{x:.4f}" for x in found.hr)),
        (f"NDCG@{TOP}", *(f"{x:.4f}" for x in found.ndcg)),
        ("scoring, s", *(f"{x:.1f}" for x in found.seconds)),
        ("different scores a user", f"{found.distinct:.1f}", ""),
        (f"users with a tie at place {TOP}, %", f"{100 * found.tied:.2f}", ""),
        ("scores alike, %", "", f"{100 * found.equal:.4f}"),
        ("scores' difference, mean", "", f"{found.mean:.2g}"),
        ("scores' difference, max", "", f"{found.max:.2g}"),
        (f"top-{TOP} lists' overlap, %", "", f"{100 * found.overlap:.3f}"),
        (f"users with the same top {TOP}, %", "", f"{100 * found.same_lists:.2f}"),
    ]
    return markdown_table(("", "checkpoint", "onnxruntime"), rows)


def main() -> None:
    parser = ArgumentParser(prog="onnx_accuracy.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("split", type=Path, help="directory of a split")
    parser.add_argument("checkpoint", type=Path, help="best.pth.tar or quantized.pth.tar")
    parser.add_argument("onnx", type=Path, help="what export.py made of it")
    args = parser.parse_args()
    require_onnx("onnx_accuracy.py")
    split, saved = load_split(args.split), load_saved(args.checkpoint)
    saved.check_sizes(split, args.checkpoint, args.split)
    if split.nb_candidates <= TOP:
        raise InputError(f"{args.split}: {split.nb_candidates} candidates; lists of {TOP} need more")
    print(table(compare(scorer_of(saved), OnnxScorer(args.onnx), split)))
    threads = f"{torch.get_num_threads()} threads"
    print(f"\n{split.nb_users} users, {split.nb_candidates} candidates each. {threads}, {machine()}.")


if __name__ == "__main__":
    sys.exit(run("onnx_accuracy.py", main))
