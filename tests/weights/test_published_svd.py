"""Key map of the published StreamingSVD file: complete, one to one, strict, at the real size and without memory."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from streamt2v.errors import WeightsError
from streamt2v.models.cam import CamConfig, ConditionalAttention
from streamt2v.models.unet3d import UNet3D, UNet3DConfig
from streamt2v.weights import published_svd
from tests.checkpoints import manifests

State = dict[str, Tensor]
FILE = "streaming_svd.safetensors"
PARTS = published_svd.LAYOUT.parts
TENSORS = {"svd/unet": 1428 + 143, "svd/cam": 629 + 28, "svd/vae": 108 + 266, "svd/vision": 520}
PARAMETERS = {
    "svd/unet": 1_524_623_082 + 68_867_200, "svd/cam": 669_455_377 + 3_589_984, "svd/vae": 34_163_664 + 63_579_183,
    "svd/vision": 632_076_800,
}  # fmt: skip


@cache
def published() -> State:
    return {key: torch.empty(shape, device="meta") for key, shape in manifests()[FILE].items()}


def build(name: str) -> Any:
    part = PARTS[name]
    with torch.device("meta"):
        if part.network == "UNet3D":
            return UNet3D(UNet3DConfig.from_dict(part.config))
        if part.network == "ConditionalAttention":
            return ConditionalAttention(CamConfig.from_dict(part.config))
        if part.network == "AutoencoderKLTemporalDecoder":
            return AutoencoderKLTemporalDecoder(**part.config)
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**part.config))


def test_the_record_is_the_published_one() -> None:
    assert len(published()) == 3246
    assert sum(value.numel() for value in published().values()) == 3_131_732_346


@pytest.mark.parametrize("name", PARTS)
def test_every_network_loads_strictly_at_its_real_size(name: str) -> None:
    network: nn.Module = build(name)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    found = PARTS[name].keys.apply(published(), shapes)
    assert len(found) == TENSORS[name]
    assert sum(value.numel() for value in found.values()) == PARAMETERS[name]
    network.load_state_dict(found, strict=True, assign=True)


def test_every_key_is_mapped_once_or_ignored_with_a_reason() -> None:
    unused = []
    for key in published():
        uses = [part.keys.rename(key) for part in PARTS.values()]
        targets = [use[0] for use in uses if use is not None and use[0]]
        assert len(targets) <= 1, key
        assert any(use is not None for use in uses), key
        if not targets:
            unused.append(key)
    assert all(rule.reason for part in PARTS.values() for rule in part.keys.rules if not rule.targets)
    assert len(unused) == 252
    text = "conditioner.embedders.0.open_clip.model."
    assert {key.removeprefix(text) for key in unused if key.startswith(text)} == {
        "positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.weight",
        "ln_final.bias",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["svd/unet", "svd/cam"])
def test_names_are_those_of_the_library(name: str) -> None:
    """Mergers and pixels apart, and the numbers' embedding, which shares its place with pooled text."""
    with torch.device("meta"):
        library = UNetSpatioTemporalConditionModel()
    theirs = {key: value.shape for key, value in library.state_dict().items()}
    found = {key: value.shape for key, value in PARTS[name].keys.apply(published()).items()}
    for index, layer in enumerate(("0", "2")):
        for end in ("weight", "bias"):
            found[f"add_embedding.linear_{index + 1}.{end}"] = found.pop(f"text_embedding.{layer}.{end}")
    ours = {key: shape for key, shape in found.items() if not key.startswith(("cam_mergers.", "cond_embedding."))}
    if name == "svd/unet":
        assert ours == theirs
    else:
        assert ours == {
            key: s for key, s in theirs.items() if not key.startswith(("up_blocks.", "conv_norm", "conv_out"))
        }


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("svd/unet", "model.diffusion_model.input_blocks.1.2.norm.weight"),
        ("svd/cam", "controlnet.output_blocks.0.0.in_layers.0.weight"),
        ("svd/vae", "lora.weight"),
        ("svd/vision", "conditioner.embedders.0.open_clip.model.visual.extra"),
    ],
)
def test_an_unknown_key_is_refused_by_name(name: str, key: str) -> None:
    with pytest.raises(WeightsError, match="unknown key"):
        PARTS[name].keys.apply(published() | {key: torch.empty(1, device="meta")})


def test_a_missing_key_is_refused_by_name() -> None:
    state = dict(published())
    del state["model.diffusion_model.cross_attention_merger_mid_block.temporal_transformer.proj_out.bias"]
    shapes = {key: value.shape for key, value in build("svd/unet").state_dict().items()}
    with pytest.raises(WeightsError, match=r"lacks 'cam_mergers\.mid\.proj_out\.bias'"):
        PARTS["svd/unet"].keys.apply(state, shapes)
