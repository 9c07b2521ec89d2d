"""The post-training quantizer: every layer against a NumPy reference, what is converted, fused, refused, saved."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
import yaml
from helpers_quant import (
    CASES,
    CLIPS,
    MODES,
    TAGS,
    Activation,
    Reference,
    Settings,
    all_pairs,
    golden_arrays,
    golden_model,
    golden_pairs,
    golden_stats,
    golden_stats_path,
    integer_scores,
    model_statistics,
    numpy_weights,
    parse,
    prepared,
    reference_statistics,
    scores,
    small_model,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from distiller.modules import Concat, EltwiseAdd, EltwiseMult
from distiller.quantization import PostTrainLinearQuantizer
from distiller.system.cli import InputError

FLOAT = {"acts": 0, "wts": 0}
EMBEDDINGS = ("mf_user_embed", "mf_item_embed", "mlp_user_embed", "mlp_item_embed")
SEEDS = st.integers(0, 10_000)
BITS = st.integers(2, 8)


# --- comparing with the reference ---


def arguments_of(settings: Settings) -> dict:
    """The quantizer's arguments that give every layer these settings."""
    return {
        "bits_activations": settings.acts,
        "bits_parameters": settings.wts,
        "bits_accum": settings.accum,
        "mode": {"activations": settings.mode_acts, "weights": settings.mode_wts},
        "clip_acts": settings.clip,
        "clip_n_stds": settings.n_stds,
        "per_channel_wts": settings.per_channel,
        "scale_approx_mult_bits": settings.approx,
    }


def shrunk(stats: dict, factor: float) -> dict:
    """Statistics of narrower tensors, so that values saturate."""
    result = copy.deepcopy(stats)
    for entry in result.values():
        for tensor in (*entry["inputs"].values(), entry["output"]):
            for key in ("min", "max", "avg_min", "avg_max", "mean", "std", "b"):
                tensor[key] *= factor
    return result


def compare(model, stats, settings, pairs, integer=False, overrides=None, changes=None):
    """Assert that library and reference score ``pairs`` alike, bit for bit, with ``integer`` in integers too.

    ``overrides`` are the library's; ``changes`` the same for the reference, by layer name.
    """

    def of_layer(name: str) -> Settings:
        return Settings(**(vars(settings) | (changes or {}).get(name, {})))

    try:
        expected = Reference(numpy_weights(model), stats, of_layer)(*(index.numpy() for index in pairs))
    except ValueError:  # an asymmetric range upside down, which clipping to a consumer and n_std can make
        expected = None
    quantized = copy.deepcopy(model)
    quantizer = PostTrainLinearQuantizer(
        quantized,
        **arguments_of(settings),
        overrides=overrides,
        model_activation_stats=copy.deepcopy(stats),
    )
    if expected is None:
        with pytest.raises(InputError):
            quantizer.prepare_model((*pairs, True))
    else:
        quantizer.prepare_model((*pairs, True))
        np.testing.assert_array_equal(scores(quantized, pairs), expected)
        if integer:
            np.testing.assert_array_equal(integer_scores(quantized, pairs), expected)
    return expected


GOLDEN_SETTINGS = {
    "asym_u": {"mode_acts": "asym_u", "mode_wts": "asym_u"},
    "sym_per_channel": {"per_channel": True},
    "bits_6_4": {"acts": 6, "wts": 4, "mode_acts": "asym_u", "mode_wts": "asym_u", "per_channel": True},
    "accum_12": {"accum": 12, "mode_acts": "asym_u", "mode_wts": "asym_u", "per_channel": True},
}


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("case", GOLDEN_SETTINGS)
def test_the_reference_is_the_original(tag, case):
    assert case in CASES
    weights = numpy_weights(golden_model(tag))
    reference = Reference(weights, golden_stats(tag), lambda name: Settings(**GOLDEN_SETTINGS[case]))
    found = reference(*(index.numpy() for index in golden_pairs()))
    np.testing.assert_array_equal(found.reshape(-1), golden_arrays()[f"{tag}/{case}/scores"])


@st.composite
def any_settings(draw, bits=BITS, clips=CLIPS, accum=(32, 32, 24, 16, 12, 8)) -> Settings:
    clip = draw(st.sampled_from(clips))
    return Settings(
        acts=draw(bits),
        wts=draw(bits),
        accum=draw(st.sampled_from(accum)),
        mode_acts=draw(st.sampled_from(MODES)),
        mode_wts=draw(st.sampled_from(MODES)),
        clip=clip,
        n_stds=draw(st.sampled_from([0.7, 1, 2.5, 3])) if clip == "n_std" else None,
        per_channel=draw(st.booleans()),
        approx=draw(st.sampled_from([None, None, 2, 4, 8, 15])),
    )


LAYERS = st.lists(st.integers(1, 6), min_size=1, max_size=3).flatmap(
    lambda rest: st.sampled_from([2, 4, 6, 10]).map(lambda first: [first, *rest])
)


@hypothesis_settings(max_examples=120, deadline=None)
@given(
    any_settings(),
    SEEDS,
    st.booleans(),
    LAYERS,
    st.sampled_from([1.0, 0.6, 0.1]),
    st.sampled_from([0.05, 1, 4]),
)
def test_static_quantization_equals_the_reference(settings, seed, split, layers, factor, gain):
    model = small_model(seed, split, mf_dim=1 + seed % 5, layers=layers, gain=gain)
    stats = shrunk(model_statistics(model), factor)
    compare(model, stats, settings, all_pairs(model), integer=True)


@hypothesis_settings(max_examples=25, deadline=None)
@given(any_settings(bits=st.integers(9, 16), clips=CLIPS[:3], accum=(32, 32, 31, 20)), SEEDS, st.booleans())
def test_more_than_8_bits_equal_the_reference(settings, seed, split):
    model = small_model(seed, split, layers=(40, 30, 4))
    compare(model, model_statistics(model), settings, all_pairs(model))


@hypothesis_settings(max_examples=15, deadline=None)
@given(any_settings(clips=CLIPS[:3]), SEEDS, st.booleans())
def test_one_bit_weights_and_activations_equal_the_reference(settings, seed, split):
    modes = {
        key: mode.replace("_restr", "") for key, mode in vars(settings).items() if key.startswith("mode")
    }
    model = small_model(seed, split)
    one_bit = Settings(**(vars(settings) | modes | {"acts": 1, "wts": 1}))
    compare(model, model_statistics(model), one_bit, all_pairs(model), integer=True)


@pytest.mark.parametrize("split", [False, True])
def test_16_bit_accumulators_beyond_2_to_the_24_are_exact(split):
    model = small_model(3, split, mf_dim=50, layers=(200, 120, 4))
    settings = Settings(acts=16, wts=16, mode_acts="asym_u", mode_wts="asym_s")
    compare(model, model_statistics(model), settings, all_pairs(model))


@pytest.mark.parametrize("accum", [4, 6, 8, 12])
@pytest.mark.parametrize("split", [False, True])
def test_narrow_accumulators_saturate_in_linear_alone(split, accum):
    model = small_model(4, split, mf_dim=20, layers=(40, 20, 10))
    stats, pairs = model_statistics(model), all_pairs(model)
    narrow = compare(model, stats, Settings(accum=accum), pairs, integer=True)
    wide = compare(model, stats, Settings(accum=32), pairs)
    assert (narrow != wide).any()


@pytest.mark.parametrize("split", [False, True])
def test_a_bias_beyond_the_accumulator_saturates(split):
    model = small_model(5, split)
    model.mlp[1].bias.fill_(1e6)
    model.mlp[0].bias.fill_(-1e6)
    compare(
        model, model_statistics(model), Settings(accum=16, mode_acts="asym_u"), all_pairs(model), integer=True
    )


@hypothesis_settings(max_examples=30, deadline=None)
@given(any_settings(clips=("none",)), SEEDS, st.booleans())
def test_dynamic_quantization_equals_the_reference(settings, seed, split):
    model = small_model(seed, split, layers=(6, 5, 4))
    compare(model, None, settings, all_pairs(model))


@pytest.mark.parametrize("clip", CLIPS[1:])
@pytest.mark.parametrize("mode", MODES)
def test_dynamic_clipping_equals_the_reference(mode, clip):
    """But for the last bit of a mean, which can move a score by one quantum of the two last layers."""
    model = small_model(6, layers=(6, 5, 4))
    settings = Settings(mode_acts=mode, mode_wts=mode, clip=clip, n_stds=1.5)
    pairs = all_pairs(model)
    expected = Reference(numpy_weights(model), None, lambda name: settings)(*(x.numpy() for x in pairs))
    PostTrainLinearQuantizer(model, **arguments_of(settings)).prepare_model((*pairs, True))
    found = scores(model, pairs)
    assert np.isclose(found, expected, rtol=0, atol=1e-5).mean() > 0.9
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.06)


def test_dynamic_ranges_come_from_the_batch_at_hand():
    """The input over its own range, the output over its own, every forward anew."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    x = torch.tensor([[1.0, -2.0, 0.5], [4.0, 3.0, -1.0], [0.25, 0.0, 8.0]])
    with torch.no_grad():
        expected = model(x)
        PostTrainLinearQuantizer(model, 12, 16, mode="asym_u").prepare_model((x,))
        for factor in (1.0, 100.0, 0.01, 1.0):
            found = model(factor * x)
            width = max(found.max().item(), 0) - min(found.min().item(), 0)
            assert found.quant_params.scale.item() == pytest.approx(4095 / width, rel=0.01)
            if factor == 1:
                torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_dynamic_mode_leaves_elementwise_modules_in_float_and_says_so(caplog):
    model = small_model(1, split=True)
    with caplog.at_level("WARNING"):
        prepared(model, "--qe-dynamic", all_pairs(model))
    for name in ("mf_mult", "mlp_concat", "final_add"):
        assert any(name in message for message in caplog.messages), name
    assert not any("sigmoid" in message or "mlp.0" in message for message in caplog.messages)


def test_dynamic_embedding_tables_take_their_own_range():
    model = small_model(2)
    table = model.mf_item_embed.weight.numpy().copy()
    prepared(model, "--qe-dynamic --qem asym_u", all_pairs(model))
    expected = np.float32(255) * (np.float32(1) / (table.max() - table.min()))
    assert model.mf_item_embed.w_scale.numpy() == expected


# --- float on one side ---


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("with_stats", [False, True])
def test_float_activations_quantize_weights_biases_and_tables_in_place(split, mode, per_channel, with_stats):
    model = small_model(7, split)
    stats = shrunk(model_statistics(model), 0.8) if with_stats else None
    settings = Settings(acts=0, wts=3, mode_acts=mode, mode_wts=mode, per_channel=per_channel)
    expected = compare(model, stats, settings, all_pairs(model))
    assert np.abs(expected - scores(model, all_pairs(model))).max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("with_stats", [False, True])
def test_float_weights_under_quantized_activations(split, mode, with_stats):
    model = small_model(8, split)
    stats = shrunk(model_statistics(model), 0.8) if with_stats else None
    settings = Settings(acts=4, wts=0, mode_acts=mode, mode_wts=mode)
    compare(model, stats, settings, all_pairs(model))


def test_all_in_float_is_the_model_itself():
    model = small_model(9)
    expected = scores(model, all_pairs(model))
    prepared(model, "--qeba 0 --qebw 0", all_pairs(model))
    np.testing.assert_array_equal(scores(model, all_pairs(model)), expected)
    assert {type(m).__module__.split(".")[0] for m in model.modules()} <= {"torch", "neural_cf", "distiller"}
    assert types_of(model) == expected_types(False, Embedding="Embedding", Linear="Linear", rest=None)


NO_QUANT = [
    ["sigmoid"],
    ["mlp.1"],
    ["mlp_relu.0"],
    ["mlp.0", "mlp_relu.0"],
    ["mf_mult"],
    ["mlp_concat"],
    ["mlp_user_embed"],
    ["mf_user_embed", "mf_item_embed"],
    ["mlp.0", "mlp_relu.0", "mlp.1", "mlp_relu.1", "mlp_concat"],
]


@pytest.mark.parametrize("layers", [*NO_QUANT, ["final"], ["final_concat"]], ids=" ".join)
@pytest.mark.parametrize("mode", ["sym", "asym_u"])
def test_no_quant_layers_stay_in_float(layers, mode):
    check_no_quant(False, layers, mode)


@pytest.mark.parametrize(
    "layers", [*NO_QUANT, ["final_add"], ["final_mf"], ["final_mlp", "sigmoid"]], ids=" ".join
)
@pytest.mark.parametrize("mode", ["sym_restr", "asym_s"])
def test_no_quant_layers_stay_in_float_in_a_split_model(layers, mode):
    check_no_quant(True, layers, mode)


def check_no_quant(split: bool, layers: list[str], mode: str) -> None:
    model = small_model(10, split)
    stats = model_statistics(model)
    overrides = {re.escape(layer): {"bits_activations": 0, "bits_weights": 0} for layer in layers}
    settings = Settings(acts=5, wts=5, mode_acts=mode, mode_wts=mode)
    changes = dict.fromkeys(layers, FLOAT)
    compare(model, stats, settings, all_pairs(model), overrides=overrides, changes=changes)


@pytest.mark.parametrize("clip", ["gauss", "laplace"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_input_from_a_float_producer_is_never_half_range(mode, clip, dynamic):
    """Though the layer itself, with its ReLU, is."""
    model = small_model(10)
    with torch.no_grad():
        for embedding in (model.mlp_user_embed, model.mlp_item_embed):
            embedding.weight.abs_()
    stats = model_statistics(model)
    layers = ["mlp_concat", "mlp_user_embed", "mlp_item_embed"]
    settings = Settings(acts=4, mode_acts=mode, mode_wts=mode, clip=clip)
    changes = dict.fromkeys(layers, FLOAT)
    if not dynamic:
        overrides = {layer: {"bits_activations": 0, "bits_weights": 0} for layer in layers}
        compare(model, stats, settings, all_pairs(model), overrides=overrides, changes=changes)
        return
    PostTrainLinearQuantizer(model, **arguments_of(settings)).prepare_model((*all_pairs(model), True))
    x = torch.rand(20, 6)
    reference = Reference(numpy_weights(small_model(10)), None, lambda name: settings)
    expected = reference.input_grid("mlp.0", 0, Activation(x.numpy()))
    found = model.mlp[0].input_params(0, x)
    assert found.scale.item() == pytest.approx(expected.scale.item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["asym_u", "asym_s"])
def test_products_beyond_32_bits_saturate(mode):
    model = small_model(28, mf_dim=20)
    with torch.no_grad():
        for embedding in (model.mf_user_embed, model.mf_item_embed):
            embedding.weight.abs_().add_(2)
    settings = Settings(acts=16, wts=16, mode_acts=mode, mode_wts=mode)
    compare(model, model_statistics(model), settings, all_pairs(model))


def test_the_no_quant_flag_leaves_layers_alone(tmp_path):
    model = small_model(11)
    write_stats(model_statistics(model), tmp_path / "stats.yaml")
    flags = f"--qe-stats-file {tmp_path}/stats.yaml --qenql mlp.1 mf_user_embed sigmoid"
    originals = {name: model.get_submodule(name) for name in ("mlp.1", "mf_user_embed", "sigmoid")}
    weights = numpy_weights(model)
    prepared(model, flags, all_pairs(model))
    for name, module in originals.items():
        assert model.get_submodule(name) is module
    for key in ("mlp.1.weight", "mlp.1.bias", "mf_user_embed.weight"):
        np.testing.assert_array_equal(model.state_dict()[key].numpy(), weights[key])


@pytest.mark.parametrize("split", [False, True])
def test_no_clip_layers_use_their_whole_range(split, tmp_path):
    model = small_model(12, split)
    stats = model_statistics(model)
    unclipped = ["mlp.0", "mlp_concat", "mf_mult"]
    settings = Settings(mode_acts="asym_u", mode_wts="asym_u", clip="laplace", acts=4)
    reference = Reference(
        numpy_weights(model),
        stats,
        lambda name: Settings(**(vars(settings) | ({"clip": "none"} if name in unclipped else {}))),
    )
    pairs = all_pairs(model)
    expected = reference(*(index.numpy() for index in pairs))
    write_stats(stats, tmp_path / "stats.yaml")
    source = f"--qe-stats-file {tmp_path}/stats.yaml --qem asym_u --qeca laplace --qeba 4"
    clipped_everywhere = copy.deepcopy(model)
    prepared(model, f"{source} --qencl {' '.join(unclipped)}", pairs)
    np.testing.assert_array_equal(scores(model, pairs), expected)
    prepared(clipped_everywhere, source, pairs)
    assert (scores(clipped_everywhere, pairs) != expected).any()


# --- which layers are converted ---


def types_of(model: nn.Module) -> dict[str, str]:
    """Class names of what stands in each place of the model, inside wrappers not counted."""
    names = [
        "mf_user_embed",
        "mf_item_embed",
        "mlp_user_embed",
        "mlp_item_embed",
        "mf_mult",
        "mlp_concat",
        "mlp.0",
        "mlp.1",
        "mlp_relu.0",
        "mlp_relu.1",
        "final_concat",
        "final",
        "final_mlp",
        "final_mf",
        "final_add",
        "sigmoid",
    ]
    return {
        name: type(model.get_submodule(name)).__name__ for name in names if hasattr(model, name.split(".")[0])
    }


def expected_types(split: bool, Embedding: str, Linear: str, rest: str | None, **exceptions: str) -> dict:
    """``rest`` is None where every other module stays, else what the ReLUs become."""
    quantized = rest is not None
    mult, concat, add, sigmoid = (
        ("QuantizedMult", "QuantizedConcat", "QuantizedAdd", "FakeQuantized")
        if quantized
        else ("EltwiseMult", "Concat", "EltwiseAdd", "Sigmoid")
    )
    types = dict.fromkeys(EMBEDDINGS, Embedding)
    types |= {"mf_mult": mult, "mlp_concat": concat, "mlp.0": Linear, "mlp.1": Linear}
    types |= dict.fromkeys(["mlp_relu.0", "mlp_relu.1"], rest or "ReLU")
    if split:
        types |= {"final_mlp": Linear, "final_mf": Linear, "final_add": add}
    else:
        types |= {"final_concat": concat, "final": Linear}
    return types | {"sigmoid": sigmoid} | {key.replace("__", "."): value for key, value in exceptions.items()}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ("", {"Embedding": "QuantizedEmbedding", "Linear": "QuantizedLinear", "rest": "Identity"}),
        ("--qeba 0", {"Embedding": "QuantizedEmbedding", "Linear": "WeightQuantizedLinear", "rest": None}),
        ("--qebw 0", {"Embedding": "FakeQuantized", "Linear": "FakeQuantized", "rest": "Identity"}),
        (
            "--qenql mlp.0",
            {
                "Embedding": "QuantizedEmbedding",
                "Linear": "QuantizedLinear",
                "rest": "Identity",
                "mlp__0": "Linear",
                "mlp_relu__0": "FakeQuantized",
            },
        ),
        (
            "--qenql mlp.1 mlp_relu.1 mf_mult mf_user_embed sigmoid",
            {
                "Embedding": "QuantizedEmbedding",
                "Linear": "QuantizedLinear",
                "rest": "Identity",
                "mlp__1": "Linear",
                "mlp_relu__1": "ReLU",
                "mf_mult": "EltwiseMult",
                "mf_user_embed": "Embedding",
                "sigmoid": "Sigmoid",
            },
        ),
    ],
)
def test_what_is_converted_to_what(split, flags, kinds, tmp_path):
    model = small_model(13, split)
    write_stats(model_statistics(model), tmp_path / "stats.yaml")
    prepared(model, f"{flags} --qe-stats-file {tmp_path}/stats.yaml", all_pairs(model))
    assert types_of(model) == expected_types(split, **kinds)


@pytest.mark.parametrize("split", [False, True])
def test_what_dynamic_mode_converts(split):
    model = small_model(13, split)
    prepared(model, "--qe-dynamic", all_pairs(model))
    kinds = {"mf_mult": "EltwiseMult", "mlp_concat": "Concat"}
    kinds |= {"final_add": "EltwiseAdd"} if split else {"final_concat": "Concat"}
    quantized = {"Embedding": "QuantizedEmbedding", "Linear": "QuantizedLinear", "rest": "Identity"}
    assert types_of(model) == expected_types(split, **quantized, **kinds)


# --- fusing and clipping ---


class Branching(nn.Module):
    """A Linear into ``activation``; ``how`` says what else reads the Linear's output."""

    def __init__(self, activation: nn.Module, how: str = "alone"):
        super().__init__()
        self.first, self.activation, self.second = nn.Linear(4, 3), activation, nn.Linear(3, 2)
        self.other, self.add, self.how = nn.Linear(3, 2), EltwiseAdd(), how

    def forward(self, x, *_):
        y = self.first(x)
        z = self.second(self.activation(y))
        if self.how == "consumed":
            return self.add(z, self.other(y))
        if self.how == "returned":
            return z, y
        if self.how == "function":
            return z + y.sum()
        return z


def branching(how: str, activation: type = nn.ReLU):
    torch.manual_seed(0)
    model = Branching(activation(), how).eval()
    with torch.no_grad():
        model.first.weight.mul_(20)
    x = torch.randn(50, 4)
    stats = reference_statistics(model, [(x,)])
    quantizer = PostTrainLinearQuantizer(model, mode="asym_u", model_activation_stats=stats)
    quantizer.prepare_model((x,))
    return model, stats, quantizer


def test_a_relu_is_fused_into_its_only_producer():
    model, stats, quantizer = branching("alone")
    assert type(model.activation) is nn.Identity
    assert model.first.fused_relu
    high = stats["first"]["output"]["max"]
    assert model.first.output_zero_point.item() == 0
    assert model.first.output_scale.item() == pytest.approx(255 / high, rel=1e-6)
    assert quantizer.statistics["first"]["output"]["min"] == 0.0
    assert quantizer.statistics["activation"]["inputs"][0] == quantizer.statistics["first"]["output"]


@pytest.mark.parametrize("how", ["consumed", "returned", "function"])
def test_an_output_with_another_reader_is_neither_fused_nor_clipped(how):
    model, stats, quantizer = branching(how)
    assert type(model.activation).__name__ == "FakeQuantized"
    assert not model.first.fused_relu
    assert quantizer.statistics["first"] == stats["first"]
    assert quantizer.statistics["activation"] == stats["activation"]
    assert model.first.output_zero_point.item() < 0
    x = torch.randn(9, 4)
    with torch.no_grad():
        outputs = model(x)
        assert (model.first(x) < 0).any()
    if how == "returned":
        assert (outputs[1] < 0).any()


@pytest.mark.parametrize(("activation", "bound"), [(nn.Sigmoid, 6.0), (nn.Tanh, 4.0)])
def test_an_output_into_a_saturating_function_is_clipped(activation, bound):
    model, stats, quantizer = branching("alone", activation)
    before, after = stats["first"]["output"], quantizer.statistics["first"]["output"]
    assert before["min"] < -bound
    assert before["max"] > bound
    assert (after["min"], after["max"]) == (-bound, bound)
    assert after["avg_min"] == max(before["avg_min"], -bound)
    assert after["avg_max"] == min(before["avg_max"], bound)
    assert {key: after[key] for key in ("mean", "std", "b", "shape")} == {
        key: before[key] for key in ("mean", "std", "b", "shape")
    }
    assert quantizer.statistics["activation"]["inputs"][0] == after
    assert quantizer.statistics["activation"]["output"] == stats["activation"]["output"]
    assert not model.first.fused_relu
    assert model.first.output_scale.item() == pytest.approx(255 / (2 * bound), rel=1e-6)


@pytest.mark.parametrize(
    ("activation", "low", "high", "expected"),
    [
        (nn.ReLU, -3.0, -1.0, (0.0, 0.0)),
        (nn.ReLU, 1.0, 2.0, (1.0, 2.0)),
        (nn.Sigmoid, 7.0, 9.0, (6.0, 6.0)),
        (nn.Sigmoid, -9.0, -8.0, (-6.0, -6.0)),
        (nn.Sigmoid, -2.0, 3.0, (-2.0, 3.0)),
        (nn.Tanh, 4.5, 9.0, (4.0, 4.0)),
    ],
)
def test_a_range_outside_the_bounds_becomes_the_bound(activation, low, high, expected):
    model = nn.Sequential(nn.Linear(2, 2), activation()).eval()
    x = torch.zeros(2, 2)
    stats = reference_statistics(model, [(x,)])
    stats["0"]["output"] |= {"min": low, "max": high, "avg_min": low, "avg_max": high}
    quantizer = PostTrainLinearQuantizer(model, model_activation_stats=stats)
    quantizer.prepare_model((x,))
    output = quantizer.statistics["0"]["output"]
    assert (output["min"], output["max"]) == expected
    assert (output["avg_min"], output["avg_max"]) == expected


def test_nothing_is_fused_or_clipped_where_the_producer_stays_in_float():
    model = small_model(14)
    stats = model_statistics(model)
    quantizer = PostTrainLinearQuantizer(
        model, overrides={r"mlp\.0|final": {"bits_activations": 0}}, model_activation_stats=stats
    )
    quantizer.prepare_model((*all_pairs(model), True))
    for name in ("mlp.0", "mlp_relu.0", "final", "sigmoid"):
        assert quantizer.statistics[name] == stats[name], name
    assert type(model.mlp_relu[0]).__name__ == "FakeQuantized"
    assert type(model.mlp_relu[1]) is nn.Identity


def test_the_caller_keeps_its_statistics():
    model = small_model(15)
    stats = model_statistics(model)
    before = copy.deepcopy(stats)
    pairs = all_pairs(model)
    quantizer = PostTrainLinearQuantizer(model, model_activation_stats=stats, clip_acts="avg")
    quantizer.prepare_model((*pairs, True))
    scores(model, pairs)
    assert stats == before
    assert quantizer.statistics != before


class Elementwise(nn.Module):
    """Every elementwise module with a ReLU behind it, between Linears."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(6, 2)
        self.mult, self.mult_relu = EltwiseMult(), nn.ReLU()
        self.add, self.add_relu = EltwiseAdd(), nn.ReLU()
        self.concat, self.concat_relu = Concat(dim=1), nn.ReLU()

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        product, total = self.mult_relu(self.mult(left, right)), self.add_relu(self.add(left, right))
        return self.last(self.concat_relu(self.concat(product, total)))


@pytest.mark.parametrize("mode", MODES)
def test_relus_are_fused_into_elementwise_modules(mode):
    torch.manual_seed(1)
    model, x = Elementwise().eval(), torch.randn(64, 4)
    with torch.no_grad():
        expected = model(x)
    stats = reference_statistics(model, [(x,)])
    PostTrainLinearQuantizer(model, 12, 12, mode=mode, model_activation_stats=stats).prepare_model((x,))
    for name in ("mult", "add", "concat"):
        assert type(model.get_submodule(f"{name}_relu")) is nn.Identity
        assert model.get_submodule(name).fused_relu
    with torch.no_grad():
        found = model(x)
        product = model.mult(model.left(x), model.right(x))
    assert (product >= 0).all()
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_relus_behind_float_elementwise_modules_stay_in_dynamic_mode():
    torch.manual_seed(1)
    model, x = Elementwise().eval(), torch.randn(64, 4)
    with torch.no_grad():
        expected = model(x)
    PostTrainLinearQuantizer(model, 12, 12, mode="asym_u").prepare_model((x,))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=0.01, rtol=0)


def test_an_embedding_row_beyond_the_calibrated_range_saturates():
    model = small_model(16)
    stats = model_statistics(model)
    with torch.no_grad():
        model.mf_user_embed.weight[3] = 1000.0
        model.mf_user_embed.weight[4] = -1000.0
    output = stats["mf_user_embed"]["output"]
    pairs = all_pairs(model)
    compare(model, stats, Settings(mode_acts="asym_u", mode_wts="asym_u"), pairs, integer=True)
    prepared_model = copy.deepcopy(model)
    PostTrainLinearQuantizer(prepared_model, mode="asym_u", model_activation_stats=stats).prepare_model(
        (*pairs, True)
    )
    rows = prepared_model.mf_user_embed(torch.tensor([3, 4]))
    step = (output["max"] - output["min"]) / 255
    assert rows[0].numpy() == pytest.approx(output["max"], abs=step)
    assert rows[1].numpy() == pytest.approx(output["min"], abs=step)


def test_embeddings_ignore_the_clip_mode_of_activations():
    stats = model_statistics(small_model(17))
    scales = []
    for clip in ("none", "avg", "laplace"):
        model = small_model(17)
        quantizer = PostTrainLinearQuantizer(model, clip_acts=clip, model_activation_stats=stats)
        quantizer.prepare_model((*all_pairs(model), True))
        scales.append((model.mlp_item_embed.w_scale.item(), model.mlp_concat.output_scale.item()))
    assert len({embedding for embedding, _ in scales}) == 1
    assert len({concat for _, concat in scales}) == 3


# --- overrides and files ---


def test_the_first_override_that_matches_wins():
    model = small_model(18)
    stats = model_statistics(model)
    overrides = {
        r"mlp\.1": {"bits_activations": 3, "bits_weights": 5},
        r"mlp\.\d": {"bits_activations": 7, "mode": "asym_u"},
        r"mf_.*_embed": {"bits_weights": 2, "mode": {"activations": "sym", "weights": "asym_s"}},
        "mlp_concat": {"clip_acts": "n_std", "clip_n_stds": 1.5},
        ".*": {"bits_activations": 6},
    }
    changes = {
        "mlp.1": {"acts": 3, "wts": 5},
        "mlp.0": {"acts": 7, "mode_acts": "asym_u", "mode_wts": "asym_u"},
        "mf_user_embed": {"wts": 2, "mode_wts": "asym_s"},
        "mf_item_embed": {"wts": 2, "mode_wts": "asym_s"},
        "mlp_concat": {"clip": "n_std", "n_stds": 1.5},
    }
    rest = ["mf_mult", "final_concat", "final", "sigmoid"]
    changes |= {name: {"acts": 6} for name in rest}
    compare(model, stats, Settings(), all_pairs(model), integer=True, overrides=overrides, changes=changes)


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 400), nn.Linear(400, 3)

    def forward(self, x):
        return self.second(self.first(x))


def two_linears() -> tuple[TwoLinears, torch.Tensor, dict]:
    """The second sums large numbers that all but cancel."""
    torch.manual_seed(0)
    model, x = TwoLinears().eval(), torch.rand(64, 4)
    with torch.no_grad():
        for tensor in (model.first.weight, model.first.bias):
            tensor.abs_()
            tensor[200:] = tensor[:200] + 1e-4 * torch.rand_like(tensor[200:])
        model.second.weight[:, :200].abs_()
        model.second.weight[:, 200:] = -model.second.weight[:, :200]
        model.second.bias.zero_()
    return model, x, reference_statistics(model, [(x,)])


@pytest.mark.parametrize("bits", [12, 16])
def test_a_producer_of_more_bits_than_its_consumer_is_exact(bits):
    """The accumulator outgrows float32's integers though the Linear's own settings are of 8 bits."""
    model, x, stats = two_linears()
    overrides = {"first": {"bits_activations": bits, "bits_weights": 16}}
    PostTrainLinearQuantizer(
        model, mode="asym_u", overrides=overrides, model_activation_stats=stats
    ).prepare_model((x,))
    with torch.no_grad():
        middle, found = model.first(x), model.second(model.first(x))
    second, grid = model.second, middle.quant_params
    integers = np.rint((middle * grid.scale).numpy().astype(np.float64)).astype(np.int64)
    weights = second.weight.numpy().astype(np.int64) + second.w_zero_point.numpy().astype(np.int64)
    accumulator = (integers @ weights.T).astype(np.float32)
    s_out, zero = second.output_scale.numpy(), second.output_zero_point.numpy()
    factor = s_out / (grid.scale * second.w_scale).numpy()
    q = np.clip(np.rint(accumulator * factor - zero), 0, 255)
    assert len(np.unique(q)) > 10
    np.testing.assert_array_equal(found.numpy(), (q + zero) / s_out)


@pytest.mark.parametrize("mode", ["sym", "sym_restr"])
@pytest.mark.parametrize("layer", ["mlp.0", "final"])
def test_symmetric_n_std_beyond_a_consumers_bound_uses_the_larger_magnitude(layer, mode):
    """lo > hi is no error in a symmetric mode, which knows but max_abs = max(|lo|, |hi|)."""
    model = small_model(27)
    stats = model_statistics(model)
    stats[layer]["output"] |= {"min": -30.0, "max": 2.0, "mean": -20.0, "std": 4.0}  # lo = 0 or -6, hi = -16
    settings = Settings(mode_acts=mode, mode_wts=mode, clip="n_std", n_stds=1.0)
    compare(model, stats, settings, all_pairs(model))
    quantizer = PostTrainLinearQuantizer(model, **arguments_of(settings), model_activation_stats=stats)
    quantizer.prepare_model((*all_pairs(small_model(27)), True))
    scale = model.get_submodule(layer).output_scale.item()
    assert scale == pytest.approx((127.5 if mode == "sym" else 127) / 16)


@pytest.mark.parametrize("layer", ["mlp.0", "final"])
def test_asymmetric_n_std_beyond_a_consumers_bound_is_an_input_error(layer):
    model = small_model(27)
    stats = model_statistics(model)
    stats[layer]["output"] |= {"min": -30.0, "max": 2.0, "mean": -20.0, "std": 4.0}
    quantizer = PostTrainLinearQuantizer(
        model, mode="asym_u", clip_acts="n_std", clip_n_stds=1.0, model_activation_stats=stats
    )
    with pytest.raises(InputError, match=re.escape(layer)):
        quantizer.prepare_model((*all_pairs(model), True))


@pytest.mark.parametrize("pattern", ["mlp", "lp.0", "mlp.0x", "nosuch", "relu"])
def test_an_override_that_matches_no_whole_name_is_an_error(pattern):
    model = small_model(18)
    quantizer = PostTrainLinearQuantizer(
        model, overrides={pattern: {"bits_activations": 4}}, model_activation_stats=model_statistics(model)
    )
    with pytest.raises(InputError, match=pattern):
        quantizer.prepare_model((*all_pairs(model), True))


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"(": {"bits_activations": 4}}, "("),
        ({"mlp.0": {"bits": 4}}, "mlp.0"),
        ({"mlp.0": {"bits_activations": 17}}, "mlp.0"),
        ({"mlp.0": {"bits_weights": -1}}, "mlp.0"),
        ({"mlp.0": {"bits_weights": "8"}}, "mlp.0"),
        ({"mlp.0": {"clip_acts": "n_std"}}, "mlp.0"),
        ({"mlp.0": {"clip_acts": "often"}}, "often"),
        ({"mlp.0": {"mode": "asymmetric"}}, "asymmetric"),
        ({"mlp.0": 8}, "mlp.0"),
        ({5: {"bits_weights": 4}}, "5"),
    ],
)
def test_bad_overrides_are_input_errors(overrides, word):
    model = small_model(18)
    stats = model_statistics(model)
    with pytest.raises(InputError) as caught:
        PostTrainLinearQuantizer(model, overrides=overrides, model_activation_stats=stats).prepare_model(
            (*all_pairs(model), True)
        )
    assert word in str(caught.value)


def write_stats(stats: dict, path) -> None:
    path.write_text(yaml.safe_dump(stats, sort_keys=False))


def write_config(path, arguments, name="PostTrainLinearQuantizer") -> str:
    path.write_text(yaml.safe_dump({"quantizers": {"post": {"class": name, **arguments}}}, sort_keys=False))
    return f"--qe-config-file {path}"


def test_a_config_file_does_what_the_arguments_say(tmp_path):
    model = small_model(20)
    stats, pairs = model_statistics(model), all_pairs(model)
    write_stats(stats, tmp_path / "stats.yaml")
    arguments = {
        "bits_activations": 6,
        "bits_parameters": 5,
        "bits_accum": 14,
        "mode": {"activations": "ASYMMETRIC_UNSIGNED", "weights": "sym_restr"},
        "clip_acts": "n_std",
        "clip_n_stds": 2.5,
        "per_channel_wts": True,
        "model_activation_stats": str(tmp_path / "stats.yaml"),
        "scale_approx_mult_bits": 8,
        "overrides": {"mlp.0": {"bits_activations": 4}, "mlp.*": {"bits_weights": 7}},
    }
    settings = Settings(6, 5, 14, "asym_u", "sym_restr", "n_std", 2.5, True, 8)
    changes = {"mlp.0": {"acts": 4}} | {
        name: {"wts": 7} for name in ("mlp.1", "mlp_user_embed", "mlp_item_embed")
    }
    reference = Reference(
        numpy_weights(model), stats, lambda name: Settings(**(vars(settings) | changes.get(name, {})))
    )
    expected = reference(*(index.numpy() for index in pairs))
    prepared(model, write_config(tmp_path / "config.yaml", arguments), pairs)
    np.testing.assert_array_equal(scores(model, pairs), expected)


@pytest.mark.parametrize("mode", ["asym_u", "ASYMMETRIC_UNSIGNED"])
def test_a_config_file_without_statistics_is_dynamic(mode, tmp_path):
    model, pairs = small_model(20), all_pairs(small_model(20))
    by_flags = copy.deepcopy(model)
    quantizer = prepared(model, write_config(tmp_path / "config.yaml", {"mode": mode}), pairs)
    assert quantizer.dynamic
    prepared(by_flags, "--qe-dynamic --qem asym_u", pairs)
    np.testing.assert_array_equal(scores(model, pairs), scores(by_flags, pairs))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "quantizers:",
        "[1, 2]",
        "just words",
        "quantizers: {a: {class: PostTrainLinearQuantizer}, b: {class: PostTrainLinearQuantizer}}",
        "quantizers: {}",
        "quantizers: [PostTrainLinearQuantizer]",
        "quantizers: {a: PostTrainLinearQuantizer}",
        "quantizers: {a: {bits_activations: 8}}",
        "quantizers: {a: {class: QuantAwareTrainRangeLinearQuantizer}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, bits: 8}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, model: 8}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, 8: 8}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, bits_activations: eight}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, bits_activations: 17}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, bits_parameters: 2.5}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, bits_accum: many}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, mode: signed}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, mode: [sym, sym]}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, mode: {activations: sym}}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, mode: {activations: sym, wts: sym}}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, mode: {activations: sym, weights: 3}}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, clip_acts: n_std}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, clip_acts: n_std, clip_n_stds: many}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, clip_acts: [none]}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, scale_approx_mult_bits: 0}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, per_channel_wts: sometimes}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, overrides: [mlp.0]}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, overrides: 3}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, overrides: {nosuch: {bits_weights: 4}}}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, overrides: {mlp.0: [8]}}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, model_activation_stats: 5}}",
        "quantizers: {a: {class: PostTrainLinearQuantizer, model_activation_stats: {mlp.0: 5}}}",
        "quantizers: {a: {class: !!python/name:os.system }}",
        "quantizers: {a: [}",
        "a: \x00",
    ],
)
def test_a_bad_config_file_is_an_input_error(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    model = small_model(21)
    with pytest.raises(InputError) as caught:
        prepared(model, f"--qe-config-file {tmp_path}/config.yaml", all_pairs(model))
    assert "\n" not in str(caught.value)


def test_a_config_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        PostTrainLinearQuantizer.from_args(small_model(0), parse(f"--qe-config-file {tmp_path}/none.yaml"))
    with pytest.raises(FileNotFoundError):
        PostTrainLinearQuantizer.from_args(small_model(0), parse(f"--qe-stats-file {tmp_path}/none.yaml"))


def test_files_left_in_the_run_directory(tmp_path):
    flags = f"--qem asym_u --qemw sym --qebw 7 --qepc --qeca avg --qe-stats-file {golden_stats_path('split')}"
    model = golden_model("split")
    quantizer = prepared(model, flags, golden_pairs())
    quantizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "layer_quant_params.yaml",
        "quant_stats_after_prepare_model.yaml",
    ]
    text = (tmp_path / "quant_stats_after_prepare_model.yaml").read_text()
    assert not re.search(r"[&*]id\d", text)
    stats, original = yaml.safe_load(text), golden_stats("split")
    assert list(stats) == list(original)
    assert stats["mlp.0"]["output"] == original["mlp.0"]["output"] | {"min": 0.0, "avg_min": 0.0}
    assert stats["mlp_relu.0"]["inputs"][0] == stats["mlp.0"]["output"]
    assert -6 <= stats["final_add"]["output"]["min"] <= stats["final_add"]["output"]["max"] <= 6
    assert stats["mf_mult"] == original["mf_mult"]

    layers = yaml.safe_load((tmp_path / "layer_quant_params.yaml").read_text())
    wrapped = [n for n, kind in types_of(model).items() if kind not in ("Identity", "ReLU")]
    assert set(layers) == set(wrapped)
    for name, entry in layers.items():
        text = yaml.safe_dump(entry)
        assert "bits" in text, name
        assert "mode" in text, name
        module = model.get_submodule(name)
        for key in ("output_scale", "output_zero_point", "w_scale", "w_zero_point"):
            if hasattr(module, key) and getattr(module, key).numel() == 1:
                assert entry[key] == getattr(module, key).item(), (name, key)
    assert layers["mlp.0"]["bits_activations"] == 8
    assert layers["mlp.0"]["bits_weights"] == 7
    assert layers["mlp.0"]["mode_activations"] == "asym_u"
    assert layers["mlp.0"]["mode_weights"] == "sym"
    assert layers["mlp.0"]["clip_acts"] == "avg"
    assert layers["mlp.0"]["per_channel_wts"] is True
    assert layers["mf_user_embed"]["bits_weights"] == 7


def test_without_statistics_only_the_parameters_are_saved(tmp_path):
    model = small_model(22)
    prepared(model, "--qe-dynamic", all_pairs(model)).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["layer_quant_params.yaml"]
    assert "mlp.0" in yaml.safe_load((tmp_path / "layer_quant_params.yaml").read_text())


def test_float_weights_are_kept_when_asked_for():
    model = small_model(23)
    weights = numpy_weights(model)
    prepared(model, "--qe-dynamic --qe-save-fp-weights", all_pairs(model))
    np.testing.assert_array_equal(model.mlp[0].float_weight.numpy(), weights["mlp.0.weight"])
    np.testing.assert_array_equal(model.mlp[0].float_bias.numpy(), weights["mlp.0.bias"])
    without = small_model(23)
    prepared(without, "--qe-dynamic", all_pairs(without))
    assert "mlp.0.float_weight" not in without.state_dict()


# --- what is refused ---


def without(layer: str, *path):
    def change(stats: dict) -> None:
        entry = stats
        *head, last = (layer, *path)
        for key in head:
            entry = entry[key]
        del entry[last]

    return change


def upside_down(layer: str):
    return lambda stats: stats[layer]["output"].update(min=1.0, max=-1.0)


def unchanged(stats: dict) -> None:
    pass


@pytest.mark.parametrize(
    ("flags", "change", "words"),
    [
        ("--qenql nosuch", unchanged, ["--qe-no-quant-layers", "nosuch"]),
        ("--qenql mlp", unchanged, ["--qe-no-quant-layers", "mlp"]),
        ("--qenql mlp.7", unchanged, ["--qe-no-quant-layers", "mlp.7"]),
        ("--qencl mlp.0 other", unchanged, ["--qe-no-clip-layers", "other"]),
        ("--qeca n_std", unchanged, ["--qe-clip-n-stds", "layer m"]),
        ("--qeca n_std --qe-clip-n-stds 0", unchanged, ["--qe-clip-n-stds", "layer m"]),
        ("--qeca n_std --qe-clip-n-stds -2", unchanged, ["--qe-clip-n-stds", "layer m"]),
        ("--qeca n_std --qe-clip-n-stds nan", unchanged, ["--qe-clip-n-stds", "layer m"]),
        ("--qeca laplace --qeba 9", unchanged, ["--qe-clip-acts", "layer m", "9"]),
        ("--qeca gauss --qeba 16", unchanged, ["--qe-clip-acts", "layer m", "16"]),
        ("--qeba 17", unchanged, ["--qe-bits-acts", "layer m", "17"]),
        ("--qeba -1", unchanged, ["--qe-bits-acts", "layer m", "-1"]),
        ("--qebw 17", unchanged, ["--qe-bits-wts", "layer m", "17"]),
        ("--qebw -8", unchanged, ["--qe-bits-wts", "layer m", "-8"]),
        ("--qe-bits-accum 0", unchanged, ["--qe-bits-accum"]),
        ("--qesab 1", unchanged, ["--qe-scale-approx-bits"]),  # a multiplier of 1 bit is 0 for most scales
        ("--qesab 0", unchanged, ["--qe-scale-approx-bits"]),
        ("--qem sym_restr --qeba 1", unchanged, ["--qe-mode"]),
        ("--qem sym_restr --qebw 1", unchanged, ["--qe-mode"]),
        ("", without("mlp.0"), ["--qe-stats-file", "mlp.0"]),
        ("", without("sigmoid"), ["--qe-stats-file", "sigmoid"]),
        ("", without("mf_item_embed"), ["--qe-stats-file", "mf_item_embed"]),
        ("--qebw 0", without("mf_item_embed"), ["--qe-stats-file", "mf_item_embed"]),
        ("", without("final_concat", "output"), ["--qe-stats-file", "final_concat", "output"]),
        ("", without("mlp.1", "output", "max"), ["--qe-stats-file", "mlp.1", "max"]),
        ("", without("mlp_user_embed", "output", "min"), ["--qe-stats-file", "mlp_user_embed", "min"]),
        ("--qeca avg", without("mlp.1", "output", "avg_max"), ["--qe-stats-file", "mlp.1", "avg_max"]),
        (
            "--qeca laplace",
            without("mf_mult", "output", "b"),
            ["--qe-stats-file", "mf_mult", " b"],
        ),
        ("--qeca gauss", without("mf_mult", "output", "std"), ["--qe-stats-file", "mf_mult", "std"]),
        (
            "--qeca gauss --qem asym_u",
            without("mf_mult", "output", "avg_min"),
            ["--qe-stats-file", "mf_mult", "avg_min"],
        ),
        (
            "--qeca n_std --qe-clip-n-stds 2",
            without("mf_mult", "output", "mean"),
            ["--qe-stats-file", "mf_mult", "mean"],
        ),
        (
            "--qenql mlp.0 mlp_relu.0",
            without("mlp.1", "inputs", 0),
            ["--qe-stats-file", "mlp.1", "input"],
        ),
        ("--qem asym_u", upside_down("mlp_concat"), ["--qe-stats-file", "mlp_concat"]),
        ("--qem asym_s", upside_down("mlp_concat"), ["--qe-stats-file", "mlp_concat"]),
        ("--qem asym_u", upside_down("mf_user_embed"), ["--qe-stats-file", "mf_user_embed"]),
    ],
)
def test_mistakes_are_one_line_that_names_flag_and_layer(flags, change, words, tmp_path):
    model = small_model(24)
    stats = model_statistics(model)
    change(stats)
    write_stats(stats, tmp_path / "stats.yaml")
    with pytest.raises(InputError) as caught:
        prepared(model, f"{flags} --qe-stats-file {tmp_path}/stats.yaml", all_pairs(model))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("flag", ["--qe-no-quant-layers", "--qe-no-clip-layers"])
def test_a_layer_that_the_forward_does_not_call_can_be_named(flag, tmp_path):
    model = small_model(24)
    write_stats(model_statistics(model), tmp_path / "stats.yaml")
    args = parse(f"{flag} sigmoid --qe-stats-file {tmp_path}/stats.yaml")
    PostTrainLinearQuantizer.from_args(model, args).prepare_model((*all_pairs(model), False))
    assert type(model.sigmoid) is nn.Sigmoid
    assert type(model.final).__name__ == "QuantizedLinear"


def test_statistics_that_no_mode_needs_may_be_missing(tmp_path):
    model = small_model(25)
    stats, pairs = model_statistics(model), all_pairs(model)
    for entry in stats.values():
        for tensor in (*entry["inputs"].values(), entry["output"]):
            del tensor["b"], tensor["std"], tensor["avg_min"]
            tensor["total_numel"] = 77
    write_stats(stats, tmp_path / "stats.yaml")
    full = copy.deepcopy(model)
    prepared(model, f"--qem asym_u --qe-stats-file {tmp_path}/stats.yaml", pairs)
    write_stats(model_statistics(full), tmp_path / "full.yaml")
    prepared(full, f"--qem asym_u --qe-stats-file {tmp_path}/full.yaml", pairs)
    np.testing.assert_array_equal(scores(model, pairs), scores(full, pairs))


@pytest.mark.parametrize(
    "flags",
    [
        "--qe-dynamic --qe-stats-file x",
        "--qe-dynamic --qe-config-file x",
        "--qe-calibration 0.1 --qe-stats-file x",
        "--qe-calibration 0",
        "--qe-calibration 1.01",
        "--qe-calibration -0.5",
        "--qe-calibration nan",
        "--qe-calibration some",
        "--qem asymmetric",
        "--qeca often",
        "--qeba eight",
        "--qe-bits-accum x",
    ],
)
def test_flags_that_the_parser_refuses(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(flags)
    assert caught.value.code == 2
    assert "--qe" in capsys.readouterr().err


def test_flags_have_the_originals_names_and_defaults():
    defaults = vars(parse(""))
    assert defaults == {
        "quantize_eval": False,
        "qe_mode": "sym",
        "qe_mode_acts": None,
        "qe_mode_wts": None,
        "qe_bits_acts": 8,
        "qe_bits_wts": 8,
        "qe_bits_accum": 32,
        "qe_clip_acts": "none",
        "qe_clip_n_stds": None,
        "qe_no_clip_layers": [],
        "qe_no_quant_layers": [],
        "qe_per_channel": False,
        "qe_scale_approx_bits": None,
        "qe_scaled_concat": False,
        "qe_per_channel_acts": False,
        "qe_embedding_bits": None,
        "qe_save_fp_weights": False,
        "qe_engine": "auto",
        "qe_convert_pytorch": False,
        "qe_stats_file": None,
        "qe_dynamic": False,
        "qe_calibration": None,
        "qe_config_file": None,
    }
    long = (
        "--quantize-eval --qe-mode asym_u --qe-mode-acts sym --qe-mode-wts sym_restr --qe-bits-acts 7 --qe-bits-wts 6 "
        "--qe-bits-accum 20 --qe-clip-acts avg --qe-clip-n-stds 2 --qe-no-clip-layers a b --qe-no-quant-layers c "
        "--qe-per-channel --qe-scale-approx-bits 9 --qe-save-fp-weights --qe-convert-pytorch"
    )
    short = (
        "--qe --qem asym_u --qema sym --qemw sym_restr --qeba 7 --qebw 6 --qe-bits-accum 20 --qeca avg "
        "--qe-clip-n-stds 2 --qencl a b --qenql c --qepc --qesab 9 --qe-save-fp-weights --qept"
    )
    assert vars(parse(long)) == vars(parse(short))
    assert parse("--qe-calibration 1").qe_calibration == 1.0


def test_mode_flags_of_one_side_leave_the_other(tmp_path):
    model = small_model(26)
    stats, pairs = model_statistics(model), all_pairs(model)
    write_stats(stats, tmp_path / "stats.yaml")
    for flags, acts, wts in (
        ("--qem asym_u", "asym_u", "asym_u"),
        ("--qem asym_u --qemw sym", "asym_u", "sym"),
        ("--qema asym_s", "asym_s", "sym"),
        ("--qem sym_restr --qema asym_u --qemw asym_s", "asym_u", "asym_s"),
    ):
        reference = Reference(
            numpy_weights(model), stats, lambda name, a=acts, w=wts: Settings(mode_acts=a, mode_wts=w)
        )
        copied = copy.deepcopy(model)
        prepared(copied, f"{flags} --qe-stats-file {tmp_path}/stats.yaml", pairs)
        expected = reference(*(index.numpy() for index in pairs))
        np.testing.assert_array_equal(scores(copied, pairs), expected)


class Shared(nn.Module):
    """Calls one Linear twice."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(self.linear(x))


def test_a_module_called_twice_is_refused():
    with pytest.raises(ValueError, match="linear"):
        PostTrainLinearQuantizer(Shared()).prepare_model((torch.zeros(2, 3),))


# --- devices ---

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_stays_on_its_device_and_scores_as_on_the_cpu(device):
    stats = model_statistics(small_model(3))
    pairs = all_pairs(small_model(3))
    results = {}
    for where in ("cpu", device):
        model = small_model(3).to(where)
        arguments = {"mode": "asym_u", "model_activation_stats": stats}
        PostTrainLinearQuantizer(model, **arguments).prepare_model((*pairs, True))
        tensors = [*model.parameters(), *model.buffers()]
        assert {tensor.device.type for tensor in tensors} == {where}
        with torch.no_grad():
            results[where] = model(*(index.to(where) for index in pairs), sigmoid=True).cpu()
    # The float sigmoid between two quantized tensors may round another way on another device.
    assert torch.allclose(results["cpu"], results[device], atol=1e-2)
