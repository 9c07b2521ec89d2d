"""--patience: training ends so many epochs after the best one, in one go or resumed, and says which one it was."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import call
from helpers_training import TRAIN, rows, run_of, same, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.untrusted.checkpoint import load_checkpoint, save_checkpoint
from neural_cf.commands import evaluate, train
from neural_cf.data.batches import TrainingBatches
from neural_cf.model import NeuMF
from neural_cf.split import Split, load_split
from neural_cf.training import trainer
from neural_cf.training.step import Step
from neural_cf.training.trainer import Progress, Trainer

QUICK = [*TRAIN, "-b", "2000"]
STEPS = 5  # 9700 samples in batches of 2000

pytestmark = pytest.mark.usefixtures("in_empty_directory")


def set_hits(monkeypatch: pytest.MonkeyPatch, hits: Iterable[int]) -> list[int]:
    """Make the evaluations give these tenths as HR@10, one after another; return what is left of them."""
    left = list(hits)
    monkeypatch.setattr(
        trainer, "rank_test_items", lambda *_, **__: torch.where(torch.arange(10) < left.pop(0), 0, 99)
    )
    return left


@pytest.fixture
def hits(monkeypatch):
    """Says what the evaluations to come will give."""
    return lambda *tenths: set_hits(monkeypatch, tenths)


@pytest.fixture
def lines(ncf, split_dir):
    """Calls ncf.py on the tiny split, which must go well; returns the lines that it printed."""

    def run(*arguments: object) -> list[str]:
        outcome = ncf(split_dir, *arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out.splitlines()

    return run


def epochs(lines: list[str]) -> list[int]:
    """Return the epochs that were trained, by the lines of a run."""
    return [int(line.split()[1][:-1]) for line in lines if re.match(r"Epoch \d+: ", line)]


def progress(name: str) -> tuple[int, int, float]:
    """Return a checkpoint's epochs, its best one and the HR of that."""
    found = load_checkpoint(Path(name))["progress"]
    return found["epoch"], found["best_epoch"], found["best_hr"]


# --- in one go ---


@pytest.mark.parametrize(
    ("patience", "tenths", "trained", "best", "rate"),
    [
        (1, [5, 4], 2, 0, "0.5000"),
        (1, [2, 3, 4, 4], 4, 2, "0.4000"),
        (2, [2, 5, 4, 5], 4, 1, "0.5000"),  # one that is as good is not better
        (3, [0, 0, 0, 0], 4, 0, "0.0000"),
        (2, [5, 4, 6, 5, 7, 1, 2], 7, 4, "0.7000"),
    ],
)
def test_training_stops_so_many_epochs_after_the_best(lines, hits, patience, tenths, trained, best, rate):
    """And not at the twentieth. The last two lines say why, and which one was the best."""
    left = hits(*tenths, 9, 9)
    out = lines(*QUICK, "-e", 20, "--patience", patience, "-o", "out")
    assert epochs(out) == list(range(trained))
    assert left == [9, 9]
    assert out[-2] == f"No epoch has been better for {patience} epochs"
    assert out[-1] == f"Best: epoch {best}, HR@10 = {rate}, in out/best.pth.tar"
    assert len(rows("out")) == trained
    content = load_checkpoint(Path("out/best.pth.tar"))
    assert (content["epoch"], f"{content['hr']:.4f}") == (best, rate)


def test_best_epoch_is_in_the_checkpoints(lines, hits):
    """In the last one, and in the best one as it was then."""
    hits(2, 5, 4, 4)
    lines(*QUICK, "-e", 20, "--patience", 2, "-o", "out")
    assert progress("out/checkpoint.pth.tar") == (4, 1, 0.5)
    assert progress("out/best.pth.tar") == (2, 1, 0.5)


def test_without_patience_all_epochs_are_trained(lines, hits):
    """The line of the best one ends any training."""
    hits(5, 4, 3, 2)
    out = lines(*QUICK, "-e", 4, "-o", "out")
    assert epochs(out) == [0, 1, 2, 3]
    assert out[-1] == "Best: epoch 0, HR@10 = 0.5000, in out/best.pth.tar"
    assert not any("better" in line for line in out)


def test_epochs_that_are_done_before_patience_ends_are_the_end(lines, hits):
    """As without it."""
    hits(5, 4, 3)
    out = lines(*QUICK, "-e", 3, "--patience", 3, "-o", "out")
    assert epochs(out) == [0, 1, 2]
    assert not any("better" in line for line in out)


def test_patience_does_not_change_the_weights(lines):
    """What was trained is what a run of so many epochs has."""
    out = lines(*QUICK, "-e", 30, "--patience", 1, "-o", "stopped")
    count = len(epochs(out))
    assert count < 30
    lines(*QUICK, "-e", count, "-o", "whole")
    assert same(weights("stopped"), weights("whole"))


def test_first_of_several_cutoffs_decides(lines, monkeypatch):
    """At place 3 an item is a hit of HR@10 and none of HR@1."""
    ranks = [[0, 3], [3, 3], [3, 3]]
    monkeypatch.setattr(trainer, "rank_test_items", lambda *_, **__: torch.tensor(ranks.pop(0)))
    out = lines(*QUICK, "-k", 1, 10, "-e", 9, "--patience", 2, "-o", "out")
    assert out[-1] == "Best: epoch 0, HR@1 = 0.5000, in out/best.pth.tar"


def test_joined_branches_can_be_the_best(lines, hits):
    """They come before the first epoch, so that one epoch that is no better ends a patience of one."""
    hits(3, 4, 9, 8)  # GMF's, the MLP's, both joined, the first epoch's
    out = lines(*QUICK, "--pretrain", 1, 1, "-e", 9, "--patience", 1, "-o", "out")
    assert out[-2:] == [
        "No epoch has been better for 1 epochs",
        "Best: as joined, HR@10 = 0.9000, in out/best.pth.tar",
    ]
    assert progress("out/checkpoint.pth.tar") == (1, -1, 0.9)


def test_patience_leaves_the_branches_alone(lines, hits):
    """Each is trained to its end."""
    hits(5, 4, 3, 5, 4, 3, 6, 5)
    out = lines(*QUICK, "--pretrain", 3, 3, "-e", 9, "--patience", 1, "-o", "out")
    assert epochs(out) == [0, 1, 2, 0, 1, 2, 0]


# --- resumed ---


def test_resumed_run_counts_on(lines, hits):
    """From the best epoch of before, with the patience it was begun with."""
    hits(5, 4)
    lines(*QUICK, "-e", 2, "--patience", 3, "-o", "out")
    left = hits(4, 3, 9)
    out = lines("--resume", "-e", 20, "-o", "out")
    assert epochs(out) == [2, 3]
    assert left == [9]
    assert out[-1] == "Best: epoch 0, HR@10 = 0.5000, in out/best.pth.tar"
    assert progress("out/checkpoint.pth.tar") == (4, 0, 0.5)


def test_resumed_run_that_gets_better_begins_to_count_again(lines, hits):
    hits(5, 4)
    lines(*QUICK, "-e", 2, "--patience", 2, "-o", "out")
    hits(6, 5, 5, 9)
    out = lines("--resume", "-e", 20, "-o", "out")
    assert epochs(out) == [2, 3, 4]
    assert out[-1] == "Best: epoch 2, HR@10 = 0.6000, in out/best.pth.tar"


def test_run_stopped_within_an_epoch_counts_whole_epochs(lines, hits):
    """The evaluation of two steps of the second epoch is not an epoch without success."""
    hits(5, 4)
    out = lines(*QUICK, "-e", 20, "--patience", 2, "--max-steps", STEPS + 2, "-o", "out")
    assert not any("better" in line for line in out)
    hits(4, 4, 9)
    out = lines("--resume", "-o", "out")
    assert epochs(out) == [1, 2]
    assert out[-1] == "Best: epoch 0, HR@10 = 0.5000, in out/best.pth.tar"


def test_run_out_of_patience_trains_no_more(lines, hits, contents):
    """However often it is resumed; checkpoints and results stay as they are."""
    hits(5, 4, 3)
    lines(*QUICK, "-e", 20, "--patience", 2, "-o", "out")
    before = {name: data for name, data in contents(Path("out")).items() if name.endswith((".tar", ".csv"))}
    for _ in range(2):
        left = hits(9, 9)
        out = lines("--resume", "-o", "out")
        assert epochs(out) == []
        assert left == [9, 9]
        assert out[-1] == "Best: epoch 0, HR@10 = 0.5000, in out/best.pth.tar"
    after = contents(Path("out"))
    assert before == {name: after[name] for name in before}
    assert len(before) == 3


def test_more_patience_goes_on(lines, hits):
    hits(5, 4, 3)
    lines(*QUICK, "-e", 20, "--patience", 2, "-o", "out")
    hits(3, 2, 9)
    assert epochs(lines("--resume", "--patience", 4, "-o", "out")) == [3, 4]


def test_run_of_before_there_was_patience_counts_from_where_it_is_resumed(lines, hits):
    """Its checkpoint has the best HR, and not which epoch's it was."""
    hits(5, 4)
    lines(*QUICK, "-e", 2, "-o", "out")
    path = Path("out/checkpoint.pth.tar")
    content = load_checkpoint(path)
    del content["progress"]["best_epoch"]
    save_checkpoint(path, content)
    hits(4, 3, 9)
    out = lines("--resume", "-e", 20, "--patience", 2, "-o", "out")
    assert epochs(out) == [2, 3]
    assert out[-1] == "Best: HR@10 = 0.5000, in out/best.pth.tar"


def test_new_run_from_a_checkpoint_forgets_its_best(lines, hits, checkpoint):
    """It has no best.pth.tar of its own before its first epoch, which is the checkpoint's third."""
    hits(1, 0, 9)
    out = lines("--load", checkpoint, "-b", 2000, "-s", 1, "-e", 20, "--patience", 1, "-o", "out")
    assert epochs(out) == [2, 3]
    assert out[-1] == "Best: epoch 2, HR@10 = 0.1000, in out/best.pth.tar"


def test_validated_run_out_of_patience_is_tested_once_more(lines, hits):
    """By the best epoch; the test items play no part in the choice."""
    hits(5, 4)
    out = lines(*QUICK, "--validate", "-e", 20, "--patience", 1, "-o", "out")
    assert out[-2] == "Best: epoch 0, HR@10 = 0.5000, in out/best.pth.tar"
    assert out[-1].startswith("Test, by epoch 0: HR@10 = ")


# --- against a plain reference ---


class Still(Step):
    """Steps that take no time and change nothing."""

    def __call__(self, batch: object) -> torch.Tensor:
        return torch.tensor(0.5)


def stops_after(tenths: list[int], patience: int, epochs: int) -> tuple[int, int]:
    """Return after how many epochs training is to stop, and the best one of these, by a plain loop."""
    best = 0
    for epoch in range(epochs):
        if tenths[epoch] > tenths[best]:
            best = epoch
        if epoch - best >= patience:
            return epoch + 1, best
    return epochs, best


def trained(split: Split, own: Progress, **settings: int) -> Progress:
    """Train without doing anything, from ``own`` on; return the progress at the end."""
    torch.manual_seed(0)
    model = NeuMF(split.nb_users, split.nb_items, 1, [2, 1])
    batches = TrainingBatches(split, 10_000, 4, seed=1)
    still = Still(model, torch.optim.Adam(model.parameters()))
    training = Trainer(run_of(split, **settings), still, batches, None, {}, progress=own)
    training.train()
    assert training.finished
    return training.progress


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    tenths=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    patience=st.integers(1, 4),
    before=st.integers(1, 8),
)
def test_any_course_ends_where_a_plain_loop_ends_it(split_dir, tenths, patience, before):
    """In one go, and stopped after ``before`` epochs and resumed."""
    split = load_split(split_dir)
    expected = stops_after(tenths, patience, 8)
    with pytest.MonkeyPatch.context() as patch:
        left = set_hits(patch, tenths)
        whole = trained(split, Progress(), epochs=8, patience=patience)
        assert (whole.epoch, whole.best_epoch) == expected
        assert len(left) == 8 - expected[0]
        left[:] = tenths
        part = trained(split, Progress(), epochs=before, patience=patience)
        assert trained(split, part, epochs=8, patience=patience) == whole


# --- refused ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--patience", 0], "--patience must be from 1 to 2147483648, not 0"),
        (["--patience", -1], "--patience must be from 1 to 2147483648, not -1"),
        (["--patience", "x"], "argument --patience: invalid int value: 'x'"),
        (
            ["--load", "x", "--evaluate", "--patience", 2],
            "--patience is for training, which --evaluate does not do",
        ),
        (
            ["--load", "x", "--qe-auto", "--patience", 2],
            "--patience is for training, which --qe-auto does not do",
        ),
    ],
)
def test_patience_is_refused(ncf, split_dir, line, message):
    """Out of its range, and where nothing is trained."""
    outcome = ncf(split_dir, *line, "-o", "out")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"ncf.py: error: {message}\n")
    assert not Path("out").exists()


def test_patience_is_a_flag_of_train_and_none_of_evaluate(split_dir, checkpoint, hits):
    hits(5, 4)
    command = (split_dir, *QUICK, "-e", 9, "--patience", 1, "-o", "out")
    outcome = call("neural-cf train", train.main, command)
    assert outcome.out.splitlines()[-1] == "Best: epoch 0, HR@10 = 0.5000, in out/best.pth.tar"
    outcome = call("neural-cf evaluate", evaluate.main, (split_dir, "--load", checkpoint, "--patience", 1))
    assert (outcome.code, outcome.err) == (
        2,
        "neural-cf evaluate: error: unrecognized arguments: --patience 1\n",
    )


@pytest.mark.parametrize("value", [2, -2, True, 0.0, "0"])
def test_checkpoint_with_a_best_epoch_that_never_was_is_refused(ncf, split_dir, run_dir, value):
    """In one line that names the file; the run is left as it was."""
    shutil.copytree(run_dir, "out")
    path = Path("out/checkpoint.pth.tar")
    content = load_checkpoint(path)
    content["progress"] |= {"epoch": 1, "best_epoch": value}
    save_checkpoint(path, content)
    before = path.read_bytes()
    outcome = ncf(split_dir, "--resume", "-e", 5, "--patience", 1, "-o", "out")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert str(path) in outcome.err
    assert path.read_bytes() == before
