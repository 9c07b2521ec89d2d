"""convert.py: the split against a slow reference, the formats, and what a user can get wrong."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers_paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from neural_cf.data import conversion, negatives
from neural_cf.split import load_split

CSV_NAMES = ["train-ratings.csv", "test-ratings.csv", "test-negative.csv"]
HEADER = "userId,movieId,rating,timestamp"
MIN_RATINGS = 20

Row = tuple[int, int, float, int]


# --- the reference ---


def random_rows(seed: int, users: int = 6, items: int = 40) -> list[Row]:
    """Ratings of users with 15 to 30 of the items each, in any order, with ids that skip and times that tie."""
    random = np.random.default_rng(seed)
    item_ids = random.choice(1000, items, replace=False)
    user_ids = random.choice(1000, users, replace=False)
    counts = [25, 20, *random.integers(15, 31, users - 2)]
    rows = [
        (int(user), int(item), 3.5, int(random.integers(0, 12)))
        for user, count in zip(user_ids, counts, strict=True)
        for item in random.choice(item_ids, count, replace=False)
    ]
    return [rows[i] for i in random.permutation(len(rows))]


def reference(rows: list[Row], nb_negatives: int, seed: int) -> dict:
    """The split by plain loops, as the protocol has it."""
    counts: dict[int, int] = {}
    for user, *_ in rows:
        counts[user] = counts.get(user, 0) + 1
    rows = [row for row in rows if counts[row[0]] >= MIN_RATINGS]
    user_of: dict[int, int] = {}
    item_of: dict[int, int] = {}
    for user, item, *_ in rows:
        user_of.setdefault(user, len(user_of))
        item_of.setdefault(item, len(item_of))
    last: dict[int, tuple[int, int]] = {}
    for line, (user, _, _, time) in enumerate(rows):
        last[user] = max(last.get(user, (time, line)), (time, line))
    test_lines = {line for _, line in last.values()}
    train = [(user_of[row[0]], item_of[row[1]]) for line, row in enumerate(rows) if line not in test_lines]
    test = [item_of[rows[last[user][1]][1]] for user in user_of]
    random = np.random.RandomState(seed)
    negatives = []
    for number in range(len(user_of)):
        seen = {item for user, item in train if user == number}
        unseen = [item for item in range(len(item_of)) if item not in seen]
        negatives.append([unseen[rank] for rank in random.randint(0, len(unseen), size=nb_negatives)])
    return {"train": train, "test": test, "negatives": negatives, "users": user_of, "items": item_of}


def write_csv(path: Path, rows: list[Row]) -> Path:
    """Write ratings in ml-20m's format."""
    path.write_text(HEADER + "\n" + "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in rows))
    return path


def pairs(split) -> list[tuple[int, int]]:
    """A split's training pairs, in its order."""
    return list(zip(split.train_users.tolist(), split.train_items.tolist(), strict=True))


def assert_as_reference(split, rows: list[Row], nb_negatives: int, seed: int) -> None:
    """The split is the reference's, number for number."""
    expected = reference(rows, nb_negatives, seed)
    assert (split.nb_users, split.nb_items) == (len(expected["users"]), len(expected["items"]))
    assert split.user_ids.tolist() == list(expected["users"])
    assert split.item_ids.tolist() == list(expected["items"])
    assert split.test_items.tolist() == expected["test"]
    assert sorted(pairs(split)) == sorted(expected["train"])
    assert split.negatives.tolist() == expected["negatives"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_split_is_the_slow_references_number_for_number(data_seed, seed, nb_negatives):
    """Numbering, held-out items, training pairs and negatives of random ratings."""
    rows = random_rows(data_seed)
    with tempfile.TemporaryDirectory() as directory:
        path = write_csv(Path(directory) / "r", rows)
        split = conversion.convert(path, Path(directory) / "out", nb_negatives, seed)
    assert_as_reference(split, rows, nb_negatives, seed)


def test_negatives_continue_one_stream_over_many_blocks_of_users(tmp_path, monkeypatch):
    """Where users are drawn in blocks, the stream of random numbers runs through."""
    monkeypatch.setattr(negatives, "USERS_PER_BLOCK", 2)
    monkeypatch.setattr(conversion, "PAIRS_PER_BLOCK", 7)
    rows = random_rows(3, users=9)
    split = conversion.convert(write_csv(tmp_path / "r", rows), tmp_path / "out", 30, 5)
    assert_as_reference(split, rows, 30, 5)
    assert csv_split(tmp_path / "out")[0] == [(user, item, "1") for user, item in pairs(split)]


def test_users_and_items_are_numbered_by_first_appearance_in_what_is_left(tmp_path):
    """A user with too few ratings takes no number and gives the items she alone rated none."""
    rows = [(900, 77, 4.0, 1)]
    rows += [(50, 200 - i, 4.0, i) for i in range(20)]
    rows += [(7, 500 + i, 4.0, i) for i in range(25)]
    split = conversion.convert(write_csv(tmp_path / "r", rows), tmp_path / "out", 5)
    assert split.user_ids.tolist() == [50, 7]
    assert split.item_ids.tolist() == [200 - i for i in range(20)] + [500 + i for i in range(25)]


@pytest.mark.parametrize(("count", "left"), [(19, 2), (20, 3)])
def test_users_under_twenty_ratings_go(tmp_path, count, left):
    """Twenty ratings are enough, nineteen are not."""
    rows = [(user, 10 * user + i, 1.0, i) for user in (1, 2) for i in range(20)]
    rows += [(3, 100 + i, 1.0, i) for i in range(count)]
    assert conversion.convert(write_csv(tmp_path / "r", rows), tmp_path / "out", 5).nb_users == left


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([5] * 20, 19),  # all tie: the last line
        ([*range(20)], 19),
        ([*range(20, 0, -1)], 0),
        ([1] * 7 + [9, 9, 3] + [2] * 10, 8),  # the later line of the two that tie
        ([-5] * 10 + [-3] + [-4] * 9, 10),
    ],
)
def test_test_item_is_the_last_by_time_and_then_by_line(tmp_path, times, expected):
    """The order of lines counts only where timestamps tie."""
    rows = [(1, 100 + i, 1.0, time) for i, time in enumerate(times)]
    rows += [(2, 300 + i, 1.0, i) for i in range(20)]
    split = conversion.convert(write_csv(tmp_path / "r", rows), tmp_path / "out", 5)
    assert split.item_ids[split.test_items[0]] == 100 + expected


# --- formats ---

FORMATS = {
    "ml-100k": lambda u, i, r, t: f"{u}\t{i}\t{int(r)}\t{t}\n",
    "ml-1m": lambda u, i, r, t: f"{u}::{i}::{int(r)}::{t}\n",
    "ml-10m": lambda u, i, r, t: f"{u}::{i}::{r:g}::{t}\n",
    "ml-20m": lambda u, i, r, t: f"{u},{i},{r}\n".replace("\n", f",{t}\n"),
}


def text_of(rows: list[Row], name: str) -> str:
    """Ratings as the named data set has them."""
    return (HEADER + "\n" if name == "ml-20m" else "") + "".join(FORMATS[name](*row) for row in rows)


@pytest.mark.parametrize("file_name", ["ratings.csv", "ratings.dat", "u.data", "anything"])
@pytest.mark.parametrize("name", FORMATS)
def test_format_is_told_by_content_whatever_the_file_is_called(tmp_path, name, file_name):
    """The same ratings in each format give the same split."""
    rows = random_rows(11)
    (tmp_path / file_name).write_text(text_of(rows, name))
    split = conversion.convert(tmp_path / file_name, tmp_path / "out", 30, 2)
    assert_as_reference(split, rows, 30, 2)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ending", ["\r\n", "\n without the last"])
def test_line_endings_of_other_systems_are_read(tmp_path, name, ending):
    """Carriage returns, and a last line without its end."""
    rows = random_rows(12)
    text = text_of(rows, name)
    text = text.replace("\n", "\r\n") if ending == "\r\n" else text.rstrip("\n")
    (tmp_path / "r").write_bytes(text.encode())
    assert_as_reference(conversion.convert(tmp_path / "r", tmp_path / "out", 9, 2), rows, 9, 2)


# --- the files ---


def csv_split(directory: Path) -> tuple[list, list, list]:
    """The three CSV files, read by plain loops."""
    tables = []
    for name in CSV_NAMES:
        text = (directory / name).read_text()
        assert text.endswith("\n")
        tables.append([line.split("\t") for line in text.split("\n")[:-1]])
    train, test, negatives = tables
    train = [(int(user), int(item), rating) for user, item, rating in train]
    test = [(int(user), int(item), rating) for user, item, rating in test]
    return train, test, [[int(item) for item in row] for row in negatives]


def test_csv_files_hold_what_the_pickle_holds(ratings_file, split_dir):
    """User, item, 1 for training and for test; a row of negatives per user; no header."""
    assert sorted(path.name for path in split_dir.iterdir()) == sorted([*CSV_NAMES, "split.pickle"])
    split = load_split(split_dir)
    train, test, negatives = csv_split(split_dir)
    assert train == [(user, item, "1") for user, item in pairs(split)]
    assert test == [(user, item, "1") for user, item in enumerate(split.test_items.tolist())]
    assert negatives == split.negatives.tolist()


def test_pickle_names_shape_seed_protocol_and_source(ratings_file, split_dir):
    """Arrays and plain values, with what is needed to make the split again."""
    content = pickle.loads((split_dir / "split.pickle").read_bytes())
    assert (split_dir / "split.pickle").read_bytes()[:2] == b"\x80\x05"  # pickle protocol 5
    for value in content.values():
        assert isinstance(value, np.ndarray | int | str | bool | None)
        assert not isinstance(value, np.ndarray) or value.dtype.kind in "ui"
    digest = subprocess.run(["sha256sum", ratings_file], capture_output=True, text=True, check=True).stdout
    assert content["digest"] == f"sha256:{digest.split()[0]}"
    assert (content["seed"], content["distinct_negatives"]) == (0, False)
    assert (content["nb_users"], content["nb_items"]) == (60, 80)
    assert content["negatives"].shape == (60, 40)


@pytest.mark.parametrize("flags", [[], ["--distinct-negatives"]])
def test_train_and_test_together_are_the_input(tmp_path, convert, flags):
    """Nothing is lost, invented or in both; negatives are never training items."""
    rows = random_rows(8, users=10, items=60)
    out = tmp_path / "out"
    assert convert(write_csv(tmp_path / "r", rows), out, "-n", 25, *flags).code == 0
    split = load_split(out)
    train = [(split.user_ids[user], split.item_ids[item]) for user, item in pairs(split)]
    test = [(split.user_ids[user], split.item_ids[item]) for user, item in enumerate(split.test_items)]
    counts = {user: sum(row[0] == user for row in rows) for user, *_ in rows}
    kept = [(user, item) for user, item, *_ in rows if counts[user] >= MIN_RATINGS]
    assert sorted(train + test) == sorted(kept)
    assert not set(train) & set(test)
    seen = set(pairs(split))
    assert not any((user, item) in seen for user, row in enumerate(split.negatives) for item in row)
    assert set(split.train_users) == set(range(split.nb_users))


def test_same_seed_gives_the_same_bytes_and_another_seed_other_negatives(ratings_file, tmp_path, contents):
    """Of the seed, only the negatives depend."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        conversion.convert(ratings_file, tmp_path / name, 20, seed)
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert {name for name in first if first[name] != other[name]} == {"test-negative.csv", "split.pickle"}


def test_defaults_are_999_negatives_and_seed_0(tmp_path, convert):
    """What the published figures were made with."""
    rows = random_rows(4)
    assert convert(write_csv(tmp_path / "r", rows), tmp_path / "out").code == 0
    assert_as_reference(load_split(tmp_path / "out"), rows, 999, 0)


# --- distinct negatives ---


def test_distinct_negatives_never_repeat_nor_hold_the_test_item(tmp_path, convert):
    """And the split records that they are distinct."""
    rows = random_rows(9, users=8, items=60)
    command = [write_csv(tmp_path / "r", rows), tmp_path / "out", "-n", 20, "-s", 6, "--distinct-negatives"]
    assert convert(*command).code == 0
    split = load_split(tmp_path / "out")
    assert split.distinct_negatives is True
    assert split.seed == 6
    assert split.negatives.shape == (split.nb_users, 20)
    rated = set(pairs(split)) | set(enumerate(split.test_items.tolist()))
    for user, row in enumerate(split.negatives.tolist()):
        assert len(set(row)) == len(row)
        assert not any((user, item) in rated for item in row)
    before = split.negatives
    assert convert(*command).code == 0
    assert np.array_equal(load_split(tmp_path / "out").negatives, before)


def test_distinct_negatives_can_be_all_unrated_items(tmp_path, convert):
    """As many as there are is not too many."""
    rows = [(user, 10 * user + i, 1.0, i) for user in (1, 2) for i in range(20)]  # 30 items, each rated 20
    assert (
        convert(write_csv(tmp_path / "r", rows), tmp_path / "out", "-n", 10, "--distinct-negatives").code == 0
    )
    split = load_split(tmp_path / "out")
    assert sorted(split.item_ids[split.negatives[0]]) == list(range(30, 40))
    assert sorted(split.item_ids[split.negatives[1]]) == list(range(10, 20))


def test_distinct_negatives_are_drawn_uniformly(tmp_path):
    """Over many users with the same four unrated items, each is drawn about as often (chi-square)."""
    rows = [(user, i, 1.0, i) for user in range(400) for i in range(20)]
    rows += [(1000, i, 1.0, i) for i in range(4, 24)]
    split = conversion.convert(write_csv(tmp_path / "r", rows), tmp_path / "out", 1, distinct=True)
    counts = np.bincount(split.negatives[:400, 0], minlength=24)[20:]
    assert counts.sum() == 400
    assert np.sum((counts - 100) ** 2 / 100) < 21.1  # 3 degrees of freedom, p = 0.0001


# --- bad input ---


def good_rows(count: int = 2, users: int = 3) -> list[Row]:
    """Enough ratings for a split, ``count`` times 20 of them for each user."""
    return [(user, 5 * user + i, 3.5, i) for user in range(1, users + 1) for i in range(20 * count)]


def assert_refused(outcome, *parts: str) -> None:
    """One line, in the errors' form, with every part; exit code 2."""
    assert outcome.code == 2
    lines = [line for line in outcome.err.split("\n") if line]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("convert.py: error: ")
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in lines[0]


def assert_refused_without_a_trace(convert, contents, split_dir, tmp_path, arguments, *parts: str) -> None:
    """Refused, the split that is there byte-identical, nothing left beside it, no new directory made."""
    there = tmp_path / "there"
    if not there.exists():
        shutil.copytree(split_dir, there)
    ratings, *flags = arguments
    before = contents(there)
    assert_refused(convert(ratings, there, *flags), *parts)
    assert contents(there) == before
    assert_refused(convert(ratings, tmp_path / "new" / "deep", *flags), *parts)
    assert not (tmp_path / "new").exists()


FAULTS = {  # by what is wrong: a line in each format
    "a user that is no number": lambda sep: f"x{sep}2{sep}3.5{sep}4",
    "an item that is no number": lambda sep: f"1{sep}2b{sep}3.5{sep}4",
    "a fractional item": lambda sep: f"1{sep}2.5{sep}3.5{sep}4",
    "a rating that is no number": lambda sep: f"1{sep}2{sep}good{sep}4",
    "a time that is no number": lambda sep: f"1{sep}2{sep}3.5{sep}noon",
    "an empty item": lambda sep: f"1{sep}{sep}3.5{sep}4",
    "an empty rating": lambda sep: f"1{sep}2{sep}{sep}4",
    "an empty time": lambda sep: f"1{sep}2{sep}3.5{sep}",
    "a rating of nan": lambda sep: f"1{sep}2{sep}nan{sep}4",
    "a negative user": lambda sep: f"-1{sep}2{sep}3.5{sep}4",
    "a negative item": lambda sep: f"1{sep}-2{sep}3.5{sep}4",
    "an id beyond 64 bits": lambda sep: f"1{sep}99999999999999999999{sep}3.5{sep}4",
    "a row cut after the rating": lambda sep: f"1{sep}2{sep}3.5",
    "a row cut after the item": lambda sep: f"1{sep}2",
    "a row cut after the user": lambda sep: "1",
    "a row too long": lambda sep: f"1{sep}2{sep}3.5{sep}4{sep}5",
    "bytes of another kind": lambda sep: f"1{sep}\x00\xff{sep}3.5{sep}4",
}
SEPARATORS = {"ml-100k": "\t", "ml-10m": "::", "ml-20m": ","}


@pytest.mark.parametrize("name", SEPARATORS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", ["middle", "last"])
def test_malformed_line_is_named(convert, contents, split_dir, tmp_path, name, fault, place):
    """File and line, in every format, in the middle and at the end."""
    lines = text_of(good_rows(), name).splitlines()
    at = len(lines) // 2 if place == "middle" else len(lines)
    lines.insert(at, FAULTS[fault](SEPARATORS[name]))
    path = tmp_path / "ratings"
    path.write_text("\n".join(lines) + "\n", encoding="latin-1")
    assert_refused_without_a_trace(convert, contents, split_dir, tmp_path, [path], f"{path}:{at + 1}:")


def test_tab_is_no_separator_between_double_colons(convert, contents, split_dir, tmp_path):
    """A line of four fields only if it were one is malformed."""
    lines = text_of(good_rows(), "ml-1m").splitlines()
    lines[50] = "1::2\t3::4"
    path = tmp_path / "ratings.dat"
    path.write_text("\n".join(lines) + "\n")
    assert_refused_without_a_trace(convert, contents, split_dir, tmp_path, [path], f"{path}:51:")


@pytest.mark.parametrize("name", SEPARATORS)
def test_malformed_line_deep_in_a_large_file_is_named(convert, tmp_path, name):
    """Past the first blocks of a parallel reader, the first of two bad lines is named."""
    lines = text_of([(user, item, 3.5, 10**9 + item) for user in range(1500) for item in range(100)], name)
    lines = lines.splitlines()
    lines[120_000] = FAULTS["a row cut after the item"](SEPARATORS[name])
    lines[140_000] = FAULTS["a user that is no number"](SEPARATORS[name])
    path = tmp_path / "ratings"
    path.write_text("\n".join(lines) + "\n")
    assert_refused(convert(path, tmp_path / "out"), f"{path}:120001:")


@pytest.mark.parametrize("name", SEPARATORS)
def test_negative_id_deep_in_a_large_file_is_named(convert, tmp_path, name):
    """A number that reads well but is no id has its line named too."""
    lines = text_of([(user, item, 3.5, 10**9 + item) for user in range(1500) for item in range(100)], name)
    lines = lines.splitlines()
    lines[110_000] = FAULTS["a negative item"](SEPARATORS[name])
    path = tmp_path / "ratings"
    path.write_text("\n".join(lines) + "\n")
    assert_refused(convert(path, tmp_path / "out"), f"{path}:110001:", "-2")


@pytest.mark.parametrize(
    "header",
    [
        "movieId,userId,rating,timestamp",
        "userId,movieId,rating",
        "userId,movieId,rating,timestamp,comment",
        "user,item,rating,time",
        "userId;movieId;rating;timestamp",
        "userId\tmovieId\trating\ttimestamp",
        "userId::movieId::rating::timestamp",
        "1,2,3.5,4",
        "",
        "hello",
    ],
)
def test_wrong_header_is_named_with_its_line(convert, contents, split_dir, tmp_path, header):
    """No line 1 but the format's own passes."""
    path = tmp_path / "ratings.csv"
    body = text_of(good_rows(), "ml-20m").split("\n", 1)[1]
    path.write_text(f"{header}\n{body}")
    assert_refused_without_a_trace(convert, contents, split_dir, tmp_path, [path], f"{path}:1:")


@pytest.mark.parametrize("content", ["", "\n", "\n\n\n", HEADER, HEADER + "\n", "\0\0\0"])
def test_empty_file_is_refused(convert, contents, split_dir, tmp_path, content):
    """No byte, no line, no row."""
    path = tmp_path / "ratings.csv"
    path.write_text(content)
    assert_refused_without_a_trace(convert, contents, split_dir, tmp_path, [path], str(path))


def test_missing_file_and_directory_in_its_place_are_refused(convert, contents, split_dir, tmp_path):
    """The name is in the message."""
    missing = tmp_path / "missing.csv"
    assert_refused_without_a_trace(convert, contents, split_dir, tmp_path, [missing], str(missing))
    (tmp_path / "directory").mkdir()
    path = tmp_path / "directory"
    assert_refused_without_a_trace(convert, contents, split_dir, tmp_path, [path], str(path))


def test_file_that_opens_and_cannot_be_read_is_named(convert, contents, split_dir, tmp_path):
    """Reading has errors of its own, without the file's name."""
    path = "/proc/self/mem"  # without the memory at 0
    assert_refused_without_a_trace(convert, contents, split_dir, tmp_path, [path], f"{path}: Input/output")


@pytest.mark.parametrize(
    "rows",
    [
        [(1, i, 1.0, i) for i in range(30)],  # one user
        [(user, user + i, 1.0, i) for user in range(5) for i in range(19)],  # none with enough
        [(1, i, 1.0, i) for i in range(30)] + [(2, i, 1.0, i) for i in range(19)],  # one with enough
        [(user, 5, 1.0, i) for user in (1, 2) for i in range(25)],  # one item, over and over
    ],
)
def test_fewer_than_two_users_or_items_left_is_refused(convert, contents, split_dir, tmp_path, rows):
    """After the users with too few ratings are gone."""
    path = write_csv(tmp_path / "r", rows)
    assert_refused_without_a_trace(convert, contents, split_dir, tmp_path, [path], str(path))


@pytest.mark.parametrize("flags", [[], ["--distinct-negatives", "-n", 1]])
def test_user_who_rated_every_item_is_named(convert, contents, split_dir, tmp_path, flags):
    """By the file's own id: there is nothing to rank her test item against."""
    rows = [(1, i, 1.0, i) for i in range(20)] + [(4711, i, 1.0, i) for i in range(30)]
    path = write_csv(tmp_path / "r", rows)
    assert_refused_without_a_trace(convert, contents, split_dir, tmp_path, [path, *flags], "4711")


def test_too_few_items_for_distinct_negatives_are_refused(convert, contents, split_dir, tmp_path):
    """One less than asked for; without the flag the same numbers are fine."""
    rows = [(user, 10 * user + i, 1.0, i) for user in (1, 2) for i in range(20)]  # 10 unrated each
    path = write_csv(tmp_path / "r", rows)
    flags = ["-n", 11, "--distinct-negatives"]
    assert_refused_without_a_trace(
        convert, contents, split_dir, tmp_path, [path, *flags], "--distinct-negatives", "11", "10"
    )
    assert convert(path, tmp_path / "repeating", "-n", 11).code == 0


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["-n", 0], "--negatives"),
        (["--negatives", -5], "--negatives"),
        (["-n", "many"], "--negatives"),
        (["-s", -1], "--seed"),
        (["--seed", 2**32], "--seed"),
        (["--unknown"], "--unknown"),
    ],
)
def test_flags_out_of_range_are_named(convert, contents, split_dir, ratings_file, tmp_path, flags, name):
    """The flag is in the message."""
    arguments = [ratings_file, *flags]
    assert_refused_without_a_trace(convert, contents, split_dir, tmp_path, arguments, name)


def test_missing_arguments_are_refused(convert):
    """One line too."""
    assert_refused(convert())


def test_output_that_cannot_be_a_directory_is_refused(convert, contents, ratings_file, tmp_path):
    """A file where the directory should be, or above it, stays as it was."""
    (tmp_path / "file").write_text("mine")
    assert_refused(convert(ratings_file, tmp_path / "file", "-n", 5), str(tmp_path / "file"))
    assert_refused(convert(ratings_file, tmp_path / "file" / "out", "-n", 5), str(tmp_path / "file"))
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt, OSError(28, "No space left on device", "x"), RuntimeError]
)
def test_failure_while_writing_leaves_the_old_split_whole(
    convert, contents, split_dir, ratings_file, tmp_path, monkeypatch, failure
):
    """An interrupt, a full disk or a bug: four old files or four new ones, and nothing beside them."""
    there = shutil.copytree(split_dir, tmp_path / "there")
    before = contents(there)

    def fail(*_):
        raise failure

    monkeypatch.setattr(conversion, "write_pickle", fail)
    if failure is RuntimeError:
        with pytest.raises(RuntimeError):
            convert(ratings_file, there, "-n", 5, "-s", 9)
    else:
        outcome = convert(ratings_file, there, "-n", 5, "-s", 9)
        assert outcome.code == (130 if failure is KeyboardInterrupt else 2)
    assert contents(there) == before


def test_bad_input_as_a_user_meets_it(split_dir, tmp_path, contents):
    """The script itself: one line on stderr, nothing on stdout, exit code 2."""
    there = shutil.copytree(split_dir, tmp_path / "there")
    before = contents(there)
    path = tmp_path / "ratings.csv"
    path.write_text(f"{HEADER}\n1,2,3.5,4\n1,two,3.5,4\n")
    command = [sys.executable, ROOT / "convert.py", path, there]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"convert.py: error: {path}:3:")
    assert done.stderr.count("\n") == 1
    assert contents(there) == before


# --- real data ---


def real(name: str) -> Path:
    """A file of the real data, or a skip that says how to have it."""
    directory = os.environ.get("NCF_TEST_DATA")
    if not directory:
        pytest.skip("NCF_TEST_DATA names no directory with ml-100k/u.data and ml-1m/ratings.csv")
    return Path(directory) / name


def read_rows(path: Path, separator: str, skip: int) -> list[Row]:
    """Ratings, read by a plain loop."""
    lines = path.read_text().splitlines()[skip:]
    fields = (line.split(separator) for line in lines)
    return [(int(user), int(item), float(rating), int(time)) for user, item, rating, time in fields]


def test_real_ml_100k_is_the_references_split(tmp_path, convert):
    """With the users who have ties at their last timestamp."""
    path = real("ml-100k/u.data")
    assert convert(path, tmp_path / "out", "-n", 99, "-s", 1).code == 0
    split = load_split(tmp_path / "out")
    assert (split.nb_users, split.nb_items) == (943, 1682)
    assert_real_as_reference(split, read_rows(path, "\t", 0), 99, 1)


def test_real_ml_1m_is_the_references_split(tmp_path, convert):
    """The standard benchmark's held-out items: every user's last by time."""
    path = real("ml-1m/ratings.csv")
    assert convert(path, tmp_path / "out", "-n", 99).code == 0
    split = load_split(tmp_path / "out")
    assert (split.nb_users, split.nb_items, len(split.train_users)) == (6040, 3706, 994169)
    assert_real_as_reference(split, read_rows(path, ",", 1), 99, 0)


def assert_real_as_reference(split, rows: list[Row], nb_negatives: int, seed: int) -> None:
    """The reference again, with each user's items gathered once: a million rows are too many for its loops."""
    lines_of: dict[int, list[tuple[int, int, int]]] = {}
    item_of: dict[int, int] = {}
    for line, (user, item, _, time) in enumerate(rows):
        lines_of.setdefault(user, []).append((time, line, item_of.setdefault(item, len(item_of))))
    assert split.user_ids.tolist() == list(lines_of)
    assert split.item_ids.tolist() == list(item_of)
    random = np.random.RandomState(seed)
    train: list[tuple[int, int]] = []
    for number, rated in enumerate(lines_of.values()):
        last = max(rated)
        seen = {item for time, line, item in rated if (time, line, item) != last}
        unseen = [item for item in range(len(item_of)) if item not in seen]
        ranks = random.randint(0, len(unseen), size=nb_negatives)
        assert split.test_items[number] == last[2]
        assert split.negatives[number].tolist() == [unseen[rank] for rank in ranks]
        train += [(number, item) for item in seen]
    assert sorted(pairs(split)) == sorted(train)
