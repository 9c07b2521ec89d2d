"""What every script does about errors: a user's mistake is one line on stderr and exit code 2."""

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
    """An error that the user can correct; the message names the flag, the file or the line of the file."""


class ArgumentParser(argparse.ArgumentParser):
    """An ``argparse.ArgumentParser`` with one-line errors, one of them for help that cannot be printed."""

    def error(self, message: str) -> NoReturn:
        """Print the error as one line, without the usage text, and exit with code 2."""
        self.exit(_failed(self.prog, message))

    def print_help(self, file: IO[str] | None = None) -> None:
        """Print the help; raise an ``OSError`` if that fails, which ``argparse`` itself would ignore."""
        print(self.format_help(), end="", file=file)


def run(prog: str, main: Callable[[], None], less_memory: str = "") -> int:
    """Call ``main``, report user errors as ``prog: error: ...`` on stderr, and return the exit code.

    The exit code is 2 for an ``InputError``, for running out of memory, and for an ``OSError`` that names a file or
    standard output (missing, not writable, disk full). It is 130 for SIGINT, 143 for SIGTERM and, without a message,
    141 for a closed pipe, by the shell's convention of 128 + the signal's number. Any other exception is a bug and
    keeps its traceback.

    Args:
        prog: The script's name, with which messages begin.
        main: The script's main function.
        less_memory: What the user can do to need less memory, for the message when it runs out; may be empty.

    Returns:
        The process's exit code, 0 if ``main`` returned.
    """
    try:
        return _code_of(prog, main, less_memory)
    finally:
        drop_unwritten()


def _code_of(prog: str, main: Callable[[], None], less_memory: str) -> int:
    """Call ``main`` and return the exit code, as ``run`` describes it."""
    try:
        with sigterm_raised(), output_named():
            main()
    except InputError as error:
        return _failed(prog, str(error))
    except BrokenPipeError:  # the reader, such as ``| head``, has read enough
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
    """Return the message for running out of memory, with the advice and the reason where there are any."""
    reason = " ".join(str(error).split())[:200]
    return f"out of memory{less_memory and ': '}{less_memory}{reason and f' ({reason})'}"


def _failed(prog: str, message: str) -> int:
    """Print the message as one line on stderr and return the exit code of a user's mistake."""
    with suppress(OSError):  # stderr may be closed, or on a full disk as stdout is
        # File names in the message may contain line breaks.
        print(f"{prog}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2
