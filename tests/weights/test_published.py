"""The published checkpoints: their key maps are one to one and complete, their networks of the published sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from streamt2v.diffusion.schedules import ScheduleConfig
from streamt2v.errors import WeightsError
from streamt2v.models.apm import AppearanceTokens
from streamt2v.models.cam import CamConfig, ConditionalAttention
from streamt2v.models.unet3d import UNet3D, UNet3DConfig
from streamt2v.weights import published
from streamt2v.weights.keymaps import check_prefixes
from tests.parity import official

State = dict[str, Tensor]


def named(tensors: Any) -> State:
    """Official names as tensors without memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in tensors}


def shapes(build: Callable[[], nn.Module]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {key: value.shape for key, value in build().state_dict().items()}


@pytest.mark.parametrize(
    "sizes",
    [
        {
            "dim": 320,
            "context_dim": 1024,
            "dim_mult": [1, 2, 4, 4],
            "num_heads": 8,
            "head_dim": 64,
            "num_res_blocks": 2,
        },
        {"dim": 32, "context_dim": 16, "dim_mult": [1, 2], "num_heads": 2, "head_dim": 8, "num_res_blocks": 3},
        {"dim": 32, "context_dim": 8, "dim_mult": [1, 1, 2, 1, 2], "num_heads": 1, "head_dim": 32, "num_res_blocks": 1},
    ],
)
def test_the_refiner_maps_one_to_one_at_any_size(sizes: dict[str, Any]) -> None:
    levels, layers = official.attends(sizes), sizes["num_res_blocks"]
    config = UNet3DConfig(
        block_out_channels=tuple(sizes["dim"] * factor for factor in sizes["dim_mult"]),
        attention_levels=tuple(levels),
        layers_per_block=layers,
        cross_attention_dim=sizes["context_dim"],
        attention_head_dim=sizes["head_dim"],
        transformer_in_heads=sizes["num_heads"],
    )
    state = named(official.unet(sizes))
    found = published.refiner_unet(levels, layers).apply(state, shapes(lambda: UNet3D(config)))
    assert len(found) == len(state)


@pytest.mark.parametrize("widths", [(128, 256, 512, 512), (32, 64)])
def test_the_vae_maps_one_to_one_at_any_size(widths: tuple[int, ...]) -> None:
    state = {f"first_stage_model.{key}": value for key, value in named(official.vae(list(widths))).items()}
    expected = shapes(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=2,
        )
    )
    assert len(published.refiner_vae(len(widths)).apply(state, expected)) == len(state)
    others = ["model.diffusion_model.x", "cond_stage_model.y", "betas", "sqrt_alphas_cumprod"]
    check_prefixes([*state, *others], [published.refiner_vae()], published.REFINER_VAE_IGNORED)
    with pytest.raises(WeightsError, match="lora"):
        check_prefixes(["lora.x"], [published.refiner_vae()], published.REFINER_VAE_IGNORED)
    assert all(published.REFINER_VAE_IGNORED.values())


def test_the_text_tower_leaves_its_last_layer_out() -> None:
    state = named(official.text(width=16, layers=4, mlp=32, vocab=30, context=7))
    state |= {"logit_scale": torch.empty(()), "visual.proj": torch.empty(2, 2)}
    config = CLIPTextConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=7,
    )  # fmt: skip
    published.open_clip_text(3).apply(state, shapes(lambda: CLIPTextModel(config)))
    with pytest.raises(WeightsError, match=r"resblocks\.3"):
        published.open_clip_text(2).apply(state)


def test_fused_projections_are_split_in_order() -> None:
    visual = "image_encoder.model.visual."
    block = f"{visual}transformer.resblocks.0."
    state = {
        f"{visual}proj": torch.arange(6.0).view(3, 2),
        f"{block}attn.in_proj_weight": torch.arange(18.0).view(9, 2),
        f"{block}attn.in_proj_bias": torch.arange(9.0),
    }
    found = published.STREAM["vision"].apply(state)
    attention = "vision_model.encoder.layers.0.self_attn."
    assert found[f"{attention}q_proj.weight"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert found[f"{attention}k_proj.bias"].tolist() == [3, 4, 5]
    assert found[f"{attention}v_proj.weight"].tolist() == [[12, 13], [14, 15], [16, 17]]
    assert found["visual_projection.weight"].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_the_published_image_tower_is_complete() -> None:
    """ViT-H-14 with what is left of its text half."""
    width, layers = 1280, 32
    visual = [("class_embedding", (width,)), ("positional_embedding", (257, width)), ("proj", (width, 1024))]
    visual += [("conv1.weight", (width, 3, 14, 14)), *official.norm("ln_pre", width), *official.norm("ln_post", width)]
    blocks = [
        (name, shape)
        for name, shape in official.text(width, layers, 4 * width, 1, 1)
        if name.startswith("transformer.")
    ]
    state = named((f"image_encoder.model.visual.{name}", shape) for name, shape in [*visual, *blocks])
    unused = ["positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.bias"]
    state |= named((f"image_encoder.model.{name}", ()) for name in unused)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, projection_dim=1024, num_hidden_layers=layers,
        num_attention_heads=16, image_size=224, patch_size=14,
    )  # fmt: skip
    published.STREAM["vision"].apply(state, shapes(lambda: CLIPVisionModelWithProjection(config)))


@pytest.mark.parametrize(
    ("file", "part", "values"),
    [
        ("streaming_t2v.ckpt", "stream/unet", 1_480_478_804),
        ("streaming_t2v.ckpt", "stream/cam", 621_981_664),
        ("streaming_t2v.ckpt", "stream/apm", 22_299_904),
        ("streaming_t2v.ckpt", "stream/vae", 83_653_863),
        ("streaming_t2v.ckpt", "stream/text", 340_387_840),
        ("streaming_t2v.ckpt", "stream/vision", 632_076_800),
        ("non_ema_0035000.pth", "refine/unet", 1_411_233_860),
        ("v2-1_512-ema-pruned.ckpt", "refine/vae", 83_653_863),
        ("open_clip_pytorch_model.bin", "refine/text", 340_387_840),
    ],
)
def test_the_published_networks_have_their_published_sizes(file: str, part: str, values: int) -> None:
    found = published.CHECKPOINTS[file].parts[part]
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in found.config.items()}
    builders: dict[str, Callable[[], nn.Module]] = {
        "UNet3D": lambda: UNet3D(UNet3DConfig.from_dict(config)),
        "ConditionalAttention": lambda: ConditionalAttention(CamConfig.from_dict(config)),
        "AppearanceTokens": lambda: AppearanceTokens(**config),
        "AutoencoderKL": lambda: AutoencoderKL(**config),
        "CLIPTextModel": lambda: CLIPTextModel(CLIPTextConfig(**config)),
        "CLIPVisionModelWithProjection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**config)),
    }
    assert sum(shape.numel() for shape in shapes(builders[found.network]).values()) == values
    if found.schedule is not None:
        assert ScheduleConfig.from_dict(found.schedule) == ScheduleConfig.from_dict(
            published.REFINER_SCHEDULE if "ema" in file else {}
        )


def test_every_ignored_key_has_a_reason() -> None:
    maps = [*published.STREAM.values(), published.refiner_unet(), published.refiner_vae(), published.open_clip_text()]
    assert all(rule.reason for key_map in maps for rule in key_map.rules if not rule.targets)
