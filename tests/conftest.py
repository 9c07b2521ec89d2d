"""A tiny set of ratings, its split, a model trained on it, and the scripts called in this process."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

# The models here are too small to share between threads, which only wait for each other, longest on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
# Compiling takes longer than all that these models are trained for; tests of it run in processes of their own.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch

import convert
import ncf
from benchmarks import recipe
from distiller.system.cli import InputError, run
from neural_cf.__main__ import SMALLER_MODEL
from neural_cf.data import synthetic
from neural_cf.training import lazy_adam

torch.set_num_threads(1)
# So that most steps of these short runs are lazy ones.
lazy_adam.DENSE_STEPS = 20

USERS, ITEMS, RATINGS, NEGATIVES = 60, 80, 2000, 40
SIZES = ["--layers", "8", "6", "4", "-f", "4"]
EPOCHS = 2


@dataclass(frozen=True)
class Outcome:
    """What a script left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Script = Callable[..., Outcome]


def call(prog: str, main: Callable[[], None], arguments: tuple, less_memory: str = "") -> Outcome:
    """Run a script's ``main`` as its last lines do, with ``arguments`` as its command line."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, [prog, *map(str, arguments)]
    threads = torch.get_num_threads()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            try:
                code = run(prog, main, less_memory)
            except SystemExit as stop:
                code = stop.code
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        close_logs()
    return Outcome(code or 0, out.getvalue(), err.getvalue())


def close_logs() -> None:
    """Take the handlers off the scripts' loggers, so that one run's log does not collect the next one's."""
    for name in ("ncf", "distiller"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True


def run_ncf(*arguments: object) -> Outcome:
    """``ncf.py`` in this process."""
    return call("ncf.py", ncf.main, arguments, SMALLER_MODEL)


def run_convert(*arguments: object) -> Outcome:
    """``convert.py`` in this process."""
    return call("convert.py", convert.main, arguments)


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> Iterator[None]:
    """Processes and tests hear SIGINT also where pytest runs in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(name="ncf")
def ncf_script() -> Script:
    """Calls ``ncf.py`` with the arguments given."""
    return run_ncf


@pytest.fixture(name="convert")
def convert_script() -> Script:
    """Calls ``convert.py`` with the arguments given."""
    return run_convert


@pytest.fixture
def scripts_here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Makes the tables' commands run in this process; the command lines so far."""
    scripts = {"ncf.py": run_ncf, "convert.py": run_convert}
    commands: list[list[str]] = []

    def execute(*command: object) -> str:
        commands.append([str(word) for word in command])
        outcome = scripts[str(command[0])](*command[1:])
        if outcome.code:
            raise InputError(f"{command[0]}: {outcome.err}")
        return outcome.out

    monkeypatch.setattr(recipe, "execute", execute)
    return commands


@pytest.fixture
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test in a directory of its own, where a forgotten ``-o`` does no harm."""
    monkeypatch.chdir(tmp_path)
    yield


@pytest.fixture(scope="session")
def ratings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ratings in ml-20m's format."""
    path = tmp_path_factory.mktemp("ratings") / "ratings.csv"
    with redirect_stderr(io.StringIO()):
        synthetic.write_ratings(path, USERS, ITEMS, RATINGS, seed=7)
    return path


@pytest.fixture(scope="session")
def split_dir(ratings_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted ratings. To be read only: a test that changes it takes a copy."""
    directory = tmp_path_factory.mktemp("split") / "ml-20m"
    outcome = run_convert(ratings_file, directory, "-n", NEGATIVES)
    assert outcome.code == 0, outcome.err
    return directory


@pytest.fixture(scope="session")
def run_dir(split_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``ncf.py`` leaves after two epochs on the split. To be read only."""
    directory = tmp_path_factory.mktemp("runs") / "base"
    outcome = run_ncf(split_dir, *SIZES, "-e", EPOCHS, "-s", 1, "-l", 0.01, "-o", directory)
    assert outcome.code == 0, outcome.err
    return directory


@pytest.fixture(scope="session")
def checkpoint(run_dir: Path) -> Path:
    """The trained model's ``best.pth.tar``."""
    return run_dir / "best.pth.tar"


@pytest.fixture(scope="session")
def stats_file(split_dir: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the trained model's activations over all test users."""
    directory = tmp_path_factory.mktemp("stats")
    outcome = run_ncf(split_dir, "--load", checkpoint, "--qe-calibration", 1, "-o", directory)
    assert outcome.code == 0, outcome.err
    (path,) = directory.glob("*.yaml")
    return path


@pytest.fixture
def quantize_eval(ncf: Script, split_dir: Path, checkpoint: Path, tmp_path: Path) -> Script:
    """ncf.py evaluating quantized with ``flags`` into the directory ``out``, on statistics as they ask for."""

    def call(flags: list, out: object, *more: object) -> Outcome:
        split_final = [flag for flag in flags if flag == "--split-final"]
        command = [split_dir, "--load", checkpoint, "--quantize-eval", *flags, "-o", out, *more]
        if "--qe-dynamic" not in flags:
            stats = tmp_path / f"stats{len(split_final)}.yaml"
            if not stats.exists():
                calibrate = ["--qe-calibration", 1, "--qe-stats-out", stats, *split_final]
                assert ncf(split_dir, "--load", checkpoint, *calibrate, "-o", "calibration").code == 0
            command += ["--qe-stats-file", stats]
        return ncf(*command)

    return call


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too, with its bytes."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.fixture(name="contents")
def contents_function() -> Callable[[Path], dict[str, bytes]]:
    """Reads every file below a directory."""
    return contents
