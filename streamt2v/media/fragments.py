"""The growing MP4 as another process may read it: how much of it is whole, and its last frames."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from streamt2v import files

if TYPE_CHECKING:
    from streamt2v.media.frames import Frames

_HEADER = 1 << 20  # more than any header that `writing` makes


@dataclass(frozen=True)
class Growing:
    """What is whole: the first `size` bytes, which hold a header and, from `starts` on, `frames` in fragments.

    `codec` is the name by which browsers know it; `starts` are (first frame, byte) of each fragment.
    """

    size: int = 0
    frames: int = 0
    codec: str = ""
    starts: tuple[tuple[int, int], ...] = ()

    def before(self, frame: int) -> int:
        """Return the byte at which the fragment with a frame begins."""
        return next((byte for first, byte in reversed(self.starts) if first <= frame), 0)


def measure(path: Path) -> Growing:
    """Measure a growing file; a fragment that is still being written does not count, nor does what is no MP4."""
    return _measure(path, files.stamp(path))


@lru_cache(maxsize=8)
def _measure(path: Path, _stamp: tuple[int, int, int] | None) -> Growing:
    size, frames, codec, starts = 0, 0, "", list[tuple[int, int]]()
    try:
        with path.open("rb") as file:
            length = file.seek(0, 2)
            for kind, start, stop in _boxes(file, 0, length):
                if kind == b"moov" and stop - start < _HEADER:
                    codec = _codec(_read(file, start, stop))
                elif kind == b"moof" and stop - start < _HEADER:
                    starts.append((frames, start))
                    moof = _read(file, start, stop)
                elif kind == b"mdat" and starts:
                    frames, size = frames + _samples(moof), stop
    except OSError:
        return Growing()
    return Growing(size, frames, codec, tuple(at for at in starts if at[1] < size))


def _read(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


def _boxes(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, stop) of the whole boxes between two bytes; ISO/IEC 14496-12, section 4.2."""
    while start + 8 <= stop:
        head = _read(file, start, start + 8)
        end = start + int.from_bytes(head[:4], "big")
        if end < start + 8 or end > stop:
            return
        yield head[4:], start, end
        start = end


def _samples(moof: bytes) -> int:
    """Return the frames of a fragment: the counts of its `trun` boxes."""
    file = io.BytesIO(moof)
    inside = [box for box in _boxes(file, 8, len(moof)) if box[0] == b"traf"]
    runs = [box for _, start, stop in inside for box in _boxes(file, start + 8, stop) if box[0] == b"trun"]
    return sum(int.from_bytes(moof[start + 12 : start + 16], "big") for _, start, _ in runs)


def _codec(moov: bytes) -> str:
    """Return the codec of a header by RFC 6381: profile, constraints and level as `avcC` states them."""
    found = moov.find(b"avcC")
    return f"avc1.{moov[found + 5 : found + 8].hex()}" if found > 0 else ""


def last_frames(path: Path) -> tuple[int, Frames]:
    """Return the frames [F,H,W,3] of the last whole fragment, and the number of the first; F is 0 where there is none.

    Raises:
        VideoError: they cannot be decoded.
    """
    import av
    import av.error
    import numpy as np

    from streamt2v.errors import VideoError

    known = measure(path)
    if not known.starts:
        return 0, np.zeros((0, 0, 0, 3), np.uint8)
    (_, header), (first, start) = known.starts[0], known.starts[-1]
    try:
        with path.open("rb") as file:
            data = io.BytesIO(_read(file, 0, header) + _read(file, start, known.size))
        with av.open(data, "r") as container:
            images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return first, np.stack(images)
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise VideoError(f"{path} cannot be read: {error}") from error
