"""HR@k and NDCG@k over candidate lists (He et al. 2017, section 4.1), users in blocks.

Shapes: U users, B users in a block, C = candidates per user: the negatives, then the test item.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset import Split
from distiller.cli import InputError
from processes import Processes

# Pairs scored at once. The published model's widest activations, 4000 x 256 float32, then take 4 MB and stay in
# the cache between layers: with four times as many, two Xeon cores scored 15 % fewer pairs a second in FP32 and 37 %
# fewer in simulated INT8 (ml-1m, medians of 3 passes, 2026-11-23).
# A GPU has no such cache, and wants few trips from the host.
PAIRS_PER_BLOCK = {"cpu": 4_000, "cuda": 250_000}


@dataclass(frozen=True)
class Metrics:
    """What a model ranks its users' test items at, over all users.

    Attributes:
        k: The list's length.
        hr: Share of users whose test item is among the first k.
        ndcg: Mean of log 2 / log(rank + 2) over users, 0 where the rank is k or more.
    """

    k: int
    hr: float
    ndcg: float

    def __str__(self) -> str:
        return f"HR@{self.k} = {self.hr:.4f}, NDCG@{self.k} = {self.ndcg:.4f}"


def metrics_of_ranks(ranks: Tensor, k: int) -> Metrics:
    """HR@k and NDCG@k of (U,) integer ranks, 0 for the first place, in float64."""
    hits = ranks < k
    gains = torch.log(torch.tensor(2.0, dtype=torch.float64)) / torch.log(ranks.double() + 2)
    return Metrics(k, hits.double().mean().item(), torch.where(hits, gains, 0.0).mean().item())


def users_per_block(split: Split, device: torch.device | str = "cpu") -> int:
    """How many users' candidates make a block of about ``PAIRS_PER_BLOCK``."""
    return max(1, PAIRS_PER_BLOCK[torch.device(device).type] // split.nb_candidates)


def candidate_items(split: Split, start: int, stop: int) -> Tensor:
    """(B, C) int64: the negatives in file order, then the test item, of users ``start`` .. ``stop - 1``."""
    items = torch.empty(stop - start, split.nb_candidates, dtype=torch.int64)
    items[:, :-1] = torch.from_numpy(split.negatives[start:stop].astype("int64"))
    items[:, -1] = torch.from_numpy(split.test_items[start:stop].astype("int64"))
    return items


@torch.inference_mode()
def score_candidates(
    model: nn.Module,
    split: Split,
    users: range,
    block: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Score users' candidates, ``block`` users at a time.

    Args:
        model: Called as ``model(users, items, sigmoid=True)`` on (B * C,) int64 each.
        split: Whose candidates.
        users: Which users, one after the other.
        block: Users at a time; ``users_per_block`` by default.
        device: The model's.

    Yields:
        Items (B, C) int64 and their scores (B, C), both on ``device``.
    """
    block = block or users_per_block(split, device)
    for start in range(users.start, users.stop, block):
        stop = min(start + block, users.stop)
        items = candidate_items(split, start, stop).to(device)
        ids = torch.arange(start, stop, device=device).repeat_interleave(split.nb_candidates)
        yield items, model(ids, items.flatten(), sigmoid=True).view_as(items)


def score_all(
    model: nn.Module,
    split: Split,
    nb_users: int,
    block: int | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Score the candidates of the first ``nb_users``, for whoever watches the model at it."""
    scored = score_candidates(model, split, range(nb_users), block, device)
    blocks = -(-nb_users // (block or users_per_block(split, device)))
    for _ in tqdm(scored, total=blocks, desc="Score test users", unit="block"):
        pass


def first_places(items: Tensor) -> Tensor:
    """(B, C) bool: whether an item stands in its row for the first time."""
    ordered, order = items.sort(dim=1, stable=True)
    first = torch.ones_like(items, dtype=torch.bool)
    return first.scatter_(1, order[:, 1:], ordered[:, 1:] != ordered[:, :-1])


def rank_last(items: Tensor, scores: Tensor) -> Tensor:
    """The rank of each row's last item, the test item.

    Repeated items count once, at their first place. The rank is the number of candidates that score higher,
    or equal and stand earlier.

    Args:
        items: (B, C) int64.
        scores: (B, C).

    Returns:
        (B,) int64.

    Raises:
        InputError: a score is not finite, so that it has no rank.
    """
    if not torch.isfinite(scores).all():
        raise InputError("the model's scores are not finite: its weights are damaged or training diverged")
    place = (items == items[:, -1:]).to(torch.int8).argmax(dim=1, keepdim=True)
    score = scores.gather(1, place)
    places = torch.arange(items.shape[1], device=items.device)
    ahead = (scores > score) | ((scores == score) & (places < place))
    return (ahead & first_places(items)).sum(dim=1)


def evaluate(
    model: nn.Module,
    split: Split,
    k: int = 10,
    block: int | None = None,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
) -> Metrics:
    """Rank every user's test item among her candidates, under a progress bar with the metrics so far.

    Args:
        model: A NeuMF, float or quantized; put into evaluation mode.
        split: Users and candidates.
        k: The list's length.
        block: Users scored at once. The result does not depend on it, but for the last bit of float products,
            unless the model's arithmetic depends on the whole batch, as dynamic quantization's does: that takes 1.
        device: The model's.
        processes: That share the users. Each returns the metrics over all of them; the bar is the first one's, and
            has its own users' alone.

    Raises:
        InputError: a score is not finite.
    """
    model.eval()
    processes = processes or Processes()
    users = processes.share(split.nb_users)
    ranks = torch.zeros(split.nb_users, dtype=torch.int64, device=device)
    done = users.start
    bar = tqdm(total=len(users), desc="Evaluate", unit="user", mininterval=0.5, disable=not processes.first)
    with bar:
        for items, scores in score_candidates(model, split, users, block, device):
            ranks[done : done + len(items)] = rank_last(items, scores)
            done += len(items)
            if bar.update(len(items)):
                bar.set_postfix_str(str(metrics_of_ranks(ranks[users.start : done], k)), refresh=False)
        processes.sum([ranks])
        metrics = metrics_of_ranks(ranks.cpu(), k)
        bar.set_postfix_str(str(metrics))
    return metrics
