"""Whatever is in a file or on a command line: it works or is a one-line error, and no file is changed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import contents, run_convert, run_ncf
from helpers_files import HEADERS, ratings
from helpers_fuzz import FUZZ, assert_works_or_refused, changed, no_hang, read_or_refused
from helpers_quant import small_model
from helpers_split import tiny_split
from hypothesis import given
from hypothesis import strategies as st

from distiller.quantization.statistics import check_statistics, load_statistics
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.commands.flags import build_parser
from neural_cf.split import CSV_FILES, PICKLE, load_split, same_pairs, write_pickle

pytestmark = pytest.mark.usefixtures("in_empty_directory")

NUMBERS = (
    "0",
    "-1",
    "1e308",
    "nan",
    "inf",
    "9" * 30,
    "9" * 5000,
    "0x1",
    "1_0",
    "٣",
    "",
    " ",
    "\0",
    "½",
    "1,5",
)


def fresh(directory: str) -> Path:
    """An empty directory."""
    shutil.rmtree(directory, ignore_errors=True)
    path = Path(directory)
    path.mkdir()
    return path


# --- ratings ---


def field() -> st.SearchStrategy[str]:
    return st.sampled_from(NUMBERS) | st.integers().map(str) | st.floats().map(str) | st.text(max_size=4)


def table(delimiter: str) -> st.SearchStrategy[bytes]:
    """Rows of any fields behind whole ones."""
    row = st.lists(field(), max_size=6).map(delimiter.join)
    rows = st.lists(row, max_size=4).map("\n".join)
    return rows.map(lambda text: (ratings(delimiter) + text).encode(errors="surrogatepass"))


@pytest.mark.parametrize("delimiter", HEADERS)
def test_ratings(delimiter):
    """Of every format, through convert.py."""
    whole = ratings(delimiter).encode()
    tokens = (*(number.encode() for number in NUMBERS), delimiter.encode(), b"\n", b"\r", b"\n\n")

    @FUZZ
    @given(changed(whole, tokens) | table(delimiter) | st.binary(max_size=100))
    def fuzz(content):
        work = fresh("work")
        (work / "ratings").write_bytes(content)
        before = contents(work)
        with no_hang():
            outcome = run_convert(work / "ratings", work / "split", "-n", 5)
        assert_works_or_refused(outcome, "convert.py")
        if outcome.code:
            assert contents(work) == before
        else:
            assert load_split(work / "split").negatives.shape[1] == 5

    fuzz()


# --- splits ---


def test_pickled_splits():
    """By themselves: there is nothing to make them anew from."""
    directory = fresh("whole")
    write_pickle(tiny_split(), directory / PICKLE)
    whole = (directory / PICKLE).read_bytes()
    tokens = (b"\x96" + b"\xff" * 8, b"\x8a\xff", b"cos\nsystem\n", b"\x81", b"b", b"R", b"}", b"\x85" * 50)

    @FUZZ
    @given(changed(whole, tokens) | st.binary(max_size=60))
    def fuzz(content):
        (directory / PICKLE).write_bytes(content)
        read_or_refused(lambda: load_split(directory))
        assert contents(directory) == {PICKLE: content}

    fuzz()


def plain() -> st.SearchStrategy[object]:
    """Plain values, nested."""
    leaves = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            | st.tuples(inner, inner)
        ),
        max_leaves=8,
    )


def test_pickled_splits_of_other_parts():
    """Whole pickles in which one part is something else."""
    directory = fresh("other")
    write_pickle(tiny_split(), directory / PICKLE)
    parts = {"format": "neumf-split", "version": 1} | vars(tiny_split())

    @FUZZ
    @given(st.sampled_from(sorted(parts)), plain())
    def fuzz(name, value):
        (directory / PICKLE).write_bytes(pickle.dumps(parts | {name: value}, protocol=5))
        read_or_refused(lambda: load_split(directory))

    fuzz()


@pytest.mark.parametrize("name", CSV_FILES)
def test_splits_as_csv_files(split_dir, name):
    """One of the three is damaged; the others stay as they are, and a pickle is made of what is whole alone."""
    work = fresh("work")
    texts = {each: (split_dir / each).read_bytes() for each in CSV_FILES}
    lines = texts[name].splitlines(keepends=True)
    short = b"".join(lines[: 60 if name != "train-ratings.csv" else 200])
    tokens = (*(number.encode() for number in NUMBERS), b"\t", b"\n")
    assert load_split(split_dir)

    @FUZZ
    @given(changed(short, tokens) | st.binary(max_size=100))
    def fuzz(content):
        (work / PICKLE).unlink(missing_ok=True)
        for each, text in texts.items():
            (work / each).write_bytes(content if each == name else text)
        before = contents(work)
        split = read_or_refused(lambda: load_split(work))
        after = contents(work)
        assert {each: after[each] for each in CSV_FILES} == before
        assert (PICKLE in after) == (split is not None)
        assert split is None or same_pairs(split, load_split(work))

    fuzz()


# --- statistics ---

TOKENS = (
    "!!int",
    "!!python/object/apply:os.system [id]",
    "&a",
    "*a",
    "<<: *a",
    "? [a]",
    "!!timestamp x",
    "!!float ''",
)
TOKENS += (
    "[" * 200,
    "{a: " * 200,
    "1:" * 5000,
    ".nan",
    "~",
    "- ",
    "|",
    "\t",
    "%YAML 9",
    "---",
    "...",
    "=",
    "\ufeff",
)


def statistics_text(stats_file: Path) -> str:
    """Of two layers."""
    content = yaml.safe_load(stats_file.read_text())
    return yaml.safe_dump({name: content[name] for name in ("mf_user_embed", "sigmoid")})


def test_statistics(stats_file):
    """Texts."""
    whole = statistics_text(stats_file).encode()
    path = Path("stats.yaml")

    @FUZZ
    @given(
        changed(whole, tuple(token.encode() for token in TOKENS))
        | st.binary(max_size=60)
        | st.text().map(str.encode)
    )
    def fuzz(content):
        path.write_bytes(content)
        read_or_refused(lambda: load_statistics(path))
        assert path.read_bytes() == content

    fuzz()


def replaced(whole: object, value: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """A nested value in which one part is another."""
    if isinstance(whole, dict) and whole:
        parts = st.sampled_from(list(whole)).flatmap(
            lambda key: replaced(whole[key], value).map(lambda part: whole | {key: part})
        )
        return parts | value
    if isinstance(whole, list) and whole:
        parts = st.integers(0, len(whole) - 1).flatmap(
            lambda i: replaced(whole[i], value).map(lambda part: [*whole[:i], part, *whole[i + 1 :]])
        )
        return parts | value
    return value


def test_statistics_of_other_parts(stats_file):
    """Maps in which one part is something else; what is read is what was written."""
    whole = yaml.safe_load(statistics_text(stats_file))
    path = Path("stats.yaml")

    @FUZZ
    @given(replaced(whole, plain()))
    def fuzz(content):
        path.write_text(yaml.safe_dump(content), encoding="utf-8", errors="surrogatepass")
        found = read_or_refused(lambda: load_statistics(path))
        if found is not None:
            check_statistics(found, path)

    fuzz()


# --- checkpoints ---


@pytest.mark.parametrize("as_zip", [True, False])
def test_checkpoints(as_zip):
    """Of both of PyTorch's formats."""
    path = Path("checkpoint.pth.tar")
    torch.save(
        {"state_dict": small_model(0).state_dict(), "epoch": 1}, path, _use_new_zipfile_serialization=as_zip
    )
    whole = path.read_bytes()
    tokens = (
        b"PK\x01\x02",
        b"PK\x05\x06",
        b"cposix\nsystem\n",
        b"\xff" * 8,
        b"M\xff\xff",
        b"J\xff\xff\xff\x7f",
        b"R",
    )

    @FUZZ
    @given(
        changed(whole, tokens)
        | st.binary(max_size=60)
        | st.binary(max_size=60).map(lambda x: b"PK\x03\x04" + x)
    )
    def fuzz(content):
        path.write_bytes(content)
        loaded = read_or_refused(lambda: load_checkpoint(path))
        assert loaded is None or all(map(torch.is_tensor, loaded["state_dict"].values()))
        assert path.read_bytes() == content

    fuzz()


def values() -> st.SearchStrategy[object]:
    """Plain values, and tensors of other shapes and types."""
    shapes = st.lists(st.integers(0, 3), max_size=3)
    types = st.sampled_from(
        [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16]
    )
    return plain() | st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), shapes, types)


@pytest.mark.parametrize("use", ["--resume", "--load", "--evaluate"])
def test_checkpoints_of_other_parts(split_dir, tmp_path_factory, use):
    """Whole files in which one part is something else, through ncf.py: within an epoch, with a schedule."""
    Path("schedule.yaml").write_text(
        "lr_schedulers: {a: {class: StepLR, step_size: 1}}\npolicies: [{lr_scheduler: {instance_name: a}, epochs: [0]}]"
    )
    train = [
        "--layers",
        8,
        4,
        "-f",
        2,
        "-s",
        1,
        "-b",
        1000,
        "-e",
        2,
        "--compress",
        "schedule.yaml",
        "--max-steps",
        4,
    ]
    assert run_ncf(split_dir, *train, "-o", "whole").code == 0
    whole = torch.load("whole/checkpoint.pth.tar", weights_only=True)
    whole["state_dict"] = dict(whole["state_dict"])

    @FUZZ
    @given(replaced(whole, values()))
    def fuzz(content):
        shutil.rmtree("out", ignore_errors=True)
        shutil.copytree("whole", "out")
        torch.save(content, "out/checkpoint.pth.tar")
        before = contents(Path("out"))
        load = ["--load", "out/checkpoint.pth.tar", "-o", "new", "--overwrite"] if use == "--load" else []
        evaluate = (
            ["--load", "out/checkpoint.pth.tar", "-o", "new", "--evaluate"] if use == "--evaluate" else []
        )
        resume = ["--resume", "-o", "out"] if use == "--resume" else []
        steps = [] if evaluate else ["-e", 3, "--max-steps", 1]
        with no_hang():
            outcome = run_ncf(split_dir, *resume, *load, *evaluate, *steps)
        assert_works_or_refused(outcome, "ncf.py")
        if outcome.code or use != "--resume":
            assert contents(Path("out")) == before

    fuzz()


@pytest.mark.parametrize("split_final", [False, True])
def test_quantized_models_of_other_parts(split_dir, checkpoint, stats_file, split_final):
    """Likewise of quantized.pth.tar."""
    flags = ["--quantize-eval", "--qe-dynamic"] + ["--split-final"] * split_final
    flags = flags if split_final else ["--quantize-eval", "--qe-stats-file", stats_file]
    assert run_ncf(split_dir, "--load", checkpoint, *flags, "-o", "whole").code == 0
    whole = torch.load("whole/quantized.pth.tar", weights_only=True)
    whole["state_dict"] = dict(whole["state_dict"])

    @FUZZ
    @given(replaced(whole, values()))
    def fuzz(content):
        torch.save(content, "other.pth.tar")
        before = Path("other.pth.tar").read_bytes()
        with no_hang():
            outcome = run_ncf(split_dir, "--load", "other.pth.tar", "--evaluate", "-o", "out")
        assert_works_or_refused(outcome, "ncf.py")
        assert Path("other.pth.tar").read_bytes() == before

    fuzz()


# --- the command line ---

WORDS = (
    "0",
    "1",
    "-1",
    "2",
    "3.5",
    "1e-3",
    "nan",
    "inf",
    "",
    " ",
    "x",
    "é",
    "\n",
    "--",
    "-",
    "9" * 30,
    "10000000000",
)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5)


def command_lines(paths: list[str]) -> st.SearchStrategy[list[str]]:
    """Flags with values that they may or may not take."""
    flags = [string for action in build_parser()._actions for string in action.option_strings]
    flags = [flag for flag in flags if flag not in ("-h", "--help")]
    word = st.sampled_from([*WORDS, *paths]) | TEXT
    choices = sorted({str(c) for action in build_parser()._actions for c in action.choices or ()})
    flag = st.tuples(st.sampled_from(flags), st.lists(word | st.sampled_from(choices), max_size=2))
    return st.lists(flag, max_size=5).map(lambda pairs: [w for first, rest in pairs for w in (first, *rest)])


def test_command_lines(split_dir, run_dir, stats_file):
    """Of ncf.py: any flags with any values."""
    inputs = Path("inputs")
    shutil.copytree(run_dir, inputs / "run")
    shutil.copy(stats_file, inputs / "stats.yaml")
    paths = ["inputs/run/best.pth.tar", "inputs/stats.yaml", "inputs", "none", "/dev/null", "out"]
    before = contents(inputs)

    @FUZZ
    @given(command_lines(paths), st.booleans())
    def fuzz(words, small):
        # Of a size that trains in no time, and where nothing else is said into a directory of its own.
        sizes = (
            ["--layers", "4", "2", "-f", "2", "-e", "1", "--max-steps", "1"]
            if small
            else ["--max-steps", "1"]
        )
        with no_hang():
            outcome = run_ncf(split_dir, *sizes, "-o", "out", *words)
        assert_works_or_refused(outcome, "ncf.py")
        assert contents(inputs) == before

    fuzz()


def test_configurations(split_dir, run_dir):
    """Of a run that is resumed: config.json of other parts."""
    whole = json.loads((run_dir / "config.json").read_text())

    @FUZZ
    @given(replaced(whole, plain().filter(lambda value: not contains_bytes(value))))
    def fuzz(content):
        shutil.rmtree("out", ignore_errors=True)
        shutil.copytree(run_dir, "out")
        Path("out/config.json").write_text(json.dumps(content))
        with no_hang():
            outcome = run_ncf(split_dir, "--resume", "-o", "out", "-e", 3, "--max-steps", 1)
        assert_works_or_refused(outcome, "ncf.py")

    fuzz()


def contains_bytes(value: object) -> bool:
    """Which JSON has none of."""
    if isinstance(value, dict):
        return any(map(contains_bytes, value.values()))
    return any(map(contains_bytes, value)) if isinstance(value, list | tuple) else isinstance(value, bytes)
