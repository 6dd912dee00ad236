"""Output on stdout and stderr, and how signals end a command."""

from __future__ import annotations

import json
import os
import signal
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TextIO

from streamt2v.batch import events
from streamt2v.errors import HANG_UP, HungUp, Interrupted, OutputError, StreamT2VError, Terminated, stopped_by


def plain(text: str) -> str:
    """Return text without control and bidirectional characters, so that a prompt cannot steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cf", "Cs"})


def say(text: str) -> None:
    """Print a line on stderr; a closed terminal or a full log does not end a run."""
    try:
        print(plain(text), file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Redirect a stream that failed to nowhere, as its buffered rest would fail again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


FETCHING = "stopped; repeat the command to continue"


def emit(text: str, out: TextIO | None = None) -> None:
    """Print a result; exit quietly if the reader of our output is gone."""
    try:
        print(text, flush=True, file=out)
    except OSError as error:
        silence(out or sys.stdout)
        gone = isinstance(error, BrokenPipeError)
        if not gone:
            say(f"error: the result cannot be printed: {error.strerror}")
        raise SystemExit(141 if gone else OutputError.exit_code) from None  # not a failure of the job


@contextmanager
def terminable(said: str = "stopped") -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into exceptions, so that a run can say how to continue as on Ctrl-C, and name them.

    This also works where a library swallows the exception and raises another one.
    """
    arrived: list[BaseException] = []

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        arrived.append({signal.SIGTERM: Terminated, HANG_UP: HungUp}.get(number, KeyboardInterrupt)())
        raise arrived[-1]

    # What is ignored from the start stays so: SIGINT for a background job of a script, SIGHUP under nohup.
    others = [one for one in (signal.SIGINT, HANG_UP) if one is not None and signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, *others)}
    try:
        yield
    except StreamT2VError:
        raise
    except BaseException as error:
        if by := stopped_by(error) or (isinstance(error, Exception) and arrived and arrived[0]):
            raise Interrupted(said, by=by) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def emit_failure(error: StreamT2VError) -> None:
    emit(json.dumps(events.event("result", **events.failed(error))))


def complain(message: str, hint: str) -> None:
    say(message)
    if hint:
        say(f"  {hint}")
