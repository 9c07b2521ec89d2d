"""From quantization-aware training to integers: the same scores, but for values between two levels."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers_quant import MODES, all_pairs, integer_scores, scores, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.quantization import NCFQuantAwareTrainQuantizer
from distiller.quantization.conversion import quantizer_of_aware
from distiller.quantization.saved import content_of, restore
from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint, save_checkpoint
from neural_cf.model import NeuMF


def trained(
    seed: int, split: bool = False, batches: int = 3, biased: bool = True, **arguments
) -> tuple[NeuMF, NeuMF]:
    """A quantization-aware model whose ranges have seen some batches, and the float model of its weights."""
    model = small_model(seed, split, users=6, items=30)
    for name, parameter in model.named_parameters():
        if not biased and name.endswith("bias"):
            parameter.zero_()
    aware = copy.deepcopy(model)
    NCFQuantAwareTrainQuantizer(aware, ema_decay=0.5, **arguments).prepare_model()
    aware.train()
    users, items = all_pairs(model)
    with torch.no_grad():
        for part in range(batches):
            aware(users[part::3], items[part::3])
    return aware.eval(), model


def converted(aware: NeuMF, model: NeuMF) -> NeuMF:
    pairs = all_pairs(model)
    quantizer_of_aware(aware, model).prepare_model((*pairs, True))
    return model


def level(model: NeuMF) -> float:
    """One of the last quantized layers' outputs, in units of the logit."""
    finals = ["final_mf", "final_mlp"] if model.split_final else ["final"]
    return sum(1 / model.get_submodule(name).fixed_output.scale.item() for name in finals)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 9999),
    split=st.booleans(),
    mode=st.fixed_dictionaries({"activations": st.sampled_from(MODES), "weights": st.sampled_from(MODES)}),
    per_channel_wts=st.booleans(),
    bits=st.tuples(st.integers(3, 8), st.integers(3, 8)),
)
def test_every_layer_computes_what_it_did_in_training_to_a_level(seed, split, mode, per_channel_wts, bits):
    """From the same inputs; where a sum lies between two levels, the other one may be nearer after it is rounded."""
    arguments = {"mode": mode, "per_channel_wts": per_channel_wts}
    aware, model = trained(seed, split, bits_activations=bits[0], bits_weights=bits[1], **arguments)
    pairs = all_pairs(model)
    prepared, calls = converted(aware, model), {}
    for name in quantized_layers(prepared):
        layer = prepared.get_submodule(name)
        layer.register_forward_hook(lambda _, x, y, name=name: calls.update({name: (x, y)}))
    with torch.no_grad():
        prepared(*pairs)
        for name, (inputs, output) in calls.items():
            expected = aware.get_submodule(name)(*inputs)
            output = output.clamp(*aware.get_submodule(name).range.bounds())  # which may lie on one side of 0
            layer = prepared.get_submodule(name)
            # A bias is in units of its layer's sums, which are coarse where inputs and weights have few bits.
            unit = 1 / layer.accumulator_scale.min() if hasattr(layer, "accumulator_scale") else 0.0
            assert ((output - expected).abs() <= 1.01 / layer.fixed_output.scale + unit).all(), name


def quantized_layers(prepared: NeuMF) -> list[str]:
    """The layers that put out integers, but for tables."""
    return [
        name for name, layer in prepared.named_modules() if getattr(layer, "fixed_output", None) is not None
    ]


@pytest.mark.parametrize("split", [False, True])
def test_with_biases_at_8_bits(split):
    aware, model = trained(8, split, mode="asym_u", per_channel_wts=True)
    pairs = all_pairs(model)
    expected = scores(aware, pairs, sigmoid=False)
    difference = np.abs(scores(converted(aware, model), pairs, sigmoid=False) - expected)
    assert np.median(difference) < 1e-5
    assert difference.max() < 2.5 * level(model)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_in_integers_they_are_the_simulations(mode, split):
    aware, model = trained(1, split, mode=mode, per_channel_wts=True)
    pairs = all_pairs(model)
    prepared = converted(aware, model)
    np.testing.assert_array_equal(integer_scores(prepared, pairs), scores(prepared, pairs))


def test_ranges_are_the_tracked_ones():
    """Of the linear layer and of its ReLU, each its own; of a table its own weights."""
    aware, model = trained(2, mode="asym_u")
    table = model.mf_user_embed.weight.clone()
    ranges = {name: aware.get_submodule(name).range.bounds() for name in ("mlp.0", "mlp_relu.0", "mf_mult")}
    prepared = converted(aware, model)
    for name, (low, high) in ranges.items():
        output = prepared.get_submodule(name).fixed_output
        assert output.scale.item() == pytest.approx(
            255 / (max(high.item(), 0) - min(low.item(), 0)), rel=1e-6
        )
    assert not prepared.mlp[0].fused_relu
    assert prepared.mf_user_embed.params.scale.item() == pytest.approx(
        255 / (table.max() - table.min()).item()
    )


def test_layers_that_do_not_round_stay_in_float():
    aware, model = trained(3, True, overrides={"mlp.1": {"bits_weights": 0}})
    prepared = converted(aware, model)
    assert type(prepared.sigmoid) is torch.nn.Sigmoid
    assert type(prepared.final_add).__name__ == "EltwiseAdd"
    assert type(prepared.mlp[1]).__name__ == "FakeQuantized"


def test_biases_of_few_bits_are_those_of_training():
    aware, model = trained(4, bits_bias=3)
    bias = aware.mlp[0].rounded_bias().detach().clone()
    quantizer_of_aware(aware, model)
    assert torch.equal(model.mlp[0].bias, bias)
    assert len(bias.unique()) < 8


def test_a_range_that_saw_no_batch_is_an_input_error():
    aware, model = trained(5, batches=0)
    with pytest.raises(InputError, match="layer mf_mult has no range"):
        quantizer_of_aware(aware, model)


def test_saved_it_scores_the_same(tmp_path):
    aware, model = trained(6, mode="asym_u")
    pairs = all_pairs(model)
    quantizer = quantizer_of_aware(aware, model)
    quantizer.prepare_model((*pairs, True))
    save_checkpoint(tmp_path / "quantized", content_of(quantizer))
    other = small_model(7, users=6, items=30)
    restore(other, load_checkpoint(tmp_path / "quantized"), (*pairs, True))
    np.testing.assert_array_equal(integer_scores(other, pairs), scores(model, pairs))
