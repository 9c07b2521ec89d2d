"""The original quantizer's scores and parameters, reproduced through the command line's flags."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_quant import (
    CASES,
    TAGS,
    golden_arrays,
    golden_model,
    golden_pairs,
    golden_stats_path,
    integer_scores,
    parse,
    prepared,
    scores,
)

from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.integer import NotIntegerError
from neural_cf.int8.engine import IntegerNeuMF

ARRAYS = golden_arrays()
PAIRS = golden_pairs()
PARAMETERS = ("output_scale", "output_zero_point", "w_scale", "w_zero_point")

FLOAT_CASES = ("weights_only", "no_quant_mlp1")  # not for integers, nor are the dynamic ones

every_case = pytest.mark.parametrize("case", CASES)
both_tags = pytest.mark.parametrize("tag", TAGS)


def is_exact(case: str) -> bool:
    """Whether no float product or float sigmoid takes part."""
    return case != "weights_only" and not case.startswith(("no_quant_", "dynamic_"))


def flags_of(tag: str, case: str) -> str:
    flags = CASES[case]
    return flags if "--qe-dynamic" in flags else f"{flags} --qe-stats-file {golden_stats_path(tag)}"


def assert_scores(found: np.ndarray, tag: str, case: str) -> None:
    expected = ARRAYS[f"{tag}/{case}/scores"]
    found = found.reshape(-1)
    assert found.shape == expected.shape
    if is_exact(case):
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@both_tags
def test_float_scores_and_logits(tag):
    model = golden_model(tag)
    for sigmoid, key in ((True, "fp32"), (False, "fp32_logits")):
        found = scores(model, PAIRS, sigmoid).reshape(-1)
        np.testing.assert_allclose(found, ARRAYS[f"{tag}/{key}"], rtol=0, atol=1e-5)


@both_tags
@every_case
def test_scores(tag, case):
    model = golden_model(tag)
    prepared(model, flags_of(tag, case), PAIRS)
    assert_scores(scores(model, PAIRS), tag, case)


@both_tags
@every_case
def test_scores_in_integers(tag, case):
    """Those of the simulation, wherever the engine takes the settings."""
    model = golden_model(tag)
    prepared(model, flags_of(tag, case), PAIRS)
    if "dynamic" in case or case in FLOAT_CASES:
        with pytest.raises(NotIntegerError):
            IntegerNeuMF(model)
        return
    found = integer_scores(model, PAIRS)
    assert_scores(found, tag, case)
    np.testing.assert_array_equal(found, scores(model, PAIRS))


@both_tags
@every_case
def test_all_parameters(tag, case):
    model = golden_model(tag)
    prepared(model, flags_of(tag, case), PAIRS)
    prefix = f"{tag}/{case}/"
    expected = {
        key.removeprefix(prefix): array
        for key, array in ARRAYS.items()
        if key.startswith(prefix) and not key.endswith("/scores")
    }
    assert expected
    buffers = dict(model.named_buffers())
    for name, array in expected.items():
        np.testing.assert_array_equal(buffers[name].reshape(-1).numpy(), array.reshape(-1), err_msg=name)
    recorded = {name for name in buffers if name.endswith(PARAMETERS)}
    if "dynamic" not in case:
        assert recorded == expected.keys()


@both_tags
@every_case
def test_a_forward_changes_nothing(tag, case):
    model = golden_model(tag)
    dummy = (*PAIRS, torch.tensor(True))
    quantizer = PostTrainLinearQuantizer.from_args(model, parse(flags_of(tag, case)))
    quantizer.prepare_model(dummy)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first = scores(model, PAIRS)
    scores(model, (PAIRS[0][:7], PAIRS[1][:7]), torch.tensor(True))
    scores(model, PAIRS, torch.tensor(True))
    last = scores(model, PAIRS)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    np.testing.assert_array_equal(last, first)
    assert_scores(last, tag, case)


@both_tags
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("dynamic_")])
def test_rows_are_scored_alike_alone_and_together(tag, case):
    model = golden_model(tag)
    prepared(model, flags_of(tag, case), PAIRS)
    some = (PAIRS[0][5:30], PAIRS[1][5:30])
    together, alone = scores(model, PAIRS)[5:30], scores(model, some)
    if is_exact(case):
        np.testing.assert_array_equal(alone, together)
    else:
        np.testing.assert_allclose(alone, together, rtol=0, atol=1e-5)
