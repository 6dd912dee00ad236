"""A small refiner on pixels: a residual video restoration network, and the lossless codec that packs pixels for it.

The codec folds blocks of pixels into channels, so nothing is lost on the way. The network sees the source, and its
frames before and after, beside the noisy latents, and returns the source plus a residual; a fresh network returns the
source itself. All of it works at the latents' size, where neighbouring frames exchange some channels (temporal shift,
arXiv 1811.08383): a CPU spends its time on convolutions there, not on moving numbers as at the size of the picture.

Shapes: B batch, F frames, N = B*F (frames innermost), C channels, h, w latent cells.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamt2v.config import Table
from streamt2v.errors import ConfigError
from streamt2v.models.layers import zero_init
from streamt2v.models.unet3d import Conditioning

Item = TypeVar("Item")
CELLS_AT_ONCE = 180 * 320
"""Cells of clips that pass a layer as a whole where nothing is learned; larger ones pass frame by frame, for memory."""
DETAIL = 5.0
"""Detail is amplified by so much, to be about as large as tones are."""
RESIDUAL = 0.03
"""What the last layer says is multiplied by so much, to be about as large as the errors of sources are.

An optimizer moves its hundreds of weights a cell by steps of one size: straight in pixels each step would change
residuals by levels, at random, and drown what is learned.
"""
CORING = 1.5 / 127.5
"""How large a change must be to count at the source's own size, where small ones may spoil what is as it should be.

Not while it learns: a network that changes little at first would get no gradient there.
"""
_FREQUENCIES = 8


@dataclass(frozen=True)
class RestorerConfig(Table):
    """Sizes of a restoration network."""

    out_channels: int = 48
    """Channels of a latent: 3 colours of `factor` x `factor` pixels."""
    block_out_channels: tuple[int, ...] = (64,)
    """Width, in a list as other networks have it."""
    blocks: int = 6
    """Residual blocks, at least one."""
    embedding: int = 64
    """Width of the embedding of noise level and scale."""

    def __post_init__(self) -> None:
        if len(self.block_out_channels) != 1 or self.block_out_channels[0] % 8:
            raise ConfigError(f"widths {self.block_out_channels} must be one multiple of 8")
        if self.blocks < 1:
            raise ConfigError("a restoration network has at least one block")

    @property
    def factor(self) -> int:
        """Side of the blocks of pixels that are packed into a latent cell."""
        return math.isqrt(self.out_channels // 3)

    def accepts(self, height: int, width: int) -> bool:
        """Tell whether latents of height x width come back with their own size: all do."""
        return height > 0 and width > 0


class Residual(nn.Module):
    """Two convolutions added to their input; the first sees a part of the channels of the frames before and after."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.shifted = channels // 8
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.embedding = nn.Linear(embedding, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor, frames: int) -> Tensor:
        """Transform x [N, C, h, w] with the embeddings [N, E]."""
        return self._added(shift_frames(x, frames, self.shifted), x, embedding)

    def passing(self, clip: Iterable[Tensor], embedding: Tensor) -> Iterator[Tensor]:
        """Transform the frames [1, C, h, w] of a clip as they come, with the clip's embedding [1, E]."""

        def passed(before: Tensor, x: Tensor, after: Tensor) -> Tensor:
            return self._added(shifted(before, x, after, self.shifted), x, embedding)

        return starmap(passed, neighbours(clip))  # holds nothing while it waits, as the variables of a loop would

    def _added(self, seen: Tensor, x: Tensor, embedding: Tensor) -> Tensor:
        gain, shift = self.embedding(embedding)[:, :, None, None].chunk(2, 1)
        # In place, as such layers spend as much time on moving numbers as on computing them.
        y = F.leaky_relu(torch.addcmul(shift, self.conv1(seen), 1 + gain), 0.1, inplace=True)
        return self.conv2(y).add_(x)


def neighbours(frames: Iterable[Item]) -> Iterator[tuple[Item, Item, Item]]:
    """Yield each frame between the one before and the one after; at an end, where there is none, itself again."""
    coming = iter(frames)
    before = here = next(coming)
    for after in coming:
        yield before, (before := here), (here := after)  # so that two are held while it waits
    yield before, here, here


def shift_frames(x: Tensor, frames: int, channels: int) -> Tensor:
    """Take the first `channels` of x [N, C, h, w] from the frame before and the next from the frame after.

    Where there is no such frame the frame keeps its own. The layout is kept: joined parts would lose it, and
    convolutions would reorder every frame twice.
    """
    moved = torch.empty_like(x)
    to, clip = moved.unflatten(0, (-1, frames)), x.unflatten(0, (-1, frames))
    before, after = slice(channels), slice(channels, 2 * channels)
    to[:, 1:, before], to[:, :1, before] = clip[:, :-1, before], clip[:, :1, before]
    to[:, :-1, after], to[:, -1:, after] = clip[:, 1:, after], clip[:, -1:, after]
    to[:, :, 2 * channels :] = clip[:, :, 2 * channels :]
    return moved


def shifted(before: Tensor, x: Tensor, after: Tensor, channels: int) -> Tensor:
    """The same for one frame x [1, C, h, w] between its neighbours."""
    return torch.cat([before[:, :channels], after[:, channels : 2 * channels], x[:, 2 * channels :]], 1)


def detail_and_tone(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Split latents [N, 3 k, h, w] of k pixels a cell into detail of their size, amplified, and tones [N, 3, h, w].

    A tone is the mean of 3 x 3 cells.
    """
    pixels = latents.unflatten(1, (3, -1))
    tones = F.avg_pool2d(F.pad(pixels.mean(2), (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (DETAIL * (pixels - tones.unsqueeze(2))).flatten(1, 2), tones


def cored(residual: Tensor, least: Tensor) -> Tensor:
    """Shrink values towards zero by `least`, and those below it to zero; where that is 0 all stay.

    A source that was not enlarged may be as it should be, and what is not sure to be better would spoil it.
    """
    # Written as a factor, as each value must have a gradient where nothing is taken off: a fresh residual is all zero.
    return residual * (1 - least / residual.abs().clamp(min=1e-6)).clamp(min=0)


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
        channels, (width,) = config.out_channels, config.block_out_channels
        self.embed = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES + 2, config.embedding), nn.SiLU(), nn.Linear(config.embedding, config.embedding)
        )
        self.conv_in = nn.Conv2d(4 * channels + 3, width, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(width, config.embedding) for _ in range(config.blocks))
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
        zero_init(self.conv_out)
        with torch.no_grad():  # noise would drown all else before it is known what it is for
            self.conv_in.weight[:, :channels].zero_()

    def prepare(self, scale: float) -> Conditioning:
        """Return what depends on neither timestep nor frame: how many times the source was enlarged, at least 1.

        No text is read, so both rows of guidance are alike.
        """
        weight = self.conv_out.weight
        return Conditioning((), torch.full((2, 1), math.log2(scale), device=weight.device))

    def forward(
        self, latents: Tensor, timestep: Tensor | float, conditioning: Conditioning, source: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """Predict clean latents; see `run`."""
        return self.run(latents, timestep, conditioning, None, None, source, keep=False)[0]

    def run(
        self, latents: Tensor, timestep: Tensor | float, conditioning: Conditioning, cam: None, deep: Tensor | None,
        source: Tensor | Sequence[Tensor], keep: bool = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Predict clean latents, and return them with the features [N, C, h, w] before the last block.

        Args:
            latents: noisy latents [B, C, F, h, w], any F >= 1.
            timestep: training index 0..999, one or one per batch item.
            conditioning: result of `prepare`, or log2 of the scale [B, 1] as its `pooled`.
            cam: None; the network knows no CAM.
            deep: features of an earlier step; given, only the last block is computed.
            source: clean latents of the source: of one clip or of each, or frames [C, h, w], for all clips the same.
            keep: whether the features will be asked for; if not, a large clip returns an empty tensor, for memory.
        """
        batch, _, frames, height, width = latents.shape
        scales = cast(Tensor, conditioning.pooled).float().to(latents.device)  # weights may lie on the host
        scales = scales.repeat_interleave(batch // len(scales), 0)
        embedding = self._embedding(timestep, scales)
        least = (0.0 if self.training else CORING) * (2 - 2**scales).clamp(min=0)[:, :, None, None]
        noisy = as_frames(latents)  # [N, C, h, w]
        shown = as_frames(source.expand_as(latents)) if isinstance(source, Tensor) else [*source] * batch
        given = [frame.unsqueeze(0) for frame in shown]  # N times [1, C, h, w]
        last = cast(Residual, self.blocks[-1])
        if torch.is_grad_enabled() or len(noisy) * height * width <= CELLS_AT_ONCE:
            embedding, least = (each.repeat_interleave(frames, 0) for each in (embedding, least))
            clip = torch.cat(given)
            deep = self._deep(noisy, clip, embedding, frames) if deep is None else deep
            clean = self._clean(last(deep, embedding, frames), clip, least)
        else:
            clean, features = torch.empty_like(noisy), deep
            if features is None:
                shape = (len(noisy) if keep else 0, *self.config.block_out_channels, height, width)
                features = latents.new_empty(shape, dtype=last.conv1.weight.dtype)
                features = features.contiguous(memory_format=torch.channels_last)
            for row in range(batch):
                part, told = slice(row * frames, (row + 1) * frames), embedding[row : row + 1]
                x = iter(features[part].split(1))
                if deep is None:
                    passing = self._passing(noisy[part], given[part], told)
                    x = map(Tensor.copy_, x, passing) if keep else passing
                for number, made in enumerate(last.passing(x, told), part.start):
                    clean[number] = self._clean(made, given[number], least[row])[0]
            deep = features
        return clean.unflatten(0, (batch, frames)).transpose(1, 2), deep

    def _deep(self, noisy: Tensor, given: Tensor, embedding: Tensor, frames: int) -> Tensor:
        """Return the features before the last block, of all frames at once."""
        detail, tone = self._parts(given)
        parts = detail.unflatten(0, (-1, frames))
        before = torch.cat([parts[:, :1], parts[:, :-1]], 1).flatten(0, 1)
        after = torch.cat([parts[:, 1:], parts[:, -1:]], 1).flatten(0, 1)
        x = self._first(noisy - given, detail, before, after, tone)
        for block in self.blocks[:-1]:
            x = block(x, embedding, frames)
        return x

    def _passing(self, noisy: Tensor, given: Sequence[Tensor], embedding: Tensor) -> Iterator[Tensor]:
        """Yield the same, of a large clip frame by frame: each layer holds a few frames then, not all of them."""

        def first(noisy: Tensor, frame: Tensor, shown: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
            (before, _), (detail, tone), (after, _) = shown
            return self._first(noisy - frame, detail, before, after, tone)

        x: Iterator[Tensor] = map(first, noisy.split(1), given, neighbours(map(self._parts, given)))
        for block in self.blocks[:-1]:
            x = cast(Residual, block).passing(x, embedding)
        return x

    def _parts(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Detail and tones of frames, ready for a layer."""
        detail, tone = detail_and_tone(given.to(self.conv_out.weight.dtype))
        return self._narrow(detail), self._narrow(tone)

    def _first(self, noise: Tensor, detail: Tensor, before: Tensor, after: Tensor, tone: Tensor) -> Tensor:
        """Apply the first layer to what was noised, the detail of three frames and the tones.

        Pixels are nearly all tone, detail is what is to be restored: taken apart, it is learned many times as fast.
        """
        seen = torch.cat([self._narrow(noise), detail, before, after, tone], 1)
        return F.leaky_relu(self.conv_in(seen), 0.1, inplace=True)

    def _narrow(self, values: Tensor) -> Tensor:
        return values.to(self.conv_out.weight.dtype).contiguous(memory_format=torch.channels_last)

    def _clean(self, x: Tensor, given: Tensor, least: Tensor) -> Tensor:
        return given + cored(RESIDUAL * self.conv_out(x).to(given.dtype), least)

    def _embedding(self, timestep: Tensor | float, scales: Tensor) -> Tensor:
        """Embed noise level and logarithms of the scale [B, 1]: [B, E]."""
        device, dtype = scales.device, self.conv_out.weight.dtype
        times = torch.as_tensor(timestep, device=device).float().reshape(-1, 1).expand(len(scales), 1) / 1000
        waves = times * (math.pi / 4 * 2 ** torch.arange(_FREQUENCIES, device=device))
        # Of the scale no waves: any may be asked for, between those of the training. From 1 to 2 it matters most.
        return self.embed(torch.cat([waves.sin(), waves.cos(), scales, 2 * 2**-scales], 1).to(dtype))


@dataclass(frozen=True)
class PixelCodecConfig(Table):
    """Sizes of a pixel codec, in the terms of a library autoencoder: the side of a cell doubles with every level."""

    block_out_channels: tuple[int, ...] = (3, 3, 3)
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
