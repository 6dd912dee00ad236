"""Tensors in other people's files, found without running anything that is in them.

A checkpoint of torch is a pickle, which is a program. Here it only ever makes lists, tables and descriptions of
tensors: no name in it is imported, and whatever else it asks for becomes `Inert`. Tensors are read one at a time from
their place in the file, so that 25 GB need no memory.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from streamt2v import weights
from streamt2v.errors import InputError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE_BYTES = 64 * 2**20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
TORCH_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: type (as safetensors names it), shape, strides in elements, and where its bytes begin."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def span(self) -> int:
        """Elements from the first to the last one, those between them included."""
        return _span(self.shape, self.stride)

    def read(self) -> Tensor:
        """Read the tensor. Raises WeightsError when the file ends before it does."""
        import torch

        data = bytearray(self.span * weights.ITEM_BYTES[self.dtype])
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            if stream.readinto(data) < len(data):
                raise WeightsError(f"{self.path} is cut short")
        kind = getattr(torch, TORCH_TYPES[self.dtype])
        flat = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Archive:
    """The tensors of a file by key, and the names of what else its pickle asked for, which was not built."""

    tensors: Mapping[str, Stored]
    refused: tuple[str, ...] = ()


def read(path: Path) -> Archive:
    """List the tensors of a safetensors file, or of a checkpoint of torch, which may hold them under `state_dict`.

    Raises:
        InputError: there is no such file.
        WeightsError: it is no such file, damaged, cut short, or has no tensors.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
            if start[:4] == b"PK\x03\x04":
                archive = _read_zip(path)
            elif start[:1] == b"\x80":
                archive = _read_legacy(path, stream)
            elif start[8:] == b"{":
                _, index = weights.read_index(path)
                rows = {key: (row.dtype, row.shape, _contiguous(row.shape), row.start) for key, row in index.items()}
                archive = Archive({key: Stored(path, *row) for key, row in rows.items()})
            else:
                raise WeightsError(f"{path} is neither a safetensors file nor a checkpoint of torch, or is cut short")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if not archive.tensors:
        raise WeightsError(f"{path} holds no tensors")
    return archive


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


# ------------------------------------------------------------------------------------------------- files of torch


def _read_zip(path: Path) -> Archive:
    """Read the present format: a zip archive of one pickle and one file per storage, none of them compressed."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
            entries = {info.filename: info for info in archive.infolist() if info.compress_type == zipfile.ZIP_STORED}
            names = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(names) != 1 or entries[names[0]].file_size > MAX_PICKLE_BYTES:
                raise WeightsError(f"{path} is a zip archive, but no checkpoint of torch")
            root = names[0].removesuffix("data.pkl")
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise WeightsError(f"{path} was written on a big-endian machine")
            reader = _PickleReader(io.BytesIO(archive.read(names[0])))
            found = reader.load()

            def place(storage: _Storage) -> tuple[int, int]:
                """First byte and size of a storage: its content follows a header of variable length."""
                entry = entries[f"{root}data/{storage.key}"]
                stream.seek(entry.header_offset)
                header = stream.read(30)
                names_length, extra_length = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
                return entry.header_offset + 30 + names_length + extra_length, entry.file_size

            return Archive(dict(_tensors(path, found, place)), tuple(sorted(reader.refused)))
    except (zipfile.BadZipFile, *_DAMAGE) as error:
        raise WeightsError(f"{path} is cut short or damaged: {error}", "fetch it again") from error


def _read_legacy(path: Path, stream: BinaryIO) -> Archive:
    """Read the format before 2020: five pickles (magic, version, machine, content, storage keys), then the storages."""
    stream.seek(0)
    head = io.BytesIO(stream.read(MAX_PICKLE_BYTES))
    reader = _PickleReader(head)
    try:
        if reader.load() != LEGACY_MAGIC:
            raise WeightsError(f"{path} is a pickle, but no checkpoint of torch")
        reader.load()
        if reader.load().get("little_endian") is not True:
            raise WeightsError(f"{path} was written on a big-endian machine")
        found, keys = reader.load(), reader.load()
        placed, position = {}, head.tell()
        for key in keys:
            stream.seek(position)
            count = int.from_bytes(stream.read(8), "little")
            size = count * weights.ITEM_BYTES[reader.storages[key].dtype]
            placed[key] = position + 8, size
            position += 8 + size
        if position > stream.seek(0, io.SEEK_END):
            raise WeightsError(f"{path} is cut short", "fetch it again")
        return Archive(dict(_tensors(path, found, lambda storage: placed[storage.key])), tuple(sorted(reader.refused)))
    except _DAMAGE as error:
        raise WeightsError(f"{path} is cut short or damaged: {error}", "fetch it again") from error


def _tensors(path: Path, found: Any, place: Any) -> Iterator[tuple[str, Stored]]:
    """Walk through the content of a checkpoint; nothing outside its `state_dict`, if it has one, is of interest."""
    size = path.stat().st_size
    inner = found.get("state_dict", found) if isinstance(found, dict) else {}
    for key, view in inner.items() if isinstance(inner, dict) else ():
        if not isinstance(view, _View) or not isinstance(key, str):
            continue
        start, available = place(view.storage)
        item = weights.ITEM_BYTES[view.storage.dtype]
        span = _span(view.shape, view.stride)
        sound = min((*view.shape, *view.stride, view.offset, start)) >= 0 and math.prod(view.shape) <= span
        if not sound or (view.offset + span) * item > available or start + available > size:
            raise WeightsError(f"{path}: {key!r} reaches beyond its storage", "the file is cut short or damaged")
        yield key, Stored(path, view.storage.dtype, view.shape, view.stride, start + view.offset * item)


# ------------------------------------------------------------------------------------------------ pickles as data

_DAMAGE = (
    pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, ArithmeticError,
    MemoryError, AssertionError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _View:
    """A tensor: part of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """What a pickle would have imported, called or built: takes everything and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return object.__new__(cls)

    def _ignore(self, *_: Any, **__: Any) -> None: ...

    __call__ = __setstate__ = __setitem__ = append = extend = add = _ignore


class _Table(dict[Any, Any]):
    """What OrderedDict becomes; its attributes are of no interest."""

    def __setstate__(self, _: Any) -> None: ...


def _view(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _parameter(view: Any, *_: Any) -> Any:
    return view


_KNOWN: Mapping[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "collections.OrderedDict": _Table,
    **{f"{module}.{name}": dtype for module in ("torch", "torch.storage") for name, dtype in STORAGES.items()},
}
"""The names in a pickle that mean something here. A storage's class is only asked for its type of numbers."""


class _PickleReader(pickle._Unpickler):
    """Looks up names in `_KNOWN` and nowhere else, so that nothing is imported and nothing of others is called.

    This is the unpickler written in Python: the one in C takes gigabytes where a damaged file misnumbers its memo.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="latin1")
        self.storages: dict[str, _Storage] = {}
        self.refused: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name here."""
        if (full := f"{module}.{name}") not in _KNOWN:
            self.refused.add(full)
        return _KNOWN.get(full, Inert)

    def get_extension(self, code: int) -> None:
        """Return something inert for a numbered name: the library's own table of them may hold the genuine thing."""
        self.refused.add(f"extension {code}")
        self.append(Inert)  # type: ignore[attr-defined]

    def persistent_load(self, described: Any) -> _Storage:
        """Describe a tensor's bytes: ("storage", type, key, device, number of elements, ...)."""
        kind, dtype, key = described[:3]
        if kind != "storage" or not isinstance(dtype, str):
            raise ValueError("a pickle refers to something that is no storage")
        return self.storages.setdefault(str(key), _Storage(dtype, str(key)))
