"""Kill training at random moments, resume it each time, and compare its end with an uninterrupted run's.

    python -m benchmarks.faults [--kills 50] [--seed 0] [--out run/faults]

After every kill both checkpoints must load, and training may have lost no more steps than --save-every.
"""

from __future__ import annotations

import argparse
import csv
import errno
import fcntl
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipe import ROOT, execute
from distiller.system.cli import ArgumentParser, InputError, run
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.data.synthetic import write_ratings
from neural_cf.runs.directory import BEST, CHECKPOINT, RESULTS
from neural_cf.runs.hardware import machine

RATINGS = {"num_users": 60, "num_items": 80, "num_ratings": 2000, "seed": 7}
# Half of the steps come after the 1,500 dense ones with which lazy Adam begins.
EPOCHS, STEPS = 20, 152
TRAIN = ["--layers", 8, 6, 4, "-f", 4, "-l", 0.01, "-s", 1, "-b", 64, "-e", EPOCHS, "-p", 1, "--no-compile"]
SAVE_EVERY = 7  # steps
# Of one process before it is killed. With this many, 50 kills take a run to its end, and through lazy steps.
MOST_STEPS = 120
COLUMNS = 200  # of the terminal: more than a bar takes
SHOWING_S = 0.5  # seconds between two updates of the progress bar
STARTS_KILLED = 0.2  # the share of processes that are killed while they start
STARTING_S = 4.0  # seconds in which these are killed
PROGRESS = re.compile(r"Epoch (\d+)[^\r]*?\| (\d+)/(\d+) \[")


def start(split: Path, out: Path) -> subprocess.Popen:
    """Start a process that trains in ``out``, or resumes the run that is there."""
    going_on = ["--resume"] if (out / CHECKPOINT).exists() else [*TRAIN, "--overwrite"]
    command = [sys.executable, ROOT / "ncf.py", split, *going_on, "--save-every", SAVE_EVERY, "--log-freq", 1]
    words = [*map(str, command), "-o", str(out)]
    terminal, end = pty.openpty()  # on which a progress bar moves
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, COLUMNS, 0, 0))
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=end)
    os.close(end)
    process.stderr = os.fdopen(terminal, "rb", buffering=0)
    return process


def read_shown(process: subprocess.Popen) -> str:
    """Return what a process has shown since the last call, once there is something; nothing at its end."""
    try:
        return process.stderr.read(1024).decode(errors="replace")
    except OSError as error:
        if error.errno != errno.EIO:  # a terminal that nobody writes to any more
            raise
        return ""


def kill(process: subprocess.Popen, moment: random.Random) -> str:
    """Kill a process at a random moment, unless it ends before, and return what it wrote to stderr."""
    text, first = "", 0
    if moment.random() < STARTS_KILLED:
        time.sleep(moment.uniform(0, STARTING_S))
    else:
        steps = moment.uniform(0, MOST_STEPS)
        while process.poll() is None and steps_seen(text) - first < steps:
            text += read_shown(process)
            first = first or steps_seen(text)
        time.sleep(moment.uniform(0, SHOWING_S))
    process.kill()
    return text


def broken_run(split: Path, out: Path, kills: int, moment: random.Random) -> list[int]:
    """Train to the end through up to ``kills`` kills and return the steps that each of them lost.

    If a kill comes after the last checkpoint and before the process ends by itself, the run is at its end too.

    Raises:
        InputError: training failed by itself, or a checkpoint does not load.
    """
    lost, before = [], 0
    while True:
        process = start(split, out)
        text = kill(process, moment) if len(lost) < kills else ""
        while shown := read_shown(process):
            text += shown
        process.stderr.close()
        code, saved = process.wait(), steps_saved(out)
        if code == 0:
            return lost
        if code != -signal.SIGKILL:
            raise InputError(f"training ended with exit code {code}: {text[-300:]}")
        lost.append(max(steps_seen(text) - saved, before - saved, 0))
        before = saved
        print(f"{out}: kill {len(lost)}: {saved} steps saved, {lost[-1]} lost", file=sys.stderr, flush=True)
        if saved == EPOCHS * STEPS:
            return lost


def steps_seen(text: str) -> int:
    """Return the number of steps, from the first epoch on, that a progress bar has shown as done."""
    shown = PROGRESS.findall(text)
    return max((int(epoch) * int(steps) + int(done) for epoch, done, steps in shown), default=0)


def steps_saved(out: Path) -> int:
    """Return the number of steps of the last checkpoint. The best checkpoint must load too."""
    if (out / BEST).exists():
        load_checkpoint(out / BEST)
    if not (out / CHECKPOINT).exists():
        return 0
    progress = load_checkpoint(out / CHECKPOINT)["progress"]
    return progress["epoch"] * STEPS + progress["step"]


def same(first: Any, second: Any) -> bool:
    """Return whether two parts of checkpoints are equal, bit for bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if torch.is_tensor(first) else first == second


def results(out: Path) -> list[dict[str, str]]:
    """Return the rows of a run's results without their times."""
    with open(out / RESULTS, newline="") as file:
        return [{k: v for k, v in row.items() if not k.endswith("time_s")} for row in csv.DictReader(file)]


def compare(whole: Path, broken: Path) -> list[str]:
    """Return the names of the parts that differ between the ends of two runs."""
    different = []
    for name in (BEST, CHECKPOINT):
        first, second = (load_checkpoint(out / name) for out in (whole, broken))
        parts = (
            "state_dict",
            "optimizer_state_dict",
            "lagging_rows",
            "schedule_state_dict",
            "progress",
            "hr",
            "ndcg",
        )
        different += [f"{name}: {part}" for part in parts if not same(first[part], second[part])]
    if results(whole) != results(broken):
        different.append(RESULTS)
    return different


def measure(out: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill training ``kills`` times, in as many runs as it takes. Return what was lost and what differs."""
    out.mkdir(parents=True, exist_ok=True)
    split, whole = out / "split", out / "whole"
    write_ratings(out / "ratings.csv", **RATINGS)
    execute("convert.py", out / "ratings.csv", split, "-n", 40)
    execute("ncf.py", split, *TRAIN, "--overwrite", "-o", whole)
    moment, lost, different, runs = random.Random(seed), [], [], 0
    while len(lost) < kills:
        runs += 1
        broken = out / f"broken-{runs}"
        lost += broken_run(split, broken, kills - len(lost), moment)
        different += compare(whole, broken)
    return {"kills": len(lost), "runs": runs, "most steps lost": max(lost), "different": different}


def main() -> None:
    """Run the script."""
    parser = ArgumentParser(prog="benchmarks.faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("run/faults"), help="a fresh directory (default: %(default)s)"
    )
    args: argparse.Namespace = parser.parse_args()
    if args.kills < 1:
        raise InputError("--kills must be at least 1")
    if args.out.exists() and any(args.out.iterdir()):
        raise InputError(f"--out: {args.out} is not empty")
    begun = time.monotonic()
    found = measure(args.out, args.kills, args.seed)
    found |= {"save every": SAVE_EVERY, "seconds": round(time.monotonic() - begun), "machine": machine()}
    print(json.dumps(found, indent=2))
    if found["different"] or found["most steps lost"] > SAVE_EVERY:
        raise InputError("a killed run lost more than it may, or ended elsewhere than the unbroken one")


if __name__ == "__main__":
    sys.exit(run("benchmarks.faults", main))
