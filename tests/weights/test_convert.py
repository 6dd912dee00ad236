"""Published checkpoints: recognised as a whole, converted tensor by tensor."""

import dataclasses
import errno
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streamt2v import files
from streamt2v.cli.app import main
from streamt2v.errors import InputError, OutputError, WeightsError
from streamt2v.weights import convert, header, networks
from streamt2v.weights.pickles import Stored
from streamt2v.weights.tokenizer import load_tokenizer
from tests import checkpoints as tiny
from tests.checkpoints import CLIP, IFNET, IMAGE_TOWER, REFINER, STREAM, STREAMING_SVD, VAE, VIDXTEND

LAYOUTS = tiny.tiny_layouts()
SHAPES = tiny.published_shapes(LAYOUTS)


def stored(shapes: tiny.Shapes) -> dict[str, Stored]:
    """Tensors of which only the names and shapes count."""
    return {key: Stored(Path("none"), "F32", shape, (), 0) for key, shape in shapes.items()}


def silent(_: str) -> None:
    pass


def make(path: Path, file: str, state: tiny.State | None = None) -> tiny.State:
    """Write a tiny checkpoint of the kind `file` in the form its ending asks for."""
    state = tiny.random_state(SHAPES[file]) if state is None else state
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(5)}}
        extra = {"epoch": 3, "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-5}]}]}
        torch.save({"state_dict": OrderedDict(state), **extra}, path)
    return state


def tiny_convert(source: Path, destination: Path, note: Callable[[str], None] = silent) -> list[Path]:
    return convert.convert(source, destination, note, LAYOUTS)


def loaded(folder: Path, name: str) -> tiny.State:
    return networks.load_module(folder / f"{name}.safetensors", "cpu", torch.float16).state_dict()


# ------------------------------------------------------------------------------------------- which keys become what


@pytest.fixture(scope="module")
def published() -> dict[str, tiny.Shapes]:
    """Every tensor of every published file at its real size: recorded where there is a record."""
    made = tiny.published_shapes(convert.LAYOUTS)
    recorded = tiny.manifests()
    assert made[STREAM] == recorded[STREAM]
    assert made[REFINER] == recorded[REFINER]
    for file in (VAE, CLIP):
        assert recorded[file].items() <= made[file].items()
    return made


def test_the_record_is_the_published_one() -> None:
    recorded = tiny.manifests()
    assert {file: len(tensors) for file, tensors in recorded.items()} == {
        STREAM: 3407,
        REFINER: 1480,
        VAE: 248,
        CLIP: 294,
        STREAMING_SVD: 3246,
    }


@pytest.mark.parametrize("file", convert.LAYOUTS)
def test_every_published_key_is_mapped_once_or_ignored_with_a_reason(
    file: str, published: dict[str, tiny.Shapes]
) -> None:
    layout, found = convert._plan(file, stored(published[file]), convert.LAYOUTS)
    assert layout is convert.LAYOUTS[file]
    for name, network in found.items():
        targets = [target for _, found, _ in network.sources for target in found]
        assert len(targets) == len(set(targets))
        assert set(targets) == set(network.shapes)
        assert name in tiny.SMALL
    for key in published[file]:
        uses = [renamed for part in layout.parts.values() if (renamed := part.keys.rename(key)) is not None]
        assert sum(bool(targets) for targets, _ in uses) <= 1
        assert uses or key.startswith(tuple(layout.ignored))
    assert all(layout.ignored.values())


def test_a_published_network_of_another_size_is_refused(published: dict[str, tiny.Shapes]) -> None:
    shapes = published[STREAM] | {"base_model.mid_block.resnets.0.conv1.weight": (1280, 1280, 3, 1)}
    with pytest.raises(WeightsError, match=r"mid_block\.resnets\.0\.conv1\.weight' has shape"):
        convert._plan("x.ckpt", stored(shapes), convert.LAYOUTS)


@pytest.mark.parametrize("file", SHAPES)
def test_a_key_too_few_or_too_many_is_named(file: str) -> None:
    parts = LAYOUTS[file].parts.values()
    key = next(key for key in SHAPES[file] if any((part.keys.rename(key) or [()])[0] for part in parts))
    less = {name: shape for name, shape in SHAPES[file].items() if name != key}
    with pytest.raises(WeightsError, match="lacks"):
        convert._plan(file, stored(less), LAYOUTS)
    for extra in ("conv_inn.weight", f"{key}.more"):
        with pytest.raises(WeightsError, match=extra):
            convert._plan(file, stored(SHAPES[file] | {extra: (1,)}), LAYOUTS)
    with pytest.raises(WeightsError, match="shape"):
        convert._plan(file, stored(SHAPES[file] | {key: (3, 5, 7)}), LAYOUTS)


def test_a_prefix_does_not_decide() -> None:
    """`unet.` is the base model in one published copy and CAM in the other."""
    for file, base in ((STREAM, "base_model."), (VIDXTEND, "unet.")):
        layout, found = convert._plan("any name", stored(SHAPES[file]), LAYOUTS)
        assert layout is LAYOUTS[file]
        assert LAYOUTS[file].parts["stream/unet"].keys.prefix == base
        assert "cam_mergers.mid.norm.weight" in found["stream/unet"].shapes
    flat = {key.replace("text_encoder.text_model.", "text_encoder."): shape for key, shape in SHAPES[VIDXTEND].items()}
    assert convert._plan("newer names", stored(flat), LAYOUTS)[0] is LAYOUTS[VIDXTEND]


def test_other_models_and_whole_numbers_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"not a known checkpoint.* 'lora_up\.weight'"):
        convert._plan("x", stored({"lora_up.weight": (2, 2)}), LAYOUTS)
    whole = stored(SHAPES[REFINER])
    whole["out.2.bias"] = dataclasses.replace(whole["out.2.bias"], dtype="I64")
    with pytest.raises(WeightsError, match=r"'out\.2\.bias' holds numbers of type I64"):
        convert._plan("x", whole, LAYOUTS)


# ------------------------------------------------------------------------------------------------- files to files


@pytest.mark.parametrize(
    ("file", "name", "tokenizer"),
    [
        (STREAM, "streaming_t2v.ckpt", "stream/tokenizer.json"),
        (VIDXTEND, "vidxtend.safetensors", "stream/tokenizer.json"),
        (REFINER, "non_ema_0035000.pth", None),
        (VAE, "v2-1_512-ema-pruned.ckpt", None),
        (CLIP, "open_clip_pytorch_model.bin", "refine/tokenizer.json"),
        (IMAGE_TOWER, "model.safetensors", None),
        (STREAMING_SVD, "streaming.safetensors", None),
        (IFNET, "rife_v4.26.safetensors", None),
    ],
)
def test_every_published_file_converts_and_loads(file: str, name: str, tokenizer: str | None, tmp_path: Path) -> None:
    state = make(tmp_path / name, file)
    said: list[str] = []
    written = tiny_convert(tmp_path / name, tmp_path / "out", said.append)
    expected = {f"{part}.safetensors" for part in LAYOUTS[file].parts} | {name for name in [tokenizer] if name}
    assert {path.relative_to(tmp_path / "out").as_posix() for path in written} == expected
    assert sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file()) == sorted(written)
    assert len(said) == len(written)
    for part, described in LAYOUTS[file].parts.items():
        own = {key: value for key, value in state.items() if key.startswith(described.keys.prefix)}
        wanted = described.keys.apply(own)
        found = loaded(tmp_path / "out", part)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key].half()) for key in found)
        network, _, schedule = header.read_header(tmp_path / "out" / f"{part}.safetensors")
        assert (network, schedule) == (described.network, described.schedule)


def test_all_forms_of_a_file_give_the_same_bytes(tmp_path: Path) -> None:
    state = make(tmp_path / "a.safetensors", VIDXTEND)
    torch.save(state, tmp_path / "plain.bin")
    torch.save({"state_dict": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({key: torch.nn.Parameter(value) for key, value in state.items()}, tmp_path / "parameters.pt")
    turned = {key: value.T.contiguous().T if value.ndim == 2 else value for key, value in state.items()}
    torch.save(turned, tmp_path / "strided.ckpt")
    joined = torch.cat([value.flatten() for value in state.values()])
    places = zip(
        state.items(), [0, *torch.tensor([v.numel() for v in state.values()]).cumsum(0).tolist()], strict=False
    )
    torch.save({k: joined[at : at + v.numel()].view(v.shape) for (k, v), at in places}, tmp_path / "shared.ckpt")
    folder = tmp_path / "folder"
    for module in ("unet", "controlnet", "vae", "text_encoder", "resampler"):
        (folder / module).mkdir(parents=True)
        own = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{module}.")}
        save_file({key: value.half() for key, value in own.items()}, folder / module / "model.fp16.safetensors")
        save_file({key: value * 0 for key, value in own.items()}, folder / module / "model.safetensors")
        (folder / module / "model.bin").write_bytes(b"not looked at")
        (folder / module / "config.json").write_text("{}")
    names = ["a.safetensors", "plain.bin", "old.pt", "parameters.pt", "strided.ckpt", "shared.ckpt", "folder"]
    contents = []
    for name in names:
        written = tiny_convert(tmp_path / name, tmp_path / f"{name}-out")
        contents.append({path.name: path.read_bytes() for path in written})
        assert contents[0].keys() == contents[-1].keys()
        for part in LAYOUTS[VIDXTEND].parts:
            first, last = loaded(tmp_path / f"{names[0]}-out", part), loaded(tmp_path / f"{name}-out", part)
            assert all(torch.equal(first[key], last[key]) for key in first)


def test_a_folder_of_checkpoints_is_converted_whole(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for file in (REFINER, VAE, CLIP):
        make(source / file, file)
    (source / "configuration.json").write_text("{}")
    written = tiny_convert(source, tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in written}
    assert names == {
        "refine/unet.safetensors", "refine/vae.safetensors", "refine/text.safetensors", "refine/tokenizer.json",
        "stream/vision.safetensors",
    }  # fmt: skip
    make(source / "again.pth", REFINER)
    with pytest.raises(WeightsError, match=r"has refine/unet twice"):
        tiny_convert(source, tmp_path / "out")
    (source / "again.pth").unlink()
    # A tower that two kinds of published files carry is written once.
    notes: list[str] = []
    make(source / STREAM, STREAM)
    assert len(tiny_convert(source, tmp_path / "all", notes.append)) == 11
    assert f"stream/vision is taken from {CLIP}; {STREAM} has it too" in notes
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "absent.ckpt"):
        with pytest.raises(InputError):
            tiny_convert(nothing, tmp_path / "out")


def test_the_tokenizer_pads_as_the_published_one(tmp_path: Path) -> None:
    make(tmp_path / "x.bin", CLIP)
    tiny_convert(tmp_path / "x.bin", tmp_path)
    tokenizer = load_tokenizer(tmp_path / "refine" / "tokenizer.json", pad="!")
    ids = tokenizer(["A cat", "a " * 100], padding="max_length", truncation=True, max_length=77).input_ids
    assert ids[0] == [49406, 320, 2368, 49407] + [0] * 73
    assert ids[1] == [49406, *[320] * 75, 49407]
    assert tokenizer.backend.get_vocab_size() == 49408
    (uncut,) = tokenizer(["a " * 100]).input_ids
    assert len(uncut) == 102  # so that what is too long can be named
    # Padding with "!", number 0, makes nothing else of one in a text.
    assert tokenizer(["a ball!"]).input_ids == [[49406, 320, 1069, 256, 49407]]


def test_values_beyond_16_bit_are_refused(tmp_path: Path) -> None:
    state = tiny.random_state(SHAPES[REFINER])
    state["out.2.bias"][0] = 1e6
    make(tmp_path / "x.pth", REFINER, state)
    with pytest.raises(WeightsError, match=r"conv_out\.bias has values that are not finite"):
        tiny_convert(tmp_path / "x.pth", tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


# ---------------------------------------------------------------------------------------------------- several parts


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network in several parts, `refine/unet.safetensors`, and the same in one, `whole/refine/unet.safetensors`."""
    make(tmp_path / "x.pth", REFINER)
    tiny_convert(tmp_path / "x.pth", tmp_path / "whole")
    monkeypatch.setattr(convert, "MAX_SHARD_BYTES", 200_000)
    tiny_convert(tmp_path / "x.pth", tmp_path)
    return tmp_path / "refine" / "unet.safetensors"


def test_large_networks_are_split(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = sorted(split.parent.glob("unet-*"))
    assert len(parts) > 2
    assert parts[0].name == f"unet-00001-of-{len(parts):05}.safetensors"
    assert not split.exists()
    assert all(part.stat().st_size < 230_000 for part in parts)
    listed = json.loads((split.parent / "unet.safetensors.index.json").read_text())
    found, whole = loaded(tmp_path, "refine/unet"), loaded(tmp_path / "whole", "refine/unet")
    assert set(listed["weight_map"]) == set(found) == set(whole)
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert header.read_header(split) == header.read_header(tmp_path / "whole" / "refine" / "unet.safetensors")
    # Another number of parts leaves nothing of the first.
    for limit in (500_000, 2**31, 200_000):
        monkeypatch.setattr(convert, "MAX_SHARD_BYTES", limit)
        written = tiny_convert(tmp_path / "x.pth", tmp_path)
        assert sorted(split.parent.iterdir()) == sorted(written)
        assert torch.equal(loaded(tmp_path, "refine/unet")["conv_in.bias"], whole["conv_in.bias"])


def _swap_name(split: Path, name: str) -> None:
    path = header.shard_index(split)
    listed = json.loads(path.read_text())
    listed["weight_map"] = dict.fromkeys(listed["weight_map"], name)
    path.write_text(json.dumps(listed))


def _foreign(split: Path) -> None:
    part = min(split.parent.glob("unet-*"))
    save_file({"a": torch.zeros(1)}, part, {"format": header.FORMAT, "class": "UNet3D", "config": "{}"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda split: min(split.parent.glob("unet-*")).unlink(), "unet-00001-of-.* cannot be read"),
        (lambda split: os.truncate(max(split.parent.glob("unet-*")), 1000), "truncated"),
        (_foreign, "belongs to another file"),
        (lambda split: _swap_name(split, "../unet.safetensors"), "outside its folder"),
        (lambda split: _swap_name(split, split.name), "outside its folder"),
        (lambda split: _swap_name(split, max(split.parent.glob("unet-*")).name), "lacks the tensor"),
        (lambda split: header.shard_index(split).write_text("{}"), "is damaged"),
        (lambda split: header.shard_index(split).write_text("[1]"), "is damaged"),
        (lambda split: header.shard_index(split).unlink(), r"unet\.safetensors cannot be read"),
    ],
)
def test_parts_that_do_not_fit_are_refused(split: Path, change: Callable[[Path], Any], said: str) -> None:
    change(split)
    with pytest.raises(WeightsError, match=said):
        networks.load_module(split, "cpu", torch.float16)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_done(fails: str, split: Path, tmp_path: Path, monkeypatch: Any) -> None:
    before = {path: path.read_bytes() for path in split.parent.iterdir()}
    real, calls = getattr(os, fails), []

    def full(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(files.os, fails, full)
    for destination in (tmp_path / "new", tmp_path):
        calls.clear()
        with pytest.raises(OutputError, match="no space"):
            tiny_convert(tmp_path / "x.pth", destination)
    assert not header.shard_index(tmp_path / "new" / "refine" / "unet.safetensors").exists()
    assert not list(tmp_path.rglob(".*.part"))
    assert {path: path.read_bytes() for path in split.parent.iterdir()} == before


# ------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "old.pt"])
def test_every_truncation_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    state = make(path, REFINER)
    if name == "old.pt":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for cut in (0, 1, 8, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(WeightsError):
            tiny_convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- command line


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_the_command_prints_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert.convert, "__defaults__", (LAYOUTS,))
    make(tmp_path / "x.pth", REFINER)
    assert call("weights", "convert", tmp_path / "x.pth", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/out/refine/unet.safetensors\n"
    assert "tensors" in err
    assert call("weights", "convert", tmp_path / "none.pth", tmp_path / "out") == 3
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04")
    assert call("weights", "convert", tmp_path / "x.pth", tmp_path / "out") == 4
    assert "Traceback" not in capsys.readouterr().err
