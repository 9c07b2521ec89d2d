"""Full ranking against a slow, obvious reference; scorers of items that users share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_quant import model_statistics, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distiller.quantization import PostTrainLinearQuantizer
from distiller.system.cli import InputError
from neural_cf.int8.engine import IntegerNeuMF
from neural_cf.ranking import blocks, candidates
from neural_cf.ranking.metrics import metrics_of_ranks
from neural_cf.ranking.places import Places, place_test_items, rank_test_items
from neural_cf.ranking.scorers import FactoredScorer, PairScorer
from neural_cf.runs.models import dummy_input
from neural_cf.runs.processes import Processes
from neural_cf.split import Split

LENGTH = 4


def make_split(trained: list[set[int]], test_items: list[int], nb_items: int) -> Split:
    """A split of these training items, in an order that is not the users'."""
    pairs = [(user, item) for user, items in enumerate(trained) for item in sorted(items)][::-1]
    users, items = np.array(pairs, dtype=np.uint8).T
    nb_users = len(test_items)
    return Split(
        nb_users=nb_users,
        nb_items=nb_items,
        train_users=users,
        train_items=items,
        test_items=np.array(test_items, dtype=np.uint8),
        negatives=np.zeros((nb_users, 1), dtype=np.uint8),
        distinct_negatives=False,
        seed=0,
        digest="",
        user_ids=None,
        item_ids=None,
    )


def table_scorer(table: list[list[float]]):
    """Looks scores up."""
    scores = torch.tensor(table, dtype=torch.float32)
    return lambda users, items: scores[users[:, None], items]


def reference(trained: set[int], test_item: int, scores: list[float]) -> tuple[int, int, int, list[int]]:
    """One user's rank, what is above and tied, and her list, one item after the other."""
    others = [item for item in range(len(scores)) if item not in trained and item != test_item]
    above = sum(scores[item] > scores[test_item] for item in others)
    tied = sum(scores[item] == scores[test_item] for item in others)
    best = sorted([*others, test_item], key=lambda item: (-scores[item], item == test_item, item))[:LENGTH]
    return above + tied, above, tied, best + [-1] * (LENGTH - len(best))


@st.composite
def cases(draw):
    """Few scores, so that they tie; negative ones too, and a test item that is among the training items."""
    nb_items, nb_users = draw(st.integers(2, 12)), draw(st.integers(1, 6))
    item = st.integers(0, nb_items - 1)
    trained = [draw(st.sets(item, min_size=1, max_size=nb_items)) for _ in range(nb_users)]
    score = st.sampled_from([-2.5, -1.0, -0.0, 0.0, 0.5, 1.0])
    table = [draw(st.lists(score, min_size=nb_items, max_size=nb_items)) for _ in range(nb_users)]
    return trained, [draw(item) for _ in range(nb_users)], table


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(1, 7))
def test_places_are_the_one_user_references(case, block):
    """In blocks of any size."""
    trained, test_items, table = case
    expected = [reference(*user) for user in zip(trained, test_items, table, strict=True)]
    split = make_split(trained, test_items, len(table[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(candidates.FULL_PAIRS_PER_BLOCK, "cpu", block * split.nb_items)
        places = place_test_items(table_scorer(table), split, ranking="full", length=LENGTH)
    assert list(zip(*(part.tolist() for part in places), strict=True)) == expected


def test_blocks_hold_no_more_pairs_than_the_limit(monkeypatch):
    """So that memory stays small at any number of users; one user's items are never torn."""
    split, asked = make_split([{0}] * 8, [1] * 8, 5), []

    def scorer(users: Tensor, items: Tensor) -> Tensor:
        asked.append(tuple(items.shape))
        return torch.rand(items.shape)

    monkeypatch.setitem(candidates.FULL_PAIRS_PER_BLOCK, "cpu", 19)
    rank_test_items(scorer, split, ranking="full")
    assert asked == [(3, 5), (3, 5), (2, 5)]


def test_score_that_is_not_finite_is_an_error():
    """Also of an item that does not count: the model is damaged."""
    with pytest.raises(InputError, match="not finite"):
        rank_test_items(table_scorer([[torch.nan, 0, 1]]), make_split([{0}], [1], 3), ranking="full")


def test_shares_of_processes_make_up_the_whole():
    """Each fills in its own users; the sum over processes is stood in for by addition."""
    trained, test_items = [{0}, {1, 2}, {3}, {0, 3}, {2}], [1, 0, 2, 1, 3]
    table = torch.randint(3, (5, 4), generator=torch.Generator().manual_seed(1)).tolist()
    split = make_split(trained, test_items, 4)

    class Share(Processes):
        def sum(self, tensors):
            """Nothing: what the others would add is added below."""

    whole = place_test_items(table_scorer(table), split, ranking="full", length=2)
    shares = [
        place_test_items(table_scorer(table), split, 10, "cpu", Share(rank, 2), None, "full", 2)
        for rank in (0, 1)
    ]
    summed = Places(*(a + b for a, b in zip(*shares, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(whole, summed, strict=True))


def test_full_ranking_by_hand():
    """Trained items do not count, and a tie goes against the test item."""
    split = make_split([{0, 3}], [2], 5)
    places = place_test_items(table_scorer([[9, 7, 5, 8, 5]]), split, ranking="full", length=2)
    assert [part.tolist() for part in places] == [[2], [1], [1], [[1, 4]]]
    assert metrics_of_ranks(places.ranks, 3).hr == 1


# --- items that users share ---

USERS = torch.tensor([3, 0, 8, 1, 4])


def scorers(split: bool):
    """Every kind of them, of a model of seven items."""
    model = small_model(1, split)
    statistics = model_statistics(model)
    for bits in (None, 4):
        quantized = small_model(1, split)
        PostTrainLinearQuantizer(
            quantized, mode="asym_u", model_activation_stats=statistics, embedding_bits=bits
        ).prepare_model(dummy_input(torch.device("cpu")))
        yield IntegerNeuMF(quantized)
        yield PairScorer(quantized)
    yield FactoredScorer(model)
    yield PairScorer(model)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("width", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("pairs", [1, 8, 1000])
def test_shared_items_are_scored_as_each_users_own(monkeypatch, split, width, pairs):
    """In tiles of any size; the last one overlaps."""
    shared = torch.arange(7).expand(len(USERS), -1)
    expected = [scorer(USERS, shared.contiguous()) for scorer in scorers(split)]
    monkeypatch.setitem(blocks.ITEMS_AT_ONCE, "cpu", width)
    for constant in (blocks.PAIRS_AT_ONCE, blocks.COMPILED_PAIRS_AT_ONCE):
        monkeypatch.setitem(constant, "cpu", pairs)
    for scorer, scores in zip(scorers(split), expected, strict=True):
        found = scorer(USERS, shared)
        if isinstance(scorer, IntegerNeuMF):
            assert torch.equal(found, scores)
        torch.testing.assert_close(found, scores, rtol=0, atol=1e-6)


def test_tiles_are_of_one_shape_but_for_the_last_users(monkeypatch):
    """What is compiled for one shape serves nearly all of them."""
    monkeypatch.setitem(blocks.ITEMS_AT_ONCE, "cpu", 3)
    shapes = []

    def compute(users: Tensor, items: Tensor) -> Tensor:
        shapes.append((len(users), *items.shape))
        return users[:, None] * 10 + items

    found = blocks.InParts({"cpu": 7})(compute, USERS, torch.arange(7).expand(5, -1))
    assert torch.equal(found, USERS[:, None] * 10 + torch.arange(7))
    assert shapes == [(2, 1, 3)] * 6 + [(1, 1, 3)] * 3
