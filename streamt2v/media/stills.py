"""Pictures that make a video without a video format: a folder of them, or an animated WebP, read by Pillow."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from streamt2v.config import exact_rate
from streamt2v.errors import VideoError
from streamt2v.media.clock import Clock, measure

if TYPE_CHECKING:
    from streamt2v.media.frames import Frames


KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
RECIPE = "recipe.json"
USUAL_RATE = Fraction(25)
"""Frames per second of a folder that does not say it."""
_MAX_PIXELS = 8192 * 4320


def handles(path: Path) -> bool:
    """Tell whether a path is read here: a folder, or a WebP file that moves."""
    if path.is_dir():
        return True
    if path.suffix.lower() != ".webp" or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(64)
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP" and b"ANIM" in head


def numbered(folder: Path) -> list[Path]:
    """Return the pictures of a folder in the order of the numbers in their names."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in KINDS and not path.name.startswith(".")]
    return sorted(
        found, key=lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
    )


def rate_of(folder: Path) -> Fraction:
    """Return the rate that the recipe in a folder tells, else the usual one."""
    try:
        fps = json.loads((folder / RECIPE).read_bytes())["config"]["output.fps"]
        return exact_rate(fps) if 0 < fps <= 1000 else USUAL_RATE
    except (OSError, ValueError, KeyError, TypeError):
        return USUAL_RATE


def measured(path: Path) -> tuple[Clock, int, int]:
    """Return (clock, height, width) of what `handles` takes.

    Raises:
        VideoError: there is no picture, or one that cannot be read.
    """
    times, first = list[int](), None
    if path.is_dir():
        pictures, rate = numbered(path), rate_of(path)
        height, width = next(iter(read(path)))[1].shape[:2]
        return Clock(Fraction(), rate, len(pictures), len(pictures)), height, width
    time = shown = 0
    for time, shown, picture in _animated(path):  # noqa: B007 - how long the last one is shown
        first = picture.shape if first is None else first
        times.append(time)
    if first is None:
        raise VideoError(f"{path} holds no picture")
    return measure(times, Fraction(1, 1000), [], shown), first[0], first[1]


def read(path: Path) -> Iterator[tuple[Fraction, Frames]]:
    """Yield (time, picture [H,W,3]) one after the other.

    Raises:
        VideoError: one cannot be read, or has another size than the first.
    """
    from streamt2v.media import pictures

    if not path.is_dir():
        yield from ((Fraction(time, 1000), picture) for time, _, picture in _animated(path))
        return
    rate, size = rate_of(path), None
    files = numbered(path)
    if not files:
        hint = f"of a folder, pictures that end in {', '.join(KINDS)} are read"
        raise VideoError(f"{path} is not a file, and holds no pictures", hint)
    for index, file in enumerate(files):
        picture = pictures.read(file)
        size = size or picture.shape
        if picture.shape != size:
            wanted = f"{size[1]}x{size[0]}"
            raise VideoError(f"{file} is {picture.shape[1]}x{picture.shape[0]}, the pictures before it are {wanted}")
        yield index / rate, picture


def _animated(path: Path) -> Iterator[tuple[int, int, Frames]]:
    """Yield (time, how long it is shown, picture) of a WebP, milliseconds; transparency laid over white."""
    from PIL import Image

    time = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["WEBP"]) as file:
                if file.width * file.height > _MAX_PIXELS:
                    raise VideoError(f"{path} has {file.width}x{file.height} pixels", "up to 8192x4320 is read")
                for index in range(getattr(file, "n_frames", 1)):
                    file.seek(index)
                    layer = file.convert("RGBA")
                    shown = int(file.info.get("duration", 100))
                    white = Image.new("RGBA", layer.size, "white")
                    yield time, shown, np.array(Image.alpha_composite(white, layer).convert("RGB"))
                    time += max(1, shown)
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Warning, Image.DecompressionBombError) as error:
        raise VideoError(f"{path} cannot be read as a WebP that moves: {error}") from error
