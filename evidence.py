"""``--report``: what an evaluation found and what that rests on, as JSON, with every user's places in a file beside it.

Shapes: U users, I items, L items of a user's list.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

import recording
from dataset import Split
from distiller.cli import InputError
from distiller.files import atomic_write, file_digest
from distiller.naming import errors_named
from evaluation import Places, values_of_ranks
from machine import processor
from significance import bootstrap_interval_of_few

FORMAT, VERSION = "neumf-evaluation", 1
BOOTSTRAP_SEED = 0
THIRDS = ("most popular", "middle", "least popular")
# What is read of a report beside its metrics.
PARTS = (
    ("data", "digest", str),
    ("data", "users", int),
    ("model", "checkpoint", str),
    ("protocol", "ranking", str),
    ("users", "file", str),
    ("users", "digest", str),
)
PLAIN = (str, int, float, type(None))  # True and False are int
MAX_COUNT = (1 << 31) - 1  # of int32, which ranks and items are
CUTOFF = re.compile(r"[1-9][0-9]{0,9}")
MAX_HEADER = 256  # bytes; NumPy writes 118
MAX_PACKING = 1032  # times smaller deflate makes what it packs, at most (zlib.net/zlib_tech.html)


@dataclass(frozen=True)
class Evidence:
    """A report that was read.

    Attributes:
        path: Its file.
        content: The JSON.
        places: Of all users; the lists have as many items as the greatest cut-off.
    """

    path: Path
    content: dict[str, Any]
    places: Places

    @property
    def cutoffs(self) -> list[int]:
        return [int(k) for k in self.content["metrics"]]


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
        "command": recording.command_line(),
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


def read_report(path: Path) -> Evidence:
    """Read what ``write_report`` wrote.

    Raises:
        InputError: not such files, or the users' places are not those of the report.
        OSError: they cannot be read.
    """
    content = _read_content(path)
    cutoffs, nb_users = [int(k) for k in content["metrics"]], content["data"]["users"]
    users = path.parent / Path(content["users"]["file"]).name
    try:
        digest = file_digest(users)
    except ValueError as error:  # characters that no file's name has
        raise InputError(f"{path}: not a whole report: users.file: {error}") from error
    if digest != content["users"]["digest"]:
        raise InputError(f"{users}: not the users of {path}: another digest")
    return Evidence(path, content, _read_places(users, nb_users, max(cutoffs)))


def _read_content(path: Path) -> dict[str, Any]:
    """A report's JSON, with all that is read of it.

    Raises:
        InputError: it is something else.
    """
    try:
        with errors_named(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a whole report: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not a report of ncf.py --report")
    if content.get("version") != VERSION:
        raise InputError(f"{path}: version {content.get('version')!r}, this program reads {VERSION}")
    for table, key, kind in PARTS:
        of_table = content.get(table)
        if not isinstance(of_table, dict) or type(of_table.get(key)) is not kind:
            raise InputError(f"{path}: not a whole report: no {table}.{key}")
    if not all(isinstance(value, PLAIN) for value in content["protocol"].values()):
        raise InputError(f"{path}: not a whole report: a protocol of lists")
    metrics, nb_users = content.get("metrics"), content["data"]["users"]
    if not isinstance(metrics, dict) or not metrics or not all(map(CUTOFF.fullmatch, metrics)):
        raise InputError(f"{path}: not a whole report: no metrics by cut-off")
    if not 1 <= nb_users <= MAX_COUNT:
        raise InputError(f"{path}: not a whole report: {nb_users} users")
    return content


def _read_places(path: Path, nb_users: int, length: int) -> Places:
    """The users' places, for which no more memory is taken than so many users' lists of this length need.

    Raises:
        InputError: not such a file.
        OSError: it cannot be read.
    """
    shapes = [(nb_users,)] * 3 + [(nb_users, length)]
    try:
        with errors_named(path), zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            # What Python and NumPy warn of in a damaged header is said by the error that follows.
            warnings.simplefilter("ignore")
            most = MAX_PACKING * path.stat().st_size
            parts = [
                _read_array(archive, f"{name}.npy", shape, most)
                for name, shape in zip(Places._fields, shapes, strict=True)
            ]
    except (OSError, MemoryError):
        raise
    # A damaged archive or header can raise nearly anything; all of it means the same here.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not users' places: {reason.split('. ')[0]}") from error
    ranks, above, tied, best = parts
    if not ((above >= 0) & (above <= ranks) & (ranks - above <= tied)).all():
        raise InputError(f"{path}: not users' places: ranks beyond what scores higher or ties")
    if not ((best >= -1).all() and (best[:, 0] >= 0).all()):
        raise InputError(f"{path}: not users' places: lists of what are no items")
    return Places(*(torch.from_numpy(part.astype(np.int64)) for part in parts))


def _read_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], most: int) -> np.ndarray:
    """An int32 array of an archive, in the form in which NumPy writes it.

    Args:
        archive: Of NumPy's, ``.npz``.
        name: The array's file in it.
        shape: What it must have.
        most: The bytes that it may unpack to.

    Raises:
        ValueError: it is something else.
        Exception: nearly any other, where it is damaged.
    """
    entry = archive.getinfo(name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.file_size > most:
        raise ValueError(f"{name} is not packed as NumPy packs it")
    with archive.open(entry) as file:
        if npy.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is of another version of NumPy's format")
        found, by_columns, dtype = npy.read_array_header_1_0(file, max_header_size=MAX_HEADER)
        if dtype != np.int32 or found != shape or by_columns:
            raise ValueError(f"{name} is {dtype} {found}, not int32 {shape}")
        size = 4 * math.prod(shape)
        if entry.file_size - file.tell() != size:
            raise ValueError(f"{name} has another size than its header says")
        return np.frombuffer(file.read(size), dtype).reshape(shape)
