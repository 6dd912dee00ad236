"""Building blocks of the video UNets: attention, transformers over space and over time, convolutions over both.

Shapes: B batch, F frames, N = B*F (frames innermost), C channels, h, w feature size, P = h*w pixels, S sequence, T time
embedding. Features travel as images [N, C, h, w]; temporal layers look at them as clips [B, C, F, P] and return images.
Parameter names are those of diffusers' `UNet3DConditionModel`.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamt2v.errors import ConfigError
from streamt2v.models.apm import TokenMixing

# CUDA attention kernels take at most 65535 sequences at once; smaller pieces also keep activations small at 720p.
MAX_SEQUENCES = 32768


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of one cross-attention, split into heads: both [B, heads, S, head_dim]."""

    keys: Tensor
    values: Tensor


def as_clips(images: Tensor, frames: int) -> Tensor:
    """View images [N, C, h, w] as clips [B, C, F, P]."""
    return images.flatten(2).unflatten(0, (-1, frames)).transpose(1, 2)


def as_images(clips: Tensor, size: torch.Size) -> Tensor:
    """Return clips [B, C, F, P] to images of `size` (N, C, h, w)."""
    return clips.transpose(1, 2).reshape(size)


def zero_init(layer: nn.Module) -> None:
    """Set every parameter of a layer to zero, so that the branch it ends adds nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class Attention(nn.Module):
    """Multi-head attention softmax(Q K^T / sqrt(head_dim)) V; context may have another width than the queries."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=False)
        # A list of one because the checkpoints call this layer `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def keys_values(self, context: Tensor) -> KeysValues:
        """Project a context [B, S, D] once, for any number of queries."""
        return KeysValues(self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context)))

    def forward(self, x: Tensor, context: KeysValues | None = None) -> Tensor:
        """Attend from x [N, S, D] to a context of B prepared rows, or to x itself when it is None.

        B divides N: each context row serves N/B consecutive rows of x, e.g. all frames of a clip.
        """
        if context is not None and context.keys.shape[2] == 1:
            # Softmax over one key is 1, whatever the query: its value is the answer at every position.
            answer = self.to_out[0](context.values.flatten(1))  # [B, D]
            return answer.repeat_interleave(len(x) // len(answer), dim=0)[:, None].expand_as(x)
        context = self.keys_values(x) if context is None else context
        rows = context.keys.shape[0]
        query = self._split_heads(self.to_q(x).reshape(rows, -1, self.heads * self.head_dim))  # [B, heads, N/B*S, d]
        given = (query, context.keys, context.values)
        if rows <= MAX_SEQUENCES:
            out = F.scaled_dot_product_attention(*given)
        else:
            pieces = zip(*(t.split(MAX_SEQUENCES) for t in given), strict=True)
            out = torch.cat([F.scaled_dot_product_attention(*piece) for piece in pieces])
        return self.to_out[0](out.transpose(1, 2).reshape(*x.shape[:-1], -1))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)  # [B, heads, S, head_dim]


class TextAttention(Attention):
    """Attention to the text; with `image_tokens` it also holds the APM mixing of an anchor frame into that text."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, context_dim: int, text_tokens: int = 77, image_tokens: int = 0
    ) -> None:
        super().__init__(dim, heads, head_dim, context_dim)
        self.apm = TokenMixing(text_tokens, image_tokens, context_dim) if image_tokens else None

    def context(self, tokens: Tensor, image_tokens: Tensor | None) -> Tensor:
        """Return what keys and values are made of: the text tokens [B, S, D], mixed with image tokens if given."""
        if image_tokens is None:
            return tokens
        if self.apm is None:
            raise ConfigError("image tokens were given to a network without APM", "use image_tokens=None")
        wanted = (self.apm.text_tokens, self.apm.conv.in_channels - self.apm.text_tokens)
        if (tokens.shape[1], image_tokens.shape[1]) != wanted:
            found = f"{tokens.shape[1]} text and {image_tokens.shape[1]} image tokens"
            raise ConfigError(f"{found} were given, APM mixes {wanted[0]} and {wanted[1]}")
        return self.apm(torch.cat([tokens, image_tokens], dim=1))


class GatedLinear(nn.Module):
    """GEGLU: one half of a projection times the exact GELU of the other."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated feed-forward layer, four times as wide inside; takes at most `rows_at_once` rows at once.

    A narrow one on a CPU takes so few that what is inside stays in the cache: a tenth less time, the same bits.
    """

    rows_at_once = 1 << 17

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cached = max(256, (1 << 14) // dim) if dim <= 128 else self.rows_at_once
        # Index 1 was dropout in the published networks; the identity keeps their key names.
        self.net = nn.Sequential(GatedLinear(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return _in_slices(self.net, min(self.rows_at_once, self.cached) if x.is_cpu else self.rows_at_once, x)


def _in_slices(layer: Callable[[Tensor], Tensor], rows: int, x: Tensor) -> Tensor:
    """Run a layer on so many rows of x [..., C] at once; its inside is the memory peak of a whole network."""
    flat = x.flatten(0, -2)
    if torch.is_grad_enabled() or len(flat) <= rows:
        return layer(x)
    return torch.cat([layer(piece) for piece in flat.split(rows)]).view_as(x)


def slice_feed_forwards(network: nn.Module, rows: int) -> None:
    """Let every feed-forward layer of a network, ours or of diffusers, take at most `rows` rows at once."""
    for layer in network.modules():
        if isinstance(layer, FeedForward):
            layer.rows_at_once = rows
        elif type(layer).__name__ == "FeedForward":
            layer.forward = partial(_in_slices, layer.forward, rows)


class TransformerBlock(nn.Module):
    """Self-attention, a second attention (to text, or again to itself) and feed-forward, each residual."""

    def __init__(self, dim: int, attn1: Attention, attn2: Attention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = attn1
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = attn2
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: KeysValues | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Attention among the pixels of one frame, and from each pixel to the text."""

    def __init__(self, channels: int, head_dim: int, groups: int, text_attention: TextAttention) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self_attention = Attention(channels, channels // head_dim, head_dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, self_attention, text_attention)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, text: KeysValues) -> Tensor:
        hidden = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [N, P, C]
        hidden = self.transformer_blocks[0](hidden, text)
        return x + self.proj_out(hidden).transpose(1, 2).reshape(x.shape)


class FrameCode(nn.Module):
    """Tells a temporal layer which frame it looks at, and which motion the text asks for.

    code(f) = Linear(phi(f)) + sum_{j<4} g_j(f) Linear_j(pooled text), with eight sinusoids phi and
    g = (1, f/8 - 1, sin(2 pi f/16), cos(2 pi f/16)). Without `text_dim` only the first term exists.
    """

    def __init__(self, channels: int, text_dim: int = 0) -> None:
        super().__init__()
        self.position = nn.Linear(8, channels, bias=False)
        self.text = nn.Linear(text_dim, 4 * channels, bias=False) if text_dim else None
        # Small rather than zero: gradients reach both factors from the first step.
        nn.init.normal_(self.position.weight, std=0.02)
        if self.text is not None:
            nn.init.normal_(self.text.weight, std=0.02)

    def forward(self, frames: int, device: torch.device, pooled: Tensor | None = None) -> Tensor:
        """Return the codes [B or 1, F, C] of frames 0..F-1 for pooled texts [B, D]; weights may wait on the host."""
        index = torch.arange(frames, device=device, dtype=torch.float32)
        # One by one, as a table of the periods would be copied to the device.
        angles = torch.stack([2 * math.pi * index / period for period in (4, 8, 16, 32)], dim=1)  # [F, 4]
        phi = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.position.weight.dtype)  # [F, 8]
        code = self.position(phi)[None]  # [1, F, C]
        if self.text is None or pooled is None:
            return code
        turn = 2 * math.pi * index / 16
        growth = torch.stack([torch.ones_like(index), index / 8 - 1, turn.sin(), turn.cos()], dim=1)  # [F, 4]
        directions = self.text(pooled).unflatten(-1, (4, -1))  # [B, 4, C]
        return code + growth.to(directions) @ directions


class TemporalTransformer(nn.Module):
    """Two self-attentions and a feed-forward over the frames of each pixel; the text is not looked at."""

    def __init__(
        self, channels: int, heads: int, head_dim: int, groups: int, frame_codes: bool = False, pooled_dim: int = 0
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(inner, Attention(inner, heads, head_dim), Attention(inner, heads, head_dim))]
        )
        self.proj_out = nn.Linear(inner, channels)
        self.frame_codes = FrameCode(inner, pooled_dim) if frame_codes else None
        # A fresh network starts as an image model; see TemporalConv.
        zero_init(self.proj_out)

    def forward(self, x: Tensor, frames: int, pooled: Tensor | None = None) -> Tensor:
        clips = as_clips(x, frames)  # [B, C, F, P]
        hidden = self.proj_in(self.norm(clips).permute(0, 3, 2, 1))  # [B, P, F, C]
        if self.frame_codes is not None:
            hidden = hidden + self.frame_codes(frames, hidden.device, pooled).unsqueeze(1)
        hidden = self.transformer_blocks[0](hidden.flatten(0, 1)).view_as(hidden)
        return as_images(clips + self.proj_out(hidden).permute(0, 3, 2, 1), x.shape)


class FrameConv(nn.Conv3d):
    """Convolution over the previous, this and the next frame of clips [B, C, F, P]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 1, 1))

    def forward(self, clips: Tensor) -> Tensor:
        # As a two-dimensional convolution: three times faster on a CPU than one with a (3, 1, 1) kernel.
        return F.conv2d(clips, self.weight.squeeze(-1), self.bias, padding=(1, 0))


class TemporalConv(nn.Module):
    """Four convolutions over (previous, this, next) frame, added to their input; zero-padded at the clip's ends."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        # Key names of the published networks: a dropout sat at index 2 of all but the first.
        self.conv1 = nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), FrameConv(channels))
        self.conv2, self.conv3, self.conv4 = (
            nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), nn.Identity(), FrameConv(channels))
            for _ in range(3)
        )
        zero_init(self.conv4[-1])

    def forward(self, x: Tensor, frames: int) -> Tensor:
        clips = as_clips(x, frames)  # [B, C, F, P]
        hidden = self.conv4(self.conv3(self.conv2(self.conv1(clips))))
        return as_images(clips + hidden, x.shape)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions per frame, with the time embedding added between them."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = self.convolution(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(embedding_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = self.convolution(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def convolution(self, in_channels: int, out_channels: int) -> nn.Module:
        """Make one of the two convolutions."""
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply to x [N, C, h, w] with time embeddings [B, T], each serving N/B consecutive images."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        shift = self.time_emb_proj(F.silu(embedding)).repeat_interleave(len(x) // len(embedding), dim=0)  # [N, C]
        hidden = self.conv2(F.silu(self.norm2(hidden + shift[:, :, None, None])))
        return self.conv_shortcut(x) + hidden


class Downsample(nn.Module):
    """Halve the size by a stride-2 convolution; rows may be padded by more than one."""

    def __init__(self, channels: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Enlarge to the size of the next skip by nearest neighbour, then convolve.

    With `crop_rows` (the refiner, whose downsampling pads rows by two) the size is doubled and the outer rows dropped.
    """

    def __init__(self, channels: int, crop_rows: int) -> None:
        super().__init__()
        self.crop_rows = crop_rows
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        if self.crop_rows:
            enlarged = F.interpolate(x, scale_factor=2.0, mode="nearest")
            return self.conv(enlarged[:, :, self.crop_rows : -self.crop_rows])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def sinusoids(values: Tensor, channels: int) -> Tensor:
    """Return waves [..., channels] of real numbers [...], cosines first, at rates from 1 down to 1/10000; float32."""
    half = channels // 2
    rates = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=values.device, dtype=torch.float32))
    angles = values.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep, or of a frame's number, through a two-layer perceptron."""

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, out_channels or 4 * channels)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed timesteps [B] (any real number, training range 0..999) as [B, 4 * channels or out_channels]."""
        waves = sinusoids(timestep, self.channels).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))
