"""`refine` of a video from elsewhere: by the small network on pixels, which makes none itself."""

from pathlib import Path

import numpy as np
import pytest

from streamt2v import weights
from streamt2v.jobs.recipe import describe_video
from streamt2v.media import reading
from streamt2v.media.frames import resize, to_float
from tests.cli.helpers import PROMPT, call, digest, generate, made


def model_of(path: Path) -> str:
    return str(describe_video(path)["recipe"]["config"]["model"])


def test_footage_is_restored_and_own_videos_are_refined_by_their_family(tmp_path: Path) -> None:
    footage, own, out = made(tmp_path / "in.mp4", 9), tmp_path / "own.mp4", tmp_path / "out.mp4"
    assert call("refine", footage, "-o", out, "--size", "64x32", "-q") == 0
    assert (digest(out)[0], model_of(out)) == (9, "restore")
    used = describe_video(out)["recipe"]["weights"]
    assert sorted(used) == ["restore/pixels.safetensors", "restore/refiner.safetensors"]
    given, shown = (np.concatenate(list(reading.read_frames(path))) for path in (footage, out))
    enlarged = resize(to_float(given), (32, 64))
    assert (to_float(shown) - enlarged).abs().mean() < 2 / 127.5  # nothing is invented
    assert generate(own, 17, "--no-refine") == 0
    assert call("refine", own, "-o", tmp_path / "again.mp4", "--size", "64x32", "-q") == 0
    assert model_of(tmp_path / "again.mp4") == "demo"
    assert call("refine", footage, "-o", tmp_path / "asked.mp4", "--size", "64x32", "-q", "--model", "demo") == 0
    assert model_of(tmp_path / "asked.mp4") == "demo"
    assert call("refine", out, "-o", tmp_path / "twice.mp4", "--size", "64x32", "-q") == 0
    assert model_of(tmp_path / "twice.mp4") == "restore"


def test_a_killed_run_of_footage_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    footage, whole, out = made(tmp_path / "in.mp4", 60), tmp_path / "whole.mp4", tmp_path / "out.mp4"
    options = ["--size", "48x32", "--seed", 3, "-q"]
    assert call("refine", footage, "-o", whole, *options) == 0

    from streamt2v.media import writing

    append, written = writing.SegmentWriter.append, list[int]()

    def stop(writer: writing.SegmentWriter, frames: object) -> object:
        if written:
            raise KeyboardInterrupt
        written.append(1)
        return append(writer, frames)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(writing.SegmentWriter, "append", stop)
        assert call("refine", footage, "-o", out, *options) == 130
    assert call("resume", out) == 0
    assert digest(out) == digest(whole)


def test_it_makes_no_videos_and_refuses_what_it_does_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("generate", PROMPT, "--frames", 20, "-o", tmp_path / "out.mp4", "--model", "restore", "-q") == 2
    assert "makes no videos" in capsys.readouterr().err
    assert weights.default_family() != "restore"
    footage = made(tmp_path / "in.mp4", 3)
    for setting in ("refine.guidance_scale=3", "refine.posterior=published"):
        assert call("refine", footage, "-o", tmp_path / "out.mp4", "--set", setting, "-q") == 2
        assert "has no use for it" in capsys.readouterr().err
