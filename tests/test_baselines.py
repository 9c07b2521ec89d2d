"""baselines.py: its recommenders against what they are by definition, and its command line."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import call
from helpers_split import tiny_split

import baselines
from baselines import ALS, FactorScorer, ItemKNN, NeighbourScorer, Popularity, interactions
from dataset import load_split
from evaluation import evaluate

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
def test_similarities_are_their_definition(split, name):
    """Each item keeps its 5 greatest; which of equal ones is open."""
    vectors = weighted(name, rated(split))
    similarity = vectors @ vectors.T
    kept = ItemKNN(name, 5).fit(split)._similarity.toarray()
    np.testing.assert_allclose(np.sort(kept)[:, -5:], np.sort(similarity)[:, -5:], rtol=1e-6)
    assert ((kept > 0).sum(axis=1) == 5).all()
    np.testing.assert_allclose(kept[kept > 0], similarity[kept > 0], rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_item_knn_sums_similarities(split):
    """From what the user has rated to each item, over the rated item's neighbours; and nothing is warned of."""
    scorer = ItemKNN("bm25", 5).fit(split)
    items = torch.arange(split.nb_items).expand(split.nb_users, -1)
    scores = scorer(torch.arange(split.nb_users), items).numpy()
    np.testing.assert_allclose(scores, rated(split) @ scorer._similarity.toarray(), rtol=1e-9)


def test_als_minimizes_its_loss(split):
    """Every user's factors solve the weighted least squares that the items' factors leave (Hu et al. 2008, eq. 4)."""
    method = ALS(factors=4, iterations=60, regularization=0.5, alpha=3.0)
    matrix = rated(split)
    scorer = method.fit(split)
    users, items = scorer._user_factors.double().numpy(), scorer._item_factors.double().numpy()
    for user, row in zip(users, matrix, strict=True):
        weight = 1 + (method.alpha - 1) * row
        left = items.T @ (weight[:, None] * items) + 0.5 * np.eye(4)
        np.testing.assert_allclose(user, np.linalg.solve(left, items.T @ (weight * row)), atol=0.01)
    np.testing.assert_allclose(scores_of_all(method, split), users @ items.T, atol=1e-5)


def test_als_depends_on_its_seed_alone(split):
    """One seed gives one model, another one another."""
    first, again, other = (scores_of_all(ALS(factors=4, seed=seed), split) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("method", [Popularity(), ItemKNN(), ALS(factors=8, seed=1)])
def test_methods_beat_chance(split, method):
    """With 40 negatives chance has 10 of 41 items."""
    assert evaluate(method.fit(split), split).hr > 0.35


@pytest.mark.parametrize("method", [ItemKNN("cosine", 10), ALS(factors=4)])
def test_scores_do_not_depend_on_blocks(split, method, monkeypatch):
    """A few users at a time score as all at once."""
    whole = scores_of_all(method, split)
    monkeypatch.setattr(baselines, "CELLS_AT_ONCE", 3 * split.nb_items)
    monkeypatch.setattr(baselines, "PAIRS_AT_ONCE", {"cpu": 7 * split.nb_items})
    np.testing.assert_allclose(scores_of_all(method, split), whole, rtol=1e-5)


def test_item_knn_holds_a_block_of_users_at_a_time(split, monkeypatch):
    """Never a matrix of all users and items."""
    asked = []
    original = NeighbourScorer._scores
    monkeypatch.setattr(baselines, "CELLS_AT_ONCE", 10 * split.nb_items)
    monkeypatch.setattr(
        NeighbourScorer, "_scores", lambda *args: asked.append(len(args[1])) or original(*args)
    )
    evaluate(ItemKNN().fit(split), split)
    assert sum(asked) == split.nb_users
    assert max(asked) == 10


def test_factors_score_by_inner_products():
    """Of the user's and the item's."""
    scorer = FactorScorer(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0, 0.0], [2.0, 5.0]]))
    assert scorer(torch.tensor([1, 0]), torch.tensor([[0, 1], [1, 1]])).tolist() == [[3, 1], [12, 12]]


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
    assert knn["metrics"] == [{"k": 10, "hr": metrics.hr, "ndcg": metrics.ndcg}]


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
