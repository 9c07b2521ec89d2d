"""``--report``: what an evaluation found and what that rests on, as JSON, with every user's places in a file beside it.

Shapes: U users, I items, L items of a user's list.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
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
from neural_cf.runs.run import Run
from neural_cf.split import Split

FORMAT, VERSION = "neumf-evaluation", 1
BOOTSTRAP_SEED = 0
THIRDS = ("most popular", "middle", "least popular")


def values_over_ties(places: Places, k: int) -> dict[str, dict[str, Tensor]]:
    """Return each metric of every user, (U,) float64, as ranked and over all orders of the items that tie.

    A test item that n others tie with has each of n + 1 ranks in equally many of these orders, so that the expected
    metric is the mean of its values at these ranks (McSherry and Najork, Computing Information Retrieval Performance
    Measures Efficiently in the Presence of Tied Scores, ECIR 2008).

    Returns:
        For each metric, by its name: ``value`` as ranked, ``optimistic`` with the test item first among the ties,
        ``pessimistic`` with it last, and ``expected``.
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
    """Return how many users' hit at k depends on the order of tied items."""
    return int(((places.above < k) & (places.above + places.tied >= k)).sum())


def metrics_with_intervals(places: Places, cutoffs: Sequence[int]) -> dict[str, Any]:
    """Return all metrics at every cut-off, by the cut-off's number as text."""
    found: dict[str, Any] = {}
    for k in cutoffs:
        found[str(k)] = {"ties_at_cutoff": ties_at(places, k)}
        for metric, orders in values_over_ties(places, k).items():
            interval = bootstrap_interval_of_few(orders["value"].numpy(), BOOTSTRAP_SEED)
            means = {order: values.mean().item() for order, values in orders.items()}
            found[str(k)][metric] = means | {"interval_95": list(interval)}
    return found


def popularity_thirds(split: Split) -> np.ndarray:
    """Return each item's third, (I,) int64: 0 for the most popular items, which have a third of all training pairs.

    Items are ordered by their number of training pairs, and by their own number where these are equal. An item that
    spans a border goes to the third that its first pair is in, and an item without pairs to the last third.
    """
    counts = np.bincount(split.train_items, minlength=split.nb_items)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    thirds = np.empty(split.nb_items, dtype=np.int64)
    thirds[order] = np.minimum(3 * before // counts.sum(), 2)
    return thirds


def by_popularity(split: Split, ranks: Tensor, cutoffs: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for each third of items: the metrics of the users whose test item is in it, None without users."""
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
    """Return what decides a rank beside model and data."""
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


def circumstances(run: Run) -> dict[str, Any]:
    """Return what a figure rests on beside the protocol: command, date, data, versions and hardware."""
    split, device = run.split, run.device
    return {
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": {
            "path": str(run.settings.data),
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
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
    }


def write_report(run: Run, places: Places, origin: Mapping[str, Any]) -> None:
    """Write the report that ``settings.report`` names and, beside it, the users' places in a file ``.npz``.

    Args:
        run: The run.
        places: The places of all users, with lists as long as the greatest cut-off.
        origin: What was evaluated: its ``checkpoint``, what it was ``computed`` in, and its training's ``seed`` and
            ``validate``.

    Raises:
        OSError: the files cannot be written.
    """
    settings, split, path = run.settings, run.split, run.settings.report
    users = path.with_suffix(".npz")
    with atomic_write(users) as temporary, temporary.open("wb") as file:
        arrays = {name: part.numpy().astype(np.int32) for name, part in places._asdict().items()}
        np.savez_compressed(file, **arrays)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "protocol": protocol_of(split, settings.ranking),
        "metrics": metrics_with_intervals(places, settings.cutoffs),
        "by_popularity": by_popularity(split, places.ranks, settings.cutoffs),
        "model": {key: value for key, value in origin.items() if key != "seed"}
        | {"digest": file_digest(origin["checkpoint"])},
        "seeds": {"training": origin["seed"], "negatives": split.seed, "bootstrap": BOOTSTRAP_SEED},
        "users": {"file": users.name, "digest": file_digest(users)},
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content | circumstances(run), indent=2) + "\n")
