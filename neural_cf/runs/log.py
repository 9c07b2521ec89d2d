"""Messages of a run: on the terminal, and in the log in the run's directory."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

LOG = "ncf.log"  # in the run's directory

log = logging.getLogger("ncf")


class _Results(logging.StreamHandler):
    """A handler for standard output whose errors end the run; logging would show a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            raise
        super().handleError(record)


def show_messages(prog: str = "ncf.py") -> None:
    """Send messages to stdout, and warnings to stderr in the form of errors, with the program's name ``prog``."""
    results = _Results(sys.stdout)
    results.setFormatter(logging.Formatter("%(message)s"))
    results.addFilter(lambda record: logging.INFO <= record.levelno < logging.WARNING)
    warnings = logging.StreamHandler(sys.stderr)
    warnings.setFormatter(logging.Formatter(f"{prog}: warning: %(message)s"))
    warnings.setLevel(logging.WARNING)
    for name in ("ncf", "distiller"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.handlers = [results, warnings]
        logger.propagate = False


class _LogFile(logging.FileHandler):
    """A handler for a log file whose errors end the run; logging would show a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, self.baseFilename) from error
        super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # it has ended the run already
            super().close()


def start_log(directory: Path, device: torch.device) -> None:
    """Start the log of a run, with versions, machine and command line at its head; the log of an earlier run ends.

    Args:
        directory: The run's directory.
        device: What the run computes on.

    Raises:
        OSError: the log cannot be written.
    """
    handler = _LogFile(directory / LOG, errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for logger_name in ("ncf", "distiller"):
        logger = logging.getLogger(logger_name)
        for earlier in [other for other in logger.handlers if isinstance(other, _LogFile)]:
            logger.removeHandler(earlier)
            earlier.close()
        logger.addHandler(handler)
    log.debug("command: %s", command_line())
    log.debug("python %s, torch %s, numpy %s", platform.python_version(), torch.__version__, np.__version__)
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    log.debug(
        "machine: %s, %d processors, %d threads", platform.platform(), os.cpu_count(), torch.get_num_threads()
    )
    log.debug("device: %s%s", device, gpu)


def command_line() -> str:
    """Return this process's command line, quoted for a shell."""
    name = Path(sys.argv[0]).name
    return shlex.join(["neural-cf" if name == "__main__.py" else name, *sys.argv[1:]])
