"""Compare an exported ONNX model in onnxruntime with its checkpoint: HR@10, NDCG@10, scores and top-10 lists.

    python -m benchmarks.onnx_accuracy SPLIT CHECKPOINT MODEL.onnx

Both score the candidates of all users of the split. A list has a user's ten best candidates. Equal scores are in the
order of the candidates, as in evaluation.
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
from neural_cf.ranking.candidates import SAMPLED_PAIRS_PER_BLOCK, score_sampled, users_per_block
from neural_cf.ranking.metrics import metrics_of_ranks
from neural_cf.ranking.places import place_last
from neural_cf.ranking.scorers import Scorer
from neural_cf.runs.hardware import machine
from neural_cf.runs.models import read_model
from neural_cf.serving.export import ALIKE
from neural_cf.serving.exported_scorers import OnnxScorer, require_onnx
from neural_cf.split import Split, load_split

TOP = 10  # cut-off of HR, NDCG and lists


@dataclass(frozen=True)
class Agreement:
    """The agreement of two scorers on all candidates. Pairs of figures have the checkpoint's figure first.

    Attributes:
        hr: HR@10 of both scorers.
        ndcg: NDCG@10 of both scorers.
        equal: Share of scores that differ by at most ``export.ALIKE``.
        mean: Mean absolute difference of scores.
        max: Greatest absolute difference of scores.
        overlap: Share of the checkpoint's list that is in the other list, averaged over users.
        same_lists: Share of users whose two lists have the same items.
        tied: Share of users for whom the checkpoint scores the last item of the list and the next one alike.
        distinct: Number of different scores that the checkpoint gives to a user's candidates, averaged over users.
        seconds: Seconds of scoring, of both scorers.
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
    """The results of one scorer for the C candidates of a block of B users.

    Attributes:
        ranks: (B,) int64, the ranks of the test items.
        scores: (B, C), the scores of the candidates.
        lists: (B, 10) int64, the items of the lists.
        tied: (B,) bool, whether the last item of a list and the next one score alike.
        distinct: (B,) int64, the number of different scores.
        seconds: Seconds of scoring.
    """

    ranks: Tensor
    scores: Tensor
    lists: Tensor
    tied: Tensor
    distinct: Tensor
    seconds: float


def scored(scorer: Scorer, split: Split) -> Iterator[Scored]:
    """Yield the results for all users, block by block. Repeated items count once, at their first place."""
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
    """Return how many items two lists share, (B,) int64, for lists (B, 10) of B users."""
    return (one[:, :, None] == other[:, None, :]).any(2).sum(1)


def compare(ours: Scorer, theirs: Scorer, split: Split) -> Agreement:
    """Score all candidates with both scorers, the checkpoint's first, and return how they agree."""
    blocks = zip(scored(ours, split), scored(theirs, split), strict=True)
    of_block = users_per_block(split.nb_candidates, SAMPLED_PAIRS_PER_BLOCK)
    bar = tqdm(blocks, total=-(-split.nb_users // of_block), desc="Score", unit="block")
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
    """Return the figures as a table in Markdown."""
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
    """Run the script."""
    parser = ArgumentParser(prog="onnx_accuracy.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("split", type=Path, help="directory of a split")
    parser.add_argument("checkpoint", type=Path, help="best.pth.tar or quantized.pth.tar")
    parser.add_argument("onnx", type=Path, help="the model that neural-cf export made of it")
    args = parser.parse_args()
    require_onnx("onnx_accuracy.py")
    split, saved = load_split(args.split), read_model(args.checkpoint)
    saved.check_sizes(split, args.checkpoint, args.split)
    if split.nb_candidates <= TOP:
        raise InputError(f"{args.split}: {split.nb_candidates} candidates; lists of {TOP} need more")
    print(table(compare(scorer_of(saved), OnnxScorer(args.onnx), split)))
    threads = f"{torch.get_num_threads()} threads"
    print(f"\n{split.nb_users} users, {split.nb_candidates} candidates each. {threads}, {machine()}.")


if __name__ == "__main__":
    sys.exit(run("onnx_accuracy.py", main))
