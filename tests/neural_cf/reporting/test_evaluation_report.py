"""--report and compare: ties over all their orders, thirds by popularity, whole command lines, damaged files."""

from __future__ import annotations

import io
import json
import re
import sys
import tracemalloc
import zipfile
from contextlib import redirect_stdout
from itertools import permutations
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from conftest import call
from helpers_split import tiny_split
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.system.cli import InputError, run
from distiller.system.files import file_digest
from neural_cf.commands import compare as command
from neural_cf.ranking.metrics import values_of_ranks
from neural_cf.ranking.places import Places
from neural_cf.ranking.significance import mcnemar
from neural_cf.reporting import compare
from neural_cf.reporting.evaluation_report import (
    by_popularity,
    popularity_thirds,
    protocol_of,
    ties_at,
    values_over_ties,
)
from neural_cf.reporting.report_reader import read_report
from neural_cf.split import load_split

pytestmark = pytest.mark.usefixtures("in_empty_directory")


def places_of(above: int, tied: int, earlier: int = 0) -> Places:
    """One user's."""
    values = (torch.tensor([value]) for value in (above + earlier, above, tied))
    return Places(*values, torch.zeros(1, 0, dtype=torch.int64))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(1, 8), st.data())
def test_values_over_ties_are_those_of_all_orders(above, tied, k, data):
    """Every order of the test item, 0, and what ties with it, one by one."""
    places = places_of(above, tied, data.draw(st.integers(0, tied)))
    ranks = torch.tensor([above + order.index(0) for order in permutations(range(tied + 1))])
    for metric, orders in values_over_ties(places, k).items():
        each = values_of_ranks(ranks, k)[metric]
        assert orders["expected"].item() == pytest.approx(each.mean().item(), abs=1e-12)
        assert orders["optimistic"].item() == each.max().item()
        assert orders["pessimistic"].item() == each.min().item()
        assert orders["value"].item() == values_of_ranks(places.ranks, k)[metric].item()
    hits = values_of_ranks(ranks, k)["hr"]
    assert ties_at(places, k) == int(hits.max() != hits.min())


def test_ties_by_hand():
    """One above, two tied, k = 2: one of three orders hits, at rank 1."""
    found = values_over_ties(places_of(1, 2, 2), 2)
    assert found["hr"]["expected"].item() == pytest.approx(1 / 3)
    assert found["ndcg"]["expected"].item() == pytest.approx(0.6309297535714574 / 3)
    assert found["mrr"]["expected"].item() == pytest.approx(1 / 6)
    assert (found["hr"]["value"].item(), found["hr"]["optimistic"].item()) == (0, 1)


def test_thirds_by_hand():
    """Items 1 has two of six pairs; 0, 5, 2 and 3 follow with one each; 4 has none."""
    split = tiny_split()
    assert popularity_thirds(split).tolist() == [1, 0, 1, 2, 2, 2]
    rows = by_popularity(split, torch.tensor([0, 5, 1]), [1, 2])
    assert [(row["items"], row["training_pairs"], row["users"]) for row in rows] == [
        (1, 2, 0),
        (2, 2, 0),
        (3, 2, 3),
    ]
    assert rows[0]["metrics"]["1"] == {"hr": None, "ndcg": None, "mrr": None}
    assert rows[2]["metrics"]["1"]["hr"] == pytest.approx(1 / 3)
    assert rows[2]["metrics"]["2"]["mrr"] == pytest.approx(0.5)


def test_protocol_says_how_negatives_were_drawn():
    """Where it is known; in full ranking there are none."""
    split = tiny_split()
    sampled = protocol_of(split, "sampled")
    assert (sampled["negatives"], sampled["with_replacement"], sampled["negatives_seed"]) == (2, True, 7)
    assert "negatives" not in protocol_of(split, "full")


# --- whole command lines ---


@pytest.fixture
def report(ncf, split_dir, checkpoint):
    """Evaluates with ``--report``; the JSON."""

    def make(name: str, *flags: object) -> dict:
        load = ["--load", checkpoint, "--evaluate", "-o", "out", "--report", name]
        outcome = ncf(split_dir, *load, *flags)
        assert outcome.code == 0, outcome.err
        return json.loads(Path(name).read_text())

    return make


@pytest.mark.parametrize("ranking", ["sampled", "full"])
def test_report_holds_what_was_printed_and_what_it_rests_on(report, split_dir, checkpoint, ranking):
    """Metrics between their ends, digests of the files, and every user once."""
    content = report("a.json", "-k", 1, 5, 10, "--ranking", ranking)
    split, places = load_split(split_dir), read_report(Path("a.json")).places
    assert np.array_equal(places.ranks, np.load("out/ranks.npy"))
    assert list(content["metrics"]) == ["1", "5", "10"]
    for k, found in content["metrics"].items():
        assert found["ties_at_cutoff"] == ties_at(places, int(k))
        for metric, values in values_of_ranks(places.ranks, int(k)).items():
            means = found[metric]
            assert means["value"] == pytest.approx(values.mean().item())
            assert means["pessimistic"] <= means["expected"] <= means["optimistic"]
            assert means["interval_95"][0] <= means["value"] <= means["interval_95"][1]
    assert content["protocol"] == protocol_of(split, ranking)
    assert content["model"]["digest"] == file_digest(checkpoint)
    assert (content["data"]["digest"], content["seeds"]["training"]) == (split.digest, 1)
    assert sum(row["users"] for row in content["by_popularity"]) == split.nb_users
    assert sum(row["training_pairs"] for row in content["by_popularity"]) == len(split.train_users)
    assert places.best.shape == (split.nb_users, 10)
    hits = (places.best == torch.from_numpy(split.test_items.astype(int))[:, None]).any(1)
    assert torch.equal(hits, places.ranks < 10)


def run_compare(*arguments: object):
    """``neural-cf compare`` in this process."""
    return call("neural-cf compare", command.main, arguments)


def test_comparison_of_two_models(report, quantize_eval, checkpoint):
    """Differences, test and overlap, each by its definition; of a model with itself there is none."""
    report("a.json", "-k", 1, 10)
    assert quantize_eval(["--qebw", 3, "--qeba", 3], "b", "-k", 10, "--report", "b.json").code == 0
    outcome = run_compare("a.json", "b.json")
    assert outcome.code == 0, outcome.err
    a, b = (read_report(Path(name)).places for name in ("a.json", "b.json"))
    line = next(line for line in outcome.out.splitlines() if line.startswith("HR@10"))
    hits = [(places.ranks < 10).numpy() for places in (a, b)]
    cells = re.split(r"  +", line)
    assert cells[1:4] == [
        f"{hits[0].mean():.4f}",
        f"{hits[1].mean():.4f}",
        f"{hits[1].mean() - hits[0].mean():+.4f}",
    ]
    assert cells[5:] == [
        str((hits[0] & ~hits[1]).sum()),
        str((hits[1] & ~hits[0]).sum()),
        f"{mcnemar(*hits):.2g}",
    ]
    lists = ((set(x) - {-1}, set(y) - {-1}) for x, y in zip(a.best.tolist(), b.best.tolist(), strict=True))
    overlap = mean(len(x & y) / min(len(x), len(y)) for x, y in lists)
    assert f"Top-10 lists: mean overlap coefficient {overlap:.4f}" in outcome.out
    assert "@1 " not in outcome.out
    same = run_compare("a.json", "a.json").out
    assert "+0.0000  [+0.0000, +0.0000]            0            0            1" in same
    assert "Top-1 lists: mean overlap coefficient 1.0000" in same


def test_overlap_of_lists_that_are_not_full():
    """Of what the shorter one has."""
    a, b = torch.tensor([[3, 1, 2], [5, -1, -1]]), torch.tensor([[1, 4, 3], [2, 5, -1]])
    assert compare.overlaps(a, b, 3).tolist() == pytest.approx([2 / 3, 1])
    assert compare.overlaps(a, b, 1).tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.data())
def test_overlaps_are_those_of_sets(k, data):
    """In blocks of users, also of one user at a time."""
    lists = st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True)
    a, b = (data.draw(st.lists(lists, min_size=3, max_size=3)) for _ in range(2))
    expected = [len(set(x[:k]) & set(y[:k])) / min(k, len(x), len(y)) for x, y in zip(a, b, strict=True)]
    a, b = (torch.tensor([row + [-1] * (6 - len(row)) for row in rows]) for rows in (a, b))
    for at_once in (1, 2 * k, compare.ITEMS_AT_ONCE):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compare, "ITEMS_AT_ONCE", at_once)
            assert compare.overlaps(a, b, k).tolist() == pytest.approx(expected)


def test_long_lists_take_no_more_than_a_block(monkeypatch):
    """Of a thousand items each, a few users at a time."""
    seen = []
    shared = compare.shared_items
    monkeypatch.setattr(compare, "shared_items", lambda a, b: seen.append(a.numel()) or shared(a, b))
    lists = torch.arange(1000).expand(3000, -1)
    assert compare.overlaps(lists, lists, 1000).tolist() == [1.0] * 3000
    assert len(seen) > 1
    assert max(seen) <= compare.ITEMS_AT_ONCE


def edited(name: str, change) -> None:
    """The report a.json under another name, with a change."""
    content = json.loads(Path("a.json").read_text())
    change(content)
    Path(name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c["data"].update(digest="sha256:0"), "data is "),
        (lambda c: c["protocol"].update(negatives=99), "protocol: negatives is 40 and 99"),
        (lambda c: c["protocol"].update(with_replacement=False), "with_replacement is True and False"),
        (lambda c: c["protocol"].update(ranking="full"), "ranking is 'sampled' and 'full'"),
        (lambda c: c.update(metrics={"5": {}}), "int32 (60, 10), not int32 (60, 5)"),
        (lambda c: c.update(format="x"), "not a report"),
        (lambda c: c.update(version=0), "version 0"),
        (lambda c: c.pop("protocol"), "not a whole report"),
        (lambda c: c.update(metrics={}), "not a whole report"),
        (lambda c: c.update(metrics={"-1": 0}), "not a whole report"),
        (lambda c: c.update(data=[]), "not a whole report"),
        (lambda c: c["users"].update(digest="sha256:0"), "another digest"),
        (lambda c: c["users"].update(file="gone.npz"), "gone.npz"),
        (lambda c: c["users"].update(file="a\0b"), "b.json: not a whole report: users.file"),
        (lambda c: c["users"].update(file="\ud800"), "b.json: not a whole report: users.file"),
        (lambda c: c["users"].update(file=""), "directory"),
        (lambda c: c["users"].update(file=["a.npz"]), "no users.file"),
        (lambda c: c["data"].update(users=float("inf")), "no data.users"),
        (lambda c: c["data"].update(users=0), "0 users"),
        (lambda c: c["data"].update(users=10**4000), "users"),
        (lambda c: c["protocol"].update(deep=[[]]), "a protocol of lists"),
        (lambda c: c.update(metrics=[10] * 2000), "no metrics by cut-off"),
        (lambda c: c.update(metrics={"10": {}, "010": {}}), "no metrics by cut-off"),
    ],
)
def test_what_does_not_compare_is_one_line(report, change, part):
    """That names the files and what differs or is damaged."""
    report("a.json")
    edited("b.json", change)
    outcome = run_compare("a.json", "b.json")
    assert outcome.code == 2, outcome
    assert len(outcome.err.splitlines()) == 1
    assert part in outcome.err


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": 3}'])
def test_files_that_are_no_reports_are_named(content):
    """Whatever is in them."""
    Path("b.json").write_bytes(content)
    with pytest.raises(InputError, match=r"b\.json"):
        read_report(Path("b.json"))


def test_missing_report_is_named():
    outcome = run_compare("none.json", "none.json")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "none.json" in outcome.err


def test_checkpoint_of_no_text_is_shown_escaped(report):
    """A file's name may have bytes that are no text."""
    report("a.json")
    edited("b.json", lambda c: c["model"].update(checkpoint="x\ud800"))
    with open("printed", "w+", encoding="utf-8") as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["neural-cf", "a.json", "b.json"])
        with redirect_stdout(out):
            assert run("neural-cf compare", command.main) == 0
        out.seek(0)
        assert "B: b.json: x\\ud800, " in out.read()


def header_of(text: str) -> bytes:
    """A NumPy array's start, with this header."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def array_of(shape: tuple[int, ...], kind: str = "<i4", by_columns: bool = False) -> bytes:
    """A header that claims a shape."""
    return header_of(f"{{'descr': {kind!r}, 'fortran_order': {by_columns}, 'shape': {shape}, }}\n")


def archive_of(content: bytes, compression: int = zipfile.ZIP_DEFLATED, ending: str = ".npy") -> bytes:
    """An archive in which every array is ``content``."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name in Places._fields:
            archive.writestr(name + ending, content)
    return file.getvalue()


def npz_of(**changes: np.ndarray) -> bytes:
    """The users' places of a.json, with changes."""
    file = io.BytesIO()
    np.savez_compressed(file, **dict(np.load("a.npz")) | changes)
    return file.getvalue()


def bytes_of(array: np.ndarray) -> bytes:
    """An ``.npy``."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def encrypted(archive: bytes) -> bytes:
    """An archive whose directory says that its first file is encrypted."""
    at = archive.index(b"PK\x01\x02") + 8
    return archive[:at] + b"\x01" + archive[at + 1 :]


ZEROS = np.zeros(60, dtype=np.int32)
DAMAGED = {
    "an array alone": lambda: bytes_of(ZEROS),
    "no arrays": lambda: archive_of(b"hello"),
    "no such names": lambda: archive_of(b"hello", ending=""),
    "a huge array": lambda: archive_of(array_of((10**12,))),
    "beyond all numbers": lambda: archive_of(array_of((10**18,))),
    "long texts": lambda: archive_of(array_of((60,), "<U100000000")),
    "no content": lambda: archive_of(array_of((60,))),
    "too much content": lambda: archive_of(array_of((60,)) + bytes(1000)),
    "columns": lambda: archive_of(array_of((60,), by_columns=True) + bytes(240)),
    "an open header": lambda: archive_of(header_of("(" * 9000)),
    "a short open header": lambda: archive_of(header_of("(" * 250)),
    "a header of no map": lambda: archive_of(header_of("{[]: 1}")),
    "a header that warns": lambda: archive_of(header_of("{'descr': 1is 1}")),
    "another packing": lambda: archive_of(array_of((60,)) + bytes(240), zipfile.ZIP_LZMA),
    "encrypted": lambda: encrypted(archive_of(array_of((60,)) + bytes(240))),
    "floats": lambda: npz_of(ranks=ZEROS.astype(np.float32)),
    "negative ranks": lambda: npz_of(ranks=ZEROS - 5),
    "ranks before those above": lambda: npz_of(ranks=ZEROS, above=ZEROS + 1),
    "ranks after those tied": lambda: npz_of(ranks=ZEROS + 9, above=ZEROS, tied=ZEROS + 8),
    "no items": lambda: npz_of(best=np.full((60, 10), -2, dtype=np.int32)),
    "empty lists": lambda: npz_of(best=np.full((60, 10), -1, dtype=np.int32)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_users_file_that_is_made_up_is_named(report, case):
    """By a stranger, who has made its digest fit."""
    report("a.json")
    Path("b.npz").write_bytes(DAMAGED[case]())
    edited("b.json", lambda c: c["users"].update(file="b.npz", digest=file_digest("b.npz")))
    outcome = run_compare("b.json", "b.json")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome.err
    assert outcome.err.startswith("neural-cf compare: error: b.npz: not users' places: ")


def test_users_file_that_unpacks_to_much_is_not_unpacked(report):
    """64 MB of zeros in 64 kB."""
    report("a.json")
    with zipfile.ZipFile("b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ranks.npy", array_of((1 << 24,)) + bytes(1 << 26))
    edited("b.json", lambda c: c["users"].update(file="b.npz", digest=file_digest("b.npz")))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"b\.npz: not users' places: ranks\.npy is int32 \(16777216,\)"):
            read_report(Path("b.json"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


def test_users_file_cannot_claim_more_than_its_bytes_hold(report):
    """Directory, header and report all claim half a billion users."""
    report("a.json")
    count = 1 << 29
    header = array_of((count,))
    archive, size = archive_of(header), len(header) + 4 * count
    at = archive.index(b"PK\x01\x02") + 24  # of the unpacked size
    Path("b.npz").write_bytes(archive[:at] + size.to_bytes(4, "little") + archive[at + 4 :])
    digest = file_digest("b.npz")
    edited(
        "b.json", lambda c: c["users"].update(file="b.npz", digest=digest) or c["data"].update(users=count)
    )
    with pytest.raises(InputError, match=r"b\.npz: .* ranks\.npy is not packed as NumPy"):
        read_report(Path("b.json"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 100])
def test_users_file_that_is_damaged_is_named(report, content):
    """Also where its digest was made to fit."""
    report("a.json")
    Path("a.npz").write_bytes(content)
    edited("b.json", lambda c: c["users"].update(digest=file_digest("a.npz")))
    for name, part in (("a.json", "digest"), ("b.json", "a.npz")):
        outcome = run_compare(name, name)
        assert (outcome.code, len(outcome.err.splitlines())) == (2, 1), outcome.err
        assert part in outcome.err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--report", "a.txt", "--evaluate"], "does not end in .json"),
        (["--report", "none/a.json", "--evaluate"], "not a file in a directory"),
        (["--report", "a.json"], "--report needs"),
        (["--report", "a.json", "--qe-calibration", "1"], "--report needs"),
    ],
)
def test_report_that_cannot_be_is_refused(ncf, split_dir, checkpoint, flags, part):
    """Before anything is computed."""
    outcome = ncf(split_dir, "--load", checkpoint, *flags, "-o", "out")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert part in outcome.err
    assert not Path("out").exists()
