"""A job: what to make, from what, where to, and how the run behaves; and the result of one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v import devices
from streamt2v.config import RunConfig
from streamt2v.jobs import run_directory

if TYPE_CHECKING:
    pass

# What fixes the number and the sizes of frames and states: no run goes on after a change there.
_FIXED = (
    "command", "source", "config.model", "config.num_frames", "config.stream.chunk", "config.stream.overlap",
    "config.stream.height", "config.stream.width", "config.refine.enabled", "config.refine.chunk",
    "config.refine.overlap", "config.refine.num_inference_steps", "config.refine.reuse_interval", "config.output",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One command: what to make, from what, where to, and how the run behaves."""

    command: str
    config: RunConfig
    output: Path
    source: Path | None = None
    device: str = "auto"
    threads: int | None = None
    resume: bool = False
    resume_anyway: bool = False
    overwrite: bool = False
    keep_run: bool = False
    preview: Path | None = None
    inputs: tuple[Path, ...] = ()
    """What the command reads besides source and picture: it must not be written over."""
    memory: float | None = None
    """Gigabytes that the run may take; None means what is free."""
    like: Mapping[str, Any] | None = None
    """Threads and memory policy of the run to repeat, where none are asked for."""

    @property
    def run_path(self) -> Path:
        """The run directory, beside the output."""
        return run_directory.directory_for(self.output)

    def local(self) -> dict[str, Any]:
        """Return what `resumed` needs besides the recipe; it stays on this machine.

        Paths are kept as they are and as seen from the output, as folders are moved with all that is in them.
        """
        paths = {"source": self.source, "image": self.config.image or None, "preview": self.preview}
        given = {name: Path(path).absolute() for name, path in paths.items() if path}
        folder = self.output.absolute().parent
        seen = {name: os.path.relpath(path, folder) for name, path in given.items() if path.anchor == folder.anchor}
        absolute = {name: str(given[name]) if name in given else None for name in paths}
        return {**absolute, "from_output": seen, "keep_run": self.keep_run}

    def may_change(self, key: str) -> bool:
        """Tell whether the run may be continued although its recipe changed at a dotted key."""
        return self.resume_anyway and not key.startswith(_FIXED)


BEHAVIOUR = ("device", "threads", "resume", "resume_anyway", "overwrite", "keep_run", "preview", "memory")
"""Fields of a job that say how it runs, not what it makes."""


@dataclass(frozen=True)
class Result:
    """What was made."""

    output: str
    frames: int
    width: int
    height: int
    fps: float
    seconds: float
    seed: int
    model: str
    peak_memory_mb: float

    @classmethod
    def of(cls, job: Job, width: int, height: int, seconds: float, device: devices.Device | None = None) -> Result:
        """Describe the finished output of a job."""
        config = job.config
        return cls(
            str(job.output), config.num_frames, width, height, config.output.fps, round(seconds, 2), config.seed,
            config.model, round(devices.peak_memory(device) / 2**20, 1),
        )  # fmt: skip
