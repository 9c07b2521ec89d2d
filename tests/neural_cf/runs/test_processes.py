"""Several processes: the same weights and figures as one, one that writes, and an end when one of them ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from helpers_paths import ROOT
from hypothesis import given
from hypothesis import strategies as st

from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.data.batches import TrainingBatches
from neural_cf.model import NeuMF
from neural_cf.runs.processes import Processes
from neural_cf.split import load_split
from neural_cf.training import lazy_adam
from neural_cf.training.step import Step

TRAIN = ["--layers", "8", "6", "4", "-f", "4", "-s", "1", "-l", "0.01", "-e", "2", "--precision", "fp32"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    """``torchrun`` of ``ncf.py``."""
    command = [*TORCHRUN, str(processes), str(ROOT / "ncf.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """A run's last weights."""
    return load_checkpoint(directory / "checkpoint.pth.tar")["state_dict"]


def largest_difference(first: dict, second: dict) -> float:
    """Over all weights."""
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


# --- shares ---


@given(st.integers(0, 1000), st.integers(1, 20))
def test_shares_are_a_partition_into_nearly_equal_parts(count, world_size):
    """Nothing twice, nothing left out, in the order of ranks."""
    shares = [Processes(rank, world_size).share(count) for rank in range(world_size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_alone_exchanges_nothing():
    """Sums stay, and it agrees with itself."""
    tensor = torch.tensor([1.0, 2.0])
    Processes().sum([tensor])
    assert tensor.tolist() == [1, 2]
    assert Processes().agree("x") == "x"


# --- the exchange itself ---


def in_processes(function, world_size: int, directory: Path) -> list[int | None]:
    """Call ``function(processes)`` in processes of their own; their exit codes."""
    context = multiprocessing.get_context("spawn")
    store = directory / f"store-{world_size}-{time.monotonic_ns()}"
    children = [
        context.Process(target=_child, args=(function, rank, world_size, str(store)))
        for rank in range(world_size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=60)
    return [child.exitcode for child in children]


def _child(function, rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(Processes(rank, world_size))
    dist.destroy_process_group()


def _sum_and_agree(processes: Processes) -> None:
    small, large = torch.tensor(float(processes.rank)), torch.full((2, 3), 10.0**processes.rank)
    processes.sum([small, large])
    assert small.item() == 3
    assert torch.equal(large, torch.full((2, 3), 111.0))
    assert processes.agree({"rank": processes.rank}) == {"rank": 0}


def test_tensors_are_summed_and_values_agreed_on(tmp_path):
    """Of any shapes, in place, in all processes."""
    assert in_processes(_sum_and_agree, 3, tmp_path) == [0, 0, 0]


def _one_leaves(processes: Processes) -> None:
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(InputError, match="process 0 of 2: another one has ended or is out of reach"):
        for _ in range(100):
            processes.sum([torch.zeros(5)])


def test_process_whose_peer_is_killed_ends_with_an_error(tmp_path):
    """At its next exchange, not after a long wait."""
    start = time.monotonic()
    assert in_processes(_one_leaves, 2, tmp_path)[1] == -signal.SIGKILL
    assert time.monotonic() - start < 60


# --- training ---


def _train_epoch(processes: Processes, split_dir: str, out: str, sizes: tuple, lazy: bool) -> None:
    """An epoch in float64, where rounding is far below what training amplifies it by."""
    lazy_adam.DENSE_STEPS = 20
    split = load_split(split_dir)
    torch.manual_seed(1)
    factors, layers, batch_size, rate = sizes
    model = NeuMF(split.nb_users, split.nb_items, factors, layers).double()
    if lazy:
        optimizer = lazy_adam.LazyAdam(model.parameters(), model.tables(), lr=rate)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    step = Step(model, optimizer, processes=processes)
    batches = TrainingBatches(split, batch_size, 4, 1, "cpu", processes)
    losses = [step(batch) for batch in batches.epoch(0)]
    if lazy:
        optimizer.flush()
    torch.save(model.state_dict() | {"losses": torch.stack(losses)}, f"{out}-{processes.rank}")


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_train_what_one_trains(split_dir, tmp_path, world_size, lazy):
    """To float64's rounding, the losses they report too, and bit for bit the same in all of them."""
    sizes = (4, [8, 6, 4], 100, 0.01)
    together = partial(_train_epoch, split_dir=str(split_dir), out=f"{tmp_path}/n", sizes=sizes, lazy=lazy)
    assert in_processes(together, world_size, tmp_path) == [0] * world_size
    _train_epoch(Processes(), str(split_dir), f"{tmp_path}/one", sizes, lazy)
    alone = torch.load(tmp_path / "one-0", weights_only=True)
    shares = [torch.load(tmp_path / f"n-{rank}", weights_only=True) for rank in range(world_size)]
    assert largest_difference(alone, shares[0]) < 1e-12
    for share in shares[1:]:
        assert largest_difference(shares[0], share) == 0


def test_processes_train_what_one_trains_on_real_data(convert, tmp_path):
    """The published recipe, an epoch of ml-100k."""
    directory = os.environ.get("NCF_TEST_DATA")
    if directory is None:
        pytest.skip("NCF_TEST_DATA names no directory with ml-100k/u.data")
    assert convert(Path(directory) / "ml-100k" / "u.data", tmp_path / "split", "-n", 10).code == 0
    sizes = (64, [256, 256, 128, 64], 2048, 0.0005)
    for world_size in (1, 2):
        out = f"{tmp_path}/n{world_size}"
        train = partial(_train_epoch, split_dir=f"{tmp_path}/split", out=out, sizes=sizes, lazy=True)
        assert in_processes(train, world_size, tmp_path) == [0] * world_size
    one, two = (torch.load(tmp_path / f"n{n}-0", weights_only=True) for n in (1, 2))
    assert largest_difference(one, two) < 1e-12


@pytest.mark.parametrize("flags", [[], ["--optimizer", "adam", "--split-final"], ["--pretrain", "1"]])
def test_torchrun_gives_the_weights_and_figures_of_one_process(ncf, split_dir, tmp_path, flags):
    """From the command line, in float32; one of them prints and writes."""
    one = ncf(split_dir, *TRAIN, *flags, "-o", tmp_path / "one")
    two = torchrun(2, split_dir, *TRAIN, *flags, "-o", tmp_path / "two")
    assert one.code == two.returncode == 0, two.stderr
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-4
    without_times = [re.sub(r"_time = [\d.]+|/(one|two)/", "", text) for text in (one.out, two.stdout)]
    assert without_times[0] == without_times[1]
    names = [
        {re.sub(r"\d{5,}.*", "", path.name) for path in (tmp_path / run).iterdir()} for run in ("one", "two")
    ]
    assert names[0] == names[1]
    assert len(list((tmp_path / "two").glob("events.out.tfevents.*"))) == 1
    assert "Epoch" not in two.stderr  # a bar is for a terminal


def test_torchrun_resumes_and_evaluates_what_one_process_began(ncf, split_dir, run_dir, tmp_path):
    """And the other way round."""
    out = tmp_path / "out"
    assert torchrun(2, split_dir, *TRAIN, "--max-steps", 45, "-o", out).returncode == 0
    assert ncf(split_dir, "--resume", "--max-steps", 1, "-o", out).code == 0
    resumed = torchrun(2, split_dir, "--resume", "-o", out)
    assert resumed.returncode == 0, resumed.stderr
    assert len(re.findall(r"^Epoch 1:", resumed.stdout, re.MULTILINE)) == 1
    load = ["--evaluate", "--load", run_dir / "best.pth.tar", "-o", tmp_path / "evaluated"]
    together, alone = torchrun(3, split_dir, *load).stdout, ncf(split_dir, *load).out
    assert together.split("val_time")[0] == alone.split("val_time")[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-b", "1"], "-b/--batch-size: 1 samples for 2 processes"),
        (["--load", "{checkpoint}", "--qe-calibration", "1"], "--qe-calibration: "),
        (["--load", "{checkpoint}", "--quantize-eval", "--qe-dynamic", "--qe-report"], "--qe-report: "),
        (["--gpus", "0"], "--gpus: "),
    ],
)
def test_what_processes_cannot_share_is_refused(split_dir, checkpoint, tmp_path, flags, message):
    """In a line, before anything is written."""
    flags = [flag.format(checkpoint=checkpoint) for flag in flags]
    outcome = torchrun(2, split_dir, *flags, "-o", tmp_path / "out")
    assert outcome.returncode != 0
    assert f"ncf.py: error: {message}" in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_killed_process_ends_the_others(split_dir, tmp_path):
    """Within a minute, with an error."""
    command = [*TORCHRUN, "2", str(ROOT / "ncf.py"), str(split_dir), *TRAIN, "-e", "1000000"]
    job = subprocess.Popen(
        [*command, "-o", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert any(line.startswith("Epoch 1:") for line in job.stdout)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        start = time.monotonic()
        assert job.wait(timeout=60) != 0
        assert time.monotonic() - start < 60
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    finally:
        job.kill()
        job.stdout.close()


@pytest.mark.parametrize("to", ["torchrun", "the second"])
def test_signal_ends_all_processes_after_the_same_step(split_dir, tmp_path, to):
    """To torchrun, which passes it on, or to one of them: saved within an epoch, and resumed as if nothing had been."""
    run = [*TORCHRUN, "2", str(ROOT / "ncf.py"), str(split_dir)]
    out = ["-o", str(tmp_path / "out")]
    with subprocess.Popen(
        [*run, *TRAIN, "-b", "16", "-e", "1000", *out],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as job:
        assert any(line.startswith("Epoch 0:") for line in job.stdout)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(job.pid if to == "torchrun" else int(children[1]), signal.SIGTERM)
        said = job.stdout.read()
        assert job.wait() != 0
    assert "Stopped in epoch " in said
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    epoch = load_checkpoint(tmp_path / "out" / "checkpoint.pth.tar")["progress"]["epoch"]
    assert torchrun(2, split_dir, "--resume", "-e", epoch + 1, *out).returncode == 0
    assert torchrun(2, split_dir, *TRAIN, "-b", 16, "-e", epoch + 1, "-o", tmp_path / "whole").returncode == 0
    assert largest_difference(weights(tmp_path / "out"), weights(tmp_path / "whole")) == 0
