"""-k with several numbers and --ranking, as a user types them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from neural_cf.ranking.metrics import describe, metrics_of_ranks
from neural_cf.split import load_split

pytestmark = pytest.mark.usefixtures("in_empty_directory")

TRAIN = ["--layers", "8", "6", "4", "-f", "4", "-s", "1", "-l", "0.01", "--no-compile"]


def test_several_cutoffs_are_printed_and_recorded(ncf, split_dir):
    """HR, NDCG and MRR of each, the first one first; the best epoch and the checkpoint go by it."""
    outcome = ncf(split_dir, *TRAIN, "-e", 2, "-k", 5, 1, 20, "-o", "out")
    assert outcome.code == 0, outcome.err
    line = outcome.out.splitlines()[1]
    found = re.findall(r"(\w+@\d+) = ", line)
    assert found == [f"{name}@{k}" for k in (5, 1, 20) for name in ("HR", "NDCG", "MRR")]
    with open("out/valid_results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [name for name in rows[0] if "@" in name] == [name.lower() for name in found]
    config = json.loads(Path("out/config.json").read_text())
    assert (config["topk"], config["cutoffs"]) == (5, [5, 1, 20])
    best = torch.load("out/best.pth.tar", weights_only=True)
    assert (best["k"], best["hr"]) == (5, max(float(row["hr@5"]) for row in rows))


@pytest.mark.parametrize("ranking", ["sampled", "full"])
def test_evaluation_at_several_cutoffs_is_that_of_its_ranks(ncf, split_dir, checkpoint, ranking):
    """In both ways of ranking."""
    load = ["--load", checkpoint, "--evaluate", "--ranking", ranking]
    outcome = ncf(split_dir, *load, "-k", 1, 5, 10, "-o", "out")
    assert outcome.code == 0, outcome.err
    ranks = torch.from_numpy(np.load("out/ranks.npy"))
    assert outcome.out.startswith(f"{describe([metrics_of_ranks(ranks, k) for k in (1, 5, 10)])}, ")


def test_full_ranking_is_harder_and_of_all_items(ncf, split_dir, checkpoint):
    """Against more than the negatives: no rank is better."""
    split, ranks = load_split(split_dir), {}
    for ranking in ("sampled", "full"):
        flags = ["--evaluate", "--ranking", ranking, "-o", ranking]
        assert ncf(split_dir, "--load", checkpoint, *flags).code == 0
        ranks[ranking] = np.load(f"{ranking}/ranks.npy")
    assert (ranks["full"] >= ranks["sampled"]).all()
    assert ranks["full"].max() > split.nb_candidates


@pytest.mark.parametrize("flags", [[], ["--split-final"], ["--qe-dynamic"], ["--qe-engine", "simulate"]])
def test_quantized_models_rank_in_full(quantize_eval, split_dir, flags):
    """In integers, simulated and with ranges of each batch; the file that they leave ranks alike."""
    assert quantize_eval(flags, "a", "--ranking", "full").code == 0
    ranks = np.load("a/ranks.npy")
    assert len(ranks) == load_split(split_dir).nb_users


def test_integers_rank_in_full_as_their_simulation_does(quantize_eval):
    """To the bit."""
    for engine in ("integer", "simulate"):
        assert quantize_eval([], engine, "--ranking", "full", "--qe-engine", engine).code == 0
    assert np.array_equal(np.load("integer/ranks.npy"), np.load("simulate/ranks.npy"))


def test_training_ranks_in_full(ncf, split_dir):
    """What it prints is what an evaluation of its last model finds."""
    trained = ncf(split_dir, *TRAIN, "-e", 1, "--ranking", "full", "-o", "out")
    assert trained.code == 0, trained.err
    load = ["--load", "out/checkpoint.pth.tar", "--evaluate", "--ranking", "full"]
    metrics = re.search(r"HR@10 = [\d.]+, NDCG@10 = [\d.]+", ncf(split_dir, *load, "-o", "again").out)[0]
    assert metrics in trained.out


def test_resumed_run_keeps_its_metrics(ncf, split_dir):
    """Its epochs compare; a run from before there were several goes on as it began."""
    assert ncf(split_dir, *TRAIN, "-e", 1, "-k", 5, 10, "-o", "out").code == 0
    for flags, name in ((["-k", 5], "-k/--topk"), (["--ranking", "full"], "--ranking")):
        outcome = ncf(split_dir, "--resume", "-e", 2, *flags, "-o", "out")
        assert outcome.code == 2
        assert name in outcome.err
    assert "MRR@10" in ncf(split_dir, "--resume", "-e", 2, "-o", "out").out


def test_run_of_one_cutoff_from_before_there_were_several_resumes(ncf, split_dir):
    """Its configuration and checkpoint have no list."""
    assert ncf(split_dir, *TRAIN, "-e", 1, "-k", 5, "-o", "out").code == 0
    config = json.loads(Path("out/config.json").read_text())
    content = torch.load("out/checkpoint.pth.tar", weights_only=True)
    for settings in (config, content["config"]):
        del settings["cutoffs"], settings["ranking"]
    with open("out/config.json", "w") as file:
        json.dump(config, file)
    torch.save(content, "out/checkpoint.pth.tar")
    outcome = ncf(split_dir, "--resume", "-e", 2, "-o", "out")
    assert outcome.code == 0, outcome.err
    assert "HR@5 = " in outcome.out


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["-k", 5, 5], "-k/--topk"),
        (["-k", 5, 0], "-k/--topk"),
        (["-k", 5, 42], "-k/--topk"),
        (["-k", 81, "--ranking", "full"], "-k/--topk"),
        (["-k"], "-k/--topk"),
        (["--ranking", "none"], "--ranking"),
        (["--ranking", "full", "--qe-auto"], "--ranking full"),
        (["--ranking", "full", "--qe-calibration", "0.1"], "--ranking full"),
    ],
)
def test_flags_out_of_range_are_named(ncf, split_dir, checkpoint, flags, name):
    """In one line."""
    mode = [] if "--qe-auto" in flags or "--qe-calibration" in flags else ["--evaluate"]
    outcome = ncf(split_dir, "--load", checkpoint, *mode, *flags, "-o", "out")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert name in outcome.err
