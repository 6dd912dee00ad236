"""The moving picture of the README: which frames it shows, that each has its number, that it stays small."""

import io
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import pictures
from streamt2v.media import writing


@given(st.integers(1, 2000), st.integers(1, 6), st.integers(1, 20), st.integers(1, 30))
def test_pieces_reach_from_the_first_frame_to_the_last(frames: int, pieces: int, shown: int, step: int) -> None:
    numbers = pictures.chosen(frames, pieces, shown, step)
    assert numbers[0] == 0
    assert len(numbers) <= pieces * shown
    assert all(0 <= number < frames for number in numbers)
    if pieces > 1 and frames >= (shown - 1) * step + pieces:
        assert len(numbers) == pieces * shown
        assert numbers[-1] == frames - 1


def test_noise_gets_a_quality_that_fits() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 90, 160, 3), dtype=np.uint8)
    shown = pictures.numbered(frames, range(6), 6)
    assert len(pictures.encode(shown, 8, 60_000)[0]) <= 60_000
    assert pictures.encode(shown, 8, 60_000)[1] < pictures.encode(shown, 8)[1]
    with pytest.raises(SystemExit, match="show fewer"):
        pictures.encode(shown, 8, 100)


def test_the_picture_of_a_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "long.webp"
    video = tmp_path / "long.mp4"
    writer = writing.SegmentWriter(tmp_path / "growing", 96, 160, Fraction(8))
    writer.append(np.full((200, 96, 160, 3), 60, np.uint8))
    writer.finish(video)
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--video", str(video), "--out", str(out), "--shown", "5"])
    pictures.main()
    assert 'src="docs/long.webp"' in capsys.readouterr().out
    with Image.open(io.BytesIO(out.read_bytes())) as picture:
        assert picture.n_frames == 20  # type: ignore[attr-defined]
        assert picture.info["loop"] == 0
        last = np.asarray(picture.convert("L"), float)
        assert last.std() > 5  # its number, on one grey level
