"""Choosing how to quantize: by some users alone, from the cheapest setting on, within the budget."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from distiller.calibration import collect_quant_stats
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf import model as neumf
from neural_cf.int8.engine import IntegerNeuMF
from neural_cf.int8.search import Chooser, Estimate, Trial, calibration_lists, nb_calibration_users
from neural_cf.model import NeuMF
from neural_cf.ranking.candidates import score_all
from neural_cf.ranking.metrics import Metrics, metrics_of_ranks
from neural_cf.split import Split, load_split

pytestmark = pytest.mark.usefixtures("in_empty_directory")


@pytest.fixture
def split(split_dir) -> Split:
    return load_split(split_dir)


@pytest.fixture
def chooser(split, checkpoint) -> Chooser:
    weights = load_checkpoint(checkpoint)["state_dict"]
    models = {}
    for split_final in (False, True):
        sizes = neumf.sizes_from_state_dict(weights) | {"split_final": split_final}
        models[split_final] = NeuMF(**sizes).eval().requires_grad_(False)
        models[split_final].load_state_dict(neumf.with_final_layer(weights, split_final))
    calibrate = partial(score_all, split=split, nb_users=nb_calibration_users(split))
    statistics = {key: collect_quant_stats(model, calibrate) for key, model in models.items()}
    return Chooser(models, statistics, calibration_lists(split, 0), 10, torch.device("cpu"))


# --- who chooses ---


@pytest.mark.parametrize(("nb_users", "expected"), [(1, 1), (2, 1), (60, 12), (6040, 1208), (138_493, 2000)])
def test_how_many_users_choose(split, nb_users, expected):
    assert nb_calibration_users(replace(split, nb_users=nb_users)) == expected


def test_lists_are_the_users_own_and_fresh_ones(split):
    """Never of items that she trained on; the same again from the same seed."""
    lists, again, other = (calibration_lists(split, seed) for seed in (1, 1, 2))
    assert [users.nb_users for users in lists] == [12] * 5
    assert np.array_equal(lists[0].negatives[:12], split.negatives[:12])
    trained = set(zip(split.train_users.tolist(), split.train_items.tolist(), strict=True))
    for number, users in enumerate(lists[1:], 1):
        assert np.array_equal(users.negatives, again[number].negatives)
        assert not np.array_equal(users.negatives, other[number].negatives)
        assert not np.array_equal(users.negatives, lists[number - 1].negatives)
        assert not trained.intersection(
            (user, item) for user, row in enumerate(users.negatives.tolist()) for item in row
        )


def test_nothing_of_the_other_users_is_looked_at(split):
    """Neither their candidates nor their test items."""
    changed = replace(
        split,
        negatives=np.concatenate([split.negatives[:12], split.negatives[12:][::-1]]),
        test_items=np.concatenate([split.test_items[:12], split.test_items[12:][::-1]]),
    )
    for one, two in zip(calibration_lists(split, 3), calibration_lists(changed, 3), strict=True):
        assert one.nb_users == two.nb_users == 12
        assert np.array_equal(one.negatives[:12], two.negatives[:12])
        assert np.array_equal(one.test_items[:12], two.test_items[:12])


# --- what is tried ---


def test_settings_go_from_cheap_to_dear(chooser):
    """All in 8 bits; then 12 bits where they cost no product; then out of one hidden layer after another."""
    names, kinds = [], []
    for setting in chooser.settings():
        quantizer = chooser.quantizer(setting)
        bits = {name: entry.get("bits_activations") for name, entry in quantizer.describe().items()}
        names.append(setting.name)
        kinds.append({name for name, of_layer in bits.items() if of_layer == 12})
        assert quantizer.describe()["mf_user_embed"]["bits_weights"] == 8
        assert hasattr(quantizer.model, "final_add") == setting.split_final
        IntegerNeuMF(quantizer.model)  # or it raises
    assert kinds[:3] == [set(), set(), set()]
    assert kinds[3] == {"mlp_concat", "mf_mult", "mlp.1"}
    assert kinds[4:] == [{"mlp_concat", "mf_mult", "mlp.1", "mlp.0"}]
    assert len(set(names)) == len(names) == 5


def test_every_layer_has_the_clip_mode_of_least_error(chooser):
    """A far value in the statistics of one is cut off."""
    entry = chooser.statistics[False]["mlp.0"]["output"]
    counts = entry["histogram"]["counts"].split()
    width = (entry["max"] - entry["min"]) / len(counts)
    entry["histogram"]["counts"] = " ".join([*counts, *["0"] * 99 * len(counts), "1"])
    entry["max"] = entry["histogram"]["max"] = entry["min"] + width * (100 * len(counts) + 1)
    setting = next(chooser.settings())
    quantizer = chooser.quantizer(setting)
    assert quantizer.describe()["mlp.0"]["clip_acts"] != "none"
    scale = quantizer.model.mlp[0].fixed_output.scale
    assert 255 / scale.min() < entry["max"] / 10


def test_trying_ends_with_the_first_within_the_budget(chooser):
    assert len(list(chooser.choose(100.0))) == 1
    trials = list(chooser.choose(-100.0))
    assert len(trials) == len(list(chooser.settings()))


def test_losses_are_those_of_the_lists(chooser):
    trial = next(chooser.choose(100.0))
    assert trial.hr_loss.mean == pytest.approx(100 * (chooser.in_float.hr - trial.metrics.hr), abs=1e-9)
    assert trial.ndcg_loss.mean == pytest.approx(100 * (chooser.in_float.ndcg - trial.metrics.ndcg), abs=1e-9)


@pytest.mark.parametrize(
    ("hr", "ndcg", "expected"),
    [((0.2, 0.15), (0.02, 0.02), 0.05), ((0.2, 0.15), (0.03, 0.04), 0.07), ((-0.1, 0.1), (-0.3, 0.2), -0.1)],
)
def test_what_counts_against_the_budget(hr, ndcg, expected):
    """NDCG's loss with its standard error, and HR's beyond its own."""
    trial = Trial(None, Metrics(10, 0.5, 0.25, 0.2), Estimate(*hr), Estimate(*ndcg), True)
    assert trial.loss == pytest.approx(expected)


# --- the command line ---


def test_choice_is_left_as_files_and_reported_on_the_other_users(ncf, split, split_dir, checkpoint):
    """What it prints is of the ranks that it leaves, and its configuration file gives these again."""
    outcome = ncf(split_dir, "--load", checkpoint, "--qe-auto", "-s", 1, "-o", "a")
    assert outcome.code == 0, outcome.err
    ranks = np.load("a/ranks.npy")
    assert len(ranks) == split.nb_users
    others = metrics_of_ranks(torch.from_numpy(ranks[12:]), 10)
    assert f"The other 48 users, quantized: {others}" in outcome.out
    again = ncf(split_dir, "--load", checkpoint, "--evaluate", "--quantize-eval", *CONFIG, "-o", "b")
    assert again.code == 0, again.err
    assert np.array_equal(np.load("b/ranks.npy"), ranks)
    assert ncf(split_dir, "--load", "a/quantized.pth.tar", "--evaluate", "-o", "c").code == 0
    assert np.array_equal(np.load("c/ranks.npy"), ranks)


CONFIG = ["--qe-config-file", "a/quant_auto.yaml"]


def test_the_same_choice_again(ncf, split_dir, checkpoint):
    """From one seed, to the last digit."""
    for out in ("a", "b"):
        assert ncf(split_dir, "--load", checkpoint, "--qe-auto", "-s", 1, "-o", out).code == 0
    a, b = (Path(out, "quant_auto.yaml").read_text().replace(f"/{out}/", "/") for out in ("a", "b"))
    assert a == b


def test_where_nothing_is_within_the_budget(ncf, split_dir, checkpoint, monkeypatch):
    """What loses least, with a warning."""
    losses = iter([3.0, 5.0, 2.0, 4.0, 2.5])

    def worse(self, setting):
        loss = Estimate(next(losses), 0.0)
        return Trial(setting, Metrics(10, 0.5, 0.25, 0.2), loss, loss, True)

    monkeypatch.setattr(Chooser, "_try", worse)
    outcome = ncf(split_dir, "--load", checkpoint, "--qe-auto", "--qe-max-loss", 1, "-o", "a")
    assert outcome.code == 0
    assert "--qe-max-loss 1: " in outcome.err
    assert "Chosen: split final layer" in outcome.out
    assert yaml.safe_load(Path("a/quant_auto.yaml").read_text())["split_final"] is True
    ranks = np.load("a/ranks.npy")
    again = ncf(split_dir, "--load", checkpoint, "--evaluate", "--quantize-eval", *CONFIG, "-o", "b")
    assert again.code == 0
    assert np.array_equal(np.load("b/ranks.npy"), ranks)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--qe-auto", "--quantize-eval"], "--qe-auto"),
        (["--qe-auto", "--evaluate"], "--qe-auto"),
        (["--qe-auto", "--qe-calibration", "0.1"], "--qe-auto"),
        (["--qe-auto", "--split-final"], "--split-final"),
        (["--qe-auto", "--qem", "sym"], "--qe-mode"),
        (["--qe-auto", "--qe-max-loss", "-1"], "--qe-max-loss"),
        (["--qe-auto", "--qe-max-loss", "nan"], "--qe-max-loss"),
        (["--qe-auto", "--precision", "bf16"], "--precision"),
        (["--qe-auto", "-e", "3", "--resume"], "--resume"),
        (["--qe-max-loss", "1", "--evaluate"], "--qe-max-loss"),
    ],
)
def test_what_does_not_go_together(ncf, split_dir, checkpoint, flags, name):
    outcome = ncf(split_dir, "--load", checkpoint, *flags, "-o", "a")
    assert outcome.code == 2
    (error,) = outcome.err.splitlines()
    assert re.match(f"ncf.py: error: .*{name}", error)
    assert not Path("a").exists()


def test_choosing_needs_a_model(ncf, split_dir):
    outcome = ncf(split_dir, "--qe-auto", "-o", "a")
    assert outcome.code == 2
    assert outcome.err == "ncf.py: error: --qe-auto needs --load: a checkpoint\n"


def test_a_quantized_model_has_nothing_to_choose(ncf, split_dir, checkpoint):
    assert ncf(split_dir, "--load", checkpoint, "--quantize-eval", "--qe-dynamic", "-o", "a").code == 0
    outcome = ncf(split_dir, "--load", "a/quantized.pth.tar", "--qe-auto", "-o", "b")
    assert outcome.code == 2
    assert outcome.err.startswith("ncf.py: error: --load: a/quantized.pth.tar is a quantized model")


@pytest.mark.parametrize("value", ["yes please", 1, [True]])
def test_a_configuration_file_says_whether_to_split_in_one_word(ncf, split_dir, checkpoint, value):
    content = {"quantizers": {"q": {"class": "PostTrainLinearQuantizer"}}, "split_final": value}
    Path("config.yaml").write_text(yaml.safe_dump(content))
    flags = ["--evaluate", "--quantize-eval", "--qe-config-file", "config.yaml"]
    outcome = ncf(split_dir, "--load", checkpoint, *flags, "-o", "a")
    assert outcome.code == 2
    (error,) = outcome.err.splitlines()
    assert error.startswith("ncf.py: error: --qe-config-file: config.yaml: split_final")
