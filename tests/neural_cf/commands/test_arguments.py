"""Settings from flags and --config files: what wins, what counts as given, what is refused and how."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import call
from helpers_fuzz import FUZZ, read_or_refused
from helpers_training import TRAIN, rows, same, weights
from hypothesis import given
from hypothesis import strategies as st

from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.__main__ import main as neural_cf
from neural_cf.commands.arguments import FACTS, parse_settings
from neural_cf.runs.settings import setting_names

pytestmark = pytest.mark.usefixtures("in_empty_directory")

SUFFIXES = [".json", ".yaml", ".yml"]


def write(content: object, name: str = "c.json") -> Path:
    """Write a file of settings as JSON or YAML, by its name."""
    path = Path(name)
    dump = json.dumps if path.suffix == ".json" else yaml.safe_dump
    path.write_text(content if isinstance(content, str) else dump(content))
    return path


def parsed(line: str):
    """Parse a command line of ncf.py."""
    return parse_settings(["ml-1m", *line.split()])


# --- what was given ---


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("", set()),
        ("-f 8 --layers 64 32 16 8 -b 256 -e 20", {"factors", "layers", "batch_size", "epochs"}),
        ("--sf -n 4 --lf 100 -p 2", {"split_final", "negative_samples", "log_freq", "threads"}),
        ("--processes 2 --topk 10 --pretrain", {"threads", "cutoffs", "pretrain"}),
        ("--load x --qe --qept --qe-report", {"load", "quantize_eval", "qe_convert_pytorch", "qe_report"}),
    ],
)
def test_given_is_what_the_command_line_has(line, names):
    """Its defaults too, and by whatever name a flag has."""
    assert parsed(line).given == {"data"} | names


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_given_is_also_what_a_file_has(suffix):
    """Its defaults too, as on the command line; the file itself is no setting."""
    path = write(
        {"epochs": 20, "factors": 16, "layers": [64, 32, 16, 8], "cutoffs": [5], "seed": 3}, f"c{suffix}"
    )
    assert parsed(f"--config {path} -b 256").given == {
        *("data", "batch_size", "epochs", "factors", "layers", "cutoffs", "seed")
    }


# --- values of a file ---

CONTENT = {
    "factors": 16,
    "layers": [32, 8],
    "learning_rate": 0.002,
    "epochs": 3,
    "cutoffs": [5, 10],
    "split_final": True,
    "optimizer": "adam",
    "precision": None,
    "threshold": 1,
    "patience": 2,
    "out_dir": "run/a",
    "pretrain": [4],
    "compress": None,
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_values_of_a_file_are_taken(suffix):
    """As flags would give them: lists fixed, paths as paths, one number of --pretrain for both branches."""
    settings = parsed(f"--config {write(CONTENT, f'c{suffix}')}")
    expected = CONTENT | {"layers": (32, 8), "cutoffs": (5, 10), "out_dir": Path("run/a"), "pretrain": (4, 4)}
    assert {name: getattr(settings, name) for name in CONTENT} == expected
    assert settings.batch_size == 256


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("-f 8", "factors", 8),  # the default, and given
        ("--layers 4 2", "layers", (4, 2)),
        ("-k 7", "cutoffs", (7,)),
        ("-o b", "out_dir", Path("b")),
        ("--optimizer lazy-adam", "optimizer", "lazy-adam"),
        ("--pretrain 2 1", "pretrain", (2, 1)),
    ],
)
def test_flags_beside_a_file_win(suffix, line, name, value):
    """Before it or after it."""
    path = write(CONTENT, f"c{suffix}")
    for words in (f"--config {path} {line}", f"{line} --config {path}"):
        settings = parsed(words)
        assert getattr(settings, name) == value
        assert name in settings.given
        assert settings.epochs == 3


def test_yaml_of_a_users_own():
    """With comments, and lists in both styles."""
    write("# mine\nlearning-rate-is-not: 1\n", "wrong.yaml")
    write("epochs: 3  # few\nlayers:\n- 8\n- 4\ncutoffs: [5, 10]\nname: a b\n", "c.yaml")
    settings = parsed("--config c.yaml")
    assert (settings.epochs, settings.layers, settings.cutoffs) == (3, (8, 4), (5, 10))
    assert settings.name == "a b"
    with pytest.raises(
        InputError, match=r"^--config: wrong.yaml: learning-rate-is-not is no setting that a file has; ncf.py"
    ):
        parsed("--config wrong.yaml")


# --- a run's own file ---


@pytest.mark.parametrize("command", ["ncf.py", "neural-cf"])
def test_run_by_a_runs_config_is_the_same_run(ncf, split_dir, run_dir, command):
    """To the bit: weights, optimizer and figures. Only where it goes is said anew."""
    line = (split_dir, "--config", run_dir / "config.json", "-s", 1, "-o", "other")
    outcome = ncf(*line) if command == "ncf.py" else call(command, neural_cf, ("train", *line))
    assert outcome.code == 0, outcome.err
    for name in ("checkpoint.pth.tar", "best.pth.tar"):
        assert same(weights(run_dir, name), weights("other", name))
    first, second = (load_checkpoint(path / "checkpoint.pth.tar") for path in (run_dir, Path("other")))
    assert same(first["optimizer_state_dict"], second["optimizer_state_dict"])
    assert [row["hr@10"] for row in rows(run_dir)] == [row["hr@10"] for row in rows("other")]
    config = json.loads(Path("other/config.json").read_text())
    before = json.loads((run_dir / "config.json").read_text())
    assert {name for name in before if config[name] != before[name]} == {"out_dir", "command"}


def test_config_has_the_seed_too(ncf, split_dir):
    """One that was drawn and recorded; another one gives other weights."""
    ncf(split_dir, *TRAIN[:-4], "--max-steps", 5, "-o", "a")
    for more, name in (([], "b"), (["-s", 5], "c")):
        assert ncf(split_dir, "--config", "a/config.json", *more, "--max-steps", 5, "-o", name).code == 0
    assert same(weights("a"), weights("b"))
    assert not same(weights("a"), weights("c"))


def test_what_is_the_runs_own_is_passed_over_in_a_line(ncf, split_dir, run_dir):
    """All that belongs to each start; no line for a file that a user wrote."""
    outcome = ncf(split_dir, "--config", run_dir / "config.json", "--max-steps", 1, "-o", "other")
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("--config")]
    names = "data, out_dir, overwrite, reset_optimizer, resume"
    assert line == f"--config: {run_dir}/config.json is the record of a run: without its {names}"
    write({"epochs": 1})
    assert "--config" not in ncf(split_dir, "--config", "c.json", "--max-steps", 1, "-o", "third").out


def test_config_without_a_directory_does_not_go_into_the_runs_own(ncf, split_dir, run_dir, contents):
    """Which stays as it is; the new run has a fresh one."""
    before = contents(run_dir)
    assert ncf(split_dir, "--config", run_dir / "config.json").code == 0
    assert contents(run_dir) == before
    (fresh,) = Path("run/neumf").iterdir()
    assert same(weights(fresh), weights(run_dir))


@pytest.mark.parametrize(
    "flags", [["--evaluate"], ["--quantize-eval", "--qe-dynamic"], ["--qe-calibration", 1]]
)
def test_record_of_a_training_goes_with_other_modes(ncf, split_dir, run_dir, checkpoint, flags):
    """Without what is for training alone."""
    load = ["--load", checkpoint, *flags]
    outcome = ncf(split_dir, "--config", run_dir / "config.json", *load, "-o", "other")
    assert outcome.code == 0, outcome.err
    plain = ncf(split_dir, *load, "-o", "plain")
    figures = [re.findall(r"@10 = [\d.]+", text) for text in (outcome.out, plain.out)]
    assert figures[0] == figures[1]


def test_number_with_an_exponent_is_a_number_in_yaml_too(tmp_path):
    """YAML 1.1 takes one without a dot for text."""
    assert parsed(f"--config {write('learning_rate: 1e-3', 'c.yaml')}").learning_rate == 0.001


@pytest.mark.parametrize("content", ["", "# nothing yet\n", "{}"])
def test_empty_file_changes_nothing(content):
    assert parsed(f"--config {write(content, 'c.yaml')} -s 1") == parsed("-s 1")


@pytest.mark.parametrize(("topk", "cutoffs"), [(5, (5,)), ([5, 10], (5, 10))])
def test_topk_is_another_name_of_cutoffs(topk, cutoffs):
    assert parsed(f"--config {write({'topk': topk})}").cutoffs == cutoffs


# --- old names ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_processes_of_an_old_file_are_threads(suffix):
    settings = parsed(f"--config {write({'processes': 3}, f'c{suffix}')}")
    assert settings.threads == 3
    assert settings.given >= {"threads"}
    assert parsed(f"--config c{suffix} -p 2").threads == 2


def test_processes_of_an_old_run_are_threads(ncf, split_dir, run_dir):
    """Which is resumed with as many, and from then on has the new name."""
    shutil.copytree(run_dir, "old")
    path = Path("old/config.json")
    config = json.loads(path.read_text())
    del config["threads"]
    path.write_text(json.dumps(config | {"processes": 1}))
    outcome = ncf(split_dir, "--resume", "-e", 3, "-o", "old")
    assert outcome.code == 0, outcome.err
    config = json.loads(path.read_text())
    assert (config["threads"], "processes" in config) == (1, False)


# --- refused ---

REFUSED = {
    "unknown": ({"epoch": 3}, "epoch"),
    "unknown with dashes": ({"batch-size": 3}, "batch-size"),
    "the parser's own": ({"config": "x.json"}, "config"),
    "not of users": ({"given": ["seed"]}, "given"),
    "text for a number": ({"epochs": "3"}, "epochs"),
    "fraction for a number": ({"batch_size": 2.5}, "batch_size"),
    "truth for a number": ({"seed": True}, "seed"),
    "of the command line": ({"data": "ml-1m"}, "data"),
    "both names": ({"threads": 1, "processes": 2}, "threads"),
    "number for text": ({"name": 3}, "name"),
    "number for a path": ({"load": 3}, "load"),
    "number for truth": ({"split_final": 1}, "split_final"),
    "number for a list": ({"layers": 8}, "layers"),
    "text in a list": ({"cutoffs": [10, "5"]}, "cutoffs"),
    "list in a list": ({"layers": [[8, 4]]}, "layers"),
    "empty list": ({"layers": []}, "layers"),
    "map": ({"qe_mode": {"sym": 1}}, "qe_mode"),
    "choice": ({"optimizer": "sgd"}, "optimizer"),
    "choice of numbers": ({"qe_embedding_bits": 5}, "qe_embedding_bits"),
    "choice of modes": ({"qe_mode": "SYM"}, "qe_mode"),
    "no epochs": ({"epochs": 0}, "epochs"),
    "large number": ({"batch_size": 1 << 40}, "batch_size"),
    "negative": ({"negative_samples": -1}, "negative_samples"),
    "rate": ({"learning_rate": 0}, "learning_rate"),
    "share": ({"threshold": 1.5}, "threshold"),
    "width": ({"layers": [1 << 20, 8]}, "layers"),
    "no such width": ({"layers": [7, 4]}, "layers"),
    "twice": ({"cutoffs": [5, 5]}, "topk"),
    "patience": ({"patience": 0}, "patience"),
    "two sources": (
        {"quantize_eval": True, "load": "x", "qe_dynamic": True, "qe_stats_file": "s"},
        "qe_dynamic",
    ),
}


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize("case", REFUSED)
def test_wrong_entry_is_refused_in_a_line_with_file_and_key(ncf, split_dir, case, suffix, contents):
    """With exit code 2, and nothing is written."""
    content, key = REFUSED[case]
    path = write(content, f"mine{suffix}")
    before = contents(Path("."))
    outcome = ncf(split_dir, "--config", path)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("ncf.py: error: ")
    assert key.replace("_", "-") in line.replace("_", "-")
    assert contents(Path(".")) == before
    assert not Path("run").exists()
    assert str(path) in line


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"learning_rate": 10**400}, "learning_rate"),
        ({"l2": 10**400}, "l2"),
        ({"pretrain": [1], "pretrain_rate": 10**400}, "pretrain_rate"),
        ({"out_dir": "a\0b"}, "out_dir"),
        ({"name": "a\0b"}, "name"),
        ({"load": "a\0b"}, "load"),
        ({"name": "a\ud800b"}, "name"),
        ({"compress": "a\0b"}, "compress"),
    ],
)
def test_value_beyond_any_use_is_refused_in_a_line(ncf, split_dir, content, key):
    """JSON has whole numbers that no float has, and names that no file has; neither ends in a traceback."""
    outcome = ncf(split_dir, "--config", write(content), "--max-steps", 1)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert key.replace("_", "-") in line.replace("_", "-")
    assert not list(Path(".").rglob("*.tar"))


FILES = {
    "cut.json": ('{"epochs": 3, ', "cut.json"),
    "cut.yaml": ("epochs: [3", "cut.yaml: not YAML"),
    "empty.json": ("", "empty.json"),
    "list.json": ("[1, 2]", "list.json: not a map of settings"),
    "list.yaml": ("- epochs\n- 3\n", "list.yaml: not a map of settings"),
    "number.json": ("3", "number.json: not a map of settings"),
    "keys.yaml": ("3: epochs\n", "keys.yaml: not a map of settings"),
    "deep.json": ("[" * 100_000, "deep.json"),
    "deep.yaml": ("[" * 1000, "deep.yaml"),
    "long.json": ('{"epochs": 1' + "0" * 5000 + "}", "long.json"),
    "date.yaml": ("name: 2026-11-24\n", "date.yaml: name is datetime.date(2026, 11, 24)"),
    "run.yaml": ("name: !!python/object/apply:os.system [touch evil]\n", "run.yaml: not YAML"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_refused_in_a_line_with_its_name(ncf, split_dir, name, contents):
    text, part = FILES[name]
    path = write(text, name)
    before = contents(Path("."))
    outcome = ncf(split_dir, "--config", path, "-o", "out")
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("ncf.py: error: --config: ")
    assert part in line
    assert contents(Path(".")) == before
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["c.json", "c.yaml"])
@pytest.mark.parametrize("kind", ["bytes", "directory", "missing"])
def test_file_that_cannot_be_read_is_refused_in_a_line_with_its_name(ncf, split_dir, name, kind):
    if kind == "bytes":
        Path(name).write_bytes(b"\xff\xfe\x00epochs: 3")
    elif kind == "directory":
        Path(name).mkdir()
    outcome = ncf(split_dir, "--config", name, "-o", "out")
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("ncf.py: error: ")
    assert name in line
    assert not Path("out").exists()


def test_config_and_resume_exclude_each_other(ncf, split_dir, run_dir, contents):
    before = contents(run_dir)
    outcome = ncf(split_dir, "--config", run_dir / "config.json", "--resume", "-o", run_dir)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "ncf.py: error: --config and --resume exclude each other\n"
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("command", "content", "name"),
    [
        ("train", {"qe_auto": True}, "qe_auto"),
        ("calibrate", {"epochs": 3}, "epochs"),
        ("evaluate", {"patience": 3}, "patience"),
        ("auto", {"qe_mode": "asym_u"}, "qe_mode"),
    ],
)
def test_setting_of_another_command_is_refused(split_dir, checkpoint, command, content, name):
    """Unless it is what it is by default, as most are in a run's config.json."""
    write(content)
    load = [] if command == "train" else ["--load", checkpoint]
    outcome = call("neural-cf", neural_cf, (command, split_dir, *load, "--config", "c.json", "-o", "out"))
    prog = f"neural-cf {command}"
    assert outcome.err == f"{prog}: error: --config: c.json: {name} is no setting of {prog}\n"
    assert (outcome.code, Path("out").exists()) == (2, False)


# --- any values ---

NAMES = sorted(setting_names() | FACTS | {"processes", "topk", "config", "x"})
WORDS = [
    "adam",
    "fp32",
    "full",
    "train",
    "sym",
    "asym_u",
    "n_std",
    "integer",
    "x.json",
    ".",
    "",
    "a\0",
    "mse",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.integers(),
    st.floats(),
    st.floats(0, 1),
    st.sampled_from(WORDS),
    st.text(st.characters()),
)
VALUES = st.recursive(
    SCALARS | st.lists(st.integers(0, 64), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5,
)


def equal(found: object, value: object) -> bool:
    """Whether a setting is what a file has: a list as a tuple, a text as a path, any number as a float."""
    if isinstance(found, float):
        return found == float(value)
    return found == (tuple(value) if isinstance(value, list) else value) or found == Path(str(value))


def assert_taken_or_refused(content: dict, line: list[str], flags: set[str]) -> None:
    """What a file has is in the settings as it stands, or the file is refused in one line; ``flags`` win."""
    Path("any.json").write_text(json.dumps(content))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        settings = read_or_refused(lambda: parse_settings([*line, "--config", "any.json"]))
    assert len(out.getvalue().splitlines()) <= 2
    if settings is None or content.get("command") is not None:  # or the record of a run
        return
    for name, value in content.items():
        name = {"processes": "threads", "topk": "cutoffs"}.get(name, name)
        # Of these, one number stands for two, or another file has a say.
        others = {"pretrain", "split_final", "cutoffs"}
        if value is not None and name not in others | flags:
            assert equal(getattr(settings, name), value), (name, value)


@FUZZ
@given(content=st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=3))
def test_any_value_of_any_setting_works_or_is_refused(content):
    assert_taken_or_refused(content, ["ml-1m"], set())


@FUZZ
@given(
    name=st.sampled_from(NAMES),
    value=SCALARS,
    mode=st.sampled_from(["--quantize-eval", "--qe-auto", "--evaluate"]),
)
def test_any_value_beside_other_modes_works_or_is_refused(name, value, mode):
    """Of settings that training refuses."""
    assert_taken_or_refused(
        {name: value}, ["ml-1m", "--load", "x", mode], {"load", mode[2:].replace("-", "_")}
    )
