"""YAML files, refused before anything is built of them if nesting, aliases or numbers are out of proportion."""

from __future__ import annotations

import os
from typing import Any

import yaml

from distiller.system.cli import InputError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_BYTES = 1 << 24  # thirty times the size of the published model's statistics
MAX_DEPTH = 50  # libyaml's loader recurses into every level, and crashes at some ten thousand
# Every alias counts as the values that it stands for. The published model's statistics have 600.
MAX_VALUES = 1 << 20
MAX_WORD = 1000  # characters of a scalar without spaces
# Characters of numbers. Numbers to the base of 60, such as 1:30, take time quadratic in their length. Integers much
# longer than 64 bits can all have the same hash, and building a map of n such keys takes O(n^2) time.
MAX_NUMBERS = {"tag:yaml.org,2002:int": 19, "tag:yaml.org,2002:float": MAX_WORD}
RESOLVER = yaml.resolver.Resolver()


def check_yaml(text: str) -> None:
    """Parse a YAML text without building its values, and raise an error if they would be too many or too large.

    Raises:
        ValueError: the text exceeds one of the limits above, or has an alias without a finished value.
        yaml.YAMLError: the text is not YAML.
    """
    sizes = {}  # by anchor, how many values the anchored value has
    open_values = [("", 0)]  # anchor and size so far of the document and of each open collection in it
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
    """Raise a ``ValueError`` for a word or a number that is too long, whether a tag or its form makes it a number."""
    length = len(event.value)
    if length <= min(MAX_NUMBERS.values()):
        return
    if length > MAX_WORD and not any(c.isspace() for c in event.value):
        raise ValueError(f"line {event.start_mark.line + 1}: a word of {length} characters")
    tag = event.tag
    if tag in (None, "!"):  # the value's form then decides its type
        tag = RESOLVER.resolve(yaml.ScalarNode, event.value, event.implicit)
    if length > MAX_NUMBERS.get(tag, length):
        raise ValueError(f"line {event.start_mark.line + 1}: a number of {length} characters")


def read_yaml(path: str | os.PathLike, flag: str) -> Any:
    """Return a YAML file's content, which is plain values only.

    Args:
        path: The file.
        flag: The command-line flag that gave the file, with which error messages begin.

    Raises:
        InputError: the file is not YAML, or exceeds one of the limits above.
        OSError: the file cannot be read.
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
    # A tag that does not fit its value makes the loader raise nearly any exception.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{flag}: {path}: not YAML: {reason}") from error
