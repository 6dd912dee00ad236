"""Other kinds of files, in and out: read with right times, written with a recipe that runs can go on from.

Reported for other tools as mdhiggins/sickbeard_mp4_automator#268, ente-io/photos-desktop#171, imageio/imageio#604
(kinds that are not read); wulkano/Kap#856, dudewheresmycode/GifTuna#7 (delays of GIF).
"""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from streamt2v.errors import VideoError
from streamt2v.jobs.recipe import describe_video
from streamt2v.media import exports, isolated, pictures, reading, stills, writing
from tests.cli.helpers import call
from tests.media.makers import X264, beep_times, ffmpeg, flash_times, flashing, gaps, kinds, refine

DELAYS = [100, 200, 100, 300, 100]


def shades(count: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((36, 64, 3), 40 + 40 * index, np.uint8)) for index in range(count)]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_delays_are_kept(name: str, tmp_path: Path) -> None:
    first, *rest = shades(5)
    path = tmp_path / name
    first.save(path, save_all=True, append_images=rest, duration=DELAYS, loop=0)
    found = isolated.probe(path)
    assert (found.fps, found.frames, found.width, found.height) == (10, 8, 64, 36)
    levels = [int(frame[0, 0, 0]) for group in isolated.read_frames(path) for frame in group]
    assert np.abs(np.array(levels) - np.repeat([40, 80, 120, 160, 200], [1, 2, 1, 3, 1])).max() <= 3


READ = {
    "a.wmv": ["-c:v", "wmv2"], "a.avi": ["-c:v", "mjpeg"], "a.flv": ["-c:v", "flv1"], "a.ogv": ["-c:v", "libtheora"],
    "a.y4m": ["-pix_fmt", "yuv420p"], "a.h264": X264, "a.hevc": ["-c:v", "libx265", "-x265-params", "log-level=none"],
    "a.ivf": ["-c:v", "libvpx"], "a.mxf": ["-c:v", "mpeg2video"], "a.m4v": ["-c:v", "mpeg4"], "a.nut": ["-c:v", "ffv1"],
    "a.mov": ["-c:v", "prores_ks"],
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_many_containers_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x48:d=0.4:r=25", *READ[name], path)
    found = isolated.probe(path)
    assert (found.frames, found.fps) == (10, 25)
    assert sum(map(len, isolated.read_frames(path))) == 10


def test_dv_is_read(tmp_path: Path) -> None:
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "testsrc=s=720x576:d=0.2:r=25",
        "-pix_fmt",
        "yuv420p",
        "-target",
        "pal-dv",
        tmp_path / "a.dv",
    )
    found = isolated.probe(tmp_path / "a.dv")
    assert (found.frames, found.fps, found.height) == (5, 25, 576)
    assert abs(found.width / found.height - 4 / 3) < 0.03


def test_what_is_not_read_is_told_with_what_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.rm"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x48:d=0.4:r=25", "-c:v", "rv10", path)
    assert call("refine", path, "-o", tmp_path / "out.mp4") == 3
    said = capsys.readouterr().err
    assert "mp4, mov, mkv, webm, avi, wmv" in said
    assert "ffmpeg -i in.rm converted.mp4" in said


def test_a_folder_of_pictures_is_a_video(tmp_path: Path, unrefined: None) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, picture in enumerate(shades(5)):
        picture.save(folder / f"f{index + 7}.png")  # f10 comes after f9
    found = isolated.probe(folder)
    assert (found.frames, found.fps, found.width) == (5, 25, 64)
    assert refine(folder, tmp_path / "out.mp4", "--fps", "12") == 0
    levels = [int(frame[0, 0, 0]) for group in isolated.read_frames(tmp_path / "out.mp4") for frame in group]
    assert np.abs(np.array(levels) - [40, 80, 120, 160, 200]).max() <= 3
    assert reading.probe(tmp_path / "out.mp4").fps == 12
    Image.new("RGB", (10, 10)).save(folder / "f99.png")
    with pytest.raises(VideoError, match="the pictures before it are 64x36"):
        list(isolated.read_frames(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="holds no pictures"):
        isolated.probe(tmp_path / "empty")


# ------------------------------------------------------------------------------------------------------------- delays


@given(st.integers(1, 200), st.fractions(Fraction(1, 10), 1000), st.sampled_from([(10, 20), (1, 5)]))
def test_animations_take_their_time(count: int, fps: Fraction, unit: tuple[int, int]) -> None:
    tick, least = unit
    times = pictures.animation_times(count, fps, tick, least)
    assert all(shown >= least and shown % tick == 0 for _, shown in times)
    frames = [frame for frame, _ in times]
    assert frames == sorted(set(frames)) and frames[-1] < count
    assert abs(sum(shown for _, shown in times) - 1000 * count / fps) <= max(least, tick)


@pytest.mark.parametrize("fps", [24, 50, 60, 120, 240])
def test_a_gif_of_a_fast_video_is_not_slow(fps: int, tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", f"testsrc=s=32x32:d={24 / fps}:r={fps}", *X264, tmp_path / "in.mp4")
    assert call("preview", tmp_path / "in.mp4", "-o", tmp_path / "a.gif", "--width", 32) == 0
    with Image.open(tmp_path / "a.gif") as picture:
        delays = []
        for index in range(picture.n_frames):
            picture.seek(index)
            delays.append(picture.info["duration"])
    assert min(delays) >= 20
    assert abs(sum(delays) - 24_000 / fps) <= 20


# ------------------------------------------------------------------------------------------------------------- outputs

OUTPUTS = ["out.webm", "out.mov", "out.gif", "out.webp", "frames"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "in.mp4"
    return flashing(path, *X264, "-c:a", "aac", seconds=2.4, rate="10")


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_chosen_by_their_names(name: str, clip: Path, tmp_path: Path, unrefined: None) -> None:
    out = tmp_path / name
    assert refine(clip, out) == 0
    assert call("verify", out) == call("resume", out, "-q") == 0
    assert describe_video(out)["recipe"]["command"] == "refine"
    found = isolated.probe(out)
    assert (found.width, found.height) == (64, 36)
    assert abs(float(found.frames / found.fps) - 2.4) < 0.15
    if name in ("out.webm", "out.mov", "frames"):
        assert (found.frames, found.fps) == (24, 10)
    if name in ("out.webm", "out.mov"):
        assert [kind.removesuffix(" und") for kind in kinds(out)] == [
            "video",
            f"audio {'opus' if out.suffix == '.webm' else 'aac'}",
        ]
        assert found.has_audio
        assert max(gaps(flash_times(out), beep_times(out))) < 0.1
    if name == "frames":
        assert sorted(path.name for path in out.iterdir()) == [f"{index:06d}.png" for index in range(24)] + [
            "recipe.json"
        ]
    if name == "out.mov":
        with av.open(str(out)) as container:
            assert container.streams.video[0].codec_context.name == "prores"
    assert refine(clip, out) == 5  # it exists
    if name == "frames":
        assert call("rerun", out, "--source", clip, "-o", tmp_path / "again", "-q") == 0
        assert refine(clip, out, "--overwrite") == 0


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_interrupted_run_goes_on_to_the_same_file(
    name: str, clip: Path, tmp_path: Path, unrefined: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole" / name, tmp_path / "cut" / name
    for path in (whole, cut):
        path.parent.mkdir()
    assert refine(clip, whole) == 0
    real, calls = writing.SegmentWriter.append, []

    def append(writer: writing.SegmentWriter, frames: np.ndarray) -> writing.SegmentMark:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(writer, frames)

    monkeypatch.setattr(writing.SegmentWriter, "append", append)
    assert refine(clip, cut) == 130
    assert not cut.exists()
    assert call("resume", cut, "-q") == 0
    assert exports.sha256_of(cut) == exports.sha256_of(whole)
    assert json.loads(exports.recipe_beside(cut) or "{}")["sha256"] == exports.sha256_of(whole)


@pytest.mark.parametrize("name", OUTPUTS)
def test_changed_outputs_are_found(name: str, clip: Path, tmp_path: Path, unrefined: None) -> None:
    out = tmp_path / name
    assert refine(clip, out) == 0
    target = out / "000003.png" if out.is_dir() else out
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    assert call("verify", out) == 3


def test_frames_of_a_folder_are_exact(tmp_path: Path, unrefined: None) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shown = np.random.default_rng(0).integers(0, 256, (3, 36, 64, 3), dtype=np.uint8)
    for index, picture in enumerate(shown):
        Image.fromarray(picture).save(source / f"{index}.png")
    assert refine(source, tmp_path / "out") == 0
    made = np.stack([pictures.read(path) for path in stills.numbered(tmp_path / "out")])
    assert np.array_equal(made, shown)


def test_a_folder_with_other_things_is_left_alone(clip: Path, tmp_path: Path, unrefined: None) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    assert refine(clip, folder) == 5
    assert refine(clip, folder, "--overwrite") == 0
    assert (folder / "letter.txt").read_text() == "dear"
    assert call("verify", folder) == 0


def test_another_ending_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generate", "a red ball", "-o", tmp_path / "x.avi", "--frames", 8) == 2
    assert ".mp4, .webm, .mov, .gif, .webp" in capsys.readouterr().err
