"""Statistics and histograms of activations, against a reference that takes one user at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import yaml
from helpers_quant import (
    GOLDEN,
    TAGS,
    golden_model,
    golden_stats,
    reference_statistics,
    seven_numbers,
    small_model,
    user_batches,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distiller.calibration import CALIBRATED_STATS_FILE, collect_quant_stats
from distiller.quantization.histogram import Histogram
from distiller.quantization.statistics import columns_of_text, load_statistics

NUMBERS = ("min", "max", "avg_min", "avg_max", "mean", "std", "b")
ORDER = "mf_user_embed mf_item_embed mlp_user_embed mlp_item_embed mf_mult mlp_concat mlp.0 mlp.1 mlp_relu.0 mlp_relu.1"
ORDERS = {
    "no_split": f"{ORDER} final_concat final sigmoid",
    "split": f"{ORDER} final_mlp final_mf final_add sigmoid",
}


def runner(batches: list[tuple]):
    """A test_fn that sends batches through the model."""

    def test_fn(model):
        for batch in batches:
            model(*batch)

    return test_fn


def chunked(batches: list[tuple], size: int) -> list[tuple]:
    """``size`` users in one forward each, sigmoid included."""
    return [
        (*(torch.cat(tensors) for tensors in zip(*batches[i : i + size], strict=True)), True)
        for i in range(0, len(batches), size)
    ]


def assert_statistics(found: dict, expected: dict, rel: float) -> None:
    assert list(found) == list(expected)
    for name, entry in expected.items():
        assert list(found[name]) == ["inputs", "output"]
        assert list(found[name]["inputs"]) == list(entry["inputs"]), name
        pairs = [(found[name]["output"], entry["output"])]
        pairs += [(found[name]["inputs"][i], entry["inputs"][i]) for i in entry["inputs"]]
        for tensor, reference in pairs:
            assert tensor["shape"] == reference["shape"], name
            assert (tensor["min"], tensor["max"]) == (reference["min"], reference["max"]), name
            for key in NUMBERS:
                assert type(tensor[key]) is float
                scale = reference["b"] if key == "mean" else 0  # a mean can cancel
                assert tensor[key] == pytest.approx(reference[key], rel=rel, abs=rel * scale), (name, key)


@pytest.mark.parametrize("tag", TAGS)
def test_the_originals_statistics(tag):
    batches = user_batches(GOLDEN["nb_users"] // 2, GOLDEN["nb_items"])
    found = collect_quant_stats(
        golden_model(tag), runner(chunked(batches, 3)), rows_per_batch=GOLDEN["nb_items"]
    )
    expected = golden_stats(tag)
    assert list(found) == list(expected) == ORDERS[tag].split()
    for name, entry in expected.items():
        tensors = {"output": (found[name]["output"], entry["output"])}
        tensors |= {i: (found[name]["inputs"][i], x) for i, x in entry["inputs"].items()}
        for where, (tensor, reference) in tensors.items():
            for key in ("min", "max", "mean", "std", "b"):
                assert tensor[key] == pytest.approx(reference[key], rel=1e-5, abs=1e-5), (name, where, key)
            assert tensor["shape"] == reference["shape"]
            assert set(tensor) - {"histogram", "column_max"} == {*NUMBERS, "shape"}


@pytest.mark.parametrize("split", [False, True])
def test_all_numbers_equal_the_reference(split):
    model = small_model(1, split)
    batches = [(*pair, True) for pair in user_batches(9, 7)]
    expected = reference_statistics(model, batches)
    assert_statistics(collect_quant_stats(model, runner(batches)), expected, rel=1e-12)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_statistics_do_not_depend_on_how_users_are_chunked(split, size):
    model = small_model(2, split)
    batches = user_batches(9, 7)
    expected = reference_statistics(model, chunked(batches, 1))
    found = collect_quant_stats(model, runner(chunked(batches, size)), rows_per_batch=7)
    # A float product's last bits may depend on how many rows it has.
    exact = collect_quant_stats(model, runner(chunked(batches, 1)), rows_per_batch=7)
    assert_statistics(exact, expected, rel=1e-12)
    for name in expected:
        inputs = (found[name]["inputs"], expected[name]["inputs"])
        for i in inputs[1]:
            close(inputs[0][i], inputs[1][i], exact=name in ("mf_mult", "mlp_concat", "mlp.0"))
        close(found[name]["output"], expected[name]["output"], exact="embed" in name or "mult" in name)


def close(found: dict, expected: dict, exact: bool) -> None:
    rel = 1e-9 if exact else 1e-6
    assert found["shape"] == expected["shape"]
    for key in NUMBERS:
        slack = rel * max(abs(expected["min"]), abs(expected["max"]))
        assert found[key] == pytest.approx(expected[key], rel=rel, abs=slack), key


class Through(nn.Module):
    """A leaf that hands its input on, so that the values are the test's own."""

    def __init__(self):
        super().__init__()
        self.leaf = nn.Identity()

    def forward(self, x):
        return self.leaf(x)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 6), st.sampled_from([(), (1,), (2,), (5,), (2, 3)]), st.integers(0, 999)
)
def test_any_batches_and_chunks_give_the_definitions_numbers(users, rows, row_shape, seed):
    values = np.random.default_rng(seed).normal(3, 2, size=(users, rows, *row_shape)).astype(np.float32)
    expected = seven_numbers(list(values))
    for size in range(1, users + 1):
        if users % size == 0:
            forwards = torch.from_numpy(values).reshape(users // size, size * rows, *row_shape)
            found = collect_quant_stats(
                Through(), runner([(x,) for x in forwards]), rows_per_batch=None if size == 1 else rows
            )
            assert_statistics(found, {"leaf": {"inputs": {0: expected}, "output": expected}}, rel=1e-9)


def test_numbers_by_hand():
    x = [torch.tensor([[1.0, 5.0], [3.0, -1.0]]), torch.tensor([[0.0, 2.0], [4.0, 2.0]])]
    found = collect_quant_stats(Through(), runner([(batch,) for batch in x]))["leaf"]["output"]
    counts = Histogram.from_plain(found.pop("histogram")).counts
    assert [counts[0], counts[-1], counts.sum()] == [1, 1, 8]
    # mean 2; deviations -1 3 1 -3 -2 0 2 0
    assert found == {
        "min": -1.0,
        "max": 5.0,
        "avg_min": (1 - 1 + 0 + 2) / 4,
        "avg_max": (5 + 3 + 2 + 4) / 4,
        "mean": 2.0,
        "std": pytest.approx(math.sqrt(28 / 8)),
        "b": 12 / 8,
        "shape": "(2, 2)",
        "column_max": "4 5",
    }


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_one_value_per_row_uses_the_batchs_range_weighted_by_rows(shape):
    batches = [torch.tensor([1.0, 4.0, 2.0]), torch.tensor([10.0])]
    found = collect_quant_stats(Through(), runner([(x.reshape(shape),) for x in batches]))["leaf"]["output"]
    assert found["avg_min"] == (3 * 1 + 1 * 10) / 4
    assert found["avg_max"] == (3 * 4 + 1 * 10) / 4
    assert found["shape"] == ("(3)" if len(shape) == 1 else "(3, 1)")


def test_averages_weigh_rows_not_batches():
    batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 9.0], [5.0, 9.0], [5.0, 9.0]])]
    found = collect_quant_stats(Through(), runner([(x,) for x in batches]))["leaf"]["output"]
    assert (found["avg_min"], found["avg_max"]) == ((1 + 15) / 4, (2 + 27) / 4)


def test_sums_are_in_float64():
    x = torch.full((1000, 100), 1e4) + torch.linspace(0, 1, 100)
    found = collect_quant_stats(Through(), runner([(x,)]))["leaf"]["output"]
    exact = seven_numbers([x.numpy()])
    for key in NUMBERS:
        assert found[key] == pytest.approx(exact[key], rel=1e-11), key


def test_a_calibration_without_the_sigmoid_has_no_entry_for_it():
    model = small_model(3)
    found = collect_quant_stats(model, runner(user_batches(9, 7)))
    assert "sigmoid" not in found
    assert "final" in found


def test_statistics_are_saved_as_they_are_returned(tmp_path):
    model = small_model(4)
    found = collect_quant_stats(model, runner(chunked(user_batches(9, 7), 3)), tmp_path, rows_per_batch=7)
    assert CALIBRATED_STATS_FILE == "acts_quantization_stats.yaml"
    assert [path.name for path in tmp_path.iterdir()] == [CALIBRATED_STATS_FILE]
    assert load_statistics(tmp_path / CALIBRATED_STATS_FILE) == found
    text = (tmp_path / CALIBRATED_STATS_FILE).read_text()
    assert "{" not in text
    assert list(yaml.safe_load(text)) == ORDERS["no_split"].split()
    assert "shape: (7, 3)" in text


def test_nothing_is_written_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    collect_quant_stats(Through(), runner([(torch.ones(2, 2),)]))
    assert not list(tmp_path.iterdir())


def test_test_fn_is_called_with_the_model_in_eval_mode_without_gradients():
    model = small_model(5).train()
    model.mlp[0].weight.requires_grad_(True)
    seen = []

    def test_fn(**kwargs):
        assert list(kwargs) == ["model"]
        assert kwargs["model"] is model
        assert not any(module.training for module in model.modules())
        seen.append(model(torch.tensor([0, 1]), torch.tensor([2, 3]), True).requires_grad)

    collect_quant_stats(model, test_fn)
    assert seen == [False, False]
    assert not model.training


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("fail_in_call", [0, 1, None])
def test_hooks_are_gone_afterwards_even_when_test_fn_raises(fail_in_call):
    model = small_model(6)
    calls = []

    def test_fn(model):
        model(torch.tensor([0]), torch.tensor([1]), True)
        calls.append(None)
        if len(calls) - 1 == fail_in_call:
            raise RuntimeError("no more data")

    if fail_in_call is None:
        collect_quant_stats(model, test_fn)
    else:
        with pytest.raises(RuntimeError, match="no more data"):
            collect_quant_stats(model, test_fn)
    assert len(calls) == (2 if fail_in_call is None else fail_in_call + 1)
    assert hooks_of(model) == 0
    assert torch.is_grad_enabled()


def test_the_models_outputs_and_weights_are_untouched():
    model = small_model(7)
    batch = chunked(user_batches(9, 7), 9)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = model(*batch[0])
    outputs = []

    def test_fn(model):
        outputs.append(model(*batch[0]))

    collect_quant_stats(model, test_fn, rows_per_batch=7)
    assert all(torch.equal(output, expected) for output in outputs)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_rows_that_are_no_multiple_of_the_batch_are_a_value_error():
    with pytest.raises(ValueError, match="5"):
        collect_quant_stats(Through(), runner([(torch.ones(5, 2),)]), rows_per_batch=3)


def test_a_test_fn_that_calls_nothing_is_a_value_error():
    with pytest.raises(ValueError):
        collect_quant_stats(Through(), lambda model: None)


def histogram(statistics: dict, name: str) -> Histogram:
    return Histogram.from_plain(statistics[name]["output"]["histogram"])


@pytest.mark.parametrize("split", [False, True])
def test_histograms_count_every_element(split):
    statistics = collect_quant_stats(small_model(8, split), runner(chunked(user_batches(9, 7), 2)))
    widths = {"mf_user_embed": 3, "mlp_concat": 6, "mlp.0": 5, "mlp_relu.1": 4, "sigmoid": 1}
    for name, entry in statistics.items():
        found = histogram(statistics, name)
        assert (found.counts >= 0).all()
        if name in widths:
            assert found.counts.sum() == 63 * widths[name], name
        assert (found.min, found.max) == (entry["output"]["min"], entry["output"]["max"])
        mean = (found.counts @ found.centers.double() / found.counts.sum()).item()
        assert mean == pytest.approx(entry["output"]["mean"], abs=(found.edges[1] - found.edges[0]).item())


def test_inputs_have_histograms_unless_they_are_indices():
    statistics = collect_quant_stats(small_model(8), runner(chunked(user_batches(9, 7), 2)))
    assert "histogram" not in statistics["mf_user_embed"]["inputs"][0]
    of_input, of_output = statistics["mf_mult"]["inputs"][1], statistics["mf_item_embed"]["output"]
    assert of_input["histogram"] == of_output["histogram"]


@pytest.mark.parametrize("size", [1, 4])
def test_every_columns_largest_value(size):
    model, batches = small_model(8), user_batches(9, 7)
    found = collect_quant_stats(model, runner(chunked(batches, size)), rows_per_batch=7)
    for name, entry in reference_statistics(model, batches).items():
        expected, values = (columns_of_text(x["output"]["column_max"]) for x in (entry, found[name]))
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-7)
    assert "column_max" not in found["mf_user_embed"]["inputs"][0]


def test_histograms_equal_numpys():
    values = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    test_fn = runner([(torch.from_numpy(values[:150]),), (torch.from_numpy(values[150:]),)])
    found = histogram(collect_quant_stats(Through(), test_fn), "leaf")
    expected, _ = np.histogram(values.astype(np.float64), bins=found.edges.numpy())
    assert found.counts.sum() == values.size
    assert np.abs(np.cumsum(found.counts.numpy()) - np.cumsum(expected)).max() <= 3  # on an edge, in float32


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_constant_output_has_a_histogram_too(value):
    test_fn = runner([(torch.full((4, 3), value),)])
    found = histogram(collect_quant_stats(Through(), test_fn), "leaf")
    assert found.counts.tolist() == [12]
    assert (found.min, found.max) == (value, value)
    assert found.centers.tolist() == [value]
