"""What a checkpoint's file claims, held against what is in it: before PyTorch reads it, and takes memory for it."""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
from dataclasses import dataclass
from typing import Any, BinaryIO

from distiller.untrusted.archive import read_archive
from distiller.untrusted.unpickling import PlainUnpickler, StandIn
from distiller.untrusted.yaml import MAX_DEPTH, MAX_VALUES

ZIP_START = b"PK\x03\x04"  # by which PyTorch tells its two formats apart
LEGACY_PICKLES = 5  # the older one's: magic number, version, machine, content and the storages' keys
LEGACY_HEAD = 8  # bytes before each of its storages: its size
ITEM_SIZES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
ITEM_SIZES |= {"Char": 1, "Byte": 1, "Bool": 1}
SCALARS = {"f4": 4, "f8": 8, "i8": 8}  # NumPy's types of metrics, in bytes


@dataclass(frozen=True)
class _ItemType:
    """Stands in for the type of a storage: so many bytes an item."""

    size: int


@dataclass(frozen=True)
class _Storage:
    """Stands in for a storage of ``count`` items of so many bytes."""

    count: int
    item_size: int

    @property
    def nbytes(self) -> int:
        return self.count * self.item_size


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

    Attributes:
        storages: What it has named, by key.
    """

    def __init__(self, file: Any, bytes_held: dict[str, int] | None = None):
        super().__init__(file, _NAMES)
        self._bytes_held = bytes_held
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, name: object) -> _Storage:
        kind, key, _, count = name[1:5] if type(name) is tuple and len(name) in (5, 6) else (None,) * 4
        known = isinstance(kind, _ItemType) and type(key) is str and type(count) is int and count >= 0
        # A part of another storage, as PyTorch before 1.0 wrote it, is in no checkpoint here.
        if not known or name[0] != "storage" or name[5:] not in ((), (None,)):
            raise pickle.UnpicklingError("it holds what is no storage")
        storage = _Storage(count, kind.size)
        # PyTorch makes a storage by the first that is said of it.
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError("it holds one storage in two sizes")
        if self._bytes_held is not None and self._bytes_held.get(key) != storage.nbytes:
            raise pickle.UnpicklingError("it holds a tensor of another size than the file has")
        return storage


class _Extent:
    """Counts values and levels with everything shared counted wherever it stands: what goes through it does so too."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int] | None] = {}  # by id; None while it is being counted

    def of(self, value: object, depth: int = 0) -> tuple[int, int]:
        """How many values a value has, itself among them, and in how many levels.

        Raises:
            pickle.UnpicklingError: it holds itself, more than ``MAX_VALUES``, or more than ``MAX_DEPTH`` levels.
        """
        if not isinstance(value, dict | list | tuple):
            return 1, 0
        if id(value) not in self._known:
            if depth == MAX_DEPTH:
                raise pickle.UnpicklingError(f"it holds more than {MAX_DEPTH} levels")
            self._known[id(value)] = None
            parts = (*value.keys(), *value.values()) if isinstance(value, dict) else value
            extents = [self.of(part, depth + 1) for part in parts]
            count = 1 + sum(count for count, _ in extents)
            self._known[id(value)] = count, 1 + max((levels for _, levels in extents), default=0)
        if self._known[id(value)] is None:
            raise pickle.UnpicklingError("it holds what holds itself")
        count, levels = self._known[id(value)]
        if count > MAX_VALUES:
            raise pickle.UnpicklingError(f"it holds more than {MAX_VALUES} values")
        if depth + levels > MAX_DEPTH:
            raise pickle.UnpicklingError(f"it holds more than {MAX_DEPTH} levels")
        return count, levels


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
    content, held = read_archive(file, size)
    _Extent().of(_ClaimsUnpickler(io.BytesIO(content), held).load())


def _check_legacy(file: BinaryIO, size: int) -> None:
    # Mapped, so that a read beyond the end costs nothing, whatever length a file claims.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        unpicklers = [_ClaimsUnpickler(mapped) for _ in range(LEGACY_PICKLES)]
        contents = [unpickler.load() for unpickler in unpicklers]
        left = size - mapped.tell()
    _Extent().of(contents)
    storages, keys = unpicklers[-2].storages, contents[-1]
    # One that is not listed PyTorch would make and leave unread.
    listed = type(keys) is list and all(type(key) is str for key in keys)
    if not listed or sorted(keys) != sorted(storages):
        raise pickle.UnpicklingError("it holds other storages than it lists")
    if sum(LEGACY_HEAD + storage.nbytes for storage in storages.values()) > left:
        raise pickle.UnpicklingError("it holds a tensor of another size than the file has")
