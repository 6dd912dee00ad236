"""Frames: uint8 arrays to float tensors and back, resizing, letterboxing, splitting a stream.

uint8 frames are numpy arrays [F,H,W,3] in RGB, float frames are tensors [F,3,H,W] in [-1,1]. A frame stream is an
iterator of uint8 arrays of any length: the only thing that crosses stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from streamt2v.devices import send
from streamt2v.errors import NumericsError
from streamt2v.media import shape

Frames: TypeAlias = npt.NDArray[np.uint8]


class Group(NamedTuple):
    """Consecutive frames, uint8 [F,H,W,3], and the number of the first."""

    start: int
    frames: Frames

    @property
    def stop(self) -> int:
        """The number of the frame after the last."""
        return self.start + len(self.frames)

    def since(self, first: int) -> Group:
        """Drop the frames before number `first`."""
        start = min(max(first, self.start), self.stop)
        return Group(start, self.frames[start - self.start :])


def to_float(frames: Frames, device: torch.device | str = "cpu") -> Tensor:
    """Convert uint8 frames [F,H,W,3] to float frames [F,3,H,W] in [-1,1].

    They are moved to `device` as bytes, which is a quarter of the traffic.
    """
    tensor = send(torch.from_numpy(np.array(frames)), device).permute(0, 3, 1, 2)
    return tensor.float().div_(127.5).sub_(1.0).contiguous()


def extremes(values: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value, both NaN if any value is; waits for the device once."""
    low, high = torch.stack(values.aminmax()).tolist()
    return low, high


def is_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    return all(map(math.isfinite, extremes(values)))


def is_picture(values: Tensor) -> bool:
    """Return whether values are finite and not all equal, which a network's picture never is, however dark."""
    low, high = extremes(values)
    return math.isfinite(low) and math.isfinite(high) and (low != high or values.numel() == 1)


def is_black(frames: Frames) -> bool:
    """Return whether uint8 frames [F,H,W,3] are black, as from a network that failed without a NaN."""
    return bool(frames.max(initial=0) <= 2 and frames.std() < 0.5)


def to_u8(frames: Tensor) -> Frames:
    """Convert float frames [F,3,H,W] in [-1,1] to uint8 frames [F,H,W,3]: clamped and rounded to the nearest level.

    Raises:
        NumericsError: a value is NaN or infinite (the cast would silently make it black or white).
    """
    wide = frames.detach().to(torch.float32)
    levels = wide.add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    # One copy carries both the pixels and whether they are finite, so the device is waited for once.
    packed: Frames = torch.cat([levels.flatten(), torch.isfinite(wide.sum()).to(torch.uint8).view(1)]).cpu().numpy()
    if not packed[-1] and not is_finite(wide):  # a sum may overflow
        raise NumericsError("the frames hold NaN or Inf")
    return packed[:-1].reshape(levels.shape)


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize float frames [F,3,h,w] to [F,3,H,W] with the antialiased bicubic filter, clamped to [-1,1].

    The same rule holds for each axis: the kernel is widened by the scale when shrinking, so that nothing aliases, and
    is the plain interpolating cubic when enlarging, so that nothing is blurred twice. An unchanged size is the
    identity.

    Args:
        frames: [F,3,h,w] in [-1,1].
        size: (H, W) in pixels.
    """
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    # CPU kernels have no half-precision bicubic of useful accuracy; the frames are small next to the networks.
    wide = functional.interpolate(frames.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
    return wide.clamp_(-1.0, 1.0).to(frames.dtype)


def apply_fit(frames: Tensor, fit: shape.Fit) -> Tensor:
    """Scale, crop and pad with black float frames [F,3,h,w] into the output [F,3,fit.height,fit.width] of a plan."""
    content = resize(frames, (fit.content_height, fit.content_width))
    top, left = max(0, -fit.top), max(0, -fit.left)
    content = content[..., top : top + fit.height, left : left + fit.width]
    amounts = _margins(content, (fit.height, fit.width), max(0, fit.top), max(0, fit.left))
    return functional.pad(content, amounts, value=-1.0)


def fill(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale float frames [F,3,h,w] to fill a size (H, W), which is even, and crop the middle of the longer side."""
    return apply_fit(frames, shape.fit_into((frames.shape[-2], frames.shape[-1]), size, "cover"))


def letterbox(frames: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Place float frames [F,3,h,w] in the middle of a canvas [F,3,H,W] of at least their size, repeating their edges.

    Black bars would pull a network's colours and statistics; repeated edges do not.
    """
    height, width = frames.shape[-2:]
    top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
    return functional.pad(frames, _margins(frames, canvas, top, left), mode="replicate")


def unletterbox(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the middle of `size` (h, w) out of a canvas [F,3,H,W]: the exact inverse of `letterbox`."""
    top, left = (frames.shape[-2] - size[0]) // 2, (frames.shape[-1] - size[1]) // 2
    return frames[..., top : top + size[0], left : left + size[1]]


def _margins(frames: Tensor, canvas: tuple[int, int], top: int, left: int) -> tuple[int, int, int, int]:
    height, width = frames.shape[-2:]
    return left, canvas[1] - width - left, top, canvas[0] - height - top


def singly(source: Iterable[Frames]) -> Iterator[Frames]:
    """Yield the frames of a stream one by one, [1,H,W,3]."""
    return (part[index : index + 1] for part in source for index in range(len(part)))


def numbered(source: Iterable[Frames], start: int = 0) -> Iterator[Group]:
    """Number the frames of a stream; the first is number `start`."""
    for part in source:
        yield Group(start, part)
        start += len(part)


def since(source: Iterable[Group], first: int) -> Iterator[Group]:
    """Drop the frames before number `first`."""
    return (group.since(first) for group in source if group.stop > first)


def contact_sheet(frames: Frames) -> Frames:
    """Lay frames [F,H,W,3] out row by row, about square and with few holes, with 4 pixels of grey between them."""
    gap = 4
    count, height, width, _ = frames.shape
    square = math.ceil(math.sqrt(count))
    columns = min((square, square + 1), key=lambda columns: -count % columns)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 24, np.uint8)
    for index, frame in enumerate(frames):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return sheet
