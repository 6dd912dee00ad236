"""What is said on stdout and stderr, and how signals end a command."""

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
from streamt2v.errors import Interrupted, OutputError, StreamT2VError, Terminated, stopped_by


def plain(text: str) -> str:
    """Return text without control and bidirectional characters, so that a prompt cannot steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cf", "Cs"})


def say(text: str) -> None:
    """Print a line on stderr; that nobody reads there, or a log is full, ends no run."""
    try:
        print(plain(text), file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Let a stream that failed lead nowhere: what it still holds would fail again at the exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


FETCHING = "stopped; the same command goes on where it stopped"


def emit(text: str, out: TextIO | None = None) -> None:
    """Print a result; when the reader of our output went away there is nobody to tell."""
    try:
        print(text, flush=True, file=out)
    except OSError as error:
        silence(out or sys.stdout)
        gone = isinstance(error, BrokenPipeError)
        if not gone:
            say(f"error: the result cannot be printed: {error.strerror}")
        raise SystemExit(141 if gone else OutputError.exit_code) from None  # no failure of a job that is being made


@contextmanager
def terminable(said: str = "stopped") -> Iterator[None]:
    """Turn SIGTERM into an exception, so that a run can say how it goes on as it does on Ctrl-C; and name both.

    Also where a library lost the exception and raises another one.
    """
    arrived: list[BaseException] = []

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        arrived.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise arrived[-1]

    # Started with SIGINT ignored, as in the background of a script, it stays ignored.
    both = [signal.SIGTERM, *([signal.SIGINT] if callable(signal.getsignal(signal.SIGINT)) else [])]
    before = {number: signal.signal(number, stop) for number in both}
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
