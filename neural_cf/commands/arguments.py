"""From a command line to ``Settings``: flags first, then a ``--config`` file or the run to resume, then defaults."""

from __future__ import annotations

import json
import os
import reprlib
import secrets
from argparse import Action, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distiller.system.cli import ArgumentParser, InputError
from distiller.untrusted.yaml import read_yaml
from neural_cf.commands.conflicts import OF_TRAINING, check_settings
from neural_cf.commands.flags import PRETRAIN_EPOCHS, build_parser
from neural_cf.runs.directory import CHECKPOINT, CONFIG
from neural_cf.runs.settings import Mode, Settings, setting_names
from neural_cf.shipped import shipped_file

# What belongs to each start of a run: a resumed run, and a run by another one's record, do not take it over.
OF_EACH_START = {"data", "out_dir", "resume", "overwrite", "load", "reset_optimizer", "max_steps", "report"}
# What a run's record, its config.json, says of the run beside its settings.
FACTS = {"nb_users", "nb_items", "data_digest", "device", "torch", "command", "compiled", "given"}
ON_COMMAND_LINE = {"data", "resume", "overwrite"}  # settings that a file cannot have
FILES = ("compress", "qe_stats_file")  # settings that can name a file of the package
RENAMED = {"processes": "threads"}  # settings that earlier versions wrote under another name
SEEDS = 1 << 32  # as many as NumPy's generators tell apart
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class Read(NamedTuple):
    """Settings read from a file.

    Attributes:
        values: The values by the settings' names, as flags would give them.
        given: The names of those that count as given by the user.
    """

    values: dict[str, Any]
    given: set[str]


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
    flags = {name: value for name, value in vars(args).items() if name in setting_names()}
    read = Read({}, set())
    if flags.get("resume"):
        if args.config is not None:
            raise InputError("--config and --resume exclude each other")
        read = settings_to_resume(args, given, parser)
    elif args.config is not None:
        read = settings_of_file(args.config, resolved(flags, given), parser)
    settings = resolved(flags | read.values, given | read.given)
    try:
        check_settings(settings)
    except InputError as error:
        if args.config is None or is_refused(resolved(flags, given)):
            raise
        raise InputError(f"--config: {args.config}: {error}") from error
    for name in FILES:
        asked = (flags | read.values).get(name)
        if asked and asked != getattr(settings, name):
            _note(f"--{name.replace('_', '-')}: {asked} is the one that comes with the package")
    return settings


def flags_given(parser: ArgumentParser, argv: Sequence[str] | None, args: Namespace) -> set[str]:
    """Return the names of the settings that the command line itself gives, defaults or not."""
    absent = object()
    marked = parser.parse_args(argv, Namespace(**dict.fromkeys(vars(args), absent)))
    return {name for name, value in vars(marked).items() if value is not absent} & setting_names()


def resolved(values: Mapping[str, Any], given: set[str]) -> Settings:
    """Return settings of these values, with what follows from them: files, epochs of both branches, split and seed."""
    values = dict(values)
    for name in FILES:
        if values.get(name):
            values[name] = own_or_shipped(values[name])
    values["pretrain"] = epochs_of_branches(values.get("pretrain"))
    if values.get("qe_config_file"):
        values["split_final"] |= asks_for_split(values["qe_config_file"])
    if values.get("seed") is None:
        values["seed"] = secrets.randbelow(SEEDS)
    return Settings(**{name: frozen(value) for name, value in values.items()}, given=frozenset(given))


def frozen(value: object) -> object:
    """Return a value, a list as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def is_refused(settings: Settings) -> bool:
    """Return whether settings are wrong in themselves."""
    try:
        check_settings(settings)
    except InputError:
        return True
    return False


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


def own_or_shipped(path: str) -> str:
    """Return a path, or where there is no such file, the file of that name that comes with the package."""
    shipped = None if Path(path).exists() else shipped_file(path)
    return path if shipped is None else str(shipped)


def settings_of_file(path: Path, flags: Settings, parser: ArgumentParser) -> Read:
    """Return the settings of a ``--config`` file that no flag gives.

    A file with a ``command`` is the record of a run, its config.json. What belongs to each start is left out of it, and
    where flags ask for another mode than training, what is for training alone.

    Args:
        path: YAML, or JSON in a file whose name ends in .json.
        flags: The settings that flags alone ask for.
        parser: The command's parser.

    Raises:
        InputError: not such a file, an unknown setting, or a value that the setting cannot have.
    """
    where = f"--config: {path}"
    content = read_json(path, where) if path.suffix == ".json" else read_yaml(path, "--config")
    content = with_current_names({} if content is None else content, where)
    is_record = "command" in content
    unknown = content.keys() - setting_names() - (FACTS if is_record else set())
    unknown |= set() if is_record else content.keys() & ON_COMMAND_LINE
    if unknown:
        raise InputError(
            f"{where}: {min(unknown)} is no setting that a file has; {parser.prog} --help lists them"
        )
    given = set(content)
    if is_record:
        given = {name for name in content.get("given") or () if isinstance(name, str)}
        left_out = (
            OF_EACH_START
            | {"name"}
            | ({*OF_TRAINING, "precision"} if flags.mode is not Mode.TRAIN else set())
        )
        _note(f"{where} is the record of a run: without its {', '.join(sorted(left_out & content.keys()))}")
        content = {name: content[name] for name in content.keys() - FACTS - left_out}
    else:
        check_has_flags(content, flags, parser, where)
    values = checked_values(content, set(flags.given), parser, where)
    return Read(values, given & values.keys())


def check_has_flags(content: Mapping[str, Any], flags: Settings, parser: ArgumentParser, where: str) -> None:
    """Raise an ``InputError`` for a setting that a command has no flag for and that is not as the command has it."""
    known = {action.dest for action in parser._actions}
    for name in sorted(content.keys() - known):
        if frozen(content[name]) != getattr(flags, name):
            raise InputError(f"{where}: {name} is no setting of {parser.prog}")


def settings_to_resume(args: Namespace, given: set[str], parser: ArgumentParser) -> Read:
    """Return the settings of the run in ``-o`` that no flag gives and that do not belong to each start.

    Raises:
        InputError: there is no run to go on with, its branches are joined already, or its settings are damaged.
    """
    if args.out_dir is None:
        raise InputError("--resume needs -o/--out-dir: the run to go on with")
    path = args.out_dir / CONFIG
    where = f"--resume: {path}"
    config = with_current_names(read_json(path, where), where) if path.is_file() else {}
    if config and "cutoffs" not in config:
        raise InputError(f"{where}: it has no cutoffs")
    # A run that trains its branches first has no checkpoint of its own until they are joined.
    joined = (args.out_dir / CHECKPOINT).is_file()
    if not config or not (joined or config.get("pretrain")):
        raise InputError(f"--resume: {args.out_dir} holds no run with a checkpoint to go on from")
    if joined and "pretrain" in given:
        raise InputError(f"--pretrain: the branches of {args.out_dir} are joined already")
    return Read(checked_values(config, given | OF_EACH_START, parser, where), set())


def read_json(path: Path, where: str) -> Any:
    """Return what a JSON file holds.

    Raises:
        InputError: beginning with ``where``; the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {error}") from error


def with_current_names(content: object, where: str) -> dict[str, Any]:
    """Return a map of settings under the names of today, without those that are null.

    Raises:
        InputError: beginning with ``where``; not such a map, or a setting stands there under both its names.
    """
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(f"{where}: not a map of settings")
    content = {name: value for name, value in content.items() if value is not None}
    for old, new in RENAMED.items():
        if old in content and new in content:
            raise InputError(f"{where}: {old} and {new} are one setting")
        if old in content:
            content[new] = content.pop(old)
    first = content.pop(
        "topk", None
    )  # which every record has beside its cutoffs, or had before there were several
    if first is not None and "cutoffs" not in content:
        content["cutoffs"] = first if isinstance(first, list) else [first]
    return content


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
    actions = {action.dest: action for action in parser._actions if action.dest in setting_names()}
    return {
        name: value_of(actions[name], content[name], f"{where}: {name}")
        for name in content.keys() & actions.keys() - without
    }


def value_of(action: Action, value: object, where: str) -> object:
    """Return a file's value as the flag would give it.

    Raises:
        InputError: beginning with ``where``; the flag has no such value.
    """
    kind = bool if action.nargs == 0 else action.type or str
    several = action.nargs in ("+", "*")
    expected = KINDS.get(kind, "text" if kind is Path else "a number")
    try:
        if several != isinstance(value, list) or (value == [] and action.default):
            raise ValueError
        converted = [_converted(kind, each) for each in (value if several else [value])]
        if action.choices is not None and not set(converted) <= set(action.choices):
            expected = f"one of {', '.join(map(str, action.choices))}"
            raise ValueError
    except (ValueError, OverflowError) as error:
        expected = f"a list, each {expected}" if several else expected
        raise InputError(f"{where} is {reprlib.repr(value)}, not {expected}") from error
    return converted if several else converted[0]


def _converted(kind: object, value: object) -> object:
    """Return a value as a flag of a type has it; raise a ``ValueError`` or ``OverflowError`` where it is none."""
    if kind is bool or kind is int:
        if type(value) is not kind:
            raise ValueError
        return value
    if kind is str or kind is Path:
        if not isinstance(value, str) or "\0" in value:
            raise ValueError
        value.encode()  # a lone surrogate is no text
        return kind(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)  # also of 1e-3, which is text in YAML 1.1


def _note(text: str) -> None:
    """Print a line, in the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
