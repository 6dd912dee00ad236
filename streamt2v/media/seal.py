"""The seal of a finished MP4: a digest of all its bytes, appended as a box that players skip."""

from __future__ import annotations

from pathlib import Path

from streamt2v import files
from streamt2v.errors import VideoError

# Size, type and name of the box; the SHA-256 of all bytes before it follows.
_SEAL = (56).to_bytes(4, "big") + b"uuid" + b"streamt2v sha256"
_SEAL_BYTES = len(_SEAL) + 32


def seal(path: Path) -> None:
    """Append the seal to a finished file. Raises OutputError."""
    size = path.stat().st_size
    files.append_bytes(path, _SEAL + files.hashed(path, size).digest(), size)


def check_seal(path: Path) -> None:
    """Compare every bit of a finished video with the seal at its end.

    Raises:
        VideoError: the file is missing, truncated, changed since, or was not written by streamt2v.
    """
    try:
        size = path.stat().st_size - _SEAL_BYTES
        with path.open("rb") as file:
            file.seek(max(0, size))
            found = file.read()
        if not found.startswith(_SEAL):
            hint = "it is truncated, was changed by another program, or was not made by streamt2v"
            raise VideoError(f"{path} does not end with the seal of streamt2v", hint)
        if files.hashed(path, size).digest() != found[len(_SEAL) :]:
            raise VideoError(f"{path} is damaged: its {size} bytes are not those that were written")
    except OSError as error:
        raise VideoError(f"{path} cannot be read: {error.strerror or error}") from error
