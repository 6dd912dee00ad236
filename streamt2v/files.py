"""Writing files so that a crash, a full disk or a second process never leaves an incomplete file under its real name.

Every byte the package writes goes through this file (or, from the ffmpeg binary, into a temporary name from
`replacing`), so one place turns system errors into sentences, and one place can be made to fail in tests.
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

from streamt2v.errors import ConfigError, OutputError, spoken_bytes

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
# Names that every system accepts, with room for suffixes: no control characters or lone surrogates, no separators of
# folders, drives or streams, no trailing characters that are dropped, no device names.
_UNFIT = r'\x00-\x1f\x7f\ud800-\udfff<>:"/\\|?*'
_NAME = re.compile(rf"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))[^{_UNFIT}]*[^{_UNFIT}. ]")
_MAX_NAME_BYTES = 200
_WRITE = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0)


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Return a cache key that changes with the file's contents: inode, size, time; None if there is no file."""
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
    """Return what all names of a file share, links included; None if there is no file."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def is_same(path: Path, other: Path) -> bool:
    """Return whether two paths mean the same file, also by symbolic or hard links."""
    found = identity(path)
    if found is not None and found == identity(other):
        return True
    with contextlib.suppress(OSError):
        return path.resolve() == other.resolve()
    return False


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that holds a path, or would hold it; 0 if unknown."""
    for parent in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(parent).free
    return 0


def require_space(
    path: Path, needed: int, purpose: str, hint: str = "free some space, or choose another place with -o"
) -> None:
    """Raise OutputError if fewer than `needed` bytes are free where `path` is or will be."""
    free = free_bytes(path)
    if free < needed:
        there = f"{spoken_bytes(free)} is free" if free else "the disk is full"
        raise OutputError(f"{purpose} needs about {spoken_bytes(needed)} at {path}, {there}", hint)


def explain(path: Path, error: OSError, needed: int = 0) -> OutputError:
    """Turn a system error while writing `needed` bytes to `path` into an OutputError with the reason and a hint."""
    if error.errno in _FULL:
        wanted = f"{spoken_bytes(needed)} needed, " if needed else ""
        message = f"no space left for {path}: {wanted}{spoken_bytes(free_bytes(path))} free"
        return OutputError(message, "free some space; a run continues with --resume")
    if error.errno in _DENIED:
        return OutputError(f"cannot write {path}: permission denied or read-only", "choose another place with -o")
    return OutputError(f"cannot write {path}: {error.strerror or error}")


def slug(text: str) -> str:
    """Return the letters and digits of a text, joined by dashes, for a file name: at most 48 bytes, cut at words."""
    words = unicodedata.normalize("NFKC", text).lower()
    dashed = "-".join("".join(c if c.isalnum() else " " for c in words).split())
    short = dashed.encode()[:48].decode(errors="ignore")
    if "-" in short and dashed[len(short) : len(short) + 1] not in ("", "-"):
        short = short.rpartition("-")[0]
    return short.strip("-") or "video"


def inside(folder: Path, name: str) -> Path:
    """Return the path of a relative name, with subfolders if it has any, inside a folder.

    Raises:
        ConfigError: the path leads out of the folder, also by a link, or some system cannot store the name.
    """
    path = folder / name
    for part in name.split("/"):
        if not _NAME.fullmatch(part) or len(part.encode()) > _MAX_NAME_BYTES:
            raise ConfigError(f"{name!r} cannot be the name of a file", f"give a plain file name inside {folder}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{path} leads outside of {folder}", "remove the link, or choose another name")
    return path


@contextlib.contextmanager
def output_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn every OSError of the body, which writes `needed` bytes, into an OutputError naming `path`."""
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


@contextlib.contextmanager
def no_new_folders(root: Path) -> Iterator[None]:
    """Remove at the end what is new and empty of `root`, the folders in it, and those it lies in."""
    before = {*root.rglob("*"), *filter(Path.exists, (root, *root.parents))}
    try:
        yield
    finally:
        for folder in sorted({*root.rglob("*"), root, *root.parents} - before, reverse=True):  # the deepest first
            with contextlib.suppress(OSError):
                folder.rmdir()


def temporary_name(path: Path) -> Path:
    """Return the hidden name beside `path` under which it grows; fixed, so that the next writer removes a leftover."""
    return path.with_name(f".{path.name}.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name; when the body succeeds, sync that file and rename it to `path` atomically.

    Raises:
        OutputError: anything failed; what was at `path` is untouched, and the temporary file is gone.
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
    """Sync a complete file and rename it atomically; the caller handles system errors."""
    with temporary.open("r+b") as file:  # Windows syncs only files open for writing
        os.fsync(file.fileno())
    os.replace(temporary, path)  # noqa: PTH105 - tests make this module's `os` fail
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename or removal in a directory survive a power cut, if the system supports it (Windows does not)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write a whole file of parts, one after the other, atomically and durably."""
    with replacing(path) as temporary, output_errors(path, sum(map(len, parts))):
        descriptor = os.open(temporary, _WRITE | os.O_EXCL, 0o666)
        try:
            for data in parts:
                _write_all(descriptor, data)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def append_bytes(path: Path, data: bytes | memoryview, at: int) -> int:
    """Cut a file to `at` bytes, append `data` durably and return the new size; a failure cuts the file back.

    Raises:
        OutputError: the write failed; the first `at` bytes are unchanged.
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
