"""Titles of items, read from MovieLens's movies files and from the titles file of a split."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from distiller.system.cli import InputError
from distiller.system.naming import errors_named

# The movies files of ml-20m, 25m and 32m; of ml-1m and ml-10m; of ml-100k.
MOVIES_FILES = ("movies.csv", "movies.dat", "u.item")
TITLES = "titles.csv"  # the titles file in a split's directory
HEADER = ("movieId", "title")
ITEM = re.compile(r"[0-9]{1,19}")  # as many digits as an int64 can have


def movies_beside(ratings: Path) -> Path | None:
    """Return the movies file in the directory of a ratings file; None if there is none."""
    return next((path for name in MOVIES_FILES if (path := ratings.parent / name).is_file()), None)


def read_titles(path: Path) -> dict[int, str]:
    """Read a movies or titles file and return the titles by the items' original ids.

    The content tells the format, which is CSV with a header, or fields separated by ``::`` or ``|`` without one. The
    encoding is UTF-8 or, for a file that is not valid UTF-8, Latin-1 (ml-100k and ml-1m).

    Raises:
        InputError: a line has no id or no title (the message names file and line), or there is no title at all.
        OSError: the file cannot be read; the error's ``filename`` is ``path``.
    """
    with errors_named(path):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    titles: dict[int, str] = {}
    for number, fields in _rows(path, text):
        item, title = (fields[0], fields[1].strip()) if len(fields) > 1 else ("", "")
        if not (ITEM.fullmatch(item) and title):
            raise InputError(f"{path}:{number}: no item id and title: {'|'.join(fields)[:60]!r}")
        titles[int(item)] = title
    if not titles:
        raise InputError(f"{path}: no titles")
    return titles


def _rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the numbers and fields of the lines that are not empty; raise an ``InputError`` for malformed CSV."""
    first = text.partition("\n")[0]
    if first.startswith(",".join(HEADER)):
        reader = csv.reader(io.StringIO(text, newline=""))
        try:
            next(reader)
            yield from ((reader.line_num, fields) for fields in reader if fields)
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num}: {error}") from error
        return
    delimiter = "::" if "::" in first else "|"
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r").split(delimiter)


def write_titles(titles: dict[int, str], items: Iterable[int], path: Path) -> None:
    """Write the titles of those ``items`` that have one to a file for ``read_titles``."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows((item, titles[item]) for item in items if item in titles)
