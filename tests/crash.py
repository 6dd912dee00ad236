"""Runs of the command line that can be killed, starved or lied to: forks of one process that has imported everything.

Importing torch takes seconds, a tiny run about one, of which a third builds networks: so a server imports and builds
once (tests/ready.py), and every run is a fork of it with its own session. What goes wrong in a run is a picklable
function called in it beforehand, such as `Failing(7, errno.EIO)`.
"""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import av.error
import imageio_ffmpeg
import torch

from streamt2v import files
from streamt2v.cli import app
from streamt2v.jobs import run_directory
from streamt2v.media import ffmpeg, writing
from streamt2v.media.frames import Frames
from streamt2v.models.restorer import Restorer
from streamt2v.models.unet3d import UNet3D
from streamt2v.models.vae import AutoencoderKL
from streamt2v.runs import pipeline  # noqa: F401
from streamt2v.weights import catalog, networks

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["pytest", "tests.crash", "tests.ready"])


class Run:
    """One run of the command line in a process and session of its own."""

    def __init__(
        self, *arguments: object, log: Path, before: Callable[[], None] | None = None, terminal: str = os.devnull
    ) -> None:
        self.log, self.began = log, time.monotonic()
        self._answers = _server.Event()
        given = list(map(str, arguments)), str(log), before, terminal, self._answers.set, dict(os.environ)
        self._process = _server.Process(target=_enter, args=given)
        log.unlink(missing_ok=True)
        self._process.start()
        self.pid = self._process.pid or 0

    def started(self) -> "Run":
        """Wait until the command line answers signals."""
        while not self._answers.wait(0.01):
            assert self.wait(0) is None, self.said
        self.began = time.monotonic()
        return self

    def wait(self, seconds: float = 280) -> int | None:
        """Return its exit code (negative: the signal that killed it), or None when it has not ended by then."""
        self._process.join(seconds)
        return self._process.exitcode

    def ends(self, work: float, seconds: float = 120) -> int | None:
        """Return its exit code, or None when it goes on: after so many seconds of its own work, or so long a time.

        Its own work, because on a busy machine it may wait for its turn.
        """
        began, before = time.monotonic(), self.spent()
        while (code := self.wait(0.01)) is None and self.spent() - before < work:
            if time.monotonic() - began > seconds:
                break
        return code

    def spent(self) -> float:
        """Seconds of processor time so far; after its end none."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> bool:
        """Kill it without warning; tells whether it was still running."""
        running = self._process.exitcode is None
        os.kill(self.pid, signal.SIGKILL) if running else None
        self._process.join(30)
        return running

    @property
    def said(self) -> str:
        """What it wrote to stdout and stderr."""
        return self.log.read_text(errors="replace")

    def survivors(self, seconds: float = 2) -> list[int]:
        """Processes of its session that are still there after so long: on a busy machine a kill takes a moment."""
        deadline = time.monotonic() + seconds
        while (found := self._session()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _session(self) -> list[int]:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found


def run(*arguments: object, log: Path, before: Callable[[], None] | None = None) -> tuple[int | None, str]:
    """Run to the end; return exit code and what was said."""
    child = Run(*arguments, log=log, before=before)
    return child.wait(), child.said


def killed(stage: str, number: int, *arguments: object, log: Path) -> None:
    """Begin a run and kill it when a stage has stored so many states."""
    child = Run(*arguments, log=log, before=Signalled(stage, number))
    assert child.wait() == -signal.SIGKILL, child.said


def _enter(
    arguments: list[str],
    log: str,
    before: Callable[[], None] | None,
    terminal: str,
    answers: Callable[[], None],
    surroundings: dict[str, str],
) -> None:
    os.setsid()
    os.environ.clear()  # the server's are those of the first test that asked for it
    os.environ.update(surroundings)
    os.dup2(os.open(terminal, os.O_RDWR), 0)  # of a new session the first terminal opened becomes the controlling one
    os.dup2(0 if terminal != os.devnull else os.open(log, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    torch.set_num_threads(1)
    networks.load_module = sys.modules["tests.ready"].given  # which the server imported, and nobody else
    gc.freeze()
    os.fsync = lambda descriptor: None  # what was written outlives its process
    if before is not None:
        before()
    real = app.terminable

    @contextmanager
    def terminable() -> Iterator[None]:
        with real():
            answers()
            yield

    app.terminable = terminable  # type: ignore[assignment]
    app.main(arguments)


# ------------------------------------------------------------------------------------------------- what can go wrong


class Trap:
    """Stands in for `os` in the file layer and calls back before and after every operation that changes the disk."""

    def __init__(self, watch: Callable[[str, str], None]) -> None:
        self.watch = watch

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in {"open", "write", "fsync", "replace", "ftruncate"}:
            return real

        def call(*arguments: object, **named: object) -> object:
            self.watch(name, "before")
            result = real(*arguments, **named)
            self.watch(name, "after")
            return result

        return call


@dataclass
class Signalled:
    """The run gets a signal as soon as a stage has stored its n-th state: "stream" after a chunk, or "output"."""

    stage: str
    number: int
    sent: signal.Signals = signal.SIGKILL

    def __call__(self) -> None:
        real, calls = run_directory.RunDirectory.save_state, count(1)

        def save(directory: run_directory.RunDirectory, stage: str, *given: Any) -> None:
            real(directory, stage, *given)
            if stage == self.stage and next(calls) == self.number:
                os.kill(os.getpid(), self.sent)

        run_directory.RunDirectory.save_state = save  # type: ignore[method-assign, assignment]


@dataclass
class Listed:
    """Another list of weights stands for the package's; then something else goes wrong."""

    manifest: Path
    then: Callable[[], None]

    def __call__(self) -> None:
        catalog._manifest = lambda root: self.manifest
        self.then()


FAILED = "an operation failed"


@dataclass
class Failing:
    """The n-th operation that changes the disk fails."""

    operation: int
    code: int
    calls: int = 0

    def __call__(self) -> None:
        def fail(_name: str, when: str) -> None:
            self.calls += when == "before"
            if when == "before" and self.calls == self.operation:
                print(FAILED, flush=True)
                raise OSError(self.code, os.strerror(self.code))

        files.os = Trap(fail)  # type: ignore[assignment]


def no_headroom() -> None:
    """Go on to the very end of the disk."""
    run_directory.HEADROOM = -(2**40)


@dataclass
class Encoder:
    """The ffmpeg binary is a shell script, which finds the real one in $FFMPEG; so long it may make no progress."""

    script: Path
    seconds: float

    def __call__(self) -> None:
        os.environ["FFMPEG"] = imageio_ffmpeg.get_ffmpeg_exe()
        imageio_ffmpeg.get_ffmpeg_exe = lambda: str(self.script)
        ffmpeg.STALL_SECONDS = self.seconds


@dataclass
class FailingSegment:
    """Encoding the n-th segment of the growing video fails."""

    segment: int

    def __call__(self) -> None:
        real = writing.SegmentWriter._encode

        def encode(writer: writing.SegmentWriter, frames: Frames) -> bytes:
            if writer.mark.segments == self.segment:
                raise av.error.ExternalError(1, "the encoder died")
            return real(writer, frames)

        writing.SegmentWriter._encode = encode  # type: ignore[method-assign]


@dataclass
class Denoising:
    """The n-th call of the streaming stage's denoiser or of the refiner, and so many more, fail or return NaN."""

    refiner: bool
    call: int
    error: type[Exception] | None = None
    times: int = 1

    def __call__(self) -> None:
        denoiser: Any = Restorer if self.refiner else UNet3D
        real, calls = denoiser.run, count()

        def run(network: Any, *arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
            output, deep = real(network, *arguments, **named)
            if not self.call <= next(calls) < self.call + self.times:
                return output, deep
            if self.error is not None:
                raise self.error("so it is said")
            return output * torch.nan, deep

        denoiser.run = run


@dataclass
class Decoding:
    """The n-th picture that a VAE decodes is NaN."""

    call: int

    def __call__(self) -> None:
        real, calls = AutoencoderKL.decode, count()

        def decode(vae: AutoencoderKL, *arguments: Any, **named: Any) -> Any:
            decoded = real(vae, *arguments, **named)
            if next(calls) == self.call:
                decoded.sample.fill_(torch.nan)
            return decoded

        AutoencoderKL.decode = decode  # type: ignore[method-assign]
