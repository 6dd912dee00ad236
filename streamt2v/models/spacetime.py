"""Layers that look at each frame, then at the frames of each pixel, and blend the two by a learned share.

They are those of Stable Video Diffusion (arXiv 2311.15127) and take the place of separate temporal layers in `unet3d`,
see `UNet3DConfig.blends_time`. Parameter names are those of diffusers' `UNetSpatioTemporalConditionModel`.

Shapes: B batch, F frames, N = B*F (frames innermost), C channels, h, w feature size, P = h*w pixels, T time embedding.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import torch
from torch import Tensor, nn

from streamt2v.models.layers import (
    Attention,
    FeedForward,
    FrameConv,
    KeysValues,
    ResnetBlock,
    SpatialTransformer,
    TextAttention,
    TimestepEmbedding,
    TransformerBlock,
    as_clips,
    as_images,
)


class TimeMixer(nn.Module):
    """A learned blend a spatial + (1 - a) temporal with a = sigmoid(mix_factor)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        share = self.mix_factor.sigmoid().to(spatial.dtype)
        return share * spatial + (1 - share) * temporal


class FrameResnet(ResnetBlock):
    """A residual block over clips [B, C, F, P]: convolutions over (previous, this, next) frame."""

    def convolution(self, in_channels: int, out_channels: int) -> nn.Module:
        return FrameConv(out_channels)


class SpaceTimeResnet(nn.Module):
    """A residual block per frame, then one over time, blended."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, groups: int) -> None:
        super().__init__()
        self.spatial_res_block = ResnetBlock(in_channels, out_channels, embedding_dim, groups)
        self.temporal_res_block = FrameResnet(out_channels, out_channels, embedding_dim, groups)
        self.time_mixer = TimeMixer()

    def forward(self, x: Tensor, embedding: Tensor, frames: int | None) -> Tensor:
        """Apply to x [N, C, h, w] with time embeddings [B or 1, T]; frames None leaves time out."""
        x = self.spatial_res_block(x, embedding)
        if frames is None:
            return x
        clips = as_clips(x, frames)  # [B, C, F, P]
        return as_images(self.time_mixer(clips, self.temporal_res_block(clips, embedding)), x.shape)


class FrameBlock(TransformerBlock):
    """A transformer block with one more feed-forward layer before it."""

    def __init__(self, dim: int, attn1: Attention, attn2: Attention) -> None:
        super().__init__(dim, attn1, attn2)
        self.norm_in = nn.LayerNorm(dim)
        self.ff_in = FeedForward(dim)

    def forward(self, x: Tensor, context: KeysValues | None = None) -> Tensor:
        return super().forward(x + self.ff_in(self.norm_in(x)), context)


class SpaceTimeTransformer(SpatialTransformer):
    """Attention within each frame, then over the frames of each pixel, which know their number; blended."""

    def __init__(
        self, channels: int, head_dim: int, groups: int, text_attention: TextAttention, time_attention: TextAttention
    ) -> None:
        super().__init__(channels, head_dim, groups, text_attention)
        self_attention = Attention(channels, channels // head_dim, head_dim)
        self.temporal_transformer_blocks = nn.ModuleList([FrameBlock(channels, self_attention, time_attention)])
        self.time_pos_embed = TimestepEmbedding(channels, channels)
        self.time_mixer = TimeMixer()

    def forward(
        self, x: Tensor, text: KeysValues, time_text: KeysValues | None = None, frames: int | None = None
    ) -> Tensor:
        """Apply to x [N, C, h, w]; without `frames` time is left out."""
        hidden = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [N, P, C]
        hidden = self.transformer_blocks[0](hidden, text)
        if frames is not None:
            hidden = self._blend(hidden, time_text, frames)
        return x + self.proj_out(hidden).transpose(1, 2).reshape(x.shape)

    def _blend(self, hidden: Tensor, text: KeysValues | None, frames: int) -> Tensor:
        numbers = torch.arange(frames, device=hidden.device)
        clips = hidden.unflatten(0, (-1, frames))  # [B, F, P, C]
        pixels = (clips + self.time_pos_embed(numbers)[:, None]).transpose(1, 2)  # [B, P, F, C]
        moved = self.temporal_transformer_blocks[0](pixels.flatten(0, 1), text).view_as(pixels)
        return self.time_mixer(clips, moved.transpose(1, 2)).flatten(0, 1)
