"""Pixels that are not square, pictures that are turned or mirrored: shown as a player shows them.

Reported for other tools as k4yt3x/video2x#161 and #1149, AaronFeng753/Waifu2x-Extension-GUI#491,
TNTwise/REAL-Video-Enhancer#236 (pixels); WebKit/WebKit#73877, jub0t/Concat#10, datachain-ai/datachain#1825 (turns).
"""

import math
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamt2v.media import isolated, pictures, reading, shape
from tests.media.makers import X264, corners, ffmpeg, refine, where

# Clockwise turn, mirrored first or not, and where red and blue of the top left and bottom right then are.
EIGHT = [
    (0, "", "TL", "BR"), (90, "", "BL", "TR"), (180, "", "BR", "TL"), (270, "", "TR", "BL"),
    (0, "-display_hflip", "TR", "BL"), (0, "-display_vflip", "BL", "TR"), (90, "-display_hflip", "BR", "TL"),
    (90, "-display_vflip", "TL", "BR"),
]  # fmt: skip


def shown(path: Path) -> np.ndarray:
    """The first picture as ffmpeg turns it."""
    raw = path.with_suffix(".png")
    ffmpeg("-i", path, "-frames:v", "1", raw)
    return pictures.read(raw)


@pytest.mark.parametrize(("angle", "flip", "red", "blue"), EIGHT)
def test_all_eight_orientations(angle: int, flip: str, red: str, blue: str, tmp_path: Path) -> None:
    plain, path = corners(tmp_path / "plain.mp4", size="64x48"), tmp_path / "in.mp4"
    ffmpeg("-display_rotation", angle, *filter(None, [flip]), "-i", plain, "-c", "copy", path)
    info, first = isolated.probe(path), next(isolated.read_frames(path))[0]
    assert (info.height, info.width) == first.shape[:2] == ((64, 48) if angle % 180 else (48, 64))
    assert {name for name, colour in where(first).items() if colour == "red"} == {red}
    assert {name for name, colour in where(first).items() if colour == "blue"} == {blue}
    assert np.abs(first.astype(int) - shown(path)).mean() < 3


def test_a_result_shows_what_the_source_shows(tmp_path: Path, unrefined: None) -> None:
    plain, path, out = corners(tmp_path / "plain.mp4", size="64x36"), tmp_path / "in.mp4", tmp_path / "out.mp4"
    ffmpeg("-display_rotation", 90, "-display_hflip", "-i", plain, "-c", "copy", path)
    assert refine(path, out, "--size", "36x64") == 0
    assert where(shown(out)) == where(shown(path))
    assert shown(out).shape == shown(path).shape


@pytest.mark.parametrize("angle", [3, -7, 44, 87, 93, 181, 359])
@pytest.mark.parametrize("mirrored", [False, True])
def test_other_angles_are_rounded_to_quarter_turns(angle: int, mirrored: bool) -> None:
    turn = math.radians(angle)
    across = -1 if mirrored else 1
    matrix = [across * math.cos(turn), across * math.sin(turn), 0, -math.sin(turn), math.cos(turn), 0, 0, 0, 2**14]
    data = struct.pack("=9i", *(round(value * 65536) for value in matrix))
    assert shape.orientation(data) == (round(-angle / 90) % 4, mirrored)


def test_three_degrees_are_none(tmp_path: Path) -> None:
    plain, path = corners(tmp_path / "plain.mp4"), tmp_path / "in.mp4"
    ffmpeg("-display_rotation", 3, "-i", plain, "-c", "copy", path)
    assert (isolated.probe(path).width, isolated.probe(path).height) == (64, 36)
    assert where(next(isolated.read_frames(path))[0])["TL"] == "red"


@given(st.binary(min_size=0, max_size=40))
def test_any_matrix_has_an_orientation(data: bytes) -> None:
    turns, mirrored = shape.orientation(data)
    assert 0 <= turns < 4
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert sorted(reading.upright(picture, turns, mirrored).flat) == sorted(picture.flat)


@pytest.mark.parametrize("pixel", ["16/11", "12/11", "10/11", "4/3", "64/45", "8/9", "1/2", "2/1", "40/33"])
def test_pixels_become_square(pixel: str, tmp_path: Path) -> None:
    path = corners(tmp_path / "in.mp4", *X264, "-vf", f"setsar={pixel}")
    info, first = isolated.probe(path), next(isolated.read_frames(path))[0]
    wide = Fraction(64, 36) * Fraction(pixel)
    assert abs(info.width / info.height / wide - 1) < 0.02
    assert first.shape[:2] == (info.height, info.width)
    assert info.width >= 64 and info.height >= 36
    assert where(first)["TL"] == "red" and where(first)["BR"] == "blue"


def test_pixels_of_a_turned_picture_and_of_mpeg2(tmp_path: Path, unrefined: None) -> None:
    plain, turned = corners(tmp_path / "plain.mp4", *X264, "-vf", "setsar=16/11"), tmp_path / "in.mp4"
    ffmpeg("-display_rotation", 90, "-i", plain, "-c", "copy", turned)
    assert (isolated.probe(turned).width, isolated.probe(turned).height) == (36, 93)
    dvd = corners(tmp_path / "dvd.mpg", "-c:v", "mpeg2video", "-aspect", "16:9", "-r", "25", size="72x58")
    assert abs(isolated.probe(dvd).width / isolated.probe(dvd).height - 16 / 9) < 0.03
    assert refine(plain, tmp_path / "out.mp4", "--size", "192x108") == 0
    found = shown(tmp_path / "out.mp4")
    assert abs(found.shape[1] / found.shape[0] - 64 / 36 * 16 / 11) < 0.05


@given(st.integers(1, 4096), st.integers(1, 4096), st.fractions(0, 200))
def test_square_sizes_keep_the_shape_or_the_pixels(height: int, width: int, pixel: Fraction) -> None:
    tall, wide = shape.squared(height, width, pixel)
    assert tall >= height and wide >= width
    if (tall, wide) != (height, width):
        assert abs(wide / tall / (width / height * pixel) - 1) <= 0.5 / (min(tall, wide) - 0.5) + 1e-9


def test_almost_square_is_square() -> None:
    assert shape.squared(108, 192, Fraction(205, 204)) == (108, 192)
    assert shape.squared(108, 192, None) == shape.squared(108, 192, Fraction(0)) == (108, 192)
    assert shape.squared(108, 192, Fraction(100)) == (108, 192)
