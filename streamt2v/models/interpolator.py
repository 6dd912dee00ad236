"""IFNet: a frame between two others, by the motion from it to both, guessed coarsely and corrected in finer scales.

The network and its parameter names are those of RIFE 4.25 and 4.26; fewer or narrower blocks make a small one. Such a
one need not find the motion itself: its blocks correct what a calculation without parameters guesses.

Sources: arXiv 2011.06294; Lucas and Kanade 1981 for the guess.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return"

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamt2v.config import Table
from streamt2v.errors import ConfigError

FLAT, REACH, WINDOW = 2.5e-5, 3.0, 9
"""Of a guess: squared slopes that tell nothing, most pixels of its scale in a round, side of a window."""


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
    rounds: tuple[int, ...] = ()
    """Rounds of guessing the motion before the first block, from the coarsest scale to full size; none: no guess."""
    sight: int = 0
    """Pixels of the frames that motion is looked for in: larger frames are made smaller for it. 0: never."""

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 2 or any(width % 2 for width in self.widths):
            raise ConfigError(f"widths is {self.widths}, it must hold even numbers of channels")
        if min(self.rounds, default=0) < 0:
            raise ConfigError(f"rounds is {self.rounds}, it must hold numbers from 0")

    @property
    def multiple(self) -> int:
        """Pixels that both sides of a frame are padded to a multiple of."""
        return max(4 * 2 ** (len(self.widths) - 1), 2 ** len(self.rounds[1:]))

    def reduced(self, height: int, width: int) -> int:
        """How many times smaller frames of a size are made before motion is looked for."""
        return max(1, round((height * width / self.sight) ** 0.5)) if self.sight else 1


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
        outputs = self.lastconv(self.convblock(self.conv0(known)))
        found = _resized(outputs.float(), scale)  # 16 bit are too few for places
        return found[:, :4] * scale, found[:, 4:5], found[:, 5:]


class Interpolator(nn.Module):
    """Frames between two frames."""

    def __init__(self, config: InterpolatorConfig) -> None:
        super().__init__()
        self.config = config
        self.encode = Head(config.head_width, config.head_channels)
        first = 2 * 3 + 2 * config.head_channels + 1  # both frames, their features, the time
        later = first + 1 + config.features + 4  # mask, features and flow of the block before
        inputs = [first + 4 * bool(config.rounds)] + [later] * (len(config.widths) - 1)
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
        reduced = self.config.reduced(height, width)
        down, right = (-extent % (self.config.multiple * reduced) for extent in (height, width))
        pair = [F.pad(frame, (0, right, 0, down), mode="replicate") for frame in (first, second)]
        small = pair if reduced == 1 else [F.avg_pool2d(frame, reduced) for frame in pair]
        *_, (warped, flow, mask) = self.steps(small, time)
        if reduced > 1:
            warped, mask = _moved(pair, _resized(flow, reduced) * reduced), _resized(mask, reduced)
        return merge(warped, mask)[..., :height, :width].clamp(0, 1)

    def steps(self, pair: Sequence[Tensor], time: float | Tensor) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
        """Yield what every block makes of it: both frames moved, the flow [B, 4, H, W] and the mask [B, 1, H, W].

        Args:
            pair: two frames [B, 3, H, W] in [0, 1], whose sides `multiple` divides.
            time: 0 to 1, a number or [B, 1, 1, 1].
        """
        seen = [self.encode(frame) for frame in pair]
        when = torch.zeros_like(pair[0][:, :1]) + time
        known, flow = [*pair, *seen, when], None
        if self.config.rounds:
            motion = guess(pair, time, self.config.rounds)
            flow = torch.cat([-time * motion, (1 - time) * motion], dim=1)
            known = [*_moved(pair, flow), *_moved(seen, flow), when]
        for index, block in enumerate(self.blocks):
            change, mask, features = block(torch.cat(known, dim=1), flow, 2 ** (len(self.blocks) - 1 - index))
            flow = change if flow is None else flow + change
            warped = _moved(pair, flow)
            yield warped, flow, mask
            if index + 1 < len(self.blocks):
                known = [*warped, *_moved(seen, flow), when, mask, features]


def merge(warped: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mix two frames [B, 3, H, W] that were moved to the same time: the mask's sigmoid is the share of the first."""
    return torch.lerp(warped[1], warped[0], mask.sigmoid())


@torch.no_grad()
def guess(pair: Sequence[Tensor], time: float | Tensor, rounds: Sequence[int]) -> Tensor:
    """Return the motion from one frame to the other, [B, 2, H, W], x and y in pixels, where it passes at a time.

    In each round both frames, moved to that time, are compared: the motion changes by what makes the squares of their
    differences least in a window, were the frames linear there. Where nothing can be seen it stays.

    Args:
        pair: two frames [B, C, H, W] in [0, 1], whose sides 2^(scales - 1) divides.
        time: 0 to 1, a number or [B, 1, 1, 1].
        rounds: how many at each scale, coarsest first, the last at full size.
    """
    motion: Tensor | None = None
    for index, count in enumerate(rounds):
        scale = 2 ** (len(rounds) - 1 - index)
        small = [F.avg_pool2d(frame, scale) for frame in pair]
        motion = torch.zeros_like(small[0][:, :2]) if motion is None else _resized(motion, 2) * 2
        for _ in range(count):
            first, second = _moved(small, torch.cat([-time * motion, (1 - time) * motion], dim=1))
            slopes = [
                time * one + (1 - time) * other for one, other in zip(_slopes(first), _slopes(second), strict=True)
            ]
            terms = [*slopes, second - first]
            products = torch.stack(
                [(terms[i] * terms[j]).mean(1) for i, j in ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2))], dim=1
            )
            xx, xy, yy, xd, yd = _smoothed(_smoothed(products)).unbind(1)
            xx, yy = xx + FLAT, yy + FLAT
            change = torch.stack([xy * yd - yy * xd, xy * xd - xx * yd], dim=1) / (xx * yy - xy * xy)[:, None]
            motion = motion + change.clamp(-REACH, REACH)
    assert motion is not None
    return motion


def _slopes(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return what one pixel more in x and in y changes."""
    wide = F.pad(image, (1, 1, 1, 1), mode="replicate")
    rows, columns = wide[..., 1:-1, :], wide[..., 1:-1]
    return (rows[..., 2:] - rows[..., :-2]) / 2, (columns[..., 2:, :] - columns[..., :-2, :]) / 2


def _smoothed(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, WINDOW, 1, WINDOW // 2, count_include_pad=False)


def _moved(pair: Sequence[Tensor], flow: Tensor) -> list[Tensor]:
    """Move the first by flow[:, :2], the second by flow[:, 2:]."""
    return [warp(image, move) for image, move in zip(pair, flow.chunk(2, dim=1), strict=True)]


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Take every pixel of an image [B, C, H, W] from where flow [B, 2, H, W] points: x, then y, in pixels."""
    height, width = image.shape[-2:]
    rows = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    columns = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[:, 0]
    grid = torch.stack([2 * columns / max(1, width - 1) - 1, 2 * rows / max(1, height - 1) - 1], dim=-1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _resized(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
