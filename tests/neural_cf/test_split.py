"""The split on disk, whatever has become of it."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers_files import COMMANDS, with_command
from helpers_fuzz import changed
from helpers_split import tiny_split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distiller.system.cli import InputError
from neural_cf import split as split_module
from neural_cf.split import Split, load_split, read_pickle, write_pickle

CSV_NAMES = ["train-ratings.csv", "test-ratings.csv", "test-negative.csv"]
PICKLE = "split.pickle"


def assert_same(first: Split, second: Split, source_too: bool = True) -> None:
    """Equal in every field; without ``source_too`` in those that CSV files have."""
    names = ["nb_users", "nb_items", "train_users", "train_items", "test_items", "negatives"]
    if source_too:
        names += ["distinct_negatives", "seed", "digest", "user_ids", "item_ids"]
    for name in names:
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


def assert_valid(split: Split) -> None:
    """Every part of a split, looked at one by one."""
    assert isinstance(split, Split)
    assert type(split.nb_users) is int
    assert type(split.nb_items) is int
    assert min(split.nb_users, split.nb_items) >= 2
    users, items = range(split.nb_users), range(split.nb_items)
    for name, ids in (
        ("train_users", users),
        ("train_items", items),
        ("test_items", items),
        ("negatives", items),
    ):
        array = getattr(split, name)
        assert isinstance(array, np.ndarray), name
        assert array.dtype.kind in "iu", name
        assert set(array.flatten().tolist()) <= set(ids), name
    assert split.train_users.shape == split.train_items.shape
    assert split.train_users.ndim == 1
    assert split.test_items.shape == (split.nb_users,)
    assert split.negatives.ndim == 2
    assert split.negatives.shape[0] == split.nb_users
    assert split.negatives.shape[1] >= 1
    assert split.seed is None or type(split.seed) is int
    assert split.distinct_negatives is None or type(split.distinct_negatives) is bool
    assert type(split.digest) is str
    for name, count in (("user_ids", split.nb_users), ("item_ids", split.nb_items)):
        ids = getattr(split, name)
        if ids is not None:
            assert isinstance(ids, np.ndarray), name
            assert ids.dtype.kind in "iu", name
            assert ids.shape == (count,), name


# --- pickle and CSV files ---


@pytest.fixture
def directory(split_dir, tmp_path) -> Path:
    """A copy of the split that a test may change."""
    return shutil.copytree(split_dir, tmp_path / "ml-20m")


def keep_only_csv(directory: Path) -> None:
    """As the original leaves a directory."""
    (directory / PICKLE).unlink()


def keep_only_pickle(directory: Path) -> None:
    """A pickle with nothing to be made anew from."""
    for name in CSV_NAMES:
        (directory / name).unlink()


def test_pickle_round_trip_keeps_every_part(tmp_path):
    """Arrays with their types, and plain values."""
    split = tiny_split()
    write_pickle(split, tmp_path / PICKLE)
    again = read_pickle(tmp_path / PICKLE)
    assert_same(split, again)
    assert_valid(again)
    assert again.negatives.dtype == np.uint8
    assert again.nb_candidates == 3
    assert os.listdir(tmp_path) == [PICKLE]


def test_arrays_that_are_not_contiguous_survive_the_pickle(tmp_path):
    """A transposed matrix of negatives, and every second training pair."""
    split = tiny_split()
    parts = vars(split) | {
        "negatives": np.ascontiguousarray(split.negatives.T).T,
        "train_users": np.repeat(split.train_users, 2)[::2],
    }
    write_pickle(Split(**parts), tmp_path / PICKLE)
    assert_same(split, read_pickle(tmp_path / PICKLE))


def test_directory_of_csv_files_loads_from_them_once_and_then_from_the_pickle(directory, monkeypatch):
    """And both give the split that was converted."""
    converted = load_split(directory)
    keep_only_csv(directory)
    from_csv = load_split(directory)
    assert_same(converted, from_csv, source_too=False)
    assert_valid(from_csv)
    assert from_csv.seed is None
    assert from_csv.distinct_negatives is None
    assert sorted(path.name for path in directory.iterdir()) == sorted([*CSV_NAMES, PICKLE])

    def unexpected(*_):
        raise AssertionError("the CSV files were read again")

    monkeypatch.setattr(split_module, "read_csv", unexpected)
    assert_same(from_csv, load_split(directory))


def test_csv_files_of_the_originals_form_load(tmp_path):
    """Ratings as floats or not at all 1, users in order, negatives between tabs."""
    (tmp_path / CSV_NAMES[0]).write_text("0\t1\t1\n0\t2\t1.0\n1\t0\t4.5\n")
    (tmp_path / CSV_NAMES[1]).write_text("0\t3\t1\n1\t1\t1\n")
    (tmp_path / CSV_NAMES[2]).write_text("0\t4\t4\n2\t3\t1\n")
    split = load_split(tmp_path)
    assert (split.nb_users, split.nb_items) == (2, 5)
    assert split.train_users.tolist() == [0, 0, 1]
    assert split.train_items.tolist() == [1, 2, 0]
    assert split.test_items.tolist() == [3, 1]
    assert split.negatives.tolist() == [[0, 4, 4], [2, 3, 1]]


def test_digest_of_csv_files_depends_on_each_of_them(tmp_path):
    """A checkpoint that names it names its data."""
    digests = set()
    for edited in (None, *range(3)):
        texts = ["0\t1\t1\n1\t0\t1\n", "0\t2\t1\n1\t2\t1\n", "0\t3\n3\t1\n"]
        if edited is not None:
            texts[edited] = texts[edited].replace("0\t", "0\t4\t" if edited == 2 else "0\t3", 1)
            texts[edited] = texts[edited].replace("3\t1\n", "3\t1\t1\n") if edited == 2 else texts[edited]
        directory = tmp_path / str(edited)
        directory.mkdir()
        for name, text in zip(CSV_NAMES, texts, strict=True):
            (directory / name).write_text(text)
        digests.add(load_split(directory).digest)
    assert len(digests) == 4


def test_pickle_older_than_the_csv_files_is_made_anew(directory):
    """Each of the three counts; what was changed in it is what loads."""
    original = load_split(directory)
    item = (int(original.test_items[0]) + 1) % original.nb_items
    lines = (directory / CSV_NAMES[1]).read_text().split("\n")
    lines[0] = f"0\t{item}\t1"
    (directory / CSV_NAMES[1]).write_text("\n".join(lines))
    for name in (CSV_NAMES[0], CSV_NAMES[2], PICKLE):
        os.utime(directory / name, (10**9, 10**9))
    assert load_split(directory).test_items[0] == item
    assert read_pickle(directory / PICKLE).test_items[0] == item


def test_pickle_of_a_copied_directory_is_kept(directory):
    """Its files' times say nothing, and it knows ids and seed, which CSV files do not."""
    original = load_split(directory)
    os.utime(directory / PICKLE, (10**9, 10**9))
    assert_same(original, load_split(directory))
    newest_csv = max((directory / name).stat().st_mtime_ns for name in CSV_NAMES)
    assert (directory / PICKLE).stat().st_mtime_ns >= newest_csv


def test_pickle_that_cannot_be_written_does_not_stop_loading(directory, monkeypatch):
    """A read-only directory of CSV files loads from them each time."""
    original = load_split(directory)
    keep_only_csv(directory)

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(directory / PICKLE))

    monkeypatch.setattr(split_module, "write_pickle", refuse)
    assert_same(original, load_split(directory), source_too=False)
    assert not (directory / PICKLE).exists()


def damaged(kind: str, whole: bytes, marker: Path) -> bytes:
    """A pickle that is not a split's any more."""
    content = {"format": split_module.FORMAT, "version": split_module.VERSION} | vars(tiny_split())
    dumps = partial(pickle.dumps, protocol=5)
    return {
        "empty": lambda: b"",
        "not a pickle": lambda: b"user,item\n1,2\n",
        "random bytes": lambda: np.random.default_rng(0).bytes(1000),
        "older version": lambda: dumps(content | {"version": split_module.VERSION - 1}),
        "newer version": lambda: dumps(content | {"version": split_module.VERSION + 1}),
        "no version": lambda: dumps({k: v for k, v in content.items() if k != "version"}),
        "another format": lambda: dumps(content | {"format": "tensors"}),
        "a list": lambda: dumps([1, 2, 3]),
        "a part too few": lambda: dumps({k: v for k, v in content.items() if k != "negatives"}),
        "a part too many": lambda: dumps(content | {"more": 1}),
        "floats for ids": lambda: dumps(content | {"test_items": np.array([0.5, 1, 2])}),
        "an item too high": lambda: dumps(content | {"test_items": np.array([0, 6, 2], np.uint8)}),
        "a user too high": lambda: dumps(content | {"nb_users": 2}),
        "one user": lambda: dumps(content | {"nb_users": 1}),
        "lengths that differ": lambda: dumps(content | {"train_users": np.zeros(2, np.uint8)}),
        "no negatives": lambda: dumps(content | {"negatives": np.zeros((3, 0), np.uint8)}),
        "a dictionary for an array": lambda: dumps(content | {"negatives": {}}),
        "a seed that is none": lambda: dumps(content | {"seed": [1]}),
        "a digest that is none": lambda: dumps(content | {"digest": 12}),
        "ids of text": lambda: dumps(content | {"user_ids": np.array(["a", "b", "c"])}),
        **{where: lambda where=where: with_command(tiny_split(), where, marker) for where in COMMANDS},
    }[kind]()


DAMAGE = [
    "empty",
    "not a pickle",
    "random bytes",
    "older version",
    "newer version",
    "no version",
    "another format",
    "a list",
    "a part too few",
    "a part too many",
    "floats for ids",
    "an item too high",
    "a user too high",
    "one user",
    "lengths that differ",
    "no negatives",
    "a dictionary for an array",
    "a seed that is none",
    "a digest that is none",
    "ids of text",
    *COMMANDS,
]


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_pickle_is_made_anew_where_there_are_csv_files(directory, tmp_path, kind):
    """And loads from the pickle again afterwards; nothing in it runs."""
    original, marker = load_split(directory), tmp_path / "marker"
    (directory / PICKLE).write_bytes(damaged(kind, (directory / PICKLE).read_bytes(), marker))
    assert_same(original, load_split(directory), source_too=False)
    assert_same(original, read_pickle(directory / PICKLE), source_too=False)
    assert not marker.exists()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_pickle_alone_is_a_clear_error(directory, tmp_path, kind, contents):
    """That names the file, runs nothing in it and leaves it as it was."""
    marker = tmp_path / "marker"
    (directory / PICKLE).write_bytes(damaged(kind, (directory / PICKLE).read_bytes(), marker))
    keep_only_pickle(directory)
    before = contents(directory)
    with pytest.raises(InputError) as error:
        load_split(directory)
    assert str(directory / PICKLE) in str(error.value)
    assert "\n" not in str(error.value)
    assert not str(error.value).endswith(": ")
    assert contents(directory) == before
    assert not marker.exists()


def test_command_in_a_pickle_is_named(tmp_path):
    """What it holds that no split does."""
    (tmp_path / PICKLE).write_bytes(with_command(tiny_split(), "eval", tmp_path / "marker"))
    with pytest.raises(InputError, match="eval"):
        load_split(tmp_path)


def test_pickle_cut_short_at_any_length_is_an_error_or_made_anew(directory):
    """Never a split of what happened to be whole."""
    original = load_split(directory)
    whole = (directory / PICKLE).read_bytes()
    lengths = sorted({*range(0, 700, 7), *range(0, len(whole), len(whole) // 150), len(whole) - 1})
    csv_files = {name: (directory / name).read_bytes() for name in CSV_NAMES}
    keep_only_pickle(directory)
    for length in lengths:
        (directory / PICKLE).write_bytes(whole[:length])
        with pytest.raises(InputError):
            load_split(directory)
    for name, text in csv_files.items():
        (directory / name).write_bytes(text)
    for length in lengths[:: len(lengths) // 5]:
        (directory / PICKLE).write_bytes(whole[:length])
        assert_same(original, load_split(directory), source_too=False)


def in_child(test: Callable[[], None], path: Path) -> None:
    """Run ``test`` in a child process with little memory, which ``path``'s bytes may bring down without us."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        message = ""
        try:
            os.close(read)
            if Path("/proc/self/statm").exists():  # where there is none, the alarm must do
                addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                _, hard = resource.getrlimit(resource.RLIMIT_AS)
                resource.setrlimit(resource.RLIMIT_AS, (addresses + (1 << 29), hard))
            signal.alarm(60)
            test()
        except BaseException:
            message = traceback.format_exc()
        os.write(write, message.encode()[-50_000:])
        os._exit(bool(message))
    os.close(write)
    with open(read, "rb") as pipe:
        message = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), (
        f"reading {path} ended in signal {os.WTERMSIG(status)}: {path.read_bytes()!r}"
    )
    assert status == 0, message


def read_any(path: Path, content: bytes) -> None:
    """Whatever the bytes: a valid split or an ``InputError`` of one line."""
    path.write_bytes(content)
    try:
        split = read_pickle(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert_valid(split)


FUZZ = settings(
    max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_random_bytes_never_give_anything_but_an_error_or_a_split(tmp_path):
    """With and without a pickle's first bytes."""
    path = tmp_path / PICKLE

    @FUZZ
    @given(st.sampled_from([b"", b"\x80\x05", b"\x80\x05}("]), st.binary(max_size=60))
    def fuzz(start, rest):
        read_any(path, start + rest)

    in_child(fuzz, path)


def whole_pickle(directory: Path) -> bytes:
    """A tiny split's pickle."""
    write_pickle(tiny_split(), directory / "whole")
    return (directory / "whole").read_bytes()


def test_mutated_pickles_never_give_anything_but_an_error_or_a_split(tmp_path):
    """Bytes changed, taken out, put in and copied to another place."""
    path, whole = tmp_path / PICKLE, whole_pickle(tmp_path)

    @FUZZ
    @given(changed(whole))
    def fuzz(content):
        read_any(path, content)

    in_child(fuzz, path)


def test_no_single_byte_changed_brings_the_reader_down(tmp_path):
    """Every byte of a pickle in turn, by each opcode that may stand there."""
    path, whole = tmp_path / PICKLE, whole_pickle(tmp_path)
    opcodes = b"N(q.bR\x94\xff"

    def fuzz():
        for at in range(len(whole)):
            for code in opcodes:
                read_any(path, whole[:at] + bytes([code]) + whole[at + 1 :])

    in_child(fuzz, path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05Nr\xff\xff\xff\x00.",  # a memo of 16 million entries
        b"\x80\x05\x8e\xff\xff\xff\x3f\x00\x00\x00\x00",  # 1 GB of bytes that do not follow
        b"\x80\x05\x96\xff\xff\xff\x3f\x00\x00\x00\x00",
    ],
)
def test_few_bytes_cannot_take_all_memory(tmp_path, content):
    """What a short file asks for, it does not get."""
    path = tmp_path / PICKLE

    def read():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        read_any(path, content)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB

    in_child(read, path)


# --- directories that hold no split ---


def test_missing_directory_and_file_in_its_place_are_named(tmp_path):
    """Neither is a split."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(InputError, match=str(path)):
            load_split(path)


@pytest.mark.parametrize("missing", [*CSV_NAMES, None])
def test_directory_without_a_whole_split_is_named(directory, missing):
    """Two of three CSV files are no split; what is missing is in the message."""
    keep_only_csv(directory)
    for name in [missing] if missing else CSV_NAMES:
        (directory / name).unlink()
    with pytest.raises(InputError) as error:
        load_split(directory)
    assert str(directory) in str(error.value)
    assert (missing or CSV_NAMES[0]) in str(error.value)


def edit(lines: list[str], at: int, line: str | None) -> list[str]:
    """Lines with one changed, or taken out."""
    return lines[:at] + ([] if line is None else [line]) + lines[at + 1 :]


CSV_FAULTS = {
    "a user beyond the others in training": (0, lambda lines: [*lines, "60\t1\t1"], CSV_NAMES[0], 1),
    "a user in training that is not in the test": (1, lambda lines: lines[:-1], None, None),
    "no training pair of the last user": (
        0,
        lambda lines: [line for line in lines if not line.startswith("59\t")],
        None,
        None,
    ),
    "no training pair of a user in between": (
        0,
        lambda lines: [line for line in lines if not line.startswith("7\t")],
        None,
        None,
    ),
    "a test user missing in between": (1, lambda lines: edit(lines, 7, None), CSV_NAMES[1], 8),
    "a test user twice": (1, lambda lines: [*lines[:5], lines[4], *lines[5:]], CSV_NAMES[1], 6),
    "test users in another order": (1, lambda lines: lines[::-1], CSV_NAMES[1], 1),
    "a row of negatives too few": (2, lambda lines: lines[:-1], CSV_NAMES[2], None),
    "a row of negatives too many": (2, lambda lines: [*lines, lines[0]], CSV_NAMES[2], None),
    "a row of negatives cut short": (
        2,
        lambda lines: edit(lines, 30, lines[30].rsplit("\t", 1)[0]),
        CSV_NAMES[2],
        31,
    ),
    "a word among the negatives": (2, lambda lines: edit(lines, 30, "x" + lines[30]), CSV_NAMES[2], 31),
    "a negative item among the negatives": (
        2,
        lambda lines: edit(lines, 30, "-1\t" + lines[30].split("\t", 1)[1]),
        CSV_NAMES[2],
        31,
    ),
    "a training row cut short": (0, lambda lines: edit(lines, 99, "3\t4"), CSV_NAMES[0], 100),
    "a negative training item": (0, lambda lines: edit(lines, 99, "3\t-4\t1"), CSV_NAMES[0], 100),
    "a negative test item": (1, lambda lines: edit(lines, 9, "9\t-4\t1"), CSV_NAMES[1], 10),
    "no training rows": (0, lambda lines: [], CSV_NAMES[0], None),
    "no test rows": (1, lambda lines: [], CSV_NAMES[1], None),
    "no negatives": (2, lambda lines: [], CSV_NAMES[2], None),
}


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_csv_files_that_are_malformed_or_disagree_are_refused(directory, contents, fault):
    """Naming the file, and the line where there is one; no pickle is made of them."""
    number, change, name, line = CSV_FAULTS[fault]
    keep_only_csv(directory)
    path = directory / CSV_NAMES[number]
    lines = change(path.read_text().splitlines())
    path.write_text("".join(f"{text}\n" for text in lines))
    if fault == "a user beyond the others in training":
        line = len(lines)
    before = contents(directory)
    with pytest.raises(InputError) as error:
        load_split(directory)
    expected = str(directory) if name is None else str(directory / name)
    assert expected + (f":{line}:" if line else "") in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(directory) == before


def test_user_whose_training_items_are_all_items_is_refused(tmp_path):
    """There is no negative to draw for her."""
    (tmp_path / CSV_NAMES[0]).write_text("0\t0\t1\n0\t1\t1\n0\t2\t1\n1\t0\t1\n")
    (tmp_path / CSV_NAMES[1]).write_text("0\t1\t1\n1\t2\t1\n")
    (tmp_path / CSV_NAMES[2]).write_text("1\n1\n")
    with pytest.raises(InputError, match="user 0"):
        load_split(tmp_path)
