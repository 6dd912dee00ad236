"""The video UNet: equal to the library's on the same weights, an image model when fresh, CAM and APM off by default."""

import pytest
import torch
from diffusers import UNet3DConditionModel

from streamt2v.models.unet3d import TextContext, UNet3D, UNet3DConfig

SMALL = UNet3DConfig(
    block_out_channels=(16, 32, 32),
    attention_levels=(True, True, False),
    layers_per_block=1,
    cross_attention_dim=24,
    attention_head_dim=8,
    transformer_in_heads=8,
    norm_num_groups=4,
)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter a value, zero-initialised ones included."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=draws))


def library_unet(config: UNet3DConfig) -> UNet3DConditionModel:
    kinds = [("CrossAttn" if attention else "") for attention in config.attention_levels]
    return UNet3DConditionModel(
        block_out_channels=config.block_out_channels,
        down_block_types=tuple(f"{kind}DownBlock3D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock3D" for kind in reversed(kinds)),
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
    ).eval()


@pytest.mark.parametrize(
    ("size", "frames", "levels", "layers"),
    [((8, 12), 5, (True, True, False), 1), ((9, 7), 3, (True, True, True), 2), ((8, 8), 1, (False, True, False), 1)],
)
@torch.no_grad()
def test_equals_the_library_unet(size: tuple[int, int], frames: int, levels: tuple[bool, ...], layers: int) -> None:
    config = UNet3DConfig.from_dict(SMALL.to_dict() | {"attention_levels": levels, "layers_per_block": layers})
    ours, theirs = UNet3D(config).eval(), library_unet(config)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    latents, text = torch.randn(2, 4, frames, *size), torch.randn(2, 7, 24)
    timestep = torch.tensor([17, 801])
    expected = theirs(latents, timestep, text).sample
    found = ours(latents, timestep, ours.prepare(TextContext(text)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
