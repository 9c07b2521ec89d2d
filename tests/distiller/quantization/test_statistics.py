"""Statistics files: what loads, what is refused and how, and statistics that belong to another model."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
import yaml
from helpers_quant import (
    TAGS,
    all_pairs,
    golden_model,
    golden_stats,
    golden_stats_path,
    model_statistics,
    prepared,
    reference_statistics,
    small_model,
    user_batches,
)
from torch import nn

from distiller.quantization.statistics import foreign_statistics, load_statistics, save_statistics
from distiller.system.cli import InputError

MODEL = small_model(1)
STATS = model_statistics(MODEL)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "stats.yaml"


def test_what_is_saved_loads_unchanged_and_in_order(path):
    save_statistics(STATS, path)
    loaded = load_statistics(path)
    assert loaded == STATS
    assert list(loaded) == list(STATS)
    assert [list(entry) for entry in loaded.values()] == [["inputs", "output"]] * len(STATS)
    save_statistics(loaded, path.with_name("again.yaml"))
    assert path.read_text() == path.with_name("again.yaml").read_text()


@pytest.mark.parametrize("value", [1e-7, -1e-300, 1e22, 0.1 + 0.2, math.pi, 5e-324, -0.0])
def test_numbers_survive_to_the_last_bit(value, path):
    stats = copy.deepcopy(STATS)
    stats["mlp.0"]["output"]["mean"] = value
    save_statistics(stats, path)
    assert load_statistics(path)["mlp.0"]["output"]["mean"] == value


def test_files_are_in_block_style_with_the_comment_on_top(path):
    save_statistics(STATS, path, comment="NeuMF\ntwo lines")
    lines = path.read_text().splitlines()
    assert lines[:6] == ["# NeuMF", "# two lines", "mf_user_embed:", "  inputs:", "    0:", "      min: 0.0"]
    assert not any("{" in line or "&" in line for line in lines)
    assert load_statistics(path) == STATS


def test_statistics_that_are_not_saved_stay_as_they_were(path):
    before = copy.deepcopy(STATS)
    save_statistics(STATS, path)
    assert before == STATS


@pytest.mark.parametrize("tag", TAGS)
def test_the_originals_files_load(tag):
    loaded = load_statistics(golden_stats_path(tag))
    assert loaded == golden_stats(tag)
    assert "total_numel" in loaded["mlp.0"]["output"]


def without_b(stats: dict) -> dict:
    stats = copy.deepcopy(stats)
    for entry in stats.values():
        for tensor in (*entry["inputs"].values(), entry["output"]):
            del tensor["b"]
            tensor["total_numel"] = 1
    return stats


@pytest.mark.parametrize("clip", ["none", "avg", "gauss", "n_std --qe-clip-n-stds 2"])
def test_a_file_without_b_serves_every_mode_but_laplace(clip, path):
    save_statistics(without_b(STATS), path)
    pairs = all_pairs(MODEL)
    prepared(copy.deepcopy(MODEL), f"--qe-stats-file {path} --qeca {clip}", pairs)
    with pytest.raises(InputError) as caught:
        prepared(copy.deepcopy(MODEL), f"--qe-stats-file {path} --qeca laplace", pairs)
    message = str(caught.value)
    assert "--qe-stats-file" in message
    assert "mf_mult" in message
    assert " b" in message


def test_keys_of_inputs_may_be_text(path):
    stats = {
        name: {"inputs": {str(i): x for i, x in entry["inputs"].items()}, "output": entry["output"]}
        for name, entry in STATS.items()
    }
    save_statistics(stats, path)
    flags = f"--qe-stats-file {path} --qenql mlp.0 mlp_relu.0"
    prepared(copy.deepcopy(MODEL), flags, all_pairs(MODEL))


ENTRY = "{min: 0, max: 1, avg_min: 0, avg_max: 1, mean: 0.5, std: 0.1, b: 0.1}"


def named(layer: str, tensor: str) -> str:
    inputs = f"inputs: {{0: {ENTRY}}}"
    return f"first: {{{inputs}, output: {ENTRY}}}\n{layer}: {{{inputs}, output: {tensor}}}\n"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", None),
        ("# nothing\n", None),
        ("[1, 2]", None),
        ("text", None),
        ("3", None),
        ("{}", None),
        ("a: [", None),
        ("a: b: c", None),
        ("\tx: 1", None),
        ("a: *nowhere", None),
        ("a: \x00", None),
        ("? [a]\n: 1", None),
        ("a: 2001-99-99", None),
        ("mlp.0:", "mlp.0"),
        ("mlp.0: 7", "mlp.0"),
        ("mlp.0: [1]", "mlp.0"),
        ("mlp.0: {inputs: [1], output: {}}", "mlp.0"),
        ("mlp.0: {inputs: 3}", "mlp.0"),
        ("mlp.0: {inputs: {0: 5}}", "mlp.0"),
        ("mlp.0: {output: high}", "mlp.0"),
        ("5: {output: {min: 0}}", "5"),
        ("null: {output: {min: 0}}", None),
        (named("mlp.0", "{min: .nan, max: 1}"), "mlp.0"),
        (named("mlp.0", "{min: -.inf, max: 1}"), "mlp.0"),
        (named("mlp.0", "{min: 0, max: .inf}"), "mlp.0"),
        (named("mlp.0", "{min: 0, max: 1, mean: .NaN}"), "mlp.0"),
        (named("mlp.0", "{min: 0, max: 1, std: .nan}"), "mlp.0"),
        (named("mlp.0", "{min: 0, max: 1, b: .nan}"), "mlp.0"),
        (named("mlp.0", "{min: 0, max: 1.0e+300}"), "mlp.0"),  # infinite in float32
        (named("mlp.0", "{min: low, max: 1}"), "mlp.0"),
        (named("mlp.0", "{min: null, max: 1}"), "mlp.0"),
        (named("mlp.0", "{min: true, max: 1}"), "mlp.0"),
        (named("mlp.0", "{min: [0], max: 1}"), "mlp.0"),
        (named("mlp.0", "{min: {}, max: 1}"), "mlp.0"),
        (named("mlp.0", f"{{min: 0, max: 1{'0' * 18}1}}"), "line 2"),
        (named("mlp.0", f"{{min: 0, max: 1{'0' * 400}}}"), "line 2"),
        (named("mlp.0", "{column_max: 1 2 three}"), "mlp.0"),
        (named("mlp.0", "{column_max: 1 2 nan}"), "mlp.0"),
        (named("mlp.0", "{column_max: 1 2 1e39}"), "mlp.0"),
        (named("mlp.0", "{column_max: [1, 2]}"), "mlp.0"),
        (named("mlp.0", "{column_max: ''}"), "mlp.0"),
        (named("mlp.0", f"{{min: 0, max: 1{'0' * 6000}}}"), "line 2"),
        ("[" * 20000, None),
        ("a: " * 3 + "{" * 5000, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_statistics_file_is_an_input_error(text, place, path):
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_statistics(path)
    message = str(caught.value)
    assert str(path) in message
    assert "--qe-stats-file" in message
    assert "\n" not in message
    if place:
        assert place in message


def test_bytes_that_are_no_text_are_an_input_error(path):
    for content in (b"\xff\xfe\xfa\xfb", b"mlp.0: \xe9", bytes(range(256)), os.urandom(2000) + b"\xff"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="--qe-stats-file"):
            load_statistics(path)


def test_a_file_cut_short_before_its_last_layer_is_refused(path):
    save_statistics(STATS, path)
    whole = path.read_text()
    for length in range(0, whole.index("sigmoid:"), 97):
        path.write_text(whole[:length])
        with pytest.raises(InputError):
            prepared(copy.deepcopy(MODEL), f"--qe-stats-file {path}", all_pairs(MODEL))


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {marker}']",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]",
        "!!python/object/new:os.system ['touch {marker}']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
        "!custom {{a: 1}}",
    ],
)
def test_python_objects_are_refused_and_not_run(tag, path, tmp_path):
    marker = tmp_path / "marker"
    path.write_text(f"mlp.0: {tag.format(marker=marker)}\n")
    with pytest.raises(InputError, match="--qe-stats-file"):
        load_statistics(path)
    assert not marker.exists()


def test_a_file_that_is_not_there_or_a_directory_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="none"):
        load_statistics(tmp_path / "none.yaml")
    with pytest.raises(OSError):
        load_statistics(tmp_path)


# --- statistics of another model ---


@pytest.mark.parametrize("tag", TAGS)
def test_a_models_own_statistics_are_no_reason_to_warn(tag):
    assert foreign_statistics(golden_model(tag), golden_stats(tag)) is None


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("split", [False, True])
def test_statistics_from_a_share_of_the_users_are_no_reason_to_warn(seed, split):
    model = small_model(seed, split, users=60, mf_dim=8, layers=(16, 8))
    batches = [(*pair, True) for pair in user_batches(15, 7)]
    assert foreign_statistics(model, reference_statistics(model, batches)) is None


@pytest.mark.parametrize("tag", TAGS)
def test_ten_times_the_weights_are_another_model(tag):
    model = golden_model(tag)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    assert "embed" in foreign_statistics(model, golden_stats(tag))


@pytest.mark.parametrize(
    ("sizes", "layer"),
    [
        ({"mf_dim": 4}, "mf_"),
        ({"layers": (8, 5, 4)}, "mlp_"),
        ({"layers": (6, 7, 4)}, "mlp.0"),
        ({"layers": (6, 5, 2)}, "mlp.1"),
    ],
)
def test_other_widths_are_another_model(sizes, layer):
    reason = foreign_statistics(small_model(1, **sizes), STATS)
    assert reason is not None
    assert layer in reason


def test_what_is_missing_is_no_reason_to_warn():
    bare = {name: {"output": {"avg_min": 0.0, "avg_max": 1.0}} for name in STATS}
    assert foreign_statistics(MODEL, bare) is None
    assert foreign_statistics(MODEL, {}) is None
    assert foreign_statistics(nn.Sequential(nn.ReLU()), STATS) is None


def test_a_statistics_file_is_plain_yaml(path):
    save_statistics(STATS, path)
    assert yaml.safe_load(path.read_text()) == STATS
