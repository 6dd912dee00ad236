"""The header of a weights file: what it claims to be, and which tensors it holds. Nothing in it is trusted.

A weights file is a safetensors file whose metadata has `format` ("streamt2v/1"), `class` (of `networks.NETWORKS`),
`config` (the arguments of that class, as JSON) and, for denoisers, `schedule` (the noise schedule, as JSON). A large
network is split into several files with an index beside them, as on the model hub.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from streamt2v import files
from streamt2v.errors import WeightsError

FORMAT = "streamt2v/1"
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 20_000
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
Header = tuple[str, dict[str, Any], dict[str, Any] | None]
"""Class name, config, and noise schedule (None for a network that is not a denoiser)."""
_HINT = "run `streamt2v weights verify`"


class Row(NamedTuple):
    """One tensor in the header of a safetensors file; `start` is its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Row]]:
    """Return the metadata and the tensors of any safetensors file; offsets, shapes and file size must agree.

    Raises:
        WeightsError: the file is missing, truncated, or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= MAX_HEADER_BYTES:
                raise WeightsError(f"{path} is not a safetensors file", _HINT)
            raw = stream.read(length)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}", _HINT) from error
    if len(raw) < length:
        raise WeightsError(f"{path} is truncated: {size:,} bytes, its header alone needs {length + 8:,}", _HINT)
    try:
        table = json.loads(raw)
        metadata = {str(key): str(value) for key, value in table.pop("__metadata__", {}).items()}
        places = {name: tuple(map(int, row["data_offsets"])) for name, row in table.items()}
        index = {
            name: Row(row["dtype"], tuple(map(int, row["shape"])), 8 + length + places[name][0])
            for name, row in table.items()
        }
        sizes = {name: ITEM_BYTES[row.dtype] * math.prod(row.shape) for name, row in index.items()}
        sound = all(0 <= start <= stop == start + sizes[name] for name, (start, stop) in places.items())
        ends = max((stop for _, stop in places.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise WeightsError(f"{path} is not a safetensors file: its header is damaged", _HINT) from error
    expected = 8 + length + ends
    if size != expected:
        problem = "is truncated" if size < expected else "has bytes after its end"
        raise WeightsError(f"{path} {problem}: {size:,} bytes, its header says {expected:,}", _HINT)
    if not sound or sum(sizes.values()) != ends or len(index) > MAX_TENSORS:
        raise WeightsError(f"{path} is damaged: shapes and sizes in its header disagree", _HINT)
    return metadata, index


def read_metadata(path: Path, metadata: Mapping[str, str]) -> Header:
    """Check what a weights file claims to be. Raises WeightsError if it is not one of ours."""
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "none")
        raise WeightsError(f"{path} is not a weights file of streamt2v: format {found!r}, expected {FORMAT!r}")
    try:
        config = json.loads(metadata["config"])
        schedule = json.loads(metadata["schedule"]) if "schedule" in metadata else None
        if not isinstance(config, dict) or not isinstance(schedule, dict | None):
            raise ValueError("config and schedule must be tables")
        return metadata["class"], config, schedule
    except (KeyError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has damaged metadata: {error}") from error


def shard_index(path: Path) -> Path:
    """Return the path of the index that lists the parts of a split weights file."""
    return path.with_name(f"{path.name}.index.json")


def read_parts(path: Path) -> tuple[dict[str, str], dict[Path, dict[str, Row]]]:
    """Return the metadata of a weights file and the tensors of each part: the file itself, or those in its index.

    The index is only trusted for file names; the rest is read from the parts.

    Raises:
        WeightsError: a file is missing or damaged, or a part belongs to another network.
    """
    listed = shard_index(path)
    if path.is_file() or not listed.is_file():
        metadata, index = read_index(path)
        return metadata, {path: index}
    try:
        names = sorted(set(json.loads(listed.read_bytes())["weight_map"].values()))
        plain = bool(names) and all(name == Path(name).name and (path.parent / name) != path for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{listed} is damaged: {error}", _HINT) from error
    if not plain:
        raise WeightsError(f"{listed} names files outside its folder, or none", _HINT)
    indices = {path.parent / name: read_index(path.parent / name) for name in names}
    metadata = indices[path.parent / names[0]][0]
    seen: set[str] = set()
    for part, (own, index) in indices.items():
        if own != metadata or not seen.isdisjoint(index):
            raise WeightsError(f"{part} belongs to another file than {path.parent / names[0]}", "convert both again")
        seen.update(index)
    return metadata, {part: index for part, (_, index) in indices.items()}


def read_header(path: Path) -> Header:
    """Read what a weights file, split or not, claims to be, without torch.

    Raises:
        WeightsError: the file is missing, truncated, not a safetensors file, or not one of ours.
    """
    return _header(path, (files.stamp(path), files.stamp(shard_index(path))))


@lru_cache(maxsize=64)
def _header(path: Path, _stamps: object) -> Header:
    return read_metadata(path, read_parts(path)[0])


def metadata_of(name: str, config: Mapping[str, Any], schedule: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the metadata of a weights file, as `read_metadata` expects it."""
    metadata = {"format": FORMAT, "class": name, "config": json.dumps(dict(config))}
    return metadata if schedule is None else metadata | {"schedule": json.dumps(dict(schedule))}
