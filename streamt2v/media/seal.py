"""The seal of a finished video: a digest of all its bytes, by which a cut or a change shows."""

from __future__ import annotations

import hashlib
from pathlib import Path

from streamt2v.errors import VideoError

# Size, kind and name of an MP4 box that players pass over; the SHA-256 of all bytes before it follows.
SEAL = (56).to_bytes(4, "big") + b"uuid" + b"streamt2v sha256"
_SEAL_BYTES = len(SEAL) + 32


def check_seal(path: Path) -> None:
    """Compare a finished video with the SHA-256 that `SegmentWriter.finish` put behind it: every bit counts.

    Raises:
        VideoError: the file is missing, cut short, changed since, or was not written here.
    """
    try:
        size = path.stat().st_size - _SEAL_BYTES
        with path.open("rb") as file:
            file.seek(max(0, size))
            seal = file.read()
        if not seal.startswith(SEAL):
            raise VideoError(
                f"{path} does not end as a video of streamt2v does",
                "it is cut short, was changed by another program, or comes from somewhere else",
            )
        if hashed(path, size).digest() != seal[len(SEAL) :]:
            raise VideoError(f"{path} is damaged: its {size} bytes are not those that were written")
    except OSError as error:
        raise VideoError(f"{path} cannot be read: {error.strerror or error}") from error


def hashed(path: Path, size: int) -> hashlib._Hash:
    """Hash the first `size` bytes of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (data := file.read(min(size, 1 << 20))):
            sha256.update(data)
            size -= len(data)
    return sha256
