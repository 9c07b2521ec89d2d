"""neural-cf NAME: its help and errors, the way from ratings to recommendations, and where it can be called from."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import NEGATIVES, SIZES, Outcome, call
from helpers_paths import ROOT
from helpers_training import same, weights

import neural_cf
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf import __main__ as command_line
from neural_cf.commands import auto, calibrate, evaluate, recommend, train
from neural_cf.commands.flags import build_parser
from neural_cf.split import load_split

pytestmark = pytest.mark.usefixtures("in_empty_directory")

NAMES = [
    *("convert", "train", "evaluate", "calibrate", "auto", "recommend"),
    *("export", "compare", "plot", "synthetic", "baselines"),
]


def neural(*arguments: object) -> Outcome:
    """``neural-cf`` in this process."""
    return call("neural-cf", command_line.main, arguments)


# --- help ---


def test_help_lists_every_command_with_a_line():
    """And both ways of calling them."""
    outcome = neural("--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("usage: neural-cf NAME ...   (or: python -m neural_cf NAME ...)\n")
    listed = outcome.out.partition("commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == NAMES
    assert all(re.fullmatch(r"  [a-z]+ +\w[^\n]{10,}", line) for line in listed)
    assert {re.match(r"  [a-z]+ +", line).end() for line in listed} == {2 + len("calibrate") + 2}


def test_no_arguments_show_the_help():
    assert neural() == neural("--help") == neural("-h")


def test_version_is_the_packages():
    outcome = neural("--version")
    assert outcome == Outcome(0, f"neural-cf {neural_cf.__version__}\n", "")


@pytest.mark.parametrize("name", ["frobnicate", "Train", "", "tra", "neural_cf.commands.train"])
def test_unknown_command_is_a_line(name):
    """With the commands that there are."""
    outcome = neural(name, "--help")
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("neural-cf: error: ")
    assert repr(name) in line
    assert all(command in line for command in NAMES)


@pytest.mark.parametrize("flag", ["--frobnicate", "--vers=1"])
def test_unknown_flag_before_the_command_is_a_line(flag):
    outcome = neural(flag)
    assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (2, "", 1)
    assert outcome.err.startswith("neural-cf: error: ")


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_of_its_own(name):
    for flag in ("-h", "--help"):
        outcome = neural(name, flag)
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.startswith(f"usage: neural-cf {name} ")


# --- errors ---


@pytest.mark.parametrize("name", NAMES)
def test_wrong_command_line_is_a_line_with_the_commands_name(name):
    for arguments in ([], ["--no-such-flag"]):
        outcome = neural(name, *arguments)
        assert (outcome.code, outcome.out) == (2, "")
        (line,) = outcome.err.splitlines()
        assert line.startswith(f"neural-cf {name}: error: ")


@pytest.mark.parametrize(
    "line",
    [
        "convert nope out",
        "train nope",
        "evaluate nope --load nope",
        "calibrate nope --load nope",
        "auto nope --load nope",
        "recommend nope nope --user 1",
        "export nope out.onnx",
        "compare nope.json nope.json",
        "plot nope -o out.png",
        "baselines nope",
    ],
)
def test_missing_file_is_a_line_with_the_commands_name(line):
    """Nothing is written."""
    outcome = neural(*line.split())
    assert (outcome.code, outcome.out) == (2, "")
    (error,) = outcome.err.splitlines()
    assert error.startswith(f"neural-cf {line.split()[0]}: error: ")
    assert "nope" in error
    assert list(Path(".").iterdir()) == []


def test_warning_begins_with_the_commands_name(split_dir, checkpoint):
    outcome = neural(
        "train", split_dir, "--load", checkpoint, "--validate", "--max-steps", 1, "-e", 3, "-o", "out"
    )
    assert outcome.code == 0
    warnings = [line for line in outcome.err.splitlines() if "warning" in line]
    assert [line.partition(str(checkpoint))[0] for line in warnings] == [
        "neural-cf train: warning: --validate: "
    ]


def test_baselines_outside_a_clone_is_a_line(monkeypatch):
    """Where the package benchmarks is not installed; other commands need none of it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        command_line.importlib.util,
        "find_spec",
        lambda name, *more: None if name == "benchmarks" else find(name, *more),
    )
    error = "baselines is a measurement of the repository: run python -m neural_cf baselines in a clone"
    assert neural("baselines", "--help") == Outcome(2, "", f"neural-cf baselines: error: {error}\n")
    assert neural("synthetic", "--help").code == 0


# --- the same as ncf.py ---


def figures(outcome: Outcome) -> list[str]:
    """Return what a command printed that went well, without times and files."""
    assert outcome.code == 0, outcome.err
    text = re.sub(r"(_time|time) = [\d.]+", "", outcome.out)
    return [re.sub(r"\S*[ab]/\S+", "FILE", line) for line in text.splitlines()]


def statistics(path: str) -> dict:
    """Return a file of statistics, without what its head says of where it is from."""
    return yaml.safe_load(Path(path).read_text())


def test_from_ratings_to_recommendations(ncf, convert, ratings_file, contents):
    """Each command, then the command line of ncf.py or convert.py for the same, with the same figures."""
    for name in "ab":
        Path(name).mkdir()
    pair = (
        neural("convert", *(ratings_file, "a/split", "-n", NEGATIVES)),
        convert(ratings_file, "b/split", "-n", NEGATIVES),
    )
    assert figures(pair[0]) == figures(pair[1])
    assert contents(Path("a/split")) == contents(Path("b/split"))

    flags = [*SIZES, "-e", 2, "-s", 1, "-l", 0.01, "-o"]
    pair = call("neural-cf train", train.main, ("a/split", *flags, "a/run")), ncf("b/split", *flags, "b/run")
    assert figures(pair[0]) == figures(pair[1])
    assert sum("HR@10 = " in line for line in figures(pair[0])) == 3
    assert same(weights("a/run"), weights("b/run"))

    def both(main, name: str, mode: list, flags: list, out: str) -> list[str]:
        """Return what a command printed, which ncf.py prints with ``mode`` too."""
        words = [str(word) for word in [*flags, "-o", f"a/{out}"]]
        of_command = call(f"neural-cf {name}", main, ("a/split", "--load", "a/run/best.pth.tar", *words))
        words = [word.replace("a/", "b/") for word in words]
        of_script = ncf("b/split", "--load", "b/run/best.pth.tar", *mode, *words)
        assert figures(of_command) == figures(of_script)
        return figures(of_command)

    stats = ["--qe-stats-out", "a/stats.yaml"]
    both(calibrate.main, "calibrate", [], ["--qe-calibration", 1, *stats], "calibration")
    assert statistics("a/stats.yaml") == statistics("b/stats.yaml")
    (line,) = both(evaluate.main, "evaluate", ["--evaluate"], ["-k", 5, 10], "float")
    assert re.match(r"HR@5 = 0\.\d{4}, NDCG@5 = ", line)
    quantize = ["--quantize-eval", "--qe-stats-file", "a/stats.yaml", "--qem", "asym_u"]
    (line,) = both(evaluate.main, "evaluate", ["--evaluate"], quantize, "int8")
    assert re.match(r"HR@10 = 0\.\d{4}, NDCG@10 = ", line)
    found = both(auto.main, "auto", ["--qe-auto"], ["-s", 1, "--qe-max-loss", 1], "auto")
    assert sum(line.startswith("Chosen: ") for line in found) == 1
    assert found[-1].startswith("The other ")

    user = int(load_split("a/split").user_ids[0])
    models = ["run/best.pth.tar", "int8/quantized.pth.tar"]
    for model in models:
        rows = [
            figures(
                call(
                    "neural-cf recommend",
                    recommend.main,
                    (f"{name}/{model}", f"{name}/split", "--user", user, "-n", 3),
                )
            )
            for name in "ab"
        ]
        assert rows[0] == rows[1]
        assert rows[0][0].split() == ["user", "rank", "item", "score"]
        assert [line.split()[:2] for line in rows[0][1:]] == [[str(user), str(rank)] for rank in (1, 2, 3)]


def test_calibrate_takes_a_tenth_by_default(split_dir, checkpoint):
    """And the share by its own name too."""
    load = ["--load", checkpoint]
    for name, portion in (("a", []), ("b", ["--portion", 0.1]), ("c", ["--portion", 1])):
        assert neural("calibrate", split_dir, *load, *portion, "--qe-stats-out", name, "-o", "out").code == 0
    assert statistics("a") == statistics("b") != statistics("c")


def parser_of(module, monkeypatch: pytest.MonkeyPatch):
    """Return the parser that a command parses its line with."""

    class FoundError(Exception):
        pass

    def found(_argv, parser):
        raise FoundError(parser)

    monkeypatch.setattr(module, "parse_settings", found)
    with pytest.raises(FoundError) as error:
        module.main(["split"])
    return error.value.args[0]


@pytest.mark.parametrize("module", [train, evaluate, calibrate, auto], ids=lambda module: module.__name__)
def test_flags_of_a_command_are_those_of_ncf(module, monkeypatch):
    """Each with the same names, type, choices and default. A command's own name stands for its mode."""
    own = parser_of(module, monkeypatch)._option_string_actions
    ncf = build_parser()._option_string_actions
    assert own.keys() - ncf.keys() == ({"--portion"} if module is calibrate else set())
    for option in own.keys() & ncf.keys():
        for attribute in ("dest", "nargs", "type", "choices", "default", "const"):
            here, there = (getattr(action[option], attribute) for action in (own, ncf))
            assert here == there or (option, attribute) == ("--qe-calibration", "default"), option


def test_commands_together_have_all_flags_of_ncf(monkeypatch):
    """But those that ask for a mode by themselves."""
    own = set()
    for module in (train, evaluate, calibrate, auto):
        own |= parser_of(module, monkeypatch)._option_string_actions.keys()
    missing = build_parser()._option_string_actions.keys() - own
    assert missing == {"--eval", "--evaluate", "--qe-auto", "--activation-histograms", "--act-hist"}


# --- from anywhere ---

SCRIPT = Path(sys.executable).parent / "neural-cf"
WAYS = {"module": [sys.executable, "-m", "neural_cf"], "script": [str(SCRIPT)]}


@pytest.mark.parametrize("way", WAYS)
def test_files_of_the_current_directory_are_not_taken_for_ours(way, split_dir, run_dir):
    """A user's own training.py and the like beside the data: no command imports them."""
    assert SCRIPT.exists(), "pip install --editable . makes it"
    for name in ("training", "dataset", "neumf", "ncf", "convert", "split", "model", "recommend", "export"):
        Path(f"{name}.py").write_text(
            f"raise SystemExit('{name}.py of the current directory was imported')\n"
        )
    paths = {"PYTHONPATH": str(ROOT)} if way == "module" else {}
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | paths
    shutil.copy(run_dir / "best.pth.tar", "best.pth.tar")
    done = subprocess.run(
        [*WAYS[way], "evaluate", split_dir, "--load", "best.pth.tar", "-o", "out"],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    hr = load_checkpoint(Path("best.pth.tar"))["hr"]
    assert done.stdout.startswith(f"HR@10 = {hr:.4f}, ")
