"""The benchmark table, from figures to Markdown and from ratings to figures; command lines that are written down."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Outcome, call, run_ncf
from torch.distributed.run import get_args_parser

from benchmarks import baselines, evaluation, precision, pretraining, table, training
from benchmarks.table import figures_in, markdown
from distiller.system.files import file_digest
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.commands import compare, convert, export, plot, recommend, synthetic
from neural_cf.commands.flags import build_parser, parse_args
from neural_cf.serving.export import FORMATS as EXPORT_FORMATS
from neural_cf.split import load_split

SMALL = ["--layers", "8", "6", "4", "--factors", "4", "--batch-size", "1024", "--learning-rate", "0.01"]
HEADER = "| Precision | Mode | Per-Channel | Split Final Layer | HR@10 | NDCG@10 |"
ROWS = [
    ("FP32", "N/A", "N/A", "N/A"),
    ("INT8", "Asymmetric", "Yes", "No"),
    ("INT8", "Asymmetric", "Yes", "Yes"),
    ("INT8", "Asymmetric", "No", "No"),
    ("INT8", "Asymmetric", "No", "Yes"),
    ("INT8", "Symmetric", "Yes", "No"),
    ("INT8", "Symmetric", "Yes", "Yes"),
    ("INT8", "Symmetric", "No", "No"),
    ("INT8", "Symmetric", "No", "Yes"),
]
PERCENT = r"\d+\.\d\d"
SPREAD = rf"{PERCENT} ± {PERCENT}"


# --- figures ---


def test_table_of_one_seed():
    """Percent with two decimals, in the order of the figures."""
    figures = {("FP32", "N/A", "N/A", "N/A"): (63.554, 37.196), ("INT8", "Sym", "Yes", "No"): (5, 0.006)}
    assert markdown([figures]).split("\n") == [
        HEADER,
        "| --- | --- | --- | --- | --- | --- |",
        "| FP32 | N/A | N/A | N/A | 63.55 | 37.20 |",
        "| INT8 | Sym | Yes | No | 5.00 | 0.01 |",
    ]


def test_table_of_two_seeds():
    """Means, and deviations of the sample: of 60 and 64 it is sqrt(4 + 4) = 2.83."""
    row = ("FP32", "N/A", "N/A", "N/A")
    lines = markdown([{row: (60.0, 30.0)}, {row: (64.0, 30.0)}]).split("\n")
    assert lines[2:] == ["| FP32 | N/A | N/A | N/A | 62.00 ± 2.83 | 30.00 ± 0.00 |"]


def test_table_of_three_seeds():
    """Of 1, 2 and 6, sqrt((4 + 1 + 9) / 2) = 2.65; of 0.1, 0.2 and 0.3, 0.1."""
    row = ("INT8", "Symmetric", "No", "Yes")
    figures = [{row: values} for values in ((1, 0.1), (2, 0.2), (6, 0.3))]
    assert markdown(figures).split("\n")[2] == "| INT8 | Symmetric | No | Yes | 3.00 ± 2.65 | 0.20 ± 0.10 |"


def test_figures_of_an_evaluations_line():
    """In percent, whatever stands around the line."""
    line = "Initial HR@10 = 0.6355, NDCG@10 = 0.3720, val_time = 12.34\n"
    assert figures_in(line) == pytest.approx((63.55, 37.20))
    assert figures_in(f"Evaluated as trained\n{line}more\n") == pytest.approx((63.55, 37.20))
    assert figures_in("Initial HR@10 = 1.0000, NDCG@10 = 0.0000, val_time = 0.00") == (100, 0)


def test_figures_of_a_real_evaluation(split_dir, checkpoint, tmp_path):
    """What ncf.py prints is what the table reads."""
    outcome = run_ncf(split_dir, "--load", checkpoint, "--evaluate", "-o", tmp_path)
    saved = load_checkpoint(checkpoint)
    assert figures_in(outcome.out) == pytest.approx((100 * saved["hr"], 100 * saved["ndcg"]), abs=0.0051)


# --- the whole of it ---


@dataclass(frozen=True)
class Run:
    """A table that was made: what it is of, where, and what was printed."""

    ratings: Path
    out: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def made(ratings_file, tmp_path_factory) -> Run:
    """A table of one epoch, as a user types it."""
    out = tmp_path_factory.mktemp("table") / "out"
    command = [sys.executable, "-m", "benchmarks.table", ratings_file, "--out", out, "--epochs", "1", *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Run(ratings_file, out, done.stdout, done.stderr)


def rows_and_protocol(stdout: str, figure: str = PERCENT) -> tuple[list[tuple[str, ...]], str]:
    """The table's rows, checked for their form, and the line below it."""
    head, dashes, *body, empty, protocol, end = stdout.split("\n")
    assert (head, set(dashes), empty, end) == (HEADER, set("| -"), "", "")
    cells = [tuple(line.strip("| ").split(" | ")) for line in body]
    assert [row[:4] for row in cells] == ROWS
    for row in cells:
        assert re.fullmatch(figure, row[4]), row
        assert re.fullmatch(figure, row[5]), row
        assert len(row) == 6
    return cells, protocol


def test_table_has_every_row_and_its_protocol(made):
    """FP32 and the eight ways of INT8; what the figures mean, below."""
    cells, protocol = rows_and_protocol(made.stdout)
    split = load_split(made.out / "split")
    digest = file_digest(made.ratings)[:12]
    for part in (
        f"{split.nb_users} users, {split.nb_items} items, {len(split.train_users)} training pairs",
        digest,
        "999 negatives per user, drawn with replacement",
        "Layers 8 6 4, 4 factors, batch 1024, learning rate 0.01",
        "the best by HR@10 of 1 epochs",
        "seeds 1.",
        "10 % of the test users",
        "torch 2.",
    ):
        assert part in protocol
    assert "standard deviation" not in protocol
    best = load_checkpoint(made.out / "seed-1/base_fp32/best.pth.tar")
    assert cells[0][4:6] == (f"{100 * round(best['hr'], 4):.2f}", f"{100 * round(best['ndcg'], 4):.2f}")
    assert all(0 <= float(figure) <= 100 for row in cells for figure in row[4:6])


def test_commands_are_shown_as_they_are_run(made):
    """Conversion, training, two calibrations, nine evaluations: each could be typed again."""
    shown = [line for line in made.stderr.split("\n") if line.startswith("$ python ")]
    words = [shlex.split(line.removeprefix("$ python ")) for line in shown]
    assert [line[0] for line in words] == ["convert.py"] + ["ncf.py"] * 12
    lines = [build_parser().parse_args(line[1:]) for line in words[1:]]
    assert [bool(args.load) for args in lines] == [False] + [True] * 11
    assert [args.qe_calibration for args in lines[1:3]] == [0.1, 0.1]
    assert all(args.evaluate for args in lines[3:])
    assert [args.quantize_eval for args in lines[3:]] == [False] + [True] * 8
    got = [(args.qe_mode, args.qe_per_channel, args.split_final) for args in lines[4:]]
    assert got == [(m, p, s) for m in ("asym_u", "sym") for p in (True, False) for s in (False, True)]
    # Each is evaluated with the statistics of the final layer that it has.
    of_split = {args.split_final: args.qe_stats_out for args in lines[1:3]}
    assert all(args.qe_stats_file == of_split[args.split_final] for args in lines[4:])


# --- once more, in this process ---


@pytest.fixture
def again(scripts_here) -> Callable[..., tuple[Outcome, list[list[str]]]]:
    """Makes a table with the scripts called in this process; what came of it, and the command lines."""

    def make(*arguments: object) -> tuple[Outcome, list[list[str]]]:
        scripts_here.clear()
        return call("table.py", table.main, (*arguments, *SMALL)), list(scripts_here)

    return make


def trainings(commands: list[list[str]]) -> list[list[str]]:
    """The command lines that train."""
    return [line for line in commands if line[0] == "ncf.py" and "--load" not in line]


def test_second_run_does_not_train_again(again, made):
    """The same figures, of the same model."""
    model = made.out / "seed-1/base_fp32"
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    outcome, commands = again(made.ratings, "--out", made.out, "--epochs", 1)
    assert outcome.code == 0, outcome.err
    assert trainings(commands) == []
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    first, second = (rows_and_protocol(stdout)[0] for stdout in (made.stdout, outcome.out))
    assert first == second


def test_model_of_other_settings_is_not_taken_for_this_one(made):
    """One line that names the flag that trains anew."""
    for flags in (
        ["--epochs", 2],
        ["--epochs", 1, "--layers", 8, 4],
        ["--epochs", 1, "--learning-rate", 0.5],
    ):
        outcome = call("table.py", table.main, (made.out / "split", "--out", made.out, *SMALL, *flags))
        assert outcome.code == 2
        (line,) = [line for line in outcome.err.split("\n") if line.startswith("table.py: error: ")]
        assert "--overwrite" in line


def test_overwrite_trains_again(again, split_dir, tmp_path):
    """A directory of a split is used as it is; other settings take the old model's place."""
    for epochs in (1, 2):
        outcome, commands = again(split_dir, "--out", tmp_path, "--overwrite", "--epochs", epochs)
        assert outcome.code == 0, outcome.err
        assert len(trainings(commands)) == 1
        assert commands[0][0] == "ncf.py"
    assert "40 negatives per user" in outcome.out
    assert load_checkpoint(tmp_path / "seed-1/base_fp32/checkpoint.pth.tar")["epoch"] == 1


@pytest.mark.parametrize(("steps", "epoch"), [(3, 0), (10, 0), (14, 1)])  # of 10 an epoch
def test_interrupted_training_is_finished(again, split_dir, tmp_path, steps, epoch):
    """To the weights that it would have had."""
    whole, _ = again(split_dir, "--out", tmp_path / "whole", "--epochs", 2)
    first_epoch = ["-b", 1024, "--layers", 8, 6, 4, "-f", 4, "--seed", 1, "-l", 0.01, "-e", 2]
    broken = tmp_path / "broken/seed-1/base_fp32"
    stopped = run_ncf(split_dir, *first_epoch, "--max-steps", steps, "-o", broken)
    assert stopped.code == 0, stopped.err
    assert load_checkpoint(broken / "checkpoint.pth.tar")["epoch"] == epoch
    outcome, commands = again(split_dir, "--out", tmp_path / "broken", "--epochs", 2)
    assert outcome.code == 0, outcome.err
    assert len(trainings(commands)) == 1
    first, second = (
        load_checkpoint(tmp_path / name / "seed-1/base_fp32/checkpoint.pth.tar")["state_dict"]
        for name in ("whole", "broken")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    rows = [rows_and_protocol(stdout)[0] for stdout in (whole.out, outcome.out)]
    # A stop within an epoch adds an evaluation, which may be the best.
    assert steps != 10 or rows[0] == rows[1]


def test_seeds_are_averaged(again, split_dir, tmp_path):
    """A model for each; the protocol says what the figures are."""
    outcome, commands = again(split_dir, "--out", tmp_path, "--epochs", 1, "--seeds", 3, 4)
    assert outcome.code == 0, outcome.err
    assert [line[line.index("--seed") + 1] for line in trainings(commands)] == ["3", "4"]
    cells, protocol = rows_and_protocol(outcome.out, SPREAD)
    assert "seeds 3 4: mean ± standard deviation" in protocol
    hits = [load_checkpoint(tmp_path / f"seed-{seed}/base_fp32/best.pth.tar")["hr"] for seed in (3, 4)]
    assert float(cells[0][4].split()[0]) == pytest.approx(50 * sum(hits), abs=0.011)


def test_script_that_fails_ends_the_table(again, tmp_path):
    """With its code."""
    outcome, commands = again(tmp_path / "nothing.csv", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert [line[0] for line in commands] == ["convert.py"]
    assert outcome.out == ""


# --- command lines that are written down ---


def command_lines(text: str, start: str) -> list[list[str]]:
    """The words after ``start`` of every line that begins with it, lines ending in a backslash joined."""
    joined = text.replace("\\\n", " ")
    found = [line.strip() for line in joined.split("\n") if line.strip().startswith(start)]
    return [shlex.split(line.removeprefix(start)) for line in found]


def long_flags(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


def flags_of(parse: Callable[[], object]) -> set[str]:
    """Every flag that a script's help names."""
    outcome = call("script", parse, ("--help",))
    assert outcome.code == 0
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9_-]*", outcome.out))


def known_flags() -> dict[str, set[str]]:
    return {
        "ncf.py": flags_of(lambda: build_parser().parse_args()),
        "convert.py": flags_of(lambda: convert.parse_args(None, "convert.py")),
        "neural-cf synthetic": flags_of(lambda: synthetic.parse_args()),
        "neural-cf baselines": flags_of(baselines.parse_args),
        "neural-cf plot": flags_of(plot.parse_args),
        "neural-cf compare": flags_of(compare.parse_args),
        "neural-cf recommend": flags_of(recommend.parse_args),
        "neural-cf export": flags_of(export.parse_args),
        "benchmarks.table": flags_of(table.parse_args),
        "benchmarks.precision": flags_of(precision.parse_args),
        "benchmarks.pretraining": flags_of(pretraining.parse_args),
        "benchmarks.training": flags_of(training.parse_args),
        "benchmarks.evaluation": flags_of(evaluation.parse_args),
        "torchrun": flags_of(lambda: get_args_parser().parse_args()),
    }


def test_command_lines_of_the_readme_parse(tmp_path, monkeypatch):
    """With flags written out in full, in range and not at odds with each other; the files they read are there."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()  # which earlier lines have made
    lines = command_lines((ROOT / "README.md").read_text(), "python ncf.py ")
    assert len(lines) >= 5
    known = known_flags()["ncf.py"]
    statistics = {None} | {path.name for path in ROOT.glob("*.yaml")}
    for words in lines:
        assert long_flags(words) <= known, words
        args = parse_args(words)
        assert args.qe_stats_file in statistics
        statistics.add(args.qe_stats_out)


def test_flags_in_the_readme_exist():
    """Wherever it names one, in its own scripts or in torchrun."""
    text = (ROOT / "README.md").read_text()
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text))
    assert found
    assert found <= set.union(*known_flags().values())


def test_flags_in_quotes_in_the_readme_take_what_they_say():
    """Each word between bars is a value of the flag before it."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"`(--\S+) (\w+(?:\|\w+)+)`", text)
    assert found
    for flag, values in found:
        if flag == "--format":
            assert set(values.split("|")) <= set(EXPORT_FORMATS.values())
            continue
        for value in values.split("|"):
            extra = ["--qe-clip-n-stds", "2"] if value == "n_std" else []
            build_parser().parse_args(["data", flag, value, *extra])


def anchor(heading: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_contents_of_the_readme_are_its_sections():
    """In order; and whatever it points to within itself or beside itself is there."""
    text = (ROOT / "README.md").read_text()
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    contents = text.split("## Contents\n")[1].split("\n## ")[0]
    listed = re.findall(r"^- \[(.*)\]\(#(.*)\)$", contents, re.MULTILINE)
    assert listed == [(section, anchor(section)) for section in sections if section != "Contents"]
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert {target[1:] for target in targets if target.startswith("#")} <= anchors
    files = [target for target in targets if not target.startswith(("#", "https://"))]
    assert files
    assert all((ROOT / target).exists() for target in files)


def test_targets_in_the_readme_exist():
    """In the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_command_lines_of_the_makefile_parse(monkeypatch):
    """Those of its own scripts, with its variables' defaults."""
    text = (ROOT / "Makefile").read_text()
    values = dict(re.findall(r"^(\w+) \?= (.*)$", text, re.MULTILINE)) | {"DATA": "ratings.csv"}
    text = re.sub(r"\$\((\w+)\)", lambda match: values.get(match[1], match[0]), text)
    known = known_flags()
    for script, count in ((table, 2), (precision, 1)):
        lines = command_lines(text, f"$(BIN)/python -m {script.__name__} ")
        assert len(lines) == count
        for words in lines:
            assert long_flags(words) <= known[script.__name__]
            monkeypatch.setattr(sys, "argv", ["table.py", *words])
            script.parse_args()
    ratings = command_lines(text, "$(BIN)/python -m neural_cf synthetic ")
    assert len(ratings) == 1
    for words in ratings:
        assert long_flags(words) <= known["neural-cf synthetic"]
        synthetic.parse_args(words)
