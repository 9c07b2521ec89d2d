"""The split of ratings into training pairs, test items and negatives: reading, writing and checking it.

Shapes: U users, I items, P training pairs, C negatives per user.
"""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import reprlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType

import numpy as np
import pyarrow as pa

from distiller.system.cli import InputError
from distiller.system.files import atomic_write, file_digest, remove_parts
from distiller.system.locks import locked
from distiller.system.tables import read_columns
from distiller.untrusted.unpickling import PlainUnpickler, StandIn, UnknownNameError

PICKLE, LOCK = "split.pickle", ".split.lock"
TRAIN, TEST, NEGATIVE = "train-ratings.csv", "test-ratings.csv", "test-negative.csv"
CSV_FILES = (TRAIN, TEST, NEGATIVE)
# A split may have this many items, or as many as it holds ids. A model allocates memory for every item, so that a small
# file must not claim many.
UNNAMED_ITEMS = 1 << 16
FORMAT, VERSION = "neumf-split", 2
WITHOUT_VALIDATION = 1  # the previous version of the format, which has no validation_items
log = logging.getLogger("ncf")


@dataclass(frozen=True)
class Split:
    """A leave-one-out split of ratings: the training pairs, and the test item and the negatives of every user.

    Attributes:
        nb_users: U, the number of users, who are numbered 0 .. U-1.
        nb_items: I, the number of items, which are numbered 0 .. I-1.
        train_users: (P,) unsigned integers, the users of the training pairs.
        train_items: (P,) unsigned integers, the items of the training pairs.
        test_items: (U,) unsigned integers, the held-out item of each user.
        negatives: (U, C) unsigned integers, the items that each test item is ranked against.
        distinct_negatives: Whether negatives were drawn without replacement and without the test item; None if the
            split comes from CSV files, which do not say.
        seed: The seed of the negatives; None if the split comes from CSV files.
        digest: The SHA-256 of the ratings file, or of the three CSV files.
        user_ids: (U,) int64, the users' ids in the ratings file; None if the split comes from CSV files.
        item_ids: (I,) int64, the items' ids in the ratings file; None if the split comes from CSV files.
        validation_items: (U,) unsigned integers, each user's last training item by time; None if the split comes from
            CSV files or from a pickle of the previous version.
    """

    nb_users: int
    nb_items: int
    train_users: np.ndarray
    train_items: np.ndarray
    test_items: np.ndarray
    negatives: np.ndarray
    distinct_negatives: bool | None
    seed: int | None
    digest: str
    user_ids: np.ndarray | None
    item_ids: np.ndarray | None
    validation_items: np.ndarray | None = None

    @property
    def nb_candidates(self) -> int:
        """C + 1, the number of items that are ranked for each user: the negatives and the test item."""
        return self.negatives.shape[1] + 1


def described(split: Split) -> str:
    """Return two sentences, to stand below a table of results, about the split and how its test items are ranked."""
    drawn = {None: "as in the CSV files", True: "without replacement", False: "with replacement"}
    return (
        f"{split.nb_users} users, {split.nb_items} items, {len(split.train_users)} training pairs "
        f"({split.digest[:19]}). Leave one out; {split.negatives.shape[1]} negatives per user, drawn "
        f"{drawn[split.distinct_negatives]}; ties count against the test item."
    )


def id_dtype(count: int) -> np.dtype:
    """Return the smallest unsigned type for ids below ``count``.

    Compared with int32, it halves the memory of ml-20m's negatives.
    """
    return np.min_scalar_type(max(count - 1, 0))


def load_split(directory: str | Path) -> Split:
    """Load the split in ``directory``, from its pickle or else from its three CSV files.

    A pickle is made anew from the CSV files if it is missing, damaged, of another version, or older than they are and
    different from them.

    Raises:
        InputError: the directory holds no split, or a split whose parts do not fit each other.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"data: {directory} is not a directory")
    csv_paths = [directory / name for name in CSV_FILES]
    missing = [path.name for path in csv_paths if not path.is_file()]
    pickle_path = directory / PICKLE
    if missing and pickle_path.is_file():
        return read_pickle(pickle_path)
    if missing:
        raise InputError(f"data: {directory} has no split: neither {PICKLE} nor {', '.join(missing)}")
    split, why = _up_to_date(pickle_path, csv_paths)
    if split is not None:
        return split
    with building(directory):
        # Another process may have made the pickle meanwhile.
        split, why = _up_to_date(pickle_path, csv_paths)
        if split is not None:
            return split
        if why:
            log.warning("%s: made anew from the CSV files", why)
        return _convert_csv(csv_paths, pickle_path)


@contextmanager
def building(directory: Path) -> Iterator[None]:
    """Let only one process at a time make a directory's split: others wait at the start of the context.

    Where the directory cannot be written, there is no lock and no process waits.
    """

    def wait(holder: str) -> None:
        log.info("Waiting for the split in %s, which is being made by %s", directory, holder)

    with ExitStack() as stack:
        try:
            stack.enter_context(locked(directory / LOCK, "making the split", wait))
            remove_parts(directory)
        except OSError as error:
            log.debug("%s: not locked (%s)", directory, error.strerror)
        yield


def _up_to_date(pickle_path: Path, csv_paths: list[Path]) -> tuple[Split | None, str]:
    """Return the split in the pickle if it is that of the CSV files.

    Returns:
        The split and an empty text; else None and the reason, which is empty if there is no pickle.
    """
    if not pickle_path.is_file():
        return None, ""
    try:
        split = read_pickle(pickle_path)
    except InputError as error:
        return None, str(error)
    if pickle_path.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in csv_paths):
        return split, ""
    # Copying a directory can make any of its files the newest, so that age is no reason to discard the pickle, which
    # alone knows ids, seed and digest.
    if not same_pairs(split, read_csv(*csv_paths)):
        return None, f"{pickle_path} is older than the CSV files"
    try:
        os.utime(pickle_path)
    except OSError as error:
        log.warning("%s: not touched (%s); the next start compares it again", pickle_path, error.strerror)
    return split, ""


def same_pairs(first: Split, second: Split) -> bool:
    """Return whether two splits hold the same training pairs, test items and negatives, in the same order."""
    names = ("train_users", "train_items", "test_items", "negatives")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


def _convert_csv(csv_paths: list[Path], pickle_path: Path) -> Split:
    """Return the split in the CSV files, and write its pickle if possible."""
    split = read_csv(*csv_paths)
    try:
        write_pickle(split, pickle_path)
    except OSError as error:
        log.warning(
            "%s: not written (%s); the next start reads the CSV files again", pickle_path, error.strerror
        )
    return split


def read_csv(train_path: Path, test_path: Path, negative_path: Path) -> Split:
    """Read a split from the three tab-separated files without header that the original implementation writes.

    Raises:
        InputError: a line is malformed, the files disagree about their users, or the split fails ``check_split``.
        OSError: a file cannot be read.
    """
    pair = {"user": pa.int64(), "item": pa.int64(), "rating": pa.float64()}
    train = read_columns(train_path, "\t", pair, unsigned={"user", "item"})
    test = read_columns(test_path, "\t", pair, unsigned={"user", "item"})
    with open(negative_path, "rb") as file:
        columns = [f"negative {i}" for i in range(1, file.readline().count(b"\t") + 2)]
    negatives = read_columns(negative_path, "\t", dict.fromkeys(columns, pa.int32()), unsigned=set(columns))

    nb_users = test.num_rows
    out_of_order = np.flatnonzero(test["user"].to_numpy() != np.arange(nb_users))
    if out_of_order.size:
        raise InputError(
            f"{test_path}:{out_of_order[0] + 1}: user {test['user'][out_of_order[0]]} where user "
            f"{out_of_order[0]} is expected: one line for each user, in order"
        )
    if negatives.num_rows != nb_users:
        raise InputError(
            f"{negative_path}: negatives of {negatives.num_rows} users, {test_path.name} has {nb_users}"
        )
    train_users, train_items = train["user"].to_numpy(), train["item"].to_numpy()
    if train_users.max() >= nb_users:
        line = np.argmax(train_users >= nb_users)
        raise InputError(
            f"{train_path}:{line + 1}: user {train_users[line]}, but {test_path.name} has only {nb_users} users"
        )
    test_items = test["item"].to_numpy()
    matrix = np.empty((nb_users, len(columns)), dtype=np.int32)
    for column, name in enumerate(columns):
        matrix[:, column] = negatives[name].to_numpy()
    nb_items = int(max(train_items.max(), test_items.max(), matrix.max())) + 1
    split = Split(
        nb_users=nb_users,
        nb_items=nb_items,
        train_users=train_users.astype(id_dtype(nb_users)),
        train_items=train_items.astype(id_dtype(nb_items)),
        test_items=test_items.astype(id_dtype(nb_items)),
        negatives=matrix.astype(id_dtype(nb_items)),
        distinct_negatives=None,
        seed=None,
        digest=file_digest(train_path, test_path, negative_path),
        user_ids=None,
        item_ids=None,
    )
    check_split(split, train_path.parent)
    return split


class _ArrayType(StandIn):
    """A stand-in for ``numpy.dtype``, whose own ``__setstate__`` crashes on states that are not a dtype's."""

    CODES = frozenset({"u1", "u2", "u4", "u8", "i8"})

    def __init__(self, code: str, align: bool, copy: bool):
        if code not in self.CODES:
            raise pickle.UnpicklingError(f"it holds an array of type {code}")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        """Raise an ``UnpicklingError`` unless the state's byte order is little-endian, or irrelevant."""
        if state[1] not in ("<", "|"):
            raise pickle.UnpicklingError("it holds an array that is not little-endian")


def _array(buffer: bytes, kind: _ArrayType, shape: tuple, order: str) -> np.ndarray:
    """Return a pickled array, as NumPy's ``_frombuffer`` would."""
    if not isinstance(kind, _ArrayType):
        raise pickle.UnpicklingError("it holds an array of no type")
    return np.frombuffer(buffer, dtype=f"<{kind.code}").reshape(shape, order=order)


# What pickles of contiguous arrays by protocol 5 refer to, from NumPy 2 and from NumPy 1.
KNOWN = {
    ("numpy", "dtype"): _ArrayType,
    ("numpy._core.numeric", "_frombuffer"): _array,
    ("numpy.core.numeric", "_frombuffer"): _array,
}


def read_pickle(path: Path) -> Split:
    """Read a split that ``write_pickle`` wrote, without executing anything in the file.

    Raises:
        InputError: the file is no pickle of a split, is cut short or of another version, or fails ``check_split``.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            # Mapped, so that a read beyond the end allocates nothing, whatever length a file claims.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                content = PlainUnpickler(mapped, KNOWN).load()
        except UnknownNameError as error:
            raise InputError(f"{path}: refused: it holds {error}, which a split does not") from error
        # A damaged pickle can make the unpickler raise nearly any exception; all of them mean the same here.
        except Exception as error:
            reason = " ".join([type(error).__name__, *str(error).split()])
            raise InputError(f"{path}: not a whole split: {reason}") from error
    if not isinstance(content, dict) or type(content.get("format")) is not str or content["format"] != FORMAT:
        raise InputError(f"{path}: not a split")
    version = content.get("version")
    if type(version) is not int or version not in (WITHOUT_VALIDATION, VERSION):
        raise InputError(
            f"{path}: version {reprlib.repr(version)} of the format, this program reads {VERSION}"
        )
    names = {field.name for field in fields(Split)}
    if version == WITHOUT_VALIDATION:
        names -= {"validation_items"}
    if content.keys() - {"format", "version"} != names:
        raise InputError(f"{path}: not a whole split: its parts are not those of version {version}")
    split = Split(**{name: content[name] for name in names})
    check_split(split, path)
    return split


def write_pickle(split: Split, path: Path) -> None:
    """Write a split as a dictionary of arrays and plain values, by pickle protocol 5, for ``read_pickle``.

    Raises:
        OSError: the file cannot be written; the error's ``filename`` is ``path``.
    """
    content = {"format": FORMAT, "version": VERSION} | {
        name: np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value
        for name, value in vars(split).items()
    }
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        pickle.dump(content, file, protocol=5)


def check_split(split: Split, where: Path) -> None:
    """Raise an ``InputError`` that begins with ``where`` unless the split's parts fit each other."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise InputError(f"{where}: {message}")

    for name in ("nb_users", "nb_items"):
        count = getattr(split, name)
        counted = type(count) is int and count >= 2
        require(counted, f"{name} is {reprlib.repr(count)}, a split has at least 2 of each")
    arrays = {"train_users": 1, "train_items": 1, "test_items": 1, "negatives": 2}
    if split.validation_items is not None:
        arrays["validation_items"] = 1
    for name, ndim in arrays.items():
        array = getattr(split, name)
        ids = (
            isinstance(array, np.ndarray)
            and array.dtype.kind == "u"
            and array.ndim == ndim
            and array.size > 0
        )
        require(ids, f"{name} is no array of ids in {ndim} dimension(s)")
        bound = split.nb_users if name == "train_users" else split.nb_items
        require(int(array.max()) < bound, f"{name} holds id {array.max()}, but ids end at {bound - 1}")
    named = split.train_items.size + split.test_items.size + split.negatives.size
    require(
        split.nb_items <= max(named, UNNAMED_ITEMS),
        f"{split.nb_items} items, but only {named} ids of them: items are numbered from 0 to their count",
    )
    for name, count in (("user_ids", split.nb_users), ("item_ids", split.nb_items)):
        ids = getattr(split, name)
        numbers = isinstance(ids, np.ndarray) and ids.dtype.kind == "i" and ids.shape == (count,)
        require(ids is None or numbers, f"{name} is no array of {count} ids")
    for name, kinds in (
        ("seed", (int, NoneType)),
        ("distinct_negatives", (bool, NoneType)),
        ("digest", (str,)),
    ):
        value = getattr(split, name)
        require(type(value) in kinds, f"{name} is {reprlib.repr(value)}")
    require(split.train_users.shape == split.train_items.shape, "training users and items differ in number")
    for name in arrays.keys() - {"train_users", "train_items"}:
        array, name = getattr(split, name), name.replace("_", " ")
        require(len(array) == split.nb_users, f"{name} of {len(array)} users, of {split.nb_users}")
    training = np.bincount(split.train_users, minlength=split.nb_users)
    require(training.min() > 0, f"user {training.argmin()} has no training item")
    for user in np.flatnonzero(training >= split.nb_items):
        rated = len(np.unique(split.train_items[split.train_users == user]))
        require(
            rated < split.nb_items, f"user {user} has every item in training: there is no negative to draw"
        )
