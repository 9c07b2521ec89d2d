"""--qe-report as a user types it: table, CSV file and pictures, and that they tell the truth."""

from __future__ import annotations

import csv
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

pytestmark = pytest.mark.usefixtures("in_empty_directory")

FILES = {"quant_report.csv", "quant_ranges.png", "quant_errors.png"}
FEW_BITS = ["--qem", "asym_u", "--qeba", "4", "--qebw", "3"]  # so that every layer loses something
EMBEDDINGS = ["mf_user_embed", "mf_item_embed", "mlp_user_embed", "mlp_item_embed"]
UNSPLIT = [*EMBEDDINGS, "mf_mult", "mlp_concat", "mlp.0", "mlp.1", "final_concat", "final", "sigmoid"]
SPLIT = [*UNSPLIT[:8], "final_mf", "final_mlp", "final_add", "sigmoid"]
WEIGHTS_ALONE = [*EMBEDDINGS, "mlp.0", "mlp.1", "final"]
VARIANTS = [
    (["--qem", "asym_u", "--qepc"], UNSPLIT),
    (["--qem", "asym_s", "--split-final"], SPLIT),
    (["--qeba", "0", "--qepc"], WEIGHTS_ALONE),
    (["--qeba", "0", "--split-final"], [*WEIGHTS_ALONE[:-1], "final_mf", "final_mlp"]),
    (["--qebw", "0"], UNSPLIT),
    (["--qeba", "0", "--qebw", "0"], []),
    (["--qenql", "final", "sigmoid"], [x for x in UNSPLIT if x not in ("final", "sigmoid")]),
    (
        ["--qenql", "mlp.0", "final_concat", "mf_mult"],
        [*EMBEDDINGS, "mlp_concat", "mlp_relu.0", "mlp.1", "final", "sigmoid"],
    ),
    (["--qem", "asym_u", "--qe-scaled-concat", "--qepc"], UNSPLIT),
    (["--qem", "asym_u", "--qe-scaled-concat", "--qe-per-channel-acts"], UNSPLIT),
    (["--qe-embedding-bits", "4"], UNSPLIT),
    (["--qeba", "16", "--qebw", "16", "--qeca", "mse"], UNSPLIT),
    (["--qeba", "1", "--qebw", "2"], UNSPLIT),
    (["--qe-dynamic", "--qepc"], [*WEIGHTS_ALONE, "sigmoid"]),
    (["--qe-dynamic", "--split-final"], [*WEIGHTS_ALONE[:-1], "final_mf", "final_mlp", "sigmoid"]),
]


def read_report(directory: str) -> tuple[list[dict], list[dict]]:
    """The rows of both models, and those of tensors."""
    with open(Path(directory) / "quant_report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows[:2]] == ["float model", "quantized model"]
    return rows[:2], rows[2:]


def text(row: dict, k: int = 10) -> str:
    """A row's metrics as the script prints them."""
    return f"HR@{k} = {float(row[f'HR@{k}']):.4f}, NDCG@{k} = {float(row[f'NDCG@{k}']):.4f}"


def alone(rows: list[dict]) -> dict[str, str]:
    """By layer, the metrics with that one alone; all of a layer's rows have the same."""
    found = {row["layer"]: text(row) for row in rows}
    assert all(text(row) == found[row["layer"]] for row in rows)
    return found


def layers_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["layer"] for row in rows))


@pytest.mark.parametrize(("flags", "layers"), VARIANTS)
def test_report_has_every_quantized_layer_in_table_file_and_pictures(quantize_eval, flags, layers):
    """Whatever is quantized, and nothing else."""
    outcome = quantize_eval(flags, "a", "--qe-report", 0.2)
    assert outcome.code == 0, outcome.err
    first, *report, last = outcome.out.splitlines()
    assert first.startswith("HR@10 = ")
    assert last == "Report written to a"
    models, rows = read_report("a")
    assert report[:2] == [
        f"Float model, 12 users: {text(models[0])}",
        f"Quantized model, the same users: {text(models[1])}",
    ]
    assert max(map(len, report)) <= 120
    described = yaml.safe_load(Path("a/layer_quant_params.yaml").read_text())
    assert layers_of(rows) == list(described)
    assert [row["type"] for row in rows] == [described[row["layer"]]["type"] for row in rows]
    assert set(layers) == described.keys()
    assert [line.split()[0] for line in report[5:] if line[0] != " "] == list(described)
    assert len(report) == 5 + len(rows)
    for name in FILES - {"quant_report.csv"}:
        assert Path("a", name).read_bytes().startswith(b"\x89PNG")


def test_table_and_file_agree(quantize_eval):
    """Cell by cell."""
    outcome = quantize_eval(["--qem", "asym_u"], "a", "--qe-report", 0.2)
    _, rows = read_report("a")
    for line, row in zip(outcome.out.splitlines()[6:-1], rows, strict=True):
        cells = line[23:].split()
        numbers = [row[key] for key in ("min", "max", "range_min", "range_max", "scale")]
        assert cells[:5] == [f"{float(number):.3g}" for number in numbers]
        assert cells[5] == row["zero_point"]
        shares = [f"{100 * float(row[key]):.2f}" for key in ("levels_used", "saturated")]
        assert cells[6:9] == [*shares, f"{float(row['sqnr']):.1f}"]
        if not line.startswith(" "):
            assert cells[9:] == [f"{float(row[key]):.4f}" for key in ("HR@10", "NDCG@10")]
        assert math.isclose(
            int(row["zero_point"]) / float(row["scale"]), float(row["range_min"]), abs_tol=1e-6
        )


@pytest.mark.parametrize("flags", [FEW_BITS, ["--qe-dynamic", "--qeba", "3"], ["--qeba", "0", "--qebw", "2"]])
def test_metrics_over_all_users_are_those_of_evaluations(ncf, split_dir, checkpoint, quantize_eval, flags):
    """Of both models."""
    outcome = quantize_eval(flags, "a", "--qe-report", 1)
    (in_float, quantized), _ = read_report("a")
    assert f"{text(quantized)}," in outcome.out
    plain = ncf(split_dir, "--load", checkpoint, "--evaluate", "-o", "b")
    assert f"{text(in_float)}," in plain.out
    assert text(in_float) != text(quantized)


def test_metrics_over_some_users_are_of_the_first(quantize_eval):
    """Half of 60, of which the evaluation leaves the ranks."""
    assert quantize_eval(FEW_BITS, "a", "--qe-report", 0.5, "-k", 5).code == 0
    (_, quantized), _ = read_report("a")
    ranks = np.load("a/ranks.npy", allow_pickle=False)[:30]
    gains = np.where(ranks < 5, np.log(2) / np.log(ranks + 2), 0)
    assert float(quantized["HR@5"]) == pytest.approx((ranks < 5).mean())
    assert float(quantized["NDCG@5"]) == pytest.approx(gains.mean())


def test_portion_is_a_tenth_by_default(quantize_eval):
    """As in the README's calibrations."""
    for out, more in (("a", []), ("b", [0.1])):
        assert "Float model, 6 users: " in quantize_eval(["--qem", "asym_u"], out, "--qe-report", *more).out
    assert Path("a/quant_report.csv").read_bytes() == Path("b/quant_report.csv").read_bytes()


def test_layer_alone_is_what_a_config_file_quantizes_alone(
    ncf, split_dir, checkpoint, quantize_eval, tmp_path
):
    """With everything else in float."""
    assert quantize_eval(FEW_BITS, "a", "--qe-report", 1).code == 0
    (in_float, _), rows = read_report("a")
    found = alone(rows)
    arguments = {
        "class": "PostTrainLinearQuantizer",
        "mode": "asym_u",
        "bits_activations": 4,
        "bits_parameters": 3,
        "model_activation_stats": str(tmp_path / "stats0.yaml"),
    }
    for layer in ("mf_user_embed", "mf_mult", "mlp.0", "final_concat", "sigmoid"):
        overrides = {re.escape(layer): {}, ".*": {"bits_activations": None, "bits_weights": None}}
        quantizers = {"q": arguments | {"overrides": overrides}}
        Path("config.yaml").write_text(yaml.safe_dump({"quantizers": quantizers}, sort_keys=False))
        load = ["--load", checkpoint, "--quantize-eval", "--qe-config-file", "config.yaml"]
        outcome = ncf(split_dir, *load, "--qe-engine", "simulate", "-o", "b")
        assert f"{found[layer]}," in outcome.out
    assert len(set(found.values()) - {text(in_float)}) > 3


def test_report_of_a_config_file_keeps_a_layers_override(ncf, split_dir, checkpoint, stats_file):
    """Of 1 bit it loses more than of 8."""
    reports = []
    for bits in (1, 8):
        arguments = {
            "class": "PostTrainLinearQuantizer",
            "mode": "asym_u",
            "model_activation_stats": str(stats_file),
            "overrides": {"mlp.1": {"bits_activations": bits}},
        }
        Path("config.yaml").write_text(yaml.safe_dump({"quantizers": {"q": arguments}}))
        load = ["--load", checkpoint, "--quantize-eval", "--qe-config-file", "config.yaml"]
        assert ncf(split_dir, *load, "--qe-report", 1, "-o", bits).code == 0
        reports.append(alone(read_report(str(bits))[1]))
    changed = {layer for layer in reports[0] if reports[0][layer] != reports[1][layer]}
    assert changed == {"mlp.1"}


def test_dynamic_activations_have_no_scale_and_still_errors(quantize_eval):
    """Tables and weights have both."""
    assert quantize_eval(["--qe-dynamic"], "a", "--qe-report", 0.5).code == 0
    _, rows = read_report("a")
    of_scales = ("range_min", "range_max", "scale", "zero_point", "levels_used", "saturated")
    for row in rows:
        fixed = row["tensor"] == "weight" or row["layer"].endswith("embed")
        assert all(bool(row[key]) == fixed for key in of_scales), row
        assert 10 < float(row["sqnr"]) < 80


def test_dynamic_report_does_not_depend_on_blocks(quantize_eval, monkeypatch):
    """Ranges are those of one user's candidates, as in the evaluation."""
    from neural_cf.ranking import blocks

    assert quantize_eval(["--qe-dynamic"], "a", "--qe-report", 0.5).code == 0
    monkeypatch.setitem(blocks.PAIRS_AT_ONCE, "cpu", 1)
    assert quantize_eval(["--qe-dynamic"], "b", "--qe-report", 0.5).code == 0
    one, other = (read_report(out)[1] for out in ("a", "b"))
    assert [float(row["sqnr"]) for row in one] == pytest.approx([float(row["sqnr"]) for row in other])


def test_tensors_are_those_of_the_data_asked_for(quantize_eval):
    """Training pairs are other pairs than test users' candidates; metrics are those of test users with both."""
    for out, more in (("a", []), ("b", ["--calibrate-on", "train", "-s", 3])):
        assert quantize_eval(FEW_BITS, out, "--qe-report", 0.5, *more).code == 0
    (one_models, one), (other_models, other) = (read_report(out) for out in ("a", "b"))
    assert one_models == other_models
    assert alone(one) == alone(other)
    for row, another in zip(one, other, strict=True):
        assert (row["sqnr"] == another["sqnr"]) == (row["tensor"] == "weight")


def test_report_does_not_depend_on_the_engine_and_changes_nothing(quantize_eval):
    """Neither the model that is kept nor the ranks."""
    flags = ["--qem", "asym_u"]
    for engine in ("integer", "simulate"):
        assert quantize_eval(flags, engine, "--qe-engine", engine, "--qe-report", 0.3).code == 0
    assert quantize_eval(flags, "plain").code == 0
    report = Path("integer/quant_report.csv").read_bytes()
    assert Path("simulate/quant_report.csv").read_bytes() == report
    for name in ("ranks.npy", "layer_quant_params.yaml", "quant_stats_after_prepare_model.yaml"):
        assert Path("plain", name).read_bytes() == Path("integer", name).read_bytes()


def test_without_matplotlib_there_are_table_and_file(quantize_eval, monkeypatch):
    """And one line on what pictures need; those of a report before are gone."""
    assert quantize_eval(["--qem", "asym_u"], "a", "--qe-report", 0.2).code == 0
    with_pictures = Path("a/quant_report.csv").read_bytes()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = quantize_eval(["--qem", "asym_u"], "a", "--qe-report", 0.2)
    assert outcome.code == 0
    (warning,) = [line for line in outcome.err.splitlines() if "warning" in line]
    assert "--qe-report" in warning
    assert "pip install matplotlib" in warning
    assert "Float model, 12 users" in outcome.out
    assert Path("a/quant_report.csv").read_bytes() == with_pictures
    assert not list(Path("a").glob("*.png"))


def test_report_of_another_evaluation_does_not_stay(ncf, split_dir, quantize_eval):
    """Neither beside a quantized evaluation without one nor beside a new run."""
    assert quantize_eval(["--qem", "asym_u"], "a", "--qe-report", 0.2).code == 0
    assert all(Path("a", name).is_file() for name in FILES)
    assert quantize_eval(["--qem", "sym"], "a").code == 0
    assert not FILES & {path.name for path in Path("a").iterdir()}
    assert quantize_eval(["--qem", "asym_u"], "a", "--qe-report", 0.2).code == 0
    sizes = ["--layers", "8", "6", "4", "-f", "4"]
    assert ncf(split_dir, *sizes, "-e", 1, "-s", 1, "-o", "a", "--overwrite").code == 0
    assert not FILES & {path.name for path in Path("a").iterdir()}


def test_too_few_training_pairs_are_an_error_before_anything_is_evaluated(ncf, convert):
    """A batch of them is as large as a user's list."""
    rows = [f"{user},{item},5,{100 * user + item}" for user in range(3) for item in range(user, user + 20)]
    Path("ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows]) + "\n")
    assert convert("ratings.csv", "few", "-n", 400).code == 0
    sizes = ["-f", 2, "--layers", 4, 2]
    assert ncf("few", *sizes, "-e", 1, "-b", 4, "-o", "a").code == 0
    for flags in (["--quantize-eval", "--qe-dynamic", "--qe-report", 1], ["--qe-calibration", 1]):
        outcome = ncf("few", "--load", "a/best.pth.tar", *flags, "--calibrate-on", "train", "-o", "b")
        assert outcome.code == 2
        assert outcome.err.splitlines()[-1].startswith("ncf.py: error: --calibrate-on train: 285 training")
        assert not Path("b").exists()
