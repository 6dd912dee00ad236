"""`streamt2v evaluate`: what it prints and writes, that every option does something, and its mistakes."""

import csv
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("scenedetect")

from streamt2v import config
from streamt2v.cli import progress
from streamt2v.media import reading, writing
from tests.cli.helpers import call, result

FRAMES = 40
QUICK = ["--flow-size", 48, "--clip", "none", "--quiet"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ball drifting over the sea in the demo's world, with settings as `generate` writes them."""
    import torch

    from streamt2v.media.frames import to_u8
    from streamt2v.training.world.drawing import render
    from streamt2v.training.world.scenes import sample_scenes

    scene = sample_scenes(1, torch.Generator().manual_seed(0))
    frames = to_u8(render(scene, torch.arange(FRAMES)[None], 48, 80)[0])
    run = config.merge(config.preset("demo"), {"prompt": "a red ball drifting left over the sea"})
    comment = json.dumps({"streamt2v": "0.1.0", "command": "generate", "config": config.to_flat(run)})
    return written(tmp_path_factory.mktemp("clips") / "clip.mp4", frames, comment)


@pytest.fixture(scope="module")
def darker(clip: Path) -> Path:
    """The same 20 levels darker, without settings."""
    frames = np.concatenate(list(reading.read_frames(clip)))
    return written(clip.with_name("darker.mp4"), np.maximum(frames, 20) - 20)


def written(path: Path, frames: Any, comment: str = "") -> Path:
    growing = path.with_suffix(".growing")
    writer = writing.SegmentWriter(growing, *frames.shape[1:3], Fraction(8), crf=0)
    writer.append(frames)
    writer.finish(path, comment)
    return path


def scores(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Scores of the first video, with `--json`."""
    assert call("evaluate", *QUICK, "--json", *arguments) == 0
    found: dict[str, Any] = result(capsys)["videos"][0]["scores"]
    return found


def test_only_pages_that_were_asked_for_are_rendered(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamt2v.metrics import report

    for page in ("as_html", "videos_csv", "frames_csv"):
        monkeypatch.setattr(report, page, lambda *_: pytest.fail("nobody asked for this page"))
    assert call("evaluate", *QUICK, clip) == 0


def test_json(clip: Path, darker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", clip, darker, "--flow-size", 48, "--json", "--quiet", "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    table = json.loads(captured.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    first, second = table["videos"]
    assert (first["video"], first["frames"], first["width"], first["fps"]) == (str(clip), FRAMES, 80, 8)
    assert first["stream_seams"] == [16, 24, 32]
    assert first["refine_seams"] == [24]
    assert first["prompt"] == "a red ball drifting left over the sea"
    assert "demo" in first["clip"]
    assert first["scores"]["clip_text"] is not None
    assert second["prompt"] == ""
    assert second["scores"]["clip_text"] is None
    assert second["scores"]["seam_score"] is None
    assert table["mean"]["flow"] == pytest.approx(np.mean([row["scores"]["flow"] for row in table["videos"]]))
    assert table["mean"]["clip_text"] == first["scores"]["clip_text"]
    assert "DIS" in table["settings"]["flow"]


def test_one_video_is_a_list_and_several_are_a_table(
    clip: Path, darker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("evaluate", clip, *QUICK) == 0
    alone = capsys.readouterr().out.splitlines()
    assert alone[0] == str(clip)
    assert any(line.startswith("mawe_paper ") and "as printed" in line for line in alone)
    assert alone[-1] == "CLIP: none"
    assert call("evaluate", clip, darker, *QUICK) == 0
    header, first, second, means, said = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["video", "scene_cuts", "mawe_paper"]
    assert [row.split()[0] for row in (first, second, means)] == [str(clip), str(darker), "mean"]
    assert len({len(row) for row in (header, first, second, means)}) == 1
    assert said == "CLIP: none"


def test_files(clip: Path, darker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, table, rows = tmp_path / "r.html", tmp_path / "t.csv", tmp_path / "f.csv"
    files = ["--report", page, "--csv", table, "--frames-csv", rows]
    assert call("evaluate", clip, darker, *QUICK, *files) == 0
    html = page.read_text()
    assert html.count("<h2>") == html.count("data:image/webp;base64,") == 2
    assert html.count("data:image/jpeg;base64,") == 2 * 24
    assert "<svg" in html
    with table.open() as lines:
        first, second = csv.DictReader(lines)
    assert (first["video"], first["frames"], first["clip_text"]) == (str(clip), str(FRAMES), "")
    assert float(second["flow"]) > 0
    with rows.open() as lines:
        measured = list(csv.DictReader(lines))
    assert len(measured) == 2 * FRAMES
    assert [row["frame"] for row in measured[:3]] == ["0", "1", "2"]
    assert measured[0]["change"] == ""
    assert float(measured[1]["change"]) > 0
    # What exists is kept unless it is said otherwise.
    before = page.read_bytes()
    assert call("evaluate", darker, *QUICK, "--report", page) == 5
    assert "--overwrite" in capsys.readouterr().err
    assert page.read_bytes() == before
    assert call("evaluate", darker, *QUICK, "--report", page, "--overwrite") == 0
    assert page.read_bytes() != before


def test_against(clip: Path, darker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scores(capsys, clip)["mse"] is None
    same = scores(capsys, clip, "--against", clip)
    assert (same["mse"], same["psnr"], same["ssim"]) == (0, None, pytest.approx(1))
    other = scores(capsys, darker, "--against", clip)
    first, second = (np.concatenate(list(reading.read_frames(path))).astype(float) for path in (clip, darker))
    assert other["mse"] == pytest.approx(np.square(first - second).mean())
    assert other["psnr"] == pytest.approx(10 * np.log10(255**2 / np.square(first - second).mean()))
    assert 0.5 < other["ssim"] < 1


def test_every_option_changes_something(
    clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = scores(capsys, clip)
    assert scores(capsys, clip, "--seams", "10:40:10")["seam_score"] != plain["seam_score"]
    assert scores(capsys, clip, "--window", 3)["stagnation"] != plain["stagnation"]
    assert scores(capsys, clip, "--flow-size", 64)["flow"] > plain["flow"]
    demo = scores(capsys, clip, "--clip", "demo")
    assert demo["clip_text"] > 0 and plain["clip_text"] is None
    assert scores(capsys, clip, "--clip", "demo", "--clip-every", 16)["clip_text"] != demo["clip_text"]
    assert scores(capsys, clip, "--clip", "demo", "--prompt", "a green moon")["clip_text"] != demo["clip_text"]
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    for quiet in ((), ("--quiet",)):
        capsys.readouterr()
        assert call("evaluate", clip, "--flow-size", 48, "--clip", "none", "--json", *quiet) == 0
        assert (clip.name in capsys.readouterr().err) == (not quiet)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["none.mp4"], 3, "none.mp4 does not exist"),
        (["CLIP", "--against", "none.mp4"], 3, "none.mp4"),
        (["CLIP", "--seams", "nonsense"], 2, "16:1200:8"),
        (["CLIP", "--seams", "99"], 2, "has 40 frames"),
        (["CLIP", "--window", "0"], 2, "at least 1"),
        (["CLIP", "--flow-size", "8"], 2, "32 to 4096"),
        (["CLIP", "--clip", "nonsense"], 2, "nonsense"),
        (["CLIP", "--clip", "hub:nobody/nothing", "--offline"], 4, "offline"),
        (["CLIP", "--device", "nonsense"], 2, "nonsense"),
        (["CLIP", "--report", "."], 5, "is a folder"),
        (["CLIP", "--csv", "/proc/nowhere/x.csv"], 5, "/proc"),
    ],
)
def test_mistakes(
    arguments: list[str], code: int, said: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call("evaluate", *[str(clip) if argument == "CLIP" else argument for argument in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert "frames/s" not in captured.err  # nothing was measured yet
    assert list(tmp_path.iterdir()) == []


def test_what_is_stopped_writes_nothing(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamt2v.metrics import motion

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(motion, "compare", stop)
    assert call("evaluate", clip, *QUICK, "--csv", tmp_path / "scores.csv") == 130
    assert "nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("absent", ["cv2", "scenedetect"])
def test_without_the_extra(
    absent: str, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("streamt2v.metrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    assert call("evaluate", clip) == 2
    assert 'pip install ".[metrics]"' in capsys.readouterr().err
