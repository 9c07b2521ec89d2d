"""NeuMF in integers: equal to its simulation, bit for bit, whatever the settings; and saved as integers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_paths import ROOT
from helpers_quant import MODES, all_pairs, integer_scores, model_statistics, scores, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.calibration import collect_quant_stats
from distiller.quantization import PostTrainLinearQuantizer, integer
from distiller.quantization.integer import IntegerLinear, NotIntegerError, code_product
from distiller.quantization.linear import LinearQuantMode, QuantParams
from distiller.quantization.saved import content_of, restore
from distiller.quantization.wrappers import ActivationSettings, QuantizedLinear, WeightSettings
from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint, save_checkpoint
from neural_cf.int8.engine import IntegerNeuMF
from neural_cf.model import NeuMF, sizes_from_state_dict, weights_of_quantized, with_final_layer
from neural_cf.ranking.candidates import score_all, score_candidates
from neural_cf.ranking.scorers import PairScorer
from neural_cf.split import load_split

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FLOAT = {"bits_activations": None, "bits_weights": None}


def scaled(statistics: dict, factor: float) -> dict:
    """Statistics of tensors so many times as wide."""
    result = copy.deepcopy(statistics)
    for entry in result.values():
        for tensor in (*entry["inputs"].values(), entry["output"]):
            for key in ("min", "max", "avg_min", "avg_max", "mean", "std", "b"):
                tensor[key] *= factor
    return result


def quantized(model: NeuMF, statistics: dict | None, **arguments) -> NeuMF:
    """A prepared copy."""
    model = copy.deepcopy(model)
    PostTrainLinearQuantizer(model, model_activation_stats=statistics, **arguments).prepare_model(
        (*all_pairs(model), True)
    )
    return model


def pairs_of(model: NeuMF) -> tuple[torch.Tensor, torch.Tensor]:
    """Every user with every item, of a prepared model."""
    weights = weights_of_quantized(model.state_dict())
    users, items = (len(weights[f"mf_{side}_embed.weight"]) for side in ("user", "item"))
    return torch.arange(users).repeat_interleave(items), torch.arange(items).repeat(users)


def assert_equal_scores(model: NeuMF) -> np.ndarray:
    """Of the simulation and in integers; the scores."""
    expected = scores(model, pairs_of(model))
    np.testing.assert_array_equal(integer_scores(model, pairs_of(model)), expected)
    return expected


# --- equal to the simulation ---


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"scaled_concat": True},
        {"embedding_bits": 4},
        {"embedding_bits": 8},
        {"per_channel_acts": True},
        {"per_channel_acts": True, "scaled_concat": True, "embedding_bits": 8},
        {"bits_activations": 12},
        {"overrides": {"mlp.0": {"bits_activations": 12, "bits_weights": 12}}, "per_channel_acts": True},
    ],
)
def test_published_widths(mode, per_channel, split, more):
    """Where sums of the first layer have 256 terms."""
    model = small_model(1, split, users=5, items=40, mf_dim=64, layers=(256, 256, 128, 64), gain=0.2)
    arguments = {"mode": mode, "per_channel_wts": per_channel} | more
    found = assert_equal_scores(quantized(model, model_statistics(model), **arguments))
    assert len(np.unique(found)) > 5


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    split=st.booleans(),
    mode=st.sampled_from(MODES),
    weight_mode=st.sampled_from(MODES),
    bits=st.tuples(st.integers(2, 13), st.integers(2, 8)),
    per_channel_acts=st.booleans(),
    per_channel_wts=st.booleans(),
    width=st.sampled_from([0.05, 0.5, 1.0, 3.0, 50.0]),
    bits_accum=st.sampled_from([32, 32, 20, 12, 8]),
    approximate=st.sampled_from([None, None, 2, 8]),
    layers=st.sampled_from([(6, 5, 4), (2, 1), (4, 9, 17, 3), (40, 33, 20)]),
    mf_dim=st.integers(1, 20),
    scaled_concat=st.booleans(),
    embedding_bits=st.sampled_from([None, None, 4, 8]),
)
def test_small_models_of_any_settings(
    seed, split, mode, weight_mode, bits, width, layers, mf_dim, approximate, **arguments
):
    """Ranges narrower than the values, so that rows saturate, or wider."""
    model = small_model(seed, split, mf_dim=mf_dim, layers=layers)
    assert_equal_scores(
        quantized(
            model,
            scaled(model_statistics(model), width),
            mode={"activations": mode, "weights": weight_mode},
            bits_activations=bits[0],
            bits_parameters=bits[1],
            scale_approx_mult_bits=approximate,
            **arguments,
        )
    )


@pytest.mark.parametrize(
    ("split", "left"),
    [
        (False, ["sigmoid"]),
        (False, ["final", "sigmoid"]),
        (False, ["final"]),
        (False, ["final_concat"]),
        (False, ["final_concat", "final", "sigmoid"]),
        (True, ["sigmoid"]),
        (True, ["final_add", "sigmoid"]),
        (True, ["final_mf"]),
        (True, ["final_mlp", "final_add"]),
        (True, ["final_mf", "final_mlp", "final_add", "sigmoid"]),
    ],
)
def test_last_layers_in_float(split, left):
    """Any of those after the last ReLU."""
    model = small_model(7, split, users=12, items=30, mf_dim=16, layers=(32, 24, 16))
    overrides = dict.fromkeys(left, FLOAT)
    found = quantized(model, model_statistics(model), mode="asym_u", overrides=overrides)
    assert_equal_scores(found)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [9, 12, 16])
@pytest.mark.parametrize("concat", [FLOAT, {}])
def test_more_bits_out_of_every_layer(split, mode, bits, concat):
    """Two products of what another layer reads; sums of few features have room for 16 bits."""
    model = small_model(29, split, users=8, items=20, mf_dim=16, layers=(64, 33, 16), gain=0.4)
    overrides = {"final_concat": concat} if not split else {}
    arguments = {"mode": mode, "bits_activations": bits, "overrides": overrides, "per_channel_acts": True}
    prepared = quantized(model, model_statistics(model), **arguments)
    levels = prepared.mlp[0].fixed_output
    assert levels.q_max - levels.q_min >= (1 << bits) - 2
    assert len(np.unique(assert_equal_scores(prepared))) > 100


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [9, 12, 16])
def test_more_bits_where_nothing_is_multiplied_for_every_pair(split, mode, bits):
    """The first layer's inputs, and what the last layers in float read."""
    model = small_model(28, split, users=8, items=20, mf_dim=16, layers=(64, 24, 16), gain=0.4)
    wide = {"bits_activations": bits}
    overrides = dict.fromkeys(["mlp_concat", "mf_mult", "mlp.1"], wide)
    overrides |= dict.fromkeys(["final.*", "sigmoid"], FLOAT)
    arguments = {"mode": mode, "overrides": overrides, "scaled_concat": True, "embedding_bits": 8}
    prepared = quantized(model, model_statistics(model), **arguments)
    assert prepared.mlp_concat.fixed_output.q_max >= 1 << 8 - 1
    assert_equal_scores(prepared)


def test_float_tail_breaks_ties():
    """What the last accumulator tells apart, 256 levels cannot."""
    model = small_model(8, users=20, items=60, mf_dim=16, layers=(32, 24, 16), gain=0.4)
    statistics = model_statistics(model)
    levels = len(np.unique(assert_equal_scores(quantized(model, statistics, mode="asym_u"))))
    overrides = {"final": FLOAT, "sigmoid": FLOAT}
    tail = assert_equal_scores(quantized(model, statistics, mode="asym_u", overrides=overrides))
    assert levels <= 256 < len(np.unique(tail))


def test_weights_only_final_layer():
    """Its activations in float, its weights rounded."""
    model = small_model(9, mf_dim=8, layers=(16, 8))
    overrides = {"final|sigmoid": {"bits_activations": None}}
    assert_equal_scores(quantized(model, model_statistics(model), mode="asym_u", overrides=overrides))


@pytest.mark.parametrize("device", DEVICES)
def test_scores_on_every_device(device):
    """Those of the simulation there."""
    model = small_model(10, mf_dim=16, layers=(32, 24, 16))
    prepared = quantized(model, model_statistics(model), mode="asym_u").to(device)
    users, items = (index.to(device) for index in pairs_of(prepared))
    assert torch.equal(
        IntegerNeuMF(prepared)(users, items[:, None]), PairScorer(prepared)(users, items[:, None])
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["bias", "width", "both widths"])
@pytest.mark.parametrize("split", [False, True])
def test_sums_beyond_what_float32_adds(which, mode, split):
    """Of one input's products, or of all."""
    widths = {"bias": (3, (6, 5, 4)), "width": (600, (16, 8)), "both widths": (600, (1200, 900))}
    mf_dim, layers = widths[which]
    model = small_model(22, split, mf_dim=mf_dim, layers=layers)
    finals = [model.final_mf, model.final_mlp] if split else [model.final]
    for final in finals:
        if which == "bias":
            final.weight.mul_(1e-4)
            final.bias.fill_(50)
        else:
            final.weight.abs_().add_(3)
    for linear in model.mlp:
        linear.weight.abs_()
    prepared = quantized(model, model_statistics(model), mode=mode)
    if mode.startswith("asym"):
        assert any(layer.exact_dtype is torch.float64 for layer in (*prepared.mlp, *_finals(prepared)))
    assert_equal_scores(prepared)


def _finals(model: NeuMF) -> list:
    return [model.final_mf, model.final_mlp] if model.split_final else [model.final]


def test_sums_of_two_wide_inputs_are_exact():
    """Where the first input's products fit float32 and the second's, or both together, do not."""
    torch.manual_seed(0)
    linear = QuantizedLinear(
        torch.nn.Linear(1000, 30, bias=False).requires_grad_(False),
        WeightSettings(8, LinearQuantMode.ASYMMETRIC_SIGNED),
        ActivationSettings(8, LinearQuantMode.ASYMMETRIC_UNSIGNED),
        [QuantParams(torch.ones(1), torch.zeros(1), 0, 255)],
        QuantParams(torch.ones(1), torch.zeros(1), 0, 255),
    )
    layer = IntegerLinear("layer", linear, [200, 800])
    q = torch.randint(0, 256, (500, 1000)).float()
    operand = linear.weight.long() + linear.w_zero_point.long()[:, None]
    parts = [layer.sums_of(i, part.clone()) for i, part in enumerate(q.split([200, 800], dim=1))]
    assert parts[0].dtype == parts[1].dtype
    assert torch.equal((parts[0] + parts[1]).long(), q.long() @ operand.t())


def test_scores_do_not_depend_on_how_users_and_items_stand():
    model = small_model(11, mf_dim=8, layers=(16, 8))
    engine = IntegerNeuMF(quantized(model, model_statistics(model), mode="asym_u"))
    users, items = torch.tensor([4, 0, 4]), torch.tensor([[1, 6, 1], [2, 0, 3], [6, 6, 5]])
    together = engine(users, items)
    for row, (user, of_user) in enumerate(zip(users, items, strict=True)):
        for place, item in enumerate(of_user):
            assert engine(user[None], item[None, None]) == together[row, place]


@pytest.mark.parametrize("capabilities", [{}, {"avx512_vnni": True}])
def test_without_integer_instructions_products_are_exact_in_floats(monkeypatch, capabilities):
    """An older processor scores the same."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    model = small_model(12, users=5, items=20, mf_dim=32, layers=(64, 40, 24))
    assert_equal_scores(quantized(model, model_statistics(model), mode="asym_u", per_channel_wts=True))


@pytest.mark.parametrize("features", [16, 1024, 1040, 20_000])
@pytest.mark.parametrize("native", [False, True])
def test_product_of_extremes_is_exact(monkeypatch, features, native):
    """Where all codes are -128, the sum is the greatest there is."""
    capabilities = {"avx512_vnni": native}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    codes = torch.full((20, features), -128, dtype=torch.int8)
    codes[3, 5] = 127
    weight = torch.full((features, 16), -128, dtype=torch.int8)
    found = code_product(codes, weight.to(integer.product_dtype(features, codes.device)))
    assert found.dtype == torch.int32
    assert found[0].tolist() == [features << 14] * 16
    assert found[3].tolist() == [(features << 14) - 255 * 128] * 16


@pytest.mark.parametrize(("file", "users"), [("ml-100k/u.data", 943), ("ml-1m/ratings.csv", 500)])
def test_models_of_real_data(ncf, convert, tmp_path, file, users):
    """All modes, split and not, per channel and not, at 8 bits and fewer."""
    directory = os.environ.get("NCF_TEST_DATA")
    if not directory:
        pytest.skip(f"NCF_TEST_DATA names no directory with {file}")
    data, run = tmp_path / "data", tmp_path / "run"
    assert convert(Path(directory) / file, data).code == 0
    recipe = ["-b", 2048, "-l", 0.0005, "-f", 64, "--layers", 256, 256, 128, 64, "-s", 1, "--max-steps", 500]
    assert ncf(data, *recipe, "-o", run).code == 0
    split = load_split(data)
    weights = load_checkpoint(run / "best.pth.tar")["state_dict"]
    for split_final in (False, True):
        model = NeuMF(**sizes_from_state_dict(weights) | {"split_final": split_final}).eval()
        model.load_state_dict(with_final_layer(weights, split_final))
        calibrate = partial(score_all, split=split, nb_users=users // 10)
        statistics = collect_quant_stats(model, calibrate, rows_per_batch=split.nb_candidates)
        more = (
            {"bits_parameters": 8},
            {"bits_parameters": 5},
            {"scaled_concat": True},
            {"embedding_bits": 4},
            {"per_channel_acts": True, "bits_activations": 12},
        )
        for mode, per_channel, changes in product(MODES, (False, True), more):
            arguments = {"mode": mode, "per_channel_wts": per_channel} | changes
            prepared = quantized(model.requires_grad_(False), statistics, **arguments)
            both = (
                score_candidates(scorer, split, range(users))
                for scorer in (PairScorer(prepared), IntegerNeuMF(prepared))
            )
            for (_, simulated), (_, found) in zip(*both, strict=True):
                assert torch.equal(found, simulated), arguments


# --- what integers cannot ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits_parameters": 9}, "layer mlp.1 has weights of more than 8 bits"),
        ({"bits_activations": 0}, "layer mf_mult is left in float"),
        ({"bits_parameters": 0}, "layer mf_user_embed is left in float"),
        ({"overrides": {"mlp.1": FLOAT}}, "layer mlp.1 is left in float"),
        ({"overrides": {"mf_mult": FLOAT}}, "layer mf_mult is left in float"),
        ({"overrides": {"mlp_item_embed": FLOAT}}, "layer mlp_item_embed is left in float"),
        ({"overrides": {"final": {"bits_weights": 12}}}, "layer final has weights of more than 8 bits"),
    ],
)
def test_settings_that_are_not_for_integers(arguments, message):
    model = small_model(13)
    with pytest.raises(NotIntegerError, match=message):
        IntegerNeuMF(quantized(model, model_statistics(model), mode="asym_u", **arguments))


def test_ranges_of_every_batch_are_not_for_integers():
    with pytest.raises(NotIntegerError, match=r"layer mlp\.0 finds its ranges on every batch"):
        IntegerNeuMF(quantized(small_model(14), None, mode="asym_u"))


def test_sums_that_may_pass_32_bits():
    """More features than 32 bits hold for certain."""
    model = NeuMF(2, 2, 1, [1 << 15, 1]).eval().requires_grad_(False)
    statistics = model_statistics(model)
    with pytest.raises(NotIntegerError, match=r"layer mlp\.0 has sums that 32 bits may not hold"):
        IntegerNeuMF(quantized(model, statistics))
    narrower = NeuMF(2, 2, 1, [1 << 14, 1]).eval().requires_grad_(False)
    assert_equal_scores(quantized(narrower, model_statistics(narrower), mode="asym_u"))


@pytest.mark.parametrize("width", [1e-36, 1e37])
def test_ranges_at_the_ends_of_float32(width):
    """Either equal, or not for integers."""
    model = small_model(15)
    statistics = model_statistics(model)
    statistics["mf_mult"]["output"] |= {"min": -width, "max": width}
    prepared = quantized(model, statistics, mode="asym_u")
    try:
        IntegerNeuMF(prepared)
    except NotIntegerError:
        return
    assert_equal_scores(prepared)


# --- compiled ---

COMPILED = """
import sys
import torch
from helpers_quant import model_statistics, small_model
from neural_cf.int8.engine import IntegerNeuMF
from test_engine import quantized
model = small_model(1, users=9, items=30, mf_dim=64, layers=(256, 256, 128, 64), gain=0.2)
for mode in ("asym_u", "sym"):
    prepared = quantized(model, model_statistics(model), mode=mode, per_channel_wts=True)
    users, items = torch.arange(9), torch.randint(30, (9, 1000))
    compiled = IntegerNeuMF(prepared, compiled=True)(users, items)
    assert torch.equal(compiled, IntegerNeuMF(prepared)(users, items)), mode
print("equal", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_compiled_scores_are_the_same_to_the_bit():
    """In a process of its own, where compiling is on; a last part of another shape is not compiled."""
    tests = ROOT / "tests"
    environment = {
        "PYTHONPATH": f"{tests / 'neural_cf' / 'int8'}:{tests}:{tests.parent}",
        "PATH": "/usr/bin:/bin:/usr/local/bin",
        "HOME": "/tmp",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal", "2"]


# --- saved ---


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "asym_u", "per_channel_wts": True},
        {"mode": {"activations": "asym_s", "weights": "sym_restr"}, "bits_parameters": 4, "clip_acts": "avg"},
        {"bits_activations": 12, "bits_parameters": 11, "bits_accum": 30, "scale_approx_mult_bits": 9},
        {"clip_acts": "n_std", "clip_n_stds": 2.5, "save_fp_weights": True},
        {"bits_activations": 0},
        {"bits_parameters": 0},
        {"overrides": {"mlp.0": FLOAT, "sigmoid": {"clip_acts": "none", "mode": "asym_u"}}},
        {"model_activation_stats": None},
        {"scaled_concat": True, "embedding_bits": 4, "overrides": {"sigmoid": FLOAT}},
        {"embedding_bits": 8, "mode": "sym"},
    ],
)
def test_saved_model_scores_the_same(split, arguments, tmp_path):
    """Whatever its settings, from the file alone: the model that it goes into has other weights."""
    model = small_model(16, split)
    arguments = {"model_activation_stats": model_statistics(model)} | arguments
    quantizer = PostTrainLinearQuantizer(model, **arguments)
    quantizer.prepare_model((*all_pairs(model), True))
    save_checkpoint(tmp_path / "quantized", content_of(quantizer))
    other = small_model(17, split)
    content = load_checkpoint(tmp_path / "quantized")
    pairs = all_pairs(other)
    restored = restore(other, content, (*pairs, True))
    np.testing.assert_array_equal(scores(other, pairs), scores(model, pairs))
    assert restored.describe() == quantizer.describe()
    assert content_of(restored)["quantizer"] == content_of(quantizer)["quantizer"]


def test_saved_tables_and_weights_are_8_bit_integers():
    model = small_model(18)
    content = quantized_checkpoint(model)
    for name in ("mf_user_embed", "mlp_item_embed", "mlp.0", "final"):
        assert content["state_dict"][f"{name}.weight"].dtype in (torch.int8, torch.uint8)


def quantized_checkpoint(model: NeuMF, **arguments) -> dict:
    quantizer = PostTrainLinearQuantizer(
        model, model_activation_stats=model_statistics(model), mode="asym_u", **arguments
    )
    quantizer.prepare_model((*all_pairs(model), True))
    return content_of(quantizer)


@pytest.mark.parametrize("part", ["state_dict", "statistics", "quantizer"])
def test_part_that_is_missing_is_an_error(part):
    content = quantized_checkpoint(small_model(19))
    del content[part]
    other = small_model(19)
    with pytest.raises(InputError, match="not a whole quantized model"):
        restore(other, content, (*all_pairs(other), True))


@pytest.mark.parametrize("key", ["mlp.0.w_scale", "mf_mult.output_scale", "sigmoid.input_0_zero_point"])
def test_tensor_that_is_missing_is_an_error(key):
    content = quantized_checkpoint(small_model(20))
    del content["state_dict"][key]
    other = small_model(20)
    with pytest.raises(InputError, match=key):
        restore(other, content, (*all_pairs(other), True))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mlp.0.bias", torch.nan),
        ("final.bias", torch.inf),
        ("mlp.0.w_zero_point", torch.nan),
        ("mlp.0.w_zero_point", 1e30),
        ("mlp.0.w_zero_point", -0.5),
        ("mlp.0.w_scale", -1.0),
        ("mlp.0.input_0_scale", 0.0),
        ("mlp.0.input_0_zero_point", 300.0),
        ("mf_mult.input_0_zero_point", 1.0),
        ("sigmoid.output_scale", torch.inf),
    ],
)
def test_values_that_no_quantized_model_has(key, value):
    """They would give other scores in integers than simulated."""
    content = quantized_checkpoint(small_model(23))
    content["state_dict"][key] = torch.full_like(content["state_dict"][key], value)
    other = small_model(23)
    with pytest.raises(InputError, match="not a quantized model: "):
        restore(other, content, (*all_pairs(other), True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits_parameters": 4}, "zero point of .* is out of range"),
        ({"clip_acts": "n_std", "clip_n_stds": 10**400}, "--qe-clip-n-stds"),
        ({"mode": "best"}, "mode"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_settings_of_another_quantized_model(change, message):
    content = quantized_checkpoint(small_model(24))
    content["quantizer"] |= change
    other = small_model(24)
    with pytest.raises(InputError, match=message):
        restore(other, content, (*all_pairs(other), True))


def test_integers_outside_their_range_are_an_error():
    content = quantized_checkpoint(small_model(27), bits_parameters=4)
    content["state_dict"]["mlp.0.weight"][0, 0] = 16
    other = small_model(27)
    with pytest.raises(InputError, match=r"mlp\.0 holds weights outside 0 to 15"):
        restore(other, content, (*all_pairs(other), True))


@pytest.mark.parametrize("statistics", ["/etc/passwd", 3, {"mlp.0": {"output": {"shape": torch.ones(1)}}}])
def test_statistics_are_a_map_of_numbers_and_texts(statistics):
    """Not the name of a file to read."""
    content = quantized_checkpoint(small_model(25)) | {"statistics": statistics}
    other = small_model(25)
    with pytest.raises(InputError, match="not a whole quantized model"):
        restore(other, content, (*all_pairs(other), True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.int64])
def test_tensor_of_another_type_is_an_error(dtype):
    content = quantized_checkpoint(small_model(26))
    content["state_dict"]["mlp.0.weight"] = content["state_dict"]["mlp.0.weight"].to(dtype)
    other = small_model(26)
    with pytest.raises(InputError, match=r"mlp\.0\.weight"):
        restore(other, content, (*all_pairs(other), True))


def test_linear_of_several_inputs_without_bias():
    """A layer need not have one."""
    model = small_model(21)
    for linear in (*model.mlp, model.final):
        linear.bias = None
    assert_equal_scores(quantized(model, model_statistics(model), mode="asym_u"))
    prepared = quantized(model, model_statistics(model), mode="asym_u")
    assert prepared.mlp[0].bias is None
    IntegerLinear("mlp.1", prepared.mlp[1], [5])
