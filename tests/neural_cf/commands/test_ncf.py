"""ncf.py as a user types it: what it prints, what it leaves behind, and what it refuses."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers_paths import SCHEDULE

import ncf as script
from distiller.quantization.histogram import Histogram
from distiller.quantization.statistics import columns_of_text
from distiller.system.files import file_digest
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.commands.flags import build_parser
from neural_cf.model import NeuMF, sizes_from_state_dict
from neural_cf.ranking import blocks, candidates, places
from neural_cf.ranking.scorers import float_scorer
from neural_cf.split import load_split
from neural_cf.training import trainer

pytestmark = pytest.mark.usefixtures("in_empty_directory")

SIZES = ["--layers", "8", "6", "4", "-f", "4"]
TRAIN = [*SIZES, "-s", "1", "-l", "0.01"]
NUMBER = r"\d+\.\d{4}"
TIME = r"\d+\.\d\d"
EPOCH_LINE = re.compile(
    rf"Epoch (\d+): HR@10 = ({NUMBER}), NDCG@10 = ({NUMBER}), AvgTrainLoss = ({NUMBER}), "
    rf"train_time = {TIME}, val_time = {TIME}"
)
INITIAL_LINE = re.compile(rf"^(HR@10 = {NUMBER}, NDCG@10 = {NUMBER}), val_time = {TIME}", re.MULTILINE)
LAYERS = [
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
]
ENDS = {False: ["final_concat", "final", "sigmoid"], True: ["final_mlp", "final_mf", "final_add", "sigmoid"]}


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Every path below a directory, with a file's bytes."""
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes()
        for path in directory.rglob("*")
    }


def lines(text: str) -> list[str]:
    """Lines that are not empty."""
    return [line for line in text.split("\n") if line.strip()]


def epochs(out: str) -> list[tuple[int, float, float]]:
    """Number, HR and NDCG of each epoch's line; the first line says how it trains, the last one which is the best."""
    first, *rest, last = lines(out)
    assert last.startswith("Best: epoch "), out
    return stopped_epochs([first, *rest])


def stopped_epochs(out: list[str]) -> list[tuple[int, float, float]]:
    """The same of the lines before the last one of a run that was stopped."""
    first, *rest = out
    assert first.startswith("Training with "), out
    found = [EPOCH_LINE.fullmatch(line) for line in rest]
    assert all(found), out
    return [(int(match[1]), float(match[2]), float(match[3])) for match in found]


def initial(outcome) -> str:
    """The metrics of an evaluation's only line."""
    assert outcome.code == 0, outcome.err
    (line,) = lines(outcome.out)
    match = INITIAL_LINE.fullmatch(line)
    assert match, line
    return match[1]


def events(directory: Path, kind: str) -> set[str]:
    """Tags of a run's TensorBoard events of one kind."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return set(accumulator.Tags()[kind])


def sha256(path: Path) -> str:
    """A file's digest."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- bad input ---


@pytest.fixture
def refused(ncf, tmp_path):
    """Calls ``ncf.py``; it must end in one line with every part, code 2, and everything as it was."""

    def check(arguments: list, *parts: object) -> str:
        before = snapshot(tmp_path)
        outcome = ncf(*arguments)
        assert outcome.code == 2, outcome
        assert len(lines(outcome.err)) == 1, outcome.err
        assert outcome.err.startswith("ncf.py: error: "), outcome.err
        assert outcome.out == ""
        for part in parts:
            assert str(part) in outcome.err
        assert snapshot(tmp_path) == before
        return outcome.err

    return check


FLAGS_OUT_OF_RANGE = [
    (["-b", "0"], "--batch-size"),
    (["-b", "-1"], "--batch-size"),
    (["--batch-size", "many"], "--batch-size"),
    (["-l", "-0.1"], "--learning-rate"),
    (["-l", "0"], "--learning-rate"),
    (["-l", "nan"], "--learning-rate"),
    (["-l", "inf"], "--learning-rate"),
    (["--l2", "-0.1"], "--l2"),
    (["--l2", "inf"], "--l2"),
    (["-k", "0"], "--topk"),
    (["-k", "42"], "--topk"),  # of 41 candidates
    (["-f", "0", "--layers", "0"], "--factors"),
    (["-f", "-4"], "--factors"),
    (["--layers", "7", "4"], "--layers"),
    (["--layers", "0", "4"], "--layers"),
    (["--layers", "4"], "--layers"),
    (["--layers", "8", "0"], "--layers"),
    (["--layers", "8", "4", "-2"], "--layers"),
    (["--split-final", "-f", "0"], "--split-final"),
    (["--pretrain", "0"], "--pretrain"),
    (["--pretrain", "few"], "--pretrain"),
    (["--pretrain", "2", "0"], "--pretrain"),
    (["--pretrain", "1", "2", "3"], "--pretrain"),
    (["--pretrain-rate", "0.1"], "--pretrain"),
    (["--pretrain", "--pretrain-rate", "0"], "--pretrain-rate"),
    (["--pretrain", "--pretrain-rate", "nan"], "--pretrain-rate"),
    (["--pretrain", "-f", "0"], "--pretrain"),
    (["--pretrain", "--layers", "0"], "--pretrain"),
    (["--compress", SCHEDULE, "--layers", "0"], "--compress"),
    (["-n", "0"], "--negative-samples"),
    (["-n", "-1"], "--negative-samples"),
    (["-e", "-1"], "--epochs"),
    (["-s", "-1"], "--seed"),
    (["-s", str(2**70)], "--seed"),
    (["-p", "0"], "--processes"),
    (["--max-steps", "0"], "--max-steps"),
    (["--log-freq", "0"], "--log-freq"),
    (["-t", "high"], "--threshold"),
    (["--gpus", "99"], "--gpus"),
    (["--gpus", "first"], "--gpus"),
    (["--gpus", "-1"], "--gpus"),
    (["--resume"], "--resume"),
    (["--evaluate"], "--load"),
    (["--eval-fp16"], "--load"),
    (["--quantize-eval", "--qe-dynamic"], "--load"),
    (["--qe-calibration", "0.1"], "--load"),
    (["--act-hist", "0.1"], "--load"),
    (["--no-such-flag"], "--no-such-flag"),
]


@pytest.mark.parametrize(("flags", "name"), FLAGS_OUT_OF_RANGE)
def test_flag_out_of_range_is_named(refused, split_dir, tmp_path, flags, name):
    """Before anything is written."""
    refused([split_dir, *flags, "-o", tmp_path / "out"], name)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--qe-calibration", "0"], "--qe-calibration"),
        (["--qe-calibration", "1.5"], "--qe-calibration"),
        (["--qe-calibration", "-1"], "--qe-calibration"),
        (["--qe-calibration", "nan"], "--qe-calibration"),
        (["--qe-calibration", "some"], "--qe-calibration"),
        (["--act-hist", "0"], "--act-hist"),
        (["--act-hist", "2"], "--act-hist"),
        (["--quantize-eval", "--qe-dynamic", "--qe-report", "0"], "--qe-report"),
        (["--quantize-eval", "--qe-dynamic", "--qe-report", "1.5"], "--qe-report"),
        (["--evaluate", "--qe-report"], "--qe-report"),
        (["--evaluate", "--calibrate-on", "train"], "--qe-report"),
        (["--evaluate", "-k", "42"], "--topk"),
        (["--evaluate", "-f", "5"], "--factors"),
        (["--evaluate", "--layers", "8", "6"], "--layers"),
        (["--evaluate", "--gpus", "99"], "--gpus"),
        (["--quantize-eval"], "--qe-stats-file"),
        (["--quantize-eval", "--qe-mode", "best"], "--qe-mode"),
        (["--quantize-eval", "--qe-dynamic", "--qeba", "17"], "--qe-bits-acts"),
        (["--quantize-eval", "--qe-dynamic", "--qeba", "-1"], "--qe-bits-acts"),
        (["--quantize-eval", "--qe-dynamic", "--qebw", "17"], "--qe-bits-wts"),
        (["--quantize-eval", "--qe-dynamic", "--qe-bits-accum", "0"], "--qe-bits-accum"),
        (["--quantize-eval", "--qe-dynamic", "--qeca", "n_std"], "--qe-clip-n-stds"),
        (
            ["--quantize-eval", "--qe-dynamic", "--qeca", "n_std", "--qe-clip-n-stds", "-1"],
            "--qe-clip-n-stds",
        ),
        (["--quantize-eval", "--qe-dynamic", "--qeca", "gauss", "--qeba", "9"], "--qe-clip-acts"),
        (["--quantize-eval", "--qe-dynamic", "--qenql", "mlp.9"], "--qe-no-quant-layers"),
        (["--quantize-eval", "--qe-dynamic", "--qencl", "mlp"], "--qe-no-clip-layers"),
        (["--quantize-eval", "--qe-dynamic", "--qenql", "final_mf"], "--qe-no-quant-layers"),
        (["--quantize-eval", "--qe-dynamic", "--qe-stats-file", "x.yaml"], "--qe-stats-file"),
        (["--quantize-eval", "--qe-stats-file", "missing.yaml"], "missing.yaml"),
        (["--quantize-eval", "--qe-config-file", "missing.yaml"], "missing.yaml"),
        (["--calibrate-on", "both", "--qe-calibration", "1"], "--calibrate-on"),
    ],
)
def test_flag_of_evaluation_or_calibration_out_of_range_is_named(
    refused, split_dir, checkpoint, tmp_path, flags, name
):
    """With a checkpoint that is good."""
    refused([split_dir, "--load", checkpoint, *flags, "-o", tmp_path / "out"], name)


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "cut"])
def test_data_directory_that_holds_no_split_is_named(refused, split_dir, tmp_path, kind):
    """Missing, empty, a file, or with a pickle cut short and nothing else."""
    data = tmp_path / "data"
    if kind == "file":
        data.write_text("")
    elif kind != "missing":
        data.mkdir()
    if kind == "cut":
        whole = (split_dir / "split.pickle").read_bytes()
        (data / "split.pickle").write_bytes(whole[: len(whole) // 2])
    refused([data, "-o", tmp_path / "out"], data)


def test_user_who_has_every_item_in_training_is_refused(refused, tmp_path):
    """In CSV files, which nobody has checked: there are no negatives to draw."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train-ratings.csv").write_text("0\t0\t1\n0\t1\t1\n0\t2\t1\n1\t0\t1\n")
    (data / "test-ratings.csv").write_text("0\t1\t1\n1\t2\t1\n")
    (data / "test-negative.csv").write_text("1\n1\n")
    refused([data, "-k", "1", "-o", tmp_path / "out"], "user 0")


class Command:
    """What would make a file when its pickle is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def broken_checkpoint(kind: str, good: Path, path: Path, marker: Path) -> None:
    """Write a file that is no checkpoint of a NeuMF."""
    content = load_checkpoint(good)
    state_dict = dict(content["state_dict"])
    changed = {
        "another model": lambda: {"weight": torch.zeros(3, 4)},
        "a layer missing": lambda: {k: v for k, v in state_dict.items() if k != "mlp.1.weight"},
        "a layer too many": lambda: state_dict | {"mlp.7.weight": torch.zeros(3, 4)},
        "a width that does not fit": lambda: state_dict | {"mlp.1.weight": torch.zeros(4, 5)},
        "a number for a matrix": lambda: state_dict | {"mlp.0.weight": torch.tensor(1.0)},
        "no weights": lambda: {},
        "items that differ": lambda: state_dict | {"mf_item_embed.weight": torch.zeros(79, 4)},
    }
    others = {
        "a command": lambda: content | {"extras": Command(marker)},
        "another class": lambda: content | {"optimizer_type": torch.optim.SGD},
        "a list": lambda: [1, 2, 3],
        "no state_dict": lambda: {"epoch": 1},
        "text for weights": lambda: {"state_dict": {"mlp.0.weight": "heavy"}},
    }
    texts = {
        "text": b"not a checkpoint\nat all\n",
        "empty": b"",
        "random": np.random.default_rng(0).bytes(2000),
    }
    if kind in changed:
        torch.save(content | {"state_dict": changed[kind]()}, path)
    elif kind in others:
        torch.save(others[kind](), path)
    elif kind in texts:
        path.write_bytes(texts[kind])
    elif kind == "a directory":
        path.mkdir()
    elif kind != "missing":
        whole = good.read_bytes()
        path.write_bytes(whole[: int(len(whole) * float(kind))])


BROKEN = [
    *("missing", "a directory", "text", "empty", "random", "a list", "no state_dict", "text for weights"),
    *("another model", "a layer missing", "a layer too many", "a width that does not fit"),
    *("a number for a matrix", "no weights", "items that differ", "a command", "another class"),
    *("0.001", "0.1", "0.5", "0.9", "0.999"),
]


@pytest.mark.parametrize("kind", BROKEN)
def test_checkpoint_that_is_none_is_named(refused, split_dir, checkpoint, tmp_path, kind):
    """Evaluating, calibrating and training alike; nothing in it runs."""
    path, marker = tmp_path / "best.pth.tar", tmp_path / "marker"
    broken_checkpoint(kind, checkpoint, path, marker)
    for flags in (["--evaluate"], ["--qe-calibration", "0.1"], [], ["--reset-optimizer"]):
        refused([split_dir, "--load", path, *flags, "-o", tmp_path / "out"], path)
    assert not marker.exists()


@pytest.mark.parametrize(("users", "items"), [(50, 80), (60, 70)])
@pytest.mark.parametrize("flags", [["--evaluate"], ["--qe-calibration", "1"], []])
def test_checkpoint_of_other_data_is_refused_with_both_sizes(
    refused, split_dir, checkpoint, tmp_path, users, items, flags
):
    """Users or items that do not fit."""
    path = tmp_path / "other.pth.tar"
    model = NeuMF(users, items, 4, [8, 6, 4])
    torch.save(load_checkpoint(checkpoint) | {"state_dict": model.state_dict()}, path)
    refused([split_dir, "--load", path, *flags, "-o", tmp_path / "out"], path, 60, 80, users, items)


def test_checkpoint_with_weights_that_are_no_numbers_is_refused(ncf, split_dir, checkpoint, tmp_path):
    """A score of nan has no rank."""
    content = load_checkpoint(checkpoint)
    state_dict = dict(content["state_dict"])
    state_dict["final.bias"] = state_dict["final.bias"] * float("nan")
    torch.save(content | {"state_dict": state_dict}, tmp_path / "nan.pth.tar")
    outcome = ncf(split_dir, "--load", tmp_path / "nan.pth.tar", "--evaluate", "-o", tmp_path / "out")
    assert outcome.code == 2
    assert re.fullmatch(r"ncf\.py: error: .*not finite.*", lines(outcome.err)[-1])


@pytest.mark.parametrize("layer", ["mf_user_embed", "mf_mult", "mlp.1", "final", "sigmoid"])
def test_stats_file_missing_a_layer_is_refused(refused, split_dir, checkpoint, stats_file, tmp_path, layer):
    """The flag and the layer are in the message."""
    statistics = yaml.safe_load(stats_file.read_text())
    del statistics[layer]
    path = tmp_path / "stats.yaml"
    path.write_text(yaml.safe_dump(statistics))
    flags = ["--load", checkpoint, "--quantize-eval", "--qe-stats-file", path, "-o", tmp_path / "out"]
    refused([split_dir, *flags], "--qe-stats-file", layer)


@pytest.mark.parametrize("key", ["avg_min", "mean", "b"])
def test_stats_file_missing_a_key_that_the_mode_needs_is_refused(
    refused, ncf, split_dir, checkpoint, stats_file, tmp_path, key
):
    """And loads in a mode that does not need it."""
    statistics = yaml.safe_load(stats_file.read_text())
    del statistics["mf_mult"]["output"][key]
    path = tmp_path / "stats.yaml"
    path.write_text(yaml.safe_dump(statistics))
    mode = {"avg_min": "avg", "mean": "gauss", "b": "laplace"}[key]
    flags = ["--load", checkpoint, "--quantize-eval", "--qe-stats-file", path, "-o", tmp_path / "out"]
    refused([split_dir, *flags, "--qeca", mode], "--qe-stats-file", "mf_mult", key)
    initial(ncf(split_dir, *flags))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "- a\n- list\n",
        "a: [1, 2\nb: {",
        "mlp.0: 3\n",
        "mlp.0: {output: {min: low}}\n",
        "mlp.0: !!python/object/apply:os.system ['touch marker']\n",
        "\x00\x01",
    ],
)
@pytest.mark.parametrize("flag", ["--qe-stats-file", "--qe-config-file"])
def test_yaml_file_of_another_form_is_refused(refused, split_dir, checkpoint, tmp_path, flag, text):
    """The flag and the file are in the message; nothing in it runs."""
    path = tmp_path / "file.yaml"
    path.write_text(text)
    refused([split_dir, "--load", checkpoint, "--quantize-eval", flag, path], flag, path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"class": "AnotherQuantizer"}, "PostTrainLinearQuantizer"),
        ({"bits_activation": 8}, "bits_activation"),
        ({"mode": "best"}, "mode"),
        ({"clip_acts": "much"}, "clip_acts"),
        ({"bits_activations": 17}, "bits_activations"),
        ({"overrides": {"mlp\\.9": {"bits_weights": 4}}}, "mlp\\.9"),
        ({"overrides": {"mlp": {"bits_weights": 4}}}, "mlp"),  # a full match, not a prefix
        ({"overrides": {"mlp\\..*": {"bits": 4}}}, "mlp\\..*"),
        ({"overrides": {"(": {"bits_weights": 4}}}, "("),
        ({"overrides": ["mlp"]}, "overrides"),
        ({"model_activation_stats": "missing.yaml"}, "missing.yaml"),
    ],
)
def test_config_file_with_a_wrong_argument_is_refused(refused, split_dir, checkpoint, tmp_path, entry, part):
    """What is wrong is named, an override that matches nothing included."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"quantizers": {"q": {"class": "PostTrainLinearQuantizer"} | entry}}))
    flags = ["--quantize-eval", "--qe-config-file", path, "-o", tmp_path / "out"]
    refused([split_dir, "--load", checkpoint, *flags], part)


@pytest.mark.parametrize("place", ["file", "file/below"])
@pytest.mark.parametrize("mode", ["train", "evaluate", "calibrate"])
def test_output_directory_that_cannot_be_written_is_named(
    refused, split_dir, checkpoint, tmp_path, place, mode
):
    """Where a file is in its way."""
    (tmp_path / "file").write_text("mine")
    flags = {"train": TRAIN, "evaluate": ["--evaluate"], "calibrate": ["--qe-calibration", "1"]}[mode]
    load = [] if mode == "train" else ["--load", checkpoint]
    refused([split_dir, *load, *flags, "-o", tmp_path / place], tmp_path / "file")


def test_place_for_statistics_that_cannot_be_written_is_named(refused, split_dir, checkpoint, tmp_path):
    """Before any are collected."""
    path = tmp_path / "missing" / "stats.yaml"
    flags = ["--load", checkpoint, "--qe-calibration", "1", "--qe-stats-out", path, "-o", tmp_path / "out"]
    refused([split_dir, *flags], path)


@pytest.fixture
def run_copy(run_dir, tmp_path) -> Path:
    """A finished run of two epochs that a test may go on with."""
    return shutil.copytree(run_dir, tmp_path / "run-copy")


def test_run_is_never_silently_overwritten(refused, split_dir, run_copy):
    """The error says what the ways out are."""
    refused([split_dir, *TRAIN, "-o", run_copy], run_copy, "--resume", "--overwrite")


@pytest.mark.parametrize("flags", [["-b", "0"], ["-k", "42"], ["--layers", "7", "3"], ["--gpus", "99"]])
def test_bad_flag_with_overwrite_leaves_the_run_as_it_was(refused, split_dir, run_copy, flags):
    """Nothing is removed before everything is checked."""
    refused([split_dir, *flags, "--overwrite", "-o", run_copy])


def test_resume_needs_a_run(refused, split_dir, run_copy, checkpoint, tmp_path):
    """A directory that holds one, a readable configuration, epochs left to train, and no flag against it."""
    (tmp_path / "bare").mkdir()
    refused([split_dir, "--resume", "-o", tmp_path / "bare"], "--resume", tmp_path / "bare")
    refused([split_dir, "--resume", "-o", tmp_path / "missing"], "--resume", tmp_path / "missing")
    refused([split_dir, "--resume", "--overwrite", "-o", run_copy], "--resume", "--overwrite")
    refused([split_dir, "--resume", "--load", checkpoint, "-o", run_copy], "--resume", "--load")
    refused([split_dir, "--resume", "-o", run_copy], "--epochs")
    refused([split_dir, "--resume", "-o", run_copy, "-e", "1"], "--epochs")
    refused([split_dir, "--resume", "-o", run_copy, "-e", "3", "--layers", "16", "8"], "--layers")
    (run_copy / "config.json").write_text('{"epochs": 2, ')
    refused([split_dir, "--resume", "-o", run_copy, "-e", "3"], run_copy / "config.json")


def test_resume_with_a_broken_checkpoint_is_refused(refused, split_dir, run_copy):
    """It names the file, and the best checkpoint stays."""
    path = run_copy / "checkpoint.pth.tar"
    path.write_bytes(path.read_bytes()[:-1000])
    refused([split_dir, "--resume", "-e", "3", "-o", run_copy], path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["config", "cutoffs"], 5),
        (["config", "cutoffs"], None),
        (["config", "cutoffs"], [torch.ones(3)]),
        (["config", "validate"], torch.ones(3)),
        (["config", "seed"], torch.ones(3)),
        (["config", "batch_size"], torch.ones(3)),
        (["config", "learning_rate"], None),
        (["schedule_state_dict"], [1]),
        (["optimizer_state_dict", "state", 0, "step"], torch.tensor(2.0**70)),
        (["optimizer_state_dict", "state", 0, "step"], torch.tensor(-1.0)),
    ],
)
def test_resume_with_one_wrong_value_is_refused(refused, split_dir, run_copy, path, value):
    """It names the file."""
    content = load_checkpoint(run_copy / "checkpoint.pth.tar")
    *outer, last = path
    place = content
    for key in outer:
        place = place[key]
    place[last] = value
    torch.save(content, run_copy / "checkpoint.pth.tar")
    refused([split_dir, "--resume", "-e", "3", "-o", run_copy], run_copy)


@pytest.mark.parametrize("flags", [["-b", "1024"], ["-n", "1"], ["-b", "128"]])
@pytest.mark.parametrize("way", ["--resume", "--load"])
def test_going_on_within_an_epoch_with_other_batches_is_refused_or_done(ncf, split_dir, tmp_path, way, flags):
    """Where the steps done are not the same part of the new epoch, never a traceback."""
    first = ncf(split_dir, *TRAIN, "-e", 2, "--max-steps", 30, "-o", tmp_path / "first")
    assert first.code == 0
    if way == "--resume":
        outcome = ncf(split_dir, "--resume", *flags, "-o", tmp_path / "first")
    else:
        load = ["--load", tmp_path / "first" / "checkpoint.pth.tar"]
        outcome = ncf(split_dir, *load, *TRAIN, "-e", 2, *flags, "-o", tmp_path / "second")
    if outcome.code:
        assert outcome.code == 2
        assert lines(outcome.err)[-1].startswith("ncf.py: error: ")
        assert any(
            flag in outcome.err for flag in ("--batch-size", "--negative-samples", "--reset-optimizer")
        )
    else:
        assert epochs(outcome.out)[-1][0] == 1


def test_bad_input_as_a_user_meets_it(tmp_path):
    """The script itself: one line on stderr, nothing on stdout, exit code 2, nothing left."""
    done = subprocess.run(
        [sys.executable, script.__file__, "ml-20m", "-o", "out"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"ncf\.py: error: .*ml-20m.*\n", done.stderr)
    assert not os.listdir(tmp_path)


def test_missing_argument_is_one_line_too(refused):
    """Without the usage text."""
    refused([], "SPLIT")


# --- the command lines of the README, smaller ---

COMMON = "ml-20m -b 2048 --layers 8 8 4 -f 4 --seed 1"
LOAD = "--load run/neumf/base_fp32/best.pth.tar"
QUANTIZE = "--evaluate --quantize-eval --qeba 8 --qebw 8 --qem asym_u --qepc"
FIVE = {
    "train": "ml-20m -l 0.0005 -b 2048 --layers 8 8 4 -f 4 --seed 1 --processes 10 -o run/neumf/base_fp32 -e 2",
    "calibrate": f"{COMMON} {LOAD} --qe-calibration 0.1",
    "calibrate split": f"{COMMON} {LOAD} --qe-calibration 0.1 --split-final",
    "int8": f"{COMMON} {LOAD} {QUANTIZE} --qe-stats-file quantization_stats_no_split.yaml",
    "int8 split": f"{COMMON} {LOAD} {QUANTIZE} --split-final --qe-stats-file quantization_stats_split.yaml",
}


@pytest.fixture(scope="module")
def five(split_dir, tmp_path_factory) -> dict:
    """The five command lines run one after the other: of each, its process and its directory."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(split_dir, home / "ml-20m")
    results = {}
    for name, line in FIVE.items():
        before = set((home / "run/neumf").glob("*"))
        command = [sys.executable, script.__file__, *line.split()]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (directory,) = set((home / "run/neumf").glob("*")) - before
        results[name] = done, directory
        if name.startswith("calibrate"):
            which = "split" if name.endswith("split") else "no_split"
            (path,) = directory.glob("*.yaml")
            shutil.copy(path, home / f"quantization_stats_{which}.yaml")
    return results


def test_training_line_prints_epochs_and_leaves_a_run(five):
    """Its lines, and every file of a run directly in ``-o``."""
    done, directory = five["train"]
    assert directory.name == "base_fp32"
    assert [number for number, *_ in epochs(done.stdout)] == [0, 1]
    names = {path.name for path in directory.iterdir()}
    assert names >= {
        "best.pth.tar",
        "checkpoint.pth.tar",
        "config.json",
        "valid_results.csv",
        "ncf.log",
    }
    assert [name for name in names if name.startswith("events.out.tfevents")]
    assert not [name for name in names if name.startswith(".")]


def test_bars_move_on_a_terminal(split_dir, tmp_path):
    """With the loss, the metrics so far and the time that the whole run still takes."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))
    command = [sys.executable, script.__file__, split_dir, *TRAIN, "-e", "2", "-o", tmp_path / "out"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=end)
    os.close(end)
    shown = b""
    with suppress(OSError):  # the end of a terminal that nobody writes to any more
        while part := os.read(terminal, 1024):
            shown += part
    os.close(terminal)
    assert process.wait() == 0
    text = shown.decode()
    loss = rf"Epoch 0 Loss {NUMBER} \({NUMBER}\): 100%\|.*\| (\d+)/\1 \[.*it/s, run [\d:]+ left\]"
    assert re.search(loss, text)
    assert re.search(rf"Evaluate: 100%.*HR@10 = {NUMBER}, NDCG@10 = {NUMBER}\]", text)
    assert "\r" in text


@pytest.mark.parametrize("split_final", [False, True])
def test_calibration_line_leaves_statistics_of_every_layer(five, split_final):
    """In the order of the model's modules, under a comment that says where they come from."""
    _, directory = five["calibrate split" if split_final else "calibrate"]
    home = directory.parents[2]
    (path,) = directory.glob("*.yaml")
    text = path.read_text()
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("#")
    assert FIVE["calibrate split" if split_final else "calibrate"] in "\n".join(comment)
    assert load_split(home / "ml-20m").digest in "\n".join(comment)
    assert sha256(home / "run/neumf/base_fp32/best.pth.tar") in "\n".join(comment)
    statistics = yaml.safe_load(text)
    assert list(statistics) == LAYERS + ENDS[split_final]
    for entry in statistics.values():
        for tensor in [entry["output"], *entry["inputs"].values()]:
            index = tensor["shape"] == "(41)"
            assert set(tensor) - {"min", "max", "avg_min", "avg_max", "mean", "std", "b", "shape"} == (
                set() if index else {"histogram", "column_max"}
            )
    assert statistics["mlp.0"]["inputs"][0]["shape"] == "(41, 8)"
    assert statistics["mf_user_embed"]["inputs"][0]["shape"] == "(41)"
    assert statistics["mf_user_embed"]["inputs"][0]["max"] == 5  # a tenth of 60 users, the first
    assert (directory / "ncf.log").exists()


@pytest.mark.parametrize("split_final", [False, True])
def test_int8_line_prints_metrics_and_leaves_parameters(five, split_final):
    """The statistics after fusing and the parameters of each layer; no warning."""
    done, directory = five["int8 split" if split_final else "int8"]
    (line,) = lines(done.stdout)
    assert INITIAL_LINE.fullmatch(line)
    assert "warning" not in done.stderr
    assert done.stderr == ""  # a bar is for a terminal
    parameters = yaml.safe_load((directory / "layer_quant_params.yaml").read_text())
    relus = {"mlp_relu.0", "mlp_relu.1"}
    assert set(parameters) == set(LAYERS + ENDS[split_final]) - relus
    statistics = yaml.safe_load((directory / "quant_stats_after_prepare_model.yaml").read_text())
    assert statistics["mlp.0"]["output"]["min"] >= 0  # clipped, as a rectifier follows
    assert statistics["mlp_relu.0"]["inputs"][0] == statistics["mlp.0"]["output"]
    last = "final_add" if split_final else "final"
    assert -6 <= statistics[last]["output"]["min"] <= statistics[last]["output"]["max"] <= 6
    assert (directory / "ncf.log").exists()


def test_fresh_directories_are_named_by_date_and_time(five):
    """Each of its own, below run/neumf."""
    names = [directory.name for name, (_, directory) in five.items() if name != "train"]
    assert len(set(names)) == 4
    assert all(re.match(r"\d{4}.?\d\d.?\d\d", name) for name in names)


# --- what a run leaves ---


def test_results_file_agrees_with_the_lines_printed(ncf, split_dir, tmp_path):
    """A row per epoch; HR and NDCG under their k."""
    outcome = ncf(split_dir, *TRAIN, "-e", 2, "-o", tmp_path / "out")
    with open(tmp_path / "out" / "valid_results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    printed = epochs(outcome.out)
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    for row, (_, hr, ndcg) in zip(rows, printed, strict=True):
        assert f"{float(row['hr@10']):.4f}" == f"{hr:.4f}"
        assert f"{float(row['ndcg@10']):.4f}" == f"{ndcg:.4f}"


def test_configuration_holds_the_originals_defaults(ncf, split_dir, tmp_path):
    """As resolved for a run without flags."""
    assert ncf(split_dir, "--max-steps", 1, "-o", tmp_path / "out").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "epochs": 20,
        "batch_size": 256,
        "factors": 8,
        "layers": [64, 32, 16, 8],
        "negative_samples": 4,
        "learning_rate": 0.001,
        "topk": 10,
        "log_freq": 100,
        "threshold": None,
        "split_final": False,
        "calibrate_on": "test",
        "qe_mode": "sym",
        "qe_bits_acts": 8,
        "qe_bits_wts": 8,
        "qe_bits_accum": 32,
        "qe_clip_acts": "none",
        "nb_users": 60,
        "nb_items": 80,
    }
    assert {key: config.get(key) for key in expected} == expected
    assert type(config["seed"]) is int  # drawn, and recorded
    assert config["data_digest"] == load_split(split_dir).digest


def test_log_has_versions_device_command_line_and_results(ncf, split_dir, tmp_path):
    """So that a run can be told from its log alone."""
    outcome = ncf(split_dir, *TRAIN, "-e", 1, "-o", tmp_path / "out")
    text = (tmp_path / "out" / "ncf.log").read_text()
    assert torch.__version__ in text
    assert np.__version__ in text
    assert sys.version.split()[0] in text
    assert f"ncf.py {split_dir} {' '.join(TRAIN)} -e 1 -o {tmp_path / 'out'}" in text
    assert lines(outcome.out)[0] in text
    assert re.search(r"device\W+cpu", text)


def test_tensorboard_has_loss_speed_and_metrics(run_dir):
    """As scalars."""
    tags = events(run_dir, "scalars")
    assert {"hr@10", "ndcg@10", "loss"} <= {tag.lower() for tag in tags}
    assert [tag for tag in tags if "samples" in tag.lower()]


def test_other_k_is_in_lines_and_columns(ncf, split_dir, tmp_path):
    """Never HR@10 where k is another."""
    outcome = ncf(split_dir, *TRAIN, "-e", 1, "-k", 5, "-o", tmp_path / "out")
    assert re.match(rf"Epoch 0: HR@5 = {NUMBER}, NDCG@5 = {NUMBER}, ", lines(outcome.out)[1])
    header = (tmp_path / "out" / "valid_results.csv").read_text().splitlines()[0].split(",")
    assert {"hr@5", "ndcg@5"} <= set(header)
    outcome = ncf(split_dir, *TRAIN, "-e", 1, "-k", 41, "-o", tmp_path / "all")
    assert lines(outcome.out)[1].startswith("Epoch 0: HR@41 = 1.0000")


def test_param_hist_leaves_pictures_and_histograms(ncf, split_dir, tmp_path):
    """Of every layer with weights."""
    assert ncf(split_dir, *TRAIN, "-e", 1, "--param-hist", "-o", tmp_path / "out").code == 0
    layers = [*LAYERS[:4], "mlp.0", "mlp.1", "final"]
    pictures = [path.name for path in (tmp_path / "out").rglob("*.png")]
    tags = events(tmp_path / "out", "histograms")
    for layer in layers:
        assert any(layer in name for name in pictures)
        assert any(layer in tag for tag in tags)
    for path in (tmp_path / "out").rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("split_final", [False, True])
def test_act_hist_leaves_pictures_and_histograms(ncf, split_dir, checkpoint, tmp_path, split_final):
    """Of every layer's output."""
    flags = ["--split-final"] if split_final else []
    command = ["--load", checkpoint, "--act-hist", 0.5, *flags, "-o", tmp_path / "out"]
    assert ncf(split_dir, *command).code == 0
    pictures = {path.name for path in (tmp_path / "out").rglob("*.png")}
    tags = events(tmp_path / "out", "histograms")
    for layer in LAYERS + ENDS[split_final]:
        assert any(layer in name for name in pictures)
        assert any(tag.endswith(layer) for tag in tags)


def test_name_stands_in_a_fresh_directory(ncf, split_dir, checkpoint):
    """Below run/neumf."""
    initial(ncf(split_dir, "--load", checkpoint, "--evaluate", "--name", "mine"))
    (directory,) = Path("run/neumf").iterdir()
    assert "mine" in directory.name


def test_workers_and_processes_are_accepted(ncf, split_dir, checkpoint):
    """With any number, and without effect on the figures."""
    plain = initial(ncf(split_dir, "--load", checkpoint, "--evaluate", "-o", "a"))
    flags = ["-w", 3, "-p", 2]
    assert initial(ncf(split_dir, "--load", checkpoint, "--evaluate", *flags, "-o", "b")) == plain


# --- flags ---

GROUP = ["--quantize-eval", "--qe-dynamic", "--load", "x"]
ALIASES = [
    ("-e 3", "--epochs 3"),
    ("-b 3", "--batch-size 3"),
    ("-f 3", "--factors 3"),
    ("-n 3", "--negative-samples 3"),
    ("-l 3", "--learning-rate 3"),
    ("-k 3", "--topk 3"),
    ("-s 3", "--seed 3"),
    ("-t 0.3", "--threshold 0.3"),
    ("-p 3", "--processes 3"),
    ("-w 3", "--workers 3"),
    ("-o x", "--out-dir x"),
    ("--eval", "--evaluate"),
    ("--lf 3", "--log-freq 3"),
    ("--sf", "--split-final"),
    ("--act-hist 0.3", "--activation-histograms 0.3"),
    ("--qe", "--quantize-eval"),
    ("--qem asym_s", "--qe-mode asym_s"),
    ("--qema asym_s", "--qe-mode-acts asym_s"),
    ("--qemw asym_s", "--qe-mode-wts asym_s"),
    ("--qeba 3", "--qe-bits-acts 3"),
    ("--qebw 3", "--qe-bits-wts 3"),
    ("--qeca avg", "--qe-clip-acts avg"),
    ("--qencl mlp.0 final", "--qe-no-clip-layers mlp.0 final"),
    ("--qenql mlp.0 final", "--qe-no-quant-layers mlp.0 final"),
    ("--qepc", "--qe-per-channel"),
    ("--qesab 3", "--qe-scale-approx-bits 3"),
    ("--qept", "--qe-convert-pytorch"),
]
OTHERS = [
    *(
        "--layers",
        "--no-cuda",
        "--load",
        "--reset-optimizer",
        "--compress",
        "--gpus",
        "--name",
        "--param-hist",
    ),
    *("--eval-fp16", "--resume", "--overwrite", "--max-steps", "--qe-stats-out", "--calibrate-on"),
    *("--qe-bits-accum", "--qe-clip-n-stds", "--qe-save-fp-weights", "--qe-stats-file", "--qe-dynamic"),
    *("--qe-calibration", "--qe-config-file", "--qe-engine", "--qe-scaled-concat", "--qe-embedding-bits"),
    *("--qe-report", "--qe-per-channel-acts", "--pretrain", "--pretrain-rate", "--l2"),
]


@pytest.mark.parametrize(("short", "long"), ALIASES)
def test_short_and_long_names_are_the_same_flag(short, long):
    """And it changes something."""
    parse = build_parser().parse_args
    assert parse(["data", *short.split()]) == parse(["data", *long.split()])
    assert parse(["data", *short.split()]) != parse(["data"])


def test_help_lists_every_flag_and_default(ncf):
    """Both names of each, in the groups they belong to."""
    outcome = ncf("--help")
    assert outcome.code == 0
    words = re.findall(r"(?<![\w-])--?[a-z][\w-]*", outcome.out)
    flags = [flag.split()[0] for pair in ALIASES for flag in pair] + OTHERS
    assert not set(flags) - set(words) - {"--compress"}
    assert "Post-Training Quantization Arguments" in outcome.out
    text = " ".join(outcome.out.split())
    for flag, default in (
        ("--epochs", "20"),
        ("--batch-size", "256"),
        ("--factors", "8"),
        ("--layers", "64 32 16 8"),
        ("--negative-samples", "4"),
        ("--learning-rate", "0.001"),
        ("--topk", "10"),
        ("--log-freq", "100"),
        ("--calibrate-on", "test"),
        ("--qe-mode", "sym"),
        ("--qe-bits-acts", "8"),
        ("--qe-bits-wts", "8"),
        ("--qe-bits-accum", "32"),
        ("--qe-clip-acts", "none"),
    ):
        described = text.split("options:", 1)[1]
        start = re.search(rf"{flag}[ ,]", described).end()
        assert re.search(r"\(default: ([^)]*)\)", described[start:])[1].endswith(default), flag


# --- evaluating ---


def test_evaluation_repeats_the_checkpoints_metrics(ncf, split_dir, checkpoint):
    """Those that training had; sizes come from the checkpoint."""
    content = load_checkpoint(checkpoint)
    line = initial(ncf(split_dir, "--load", checkpoint, "--evaluate"))
    assert line == f"HR@10 = {content['hr']:.4f}, NDCG@10 = {content['ndcg']:.4f}"
    assert initial(ncf(split_dir, "--load", checkpoint, "--evaluate", "--split-final")) == line


def test_half_precision_evaluation_scores_in_half_precision(ncf, split_dir, checkpoint):
    """Its metrics are those of the model in float16."""
    state_dict = load_checkpoint(checkpoint)["state_dict"]
    model = NeuMF(**sizes_from_state_dict(state_dict))
    model.load_state_dict(state_dict)
    expected = places.evaluate(float_scorer(model.half()), load_split(split_dir))
    assert initial(ncf(split_dir, "--load", checkpoint, "--evaluate", "--eval-fp16", "-o", "a")) == str(
        expected
    )
    assert initial(ncf(split_dir, "--load", checkpoint, "--eval-fp16", "-o", "b")) == str(expected)


# --- integers ---

INTEGERS = [
    ["--qem", "asym_u", "--qepc"],
    ["--qem", "sym"],
    ["--qem", "asym_s", "--qeca", "avg"],
    ["--qema", "asym_u", "--qemw", "sym_restr", "--qeba", "5", "--qebw", "4"],
    ["--qem", "asym_u", "--qesab", "8", "--qe-save-fp-weights"],
    ["--qem", "asym_u", "--split-final", "--qencl", "final_mf"],
    ["--qem", "asym_u", "--qenql", "final", "sigmoid"],
    ["--qem", "asym_u", "--split-final", "--qenql", "final_add", "sigmoid"],
    ["--qem", "asym_u", "--qe-scaled-concat", "--qeca", "percentile"],
    ["--qem", "asym_u", "--qe-embedding-bits", "4", "--qeca", "mse"],
    [
        "--qem",
        "sym",
        "--qe-embedding-bits",
        "8",
        "--qe-scaled-concat",
        "--qenql",
        "final",
        "sigmoid",
        "--qeca",
        "kl",
    ],
    ["--qem", "sym", "--qe-embedding-bits", "4", "--split-final"],
    ["--qem", "asym_u", "--qe-per-channel-acts", "--qepc", "--qe-scaled-concat"],
    ["--qem", "asym_s", "--qe-per-channel-acts", "--qeba", "12", "--qenql", "final", "sigmoid"],
]
NOT_INTEGERS = [
    (["--qem", "asym_u", "--qenql", "mlp.1"], "layer mlp.1"),
    (["--qebw", "16"], "8 bits"),
    (["--qeba", "0"], "layer mf_mult"),
    (["--qe-dynamic"], "every batch"),
]


@pytest.mark.parametrize("flags", INTEGERS)
def test_integers_give_the_simulations_metrics(quantize_eval, flags):
    """To the last digit printed, by default and asked for in either way."""
    line = initial(quantize_eval(flags, "a", "--qe-engine", "simulate"))
    for out, more in (("b", []), ("c", ["--qe-engine", "integer"]), ("d", ["--qe-convert-pytorch"])):
        outcome = quantize_eval(flags, out, *more)
        assert initial(outcome) == line
        assert "simulated" not in outcome.err


@pytest.mark.parametrize(("flags", "reason"), NOT_INTEGERS)
def test_what_integers_cannot_is_simulated_with_a_note(quantize_eval, flags, reason):
    """One line that says why; asked for integers, an error."""
    line = initial(quantize_eval(flags, "a", "--qe-engine", "simulate"))
    outcome = quantize_eval(flags, "b")
    assert initial(outcome) == line
    (note,) = [text for text in outcome.err.splitlines() if "simulated" in text]
    assert reason in note
    for more, flag in (("--qe-engine integer", "--qe-engine integer"), ("--qept", "--qe-convert-pytorch")):
        outcome = quantize_eval(flags, "c", *more.split())
        assert outcome.code == 2
        *_, error = outcome.err.splitlines()  # dynamic quantization warns of layers before it
        assert error.startswith(f"ncf.py: error: {flag}: ")
        assert reason in error
        assert not Path("c").exists()


@pytest.mark.parametrize("flags", [*INTEGERS, *(flags for flags, _ in NOT_INTEGERS)])
def test_quantized_model_evaluates_without_float_model_or_statistics(ncf, split_dir, quantize_eval, flags):
    """The file that a quantized evaluation leaves: the same metrics, in integers and simulated."""
    line = initial(quantize_eval(flags, "a"))
    load = [split_dir, "--load", "a/quantized.pth.tar", "--evaluate"]
    assert initial(ncf(*load, "-o", "b")) == line
    assert initial(ncf(*load, "--qe-engine", "simulate", "-o", "c")) == line
    assert not Path("b/quantized.pth.tar").exists()
    names = ["layer_quant_params.yaml"]
    assert [Path("b", name).read_bytes() for name in names] == [
        Path("a", name).read_bytes() for name in names
    ]


def test_4_bit_tables_are_two_to_a_byte_in_the_file(quantize_eval, checkpoint):
    """And ranges' histograms are not in it."""
    assert quantize_eval(["--qem", "asym_u", "--qe-embedding-bits", "4", "--qeca", "mse"], "a").code == 0
    content, table = load_checkpoint("a/quantized.pth.tar"), "mf_user_embed.weight"
    rows, columns = load_checkpoint(checkpoint)["state_dict"][table].shape
    assert content["state_dict"][table].shape == (rows, columns // 2)
    assert content["state_dict"][table].dtype == torch.uint8
    assert Path("a/quantized.pth.tar").stat().st_size < 100_000


def test_columns_of_statistics_are_not_in_the_file(quantize_eval):
    """Their scales are."""
    assert quantize_eval(["--qem", "asym_u", "--qe-per-channel-acts"], "a").code == 0
    content = load_checkpoint("a/quantized.pth.tar")
    assert set(content["statistics"]["mlp.0"]["output"]["column_max"].split()) == {"0"}
    assert len(content["state_dict"]["mlp.0.output_scale"].unique()) > 1


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--qe-dynamic", "--qe-scaled-concat"], "--qe-scaled-concat"),
        (["--qeba", "0", "--qe-scaled-concat"], "--qe-scaled-concat"),
        (["--split-final", "--qe-embedding-bits", "4", "--qe-scaled-concat"], "--qe-scaled-concat"),
        (["--qebw", "0", "--qe-embedding-bits", "4"], "--qe-embedding-bits"),
        (["--qe-dynamic", "--qe-per-channel-acts"], "--qe-per-channel-acts"),
        (["--qeba", "0", "--qe-per-channel-acts"], "--qe-per-channel-acts"),
    ],
)
def test_flags_of_quantization_without_effect(quantize_eval, flags, name):
    outcome = quantize_eval(flags, "a")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(f"ncf.py: error: {name} has no effect")
    assert not Path("a").exists()


def test_dynamic_ranges_have_no_histograms(quantize_eval):
    """Nor does a file of statistics from before there were any."""
    outcome = quantize_eval(["--qe-dynamic", "--qeca", "kl"], "a")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("ncf.py: error: --qe-clip-acts kl ")


@pytest.mark.parametrize("flags", [["--evaluate"], ["--quantize-eval", "--qe-dynamic"]])
def test_an_evaluation_leaves_the_users_ranks(ncf, split_dir, checkpoint, flags):
    """From which its metrics follow."""
    found = initial(ncf(split_dir, "--load", checkpoint, *flags, "-o", "a"))
    ranks = np.load("a/ranks.npy", allow_pickle=False)
    assert ranks.shape == (load_split(split_dir).nb_users,)
    assert ranks.min() >= 0
    hits = ranks < 10
    ndcg = np.where(hits, np.log(2) / np.log(ranks + 2), 0).mean()
    assert f"HR@10 = {hits.mean():.4f}, NDCG@10 = {ndcg:.4f}" in found


@pytest.fixture
def aware(ncf, split_dir, checkpoint):
    """The checkpoint of an epoch by the repository's schedule of quantization-aware training."""
    flags = [
        "--reset-optimizer",
        "-e",
        1,
        "--compress",
        SCHEDULE,
        "-o",
        "aware",
    ]
    assert ncf(split_dir, *TRAIN, "--load", checkpoint, *flags).code == 0
    return Path("aware/best.pth.tar")


def test_quantization_aware_checkpoint_is_quantized_as_it_was_trained(ncf, split_dir, aware):
    """In integers and simulated alike, without statistics; and the file it leaves, too."""
    load = [split_dir, "--load", aware, "--quantize-eval"]
    line = initial(ncf(*load, "--qe-engine", "integer", "-o", "a"))
    assert initial(ncf(*load, "--qe-engine", "simulate", "-o", "b")) == line
    assert initial(ncf(split_dir, "--load", "a/quantized.pth.tar", "--evaluate", "-o", "c")) == line
    assert ncf(split_dir, "--load", aware, "--evaluate", "-o", "d").code == 0
    moved = np.abs(np.load("a/ranks.npy") - np.load("d/ranks.npy"))
    assert np.mean(moved <= 2) > 0.8  # a score between two levels may go to the other one


@pytest.mark.parametrize("flags", [["--qem", "asym_u"], ["--qe-scaled-concat"], ["--qebw", "4"]])
def test_quantization_aware_checkpoint_has_its_own_settings(refused, split_dir, aware, flags):
    refused([split_dir, "--load", aware, "--quantize-eval", *flags], "--qe-")


def test_quantizing_needs_ranges(refused, split_dir, checkpoint):
    """Or a checkpoint that has them."""
    refused([split_dir, "--load", checkpoint, "--quantize-eval"], "--qe-stats-file")


def test_overwriting_a_run_removes_its_quantized_model(ncf, split_dir, quantize_eval):
    """It is not the new run's."""
    assert quantize_eval(["--qem", "asym_u"], "a").code == 0
    assert ncf(split_dir, *TRAIN, "-e", 1, "-o", "a", "--overwrite").code == 0
    assert not {"quantized.pth.tar", "layer_quant_params.yaml"} & set(os.listdir("a"))


@pytest.mark.parametrize("flags", [["--evaluate"], ["--quantize-eval", "--qe-dynamic"], ["--eval-fp16"]])
def test_nothing_is_compiled_in_vain(ncf, split_dir, checkpoint, monkeypatch, flags):
    """What is not compiled does not ask for a compiler."""
    monkeypatch.setattr("neural_cf.commands.evaluate.PAIRS_WORTH_COMPILING", 1)
    monkeypatch.setattr("neural_cf.runs.hardware.why_not_compiled", lambda device: "no compiler")
    outcome = ncf(split_dir, "--load", checkpoint, *flags, "-o", "a")
    assert outcome.code == 0
    assert ("no compiler" in outcome.out) == ("--qe-dynamic" in flags)


def test_quantized_model_says_where_it_is_from(quantize_eval, checkpoint, split_dir):
    """Digests of the float checkpoint and of the data; its tables are integers."""
    assert quantize_eval(["--qem", "asym_u"], "a").code == 0
    content = load_checkpoint("a/quantized.pth.tar")
    assert content["float_digest"] == file_digest(checkpoint)
    assert content["data_digest"] == load_split(split_dir).digest
    assert content["state_dict"]["mf_user_embed.weight"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--quantize-eval", "--qe-dynamic"], "--quantize-eval"),
        (["--eval-fp16"], "--eval-fp16"),
        (["--evaluate", "--precision", "bf16"], "--precision"),
        (["--evaluate", "--split-final"], "--split-final"),
        (["--evaluate", "-f", "5"], "--factors"),
        (["--evaluate", "--qem", "sym"], "--qe-mode"),
        (["--qe-calibration", "0.5"], "--load"),
        (["--act-hist", "0.5"], "--"),
        (["--quantize-eval", "--qe-dynamic", "--qe-report"], "--quantize-eval"),
        ([], "--load"),
    ],
)
def test_quantized_model_is_only_evaluated(ncf, split_dir, quantize_eval, flags, name):
    """As it is; anything else is one line that names the flag."""
    assert quantize_eval(["--qem", "asym_u"], "a").code == 0
    outcome = ncf(split_dir, "--load", "a/quantized.pth.tar", *flags, "-o", "b")
    assert outcome.code == 2
    (error,) = outcome.err.splitlines()
    assert error.startswith("ncf.py: error: ")
    assert name in error
    assert not Path("b").exists()


@pytest.mark.parametrize("part", ["statistics", "state_dict"])
def test_quantized_model_that_is_not_whole_is_named(ncf, split_dir, quantize_eval, part):
    """Whichever part of it is another model's."""
    assert quantize_eval(["--qem", "asym_u"], "a").code == 0
    path = Path("a/quantized.pth.tar")
    content = load_checkpoint(path)
    if part == "statistics":
        del content["statistics"]["mlp.0"]
    else:
        content["state_dict"]["mlp.0.w_scale"] = torch.ones(7)
    torch.save(content, path)
    outcome = ncf(split_dir, "--load", path, "--evaluate", "-o", "b")
    assert outcome.code == 2
    assert outcome.err.startswith(f"ncf.py: error: --load: {path}: ")
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--evaluate", "--qe-engine", "integer"], ["--qe-engine"]),
        (["--evaluate", "--qept"], ["--qe-engine"]),
        (["--qe-engine", "integer"], ["--qe-engine", "--quantize-eval"]),
        (
            ["--quantize-eval", "--qe-dynamic", "--qept", "--qe-engine", "simulate"],
            ["--qe-convert-pytorch", "--qe-engine"],
        ),
        (["--quantize-eval", "--qe-dynamic", "--precision", "bf16"], ["--precision", "--quantize-eval"]),
        (["--eval-fp16", "--precision", "bf16"], ["--precision", "--eval-fp16"]),
        (["--qe-calibration", "1", "--precision", "bf16"], ["--precision", "--qe-calibration"]),
    ],
)
def test_engine_and_precision_without_effect_are_refused(
    refused, split_dir, checkpoint, tmp_path, flags, names
):
    """They name what they clash with."""
    refused([split_dir, "--load", checkpoint, *flags, "-o", tmp_path / "out"], *names)


def test_evaluation_in_bf16_is_near_fp32(ncf, split_dir, checkpoint):
    """Asked for: the default is fp32."""
    load = [split_dir, "--load", checkpoint, "--evaluate"]
    line = initial(ncf(*load, "-o", "a"))
    assert initial(ncf(*load, "--precision", "fp32", "-o", "b")) == line
    hr = [
        float(text.split()[2].rstrip(","))
        for text in (line, initial(ncf(*load, "--precision", "bf16", "-o", "c")))
    ]
    assert hr[1] == pytest.approx(hr[0], abs=0.05)


def test_dynamic_quantization_needs_no_statistics(ncf, split_dir, checkpoint):
    """Its metrics do not depend on how users are put in blocks."""
    flags = ["--load", checkpoint, "--quantize-eval", "--qe-dynamic", "--qem", "asym_u"]
    line = initial(ncf(split_dir, *flags, "-o", "a"))
    assert line.startswith("HR@10 = ")
    assert "layer_quant_params.yaml" in os.listdir("a")


def test_dynamic_quantization_does_not_depend_on_blocks(ncf, split_dir, checkpoint, monkeypatch):
    """A batch is one user's candidates, at any limit on pairs."""
    flags = ["--load", checkpoint, "--quantize-eval", "--qe-dynamic", "--qeba", "4"]
    line = initial(ncf(split_dir, *flags, "-o", "a"))
    monkeypatch.setitem(candidates.SAMPLED_PAIRS_PER_BLOCK, "cpu", 200)
    monkeypatch.setitem(blocks.PAIRS_AT_ONCE, "cpu", 100)
    assert initial(ncf(split_dir, *flags, "-o", "b")) == line


def test_config_file_gives_what_the_same_flags_give(ncf, split_dir, checkpoint, stats_file):
    """Bits, modes, clipping, and a layer's override as the flag that leaves it alone."""
    entry = {
        "class": "PostTrainLinearQuantizer",
        "bits_activations": 6,
        "bits_parameters": 5,
        "mode": {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"},
        "clip_acts": "avg",
        "per_channel_wts": True,
        "model_activation_stats": str(stats_file),
        "overrides": {"mlp\\.0": {"bits_activations": None, "bits_weights": None}},
    }
    Path("config.yaml").write_text(yaml.safe_dump({"quantizers": {"post": entry}}))
    load = [split_dir, "--load", checkpoint, "--quantize-eval"]
    flags = ["--qeba", 6, "--qebw", 5, "--qema", "asym_u", "--qemw", "sym", "--qeca", "avg", "--qepc"]
    line = initial(ncf(*load, *flags, "--qenql", "mlp.0", "--qe-stats-file", stats_file, "-o", "a"))
    assert initial(ncf(*load, "--qe-config-file", "config.yaml", "-o", "b")) == line
    parameters = [Path(name, "layer_quant_params.yaml").read_text() for name in "ab"]
    assert parameters[0] == parameters[1]


def original_checkpoint(path: Path, good: Path, **changes) -> None:
    """Write a checkpoint as the original does: a class and NumPy scalars in it, and no more than that."""
    content = load_checkpoint(good)
    torch.save(
        {
            "epoch": 1,
            "arch": "NeuMF",
            "state_dict": content["state_dict"],
            "optimizer_state_dict": content["optimizer_state_dict"],
            "optimizer_type": torch.optim.Adam,
            "extras": {"current_hr": np.float64(0.5), "best": np.float32(0.25), "best_epoch": np.int64(1)},
        }
        | changes,
        path,
    )


def test_checkpoint_of_the_original_evaluates_and_trains_on(ncf, split_dir, run_dir, tmp_path):
    """The same metrics, and epochs go on from its own."""
    path, good = tmp_path / "original.pth.tar", run_dir / "checkpoint.pth.tar"
    original_checkpoint(path, good)
    expected = initial(ncf(split_dir, "--load", good, "--evaluate", "-o", "a"))
    assert initial(ncf(split_dir, "--load", path, "--evaluate", "-o", "b")) == expected
    outcome = ncf(split_dir, "--load", path, *TRAIN, "-e", 3, "-o", "c")
    assert [number for number, *_ in epochs(outcome.out)] == [2]


def test_only_the_originals_types_are_allowed_in_a_checkpoint(refused, split_dir, checkpoint, tmp_path):
    """Another class of optimizer or an array of objects is refused, and named."""
    path = tmp_path / "original.pth.tar"
    original_checkpoint(path, checkpoint, optimizer_type=torch.optim.SGD)
    refused([split_dir, "--load", path, "--evaluate"], path, "SGD")
    original_checkpoint(path, checkpoint, extras={"path": Path("x")})
    refused([split_dir, "--load", path, "--evaluate"], path, "Path")


def test_stats_of_another_model_get_one_line_of_warning(ncf, split_dir, checkpoint, stats_file, tmp_path):
    """Where tables exceed theirs by far; with the model's own there is none."""
    flags = [split_dir, "--load", checkpoint, "--quantize-eval", "--qe-stats-file"]
    own = ncf(*flags, stats_file, "-o", "a")
    assert "warning" not in own.err
    statistics = yaml.safe_load(stats_file.read_text())
    for key in ("min", "max", "avg_min", "avg_max"):
        statistics["mf_user_embed"]["output"][key] /= 100
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(statistics))
    outcome = ncf(*flags, tmp_path / "other.yaml", "-o", "b")
    initial(outcome)
    warnings = [line for line in outcome.err.split("\n") if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("ncf.py: warning: ")
    assert "mf_user_embed" in warnings[0]


# --- calibrating ---


def test_calibration_on_training_pairs_uses_nothing_of_the_test_set(
    ncf, convert, ratings_file, split_dir, checkpoint, tmp_path
):
    """The same statistics whatever the negatives are; on the test set they differ."""
    assert convert(ratings_file, tmp_path / "other", "-n", 40, "-s", 5).code == 0
    results = {}
    for on in ("train", "test"):
        for name, data in (("one", split_dir), ("two", tmp_path / "other")):
            out = tmp_path / f"{on}-{name}.yaml"
            flags = ["--qe-calibration", 0.5, "--calibrate-on", on, "-s", 3, "--qe-stats-out", out]
            assert ncf(data, "--load", checkpoint, *flags, "-o", tmp_path / f"{on}-{name}").code == 0
            results[on, name] = yaml.safe_load(out.read_text())
    assert results["train", "one"] == results["train", "two"]
    assert results["test", "one"] != results["test", "two"]
    assert list(results["train", "one"]) == LAYERS + ENDS[False]


def test_statistics_do_not_depend_on_blocks(ncf, split_dir, checkpoint, stats_file, monkeypatch):
    """One user's candidates are a batch, however many are scored at once."""
    monkeypatch.setitem(candidates.SAMPLED_PAIRS_PER_BLOCK, "cpu", 41)
    assert ncf(split_dir, "--load", checkpoint, "--qe-calibration", 1, "-o", "out").code == 0
    (path,) = Path("out").glob("*.yaml")
    one, many = (yaml.safe_load(file.read_text()) for file in (path, stats_file))
    assert list(one) == list(many)
    for layer, entry in one.items():
        for tensor, other in [
            (entry["output"], many[layer]["output"]),
            *((tensor, many[layer]["inputs"][i]) for i, tensor in entry["inputs"].items()),
        ]:
            assert tensor.pop("shape") == other.pop("shape")
            histograms = [
                Histogram.from_plain(x.pop("histogram")) for x in (tensor, other) if "histogram" in x
            ]
            # Values on a bin's edge may fall to either side.
            assert len({histogram.counts.sum().item() for histogram in histograms}) < 2
            columns = [columns_of_text(x.pop("column_max")) for x in (tensor, other) if "column_max" in x]
            torch.testing.assert_close(columns[:1], columns[1:], rtol=1e-5, atol=1e-7)
            assert tensor == pytest.approx(other, rel=1e-5, abs=1e-7)


def test_stats_out_is_a_copy_of_what_the_run_directory_has(ncf, split_dir, checkpoint, tmp_path):
    """And may replace a file."""
    path = tmp_path / "stats.yaml"
    path.write_text("old")
    flags = ["--qe-calibration", 0.2, "--qe-stats-out", path]
    assert ncf(split_dir, "--load", checkpoint, *flags, "-o", "out").code == 0
    (own,) = Path("out").glob("*.yaml")
    assert path.read_bytes() == own.read_bytes()


# --- going on, starting again, being interrupted ---


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """A run's last weights."""
    return load_checkpoint(directory / "checkpoint.pth.tar")["state_dict"]


def same(first: dict, second: dict) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_load_goes_on_with_the_optimizer(ncf, split_dir, run_dir):
    """Two epochs and one more give the weights of three; without its optimizer they are others."""
    load = ["--load", run_dir / "checkpoint.pth.tar"]
    whole = ncf(split_dir, *TRAIN, "-e", 3, "-o", "whole")
    outcome = ncf(split_dir, *TRAIN, *load, "-e", 3, "-o", "more")
    assert epochs(outcome.out) == epochs(whole.out)[2:]
    assert same(weights(Path("more")), weights(Path("whole")))
    assert Path("more/best.pth.tar").exists()

    reset = ncf(split_dir, *TRAIN, *load, "--reset-optimizer", "-e", 1, "-o", "reset")
    assert [number for number, *_ in epochs(reset.out)] == [0]
    assert not same(weights(Path("reset")), weights(Path("more")))
    fresh = ncf(split_dir, *TRAIN, "-e", 1, "-o", "fresh")
    assert fresh.code == 0
    assert not same(weights(Path("reset")), weights(Path("fresh")))


def test_run_that_goes_on_from_another_keeps_a_best_of_its_own(ncf, split_dir, run_dir, monkeypatch):
    """However good the other one was."""
    monkeypatch.setattr(trainer, "rank_test_items", lambda *_, **__: torch.arange(100) * 10 + 9)
    load = ["--load", run_dir / "checkpoint.pth.tar"]
    assert ncf(split_dir, *TRAIN, *load, "-e", 3, "-o", "more").code == 0
    assert load_checkpoint("more/best.pth.tar")["hr"] == 0.01


def test_load_takes_sizes_from_the_checkpoint(ncf, split_dir, run_dir):
    """They need not be given again."""
    outcome = ncf(split_dir, "--load", run_dir / "checkpoint.pth.tar", "-s", 1, "-e", 3, "-o", "more")
    assert [number for number, *_ in epochs(outcome.out)] == [2]


def test_load_with_another_final_layer_needs_a_fresh_optimizer(refused, ncf, split_dir, run_dir, tmp_path):
    """Its state is of other weights; with a fresh one the weights are converted."""
    command = [split_dir, *TRAIN, "--load", run_dir / "checkpoint.pth.tar", "--split-final"]
    refused([*command, "-e", 3, "-o", tmp_path / "out"], "--reset-optimizer")
    assert ncf(*command, "-e", 1, "--reset-optimizer", "-o", tmp_path / "out").code == 0
    assert "final_mf.weight" in weights(tmp_path / "out")


def test_overwrite_starts_again(ncf, split_dir, run_copy):
    """As in an empty directory: nothing of the old run is left in its results."""
    command = [split_dir, *TRAIN, "-s", 2, "-e", 1]
    assert ncf(*command, "-o", run_copy, "--overwrite").code == 0
    assert ncf(*command, "-o", "fresh").code == 0
    assert same(weights(run_copy), weights(Path("fresh")))
    assert len((run_copy / "valid_results.csv").read_text().splitlines()) == 2
    assert len(list(run_copy.glob("events.out.tfevents*"))) == 1
    assert json.loads((run_copy / "config.json").read_text())["seed"] == 2


def test_evaluation_into_a_runs_directory_leaves_the_run(ncf, split_dir, run_copy, stats_file):
    """Its checkpoints, results and configuration."""
    names = ["best.pth.tar", "checkpoint.pth.tar", "config.json", "valid_results.csv"]
    before = [(run_copy / name).read_bytes() for name in names]
    load = ["--load", run_copy / "best.pth.tar", "-o", run_copy]
    initial(ncf(split_dir, *load, "--evaluate"))
    initial(ncf(split_dir, *load, "--quantize-eval", "--qe-stats-file", stats_file))
    assert ncf(split_dir, *load, "--qe-calibration", 0.1).code == 0
    assert [(run_copy / name).read_bytes() for name in names] == before


def test_interrupt_of_an_evaluation_keeps_the_epoch(ncf, split_dir, monkeypatch):
    """Exit code 130, no traceback; the run can be gone on with to the weights of an unbroken one."""
    rank, calls = trainer.rank_test_items, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rank(*arguments, **options)

    monkeypatch.setattr(trainer, "rank_test_items", interrupted)
    outcome = ncf(split_dir, *TRAIN, "-e", 4, "-o", "out")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    *before, stopped = lines(outcome.out)
    assert [number for number, *_ in stopped_epochs(before)] == [0, 1]
    assert stopped.startswith("Stopped in epoch 2, ")
    assert load_checkpoint("out/checkpoint.pth.tar")["epoch"] == 2
    resumed = ncf(split_dir, "--resume", "-o", "out")
    assert [number for number, *_ in epochs(resumed.out)] == [2, 3]
    monkeypatch.setattr(trainer, "rank_test_items", rank)
    assert ncf(split_dir, *TRAIN, "-e", 4, "-o", "whole").code == 0
    assert same(weights(Path("out")), weights(Path("whole")))


def test_interrupt_key_ends_a_process_in_130(split_dir, tmp_path):
    """The signal itself, in the middle of training."""
    command = [sys.executable, script.__file__, split_dir, *TRAIN, "-b", "64", "-e", "100000", "-o", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "checkpoint.pth.tar").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    content = load_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert content["epoch"] >= 0
    assert not list(tmp_path.glob(".*"))
    *before, stopped = lines(out)
    assert stopped_epochs(before)
    assert stopped.startswith("Stopped in epoch ")


def test_disk_that_fails_while_saving_leaves_the_last_checkpoint(ncf, split_dir, run_copy, monkeypatch):
    """One line that names the file, and the old one whole."""
    before = (run_copy / "checkpoint.pth.tar").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    outcome = ncf(split_dir, "--resume", "-e", 3, "-o", run_copy)
    assert outcome.code == 2
    assert lines(outcome.err)[-1].startswith("ncf.py: error: ")
    assert ".pth.tar: No space left on device" in lines(outcome.err)[-1]
    assert (run_copy / "checkpoint.pth.tar").read_bytes() == before
    assert not list(run_copy.glob(".*"))


def test_output_can_be_piped(split_dir, checkpoint):
    """Metrics on stdout, progress on stderr."""
    command = [sys.executable, script.__file__, split_dir, "--load", checkpoint, "--evaluate"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert INITIAL_LINE.fullmatch(done.stdout.rstrip("\n"))
    assert io.StringIO(done.stdout).readlines()[0].endswith("\n")


def test_load_goes_on_at_the_rate_of_the_checkpoint(ncf, split_dir, checkpoint, tmp_path):
    """Unless -l says otherwise, and the configuration records it."""
    saved = load_checkpoint(checkpoint)["optimizer_state_dict"]["param_groups"][0]["lr"]
    for flags, rate in (([], saved), (["-l", 0.5 * saved], 0.5 * saved)):
        out = tmp_path / str(rate)
        outcome = ncf(split_dir, "--load", checkpoint, "-e", 9, "--max-steps", 1, "-s", 1, *flags, "-o", out)
        assert outcome.code == 0, outcome.err
        assert json.loads((out / "config.json").read_text())["learning_rate"] == rate
        after = load_checkpoint(out / "checkpoint.pth.tar")["optimizer_state_dict"]["param_groups"][0]["lr"]
        assert after == rate
    assert saved != 0.001  # which is the default without a checkpoint


# --- how it trains ---


def in_a_process(*arguments: object, **environment: str) -> str:
    """What ``ncf.py`` prints in a process of its own, with ``torch.compile`` as it comes."""
    inherited = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, script.__file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=inherited | environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def largest_difference(first: str, second: str) -> float:
    """Of any weight, between two runs."""
    one, other = (weights(Path(directory)) for directory in (first, second))
    return max((one[key] - other[key]).abs().max().item() for key in one)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_printed_and_recorded(ncf, split_dir, precision):
    """In the first line, the configuration and the checkpoint; a resumed run keeps it."""
    outcome = ncf(split_dir, *TRAIN, "--precision", precision, "-e", 1, "-o", "out")
    assert f"{precision} matrix products" in lines(outcome.out)[0]
    assert json.loads(Path("out/config.json").read_text())["precision"] == precision
    content = load_checkpoint("out/checkpoint.pth.tar")
    assert content["config"]["precision"] == precision
    assert all(value.dtype == torch.float32 for value in content["state_dict"].values())
    assert f"{precision} matrix products" in lines(ncf(split_dir, "--resume", "-e", 2, "-o", "out").out)[0]


@pytest.mark.parametrize("native", [True, False])
def test_default_precision_is_what_the_processor_has(ncf, split_dir, monkeypatch, native):
    """bf16 natively, else fp32; and it makes a difference."""
    monkeypatch.setattr("neural_cf.runs.hardware.native_bf16", lambda device: native)
    assert ncf(split_dir, *TRAIN, "-e", 1, "-o", "default").code == 0
    for precision in ("fp32", "bf16"):
        assert ncf(split_dir, *TRAIN, "-e", 1, "--precision", precision, "-o", precision).code == 0
    assert largest_difference("default", "bf16" if native else "fp32") == 0
    assert largest_difference("fp32", "bf16") > 0


def test_bf16_does_not_go_with_quantization_aware_training(ncf, refused, split_dir, tmp_path):
    """Asked for it is refused; by default such a run is in fp32."""
    schedule = tmp_path / "qat.yaml"
    quantizers = {"q": {"class": "NCFQuantAwareTrainQuantizer"}}
    policies = [{"quantizer": {"instance_name": "q"}, "starting_epoch": 0, "ending_epoch": 9}]
    schedule.write_text(yaml.safe_dump({"quantizers": quantizers, "policies": policies}))
    flags = ["--compress", schedule, "-o", tmp_path / "out"]
    refused([split_dir, *TRAIN, "--precision", "bf16", *flags], "--precision")
    assert "fp32 matrix products" in ncf(split_dir, *TRAIN, "-e", 1, *flags).out


@pytest.mark.parametrize(("flag", "value"), [("--precision", "fp16"), ("--optimizer", "sgd")])
def test_unknown_precision_or_optimizer_is_refused(refused, split_dir, flag, value):
    """The line names the flag and the choices."""
    refused([split_dir, flag, value], flag, value)


@pytest.mark.parametrize("order", [["adam", "lazy-adam"], ["lazy-adam", "adam"]])
@pytest.mark.parametrize("steps", [25, 38, 50])
def test_run_goes_on_under_the_other_optimizer(ncf, split_dir, order, steps):
    """From within an epoch and from its end, to the weights of a run that never changed."""
    train = [split_dir, *TRAIN, "--precision", "fp32", "-e", 2]
    for name in order:
        assert ncf(*train, "--optimizer", name, "-o", f"whole-{name}").code == 0
    assert ncf(*train, "--optimizer", order[0], "--max-steps", steps, "-o", "parts").code == 0
    resumed = ncf(split_dir, "--resume", "--optimizer", order[1], "-o", "parts")
    assert resumed.code == 0, resumed.err
    assert resumed.out.startswith(f"Training with {order[1]}, ")
    for name in order:
        assert largest_difference("parts", f"whole-{name}") < 1e-3


def test_lazy_adam_trains_the_weights_of_adam(ncf, split_dir):
    """Small steps and few of them, so that rounding is not amplified."""
    for name in ("adam", "lazy-adam"):
        flags = ["-b", 512, "-l", 0.001, "--precision", "fp32", "--optimizer", name]
        assert ncf(split_dir, *TRAIN, *flags, "-e", 5, "-o", name).code == 0
    assert largest_difference("adam", "lazy-adam") < 1e-4
    states = [load_checkpoint(f"{name}/checkpoint.pth.tar") for name in ("adam", "lazy-adam")]
    assert [state["optimizer_type"] for state in states] == ["Adam", "LazyAdam"]
    moments = [state["optimizer_state_dict"]["state"] for state in states]
    for number, parts in moments[0].items():
        assert {name: part.shape for name, part in parts.items()} == {
            name: part.shape for name, part in moments[1][number].items()
        }
        assert parts["step"] == moments[1][number]["step"] == 5 * 19


def test_damaged_lagging_rows_are_refused(ncf, split_dir):
    """A line that names the file."""
    assert ncf(split_dir, *TRAIN, "--max-steps", 25, "-o", "out").code == 0
    path = Path("out/checkpoint.pth.tar")
    content = load_checkpoint(path)
    values, last = content["lagging_rows"][0]
    late, early = last.clone(), last.clone()
    late[0], early[0] = 26, -1
    rows = [(values[:-1], last), (values, last[:-1]), (values, 3), (values, late), (values, early)]
    for damaged in (3, [(values, last)], *([row, row] for row in rows)):
        torch.save(content | {"lagging_rows": damaged}, path)
        outcome = ncf(split_dir, "--resume", "-o", "out")
        assert outcome.code == 2
        assert lines(outcome.err)[-1].startswith(f"ncf.py: error: {path}: lagging_rows: ")


def test_compiled_run_trains_what_an_uncompiled_one_does(split_dir):
    """Beyond the dense steps, which are not compiled: 40 epochs and some."""
    train = [split_dir, *TRAIN, "-l", 0.001, "--precision", "fp32", "-e", 42]
    assert ", compiled, on cpu" in lines(in_a_process(*train, "-o", "compiled"))[0]
    assert ", not compiled, on cpu" in lines(in_a_process(*train, "--no-compile", "-o", "eager"))[0]
    assert json.loads(Path("compiled/config.json").read_text())["compiled"] is True
    assert json.loads(Path("eager/config.json").read_text())["compiled"] is False
    assert largest_difference("compiled", "eager") < 1e-2
    results = [
        Path(run, "valid_results.csv").read_text().splitlines()[-1].split(",")
        for run in ("compiled", "eager")
    ]
    assert float(results[0][4]) == pytest.approx(float(results[1][4]), abs=1e-3)


def test_without_a_compiler_it_runs_uncompiled_and_says_so(split_dir, tmp_path):
    """In a line with the reason."""
    cache = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    first, second, *rest = lines(
        in_a_process(split_dir, *TRAIN, "-e", 1, "-o", "out", CXX="/bin/false", **cache)
    )
    assert first.startswith("Without torch.compile, which does not work here: ")
    assert "compiler" in first
    assert ", not compiled, on cpu" in second
    assert len(rest) == 2
