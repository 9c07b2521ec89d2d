"""The model: its forward by hand, its weights' names and beginnings, its final layer split and joined."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.system.cli import InputError
from neural_cf.model import (
    NeuMF,
    is_split,
    join_final_layer,
    sizes_from_state_dict,
    split_final_layer,
    with_final_layer,
)

USERS, ITEMS, FACTORS, LAYERS = 7, 9, 5, [12, 6, 4]
EMBEDDINGS = [
    "mf_user_embed.weight",
    "mf_item_embed.weight",
    "mlp_user_embed.weight",
    "mlp_item_embed.weight",
]


def make(split_final: bool = False, seed: int = 0, layers: list[int] = LAYERS) -> NeuMF:
    """A model whose weights are all far from 0."""
    torch.manual_seed(seed)
    model = NeuMF(USERS, ITEMS, FACTORS, layers, split_final)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def all_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Every user with every item."""
    users = torch.arange(USERS).repeat_interleave(ITEMS)
    return users, torch.arange(ITEMS).repeat(USERS)


def by_hand(state_dict: dict, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Logits of NeuMF in NumPy, in float64."""
    weight = {key: value.double().numpy() for key, value in state_dict.items()}
    mf = weight["mf_user_embed.weight"][users] * weight["mf_item_embed.weight"][items]
    hidden = np.concatenate(
        [weight["mlp_user_embed.weight"][users], weight["mlp_item_embed.weight"][items]], axis=1
    )
    layer = 0
    while f"mlp.{layer}.weight" in weight:
        hidden = np.maximum(hidden @ weight[f"mlp.{layer}.weight"].T + weight[f"mlp.{layer}.bias"], 0)
        layer += 1
    if "final.weight" in weight:
        return np.concatenate([mf, hidden], axis=1) @ weight["final.weight"].T + weight["final.bias"]
    by_mf = mf @ weight["final_mf.weight"].T + weight["final_mf.bias"]
    return by_mf + hidden @ weight["final_mlp.weight"].T + weight["final_mlp.bias"]


# --- forward ---


@pytest.mark.parametrize("split_final", [False, True])
@pytest.mark.parametrize("layers", [[2, 1], [12, 6, 4], [8, 16, 3, 5]])
def test_forward_is_neumf_by_hand(split_final, layers):
    """Logits, and probabilities with ``sigmoid``, of every pair."""
    model = make(split_final, layers=layers)
    users, items = all_pairs()
    expected = by_hand(model.state_dict(), users.numpy(), items.numpy())
    with torch.no_grad():
        logits, scores = model(users, items), model(users, items, sigmoid=True)
    assert logits.shape == scores.shape == (USERS * ITEMS, 1)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores.numpy(), 1 / (1 + np.exp(-expected)), rtol=1e-4, atol=1e-5)


def test_forward_gives_logits_by_default():
    """The sigmoid is asked for."""
    users, items = all_pairs()
    model = make()
    assert torch.equal(model(users, items), model(users, items, False))
    assert not torch.equal(model(users, items), model(users, items, True))


@pytest.mark.parametrize("sigmoid", [False, True])
def test_forward_leaves_weights_alone(sigmoid):
    """The first call as any later one."""
    model = make(True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    users, items = all_pairs()
    first = model(users, items, sigmoid)
    assert torch.equal(first, model(users, items, sigmoid))
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_parameter_takes_part():
    """None is left without a gradient."""
    for split_final in (False, True):
        model = make(split_final)
        model(*all_pairs()).sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_half_precision_scores_are_in_half_precision():
    """In the weights' own type."""
    assert make().half()(*all_pairs(), sigmoid=True).dtype == torch.float16


# --- names and beginnings ---


def names(split_final: bool) -> list[str]:
    """Keys of a state dictionary of two MLP layers."""
    finals = ["final_mlp", "final_mf"] if split_final else ["final"]
    layers = [f"{layer}.{part}" for layer in ["mlp.0", "mlp.1", *finals] for part in ("weight", "bias")]
    return EMBEDDINGS + layers


@pytest.mark.parametrize("split_final", [False, True])
def test_state_dict_has_the_originals_keys_and_shapes(split_final):
    """And no others."""
    state_dict = make(split_final).state_dict()
    assert sorted(state_dict) == sorted(names(split_final))
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    expected = {
        "mf_user_embed.weight": (7, 5),
        "mf_item_embed.weight": (9, 5),
        "mlp_user_embed.weight": (7, 6),
        "mlp_item_embed.weight": (9, 6),
        "mlp.0.weight": (6, 12),
        "mlp.0.bias": (6,),
        "mlp.1.weight": (4, 6),
        "mlp.1.bias": (4,),
        "final.weight": (1, 9),
        "final.bias": (1,),
        "final_mf.weight": (1, 5),
        "final_mf.bias": (1,),
        "final_mlp.weight": (1, 4),
        "final_mlp.bias": (1,),
    }
    assert shapes == {key: expected[key] for key in names(split_final)}


@pytest.mark.parametrize(
    ("split_final", "ends"),
    [(False, ["final_concat", "final"]), (True, ["final_mlp", "final_mf", "final_add"])],
)
def test_modules_are_in_the_order_of_the_statistics_file(split_final, ends):
    """Of ``named_modules``, all of them and the leaves."""
    found = [name for name, _ in make(split_final).named_modules() if name]
    start = ["mf_user_embed", "mf_item_embed", "mlp_user_embed", "mlp_item_embed", "mf_mult", "mlp_concat"]
    layers = ["mlp", "mlp.0", "mlp.1", "mlp_relu", "mlp_relu.0", "mlp_relu.1"]
    assert found == [*start, *layers, *ends, "sigmoid"]


@pytest.mark.parametrize("split_final", [False, True])
def test_weights_begin_where_the_original_begins(split_final):
    """Embeddings normal of deviation 0.01, MLP Glorot uniform, final LeCun uniform."""
    torch.manual_seed(3)
    model = NeuMF(3000, 2000, 32, [128, 96, 64], split_final)
    state_dict = model.state_dict()
    for key in EMBEDDINGS:
        values = state_dict[key]
        assert abs(values.mean()) < 5 * 0.01 / math.sqrt(values.numel())
        assert abs(values.std() / 0.01 - 1) < 5 / math.sqrt(2 * values.numel())
        assert values.abs().max() > 0.035  # no normal deviate is that rare; a uniform one ends at 0.0173
    for key, fan_in, fan_out in (("mlp.0.weight", 128, 96), ("mlp.1.weight", 96, 64)):
        assert_uniform(state_dict[key], math.sqrt(6 / (fan_in + fan_out)))
    if split_final:
        assert all(state_dict[f"final_{branch}.weight"].any() for branch in ("mf", "mlp"))
    else:
        assert_uniform(state_dict["final.weight"], math.sqrt(3 / 96))


def assert_uniform(values: torch.Tensor, bound: float) -> None:
    """Within a bound, up to it, and of a uniform distribution's deviation."""
    count = values.numel()
    assert bound * (1 - 10 / count) < values.abs().max() <= bound
    assert abs(values.mean()) < 5 * bound / math.sqrt(3 * count)
    assert abs(values.std() * math.sqrt(3) / bound - 1) < 5 / math.sqrt(5 * count) + 1 / count


def test_same_seed_begins_with_the_same_weights():
    """And another with others."""

    def begin(seed: int) -> dict:
        torch.manual_seed(seed)
        return NeuMF(USERS, ITEMS, FACTORS, LAYERS).state_dict()

    first, second, other = begin(1), begin(1), begin(2)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


# --- split and joined ---


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_split_and_joined_score_the_same(seed, split_final):
    """In FP32, from either to the other."""
    model, other = make(split_final, seed), make(not split_final, seed + 1)
    other.load_state_dict(with_final_layer(model.state_dict(), not split_final))
    users, items = all_pairs()
    with torch.no_grad():
        torch.testing.assert_close(model(users, items), other(users, items), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(users, items, True), other(users, items, True), rtol=1e-5, atol=1e-6)


def test_split_weights_are_mf_then_mlp_and_half_the_bias_each():
    """By hand."""
    joined = make().state_dict()
    split = split_final_layer(joined)
    assert sorted(split) == sorted(names(True))
    assert torch.equal(split["final_mf.weight"], joined["final.weight"][:, :FACTORS])
    assert torch.equal(split["final_mlp.weight"], joined["final.weight"][:, FACTORS:])
    for branch in ("mf", "mlp"):
        assert torch.equal(split[f"final_{branch}.bias"], joined["final.bias"] / 2)


def test_joined_weights_are_mf_then_mlp_and_the_sum_of_the_biases():
    """By hand."""
    split = make(True).state_dict()
    joined = join_final_layer(split)
    assert sorted(joined) == sorted(names(False))
    assert torch.equal(joined["final.weight"][:, :FACTORS], split["final_mf.weight"])
    assert torch.equal(joined["final.weight"][:, FACTORS:], split["final_mlp.weight"])
    assert torch.equal(joined["final.bias"], split["final_mf.bias"] + split["final_mlp.bias"])


def test_there_and_back_again_is_exact():
    """Every weight, and the bias of a layer that began joined."""
    joined = make().state_dict()
    again = join_final_layer(split_final_layer(joined))
    assert sorted(again) == sorted(joined)
    assert all(torch.equal(again[key], joined[key]) for key in joined)
    split = make(True).state_dict()
    again = split_final_layer(join_final_layer(split))
    assert sorted(again) == sorted(split)
    assert all(torch.equal(again[key], split[key]) for key in split if not key.startswith("final_m"))
    assert all(
        torch.equal(again[f"final_{branch}.weight"], split[f"final_{branch}.weight"])
        for branch in ("mf", "mlp")
    )


@pytest.mark.parametrize("split_final", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_conversion_leaves_the_callers_weights_alone(split_final, wanted):
    """Its dictionary, and its final layer, whatever becomes of the result."""
    state_dict = make(split_final).state_dict()
    copies = {key: value.clone() for key, value in state_dict.items()}
    result = with_final_layer(state_dict, wanted)
    assert is_split(result) == wanted
    assert is_split(state_dict) == split_final
    if split_final != wanted:
        for key, value in result.items():
            if key.startswith("final"):
                value.fill_(7)
    result["more"] = torch.zeros(1)
    assert list(state_dict) == list(copies)
    assert all(torch.equal(state_dict[key], copies[key]) for key in copies)


# --- sizes ---


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 6).map(lambda half: 2 * half),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.booleans(),
)
def test_sizes_are_read_off_the_weights(users, items, factors, first, rest, split_final):
    """The constructor's arguments, so that a checkpoint is enough to make the model again."""
    model = NeuMF(users, items, factors, [first, *rest], split_final)
    sizes = sizes_from_state_dict(model.state_dict())
    assert sizes == {
        "nb_users": users,
        "nb_items": items,
        "mf_dim": factors,
        "mlp_layer_sizes": [first, *rest],
        "split_final": split_final,
    }
    NeuMF(**sizes).load_state_dict(model.state_dict())


@pytest.mark.parametrize("key", names(False))
def test_weights_with_a_key_missing_are_refused(key):
    """Whichever it is."""
    state_dict = make().state_dict()
    del state_dict[key]
    with pytest.raises(InputError):
        sizes_from_state_dict(state_dict)


@pytest.mark.parametrize("key", names(False))
@pytest.mark.parametrize("shape", [(), (3,), (0, 0), (2, 3), (2, 3, 4)])
def test_weights_with_a_shape_that_does_not_fit_are_refused(key, shape):
    """Whichever it is, in any number of dimensions."""
    state_dict = make().state_dict()
    state_dict[key] = torch.zeros(shape)
    with pytest.raises(InputError):
        sizes_from_state_dict(state_dict)


def test_weights_of_both_kinds_or_more_are_refused():
    """A final layer and its halves, or a layer out of the row."""
    both = make().state_dict() | make(True).state_dict()
    with pytest.raises(InputError):
        sizes_from_state_dict(both)
    with pytest.raises(InputError, match=r"mlp\.5\.weight"):
        sizes_from_state_dict(make().state_dict() | {"mlp.5.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("split_final", [False, True])
def test_squared_norms(split_final):
    """Worked out; and as they were where embeddings grow and the final layer shrinks."""
    model = NeuMF(2, 2, 2, [2, 1], split_final)
    final = model.final_mf if split_final else model.final
    with torch.no_grad():
        final.weight[0, :2] = torch.tensor([-2.0, 0.5])
    rows = [torch.tensor([row]) for row in ([1.0, 2.0], [3.0, -4.0], [5.0], [6.0])]
    # 2 (1 + 9) + 0.5 (4 + 16) + 25 + 36
    assert model.squared_norms(*rows).tolist() == [91.0]
    with torch.no_grad():
        final.weight[0, :2] /= 4
    assert model.squared_norms(2 * rows[0], 2 * rows[1], *rows[2:]).tolist() == [91.0]


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((7, 9, 5, [11, 4]), "--layers"),
        ((7, 9, 5, [0, 4]), "--layers"),
        ((7, 9, 5, [12, 0, 4]), "--layers"),
        ((7, 9, 5, [12, -4]), "--layers"),
        ((7, 9, 5, []), "--layers"),
        ((7, 9, 0, [0]), "--factors"),
        ((7, 9, 5, [0, 0]), "--layers"),
        ((7, 9, 5, [12]), "--layers"),
        ((7, 9, 5, [0], True), "--split-final"),
        ((7, 9, 0, [12, 4], True), "--split-final"),
        ((7, 9, -1, [12, 4]), "--factors"),
        ((0, 9, 5, [12, 4]), "users"),
        ((7, 0, 5, [12, 4]), "items"),
    ],
)
def test_sizes_that_no_model_has_are_refused(sizes, name):
    """With the flag's name."""
    with pytest.raises(InputError, match=name):
        NeuMF(*sizes)
