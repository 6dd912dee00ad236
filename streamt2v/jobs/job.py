"""A job: what to make, from what, where to, and how the run behaves; and the result of one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from streamt2v import devices, files
from streamt2v.config import RunConfig, maker, to_flat
from streamt2v.jobs import run_directory

_REFINED = ("enabled", "model", "solver", "chunk", "overlap", "shift_back", "num_inference_steps", "reuse_interval")
# What fixes the number and the sizes of frames and states: no run goes on after a change there.
_FIXED = (
    *("command", "source", "refiner", "config.model", "config.num_frames", "config.output"),
    *(f"config.stream.{name}" for name in ("chunk", "overlap", "height", "width")),
    *(f"config.refine.{name}" for name in _REFINED),
)


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
    audio: Path | None = None
    """A file whose sound the video gets, in place of its source's."""
    memory: float | None = None
    """Gigabytes that the run may take; None means what is free."""
    like: Mapping[str, Any] | None = None
    """Threads and memory policy of the run to repeat, where none are asked for."""

    @property
    def run_path(self) -> Path:
        """The run directory, beside the output."""
        return run_directory.directory_for(self.output)

    @property
    def maker(self) -> str:
        """The model that makes the frames."""
        return maker(self.command, to_flat(self.config))

    def local(self) -> dict[str, Any]:
        """Return what `resumed` needs besides the recipe; it stays on this machine.

        Paths are kept as they are and as seen from the output, as folders are moved with all that is in them.
        """
        paths = {
            "source": self.source,
            "image": None,
            **self.config.all_files,
            "preview": self.preview,
            "audio": self.audio,
        }
        given = {name: Path(path).absolute() for name, path in paths.items() if path}
        folder = self.output.absolute().parent
        seen = {name: os.path.relpath(path, folder) for name, path in given.items() if path.anchor == folder.anchor}
        absolute = {name: str(given[name]) if name in given else None for name in paths}
        return {**absolute, "from_output": seen, "keep_run": self.keep_run}

    def may_change(self, key: str) -> bool:
        """Tell whether the run may be continued although its recipe changed at a dotted key."""
        return self.resume_anyway and not key.startswith(_FIXED)


BEHAVIOUR = ("device", "threads", "resume", "resume_anyway", "overwrite", "keep_run", "preview", "audio", "memory")
"""Fields of a job that say how it runs, not what it makes."""


def beside(source: Path, command: str) -> Path:
    """Return the name of what `refine` or `extend` makes of a video when no other was given."""
    return source.parent / f"{source.stem}_{command.removesuffix('e')}ed.mp4"


def default_output(prompt: str, seed: int) -> Path:
    """Return a file name made of the date, the words of the prompt and the seed."""
    return Path(f"{datetime.now():%Y%m%d-%H%M%S}_{files.slug(prompt)}_{seed}.mp4")


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
            output=str(job.output),
            frames=config.num_frames,
            width=width,
            height=height,
            fps=config.output.fps,
            seconds=round(seconds, 2),
            seed=config.seed,
            model=job.maker,
            peak_memory_mb=round(devices.peak_memory(device) / 2**20, 1),
        )
