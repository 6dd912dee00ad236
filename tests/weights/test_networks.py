"""Weights: what is saved comes back exactly, and nothing else is ever loaded."""

import json
import os
import signal
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, Self

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from streamt2v.errors import OutputError, WeightsError
from streamt2v.models.apm import AppearanceTokens
from streamt2v.models.cam import CamConfig, ConditionalAttention
from streamt2v.models.clip import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from streamt2v.models.dit import SpacetimeConfig, SpacetimeTransformer
from streamt2v.models.interpolator import Interpolator, InterpolatorConfig
from streamt2v.models.prior import EmbeddingPrior, PriorConfig
from streamt2v.models.restorer import PixelCodec, PixelCodecConfig, Restorer, RestorerConfig
from streamt2v.models.unet3d import UNet3D, UNet3DConfig
from streamt2v.models.vae import AutoencoderConfig, AutoencoderKL
from streamt2v.weights import catalog, header, inventory, networks
from streamt2v.weights.tokenizer import clip_tokenizer, load_tokenizer
from tests.weights.conftest import TOY

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


def clip_config(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | more


def small_networks() -> dict[str, torch.nn.Module]:
    """A small network of every class."""
    from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder

    cam = CamConfig(unet=UNET, cond_embed_channels=(4, 4, 8, 8))
    text = clip_config(vocab_size=20, max_position_embeddings=7, projection_dim=4, eos_token_id=3)
    vision = clip_config(image_size=16, patch_size=8, projection_dim=4)
    return {
        "UNet3D": UNet3D(UNET),
        "SpacetimeTransformer": SpacetimeTransformer(SpacetimeConfig(width=12, depth=1, heads=1, text_dim=4)),
        "EmbeddingPrior": EmbeddingPrior(PriorConfig(text_dim=4, image_dim=4, width=8, depth=1)),
        "Restorer": Restorer(RestorerConfig(block_out_channels=(8,), blocks=2, embedding=8)),
        "PixelCodec": PixelCodec(PixelCodecConfig()),
        "ConditionalAttention": ConditionalAttention(cam),
        "AppearanceTokens": AppearanceTokens(**TOY),
        "Interpolator": Interpolator(InterpolatorConfig(widths=(8, 4), layers=1, head_width=4, features=2)),
        "AutoencoderKL": AutoencoderKL(AutoencoderConfig(block_out_channels=(8,), norm_num_groups=2)),
        "AutoencoderKLTemporalDecoder": AutoencoderKLTemporalDecoder(block_out_channels=(32,)),
        "CLIPTextModel": CLIPTextModel(CLIPTextConfig(**text)),
        "CLIPTextModelWithProjection": CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        "CLIPVisionModelWithProjection": CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)),
    }


def tiny(root: Path) -> catalog.Family:
    return catalog.family("tiny", root)


# ------------------------------------------------------------------------------------------------------- one file


def test_there_is_a_test_network_of_every_class() -> None:
    assert set(small_networks()) == set(networks.NETWORKS)


@pytest.mark.parametrize("name", sorted(networks.NETWORKS))
def test_every_network_comes_back_as_it_was_saved(name: str, tmp_path: Path) -> None:
    network = small_networks()[name].half().float()
    path = tmp_path / "network.safetensors"
    networks.save_module(path, network, {"kind": "scaled_linear"})
    loaded = networks.load_module(path, "cpu", torch.float32)
    assert type(loaded) is type(network)
    assert not loaded.training
    wanted, found = network.state_dict(), loaded.state_dict()
    assert list(wanted) == list(found)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    # Buffers that no file stores (position numbers) must be there too, with their values.
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffers[key], value) for key, value in network.named_buffers())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())
    assert header.read_header(path)[0] == name
    assert header.read_header(path)[2] == {"kind": "scaled_linear"}


def test_storage_is_half_precision_and_a_schedule_is_optional(file: Path, apm: AppearanceTokens) -> None:
    assert file.stat().st_size < 2 * sum(p.numel() for p in apm.parameters()) + 1000
    assert file.stat().st_mode & 0o777 == 0o644
    assert header.read_header(file) == ("AppearanceTokens", TOY, None)
    loaded = networks.load_module(file, "cpu", torch.float64)
    assert torch.equal(loaded.state_dict()["linear_1.weight"], apm.linear_1.weight.half().double())


def test_saving_refuses_what_would_not_load(tmp_path: Path, apm: AppearanceTokens) -> None:
    path = tmp_path / "apm.safetensors"
    with pytest.raises(WeightsError, match="unknown class 'Linear'"):
        networks.save_module(path, torch.nn.Linear(2, 2))
    with pytest.raises(WeightsError, match=r"'linear_1\.weight' has shape"):
        apm.config["hidden_dim"] = 6
        networks.save_module(path, apm)
    apm.config["hidden_dim"] = 5
    with torch.no_grad():
        apm.linear_2.bias[0] = 1e6  # beyond float16
    with pytest.raises(WeightsError, match=r"linear_2\.bias .* not finite"):
        networks.save_module(path, apm)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError):
        networks.save_module(Path("/proc/nowhere/apm.safetensors"), AppearanceTokens(**TOY))


def rewrite(path: Path, change: Any, **metadata: str) -> None:
    """Write the file again with other tensors or metadata."""
    tensors = {key: value.half() for key, value in AppearanceTokens(**TOY).state_dict().items()}
    change(tensors)
    names = {"format": header.FORMAT, "class": "AppearanceTokens", "config": json.dumps(TOY)} | metadata
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
        networks.load_module(path, "cpu", torch.float32)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"x\.safetensors cannot be read"):
        networks.load_module(tmp_path / "x.safetensors", "cpu", torch.float32)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 500))
def test_every_truncation_is_refused(file: Path, cut: int) -> None:
    whole = file.read_bytes()
    path = file.with_name("cut.safetensors")
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    with pytest.raises(WeightsError):
        networks.load_module(path, "cpu", torch.float32)


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
            networks.load(chosen, "stream.apm", "cpu", torch.float32)
        assert not inventory.missing(chosen)  # the size is right: only the digest tells
        with pytest.raises(WeightsError, match="damaged"):
            inventory.verify(chosen)
    finally:
        path.write_bytes(whole)


@pytest.mark.slow
def test_seven_thousand_damaged_files_reach_no_network(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, random = tiny(root), Random(8)
    path = chosen.path("stream.apm")
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]

    def flipped() -> bytes:
        damaged = bytearray(whole)
        damaged[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        return bytes(damaged)

    def mutated() -> bytes:
        at, count = random.randrange(start), random.randrange(1, 9)
        put = random.choice([random.randbytes(count), b"", whole[at : at + count] * 2])
        return whole[:at] + put + whole[at + count :]

    def build(*_: object) -> None:
        raise AssertionError("a damaged file reached a network")

    monkeypatch.setattr(networks, "load_module", build)
    kinds = ((1000, flipped), (1000, lambda: whole[: random.randrange(len(whole))]), (5000, mutated))
    for count, damage in kinds:
        for _ in range(count):
            if (content := damage()) == whole:
                continue
            path.write_bytes(content)
            with pytest.raises(WeightsError):
                networks.load(chosen, "stream.apm", "cpu", torch.float32)


def test_a_family_loads_by_role(root: Path, apm: AppearanceTokens) -> None:
    chosen = tiny(root)
    assert chosen.has("stream.apm")
    assert not chosen.has("stream.cam")
    assert chosen.vocabulary_path() is None
    assert chosen.num_bytes == sum(path.stat().st_size for path in (root / "tiny").iterdir())
    loaded = networks.load(chosen, "stream.apm", "cpu", torch.float32)
    assert torch.equal(loaded.linear_1.bias, apm.linear_1.bias.half().float())
    tokenizer = networks.load(chosen, "stream.tokenizer", "cpu", torch.float32)
    assert tokenizer(["ball"], padding="max_length", max_length=7).input_ids == [[1, 0, 0, 0, 0, 0, 0]]
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
            networks.load_module(file, "cpu", torch.float32)
        assert signal.getsignal(sent) is signal.default_int_handler
    finally:
        signal.signal(sent, before)
    assert len(read) == 1  # at once after the tensor


def test_weights_load_in_a_thread_too(file: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(networks.load_module, file, "cpu", torch.float32).result().training is False


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(WeightsError, match="missing"):
        load_tokenizer(path, "!")
    path.write_text("{}")
    with pytest.raises(WeightsError, match="not a tokenizer"):
        load_tokenizer(path, "!")
    path.write_text(clip_tokenizer().to_str())
    with pytest.raises(WeightsError, match="no token '<pad>'"):
        load_tokenizer(path, "<pad>")
