"""Pickles of plain values, read without running anything that is in them and without taking what they only claim."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

# What pickles of plain values, arrays and tensors have no use for.
REFUSED = (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX)
REFUSED += (pickle.PERSID, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)
REFUSED += (pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
REFUSED += (pickle.PUT, pickle.GET)  # protocol 0's, which name what they remember by numbers of any length
KEYS = (str, int, float, bool)  # others can nest, and bring down what hashes them
# Of whole numbers as keys: longer ones can all have the same hash, and a map of such takes time with their square.
KEY_BITS = 64


class UnknownNameError(pickle.UnpicklingError):
    """A pickle asks for a function or a class that is not known; the message is its module and name."""


class StandIn:
    """What stands in a pickle's place for an object of another class. It may take its state."""

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it holds the state of an object that has none")


# Python's unpickler and not C's, which takes memory for whatever memo index a file names. What it reads has few parts,
# so that it is no slower.
class PlainUnpickler(pickle._Unpickler):
    """Builds plain values, and what ``known`` makes of the names in a pickle; nothing else, whatever it asks for.

    Args:
        file: Mapped memory or a ``BytesIO``, so that a read beyond the end takes no memory.
        known: Functions and ``StandIn`` classes by module and name.

    Raises, while loading, nearly anything; ``UnknownNameError`` where the pickle asks for what is not known.
    """

    def __init__(self, file: Any, known: Mapping[tuple[str, str], object]):
        super().__init__(file, encoding="utf-8")
        self._known = known

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._known:
            raise UnknownNameError(" ".join(f"{module}.{name}".split()))
        return self._known[module, name]

    def load_bytearray8(self) -> None:
        """Read a writable array's bytes; the base class would take the memory first, in whatever size is claimed."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))

    def load_build(self) -> None:
        """Give a stand-in its state; the base class would set attributes of anything, functions and classes too."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], StandIn):
            raise pickle.UnpicklingError("it sets the state of what has none")
        self.stack[-1].__setstate__(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: object, value: object) -> None:
        if type(key) not in KEYS or not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError("it holds a map with keys that are no plain values")
        if type(key) is int and key.bit_length() > KEY_BITS:
            raise pickle.UnpicklingError(f"it holds a map with a key of {key.bit_length()} bits")
        self.stack[-1][key] = value

    def _refuse(self) -> NoReturn:
        raise pickle.UnpicklingError("it holds what no pickle of plain values does")

    dispatch: ClassVar = (
        pickle._Unpickler.dispatch
        | dict.fromkeys((code[0] for code in REFUSED), _refuse)
        | {
            pickle.BYTEARRAY8[0]: load_bytearray8,
            pickle.BUILD[0]: load_build,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
            pickle.DICT[0]: load_dict,
        }
    )
