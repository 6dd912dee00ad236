"""Every expected failure of the package, with the exit code it maps to.

StreamT2VError            1    base; a bare one is a bug
├── ConfigError           2    an option, config file, preset or plan is invalid
├── InputError            3    an input is missing, unreadable or of the wrong kind
│   └── VideoError        3    ... a video
├── WeightsError          4    weights are missing, damaged or of another layout
├── OutputError           5    the output exists, cannot be written, or the disk is full
│   └── ResumeError       5    a run directory does not fit the run that should resume it
├── MemoryLimitError      6    the device or the host has not enough memory
├── NumericsError         7    a network produced NaN, Inf or an all-black chunk
├── BusyError             8    another process holds the output or the weights
└── Interrupted         130    SIGINT (143 for SIGTERM); the run can be resumed
"""


class StreamT2VError(Exception):
    """An expected failure: `message` says what was found, `hint` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(StreamT2VError):
    """An option, a config file, a preset or a plan is invalid."""

    exit_code = 2


class InputError(StreamT2VError):
    """An input file is missing, unreadable or of the wrong kind."""

    exit_code = 3


class VideoError(InputError):
    """A video cannot be probed or decoded."""


class WeightsError(StreamT2VError):
    """Weights are missing, damaged or do not fit the network."""

    exit_code = 4


class OutputError(StreamT2VError):
    """The output exists already, cannot be written, or the disk is full."""

    exit_code = 5


class ResumeError(OutputError):
    """A run directory does not belong to the run that should resume it."""


class MemoryLimitError(StreamT2VError):
    """The device or the host has not enough memory for the asked settings."""

    exit_code = 6


class NumericsError(StreamT2VError):
    """A network produced NaN, Inf or an all-black chunk."""

    exit_code = 7


class BusyError(StreamT2VError):
    """Another process is working on the same output."""

    exit_code = 8


class Interrupted(StreamT2VError):
    """The run was stopped by a signal and can be resumed."""

    def __init__(self, message: str, hint: str = "", *, by: BaseException) -> None:
        super().__init__(message, hint)
        self.exit_code = 143 if isinstance(by, Terminated) else 130


class Terminated(BaseException):
    """SIGTERM arrived; like Ctrl-C no `Exception`, so that no library takes it for a failure of its own."""


SIGNALS = (KeyboardInterrupt, Terminated)
