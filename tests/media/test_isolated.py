"""Videos of others: decoded elsewhere, in little memory, and refused before that where they are too large."""

import hashlib
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from streamt2v.errors import VideoError
from streamt2v.media import isolated, lossless, reading, seal
from tests.cli.helpers import call, made


@pytest.fixture(autouse=True)
def started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process as users have it, not as a fork."""
    monkeypatch.setattr(isolated, "subprocess", subprocess)


def noise(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def repeated(path: Path, count: int, codec: str = "mpeg4", height: int = 16, width: int = 16) -> Path:
    """Write one encoded frame so many times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1
        (data,) = (bytes(packet) for packet in stream.encode(av.VideoFrame(width, height, "yuv420p")))
        for index in range(count):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 25), True
            packet.pts = packet.dts = index
            container.mux(packet)
    return path


def test_it_reads_what_is_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "in.mp4", 19, 'a "comment" \u00e9')
    monkeypatch.chdir(tmp_path)
    Path("numpy.py").write_text("raise SystemExit(9)")  # the current folder is none of the process's
    assert isolated.probe(path) == reading.probe(path)
    assert [len(part) for part in isolated.read_frames(Path("in.mp4"))] == [8, 8, 3]
    here = np.concatenate(list(reading.read_frames(path)))
    assert np.array_equal(np.concatenate(list(isolated.read_frames(path, 5))), here)
    assert isolated.digest(path) == (19, hashlib.sha256(here.tobytes()).hexdigest())


def test_an_unchanged_video_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], isolated._answers
    monkeypatch.setattr(isolated, "_answers", lambda what, path: [asked.append(what), real(what, path)][1])
    for frames in (4, 7):
        path = made(tmp_path / "in.mp4", frames)
        asked.clear()
        assert [isolated.probe(path).frames for _ in range(3)] == [frames] * 3
        assert asked == ["probe"]


def test_a_reader_that_stops_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, started, real = tmp_path / "in.mkv", [], subprocess.Popen
    lossless.write_lossless(path, noise(40, 64, 64))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: [started.append(real(*a, **k)), started[-1]][1])
    isolated.probe(path)
    started.clear()
    reader = isolated.read_frames(path)
    next(reader)
    reader.close()  # type: ignore[attr-defined]
    assert [process.returncode for process in started] == [-9]


@pytest.mark.parametrize("name", ["long.mkv", "long.mp4", "wide.mkv"])
def test_what_is_too_large_is_refused_before_it_is_decoded(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "wide.mkv":
        repeated(path, 2, "ffv1", 8000, 8000)
        said = "8000x8000"
    else:
        repeated(path, isolated.MAX_FRAMES + 1)
        said = "more than 100,000 frames"
    before = os.times()
    with pytest.raises(VideoError, match=said):
        isolated.probe(path)
    assert sum(os.times()[:4]) - sum(before[:4]) < 10  # decoding the frames takes a minute of work


def test_our_own_videos_may_be_of_any_length(tmp_path: Path) -> None:
    path = repeated(tmp_path / "long.mp4", isolated.MAX_FRAMES + 1)
    seal.seal(path)
    assert isolated.probe(path).frames == isolated.MAX_FRAMES + 1


def test_more_memory_than_it_gets_is_an_error(tmp_path: Path) -> None:
    lossless.write_lossless(tmp_path / "in.mkv", np.zeros((1, 3000, 4000, 3), np.uint8))
    code = (
        "import sys, pathlib; from streamt2v.media import isolated as f; "
        "f._MEMORY, f._MEMORY_PER_PIXEL = 240 << 20, 0; "
        "f._main('read', pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "in.mkv"], capture_output=True, check=True)
    assert "error" in json.loads(done.stdout)
    assert done.stderr == b""


def test_a_crash_of_the_decoder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, script = made(tmp_path / "in.mp4", 3), tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -SEGV $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(VideoError, match="code -11"):
        list(isolated.read_frames(path))
    assert call("info", path) == call("refine", path, "-o", tmp_path / "out.mp4") == 3


def test_damaged_files_end_with_0_or_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, whole = np.random.default_rng(3), np.frombuffer(made(tmp_path / "in.mp4", 24).read_bytes(), np.uint8)
    codes = set()
    for index in range(12):
        broken = whole.copy()
        broken[rng.integers(0, len(whole), 1 + 8 * index)] = 255
        (tmp_path / "broken.mp4").write_bytes(broken.tobytes())
        codes.add(call("preview", tmp_path / "broken.mp4", "-f"))
    assert codes == {0, 3}
    assert "Traceback" not in capsys.readouterr().err
