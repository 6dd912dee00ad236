"""A machine with PyAV and without the ffmpeg binary: the same packets, and a clear word where there is sound."""

import sys
from fractions import Fraction
from pathlib import Path

import av
import pytest

from streamt2v.cli import doctor
from streamt2v.errors import OutputError
from streamt2v.media import ffmpeg, reading, seal, sound, writing
from tests.media.test_video import RATES, written
from tests.media.test_video import samples as samples


@pytest.fixture
def no_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (writing, ffmpeg):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)


def content(path: Path) -> tuple[object, ...]:
    """Every packet with its time, the tags, and whether a player finds its way before it has all."""
    with av.open(str(path)) as file:
        packets = [(bytes(packet), packet.pts, packet.dts, packet.time_base) for packet in file.demux(video=0)]
        return (
            packets,
            file.duration,
            dict(file.metadata),
            path.read_bytes().find(b"moov") < path.read_bytes().find(b"mdat"),
        )


@pytest.mark.parametrize("fps", RATES, ids=str)
def test_the_file_holds_the_same(fps: Fraction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growing = written(tmp_path / "growing", fps=fps)
    growing.finish(tmp_path / "binary.mp4", "made é by 'me'")
    monkeypatch.setattr(writing, "find_spec", lambda name: None)
    monkeypatch.setattr(writing, "run_ffmpeg", lambda *_: pytest.fail("the binary was started"))
    growing.finish(tmp_path / "odd %d:'.mp4", "made é by 'me'")
    found = [content(tmp_path / name) for name in ("binary.mp4", "odd %d:'.mp4")]
    assert found[0] == found[1]
    assert reading.probe(tmp_path / "odd %d:'.mp4") == reading.probe(tmp_path / "binary.mp4")
    seal.check_seal(tmp_path / "odd %d:'.mp4")


def test_sound_needs_the_binary(tmp_path: Path, samples: Path, no_binary: None) -> None:
    with pytest.raises(OutputError, match="sound is copied with imageio-ffmpeg, which is not installed"):
        sound.carry(samples / "aac.mp4", Fraction(1))  # before any work


def test_a_full_disk_is_said(tmp_path: Path, no_binary: None, monkeypatch: pytest.MonkeyPatch) -> None:
    growing = written(tmp_path / "growing")
    open_ = av.open

    def full(name: str, *mode: str, **more: object) -> object:
        if "w" in mode:
            raise OSError(28, "No space left on device")
        return open_(name, *mode, **more)

    monkeypatch.setattr(av, "open", full)
    with pytest.raises(OutputError, match="no space left for"):
        growing.finish(tmp_path / "out.mp4")


def test_the_doctor_says_what_that_means(no_binary: None) -> None:
    found = doctor._ffmpeg()
    assert found.ok
    assert "PyAV writes the videos, and sound is not copied" in found.found
