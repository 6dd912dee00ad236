"""A transformer over patches of space and time, for flow matching: latents of any size and any number of frames.

Every frame of a clip has a noise level of its own, so known frames can be clean while the others are not. Attention
sees how far tokens lie apart (rotary positions in time, rows and columns); where in the picture a token lies, and in
which frame of the clip, is added to it. An anchor frame is one more, clean, frame that lies before the clip.

Shapes: B batch, k frames of latents, C channels of h x w latent cells, n patches a frame, S text tokens, D features.

Sources: arXiv 2212.09748 (transformers for latents, conditioned by scales and shifts), 2104.09864 (rotary positions),
2302.05442 (normalised queries and keys).
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamt2v.config import Table
from streamt2v.errors import ConfigError
from streamt2v.models.layers import sinusoids, zero_init

ANCHOR_TIME = -16
"""The time of an anchor in frames: too early to be taken for the frame before the clip."""
WAVES = 64  # of a noise level
PERIODS = (8.0, 16.0, 32.0, 64.0)  # of the number of a frame
SLOWEST = 100.0  # rotary positions turn by 1 to nearly 1/100 a latent cell, or a frame


@dataclass(frozen=True)
class SpacetimeConfig(Table):
    """Sizes of a transformer; the defaults are those of the demo: 6.5 million parameters."""

    channels: int = 4
    width: int = 192
    depth: int = 8
    heads: int = 6
    patch: tuple[int, int] = (3, 2)
    """Latent cells of a patch, H before W; what a side of a picture lacks is filled up with zeros."""
    text_dim: int = 128

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2 or self.width // self.heads < 6:
            said = f"{self.width} features cannot be divided into {self.heads} heads of an even width of at least 6"
            raise ConfigError(said, "change width or heads")


def patched(latents: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut latents [B, C, k, h, w] into patches [B, k, n, C * rows * columns], row by row, filled up with zeros."""
    rows, columns = patch
    height, width = latents.shape[-2:]
    latents = F.pad(latents, (0, -width % columns, 0, -height % rows))
    cut = latents.unflatten(4, (-1, columns)).unflatten(3, (-1, rows))  # [B, C, k, down, rows, across, columns]
    return cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)


def unpatched(patches: Tensor, patch: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Join patches [B, k, n, C * rows * columns] to latents [B, C, k, h, w] of a size (h, w)."""
    (rows, columns), (height, width) = patch, size
    grid = patches.unflatten(2, (-1, -(-width // columns))).unflatten(4, (-1, rows, columns))
    joined = grid.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)
    return joined[..., :height, :width]


def places(times: Tensor, size: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Return where the middles of patches lie, [k * n, 3]: time, row and column, in frames and latent cells."""
    rows, columns = (-(-extent // side) for extent, side in zip(size, patch, strict=True))
    down, across = (torch.arange(count, device=times.device) + 0.5 for count in (rows, columns))
    grid = torch.meshgrid(times.float(), down * patch[0], across * patch[1], indexing="ij")
    return torch.stack(grid, -1).flatten(0, 2)


def angles(places: Tensor, head_dim: int) -> Tensor:
    """Return by how much each pair of features turns at places [N, 3]: [N, head_dim / 2].

    A third of the pairs turns with rows, a third with columns, the rest with time.
    """
    pairs = head_dim // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    rates = [SLOWEST ** (-torch.arange(share, device=places.device) / share) for share in shares]
    return torch.cat([places[:, axis, None] * rate for axis, rate in enumerate(rates)], -1)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs of features of x [B, heads, N, head_dim] by angles [N, head_dim / 2].

    Products of turned queries and keys depend on the difference of their places alone.
    """
    cosine, sine = angles.cos(), angles.sin()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1).to(x.dtype)


def _normalised(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-6)


class Block(nn.Module):
    """Attention among all patches, attention to the text, two layers for each patch; scaled and shifted by frame."""

    def __init__(self, config: SpacetimeConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = (nn.Parameter(torch.ones(width // config.heads)) for _ in range(2))
        self.to_text_q, self.to_text_out = nn.Linear(width, width), nn.Linear(width, width)
        self.to_text_kv = nn.Linear(config.text_dim, 2 * width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        # A fresh block changes nothing.
        zero_init(self.modulation)
        zero_init(self.to_text_out)

    def forward(self, x: Tensor, condition: Tensor, angles: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Apply to patches.

        Args:
            x: [B, k, n, D].
            condition: of every frame, [B, k, D].
            angles: see `angles`, for k * n places.
            words: features of the text [B, S, text_dim].
            mask: which of them are words, [B, 1, 1, S].
        """
        shift, scale, gate, shift_own, scale_own, gate_own = self.modulation(condition)[:, :, None].chunk(6, -1)
        x = x + gate * self._attend((1 + scale) * self.norm1(x) + shift, angles)
        x = x + self._read(self.norm2(x), words, mask)
        return x + gate_own * self.feed_forward((1 + scale_own) * self.norm3(x) + shift_own)

    def _attend(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = (self._split(part) for part in self.to_qkv(x.flatten(1, 2)).chunk(3, -1))
        q, k = turned(_normalised(q, self.norm_q), angles), turned(_normalised(k, self.norm_k), angles)
        return self.to_out(self._joined(F.scaled_dot_product_attention(q, k, v))).view_as(x)

    def _read(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        q = self._split(self.to_text_q(x.flatten(1, 2)))
        k, v = (self._split(part) for part in self.to_text_kv(words).chunk(2, -1))
        read = F.scaled_dot_product_attention(q, k, v, mask)
        return self.to_text_out(self._joined(read)).view_as(x)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, head_dim]

    def _joined(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class SpacetimeTransformer(nn.Module):
    """Predicts the velocity n - x_0 of noisy latents x = (1 - sigma) x_0 + sigma n, with a sigma for each frame."""

    def __init__(self, config: SpacetimeConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        cells, bearings = config.channels * config.patch[0] * config.patch[1], 2 * len(PERIODS)
        self.embed = nn.Linear(cells, width)
        self.bearing = nn.Linear(3 * bearings, width)
        self.condition = nn.Sequential(
            nn.Linear(WAVES + config.text_dim + bearings, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.words_norm = nn.LayerNorm(config.text_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, cells)
        zero_init(self.modulation)
        zero_init(self.head)

    def forward(self, x: Tensor, sigmas: Tensor, words: Tensor, mask: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Predict the velocity of latents.

        Args:
            x: [B, C, k, h, w].
            sigmas: noise levels of the frames in [0, 1], [B, k]; 0 says that a frame is clean.
            words: features of the text [B, S, text_dim].
            mask: 1 where they are of words, 0 where they fill up, [B, S]; the first one is a word.
            anchor: clean latents [B, C, 1, h, w] of a frame long before.

        Returns:
            Velocities [B, C, k, h, w]; those of clean frames mean nothing.
        """
        times = torch.arange(x.shape[2], device=x.device)
        if anchor is not None:
            x, sigmas = torch.cat([anchor, x], 2), F.pad(sigmas, (1, 0))
            times = F.pad(times, (1, 0), value=ANCHOR_TIME)
        grid = places(times, (x.shape[3], x.shape[4]), self.config.patch)
        bearings = _bearings(grid, (x.shape[3], x.shape[4]))  # [k * n, 3, 2 * len(PERIODS)]
        numbers = bearings[:, 0].unflatten(0, (len(times), -1))[:, 0]  # of the frames
        words, said = self.words_norm(words), mask > 0
        whole = words[torch.arange(len(words), device=x.device), said.sum(1) - 1]  # the last word has read all others
        known = (sinusoids(1000 * sigmas, WAVES), whole[:, None], numbers[None])
        dtype, (rows, frames) = self.embed.weight.dtype, sigmas.shape
        condition = self.condition(torch.cat([part.expand(rows, frames, -1).to(dtype) for part in known], -1))

        patches = patched(x, self.config.patch)
        tokens = self.embed(patches) + self.bearing(bearings.flatten(1).to(dtype)).view(*patches.shape[1:3], -1)
        turns = angles(grid, self.config.width // self.config.heads)
        for block in self.blocks:
            tokens = block(tokens, condition, turns, words, said[:, None, None])
        shift, scale = self.modulation(condition)[:, :, None].chunk(2, -1)
        velocity = self.head((1 + scale) * self.norm(tokens) + shift)
        if anchor is not None:
            velocity = velocity[:, 1:]
        return unpatched(velocity, self.config.patch, (x.shape[3], x.shape[4]))


def _bearings(places: Tensor, size: tuple[int, int]) -> Tensor:
    """Waves of where patches lie [N, 3, 8]: by the number of the frame, and by shares of the height and the width."""
    harmonics = [[2 * math.pi / period for period in PERIODS]]
    harmonics += [[math.pi * number / extent for number in range(1, len(PERIODS) + 1)] for extent in size]
    turns = places[..., None] * torch.tensor(harmonics, device=places.device)
    return torch.cat([turns.cos(), turns.sin()], -1)
