"""Colour: from what the tags of a video mean to the colours of an ordinary screen.

Pure functions of values in 0..1. The numbers come from ITU-R BT.709, BT.2020, BT.2100 (PQ, HLG, ICtCp), BT.1886, SMPTE
ST 2084 and RP 431, the code points from ITU-T H.273.

High dynamic range is converted to standard range as follows. Light is measured in nits, with diffuse white, 203 nits by
ITU-R BT.2408, as 1. The largest of R, G and B goes through a Moebius curve that is linear up to 0.3 and maps 1000 nits
to 1; the other two are scaled with it, so that hues are kept. Primaries are converted to BT.709, clipping what lies
outside, and the result is encoded for a BT.1886 screen, where white of 203 nits becomes 217 of 255. HLG is rendered for
a screen of 1000 nits. Wide primaries in standard range (BT.2020, P3) are converted in the same way without the curve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Values: TypeAlias = npt.NDArray[np.float64]

WHITE_NITS, PEAK_NITS = 203.0, 1000.0
_KNEE = 0.3
PQ, HLG = 16, 18
_SRGB, _LINEAR = 13, 8
_BT2020 = 9
_D65 = (0.3127, 0.3290)
# Red, green and blue as (x, y). 11 is P3 with a cinema's white, but phones and screens mean the usual white.
_PRIMARIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    5: ((0.640, 0.330), (0.290, 0.600), (0.150, 0.060)),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_WIDE = {9, 11, 12}
DIRECT = {1, 4, 5, 6, 7, 9}
"""Matrices that the scaler knows. 0 means RGB, 2 unspecified."""
_YCGCO, _CONSTANT, _DERIVED, _DERIVED_CONSTANT, _ICTCP = 8, 10, 12, 13, 14
ODD = {_YCGCO, _CONSTANT, _DERIVED, _DERIVED_CONSTANT, _ICTCP}
"""Matrices that `from_matrix` handles."""
_LMS = np.array([[1688, 2146, 262], [683, 2951, 462], [99, 309, 3688]]) / 4096
_ICTCP_OF = {
    PQ: np.array([[2048, 2048, 0], [6610, -13613, 7003], [17933, -17390, -543]]) / 4096,
    HLG: np.array([[2048, 2048, 0], [3625, -7465, 3840], [9500, -9212, -288]]) / 4096,
}


def is_plain(primaries: int, transfer: int, matrix: int) -> bool:
    """Return whether only the matrix has to be undone: BT.601, BT.709, sRGB and unspecified colours."""
    return primaries_of(primaries, matrix) not in _WIDE and transfer not in (PQ, HLG)


def primaries_of(primaries: int, matrix: int) -> int:
    """Return the primaries; where unspecified, those of BT.2020 with its matrices, else those of BT.709."""
    if primaries in _PRIMARIES:
        return primaries
    return _BT2020 if matrix in (9, _CONSTANT, _ICTCP) else 1


@cache
def _to_xyz(primaries: int) -> Values:
    corners = np.array([(x / y, 1.0, (1 - x - y) / y) for x, y in _PRIMARIES[primaries]]).T
    x, y = _D65
    return np.asarray(corners * np.linalg.solve(corners, np.array([x / y, 1.0, (1 - x - y) / y])))


def luma(primaries: int) -> Values:
    """Return the weights of red, green and blue in the luminance, for the given primaries."""
    return np.asarray(_to_xyz(primaries)[1])


def pq_to_nits(coded: Values) -> Values:
    """SMPTE ST 2084: coded values 0..1 to nits 0..10000."""
    power = np.clip(coded, 0, 1) ** (32 / 2523)
    return np.asarray(10_000 * (np.maximum(power - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * power)) ** (8192 / 1305))


def nits_to_pq(nits: Values) -> Values:
    """SMPTE ST 2084: nits 0..10000 to coded values 0..1."""
    power = np.clip(nits / 10_000, 0, 1) ** (1305 / 8192)
    return np.asarray(((107 / 128 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32))


def _hlg_to_scene(coded: Values) -> Values:
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    bright = (np.exp((np.clip(coded, 0.5, 1) - c) / a) + b) / 12
    return np.asarray(np.where(coded <= 0.5, np.clip(coded, 0, 0.5) ** 2 / 3, bright))


def _scene_to_hlg(scene: Values) -> Values:
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    bright = a * np.log(np.maximum(12 * scene - b, 1e-6)) + c
    return np.asarray(np.where(scene <= 1 / 12, np.sqrt(3 * np.clip(scene, 0, 1)), bright))


def hlg_to_nits(coded: Values, primaries: int = _BT2020) -> Values:
    """BT.2100: HLG values [...,3] in 0..1 to nits of a screen of 1000 nits, whose system gamma is 1.2."""
    scene = _hlg_to_scene(coded)
    return np.asarray(1000 * np.maximum(scene @ luma(primaries), 1e-9)[..., None] ** 0.2 * scene)


def _from_srgb(coded: Values) -> Values:
    return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)


def _linear(coded: Values, transfer: int) -> Values:
    """Return light of standard range, 1 at white: by BT.1886 unless the tag says otherwise."""
    clipped = np.clip(coded, 0, 1)
    if transfer == _SRGB:
        return _from_srgb(clipped)
    return np.asarray(clipped ** {4: 2.2, 5: 2.8, _LINEAR: 1.0}.get(transfer, 2.4))


def tone(light: Values) -> Values:
    """Map light, 1 at diffuse white, into 0..1 by the Moebius curve described above."""
    peak, knee = PEAK_NITS / WHITE_NITS, _KNEE
    a = -(knee**2) * (peak - 1) / (knee**2 - 2 * knee + peak)
    b = (knee**2 - 2 * knee * peak + peak) / (peak - 1)
    x = np.clip(light, 0, peak)
    return np.asarray(np.where(x <= knee, x, (b**2 + 2 * b * knee + knee**2) / (b - a) * (x + a) / (x + b)))


def to_sdr(coded: Values, primaries: int, transfer: int) -> Values:
    """Convert R'G'B' [...,3] in 0..1 of any primaries and transfer to BT.709 in standard range.

    Args:
        coded: values as stored in the video, full range.
        primaries, transfer: code points of H.273, primaries from `primaries_of`.
    """
    if transfer in (PQ, HLG):
        light = (pq_to_nits(coded) if transfer == PQ else hlg_to_nits(coded, primaries)) / WHITE_NITS
        largest = np.maximum(light.max(axis=-1, keepdims=True), 1e-9)
        light = light * (tone(largest) / largest)
    else:
        light = _linear(coded, transfer)
    change = np.linalg.solve(_to_xyz(1), _to_xyz(primaries))
    return np.asarray(np.clip(light @ change.T, 0, 1) ** (1 / 2.4))


def convert(coded: npt.NDArray[np.uint16], primaries: int, transfer: int) -> npt.NDArray[np.uint8]:
    """Apply `to_sdr` to a picture, uint16 R'G'B' [H,W,3] to uint8, in little memory: 0.4 s for 1920x1080."""
    made = np.empty(coded.shape, np.uint8)
    for top in range(0, len(coded), 32):
        band = coded[top : top + 32] / np.float32(65535)
        made[top : top + 32] = to_sdr(band, primaries, transfer) * 255 + 0.5
    return made


def from_matrix(luma_chroma: Values, matrix: int, primaries: int, transfer: int) -> Values:
    """Convert Y'CbCr [...,3] (Y 0..1, the others -0.5..0.5) of a matrix in `ODD` to R'G'B' of the same transfer."""
    y, first, second = np.moveaxis(luma_chroma, -1, 0)
    if matrix == _YCGCO:
        return np.stack([y - first + second, y + first, y - first - second], axis=-1)
    if matrix == _ICTCP:
        kind = transfer if transfer in _ICTCP_OF else PQ
        lms = luma_chroma @ np.linalg.inv(_ICTCP_OF[kind]).T
        light = pq_to_nits(lms) if kind == PQ else _hlg_to_scene(lms)
        rgb = np.maximum(light @ np.linalg.inv(_LMS).T, 0)
        return nits_to_pq(rgb) if kind == PQ else _scene_to_hlg(rgb)
    red, green, blue = luma(_BT2020 if matrix == _CONSTANT else primaries)
    if matrix == _DERIVED:
        r, b = y + 2 * (1 - red) * second, y + 2 * (1 - blue) * first
        return np.stack([r, (y - red * r - blue * b) / green, b], axis=-1)
    encode, decode = _curve(transfer)

    def difference(chroma: Values, weight: float) -> Values:
        low, high = encode(np.array(1 - weight)), 1 - encode(np.array(weight))
        return np.where(chroma <= 0, 2 * low * chroma, 2 * high * chroma)

    r, b = y + difference(second, red), y + difference(first, blue)
    g = encode(np.clip((decode(y) - red * decode(r) - blue * decode(b)) / green, 0, 1))
    return np.stack([r, g, b], axis=-1)


def _curve(transfer: int) -> tuple[Callable[[Values], Values], Callable[[Values], Values]]:
    """Return (light to coded, coded to light) for one channel, for matrices of constant luminance."""
    if transfer == PQ:
        return lambda light: nits_to_pq(10_000 * light), lambda coded: pq_to_nits(coded) / 10_000
    if transfer == HLG:
        return _scene_to_hlg, _hlg_to_scene
    return (
        lambda light: np.where(light < 0.0181, 4.5 * light, 1.0993 * np.maximum(light, 1e-9) ** 0.45 - 0.0993),
        lambda coded: np.where(coded < 0.0812, coded / 4.5, ((np.maximum(coded, 0) + 0.0993) / 1.0993) ** (1 / 0.45)),
    )
