"""From a command line to ``Settings``: flags first, then a ``--config`` file or the run to resume, then defaults."""

from __future__ import annotations

import json
import os
import reprlib
import secrets
from argparse import Action, Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from distiller.system.cli import ArgumentParser, InputError
from distiller.untrusted.yaml import read_yaml
from neural_cf.commands.conflicts import check_settings
from neural_cf.commands.flags import PRETRAIN_EPOCHS, build_parser
from neural_cf.runs.directory import CHECKPOINT, CONFIG
from neural_cf.runs.settings import Settings, setting_names
from neural_cf.shipped import shipped_file

# What a resumed run does not take over from the settings it began with.
OF_EACH_START = {"data", "out_dir", "resume", "overwrite", "load", "reset_optimizer", "max_steps", "report"}
# What a run's config.json says of the run itself and of how it was started: no settings of the next run.
RECORDED = {
    *("nb_users", "nb_items", "data_digest", "device", "torch", "command", "compiled", "topk"),
    *("data", "resume", "overwrite"),
}
RENAMED = {"processes": "threads"}  # settings that earlier versions wrote under another name
SEEDS = 1 << 32  # as many as NumPy's generators tell apart


def parse_settings(argv: Sequence[str] | None = None, parser: ArgumentParser | None = None) -> Settings:
    """Return the settings that a command line asks for.

    Args:
        argv: The command line, by default the process's own.
        parser: The command's parser, by default that of ncf.py. A setting that it has no flag for keeps its default.

    Raises:
        InputError: a setting is out of its range, or leaves another one without effect.
    """
    parser = parser or build_parser()
    args = parser.parse_args(argv)
    given = flags_given(parser, argv, args)
    values = vars(args)
    config = values.pop("config")
    if values.get("resume"):
        if config is not None:
            raise InputError("--config and --resume exclude each other")
        values |= settings_to_resume(args, given, parser)
    elif config is not None:
        more = settings_of_file(config, given, parser)
        values |= more
        given |= {name for name, value in more.items() if frozen(value) != frozen(parser.get_default(name))}
    for name in ("compress", "qe_stats_file"):
        if values.get(name):
            values[name] = own_or_shipped(f"--{name.replace('_', '-')}", values[name])
    values["pretrain"] = epochs_of_branches(values.get("pretrain"))
    if values.get("qe_config_file"):
        values["split_final"] |= asks_for_split(values["qe_config_file"])
    if values.get("seed") is None:
        values["seed"] = secrets.randbelow(SEEDS)
    settings = Settings(**{name: frozen(value) for name, value in values.items()}, given=frozenset(given))
    check_settings(settings)
    return settings


def flags_given(parser: ArgumentParser, argv: Sequence[str] | None, args: Namespace) -> set[str]:
    """Return the names of the settings that the command line itself gives, defaults or not."""
    absent = object()
    marked = parser.parse_args(argv, Namespace(**dict.fromkeys(vars(args), absent)))
    return {name for name, value in vars(marked).items() if value is not absent}


def frozen(value: object) -> object:
    """Return a value, a list as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def epochs_of_branches(pretrain: Sequence[int] | None) -> Sequence[int] | None:
    """Return the epochs of GMF and of the MLP that ``--pretrain`` asks for with no number, one or two."""
    if pretrain is None or len(pretrain) > 1:
        return pretrain
    return 2 * tuple(pretrain) or PRETRAIN_EPOCHS


def asks_for_split(path: str) -> bool:
    """Return whether a ``--qe-config-file`` is for a split final layer: its ``split_final``, beside its quantizer."""
    content = read_yaml(path, "--qe-config-file")
    value = content.get("split_final", False) if isinstance(content, dict) else False
    if not isinstance(value, bool):
        raise InputError(f"--qe-config-file: {path}: split_final: {value!r} is neither true nor false")
    return value


def own_or_shipped(flag: str, path: str) -> str:
    """Return a path, or where there is no such file, the file of that name that comes with the package."""
    shipped = None if Path(path).exists() else shipped_file(path)
    if shipped is None:
        return path
    _note(f"{flag}: {path} is the one that comes with neural-cf")
    return str(shipped)


def _note(text: str) -> None:
    """Print a line, in the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def settings_of_file(path: Path, given: Collection[str], parser: ArgumentParser) -> dict[str, Any]:
    """Return the settings of a ``--config`` file that no flag gives, and say which of its entries are none.

    Args:
        path: YAML, or JSON in a file whose name ends in .json.
        given: The names of the settings that flags give.
        parser: The command's parser.

    Raises:
        InputError: not such a file, an unknown entry, or a value that the setting cannot have.
    """
    where = f"--config: {path}"
    content = read_json(path, where) if path.suffix == ".json" else read_yaml(path, "--config")
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(f"{where}: not a map of settings")
    content = {RENAMED.get(name, name): value for name, value in content.items()}
    unknown = sorted(content.keys() - setting_names() - RECORDED)
    if unknown:
        raise InputError(
            f"{where}: {unknown[0]} is no setting; ncf.py --help lists them, dashes are underscores here"
        )
    passed_over = sorted(content.keys() & RECORDED)
    if passed_over:
        _note(f"{where}: without {', '.join(passed_over)}, which are of the run that wrote it")
    found = {name: value for name, value in content.items() if name not in RECORDED}
    actions = {action.dest for action in parser._actions}
    foreign = sorted(
        name for name in found.keys() - actions if frozen(found[name]) != getattr(Settings, name, None)
    )
    if foreign:
        raise InputError(f"{where}: {foreign[0]} is no setting of {parser.prog}")
    return checked_values(found, set(given), parser, where)


def settings_to_resume(args: Namespace, given: Collection[str], parser: ArgumentParser) -> dict[str, Any]:
    """Return the settings of the run in ``-o`` that no flag gives and that do not belong to each start.

    Raises:
        InputError: there is no run to go on with, its branches are joined already, or its settings are damaged.
    """
    if args.out_dir is None:
        raise InputError("--resume needs -o/--out-dir: the run to go on with")
    path = args.out_dir / CONFIG
    config = read_json(path, f"--resume: {path}") if path.is_file() else {}
    if not isinstance(config, dict):
        raise InputError(f"--resume: {path}: not a map of settings")
    if config:
        if "cutoffs" not in config and "topk" not in config:
            raise InputError(f"--resume: {path}: it has no cutoffs")
        config.setdefault("cutoffs", [config.get("topk")])  # of runs from before there were several
        config = {RENAMED.get(name, name): value for name, value in config.items()}
    # A run that trains its branches first has no checkpoint of its own until they are joined.
    joined = (args.out_dir / CHECKPOINT).is_file()
    if not config or not (joined or config.get("pretrain")):
        raise InputError(f"--resume: {args.out_dir} holds no run with a checkpoint to go on from")
    if joined and "pretrain" in given:
        raise InputError(f"--pretrain: the branches of {args.out_dir} are joined already")
    return checked_values(config, set(given) | OF_EACH_START, parser, f"--resume: {path}")


def read_json(path: Path, where: str) -> Any:
    """Return what a JSON file holds; raise an ``InputError`` that begins with ``where`` if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {error}") from error


def checked_values(
    content: Mapping[str, Any], without: set[str], parser: ArgumentParser, where: str
) -> dict[str, Any]:
    """Return the values that a parser has flags for, as the flags would give them.

    Args:
        content: Values by the settings' names.
        without: Names to leave out.
        parser: The command's parser.
        where: What an error begins with.

    Raises:
        InputError: a value that the flag cannot have.
    """
    values = {}
    for action in parser._actions:
        name = action.dest
        if name in content and name not in without:
            value = content[name]
            if not is_value_of(action, value):
                raise InputError(f"{where}: {name} is {reprlib.repr(value)}")
            values[name] = Path(value) if action.type is Path and value is not None else value
    return values


def is_value_of(action: Action, value: object) -> bool:
    """Return whether a value is such as a flag gives."""
    if action.nargs == 0:
        return type(value) is bool
    if value is None:
        return action.default is None
    types = {int: (int,), Path: (str,), None: (str,)}.get(action.type, (int, float))
    values = value if action.nargs in ("+", "*") else [value]
    fit = isinstance(values, list) and all(type(each) in types for each in values)
    return fit and bool(values or not action.default) and (action.choices is None or value in action.choices)
