"""The speed benchmarks as a user runs them: what they print, not what it comes to."""

from __future__ import annotations

import json

import pytest
from conftest import call

from benchmarks import evaluation, training


@pytest.fixture
def small(monkeypatch):
    """Too little work to measure, on what is already here."""
    monkeypatch.setitem(training.SIZES, 1, (50, 40, 2000))


def test_training_speed_as_json(small, split_dir):
    """Every figure of both tables, each of them positive."""
    flags = [
        split_dir,
        "--json",
        "--rounds",
        2,
        "--steps",
        3,
        "--sizes",
        1,
        "--batch-size",
        64,
        "--no-compile",
    ]
    outcome = call("training.py", training.main, flags)
    assert outcome.code == 0, outcome.err
    figures = json.loads(outcome.out)
    assert figures["seconds"].keys() == {"plain", "fp32", "bf16"}
    assert all(len(values) == 2 and min(values) > 0 for values in figures["seconds"].values())
    assert all(value > 0 for value in (*figures["parts"].values(), *figures["matrix_seconds"].values()))
    # Forward and twice backward: 2 x 3 x 64 x (256 x 256 + 256 x 128 + 128 x 64 + 128).
    assert figures["work"]["flop"] == 6 * 64 * 106_624
    (row,) = figures["sizes"]
    assert (row["users"], row["items"], row["ratings"]) == (50, 40, 2000)
    assert figures["compiled"] == "not compiled: --no-compile"


def test_training_speed_as_tables(small, split_dir):
    """A row for each kind of step and for each size, and what it was measured on."""
    flags = [split_dir, "--rounds", 1, "--steps", 2, "--sizes", 1, "--batch-size", 64, "--no-compile"]
    outcome = call("training.py", training.main, flags)
    assert outcome.code == 0, outcome.err
    for start in ("| plain |", "| fp32 |", "| bf16 |", "| 2,000 | 50 | 40 |"):
        assert f"\n{start}" in outcome.out
    assert "torch" in outcome.out.splitlines()[-1]


def test_evaluation_speed(split_dir):
    """Every contender's speed, memory in a process of its own, and bytes: INT8 takes a quarter of FP32."""
    flags = [split_dir, "--json", "--users", 5, "--rounds", 2, "--no-compile"]
    outcome = call("evaluation.py", evaluation.main, flags)
    assert outcome.code == 0, outcome.err
    figures = json.loads(outcome.out)
    for key in ("pairs_per_s", "peak_bytes", "model_bytes"):
        assert tuple(figures[key]) == evaluation.CONTENDERS
    assert all(len(values) == 2 and min(values) > 0 for values in figures["pairs_per_s"].values())
    assert min(figures["peak_bytes"].values()) > 50e6
    assert 0.25 < figures["model_bytes"]["INT8"] / figures["model_bytes"]["FP32"] < 0.3
    lines = evaluation.table(figures).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in evaluation.CONTENDERS]


@pytest.mark.parametrize(
    ("script", "main", "flags", "name"),
    [
        ("training.py", training.main, ["--steps", 0], "--steps"),
        ("training.py", training.main, ["--sizes", 2], "--sizes"),
        ("training.py", training.main, ["missing"], "missing"),
        ("evaluation.py", evaluation.main, ["--users", 0], "--users"),
        ("evaluation.py", evaluation.main, ["--rounds", -1], "--rounds"),
        ("evaluation.py", evaluation.main, ["missing"], "missing"),
    ],
)
def test_bad_input_is_one_line(script, main, flags, name):
    outcome = call(script, main, flags)
    assert outcome.code == 2
    (error,) = outcome.err.splitlines()
    assert error.startswith(f"{script}: error: ")
    assert name in error
