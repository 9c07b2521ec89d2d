"""--validate: the split without last items, and training that chooses its best epoch without looking at them."""

from __future__ import annotations

import csv
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers_paths import SCHEDULE
from helpers_split import tiny_split

from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf import split as split_module
from neural_cf.data.batches import TrainingBatches
from neural_cf.data.validation_split import validation_split
from neural_cf.split import PICKLE, load_split, read_pickle, write_pickle

pytestmark = pytest.mark.usefixtures("in_empty_directory")

TRAIN = ["--layers", "8", "6", "4", "-f", "4", "-s", "1", "-l", "0.01", "--no-compile"]


def last_two(ratings_file: Path) -> dict[int, list[int]]:
    """Each user's last two items by their ids, one rating after the other."""
    table = pd.read_csv(ratings_file)
    return {
        user: rows.sort_values("timestamp", kind="stable")["movieId"].tolist()[-2:]
        for user, rows in table.groupby("userId")
    }


def test_converted_split_knows_the_item_before_the_last(ratings_file, split_dir):
    """By time, and by line where times tie, as the last one; it stays in training."""
    split, expected = load_split(split_dir), last_two(ratings_file)
    found = zip(split.item_ids[split.validation_items], split.item_ids[split.test_items], strict=True)
    assert dict(zip(split.user_ids.tolist(), map(list, found), strict=True)) == expected
    for user in range(split.nb_users):
        assert split.validation_items[user] in split.train_items[split.train_users == user]


def test_times_that_tie_go_by_line(convert, tmp_path):
    """All at one second: the last two lines of each user."""
    rows = [(user, item, 3.0, 5) for item in range(25, 0, -1) for user in (7, 8)]
    rows += [(7, 100, 3.0, 4), (8, 101, 3.0, 4)]
    table = pd.DataFrame(rows, columns=["userId", "movieId", "rating", "timestamp"])
    table.to_csv("ratings.csv", index=False)
    assert convert("ratings.csv", "out", "-n", 3).code == 0
    split = load_split("out")
    assert split.item_ids[split.validation_items].tolist() == [2, 2]
    assert split.item_ids[split.test_items].tolist() == [1, 1]


@pytest.fixture(params=[False, True])
def both(request, convert, ratings_file):
    """A split, with repeated negatives or distinct ones, and its validation split."""
    flags = ["--distinct-negatives"] if request.param else []
    assert convert(ratings_file, "split", "-n", 2, *flags).code == 0
    split = load_split("split")
    return split, validation_split(split, "split")


def test_validation_split_is_the_split_without_last_items(both):
    """Its training pairs are the others, in their order; negatives are by the split's rule."""
    split, found = both
    pairs = set(zip(split.train_users.tolist(), split.train_items.tolist(), strict=True))
    held_out = set(enumerate(split.validation_items.tolist()))
    left = list(zip(found.train_users.tolist(), found.train_items.tolist(), strict=True))
    assert left == [
        pair
        for pair in zip(split.train_users.tolist(), split.train_items.tolist(), strict=True)
        if pair not in held_out
    ]
    assert set(left) == pairs - held_out
    assert np.array_equal(found.test_items, split.validation_items)
    assert found.negatives.shape == split.negatives.shape
    assert found.digest == split.digest
    for user, row in enumerate(found.negatives.tolist()):
        assert not {(user, item) for item in row} & set(left)
        if split.distinct_negatives:
            assert len({*row, found.test_items[user]}) == len(row) + 1
    assert not np.array_equal(found.negatives, split.negatives)
    assert np.array_equal(found.negatives, validation_split(split, "split").negatives)


def test_negatives_are_uniform_over_what_training_leaves_unseen(convert, ratings_file):
    """The last item among them: nobody knows it yet."""
    assert convert(ratings_file, "split", "-n", 4000).code == 0
    split = validation_split(load_split("split"), "split")
    unseen = set(range(split.nb_items)) - set(split.train_items[split.train_users == 0].tolist())
    counts = np.bincount(split.negatives[0], minlength=split.nb_items)
    assert set(np.flatnonzero(counts)) == unseen
    expected = 4000 / len(unseen)
    assert ((counts[sorted(unseen)] - expected) ** 2 / expected).sum() < 2 * len(unseen)  # chi squared


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"validation_items": None}, "convert its ratings again"),
        ({"seed": None}, "convert its ratings again"),
        ({"validation_items": np.array([4, 5, 1], dtype=np.uint8)}, "of user 0, training without item 4"),
        (
            {"validation_items": np.array([1, 5, 1], dtype=np.uint8)},
            "of user 1, training without item 5 has 0",
        ),
    ],
)
def test_split_that_has_no_validation_items_is_refused(changes, part):
    """Or whose items are not in training, or are all that a user has."""
    with pytest.raises(InputError, match=part):
        validation_split(replace(tiny_split(), **changes), "split")


# --- the split on disk ---


def of_version_1(path: Path) -> None:
    """Make a split's pickle one of the version before."""
    content = vars(read_pickle(path)) | {"format": split_module.FORMAT, "version": 1}
    del content["validation_items"]
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=5)


def test_split_of_the_version_before_still_loads(ncf, convert, ratings_file):
    """And is the same; only ``--validate`` asks to convert again."""
    assert convert(ratings_file, "split", "-n", 20).code == 0
    whole, path = load_split("split"), Path("split") / PICKLE
    of_version_1(path)
    before = path.read_bytes()
    old = load_split("split")
    assert path.read_bytes() == before
    assert old.validation_items is None
    assert (old.digest, old.seed) == (whole.digest, whole.seed)
    assert split_module.same_pairs(old, whole)
    outcome = ncf("split", *TRAIN, "--validate", "-e", 1, "-o", "out")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "--validate: split" in outcome.err
    assert "convert" in outcome.err
    assert not Path("out").exists()


@pytest.mark.parametrize("items", [[0, 1], [0, 1, 6], [[0], [1], [2]], [0.0, 1.0, 2.0]])
def test_validation_items_of_another_form_are_refused(items):
    """Not one item of each user."""
    bad = np.array(items)
    bad = bad if bad.dtype.kind == "f" else bad.astype(np.uint8)
    write_pickle(replace(tiny_split(), validation_items=bad), Path(PICKLE))
    with pytest.raises(InputError, match=r"split\.pickle"):
        read_pickle(Path(PICKLE))


# --- whole command lines ---


def metrics_in(line: str) -> str:
    return re.search(r"HR@10 = [\d.]+, NDCG@10 = [\d.]+", line)[0]


@pytest.fixture
def validated(ncf, split_dir):
    """The output of three epochs into ``out``."""
    report = ["--report", "out.json"]
    outcome = ncf(split_dir, *TRAIN, "-e", 3, "--validate", *report, "-o", "out")
    assert outcome.code == 0, outcome.err
    return outcome.out.splitlines()


def test_best_epoch_is_chosen_by_validation_and_tested_once(validated, ncf, split_dir):
    """The epochs' metrics are of validation items, the last line's of the test items."""
    epochs = [line for line in validated if line.startswith("Epoch ")]
    (tested,) = [line for line in validated if line.startswith("Test, by epoch ")]
    with open("out/valid_results.csv", newline="") as file:
        hit_rates = [float(row["hr@10"]) for row in csv.DictReader(file)]
    best = int(np.argmax(hit_rates))
    assert tested.startswith(f"Test, by epoch {best}: HR@10 = ")
    assert load_checkpoint("out/best.pth.tar")["epoch"] == best
    again = ncf(split_dir, "--load", "out/best.pth.tar", "--evaluate", "-o", "again")
    assert metrics_in(again.out) == metrics_in(tested)
    assert np.array_equal(np.load("again/ranks.npy"), np.load("out/ranks.npy"))
    assert metrics_in(tested) not in {metrics_in(line) for line in epochs}
    model = json.loads(Path("out.json").read_text())["model"]
    assert (model["checkpoint"], model["validate"]) == ("out/best.pth.tar", True)


def test_test_items_are_looked_at_once_training_is_done(ncf, split_dir):
    """Not where it is to go on; and then though it was stopped after the last epoch."""
    run = ["--validate", "-o", "out"]
    assert "Test, " not in ncf(split_dir, *TRAIN, "-e", 2, *run, "--max-steps", 3).out
    assert "Test, by epoch" in ncf(split_dir, "--resume", "-o", "out").out
    ranks = Path("out/ranks.npy").read_bytes()
    outcome = ncf(split_dir, "--resume", "-o", "out")
    assert (outcome.code, "already has 2 epochs" in outcome.err) == (2, True)
    Path("out/ranks.npy").unlink()
    outcome = ncf(split_dir, "--resume", "-o", "out")
    assert (outcome.code, "Test, by epoch" in outcome.out) == (0, True)
    assert Path("out/ranks.npy").read_bytes() == ranks


def test_training_does_not_see_what_is_held_out(ncf, split_dir, monkeypatch):
    """Neither the last item nor the one before."""
    seen = []
    original = TrainingBatches.__init__

    def spy(self, split, *arguments):
        seen.append(split)
        original(self, split, *arguments)

    monkeypatch.setattr(TrainingBatches, "__init__", spy)
    assert ncf(split_dir, *TRAIN, "-e", 1, "--validate", "-o", "out").code == 0
    pairs = set(zip(seen[0].train_users.tolist(), seen[0].train_items.tolist(), strict=True))
    whole = load_split(split_dir)
    assert not pairs & set(enumerate(whole.validation_items.tolist()))
    assert not pairs & set(enumerate(whole.test_items.tolist()))
    assert len(pairs) == len(whole.train_users) - whole.nb_users


def test_resumed_run_validates_on(ncf, split_dir, validated):
    """To the weights of one that never stopped; a run is not validated from its middle on."""
    assert ncf(split_dir, *TRAIN, "-e", 1, "--validate", "-o", "part").code == 0
    assert ncf(split_dir, "--resume", "-e", 3, "-o", "part").code == 0
    ours, theirs = (load_checkpoint(f"{name}/checkpoint.pth.tar")["state_dict"] for name in ("part", "out"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert np.array_equal(np.load("part/ranks.npy"), np.load("out/ranks.npy"))
    assert ncf(split_dir, *TRAIN, "-e", 1, "-o", "plain").code == 0
    outcome = ncf(split_dir, "--resume", "--validate", "-e", 2, "-o", "plain")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "--validate" in outcome.err


def test_going_on_from_a_model_that_has_seen_the_items_is_warned_of(ncf, split_dir, checkpoint, validated):
    """Once; not from one that was validated itself."""
    load = ["--reset-optimizer", "-e", 1, "--validate"]
    warned = ncf(split_dir, *TRAIN, "--load", checkpoint, *load, "-o", "a")
    assert warned.code == 0
    assert "warning: --validate: " in warned.err
    assert "warning" not in ncf(split_dir, *TRAIN, "--load", "out/best.pth.tar", *load, "-o", "b").err


def test_quantization_aware_best_epoch_is_tested_as_trained(ncf, split_dir, checkpoint):
    """Rounding."""
    schedule = SCHEDULE
    flags = ["--reset-optimizer", "-e", 1, "--compress", schedule, "--validate", "-o", "aware"]
    outcome = ncf(split_dir, *TRAIN, "--load", checkpoint, *flags)
    assert outcome.code == 0, outcome.err
    again = ncf(split_dir, "--load", "aware/best.pth.tar", "--evaluate", "-o", "again")
    assert metrics_in(outcome.out.splitlines()[-1]) in again.out


def test_validation_ranks_in_full(ncf, split_dir):
    """Both the epochs and the test."""
    outcome = ncf(split_dir, *TRAIN, "-e", 1, "--validate", "--ranking", "full", "-k", 5, 10, "-o", "out")
    assert outcome.code == 0, outcome.err
    assert np.load("out/ranks.npy").max() > load_split(split_dir).nb_candidates
    assert "MRR@5" in outcome.out.splitlines()[-1]


def test_validation_is_of_training(ncf, split_dir, checkpoint):
    """An evaluation has no epochs to choose from."""
    outcome = ncf(split_dir, "--load", checkpoint, "--evaluate", "--validate", "-o", "out")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "--validate is for training" in outcome.err
