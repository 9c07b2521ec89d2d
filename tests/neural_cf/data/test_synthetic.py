"""neural-cf synthetic: what every file must have, what makes it like a real one, and what a user can get wrong."""

import errno
import itertools
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers_paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.system.cli import InputError, run
from neural_cf.commands import synthetic as command
from neural_cf.data import synthetic

SCRIPT = ["-m", "neural_cf", "synthetic"]


def make(path, users, items, ratings, seed=0):
    """Write a file by the command line's own path and read it back."""
    counts = ["--users", users, "--items", items, "--ratings", ratings, "--seed", seed]
    command.main([str(path), *map(str, counts)])
    return pd.read_csv(path)


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """2000 users, 1500 items, 150,000 ratings: mean activity 75, density 5 %."""
    return make(tmp_path_factory.mktemp("medium") / "ratings.csv", 2000, 1500, 150_000)


def check_invariants(table, users, items, ratings):
    assert list(table) == ["userId", "movieId", "rating", "timestamp"]
    assert len(table) == ratings
    assert not table.duplicated(["userId", "movieId"]).any()
    assert table.userId.is_monotonic_increasing
    assert set(table.userId) == set(range(1, users + 1))
    assert set(table.movieId) == set(range(1, items + 1))
    assert table.groupby("userId").size().between(20, items - 2).all()
    assert set(table.rating * 2) <= set(range(1, 11))
    assert table.timestamp.dtype == np.int64
    assert (table.groupby("userId").timestamp.diff().dropna() >= 0).all()


@st.composite
def counts(draw):
    users = draw(st.integers(2, 40))
    items = draw(st.integers(22, 60))
    return users, items, draw(st.integers(max(20 * users, items), users * (items - 2)))


@settings(max_examples=60, deadline=None)
@given(counts(), st.integers(0, synthetic.MAX_SEED))
def test_invariants_hold_for_all_small_sizes(tmp_path_factory, counts, seed):
    path = tmp_path_factory.mktemp("small") / "ratings.csv"
    check_invariants(make(path, *counts, seed), *counts)


@pytest.mark.parametrize(
    "counts",
    [
        (50, 30, 1100),
        (2, 22, 40),  # the least of everything: every user rates all but two items
        (30, 50, 30 * 48),  # as dense as it gets
        (30, 600, 600),  # every rating is an item's only one
        (3, 9000, 26_000),  # users of thousands of ratings
        (600, 9000, 12_000),  # several blocks
    ],
)
def test_invariants_hold_at_the_edges(tmp_path, counts):
    check_invariants(make(tmp_path / "ratings.csv", *counts), *counts)


def test_invariants_hold_at_a_usual_size(medium):
    check_invariants(medium, 2000, 1500, 150_000)


def test_the_text_is_ml_20m_s(tmp_path):
    make(tmp_path / "ratings.csv", 50, 30, 1100)
    text = (tmp_path / "ratings.csv").read_text()
    assert text.startswith("userId,movieId,rating,timestamp\n1,")
    assert text.endswith("\n")
    assert pd.Series(text.splitlines()[1:]).str.fullmatch(r"\d+,\d+,[0-5]\.[05],\d{9,10}").all()


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for path, seed in ((first, 5), (again, 5), (other, 6)):
        make(path, 100, 9000, 20_000, seed)
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_popularity_falls_off_like_a_power_law(medium):
    popularity = np.sort(medium.groupby("movieId").size().to_numpy())[::-1]
    tenth = len(popularity) // 10
    assert popularity[:tenth].sum() > 0.3 * len(medium)  # ml-1m, as dense: 0.44
    assert popularity[-5 * tenth :].sum() < 0.25 * len(medium)  # ml-1m: 0.08
    assert popularity[0] < 0.6 * medium.userId.nunique()  # ml-1m: 0.57
    head = synthetic.POPULARITY_HEAD * len(medium) / medium.userId.nunique()
    log_ranks = np.log(np.arange(1, len(popularity) + 1) + head)
    # A straight line, less steep than the weights' -2 because tastes lift what is unpopular.
    assert -1.8 < np.polyfit(log_ranks, np.log(popularity), 1)[0] < -1.1
    assert np.corrcoef(log_ranks, np.log(popularity))[0, 1] < -0.98


def test_popularity_does_not_follow_the_ids(medium):
    popularity = medium.groupby("movieId").size()
    assert abs(np.corrcoef(popularity.index, popularity)[0, 1]) < 0.1


def test_activity_is_spread_lognormally(medium):
    activity = medium.groupby("userId").size()
    assert activity.max() > 8 * activity.median()
    assert activity.median() < 0.75 * activity.mean()
    low, middle, high = np.log(activity - 20 + 0.5).quantile([0.16, 0.5, 0.84])  # one sigma either side
    assert high - middle == pytest.approx(synthetic.ACTIVITY_SIGMA, rel=0.1)
    assert middle - low == pytest.approx(synthetic.ACTIVITY_SIGMA, rel=0.1)


def test_times_come_in_bursts_with_ties(medium):
    gaps = medium.groupby("userId").timestamp.diff().dropna()
    assert 0.45 < (gaps == 0).mean() < 0.55  # ml-100k: 0.51
    assert 0.01 < (gaps > 3600).mean() < 0.03  # ml-100k: 0.018
    assert gaps.quantile(0.9) < 600
    last = medium.groupby("userId").timestamp.transform("max") == medium.timestamp
    assert 0.3 < (last.groupby(medium.userId).sum() > 1).mean() < 0.7  # ml-100k: 0.44
    first_days = medium.groupby("userId").timestamp.min()
    assert first_days.between(synthetic.FIRST_DAY_S, synthetic.LAST_DAY_S).all()
    assert first_days.std() > 4 * 365 * 86_400


def test_ratings_look_like_stars(medium):
    assert 3.0 < medium.rating.mean() < 4.0
    assert 0.8 < medium.rating.std() < 1.3
    assert medium.rating.nunique() == 10


def test_a_user_s_order_does_not_follow_popularity_or_ids(medium):
    popularity = medium.groupby("movieId").movieId.transform("size")
    for values in (popularity, medium.movieId):
        centred = values - values.groupby(medium.userId).transform("mean")
        place = medium.groupby("userId").cumcount(ascending=False) < 10  # the last ten of each user
        assert abs(centred[place].mean()) < 0.05 * values.std()


def test_items_are_an_exact_weighted_sample():
    """40,000 users of one taste each draw 2 of 4 items; inclusion is known by summing over the orders."""
    weights, num_users = np.array([8.0, 4.0, 2.0, 1.0]), 40_000
    market = synthetic.Market(
        activity=np.full(num_users, 2),
        first_raters=np.full(4, -1),  # nobody
        tastes=np.ones((num_users, 1), np.float32),
        traits=np.log([[4.0, 4.0, 1.0, 1.0]]).astype(np.float32),
        log_popularity=np.log([2.0, 1.0, 2.0, 1.0]).astype(np.float32),
    )
    expected = np.zeros(4)
    for first, second in itertools.permutations(range(4), 2):
        chance = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        expected[[first, second]] += chance
    items = synthetic.draw_items(market, 0, num_users, np.random.default_rng(0))
    measured = np.bincount(items) / num_users
    assert np.abs(measured - expected).max() < 5 * 0.5 / np.sqrt(num_users)  # 5 standard errors at the most


def hit_rate(scores, known, users, tests, rng):
    """HR@10 of each user's test item among 99 random items that the user has not rated."""
    hits = 0
    for user, test in zip(users, tests, strict=True):
        negatives = rng.choice(np.flatnonzero(~known[user]), 99)
        hits += (scores[user, negatives] >= scores[user, test]).sum() < 10
    return hits / len(users)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_model_learns_far_more_than_popularity(tmp_path, seed):
    table = make(tmp_path / "ratings.csv", 600, 400, 24_000, seed)
    last = table.groupby("userId").tail(1) - 1
    known = np.zeros((600, 400), bool)
    known[table.userId - 1, table.movieId - 1] = True
    train = known.astype(np.float64)
    train[last.userId, last.movieId] = 0.0
    u, s, vt = np.linalg.svd(train, full_matrices=False)
    factors = (u[:, :9] * s[:9]) @ vt[:9]  # popularity and the eight directions of taste
    popularity = np.broadcast_to(train.sum(axis=0), train.shape)
    by_factors, by_popularity = (
        hit_rate(scores, known, last.userId, last.movieId, np.random.default_rng(0))
        for scores in (factors, popularity)
    )
    assert by_popularity > 0.2  # chance: 0.1
    assert by_factors > by_popularity + 0.2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--users", "1"], "--users 1: must be from 2 to 10000000"),
        (["--items", "21"], "--items 21: must be from 22 to 10000000"),
        (["--items", "10000001"], "--items 10000001: must be"),
        (["--users", "50", "--items", "30", "--ratings", "999"], "--ratings 999: must be from 1000 to 1400"),
        (
            ["--users", "50", "--items", "30", "--ratings", "1401"],
            "--ratings 1401: must be from 1000 to 1400",
        ),
        (["--users", "2", "--items", "90", "--ratings", "89"], "--ratings 89: must be from 90 to 176"),
        (["--seed", "-1"], "--seed -1: must be from 0 to 4294967295"),
        (["--seed", "4294967296"], "--seed 4294967296: must be"),
    ],
)
def test_bad_counts_name_the_flag(tmp_path, flags, message):
    with pytest.raises(InputError) as error:
        command.main([str(tmp_path / "out.csv"), *flags])
    assert str(error.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_counts_that_are_not_numbers_name_the_flag(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([str(tmp_path / "out.csv"), "--users", "many"])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err == "neural-cf synthetic: error: argument --users: invalid int value: 'many'\n"
    )


def test_what_is_not_a_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match=r"OUT .*: is not a regular file"):
            command.main([str(out)])
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["missing/out.csv"], "OUT {folder}/missing/out.csv: there is no directory {folder}/missing"),
        (["out.csv", "--users", "0"], "--users 0: must be from 2 to 10000000"),
    ],
)
def test_errors_as_a_user_meets_them(tmp_path, flags, message):
    done = subprocess.run(
        [sys.executable, *SCRIPT, *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"neural-cf synthetic: error: {message.format(folder=tmp_path.resolve())}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: {path}: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, capsys, failure, code, line):
    def fail(table, file, options):
        file.write(b"half a f")
        raise failure

    path = (tmp_path / "ratings.csv").resolve()
    path.write_text("before")
    monkeypatch.setattr(synthetic.pa.csv, "write_csv", fail)
    assert run("neural-cf synthetic", lambda: command.main([str(path)])) == code
    assert capsys.readouterr().err == f"neural-cf synthetic: {line.format(path=path)}\n"
    assert [file.name for file in tmp_path.iterdir()] == ["ratings.csv"]
    assert path.read_text() == "before"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    make(tmp_path / "link.csv", 50, 30, 1100)
    assert (tmp_path / "link.csv").is_symlink()
    assert len(pd.read_csv(tmp_path / "target.csv")) == 1100
