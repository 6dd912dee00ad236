"""What another process can see of a run: how far it is, whether it lives, what can be watched. Nothing is written.

The run directory says it all: the names and times of the stored chunks, the marks in the states of the output, the
fragments of the growing file, and the lock, which the kernel frees when the run dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from streamt2v.chunks import evenly
from streamt2v.errors import StreamT2VError
from streamt2v.jobs import run_directory
from streamt2v.jobs.recipe import recorded_run
from streamt2v.media import fragments
from streamt2v.timeline import plans

PLAYED = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif", ".webp": "image/webp"}
"""Finished outputs that browsers show."""
_ENDINGS = (*PLAYED, ".mov")
_DEPTH, _ROWS = 3, 500  # of a folder
_RECENT, _PAUSE = 12, 5  # chunks whose pace counts; how many usual ones are a pause
LAST = 6


class Stage(NamedTuple):
    """How far a stage is, in frames."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Seen:
    """A run at one moment.

    `state` is running, stopped, finished or gone; `left` the seconds it still needs, None where nobody can tell yet;
    `run` changes when another run takes its place, `last` when other frames are the newest.
    """

    state: str
    run: str
    stages: tuple[Stage, ...] = ()
    left: float | None = None
    fps: float = 0.0
    frames: int = 0
    size: int = 0
    codec: str = ""
    last: str = ""


def is_inside(path: Path, folder: Path) -> bool:
    """Tell whether a file is a plain one at its own place in a folder: no link leads to it, nor to the folder."""
    with contextlib.suppress(OSError):
        own = folder.parent.resolve() / folder.name / path.relative_to(folder)
        return path.is_file() and path.resolve() == own
    return False


def is_running(run: Path) -> bool:
    """Tell whether a process works in a run directory; where the system cannot tell, as long as it is there."""
    try:
        import fcntl
    except ImportError:  # Windows
        return run_directory.exists(run)
    try:
        lock = os.open(run / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # not exclusive: two who watch do not see each other
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def state_of(output: Path) -> str:
    """Return whether the run of an output is running, stopped, finished or gone."""
    run = run_directory.directory_for(output)
    if run.is_symlink():
        return "gone"
    if run_directory.exists(run) and is_running(run):
        return "running"
    if is_inside(output, output.parent):
        return "finished"
    return "stopped" if run_directory.exists(run) else "gone"


def see(output: Path) -> Seen:
    """Look at the run of an output, or at the output where it is finished."""
    run, state = run_directory.directory_for(output), state_of(output)
    if state in ("finished", "gone"):
        with contextlib.suppress(OSError):
            return Seen(state, f"{state} {output.stat().st_mtime_ns}", size=output.stat().st_size)
        return Seen(state, state)
    try:
        recipe = run_directory.recorded(run).recipe
        known = recorded_run(recipe)
        growing = run / run_directory.GROWING
        seen = fragments.measure(growing) if is_inside(growing, run) else fragments.Growing()
        chunks = _chunks(run)
    except (OSError, StreamT2VError, ValueError):
        return Seen("gone", "gone")  # it ends at this moment, or is none of ours
    name = hashlib.sha256(json.dumps(recipe.get("config")).encode()).hexdigest()
    last = f"{seen.frames} {len(chunks)}"
    if known is None:
        return Seen(state, name, (), None, 0.0, seen.frames, seen.size, seen.codec, last)
    settings, command, kept = known
    stream, refine = plans(settings, command, kept)
    total, base = settings.num_frames, settings.output.interpolate * chunks[-1].stop if chunks else 0
    made_base = Stage("streaming", base, total - stream[0].start) if stream else None
    final = Stage("refinement" if refine else "output", seen.frames, total)
    stages = tuple(stage for stage in (made_base, final) if stage is not None)
    left = _left(made_base, final, chunks, _marks(run)) if state == "running" else None
    return Seen(state, name, stages, left, settings.output.fps, seen.frames, seen.size, seen.codec, last)


class _Chunk(NamedTuple):
    stop: int
    stored: float
    path: Path


def _chunks(run: Path) -> list[_Chunk]:
    """Return the stored chunks of the base video in order."""
    found = list[_Chunk]()
    for path in sorted((run / "base").glob("[0-9]*-[0-9]*-[0-9]*.mkv")):
        _, start, frames = path.stem.split("-")
        found.append(_Chunk(int(start) + int(frames), path.stat().st_mtime, path))
    return found


def _marks(run: Path) -> list[tuple[float, int]]:
    """Return (time, frames of the output) of its saved states."""
    from safetensors import SafetensorError, safe_open

    found = list[tuple[float, int]]()
    for path in sorted((run / "state").glob("output-*.safetensors")):
        with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
            with safe_open(path, framework="numpy") as file:
                mark = json.loads((file.metadata() or {})["meta"])["mark"]
            found.append((path.stat().st_mtime, int(mark["frames"])))
    return found


def _left(base: Stage | None, final: Stage, chunks: list[_Chunk], marks: list[tuple[float, int]]) -> float | None:
    """Return the seconds that a run still needs by its recent pace, less what has passed since its last progress.

    While base frames are made, refined ones follow them at a distance: a chunk's time holds both, and the distance is
    what remains at the end, of which the refiner's part counts half. Afterwards only the output grows.
    """
    recent, ahead = chunks[-_RECENT:], final.total - final.done
    if base is not None and base.done < base.total and len(recent) > 1:
        spans = [later.stored - before.stored for before, later in pairwise(recent)]
        usual = _PAUSE * statistics.median(spans)  # longer ones are the pause before a resumed run went on
        pace = statistics.fmean(span for span in spans if span <= usual) / (recent[-1].stop - recent[-2].stop)
        lag = max(0, ahead - (base.total - base.done))
        left, since = pace * (base.total - base.done + lag / 2 * (final.name == "refinement")), recent[-1].stored
    elif (base is None or base.done >= base.total) and len(marks) > 1 and marks[-1][1] > marks[0][1]:
        left = ahead * (marks[-1][0] - marks[0][0]) / (marks[-1][1] - marks[0][1])
        since = marks[-1][0]
    else:
        return None
    return max(0.0, left - max(0.0, time.time() - since))


def newest(output: Path) -> tuple[list[int], Any]:
    """Return up to `LAST` of the newest frames [F,H,W,3] and the number of each: of the output, else of the base video.

    Raises:
        VideoError: they cannot be decoded.
    """
    from streamt2v.media import lossless

    run = run_directory.directory_for(output)
    growing, chunks = run / run_directory.GROWING, _chunks(run)
    if is_inside(growing, run) and fragments.measure(growing).frames:
        first, images = fragments.last_frames(growing)
    elif chunks and is_inside(chunks[-1].path, run):
        images = lossless.read_lossless(chunks[-1].path)
        first = chunks[-1].stop - len(images)
    else:
        return [], []
    chosen = evenly(len(images), LAST)
    return [first + at for at in chosen], images[list(chosen)]


def as_json(seen: Seen, output: Path) -> dict[str, Any]:
    """Return what the page of a run is told."""
    stages = [stage._asdict() for stage in seen.stages]
    kind = PLAYED.get(output.suffix.lower(), "") if seen.state == "finished" else ""
    return {**asdict(seen), "stages": stages, "kind": kind}


def outputs(folder: Path) -> dict[str, Path]:
    """Return the outputs in a folder by their names in it, finished or not; no link is followed."""
    return dict(sorted(list(_outputs(folder, folder, _DEPTH))[:_ROWS]))


def _outputs(folder: Path, root: Path, depth: int) -> Iterator[tuple[str, Path]]:
    with contextlib.suppress(OSError):
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith(".") or entry.is_symlink():
                continue
            output = run_directory.output_of(entry)
            if (entry.is_dir() and run_directory.exists(entry) and output != entry) or (
                entry.is_file() and entry.suffix.lower() in _ENDINGS
            ):
                yield output.relative_to(root).as_posix(), output
            elif entry.is_dir() and depth > 1 and output == entry:
                yield from _outputs(entry, root, depth - 1)
