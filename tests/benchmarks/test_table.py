"""The benchmark table, from figures to Markdown and from ratings to figures; command lines that are written down."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import Outcome, call, run_ncf
from helpers_paths import ROOT
from torch.distributed.run import get_args_parser

import neural_cf.shipped as shipped_module
from benchmarks import evaluation, precision, pretraining, table, training
from benchmarks.table import figures_in, markdown
from distiller.system.files import file_digest
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.__main__ import COMMANDS
from neural_cf.commands import convert, synthetic
from neural_cf.commands.arguments import parse_settings
from neural_cf.commands.flags import build_parser
from neural_cf.runs.directory import BEST, CHECKPOINT, QUANTIZED
from neural_cf.runs.settings import Mode, Settings
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
    line = "HR@10 = 0.6355, NDCG@10 = 0.3720, val_time = 12.34\n"
    assert figures_in(line) == pytest.approx((63.55, 37.20))
    assert figures_in(f"Initial {line}") == pytest.approx((63.55, 37.20))  # as earlier versions print it
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


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]
# A line of code that begins with a command, or a whole command in backquotes, which may be wrapped.
PROGRAM = r"(?:/usr/bin/time -v )?(?:python|torchrun|neural-cf)"
COMMAND = re.compile(
    rf"^ {{4}}({PROGRAM} .*)$|`((?:/usr/bin/time -v )?(?:python|torchrun) [^`]+)`", re.MULTILINE
)
WITH_SETTINGS = {"train", "evaluate", "calibrate", "auto"}
BENCHMARKS = {module.__name__: module for module in (table, precision, pretraining, training, evaluation)}
PIP_FLAGS = {"--extra-index-url"}


class Parsed(Exception):
    """What takes the place of a run: the settings that a command line asks for."""


def command_lines(text: str, start: str) -> list[list[str]]:
    """Return the words after ``start`` of every line that begins with it, lines ending in a backslash joined."""
    joined = text.replace("\\\n", " ")
    found = [line.strip() for line in joined.split("\n") if line.strip().startswith(start)]
    return [shlex.split(line.removeprefix(start)) for line in found]


def written_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every command line on a page, in order, without what stands before and behind it."""
    for match in COMMAND.finditer(page.read_text()):
        line = " ".join((match[1] or match[2]).split()).removeprefix("/usr/bin/time -v ")
        words = shlex.split(line.split(" > ")[0], comments=True)
        if len(words) > 3 and "NAME" not in words:  # else it only names a program
            yield words


def long_flags(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


def flags_of(parse: Callable[[], object]) -> set[str]:
    """Return every flag that a script's help names."""
    outcome = call("script", parse, ("--help",))
    assert outcome.code == 0
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9_-]*", outcome.out))


def module_of(name: str):
    """Return the module of a command of ``neural-cf``."""
    return importlib.import_module(COMMANDS[name].module)


def known_flags() -> dict[str, set[str]]:
    """Return the flags of every program that the pages name."""
    commands = {name: flags_of(lambda name=name: module_of(name).main(["--help"])) for name in COMMANDS}
    benchmarks = {name: flags_of(module.parse_args) for name, module in BENCHMARKS.items()}
    return {
        "ncf.py": flags_of(parse_settings),
        "convert.py": commands["convert"],
        "torchrun": flags_of(lambda: get_args_parser().parse_args()),
        **commands,
        **benchmarks,
    }


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return which program a command line calls, and its arguments; None for one that is not this project's.

    The name is ``ncf.py``, ``convert.py``, that of a command of ``neural-cf``, or that of a benchmark.
    """
    if words[0] == "neural-cf":
        return words[1], words[2:]
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        return launch.training_script, launch.training_script_args
    if words[1:3] == ["-m", "neural_cf"]:
        return words[3], words[4:]
    if words[1] == "-m":
        return (words[2], words[3:]) if words[2] in BENCHMARKS else None
    return (words[1], words[2:]) if words[1].endswith(".py") else None


def parsed(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Settings | Namespace:
    """Return what a program makes of its arguments, without running it; its errors are the test's."""
    if name == "ncf.py":
        return parse_settings(words)
    if name in WITH_SETTINGS:

        def stop(settings: Settings, prog: str) -> None:
            raise Parsed(settings)

        monkeypatch.setattr(module_of(name), "started", stop)
        with pytest.raises(Parsed) as info:
            module_of(name).main(words)
        return info.value.args[0]
    if name in ("convert", "convert.py"):
        return convert.parse_args(words, name)
    if name in BENCHMARKS:
        monkeypatch.setattr(sys, "argv", [name, *words])
        return BENCHMARKS[name].parse_args()
    return module_of(name).parse_args(words)


def files_made(name: str, args: Settings | Namespace) -> set[str]:
    """Return the files that later command lines may read once this one has run."""
    made = {str(args.report)} if getattr(args, "report", None) else set()
    if not isinstance(args, Settings):
        return made
    if args.qe_stats_out:
        made.add(str(args.qe_stats_out))
    names = {Mode.TRAIN: [BEST, CHECKPOINT], Mode.AUTO: ["quant_auto.yaml"]}.get(args.mode, [])
    names = [QUANTIZED] if args.quantize_eval else names
    return made | {f"{args.out_dir}/{file}" for file in names if args.out_dir}


def files_read(name: str, args: Settings | Namespace) -> set[str]:
    """Return the files that a command line reads, but for ratings and splits."""
    if isinstance(args, Settings):
        found = (args.load, args.qe_stats_file, args.qe_config_file, args.compress)
    elif name in ("recommend", "export"):
        found = (args.checkpoint,)
    else:
        found = (args.a, args.b) if name == "compare" else ()
    shipped = shipped_module.__path__[0]  # files of the repository that are installed too
    return {Path(path).name if str(path).startswith(shipped) else str(path) for path in found if path}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_of_the_pages_parse(page, tmp_path, monkeypatch):
    """Flags are written out in full, in range and not at odds with each other, and the files they read are there.

    They are in the repository, or made by a line above or by one of the README's.
    """
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    known = known_flags()
    there = {str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.yaml"), *ROOT.glob("schedules/*.yaml"))}
    count = dict.fromkeys((PAGES[0], page), 0)
    for each in count:
        for program in filter(None, map(program_of, written_commands(each))):
            name, words = program
            assert name in known, program
            assert long_flags(words) <= known[name], program
            args = parsed(name, words, monkeypatch)
            assert files_read(name, args) <= there, program
            made = files_made(name, args)
            for path in map(Path, made):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("{}")  # a --qe-config-file is read when its line is parsed
            there |= made
            count[each] += 1
    assert count[PAGES[0]] >= 15


def test_pages_name_every_command():
    """The README's table has them all, and each has a command line on some page."""
    rows = re.findall(r"^\| `([a-z]+) [^`]*` \|", PAGES[0].read_text(), re.MULTILINE)
    assert rows == list(COMMANDS)
    used = {program[0] for page in PAGES for program in map(program_of, written_commands(page)) if program}
    # calibrate is ncf.py's --qe-calibration on every page.
    assert set(COMMANDS) - used <= {"calibrate"}


def test_flags_in_the_pages_exist():
    """Wherever they name one: in this project's programs, in torchrun or in pip."""
    known = set.union(PIP_FLAGS, *known_flags().values())
    for page in PAGES:
        found = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", page.read_text()))
        assert found <= known, page


def test_flags_in_quotes_in_the_pages_take_what_they_say():
    """Each word between bars is a value of the flag before it."""
    pattern = re.compile(r"`(--\S+) ([\w-]+(?:\|[\w-]+)+)`")
    found = [pair for page in PAGES for pair in pattern.findall(page.read_text())]
    assert found
    for flag, values in found:
        if flag == "--format":
            assert set(values.split("|")) <= set(EXPORT_FORMATS.values()) | {"table", "csv", "json"}
            continue
        for value in values.split("|"):
            extra = ["--qe-clip-n-stds", "2"] if value == "n_std" else []
            build_parser().parse_args(["data", flag, value, *extra])


def anchor(heading: str) -> str:
    """Return a heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To a section of the page itself, or to a file of the repository and a section of that."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file, _, section = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        assert not section or section in anchors(path), target


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_source_files_that_pages_name_exist(page):
    """Those that are named by their path from the repository's root."""
    paths = set(
        re.findall(
            r"(?<![\w/.])(?:tests|benchmarks|distiller|neural_cf|schedules)/[\w/]+\.\w+", page.read_text()
        )
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_contents_of_the_pages_are_their_sections():
    """Where a page begins with a list of its sections, it has them all in order."""
    listed = 0
    for page in PAGES[1:]:
        text = page.read_text()
        contents = re.findall(r"^- \[(.*)\]\(#(.*)\)$", text.split("\n## ")[0], re.MULTILINE)
        sections = [
            section for section in re.findall(r"^## (.*)$", text, re.MULTILINE) if section != "Sources"
        ]
        if contents:
            assert contents == [(section, anchor(section)) for section in sections], page
            listed += 1
    assert listed >= 4


def test_readme_is_short_and_leads_to_every_page():
    """It has 1,500 words at most."""
    text = PAGES[0].read_text()
    assert len(text.split()) <= 1500
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(re.findall(r"\]\(([^)#]+)", text))


def test_targets_in_the_pages_exist():
    """In the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(page.read_text() for page in DOCUMENTS)
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z]+)", text, re.MULTILINE))
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
        assert long_flags(words) <= known["synthetic"]
        synthetic.parse_args(words)
