"""Writing files so that a crash, a full disk or a second process never leaves a half file under a real name.

Every byte the package writes goes through this file (or, from the ffmpeg binary, into a temporary name that `replacing`
hands out), so one place turns system errors into sentences and one place can be made to fail in tests.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamt2v.errors import ConfigError, OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
# Names that every system can keep, with room for what is appended to them: no control or half characters, none that
# separate folders, drives or streams, none at the end that are dropped, none that stand for a device.
_UNFIT = r'\x00-\x1f\x7f\ud800-\udfff<>:"/\\|?*'
_NAME = re.compile(rf"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))[^{_UNFIT}]*[^{_UNFIT}. ]")
_MAX_NAME_BYTES = 200
_WRITE = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0)


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what tells a file from its later contents, for caches: inode, size, time; None where there is none."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns
    return None


def hashed(path: Path, size: int | None = None) -> hashlib._Hash:
    """Hash a file, or its first `size` bytes, with SHA-256."""
    sha256, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (data := file.read(min(left, 1 << 20))):
            sha256.update(data)
            left -= len(data)
    return sha256


def identity(path: Path) -> tuple[int, int] | None:
    """Return what all names of one file share, links included; None where there is none."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def is_same(path: Path, other: Path) -> bool:
    """Tell whether two names mean one file: as they are written, by links, or as one file with two names."""
    found = identity(path)
    if found is not None and found == identity(other):
        return True
    with contextlib.suppress(OSError):
        return path.resolve() == other.resolve()
    return False


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that holds a path, or would hold it (0 if that cannot be told)."""
    for parent in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(parent).free
    return 0


def require_space(
    path: Path, needed: int, purpose: str, hint: str = "free some space, or choose another place with -o"
) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        OutputError: fewer than `needed` bytes are free where `path` is or will be.
    """
    free = free_bytes(path)
    if free < needed:
        message = f"{purpose} needs about {needed / 1e6:,.0f} MB at {path}, {free / 1e6:,.0f} MB are free"
        raise OutputError(message, hint)


def explain(path: Path, error: OSError, needed: int = 0) -> OutputError:
    """Turn a system error on writing `needed` bytes to `path` into an OutputError with the reason and what to do."""
    if error.errno in _FULL:
        wanted = f"{needed / 1e6:.2f} MB are needed, " if needed else ""
        message = f"no space left for {path}: {wanted}{free_bytes(path) / 1e6:.2f} MB are free"
        return OutputError(message, "free some space; a run continues with --resume")
    if error.errno in _DENIED:
        return OutputError(f"cannot write {path}: permission denied or read-only", "choose another place with -o")
    return OutputError(f"cannot write {path}: {error.strerror or error}")


def slug(text: str) -> str:
    """Return letters and digits of a text, joined by dashes, as part of a file name: at most 48 bytes, never empty."""
    words = unicodedata.normalize("NFKC", text).lower()
    dashed = "-".join("".join(c if c.isalnum() else " " for c in words).split())
    return dashed.encode()[:48].decode(errors="ignore").strip("-") or "video"


def inside(folder: Path, name: str) -> Path:
    """Return the path of a relative name inside a folder; it may name folders of its own.

    Raises:
        ConfigError: it leads elsewhere, by itself or by a link, or is a name that some system cannot keep.
    """
    path = folder / name
    for part in name.split("/"):
        if not _NAME.fullmatch(part) or len(part.encode()) > _MAX_NAME_BYTES:
            raise ConfigError(f"{name!r} cannot be the name of a file", f"give a plain name of a file inside {folder}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{path} leads outside of {folder}", "remove the link, or choose another name")
    return path


@contextlib.contextmanager
def output_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn every OSError of the body, which writes `needed` bytes, into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise explain(path, error, needed) from error


def make_directory(path: Path) -> None:
    """Make a directory and its parents, durably; an existing one is fine."""
    with output_errors(path):
        if not path.is_dir():
            if path.exists():
                raise OutputError(f"{path} is not a folder", "choose another name")
            path.mkdir(parents=True, exist_ok=True)
            sync_directory(path.parent)


def temporary_name(path: Path) -> Path:
    """Return the hidden name beside `path` under which it grows; fixed, so that the next writer clears a leftover."""
    return path.with_name(f".{path.name}.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hand out a temporary name; when the body ends well, sync that file and rename it to `path` in one step.

    Raises:
        OutputError: anything failed; whatever was under `path` before is untouched and the temporary file is gone.
    """
    temporary = temporary_name(path)
    with output_errors(path):
        # Unlinked, not truncated: a child of a killed process may still be writing into the old inode.
        temporary.unlink(missing_ok=True)
        try:
            yield temporary
            publish(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def publish(temporary: Path, path: Path) -> None:
    """Sync a whole file and give it its name in one step; system errors are the caller's."""
    with temporary.open("r+b") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())
    os.replace(temporary, path)  # noqa: PTH105 - so that tests can make `os` of this module fail
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename or removal in a directory survive a power cut, where the system can (Windows cannot)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file atomically and durably."""
    with replacing(path) as temporary, output_errors(path, len(data)):
        descriptor = os.open(temporary, _WRITE | os.O_EXCL, 0o666)
        try:
            _write_all(descriptor, data)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def append_bytes(path: Path, data: bytes | memoryview, at: int) -> int:
    """Cut a file to `at` bytes, append `data` durably and return the new size; on failure the file is cut back.

    Raises:
        OutputError: the write failed; the first `at` bytes are as before.
    """
    with output_errors(path, len(data)):
        descriptor = os.open(path, _WRITE, 0o666)
        try:
            os.ftruncate(descriptor, at)
            os.lseek(descriptor, at, os.SEEK_SET)
            try:
                _write_all(descriptor, data)
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, at)
                raise
        finally:
            os.close(descriptor)
    return at + len(data)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
