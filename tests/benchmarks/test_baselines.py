"""baselines.py: its recommenders against what they are by definition, and its command line."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import call
from helpers_split import tiny_split

from benchmarks import baselines
from benchmarks.baselines import ALS, ItemKNN, Popularity, RowScorer, interactions, weighted_users
from neural_cf.ranking.places import evaluate
from neural_cf.split import load_split

USERS, ITEMS = torch.arange(3), torch.arange(6).expand(3, 6)


@pytest.fixture
def split(split_dir):
    return load_split(split_dir)


def rated(split) -> np.ndarray:
    """(U, I), 1 where a user has rated an item."""
    matrix = np.zeros((split.nb_users, split.nb_items))
    matrix[split.train_users, split.train_items] = 1
    return matrix


def scores_of_all(method, split) -> np.ndarray:
    """(U, I): every item's score for every user."""
    items = torch.arange(split.nb_items).expand(split.nb_users, -1)
    return method.fit(split)(torch.arange(split.nb_users), items).numpy()


# --- the methods ---


def test_popularity_counts_training_pairs():
    """For every user alike, and not what is held out."""
    assert Popularity().fit(tiny_split())(USERS, ITEMS).tolist() == [[1, 2, 1, 1, 0, 1]] * 3


def test_interactions_are_the_training_pairs_once():
    """A pair that CSV files repeat does not count twice."""
    split = tiny_split()
    expected = [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 0, 0]]
    assert interactions(split).toarray().tolist() == expected
    for name in ("train_users", "train_items"):
        object.__setattr__(split, name, np.concatenate([getattr(split, name)] * 2))
    assert interactions(split).toarray().tolist() == expected


def test_cosine_of_a_worked_example():
    """User 0 has items 0 and 1, user 2 has 1, 2 and 3: item 1 has two users, the others one each."""
    scores = ItemKNN("cosine", 6).fit(tiny_split())(USERS, ITEMS).numpy()
    one_of_two = 1 / math.sqrt(2)
    assert scores[0, 2] == pytest.approx(one_of_two)  # of item 1 alone
    assert scores[2, 0] == pytest.approx(one_of_two)
    assert scores[0, 5] == scores[1, 2] == scores[0, 4] == 0  # no user in common


def weighted(name: str, matrix: np.ndarray) -> np.ndarray:
    """(I, U): items as vectors of their users, as the three similarities weigh them."""
    vectors = matrix.T
    if name == "cosine":
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rarity = np.log(len(vectors)) - np.log1p(vectors.sum(axis=0))
    if name == "tfidf":
        vectors = vectors * rarity
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    length = vectors.sum(axis=1, keepdims=True)
    norm = 0.25 + 0.75 * length / length.mean()
    return vectors * 2.2 / (1.2 * norm + vectors) * rarity


@pytest.mark.parametrize("name", baselines.SIMILARITIES)
def test_weights_are_their_definition(split, name):
    """Of every item and user."""
    found = weighted_users(interactions(split), name).toarray()
    np.testing.assert_allclose(found, weighted(name, rated(split)).T, rtol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", baselines.SIMILARITIES)
def test_item_knn_with_all_neighbours_sums_similarities(split, name):
    """From what the user has rated to each item; and nothing is warned of."""
    vectors = weighted(name, rated(split))
    expected = rated(split) @ vectors @ vectors.T
    np.testing.assert_allclose(scores_of_all(ItemKNN(name, split.nb_items), split), expected, rtol=1e-6)


def test_item_knn_keeps_the_most_similar():
    """Of two neighbours one is the item itself: item 1 is no neighbour of 2 and 3, which are each other's."""
    scores = ItemKNN("cosine", 2).fit(tiny_split())(USERS, ITEMS).numpy()
    assert scores[2, 1] == pytest.approx(1)
    assert scores[0, 1] == pytest.approx(1 + 1 / math.sqrt(2))  # item 0 has no other neighbour


@pytest.fixture
def factors(monkeypatch) -> list:
    """The models that implicit has fitted."""
    import implicit.cpu.als

    fitted = []

    class Watched(implicit.cpu.als.AlternatingLeastSquares):
        def fit(self, *args, **kwargs):
            fitted.append(self)
            super().fit(*args, **kwargs)

    monkeypatch.setattr(implicit.cpu.als, "AlternatingLeastSquares", Watched)
    return fitted


def test_als_minimizes_its_loss(split, factors):
    """The items' factors solve the weighted least squares that the users' leave (Hu et al. 2008, eq. 5)."""
    method = ALS(factors=4, iterations=60, regularization=0.5, alpha=3.0)
    matrix = rated(split)
    scores = scores_of_all(method, split)
    users, items = factors[0].user_factors.astype(float), factors[0].item_factors.astype(float)
    for item, column in zip(items, matrix.T, strict=True):
        weight = 1 + (method.alpha - 1) * column
        left = users.T @ (weight[:, None] * users) + method.regularization * np.eye(4)
        np.testing.assert_allclose(item, np.linalg.solve(left, users.T @ (weight * column)), atol=1e-3)
    np.testing.assert_allclose(scores, users @ items.T, atol=1e-5)


def test_als_depends_on_its_seed_alone(split):
    """One seed gives one model, another one another."""
    first, again, other = (scores_of_all(ALS(factors=4, seed=seed), split) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("method", [Popularity(), ItemKNN(), ALS(factors=8, seed=1)])
def test_methods_beat_chance(split, method):
    """With 40 negatives chance has 10 of 41 items."""
    assert evaluate(method.fit(split), split).hr > 0.35


@pytest.mark.parametrize("users_at_once", [1, 7, 1000])
def test_scores_do_not_depend_on_blocks(monkeypatch, users_at_once):
    """Nor is there ever a matrix of all users and items."""
    monkeypatch.setattr(baselines, "CELLS_AT_ONCE", users_at_once * 20)
    table = torch.rand(30, 20)
    asked = []
    scorer = RowScorer(lambda users: asked.append(len(users)) or table[users], 20)
    users, items = torch.randint(30, (18,)), torch.randint(20, (18, 5))
    assert (scorer(users, items) == table[users].gather(1, items)).all()
    assert max(asked) == min(users_at_once, 18)
    assert sum(asked) == 18


# --- the command line ---


def run_baselines(*arguments: object):
    return call("baselines.py", baselines.main, arguments)


def test_table_has_a_row_for_each_method(split_dir):
    """With the figures of our own evaluation."""
    outcome = run_baselines(split_dir, "-k", 1, 10)
    assert outcome.code == 0, outcome.err
    header, _, *rows, _, below = outcome.out.splitlines()
    assert header == "| Method | Settings | HR@1 | NDCG@1 | HR@10 | NDCG@10 | fit, s | evaluation, s |"
    assert [row.split(" | ")[0] for row in rows] == ["| popularity", "| knn", "| als"]
    split = load_split(split_dir)
    metrics = evaluate(Popularity().fit(split), split)
    assert f" | {100 * metrics.hr:.2f} | {100 * metrics.ndcg:.2f} | " in rows[0]
    assert "40 negatives per user, drawn with replacement; ties count against the test item." in below


def test_json_has_settings_and_metrics(split_dir):
    """Those given, and the others' defaults."""
    flags = ["--factors", 4, "--alpha", 2, "--similarity", "cosine", "--neighbours", 7, "-s", 3]
    outcome = run_baselines(split_dir, "--json", "--methods", "als", "knn", *flags)
    assert outcome.code == 0, outcome.err
    als, knn = json.loads(outcome.out)["methods"]
    assert knn["settings"] == {"similarity": "cosine", "neighbours": 7}
    expected = {"factors": 4, "alpha": 2.0, "seed": 3}
    assert als["settings"] == expected | {
        name: getattr(ALS, name) for name in ("iterations", "regularization")
    }
    split = load_split(split_dir)
    metrics = evaluate(ItemKNN("cosine", 7).fit(split), split)
    assert knn["metrics"] == [asdict(metrics)]


@pytest.mark.filterwarnings("error")
def test_blas_is_not_left_to_compete_with_threads_of_als(split, monkeypatch):
    """Implicit looks once in a process, and warns."""
    import implicit.utils

    monkeypatch.setattr(implicit.utils, "_checked_blas_config", False)
    ALS(factors=4, iterations=1).fit(split)
    assert implicit.utils._checked_blas_config


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--methods", "bpr"], "--methods"),
        (["-k", 0], "-k/--topk"),
        (["-k", 5, 5], "-k/--topk"),
        (["-k", 42], "-k/--topk"),  # of 41 candidates
        (["--neighbours", 0], "--neighbours"),
        (["--similarity", "jaccard"], "--similarity"),
        (["--factors", 0], "--factors"),
        (["--iterations", 0], "--iterations"),
        (["--regularization", 0], "--regularization"),
        (["--alpha", "nan"], "--alpha"),
        (["-s", -1], "-s/--seed"),
        (["--methods", "knn", "--factors", 4], "--factors"),
        (["--methods", "als", "popularity", "--neighbours", 4], "--neighbours"),
    ],
)
def test_bad_flag_is_named(split_dir, flags, named):
    """In one line."""
    outcome = run_baselines(split_dir, *flags)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert f"baselines.py: error: {named}" in outcome.err or f"argument {named}" in outcome.err


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("flags", [["--alpha", 1e38], ["--alpha", 1e300], ["--regularization", 1e300]])
def test_weight_without_a_solution_is_named(split_dir, flags):
    """Where float32 cannot hold what is solved; NumPy's warnings say nothing beside it."""
    outcome = run_baselines(split_dir, "--methods", "als", *flags)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("baselines.py: error: --alpha")


def test_directory_without_a_split_is_named(tmp_path):
    """As everywhere."""
    outcome = run_baselines(tmp_path)
    assert outcome.code == 2
    assert str(tmp_path) in outcome.err


def test_without_implicit_there_is_popularity_alone(split_dir, monkeypatch):
    """The others say what to install."""
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    assert run_baselines(split_dir, "--methods", "popularity").code == 0
    outcome = run_baselines(split_dir)
    assert outcome.code == 2
    assert outcome.err.endswith("pip install implicit\n")
    assert outcome.err.count("\n") == 1


def test_split_of_csv_files_alone(split_dir, tmp_path):
    """Gives the same scores."""
    for path in split_dir.glob("*.csv"):
        shutil.copy(path, tmp_path)
    rows = [run_baselines(d, "--methods", "knn", "--json").out for d in (split_dir, tmp_path)]
    first, second = (json.loads(row)["methods"][0]["metrics"] for row in rows)
    assert first == second
