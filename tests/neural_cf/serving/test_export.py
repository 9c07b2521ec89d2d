"""neural-cf export: ONNX graphs against the models that they are of, and the command line."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import call
from helpers_paths import SCHEDULE
from helpers_quant import MODES, all_pairs, model_statistics, scores, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

import distiller.onnx_graph
from benchmarks import onnx_accuracy
from distiller.graph import leaf_modules, module_graph
from distiller.onnx_graph import onnx_model
from distiller.quantization import PostTrainLinearQuantizer
from distiller.system.cli import InputError
from neural_cf.commands import export as command
from neural_cf.int8.scorer import scorer_of
from neural_cf.model import NeuMF
from neural_cf.serving import export as export_module
from neural_cf.split import load_split

INPUTS = {
    "mf_user_embed": "user",
    "mf_item_embed": "item",
    "mlp_user_embed": "user",
    "mlp_item_embed": "item",
}
FLOAT = {"bits_activations": None, "bits_weights": None}
ALIKE = 1e-6


# --- the graph ---


def quantized(model: NeuMF, **arguments) -> tuple[onnx.ModelProto, np.ndarray]:
    """The ONNX model of a prepared model, which is changed in place, and its own scores of all pairs."""
    pairs, statistics = all_pairs(model), off_the_edges(model_statistics(model))
    quantizer = PostTrainLinearQuantizer(model, model_activation_stats=statistics, **arguments)
    quantizer.prepare_model((*pairs, True))
    graph = onnx_model(quantizer.graph, quantizer.modules, INPUTS, "score", quantizer.weights)
    onnx.checker.check_model(graph, full_check=True)
    return graph, scores(model, pairs)


def off_the_edges(statistics: dict) -> dict:
    """Each layer's ranges a few per cent wider, by its own factor, so that no output of few levels lies half-way.

    On that edge a rounding in the last bit decides, and for many pairs at once.
    """

    def wider(value: Any, factor: float) -> Any:
        if isinstance(value, dict):
            return {key: wider(part, factor) for key, part in value.items()}
        return value * factor if isinstance(value, float) else value

    return {
        layer: wider(found, 1 + math.sqrt(2 + number) / 100)
        for number, (layer, found) in enumerate(statistics.items())
    }


def run_graph(
    graph: onnx.ModelProto, users: torch.Tensor, items: torch.Tensor, optimized: bool
) -> np.ndarray:
    """What onnxruntime computes, with its own fusions or operator by operator."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"user": users.numpy(), "item": items.numpy()})
    return result


def initializers(graph: onnx.ModelProto) -> dict[str, TensorProto]:
    """By name."""
    return {tensor.name: tensor for tensor in graph.graph.initializer}


SETTINGS = [
    {},
    {"per_channel_wts": True},
    {"scaled_concat": True, "per_channel_wts": True},
    {"embedding_bits": 4},
    {"embedding_bits": 8},
    {"per_channel_acts": True, "per_channel_wts": True},
    {"per_channel_acts": True, "scaled_concat": True, "embedding_bits": 8},
    {"bits_activations": 4, "bits_parameters": 5},
    {"bits_activations": 12},
    {"scale_approx_mult_bits": 8},
    {"fuse_relu": False},
    {"bits_activations": 0},
    {"bits_parameters": 0},
    {"overrides": {"final.*": FLOAT, "sigmoid": FLOAT}},
    {"overrides": {"final": FLOAT, "final_mf": FLOAT}},
    {"per_channel_acts": True, "scaled_concat": True, "overrides": {"mf_mult": {"bits_activations": 12}}},
]


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arguments", SETTINGS)
def test_a_quantized_graph_computes_what_the_simulation_does(arguments, mode, split, optimized):
    """But for values between two levels, which are few."""
    arguments = dict(arguments)
    if "overrides" in arguments and split:
        arguments["overrides"] = {k: v for k, v in arguments["overrides"].items() if k != "final"}
    elif "overrides" in arguments:
        arguments["overrides"] = {k: v for k, v in arguments["overrides"].items() if k != "final_mf"}
    model = small_model(1, split, users=9, items=70)
    pairs = all_pairs(model)
    graph, expected = quantized(model, mode=mode, **arguments)
    difference = np.abs(run_graph(graph, *pairs, optimized) - expected)
    assert len(np.unique(expected)) > 3
    assert (difference <= ALIKE).mean() >= 0.99


@pytest.mark.parametrize("bits", [9, 15, 16])
def test_more_than_8_bits(bits):
    """Float32 sums come to lie on the other side of a rounding here and there, which moves a score by a few levels."""
    model = small_model(2, users=9, items=70)
    pairs = all_pairs(model)
    graph, expected = quantized(model, mode="asym_u", bits_activations=bits)
    np.testing.assert_allclose(run_graph(graph, *pairs, True), expected, atol=64 / 2**bits)
    kinds = {tensor.data_type for name, tensor in initializers(graph).items() if "mf_mult" in name}
    assert TensorProto.UINT16 in kinds


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    split=st.booleans(),
    mode=st.sampled_from(MODES),
    weight_mode=st.sampled_from(MODES),
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    layers=st.sampled_from([(6, 5, 4), (2, 1), (4, 9, 17, 3), (40, 33, 20)]),
    mf_dim=st.integers(1, 20),
    embedding_bits=st.sampled_from([None, 4, 8]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_small_models_of_any_settings(
    seed, split, mode, weight_mode, bits, layers, mf_dim, embedding_bits, flags
):
    """Odd widths of packed rows, fewer bits than the type has, one column."""
    model = small_model(seed, split, users=7, items=30, mf_dim=mf_dim, layers=layers)
    pairs = all_pairs(model)
    graph, expected = quantized(
        model,
        mode={"activations": mode, "weights": weight_mode},
        bits_activations=bits[0],
        bits_parameters=bits[1],
        embedding_bits=embedding_bits,
        per_channel_wts=flags[0],
        per_channel_acts=flags[1],
        scaled_concat=flags[2],
    )
    difference = np.abs(run_graph(graph, *pairs, True) - expected)
    assert (difference <= ALIKE).mean() >= 0.99


@pytest.mark.parametrize("split", [False, True])
def test_a_float_graph(split):
    """In batches of any size; its weights are the model's."""
    model = small_model(3, split)
    graph = onnx_model(module_graph(model, (*all_pairs(model), True)), leaf_modules(model), INPUTS, "score")
    onnx.checker.check_model(graph, full_check=True)
    users, items = all_pairs(model)
    for rows in (1, 2, len(users)):
        found = run_graph(graph, users[:rows], items[:rows], True)
        assert found.shape == (rows, 1)
        np.testing.assert_allclose(found, scores(model, (users[:rows], items[:rows])), atol=ALIKE)
    weights = {name for name, _ in model.named_parameters()}
    assert weights == set(initializers(graph))
    assert [(x.domain, x.version) for x in graph.opset_import] == [("", 21)]


def test_integers_scales_and_zero_points():
    """ONNX's scale is the inverse of ours and its zero point the opposite; weights are the model's own integers."""
    model = small_model(1, users=9, items=70)
    graph, _ = quantized(model, mode="asym_u", per_channel_wts=True)
    tensors = {name: numpy_helper.to_array(x) for name, x in initializers(graph).items()}
    product, linear = model.mf_mult, model.get_submodule("mlp.0")
    assert tensors["mf_mult/quantized/scale"] == np.float32(1 / product.output_scale.double().item())
    assert tensors["mf_mult/quantized/zero_point"] == -product.output_zero_point.item()
    for name, buffers in (("mf_user_embed", model.mf_user_embed), ("mlp.0", linear)):
        assert tensors[f"{name}.weight"].dtype == np.uint8
        np.testing.assert_array_equal(tensors[f"{name}.weight"], buffers.weight.numpy())
    assert tensors["mlp.0.bias"].dtype == np.int32
    np.testing.assert_array_equal(tensors["mlp.0.bias"], linear.bias.numpy())
    assert tensors["mlp.0.weight/scale"].shape == (5,)
    np.testing.assert_allclose(tensors["mlp.0.weight/scale"], 1 / linear.w_scale.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(tensors["mlp.0.weight/zero_point"], -linear.w_zero_point.numpy())


def test_tables_of_4_bits_are_two_to_a_byte():
    model = small_model(1, users=9, items=70, mf_dim=5)
    graph, _ = quantized(model, mode="sym", embedding_bits=4)
    table = numpy_helper.to_array(initializers(graph)["mf_item_embed.weight"])
    assert (table.dtype, table.shape) == (np.uint8, (70, 3))


def test_accumulators_that_may_saturate_are_refused():
    with pytest.raises(InputError, match=r"layer mlp\.0 has sums that may saturate at 12 bits"):
        quantized(small_model(1), mode="asym_u", bits_accum=12)


def test_dynamic_ranges_are_refused():
    model = small_model(1)
    quantizer = PostTrainLinearQuantizer(model, mode="asym_u")
    quantizer.prepare_model((*all_pairs(model), True))
    with pytest.raises(InputError, match=r"layer mlp\.0 finds its ranges on every batch"):
        onnx_model(quantizer.graph, quantizer.modules, INPUTS, "score", quantizer.weights)


# --- the command line ---


@pytest.fixture
def export():
    """Calls ``neural-cf export``."""
    return lambda *arguments: call("neural-cf export", command.main, arguments)


@pytest.fixture
def quantized_file(quantize_eval, tmp_path, monkeypatch) -> Path:
    """A ``quantized.pth.tar``."""
    monkeypatch.chdir(tmp_path)
    assert quantize_eval(["--qem", "asym_u", "--qepc", "--split-final"], "int8").code == 0
    return tmp_path / "int8" / "quantized.pth.tar"


def error_line(outcome) -> str:
    """The only line of a user's error."""
    assert outcome.code == 2, outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith("neural-cf export: error: ")
    return line


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_export(export, checkpoint, quantized_file, tmp_path, kind, name):
    """Both formats of both kinds pass their check, and score as the checkpoint does."""
    path = checkpoint if kind == "float" else quantized_file
    outcome = export(path, tmp_path / name)
    assert outcome.code == 0, outcome.err
    check, summary = outcome.out.splitlines()
    assert "10000 pairs: max " in check
    assert "inputs user, item, output score" in summary
    saved = export_module.read_model(path)
    users, items = torch.arange(60), torch.arange(80).repeat(60, 1)
    scorer = (export_module.OnnxScorer if name.endswith("onnx") else export_module.TorchScorer)(
        tmp_path / name
    )
    differences = export_module.compare_scores(scorer_of(saved), scorer, users, items)
    assert (differences.pairs, differences.equal > 0.99) == (4800, True)


def test_a_quantized_file_is_a_quarter(export, checkpoint, quantized_file, tmp_path):
    """Of what tables take, which are most of it."""
    tables = 4 * (60 + 80) * (4 + 4)
    assert export(checkpoint, tmp_path / "a.onnx").code == 0
    assert export(quantized_file, tmp_path / "b.onnx").code == 0

    def nb_bytes(name: str) -> int:
        graph = onnx.load(tmp_path / name)
        return sum(len(x.raw_data) for key, x in initializers(graph).items() if key.endswith("embed.weight"))

    assert (nb_bytes("a.onnx"), nb_bytes("b.onnx")) == (tables, tables / 4)


def test_a_model_above_the_tolerance_is_not_written(export, checkpoint, tmp_path):
    """Float32 sums differ in their last digits; what was there before is still there, and nothing else."""
    out = tmp_path / "model.onnx"
    out.write_text("before")
    outcome = export(checkpoint, out, "--tolerance", 0)
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"neural-cf export: error: {out} is not written: its scores differ by up to ")
    assert out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_wrong_graph_is_caught(export, checkpoint, tmp_path, monkeypatch):
    """Of another model."""
    other = torch.load(checkpoint, weights_only=False)
    other["state_dict"]["final.weight"] = -other["state_dict"]["final.weight"]
    torch.save(other, tmp_path / "other.pth.tar")
    write = export_module.write_onnx
    monkeypatch.setattr(
        export_module,
        "write_onnx",
        lambda saved, path: write(export_module.read_model(tmp_path / "other.pth.tar"), path),
    )
    assert export(checkpoint, tmp_path / "model.onnx").code == 1
    assert not (tmp_path / "model.onnx").exists()


def test_the_format_is_the_suffix_or_the_flag(export, checkpoint, tmp_path):
    assert "--format" in error_line(export(checkpoint, tmp_path / "model.bin"))
    assert export(checkpoint, tmp_path / "model.bin", "--format", "onnx").code == 0
    onnx.checker.check_model(tmp_path / "model.bin")


@pytest.mark.parametrize("value", ["-1", "2", "nan", "much"])
def test_a_tolerance_out_of_range(export, checkpoint, tmp_path, value):
    assert "--tolerance" in error_line(export(checkpoint, tmp_path / "model.onnx", "--tolerance", value))


def test_no_checkpoint(export, tmp_path):
    (tmp_path / "a.pth.tar").write_text("nothing")
    assert "a.pth.tar" in error_line(export(tmp_path / "a.pth.tar", tmp_path / "model.onnx"))
    assert "b.pth.tar" in error_line(export(tmp_path / "b.pth.tar", tmp_path / "model.onnx"))


def test_no_directory(export, checkpoint, tmp_path):
    error_line(export(checkpoint, tmp_path / "none" / "model.onnx"))
    assert "is a directory" in error_line(export(checkpoint, tmp_path, "--format", "onnx"))
    content = checkpoint.read_bytes()
    assert "is the checkpoint itself" in error_line(export(checkpoint, checkpoint, "--format", "onnx"))
    assert checkpoint.read_bytes() == content


def test_without_the_libraries(export, checkpoint, tmp_path, monkeypatch):
    """torch.export does without."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if "onnx" in name else find(name, *more)
    )
    assert "pip install onnx onnxruntime" in error_line(export(checkpoint, tmp_path / "model.onnx"))
    assert export(checkpoint, tmp_path / "model.pt2").code == 0


def test_a_dynamic_model(export, quantize_eval, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quantize_eval(["--qe-dynamic"], "dynamic").code == 0
    outcome = export("dynamic/quantized.pth.tar", "model.onnx")
    *warnings, line = outcome.err.splitlines()
    assert outcome.code == 2
    assert all(text.startswith("neural-cf export: warning: dynamic quantization leaves") for text in warnings)
    assert "layer mlp.0 finds its ranges on every batch" in line


def test_a_quantization_aware_checkpoint(export, ncf, split_dir, checkpoint, tmp_path, monkeypatch):
    """Is exported by way of its integers."""
    monkeypatch.chdir(tmp_path)
    schedule = SCHEDULE
    training = ["--reset-optimizer", "-l", 0.001, "-e", 1, "--compress", schedule, "-o", "qat"]
    assert ncf(split_dir, "--load", checkpoint, *training).code == 0
    assert "--quantize-eval" in error_line(export("qat/best.pth.tar", "model.onnx"))
    evaluation = ["--load", "qat/best.pth.tar", "--evaluate", "--quantize-eval", "-o", "int8"]
    assert ncf(split_dir, *evaluation).code == 0
    outcome = export("int8/quantized.pth.tar", "model.onnx")
    assert outcome.code == 0, outcome.err


def test_a_model_larger_than_a_file_may_be(export, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(distiller.onnx_graph, "MAX_BYTES", 1000)
    assert "larger than the 2 GB" in error_line(export(checkpoint, tmp_path / "model.onnx"))
    assert not list(tmp_path.iterdir())


# --- benchmarks.onnx_accuracy ---


def test_accuracy_of_an_export(export, split_dir, quantized_file, tmp_path):
    """The same figures on both sides, and lists that are the same."""
    assert export(quantized_file, tmp_path / "model.onnx").code == 0
    arguments = (split_dir, quantized_file, tmp_path / "model.onnx")
    outcome = call("onnx_accuracy.py", onnx_accuracy.main, arguments)
    assert outcome.code == 0, outcome.err
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in outcome.out.splitlines() if "|" in line
    ]
    figures = {name: values for name, *values in rows}
    assert len(set(figures["HR@10"])) == len(set(figures["NDCG@10"])) == 1
    assert float(figures["scores alike, %"][1]) > 99
    assert float(figures["top-10 lists' overlap, %"][1]) > 99


def test_accuracy_of_another_model(split_dir):
    """Overlap, ties and differences as plain loops have them."""
    split = load_split(split_dir)

    def ours(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return (items % 7) / 8

    def theirs(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return (items % 7) / 8 + ((items + users[:, None]) % 5 == 0) / 64

    overlap, tied, alike, levels = [], [], [], []
    for user in range(split.nb_users):
        candidates = [*split.negatives[user].tolist(), int(split.test_items[user])]
        alike += [(item + user) % 5 != 0 for item in candidates]
        distinct = list(dict.fromkeys(candidates))
        best = sorted(distinct, key=lambda item: -(item % 7))
        other = sorted(distinct, key=lambda item, user=user: -(item % 7 / 8 + ((item + user) % 5 == 0) / 64))
        overlap.append(len(set(best[:10]) & set(other[:10])) / len(best[:10]))
        tied.append(len(best) > 10 and best[9] % 7 == best[10] % 7)
        levels.append(len({item % 7 for item in best}))
    found = onnx_accuracy.compare(ours, theirs, split)
    assert 0 < np.mean(overlap) < 1
    assert found.overlap == pytest.approx(np.mean(overlap))
    assert found.same_lists == pytest.approx(np.mean(np.array(overlap) == 1))
    assert found.tied == pytest.approx(np.mean(tied))
    assert found.distinct == pytest.approx(np.mean(levels))
    assert found.equal == pytest.approx(np.mean(alike))
    assert (found.max, found.mean) == pytest.approx((1 / 64, (1 - np.mean(alike)) / 64))
