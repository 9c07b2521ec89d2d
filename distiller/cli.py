"""Command-line conduct shared by every script: a user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from .signals import Terminated, sigterm_raised


class InputError(ValueError):
    """Something the user can put right: a flag, a file or a line of a file. The message names it."""


class ArgumentParser(argparse.ArgumentParser):
    """An ``argparse.ArgumentParser`` whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(_failed(self.prog, message))


def run(prog: str, main: Callable[[], None]) -> int:
    """Call ``main`` and turn user errors into ``prog: error: ...`` on stderr.

    An ``InputError``, and an ``OSError`` that names a file (missing, not writable, disk full), give 2;
    SIGINT gives 130 and SIGTERM 143, by the shell's convention of 128 + the signal's number. Anything else is a bug
    and keeps its traceback.

    Returns:
        The process's exit code.
    """
    try:
        with sigterm_raised():
            main()
    except InputError as error:
        return _failed(prog, str(error))
    except OSError as error:
        if error.filename is None:
            raise
        return _failed(prog, f"{error.filename}: {error.strerror}")
    except Terminated:
        print(f"{prog}: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def _failed(prog: str, message: str) -> int:
    # Names in it may have line ends.
    print(f"{prog}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2
