"""Scorers of float models against the model called on one pair after another."""

from __future__ import annotations

import pytest
import torch
from helpers_quant import small_model
from torch import nn

from distiller.schedule import prepare_quantization_aware
from neural_cf.model import NeuMF, split_final_layer
from neural_cf.ranking import blocks
from neural_cf.ranking.blocks import InParts
from neural_cf.ranking.scorers import FactoredScorer, PairScorer, float_scorer

USERS = torch.tensor([3, 0, 3, 8])
ITEMS = torch.tensor([[6, 0, 1], [2, 2, 5], [4, 3, 6], [0, 1, 2]])


def pair_by_pair(model: NeuMF) -> torch.Tensor:
    rows = [
        [model(user[None], item[None], sigmoid=True) for item in row]
        for user, row in zip(USERS, ITEMS, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


class Recording(nn.Module):
    """Remembers what it is called on."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, users, items, sigmoid=False):
        assert sigmoid and not self.training
        self.calls.append((users.tolist(), items.tolist()))
        return (users * 10.0 + items)[:, None]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("layers", [(6, 5, 4), (2, 1), (8, 7, 6, 5, 3)])
def test_both_scorers_score_as_the_model_does(split, layers):
    """Each item for its row's user; users may repeat and stand in any order."""
    model = small_model(1, split, layers=layers)
    expected = pair_by_pair(model)
    for scorer in (PairScorer(model), FactoredScorer(model)):
        found = scorer(USERS, ITEMS)
        assert found.shape == ITEMS.shape
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_factored_in_double_precision_is_the_model_to_fifteen_digits():
    """The same algebra, so that nothing but rounding differs."""
    model = small_model(2).double()
    found = FactoredScorer(model)(USERS, ITEMS)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, pair_by_pair(model), rtol=0, atol=1e-15)


def test_split_final_layer_scores_alike():
    """The weights of either form are taken apart to the same ones."""
    model = small_model(3)
    split = small_model(3, split=True)
    split.load_state_dict(split_final_layer(model.state_dict()))
    torch.testing.assert_close(FactoredScorer(model)(USERS, ITEMS), FactoredScorer(split)(USERS, ITEMS))


def test_bfloat16_is_of_the_matrix_products_alone():
    """Scores come in float32 and are off by a rounding to 8 bits."""
    model = small_model(4, layers=(8, 8, 8), gain=0.5)
    exact, rounded = pair_by_pair(model), FactoredScorer(model, torch.bfloat16)(USERS, ITEMS)
    assert rounded.dtype == torch.float32
    difference = (rounded - exact).abs().max()
    assert 1e-6 < difference < 1e-2


def test_factored_scorer_keeps_model_and_its_weights():
    """Computing in place touches nothing that stays; scoring twice gives the same."""
    model = small_model(5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scorer = FactoredScorer(model)
    first = scorer(USERS, ITEMS)
    assert torch.equal(scorer(USERS, ITEMS), first)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_parts_are_of_whole_users(monkeypatch):
    """As many as fit, one at least; the last part is what is left."""
    model = Recording()
    monkeypatch.setitem(blocks.PAIRS_AT_ONCE, "cpu", 8)
    found = PairScorer(model)(USERS, ITEMS)
    assert [len(users) for users, _ in model.calls] == [6, 6]
    assert torch.equal(found, USERS[:, None] * 10.0 + ITEMS)
    monkeypatch.setitem(blocks.PAIRS_AT_ONCE, "cpu", 9)
    model.calls.clear()
    PairScorer(model)(USERS, ITEMS)
    assert [len(users) for users, _ in model.calls] == [9, 3]


def test_one_user_at_a_time():
    """For arithmetic that depends on the whole batch."""
    model = Recording()
    PairScorer(model, one_user=True)(USERS, ITEMS)
    assert model.calls == [
        ([user] * 3, row) for user, row in zip(USERS.tolist(), ITEMS.tolist(), strict=True)
    ]


def test_in_parts_hands_each_part_its_rows_of_every_tensor():
    sums = torch.arange(12.0).view(4, 3)
    found = InParts({"cpu": 3})(lambda a, b: a + b, sums, ITEMS)
    assert torch.equal(found, sums + ITEMS)


def test_what_rounds_is_not_factored():
    """A quantization-aware model is called as it was trained."""
    model = small_model(6)
    assert isinstance(float_scorer(model), FactoredScorer)
    prepare_quantization_aware(model, {})
    assert isinstance(float_scorer(model), PairScorer)
