"""What a checkpoint's file claims, held against what is in it: before PyTorch reads it, and takes memory for it."""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import zipfile
from dataclasses import dataclass
from typing import Any, BinaryIO

from .unpickling import PlainUnpickler, StandIn

ZIP_START = b"PK\x03\x04"  # by which PyTorch tells its two formats apart
LEGACY_PICKLES = 5  # the older one's: magic number, version, machine, content and the storages' keys
ITEM_SIZES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
ITEM_SIZES |= {"Char": 1, "Byte": 1, "Bool": 1}
SCALARS = {"f4": 4, "f8": 8, "i8": 8}  # NumPy's types of metrics, in bytes


@dataclass(frozen=True)
class _ItemType:
    """Stands in for the type of a storage: so many bytes an item."""

    size: int


@dataclass(frozen=True)
class _Storage:
    """Stands in for a storage of ``count`` items."""

    count: int


class _Map(dict, StandIn):
    """Stands in for an ``OrderedDict``. A ``state_dict`` has attributes too, which nobody reads."""

    def __setstate__(self, state: object) -> None:
        pass


class _ScalarType(StandIn):
    """Stands in for ``numpy.dtype``, whose own ``__setstate__`` crashes on states that are not its own."""

    def __init__(self, code: str, align: bool, copy: bool):
        if code not in SCALARS:
            raise pickle.UnpicklingError("it holds a NumPy value that is no metric")
        self.size = SCALARS[code]

    def __setstate__(self, state: object) -> None:
        if state != (3, "<", None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError("it holds a NumPy value that is no metric")


def _map() -> _Map:
    return _Map()


def _counter(counts: dict) -> dict:
    if type(counts) is not dict or not all(type(count) is int for count in counts.values()):
        raise pickle.UnpicklingError("it holds counts that are none")
    return counts


def _encode(text: str, encoding: str) -> bytes:
    """What ``_codecs.encode`` makes of the text that bytes are written as."""
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("it holds encoded text")
    return text.encode("latin1")


def _scalar(kind: _ScalarType, content: bytes) -> float:
    """Stands in for a metric; its value is of no interest here."""
    if not isinstance(kind, _ScalarType) or type(content) is not bytes or len(content) != kind.size:
        raise pickle.UnpicklingError("it holds a NumPy value that is no metric")
    return math.nan


def _tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_: object) -> None:
    """Stands in for a tensor: no larger than its storage, and within it.

    One that repeats its storage could claim any size.
    """
    numbers = (offset, *size, *stride)
    whole = all(type(number) is int and number >= 0 for number in numbers) and len(size) == len(stride)
    if not whole or not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("it holds a tensor of no size")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > storage.count or (count and last >= storage.count):
        raise pickle.UnpicklingError("it holds a tensor of another size than the file has")


def _parameter(tensor: None, requires_grad: bool, hooks: _Map) -> None:
    """Stands in for a parameter."""
    if tensor is not None:
        raise pickle.UnpicklingError("it holds a parameter that is no tensor")


_NAMES = {
    ("collections", "OrderedDict"): _map,
    ("collections", "Counter"): _counter,  # a learning-rate scheduler's milestones
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.optim.adam", "Adam"): None,
    ("numpy", "dtype"): _ScalarType,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.multiarray", "scalar"): _scalar,
} | {("torch", f"{name}Storage"): _ItemType(size) for name, size in ITEM_SIZES.items()}


class _ClaimsUnpickler(PlainUnpickler):
    """Builds stand-ins for all that a checkpoint may hold.

    Args:
        file: The pickle.
        bytes_held: Of every storage by its key; None where the pickle itself is all that names them.
    """

    def __init__(self, file: Any, bytes_held: dict[str, int] | None = None):
        super().__init__(file, _NAMES)
        self._bytes_held = bytes_held
        self.bytes_claimed: dict[str, int] = {}

    def persistent_load(self, name: object) -> _Storage:
        kind, key, _, count = name[1:5] if type(name) is tuple and len(name) in (5, 6) else (None,) * 4
        known = isinstance(kind, _ItemType) and type(key) is str and type(count) is int and count >= 0
        # A part of another storage, as PyTorch before 1.0 wrote it, is in no checkpoint here.
        if not known or name[0] != "storage" or name[5:] not in ((), (None,)):
            raise pickle.UnpicklingError("it holds what is no storage")
        claimed = self.bytes_claimed[key] = count * kind.size
        if self._bytes_held is not None and self._bytes_held.get(key) != claimed:
            raise pickle.UnpicklingError("it holds a tensor of another size than the file has")
        return _Storage(count)


def check_claims(file: BinaryIO) -> None:
    """Read through a checkpoint without making anything that it describes.

    Raises:
        pickle.UnpicklingError: it holds what no checkpoint here does, or claims more than the file has.
        Exception: nearly any other, where it is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    if file.read(len(ZIP_START)) == ZIP_START:
        _check_zip(file, size)
    else:
        _check_legacy(file, size)


def _check_zip(file: BinaryIO, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > size:
            raise pickle.UnpicklingError("it unpacks to more than the file has")
        sizes = {entry.filename: entry.file_size for entry in entries}
        roots = {name.partition("/")[0] for name in sizes}
        if len(sizes) != len(entries) or len(roots) != 1 or archive.comment:
            raise pickle.UnpicklingError("it is no archive of PyTorch's")
        (root,) = roots
        content = archive.read(f"{root}/data.pkl")
    start = f"{root}/data/"
    held = {name.removeprefix(start): size for name, size in sizes.items() if name.startswith(start)}
    _ClaimsUnpickler(io.BytesIO(content), held).load()


def _check_legacy(file: BinaryIO, size: int) -> None:
    # Mapped, so that a read beyond the end costs nothing, whatever length a file claims.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        claimed = 0
        for _ in range(LEGACY_PICKLES):
            unpickler = _ClaimsUnpickler(mapped)
            unpickler.load()
            claimed += sum(unpickler.bytes_claimed.values())
    if claimed > size:
        raise pickle.UnpicklingError("it holds a tensor of another size than the file has")
