"""Shape: how a decoded picture is rotated, mirrored and stretched for display, and the largest that is read."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import numpy.typing as npt

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
    clockwise = np.degrees(np.arctan2(b - c, a + d)) if (a, b, c, d) != (0, 0, 0, 0) else 0.0
    return round(-clockwise / 90) % 4, mirrored


def upright(picture: npt.NDArray[np.uint8], turns: int, mirrored: bool) -> npt.NDArray[np.uint8]:
    """Mirror and rotate a picture [H,W,C] as `orientation` says."""
    return np.ascontiguousarray(np.rot90(picture[:, ::-1] if mirrored else picture, turns))


def squared(height: int, width: int, pixel: Fraction | None) -> tuple[int, int]:
    """Return the (H, W) at which a picture has square pixels, given the width of a stored pixel over its height.

    The picture is enlarged, so that no detail is lost. Ratios that are 1 up to rounding, or that no camera has, count
    as 1.
    """
    if not pixel or abs(float(pixel) - 1) < _ALMOST_SQUARE or not 1 / _MOST_STRETCHED <= pixel <= _MOST_STRETCHED:
        return height, width
    return (height, round(width * pixel)) if pixel > 1 else (round(height / pixel), width)
