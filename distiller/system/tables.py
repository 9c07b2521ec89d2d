"""Tables as text: delimited text, read fast and with errors that name file and line; and Markdown tables."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from io import BytesIO
from typing import BinaryIO

import pyarrow as pa
from pyarrow import compute, csv

from distiller.system.cli import InputError
from distiller.system.naming import errors_named

WHOLE_NUMBER = re.compile(rb"-?[0-9]+")


def read_columns(
    path: str | os.PathLike,
    delimiter: str,
    types: Mapping[str, pa.DataType],
    header: bool = False,
    unsigned: frozenset[str] | set[str] = frozenset(),
) -> pa.Table:
    """Read a table of numbers from delimited text.

    Args:
        path: The file. Empty lines in it are skipped.
        delimiter: The text between two fields, of any length.
        types: The columns' names and types, integer or floating point, in the file's order.
        header: Whether the first line is a header, which is skipped unread.
        unsigned: The columns in which a negative number is an error.

    Raises:
        InputError: a row has another number of fields, a field is not a finite number of its type, or a number is
            negative in an ``unsigned`` column (the message names file and line); or the file holds no row.
        OSError: the file cannot be read; the error's ``filename`` is ``path``.
    """
    separator = delimiter
    with ExitStack() as stack:
        stack.enter_context(errors_named(path))
        # An open file and not its name: Arrow would decompress a file whose name ends in .gz.
        source: BinaryIO = stack.enter_context(open(path, "rb"))
        # Arrow's delimiter is one character; the two-character one of ml-1m is replaced in memory.
        if len(delimiter) > 1:
            separator = "\t"
            content = source.read()
            if separator.encode() in content:
                raise first_error(path, delimiter, types, header, unsigned) or InputError(
                    f"{path}: holds a tab"
                )
            source = BytesIO(content.replace(delimiter.encode(), separator.encode()))
        try:
            table = csv.read_csv(
                source,
                read_options=csv.ReadOptions(column_names=list(types), skip_rows=int(header)),
                parse_options=csv.ParseOptions(delimiter=separator, quote_char=False),
                convert_options=csv.ConvertOptions(column_types=types, null_values=[]),
            )
        except pa.ArrowException as error:
            raise first_error(path, delimiter, types, header, unsigned) or InputError(
                f"{path}: {error}"
            ) from error
    if not table.num_rows:
        raise InputError(f"{path}: no rows")
    for name, kind in types.items():
        if pa.types.is_floating(kind):
            valid = compute.all(compute.is_finite(table[name])).as_py()
        else:
            valid = name not in unsigned or compute.min(table[name]).as_py() >= 0
        if not valid:
            raise first_error(path, delimiter, types, header, unsigned) or InputError(f"{path}: bad {name}")
    return table


def first_error(
    path: str | os.PathLike,
    delimiter: str,
    types: Mapping[str, pa.DataType],
    header: bool,
    unsigned: frozenset[str] | set[str],
) -> InputError | None:
    """Return the error of a file's first bad line, or None if all lines are good.

    The arguments are those of ``read_columns``. Reading line by line is slow, and only done for a file that is known to
    be bad.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.rstrip(b"\r\n")
            if not content or (header and number == 1):
                continue
            fields = content.split(delimiter.encode())
            if len(fields) != len(types):
                return InputError(f"{path}:{number}: {len(fields)} fields where {len(types)} are expected")
            for (name, kind), field in zip(types.items(), fields, strict=True):
                if fault := _fault(field, kind, name in unsigned):
                    text = field.decode(errors="replace")
                    return InputError(f"{path}:{number}: {name} {text!r} is {fault}")
    return None


def _fault(field: bytes, kind: pa.DataType, unsigned: bool) -> str | None:
    """Return what is wrong with a field's text as a number of its type; None if nothing is."""
    if pa.types.is_integer(kind):
        if not WHOLE_NUMBER.fullmatch(field):
            return "not a whole number"
        if unsigned and field.startswith(b"-"):
            return "negative"
        # Python refuses to read integers of more than some thousand digits.
        return "too large" if len(field) > 4000 or abs(int(field)) >> (kind.bit_width - 1) else None
    try:
        finite = math.isfinite(float(field))
    except ValueError:
        return "not a number"
    return None if finite else "not finite"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with these header and row cells."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
