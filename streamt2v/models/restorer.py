"""A small refiner on pixels: a residual video restoration network, and the lossless codec that packs pixels for it.

The codec folds blocks of pixels into channels, so nothing is lost on the way. The network sees the source beside the
noisy latents and returns the source plus a residual; a fresh network returns the source itself. Its trunk works on
whole clips at a quarter and an eighth of the latents' size, where neighbouring frames exchange some channels (temporal
shift, arXiv 1811.08383); the last layers work at the latents' own size, on a frame and the source of its neighbours.

Shapes: B batch, F frames, N = B*F (frames innermost), C channels, h, w latent cells.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamt2v.config import Table
from streamt2v.errors import ConfigError
from streamt2v.models.layers import zero_init
from streamt2v.models.unet3d import Conditioning

CELLS_AT_ONCE = 360 * 640
"""Cells of frames that pass the finest layers together, where it is more than one frame: bounds their memory."""
DETAIL = 5.0
"""Detail is amplified by so much, to be about as large as tones are."""
_FREQUENCIES = 8


@dataclass(frozen=True)
class RestorerConfig(Table):
    """Sizes of a restoration network."""

    out_channels: int = 12
    """Channels of a latent: 3 colours of `factor` x `factor` pixels."""
    block_out_channels: tuple[int, ...] = (32, 64, 96)
    """Widths at the latents' own size, at a quarter and at an eighth of it."""
    layers_per_block: tuple[int, ...] = (2, 2, 2)
    """Residual blocks at each size."""
    embedding: int = 64
    """Width of the embedding of noise level and scale."""

    def __post_init__(self) -> None:
        if len(self.block_out_channels) != 3 or len(self.layers_per_block) != 3:
            raise ConfigError("a restoration network has three levels")
        if any(width % 8 for width in self.block_out_channels):
            raise ConfigError(f"widths {self.block_out_channels} must be multiples of 8")

    def accepts(self, height: int, width: int) -> bool:
        """Tell whether latents of height x width come back with their own size: each is divided by 8."""
        return height > 0 and width > 0 and height % 8 == 0 and width % 8 == 0


class Residual(nn.Module):
    """Two convolutions added to their input; the first sees a part of the channels of the frames before and after."""

    def __init__(self, channels: int, embedding: int, temporal: bool) -> None:
        super().__init__()
        self.shifted = channels // 8 if temporal else 0
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.embedding = nn.Linear(embedding, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor, frames: int) -> Tensor:
        """Transform x [N, C, h, w] with an embedding [N, E]."""
        y = self.conv1(shift_frames(x, frames, self.shifted) if self.shifted else x)
        gain, shift = self.embedding(embedding)[:, :, None, None].chunk(2, 1)
        # In place, as such layers spend as much time on moving numbers as on computing them.
        y = F.leaky_relu(torch.addcmul(shift, y, 1 + gain), 0.1, inplace=True)
        return self.conv2(y).add_(x)


def shift_frames(x: Tensor, frames: int, channels: int) -> Tensor:
    """Take the first `channels` of x [N, C, h, w] from the frame before and the next from the frame after.

    Where there is no such frame the frame keeps its own.
    """
    clip = x.unflatten(0, (-1, frames))
    before, after = clip[:, :, :channels], clip[:, :, channels : 2 * channels]
    before = torch.cat([before[:, :1], before[:, :-1]], 1)
    after = torch.cat([after[:, 1:], after[:, -1:]], 1)
    return torch.cat([before, after, clip[:, :, 2 * channels :]], 2).flatten(0, 1)


def detail_and_tone(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Split latents [N, 3 k, h, w] of k pixels a cell into detail of their size, amplified, and tones [N, 3, h, w].

    A tone is the mean of 3 x 3 cells.
    """
    pixels = latents.unflatten(1, (3, -1))
    tones = F.avg_pool2d(F.pad(pixels.mean(2), (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (DETAIL * (pixels - tones.unsqueeze(2))).flatten(1, 2), tones


def as_frames(clips: Tensor) -> Tensor:
    """View clips [B, C, F, h, w] as frames [N, C, h, w]."""
    return clips.transpose(1, 2).flatten(0, 1)


class Restorer(nn.Module):
    """The refiner of pixels: predicts clean latents from noisy ones and the source."""

    narrow = True
    """bfloat16 is good enough for it: what it adds to the source is small."""

    def __init__(self, config: RestorerConfig) -> None:
        super().__init__()
        self.config = config
        fine, middle, coarse = config.block_out_channels

        def blocks(level: int, count: int) -> nn.ModuleList:
            width = config.block_out_channels[level]
            return nn.ModuleList(Residual(width, config.embedding, temporal=level > 0) for _ in range(count))

        counts = config.layers_per_block
        self.embed = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES + 2, config.embedding), nn.SiLU(), nn.Linear(config.embedding, config.embedding)
        )
        self.enter = nn.Conv2d(2 * config.out_channels + 3, middle, 4, stride=4)
        self.before = blocks(1, counts[1] - 1)
        self.down = nn.Conv2d(middle, coarse, 2, stride=2)
        self.inner = blocks(2, counts[2])
        self.up = nn.Conv2d(coarse, 4 * middle, 1)
        self.after = blocks(1, 1)
        self.conv_in = nn.Conv2d(4 * config.out_channels, fine, 3, padding=1)
        self.spread = nn.Conv2d(middle, 16 * fine, 1)
        self.fine = blocks(0, counts[0])
        self.conv_out = nn.Conv2d(fine, config.out_channels, 3, padding=1)
        zero_init(self.conv_out)
        for layer in (self.conv_in, self.enter):  # noise would drown all else before it is known what it is for
            with torch.no_grad():
                layer.weight[:, : config.out_channels].zero_()

    def prepare(self, scale: float) -> Conditioning:
        """Return what depends on neither timestep nor frame: how many times the source was enlarged, at least 1.

        No text is read, so both rows of guidance are alike.
        """
        weight = self.conv_out.weight
        return Conditioning((), torch.full((2, 1), math.log2(scale), device=weight.device))

    def forward(self, latents: Tensor, timestep: Tensor | float, conditioning: Conditioning, source: Tensor) -> Tensor:
        """Predict clean latents; see `run`."""
        return self.run(latents, timestep, conditioning, None, None, source)[0]

    def run(
        self, latents: Tensor, timestep: Tensor | float, conditioning: Conditioning, cam: None, deep: Tensor | None,
        source: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Predict clean latents, and return them with the features [N, C, h/4, w/4] of the coarse levels.

        Args:
            latents: noisy latents [B, C, F, h, w], any F >= 1.
            timestep: training index 0..999, one or one per batch item.
            conditioning: result of `prepare`, or log2 of the scale [B, 1] as its `pooled`.
            cam: None; the network knows no CAM.
            deep: features of an earlier step; given, only the finest level is computed.
            source: clean latents of the source, of one clip or of each.

        Raises:
            ConfigError: the size does not fit.
        """
        batch, _, frames, height, width = latents.shape
        if not self.config.accepts(height, width):
            raise ConfigError(f"latents of {height}x{width} do not fit this network", "both must be multiples of 8")
        embedding = self._embedding(timestep, conditioning, batch).repeat_interleave(frames, 0)
        noisy, given = (as_frames(clip) for clip in (latents, source.expand_as(latents)))  # each [N, C, h, w]
        at_once = max(1, CELLS_AT_ONCE // (height * width))
        pieces = [slice(at, at + at_once) for at in range(0, batch * frames, at_once)]
        if deep is None:
            x = torch.cat([self.enter(self._seen(noisy[piece], given[piece], whole=True)) for piece in pieces])
            deep = self._coarse(x, embedding, frames)
        place = torch.arange(batch * frames, device=latents.device).view(batch, frames)
        before = torch.cat([place[:, :1], place[:, :-1]], 1).flatten()
        after = torch.cat([place[:, 1:], place[:, -1:]], 1).flatten()
        clean = torch.empty_like(given)
        for piece in pieces:
            seen = self._seen(noisy[piece], given[piece], given[before[piece]], given[after[piece]])
            residual = self._finest(seen, deep[piece], embedding[piece])
            clean[piece] = given[piece] + residual.to(given.dtype)
        return clean.unflatten(0, (batch, frames)).transpose(1, 2), deep

    def _seen(self, noisy: Tensor, given: Tensor, *neighbours: Tensor, whole: bool = False) -> Tensor:
        """Return what convolutions see: what was noised and the fine detail of frames, and their tones if `whole`.

        Pixels are nearly all tone, detail is what is to be restored: taken apart, it is learned many times as fast.
        """
        details, tones = zip(*map(detail_and_tone, (given, *neighbours)), strict=True)
        seen = torch.cat([noisy - given, *details, *(tones if whole else ())], 1)
        return seen.to(self.conv_out.weight.dtype).contiguous(memory_format=torch.channels_last)

    def _embedding(self, timestep: Tensor | float, conditioning: Conditioning, batch: int) -> Tensor:
        """Embed noise level and scale: [B, E]."""
        like = self.conv_out.weight
        times = torch.as_tensor(timestep, device=like.device).float().reshape(-1, 1).expand(batch, 1) / 1000
        scales = cast(Tensor, conditioning.pooled).float()
        scales = scales.repeat_interleave(batch // len(scales), 0)
        waves = times * (math.pi / 4 * 2 ** torch.arange(_FREQUENCIES, device=like.device))
        # Of the scale no waves: any may be asked for, between those of the training. From 1 to 2 it matters most.
        return self.embed(torch.cat([waves.sin(), waves.cos(), scales, 2 * 2**-scales], 1).to(like.dtype))

    def _coarse(self, x: Tensor, embedding: Tensor, frames: int) -> Tensor:
        for block in self.before:
            x = block(x, embedding, frames)
        y = self.down(x)
        for block in self.inner:
            y = block(y, embedding, frames)
        x = F.pixel_shuffle(self.up(y), 2).add_(x)
        for block in self.after:
            x = block(x, embedding, frames)
        return x

    def _finest(self, seen: Tensor, deep: Tensor, embedding: Tensor) -> Tensor:
        x = self.conv_in(seen).add_(F.pixel_shuffle(self.spread(deep), 4))
        x = F.leaky_relu(x, 0.1, inplace=True)
        for block in self.fine:
            x = block(x, embedding, 1)
        return self.conv_out(x)


@dataclass(frozen=True)
class PixelCodecConfig(Table):
    """Sizes of a pixel codec, in the terms of a library autoencoder: the side of a cell doubles with every level."""

    block_out_channels: tuple[int, ...] = (3, 3)
    scaling_factor: float = 1.0


class PixelCodec(nn.Module):
    """Packs blocks of pixels into channels and back, with the interface of a library autoencoder; nothing is lost.

    Latents are of 16 bit, in which pixels of 8 bit are exact to a tenth of a level: they are as large as the pictures.
    """

    latent_dtype = dtype = torch.float16
    lossless = True

    def __init__(self, config: PixelCodecConfig) -> None:
        super().__init__()
        self.config = config
        factor = 2 ** (len(config.block_out_channels) - 1)
        self.encoder, self.decoder = nn.PixelUnshuffle(factor), nn.PixelShuffle(factor)

    def encode(self, frames: Tensor) -> Any:
        """Pack frames [F, 3, H, W]: an object with `latent_dist.mean` and `.std` [F, 3 factor^2, h, w]."""
        mean = self.encoder(frames)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.zeros_like(mean)))

    def decode(self, latents: Tensor) -> Any:
        """Unpack latents: an object with `sample` [F, 3, H, W]."""
        return SimpleNamespace(sample=self.decoder(latents))
