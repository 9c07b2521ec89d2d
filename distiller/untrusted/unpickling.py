"""Pickles of plain values, read without running any code in them or allocating sizes that they merely claim."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

# Opcodes that pickles of plain values, arrays and tensors do not need.
REFUSED = (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX)
REFUSED += (pickle.PERSID, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)
REFUSED += (pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
REFUSED += (pickle.PUT, pickle.GET)  # protocol 0's memo opcodes, whose indices are numbers of any length
# Types of keys. Others, such as tuples, can nest so deeply that hashing them crashes.
KEYS = (str, int, float, bool)
# Bits of integers as keys: longer ones can all have the same hash, and a map of n such keys takes O(n^2) time to build.
KEY_BITS = 64


class UnknownNameError(pickle.UnpicklingError):
    """The error of a pickle that asks for an unknown function or class; the message is its module and name."""


class StandIn:
    """A base class of stand-ins for objects in a pickle; a subclass may accept the object's state."""

    def __setstate__(self, state: object) -> None:
        """Raise an ``UnpicklingError``: by default there is no state to accept."""
        raise pickle.UnpicklingError("it holds the state of an object that has none")


# The unpickler written in Python: the one in C allocates memory for whatever memo index a file names. Pickles that are
# read here have few parts, so that it is no slower.
class PlainUnpickler(pickle._Unpickler):
    """An unpickler that builds plain values and calls ``known`` functions and classes only.

    Loading raises an ``UnknownNameError`` if the pickle asks for any other function or class, and nearly any exception
    if the pickle is damaged.

    Args:
        file: The pickle, as mapped memory or a ``BytesIO``, so that a read beyond the end allocates nothing.
        known: Functions and ``StandIn`` classes by the module and the name that a pickle calls them by.
    """

    def __init__(self, file: Any, known: Mapping[tuple[str, str], object]):
        super().__init__(file, encoding="utf-8")
        self._known = known

    def find_class(self, module: str, name: str) -> object:
        """Return what ``known`` has by this name; raise an ``UnknownNameError`` if it has nothing."""
        if (module, name) not in self._known:
            raise UnknownNameError(" ".join(f"{module}.{name}".split()))
        return self._known[module, name]

    def load_bytearray8(self) -> None:
        """Read a bytearray; the base class would first allocate whatever size the pickle claims."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))

    def load_build(self) -> None:
        """Pass a state to a stand-in; the base class would set attributes of any object, functions and classes too."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], StandIn):
            raise pickle.UnpicklingError("it sets the state of what has none")
        self.stack[-1].__setstate__(state)

    def load_setitem(self) -> None:
        """Set one item of a dictionary, by ``_set``."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def load_setitems(self) -> None:
        """Set several items of a dictionary, by ``_set``."""
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def load_dict(self) -> None:
        """Make a dictionary of the items on the stack, by ``_set``."""
        items = self.pop_mark()
        self.append({})
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: object, value: object) -> None:
        """Set an item of the dictionary on the stack; refuse keys that are slow or dangerous to hash."""
        if type(key) not in KEYS or not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError("it holds a map with keys that are no plain values")
        if type(key) is int and key.bit_length() > KEY_BITS:
            raise pickle.UnpicklingError(f"it holds a map with a key of {key.bit_length()} bits")
        self.stack[-1][key] = value

    def _refuse(self) -> NoReturn:
        """Raise an ``UnpicklingError`` for an opcode of ``REFUSED``."""
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
