"""A corpus of malformed files, made here: each is refused in one line, and no file is changed or left behind."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import contents, run_convert, run_ncf
from helpers_files import COMMANDS, HEADERS, evil, ratings, with_command
from helpers_fuzz import assert_refused, no_hang
from helpers_split import tiny_split

from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint, save_checkpoint
from distiller.untrusted.yaml import read_yaml
from neural_cf.commands.arguments import OF_EACH_START
from neural_cf.commands.flags import build_parser
from neural_cf.split import CSV_FILES, PICKLE, write_pickle

pytestmark = pytest.mark.usefixtures("in_empty_directory")

NO_ID = (
    "",
    "x",
    "-1",
    "1.5",
    "1e3",
    "9" * 30,
    "9" * 5000,
    "nan",
    " ",
    "\0",
    "½",
    "1 2",
    "'1'",
    '"1"',
    "+-1",
)
NO_NUMBER = ("", "x", "nan", "inf", "-inf", "1.2.3", "0x1", " ", "\0", "½", "1 2", '"1"', "--1")
NO_TIME = ("", "x", "1.5", "nan", "9" * 30, " ", "\0", "½", '"1"')
# What a whole file may be cut to, in parts of it.
CUTS = [i / 40 for i in range(40)]


def malformed_ratings() -> Iterator[tuple[str, bytes]]:
    """Every field of a row wrong in many ways, in all formats; rows and files of another form."""
    for delimiter in HEADERS:
        whole = ratings(delimiter)
        for column, values in enumerate((NO_ID, NO_ID, NO_NUMBER, NO_TIME)):
            for value in values:
                row = ["1", "2", "3.5", "4"]
                row[column] = value
                yield (
                    f"{delimiter!r}, column {column}: {value[:9]!r}",
                    (whole + delimiter.join(row) + "\n").encode(),
                )
        for row in ("1", delimiter.join("123"), delimiter.join("12345"), delimiter * 3, "x" * 70_000):
            yield f"{delimiter!r}, row {row[:9]!r}", (whole + row + "\n").encode()
        yield f"{delimiter!r}, two rows", "".join(whole.splitlines(keepends=True)[:3]).encode()
    yield from {
        "nothing": b"",
        "zeros": bytes(5000),
        "another header": ratings(",").replace("userId", "user").encode(),
        "header alone": HEADERS[","].encode(),
        "UTF-16": ratings(",").encode("utf-16"),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "lines of Windows in the middle of a row": ratings("::").replace("::", "\r\n").encode(),
    }.items()


def malformed_tables(split_dir: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The three files of a split, one of them wrong."""
    whole = {name: (split_dir / name).read_bytes() for name in CSV_FILES}
    for name, text in whole.items():
        lines = text.splitlines()
        for value in NO_ID:
            fields = lines[5].split(b"\t")
            fields[1] = value.encode()
            bad = b"\n".join([*lines[:5], b"\t".join(fields), *lines[6:]]) + b"\n"
            yield f"{name}: {value[:9]!r}", whole | {name: bad}
        yield f"{name}: nothing", whole | {name: b""}
        yield f"{name}: a field more", whole | {name: text + lines[-1] + b"\t1\n"}
        yield f"{name}: an item beyond all bounds", whole | {name: text.replace(lines[5], edited(lines[5]))}
        if name != "train-ratings.csv":
            yield f"{name}: a user less", whole | {name: b"\n".join(lines[:-1]) + b"\n"}


def edited(line: bytes) -> bytes:
    """A line with a large item."""
    first, _, *rest = line.split(b"\t")
    return b"\t".join([first, b"268435455", *rest])


def malformed_pickles() -> Iterator[tuple[str, bytes]]:
    """Splits cut short, and with parts missing, of other types and sizes."""
    write_pickle(tiny_split(), Path("whole"))
    whole = Path("whole").read_bytes()
    Path("whole").unlink()
    for part in CUTS:
        yield f"cut to {part:.0%}", whole[: int(part * len(whole))]
    parts = {"format": "neumf-split", "version": 1} | vars(tiny_split())
    for name in parts:
        yield (
            f"no {name}",
            pickle.dumps({key: value for key, value in parts.items() if key != name}, protocol=5),
        )
        for value in ([], {"a": 1}, 1.5, b"x", (None,) * 3):
            yield f"{name} is {value}", pickle.dumps(parts | {name: value}, protocol=5)
    for name, value in (("nb_items", 1 << 40), ("nb_users", 1 << 40), ("nb_items", 10**400), ("version", 2)):
        yield f"{name} is {str(value)[:9]}", pickle.dumps(parts | {name: value}, protocol=5)


def malformed_checkpoints(checkpoint: Path) -> Iterator[tuple[str, bytes]]:
    """Cut short in both formats, and with weights missing or of other shapes."""
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"] = dict(content["state_dict"])
    for as_zip in (True, False):
        whole = saved(content, as_zip)
        for part in CUTS:
            yield f"zip {as_zip}, cut to {part:.0%}", whole[: int(part * len(whole))]
    weights = content["state_dict"]
    for name, tensor in weights.items():
        others = {
            "missing": None,
            "longer": torch.zeros(len(tensor) + 1, *tensor.shape[1:]),
            "flat": torch.zeros(()),
        }
        for kind, other in others.items():
            left = {key: value for key, value in weights.items() if key != name}
            bad = left if other is None else left | {name: other}
            yield f"{name} {kind}", saved(content | {"state_dict": bad})
        yield f"{name} not finite", saved(content | {"state_dict": weights | {name: tensor / 0}})
    for other in ({}, [], None, 1, {"state_dict": {}}, {"state_dict": weights | {"more": torch.ones(2)}}):
        yield f"{str(other)[:20]}", saved(other)


def saved(content: object, as_zip: bool = True) -> bytes:
    torch.save(content, "saved", _use_new_zipfile_serialization=as_zip)
    content = Path("saved").read_bytes()
    Path("saved").unlink()
    return content


def malformed_settings(run_dir: Path) -> Iterator[tuple[str, bytes]]:
    """A run's config.json with each setting in turn of no type that its flag has."""
    whole = json.loads((run_dir / "config.json").read_text())
    for action in build_parser()._actions:
        if action.dest in whole.keys() - OF_EACH_START:
            yield f"{action.dest}", json.dumps(whole | {action.dest: {"a": 1}}).encode()
    yield from {
        "nothing": b"",
        "list": b"[1]",
        "deep": b"[" * 100_000,
        "bytes": b"\xff\xfe",
        "cut": b'{"seed": ',
    }.items()


def refused(case: str, outcome, prog: str) -> None:
    """With the case named where it is not."""
    try:
        assert_refused(outcome, prog)
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error


def test_corpus(split_dir, run_dir, checkpoint):
    """Every file of it."""
    count = 0
    for case, content in malformed_ratings():
        Path("ratings").write_bytes(content)
        with no_hang():
            refused(case, run_convert("ratings", "split", "-n", 5), "convert.py")
        assert contents(Path(".")) == {"ratings": content}
        count += 1
    Path("ratings").unlink()
    for files in [
        *malformed_tables(split_dir),
        *((case, {PICKLE: content}) for case, content in malformed_pickles()),
    ]:
        case, texts = files
        Path("split").mkdir()
        for name, text in texts.items():
            Path("split", name).write_bytes(text)
        with no_hang():
            refused(case, run_ncf("split", "-o", "out"), "ncf.py")
        assert contents(Path(".")) == {f"split/{name}": text for name, text in texts.items()}
        shutil.rmtree("split")
        count += 1
    for case, content in malformed_checkpoints(checkpoint):
        Path("x").write_bytes(content)
        with no_hang():
            refused(case, run_ncf(split_dir, "--load", "x", "--evaluate", "-o", "out"), "ncf.py")
        assert contents(Path(".")) == {"x": content}
        count += 1
    Path("x").unlink()
    shutil.copytree(run_dir, "run")
    for case, content in malformed_settings(run_dir):
        Path("run/config.json").write_bytes(content)
        before = contents(Path("run"))
        with no_hang():
            refused(case, run_ncf(split_dir, "--resume", "-o", "run"), "ncf.py")
        assert contents(Path("run")) == before
        count += 1
    assert count >= 200
    print(f"{count} malformed files")


@pytest.mark.parametrize("kind", ["os.system", "open", "eval", "touch", "nested"])
def test_checkpoint_that_would_run_a_command(split_dir, kind):
    """Refused at every flag that reads it, and the command does not run."""
    Path("x").write_bytes(saved({"state_dict": {}, "extra": evil(Path("marker"))[kind]}))
    for flags in (["--evaluate"], [], ["--qe-calibration", 1], ["--quantize-eval", "--qe-dynamic"]):
        assert_refused(run_ncf(split_dir, "--load", "x", *flags, "-o", "out"), "ncf.py")
    assert [path.name for path in Path(".").iterdir()] == ["x"]


@pytest.mark.parametrize("where", COMMANDS)
def test_split_that_would_run_a_command(where):
    """Likewise."""
    Path("split").mkdir()
    Path("split", PICKLE).write_bytes(with_command(tiny_split(), where, Path("marker")))
    assert_refused(run_ncf("split", "-o", "out"), "ncf.py")
    assert [path.name for path in Path(".").iterdir()] == ["split"]


# --- numbers out of all proportion ---

SIXTIES = "1:" * 100_000 + "1"
LONG = {
    "as it is": f"gamma: {SIXTIES}",
    "with a tag": f"gamma: !!int {SIXTIES}",
    "with a tag, quoted": f'gamma: !!int "{SIXTIES} "',
    "with a tag, in another form": f'gamma: !<tag:yaml.org,2002:int> "{SIXTIES} "',
    "with a tag by another handle": f'%TAG !y! tag:yaml.org,2002:\n---\ngamma: !y!int "{SIXTIES} "',
    "with spaces in it": 'gamma: !!int "' + "1: " * 100_000 + '1"',
    "as whatever it looks like": f'gamma: ! "{SIXTIES}\\n"',
    "as a block": f"gamma: ! |\n  {SIXTIES}\n",
    "of digits": "gamma: " + "9" * 5000,
    "of underscores": "gamma: 1" + "_" * 5000,
    "with a fraction": f'gamma: !!float "{SIXTIES} "',
    "as a key": f'? !!int "{SIXTIES} "\n: 1',
}


@pytest.mark.parametrize("kind", LONG)
def test_long_number_in_yaml_is_refused(kind):
    """Before it is made: that takes time with the square of its length."""
    Path("x.yaml").write_text(LONG[kind])
    with no_hang(), pytest.raises(InputError, match=r"a (word|number) of \d+ characters"):
        read_yaml("x.yaml", "--compress")


SAME_HASH = [k * ((1 << 61) - 1) << (61 * power) for power in (1, 2, 20) for k in (1, 2, 3)]


@pytest.mark.parametrize("form", ["{}", "{:#x}", "{:#b}", "{:#o}", "-{}", '!!int "{}"', "{:_}"])
def test_keys_of_one_hash_in_yaml_are_refused(form):
    """Before a map is made of them: that takes time with the square of their number."""
    assert len({hash(key) for key in SAME_HASH}) == 1
    for key in SAME_HASH:
        text = form.format(key) if form != "{:#o}" else f"0{key:o}"
        Path("x.yaml").write_text(f"{{{text}: 1}}")
        with pytest.raises(InputError, match=r"a (word|number) of"):
            read_yaml("x.yaml", "--compress")


@pytest.mark.parametrize(
    "value",
    [
        (1 << 63) - 1,
        -(10**17),
        0.1 + 0.2,
        -1.2345678901234567e-300,
        "9" * 5000,
        "1 " * 5000,
        "2" * 20,
        "x" * 999,
    ],
    ids=lambda value: repr(value)[:25],
)
def test_numbers_of_use_and_texts_of_digits_in_yaml_are_read(value):
    """As they were written."""
    Path("x.yaml").write_text(yaml.safe_dump({"value": value}))
    if isinstance(value, str) and len(value) == 5000:
        with pytest.raises(InputError, match="a word of 5000"):
            read_yaml("x.yaml", "--compress")
    else:
        assert read_yaml("x.yaml", "--compress") == {"value": value}


@pytest.mark.parametrize("as_zip", [True, False])
def test_keys_of_one_hash_in_a_checkpoint_are_refused(as_zip):
    """Likewise; those of 64 bits are read."""
    weights = {"a": torch.ones(1)}
    save_checkpoint("x", {"state_dict": weights, "extra": {(1 << 64) - 1: 1, -(1 << 63): 2, 0.5: 3}})
    assert load_checkpoint("x")["extra"] == {(1 << 64) - 1: 1, -(1 << 63): 2, 0.5: 3}
    for key in SAME_HASH:
        Path("x").write_bytes(saved({"state_dict": weights, "extra": {key: 1}}, as_zip))
        with pytest.raises(InputError, match="a key of"):
            load_checkpoint("x")


@pytest.mark.parametrize("code", ["p", "g"])
def test_pickle_that_remembers_under_long_numbers_is_refused(code):
    """Likewise: the numbers are keys of a map too, and PyTorch does not read them."""
    whole = saved({"state_dict": {"a": torch.ones(1)}}, as_zip=False)
    start = whole.index(b"state_dict") - 5
    text = f"{code}{SAME_HASH[0]}\n".encode()
    Path("x").write_bytes(whole[:start] + b"Np" + text[1:] + (text if code == "g" else b"") + whole[start:])
    with pytest.raises(InputError, match="no pickle of plain values"):
        load_checkpoint("x")
