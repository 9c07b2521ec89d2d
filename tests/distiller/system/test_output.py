"""Standard output that is full, closed or of few characters, and memory that runs out, in every script."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import call, close_logs
from helpers_paths import ROOT

import convert
import ncf
from benchmarks import baselines
from distiller.system.cli import run
from neural_cf.commands import compare, export, plot, recommend, synthetic

MAINS = {
    "neural-cf baselines": baselines.main,
    "neural-cf compare": compare.main,
    "convert.py": convert.main,
    "neural-cf export": export.main,
    "ncf.py": ncf.main,
    "neural-cf plot": plot.main,
    "neural-cf recommend": recommend.main,
    "neural-cf synthetic": synthetic.main,
}
BUFFERED = os.environ | {"PYTHONUNBUFFERED": ""}
# Prints so much, in one go or in parts, and ends.
PRINT = """
import sys
from distiller.system.cli import InputError, run
def main():
    for part in range({parts}):
        print("x" * {size})
    {end}
sys.exit(run("prog", main))
"""


def printed(out, size: int, parts: int = 1, end: str = "pass") -> tuple[int, str]:
    """The exit code and stderr of a process of its own, whose interpreter ends as it does at a shell."""
    code = PRINT.format(size=size, parts=parts, end=end)
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, cwd=ROOT, env=BUFFERED)
    return process.returncode, process.stderr.decode()


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (100_000, 1), (1, 100_000)])
def test_full_output_is_one_line(size, parts):
    """Also where all is in a buffer until the end."""
    with open("/dev/full", "wb") as out:
        assert printed(out, size, parts) == (2, "prog: error: standard output: No space left on device\n")


def test_full_output_leaves_another_error_as_it_is():
    with open("/dev/full", "wb") as out:
        assert printed(out, 1, end="raise InputError('x')") == (2, "prog: error: x\n")
        assert printed(out, 1, end="sys.exit(3)")[0] == 2


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (1, 100_000)])
def test_closed_pipe_ends_quietly(size, parts):
    """As a signal would."""
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    assert printed(reader.stdin, size, parts) == (141, "")


def test_closed_output_and_error():
    """Nothing to write to, and nothing to say it on."""
    for streams in (">&-", "> /dev/full 2>&1", "> /dev/full 2>&-"):
        command = f"exec '{sys.executable}' -c '{PRINT.format(size=1, parts=1, end='pass')}' {streams}"
        done = subprocess.run(["sh", "-c", command], cwd=ROOT, env=BUFFERED, stderr=subprocess.PIPE)
        assert done.returncode == (0 if streams == ">&-" else 2)
        assert done.stderr == b""


@pytest.mark.parametrize("prog", MAINS)
def test_help_to_a_full_disk(prog, monkeypatch, capsys):
    """After which the parser has ended the script."""
    monkeypatch.setattr(sys, "argv", [prog, "--help"])
    with open("/dev/full", "w") as full, redirect_stdout(full):
        assert run(prog, MAINS[prog]) == 2
    assert capsys.readouterr().err == f"{prog}: error: standard output: No space left on device\n"


def test_messages_to_a_full_disk_end_a_run(split_dir, monkeypatch, tmp_path, capsys):
    """Where logging would print a traceback and go on."""
    monkeypatch.setattr(sys, "argv", ["ncf.py", str(split_dir), "-o", str(tmp_path / "out"), "-e", "1"])
    try:
        with open("/dev/full", "w") as full, redirect_stdout(full):
            assert run("ncf.py", ncf.main) == 2
    finally:
        close_logs()
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "ncf.py: error: standard output: No space left on device"


def test_characters_that_the_output_has_not():
    """Bytes of a file's name that are no text are escaped; of a title nothing is changed."""
    for encoding, text, expected in (
        ("utf-8", "é\udcff", (0, "é\\udcff\n", "")),
        ("ascii", "é", (2, "", "prog: error: standard output: its encoding, ascii, has no '\\xe9'\n")),
    ):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        err = io.StringIO()
        with redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", err)
            code = run("prog", lambda text=text: print(text))
        assert (code, out.buffer.getvalue().decode(), err.getvalue()) == expected


# --- memory ---


@pytest.mark.parametrize(
    ("prog", "function", "arguments"),
    [
        ("neural-cf baselines", "benchmarks.baselines.load_split", ["x"]),
        ("neural-cf compare", "neural_cf.commands.compare.read_report", ["x", "y"]),
        ("convert.py", "neural_cf.data.conversion.read_ratings", ["x", "y"]),
        ("neural-cf export", "neural_cf.serving.export.read_model", ["x", "y.pt2"]),
        ("ncf.py", "neural_cf.commands.start.load_split", ["x"]),
        ("neural-cf plot", "neural_cf.reporting.plot.draw_runs", ["x", "-o", "y.png"]),
        ("neural-cf recommend", "neural_cf.commands.recommend.load_split", ["x", "y", "--user", "1"]),
    ],
)
@pytest.mark.parametrize(
    "error", [MemoryError("1 GB"), RuntimeError("DefaultCPUAllocator: 1 GB"), torch.OutOfMemoryError("1 GB")]
)
def test_out_of_memory_is_one_line(prog, function, arguments, error, monkeypatch, in_empty_directory):
    """In every script."""

    def fail(*_):
        raise error

    monkeypatch.setattr("neural_cf.reporting.plot.read_run", Path)
    monkeypatch.setattr(function, fail)
    outcome = call(prog, MAINS[prog], arguments, "smaller files take less")
    assert (outcome.code, outcome.out) == (2, "")
    expected = f"{prog}: error: out of memory: smaller files take less ({error})\n"
    assert outcome.err == expected


def test_other_runtime_errors_keep_their_traceback():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run("prog", fail)
