"""The table of what each precision costs: its figures, what it runs, and what it does not run again."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome, call, run_convert

from benchmarks import precision, recipe, table
from benchmarks.precision import Difference, Evaluation, Figures, cells, difference_of, figures_of, markdown
from distiller.schedule import load_schedule
from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.commands.arguments import parse_settings as parse_args
from neural_cf.commands.flags import build_parser
from neural_cf.int8.search import nb_calibration_users
from neural_cf.ranking.metrics import metrics_of_ranks
from neural_cf.split import load_split

SMALL = ["--layers", 8, 6, 4, "--factors", 4, "--batch-size", 1024, "--learning-rate", 0.01, "--epochs", 1]
HAS_AUTO = "--qe-auto" in build_parser().format_help()
ALL_ROWS = tuple(row for row in precision.ROWS if HAS_AUTO or precision.AUTO not in row.before)
FEW_ROWS = tuple(row for row in precision.ROWS if row.name in ("FP32", "INT8", "INT8 QAT"))
GAIN_OF_SECOND = math.log(2) / math.log(3)  # 0.6309
Make = Callable[..., tuple[Outcome, list[list[str]]]]


def evaluation(*ranks: int, megabytes: float = 1.0, seconds: float = 1.0) -> Evaluation:
    return Evaluation(torch.tensor(ranks), megabytes, seconds)


# --- figures ---


def test_figures_of_made_up_ranks():
    """Two seeds of four users: half and three quarters are hits."""
    in_float = [evaluation(0, 1, 10, 50, seconds=3.0), evaluation(0, 9, 1, 12, megabytes=2.0)]
    row = figures_of("FP32", in_float, None)
    assert row.hr == [50.0, 75.0]
    tenth = math.log(2) / math.log(11)
    assert row.ndcg == pytest.approx([25 * (1 + GAIN_OF_SECOND), 25 * (1 + tenth + GAIN_OF_SECOND)])
    assert (row.name, row.difference, row.megabytes, row.seconds) == ("FP32", None, 1.5, 2.0)


def test_difference_of_made_up_ranks():
    """Of 6 pairs, 3 lose their hit and one gains one: p = 2 (1 + 4) / 16. NDCG by hand."""
    in_float = torch.tensor([[0, 0, 20], [0, 1, 20]])
    ranks = torch.tensor([[0, 10, 20], [99, 10, 0]])
    found = difference_of(ranks, in_float)
    assert found.hr == pytest.approx(100 * (2 - 4) / 6)
    assert found.p == 0.625
    users = np.array([(0 - 1) / 2, (-1 - GAIN_OF_SECOND) / 2, (0 + 1) / 2])
    assert found.ndcg == pytest.approx(100 * users.mean())
    assert found.interval == pytest.approx((100 * users.min(), 100 * users.max()))  # means of 3 of 3 users


def test_rows_are_compared_seed_by_seed():
    """A row that is FP32 with its seeds in the other order is not FP32."""
    seeds = [evaluation(0, 20, 20), evaluation(20, 0, 0)]
    same, other = figures_of("a", seeds, seeds), figures_of("b", seeds[::-1], seeds)
    assert same.difference == Difference(0.0, 1.0, 0.0, (0.0, 0.0))
    assert other.difference.p == 1.0
    assert other.difference.interval == (0.0, 0.0)  # but over seeds each user has the same mean
    assert other.difference.hr == 0
    mixed = figures_of("c", [seeds[0], seeds[0]], seeds).difference
    assert (mixed.p, mixed.hr) == (1.0, pytest.approx(-100 / 6))


def test_table_of_figures():
    """Two decimals, signs, and nothing beside FP32."""
    rows = [
        Figures("FP32", [60.0, 64.0], [30.0, 30.0], None, 7.5021, 0.849),
        Figures("INT8", [50.0, 50.0], [3.0, 3.006], Difference(-0.745, 0.0312, 0.126, (-0.004, 1)), 1.9, 10),
    ]
    assert markdown(rows).split("\n") == [
        "| Precision | HR@10 | NDCG@10 | HR@10 minus FP32's (p) | NDCG@10 minus FP32's [95 %] | model, MB "
        "| evaluation, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| FP32 | 62.00 ± 2.83 | 30.00 ± 0.00 |  |  | 7.50 | 0.8 |",
        "| INT8 | 50.00 ± 0.00 | 3.00 ± 0.00 | -0.74 (p = 0.031) | +0.13 [+0.00, +1.00] | 1.90 | 10.0 |",
    ]


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (1.0, "p = 1"),
        (0.625, "p = 0.62"),
        (0.00012, "p = 0.00012"),
        (0.00009, "p < 0.0001"),
        (0.0, "p < 0.0001"),
    ],
)
def test_p_values(p, text):
    assert cells(Difference(1.0, p, 1.0, (0.5, 2.0))) == (f"+1.00 ({text})", "+1.00 [+0.50, +2.00]")


# --- the whole of it ---


@pytest.fixture
def make(scripts_here, monkeypatch) -> Make:
    """Makes a table of the rows given, in this process; what came of it, and the command lines."""

    def run(
        *arguments: object, rows: tuple[precision.Row, ...] = FEW_ROWS
    ) -> tuple[Outcome, list[list[str]]]:
        monkeypatch.setattr(precision, "ROWS", rows)
        scripts_here.clear()
        return call("precision.py", precision.main, (*SMALL, *arguments)), list(scripts_here)

    return run


def made(outcome: Outcome) -> str:
    """What a table that was made printed."""
    assert outcome.code == 0, outcome.err
    return outcome.out


def figures_in(text: str) -> list[list[str]]:
    """The table's rows, but for times, which differ between runs."""
    return [line.split(" | ")[:-1] for line in text.split("\n") if line.startswith("| ")]


def slug(command: list[str]) -> str:
    """The name of the directory that a command writes to."""
    return Path(command[command.index("-o") + 1]).name


def test_every_row_and_the_same_again(make, split_dir, tmp_path):
    """Every command is one that is printed, and parses; a second run has nothing to do."""
    arguments = ("--out", tmp_path, split_dir, "--seeds", 1, 2)
    outcome, commands = make(*arguments, rows=ALL_ROWS)
    text = made(outcome)
    split = load_split(split_dir)
    body = figures_in(text)[2:]
    assert [row[0] for row in body] == [f"| {row.name}" for row in ALL_ROWS]
    reported = split.nb_users - nb_calibration_users(split)
    assert f"of the last {reported} users: --qe-auto chooses by the first" in text
    ranks = [torch.from_numpy(np.load(tmp_path / f"seed-{seed}/fp32/ranks.npy")) for seed in (1, 2)]
    hits = [100 * metrics_of_ranks(of_seed[-reported:], 10).hr for of_seed in ranks]
    assert body[0][1] == recipe.over_seeds(hits)

    printed = [line.strip() for line in text.split("\n") if line.startswith("    ")]
    values = dict(word.split("=") for word in shlex.split(printed[0]))
    assert values == {"SPLIT": str(split_dir), "OUT": str(tmp_path), "SEED": "1"}
    lines = [line for line in printed[1:] if not line.startswith("#")]
    typed = []
    for seed in ("1", "2"):
        for line in lines:
            for name, value in (values | {"SEED": seed}).items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line.replace(" ./", f" {recipe.ROOT}/"))
            assert words.pop(0) == "python"
            parse_args(words[1:])
            typed.append(words)
    assert sorted(typed) == sorted(commands)

    outcome, commands = make(*arguments, "--json", rows=ALL_ROWS)
    found = json.loads(made(outcome))
    assert commands == []
    assert [row["name"] for row in found["rows"]] == [row.name for row in ALL_ROWS]
    assert found["rows"][0]["hr"] == pytest.approx(hits)
    assert found["rows"][0]["difference"] is None
    assert [line for row in found["rows"] for line in row["commands"]] == lines
    outcome, commands = make(*arguments, rows=ALL_ROWS)
    assert (made(outcome), commands) == (text, [])


def test_sizes_are_of_the_weights(make, split_dir, tmp_path):
    """FP32's without the optimizer, the others' as their file has it."""
    outcome, _ = make(split_dir, "--out", tmp_path, "--seeds", 1, "--json")
    of_float, of_int8, _ = json.loads(made(outcome))["rows"]
    weights = load_checkpoint(tmp_path / "seed-1/base_fp32/checkpoint.pth.tar")["state_dict"]
    assert of_float["megabytes"] == sum(4 * tensor.numel() for tensor in weights.values()) / 1e6
    assert of_int8["megabytes"] == (tmp_path / "seed-1/int8/quantized.pth.tar").stat().st_size / 1e6


@pytest.mark.parametrize("nb_done", range(6))  # of training, calibration, QAT, three evaluations
def test_interrupted_run_goes_on(make, split_dir, tmp_path, monkeypatch, nb_done):
    """Nothing that was done is done again."""
    whole = made(make(split_dir, "--out", tmp_path / "whole", "--seeds", 1)[0])
    execute, done = recipe.execute, []

    def stops(*command: object) -> str:
        if len(done) == nb_done:
            raise KeyboardInterrupt
        done.append([str(word) for word in command])
        return execute(*command)

    broken = (split_dir, "--out", tmp_path / "broken", "--seeds", 1)
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "execute", stops)
        outcome, _ = make(*broken)
    assert (outcome.code, outcome.out, len(done)) == (130, "", nb_done)
    outcome, commands = make(*broken)
    assert figures_in(made(outcome)) == figures_in(whole)
    assert len(done) + len(commands) == 6
    assert all(command not in done for command in commands)


def test_evaluation_that_was_cut_short_is_made_again(make, split_dir, tmp_path, monkeypatch):
    """Its record is gone before it starts, whatever of an earlier one is still there."""
    arguments = (split_dir, "--out", tmp_path, "--seeds", 1)
    made(make(*arguments)[0])
    execute = recipe.execute

    def fails(*command: object) -> str:
        if slug([str(word) for word in command]) == "int8":
            raise InputError("disk full")
        return execute(*command)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "execute", fails)
        outcome, _ = make(*arguments, "--overwrite")
    assert (outcome.code, outcome.out) == (2, "")
    assert (tmp_path / "seed-1/int8/ranks.npy").exists()
    outcome, commands = make(*arguments)
    made(outcome)
    assert "int8" in map(slug, commands)


def test_what_has_changed_is_made_again(make, split_dir, tmp_path):
    """Ranks of another evaluation in the same place, other statistics, another schedule's model: nothing else."""
    arguments = (split_dir, "--out", tmp_path, "--seeds", 1)
    first = figures_in(made(make(*arguments)[0]))
    directory = tmp_path / "seed-1"
    np.save(directory / "int8/ranks.npy", np.zeros(60, dtype=np.int64))
    outcome, commands = make(*arguments)
    assert figures_in(made(outcome)) == first
    assert [slug(command) for command in commands] == ["int8"]

    (directory / "quantization_stats_no_split.yaml").unlink()
    outcome, commands = make(*arguments)
    assert figures_in(made(outcome)) == first
    assert [slug(command) for command in commands] == ["calibration"]  # which leaves the same file

    (directory / "qat8/checkpoint.pth.tar").write_bytes(b"")
    outcome, commands = make(*arguments)
    assert figures_in(made(outcome)) == first
    assert [slug(command) for command in commands] == ["qat8"]  # likewise


def test_other_negatives_are_evaluated(make, ratings_file, tmp_path):
    """In the same directory, of the same ratings: the model is the same, what it ranks is not."""
    arguments = (tmp_path / "split", "--out", tmp_path / "out", "--seeds", 1)
    for negatives, slugs in (
        (30, ["base_fp32", "calibration", "qat8", "fp32", "int8", "int8_qat"]),
        (31, ["calibration", "qat8", "fp32", "int8", "int8_qat"]),
    ):
        assert run_convert(ratings_file, tmp_path / "split", "-n", negatives).code == 0
        outcome, commands = make(*arguments)
        assert f"{negatives} negatives per user" in made(outcome)
        assert [slug(command) for command in commands] == slugs


def test_overwrite_starts_again(make, split_dir, tmp_path):
    """All of it, each step once; other settings take the old ones' place."""
    arguments = (split_dir, "--out", tmp_path, "--seeds", 1)
    _, first = make(*arguments)
    assert len(first) == 6
    outcome, commands = make(*arguments, "--overwrite")
    made(outcome)
    assert commands == first
    outcome, commands = make(*arguments, "--overwrite", "--learning-rate", 0.02)
    made(outcome)
    assert len(commands) == 6


def test_models_are_shared_with_the_other_table(make, split_dir, tmp_path):
    """Whichever comes first: one trains, and each calibrates the epoch that it looks at."""
    of_table = (*SMALL, split_dir, "--out", tmp_path)
    assert call("table.py", table.main, of_table).code == 0
    outcome, commands = make(split_dir, "--out", tmp_path, "--seeds", 1)
    made(outcome)
    assert "base_fp32" not in map(slug, commands)
    assert call("table.py", table.main, of_table).code == 0
    again, commands = make(split_dir, "--out", tmp_path, "--seeds", 1)
    assert "base_fp32" not in map(slug, commands)
    assert figures_in(made(again)) == figures_in(outcome.out)


# --- errors ---


def error_of(outcome: Outcome) -> str:
    """The one line of an error."""
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = [line for line in outcome.err.split("\n") if line.startswith("precision.py: error: ")]
    return line


def test_model_of_other_settings_is_not_taken_for_this_one(make, split_dir, tmp_path):
    made(make(split_dir, "--out", tmp_path, "--seeds", 1)[0])
    outcome, commands = make(split_dir, "--out", tmp_path, "--seeds", 1, "--epochs", 2)
    assert "--overwrite" in error_of(outcome)
    assert commands == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"output": 1}', "{}"])
def test_damaged_record(make, split_dir, tmp_path, text):
    """Is named; --overwrite gets over it."""
    arguments = (split_dir, "--out", tmp_path, "--seeds", 1)
    rows = FEW_ROWS[:1]
    made(make(*arguments, rows=rows)[0])
    (tmp_path / "seed-1/fp32/ranks.npy.json").write_text(text)
    line = error_of(make(*arguments, rows=rows)[0])
    assert "fp32/ranks.npy.json" in line
    assert "--overwrite" in line
    made(make(*arguments, "--overwrite", rows=rows)[0])


def test_seed_that_repeats(make, split_dir, tmp_path):
    """Would count twice."""
    assert "--seeds: 1 2 1" in error_of(make(split_dir, "--out", tmp_path, "--seeds", 1, 2, 1)[0])


def test_data_that_are_not_there(make, tmp_path):
    outcome, commands = make(tmp_path / "nothing.csv", "--out", tmp_path / "out")
    error_of(outcome)
    assert [line[0] for line in commands] == ["convert.py"]


# --- settings ---


@pytest.mark.parametrize(("flags", "bits"), [([], 8), (["--qebw", "4"], 4)])
def test_bits_after_training_are_those_of_training(flags, bits):
    """The flags say what the file says; the files differ in the weights alone."""
    eight, four = (
        load_schedule(recipe.ROOT / "schedules" / name).quantizer
        for name in ("ncf_qat.yaml", "ncf_qat_4bit.yaml")
    )
    assert four == eight | {"bits_weights": 4}
    settings = eight | {"bits_weights": bits}
    args = build_parser().parse_args(["split", *precision.LIKE_QAT.split(), *flags])
    assert (args.qe_bits_wts, args.qe_bits_acts) == (settings["bits_weights"], settings["bits_activations"])
    assert {"weights": args.qe_mode_wts, "activations": args.qe_mode_acts} == settings["mode"]
    assert args.qe_per_channel == settings["per_channel_wts"]
    assert args.qe_embedding_bits is None
