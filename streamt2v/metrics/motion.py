"""Motion between two frames: dense optical flow, and the warp errors behind MAWE.

Flow is OpenCV's DIS (dense inverse search) with its medium preset: the same with any number of threads, and within 0.15
pixels of a known shift of a textured picture. H, W are rows and columns; a flow [H,W,2] holds (x, y).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from streamt2v.media.frames import Frames

Plane: TypeAlias = npt.NDArray[np.float32]
Mask: TypeAlias = npt.NDArray[np.bool_]

FLOW = "OpenCV DIS, medium preset"
SCRIPT_SCALE = 9.5
"""Factor of the mean flow magnitude in the released script."""


@dataclass(frozen=True)
class Motion:
    """One pair of frames: mean flow magnitude (pixels) and its mean square; the warp errors of the paper and of the
    released script (squared levels, summed over channels), NaN if the mask leaves no pixel."""

    magnitude: float
    squared_magnitude: float
    warp_error: float
    script_warp_error: float


def square(frame: Frames, size: int) -> Frames:
    """Scale a frame [H,W,3] to [size,size,3] regardless of its aspect ratio, as in the paper."""
    shrinks = size <= min(frame.shape[:2])
    scaled: Frames = cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return scaled


@cache
def _estimator() -> Any:
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


def dense_flow(first: Frames, second: Frames) -> Plane:
    """Estimate the flow [H,W,2] from each pixel of one RGB frame [H,W,3] to its position in another."""
    grey = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second))
    flow: Plane = _estimator().calc(*grey, None)
    return flow


def targets(flow: Plane) -> Plane:
    """Return where each pixel moves to: its own (x, y) plus its flow."""
    rows, columns = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    return np.stack([columns, rows], axis=-1) + flow


def warp(image: npt.NDArray[Any], flow: Plane) -> Plane:
    """Sample an image [H,W,C] bilinearly where each pixel's flow points; the edge repeats beyond the border."""
    place = targets(flow)
    warped: Plane = cv2.remap(image.astype(np.float32), place, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return warped


def visible(forward: Plane, backward: Plane) -> Mask:
    """Return which pixels of the first frame are visible in the second: the flow stays inside, and leads back.

    Source: the consistency test of Lai et al. (2018), which the paper's warp error cites: occluded where
    |f + b|^2 > 0.01 (|f|^2 + |b|^2) + 0.5, with b the backward flow at the place that f points to.
    """
    back = warp(backward, forward)
    lost = _squares(forward + back) > 0.01 * (_squares(forward) + _squares(back)) + 0.5
    return ~lost & _inside(targets(forward))


def landed_on(forward: Plane) -> Mask:
    """Return which pixels of the second frame a rounded flow vector lands on: the mask of the released script."""
    places = np.rint(targets(forward)).astype(np.int64)
    columns, rows = places[_inside(places)].T
    hit = np.zeros(forward.shape[:2], np.bool_)
    hit[rows, columns] = True
    return hit


def compare(first: Frames, second: Frames, forward: Plane, backward: Plane) -> Motion:
    """Measure a pair of RGB frames [H,W,3] by the flows from the first to the second and back."""
    squares = _squares(forward)
    return Motion(
        magnitude=float(np.sqrt(squares).mean(dtype=np.float64)),
        squared_magnitude=float(squares.mean(dtype=np.float64)),
        warp_error=_error(first, warp(second, forward), visible(forward, backward)),
        script_warp_error=_error(second, warp(first, backward), landed_on(forward)),
    )


def _squares(vectors: Plane) -> Plane:
    """Return the squared lengths [H,W] of vectors [H,W,D]."""
    lengths: Plane = np.einsum("hwd,hwd->hw", vectors, vectors)
    return lengths


def _inside(places: npt.NDArray[Any]) -> Mask:
    """Return whether positions [H,W,2] lie inside the frame."""
    rows, columns = places.shape[:2]
    x, y = places[..., 0], places[..., 1]
    within: Mask = (x >= 0) & (x <= columns - 1) & (y >= 0) & (y <= rows - 1)
    return within


def _error(image: Frames, warped: Plane, mask: Mask) -> float:
    if not mask.any():
        return float("nan")
    return float(_squares(image - warped)[mask].mean(dtype=np.float64))
