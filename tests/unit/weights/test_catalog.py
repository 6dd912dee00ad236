"""Weights: what is saved comes back exactly, and nothing else is ever loaded."""

import json
import os
import signal
import struct
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, Self

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from streamt2v.errors import ConfigError, OutputError, WeightsError
from streamt2v.models.apm import AppearanceTokens
from streamt2v.models.cam import CamConfig, ConditionalAttention
from streamt2v.models.unet3d import UNet3D, UNet3DConfig
from streamt2v.weights import catalog as weights

UNET = UNet3DConfig(
    block_out_channels=(8, 16),
    attention_levels=(True, True),
    layers_per_block=1,
    cross_attention_dim=8,
    attention_head_dim=4,
    norm_num_groups=2,
    text_tokens=6,
    pooled_text_dim=8,
    frame_codes=True,
)
TOY = {"embed_dim": 4, "hidden_dim": 5, "num_tokens": 2, "context_dim": 3}
MANIFEST = """# a comment that stays
schema = 1

[families.tiny]
title = "for tests"
licence = "Apache-2.0"
preset = "demo"
vocabulary = ""

[families.tiny.components]
stream.apm = "tiny/apm.safetensors"
stream.tokenizer = "tiny/tokenizer.json"

[[files]]
path = "tiny/apm.safetensors"
bytes = 0
sha256 = ""
licence = "Apache-2.0"
what = "a \\"toy\\""

[[files]]
path = "tiny/tokenizer.json"
bytes = 0
sha256 = ""
licence = "Apache-2.0"
what = "words"
tokens = { pad_token = "<pad>", model_max_length = 7 }
"""


def clip_config(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | more


def networks() -> dict[str, torch.nn.Module]:
    """A small network of every class."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    cam = CamConfig(unet=UNET, cond_embed_channels=(4, 4, 8, 8))
    text = clip_config(vocab_size=20, max_position_embeddings=7, projection_dim=4, bos_token_id=1, eos_token_id=3)
    vision = clip_config(image_size=16, patch_size=8, projection_dim=4)
    return {
        "UNet3D": UNet3D(UNET),
        "ConditionalAttention": ConditionalAttention(cam),
        "AppearanceTokens": AppearanceTokens(**TOY),
        "AutoencoderKL": AutoencoderKL(block_out_channels=(8,), norm_num_groups=2),
        "CLIPTextModel": CLIPTextModel(CLIPTextConfig(**text)),
        "CLIPTextModelWithProjection": CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        "CLIPVisionModelWithProjection": CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)),
    }


@pytest.fixture
def apm() -> AppearanceTokens:
    torch.manual_seed(0)
    return AppearanceTokens(**TOY)


@pytest.fixture
def file(tmp_path: Path, apm: AppearanceTokens) -> Path:
    """A whole weights file of the smallest network."""
    path = tmp_path / "apm.safetensors"
    weights.save_module(path, apm)
    return path


@pytest.fixture
def root(tmp_path: Path, apm: AppearanceTokens) -> Path:
    """A package folder with one family, recorded."""
    from tokenizers import Tokenizer, models

    folder = tmp_path / "package"
    weights.save_module(folder / "tiny" / "apm.safetensors", apm)
    Tokenizer(models.WordLevel({"<pad>": 0, "ball": 1}, unk_token="<pad>")).save(
        str(folder / "tiny" / "tokenizer.json")
    )
    (folder / "weights.toml").write_text(MANIFEST)
    assert weights.record(folder) == ["tiny/apm.safetensors", "tiny/tokenizer.json"]
    return folder


def tiny(root: Path) -> weights.Family:
    return weights.family("tiny", root)


# ------------------------------------------------------------------------------------------------------- one file


def test_there_is_a_test_network_of_every_class() -> None:
    assert set(networks()) == set(weights.NETWORKS)


@pytest.mark.parametrize("name", sorted(weights.NETWORKS))
def test_every_network_comes_back_as_it_was_saved(name: str, tmp_path: Path) -> None:
    network = networks()[name].half().float()
    path = tmp_path / "network.safetensors"
    weights.save_module(path, network, {"kind": "scaled_linear"})
    loaded = weights.load_module(path, "cpu", torch.float32)
    assert type(loaded) is type(network)
    assert not loaded.training
    wanted, found = network.state_dict(), loaded.state_dict()
    assert list(wanted) == list(found)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    # Buffers that no file stores (position numbers) must be there too, with their values.
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffers[key], value) for key, value in network.named_buffers())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())
    assert weights.read_header(path)[0] == name
    assert weights.read_header(path)[2] == {"kind": "scaled_linear"}


def test_storage_is_half_precision_and_a_schedule_is_optional(file: Path, apm: AppearanceTokens) -> None:
    assert file.stat().st_size < 2 * sum(p.numel() for p in apm.parameters()) + 1000
    assert file.stat().st_mode & 0o777 == 0o644
    assert weights.read_header(file) == ("AppearanceTokens", TOY, None)
    loaded = weights.load_module(file, "cpu", torch.float64)
    assert torch.equal(loaded.state_dict()["linear_1.weight"], apm.linear_1.weight.half().double())


def test_saving_refuses_what_would_not_load(tmp_path: Path, apm: AppearanceTokens) -> None:
    path = tmp_path / "apm.safetensors"
    with pytest.raises(WeightsError, match="unknown class 'Linear'"):
        weights.save_module(path, torch.nn.Linear(2, 2))
    with pytest.raises(WeightsError, match=r"'linear_1\.weight' has shape"):
        apm.config["hidden_dim"] = 6
        weights.save_module(path, apm)
    apm.config["hidden_dim"] = 5
    with torch.no_grad():
        apm.linear_2.bias[0] = 1e6  # beyond float16
    with pytest.raises(WeightsError, match=r"linear_2\.bias .* not finite"):
        weights.save_module(path, apm)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError):
        weights.save_module(Path("/proc/nowhere/apm.safetensors"), AppearanceTokens(**TOY))


def rewrite(path: Path, change: Any, **metadata: str) -> None:
    """Write the file again with other tensors or metadata."""
    tensors = {key: value.half() for key, value in AppearanceTokens(**TOY).state_dict().items()}
    change(tensors)
    names = {"format": weights.FORMAT, "class": "AppearanceTokens", "config": json.dumps(TOY)} | metadata
    save_file(tensors, path, names)


@pytest.mark.parametrize(
    ("change", "metadata", "said"),
    [
        (lambda t: t.pop("linear_2.bias"), {}, r"lacks the tensor 'linear_2\.bias' of AppearanceTokens"),
        (lambda t: t.update(more=torch.zeros(1)), {}, "a tensor 'more' that AppearanceTokens does not know"),
        (
            lambda t: t.update({"linear_1.bias": torch.zeros(9)}),
            {},
            r"'linear_1\.bias' has shape \[9\], .* needs \[5\]",
        ),
        (lambda t: None, {"class": "Pickle"}, "unknown class 'Pickle'"),
        (lambda t: None, {"format": "other/7"}, "format 'other/7', expected 'streamt2v/1'"),
        (lambda t: None, {"config": "{"}, "damaged metadata"),
        (lambda t: None, {"config": "[]"}, "damaged metadata"),
        (lambda t: None, {"config": '{"hidden": 1}'}, "does not describe a AppearanceTokens"),
        (lambda t: None, {"class": "UNet3D"}, "does not describe a UNet3D: unknown setting"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, change: Any, metadata: dict[str, str], said: str) -> None:
    path = tmp_path / "apm.safetensors"
    rewrite(path, change, **metadata)
    with pytest.raises(WeightsError, match=said):
        weights.load_module(path, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a safetensors file"),
        (b"text", "not a safetensors file"),
        (b"some longer text that is no weights file at all", "not a safetensors file"),
        (struct.pack("<Q", 2**40) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 100) + b"{}", "cut short"),
        (struct.pack("<Q", 2) + b"[]", "header is damaged"),
        (struct.pack("<Q", 2) + b"{]", "header is damaged"),
        (struct.pack("<Q", 2) + b"{}", "format 'none'"),
        (struct.pack("<Q", 2) + b"{}more", "has bytes after its end"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=said) as caught:
        weights.read_header(path)
    assert caught.value.exit_code == 4


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"x\.safetensors cannot be read"):
        weights.load_module(tmp_path / "x.safetensors", "cpu", torch.float32)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 500))
def test_every_truncation_is_refused(file: Path, cut: int) -> None:
    whole = file.read_bytes()
    path = file.with_name("cut.safetensors")
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    with pytest.raises(WeightsError):
        weights.load_module(path, "cpu", torch.float32)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_bit_is_refused(root: Path, data: st.DataObject) -> None:
    chosen = tiny(root)
    path = chosen.path("stream.apm")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        with pytest.raises(WeightsError, match="damaged"):
            weights.load(chosen, "stream.apm", "cpu", torch.float32)
        assert not weights.missing(chosen)  # the size is right: only the digest tells
        with pytest.raises(WeightsError, match="damaged"):
            weights.verify(chosen)
    finally:
        path.write_bytes(whole)


@pytest.mark.slow
def test_seven_thousand_damaged_files_reach_no_network(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, random = tiny(root), Random(8)
    path = chosen.path("stream.apm")
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]

    def flipped() -> bytes:
        damaged = bytearray(whole)
        damaged[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        return bytes(damaged)

    def mutated() -> bytes:
        at, count = random.randrange(header), random.randrange(1, 9)
        put = random.choice([random.randbytes(count), b"", whole[at : at + count] * 2])
        return whole[:at] + put + whole[at + count :]

    def build(*_: object) -> None:
        raise AssertionError("a damaged file reached a network")

    monkeypatch.setattr(weights, "load_module", build)
    kinds = ((1000, flipped), (1000, lambda: whole[: random.randrange(len(whole))]), (5000, mutated))
    for count, damage in kinds:
        for _ in range(count):
            if (content := damage()) == whole:
                continue
            path.write_bytes(content)
            with pytest.raises(WeightsError):
                weights.load(chosen, "stream.apm", "cpu", torch.float32)


# ---------------------------------------------------------------------------------------------- the list of weights


def test_a_family_loads_by_role(root: Path, apm: AppearanceTokens) -> None:
    chosen = tiny(root)
    assert chosen.has("stream.apm")
    assert not chosen.has("stream.cam")
    assert chosen.vocabulary_path() is None
    assert chosen.num_bytes == sum(path.stat().st_size for path in (root / "tiny").iterdir())
    loaded = weights.load(chosen, "stream.apm", "cpu", torch.float32)
    assert torch.equal(loaded.linear_1.bias, apm.linear_1.bias.half().float())
    tokenizer = weights.load(chosen, "stream.tokenizer", "cpu", torch.float32)
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.model_max_length == 7
    assert tokenizer("ball", padding="max_length")["input_ids"] == [1, 0, 0, 0, 0, 0, 0]
    with pytest.raises(WeightsError, match=r"has no 'stream\.cam'"):
        chosen.path("stream.cam")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_tensor_is_read_stays_a_signal(
    sent: signal.Signals, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch, hit in the middle, clears it and raises a ValueError of its own."""

    class Opened:
        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def get_tensor(self, key: str) -> torch.Tensor:
            try:
                os.kill(os.getpid(), sent)
                time.sleep(1)  # returns early, if the handler raises
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape") from None
            read.append(key)
            return torch.zeros(1)

    read: list[str] = []
    monkeypatch.setattr("safetensors.safe_open", Opened)
    before = signal.signal(sent, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            weights.load_module(file, "cpu", torch.float32)
        assert signal.getsignal(sent) is signal.default_int_handler
    finally:
        signal.signal(sent, before)
    assert len(read) == 1  # at once after the tensor


def test_weights_load_in_a_thread_too(file: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(weights.load_module, file, "cpu", torch.float32).result().training is False


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(WeightsError, match="missing"):
        weights.load_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(WeightsError, match="no tokenizer"):
        weights.load_tokenizer(path)


def test_recording_keeps_comments_and_everything_else(root: Path) -> None:
    text = (root / "weights.toml").read_text()
    assert text.startswith(MANIFEST.partition("[[files]]")[0])
    before, after = tomllib.loads(MANIFEST), tomllib.loads(text)
    assert all(len(row["sha256"]) == 64 and row["bytes"] > 0 for row in after["files"])
    for row in before["files"] + after["files"]:
        del row["sha256"], row["bytes"]
    assert before == after
    assert weights.record(root) == []
    assert (root / "weights.toml").read_text() == text


def test_absent_files_and_other_sizes_are_named(root: Path) -> None:
    chosen = tiny(root)
    assert weights.missing(chosen) == []
    weights.verify(chosen)
    assert weights.default_family(root) == "tiny"
    (root / "tiny" / "tokenizer.json").unlink()
    with chosen.path("stream.apm").open("ab") as stream:
        stream.write(b"more")
    first, second = weights.missing(chosen)
    assert "apm.safetensors has" in first
    assert "tokenizer.json is missing" in second
    for refuse in (weights.require, weights.verify):
        with pytest.raises(WeightsError, match=r"apm\.safetensors has .* \(and 1 more\)"):
            refuse(chosen)
    assert weights.default_family(root) == "tiny"  # the last one is named even so, and then says what it lacks


def test_unknown_models_name_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no model 'dmeo'") as caught:
        weights.family("dmeo")
    assert "did you mean 'demo'?" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        weights.family("completely-different")
    assert "demo" in caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schema = 1", "schema = 2", "schema 2"),
        ('preset = "demo"', "", "'preset'"),
        ('path = "tiny/tokenizer.json"', 'path = "tiny/other.json"', "tokenizer.json"),
        ('"tiny/tokenizer.json"', '"../secret.json"', "outside"),
        ('"tiny/tokenizer.json"', '"/etc/passwd"', "outside"),
        ("bytes = 0", "size = 0", "size"),
        ("[[files]]", "[[files", "cannot be used"),
    ],
)
def test_a_broken_list_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "weights.toml").write_text(MANIFEST.replace(old, new))
    with pytest.raises(WeightsError, match=said):
        weights.families(tmp_path)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="list of weights is missing"):
        weights.families(tmp_path / "nothing")


def test_the_shipped_list_is_sound() -> None:
    """Every listed family has a licence for each file, and each listed file has a user."""
    known = weights.families()
    used = {file.path for chosen in known.values() for file in chosen.files}
    listed = tomllib.loads(weights._manifest(weights.PACKAGE).read_text())["files"]
    assert used == {row["path"] for row in listed}
    assert len(listed) == len(used)
    for chosen in known.values():
        assert (weights.PACKAGE / "presets" / f"{chosen.preset}.toml").is_file()
        assert all(file.licence and file.what for file in chosen.files)
        assert {"stream.unet", "stream.vae", "stream.text", "stream.tokenizer"} <= set(chosen.components)


@pytest.mark.weights("demo")
def test_the_shipped_demo_is_whole_and_small() -> None:
    demo = weights.family("demo")
    weights.verify(demo)
    assert demo.num_bytes <= 40e6
