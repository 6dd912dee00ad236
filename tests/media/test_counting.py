"""Packets are not pictures: what `info` says, `refine` gives; and damage is bridged and named, or refused.

Reported for other tools as Comfy-Org/ComfyUI#16310, cvat-ai/cvat#6929, PyAV-Org/PyAV#976, k4yt3x/video2x#1318 and
#1320, HomeOfAviSynthPlusEvolution/L-SMASH-Works#69 (counting); nagadomi/nunif#543, Kruk2/jasna#199,
Breakthrough/PySceneDetect#258 (damage). All inputs are made here.
"""

import csv
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamt2v.errors import VideoError
from streamt2v.jobs.recipe import describe_video
from streamt2v.media import containers, isolated, reading
from tests.cli.helpers import TINY, call
from tests.media.makers import X264, corners, ffmpeg, flashing, not_coded, refine, repacked

AUD = (2).to_bytes(4, "big") + bytes([9, 0xF0])  # an access unit delimiter, length first as in MP4


def moving(path: Path, *codecs: str, before: tuple[str, ...] = ()) -> Path:
    """Write 25 pictures that all differ, at 25 a second."""
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x36:d=1:r=25", *before, *(codecs or X264), path)
    return path


def mpeg4(path: Path) -> Path:
    """MPEG-4 in MP4 with three pictures that are not coded, as packed DivX becomes by copying."""
    whole = moving(path.with_name("whole.mp4"), "-c:v", "mpeg4", "-bf", "0", "-g", "50", "-q:v", "5")
    return repacked(whole, path, {index: not_coded(index) for index in (5, 12, 24)})


def delimiters(path: Path) -> Path:
    """H.264 with three packets that only say where a picture would begin."""
    whole = moving(path.with_name("whole.mp4"), *X264, "-bf", "0", "-g", "5")
    return repacked(whole, path, dict.fromkeys((6, 7, 21), AUD))


def skipped_avi(path: Path) -> Path:
    """AVI whose first picture stays on for three empty chunks, with MP3 sound, as Xvid's delay frame."""
    whole = flashing(path.with_name("whole.avi"), "-c:v", "mpeg4", "-bf", "0", "-c:a", "libmp3lame", seconds=3)
    ffmpeg(
        "-i",
        whole,
        "-i",
        whole,
        "-map",
        "0:v",
        "-map",
        "1:a",
        "-c",
        "copy",
        "-bsf:v",
        "noise=drop='between(n,1,3)'",
        path,
    )
    return path


def without_counts(path: Path) -> Path:
    """Matroska as it is streamed: no length, no index."""
    moving(path, *X264, "-f", "matroska", "-live", "1")
    return path


def odd_avi(path: Path) -> Path:
    """AVI whose header announces twice the frames that it has, as of a capture that ended early."""
    data = bytearray(moving(path.with_name("whole.avi"), "-c:v", "mjpeg").read_bytes())
    for tag, offset in ((b"avih", 24), (b"strh", 40)):  # dwTotalFrames, dwLength
        place = data.index(tag) + offset
        data[place : place + 4] = (50).to_bytes(4, "little")
    path.write_bytes(data)
    return path


def trimmed(path: Path) -> Path:
    """MP4 whose edit list shows less than it holds."""
    ffmpeg("-ss", "0.5", "-i", moving(path.with_name("whole.mp4"), *X264, "-g", "50"), "-c", "copy", path)
    return path


def hidden(path: Path) -> Path:
    """VP8 with pictures that are never shown."""
    return moving(path, "-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "10", "-b:v", "100k")


def raw(path: Path) -> Path:
    """Bare H.264, which has no times."""
    return moving(path, *X264)


COUNTS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "not_coded.mp4": (mpeg4, 25),
    "delimiters.mp4": (delimiters, 25),
    "delay.avi": (skipped_avi, 76),
    "announces_more.avi": (odd_avi, 25),
    "live.mkv": (without_counts, 25),
    "trimmed.mp4": (trimmed, 13),
    "hidden.webm": (hidden, 25),
    "bare.h264": (raw, 25),
    "fields.ts": (lambda path: moving(path, "-c:v", "mpeg2video", "-flags", "+ildct+ilme"), 25),
    "gif.gif": (lambda path: moving(path, "-c:v", "gif"), 25),
}


@pytest.mark.parametrize("name", COUNTS)
def test_what_info_says_is_what_is_read(name: str, tmp_path: Path) -> None:
    make, frames = COUNTS[name]
    source = make(tmp_path / name)
    found = isolated.probe(source)
    assert abs(found.frames - frames) <= (1 if name in ("trimmed.mp4", "gif.gif") else 0)
    assert sum(map(len, isolated.read_frames(source))) == found.frames


def test_refine_and_evaluate_hold_to_it(tmp_path: Path, unrefined: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cv2")
    source, other = mpeg4(tmp_path / "in.mp4"), tmp_path / "whole.mp4"
    assert refine(source, tmp_path / "out.mp4") == 0
    assert reading.probe(tmp_path / "out.mp4").frames == describe_video(source)["video"]["frames"] == 25
    assert call("evaluate", source, "--against", other, "--clip", "none", "--flow-size", 32, "-q") == 0
    assert "Traceback" not in capsys.readouterr().err


def test_extend_gives_as_many_as_asked(tmp_path: Path) -> None:
    source, out = mpeg4(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    assert call("extend", source, "-o", out, "--frames", 27, "--prompt", "a red ball", "--no-refine", *TINY) == 0
    assert reading.probe(out).frames == 27
    assert call("verify", out) == 0


def test_a_run_that_gets_fewer_frames_says_so(
    tmp_path: Path, unrefined: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = corners(tmp_path / "in.mp4", frames=10)
    monkeypatch.setattr(isolated, "read_frames", lambda path, note: reading.read_frames(path, 4, None))
    found = isolated.probe(source)
    longer = dataclasses.replace(found.clock, frames=12)
    monkeypatch.setattr(isolated, "probe", lambda path: dataclasses.replace(found, clock=longer))
    assert refine(source, tmp_path / "out.mp4") == 3
    assert "after 10 of 12 frames" in capsys.readouterr().err


@given(st.sampled_from([1, 5, 6, 7, 8, 9]), st.integers(1, 980), st.booleans(), st.sampled_from(["h264", "hevc"]))
def test_only_packets_without_a_picture_are_passed_over(kind: int, size: int, lengths: bool, codec: str) -> None:
    shown = kind < 6
    head = kind if codec == "h264" else (1 if shown else 26 + kind) << 1
    unit = bytes([head]) + b"\x5a" * (size - 1)
    data = (size.to_bytes(4, "big") if lengths else b"\0\0\0\1") + unit
    assert containers.says_only(codec, data) is not shown
    assert not containers.says_only("mpeg4", data)


# -------------------------------------------------------------------------------------------------------------- damage


def broken(path: Path, *indexes: int, codec: tuple[str, ...] = tuple(X264)) -> Path:
    """Write 25 pictures, some of whose packets hold noise."""
    whole = moving(path.with_name(f"whole{path.suffix}"), *codec, "-bf", "0", "-g", "1")
    noise = np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8).tobytes()
    return repacked(whole, path, dict.fromkeys(indexes, b"\0\0\0\x30" + noise))


DAMAGED = {
    "one.mp4": ([12], "frame 12 cannot"),
    "two.mp4": ([3, 4], "frames 3 to 4 cannot"),
    # A decoder of several threads, as there are cores, keeps to itself what was wrong with the last packet.
    "last.mp4": ([24], "(frame 24 cannot be decoded,|no picture for frame 24:) frame 23 is shown instead"),
    "many.mp4": ([5, 9, 20], "frame 9 cannot"),
    "one.mkv": ([12], "cannot"),
    "one.avi": ([12], "cannot"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_bridged_and_named(
    name: str, tmp_path: Path, unrefined: None, capsys: pytest.CaptureFixture[str]
) -> None:
    indexes, said = DAMAGED[name]
    mjpeg = ("-c:v", "mjpeg") if name.endswith("avi") else tuple(X264)
    source, out = broken(tmp_path / name, *indexes, codec=mjpeg), tmp_path / "out.mp4"
    assert refine(source, out, quiet=False) == 0
    assert reading.probe(out).frames == 25
    shown = capsys.readouterr().err
    assert re.search(said, shown)
    assert str(source) in shown
    whole = np.concatenate(list(isolated.read_frames(tmp_path / f"whole{source.suffix}")))
    found = np.concatenate(list(isolated.read_frames(source, note=lambda text: None)))
    for index in range(25):
        shows = max(good for good in range(index + 1) if good not in indexes)
        assert np.abs(found[index].astype(int) - whole[shows]).mean() < 1


def test_damage_is_refused_where_it_would_count(tmp_path: Path) -> None:
    source = broken(tmp_path / "in.mp4", 12)
    with pytest.raises(VideoError, match="frame 12 cannot be decoded"):
        list(isolated.read_frames(source))
    with pytest.raises(VideoError, match="frame 12 cannot be decoded"):
        isolated.digest(source)


def test_evaluate_keeps_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cv2")
    bad, good, table = broken(tmp_path / "bad.mp4", 12), tmp_path / "whole.mp4", tmp_path / "scores.csv"
    quick = ["--clip", "none", "--flow-size", 32, "-q"]
    assert call("evaluate", bad, good, *quick, "--csv", table) == 3
    shown = capsys.readouterr()
    assert f"{bad} is damaged: frame 12" in shown.err
    assert "1 of 2 videos could not be measured" in shown.err
    assert str(good) in shown.out
    assert next(csv.DictReader(table.read_text().splitlines()))["video"] == str(good)
    assert call("evaluate", bad, *quick) == 3


def test_a_size_that_changes_is_scaled_and_said(
    tmp_path: Path, unrefined: None, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        corners(tmp_path / f"{size}.ts", "-c:v", "mpeg2video", size=size, frames=10) for size in ("64x36", "96x54")
    ]
    source = tmp_path / "in.ts"
    source.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert refine(source, tmp_path / "out.mp4", quiet=False) == 0
    assert "changes its frame size to 96x54; scaled to 64x36" in capsys.readouterr().err
    assert reading.probe(tmp_path / "out.mp4").frames == isolated.probe(source).frames


def test_seams_without_end_are_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cv2")
    source = moving(tmp_path / "in.mp4")
    for seams in ("1:100000000000:1", "1:1000:1", "5,99999999999999999999", "1:3000000:7", "24,25"):
        assert call("evaluate", source, "--clip", "none", "--flow-size", 32, "-q", "--seams", seams) == 2
        assert "no chunk begins at" in capsys.readouterr().err
