"""The image autoencoder of Stable Diffusion: frames to latents and back, by convolutions and groups of norms.

It computes what diffusers' `AutoencoderKL` does, bit for bit, and shares its parameter names and the part of its
interface that `encoders` uses; importing that library takes longer than a run's first steps.

Shapes: N frames, C channels, H, W pixels, h, w latent cells.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamt2v.config import Table
from streamt2v.errors import ConfigError

# What the library's configuration can say besides, and the values for which its network is this one.
_FIXED: Mapping[str, tuple[object, ...]] = {
    "act_fn": ("silu",),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "force_upcast": (True, False),  # read by its pipelines alone
}


@dataclass(frozen=True)
class AutoencoderConfig(Table):
    """Sizes of an autoencoder, in the library's terms; the defaults are the library's."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.18215

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from the library's configuration. Raises ConfigError where that means another network."""
        own = dict(values)
        own.pop("sample_size", None)  # nothing is computed with it
        for name, allowed in _FIXED.items():
            if (found := own.pop(name, allowed[0])) not in allowed:
                raise ConfigError(f"an autoencoder with {name} = {found!r} is not supported")
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if other := sorted({*own.pop(name, ())} - {kind}):
                raise ConfigError(f"an autoencoder with {other[0]} is not supported")
        return super().from_dict(own)


def _norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _conv(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1)


def _through(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class Residual(nn.Module):
    """Two convolutions, each after norm and SiLU, added to their input."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(groups, channels), _conv(channels, out_channels)
        self.norm2, self.conv2 = _norm(groups, out_channels), _conv(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """Attention among all cells, in one head, added to its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = _norm(groups, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        # A list of one because the checkpoints call this layer `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.group_norm(x.flatten(2)).transpose(1, 2)  # [N, h*w, C]
        query, key, value = (project(hidden)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        mixed = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return self.to_out[0](mixed).transpose(1, 2).reshape(x.shape) + x


class Middle(nn.Module):
    """The lowest level: a residual layer, attention if there is any, and another residual layer."""

    def __init__(self, channels: int, groups: int, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attends else [])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](_through(self.attentions, self.resnets[0](x)))


class Downsample(nn.Module):
    """Halve the size by a convolution; one row and one column of zeros are added at the end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size by nearest neighbour, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _residuals(widths: Sequence[int], groups: int) -> nn.ModuleList:
    return nn.ModuleList(Residual(before, after, groups) for before, after in pairwise(widths))


class DownLevel(nn.Module):
    """The residual layers of one size on the way down, then, but for the last level, half of it."""

    def __init__(self, widths: Sequence[int], groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = _residuals(widths, groups)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(widths[-1])])

    def forward(self, x: Tensor) -> Tensor:
        return _through((*self.resnets, *self.downsamplers), x)


class UpLevel(nn.Module):
    """The residual layers of one size on the way up, then, but for the last level, twice of it."""

    def __init__(self, widths: Sequence[int], groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = _residuals(widths, groups)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(widths[-1])])

    def forward(self, x: Tensor) -> Tensor:
        return _through((*self.resnets, *self.upsamplers), x)


class Encoder(nn.Module):
    """Frames [N, 3, H, W] to mean and log-variance [N, 2 C, h, w]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = _conv(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            inside = [widths[max(level - 1, 0)], *[width] * config.layers_per_block]
            self.down_blocks.append(DownLevel(inside, groups, last=level + 1 == len(widths)))
        self.mid_block = Middle(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = _norm(groups, widths[-1])
        self.conv_out = _conv(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(_through(self.down_blocks, self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents [N, C, h, w] to frames [N, 3, H, W]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = _conv(config.latent_channels, widths[0])
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            inside = [widths[max(level - 1, 0)], *[width] * (config.layers_per_block + 1)]
            self.up_blocks.append(UpLevel(inside, groups, last=level + 1 == len(widths)))
        self.mid_block = Middle(widths[0], groups, config.mid_block_add_attention)
        self.conv_norm_out = _norm(groups, widths[-1])
        self.conv_out = _conv(widths[-1], config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = _through(self.up_blocks, self.mid_block(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The autoencoder. Source: arXiv 2112.10752."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        """The type it computes in."""
        return self.quant_conv.weight.dtype

    def encode(self, frames: Tensor) -> Any:
        """Encode frames [N, 3, H, W]: an object with `latent_dist.mean` and `.std` [N, C, h, w]."""
        mean, logvar = self.quant_conv(self.encoder(frames)).chunk(2, dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.exp(0.5 * logvar.clamp(-30, 20))))

    def decode(self, latents: Tensor) -> Any:
        """Decode latents [N, C, h, w]: an object with `sample` [N, 3, H, W]."""
        return SimpleNamespace(sample=self.decoder(self.post_quant_conv(latents)))
