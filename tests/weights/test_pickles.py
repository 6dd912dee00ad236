"""Checkpoints are data: what is damaged or hostile is refused, and nothing in them is ever run."""

import contextlib
import copyreg
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from streamt2v.errors import WeightsError
from streamt2v.weights import pickles
from tests import checkpoints as tiny
from tests.checkpoints import REFINER
from tests.weights.test_convert import SHAPES, make, tiny_convert


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    row = pickles.read(tmp_path / "a.safetensors").tensors["a"]
    assert torch.equal(row.read(), torch.ones(100))
    os.truncate(tmp_path / "a.safetensors", 200)
    with pytest.raises(WeightsError, match="truncated"):
        row.read()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_byte_of_an_index_crashes(tmp_path: Path, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(3, 2), "b": torch.zeros(4).half()}, "epoch": [1, {"x": 2.5}]}, buffer)
    damaged = bytearray(buffer.getvalue())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.ckpt"
    path.write_bytes(damaged)
    try:
        for row in pickles.read(path).tensors.values():
            row.read()
    except WeightsError:
        pass


def test_an_index_that_points_before_the_file_is_damage(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3, 2)}, buffer)
    damaged = bytearray(buffer.getvalue())
    end = damaged.rindex(b"PK\x06\x06")
    damaged[end + 48 : end + 56] = (2**40).to_bytes(8, "little")  # where the central directory is said to lie
    path = tmp_path / "x.ckpt"
    path.write_bytes(damaged)
    with pytest.raises(WeightsError, match="damaged"):
        pickles.read(path)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol_are_read_as_data(protocol: int) -> None:
    value = {
        "numbers": [1, -70000, 2**40, 2**2100, 1.5, True, None],
        "texts": ("a", "\u00e9" * 300, b"bytes", "x" * 70000),
        "sets": [{1, 2}, frozenset({"a"})],
        3: {"deep": [[[()]], {}], "table": OrderedDict(a=1)},
    }
    value["again"] = value["texts"]
    if protocol < 3:
        value["texts"] = value["again"] = ("a", "\u00e9" * 300)
    if protocol < 4:
        del value["sets"]
    assert pickles._Reader(io.BytesIO(pickle.dumps(value, protocol))).next() == value


# ------------------------------------------------------------------------------------------------- hostile files


class Reduce:
    """Pickles as a call of whatever it is given."""

    def __init__(self, called: Any, *arguments: Any) -> None:
        self.reduced = (called, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def _pickled(value: Any) -> bytes:
    return pickle.dumps(value, 2)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def hostile(mark: str) -> dict[str, bytes]:
    """Pickles that, opened by pickle, would write the file `mark`."""
    command = f"touch '{mark}'"
    code = f"open({mark!r}, 'w').close()"
    call = b"cos\nsystem\n"
    extension = b"\x80\x02\x82\xf0" + _text(command) + b"\x85R."
    return {
        "os.system": _pickled(Reduce(os.system, command)),
        "eval": _pickled(Reduce(eval, code)),
        "exec": _pickled(Reduce(exec, code)),
        "nested in a table": _pickled({"state_dict": {"a": [Reduce(os.system, command)]}}),
        "by attribute": _pickled({"x": Reduce(getattr, Reduce(__import__, "os"), "system")})[:-1]
        + b"0" + call + _text(command) + b"\x85R.",
        "old instance": b"(" + _text(command) + b"ios\nsystem\n.",
        "old object": b"(" + call + _text(command) + b"o.",
        "new object": b"\x80\x02" + call + _text(command) + b"\x85\x81.",
        "new object with names": b"\x80\x04" + call + _text(command) + b"\x85}\x92.",
        "set state": b"\x80\x02ctypes\nSimpleNamespace\n)\x81}" + _text("__setstate__") + call + b"sb"
        + _text(command) + b"b.",
        "named on the stack": b"\x80\x04" + _text("os") + _text("system") + b"\x93" + _text(command) + b"\x85R.",
        "registered extension": extension,
        "function as a tensor's storage": b"\x80\x02" + call + _text(command) + b"\x85RQ.",
        "loads more": _pickled(Reduce(pickle.loads, _pickled(Reduce(os.system, command)))),
        "torch loads more": b"ctorch.storage\n_load_from_bytes\n" + _pickled_bytes(Reduce(os.system, command)),
    }  # fmt: skip


def _pickled_bytes(value: Any) -> bytes:
    inner = _pickled(value)
    return b"B" + struct.pack("<I", len(inner)) + inner + b"\x85R."


@pytest.fixture
def extension() -> Any:
    copyreg.add_extension("os", "system", 0xF0)
    yield
    copyreg.remove_extension("os", "system", 0xF0)


def test_the_hostile_pickles_are_hostile(tmp_path: Path, extension: None) -> None:
    worked = []
    for style, data in hostile(str(tmp_path / "mark")).items():
        with contextlib.suppress(Exception):
            pickle.loads(data)
        if (tmp_path / "mark").exists():
            worked.append(style)
            (tmp_path / "mark").unlink()
    assert len(worked) >= 12  # the others only try


@pytest.mark.parametrize("style", hostile("x"))
@pytest.mark.parametrize("place", ["raw", "legacy", "zip", "beside the weights"])
def test_nothing_in_a_checkpoint_is_run(
    style: str, place: str, tmp_path: Path, extension: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "x.ckpt"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    data = hostile(str(mark))[style]
    if place == "raw":
        path.write_bytes(data)
    elif place == "legacy":
        head = [pickle.dumps(v, 2) for v in (pickles.LEGACY_MAGIC, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(head) + data + pickle.dumps([], 2))
    else:
        make(path, REFINER)
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                if name.endswith("data.pkl"):
                    # The hostile value is made first and dropped, then the genuine content follows.
                    content = data if place == "zip" else data[:-1] + b"0" + content.removeprefix(b"\x80\x02")
                archive.writestr(name, content)
            archive.writestr("x/code/run.py", f"open({str(mark)!r}, 'w')")
    said: list[str] = []
    try:
        tiny_convert(path, tmp_path / "out", said.append)
        assert place == "beside the weights"
        assert "storage" not in style
        assert "not imported" in said[0]
    except WeightsError:
        assert place != "beside the weights" or "storage" in style
        assert not (tmp_path / "out").exists()
    assert not mark.exists()


def test_unknown_objects_beside_the_weights_do_not_stop_a_conversion(tmp_path: Path) -> None:
    """Checkpoints of training frameworks carry settings as objects of classes that are not here."""
    state = tiny.random_state(SHAPES[REFINER])
    path = tmp_path / "x.ckpt"
    torch.save({"hyper_parameters": Path("settings"), "callbacks": {Exception: 1}, "state_dict": state}, path)
    said: list[str] = []
    assert len(tiny_convert(path, tmp_path, said.append)) == 1
    assert "pathlib" in said[0]


def _zip(path: Path, names: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in names.items():
            archive.writestr(name, content)


def _view(offset: int, shape: tuple[int, ...], stride: tuple[int, ...], kind: str = "FloatStorage") -> bytes:
    """A pickle {"a": tensor} of any offset, shape and stride in the storage "0"."""
    storage = b"((" + _text("storage") + f"ctorch\n{kind}\n".encode() + _text("0") + _text("cpu") + b"K\x04tQ"
    numbers = b"".join(_pickled(value)[2:-1] for value in (offset, shape, stride))
    return b"\x80\x02}" + _text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + numbers + b"tRs."


@pytest.mark.parametrize(
    ("view", "said"),
    [
        (_view(0, (5,), (1,)), "beyond its storage"),
        (_view(1, (4,), (1,)), "beyond its storage"),
        (_view(-1, (4,), (1,)), "beyond its storage"),
        (_view(0, (-4,), (1,)), "beyond its storage"),
        (_view(0, (2,), (-1,)), "beyond its storage"),
        (_view(0, (2**40,), (0,)), "beyond its storage"),
        (_view(0, (2**62, 2**62), (1, 1)), "beyond its storage"),
        (_view(0, (2, 2), (1,)), "damaged"),
        (_view(0, (4,), (1,), "StrangeStorage"), "damaged"),
    ],
)
def test_tensors_that_reach_beyond_the_file_are_refused(view: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    _zip(path, {"x/data.pkl": view, "x/data/0": bytes(16)})
    with pytest.raises(WeightsError, match=said):
        pickles.read(path)
    _zip(path, {"x/data.pkl": _view(0, (2, 2), (1, 2)), "x/data/0": struct.pack("<4f", 1, 2, 3, 4)})
    assert pickles.read(path).tensors["a"].read().tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize(
    "names",
    [
        {"x/data.pkl": _view(0, (4,), (1,))},
        {"x/data.pkl": _view(0, (4,), (1,)), "x/data/0": bytes(8)},
        {"x/data.pkl": b"", "x/data/0": bytes(16)},
        {"data.pkl": _view(0, (4,), (1,)), "data/0": bytes(16)},
        {"x/data.pkl": _view(0, (4,), (1,)), "x/data/0": bytes(16), "x/byteorder": b"big"},
        {"x/data.pkl": _view(0, (4,), (1,)), "x/data/0": bytes(16), "y/data.pkl": b"."},
        {"x/data.pkl": b"\x80\x02}."},
    ],
)
def test_zip_archives_that_are_no_checkpoint_are_refused(names: dict[str, bytes], tmp_path: Path) -> None:
    _zip(tmp_path / "x.pt", names)
    with pytest.raises(WeightsError):
        pickles.read(tmp_path / "x.pt")


def _many(count: int, operation: bytes) -> bytes:
    return b"\x80\x04(" + operation * count + b"1}."


PAIRS = b"\x80\x02]q\x00(" + b"K\x01K\x02\x86" * 20_000 + b"e0"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x80\x02}r\xff\xff\xff\xff.", "more operations"),  # a memo of 2**32 places
        (b"\x80\x02}p999999999999\n.", "more operations"),
        (_many(3_000_000, b"\x8f"), "more operations"),  # a set for every byte
        (b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.", "more operations"),  # hashing it would use up the stack
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.", "bytes8"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"x.", "bytearray8"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.", "damaged"),
        (PAIRS + b"(" + b"ccollections\nOrderedDict\nh\x00\x85R" * 200 + b"1}.", "more entries"),
        (_view(0, (4,) * 65, (1,) * 65), "not a tensor"),
        (_view(0, (2**63,), (1,)), "no file has"),
    ],
)
def test_pickles_that_ask_for_much_are_refused_at_once(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    _zip(path, {"x/data.pkl": data, "x/data/0": bytes(16)})
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=said):
            pickles.read(path)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_what_a_pickle_may_use_is_out_of_its_reach(tmp_path: Path) -> None:
    """BUILD sets attributes, also of functions and classes: theirs would outlast the file."""
    defaults = b"N}" + _text("__defaults__") + _text("x") + b"s\x86b0"
    for named in (b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n"):
        for state in (defaults, b"}" + _text("append") + _text("x") + b"sb0"):
            _zip(tmp_path / "x.pt", {"x/data.pkl": b"\x80\x02" + named + state + b"}.", "x/data/0": bytes(16)})
            with pytest.raises(WeightsError):  # it holds no tensors, or is damaged
                pickles.read(tmp_path / "x.pt")
    _zip(tmp_path / "x.pt", {"x/data.pkl": _view(0, (4,), (1,)), "x/data/0": bytes(16)})
    assert pickles.read(tmp_path / "x.pt").tensors["a"].shape == (4,)
    assert pickles.Inert.append is pickles.Inert._ignore
    assert pickles._view.__defaults__ is None


def test_a_registered_extension_is_not_run_from_the_cache_of_another_pickle(tmp_path: Path, extension: None) -> None:
    code = b"\x80\x02\x82\xf0."
    assert pickle.loads(code) is os.system  # from now on the interpreter has it at hand
    reader = pickles._Reader(io.BytesIO(code))
    assert reader.next() is pickles.Inert
    assert reader.refused == {"os.system"}
    assert pickle.loads(code) is os.system  # nor does ours stay there


def test_compressed_and_huge_indices_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"x/data.pkl": _view(0, (4,), (1,)), "x/data/0": bytes(16)}
    _zip(tmp_path / "x.pt", names, zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="not a torch checkpoint"):
        pickles.read(tmp_path / "x.pt")
    _zip(tmp_path / "x.pt", names)
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 10)
    with pytest.raises(WeightsError, match="not a torch checkpoint"):
        pickles.read(tmp_path / "x.pt")
