"""Runs of the command line that can be killed, starved or lied to: forks of one process that has imported everything.

Importing torch takes seconds, a tiny run about one: so a server imports once, and every run is a fork of it with its
own session. What goes wrong in a run is a picklable function called in it beforehand, such as `Failing(7, errno.EIO)`.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import av.error
import imageio_ffmpeg
import torch

from streamt2v import files
from streamt2v.cli.app import main
from streamt2v.jobs import run_directory
from streamt2v.media import ffmpeg, writing
from streamt2v.media.frames import Frames
from streamt2v.models.unet3d import UNet3D
from streamt2v.models.vae import AutoencoderKL
from streamt2v.runs import pipeline  # noqa: F401

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["pytest", "tests.crash"])


class Run:
    """One run of the command line in a process and session of its own."""

    def __init__(
        self, *arguments: object, log: Path, before: Callable[[], None] | None = None, terminal: str = os.devnull
    ) -> None:
        self.log, self.began = log, time.monotonic()
        self._process = _server.Process(target=_enter, args=(list(map(str, arguments)), str(log), before, terminal))
        log.unlink(missing_ok=True)
        self._process.start()
        self.pid = self._process.pid or 0

    def started(self) -> "Run":
        """Wait until it is about to enter the command line."""
        while not self.log.exists():
            time.sleep(0.002)
        self.began = time.monotonic()
        return self

    def wait(self, seconds: float = 120) -> int | None:
        """Return its exit code (negative: the signal that killed it), or None when it has not ended by then."""
        self._process.join(seconds)
        return self._process.exitcode

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

    def survivors(self) -> list[int]:
        """Processes of its session that are still there."""
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


def _enter(arguments: list[str], log: str, before: Callable[[], None] | None, terminal: str) -> None:
    os.setsid()
    os.dup2(os.open(terminal, os.O_RDWR), 0)  # of a new session the first terminal opened becomes the controlling one
    os.dup2(0 if terminal != os.devnull else os.open(log, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if before is not None:
        before()
    Path(log).touch()
    main(arguments)


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
    """The ffmpeg binary is a shell script, which finds the real one in $FFMPEG."""

    script: Path

    def __call__(self) -> None:
        os.environ["FFMPEG"] = imageio_ffmpeg.get_ffmpeg_exe()
        imageio_ffmpeg.get_ffmpeg_exe = lambda: str(self.script)
        ffmpeg.STALL_SECONDS = 1.0


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
    """The n-th call of a denoiser, and so many more, fail or return NaN. The refiner's is the one without CAM."""

    refiner: bool
    call: int
    error: type[Exception] | None = None
    times: int = 1

    def __call__(self) -> None:
        real, calls = UNet3D.run, count()

        def run(network: UNet3D, *arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
            output, deep = real(network, *arguments, **named)
            if network.config.cam == self.refiner or not self.call <= next(calls) < self.call + self.times:
                return output, deep
            if self.error is not None:
                raise self.error("so it is said")
            return output * torch.nan, deep

        UNet3D.run = run  # type: ignore[method-assign, assignment]


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
