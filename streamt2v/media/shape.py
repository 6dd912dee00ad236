"""Shape: how a picture is rotated, mirrored and stretched for display, the largest that is read, fitting into a box."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

from streamt2v.errors import ConfigError

FitMode: TypeAlias = Literal["contain", "cover", "pad"]

MAX_PIXELS, MAX_SIZE = 8192 * 4320, "8192x4320"
_ALMOST_SQUARE = 0.01  # rounding by other programs; every non-square pixel shape in use is further from 1
_MOST_STRETCHED = 10


def orientation(matrix: bytes) -> tuple[int, bool]:
    """Read a display matrix: (quarter turns anticlockwise, whether it is first mirrored left to right).

    Other angles are rounded to the nearest quarter turn, so that nothing is cropped and no corner is empty.

    Args:
        matrix: nine 32-bit integers in native byte order, as FFmpeg returns the matrix of ISO/IEC 14496-12.
    """
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix) if len(matrix) == 36 else (1, 0, 0, 0, 1)
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    # Of x' = a x + c y and y' = b x + d y, with y down: a turn by an angle has a = d = cos, b = -c = sin clockwise.
    clockwise = math.degrees(math.atan2(b - c, a + d))
    return round(-clockwise / 90) % 4, mirrored


def squared(height: int, width: int, pixel: Fraction | None) -> tuple[int, int]:
    """Return the (H, W) at which a picture has square pixels, given the width of a stored pixel over its height.

    The picture is enlarged, so that no detail is lost. Ratios that are 1 up to rounding, or that no camera has, count
    as 1.
    """
    if not pixel or abs(float(pixel) - 1) < _ALMOST_SQUARE or not 1 / _MOST_STRETCHED <= pixel <= _MOST_STRETCHED:
        return height, width
    return (height, round(width * pixel)) if pixel > 1 else (round(height / pixel), width)


@dataclass(frozen=True)
class Fit:
    """Where a source lands in an output: the source is scaled to the content size and placed at (top, left).

    `height`, `width` (output, even) and `content_height`, `content_width` are pixels. `top` and `left` are >= 0 where
    bars are needed and <= 0 where the content is cropped.
    """

    height: int
    width: int
    content_height: int
    content_width: int
    top: int
    left: int


def _nearest_even(numerator: int, denominator: int) -> int:
    """Round a positive fraction to the nearest even integer, at least 2."""
    return max(2, 2 * ((numerator + denominator) // (2 * denominator)))


def fit_into(source: tuple[int, int], box: tuple[int, int], mode: FitMode = "contain") -> Fit:
    """Plan how frames of one size go into a box; every output size is even, because yuv420p needs it.

    `contain` keeps the aspect ratio (within one pixel) and shrinks the output; `pad` does the same and adds bars up to
    the box; `cover` fills the box and crops the middle of the longer side. An odd box loses one pixel.

    Args:
        source: (H, W) of the source, >= 1.
        box: (H, W) of the box, >= 2.
        mode: contain, cover or pad.

    Raises:
        ConfigError: a size is too small or the mode is unknown.
    """
    (source_h, source_w), (box_h, box_w) = source, (box[0] - box[0] % 2, box[1] - box[1] % 2)
    if min(source) < 1 or min(box) < 2:
        raise ConfigError(f"cannot fit {source_w}x{source_h} frames into a {box[1]}x{box[0]} box")
    wide = source_w * box_h > source_h * box_w  # the source is wider than the box
    if mode == "cover":
        content_h = box_h if wide else -(-source_h * box_w // source_w)
        content_w = -(-source_w * box_h // source_h) if wide else box_w
        return Fit(box_h, box_w, content_h, content_w, (box_h - content_h) // 2, (box_w - content_w) // 2)
    content_h = _nearest_even(source_h * box_w, source_w) if wide else box_h
    content_w = box_w if wide else _nearest_even(source_w * box_h, source_h)
    if mode == "contain":
        return Fit(content_h, content_w, content_h, content_w, 0, 0)
    if mode == "pad":
        return Fit(box_h, box_w, content_h, content_w, (box_h - content_h) // 2, (box_w - content_w) // 2)
    raise ConfigError(f"unknown fit {mode!r}", "use contain, cover or pad")
