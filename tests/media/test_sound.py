"""Sound, text and chapters go where the picture goes: copied, encoded anew or left out, and that is known before.

Reported for other tools as k4yt3x/video2x#36, #94 and #222, AaronFeng753/Waifu2x-Extension-GUI#247, Kruk2/jasna#49,
Djdefrag/QualityScaler#104, photoprism/photoprism#1061. All inputs are made here.
"""

import subprocess
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import pytest

from streamt2v.jobs.recipe import inspect_source
from streamt2v.media import ffmpeg as binary
from streamt2v.media import isolated, reading, sound, writing
from streamt2v.runs import pipeline
from tests.cli.helpers import call
from tests.media.makers import X264, beep_times, ffmpeg, flash_times, flashing, gaps, kinds, refine

MPEG4 = ("-c:v", "mpeg4")
# Name, arguments of the sound, and what MP4 gets of it.
CODECS = {
    "aac.mp4": (["-c:a", "aac"], "aac"),
    "aac.ts": (["-c:a", "aac"], "aac"),
    "mp3.mp4": (["-c:a", "libmp3lame"], "mp3"),
    "mp3_8khz.mkv": (["-c:a", "libmp3lame", "-ar", "8000"], "aac"),
    "mp2.mpg": (["-c:a", "mp2"], "aac"),
    "ac3.mkv": (["-c:a", "ac3"], "ac3"),
    "eac3.mkv": (["-c:a", "eac3"], "eac3"),
    "dts.mkv": (["-c:a", "dca", "-strict", "-2", "-ac", "2"], "aac"),
    "alac.mov": (["-c:a", "alac"], "alac"),
    "flac.mkv": (["-c:a", "flac"], "flac"),
    "opus.webm": (["-c:a", "libopus"], "opus"),
    "vorbis.mkv": (["-c:a", "libvorbis"], "aac"),
    "pcm.avi": (["-c:a", "pcm_s16le", "-ar", "11025"], "aac"),
    "pcm_24.mov": (["-c:a", "pcm_s24le", "-ar", "96000"], "aac"),
    "float_192.mkv": (["-c:a", "pcm_f32le", "-ar", "192000"], "aac"),
    "adpcm.avi": (["-c:a", "adpcm_ima_wav", "-ar", "22050"], "aac"),
    "mulaw.mov": (["-c:a", "pcm_mulaw", "-ar", "8000"], "aac"),
    "surround.mkv": (["-c:a", "flac", "-ac", "6"], "flac"),
    "eight.mkv": (["-c:a", "pcm_s16le", "-ac", "8"], "aac"),
    "sixteen.mkv": (["-c:a", "pcm_s16le", "-af", "pan=16c|c0=c0|c15=c0"], "aac"),
    "three.mkv": (["-c:a", "pcm_s16le", "-af", "pan=3.0|FL=c0|FR=c0|FC=c0"], "aac"),
    "wma.wmv": (["-c:a", "wmav2"], "aac"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 2.4 s that flashes and beeps twice."""
    return flashing(tmp_path_factory.mktemp("plain") / "plain.mkv", seconds=2.4)


def picture(name: str) -> tuple[str, ...]:
    return ("-c:v", "libvpx", "-b:v", "200k") if name.endswith("webm") else ("-c:v", "wmv2") if "wmv" in name else MPEG4


def written(source: Path, out: Path) -> reading.VideoInfo:
    """Do what a run does with frames and tracks, without any network."""
    found = isolated.probe(source)
    writer = writing.SegmentWriter(out.with_name("growing"), found.height, found.width, found.fps)
    for group in isolated.read_frames(source):
        writer.append(group)
    return writer.finish(out, extras=sound.carry(source, found.frames / found.fps).extras)


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_and_layout_arrives_in_time(name: str, plain: Path, tmp_path: Path) -> None:
    arguments, codec = CODECS[name]
    source, out = tmp_path / name, tmp_path / "out.mp4"
    ffmpeg("-i", plain, *picture(name), *arguments, source)
    assert written(source, out).has_audio
    assert kinds(out) == ["video", f"audio {codec} und"]
    assert max(gaps(flash_times(out), beep_times(out))) < 0.045


def test_two_tracks_text_and_chapters(plain: Path, tmp_path: Path) -> None:
    source, out, chapters = tmp_path / "in.mkv", tmp_path / "out.mp4", tmp_path / "chapters.txt"
    chapters.write_text(
        ";FFMETADATA1\n[CHAPTER]\nTIMEBASE=1/10\nSTART=0\nEND=10\ntitle=One\n"
        "[CHAPTER]\nTIMEBASE=1/10\nSTART=10\nEND=24\ntitle=Two\n"
    )
    (tmp_path / "words.srt").write_text("1\n00:00:01,000 --> 00:00:01,500\nHello\n")
    ffmpeg(
        "-i", plain, "-i", tmp_path / "words.srt", "-i", chapters, "-map", "0:v", "-map", "0:a", "-map", "0:a", "-map",
        "1:s", "-map_chapters", "2", *MPEG4, "-c:a:0", "aac", "-c:a:1", "libvorbis", "-c:s", "srt", "-metadata:s:a:0",
        "language=eng", "-metadata:s:a:1", "language=fra", "-metadata:s:s:0", "language=deu", "-disposition:a:0", "0",
        "-disposition:a:1", "default", source,
    )  # fmt: skip
    written(source, out)
    assert kinds(out)[:4] == ["video", "audio aac eng", "audio aac fra", "subtitle mov_text deu"]
    for track in (0, 1):
        assert max(gaps(flash_times(out), beep_times(out, track))) < 0.045
    with av.open(str(out)) as container:
        assert [stream.disposition & 1 for stream in container.streams.audio] == [0, 1]
        assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["One", "Two"]
        (first, *_) = [packet for packet in container.demux(subtitles=0) if packet.size > 2]
        assert float(first.pts * first.time_base) == pytest.approx(1, abs=0.05)
        assert b"Hello" in bytes(first)


def test_what_is_left_out_is_said_before(
    plain: Path, tmp_path: Path, unrefined: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.mkv", tmp_path / "out.mp4"
    late = ["-itsoffset", "5", "-i", plain]
    ffmpeg(
        "-i",
        plain,
        *late,
        "-map",
        "0:v",
        "-map",
        "0:a",
        "-map",
        "1:a",
        *MPEG4,
        "-c:a:0",
        "libvorbis",
        "-c:a:1",
        "aac",
        source,
    )
    assert refine(source, out, quiet=False) == 0
    said = capsys.readouterr().err
    assert "sound 1 (vorbis) is re-encoded as AAC" in said
    assert "sound 2 (aac) is left out: it begins after the picture ends" in said
    assert said.index("left out") < said.index("frames at 25 fps")
    assert kinds(out) == ["video", "audio aac und"]


def test_sound_before_the_picture_is_cut_and_said(plain: Path, tmp_path: Path) -> None:
    whole, source, out = tmp_path / "whole.mp4", tmp_path / "in.mp4", tmp_path / "out.mp4"
    ffmpeg("-i", plain, *X264, "-c:a", "aac", whole)
    ffmpeg("-itsoffset", "0.6", "-i", whole, "-i", whole, "-map", "0:v", "-map", "1:a", "-c", "copy", source)
    assert any(
        "the first 0.60 s of sound (aac) come before" in said for said in sound.carry(source, Fraction(2)).notices
    )
    written(source, out)
    apart = [heard - shown for heard, shown in zip(beep_times(source), flash_times(source), strict=True)]
    assert (
        max(gaps([heard - shown for heard, shown in zip(beep_times(out), flash_times(out), strict=True)], apart))
        < 0.045
    )


@pytest.mark.parametrize("late", [2.39, 2.5, 30])
def test_sound_that_begins_at_the_end_or_after_it(late: float, plain: Path, tmp_path: Path, unrefined: None) -> None:
    source, out = tmp_path / "in.mkv", tmp_path / "out.mp4"
    ffmpeg("-i", plain, "-itsoffset", late, "-i", plain, "-map", "0:v", "-map", "1:a", *MPEG4, "-c:a", "aac", source)
    assert refine(source, out) == 0
    assert reading.probe(out).has_audio in ((True, False) if late < 2.4 else (False,))


def test_text_of_pictures_and_data_are_left_out_with_a_word(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.mkv"
    ffmpeg("-i", plain, "-f", "lavfi", "-i", "anullsrc", "-map", "0:v", *MPEG4, "-attach", __file__,
           "-metadata:s:t", "mimetype=text/plain", source)  # fmt: skip
    carried = sound.carry(source, Fraction(2))
    assert carried.extras == writing.Extras()
    assert carried.notices == (f"{source}: 1 data track left out",)


def test_a_track_that_cannot_be_decoded_is_left_out(plain: Path, tmp_path: Path, unrefined: None) -> None:
    source, out = tmp_path / "in.avi", tmp_path / "out.mp4"
    ffmpeg("-i", plain, *MPEG4, "-c:a", "pcm_s16le", source)
    data = source.read_bytes()
    place = data.index(b"auds") + data[data.index(b"auds") :].index(b"strf") + 8
    source.write_bytes(data[:place] + b"\xee\xee" + data[place + 2 :])  # a format that nobody knows
    assert refine(source, out) == 0
    assert kinds(out) == ["video"]
    assert "is left out" in sound.carry(source, Fraction(2)).notices[0]


@pytest.fixture
def before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where networks would be loaded."""
    monkeypatch.setattr(pipeline, "_make", lambda *_: pytest.fail("the work has begun"))


# Name, what stands in its file (None: there is none) and its mode, and what is said.
BINARIES: dict[str, tuple[bytes | None, int, str]] = {
    "none": (None, 0, "cannot be started"),
    "not executable": (b"#!/bin/sh", 0o644, "cannot be started"),
    "not a program": (b"\0" * 100, 0o755, "cannot be started"),
    "for another interpreter": (b"#!/none/sh", 0o755, "cannot be started"),
    "a library is missing": (b"#!/bin/sh\nexit 127", 0o755, "ends with code 127"),
    "killed": (b"#!/bin/sh\nkill -9 $$", 0o755, "ends with code -9"),
    "hangs": (b"#!/bin/sh\nexec sleep 60", 0o755, "no version within"),
}


@pytest.mark.parametrize("name", [*BINARIES, "a folder"])
def test_an_ffmpeg_that_does_not_run_is_found_before_the_work(
    name: str, plain: Path, tmp_path: Path, before_the_work: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (folder := tmp_path / "bin").mkdir()
    content, mode, said = BINARIES.get(name, (None, 0, "cannot be started"))
    if content is not None:
        (folder / "ffmpeg").write_bytes(content)
        (folder / "ffmpeg").chmod(mode)
    place = folder if name == "a folder" else folder / "ffmpeg"
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(place))
    monkeypatch.setattr(binary, "STALL_SECONDS", 0.5)
    for command in (("generate", "a red ball", "--no-refine"), ("refine", plain)):
        assert call(*command, "-o", tmp_path / "out.mp4", "-q") == 5
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


TARGETS = {
    "in a file": ("file/out.mp4", "is not a folder"),
    "in a folder of a file": ("file/videos/out.mp4", ""),
    "a folder": ("folder.mp4", "is a folder"),
    "a name that is too long": (f"{'x' * 300}.mp4", "too long"),
    "a link to a folder": ("link.mp4", "is a folder"),
    "its run directory is a file": ("taken.mp4", "is not a folder"),
    "of no known kind": ("out.mpeg", "must end in"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_that_cannot_be_is_found_before_the_work(
    name: str, plain: Path, tmp_path: Path, before_the_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken.mp4.streamt2v").write_text("mine")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "folder.mp4")
    before, (target, said) = sorted(tmp_path.iterdir()), TARGETS[name]
    for command in (("generate", "a red ball", "--no-refine"), ("refine", plain)):
        assert call(*command, "-o", tmp_path / target, "-q") in (2, 5)
        err = capsys.readouterr().err
        assert said in err and "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == (tmp_path / "taken.mp4.streamt2v").read_text() == "mine"


def test_tracks_are_tried_once(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, started = tmp_path / "in.mkv", []
    ffmpeg("-i", plain, *MPEG4, "-c:a", "aac", source)
    real = subprocess.Popen
    monkeypatch.setattr(isolated, "subprocess", subprocess)  # not forked, as in other tests
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: [started.append(a), real(*a, **k)][1])
    binary._check_starts.cache_clear()
    for _ in range(3):
        sound.carry(source, Fraction(2))
    assert len(started) == 3  # the probe, whether there is an ffmpeg, the trial
    assert inspect_source(source).has_audio
