"""What a YAML text claims, before anything is made of it: nesting, aliases and numbers out of all proportion."""

from __future__ import annotations

import os
from typing import Any

import yaml

from distiller.system.cli import InputError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_BYTES = 1 << 24  # thirty times the statistics of the published model
MAX_DEPTH = 50  # libyaml's loader calls itself for every level, and crashes at some ten thousand
MAX_VALUES = (
    1 << 20
)  # with every alias counted as what it stands for; the published model's statistics have 600
MAX_WORD = 1000  # characters
# Characters of numbers. Those to the base of 60, as 1:30, take time with the square of their length. Whole numbers much
# longer than 64 bits can all have the same hash, and a map of such takes time with their square.
MAX_NUMBERS = {"tag:yaml.org,2002:int": 19, "tag:yaml.org,2002:float": MAX_WORD}
RESOLVER = yaml.resolver.Resolver()


def check_yaml(text: str) -> None:
    """Go through a YAML text without making anything of it.

    Raises:
        ValueError: it claims too much.
        yaml.YAMLError: it is not YAML.
    """
    sizes = {}  # of what has an anchor
    open_values = [("", 0)]  # anchor and size of what is not closed yet, the document itself first
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_values.pop()
            sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"alias {event.anchor} stands within what it stands for, or for nothing")
            size = sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            _check_scalar(event)
            sizes[event.anchor] = size = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes.pop(event.anchor, None)
            open_values.append((event.anchor, 1))
            if len(open_values) > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} levels")
            continue
        else:
            continue
        parent, before = open_values[-1]
        open_values[-1] = (parent, before + size)
        if before + size > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")


def _check_scalar(event: yaml.ScalarEvent) -> None:
    """Raise a ``ValueError`` for a word or a number that is too long, whatever makes it one."""
    length = len(event.value)
    if length <= min(MAX_NUMBERS.values()):
        return
    if length > MAX_WORD and not any(c.isspace() for c in event.value):
        raise ValueError(f"line {event.start_mark.line + 1}: a word of {length} characters")
    tag = event.tag
    if tag in (None, "!"):  # which leave it to the value
        tag = RESOLVER.resolve(yaml.ScalarNode, event.value, event.implicit)
    if length > MAX_NUMBERS.get(tag, length):
        raise ValueError(f"line {event.start_mark.line + 1}: a number of {length} characters")


def read_yaml(path: str | os.PathLike, flag: str) -> Any:
    """A YAML file's content, plain values only.

    Raises:
        InputError: not YAML; the message begins with ``flag``, which named the file.
        OSError: it cannot be read; the message names ``flag`` too.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        text = content.decode()
        check_yaml(text)
        return yaml.load(text, Loader=LOADER)
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{flag}: {path}") from error
    # Tags on values that do not fit them make the loader raise nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{flag}: {path}: not YAML: {reason}") from error
