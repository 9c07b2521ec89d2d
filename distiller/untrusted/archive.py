"""PyTorch's zip archives, accepted only if Python and PyTorch are certain to read the same from them."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from typing import BinaryIO

# The records at the end of an archive; PyTorch's archives nearly always have those of zip64 too.
END = struct.Struct("<4s4H2LH")
LOCATOR_64 = struct.Struct("<4sLQL")
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64_START, END_64_START = b"PK\x06\x07", b"PK\x06\x06"
EXTRA = struct.Struct("<2H")  # the kind and the length of an extra field in a directory entry
ZIP64 = 1


def read_archive(file: BinaryIO, size: int) -> tuple[bytes, dict[str, int]]:
    """Read the pickle of a checkpoint from an open file of ``size`` bytes.

    Returns:
        The pickle, and the size in bytes of every storage by its key.

    Raises:
        pickle.UnpicklingError: the file is no archive of PyTorch's, or its entries are larger than the file.
        Exception: the archive is damaged, in which case nearly any exception may come.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        packed = any(
            entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
            for entry in entries
        )
        if packed or sum(entry.file_size for entry in entries) > size:
            raise pickle.UnpicklingError("it unpacks to more than the file has")
        sizes = {entry.filename: entry.file_size for entry in entries}
        roots = {name.partition("/")[0] for name in sizes}
        if len(roots) != 1 or not _names_are_plain(entries) or not _ends_exactly(file, size, archive):
            raise pickle.UnpicklingError("it is no archive of PyTorch's")
        (root,) = roots
        content = archive.read(f"{root}/data.pkl")
    start = f"{root}/data/"
    held = {name.removeprefix(start): size for name, size in sizes.items() if name.startswith(start)}
    return content, held


def _names_are_plain(entries: list[zipfile.ZipInfo]) -> bool:
    """Return whether all readers see the same, distinct names; PyTorch does not tell upper case from lower."""
    names = [entry.orig_filename for entry in entries]
    plain = all(name.isascii() and name.isprintable() and "\\" not in name for name in names)
    return (
        plain and len({name.lower() for name in names}) == len(names) and all(map(_extra_is_plain, entries))
    )


def _extra_is_plain(entry: zipfile.ZipInfo) -> bool:
    """Return whether an entry has no extra field but the zip64 sizes, once; other kinds can rename the entry."""
    if not entry.extra:
        return True
    return len(entry.extra) > EXTRA.size and EXTRA.unpack_from(entry.extra) == (
        ZIP64,
        len(entry.extra) - EXTRA.size,
    )


def _ends_exactly(file: BinaryIO, size: int, archive: zipfile.ZipFile) -> bool:
    """Return whether the zip directory lies right before the end records, where they say, and is complete.

    Python looks for the directory right before the records, PyTorch at the position that they give.
    """
    file.seek(-(END_64.size + LOCATOR_64.size + END.size), os.SEEK_END)
    end_64, locator, end = (file.read(record.size) for record in (END_64, LOCATOR_64, END))
    *_, count, length, start, _ = END.unpack(end)
    stop = size - END.size
    if locator.startswith(LOCATOR_64_START):
        stop -= LOCATOR_64.size + END_64.size
        signature, *_, count, length, start = END_64.unpack(end_64)
        if signature != END_64_START or LOCATOR_64.unpack(locator)[2] != stop:
            return False
    exact = start + length == stop and start == archive.start_dir
    return exact and count == len(archive.infolist()) and not archive.comment
