"""The weights home: the folder of fetched and converted files, and the record of what each of them must be.

The record, `weights.lock.json`, is written when a file is first fetched or converted, and compared from then on.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from streamt2v import files
from streamt2v.errors import BusyError, WeightsError

SCHEMA = 1
Section = Literal["sources", "files", "snapshots", "folders"]
ROWS: Mapping[Section, tuple[str, ...]] = {  # the fields of each row of a section
    "sources": ("commit", "bytes", "sha256"),  # published files, by repository and path
    "files": ("parts",),  # converted files, by name in the home
    "snapshots": ("commit", "folder", "files"),  # third-party pipelines in the library's cache, by request
    "folders": ("files",),  # other folders with pipelines, by path
}


def path() -> Path:
    """Return the weights home: `STREAMT2V_HOME`, else `streamt2v` in the user's cache folder."""
    return _path(*map(os.environ.get, ("STREAMT2V_HOME", "XDG_CACHE_HOME", "HOME"))).absolute()


@lru_cache(maxsize=8)  # a batch asks a dozen times a row
def _path(given: str | None, cache: str | None, _user: str | None) -> Path:
    if given:
        return Path(given).expanduser()
    return (Path(cache) if cache else Path.home() / ".cache") / "streamt2v"


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    return files.hashed(file).hexdigest()


@dataclass(frozen=True)
class Recorded:
    """What a file must be: its size and SHA-256.

    `stamp` is (modification time in ns, inode) of the file that was hashed: as long as it stays the same, the gigabytes
    are not hashed again. Bundled files have none and are always hashed.
    """

    bytes: int
    sha256: str
    stamp: tuple[int, int] | None = None

    @classmethod
    def of(cls, file: Path) -> Self:
        """Record a file as it is now."""
        status = file.stat()
        return cls(status.st_size, sha256_of(file), (status.st_mtime_ns, status.st_ino))

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Read a row from `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        modified, inode = map(int, row["stamp"])
        return cls(int(row["bytes"]), str(row["sha256"]), (modified, inode))

    def to_json(self) -> dict[str, Any]:
        """Return a row for the record."""
        return {"bytes": self.bytes, "sha256": self.sha256, "stamp": self.stamp}

    def has_size(self, file: Path) -> bool:
        """Return whether a file exists and has the recorded size."""
        return file.is_file() and file.stat().st_size == self.bytes

    def now(self, file: Path) -> Self:
        """Record a file again; it is hashed only if its size or stamp has changed."""
        status = file.stat()
        same = (status.st_size, (status.st_mtime_ns, status.st_ino)) == (self.bytes, self.stamp)
        return self if same else self.of(file)

    def matches(self, file: Path) -> bool:
        """Return whether a file is as recorded."""
        return self.has_size(file) and self.now(file).sha256 == self.sha256


def record_path() -> Path:
    """Return the path of the record, which may not exist yet."""
    return path() / "weights.lock.json"


def recorded(section: Section) -> dict[str, Any]:
    """Return one section of the record, empty if nothing was recorded.

    Raises:
        WeightsError: the record is damaged or of another schema.
    """
    record = record_path()
    try:
        table = json.loads(record.read_text("utf-8"))
        if table["schema"] != SCHEMA:
            raise ValueError(f"schema {table['schema']}, this version reads {SCHEMA}")
        rows = dict(table.get(section, {}))
        for row in rows.values():
            if absent := [key for key in ROWS[section] if key not in row]:
                raise ValueError(f"a row of {section} lacks {absent[0]!r}")
            for part in {**row.get("parts", {}), **row.get("files", {})}.values():
                Recorded.from_json(part)
        return rows
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "move it away, then run `streamt2v weights pull` again"
        raise WeightsError(f"the record of the weights, {record}, cannot be used: {error}", hint) from error


def remember(section: Section, rows: Mapping[str, Any]) -> None:
    """Add or replace rows of the record.

    Raises:
        OutputError: the record cannot be written.
    """
    from filelock import FileLock  # importing it takes 15 ms

    files.make_directory(path())
    with files.output_errors(record_path()), FileLock(path() / ".weights.lock"):
        table = {name: recorded(name) for name in ROWS}
        table[section] |= rows
        files.write_json(record_path(), {"schema": SCHEMA, **table})


@contextlib.contextmanager
def working_on(file: Path) -> Iterator[None]:
    """Lock a file of the home for this process. Raises BusyError if another process holds it."""
    from filelock import FileLock, Timeout

    files.make_directory(file.parent)
    lock = FileLock(file.with_name(f".{file.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:  # a Timeout is an OSError too
        raise BusyError(f"another process is working on {file}", "wait until it has finished, or stop it") from error
    except OSError as error:
        raise files.explain(file, error) from error
    try:
        yield
    finally:
        lock.release()
