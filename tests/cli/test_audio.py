"""`--audio`: the sound of a file, cut to the length of the video; without it, a source's own sound stays."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from streamt2v.media import reading, writing
from tests.cli.helpers import call, made
from tests.cli.test_experience import interrupt_after

pytestmark = pytest.mark.usefixtures("toy_family")
TOY = ("--model", "toy", "--device", "cpu", "--threads", "1", "-q")


def tone(path: Path, seconds: float, hertz: int = 440) -> Path:
    make = ["-v", "error", "-f", "lavfi", "-i", f"sine=frequency={hertz}:duration={seconds}"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *make, path], check=True, capture_output=True)
    return path


def heard(path: Path) -> tuple[float, float]:
    """Seconds of sound in a file, and its strongest frequency."""
    decode = ["-v", "error", "-i", path, "-map", "0:a:0", "-ac", "1", "-ar", "8000", "-f", "s16le", "-"]
    data = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *map(str, decode)], check=True, capture_output=True).stdout
    samples = np.frombuffer(data, np.int16)
    peak = np.abs(np.fft.rfft(samples[:8000].astype(float))).argmax() * 8000 / min(8000, len(samples))
    return len(samples) / 8000, float(peak)


@pytest.mark.parametrize(("name", "output"), [("a.wav", "out.mp4"), ("a.mp3", "out.mp4"), ("a.flac", "out.webm")])
def test_sound_is_cut_to_the_video(name: str, output: str, tmp_path: Path) -> None:
    sound, path = tone(tmp_path / name, 6), tmp_path / output
    assert call("generate", "abc", "--frames", "3s", "--audio", sound, "-o", path, *TOY) == 0
    seconds, hertz = heard(path)
    assert seconds == pytest.approx(3, abs=0.1)
    assert hertz == pytest.approx(440, abs=5)
    assert reading.probe(path).frames == 24


def test_refine_and_extend_keep_their_sound_or_take_another(tmp_path: Path) -> None:
    base, sound, other = tmp_path / "base.mp4", tone(tmp_path / "a.wav", 3), tone(tmp_path / "b.wav", 9, 1000)
    assert call("generate", "abc", "--frames", 24, "--audio", sound, "--no-refine", "-o", base, *TOY) == 0
    assert call("refine", base, "-o", tmp_path / "kept.mp4", *TOY) == 0
    assert heard(tmp_path / "kept.mp4")[1] == pytest.approx(440, abs=5)
    assert call("extend", base, "--frames", 40, "-o", tmp_path / "longer.mp4", *TOY) == 0
    assert heard(tmp_path / "longer.mp4") == (pytest.approx(3, abs=0.1), pytest.approx(440, abs=5))
    assert call("extend", base, "--frames", 40, "--audio", other, "-o", tmp_path / "other.mp4", *TOY) == 0
    assert heard(tmp_path / "other.mp4") == (pytest.approx(5, abs=0.1), pytest.approx(1000, abs=5))


def test_a_resumed_run_remembers_its_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sound = tmp_path / "out.mp4", tone(tmp_path / "a.wav", 6)
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        assert call("generate", "abc", "--frames", 40, "--audio", sound, "-o", path, *TOY) == 130
    assert call("resume", path, "-q") == 0
    assert heard(path)[0] == pytest.approx(5, abs=0.1)


def test_a_row_of_a_batch_has_a_sound(tmp_path: Path) -> None:
    sound, rows = tone(tmp_path / "a.wav", 6), tmp_path / "rows.jsonl"
    rows.write_text(f'{{"prompt": "abc", "audio": "{sound}", "frames": 16}}\n')
    assert call("batch", rows, "--out-dir", tmp_path / "videos", *TOY) == 0
    assert heard(tmp_path / "videos" / "abc.mp4")[0] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("name", ["none.wav", "text.wav", "silent.mp4"])
def test_what_has_no_sound_is_refused_before_the_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    made(tmp_path / "silent.mp4", 4)
    monkeypatch.setattr(writing.SegmentWriter, "append", lambda *_: pytest.fail("it began"))
    assert call("generate", "abc", "--audio", tmp_path / name, "-o", tmp_path / "out.mp4", *TOY) == 3
    assert name in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()
