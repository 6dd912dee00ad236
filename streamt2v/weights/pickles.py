"""Tensors in third-party checkpoints, found without running anything in them.

A torch checkpoint is a pickle, and a pickle is a program. It is read by an unpickler that imports nothing: names that
describe tensors become descriptions, all others an `Inert`. A pickle that would exhaust memory is refused first.
Tensors are read one at a time from their position in the file, so that 25 GB need no memory.
"""

from __future__ import annotations

import copyreg
import errno
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from streamt2v.errors import InputError, WeightsError
from streamt2v.weights.header import ITEM_BYTES, read_index

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE_BYTES = 64 * 2**20
MAX_OPERATIONS, MAX_TUPLES = 2_000_000, 100_000  # a tensor takes about 40 operations, 4 of them tuples
MAX_DIMENSIONS, MAX_NUMBER, MAX_NAMES = 64, 2**63 - 1, 20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_TYPES = (  # in safetensors, in a torch checkpoint, in torch
    ("F64", "DoubleStorage", "float64"),
    ("F32", "FloatStorage", "float32"),
    ("F16", "HalfStorage", "float16"),
    ("BF16", "BFloat16Storage", "bfloat16"),
    ("I64", "LongStorage", "int64"),
    ("I32", "IntStorage", "int32"),
    ("I16", "ShortStorage", "int16"),
    ("I8", "CharStorage", "int8"),
    ("U8", "ByteStorage", "uint8"),
    ("BOOL", "BoolStorage", "bool"),
)
STORAGES = {storage: code for code, storage, _ in _TYPES}
TORCH_TYPES = {code: name for code, _, name in _TYPES}
_WRONG = (ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, ArithmeticError)
_DAMAGE = (*_WRONG, struct.error, pickle.UnpicklingError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: type (as in safetensors), shape, strides in elements, and position of its first byte."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def span(self) -> int:
        """Number of elements from the first to the last, gaps included."""
        steps = zip(self.shape, self.stride, strict=True)
        return 1 + sum((size - 1) * step for size, step in steps) if 0 not in self.shape else 0

    def read(self) -> Tensor:
        """Read the tensor. Raises WeightsError if the file ends first."""
        import torch

        data = bytearray(self.span * ITEM_BYTES[self.dtype])
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            if stream.readinto(data) < len(data):
                raise WeightsError(f"{self.path} is truncated")
        kind = getattr(torch, TORCH_TYPES[self.dtype])
        flat = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Archive:
    """The tensors of a file by key, and the other names its pickle refers to, which were not imported."""

    tensors: Mapping[str, Stored]
    refused: tuple[str, ...] = ()


def read(path: Path) -> Archive:
    """List the tensors of a safetensors file or of a torch checkpoint, which may hold them under `state_dict`.

    Raises:
        InputError: there is no such file.
        WeightsError: it is neither of them, is damaged or truncated, or holds no tensors.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
            if start[:4] == b"PK\x03\x04":
                archive = _read_zip(path, stream)
            elif start[:1] == b"\x80":
                archive = _read_legacy(path, stream)
            elif start[8:] == b"{":
                _, index = read_index(path)
                archive = Archive({key: _contiguous(path, *row) for key, row in index.items()})
            else:
                raise WeightsError(f"{path} is neither a safetensors file nor a torch checkpoint, or is truncated")
    except OSError as error:
        if error.errno == errno.EINVAL:  # a seek to before the first byte, from a damaged index
            raise WeightsError(f"{path} is truncated or damaged: {error}", "fetch it again") from error
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise WeightsError(f"{path} is truncated or damaged: {error}", "fetch it again") from error
    if not archive.tensors:
        raise WeightsError(f"{path} holds no tensors")
    return archive


def _contiguous(path: Path, dtype: str, shape: tuple[int, ...], start: int) -> Stored:
    return Stored(path, dtype, shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), start)


def _read_zip(path: Path, stream: BinaryIO) -> Archive:
    """Read the current format: a zip archive of one pickle and one file per storage, all uncompressed."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist() if info.compress_type == zipfile.ZIP_STORED}
        names = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) != 1 or entries[names[0]].file_size > MAX_PICKLE_BYTES:
            raise WeightsError(f"{path} is a zip archive, but not a torch checkpoint")
        root = names[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise WeightsError(f"{path} was written on a big-endian machine")
        reader = _Reader(io.BytesIO(archive.read(names[0])))

    def place(storage: _Storage) -> tuple[int, int]:
        """Return position and size of a storage, whose content follows a header of variable length."""
        entry = entries[f"{root}data/{storage.key}"]
        stream.seek(entry.header_offset + 26)
        lengths = stream.read(2), stream.read(2)
        return entry.header_offset + 30 + sum(int.from_bytes(length, "little") for length in lengths), entry.file_size

    return Archive(dict(_tensors(path, reader.next(), place)), tuple(sorted(reader.refused)))


def _read_legacy(path: Path, stream: BinaryIO) -> Archive:
    """Read the format before 2020: five pickles (magic, version, machine, content, storage keys), then the storages."""
    stream.seek(0)
    head = io.BytesIO(stream.read(MAX_PICKLE_BYTES))
    reader = _Reader(head)
    if reader.next() != LEGACY_MAGIC:
        raise WeightsError(f"{path} is a pickle, but not a torch checkpoint")
    reader.next()
    if reader.next().get("little_endian") is not True:
        raise WeightsError(f"{path} was written on a big-endian machine")
    found, keys = reader.next(), reader.next()
    placed, position = {}, head.tell()
    for key in keys:
        stream.seek(position)
        count = int.from_bytes(stream.read(8), "little")
        size = count * ITEM_BYTES[reader.storages[key].dtype]
        placed[key] = position + 8, size
        position += 8 + size
    if position > stream.seek(0, io.SEEK_END):
        raise WeightsError(f"{path} is truncated", "fetch it again")
    return Archive(dict(_tensors(path, found, lambda storage: placed[storage.key])), tuple(sorted(reader.refused)))


def _tensors(path: Path, found: Any, place: Any) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of an unpickled checkpoint, or those in its `state_dict` if it has one."""
    size = path.stat().st_size
    inner = found.get("state_dict", found) if isinstance(found, dict) else {}
    for key, view in inner.items() if isinstance(inner, dict) else ():
        if not isinstance(view, _View) or not isinstance(key, str):
            continue
        (start, available), item = place(view.storage), ITEM_BYTES[view.storage.dtype]
        row = Stored(path, view.storage.dtype, view.shape, view.stride, start + view.offset * item)
        sound = min((*view.shape, *view.stride, view.offset, start)) >= 0 and math.prod(view.shape) <= row.span
        if not sound or (view.offset + row.span) * item > available or start + available > size:
            raise WeightsError(f"{path}: {key!r} reaches beyond its storage", "the file is truncated or damaged")
        yield key, row


class Inert(dict[Any, Any]):
    """Stands in for whatever a pickle would import or build: accepts anything, does nothing; a dict keeps its items."""

    __slots__ = ()
    __hash__ = object.__hash__  # type: ignore[assignment]  # may be used as a key

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _ignore(self, *_: Any) -> Inert:
        return self

    __call__ = __setstate__ = append = extend = add = _ignore


class _Call(Inert):
    """A function that a pickle may call, but whose attributes, such as defaults, it cannot reach."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class _Storage(NamedTuple):
    """The bytes that tensors are views of."""

    dtype: str
    key: str


class _View(NamedTuple):
    """A tensor: part of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Reader(pickle.Unpickler):
    """Reads pickles, one after the other, without importing or running anything they name."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="latin-1")  # strings of Python 2 may hold any byte
        self.stream = stream
        self.storages: dict[str, _Storage] = {}
        self.refused: set[str] = set()
        self.copied = 0
        first = _Call(lambda value, *_: value)
        self.calls = {
            ("torch._utils", "_rebuild_tensor_v2"): _Call(_view),
            ("torch._utils", "_rebuild_parameter"): first,
            ("torch._utils", "_rebuild_parameter_with_state"): first,
            ("collections", "OrderedDict"): _Call(self._table),
        }

    def next(self) -> Any:
        """Read one pickle and return the value it describes."""
        start = self.stream.tell()
        _check_extent(self.stream)
        self.stream.seek(start)
        copyreg.clear_extension_cache()  # its entries would bypass `find_class`
        try:
            return self.load()
        finally:
            copyreg.clear_extension_cache()

    def find_class(self, module: str, name: str) -> Any:
        """Describe what a pickle would import."""
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return STORAGES.get(name, name)
        if (module, name) in self.calls:
            return self.calls[module, name]
        if len(self.refused) < MAX_NAMES:
            self.refused.add(f"{module[:80]}.{name[:80]}")
        return Inert

    def persistent_load(self, described: Any) -> _Storage:
        """Describe a storage: ("storage", class, key, device, number of elements, ...)."""
        kind, dtype, key = described[:3]
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str | int):
            raise ValueError("a pickle refers to something that is not a storage")
        return self.storages.setdefault(str(key), _Storage(dtype, str(key)))

    def _table(self, items: Any = ()) -> Inert:
        self.copied += len(items)  # or a pickle could copy one list without end
        if self.copied > MAX_OPERATIONS:
            raise ValueError("a pickle with more entries than any checkpoint has")
        table = Inert()
        table.update(items)
        return table


def _view(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _View:
    """Describe a tensor as torch rebuilds one."""
    if not isinstance(storage, _Storage) or max(len(shape), len(stride)) > MAX_DIMENSIONS:
        raise ValueError("a pickle describes something that is not a tensor")
    view = _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))
    if max(map(abs, (view.offset, *view.shape, *view.stride))) > MAX_NUMBER:
        raise ValueError("a tensor of a size that no file has")
    return view


def _check_extent(stream: BinaryIO) -> None:
    """Refuse a pickle that would exhaust memory or the stack, without building anything.

    The unpickler allocates every slot of its memo up to the highest one used; one byte of code may create an object of
    200 bytes; hashing nested tuples takes stack for every level.
    """
    tuples = 0
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        tuples += operation.name.startswith("TUPLE")
        place = int(argument or 0) if operation.name.endswith("PUT") else 0
        if max(count, place) > MAX_OPERATIONS or tuples > MAX_TUPLES:
            raise ValueError("a pickle with more operations than any checkpoint has")
