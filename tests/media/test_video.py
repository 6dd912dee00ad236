"""Video files: exact counts, exact pixels where lossless, typed errors, and an output that can die at any byte."""

import contextlib
import io
import json
import resource
import shutil
import subprocess
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from streamt2v.errors import ConfigError, InputError, OutputError, ResumeError, VideoError
from streamt2v.media import lossless, pictures, reading, sound, writing

RATES = [Fraction(7), Fraction(8), Fraction(10), Fraction(24), Fraction(25, 2), Fraction(30000, 1001)]


def clip(count: int, height: int = 48, width: int = 64, start: int = 0) -> np.ndarray:
    """A smooth moving picture whose every frame differs."""
    y, x = np.mgrid[0:height, 0:width]
    t = np.arange(start, start + count)[:, None, None]
    waves = [np.sin((x + 3 * t) / 9), np.cos((y - 2 * t) / 11), np.sin((x + y + t) / 13)]
    return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def noise(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def decode(path: Path) -> np.ndarray:
    return np.concatenate(list(reading.read_frames(path)))


def written(path: Path, lengths: tuple[int, ...] = (16, 8, 1), fps: Fraction = Fraction(8)) -> writing.SegmentWriter:
    writer = writing.SegmentWriter(path, 48, 64, fps)
    for length in lengths:
        writer.append(clip(length, start=writer.mark.frames))
    return writer


def carried(source: Path, length: Fraction) -> writing.Extras:
    return sound.carry(source, length).extras


def ffmpeg(*arguments: str) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments], check=True)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three-second clips of 75 frames with sound in several containers."""
    folder = tmp_path_factory.mktemp("samples")
    source = ["-f", "lavfi", "-i", "testsrc=s=128x96:d=3:r=25", "-f", "lavfi", "-i", "sine=d=3"]
    for name, codecs in {
        "aac.mp4": ["libx264", "aac"],
        "mp3.mp4": ["libx264", "libmp3lame"],
        "opus.webm": ["libvpx-vp9", "libopus"],
        "vorbis.mkv": ["libx264", "libvorbis"],
        "mp2.ts": ["mpeg2video", "mp2"],
    }.items():
        ffmpeg(*source, "-c:v", codecs[0], "-pix_fmt", "yuv420p", "-c:a", codecs[1], str(folder / name))
    ffmpeg(*source[4:], str(folder / "sound.mp4"))
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x48:d=1:r=10", str(folder / "silent.gif"))
    return folder


# -- reading


@pytest.mark.parametrize("name", ["aac.mp4", "mp3.mp4", "opus.webm", "vorbis.mkv", "mp2.ts"])
def test_probe_counts_frames_and_finds_sound(samples: Path, name: str) -> None:
    info = reading.probe(samples / name)
    assert (info.frames, info.width, info.height, info.fps) == (75, 128, 96, Fraction(25))
    assert info.has_audio
    assert decode(samples / name).shape == (75, 96, 128, 3)


def test_a_gif_is_a_silent_video(samples: Path) -> None:
    info = reading.probe(samples / "silent.gif")
    assert (info.frames, info.fps, info.has_audio) == (10, Fraction(10), False)


def test_inputs_that_are_no_video_are_named(tmp_path: Path, samples: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 200)
    cases = {
        tmp_path / "none.mp4": "does not exist",
        tmp_path / "empty.mp4": "empty",
        tmp_path: "not a file",
        tmp_path / "text.mp4": "cannot be read as a video",
        samples / "sound.mp4": "no video",
    }
    for path, said in cases.items():
        with pytest.raises(VideoError, match=said) as caught:
            reading.probe(path)
        assert str(path) in caught.value.message
        with pytest.raises(VideoError):
            list(reading.read_frames(path))


def test_scripts_and_playlists_open_no_other_file(tmp_path: Path, samples: Path) -> None:
    shutil.copy(samples / "aac.mp4", tmp_path / "secret.mp4")
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    (tmp_path / "b.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nsecret.mp4\n#EXT-X-ENDLIST\n")
    for path in (tmp_path / "a.mp4", tmp_path / "b.mp4", Path("http://localhost/a.mp4"), Path("concat:a|b")):
        with pytest.raises(VideoError):
            reading.probe(path)


@pytest.mark.parametrize("name", ["aac.mp4", "opus.webm", "vorbis.mkv"])
def test_a_cut_file_is_refused(tmp_path: Path, samples: Path, name: str) -> None:
    data = (samples / name).read_bytes()
    # The last percents of a file may hold sound or an index only.
    for percent in (1, 10, 30, 50, 70, 90):
        cut = tmp_path / name
        cut.write_bytes(data[: len(data) * percent // 100])
        with pytest.raises(VideoError):
            reading.probe(cut)


@pytest.mark.parametrize("count", [12, pytest.param(800, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("name", ["aac.mp4", "vorbis.mkv", "opus.webm", "mp2.ts", "silent.gif"])
def test_mutated_videos_never_raise_anything_else(tmp_path: Path, samples: Path, name: str, count: int) -> None:
    for broken in mutations(tmp_path / name, (samples / name).read_bytes(), count):
        with contextlib.suppress(VideoError):
            reading.probe(broken)
            list(reading.read_frames(broken))


@pytest.mark.parametrize("count", [12, pytest.param(800, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_mutated_pictures_never_raise_anything_else(tmp_path: Path, kind: str, count: int) -> None:
    for broken in mutations(tmp_path / "a", pictures.encode_image(clip(1)[0], kind), count):
        with contextlib.suppress(InputError):
            pictures.read(broken)


def mutations(path: Path, data: bytes, count: int) -> Iterator[Path]:
    """Write a file with 20 wrong bytes in it, half the time near its start; each must be done with in 2 s of work."""
    rng, whole = np.random.default_rng(1), np.frombuffer(data, np.uint8)
    for _ in range(count):
        broken = whole.copy()
        near = len(whole) if rng.random() < 0.5 else min(2000, len(whole))
        broken[rng.integers(0, near, 20)] = rng.integers(0, 256, 20)
        path.write_bytes(broken.tobytes())
        began = time.process_time()
        yield path
        assert time.process_time() - began <= 2


def test_a_video_that_grows_midway_is_refused(tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ffmpeg("-i", str(samples / "mp2.ts"), "-c:v", "mpeg2video", "-vf", "scale=256:192", str(tmp_path / "large.ts"))
    path = tmp_path / "both.ts"
    path.write_bytes((samples / "mp2.ts").read_bytes() + (tmp_path / "large.ts").read_bytes())
    with pytest.raises(VideoError, match="changes its frame size to 256x192"):
        list(reading.read_frames(path))
    monkeypatch.setattr(reading, "MAX_PIXELS", 128 * 96)
    with pytest.raises(VideoError, match="cannot be read as a video"):  # the decoder does not even begin
        list(reading.read_frames(path))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, samples: Path, degrees: int) -> None:
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", str(degrees), "-i", str(samples / "aac.mp4"), "-c", "copy", str(turned))
    first = next(reading.read_frames(turned))[0]
    assert np.array_equal(first, np.rot90(next(reading.read_frames(samples / "aac.mp4"))[0], degrees // 90))
    info = reading.probe(turned)
    assert (info.height, info.width) == first.shape[:2]


@pytest.mark.parametrize(
    ("matrix", "tag", "colours", "height"),
    [
        ("bt709", "bt709", "tv", 64),
        ("bt709", "bt709", "pc", 64),
        ("bt601", "smpte170m", "tv", 720),
        ("bt601", "smpte170m", "pc", 720),
        ("bt601", "unknown", "tv", 64),
        ("bt709", "unknown", "tv", 720),
    ],
)
def test_colours_follow_the_tags(tmp_path: Path, matrix: str, tag: str, colours: str, height: int) -> None:
    path = tmp_path / "red.mp4"
    tags = f"setparams=range={'unknown' if tag == 'unknown' else colours}:colorspace={tag}"
    ffmpeg(
        "-f", "lavfi", "-i", f"color=0xd23214:s=64x{height}:d=0.2", "-vf",
        f"format=rgb24,scale=out_color_matrix={matrix}:out_range={colours},format=yuv420p,{tags}",
        "-c:v", "libx264", "-qp", "1", str(path),
    )  # fmt: skip
    assert np.abs(decode(path)[0].mean(axis=(0, 1)) - (0xD2, 0x32, 0x14)).max() <= 3


def test_read_frames_batches_and_leaves_no_thread(samples: Path) -> None:
    assert [len(part) for part in reading.read_frames(samples / "aac.mp4")] == [8] * 9 + [3]
    reader = reading.read_frames(samples / "aac.mp4")
    next(reader)
    reader.close()  # type: ignore[attr-defined]


# -- pictures


def test_read_image_handles_modes_and_orientation(tmp_path: Path) -> None:
    picture = noise(1, 6, 8)[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert np.array_equal(pictures.read(tmp_path / "a.png"), picture)
    Image.fromarray(np.dstack([picture, np.zeros((6, 8), np.uint8)])).save(tmp_path / "clear.png")
    assert np.all(pictures.read(tmp_path / "clear.png") == 255)
    Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert pictures.read(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 128, 255]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.read(tmp_path / "turned.jpg").shape == (8, 6, 3)


def test_read_image_refuses_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    whole = io.BytesIO()
    Image.fromarray(noise(1, 64, 64)[0]).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:2000])
    header = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big")
    start = b"IHDR" + (8192).to_bytes(4, "big") + (4321).to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    (tmp_path / "wide.png").write_bytes(header + start + zlib.crc32(start).to_bytes(4, "big") + b"\0\0\0\0IDAT")
    cases = {"wide.png": "8192x4321", "none.png": "exist", "text.png": "read", "cut.png": "read", ".": "not a file"}
    for name, said in cases.items():
        with pytest.raises(InputError, match=said):
            pictures.read(tmp_path / name)


def test_previews_are_readable(tmp_path: Path) -> None:
    frames = clip(5)
    pictures.write_image(tmp_path / "a.png", frames[0])
    assert np.array_equal(pictures.read(tmp_path / "a.png"), frames[0])
    with pytest.raises(OutputError):
        pictures.write_image(tmp_path / "none" / "a.png", frames[0])


# -- lossless segments


@pytest.mark.parametrize("shape", [(8, 48, 64), (1, 17, 33), (3, 2, 2)])
def test_lossless_is_exact_and_repeatable(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    frames = noise(*shape)
    lossless.write_lossless(tmp_path / "a.mkv", frames)
    assert np.array_equal(lossless.read_lossless(tmp_path / "a.mkv"), frames)
    lossless.write_lossless(tmp_path / "b.mkv", frames[:, ::-1][:, ::-1])
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()
    assert np.array_equal(decode(tmp_path / "a.mkv"), frames)


def test_a_damaged_lossless_segment_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    lossless.write_lossless(path, noise(4, 32, 32))
    data = path.read_bytes()
    for percent in (5, 40, 80, 95):
        path.write_bytes(data[: len(data) * percent // 100])
        with pytest.raises(VideoError):
            lossless.read_lossless(path)
    for position in range(0, len(data), 397):
        flipped = bytearray(data)
        flipped[position] ^= 4
        path.write_bytes(flipped)
        # A bit that does not matter (a date, an unused field) may stay; wrong pixels may not.
        with contextlib.suppress(VideoError):
            assert np.array_equal(lossless.read_lossless(path), noise(4, 32, 32))


# -- the growing output


@pytest.mark.parametrize("fps", RATES, ids=str)
def test_finish_keeps_count_rate_timestamps_and_comment(tmp_path: Path, fps: Fraction) -> None:
    out, comment = tmp_path / "out.mp4", json.dumps({"prompt": 'a "b" = c; d\n\u00e9 \U0001f600'})
    info = written(tmp_path / "run.mp4", fps=fps).finish(out, comment)
    assert info == reading.probe(out)
    assert (info.frames, info.width, info.height, info.fps, info.comment) == (25, 64, 48, fps, comment)
    assert not info.has_audio
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert [packet.pts * stream.time_base * fps for packet in packets] == list(range(25))
        assert [index for index, packet in enumerate(packets) if packet.is_keyframe] == [0, 16, 24]
        context = stream.codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert context.pix_fmt == "yuv420p"
    data = out.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert psnr(decode(out), clip(25)) > 33
    assert list(tmp_path.glob(".*")) == []


def test_the_conversion_is_really_bt709(tmp_path: Path) -> None:
    writer = writing.SegmentWriter(tmp_path / "a.mp4", 16, 16, Fraction(8), crf=1)
    writer.append(np.broadcast_to(np.array([200, 120, 40], np.uint8), (2, 16, 16, 3)))
    with av.open(str(tmp_path / "a.mp4")) as container:
        planes = next(container.decode(video=0)).to_ndarray()
    r, g, b = 200 / 255, 120 / 255, 40 / 255
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    expected = (16 + 219 * y, 128 + 224 * (b - y) / 1.8556, 128 + 224 * (r - y) / 1.5748)
    assert (planes[4, 4], planes[16, 4], planes[20, 4]) == pytest.approx(expected, abs=1)


def test_a_round_trip_does_not_darken(tmp_path: Path) -> None:
    writer = writing.SegmentWriter(tmp_path / "a.mp4", 48, 64, Fraction(8), crf=8)
    writer.append(clip(8))
    change = decode(tmp_path / "a.mp4").astype(float).mean(axis=(0, 1, 2)) - clip(8).mean(axis=(0, 1, 2))
    assert np.abs(change).max() < 0.2


def test_every_stage_of_the_growing_file_plays(tmp_path: Path) -> None:
    path = tmp_path / "run.mp4"
    writer = writing.SegmentWriter(path, 48, 64, Fraction(8))
    for length in (8, 3, 1):
        mark = writer.append(clip(length, start=writer.mark.frames))
        assert mark.size == path.stat().st_size
        assert len(decode(path)) == reading.probe(path).frames == mark.frames


@pytest.mark.parametrize("segments", [0, 1, 2])
@pytest.mark.parametrize("tail", [0, 5, 700])
def test_a_cut_writer_continues_to_the_same_bytes(tmp_path: Path, segments: int, tail: int) -> None:
    whole = written(tmp_path / "whole.mp4")
    path = tmp_path / "cut.mp4"
    mark = written(path, (16, 8, 1)[:segments]).mark
    with path.open("ab") as file:
        file.write(b"\0" * tail)
    writer = writing.SegmentWriter(path, 48, 64, Fraction(8), resume=mark)
    for length in (16, 8, 1)[segments:]:
        writer.append(clip(length, start=writer.mark.frames))
    assert path.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert writer.mark == whole.mark
    first, second = tmp_path / "1.mp4", tmp_path / "2.mp4"
    assert writer.finish(first) == whole.finish(second)
    assert first.read_bytes() == second.read_bytes()


def test_a_mark_beyond_the_file_or_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.mp4"
    mark = written(path).mark
    for other in (replace(mark, size=mark.size - 1), replace(mark, sha256="")):
        with pytest.raises(ResumeError, match="damaged"):
            writing.SegmentWriter(path, 48, 64, Fraction(8), resume=other)
    with pytest.raises(ResumeError, match="gone"):
        writing.SegmentWriter(tmp_path / "none.mp4", 48, 64, Fraction(8), resume=mark)
    (tmp_path / "short.mp4").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ResumeError, match="damaged"):
        writing.SegmentWriter(tmp_path / "short.mp4", 48, 64, Fraction(8), resume=mark)
    faster = writing.SegmentWriter(path, 48, 64, Fraction(10), resume=mark)
    with pytest.raises(ResumeError, match="other settings"):
        faster.append(clip(1))


@pytest.mark.parametrize("name", ["aac.mp4", "mp3.mp4", "opus.webm", "vorbis.mkv", "mp2.ts", "silent.gif"])
def test_sound_is_carried_over(tmp_path: Path, samples: Path, name: str) -> None:
    out = tmp_path / "out.mp4"
    info = written(tmp_path / "run.mp4", (16,)).finish(out, extras=carried(samples / name, Fraction(2)))
    assert (info.frames, info.fps, info.has_audio) == (16, Fraction(8), name != "silent.gif")
    if not info.has_audio:
        return
    with av.open(str(out)) as container:
        sound = container.streams.audio[0]
        expected = {"aac.mp4": "aac", "mp3.mp4": "mp3", "opus.webm": "opus"}.get(name, "aac")
        assert sound.codec_context.codec.canonical_name == expected
        assert float(sound.duration * sound.time_base) == pytest.approx(2.0, abs=0.1)


def test_copied_sound_is_the_same_packets(tmp_path: Path, samples: Path) -> None:
    out = tmp_path / "out.mp4"
    written(tmp_path / "run.mp4", (30,)).finish(out, extras=carried(samples / "aac.mp4", Fraction(30, 8)))

    def packets(path: Path) -> list[bytes]:
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(audio=0) if packet.size]

    assert packets(out) == packets(samples / "aac.mp4")


@pytest.mark.parametrize("name", ["-x.mp4", "a:b.mp4", "%d.mp4", "a b'\";$().mp4", "new\nline.mp4", "concat:x.mkv"])
def test_odd_names_are_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("run.mp4"), (2,)).finish(Path(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "run.mp4"])
    assert reading.probe(Path(name)).frames == 2


def test_impossible_requests_are_config_errors(tmp_path: Path) -> None:
    path = tmp_path / "run.mp4"
    for height, width, fps in ((47, 64, 8), (48, 63, 8), (0, 64, 8), (48, 64, 0), (48, 64, -1), (48, 64, 100000)):
        with pytest.raises(ConfigError):
            writing.SegmentWriter(path, height, width, Fraction(fps))
    writer = writing.SegmentWriter(path, 48, 64, Fraction(8))
    with pytest.raises(ConfigError, match="at least 1 frame"):
        writer.finish(tmp_path / "out.mp4")
    with pytest.raises(ConfigError, match="do not fit"):
        writer.append(clip(1, 32, 32))
    assert writer.append(clip(0)) == writer.mark
    assert (writer.mark.segments, writer.mark.frames, writer.mark.size) == (0, 0, 0)
    writer.append(clip(1))
    for comment in ("x" * 70_000, "a\0b", "lone \ud800"):
        with pytest.raises(ConfigError, match="comment"):
            writer.finish(tmp_path / "out.mp4", comment)
    assert reading.probe(path).frames == 1
    assert not (tmp_path / "out.mp4").exists()


def test_a_long_comment_survives(tmp_path: Path) -> None:
    comment = "\u00e9" * (32 * 1024)
    assert written(tmp_path / "run.mp4", (1,)).finish(tmp_path / "out.mp4", comment).comment == comment


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "code 1"),
        ("exit 0", "could not be written whole"),
        ("kill -9 $$", "code -9"),
        ("echo 'x: No space left on device' >&2; exit 228", "no space left"),
        ('for last; do :; done; printf half > "${last#file:}"', "could not be written whole"),
    ],
)
def test_a_failing_ffmpeg_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    out, fake = tmp_path / "out.mp4", tmp_path / "ffmpeg"
    out.write_text("old")
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    writer = written(tmp_path / "run.mp4", (2,))
    with monkeypatch.context() as patch:
        patch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(fake))
        with pytest.raises(OutputError, match=said):
            writer.finish(out)
    assert out.read_text() == "old"
    assert list(tmp_path.glob(".*")) == []
    assert writer.finish(out).frames == 2


def test_a_missing_folder_or_ffmpeg_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = written(tmp_path / "run.mp4", (1,))
    with pytest.raises(OutputError, match="none"):
        writer.finish(tmp_path / "none" / "out.mp4")
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "no-such-binary"))
    with pytest.raises(OutputError, match="cannot be started"):
        writer.finish(tmp_path / "out.mp4")


def test_segments_are_quick_and_memory_is_flat(tmp_path: Path) -> None:
    frames = clip(16, 144, 256)
    writer = writing.SegmentWriter(tmp_path / "run.mp4", 144, 256, Fraction(8))
    writer.append(frames)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        writer.append(frames)
    # Measured 0.04 s each; the bound leaves room for a busy machine.
    assert (time.process_time() - began) / 10 < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000
