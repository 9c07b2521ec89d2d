"""Tables with a scale for every row, and concatenations whose inputs keep their scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_quant import MODES, all_pairs, model_statistics, prepared, scores, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distiller.modules import Concat, EltwiseMult
from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.linear import LinearQuantMode, params_of_range
from distiller.quantization.statistics import columns_of_text, save_statistics
from distiller.quantization.wrappers import (
    QuantizedConcat,
    QuantizedEmbedding,
    QuantizedLinear,
    RowQuantizedEmbedding,
    ScaledConcat,
    pack,
    unpack,
)
from distiller.system.cli import InputError

FLOAT = {"bits_activations": None, "bits_weights": None}


def quantizer_of(model: nn.Module, dummy, **arguments) -> PostTrainLinearQuantizer:
    quantizer = PostTrainLinearQuantizer(model, **arguments)
    quantizer.prepare_model(dummy)
    return quantizer


# --- tables ---


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_two_to_a_byte_and_back(rows, width, seed):
    q = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (rows, width)))
    packed = pack(q.float())
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, (width + 1) // 2)
    assert unpack(packed, width).tolist() == q.tolist()


def test_the_first_of_two_is_the_lower_half():
    assert pack(torch.tensor([[1.0, 2.0, 15.0]])).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("mode", list(LinearQuantMode))
@pytest.mark.parametrize("bits", [4, 8])
def test_every_row_has_its_own_scale(mode, bits):
    torch.manual_seed(0)
    embedding = nn.Embedding(6, 5).requires_grad_(False)
    embedding.weight.mul_(torch.tensor([[1e-3], [1.0], [30.0], [0.0], [1.0], [7.0]]))
    embedding.weight[4].abs_()
    table = RowQuantizedEmbedding(embedding, bits, mode)
    found = table(torch.arange(6))
    for row, values, params in zip(embedding.weight, found, table.params.scale, strict=True):
        alone = params_of_range(row.min().reshape(1), row.max().reshape(1), bits, mode)
        assert params == alone.scale
        # Half a quantum, and where symmetric levels end before the range does, one.
        assert ((values - row).abs() <= 1.01 / alone.scale).all()
    assert table.integers().min() >= table.params.q_min
    assert table.integers().max() <= table.params.q_max


def test_4_bits_by_hand():
    embedding = nn.Embedding(2, 3).requires_grad_(False)
    embedding.weight.copy_(torch.tensor([[-1.0, 0.0, 2.0], [0.5, 1.0, 3.0]]))
    table = RowQuantizedEmbedding(embedding, 4, LinearQuantMode.ASYMMETRIC_UNSIGNED)
    # The second row's range is widened to contain 0: 5 quanta per unit in both.
    assert table.params.scale.flatten().tolist() == [5, 5]
    assert table.params.zero_point.flatten().tolist() == [-5, 0]
    assert table.integers().tolist() == [[0, 5, 15], [2, 5, 15]]  # 2.5 to even
    assert table.weight.tolist() == [[0x50, 0x0F], [0x52, 0x0F]]
    torch.testing.assert_close(
        table(torch.tensor([1, 0, 1])), torch.tensor([[0.4, 1, 3], [-1, 0, 2], [0.4, 1, 3]])
    )


def test_rows_beyond_the_calibrated_range_do_not_saturate():
    """A row's range is its own, whatever calibration saw."""
    model = small_model(1)
    statistics = model_statistics(model)
    model.mf_user_embed.weight[2] *= 100
    quantizer_of(model, (*all_pairs(model), True), model_activation_stats=statistics, embedding_bits=8)
    row = small_model(1).mf_user_embed.weight[2] * 100
    torch.testing.assert_close(
        model.mf_user_embed(torch.tensor([2]))[0], row, rtol=0, atol=row.abs().max() / 127
    )


@pytest.mark.parametrize("mode", MODES)
def test_products_of_rows_use_the_rows_scales(mode):
    """(q_u + zp_u)(q_i + zp_i) in units of the product of the two rows' scales, in float64."""
    model = small_model(2, users=4, items=6, mf_dim=5)
    users, items = all_pairs(model)
    statistics = model_statistics(model)
    quantizer_of(model, (users, items, True), model_activation_stats=statistics, embedding_bits=4, mode=mode)
    found = model.mf_mult(model.mf_user_embed(users), model.mf_item_embed(items)).double()
    exact = 1.0
    for table, index in ((model.mf_user_embed, users), (model.mf_item_embed, items)):
        params = table.params
        exact = exact * ((table.integers() + params.zero_point).double() / params.scale.double())[index]
    output = model.mf_mult.fixed_output
    low, high = ((bound + output.zero_point) / output.scale for bound in (output.q_min, output.q_max))
    assert ((found - exact.clamp(low, high)).abs() <= 0.51 / output.scale).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_float_activations_read_rows_too(bits):
    model = small_model(3)
    pairs = all_pairs(model)
    expected = scores(model, pairs)
    quantizer_of(model, (*pairs, True), bits_activations=0, bits_parameters=8, embedding_bits=bits)
    assert isinstance(model.mlp_item_embed, RowQuantizedEmbedding)
    np.testing.assert_allclose(scores(model, pairs), expected, atol=0.02 if bits == 8 else 0.3)


def test_dynamic_quantization_reads_rows_too():
    model = small_model(4)
    pairs = all_pairs(model)
    expected = scores(model, pairs)
    quantizer_of(model, (*pairs, True), mode="asym_u", embedding_bits=8)
    np.testing.assert_allclose(scores(model, pairs), expected, atol=0.1)


def test_a_table_left_in_float_has_no_rows_of_integers():
    model = small_model(5)
    pairs = all_pairs(model)
    arguments = {"embedding_bits": 4, "overrides": {"mf_user_embed": FLOAT}}
    quantizer = quantizer_of(
        model, (*pairs, True), model_activation_stats=model_statistics(model), **arguments
    )
    assert isinstance(model.mf_user_embed, nn.Embedding)
    assert isinstance(model.mf_item_embed, RowQuantizedEmbedding)
    assert quantizer.describe()["mf_item_embed"]["bits_weights"] == 4
    assert np.isfinite(scores(model, pairs)).all()


class Bag(nn.Module):
    """A table read by a linear layer directly, or through an identity."""

    def __init__(self, through: bool):
        super().__init__()
        self.table, self.through = nn.Embedding(4, 3), nn.Identity() if through else None
        self.linear = nn.Linear(3, 2)

    def forward(self, index):
        x = self.table(index)
        return self.linear(self.through(x) if self.through else x)


@pytest.mark.parametrize("through", [False, True])
def test_a_linear_layer_cannot_fold_rows(through):
    statistics = {
        name: {"inputs": {0: {"min": -1.0, "max": 1.0}}, "output": {"min": -1.0, "max": 1.0}}
        for name in ("table", "through", "linear")
    }
    with pytest.raises(InputError, match="--qe-embedding-bits: layer linear"):
        quantizer_of(
            Bag(through).eval(), torch.tensor([0]), model_activation_stats=statistics, embedding_bits=8
        )


@pytest.mark.parametrize("bits", [0, 3, 16, "4", True])
def test_bits_that_do_not_fill_bytes(bits):
    with pytest.raises(InputError, match="--qe-embedding-bits"):
        PostTrainLinearQuantizer(small_model(6), embedding_bits=bits)


# --- concatenations ---


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    mode=st.sampled_from(MODES),
    weight_mode=st.sampled_from(MODES),
    bits=st.integers(3, 8),
)
def test_a_scaled_concatenation_loses_nothing(seed, mode, weight_mode, bits):
    """What the final layer reads are its inputs, and what it puts out their products with folded weights."""
    model = small_model(seed)
    weight, bias = model.final.weight.clone().double(), model.final.bias.clone().double()
    statistics = model_statistics(model)
    statistics["mf_mult"]["output"] = {
        key: value / 50 for key, value in statistics["mf_mult"]["output"].items() if isinstance(value, float)
    }
    users, items = all_pairs(model)
    quantizer_of(
        model,
        (users, items, True),
        model_activation_stats=statistics,
        mode={"activations": mode, "weights": weight_mode},
        bits_activations=bits,
        scaled_concat=True,
    )
    mf = model.mf_mult(model.mf_user_embed(users), model.mf_item_embed(items))
    hidden = model.mlp_concat(model.mlp_user_embed(users), model.mlp_item_embed(items))
    for linear in model.mlp:
        hidden = linear(hidden)
    both = model.final_concat(mf, hidden)
    torch.testing.assert_close(both, torch.cat([mf, hidden], dim=1), rtol=1e-6, atol=0)

    inputs, final = model.final.fixed_input(0), model.final
    integers = torch.round(both.double() * inputs.scale)  # q + zp
    folded = weight / inputs.scale.double()
    rounded = (final.weight + final.w_zero_point[:, None]).double() / final.w_scale.double()
    assert ((rounded - folded).abs() <= 1.01 / final.w_scale).all()
    logit = integers @ rounded[0] + bias
    output = final.fixed_output
    low, high = ((bound + output.zero_point) / output.scale for bound in (output.q_min, output.q_max))
    slack = 0.51 / output.scale + 0.51 / final.accumulator_scale
    assert ((final(both)[:, 0].double() - logit.clamp(low, high)).abs() <= slack).all()


def test_a_branch_of_a_small_range_keeps_it():
    """Unscaled, 255 levels of the wider branch; scaled, of each."""
    wide, narrow = {"min": -100.0, "max": 100.0}, {"min": -1.0, "max": 1.0}
    tensor = {"inputs": {0: narrow, 1: narrow}, "output": narrow}
    model = small_model(7)
    statistics = dict.fromkeys(model_statistics(model), tensor)
    statistics |= {
        "mlp.1": {"inputs": {0: wide}, "output": wide},
        "final_concat": {"inputs": {0: narrow, 1: wide}, "output": wide},
    }
    levels = {}
    for scaled in (False, True):
        copy = small_model(7)
        quantizer_of(copy, (*all_pairs(copy), True), model_activation_stats=statistics, scaled_concat=scaled)
        mf, hidden = torch.linspace(-1, 1, 200).view(-1, 1).expand(200, 3), torch.zeros(200, 4)
        levels[scaled] = len(copy.final_concat(mf, hidden)[:, 0].unique())
    assert levels[False] < 5
    assert levels[True] > 190


def test_which_concatenations_keep_scales():
    def kinds(**arguments) -> list[type]:
        model = small_model(8)
        dummy = (*all_pairs(model), True)
        quantizer_of(
            model,
            dummy,
            **{"model_activation_stats": model_statistics(model), "scaled_concat": True} | arguments,
        )
        return [type(model.mlp_concat), type(model.final_concat)]

    assert kinds() == [ScaledConcat, ScaledConcat]
    assert kinds(scaled_concat=False) == [QuantizedConcat, QuantizedConcat]
    # Rows with a scale each cannot be folded.
    assert kinds(embedding_bits=8) == [QuantizedConcat, ScaledConcat]
    assert kinds(overrides={"final|sigmoid": FLOAT}) == [ScaledConcat, ScaledConcat]
    assert kinds(overrides={"final_concat": FLOAT}) == [ScaledConcat, Concat]
    assert kinds(model_activation_stats=None) == [Concat, Concat]


class Shared(nn.Module):
    """A concatenation that a linear layer reads, and something else."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)
        self.concat, self.linear, self.mult = Concat(dim=1), nn.Linear(4, 4), EltwiseMult()

    def forward(self, x):
        both = self.concat(self.left(x), self.right(x))
        return self.mult(both, self.linear(both))


def test_a_concatenation_with_another_reader_has_one_scale():
    model, numbers = Shared().eval().requires_grad_(False), {"min": -3.0, "max": 3.0}
    statistics = {
        name: {"inputs": {0: numbers, 1: numbers}, "output": numbers}
        for name in ("left", "right", "concat", "linear", "mult")
    }
    quantizer_of(model, torch.ones(1, 3), model_activation_stats=statistics, scaled_concat=True)
    assert type(model.concat) is QuantizedConcat


# --- scales per output feature of activations ---


def hidden_of(model, users, items) -> list[torch.Tensor]:
    """What the first layer reads, and what every layer of the MLP puts out."""
    outputs = [model.mlp_concat(model.mlp_user_embed(users), model.mlp_item_embed(items))]
    for linear in model.mlp:
        outputs.append(linear(outputs[-1]))
    return outputs


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    mode=st.sampled_from(MODES),
    weight_mode=st.sampled_from(MODES),
    bits=st.integers(3, 12),
    per_channel_wts=st.booleans(),
)
def test_every_output_feature_keeps_its_range(seed, mode, weight_mode, bits, per_channel_wts):
    """Rounded by half a level of its own, and multiplied by weights that its scale went into."""
    model = small_model(seed)
    weight, bias = model.mlp[1].weight.clone().double(), model.mlp[1].bias.clone().double()
    reach = columns_of_text(model_statistics(model)["mlp_relu.0"]["output"]["column_max"]).clamp(min=0)
    users, items = all_pairs(model)
    quantizer_of(
        model,
        (users, items, True),
        model_activation_stats=model_statistics(model),
        mode={"activations": mode, "weights": weight_mode},
        bits_activations=bits,
        per_channel_acts=True,
        per_channel_wts=per_channel_wts,
    )
    first, second = model.mlp[0].fixed_output, model.mlp[1]
    assert first.scale.shape == (len(reach),)
    levels = first.q_max if mode in ("sym", "sym_restr") else first.q_max - first.q_min
    widths = torch.maximum(reach, reach.max() / 16)
    torch.testing.assert_close(first.scale * widths, torch.full_like(widths, levels), rtol=0.2, atol=0)

    _, hidden, output = hidden_of(model, users, items)
    integers = torch.round(hidden.double() * first.scale)  # q + zp
    rounded = (second.weight + second.w_zero_point[:, None]).double() / second.w_scale.double()[:, None]
    folded = weight / first.scale.double()
    assert ((rounded - folded).abs() <= 1.01 / second.w_scale[:, None]).all()
    expected = (integers @ rounded.T + bias).relu()
    params = second.fixed_output
    low, high = ((bound + params.zero_point) / params.scale for bound in (params.q_min, params.q_max))
    slack = 0.51 / params.scale + 0.51 / second.accumulator_scale
    assert ((output.double() - torch.clamp(expected, low, high)).abs() <= slack).all()


def test_which_layers_have_scales_per_output_feature():
    def which(split=False, **arguments) -> list[bool]:
        model = small_model(8, split)
        more = {"model_activation_stats": model_statistics(model), "per_channel_acts": True} | arguments
        quantizer_of(model, (*all_pairs(model), True), **more)
        return [module.has_output_scales for module in model.modules() if isinstance(module, QuantizedLinear)]

    # mlp.0, mlp.1, final. What joins the last one with the other branch has one scale, unless it keeps both.
    assert which() == [True, False, False]
    assert which(scaled_concat=True) == [True, True, False]
    assert which(per_channel_acts=False) == [False, False, False]
    # mlp.0, mlp.1, final_mlp, final_mf
    assert which(split=True) == [True, True, False, False]
    assert which(overrides={r"mlp\.1": FLOAT}) == [True, False]
    assert which(overrides={r"mlp_relu\.0": FLOAT}) == [True, False, False]
    assert which(fuse_relu=False) == [False, False, False]


class TwoReaders(nn.Module):
    """A ReLU that a linear layer reads, and something else."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)
        self.mult = EltwiseMult()

    def forward(self, x):
        hidden = self.relu(self.first(x))
        return self.mult(hidden, self.second(hidden))


def test_a_relu_with_another_reader_has_one_scale():
    model, numbers = TwoReaders().eval().requires_grad_(False), {"min": -3.0, "max": 3.0}
    statistics = {
        name: {"inputs": {0: numbers, 1: numbers}, "output": numbers}
        for name in ("first", "relu", "second", "mult")
    }
    quantizer_of(model, torch.ones(1, 3), model_activation_stats=statistics, per_channel_acts=True)
    assert model.first.fixed_output.scale.shape == (1,)


@pytest.mark.parametrize("clip", ["none", "avg", "gauss", "laplace"])
@pytest.mark.parametrize("mode", MODES)
def test_ranges_of_output_features_start_at_0(mode, clip):
    """Whatever range the clip mode finds for the layer; it cuts the features' off."""
    model = small_model(9)
    statistics = model_statistics(model)
    for name in ("mlp.0", "mlp_relu.0"):
        statistics[name]["output"]["avg_min"] = 0.5 * statistics[name]["output"]["avg_max"]
    scales = []
    for per_channel in (False, True):
        copy = small_model(9)
        more = {"mode": mode, "clip_acts": clip, "per_channel_acts": per_channel}
        quantizer_of(copy, (*all_pairs(copy), True), model_activation_stats=statistics, **more)
        scales.append(copy.mlp[0].fixed_output.scale)
    assert (scales[1] >= 0.999 * scales[0]).all()
    assert len(scales[1].unique()) > 1


@pytest.mark.parametrize(
    ("column_max", "message"),
    [(None, "mlp.0: its output has no column_max"), ("1 2 3", "mlp.0: column_max of 3 columns, not 5")],
)
def test_statistics_without_columns(column_max, message):
    model = small_model(9)
    statistics = model_statistics(model)
    statistics["mlp.0"]["output"]["column_max"] = column_max
    if column_max is None:
        del statistics["mlp.0"]["output"]["column_max"]
    with pytest.raises(InputError, match=message):
        quantizer_of(
            model, (*all_pairs(model), True), model_activation_stats=statistics, per_channel_acts=True
        )


def test_flags(tmp_path):
    model = small_model(9)
    save_statistics(model_statistics(model), tmp_path / "stats.yaml")
    flags = f"--qe-stats-file {tmp_path}/stats.yaml --qe-scaled-concat --qe-embedding-bits 4 --qe-per-channel-acts"
    prepared(model, flags, all_pairs(model))
    assert isinstance(model.final_concat, ScaledConcat)
    assert model.mlp[0].has_output_scales
    assert isinstance(model.mf_item_embed, RowQuantizedEmbedding)
    assert not isinstance(model.mf_item_embed, QuantizedEmbedding)
    with pytest.raises(InputError, match="--qe-scaled-concat"):
        PostTrainLinearQuantizer(model, scaled_concat="yes")
    with pytest.raises(InputError, match="--qe-per-channel-acts"):
        PostTrainLinearQuantizer(model, per_channel_acts=1)
