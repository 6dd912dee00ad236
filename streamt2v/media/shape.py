"""Shape: how a decoded picture is to be turned, mirrored and stretched before anybody looks at it."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import numpy.typing as npt

_ALMOST_SQUARE = 0.01  # rounding of sizes by other programs; every pixel shape in use is further from 1
_MOST_STRETCHED = 10


def orientation(matrix: bytes) -> tuple[int, bool]:
    """Read a display matrix: (quarter turns anticlockwise, whether it is mirrored left to right before).

    Angles between are rounded to the nearest quarter turn, so nothing is cut off and no corner is empty.

    Args:
        matrix: nine 32-bit numbers in the byte order of the machine, as FFmpeg hands out what ISO/IEC 14496-12 stores.
    """
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix) if len(matrix) == 36 else (1, 0, 0, 0, 1)
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    # Of x' = a x + c y and y' = b x + d y, with y down: a turn by an angle has a = d = cos, b = -c = sin clockwise.
    clockwise = np.degrees(np.arctan2(b - c, a + d)) if (a, b, c, d) != (0, 0, 0, 0) else 0.0
    return round(-clockwise / 90) % 4, mirrored


def upright(picture: npt.NDArray[np.uint8], turns: int, mirrored: bool) -> npt.NDArray[np.uint8]:
    """Mirror and turn a picture [H,W,C] by what `orientation` says."""
    return np.ascontiguousarray(np.rot90(picture[:, ::-1] if mirrored else picture, turns))


def squared(height: int, width: int, pixel: Fraction | None) -> tuple[int, int]:
    """Return the (H, W) at which a picture of pixels `pixel` times as wide as high has square ones.

    Enlarged, so that no detail is lost. Shapes that are square but for rounding, or that no camera has, are taken as
    square.
    """
    if not pixel or abs(float(pixel) - 1) < _ALMOST_SQUARE or not 1 / _MOST_STRETCHED <= pixel <= _MOST_STRETCHED:
        return height, width
    return (height, round(width * pixel)) if pixel > 1 else (round(height / pixel), width)
