"""Tables as text: delimited text read fast, with errors that name the file and the line; Markdown written."""

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
    """Read a table of numbers.

    Args:
        path: The file. Empty lines in it are passed over.
        delimiter: Between fields; of any length.
        types: The columns' names and types, integer or floating, in the file's order.
        header: Whether the first line is a header (which is not looked at).
        unsigned: The columns in which a negative number is an error.

    Raises:
        InputError: naming file and line, for a row of another length, a field that is not a number of
            its type, or a negative number where there should be none; or the file holds no row.
    """
    separator = delimiter
    with ExitStack() as stack:
        stack.enter_context(errors_named(path))
        # Not the file's name, by which Arrow would unpack it.
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
    """The first bad line of a file that Arrow refused, line by line: slow, and only run on bad input."""
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
    if pa.types.is_integer(kind):
        if not WHOLE_NUMBER.fullmatch(field):
            return "not a whole number"
        if unsigned and field.startswith(b"-"):
            return "negative"
        # Python reads no numbers of thousands of digits.
        return "too large" if len(field) > 4000 or abs(int(field)) >> (kind.bit_width - 1) else None
    try:
        finite = math.isfinite(float(field))
    except ValueError:
        return "not a number"
    return None if finite else "not finite"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
