"""The run directory: what a run was asked, its lossless base frames and the small state of every stage.

    OUT.mp4.streamt2v/
        run.json                      schema, recipe, what was changed midway, and paths that are true here only;
                                      written last on creation, removed first at the end
        lock                          held by the process that works here; the kernel frees it when that process dies
        base/000012-0000104-8.mkv     chunk 12: 8 frames from frame 104 on, lossless (FFV1)
        state/stream-000013.safetensors   a state; the newest two of each name are kept
        video.mp4                     the output as it grows; plays at any moment

Nothing is trusted by its name or time: base frames, states and the growing video carry checksums.

Crash-only: nothing is repaired on the way out, everything on the way in. Each file appears whole under its name
(written beside it, synced, renamed), so a run that died between two writes leaves two kinds of surplus, both dropped:

- temporary files, when the directory is opened;
- frames that no state accounts for, by `resume_point`. A state is saved after the frames it belongs to (base chunk k,
  then the state that counts k + 1 chunks; an output segment, then the state with its mark): it is never ahead of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from streamt2v import files
from streamt2v.config import up_to_date
from streamt2v.errors import BusyError, OutputError, ResumeError, VideoError
from streamt2v.jobs import states
from streamt2v.jobs.states import State

if TYPE_CHECKING:
    from streamt2v.media.frames import Frames


SCHEMA = 1
GROWING = "video.mp4"
_SUFFIX = ".streamt2v"
HEADROOM = 32 * 2**20


def directory_for(output: Path) -> Path:
    """Return the run directory of an output: beside it, so that both move together."""
    return output.parent / f"{output.name}{_SUFFIX}"


def output_of(path: Path) -> Path:
    """Return the output that a path means: itself, or, of a run directory, the one it belongs to."""
    named = path if path.name else path.absolute()  # "." is the run directory itself, for a user inside it
    return named.parent / named.name.removesuffix(_SUFFIX) if named.name.endswith(_SUFFIX) else path


def exists(path: Path) -> bool:
    """Tell whether a run that can be resumed lies in a directory."""
    return (path / "run.json").is_file()


class Record(NamedTuple):
    """What run.json holds: the recipe, what was changed midway, and what is true on this machine only."""

    recipe: dict[str, Any]
    changes: list[dict[str, Any]]
    local: dict[str, Any]


def size(path: Path) -> int:
    """Bytes in a run directory."""
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in path.rglob("*"))
    return 0


def discard(path: Path) -> None:
    """Remove the run directory of a finished output whose maker was killed before or while it removed it."""
    if path.is_dir() and (exists(path) or (path / "lock").exists() or not any(path.iterdir())):
        with contextlib.suppress(BusyError, OutputError):  # the output is being made again, or it may not be written
            RunDirectory(path).remove()


def recorded(path: Path) -> Record:
    """Read the record of the run in a directory.

    Raises:
        ResumeError: there is none, it is damaged, or a newer version wrote it.
    """
    try:
        record = json.loads((path / "run.json").read_bytes())
        schema, found = record["schema"], Record(record["recipe"], record.get("changes", []), record.get("local", {}))
    except FileNotFoundError as error:
        hint = "name the output of a run that was stopped, or its directory"
        raise ResumeError(f"{path} holds no run to resume", hint) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{path / 'run.json'} cannot be read: {error}", "start again with --overwrite") from error
    if schema != SCHEMA or not isinstance(found.recipe, dict):
        raise ResumeError(f"{path} has run format {schema}, this version reads {SCHEMA}", "use a newer version")
    return found._replace(recipe=up_to_date(found.recipe))


def recorded_seed(output: Path) -> int | None:
    """Return the seed of the interrupted run of an output, None when there is no such run."""
    if not exists(directory_for(output)):
        return None
    config = recorded(directory_for(output)).recipe.get("config")
    seed = config.get("seed") if isinstance(config, dict) else None
    return seed if isinstance(seed, int) else None


def chunk_seconds(path: Path) -> dict[int, float]:
    """Return how long after the one before it each base chunk was stored, of a run whose directory is still there."""
    stored = sorted((path / "base").glob("*.mkv"))
    times = {int(chunk.name.partition("-")[0]): chunk.stat().st_mtime for chunk in stored}
    return {chunk: times[chunk] - times[chunk - 1] for chunk in times if chunk - 1 in times}


def check_writable(folder: Path) -> None:
    """Refuse a folder that is missing or cannot be written.

    Raises:
        OutputError: with the reason.
    """
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} does not exist" if not folder.exists() else f"{folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {folder} cannot be written", "choose another place with -o")


class _Segment(NamedTuple):
    chunk: int
    start: int
    frames: int
    path: Path


class RunDirectory:
    """One run's directory, locked by this process; a context manager. Made by `open`."""

    def __init__(self, path: Path) -> None:
        """Lock a directory, making it when missing. Raises BusyError when another process works in it."""
        from filelock import FileLock  # not at import: it takes 15 ms of every command

        self.path, self.resumed = path, False
        self._base, self._states = path / "base", path / "state"
        self._segments: list[_Segment] = []
        self.joined = threading.RLock()
        """Held while a chunk and the state after it are stored: no other state counts a chunk that has none yet."""
        # Not at once: a process killed while it started ffmpeg leaves a child that holds the lock until it is ffmpeg.
        # Of 120 kills among such starts 6 found the lock held, for up to 43 ms; of 120 others none.
        self._lock = FileLock(path / "lock", timeout=0.5, thread_local=False)
        files.make_directory(path)
        self._acquire()

    @classmethod
    def open(
        cls,
        path: Path,
        recipe: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool = False,
        local: Mapping[str, Any] | None = None,
        may_change: Callable[[str], bool] = lambda key: False,
    ) -> RunDirectory:
        """Continue the run in a directory if there is one and that is wanted, else start one, clearing what is there.

        Args:
            path: see `directory_for`.
            recipe: what decides the frames.
            resume: continue what is there.
            overwrite: where that has another recipe, start again.
            local: kept beside the recipe and not compared with anything.
            may_change: tells of a dotted key whether a run may be continued although the recipe changed there.

        Raises:
            ResumeError: the run to continue has another recipe (names the first key).
            OutputError: the directory belongs to another program, or cannot be written.
            BusyError: another process works on it.
        """
        if path.is_dir() and any(path.iterdir()) and not exists(path) and not (path / "lock").exists():
            raise OutputError(f"{path} is not a run directory, so it is left alone", "choose another name with -o")
        run = cls(path)
        try:
            # Looked at only now: another process may have held the lock, finished the run and removed all this.
            begun = differences(recorded(path).recipe, recipe) if resume and exists(path) else ()
            changed = [said for key, said in begun if not may_change(key)]
            if changed and not overwrite:
                raise ResumeError(
                    f"the run in {path} was started with {changed[0]}",
                    "give the same settings to continue it, or start again with --overwrite; --resume-anyway continues "
                    "with other ones where the sizes stay",
                )
            run.resumed = resume and exists(path) and not changed
            if not run.resumed:
                run._clear()
            files.make_directory(run._base)
            files.make_directory(run._states)
            if run.resumed:
                run._sweep()
                run.change(recipe)
            else:
                run._write(Record(_plain(recipe), [], _plain(local or {})))
        except BaseException:
            run.close()
            raise
        return run

    # -- life

    @property
    def recipe(self) -> dict[str, Any]:
        """What the run was asked."""
        return recorded(self.path).recipe

    @property
    def changes(self) -> list[dict[str, Any]]:
        """What was changed midway: after how many base frames, and the old values by dotted key."""
        return recorded(self.path).changes

    def change(self, recipe: Mapping[str, Any]) -> None:
        """Go on with another recipe, and record what is different from now on."""
        record, asked = recorded(self.path), _plain(recipe)
        if old := dict(differences(record.recipe, asked)):
            change = {"base_frames": self.num_base_frames, "changed": old}
            self._write(Record(asked, [*record.changes, change], record.local))

    def _write(self, record: Record) -> None:
        files.write_json(self.path / "run.json", {"schema": SCHEMA, **record._asdict()})

    def require_room(self, more: int) -> None:
        """Refuse to go on where `more` bytes, and the records of the run, would not fit. Raises OutputError."""
        hint = "free some space, then continue with --resume"
        files.require_space(self.path, more + HEADROOM, "the next chunk", hint)

    @property
    def partial_path(self) -> Path:
        """The output as it grows."""
        return self.path / GROWING

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the lock; the directory stays and can be resumed."""
        self._lock.release()

    def remove(self) -> None:
        """Delete the run once its output is whole. Files that are not the run's own are left, with the directory."""
        self._acquire()
        self._clear()
        with files.output_errors(self.path):
            (self.path / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()
        self.close()

    def _acquire(self) -> None:
        from filelock import Timeout

        try:
            if not self._lock.is_locked:
                self._lock.acquire()
        except Timeout as error:
            raise BusyError(f"another process is working on {self.path}", "wait for it, or stop it") from error
        except OSError as error:
            raise files.explain(self.path, error) from error

    def _clear(self) -> None:
        """Delete what a run writes; run.json first, so that a half-deleted run is never resumed."""
        with files.output_errors(self.path):
            (self.path / "run.json").unlink(missing_ok=True)
            files.sync_directory(self.path)
            self.partial_path.unlink(missing_ok=True)
            for folder in (self._base, self._states):
                if folder.is_dir():
                    shutil.rmtree(folder)
            for leftover in self.path.glob(".*.part"):
                leftover.unlink(missing_ok=True)
        self._segments = []

    def _sweep(self) -> None:
        """Remove temporary files and list the base segments up to the first gap."""
        with files.output_errors(self.path):
            for folder in (self.path, self._base, self._states):
                for leftover in folder.glob(".*.part"):
                    leftover.unlink(missing_ok=True)
            named = [(re.fullmatch(r"(\d+)-(\d+)-(\d+)\.mkv", path.name), path) for path in self._base.iterdir()]
            found = [_Segment(int(name[1]), int(name[2]), int(name[3]), path) for name, path in named if name]
            for segment in sorted(found):
                if (segment.chunk, segment.start) == (self.num_base_chunks, self.num_base_frames):
                    self._segments.append(segment)
                else:
                    segment.path.unlink()

    # -- base frames

    @property
    def num_base_chunks(self) -> int:
        """Chunks in the base store."""
        return len(self._segments)

    @property
    def num_base_frames(self) -> int:
        """Frames in the base store."""
        last = self._segments[-1] if self._segments else None
        return last.start + last.frames if last else 0

    def append_base(self, chunk: int, frames: Frames) -> None:
        """Store the uint8 frames [F,H,W,3] that a chunk adds, losslessly and durably; chunks come in order, from 0.

        Raises:
            OutputError: the disk is full or cannot be written; the store is as before and the call may be repeated.
        """
        from streamt2v.media import lossless

        if chunk != self.num_base_chunks or not len(frames):
            raise ValueError(f"chunk {chunk} with {len(frames)} frames cannot follow {self.num_base_chunks} chunks")
        start = self.num_base_frames
        path = self._base / f"{chunk:06d}-{start:07d}-{len(frames)}.mkv"
        lossless.write_lossless(path, frames)
        self._segments.append(_Segment(chunk, start, len(frames), path))

    def base_frames(self, start: int = 0) -> Iterator[Frames]:
        """Yield the stored frames from frame `start` on, chunk by chunk, including chunks appended while this runs.

        Raises:
            ResumeError: a stored chunk is damaged.
        """
        from streamt2v.media import lossless

        chunk = 0
        while chunk < self.num_base_chunks:
            segment = self._segments[chunk]
            chunk += 1
            if segment.start + segment.frames <= start:
                continue
            try:
                frames = lossless.read_lossless(segment.path)
            except VideoError as error:
                raise ResumeError(error.message, "start again with --overwrite") from error
            yield frames[max(0, start - segment.start) :]

    # -- states

    def save_state(self, name: str, arrays: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> None:
        """Save a named state that accounts for every base chunk stored so far; older ones but one are removed.

        A generator saves before it yields the frames: the consumer may save a state of its own next.

        Args:
            name: letters only, such as "stream".
            arrays: numpy arrays or torch tensors; bfloat16 is widened to float32, which loses nothing.
            meta: small values that fit JSON.

        Raises:
            OutputError: it cannot be written; the state before it still is there.
        """
        with self.joined:
            states.write(self._states, name, self.num_base_chunks, arrays, _plain(meta or {}))

    def load_state(self, name: str) -> State | None:
        """Return the newest whole state of that name that is not ahead of the base frames, or None.

        A damaged state (every state carries a checksum) and one whose frames are gone are skipped and removed.
        """
        return states.newest(self._states, name, self.num_base_chunks)

    def resume_point(self, name: str) -> State | None:
        """Return `load_state` and drop the base chunks that it does not account for (all of them when it is None).

        Afterwards the base store and the state agree, whichever write the run died at: continue with chunk
        `num_base_chunks`.
        """
        state = self.load_state(name)
        chunks = state.index if state else 0
        with files.output_errors(self._base):
            while self.num_base_chunks > chunks:  # from the end, so that no gap can appear
                self._segments.pop().path.unlink(missing_ok=True)
            files.sync_directory(self._base)
        return state


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back (tuples become lists), so that recipes compare equal."""
    return json.loads(json.dumps(value, allow_nan=False))


def differences(recorded: Any, asked: Any) -> Iterator[tuple[str, str]]:
    """Yield every dotted key in which a recipe that was read differs from another one, and a text with both values."""
    return _differences(recorded, _plain(asked), "")


def _differences(recorded: Any, asked: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(recorded, dict) and isinstance(asked, dict):
        for name in [*recorded, *(name for name in asked if name not in recorded)]:
            yield from _differences(recorded.get(name), asked.get(name), f"{key}.{name}" if key else name)
    elif recorded != asked or isinstance(recorded, bool) != isinstance(asked, bool):
        now = json.dumps(asked, ensure_ascii=False)
        yield key, f"{key} = {json.dumps(recorded, ensure_ascii=False)}, now it is {now}"
