"""Every expected failure of the package, with the exit code it maps to and the `code` that `--json` shows.

StreamT2VError            1    base; a bare one is a bug
├── ConfigError           2    an option, config file, preset or plan is invalid
│   └── FieldError        2    ... a field of a row of a batch
├── InputError            3    an input is missing, unreadable or of the wrong kind
│   └── VideoError        3    ... a video
├── WeightsError          4    weights are missing, damaged or of another layout
├── OutputError           5    the output exists, cannot be written, or the disk is full
│   └── ResumeError       5    a run directory does not belong to the run that should resume it
├── MemoryLimitError      6    the device or the host has too little memory
├── NumericsError         7    a network produced NaN, Inf or an all-black chunk
├── BusyError             8    another process holds the output or the weights
├── BatchError            9    a batch ended with failed jobs
├── DifferenceError      10    a rerun gave other frames than the original
└── Interrupted         130    SIGINT (143 for SIGTERM, 129 for SIGHUP); the run can be resumed
"""

import contextlib
import errno
import signal
import threading
from collections.abc import Iterator
from typing import Any


class StreamT2VError(Exception):
    """An expected failure: `message` says what was found, `hint` what to do about it."""

    code = "unexpected"
    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def explained(error: BaseException) -> StreamT2VError:
    """Return an error of this package unchanged, and any other one as the error of this package it stands for."""
    if isinstance(error, StreamT2VError):
        return error
    if isinstance(error, MemoryError):
        return MemoryLimitError("out of memory", less_memory())
    if isinstance(error, ImportError) and "failed to map segment" in str(error):
        return MemoryLimitError("out of memory while libraries are loaded", less_memory())
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM):
        # From asking whether a path given by the user exists.
        return ConfigError(f"{str(error.filename)[:200]} cannot be accessed: {(error.strerror or '').lower()}")
    first_line = str(error).strip().partition("\n")[0]
    return StreamT2VError(f"{type(error).__name__}: {first_line}", "this is a bug")


def address_limit() -> int | None:
    """Return the bytes that this process may have mapped, as `ulimit -v` limits them; None where nothing does."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def less_memory() -> str:
    """Say what to do where memory ran out."""
    if (limit := address_limit()) is not None:
        return f"this shell allows a program {spoken_bytes(limit)} (ulimit -v), libraries included: raise it"
    return "try a lower --memory, or a smaller --size or --chunk"


def spoken_bytes(size: int) -> str:
    """Write a size as people say it: 20 kB, 350 MB, 1.4 GB; 0 is "nothing"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes" if size else "nothing"


class ConfigError(StreamT2VError):
    """An option, a config file, a preset or a plan is invalid."""

    code = "config"
    exit_code = 2


class FieldError(ConfigError):
    """A field of a row of a batch is invalid."""

    def __init__(self, field: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.field = field


class InputError(StreamT2VError):
    """An input file is missing, unreadable or of the wrong kind."""

    code = "input"
    exit_code = 3


class VideoError(InputError):
    """A video cannot be probed or decoded."""

    code = "video"


class WeightsError(StreamT2VError):
    """Weights are missing, damaged or do not fit the network."""

    code = "weights"
    exit_code = 4


class OutputError(StreamT2VError):
    """The output exists already, cannot be written, or the disk is full."""

    code = "output"
    exit_code = 5


class ResumeError(OutputError):
    """A run directory does not belong to the run that should resume it."""

    code = "resume"


class MemoryLimitError(StreamT2VError):
    """The device or the host has too little memory for the requested settings."""

    code = "memory"
    exit_code = 6


class NumericsError(StreamT2VError):
    """A network produced NaN, Inf or an all-black chunk."""

    code = "numerics"
    exit_code = 7


class BusyError(StreamT2VError):
    """Another process is working on the same output."""

    code = "busy"
    exit_code = 8


class BatchError(StreamT2VError):
    """A batch ended with failed jobs."""

    code = "batch"
    exit_code = 9


class DifferenceError(StreamT2VError):
    """A rerun gave other frames than the original; it is kept."""

    code = "difference"
    exit_code = 10


class Interrupted(StreamT2VError):
    """The run was stopped by a signal and can be resumed."""

    code = "interrupted"

    def __init__(self, message: str, hint: str = "", *, by: BaseException) -> None:
        super().__init__(message, hint)
        self.exit_code = getattr(by, "exit_code", 130)


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt not an `Exception`, so that no library handles it as its own failure."""

    exit_code = 143


class HungUp(Terminated):
    """SIGHUP arrived: the terminal was closed, or the connection to it."""

    exit_code = 129


HANG_UP = getattr(signal, "SIGHUP", None)  # not on Windows
SIGNALS = (KeyboardInterrupt, Terminated)


def stopped_by(error: BaseException | None) -> BaseException | None:
    """Return the signal that an error is, or was caused by; None for any other error.

    A library interrupted in the middle of its work may fail in its own way while cleaning up.
    """
    while error is not None and not isinstance(error, SIGNALS):
        error = error.__context__
    return error


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Delay signals during a short call of a library that would turn them into an error of its own."""
    arrived: list[tuple[Any, ...]] = []
    delayed = [one for one in (signal.SIGINT, signal.SIGTERM, HANG_UP) if one is not None]
    before = {one: signal.getsignal(one) for one in delayed} if _in_main_thread() else {}
    try:
        for one in before:  # if another one raises here, all are restored as well
            signal.signal(one, lambda *said: arrived.append(said))
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        for number, frame in arrived[:1]:
            if callable(handler := before[number]):
                handler(number, frame)
