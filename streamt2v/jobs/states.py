"""States: small files that say how a stage of a run goes on, each with a checksum, the newest two kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v import files

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

KEPT = 2


@dataclass(frozen=True)
class State:
    """A saved state: the number of base chunks it accounts for, its arrays, and a small JSON record."""

    index: int
    arrays: dict[str, npt.NDArray[Any]]
    meta: dict[str, Any]

    def torch(self) -> dict[str, Tensor]:
        """Hand over the arrays as CPU tensors (bfloat16 ones come back as the float32 they were stored in)."""
        from torch import from_numpy

        # Copied into torch's aligned memory: MKL may round differently on other alignments, as its manual says.
        return {name: from_numpy(self.arrays.pop(name)).clone() for name in [*self.arrays]}


def write(folder: Path, name: str, index: int, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write a state of a name beside the older ones, and remove those but one; see `RunDirectory.save_state`."""
    plain = {key: _array(value) for key, value in arrays.items()}
    header = {"index": str(index), "meta": json.dumps(meta)}
    header["sha256"] = _digest(plain, header)
    older = _of(folder, name)
    serial = 1 + (_serial(older[-1]) if older else 0)
    files.write_bytes(folder / f"{name}-{serial:06d}.safetensors", *_parts(plain, header))
    with files.output_errors(folder):
        for path in older[: 1 - KEPT]:
            path.unlink(missing_ok=True)


def newest(folder: Path, name: str, index: int) -> State | None:
    """Return the newest whole state of a name that accounts for at most `index` base chunks; newer ones are removed."""
    for path in reversed(_of(folder, name)):
        state = _read(path)
        if state is not None and state.index <= index:
            return state
        with files.output_errors(path):
            path.unlink(missing_ok=True)
    return None


def _of(folder: Path, name: str) -> list[Path]:
    """The states of a name, oldest first."""
    return sorted(folder.glob(f"{name}-*.safetensors"), key=_serial)


def _serial(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _array(value: Any) -> npt.NDArray[Any]:
    import numpy as np

    if not isinstance(value, np.ndarray):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return np.asarray(value, order="C")


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    """View an array's bytes: a state of a refiner can be as large as all else in memory, and is never copied."""
    return array.reshape(-1).view("u1").data


def _parts(arrays: Mapping[str, npt.NDArray[Any]], header: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file: length of the table, table, arrays; the widest first, so that all are aligned."""
    table, end = dict[str, Any](__metadata__=header), 0
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, array in ordered:
        kind = "BOOL" if array.dtype == bool else f"{array.dtype.kind.upper()}{8 * array.itemsize}"
        begin, end = end, end + array.nbytes
        table[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [begin, end]}
    written = json.dumps(table).encode()
    written += b" " * (-len(written) % 8)
    yield len(written).to_bytes(8, "little") + written
    yield from (_bytes(array) for _, array in ordered)


def _digest(arrays: Mapping[str, npt.NDArray[Any]], header: Mapping[str, str]) -> str:
    """Hash a state; safetensors itself loads flipped bits without complaint."""
    digest = hashlib.sha256(f"{header['index']} {header['meta']}".encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(_bytes(arrays[name]))
    return digest.hexdigest()


def _read(path: Path) -> State | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        if _digest(arrays, header) != header["sha256"]:
            return None
        return State(int(header["index"]), arrays, json.loads(header["meta"]))
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
