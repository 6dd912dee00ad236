"""The conditional attention module (CAM, arXiv 2403.14773 section 4.1): features of the last frames shown.

CAM is a second UNet encoder. It reads the chunk's first noisy latents and, through a small stack of convolutions, the
pixels of the conditioning frames; the mergers of the denoiser (`unet3d.CamMerger`) attend to its features.

Shapes: B batch, Fc conditioning frames, N = B*Fc, C channels.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from streamt2v.config import Table
from streamt2v.errors import ConfigError
from streamt2v.models.layers import zero_init
from streamt2v.models.unet3d import CamFeatures, Conditioning, UNet3DConfig, UNetEncoder


@dataclass(frozen=True)
class CamConfig(Table):
    """Sizes of CAM: those of the encoder, of the pixel stack, and the number of conditioning frames."""

    unet: UNet3DConfig = field(default_factory=UNet3DConfig)
    cond_embed_channels: tuple[int, ...] = (32, 96, 256, 512)
    """Widths of the pixel stack; each after the first halves the frame, so their number fixes the latent factor."""
    num_cond_frames: int = 8
    pixel_norms: bool = False
    """Whether the pixel stack normalises its features: over the channels of each pixel, before the SiLU."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from parsed JSON with `unet` as a mapping."""
        return super().from_dict({**values, "unet": UNet3DConfig.from_dict(values.get("unet", {}))})


class PixelStack(nn.Module):
    """Frames to features of latent size: 3x3 convolutions with SiLU between them; all but the ends may have a norm."""

    def __init__(self, widths: tuple[int, ...], out_channels: int, normed: bool = False) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        channels = [width for pair in pairwise(widths) for width in pair]
        self.norms = nn.ModuleList(nn.LayerNorm(width) if normed else nn.Identity() for width in channels)
        for narrow, wide in pairwise(widths):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        # The encoder starts as a plain copy of the denoiser's.
        zero_init(self.conv_out)

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames [N, 3, H, W] to [N, C, H/8, W/8] (8 for four widths)."""
        x = F.silu(self.conv_in(frames))
        for conv, norm in zip(self.blocks, self.norms, strict=True):
            x = F.silu(norm(conv(x).movedim(1, -1)).movedim(-1, 1))
        return self.conv_out(x)


class ConditionalAttention(UNetEncoder):
    """CAM's feature extractor."""

    def __init__(self, config: CamConfig) -> None:
        super().__init__(config.unet)
        self.config = config
        self.cond_embedding = PixelStack(
            config.cond_embed_channels, config.unet.block_out_channels[0], config.pixel_norms
        )

    def embed_frames(self, frames: Tensor) -> Tensor:
        """Embed conditioning frames [B, Fc, 3, H, W] in [-1, 1] as [B, C0, Fc, h, w], once per chunk."""
        embedded = self.cond_embedding(frames.to(self.conv_in.weight.dtype).flatten(0, 1))  # [N, C0, h, w]
        return embedded.unflatten(0, frames.shape[:2]).transpose(1, 2)

    def forward(
        self,
        latents_first: Tensor,
        timestep: Tensor | float,
        conditioning: Conditioning,
        frame_embedding: Tensor,
        shallow: bool = False,
    ) -> CamFeatures:
        """Extract the features the denoiser's mergers attend to.

        Args:
            latents_first: the chunk's first Fc noisy latents [B, C, Fc, h, w].
            timestep: training index 0..999, one or one per batch item.
            conditioning: result of this module's own `prepare`.
            frame_embedding: result of `embed_frames` [B or 1, C0, Fc, h, w]; one serves all batch items.
            shallow: only what a shallow pass of the denoiser looks at, see `UNet3D.run`.

        Returns:
            One feature [B, C, Fc, h, w] per skip and one of the middle.
        """
        batch, _, frames, _, _ = latents_first.shape
        step = self.begin(latents_first, timestep, conditioning, True, shallow)
        x = self.enter(latents_first, step).unflatten(0, (batch, frames))  # [B, Fc, C0, h, w]
        x = (x + frame_embedding.transpose(1, 2)).flatten(0, 1)  # [N, C0, h, w]
        skips = self.descend(x, step)

        def clips(images: Tensor) -> Tensor:
            return images.unflatten(0, (batch, frames)).transpose(1, 2)  # [B, C, Fc, h, w]

        mid = None if shallow else clips(self.mid_block(skips[-1], step))
        return CamFeatures(tuple(clips(skip) for skip in skips), mid)


def init_from_unet(cam: ConditionalAttention, unet: UNetEncoder) -> None:
    """Copy the denoiser's encoder into CAM, the start of its training; sizes must agree.

    Raises:
        ConfigError: a layer of CAM outside the pixel stack has no counterpart of its shape.
    """
    source = unet.state_dict()
    own = {name: value for name, value in cam.state_dict().items() if not name.startswith("cond_embedding.")}
    for name, value in own.items():
        if name not in source or source[name].shape != value.shape:
            raise ConfigError(f"the denoiser has no layer {name} of shape {tuple(value.shape)} to copy into CAM")
    cam.load_state_dict({name: source[name] for name in own}, strict=False)
