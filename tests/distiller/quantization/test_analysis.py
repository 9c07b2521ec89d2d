"""A quantized model's tensors beside the float model's: figures worked out by hand, and what holds of any model."""

from __future__ import annotations

import copy
import math
import statistics as stdlib

import pytest
import torch
from helpers_quant import all_pairs, model_statistics, small_model
from torch import Tensor, nn

from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.analysis import TensorErrors, compare_tensors
from distiller.quantization.linear import LinearQuantMode, QuantParams
from distiller.quantization.wrappers import QuantizedEmbedding

TWO_BITS = {"bits_activations": 2, "bits_parameters": 2, "mode": "asym_u"}
# Of every value a level of its own: 0, 1, 2, 3.
STATISTICS = {
    "linear": {"inputs": {0: {"min": 0.0, "max": 3.0}}, "output": {"min": -1.0, "max": 3.0}},
    "relu": {"inputs": {0: {"min": -1.0, "max": 3.0}}, "output": {"min": 0.0, "max": 3.0}},
}


class Tiny(nn.Module):
    """A linear layer and a ReLU, which is fused."""

    def __init__(self, weight: list[list[float]]):
        super().__init__()
        self.linear = nn.Linear(len(weight[0]), len(weight), bias=False)
        self.linear.weight.requires_grad_(False).copy_(torch.tensor(weight))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(x))


def compared(
    model: nn.Module, inputs: tuple, rows: int | None = None, settings: dict | None = None, **arguments
) -> dict[tuple[str, str], TensorErrors]:
    """By layer and tensor, after both models have seen the inputs."""
    quantizer = PostTrainLinearQuantizer(copy.deepcopy(model), **arguments)
    settings = settings or {}
    quantizer.prepare_model((*inputs, *settings.values()))
    found = compare_tensors(model, quantizer, lambda model: model(*inputs, **settings), rows)
    assert {x.layer for x in found} == quantizer.describe().keys()
    for part in (*model.modules(), *quantizer.model.modules()):
        assert not part._forward_hooks
    result = {(x.layer, x.tensor): x for x in found}
    assert len(result) == len(found)
    return result


def tiny(weight: list[list[float]], x: list[list[float]], **arguments) -> dict[str, TensorErrors]:
    """By tensor, of the tiny model's layer; the ReLU, part of it, has no row of its own."""
    arguments = {"model_activation_stats": STATISTICS} | TWO_BITS | arguments
    found = compared(Tiny(weight), (torch.tensor(x),), **arguments)
    assert {layer for layer, _ in found} == {"linear"}
    return {tensor: errors for (_, tensor), errors in found.items()}


def decibels(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise)


# --- by hand ---

WEIGHT = [[1.0, -0.5]]  # two quanta per unit, zero point -1: integers 3 and 0
ROWS = [[0.0, 1.0], [1.25, 0.0], [3.0, 1.0], [5.0, 0.0]]


def test_an_input_by_hand():
    """Seen as 0 1, 1 0, 3 1, 3 0: 1.25 is rounded, 5 cut to 3, and no value becomes 2."""
    x = tiny(WEIGHT, ROWS)["input 0"]
    assert (x.range_min, x.range_max, x.scale, x.zero_point) == (0, 3, 1, 0)
    assert (x.min, x.max, x.mean) == (0, 5, 11.25 / 8)
    assert x.std == pytest.approx(stdlib.pstdev([v for row in ROWS for v in row]))
    assert x.levels_used == 3 / 4
    assert x.saturated == 1 / 8
    assert x.sqnr == pytest.approx(decibels(37.5625, 0.25**2 + 2**2))


def test_an_output_by_hand():
    """After the ReLU 0, 1.25, 2.5, 5. Sums of -1, 2, 5, 6 half units are 0, 1, 2 (2.5 to even) and 3."""
    output = tiny(WEIGHT, ROWS)["output"]
    assert (output.range_min, output.range_max, output.scale, output.zero_point) == (0, 3, 1, 0)
    assert (output.min, output.max, output.mean) == (0, 5, 8.75 / 4)
    assert output.levels_used == 1
    assert output.saturated == 1 / 4
    signal = 1.25**2 + 2.5**2 + 5**2
    assert output.sqnr == pytest.approx(decibels(signal, 0.25**2 + 0.5**2 + 2**2))


def test_a_weight_by_hand():
    """Its values are levels exactly."""
    weight = tiny(WEIGHT, ROWS)["weight"]
    assert (weight.range_min, weight.range_max, weight.scale, weight.zero_point) == (-0.5, 1, 2, -1)
    assert (weight.min, weight.max, weight.mean, weight.std) == (-0.5, 1, 0.25, 0.75)
    assert (weight.levels_used, weight.saturated, weight.sqnr) == (2 / 4, 0, math.inf)


def test_several_scales_have_a_mean_and_the_outermost_range():
    """2 and 1 quanta per unit, from -0.5 to 1 and from 0 to 3."""
    weight = tiny([[1.0, -0.5], [3.0, 0.0]], ROWS, per_channel_wts=True)["weight"]
    assert (weight.range_min, weight.range_max) == (-0.5, 3)
    assert weight.scale == 1.5
    assert weight.zero_point is None
    assert weight.sqnr == math.inf


def test_rounding_is_no_saturation():
    """The greatest value of a symmetric tensor is half a level past the last one."""
    weight = tiny([[1.0, -0.5]], ROWS, mode="sym", bits_parameters=8)["weight"]
    assert weight.max > weight.range_max
    assert weight.saturated == 0


def test_a_tables_values_past_its_range_are_saturated():
    """Two of six: 9 and -2 of a range of 0 to 3, of which 2 is not used."""
    model = nn.Sequential(nn.Embedding(3, 2))
    model[0].weight.requires_grad_(False).copy_(torch.tensor([[0.0, 1.0], [3.0, 9.0], [-2.0, 0.0]]))
    statistics = {"0": {"inputs": {0: {"min": 0, "max": 2}}, "output": {"min": 0.0, "max": 3.0}}}
    index = torch.tensor([0, 0, 1])
    found = compared(model, (index,), model_activation_stats=statistics, **TWO_BITS)
    assert list(found) == [("0", "output"), ("0", "weight")]
    output, weight = found.values()
    assert weight.type == QuantizedEmbedding.__name__
    assert weight.saturated == 2 / 6
    assert weight.levels_used == 3 / 4
    assert weight.sqnr == pytest.approx(decibels(1 + 9 + 81 + 4, 36 + 4))
    assert output.saturated == 1 / 6  # row 0 twice and row 1; row 2 is not asked for
    assert output.sqnr == pytest.approx(decibels(1 + 1 + 9 + 81, 36))


def test_what_was_0_and_is_not_has_no_signal():
    """Minus infinity, where only the quantized tensor is different from 0."""
    found = tiny(WEIGHT, [[0.25, 0.5]], mode={"activations": "asym_s", "weights": "asym_u"})
    assert found["output"].sqnr == math.inf
    assert tiny([[1.0, -0.6]], [[0.6, 1.0]])["output"].sqnr == -math.inf


# --- of any model ---


def test_models_that_compute_the_same_have_no_errors():
    """On whole numbers within the range."""
    found = tiny(WEIGHT, [[0.0, 0.0], [1.0, 0.0], [3.0, 2.0]])
    assert [errors.sqnr for errors in found.values()] == [math.inf] * 3
    assert [errors.saturated for errors in found.values()] == [0] * 3


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_dynamic_ranges_are_of_so_many_rows(rows):
    """As if they had come one batch after the other; of activations nothing is fixed."""
    x, model = torch.tensor(ROWS), Tiny(WEIGHT)
    found = compared(model, (x,), rows, **TWO_BITS)
    quantizer = PostTrainLinearQuantizer(copy.deepcopy(model), **TWO_BITS)
    quantizer.prepare_model((x,))
    expected = torch.cat([quantizer.model(part) for part in x.split(rows)])
    noise = (expected - model(x)).square().sum().item()
    output = found["linear", "output"]
    assert output.sqnr == pytest.approx(
        decibels(model(x).square().sum().item(), noise) if noise else math.inf
    )
    for tensor in ("input 0", "output"):
        errors = found["linear", tensor]
        assert {errors.scale, errors.zero_point, errors.range_min, errors.levels_used, errors.saturated} == {
            None
        }
    assert found["linear", "weight"].scale == 2


def neumf_errors(split: bool = False, **arguments) -> tuple[dict[tuple[str, str], TensorErrors], nn.Module]:
    """Of a small NeuMF, on all of its pairs."""
    model = small_model(seed=1, split=split)
    arguments = {"mode": "asym_u", "model_activation_stats": model_statistics(model)} | arguments
    return compared(model, all_pairs(model), settings={"sigmoid": True}, **arguments), model


@pytest.mark.parametrize("split", [False, True])
def test_every_quantized_layer_of_a_neumf_has_its_tensors(split):
    """Tables have weights and no inputs, linear layers both; of ReLUs, which are fused, there is nothing."""
    found, _ = neumf_errors(split)
    tables = ("mf_user_embed", "mf_item_embed", "mlp_user_embed", "mlp_item_embed")
    linears = ("mlp.0", "mlp.1", *(("final_mlp", "final_mf") if split else ("final",)))
    pairs = ("mf_mult", "mlp_concat", "final_add" if split else "final_concat")
    assert found.keys() == {
        *((layer, tensor) for layer in tables for tensor in ("output", "weight")),
        *((layer, tensor) for layer in linears for tensor in ("input 0", "output", "weight")),
        *((layer, tensor) for layer in pairs for tensor in ("input 0", "input 1", "output")),
        *(("sigmoid", tensor) for tensor in ("input 0", "output")),
    }


def test_a_tensor_is_the_same_as_output_and_as_input():
    """Whoever reads it."""
    found, _ = neumf_errors()
    for producer, consumer in (("mf_mult", "final_concat"), ("mlp.0", "mlp.1"), ("final", "sigmoid")):
        values = [vars(found[x]) for x in ((producer, "output"), (consumer, "input 0"))]
        one, other = ({k: v for k, v in x.items() if k not in ("layer", "type", "tensor")} for x in values)
        assert one == other


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_left_in_float_have_no_rows_and_add_no_errors(bits):
    """What only they have touched is exact."""
    pattern = "mlp.*|final.*|sigmoid"
    overrides = {pattern: {"bits_activations": None, "bits_weights": None}}
    found, _ = neumf_errors(overrides=overrides, bits_activations=bits)
    assert {layer for layer, _ in found} == {"mf_user_embed", "mf_item_embed", "mf_mult"}


def test_more_bits_lose_less():
    """In every tensor, on the way from 4 bits to 8 and 12. (What the sigmoid would saturate is cut at any.)"""
    left_out = {"final|sigmoid": {"bits_activations": None, "bits_weights": None}}
    by_bits = [neumf_errors(bits_activations=b, bits_parameters=b, overrides=left_out)[0] for b in (4, 8, 12)]
    for few, some, many in zip(*(found.values() for found in by_bits), strict=True):
        assert few.sqnr + 12 < some.sqnr < many.sqnr - 12, few
        assert few.levels_used >= some.levels_used >= many.levels_used


def test_weights_that_hold_their_inputs_scales_are_compared_as_they_were():
    """A linear layer after a concatenation that keeps scales: weight over scale is in it, the weight in the report."""
    found, model = neumf_errors(scaled_concat=True, per_channel_wts=True)
    errors = found["final", "weight"]
    weight = model.final.weight
    assert (errors.min, errors.max) == (weight.min().item(), weight.max().item())
    assert 30 < errors.sqnr < 80
    assert errors.saturated == 0
    assert errors.zero_point is None
    assert found["final_concat", "output"].zero_point is None
    assert found["final_concat", "output"].sqnr == pytest.approx(found["final", "input 0"].sqnr)


def test_scales_per_output_feature():
    """Their mean, and each feature's error by its own: no worse than with one for all."""
    found, _ = neumf_errors(per_channel_acts=True)
    whole, _ = neumf_errors()
    channels, one = (x["mlp.0", "output"] for x in (found, whole))
    assert channels.scale > one.scale
    assert channels.zero_point is None
    assert channels.sqnr > one.sqnr
    assert channels.saturated == 0
    assert (channels.min, channels.max) == (one.min, one.max)
    assert found["mlp.1", "weight"].sqnr > 30


def test_rows_with_scales_of_their_own():
    """The table's mean scale; who reads the rows has the mean of those that it read."""
    found, model = neumf_errors(embedding_bits=4)
    table = model.mf_user_embed.weight
    low, high = table.amin(1).clamp(max=0), table.amax(1).clamp(min=0)
    expected = (15 / (high - low)).mean().item()
    for key in (("mf_user_embed", "weight"), ("mf_user_embed", "output"), ("mf_mult", "input 0")):
        assert found[key].scale == pytest.approx(expected)  # every row is read as often
        assert found[key].zero_point is None
        assert found[key].levels_used == found["mf_user_embed", "weight"].levels_used > 0.5
        assert found[key].saturated == 0


def test_activations_in_float_have_errors_and_no_scales():
    """``bits_activations`` of 0 leaves them their weights' errors."""
    found, _ = neumf_errors(bits_activations=0, per_channel_wts=True)
    assert {layer for layer, _ in found} == {
        *("mf_user_embed", "mf_item_embed", "mlp_user_embed", "mlp_item_embed", "mlp.0", "mlp.1", "final"),
    }
    assert found["mlp.1", "output"].scale is None
    assert 10 < found["mlp.1", "output"].sqnr < 80
    assert found["mlp.1", "weight"].scale is not None
    assert 30 < found["mlp.1", "weight"].sqnr < 80


def test_a_pass_that_calls_nothing_is_an_error():
    """And leaves no hooks."""
    model = Tiny(WEIGHT)
    quantizer = PostTrainLinearQuantizer(copy.deepcopy(model), model_activation_stats=STATISTICS)
    quantizer.prepare_model((torch.tensor(ROWS),))
    with pytest.raises(ValueError, match="linear"):
        compare_tensors(model, quantizer, lambda model: None)


def test_a_pass_that_fails_leaves_no_hooks():
    """Nor is its error lost."""
    model = Tiny(WEIGHT)
    quantizer = PostTrainLinearQuantizer(copy.deepcopy(model), model_activation_stats=STATISTICS)
    quantizer.prepare_model((torch.tensor(ROWS),))

    def fail(model: nn.Module) -> None:
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        compare_tensors(model, quantizer, fail)
    for part in (*model.modules(), *quantizer.model.modules()):
        assert not part._forward_hooks


# --- one layer alone ---


@pytest.mark.parametrize("layer", ["mf_user_embed", "mf_mult", "mlp.0", "mlp.1", "final_concat", "final"])
def test_one_layer_is_quantized_as_among_the_others(layer):
    """With its own override; the others stay the float modules that they were."""
    model = small_model(seed=2)
    quantizer = PostTrainLinearQuantizer(
        copy.deepcopy(model),
        mode="asym_s",
        per_channel_wts=True,
        model_activation_stats=model_statistics(model),
        overrides={
            "mlp.1|mf_user_embed": {"bits_weights": 5, "mode": "sym"},
            "mlp.*": {"bits_activations": 6},
        },
    )
    quantizer.prepare_model((*all_pairs(model), True))
    one = quantizer.of_one_layer(copy.deepcopy(model), layer)
    one.prepare_model((*all_pairs(model), True))
    assert one.describe().keys() == {layer}
    settings = {
        k: v for k, v in quantizer.describe()[layer].items() if not k.endswith(("scale", "zero_point"))
    }
    assert settings.items() <= one.describe()[layer].items()
    assert one.activations[layer] == quantizer.activations[layer]
    assert one.weights[layer] == quantizer.weights[layer]
    fixed: QuantParams = one.modules[layer].all_params().get("output")
    if fixed is not None and layer != "final":  # whose range the sigmoid's cuts, in both
        assert fixed.scale == quantizer.modules[layer].all_params()["output"].scale


def test_one_layers_statistics_are_those_given():
    """Not those that preparing has cut: a sigmoid alone reads what a float layer puts out."""
    model = small_model(seed=2, gain=3.0)
    statistics = model_statistics(model)
    quantizer = PostTrainLinearQuantizer(
        copy.deepcopy(model), mode=LinearQuantMode.ASYMMETRIC_UNSIGNED, model_activation_stats=statistics
    )
    quantizer.prepare_model((*all_pairs(model), True))
    one = quantizer.of_one_layer(copy.deepcopy(model), "sigmoid")
    one.prepare_model((*all_pairs(model), True))
    given = statistics["sigmoid"]["inputs"][0]
    assert given["max"] - given["min"] > 12
    assert one.modules["sigmoid"].input_0_scale.item() == pytest.approx(255 / (given["max"] - given["min"]))
    assert quantizer.modules["sigmoid"].input_0_scale.item() == pytest.approx(255 / 12, rel=0.3)
