"""Reading evaluation reports, which may come from untrusted sources.

Shapes: U users, L items of a user's list.
"""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy

from distiller.system.cli import InputError
from distiller.system.files import file_digest
from distiller.system.naming import errors_named
from neural_cf.ranking.places import Places
from neural_cf.reporting.evaluation_report import FORMAT, VERSION

# The entries of a report that are used, beside its metrics: table, key and type.
PARTS = (
    ("data", "digest", str),
    ("data", "users", int),
    ("model", "checkpoint", str),
    ("protocol", "ranking", str),
    ("users", "file", str),
    ("users", "digest", str),
)
PLAIN = (str, int, float, type(None))  # bool is a subclass of int
MAX_COUNT = (1 << 31) - 1  # ranks and items are int32
CUTOFF = re.compile(r"[1-9][0-9]{0,9}")
MAX_HEADER = 256  # bytes of an array's header; NumPy writes 118
MAX_PACKING = 1032  # the greatest ratio by which deflate compresses (zlib.net/zlib_tech.html)


@dataclass(frozen=True)
class Evidence:
    """An evaluation report that was read and checked.

    Attributes:
        path: The report's file.
        content: The content of its JSON.
        places: The places of all users, with lists as long as the greatest cut-off.
    """

    path: Path
    content: dict[str, Any]
    places: Places

    @property
    def cutoffs(self) -> list[int]:
        """The cut-offs of the report's metrics."""
        return [int(k) for k in self.content["metrics"]]


def read_report(path: Path) -> Evidence:
    """Return the report that ``write_report`` wrote.

    Raises:
        InputError: the files are not a report, or the file of users' places does not belong to it.
        OSError: a file cannot be read.
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
    """Return the content of a report's JSON, checked for every entry that is used.

    Raises:
        InputError: the file is no whole report.
        OSError: the file cannot be read.
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
    """Return the users' places, taking no more memory than they need, whatever the file claims to hold.

    Args:
        path: The file of places.
        nb_users: U.
        length: L.

    Raises:
        InputError: the file does not hold the places of so many users with lists of this length.
        OSError: the file cannot be read.
    """
    shapes = [(nb_users,)] * 3 + [(nb_users, length)]
    try:
        with errors_named(path), zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            # Python and NumPy also warn of a damaged header, but the error that follows says enough.
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
    """Return an int32 array of an archive, which must be stored just as NumPy stores it.

    Args:
        archive: A NumPy archive, ``.npz``.
        name: The name of the array's file in the archive.
        shape: The shape that the array must have.
        most: The greatest number of bytes that the array's file may unpack to.

    Raises:
        ValueError: the array has another form, type or shape.
        Exception: the archive is damaged, which can raise nearly any error.
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
