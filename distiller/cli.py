"""Command-line conduct shared by every script: a user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(ValueError):
    """Something the user can put right: a flag, a file or a line of a file. The message names it."""


class ArgumentParser(argparse.ArgumentParser):
    """An ``argparse.ArgumentParser`` whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def run(prog: str, main: Callable[[], None]) -> int:
    """Call ``main`` and turn user errors into ``prog: error: ...`` on stderr.

    An ``InputError``, and an ``OSError`` that names a file (missing, not writable, disk full), give 2;
    an interrupt gives 130, by the shell's convention of 128 + SIGINT. Anything else is a bug and keeps
    its traceback.

    Returns:
        The process's exit code.
    """
    try:
        main()
    except InputError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{prog}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0
