"""What a run tells while it goes on, what it notices, and how fast it was."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from streamt2v import devices
from streamt2v.families.networks import Networks
from streamt2v.jobs import forecast
from streamt2v.jobs.prepared import Prepared
from streamt2v.jobs.run_directory import RunDirectory
from streamt2v.media import frames
from streamt2v.media.frames import Group


class Report(Protocol):
    """What is told of a run's progress; a test or a caller may pass its own."""

    def start(self, stage: str, total_frames: int, done: int = 0) -> None:
        """A stage begins, or continues after `done` frames."""
        ...

    def advance(self, stage: str, done: int, chunk: int, num_chunks: int) -> None:
        """`done` frames of the stage exist, chunk number `chunk` (from 1) of `num_chunks` is finished."""
        ...

    def note(self, text: str, warning: bool = False) -> None:
        """Something worth a line when the user asked for details, or a warning for everybody."""
        ...


def look_at(group: Group, what: str, directory: RunDirectory, report: Report) -> None:
    """Warn of frames without a picture, and refuse to compute more than the disk can take."""
    if frames.is_black(group.frames):
        report.note(f"{what} {group.start} to {group.stop - 1} are black", warning=True)
    directory.require_room(2 * group.frames.nbytes)  # of what comes next, as large as this before compression


class Speed:
    """What a run's time was spent on, for `plan`: loading and the first chunk, later chunks, the refiner's pixels."""

    def __init__(self, networks: Networks) -> None:
        self.networks = networks
        self.first_seconds = self.stream_seconds = 0.0

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Count what is done inside as the first chunk, without what it loads."""
        began = time.monotonic() - self.networks.seconds
        yield
        self.first_seconds += time.monotonic() - self.networks.seconds - began

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Count what is done inside as a later chunk, without what it loads."""
        began = time.monotonic() - self.networks.seconds
        yield
        self.stream_seconds += time.monotonic() - self.networks.seconds - began

    def remember(self, known: Prepared, seconds: float) -> None:
        """Keep this run's speed for `plan`; short runs, and those that did not begin here, say too little."""
        job, networks, later = known.job, self.networks, len(known.stream_plan) - 1
        if job.command != "generate" or job.resume or not later or len(known.refine_plan) == 1:
            return
        import torch

        fixed = networks.seconds + self.first_seconds
        rest = seconds - fixed - self.stream_seconds
        pixels = networks.pixel_time.seconds if known.refine_plan else rest
        measured = {
            "fixed_seconds": fixed,
            "stream_seconds_per_chunk": self.stream_seconds / later,
            "refine_seconds_per_chunk": (rest - pixels) / max(1, len(known.refine_plan)),
            "seconds_per_frame": pixels / job.config.num_frames,
            "peak_memory_bytes": devices.peak_memory(networks.device),
        }
        seen = devices.Glance(networks.device.kind, 0, devices.card(networks.device))
        forecast.remember(job.config, seen, torch.get_num_threads(), networks.policy, measured)
