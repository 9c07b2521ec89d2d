"""Check of what a checkpoint claims to hold against what its file holds.

It runs before PyTorch reads the file, which would allocate whatever sizes the file claims.
"""

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

ZIP_START = b"PK\x03\x04"  # the first bytes of the newer of PyTorch's two formats
LEGACY_PICKLES = 5  # in the older format: magic number, version, machine, content and the storages' keys
LEGACY_HEAD = 8  # bytes before each storage in the older format, which hold its size
ITEM_SIZES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
ITEM_SIZES |= {"Char": 1, "Byte": 1, "Bool": 1}
SCALARS = {"f4": 4, "f8": 8, "i8": 8}  # the NumPy types that metrics have, and their sizes in bytes


@dataclass(frozen=True)
class _ItemType:
    """A stand-in for the type of a storage, whose items have ``size`` bytes each."""

    size: int


@dataclass(frozen=True)
class _Storage:
    """A stand-in for a storage of ``count`` items of ``item_size`` bytes each."""

    count: int
    item_size: int

    @property
    def nbytes(self) -> int:
        """The size of the storage in bytes."""
        return self.count * self.item_size


class _Map(dict, StandIn):
    """A stand-in for an ``OrderedDict``, which in a ``state_dict`` has attributes too."""

    def __setstate__(self, state: object) -> None:
        """Ignore the attributes, which nobody reads."""


class _ScalarType(StandIn):
    """A stand-in for ``numpy.dtype``, whose own ``__setstate__`` crashes on states that are not a dtype's."""

    def __init__(self, code: str, align: bool, copy: bool):
        if code not in SCALARS:
            raise pickle.UnpicklingError("it holds a NumPy value that is no metric")
        self.size = SCALARS[code]

    def __setstate__(self, state: object) -> None:
        """Raise an ``UnpicklingError`` unless the state is that of a plain little-endian type."""
        if state != (3, "<", None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError("it holds a NumPy value that is no metric")


def _map() -> _Map:
    """Stand in for the constructor of an ``OrderedDict``."""
    return _Map()


def _counter(counts: dict) -> dict:
    """Stand in for the constructor of a ``Counter``; raise an ``UnpicklingError`` unless it counts in integers."""
    if type(counts) is not dict or not all(type(count) is int for count in counts.values()):
        raise pickle.UnpicklingError("it holds counts that are none")
    return counts


def _encode(text: str, encoding: str) -> bytes:
    """Stand in for ``_codecs.encode``, by which older pickle protocols store bytes as Latin-1 text."""
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("it holds encoded text")
    return text.encode("latin1")


def _scalar(kind: _ScalarType, content: bytes) -> float:
    """Stand in for the constructor of a NumPy scalar; its value is of no interest here and becomes NaN."""
    if not isinstance(kind, _ScalarType) or type(content) is not bytes or len(content) != kind.size:
        raise pickle.UnpicklingError("it holds a NumPy value that is no metric")
    return math.nan


def _tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_: object) -> None:
    """Stand in for a tensor's constructor; raise an ``UnpicklingError`` unless the tensor lies within its storage.

    The tensor may also have no more elements than its storage: by strides of 0 it could claim any size.
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
    """Stand in for the constructor of a ``Parameter``, whose tensor ``_tensor`` has checked and replaced by None."""
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
    """An unpickler that builds stand-ins for everything that a checkpoint may hold, and refuses the rest.

    Args:
        file: The pickle, as mapped memory or a ``BytesIO``.
        bytes_held: The size in bytes of every storage in the file by its key; None for the older format, in which only
            the pickle says what storages there are.

    Attributes:
        storages: The stand-ins of the storages that the pickle has named, by key.
    """

    def __init__(self, file: Any, bytes_held: dict[str, int] | None = None):
        super().__init__(file, _NAMES)
        self._bytes_held = bytes_held
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, name: object) -> _Storage:
        """Return the stand-in of a storage that the pickle names; raise an ``UnpicklingError`` if it cannot exist."""
        kind, key, _, count = name[1:5] if type(name) is tuple and len(name) in (5, 6) else (None,) * 4
        known = isinstance(kind, _ItemType) and type(key) is str and type(count) is int and count >= 0
        # Parts of other storages, which PyTorch before 1.0 wrote, are in no checkpoint that is read here.
        if not known or name[0] != "storage" or name[5:] not in ((), (None,)):
            raise pickle.UnpicklingError("it holds what is no storage")
        storage = _Storage(count, kind.size)
        # PyTorch makes a storage of the size that it is first named with.
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError("it holds one storage in two sizes")
        if self._bytes_held is not None and self._bytes_held.get(key) != storage.nbytes:
            raise pickle.UnpicklingError("it holds a tensor of another size than the file has")
        return storage


class _Extent:
    """A count of values and nesting levels in which a shared value counts wherever it appears.

    Code that walks through the loaded checkpoint visits a shared value at each of its places too.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int] | None] = {}  # by id; None while it is being counted

    def of(self, value: object, depth: int = 0) -> tuple[int, int]:
        """Return the number of values in a value, itself among them, and the number of its nesting levels.

        Args:
            value: The value; only dictionaries, lists and tuples nest.
            depth: The number of levels that the value itself lies within.

        Raises:
            pickle.UnpicklingError: the value holds itself, or more than ``MAX_VALUES`` values or ``MAX_DEPTH`` levels.
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
    """Read through an open checkpoint without making anything that it describes.

    Raises:
        pickle.UnpicklingError: the file holds what no checkpoint of this project does, or claims to hold more data than
            it does.
        Exception: the file is damaged, in which case nearly any exception may come.
    """
    size = os.fstat(file.fileno()).st_size
    if file.read(len(ZIP_START)) == ZIP_START:
        _check_zip(file, size)
    else:
        _check_legacy(file, size)


def _check_zip(file: BinaryIO, size: int) -> None:
    """Check a checkpoint of ``size`` bytes in PyTorch's newer format, a zip archive."""
    content, held = read_archive(file, size)
    _Extent().of(_ClaimsUnpickler(io.BytesIO(content), held).load())


def _check_legacy(file: BinaryIO, size: int) -> None:
    """Check a checkpoint of ``size`` bytes in PyTorch's older format, pickles followed by the storages."""
    # Mapped, so that a read beyond the end allocates nothing, whatever length a file claims.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        unpicklers = [_ClaimsUnpickler(mapped) for _ in range(LEGACY_PICKLES)]
        contents = [unpickler.load() for unpickler in unpicklers]
        left = size - mapped.tell()
    _Extent().of(contents)
    storages, keys = unpicklers[-2].storages, contents[-1]
    # PyTorch would allocate a storage that is not listed, and leave it unread.
    listed = type(keys) is list and all(type(key) is str for key in keys)
    if not listed or sorted(keys) != sorted(storages):
        raise pickle.UnpicklingError("it holds other storages than it lists")
    if sum(LEGACY_HEAD + storage.nbytes for storage in storages.values()) > left:
        raise pickle.UnpicklingError("it holds a tensor of another size than the file has")
