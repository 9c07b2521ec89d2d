"""Command-line conduct shared by every script: a user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, NoReturn

from distiller.system.memory import MEMORY_ERRORS, is_out_of_memory
from distiller.system.output import drop_unwritten, output_named
from distiller.system.signals import Terminated, sigterm_raised


class InputError(ValueError):
    """Something the user can put right: a flag, a file or a line of a file. The message names it."""


class ArgumentParser(argparse.ArgumentParser):
    """An ``argparse.ArgumentParser`` whose errors are one line, without the usage text, and whose help is whole."""

    def error(self, message: str) -> NoReturn:
        self.exit(_failed(self.prog, message))

    def print_help(self, file: IO[str] | None = None) -> None:
        # ``argparse`` itself passes over what cannot be written.
        print(self.format_help(), end="", file=file)


def run(prog: str, main: Callable[[], None], less_memory: str = "") -> int:
    """Call ``main`` and turn user errors into ``prog: error: ...`` on stderr.

    An ``InputError``, running out of memory, and an ``OSError`` that names a file or standard output (missing, not
    writable, disk full), give 2; SIGINT gives 130, SIGTERM 143 and a closed pipe, without a word, 141, by the shell's
    convention of 128 + the signal's number. Anything else is a bug and keeps its traceback.

    Args:
        prog: The script's name.
        main: The script.
        less_memory: What a user can do where memory runs out.

    Returns:
        The process's exit code.
    """
    try:
        return _code_of(prog, main, less_memory)
    finally:
        drop_unwritten()


def _code_of(prog: str, main: Callable[[], None], less_memory: str) -> int:
    try:
        with sigterm_raised(), output_named():
            main()
    except InputError as error:
        return _failed(prog, str(error))
    except BrokenPipeError:  # ``| head`` has what it wants
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        return _failed(prog, f"{error.filename}: {error.strerror}")
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        return _failed(prog, _out_of_memory(error, less_memory))
    except Terminated:
        print(f"{prog}: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def _out_of_memory(error: BaseException, less_memory: str) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"out of memory{less_memory and ': '}{less_memory}{reason and f' ({reason})'}"


def _failed(prog: str, message: str) -> int:
    with suppress(OSError):  # stderr may be closed, or full as stdout is
        # Names in it may have line ends.
        print(f"{prog}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2
