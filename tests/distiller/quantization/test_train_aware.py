"""Quantization-aware training: what rounds, by which moving range, and what gradients see of it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers_quant import MODES, Grid, all_pairs, grid_of, quantized, restored, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from distiller.modules import EltwiseMult
from distiller.quantization.train_aware import (
    NCFQuantAwareTrainQuantizer,
    is_quantization_aware,
    without_ranges,
)
from distiller.system.cli import InputError
from neural_cf.model import NeuMF

FLOAT_WEIGHTS = {"bits_weights": 0, "bits_bias": 0}
PAIRS = all_pairs(small_model(0))
EMBEDDINGS = ["mf_user_embed", "mf_item_embed", "mlp_user_embed", "mlp_item_embed"]


class Parts(nn.Module):
    """One of each kind of layer, to be called one by one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.linear = nn.Linear(3, 4)
        self.relu = nn.ReLU()
        self.mult = EltwiseMult()


def prepared(model: nn.Module, **arguments) -> nn.Module:
    """The model, made quantization-aware in place."""
    NCFQuantAwareTrainQuantizer(model, **arguments).prepare_model()
    return model


def trainable(seed: int = 3, split: bool = False) -> NeuMF:
    """A small NeuMF whose parameters ask for gradients."""
    return small_model(seed, split).requires_grad_(True).train()


def output(model: nn.Module, values: list[float] | Tensor) -> Tensor:
    """What the multiplication hands out for these values, times one."""
    x = torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1)
    return model.mult(x, torch.ones_like(x)).flatten()


def tracker(batches: list[list[float]], **arguments) -> nn.Module:
    """Parts, in evaluation mode after its multiplication saw some batches in training mode."""
    model = prepared(Parts(), **arguments).train()
    for batch in batches:
        output(model, batch)
    return model.eval()


def bounds(model: nn.Module) -> tuple[float, float]:
    """The tracked range, as far as the levels resolve it: what far too low and far too high values become."""
    return tuple(output(model, [-1e6, 1e6]).tolist())


def saturated(grid: Grid, x: np.ndarray, low: float, high: float) -> np.ndarray:
    """The definition: clamped to the range, on the grid."""
    return restored(quantized(np.clip(x, np.float32(low), np.float32(high)), grid), grid)


def rounded(tensor: Tensor, bits: int, mode: str, per_row: bool = False) -> np.ndarray:
    """A weight on its own grid."""
    x = tensor.detach().numpy()
    if per_row:
        return np.stack(
            [restored(quantized(row, g), g) for row in x for g in [grid_of_array(row, bits, mode)]]
        )
    grid = grid_of_array(x, bits, mode)
    return restored(quantized(x, grid), grid)


def grid_of_array(x: np.ndarray, bits: int, mode: str) -> Grid:
    return grid_of(x.min(), x.max(), bits, mode)


def close(actual: Tensor, expected: np.ndarray) -> None:
    """Equal but for the last bits of float32."""
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


# --- tracked ranges ---


def test_range_is_a_moving_average_with_bias_correction():
    """By hand, with d = 1/2: of minima -1, -3, 0 and of maxima 2, 1, 4."""
    batches = [[-1, 0.5, 2], [-3, 1, 0], [4, 0, 3]]
    # e: -1/2, then -1/4 - 3/2, then -7/8; 1, then 1/2 + 1/2, then 1/2 + 2. Divided by 1/2, 3/4, 7/8.
    expected = [(-1, 2), (-7 / 3, 4 / 3), (-1, 20 / 7)]
    for count, (low, high) in enumerate(expected, 1):
        model = tracker(batches[:count], bits_activations=16, mode="asym_u", ema_decay=0.5)
        step = (high - low) / (2**16 - 1)
        assert bounds(model) == (pytest.approx(low, abs=step), pytest.approx(high, abs=step))


def test_symmetric_range_reaches_as_far_as_the_wider_bound():
    """Of the tracked -7/3 and 4/3 of the test above, 7/3 both ways."""
    model = tracker([[-1, 2], [-3, 1]], bits_activations=16, mode="sym_restr", ema_decay=0.5)
    assert bounds(model) == (pytest.approx(-7 / 3, abs=1e-4), pytest.approx(7 / 3, abs=1e-4))


def test_default_decay_is_0_999():
    """The second batch weighs 0.001 / (1 - 0.999^2) = 1 / 1.999."""
    model = tracker([[0, 1], [0, 3]], bits_activations=16, mode="asym_u")
    assert bounds(model)[1] == pytest.approx((0.999 * 1 + 3) / 1.999, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([0.1, 0.5, 0.9, 0.999]),
    st.lists(
        st.lists(st.integers(-512, 512).map(lambda n: n / 64), min_size=1, max_size=4), min_size=1, max_size=6
    ),
)
def test_range_of_any_batches_is_that_of_the_formula(decay, batches):
    """In float64."""
    low = high = 0.0
    for batch in batches:
        low = decay * low + (1 - decay) * min(batch)
        high = decay * high + (1 - decay) * max(batch)
    correction = 1 - decay ** len(batches)
    low, high = low / correction, high / correction
    step = max((max(high, 0) - min(low, 0)) / (2**16 - 1), 1e-5)
    found = bounds(tracker(batches, bits_activations=16, mode="asym_u", ema_decay=decay))
    assert found == (pytest.approx(low, abs=2 * step), pytest.approx(high, abs=2 * step))


def test_same_range_in_every_batch_stays_that_range():
    """From the first batch to the thousandth."""
    for count in (1, 2, 1000):
        model = tracker([[-0.25, 0.75]] * count, bits_activations=16, mode="asym_s")
        assert bounds(model) == (pytest.approx(-0.25, abs=3e-5), pytest.approx(0.75, abs=3e-5))


def test_batch_at_hand_counts_for_its_own_range():
    """The first batch is not clamped; the second with a range between its own and the first's."""
    model = prepared(Parts(), bits_activations=16, mode="asym_u", ema_decay=0.5).train()
    np.testing.assert_allclose(output(model, [-1, 0.5, 2]), [-1, 0.5, 2], atol=1e-4)
    np.testing.assert_allclose(output(model, [-3, 1, 0]), [-7 / 3, 1, 0], atol=1e-4)


def test_ranges_move_in_training_mode_only():
    """Whatever evaluation sees."""
    model = prepared(trainable(), ema_decay=0.9)
    model(*PAIRS)
    before = copy.deepcopy(model.state_dict())
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3  # other activations
        model(*PAIRS)
        for parameter in model.parameters():
            parameter /= 3
    after = model.state_dict()
    ranges = before.keys() - without_ranges(before).keys()
    assert ranges
    assert all(torch.equal(before[key], after[key]) for key in ranges)
    model.train()
    model(*PAIRS)
    assert any(not torch.equal(before[key], model.state_dict()[key]) for key in ranges)


def test_each_layer_has_a_range_of_its_own():
    """One layer's batches do nothing to another's."""
    model = prepared(Parts(), bits_activations=16, mode="asym_u").train()
    model.relu(torch.tensor([0.0, 5.0]))
    output(model, [-1, 1])
    model.eval()
    assert model.relu(torch.tensor([99.0])).item() == pytest.approx(5, abs=1e-3)
    assert bounds(model) == (pytest.approx(-1, abs=1e-4), pytest.approx(1, abs=1e-4))


def test_evaluation_before_training_leaves_outputs_alone():
    """To the bit, where weights are float too; and it leaves no range behind."""
    for split in (False, True):
        plain = small_model(4, split)
        model = prepared(copy.deepcopy(plain), **FLOAT_WEIGHTS).eval()
        before = copy.deepcopy(model.state_dict())
        assert torch.equal(model(*PAIRS), plain(*PAIRS))
        assert torch.equal(model(*PAIRS, True), plain(*PAIRS, True))
        assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


# --- levels ---


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_clamped_and_on_the_grid(mode, bits):
    """Of the tracked range -7/3 .. 4/3; a symmetric range is the wider bound's, both ways."""
    model = tracker([[-1, 2], [-3, 1]], bits_activations=bits, mode=mode, ema_decay=0.5)
    low, high = -7 / 3, 4 / 3
    grid = grid_of(np.float32(low), np.float32(high), bits, mode)
    if mode.startswith("sym"):
        low, high = -7 / 3, 7 / 3
    # None of them half-way between levels, where the last bit of the scale decides.
    x = np.random.default_rng(bits).uniform(-4, 4, 500).astype(np.float32)
    x = x[np.abs((grid.scale * np.clip(x, low, high)) % 1 - 0.5) > 1e-3]
    result = output(model, torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(result, saturated(grid, x, low, high), rtol=1e-5, atol=1e-6)
    whole = result * grid.scale - grid.zero
    np.testing.assert_allclose(whole, whole.round(), atol=1e-3)
    assert grid.low <= whole.round().min() <= whole.round().max() <= grid.high


@pytest.mark.parametrize("mode", ["asym_u", "asym_s"])
def test_range_that_lacks_0_clamps_to_the_range(mode):
    """Although the grid contains 0."""
    model = tracker([[1, 2, 1.5]], bits_activations=8, mode=mode)
    np.testing.assert_allclose(output(model, [0, -5, 1.5, 7]), [1, 1, 1.5, 2], atol=2 / 255)
    model = tracker([[-1, -2, -1.5]], bits_activations=8, mode=mode)
    np.testing.assert_allclose(output(model, [0, 5, -1.5, -7]), [-1, -1, -1.5, -2], atol=2 / 255)


def test_modes_may_differ_between_activations_and_weights():
    """As a map of both."""
    model = prepared(
        Parts(), bits_activations=2, bits_weights=2, mode={"activations": "asym_u", "weights": "sym_restr"}
    ).train()
    # Three steps over 0 .. 3, where sym_restr has the levels -3, 0, 3 only.
    np.testing.assert_allclose(output(model, [0, 1.2, 2.2, 3]), [0, 1, 2, 3], atol=1e-6)
    table = model.embedding(torch.arange(5))
    close(table, rounded(model.embedding.weight, 2, "sym_restr"))


# --- weights ---


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_are_rounded_per_channel_for_linear_alone(mode, bits, per_channel):
    """An embedding's table has one range even so; a bias is symmetric over the whole of it."""
    model = prepared(
        trainable(),
        bits_activations=0,
        bits_weights=bits,
        bits_bias=0,
        mode=mode,
        per_channel_wts=per_channel,
    )
    for name in EMBEDDINGS:
        layer = model.get_submodule(name)
        table = layer(torch.arange(len(layer.weight)))
        close(table, rounded(layer.weight, bits, mode))
    for name in ("mlp.0", "mlp.1", "final"):
        layer = model.get_submodule(name)
        product = layer(torch.eye(layer.weight.shape[1])) - layer.bias
        close(product.T, rounded(layer.weight, bits, mode, per_row=per_channel))


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_bias_is_rounded(bits):
    """Symmetric, one range over the whole of it."""
    model = prepared(trainable(), bits_activations=0, bits_weights=0, bits_bias=bits)
    layer = model.get_submodule("mlp.0")
    zero_input = torch.zeros(1, layer.weight.shape[1])
    reach = np.abs(layer.bias.detach().numpy()).max()
    grid = grid_of(-reach, reach, bits, "sym")
    expected = restored(quantized(layer.bias.detach().numpy(), grid), grid)
    close(layer(zero_input)[0], expected)
    assert bits == 32 or not torch.equal(layer(zero_input)[0], layer.bias)


def test_forward_leaves_the_float_weights_as_they_are():
    """They are rounded on the way, not in place."""
    model = prepared(trainable(), bits_activations=4, bits_weights=2, bits_bias=2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for training in (True, False):
        model.train(training)
        model(*PAIRS)
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


# --- which layers ---


def quantized_outputs(model: NeuMF, plain: NeuMF) -> set[str]:
    """Names of the layers whose output is not just what the float layer makes of the same inputs."""
    names = [name for name, module in plain.named_modules() if not any(module.children())]
    found = {}

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple, result: Tensor) -> None:
            found[name] = not torch.equal(plain.get_submodule(name)(*inputs), result)

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    with torch.no_grad():
        model(*PAIRS, True)
    assert found.keys() == set(names)
    return {name for name, differs in found.items() if differs}


MLP = {"mf_mult", "mlp_concat", "mlp.0", "mlp.1", "mlp_relu.0", "mlp_relu.1"}
ENDS = {False: {"final_concat", "final"}, True: {"final_mlp", "final_mf"}}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_of_relu_linear_mult_and_concat_are_quantized_and_no_others(split, training):
    """Not those of embeddings, of the addition, of the sigmoid."""
    plain = small_model(5, split)
    model = prepared(copy.deepcopy(plain), bits_activations=3, mode="asym_u", **FLOAT_WEIGHTS).train()
    model(*PAIRS)
    assert quantized_outputs(model.train(training), plain) == MLP | ENDS[split]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", ["asym_u", "sym_restr"])
def test_each_quantized_output_has_as_many_levels_as_its_bits_allow(split, mode):
    """Evenly spaced, 0 among them, of all layers whose output is quantized."""
    model = prepared(small_model(5, split), bits_activations=3, mode=mode, **FLOAT_WEIGHTS).train()
    seen: dict[str, Tensor] = {}
    for name in MLP | ENDS[split]:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, result, name=name: seen.update({name: result.unique()})
        )
    model(*PAIRS)
    model.eval()(*PAIRS)
    assert seen.keys() == MLP | ENDS[split]
    for levels in seen.values():
        assert 2 < len(levels) <= 8
        low, high = min(levels.min(), 0), max(levels.max(), 0)
        steps = levels * (7 / (high - low) if mode == "asym_u" else 3 / max(-low, high))
        np.testing.assert_allclose(steps, steps.round(), atol=1e-4)


@pytest.mark.parametrize("split", [False, True])
def test_weights_alone_change_embeddings_and_linear_alone(split):
    """Activations stay float at 0 bits."""
    plain = small_model(5, split)
    model = prepared(copy.deepcopy(plain), bits_activations=0, bits_weights=3, bits_bias=0)
    linear = {"mlp.0", "mlp.1"} | (ENDS[split] - {"final_concat"})
    assert quantized_outputs(model, plain) == {*EMBEDDINGS, *linear}
    assert without_ranges(model.state_dict()).keys() == model.state_dict().keys()


@pytest.mark.parametrize("none", [0, None])
@pytest.mark.parametrize("split", [False, True])
def test_zero_bits_are_float(none, split):
    """All of them: the float model's bits, in training too."""
    plain = small_model(6, split)
    model = prepared(copy.deepcopy(plain), bits_activations=none, bits_weights=none, bits_bias=none)
    for training in (True, False):
        model.train(training)
        assert torch.equal(model(*PAIRS), plain(*PAIRS))
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("split", [False, True])
def test_parameters_are_the_same_objects_by_the_same_names(split):
    """In the same order, so that an optimizer and its saved state see no difference."""
    model = trainable(split=split)
    before = list(model.named_parameters())
    prepared(model)
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(old is new for (_, old), (_, new) in zip(before, after, strict=True))


@pytest.mark.parametrize("split", [False, True])
def test_without_ranges_is_the_state_of_a_float_model(split):
    """It loads, and holds the float copies."""
    model = prepared(trainable(split=split), bits_weights=2)
    model(*PAIRS)
    state = model.state_dict()
    plain = small_model(99, split)
    weights = without_ranges(state)
    assert weights.keys() == plain.state_dict().keys() < state.keys()
    plain.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        assert torch.equal(plain.get_parameter(name), parameter)


@pytest.mark.parametrize("split", [False, True])
def test_state_dict_has_all_that_evaluation_needs(split):
    """Loaded into a model of other weights, it scores the same bits."""
    arguments = {"bits_activations": 4, "bits_weights": 4, "mode": "asym_s", "ema_decay": 0.5}
    model = prepared(trainable(split=split), **arguments)
    for _ in range(3):
        model(*PAIRS)
    other = prepared(trainable(seed=8, split=split), **arguments)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(*PAIRS), model.eval()(*PAIRS))
    other.train()
    model.train()  # and their ranges move on alike
    assert torch.equal(other(*PAIRS), model(*PAIRS))


def test_model_says_whether_it_is_quantization_aware():
    """Once prepared, in either mode."""
    model = trainable()
    assert not is_quantization_aware(model)
    prepared(model)
    assert is_quantization_aware(model)
    assert is_quantization_aware(model.eval())


# --- gradients ---


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("mode", ["asym_u", "asym_s"])
def test_gradient_passes_inside_the_range_and_stops_outside(mode, bits):
    """Of a range -7/3 .. 4/3: as it is where nothing is clamped, else zero."""
    model = tracker([[-1, 2], [-3, 1]], bits_activations=bits, mode=mode, ema_decay=0.5)
    x = torch.tensor([-9.0, -2.4, -2.3, -0.7, 0.0, 0.01, 1.3, 1.4, 50.0], requires_grad=True)
    weights = torch.arange(1.0, 10.0)
    (output(model, x) * weights).sum().backward()
    assert torch.equal(x.grad, weights * torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 0, 0]))


@pytest.mark.parametrize("mode", ["sym", "sym_restr"])
def test_gradient_of_a_symmetric_range_stops_at_its_reach(mode):
    """7/3 both ways; what rounds beyond the greatest integer is still inside."""
    model = tracker([[-1, 2], [-3, 1]], bits_activations=3, mode=mode, ema_decay=0.5)
    x = torch.tensor([-2.4, -2.3, 0.0, 1.4, 2.3, 2.4], requires_grad=True)
    output(model, x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1, 1, 1, 1, 0]))


def test_gradient_in_training_mode_sees_the_range_of_that_batch():
    """-3 lies outside of -7/3 .. 4/3."""
    model = prepared(Parts(), bits_activations=8, mode="asym_u", ema_decay=0.5).train()
    output(model, [-1, 2])
    x = torch.tensor([-3.0, -1, 1], requires_grad=True)
    output(model, x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1, 1]))


def test_gradient_of_relu_is_that_of_relu_inside_the_range():
    """Zero below 0, one up to the range's end, zero beyond."""
    model = prepared(Parts(), mode="asym_u").train()
    model.relu(torch.tensor([0.0, 2.0]))
    x = torch.tensor([-1.0, 0.4, 1.9, 2.1], requires_grad=True)
    model.eval().relu(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1, 1, 0]))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("mode", "per_channel"), [("sym", False), ("asym_u", True)])
def test_gradients_of_weights_are_those_of_the_rounded_weights(split, mode, per_channel):
    """Of a float model that holds the rounded weights, to the last bits."""
    model = trainable(split=split)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("bias"):
                reach = parameter.abs().max().numpy()
                grid = grid_of(-reach, reach, 4, "sym")
                values = restored(quantized(parameter.numpy(), grid), grid)
            else:
                values = rounded(parameter, 3, mode, per_channel and "embed" not in name)
            parameter.copy_(torch.from_numpy(values))
    prepared(model, bits_activations=0, bits_weights=3, bits_bias=4, mode=mode, per_channel_wts=per_channel)
    users, items = PAIRS
    labels = (users + items) % 2 * 1.0
    for each in (model, plain):
        loss = functional.binary_cross_entropy_with_logits(each(users, items).squeeze(1), labels)
        loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0
        close(parameter.grad, plain.get_parameter(name).grad.numpy())


def test_optimizer_moves_the_float_copy():
    """Steps too small to change what a weight rounds to add up."""
    model = prepared(Parts(), bits_activations=0, bits_weights=2, bits_bias=0, mode="sym_restr")
    with torch.no_grad():
        model.linear.weight.copy_(torch.tensor([[1.0, 0.1, -1.0]]).expand(4, 3))
    optimizer = torch.optim.SGD([model.linear.weight], lr=0.01)
    x = torch.tensor([[0.0, 1.0, 0.0]])
    values = []
    for _ in range(50):
        optimizer.zero_grad()
        result = model.linear(x)
        values.append((result[0, 0] - model.linear.bias[0]).item())
        (-result).sum().backward()  # d/dw = -1: each step adds 0.01
        optimizer.step()
    expected = [1.0 if 0.1 + 0.01 * step > 0.5 else 0.0 for step in range(50)]
    np.testing.assert_allclose(values[:40], expected[:40], atol=1e-6)
    np.testing.assert_allclose(values[41:], expected[41:], atol=1e-6)  # step 40 is half-way between levels
    np.testing.assert_allclose(model.linear.weight[:, 1].detach(), 0.6, rtol=1e-5)
    np.testing.assert_allclose(model.linear.weight[:, 0].detach(), 1.0)


# --- overrides and arguments ---


def test_override_changes_the_layers_that_its_whole_name_matches():
    """``mlp`` is not ``mlp.0``; the first pattern that matches counts."""
    plain = trainable()
    overrides = {
        "mlp.0": {"bits_weights": 2, "mode": "asym_u"},
        "mlp[.].*": {"bits_weights": 0},
        "mf_(user|item)_embed": {"bits_weights": 3},
        "mlp": {"bits_weights": 4},
    }
    with pytest.raises(InputError):
        prepared(copy.deepcopy(plain), overrides=overrides)
    del overrides["mlp"]
    model = prepared(plain, bits_activations=0, bits_weights=6, bits_bias=0, overrides=overrides)

    def product(name: str) -> Tensor:
        layer = model.get_submodule(name)
        return (layer(torch.eye(layer.weight.shape[1])) - layer.bias).T

    close(product("mlp.0"), rounded(model.get_submodule("mlp.0").weight, 2, "asym_u"))
    close(product("mlp.1"), model.get_submodule("mlp.1").weight.detach().numpy())
    close(product("final"), rounded(model.final.weight, 6, "sym"))
    for name, bits in (("mf_user_embed", 3), ("mf_item_embed", 3), ("mlp_user_embed", 6)):
        layer = model.get_submodule(name)
        close(layer(torch.arange(len(layer.weight))), rounded(layer.weight, bits, "sym"))


def test_override_of_activations_leaves_an_output_in_float():
    """Just that layer's."""
    plain = small_model(5)
    overrides = {"mlp_relu.*|final": {"bits_activations": 0}}
    model = prepared(
        copy.deepcopy(plain), bits_activations=3, mode="asym_u", overrides=overrides, **FLOAT_WEIGHTS
    ).train()
    changed = quantized_outputs(model, plain)
    assert changed == (MLP | ENDS[False]) - {"mlp_relu.0", "mlp_relu.1", "final"}


def test_override_of_activations_quantizes_one_output_alone():
    """Where the others stay float."""
    plain = small_model(5)
    overrides = {"mf_mult": {"bits_activations": 3, "mode": "asym_u"}}
    model = prepared(copy.deepcopy(plain), bits_activations=0, overrides=overrides, **FLOAT_WEIGHTS).train()
    assert quantized_outputs(model, plain) == {"mf_mult"}


BAD_ARGUMENTS = [
    ({"overrides": {"no_such_layer": {"bits_weights": 4}}}, "no_such_layer"),
    ({"overrides": {"ml": {"bits_weights": 4}}}, "ml"),
    ({"overrides": {"final_mf": {"bits_weights": 4}}}, "final_mf"),  # of a split model only
    ({"overrides": {"(": {"bits_weights": 4}}}, "("),
    ({"overrides": {"final": {"bits_wts": 4}}}, "final"),
    ({"overrides": {"final": 4}}, "final"),
    ({"overrides": ["final"]}, "overrides"),
    ({"overrides": {"final": {"bits_weights": 17}}}, "final"),
    ({"overrides": {"final": {"mode": "round"}}}, "round"),
    ({"bits_activations": 17}, "bits_activations"),
    ({"bits_activations": -1}, "bits_activations"),
    ({"bits_activations": "8"}, "bits_activations"),
    ({"bits_activations": True}, "bits_activations"),
    ({"bits_weights": 17}, "bits_weights"),
    ({"bits_weights": 7.5}, "bits_weights"),
    ({"bits_bias": 33}, "bits_bias"),
    ({"bits_bias": -1}, "bits_bias"),
    ({"bits_bias": "32"}, "bits_bias"),
    ({"bits_bias": False}, "bits_bias"),
    ({"mode": "asymmetric"}, "mode"),
    ({"mode": 1}, "mode"),
    ({"mode": {"activations": "sym"}}, "mode"),
    ({"mode": {"activations": "sym", "weights": "none"}}, "mode"),
    ({"ema_decay": 0.0}, "ema_decay"),
    ({"ema_decay": 1.0}, "ema_decay"),
    ({"ema_decay": 1}, "ema_decay"),
    ({"ema_decay": -0.5}, "ema_decay"),
    ({"ema_decay": float("nan")}, "ema_decay"),
    ({"ema_decay": "0.9"}, "ema_decay"),
    ({"mode": "sym_restr", "bits_weights": 1}, "sym_restr"),
]


@pytest.mark.parametrize(("arguments", "part"), BAD_ARGUMENTS)
def test_argument_out_of_range_is_named(arguments, part):
    """In one line."""
    with pytest.raises(InputError) as error:
        prepared(trainable(), **arguments)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


# --- no range at all ---


@pytest.mark.parametrize("mode", MODES)
def test_range_of_zero_width_is_safe(mode):
    """All zeros come out as zeros, with gradients that are numbers."""
    model = prepared(Parts(), mode=mode, ema_decay=0.5).train()
    x = torch.zeros(4, requires_grad=True)
    for training in (True, True, False):
        model.train(training)
        result = output(model, x)
        assert torch.equal(result, torch.zeros(4))
        result.sum().backward()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_that_are_all_zero_are_safe(mode, per_channel):
    """A row, a table, a bias."""
    model = prepared(Parts(), mode=mode, per_channel_wts=per_channel).train()
    with torch.no_grad():
        model.linear.weight[1] = 0
        model.linear.bias.zero_()
        model.embedding.weight.zero_()
    hidden = model.linear(model.embedding(torch.arange(5)) + torch.ones(5, 3))
    assert torch.isfinite(hidden).all()
    assert torch.equal(hidden[:, 1], torch.zeros(5))
    hidden.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (model.linear.weight, model.embedding.weight))


@pytest.mark.parametrize("mode", MODES)
def test_range_that_fades_away_is_safe(mode):
    """A layer that died hands out zeros for good: its average halves until nothing of it is left."""
    model = prepared(Parts(), mode=mode, ema_decay=0.5).train()
    output(model, [0, 1])
    zeros = torch.zeros(4)
    for _ in range(200):
        assert torch.equal(output(model, zeros), zeros)
    assert torch.equal(output(model.eval(), zeros), zeros)
