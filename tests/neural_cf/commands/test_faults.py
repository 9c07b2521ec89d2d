"""What stops a run in its midst: signals, kills, full disks, a second run, too little memory."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers_files import files_of_at_most
from helpers_paths import ROOT
from helpers_training import STEPS, TRAIN, rows, same

from benchmarks import faults
from distiller.system.cli import InputError
from distiller.system.files import atomic_write
from distiller.system.locks import LockHeldError, locked
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.ranking import candidates, scorers
from neural_cf.ranking.blocks import InParts
from neural_cf.ranking.places import rank_test_items
from neural_cf.ranking.scorers import float_scorer
from neural_cf.split import CSV_FILES, PICKLE, load_split
from neural_cf.training import step, trainer

pytestmark = pytest.mark.usefixtures("in_empty_directory")

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def assert_one_line(outcome, *parts: object) -> None:
    """Exit code 2, and one line that has the parts."""
    assert outcome.code == 2, (outcome.out, outcome.err)
    assert "Traceback" not in outcome.err
    last = outcome.err.rstrip("\n").split("\n")[-1]
    assert last.startswith("ncf.py: error: ")
    for part in parts:
        assert str(part) in last


def assert_same_end(first: str, second: str) -> None:
    """Two runs' last and best checkpoints and results, bit for bit."""
    for name in ("checkpoint.pth.tar", "best.pth.tar"):
        ends = [load_checkpoint(Path(run) / name) for run in (first, second)]
        for part in ("state_dict", "optimizer_state_dict", "progress", "hr", "ndcg"):
            assert same(ends[0][part], ends[1][part]), (name, part)
    without_times = [
        [{key: value for key, value in row.items() if not key.endswith("time_s")} for row in rows(run)]
        for run in (first, second)
    ]
    assert without_times[0] == without_times[1]


def at_step(monkeypatch, number: int, act) -> None:
    """Call ``act`` within the step of that number, counted from 1."""
    take, taken = step.Step.__call__, []

    def counted(self, batch):
        taken.append(1)
        if len(taken) == number:
            act()
        return take(self, batch)

    monkeypatch.setattr(step.Step, "__call__", counted)


@pytest.fixture
def whole(ncf, split_dir) -> str:
    """A run of three epochs that nothing stopped."""
    assert ncf(split_dir, *TRAIN, "-e", 3, "-o", "whole").code == 0
    return "whole"


# --- signals ---


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("at", [1, STEPS // 2, STEPS, STEPS + 30])
def test_signal_finishes_the_step_saves_and_ends(ncf, split_dir, whole, monkeypatch, number, at):
    """In its first steps, between dense and lazy ones, at an epoch's end; --resume ends where nothing stopped it."""
    with monkeypatch.context() as patch:
        at_step(patch, at, lambda: signal.raise_signal(number))
        outcome = ncf(split_dir, *TRAIN, "-e", 3, "-o", "out")
    assert outcome.code == CODES[number]
    assert "Traceback" not in outcome.err
    progress = load_checkpoint("out/checkpoint.pth.tar")["progress"]
    assert progress["epoch"] * STEPS + progress["step"] == at
    assert ncf(split_dir, "--resume", "-o", "out").code == 0
    assert_same_end(whole, "out")
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


@pytest.mark.parametrize("number", CODES)
def test_signal_cuts_an_evaluation_short_and_keeps_the_epoch(ncf, split_dir, whole, monkeypatch, number):
    """Its steps are not taken again: only the evaluation is."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "rank_test_items", lambda *_, **__: signal.raise_signal(number))
        assert ncf(split_dir, *TRAIN, "-e", 3, "-o", "out").code == CODES[number]
    assert load_checkpoint("out/checkpoint.pth.tar")["progress"]["step"] == STEPS
    assert not Path("out/best.pth.tar").exists()
    assert ncf(split_dir, "--resume", "-o", "out").code == 0
    assert_same_end(whole, "out")


@pytest.mark.parametrize("first", CODES)
@pytest.mark.parametrize("second", CODES)
def test_second_signal_ends_at_once(first, second):
    """Whatever is being finished."""
    code = (
        "import os, signal, time\nfrom distiller.system.signals import DeferredSignals\n"
        f"with DeferredSignals() as signals:\n    os.kill(os.getpid(), {first})\n"
        f"    assert signals.received == {first}\n    print('on', flush=True)\n    os.kill(os.getpid(), {second})\n"
        "    print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-second, "on\n")
    assert "a second signal ends at once" in done.stderr


def test_ignored_signal_stays_ignored(ncf, split_dir):
    """As a shell starts what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with trainer.DeferredSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_elsewhere_cleans_up(ncf, split_dir, checkpoint, monkeypatch):
    """In an evaluation: 143, and no half of a file."""

    def interrupted(*_, **__):
        with atomic_write("half"):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("neural_cf.commands.evaluate.place_test_items", interrupted)
    outcome = ncf(split_dir, "--load", checkpoint, "--evaluate", "-o", "out")
    assert (outcome.code, outcome.err.split("\n")[-2]) == (143, "ncf.py: terminated")
    assert {path.name for path in Path(".").iterdir()} == {"out"}
    assert {path.name for path in Path("out").iterdir()} == {"ncf.log"}


# --- kills ---


class Killed(BaseException):
    """Nothing is saved on it, as on SIGKILL."""


def killed() -> None:
    raise Killed


@pytest.mark.parametrize(("every", "at"), [(1, 5), (7, 20), (7, STEPS + 1), (STEPS, STEPS + 20), (100, 10)])
def test_kill_loses_at_most_save_every_steps(ncf, split_dir, whole, monkeypatch, every, at):
    """Within an epoch and after it; the end is that of an unbroken run without --save-every."""
    with monkeypatch.context() as patch:
        at_step(patch, at, killed)
        with pytest.raises(Killed):
            ncf(split_dir, *TRAIN, "-e", 3, "--save-every", every, "-o", "out")
    progress = load_checkpoint("out/checkpoint.pth.tar")["progress"]
    saved = progress["epoch"] * STEPS + progress["step"]
    assert saved == max(n for n in range(at) if n % STEPS % every == 0 or n % STEPS == 0)
    assert ncf(split_dir, "--resume", "-o", "out").code == 0
    assert_same_end(whole, "out")


def test_row_of_an_epoch_that_was_not_saved_is_not_there_twice(ncf, split_dir, whole, monkeypatch):
    """Killed between the row of results and the checkpoint."""
    save = trainer.save_checkpoint

    def first_only(path, content):
        if content["epoch"] == 1:
            raise Killed
        save(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", first_only)
        with pytest.raises(Killed):
            ncf(split_dir, *TRAIN, "-e", 3, "-o", "out")
    assert len(rows("out")) == 2
    assert ncf(split_dir, "--resume", "-o", "out").code == 0
    assert_same_end(whole, "out")


def test_losses_that_diverged_do_not_replace_a_good_checkpoint(ncf, split_dir):
    """Between two updates of the progress bar."""
    flags = ["-l", 1e30, "--save-every", 5, "--log-freq", 1000]
    assert_one_line(ncf(split_dir, *TRAIN, *flags, "-o", "out"), "the loss is", "out/checkpoint.pth.tar")
    weights = load_checkpoint("out/checkpoint.pth.tar")["state_dict"].values()
    assert all(tensor.isfinite().all() for tensor in weights)


def test_real_kills_lose_nothing(tmp_path):
    """SIGKILL at random moments; the harness of `make faults`, which kills 50 times."""
    found = faults.measure(tmp_path / "faults", kills=2, seed=1)
    assert found["kills"] == 2
    assert found["most steps lost"] <= faults.SAVE_EVERY
    assert found["different"] == []


def test_what_a_killed_run_left_half_written_is_removed(ncf, split_dir, run_dir):
    """By the next one in its directory."""
    shutil.copytree(run_dir, "out")
    Path("out/.best.pth.tar.abc.part").write_text("half")
    assert ncf(split_dir, "--resume", "-e", 3, "-o", "out").code == 0
    assert not list(Path("out").glob(".*"))


# --- full disks ---


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MB; skipped where it cannot be mounted."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("room", [0, 1, 20, 60, 100])
def test_disk_that_fills_up_leaves_the_last_checkpoint_whole(
    ncf, split_dir, run_dir, whole, small_disk, room
):
    """In whatever is being written; once there is room again the run goes on to where it would have come."""
    out = small_disk / "out"
    shutil.copytree(run_dir, out)
    before = {name: (out / name).read_bytes() for name in ("checkpoint.pth.tar", "best.pth.tar")}
    with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
        while True:
            filler.write(bytes(1024))
    with open(small_disk / "filler", "r+b") as filler:
        filler.truncate((small_disk / "filler").stat().st_size - 1024 * room)
    outcome = ncf(split_dir, "--resume", "-e", 3, "--save-every", 10, "-o", out)
    if outcome.code:
        assert_one_line(outcome, small_disk, os.strerror(errno.ENOSPC))
    if room < 60:
        assert outcome.code
        assert {name: (out / name).read_bytes() for name in before} == before
    load_checkpoint(out / "checkpoint.pth.tar")
    assert not list(out.glob(".*"))
    (small_disk / "filler").unlink()
    if load_checkpoint(out / "checkpoint.pth.tar")["progress"]["epoch"] < 3:
        assert ncf(split_dir, "--resume", "-e", 3, "-o", out).code == 0
    assert_same_end(whole, str(out))


@pytest.mark.parametrize("size", [100, 1000, 5000, 20_000])
def test_files_that_cannot_grow_are_an_error_and_no_half_file(ncf, split_dir, run_dir, size):
    """As a quota has it: the run ends with one line, and its checkpoints are as they were."""
    shutil.copytree(run_dir, "out")
    before = {name: Path("out", name).read_bytes() for name in ("checkpoint.pth.tar", "best.pth.tar")}
    with files_of_at_most(size):
        outcome = ncf(split_dir, "--resume", "-e", 3, "-o", "out")
    assert_one_line(outcome, "out", os.strerror(errno.EFBIG))
    assert {name: Path("out", name).read_bytes() for name in before} == before
    assert not list(Path("out").glob(".*"))


def test_a_name_is_flushed_to_disk_after_the_file(tmp_path, monkeypatch):
    """The file before its rename, the directory after it."""
    done = []
    fsync, replace = os.fsync, os.replace

    def noted(descriptor):
        done.append("directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), replace(*names)))
    with atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("x")
    assert done == ["file", "rename", "directory"]


# --- two at once ---


@pytest.mark.parametrize("mode", ["train", "--evaluate", "--qe-calibration"])
def test_second_run_in_a_directory_names_the_first(ncf, split_dir, run_dir, contents, mode):
    """Its number and its command line; nothing is changed."""
    shutil.copytree(run_dir, "out")
    load = ["--load", run_dir / "best.pth.tar"]
    flags = {"train": ["--overwrite"], "--evaluate": [*load, mode], "--qe-calibration": [*load, mode, 1]}[
        mode
    ]
    with locked(Path("out/.lock"), "ncf.py the first"):
        before = contents(Path("out"))
        assert_one_line(
            ncf(split_dir, *flags, "-o", "out"), "out", f"process {os.getpid()} ", "ncf.py the first"
        )
        assert contents(Path("out")) == before
    assert not Path("out/.lock").exists()


def test_lock_does_not_outlive_its_holder(tmp_path):
    """Killed, it leaves the file and not the lock."""
    path = tmp_path / "lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom distiller.system.locks import locked\n"
        f"with locked(Path({str(path)!r}), 'held'):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LockHeldError, match=f"process {holder.pid} .*: held"), locked(path, "second"):
        pass
    holder.kill()
    holder.communicate()
    assert path.exists()
    with locked(path, "second"):
        pass
    assert not path.exists()


def test_error_leaves_no_directory_behind(ncf, split_dir, checkpoint):
    """Of those that were made for the run."""
    assert ncf(split_dir, "--load", checkpoint, "--quantize-eval", "-o", "a/b").code == 2
    assert ncf(split_dir, "--load", checkpoint, "--quantize-eval").code == 2
    assert not list(Path(".").iterdir())


EVALUATE = """
import ncf
from distiller.system.cli import run
from neural_cf import split
made, write = [], split.write_pickle
split.write_pickle = lambda *arguments: (made.append(1), write(*arguments))
assert run("ncf.py", ncf.main) == 0
print(len(made))
"""


def test_eight_processes_build_one_split_and_evaluate(split_dir, checkpoint, tmp_path):
    """One makes the pickle and the others wait for it; all come to the same."""
    directory = tmp_path / "split"
    directory.mkdir()
    for name in CSV_FILES:
        shutil.copy(split_dir / name, directory)
    command = [sys.executable, "-c", EVALUATE, directory, "--load", checkpoint, "--evaluate", "-o"]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    processes = [subprocess.Popen([*command, tmp_path / f"out-{i}"], **options) for i in range(8)]
    found = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    assert len({line.split(", val_time")[0] for lines in found for line in lines if "HR@10" in line}) == 1
    assert len({(tmp_path / f"out-{i}" / "ranks.npy").read_bytes() for i in range(8)}) == 1
    assert sum(int(lines[-1]) for lines in found) == 1
    assert {path.name for path in directory.iterdir()} == {*CSV_FILES, PICKLE}


def test_conversion_killed_between_its_files_leaves_a_whole_split(
    convert, ratings_file, tmp_path, monkeypatch
):
    """The old one or the new one, never parts of both: after each of the renames."""
    assert convert(ratings_file, "old", "-n", 10).code == 0
    assert convert(ratings_file, "new", "-n", 20).code == 0
    replace = os.replace
    for renames in range(6):
        shutil.rmtree("out", ignore_errors=True)
        shutil.copytree("old", "out")
        left = [renames]

        def limited(*names, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            replace(*names)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", limited)
            with suppress(Killed):
                convert(ratings_file, "out", "-n", 20)
        width = load_split("out").nb_candidates
        assert width in (11, 21)
        assert same_bytes(load_split("out").negatives, load_split("old" if width == 11 else "new").negatives)


def same_bytes(first, second) -> bool:
    return first.dtype == second.dtype and first.tobytes() == second.tobytes()


# --- memory ---


def of_little_memory(compute, most: int):
    """As on a small machine: fails for more than so many users at a time."""

    def limited(*tensors):
        if len(tensors[0]) > most:
            raise RuntimeError(
                "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            )
        return compute(*tensors)

    return limited


@pytest.mark.parametrize("most", [1, 3, 60])
def test_smaller_blocks_where_memory_runs_out(ncf, split_dir, checkpoint, monkeypatch, caplog, most):
    """With a note, to the same ranks."""
    load = ["--load", checkpoint, "--evaluate"]
    expected = ncf(split_dir, *load, "-o", "a").out.split(", val_time")[0]
    scores = scorers.FactoredScorer._scores
    monkeypatch.setattr(
        scorers.FactoredScorer,
        "_scores",
        lambda self, *tensors: of_little_memory(lambda *t: scores(self, *t), most)(*tensors),
    )
    outcome = ncf(split_dir, *load, "-o", "b")
    assert outcome.out.split(", val_time")[0] == expected
    assert Path("a/ranks.npy").read_bytes() == Path("b/ranks.npy").read_bytes()
    assert ("out of memory with" in outcome.err) == (most < 60)


def test_block_itself_is_halved(split_dir, checkpoint, monkeypatch):
    """Where a whole block's candidates are too many."""
    split = load_split(split_dir)
    scorer, sizes = float_scorer(model_of(checkpoint, split)), []

    def limited(users, items):
        sizes.append(len(users))
        return of_little_memory(scorer, 10)(users, items)

    expected = rank_test_items(scorer, split)
    assert torch.equal(rank_test_items(limited, split), expected)
    assert sizes[:4] == [60, 30, 15, 7]


def model_of(checkpoint: Path, split):
    """The float model in a checkpoint."""
    from neural_cf.model import NeuMF, sizes_from_state_dict

    weights = load_checkpoint(checkpoint)["state_dict"]
    model = NeuMF(**sizes_from_state_dict(weights))
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(
    "error", [MemoryError("1 GB"), RuntimeError("DefaultCPUAllocator"), torch.OutOfMemoryError()]
)
def test_no_memory_for_one_user_is_a_clear_error(ncf, split_dir, checkpoint, monkeypatch, error):
    """Also in training, which does not try again."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(scorers.FactoredScorer, "_scores", fail)
    assert_one_line(ncf(split_dir, "--load", checkpoint, "--evaluate", "-o", "a"), "out of memory")
    monkeypatch.setattr(step.Step, "__call__", fail)
    assert_one_line(ncf(split_dir, *TRAIN, "-o", "b"), "out of memory", "--batch-size")


def test_calibration_does_not_see_a_pair_twice(ncf, split_dir, checkpoint, monkeypatch):
    """What is watched is not tried again: its statistics would count what had been seen before memory ran out."""
    calls = scorers.PairScorer._scores
    monkeypatch.setattr(
        scorers.PairScorer,
        "_scores",
        lambda self, *tensors: of_little_memory(lambda *t: calls(self, *t), 3)(*tensors),
    )
    outcome = ncf(split_dir, "--load", checkpoint, "--qe-calibration", 1, "-o", "out")
    assert_one_line(outcome, "out of memory")
    assert not Path("out/acts_quantization_stats.yaml").exists()


def test_other_errors_are_not_taken_for_memory():
    """They are bugs."""

    def fail(*_):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        InParts(candidates.SAMPLED_PAIRS_PER_BLOCK)(fail, torch.zeros(4, 2))


# --- what files claim ---


def rewritten(path: Path, change) -> None:
    """A checkpoint's archive with other entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        change(archive, entries)


def packed(archive, entries) -> None:
    for name, content in entries.items():
        archive.writestr(name, content + bytes(50_000_000) * name.endswith("/data/0"), zipfile.ZIP_DEFLATED)


def short(archive, entries) -> None:
    for name, content in entries.items():
        archive.writestr(name, content[:8] if name.endswith("/data/0") else content)


@pytest.mark.parametrize("change", [packed, short])
def test_archive_that_is_larger_than_its_file_is_refused(tmp_path, change):
    """Packed, or with a tensor cut short."""
    path = tmp_path / "x"
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, path)
    rewritten(path, change)
    with pytest.raises(InputError, match="than the file has"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(
            f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "&a [*a]",
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 100_000,
        "a: " + "1:" * 500_000 + "1",
        "a: !!timestamp x",
        "a: !!int ''",
        "a: !!bool x",
        "a: !!python/object/apply:os.system ['touch marker']",
    ],
    ids=["aliases", "itself", "lists", "maps", "items", "sixties", "time", "int", "bool", "call"],
)
def test_yaml_that_claims_more_than_it_says_is_refused(ncf, split_dir, checkpoint, text):
    """At every flag that takes such a file."""
    Path("x.yaml").write_text(text)
    load = ["--load", checkpoint, "--quantize-eval", "-o", "out"]
    for flag, more in (("--qe-stats-file", load), ("--qe-config-file", load), ("--compress", ["-o", "out"])):
        outcome = ncf(split_dir, *more, flag, "x.yaml")
        assert_one_line(outcome, "x.yaml")
        assert len(outcome.err) < 2000
    assert not Path("marker").exists()
    assert re.search("x.yaml", outcome.err)
