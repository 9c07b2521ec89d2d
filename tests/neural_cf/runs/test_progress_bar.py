"""Progress: a bar on a terminal, plain lines in a file, and what training says of the time that is left."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from itertools import pairwise
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
import tqdm.std
from helpers_training import STEPS, TRAIN, run_of

from neural_cf.data.batches import TrainingBatches
from neural_cf.model import NeuMF
from neural_cf.runs import progress_bar as module
from neural_cf.runs.progress_bar import LINE_EVERY_S, progress_bar
from neural_cf.runs.recorder import Recorder
from neural_cf.split import load_split
from neural_cf.training import trainer
from neural_cf.training.step import Step
from neural_cf.training.trainer import Pace, Trainer


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A time that passes only when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """tqdm's clock."""
    clock = Clock()
    monkeypatch.setattr(tqdm.std, "time", clock)
    return clock


@pytest.fixture
def every_update(monkeypatch) -> None:
    """Makes every update a line, and every update of a bar visible."""
    monkeypatch.setattr(module, "LINE_EVERY_S", 0)
    monkeypatch.setattr(module, "BAR_EVERY_S", 0)


def whole_lines(text: str) -> list[str]:
    """Return lines that have text, no two of them in turn the same, and nothing that moves a cursor."""
    assert not set("\r\x1b") & set(text)
    assert text == "" or text.endswith("\n")
    lines = text.splitlines()
    assert all(line == line.strip() != "" for line in lines)
    assert all(first != second for first, second in pairwise(lines))
    return lines


def counts(lines: list[str]) -> list[str]:
    """Return how far each line says that the work is, such as 3/12."""
    return [re.search(r"\d+/\d+", line)[0] for line in lines]


@contextmanager
def bar_on(stream: io.StringIO, *arguments: object, **more: object) -> Iterator[tqdm.std.tqdm]:
    """A progress bar while ``stream`` is stderr. pytest puts its own back after fixtures, so that this is none."""
    with redirect_stderr(stream), progress_bar(*arguments, **more) as bar:
        yield bar


# --- in a file ---


def test_quick_work_leaves_nothing_in_a_file(clock):
    """Work of ten seconds less a moment, whatever it says of itself."""
    file = io.StringIO()
    with bar_on(file, 100, "users", "user") as bar:
        for _ in range(100):
            clock.now += (LINE_EVERY_S - 0.01) / 100
            bar.set_description("loss")
            bar.update()
    assert file.getvalue() == ""


def test_a_file_gets_a_line_every_ten_seconds(clock):
    """Of twelve steps of 4 s the third is the first at 10 s or more; then every third one."""
    file = io.StringIO()
    with bar_on(file, 12, "Epoch 0", "it") as bar:
        for _ in range(12):
            clock.now += 4
            bar.update()
    assert whole_lines(file.getvalue()) == [
        "Epoch 0:  25% 3/12 [00:12<00:36,  4.00s/it]",
        "Epoch 0:  50% 6/12 [00:24<00:24,  4.00s/it]",
        "Epoch 0:  75% 9/12 [00:36<00:12,  4.00s/it]",
        "Epoch 0: 100% 12/12 [00:48<00:00,  4.00s/it]",
    ]


def test_the_end_is_one_line_also_where_the_last_step_is_slow(clock):
    """Whose rate is not that of the others: 100 % is said once."""
    file = io.StringIO()
    with bar_on(file, 3, "x", "it") as bar:
        for seconds in (11, 11, 50):
            clock.now += seconds
            bar.update()
    assert counts(whole_lines(file.getvalue())) == ["1/3", "2/3", "3/3"]


def test_lines_are_plain_and_in_order(every_update):
    """With description and what stands behind it; nothing of a longer line is left on a shorter one."""
    file = io.StringIO()
    with bar_on(file, 5, "a long description", "user") as bar:
        for number in range(5):
            bar.set_postfix_str(f"run {number} left", refresh=False)
            bar.update()
            bar.set_description("short", refresh=False)
    lines = whole_lines(file.getvalue())
    assert list(dict.fromkeys(counts(lines))) == ["0/5", "1/5", "2/5", "3/5", "4/5", "5/5"]
    assert re.fullmatch(r"a long description:   0% 0/5 \[00:00<\?, \?user/s\]", lines[0])
    assert re.fullmatch(r"a long description:  20% 1/5 \[00:00<00:00, +[\d.]+user/s, run 0 left\]", lines[1])
    assert re.fullmatch(r"short:  40% 2/5 \[00:00<00:00, +[\d.]+user/s, run 1 left\]", lines[2])


def test_refreshing_without_news_is_no_line(clock, every_update):
    """At the same time, with the same count."""
    file = io.StringIO()
    with bar_on(file, 5, "x", "it") as bar:
        for _ in range(3):
            bar.refresh()
        clock.now += 1
        bar.update(5)
    assert counts(whole_lines(file.getvalue())) == ["0/5", "5/5"]


def test_work_that_was_begun_counts_from_there(every_update):
    """As a run does that goes on within an epoch."""
    file = io.StringIO()
    with bar_on(file, 10, "x", "it", initial=8) as bar:
        bar.update(2)
    lines = whole_lines(file.getvalue())
    assert (counts(lines)[0], counts(lines)[-1]) == ("8/10", "10/10")


# --- on a terminal ---


def test_a_terminal_gets_a_bar_in_one_place(every_update):
    """Written over itself, and ended by the only line break."""
    terminal = Terminal()
    with bar_on(terminal, 4, "Epoch 0", "it") as bar:
        for _ in range(4):
            bar.update()
    text = terminal.getvalue()
    assert text.endswith("\n")
    assert text.count("\n") == 1
    drawn = [part for part in text.strip().split("\r") if part]
    assert drawn[0].startswith("Epoch 0:   0%|")
    assert drawn[-1].startswith("Epoch 0: 100%|")
    assert re.search(r"100%\|[#█]+\| 4/4 \[", drawn[-1])


def test_a_terminal_gets_a_bar_at_once():
    """Also for what is quick."""
    terminal = Terminal()
    with bar_on(terminal, 4, "x", "it"):
        assert "0%|" in terminal.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_disabled_bar_shows_nothing(every_update, stream):
    """In torchrun's other processes."""
    file = stream()
    with bar_on(file, 4, "x", "it", disable=True) as bar:
        bar.update(4)
    assert file.getvalue() == ""


def test_a_closed_stderr_ends_no_work(monkeypatch):
    """As with 2>&-, where Python has None for it."""
    monkeypatch.setattr(tqdm.std.tqdm, "_instances", WeakSet())  # whatever is left of this bar moves no other
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(4, "x", "it") as bar:
        bar.update(4)
    assert bar.disable


# --- training ---

LINE = re.compile(r"Epoch (\d+) Loss \d\.\d{4} \(\d\.\d{4}\): +\d+% (\d+/\d+) \[.*, run (\d\d:\d\d) left\]")


def test_a_trainings_lines_have_the_loss_and_the_time_left(ncf, split_dir, tmp_path, every_update):
    """Of every update, in stderr; the results are on stdout alone."""
    outcome = ncf(split_dir, *TRAIN, "-e", 2, "--log-freq", 10, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    found = [LINE.fullmatch(line) for line in whole_lines(outcome.err) if " Loss " in line]
    assert all(found)
    assert list(dict.fromkeys((line[1], line[2]) for line in found)) == [
        (epoch, f"{step}/{STEPS}") for epoch in "01" for step in (10, 20, 30, STEPS)
    ]
    assert "Loss 0" not in outcome.out


def test_quick_training_leaves_stderr_empty(ncf, split_dir, tmp_path):
    assert ncf(split_dir, *TRAIN, "-e", 1, "-o", tmp_path / "out").err == ""


@pytest.fixture
def timed(split_dir, tmp_path, monkeypatch, every_update):
    """Trains with steps of a second and evaluations of a minute; what the bar said after each update."""
    split = load_split(split_dir)
    clock = Clock()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=clock))

    def step(self, batch):
        clock.now += 1
        return torch.tensor(0.5)

    def rank(*_, **__):
        clock.now += 60
        return torch.zeros(10)

    monkeypatch.setattr(Step, "__call__", step)
    monkeypatch.setattr(trainer, "rank_test_items", rank)

    def run(**settings: object) -> list[tuple[str, str, str]]:
        model = NeuMF(split.nb_users, split.nb_items, 4, [8, 4])
        batches = TrainingBatches(split, 256, 4, seed=1)
        terminal = Terminal()
        with Recorder(tmp_path) as recorder, redirect_stderr(terminal):
            own = run_of(split, tmp_path, **settings)
            Trainer(own, Step(model, torch.optim.Adam(model.parameters())), batches, recorder, {}).train()
        drawn = re.sub(r"\|.*?\|", "", terminal.getvalue()).split("\r")
        found = [LINE.match(line.strip()) for line in drawn]
        return list(dict.fromkeys(line.groups() for line in found if line))

    return run


def test_time_left_in_numbers(timed):
    """Three epochs of 38 steps of 1 s, each with an evaluation of 60 s, which counts once there has been one.

    In the middle of the second epoch 57 steps and two evaluations are left: 177 s.
    """
    assert timed(epochs=3, log_freq=19) == [
        ("0", "19/38", "01:35"),
        ("0", "38/38", "01:16"),
        ("1", "19/38", "02:57"),
        ("1", "38/38", "02:38"),
        ("2", "19/38", "01:19"),
        ("2", "38/38", "01:00"),
    ]


def test_time_left_until_max_steps(timed):
    """Of 50 steps 31 are left after 19; the last 12 are evaluated once."""
    assert timed(epochs=3, log_freq=19, max_steps=50) == [
        ("0", "19/38", "00:31"),
        ("0", "38/38", "00:12"),
        ("1", "12/38", "01:00"),
    ]


def test_pace_in_numbers():
    """The means of all steps and of all evaluations so far, those of the epoch under way too."""
    pace = Pace()
    assert pace.seconds(train_s=0, steps=0, steps_left=10, evaluations_left=2) == 0
    assert pace.seconds(train_s=10, steps=5, steps_left=20, evaluations_left=3) == 40
    pace.add(train_s=100, steps=50, val_s=30)
    assert pace == Pace(100, 50, 30, 1)
    assert pace.seconds(train_s=0, steps=0, steps_left=10, evaluations_left=2) == 10 * 2 + 2 * 30
    assert pace.seconds(train_s=200, steps=50, steps_left=10, evaluations_left=1) == 10 * 3 + 30
    pace.add(train_s=200, steps=50, val_s=10)
    assert pace.seconds(train_s=0, steps=0, steps_left=0, evaluations_left=5) == 5 * 20
