"""Ranks and metrics against one-user-at-a-time references, and their independence of blocks."""

from __future__ import annotations

import heapq
import io
import math
from contextlib import redirect_stderr

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.model import NeuMF, sizes_from_state_dict
from neural_cf.ranking import candidates
from neural_cf.ranking.candidates import Candidates, first_places
from neural_cf.ranking.metrics import describe, metrics_of_ranks, results_of
from neural_cf.ranking.places import evaluate, place_last
from neural_cf.ranking.scorers import PairScorer
from neural_cf.split import Split, load_split


class Table(nn.Module):
    """Scores from a table of users and items; counts how many pairs it is asked for at once."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", torch.as_tensor(table, dtype=torch.float32))
        self.asked = []

    def forward(self, user, item, sigmoid=False):
        assert sigmoid, "candidates are scored with the final sigmoid"
        self.asked.append(len(user))
        return self.table[user, item].unsqueeze(1)


def rank_last(items: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Ranks by the sampled protocol."""
    return place_last(Candidates(items, scores, first_places(items))).ranks


def make_split(negatives: list[list[int]], test_items: list[int], nb_items: int) -> Split:
    """A split of these candidates; training pairs play no part."""
    nb_users = len(test_items)
    return Split(
        nb_users=nb_users,
        nb_items=nb_items,
        train_users=np.arange(nb_users, dtype=np.uint8),
        train_items=np.zeros(nb_users, dtype=np.uint8),
        test_items=np.array(test_items, dtype=np.uint8),
        negatives=np.array(negatives, dtype=np.uint8),
        distinct_negatives=False,
        seed=0,
        digest="",
        user_ids=None,
        item_ids=None,
    )


def reference_rank(candidates: list[int], scores: list[float]) -> int:
    """The last candidate's rank: repeated ones count once, at their first place."""
    seen: list[tuple[int, float]] = []
    for item, score in zip(candidates, scores, strict=True):
        if item not in [earlier for earlier, _ in seen]:
            seen.append((item, score))
    place = [item for item, _ in seen].index(candidates[-1])
    mine = seen[place][1]
    return sum(score > mine or (score == mine and i < place) for i, (_, score) in enumerate(seen))


def original_metrics(candidates: list[int], scores: list[float], k: int) -> tuple[float, float]:
    """A user's HR and NDCG as the original has them: a dictionary and the k largest of it."""
    score_of = dict(zip(candidates, scores, strict=True))
    ranked = heapq.nlargest(k, score_of, key=score_of.get)
    for place, item in enumerate(ranked):
        if item == candidates[-1]:
            return 1.0, math.log(2) / math.log(place + 2)
    return 0.0, 0.0


@st.composite
def users_with_candidates(draw):
    """Few items and few scores, so that both repeat; the test item may be among its own negatives."""
    nb_items = draw(st.integers(2, 12))
    nb_users = draw(st.integers(2, 6))
    nb_negatives = draw(st.integers(1, 25))
    item = st.integers(0, nb_items - 1)
    negatives = draw(
        st.lists(
            st.lists(item, min_size=nb_negatives, max_size=nb_negatives), min_size=nb_users, max_size=nb_users
        )
    )
    test_items = draw(st.lists(item, min_size=nb_users, max_size=nb_users))
    score = st.sampled_from([0.0, 0.25, 0.5, float(np.nextafter(np.float32(0.5), np.float32(1))), 1.0])
    table = draw(
        st.lists(st.lists(score, min_size=nb_items, max_size=nb_items), min_size=nb_users, max_size=nb_users)
    )
    return negatives, test_items, table


@settings(max_examples=300, deadline=None)
@given(users_with_candidates())
def test_rank_is_the_one_user_references(case):
    """With ties, repeated items and the test item among its own negatives."""
    negatives, test_items, table = case
    candidates = [[*row, item] for row, item in zip(negatives, test_items, strict=True)]
    scores = [[table[user][item] for item in row] for user, row in enumerate(candidates)]
    expected = [reference_rank(row, values) for row, values in zip(candidates, scores, strict=True)]
    assert rank_last(torch.tensor(candidates), torch.tensor(scores)).tolist() == expected


@settings(max_examples=300, deadline=None)
@given(users_with_candidates(), st.integers(1, 12), st.integers(1, 7))
def test_metrics_are_the_originals(case, k, block):
    """Means over users of the original's formulation, at any k and in blocks of any size."""
    negatives, test_items, table = case
    each = [
        original_metrics([*row, item], [table[user][i] for i in [*row, item]], k)
        for user, (row, item) in enumerate(zip(negatives, test_items, strict=True))
    ]
    split = make_split(negatives, test_items, len(table[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(candidates.SAMPLED_PAIRS_PER_BLOCK, "cpu", block * split.nb_candidates)
        metrics = evaluate(PairScorer(Table(table)), split, k)
    assert metrics.k == k
    assert metrics.hr == pytest.approx(sum(hr for hr, _ in each) / len(each), abs=1e-12)
    assert metrics.ndcg == pytest.approx(sum(ndcg for _, ndcg in each) / len(each), abs=1e-12)


@pytest.mark.parametrize(
    ("candidates", "scores", "rank"),
    [
        ([1, 2, 3, 9], [0.1, 0.2, 0.3, 0.9], 0),
        ([1, 2, 3, 9], [0.1, 0.95, 0.3, 0.9], 1),
        ([1, 2, 3, 9], [0.9, 0.9, 0.9, 0.9], 3),  # ties go against the test item
        ([9, 2, 3, 9], [0.9, 0.9, 0.9, 0.9], 0),  # unless it stands earlier
        ([1, 9, 3, 9], [0.9, 0.9, 0.9, 0.9], 1),
        ([2, 2, 2, 9], [0.95, 0.95, 0.95, 0.9], 1),  # a repeated item counts once
        ([2, 9, 2, 9], [0.9, 0.9, 0.9, 0.9], 1),  # at its first place
        ([9, 2, 2, 9], [0.9, 0.9, 0.9, 0.9], 0),
        ([9, 9, 9, 9], [0.1, 0.1, 0.1, 0.1], 0),
    ],
)
def test_rank_by_hand(candidates, scores, rank):
    """The cases that the protocol names."""
    assert rank_last(torch.tensor([candidates]), torch.tensor([scores])).tolist() == [rank]


def test_rank_does_not_change_its_arguments():
    """Evaluation must not write into what it reads."""
    items, scores = torch.tensor([[3, 1, 3, 2]]), torch.tensor([[0.5, 0.25, 0.5, 0.75]])
    copies = items.clone(), scores.clone()
    rank_last(items, scores)
    assert torch.equal(items, copies[0])
    assert torch.equal(scores, copies[1])


def test_hr_and_ndcg_by_hand():
    """Ranks 0, 1, 9 and 10 at k = 10: three hits, of gains 1, log 2 / log 3 and log 2 / log 11."""
    metrics = metrics_of_ranks(torch.tensor([0, 1, 9, 10]), 10)
    assert metrics.hr == 0.75
    assert metrics.ndcg == pytest.approx((1 + 0.6309297535714574 + 0.2890648263178879) / 4, abs=1e-12)
    assert metrics.mrr == pytest.approx((1 + 1 / 2 + 1 / 10) / 4, abs=1e-12)
    assert str(metrics) == "HR@10 = 0.7500, NDCG@10 = 0.4800"


def test_one_cutoff_is_described_without_mrr_and_several_with_it():
    """What is read by scripts stays as it was."""
    ranks = torch.tensor([0, 1, 9, 10])
    first, second = metrics_of_ranks(ranks, 10), metrics_of_ranks(ranks, 1)
    assert describe([first]) == "HR@10 = 0.7500, NDCG@10 = 0.4800"
    assert describe([second, first]) == (
        "HR@1 = 0.2500, NDCG@1 = 0.2500, MRR@1 = 0.2500, HR@10 = 0.7500, NDCG@10 = 0.4800, MRR@10 = 0.4000"
    )
    assert list(results_of([first])) == ["hr@10", "ndcg@10"]
    assert list(results_of([second, first])) == [
        f"{name}@{k}" for k in (1, 10) for name in ("hr", "ndcg", "mrr")
    ]


@pytest.mark.parametrize(
    ("k", "hr", "ndcg"), [(1, 0.25, 0.25), (2, 0.5, 0.40773243839286436), (11, 1.0, None)]
)
def test_k_sets_the_length_of_the_list(k, hr, ndcg):
    """A rank of k or more is no hit and no gain; k is in the text."""
    metrics = metrics_of_ranks(torch.tensor([0, 1, 9, 10]), k)
    assert metrics.hr == hr
    assert ndcg is None or metrics.ndcg == pytest.approx(ndcg, abs=1e-12)
    assert str(metrics).startswith(f"HR@{k} = {hr:.4f}, NDCG@{k} = ")


def test_gains_do_not_round_to_single_precision():
    """A sum over many users in float32 would show in the fourth decimal place."""
    ranks = torch.ones(2_000_000, dtype=torch.int64)
    assert metrics_of_ranks(ranks, 10).ndcg == pytest.approx(math.log(2) / math.log(3), abs=1e-12)


@pytest.fixture
def trained(split_dir, checkpoint):
    """The split and the model trained on it."""
    state_dict = load_checkpoint(checkpoint)["state_dict"]
    model = NeuMF(**sizes_from_state_dict(state_dict))
    model.load_state_dict(state_dict)
    return load_split(split_dir), model


@pytest.mark.parametrize("block", [1, 2, 7, 59, 60, 1000])
def test_metrics_do_not_depend_on_blocks(trained, block, monkeypatch):
    """A real model over users in blocks of any size, against one pair at a time."""
    split, model = trained
    model.eval()
    hr, ndcg = 0.0, 0.0
    with torch.no_grad():
        for user in range(split.nb_users):
            own = [*split.negatives[user].tolist(), int(split.test_items[user])]
            items = torch.tensor(own)
            scores = model(torch.full_like(items, user), items, sigmoid=True).squeeze(1).tolist()
            gain = original_metrics(own, scores, 10)
            hr, ndcg = hr + gain[0], ndcg + gain[1]
    monkeypatch.setitem(candidates.SAMPLED_PAIRS_PER_BLOCK, "cpu", block * split.nb_candidates)
    metrics = evaluate(PairScorer(model), split, 10)
    assert metrics.hr == pytest.approx(hr / split.nb_users, abs=1e-12)
    assert metrics.ndcg == pytest.approx(ndcg / split.nb_users, abs=1e-12)


def test_blocks_hold_no_more_pairs_than_the_limit(trained, monkeypatch):
    """So that memory stays small at any number of users; a user's candidates are never torn."""
    split, _ = trained
    asked = []

    def scorer(users, items):
        asked.append(tuple(items.shape))
        return torch.rand(items.shape)

    monkeypatch.setitem(candidates.SAMPLED_PAIRS_PER_BLOCK, "cpu", 3 * split.nb_candidates + 5)
    evaluate(scorer, split)
    assert set(asked) == {(3, split.nb_candidates)}
    monkeypatch.setitem(candidates.SAMPLED_PAIRS_PER_BLOCK, "cpu", 1)
    asked.clear()
    evaluate(scorer, split)
    assert set(asked) == {(1, split.nb_candidates)}


def test_evaluation_leaves_weights_and_split_alone(trained):
    """Nothing is written to, and no gradients are kept."""
    split, model = trained
    before = {key: value.clone() for key, value in model.state_dict().items()}
    negatives, test_items = split.negatives.copy(), split.test_items.copy()
    evaluate(PairScorer(model.train()), split)
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert np.array_equal(split.negatives, negatives)
    assert np.array_equal(split.test_items, test_items)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["test item", "negative"])
def test_score_that_is_not_finite_is_an_error(bad, place):
    """It has no rank, wherever it stands."""
    table = torch.full((2, 4), 0.5)
    table[1, 3 if place == "test item" else 1] = bad
    split = make_split([[0, 1], [1, 2]], [3, 3], 4)
    with pytest.raises(InputError, match="not finite"):
        evaluate(PairScorer(Table(table)), split, 2)


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_bar_shows_metrics_so_far():
    """HR and NDCG run along with it."""
    terminal = Terminal()
    split = make_split([[0, 1], [1, 2]], [3, 3], 4)
    with redirect_stderr(terminal):
        evaluate(PairScorer(Table(torch.arange(8.0).view(2, 4))), split, 2)
    assert "HR@2 = 1.0000, NDCG@2 = 1.0000" in terminal.getvalue()
