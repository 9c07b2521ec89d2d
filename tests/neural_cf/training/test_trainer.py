"""Training: the same bits from the same seed, resumed or not; when it stops, what it keeps, what it learns."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_training import STEPS, TRAIN, rows, run_of, same, weights
from torch.nn import functional

from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.data.batches import TrainingBatches
from neural_cf.model import NeuMF
from neural_cf.ranking.places import evaluate
from neural_cf.ranking.scorers import float_scorer
from neural_cf.runs.recorder import Recorder
from neural_cf.split import Split, load_split
from neural_cf.training import trainer
from neural_cf.training.step import Step
from neural_cf.training.trainer import Progress, Trainer

pytestmark = pytest.mark.usefixtures("in_empty_directory")


@pytest.fixture
def train(ncf, split_dir):
    """Trains on the tiny split, which must go well; returns what was printed."""

    def run(*arguments: object) -> str:
        outcome = ncf(split_dir, *arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return run


# --- the same bits ---


@pytest.mark.parametrize("flags", [[], ["--split-final"], ["-b", "100", "-n", "3"]])
def test_same_seed_gives_the_same_weights(train, flags):
    """Bit for bit, the optimizer's state included; another seed gives others."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(*TRAIN, *flags, "-s", seed, "-e", 2, "-o", name)
    first, second, other = (load_checkpoint(f"{name}/checkpoint.pth.tar") for name in "abc")
    assert same(first["state_dict"], second["state_dict"])
    assert same(first["optimizer_state_dict"], second["optimizer_state_dict"])
    assert not any(same(first["state_dict"][key], other["state_dict"][key]) for key in first["state_dict"])
    assert [(row["hr@10"], row["avg_train_loss"]) for row in rows("a")] == [
        (row["hr@10"], row["avg_train_loss"]) for row in rows("b")
    ]


def test_same_seed_gives_the_same_weights_on_several_threads(train):
    """With as many as asked for."""
    for name in "ab":
        train(*TRAIN, "-p", 2, "--max-steps", 5, "-o", name)
    assert same(weights("a"), weights("b"))


def test_logging_and_histograms_do_not_change_the_weights(train):
    """Watching is not taking part."""
    train(*TRAIN, "-e", 1, "-o", "plain")
    train(*TRAIN, "-e", 1, "--log-freq", 1, "--param-hist", "-k", 3, "-o", "watched")
    assert same(weights("plain"), weights("watched"))


def test_state_of_the_callers_generator_plays_no_part(train):
    """A run does not depend on what was drawn before it."""
    torch.manual_seed(99)
    np.random.seed(99)
    train(*TRAIN, "-e", 1, "-o", "a")
    torch.manual_seed(7)
    train(*TRAIN, "-e", 1, "-o", "b")
    assert same(weights("a"), weights("b"))


# --- going on ---


@pytest.mark.parametrize("parts", [[1], [STEPS], [STEPS - 1], [STEPS + 5], [10, 20, STEPS], [2 * STEPS]])
@pytest.mark.parametrize("flags", [[], ["--split-final"]])
def test_resumed_run_ends_in_the_weights_of_an_unbroken_one(train, parts, flags):
    """Stopped within an epoch, at its end, several times; the optimizer's state too."""
    train(*TRAIN, *flags, "-e", 3, "-o", "whole")
    train(*TRAIN, *flags, "-e", 3, "--max-steps", parts[0], "-o", "parts")
    for steps in parts[1:]:
        train("--resume", "--max-steps", steps, "-o", "parts")
    train("--resume", "-o", "parts")
    whole, resumed = (load_checkpoint(f"{name}/checkpoint.pth.tar") for name in ("whole", "parts"))
    assert same(whole["state_dict"], resumed["state_dict"])
    assert same(whole["optimizer_state_dict"], resumed["optimizer_state_dict"])
    assert whole["epoch"] == resumed["epoch"] == 2
    assert whole["hr"] == resumed["hr"]


def test_resume_after_whole_epochs_goes_on_to_more_of_them(train):
    """Two and two are four; the results file has all, the best of all is kept."""
    train(*TRAIN, "-e", 4, "-o", "whole")
    train(*TRAIN, "-e", 2, "-o", "parts")
    out = train("--resume", "-e", 4, "-o", "parts")
    assert re.findall(r"^Epoch (\d+):", out, re.MULTILINE) == ["2", "3"]
    assert same(weights("whole"), weights("parts"))
    assert same(weights("whole", "best.pth.tar"), weights("parts", "best.pth.tar"))
    assert [row["hr@10"] for row in rows("whole")] == [row["hr@10"] for row in rows("parts")]


def test_resume_takes_the_runs_own_settings(train):
    """Sizes, rate, batch size and seed need not be given again."""
    train("--layers", 8, 4, "-f", 3, "-b", 300, "-n", 2, "-l", 0.02, "-e", 2, "-o", "whole")
    seed = load_checkpoint("whole/checkpoint.pth.tar")["config"]["seed"]
    train(
        "--layers",
        8,
        4,
        "-f",
        3,
        "-b",
        300,
        "-n",
        2,
        "-l",
        0.02,
        "-e",
        2,
        "-s",
        seed,
        "--max-steps",
        7,
        "-o",
        "a",
    )
    train("--resume", "-o", "a")
    assert same(weights("whole"), weights("a"))


# --- when it stops ---


def test_training_stops_at_the_threshold(train):
    """After the first epoch whose HR reaches it."""
    train(*TRAIN, "-e", 5, "-o", "whole")
    hit_rates = [float(row["hr@10"]) for row in rows("whole")]
    threshold = sorted(hit_rates)[2]
    train(*TRAIN, "-e", 5, "-t", repr(threshold), "-o", "stopped")
    first = next(i for i, hit_rate in enumerate(hit_rates) if hit_rate >= threshold)
    assert [float(row["hr@10"]) for row in rows("stopped")] == hit_rates[: first + 1]
    train(*TRAIN, "-e", 2, "-t", 1, "-o", "never")
    assert len(rows("never")) == 2


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (STEPS, 1), (STEPS + 1, 2), (10 * STEPS, 3)])
def test_max_steps_stops_evaluates_and_saves(train, steps, epochs):
    """After so many steps of this run, or after its epochs where those are fewer."""
    out = train(*TRAIN, "-e", 3, "--max-steps", steps, "-o", "out")
    assert out.count("Epoch ") == epochs
    content = load_checkpoint("out/checkpoint.pth.tar")
    taken = {state["step"].item() for state in content["optimizer_state_dict"]["state"].values()}
    assert taken == {min(steps, 3 * STEPS)}
    assert Path("out/best.pth.tar").exists()


def test_average_loss_is_the_mean_over_samples(split_dir):
    """Of an epoch's batches as they come, the last and smaller one weighted by its size."""
    split = load_split(split_dir)
    torch.manual_seed(0)
    model = NeuMF(split.nb_users, split.nb_items, 4, [8, 4])
    batches = TrainingBatches(split, 3000, 4, seed=1)
    with torch.no_grad():
        losses = [
            functional.binary_cross_entropy_with_logits(
                model(batch.users, batch.items).squeeze(1), batch.labels, reduction="none"
            )[batch.weights > 0].sum()
            for batch in batches.epoch(0)
        ]
    # Weights stay, so that all batches meet the same ones.
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0))
    trainer = Trainer(run_of(split, epochs=1), step, batches, Recorder(Path(".")), {})
    trainer.train()
    expected = (sum(losses) / batches.nb_samples).item()
    assert float(rows(".")[0]["avg_train_loss"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("l2", [0.0, 10.0])
def test_a_step_is_adams_on_the_mean_cross_entropy_of_logits(train, split_dir, l2):
    """Two steps by hand, from the same initial weights, with the penalty on each sample's embeddings."""
    split = load_split(split_dir)
    train(*TRAIN, "--precision", "fp32", "--l2", l2, "--max-steps", 2, "-o", "out")
    torch.manual_seed(1)
    model = NeuMF(split.nb_users, split.nb_items, 4, [8, 6, 4])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _, batch in zip(range(2), TrainingBatches(split, 256, 4, 1).epoch(0), strict=False):
        scores = torch.sigmoid(model(batch.users, batch.items).squeeze(1))
        optimizer.zero_grad()
        (mf_users, mlp_users), (mf_items, mlp_items) = model.tables()
        mf = mf_users[batch.users].square() + mf_items[batch.items].square()
        mlp = mlp_users[batch.users].square().sum() + mlp_items[batch.items].square().sum()
        penalty = (mf * model.final.weight[0, :4].abs()).sum() + mlp
        loss = functional.binary_cross_entropy(scores, batch.labels) + l2 * penalty / len(scores)
        loss.backward()
        optimizer.step()
    for key, value in weights("out").items():
        # Where a gradient is rounding noise, Adam's step has its sign alone, and so up to the rate's size.
        close = torch.isclose(value, model.state_dict()[key], rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.97, key


# --- what it keeps ---


def test_best_checkpoint_is_the_epoch_with_the_highest_hr(split_dir, monkeypatch):
    """The first of those that tie; the last epoch's is the other one."""
    split = load_split(split_dir)
    model = NeuMF(split.nb_users, split.nb_items, 4, [8, 4])
    hits = iter([2, 5, 5, 4])
    after = []

    def rank(*_, **__):
        after.append({key: value.clone() for key, value in model.state_dict().items()})
        return torch.where(torch.arange(10) < next(hits), 1, 99)

    monkeypatch.setattr(trainer, "rank_test_items", rank)
    optimizer = torch.optim.Adam(model.parameters())
    batches = TrainingBatches(split, 2000, 4, seed=1)
    Trainer(run_of(split, epochs=4), Step(model, optimizer), batches, Recorder(Path(".")), {}).train()
    best, last = load_checkpoint("best.pth.tar"), load_checkpoint("checkpoint.pth.tar")
    assert (best["epoch"], best["hr"], best["ndcg"]) == (1, 0.5, pytest.approx(0.5 / math.log2(3)))
    assert same(dict(best["state_dict"]), after[1])
    assert (last["epoch"], last["hr"]) == (3, 0.4)
    assert same(dict(last["state_dict"]), after[3])


def test_resumed_run_keeps_the_best_of_before(train, split_dir, monkeypatch):
    """Worse epochs after a resume do not replace it."""
    train(*TRAIN, "-e", 1, "-o", "out")
    best = Path("out/best.pth.tar").read_bytes()
    monkeypatch.setattr(trainer, "rank_test_items", lambda *_, **__: torch.arange(100) * 10 + 9)
    train("--resume", "-e", 3, "-o", "out")
    assert Path("out/best.pth.tar").read_bytes() == best


def test_checkpoints_describe_themselves(split_dir, run_dir):
    """Read by PyTorch's safe loader with nothing allowed: weights, sizes, settings, metrics, data."""
    content = torch.load(run_dir / "checkpoint.pth.tar", weights_only=True)
    assert {"state_dict", "optimizer_state_dict", "epoch", "k", "hr", "ndcg", "config", "data_digest"} <= set(
        content
    )
    assert (content["epoch"], content["k"]) == (1, 10)
    assert content["data_digest"] == load_split(split_dir).digest
    assert 0 <= content["ndcg"] <= content["hr"] <= 1
    expected = {
        "nb_users": 60,
        "nb_items": 80,
        "factors": 4,
        "layers": [8, 6, 4],
        "split_final": False,
        "seed": 1,
        "learning_rate": 0.01,
        "batch_size": 256,
    }
    assert {key: content["config"][key] for key in expected} == expected
    assert all(torch.is_tensor(value) for value in content["state_dict"].values())
    last = rows(str(run_dir))[-1]
    assert (float(last["hr@10"]), float(last["ndcg@10"])) == (content["hr"], content["ndcg"])


# --- a loss that is no number ---


def assert_diverged(outcome, epoch: int, *parts: object) -> None:
    """One line that names epoch, step and the last good checkpoint; no traceback."""
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    last = outcome.err.rstrip("\n").split("\n")[-1]
    assert last.startswith("ncf.py: error: ")
    assert re.search(rf"epoch {epoch}\b.*step \d+", last)
    for part in parts:
        assert str(part) in last


@pytest.mark.parametrize("flags", [[], ["--log-freq", "7"], ["--log-freq", "100000"]])
def test_loss_that_is_not_finite_stops_the_run(ncf, split_dir, flags):
    """In the first epoch there is no good checkpoint, and none is written."""
    outcome = ncf(split_dir, *TRAIN, "-l", 1e30, "-e", 3, *flags, "-o", "out")
    assert_diverged(outcome, 0, "none")
    assert not list(Path("out").glob("*.tar"))


def test_loss_that_is_not_finite_later_names_the_last_good_checkpoint(ncf, split_dir, run_dir):
    """Which is left as it was."""
    shutil.copytree(run_dir, "out")
    before = {path.name: path.read_bytes() for path in Path("out").glob("*.tar")}
    outcome = ncf(split_dir, "--resume", "-l", 1e30, "-e", 4, "-o", "out")
    assert_diverged(outcome, 2, Path("out/checkpoint.pth.tar"))
    assert {path.name: path.read_bytes() for path in Path("out").glob("*.tar")} == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_single_loss_that_is_not_finite_is_not_missed(split_dir, monkeypatch, value):
    """In the middle of an epoch, between two updates of the progress bar."""
    split = load_split(split_dir)
    model = NeuMF(split.nb_users, split.nb_items, 4, [8, 4])
    batches = TrainingBatches(split, 256, 4, seed=1)
    optimizer = torch.optim.Adam(model.parameters())
    trainer = Trainer(
        run_of(split, epochs=2), Step(model, optimizer), batches, Recorder(Path(".")), {}, progress=Progress()
    )
    step, taken = Step.__call__, []

    def poisoned(self, batch):
        taken.append(1)
        loss = step(self, batch)
        return loss * value if len(taken) == 17 else loss

    monkeypatch.setattr(Step, "__call__", poisoned)
    with pytest.raises(InputError, match="epoch 0, step 17;"):
        trainer.train()
    assert not list(Path(".").glob("*.tar"))


# --- what it learns ---


def two_communities() -> Split:
    """Users and items in two halves; users rate 25 of the 40 items of their own half, and nothing else."""
    random = np.random.default_rng(0)
    train_users, train_items, test_items, negatives = [], [], [], []
    for user in range(60):
        own = random.permutation(40) + 40 * (user % 2)
        train_users += [user] * 24
        train_items += own[:24].tolist()
        test_items.append(own[24])
        # Against it: 6 items of the own half that were not rated, and 34 of the other one.
        other = random.permutation(40)[:34] + 40 * (1 - user % 2)
        negatives.append(np.concatenate([own[25:31], other]))
    return Split(
        nb_users=60,
        nb_items=80,
        train_users=np.array(train_users, dtype=np.uint8),
        train_items=np.array(train_items, dtype=np.uint8),
        test_items=np.array(test_items, dtype=np.uint8),
        negatives=np.array(negatives, dtype=np.uint8),
        distinct_negatives=True,
        seed=0,
        digest="",
        user_ids=None,
        item_ids=None,
    )


@pytest.mark.parametrize("split_final", [False, True])
def test_known_structure_is_learned(split_final):
    """The held-out item is among 7 of the own half: HR@10 goes from chance, 10 of 41, to nearly 1."""
    split = two_communities()
    torch.manual_seed(0)
    model = NeuMF(split.nb_users, split.nb_items, 4, [16, 8], split_final)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batches = TrainingBatches(split, 128, 4, seed=1)
    before = evaluate(float_scorer(model), split).hr
    Trainer(run_of(split, epochs=12), Step(model, optimizer), batches, Recorder(Path(".")), {}).train()
    results = rows(".")
    losses = [float(row["avg_train_loss"]) for row in results]
    assert before < 0.5
    assert float(results[-1]["hr@10"]) > 0.95
    assert losses[0] > losses[3] > losses[-1]
    # Of the own half's samples 24 in 51.4 are positives: who knows the halves and no more has a loss of 0.296.
    assert 0.1 < losses[-1] < 0.31


def test_training_teaches_only_the_users_and_items_it_meets(split_dir):
    """An embedding of an item that no batch holds stays as it was at first."""
    split = two_communities()
    parts = {"train_users": split.train_users % 60, "nb_items": 81}
    split = Split(**vars(split) | parts)
    torch.manual_seed(0)
    model = NeuMF(60, 81, 4, [8, 4])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = TrainingBatches(split, 128, 4, seed=1)
    seen = {int(item) for batch in batches.epoch(0) for item in batch.items}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    Trainer(run_of(split, epochs=1), Step(model, optimizer), batches, Recorder(Path(".")), {}).train()
    changed = (model.mf_item_embed.weight != before["mf_item_embed.weight"]).any(1).nonzero().flatten()
    assert set(changed.tolist()) <= seen
    assert len(changed) > 70
