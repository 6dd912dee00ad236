"""Videos without a video format, read by Pillow: a folder of pictures, or an animated WebP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from streamt2v.config import exact_rate
from streamt2v.errors import InputError, VideoError
from streamt2v.media import pictures
from streamt2v.media.clock import Clock, measure

if TYPE_CHECKING:
    from streamt2v.media.frames import Frames


KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
RECIPE = "recipe.json"
USUAL_RATE = Fraction(25)
"""Frames per second of a folder without a recipe."""


def handles(path: Path) -> bool:
    """Return whether a path is read here: a folder, or an animated WebP."""
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
    return sorted(found, key=_numbers)


def _numbers(path: Path) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def rate_of(folder: Path) -> Fraction:
    """Return the rate in the recipe of a folder, else the usual one."""
    try:
        fps = json.loads((folder / RECIPE).read_bytes())["config"]["output.fps"]
        return exact_rate(fps) if 0 < fps <= 1000 else USUAL_RATE
    except (OSError, ValueError, KeyError, TypeError):
        return USUAL_RATE


def measured(path: Path) -> tuple[Clock, int, int]:
    """Return (clock, height, width) of a folder or an animated WebP.

    Raises:
        VideoError: there is no picture, or one cannot be read.
    """
    times, first = list[int](), None
    if path.is_dir():
        count, rate = len(numbered(path)), rate_of(path)
        height, width = next(iter(read(path)))[1].shape[:2]
        return Clock(Fraction(), rate, count, count), height, width
    time = shown = 0
    for time, shown, picture in _animated(path):  # noqa: B007 - `shown` of the last one is used
        first = picture.shape if first is None else first
        times.append(time)
    if first is None:
        raise VideoError(f"{path} holds no picture")
    return measure(times, Fraction(1, 1000), [], shown), first[0], first[1]


def read(path: Path) -> Iterator[tuple[Fraction, Frames]]:
    """Yield (time, picture [H,W,3]) in order.

    Raises:
        VideoError: a picture cannot be read, or its size differs from the first one's.
    """
    if not path.is_dir():
        yield from ((Fraction(time, 1000), picture) for time, _, picture in _animated(path))
        return
    rate, size = rate_of(path), None
    files = numbered(path)
    if not files:
        hint = f"pictures in a folder must end in {', '.join(KINDS)}"
        raise VideoError(f"{path} is not a file, and holds no pictures", hint)
    for index, file in enumerate(files):
        picture = pictures.read(file)
        size = size or picture.shape
        if picture.shape != size:
            wanted = f"{size[1]}x{size[0]}"
            raise VideoError(f"{file} is {picture.shape[1]}x{picture.shape[0]}, the pictures before it are {wanted}")
        yield index / rate, picture


def _animated(path: Path) -> Iterator[tuple[int, int, Frames]]:
    """Yield (time, how long it is shown, picture) of an animated WebP, times in milliseconds."""
    time = 0
    try:
        with pictures.opened(path, "WEBP") as file:
            for index in range(getattr(file, "n_frames", 1)):
                file.seek(index)
                picture = pictures.over_white(file.convert("RGBA"))
                shown = int(file.info.get("duration", 100))  # known only once the picture is decoded
                yield time, shown, picture
                time += max(1, shown)
    except InputError as error:
        raise VideoError(error.message, error.hint) from error
