"""Settings: what they are called, what they are by default, which mode they ask for, how they are written down."""

from __future__ import annotations

import itertools
import json
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import pytest

from distiller.system.cli import InputError
from neural_cf.commands.arguments import parse_settings
from neural_cf.commands.flags import build_parser
from neural_cf.runs.settings import Mode, Settings, setting_names


def names() -> set[str]:
    """Return the names of all fields."""
    return {field.name for field in fields(Settings)}


def test_settings_cannot_be_changed():
    """None of them, and none can be added."""
    settings = Settings(data=Path("ml-1m"))
    for name in sorted(names()):
        with pytest.raises(FrozenInstanceError):
            setattr(settings, name, getattr(settings, name))
    with pytest.raises(FrozenInstanceError):
        settings.epoch = 3


def test_settings_are_hashable():
    """So that no list or dictionary is among them that could be changed."""
    settings = parse_settings(["ml-1m", "--layers", "8", "4", "-k", "5", "10", "--pretrain", "-s", "1"])
    assert len({settings, replace(settings), replace(settings, seed=2)}) == 2


def test_every_flag_has_a_setting_and_every_setting_a_flag():
    """``--config`` and ``--help`` set nothing, and ``given`` is no flag."""
    flags = {action.dest for action in build_parser()._actions}
    assert names() == flags - {"config", "help"} | {"given"}
    assert setting_names() == names() - {"given"}


def test_defaults_are_those_of_the_command_line():
    """The seed is drawn where none is given; tuples stand for argparse's lists."""
    by_flags = vars(build_parser().parse_args(["ml-1m"]))
    assert (by_flags.pop("config"), by_flags.pop("seed")) == (None, None)
    own = asdict(Settings(data=Path("ml-1m")))
    assert (own.pop("given"), own.pop("seed")) == (frozenset(), 0)
    assert {
        name: tuple(value) if isinstance(value, list) else value for name, value in by_flags.items()
    } == own
    of_several = {name for name, value in own.items() if isinstance(value, tuple)}
    assert of_several == {"layers", "cutoffs", "qe_no_clip_layers", "qe_no_quant_layers"}


# --- modes ---


MODES = {
    ("--qe-calibration", "0.1"): Mode.CALIBRATE,
    ("--activation-histograms", "0.1"): Mode.HISTOGRAM,
    ("--qe-auto",): Mode.AUTO,
    ("--evaluate",): Mode.EVALUATE,
    ("--quantize-eval",): Mode.EVALUATE,
    ("--eval-fp16",): Mode.EVALUATE,
}


@pytest.mark.parametrize(
    "asked", [flags for size in range(7) for flags in itertools.combinations(MODES, size)], ids=repr
)
def test_mode_of_every_combination_of_flags(asked):
    """Flags of two modes are refused, and of two precisions of an evaluation; flags of none train."""
    line = ["ml-1m", "--load", "best.pth.tar", *itertools.chain(*asked)]
    modes = {MODES[flags] for flags in asked} or {Mode.TRAIN}
    if len(modes) > 1 or {("--quantize-eval",), ("--eval-fp16",)} <= set(asked):
        with pytest.raises(InputError, match=r"^--[a-z0-9-]+ and --[a-z0-9-]+ exclude each other$"):
            parse_settings(line)
    else:
        assert {parse_settings(line).mode} == modes


@pytest.mark.parametrize(
    ("line", "mode"),
    [
        ("ml-1m", "train"),
        ("ml-1m --validate --patience 3 -o run/a", "train"),
        ("ml-1m --load best.pth.tar --reset-optimizer", "train"),
        ("ml-1m --load best.pth.tar --quantize-eval --qe-stats-file s.yaml --qe-report", "evaluate"),
        ("ml-1m --load best.pth.tar --qe-calibration 0.1 --qe-stats-out s.yaml", "calibrate"),
        ("ml-1m --load best.pth.tar --act-hist 0.1", "histogram"),
        ("ml-1m --load best.pth.tar --qe-auto --qe-max-loss 0.1", "auto"),
    ],
)
def test_mode_of_a_command_line(line, mode):
    assert parse_settings(line.split()).mode.value == mode


def test_first_cutoff_is_the_one_that_decides():
    assert Settings(data=Path("x"), cutoffs=(5, 1, 20)).k == 5


@pytest.mark.parametrize(
    ("settings", "names_ranges"),
    [
        ({}, False),
        ({"qe_stats_file": "s.yaml"}, True),
        ({"qe_config_file": "q.yaml"}, True),
        ({"qe_dynamic": True}, True),
        ({"qe_bits_acts": 0}, True),
        ({"qe_bits_acts": 4, "qe_calibration": 0.1}, False),
    ],
)
def test_ranges_come_from_a_file_from_every_batch_or_are_not_needed(settings, names_ranges):
    """Calibration is to find them first."""
    assert Settings(data=Path("x"), **settings).names_ranges is names_ranges


# --- written down ---


def test_config_is_plain():
    """Paths as text, tuples as lists, the first cut-off as ``topk`` too, and what was given."""
    settings = Settings(
        data=Path("ml-1m"),
        load=Path("run/a/best.pth.tar"),
        layers=(8, 4),
        cutoffs=(5, 10),
        pretrain=(3, 2),
        report=Path("r.json"),
        given=frozenset({"layers"}),
    )
    config = settings.to_config()
    assert config.keys() == setting_names() | {"topk", "given"}
    assert config["given"] == ["layers"]
    expected = {
        "data": "ml-1m",
        "load": "run/a/best.pth.tar",
        "layers": [8, 4],
        "cutoffs": [5, 10],
        "topk": 5,
        "pretrain": [3, 2],
        "report": "r.json",
        "out_dir": None,
        "threads": None,
        "seed": 0,
        "qe_no_quant_layers": [],
    }
    assert {name: config[name] for name in expected} == expected
    assert {type(value) for value in config.values()} == {str, int, float, bool, list, type(None)}
    assert json.loads(json.dumps(config, allow_nan=False)) == config


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize(
    "line",
    [
        "ml-1m",
        "ml-1m -f 64 --layers 256 256 128 64 -b 2048 -l 0.0005 -n 5 -e 3 -s 7 -o run/a -k 5 10 --patience 2",
        "ml-1m --pretrain 3 2 --pretrain-rate 0.01 --l2 0.002 --validate --report r.json -t 0.5 --save-every 9",
        "ml-1m --pretrain --optimizer adam --precision fp32 --no-compile -p 2 -w 3 --name x --max-steps 4",
        "ml-1m --load best.pth.tar --qe --qe-stats-file s.yaml --qenql final sigmoid --qem asym_u --qeba 6 --qe-report",
        "ml-1m --load best.pth.tar --evaluate --ranking full --no-cuda --lf 3",
        "ml-1m --load best.pth.tar --qe-auto --qe-max-loss 0.1 -s 9223372036854775807",
        "ml-1m --load best.pth.tar --qe-calibration 0.25 --calibrate-on train --qe-stats-out s.yaml --split-final",
    ],
)
def test_config_read_back_is_the_same_settings(tmp_path, line, suffix):
    """By ``--config``, as JSON, and as YAML, which JSON is, from what was given."""
    before = parse_settings([*line.split(), *([] if "-s " in line else ["-s", "3"])])
    content = {name: value for name, value in before.to_config().items() if name in before.given - {"data"}}
    path = tmp_path / f"config{suffix}"
    path.write_text(json.dumps(content, indent=2))
    assert parse_settings(["ml-1m", "--config", str(path)]) == before
