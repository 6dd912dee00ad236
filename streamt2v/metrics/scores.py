"""The maths of the metrics: pictures and series of numbers in, one number out. `docs/metrics.md` has the formulas.

A series has one value per frame, NaN where nothing was measured, as at frame 0 for comparisons with the previous frame.
A score is None where it is undefined, such as a ratio to no motion at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from streamt2v.media.frames import Frames
from streamt2v.metrics.motion import SCRIPT_SCALE

Series: TypeAlias = npt.NDArray[np.float64]
Grey: TypeAlias = npt.NDArray[np.float32]

CELLS = 16  # rows and columns of the grid on which flicker is measured


def mean(series: Series) -> float | None:
    """Return the mean of the known values."""
    known = series[np.isfinite(series)]
    return float(known.mean()) if len(known) else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """Return the quotient of two scores; None if one is missing or the divisor is 0."""
    return None if part is None or not whole else part / whole


def mawe_paper(warp_errors: Series, squared_magnitudes: Series) -> float | None:
    """MAWE as printed: mean warp error over mean squared flow magnitude. Source: the paper's definition of MAWE."""
    return ratio(mean(warp_errors), mean(squared_magnitudes))


def mawe_script(warp_errors: Series, magnitudes: Series) -> float | None:
    """MAWE as in the released script: the mean over pairs of warp error / (9.5 mean flow magnitude).

    Pairs without any motion have no ratio and are left out.
    """
    moving = magnitudes > 0
    return mean(warp_errors[moving] / (SCRIPT_SCALE * magnitudes[moving]))


def deviation(series: Series) -> float | None:
    """Return the standard deviation of the known values."""
    known = series[np.isfinite(series)]
    return float(known.std()) if len(known) else None


def seam_score(changes: Series, seams: Sequence[int], other_seams: Sequence[int] = ()) -> float | None:
    """Return the mean change into frames where chunks begin over the median change into all other frames.

    Args:
        changes: mean absolute difference between each frame and the previous one.
        seams: frames at which a chunk begins.
        other_seams: seams of another stage, which do not count as other frames either.
    """
    elsewhere = np.isfinite(changes)
    elsewhere[[*seams, *other_seams]] = False
    if not len(seams) or not elsewhere.any():
        return None
    return ratio(mean(changes[list(seams)]), float(np.median(changes[elsewhere])))


def wrap(first: Frames | None, last: Frames | None, changes: Series) -> float | None:
    """Return the change from the last frame to the first over the median change between frames."""
    if first is None or last is None or not np.isfinite(changes).any():
        return None
    return ratio(float(cv2.absdiff(last, first).mean()), float(np.nanmedian(changes)))


def windows(num_frames: int, start: int, window: int) -> tuple[slice, slice] | None:
    """Return the first and the last `window` frames from `start` on, shortened so as not to overlap; None if empty."""
    size = min(window, (num_frames - start) // 2)
    return (slice(start, start + size), slice(num_frames - size, num_frames)) if size > 0 else None


def stagnation(magnitudes: Series, start: int, window: int) -> float | None:
    """Return the flow in the last frames over that in the first ones from `start` on: 1 moves on, 0 is at rest."""
    parts = windows(len(magnitudes), start, window)
    return None if parts is None else ratio(mean(magnitudes[parts[1]]), mean(magnitudes[parts[0]]))


def at_the_end(series: Series, window: int) -> float | None:
    """Return the mean over the last `window` frames, at most the second half of the series."""
    parts = windows(len(series), 0, window)
    return None if parts is None else mean(series[parts[1]])


def histograms(frame: Frames) -> Series:
    """Return the share of every level in every channel of a frame [H,W,3]: [3,256]."""
    counts = np.stack([np.bincount(frame[..., channel].ravel(), minlength=256) for channel in range(3)])
    shares: Series = counts / counts.sum(axis=1, keepdims=True)
    return shares


def colour_distance(first: Series, second: Series) -> float:
    """Return the distance between the colours of two frames in levels, wherever in the frame they are.

    It is how far levels move to turn one histogram into the other (1-Wasserstein), averaged over the channels: 10 when
    everything brightens by 10 levels, 0 when things only move.
    """
    return float(np.abs(np.cumsum(first - second, axis=1)).sum(axis=1).mean())


def cells(grey: Grey) -> Series:
    """Return the mean brightness of a grey picture [H,W] on a grid [16,16]."""
    return np.asarray(cv2.resize(grey, (CELLS, CELLS), interpolation=cv2.INTER_AREA), np.float64)


def flicker(before: Series, now: Series, after: Series) -> float:
    """Return how far brightness jumps back and forth, in levels: alternating +a, -a gives a, a steady fade 0.

    Args:
        before, now, after: `cells` of three frames in a row.
    """
    return float(np.abs(before - 2 * now + after).mean() / 4)


def squared_error(first: Frames, second: Frames) -> float:
    """Return the mean squared difference of two frames, in squared levels."""
    return float(np.square(first.astype(np.float32) - second).mean(dtype=np.float64))


def psnr(mean_squared_error: float | None) -> float | None:
    """Return the peak signal-to-noise ratio in dB; None without any error, where it is infinite."""
    return 10 * math.log10(255**2 / mean_squared_error) if mean_squared_error else None


def ssim(first: Grey, second: Grey) -> float:
    """Return the structural similarity of two grey pictures [H,W] of levels 0-255, at least 11 x 11.

    Source: Wang et al. (2004): Gaussian window of 11 x 11 with deviation 1.5, K1 = 0.01, K2 = 0.03, only windows that
    lie entirely inside.
    """

    def smooth(picture: Any) -> Any:
        return cv2.GaussianBlur(picture, (11, 11), 1.5)[5:-5, 5:-5]

    a, b = first.astype(np.float64), second.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = smooth(a), smooth(b)
    spread = smooth(a * a) - mean_a**2 + smooth(b * b) - mean_b**2
    shared = smooth(a * b) - mean_a * mean_b
    index = (2 * mean_a * mean_b + c1) * (2 * shared + c2) / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))
    return float(index.mean())


def cosine(first: Series, second: Series) -> float:
    """Return the cosine of the angle between two vectors."""
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))
