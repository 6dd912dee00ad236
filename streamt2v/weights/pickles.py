"""Tensors in other people's files, found without running anything that is in them.

A checkpoint of torch is a pickle, which is a program. Here it is read as data by a small interpreter that makes lists,
tables and descriptions of tensors and never calls or imports anything: whatever else the pickle asks for becomes an
inert `Name` or `Inert`. Tensors are read one at a time from their place in the file, so that 25 GB need no memory.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from streamt2v.errors import InputError, WeightsError
from streamt2v.weights.header import ITEM_BYTES, read_index

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

        data = bytearray(self.span * ITEM_BYTES[self.dtype])
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
                _, index = read_index(path)
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
            reader = _PickleReader()
            found = reader.run(io.BytesIO(archive.read(names[0])))

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
    reader = _PickleReader()
    try:
        if reader.run(head) != LEGACY_MAGIC:
            raise WeightsError(f"{path} is a pickle, but no checkpoint of torch")
        reader.run(head)
        if reader.run(head).get("little_endian") is not True:
            raise WeightsError(f"{path} was written on a big-endian machine")
        found, keys = reader.run(head), reader.run(head)
        placed, position = {}, head.tell()
        for key in keys:
            stream.seek(position)
            count = int.from_bytes(stream.read(8), "little")
            size = count * ITEM_BYTES[reader.storages[key].dtype]
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
        item = ITEM_BYTES[view.storage.dtype]
        span = _span(view.shape, view.stride)
        sound = min((*view.shape, *view.stride, view.offset, start)) >= 0 and math.prod(view.shape) <= span
        if not sound or (view.offset + span) * item > available or start + available > size:
            raise WeightsError(f"{path}: {key!r} reaches beyond its storage", "the file is cut short or damaged")
        yield key, Stored(path, view.storage.dtype, view.shape, view.stride, start + view.offset * item)


# ------------------------------------------------------------------------------------------------ pickles as data

_DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, ArithmeticError, struct.error
)  # fmt: skip


@dataclass(frozen=True)
class Name:
    """What a pickle would have imported."""

    module: str
    name: str


class Inert:
    """What a pickle would have built."""


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


_PUSH = {
    "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLE = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _PickleReader:
    """An interpreter for the opcodes of pickles that has no operation that calls or imports."""

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}
        self.refused: set[str] = set()
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        """Read one pickle and return the value it describes."""
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise EOFError("a pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _CONSTANT:
            stack.append(_CONSTANT[name])
        elif name in _TUPLE:
            stack[-_TUPLE[name] :] = [tuple(stack[-_TUPLE[name] :])]
        elif name in ("TUPLE", "LIST", "FROZENSET"):
            stack.append({"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}[name](self._marked()))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else int(argument)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(argument)])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "POP":  # a mark where one lies on top
            (self.marks if self.marks[-1:] == [len(stack)] else stack).pop()
        elif name == "POP_MARK":
            self._marked()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in ("APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS", "DICT"):
            self._fill(name)
        else:
            self._build(name, argument)

    def _marked(self) -> list[Any]:
        """Take everything above the topmost mark, and the mark."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def _fill(self, name: str) -> None:
        """Put items into the container below them; one that was not built stays empty."""
        count = {"APPEND": 1, "SETITEM": 2}.get(name)
        items = self._marked() if count is None else [self.stack.pop() for _ in range(count)][::-1]
        if name == "DICT":
            self.stack.append({})
        container = self.stack[-1]
        if isinstance(container, dict):
            container.update(zip(items[::2], items[1::2], strict=True))
        elif isinstance(container, list):
            container.extend(items)
        elif isinstance(container, set):
            container.update(items)

    def _build(self, name: str, argument: Any) -> None:
        """Describe what the pickle would import, call or build."""
        stack = self.stack
        if name == "GLOBAL":
            stack.append(Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [Name(str(stack[-2]), str(stack[-1]))]
        elif name in ("PERSID", "BINPERSID"):
            stack.append(self._storage(stack.pop() if name == "BINPERSID" else argument))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(self._call(stack.pop(), arguments))
        elif name == "BUILD":  # attributes: of no interest
            stack.pop()
        elif name in ("NEWOBJ", "NEWOBJ_EX"):
            del stack[-1 if name == "NEWOBJ" else -2 :]
            stack.append(self._call(stack.pop(), None))
        elif name in ("OBJ", "INST"):
            marked = self._marked()
            stack.append(self._call(marked[0] if name == "OBJ" else Name(*argument.split(" ", 1)), None))
        elif name in ("EXT1", "EXT2", "EXT4"):
            stack.append(Name("copyreg", f"extension {argument}"))
        else:
            raise ValueError(f"a pickle has an operation {name}")

    def _storage(self, described: Any) -> _Storage:
        """A tensor's bytes: ("storage", type, key, device, number of elements, ...)."""
        kind, storage, key = described[:3]
        if kind != "storage" or not isinstance(storage, Name) or storage.module not in ("torch", "torch.storage"):
            raise ValueError("a pickle refers to something that is no storage")
        return self.storages.setdefault(str(key), _Storage(STORAGES.get(storage.name, storage.name), str(key)))

    def _call(self, called: Any, arguments: Any) -> Any:
        """Describe the result of a call: a tensor, a table, or nothing known."""
        known = f"{called.module}.{called.name}" if isinstance(called, Name) else "a value"
        if known == "torch._utils._rebuild_tensor_v2":
            storage, offset, shape, stride = arguments[:4]
            if not isinstance(storage, _Storage):
                raise ValueError("a tensor without a storage")
            return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))
        if known in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return arguments[0]
        if known == "collections.OrderedDict" and isinstance(arguments, tuple):
            return dict(*arguments)
        self.refused.add(known)
        return Inert()
