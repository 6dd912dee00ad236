"""A job: what to make, from what, where to; and everything that can be checked before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v import devices, files, weights
from streamt2v.config import RunConfig, to_flat
from streamt2v.families import choose
from streamt2v.jobs import run_directory
from streamt2v.jobs.recipe import inspect_source
from streamt2v.timeline import Prompt, turns
from streamt2v.weights.home import sha256_of

if TYPE_CHECKING:
    from streamt2v.media.sound import Carried

# What fixes the number and the sizes of frames and states: no run goes on after a change there.
_FIXED = (
    "command", "source", "config.model", "config.num_frames", "config.stream.chunk", "config.stream.overlap",
    "config.stream.height", "config.stream.width", "config.refine.enabled", "config.refine.chunk",
    "config.refine.overlap", "config.refine.blending", "config.refine.num_inference_steps",
    "config.refine.reuse_interval", "config.output",
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

    def timeline(self) -> tuple[Prompt, ...]:
        """Return the prompts and the frames at which the run turns to them, see `timeline.turns`."""
        kept = inspect_source(self.source).frames if self.source and self.command == "extend" else 0
        return turns(self.config, self.command, kept)

    def recipe(self) -> dict[str, Any]:
        """Return what decides the frames: a run may only be resumed by a job with an equal recipe."""
        chosen = choose.choose(self.config) if self.command == "generate" else None
        return {
            "command": self.command,
            # Of a picture the name says enough: a recipe travels with the video, the folder stays private.
            "config": to_flat(self.config) | {"image": Path(self.config.image).name},
            "source": self.source and {**_fingerprint(self.source), "frames": inspect_source(self.source).frames},
            "image": _fingerprint(Path(self.config.image)) if self.config.image else None,
            "initializer": None if chosen is None else chosen.fingerprint(),
            "weights": {
                name: part.sha256
                for file in weights.family(self.config.model).files
                for name, part in file.parts.items()
            },
        }

    def carried(self) -> Carried:
        """Return how the result carries what the source has besides its pictures; there must be one."""
        assert self.source is not None
        from streamt2v.media import sound

        return sound.carry(self.source, self.config.num_frames / self.config.output.rate, self.output.suffix)

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


def _fingerprint(path: Path) -> dict[str, Any]:
    size = sum(part.stat().st_size for part in path.iterdir()) if path.is_dir() else path.stat().st_size
    return {"name": path.name, "bytes": size, "sha256": contents_hash(path, files.stamp(path))}


@lru_cache(maxsize=8)
def contents_hash(path: Path, _stamp: tuple[int, int, int] | None) -> str:
    from streamt2v.media import exports

    return exports.sha256_of(path) if path.is_dir() else sha256_of(path)
