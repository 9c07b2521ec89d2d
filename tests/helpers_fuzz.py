"""Malformed files: made at random from whole ones, and what is asserted of reading them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from distiller.system.cli import InputError

# 10,000 by `make fuzz`.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 300))
HANGS_S = 5.0  # of processor time

FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
)


def changed(whole: bytes, tokens: tuple[bytes, ...] = ()) -> st.SearchStrategy[bytes]:
    """Bytes of ``whole`` changed, taken out, put in and copied elsewhere; ``tokens`` are among what is put in."""
    position = st.integers(0, len(whole))
    value = st.binary(min_size=1, max_size=8)
    change = st.tuples(
        st.sampled_from(["set", "cut", "insert", "copy", "end"]),
        position,
        position,
        st.sampled_from(tokens) | value if tokens else value,
    )

    def apply(changes: list[tuple[str, int, int, bytes]]) -> bytes:
        content = bytearray(whole)
        for kind, at, other, value in changes:
            if kind == "set":
                content[at : at + len(value)] = value
            elif kind == "cut":
                del content[at : at + len(value)]
            elif kind == "insert":
                content[at:at] = value
            elif kind == "copy":
                content[at : at + len(value)] = content[other : other + len(value)]
            else:
                del content[at:]
        return bytes(content)

    return st.lists(change, min_size=1, max_size=4).map(apply)


@contextmanager
def no_hang() -> Iterator[None]:
    """Fail after ``HANGS_S`` of processor time, whatever else the machine does."""

    def fail(*_: object) -> None:
        raise AssertionError(f"not done in {HANGS_S} s of processor time")

    before = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, HANGS_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def read_or_refused(read: Callable[[], object]) -> object | None:
    """What is read; None where it is refused, by an error that the command line makes one line of."""
    with no_hang():
        try:
            return read()
        except InputError as error:
            assert str(error)
        except OSError as error:
            assert error.filename is not None
    return None


def assert_refused(outcome, prog: str) -> None:
    """Exit code 2 and one line."""
    assert outcome.code == 2, (outcome.code, outcome.out, outcome.err)
    assert "Traceback" not in outcome.err
    last = outcome.err.rstrip("\n").split("\n")[-1].split("\r")[-1]
    assert last.startswith(f"{prog}: error: "), outcome.err


def assert_works_or_refused(outcome, prog: str) -> None:
    """Exit code 0, or 2 and one line."""
    if outcome.code:
        assert_refused(outcome, prog)
