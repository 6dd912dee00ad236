"""Videos from users are decoded in a process of their own, which has bounded memory and may crash.

A few hundred bytes can make a decoder ask for gigabytes, or lead it where it was never tested. In a process of its own
that costs an error naming the file, not the run. What streamt2v has just written itself is read by `reading` directly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamt2v import files
from streamt2v.errors import VideoError
from streamt2v.media import exports, reading, seal
from streamt2v.media.clock import Clock
from streamt2v.media.ffmpeg import SOUND_OPTIONS

if TYPE_CHECKING:
    from streamt2v.media.frames import Frames


MAX_FRAMES = 100_000  # of a video without our seal
# Address space, most of it reserved by 16 threads. Measured: 1.4 GB for small frames, 4.7 GB for 8192x4320 in 10 bit.
_MEMORY, _MEMORY_PER_PIXEL = 2 << 30, 128


def probe(path: Path) -> reading.VideoInfo:
    """Measure a video as `reading.probe` does; an unchanged file is measured only once.

    Raises:
        VideoError: see `reading.probe`; also more than `MAX_FRAMES` frames that streamt2v did not make.
    """
    found = _probe(path, files.stamp(path))
    recipe = exports.recipe_beside(path)
    return found if recipe is None else dataclasses.replace(found, comment=recipe)


@lru_cache(maxsize=8)
def _probe(path: Path, _stamp: tuple[int, int, int] | None) -> reading.VideoInfo:
    with closing(_answers("probe", path)) as answers:
        (facts, _), *_ = answers
    tracks = tuple(reading.Track(**track) for track in facts["tracks"])
    return reading.VideoInfo(**{**facts, "clock": _clock(facts["clock"]), "tracks": tracks})


def tracks(path: Path) -> tuple[reading.Track, ...]:
    """Return the tracks of a file that need not hold a video. Raises VideoError where it cannot be opened."""
    with closing(_answers("tracks", path)) as answers:
        (facts, _), *_ = answers
    return tuple(reading.Track(**track) for track in facts["tracks"])


def _clock(facts: dict[str, Any]) -> Clock:
    return Clock(**{**facts, "start": Fraction(facts["start"]), "rate": Fraction(facts["rate"])})


def read_frames(path: Path, batch: int = 8, note: Callable[[str], None] | None = None) -> Iterator[Frames]:
    """Decode a video as `reading.read_frames` does, on its own clock: exactly the frames that `probe` counts.

    Args:
        path: the video.
        batch: frames per array.
        note: called with what is damaged and which frame is shown instead; None makes damage an error.
    """
    clock = json.dumps(dataclasses.asdict(probe(path).clock), default=str)
    with closing(_answers("read", path, clock, "bridge" if note else "refuse")) as answers:
        images = (image for facts, data in answers for image in _images(facts, data, note))
        while group := list(islice(images, batch)):
            yield np.stack(group)


def _images(facts: dict[str, Any], data: bytes, note: Callable[[str], None] | None) -> Iterator[Frames]:
    """Return the frames of one answer: a picture, as often as it is shown; a note goes to `note`."""
    if note is not None and "note" in facts:
        note(facts["note"])
    return iter([np.frombuffer(data, np.uint8).reshape(facts["shape"])] * facts["count"] if "shape" in facts else [])


def digest(path: Path) -> tuple[int, str]:
    """Decode a whole video: return its number of frames and the SHA-256 of their RGB values."""
    count, sha256 = 0, hashlib.sha256()
    for frames in read_frames(path):
        count += len(frames)
        sha256.update(frames.data)
    return count, sha256.hexdigest()


def _answers(what: str, path: Path, *more: str) -> Generator[tuple[dict[str, Any], bytes]]:
    """Run `_main` in a process of its own; yield (facts, bytes) for each answer, and raise its errors here."""
    command = [sys.executable, "-P", "-m", __name__, what, str(path), *more]
    # The child imports the same package wherever it is started: -P keeps the current folder off its path.
    found = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    surroundings = {**os.environ, "PYTHONPATH": found, "OPENBLAS_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        process = subprocess.Popen(command, env=surroundings, **pipes)  # type: ignore[call-overload]
    except (OSError, ValueError) as error:  # such as an impossible file name
        raise VideoError(f"{path} cannot be read: {error}") from error
    with process:
        try:
            while line := process.stdout.readline():
                facts = json.loads(line)
                if "error" in facts:
                    raise VideoError(*facts["error"])
                data = process.stdout.read(facts.pop("bytes"))
                yield facts, data
            if process.wait():
                raise VideoError(f"{path} makes the decoder exit with code {process.returncode}")
        finally:
            process.kill()  # no effect if it has ended


def _main(what: str, path: Path, clock: str = "", damage: str = "") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    try:
        _limit_memory(_MEMORY)
        if what == "tracks":
            with reading.opened(path, SOUND_OPTIONS) as container:
                _answer({"tracks": [dataclasses.asdict(reading.track(stream)) for stream in container.streams]})
            return
        height, width = reading.declared_size(path)
        _limit_memory(_MEMORY + _MEMORY_PER_PIXEL * height * width)
        if what == "probe":
            _check_length(path)
            info = reading.probe(path)
            _answer(dataclasses.asdict(info))
        else:
            note = (lambda text: _answer({"note": text})) if damage == "bridge" else None
            for frame, count in reading.read_pictures(path, _clock(json.loads(clock)) if clock else None, note):
                _answer({"shape": frame.shape, "count": count}, np.ascontiguousarray(frame).data.cast("B"))
    except VideoError as error:
        _answer({"error": (error.message, error.hint)})
    except BrokenPipeError:
        return
    except Exception as error:  # whatever decoding raises, the file is to blame
        _answer({"error": (f"{path} cannot be read as a video: {type(error).__name__}: {error}", "")})


def _answer(facts: dict[str, Any], data: bytes | memoryview = b"") -> None:
    out = sys.stdout.buffer
    out.write(json.dumps({**facts, "bytes": len(data)}, default=str).encode() + b"\n")
    out.write(data)  # not joined with the line: pictures are large
    out.flush()


def _limit_memory(size: int) -> None:
    """Limit the address space of this process, where the system supports it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _check_length(path: Path) -> None:
    if reading.is_longer(path, MAX_FRAMES):
        try:
            seal.check_seal(path)
        except VideoError:
            raise VideoError(
                f"{path} has more than {MAX_FRAMES:,} frames and was not made by streamt2v",
                f"split it into parts of at most {MAX_FRAMES:,}",
            ) from None


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
