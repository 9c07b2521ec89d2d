"""``--report``: what an evaluation found and what that rests on, as JSON, with every user's places in a file beside it.

Shapes: U users, I items, L items of a user's list.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distiller.system.files import atomic_write, file_digest
from neural_cf.ranking.metrics import values_of_ranks
from neural_cf.ranking.places import Places
from neural_cf.ranking.significance import bootstrap_interval_of_few
from neural_cf.runs.hardware import processor
from neural_cf.runs.log import command_line
from neural_cf.split import Split

FORMAT, VERSION = "neumf-evaluation", 1
BOOTSTRAP_SEED = 0
THIRDS = ("most popular", "middle", "least popular")


def values_over_ties(places: Places, k: int) -> dict[str, dict[str, Tensor]]:
    """Each metric of every user, (U,) float64, as ranked and over all orders of those that tie with the test item.

    A test item that n others tie with has each of n + 1 ranks equally often in these orders, so that a metric's mean is
    that of its values there (McSherry and Najork, Computing Information Retrieval Performance Measures Efficiently in
    the Presence of Tied Scores, ECIR 2008).

    Returns:
        By the metric's name: ``value``, ``optimistic`` (the test item first), ``pessimistic`` and ``expected``.
    """
    above, tied = places.above, places.tied
    found = {}
    orders = {"value": places.ranks, "optimistic": above, "pessimistic": above + tied}
    for order, ranks in orders.items():
        for metric, values in values_of_ranks(ranks, k).items():
            found.setdefault(metric, {})[order] = values
    for metric, values in values_of_ranks(torch.arange(k), k).items():
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), values.cumsum(0)])
        until, since = (above + tied + 1).clamp(max=k), above.clamp(max=k)
        expected = (sums[until] - sums[since]) / (tied + 1)
        # The differences of sums may round beyond both ends.
        found[metric]["expected"] = expected.clamp(
            *(found[metric][end] for end in ("pessimistic", "optimistic"))
        )
    return found


def ties_at(places: Places, k: int) -> int:
    """How many users' hit at k depends on the order of what ties."""
    return int(((places.above < k) & (places.above + places.tied >= k)).sum())


def metrics_with_intervals(places: Places, cutoffs: Sequence[int]) -> dict[str, Any]:
    """All metrics at every cut-off, by its number as text."""
    found: dict[str, Any] = {}
    for k in cutoffs:
        found[str(k)] = {"ties_at_cutoff": ties_at(places, k)}
        for metric, orders in values_over_ties(places, k).items():
            interval = bootstrap_interval_of_few(orders["value"].numpy(), BOOTSTRAP_SEED)
            means = {order: values.mean().item() for order, values in orders.items()}
            found[str(k)][metric] = means | {"interval_95": list(interval)}
    return found


def popularity_thirds(split: Split) -> np.ndarray:
    """Each item's third, (I,) int64: 0 has the most popular ones, with a third of all training pairs, and so on.

    Items stand by their number of training pairs, those of equal ones by number; one that spans a border goes to the
    third where its first pair is, and one without pairs to the last.
    """
    counts = np.bincount(split.train_items, minlength=split.nb_items)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    thirds = np.empty(split.nb_items, dtype=np.int64)
    thirds[order] = np.minimum(3 * before // counts.sum(), 2)
    return thirds


def by_popularity(split: Split, ranks: Tensor, cutoffs: Sequence[int]) -> list[dict[str, Any]]:
    """The metrics of the users whose test item is in each third; None where there are none."""
    thirds, pairs = popularity_thirds(split), np.bincount(split.train_items, minlength=split.nb_items)
    rows = []
    for third, name in enumerate(THIRDS):
        users = torch.from_numpy(thirds[split.test_items] == third)
        metrics = {
            str(k): {
                metric: values.mean().item() if len(values) else None
                for metric, values in values_of_ranks(ranks[users], k).items()
            }
            for k in cutoffs
        }
        items = thirds == third
        counts = {"items": items.sum(), "training_pairs": pairs[items].sum(), "users": users.sum()}
        rows.append(
            {"third": name} | {key: int(count) for key, count in counts.items()} | {"metrics": metrics}
        )
    return rows


def protocol_of(split: Split, ranking: str) -> dict[str, Any]:
    """What decides a rank beside model and data."""
    protocol = {"held_out": "each user's last item", "ranking": ranking, "ties": "against the test item"}
    if ranking == "full":
        return protocol | {"candidates": "items without the user's training items"}
    distinct = split.distinct_negatives
    return protocol | {
        "ties": "against the test item, unless it stands earlier among its own negatives",
        "candidates": "drawn negatives, repeated ones once",
        "negatives": split.nb_candidates - 1,
        "with_replacement": None if distinct is None else not distinct,
        "negatives_seed": split.seed,
    }


def circumstances(args: Namespace, split: Split, device: torch.device) -> dict[str, Any]:
    """Data, versions and hardware."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": command_line(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "data": {
            "path": str(args.data),
            "digest": split.digest,
            "users": split.nb_users,
            "items": split.nb_items,
            "training_pairs": len(split.train_users),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "hardware": {
            "processor": processor(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
        },
    }


def write_report(
    path: Path,
    args: Namespace,
    split: Split,
    places: Places,
    model: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Write ``path`` and, beside it, the users' places under the same name with ``.npz``.

    Args:
        path: Of the JSON.
        args: The flags.
        split: That was evaluated.
        places: Of all users, with lists as long as the greatest cut-off.
        model: What was evaluated, for the JSON: its ``checkpoint``, ``computed`` in what, ``seed`` and ``validate`` of
            its training.
        device: It was computed on.

    Raises:
        OSError: they cannot be written.
    """
    users = path.with_suffix(".npz")
    with atomic_write(users) as temporary, temporary.open("wb") as file:
        arrays = {name: part.numpy().astype(np.int32) for name, part in places._asdict().items()}
        np.savez_compressed(file, **arrays)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "protocol": protocol_of(split, args.ranking),
        "metrics": metrics_with_intervals(places, args.cutoffs),
        "by_popularity": by_popularity(split, places.ranks, args.cutoffs),
        "model": {key: value for key, value in model.items() if key != "seed"}
        | {"digest": file_digest(model["checkpoint"])},
        "seeds": {"training": model["seed"], "negatives": split.seed, "bootstrap": BOOTSTRAP_SEED},
        "users": {"file": users.name, "digest": file_digest(users)},
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content | circumstances(args, split, device), indent=2) + "\n")
