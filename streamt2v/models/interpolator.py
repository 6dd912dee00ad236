"""IFNet: a frame between two others, by the motion from it to both, guessed coarsely and corrected in finer scales.

The network and its parameter names are those of RIFE 4.25 and 4.26; fewer or narrower blocks make a small one.

Source: arXiv 2011.06294.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return"

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamt2v.config import Table
from streamt2v.errors import ConfigError


@dataclass(frozen=True)
class InterpolatorConfig(Table):
    """Sizes of an interpolator; the defaults are the published ones."""

    widths: tuple[int, ...] = (192, 128, 96, 64, 32)
    """Channels of the blocks, from the coarsest scale to full size: each works at twice the scale of the one before."""
    layers: int = 8
    head_width: int = 16
    head_channels: int = 4
    """Features of a frame that all blocks see."""
    features: int = 8
    """Features that a block hands to the next."""

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 2 or any(width % 2 for width in self.widths):
            raise ConfigError(f"widths is {self.widths}, it must hold even numbers of channels")

    @property
    def multiple(self) -> int:
        """Pixels that both sides of a frame are padded to a multiple of."""
        return 4 * 2 ** (len(self.widths) - 1)


def _leaky(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.LeakyReLU(0.2, inplace=True))


class Head(nn.Module):
    """Features of a frame [B, 3, H, W] at its own size."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.cnn0 = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.cnn1 = nn.Conv2d(width, width, 3, padding=1)
        self.cnn2 = nn.Conv2d(width, width, 3, padding=1)
        self.cnn3 = nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1)

    def forward(self, frame: Tensor) -> Tensor:
        x = F.leaky_relu(self.cnn0(frame), 0.2)
        x = F.leaky_relu(self.cnn1(x), 0.2)
        return self.cnn3(F.leaky_relu(self.cnn2(x), 0.2))


class ScaledResidual(nn.Module):
    """A convolution whose result is scaled by channel and added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.beta = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x) * self.beta + x, 0.2)


class Block(nn.Module):
    """One scale: from what is known to a correction of the motion, a mask and features."""

    def __init__(self, inputs: int, width: int, layers: int, features: int) -> None:
        super().__init__()
        halved = nn.Conv2d(inputs, width // 2, 3, stride=2, padding=1)
        self.conv0 = nn.Sequential(_leaky(halved), _leaky(nn.Conv2d(width // 2, width, 3, stride=2, padding=1)))
        self.convblock = nn.Sequential(*(ScaledResidual(width) for _ in range(layers)))
        outputs = nn.ConvTranspose2d(width, 4 * (5 + features), 4, stride=2, padding=1)
        self.lastconv = nn.Sequential(outputs, nn.PixelShuffle(2))

    def forward(self, x: Tensor, flow: Tensor | None, scale: int) -> tuple[Tensor, Tensor, Tensor]:
        """Work on x [B, C, H, W] at 1/scale of its size: flow [B, 4, H, W] in pixels, mask [B, 1, H, W], features."""
        known = _resized(x, 1 / scale)
        if flow is not None:
            known = torch.cat([known, _resized(flow, 1 / scale) / scale], dim=1)
        found = _resized(self.lastconv(self.convblock(self.conv0(known))), scale)
        return found[:, :4] * scale, found[:, 4:5], found[:, 5:]


class Interpolator(nn.Module):
    """Frames between two frames."""

    def __init__(self, config: InterpolatorConfig) -> None:
        super().__init__()
        self.config = config
        self.encode = Head(config.head_width, config.head_channels)
        first = 2 * 3 + 2 * config.head_channels + 1  # both frames, their features, the time
        later = first + 1 + config.features + 4  # mask, features and flow of the block before
        inputs = [first] + [later] * (len(config.widths) - 1)
        self.blocks = nn.ModuleList(
            Block(given, width, config.layers, config.features)
            for given, width in zip(inputs, config.widths, strict=True)
        )

    def forward(self, first: Tensor, second: Tensor, time: float) -> Tensor:
        """Return the frame between two.

        Args:
            first, second: [B, 3, H, W] in [0, 1], of any size.
            time: where it lies, 0 (at the first) to 1.
        """
        height, width = first.shape[-2:]
        down, right = -height % self.config.multiple, -width % self.config.multiple
        pair = [F.pad(frame, (0, right, 0, down), mode="replicate") for frame in (first, second)]
        seen = [self.encode(frame) for frame in pair]
        when = torch.full_like(pair[0][:, :1], time)
        warped, known = pair, [*pair, *seen, when]
        flow: Tensor | None = None
        for index, block in enumerate(self.blocks):
            change, mask, features = block(torch.cat(known, dim=1), flow, 2 ** (len(self.blocks) - 1 - index))
            flow = change if flow is None else flow + change
            moves = flow[:, :2], flow[:, 2:]
            warped = [warp(frame, move) for frame, move in zip(pair, moves, strict=True)]
            moved = [warp(feature, move) for feature, move in zip(seen, moves, strict=True)]
            known = [*warped, *moved, when, mask, features]
        merged = torch.lerp(warped[1], warped[0], mask.sigmoid())
        return merged[..., :height, :width].clamp(0, 1)


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Take every pixel of an image [B, C, H, W] from where flow [B, 2, H, W] points: x, then y, in pixels."""
    height, width = image.shape[-2:]
    rows = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    columns = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[:, 0]
    grid = torch.stack([2 * columns / max(1, width - 1) - 1, 2 * rows / max(1, height - 1) - 1], dim=-1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _resized(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
