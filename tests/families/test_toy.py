"""A new family is one file, one preset and one row; the real commands work with it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamt2v.jobs import run_directory
from streamt2v.media import reading, writing
from streamt2v.runs import output
from tests.cli.helpers import call
from tests.families import toy

pytestmark = pytest.mark.usefixtures("toy_family")
LOSSLESS = ("--set", "output.crf=0")


def levels(path: Path) -> list[float]:
    """The grey level in [-1, 1] of every frame of a video."""
    return [float(frame.mean()) / 127.5 - 1 for part in reading.read_frames(path) for frame in part]


def made(path: Path, *more: object) -> list[float]:
    assert call("generate", "abc", "--model", "toy", "-o", path, *LOSSLESS, "-q", *more) == 0
    return levels(path)


def test_it_streams_and_refines(tmp_path: Path) -> None:
    wanted = [toy.level("abc", frame) for frame in range(40)]
    assert made(tmp_path / "base.mp4", "--frames", 40, "--no-refine") == pytest.approx(wanted, abs=0.02)
    whole = made(tmp_path / "whole.mp4", "--frames", 40)
    assert whole == pytest.approx([-level for level in wanted], abs=0.02)
    assert reading.probe(tmp_path / "whole.mp4").height == 32
    turned = made(tmp_path / "turned.mp4", "--frames", 40, "--no-refine", "--at", 24, "abcdefgh")
    assert turned[24:] == pytest.approx([toy.level("abcdefgh", frame) for frame in range(24, 40)], abs=0.02)


def stopped(path: Path, patch: pytest.MonkeyPatch, groups: int) -> None:
    """A run that is stopped after so many groups of frames."""
    append, written = writing.SegmentWriter.append, list[int]()

    def stop(writer: writing.SegmentWriter, group: Any) -> writing.SegmentMark:
        if len(written) == groups:
            raise KeyboardInterrupt
        written.append(len(group))
        return append(writer, group)

    with patch.context() as inner:
        inner.setattr(writing.SegmentWriter, "append", stop)
        assert call("generate", "abc", "--model", "toy", "-o", path, *LOSSLESS, "-q", "--frames", 40) == 130


@pytest.mark.parametrize("share", [1e-9, 1e9], ids=["never again", "always"])
def test_a_stopped_run_goes_on_from_the_last_state(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refiner's state may be large, so it is saved as seldom as a share of the time allows; the first one always."""
    whole, saved = made(tmp_path / "whole.mp4", "--frames", 40), list[str]()
    save = run_directory.RunDirectory.save_state

    def spy(directory: run_directory.RunDirectory, name: str, *more: Any) -> None:
        saved.append(name)
        save(directory, name, *more)

    monkeypatch.setattr(output, "SAVING", share)
    monkeypatch.setattr(run_directory.RunDirectory, "save_state", spy)
    path = tmp_path / "out.mp4"
    stopped(path, monkeypatch, 3)
    assert saved.count("output") == (3 if share > 1 else 1)
    assert call("resume", path, "-q") == 0
    assert levels(path) == whole
    assert call("verify", path) == 0


def test_it_extends_refines_a_file_and_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, longer, again = (tmp_path / name for name in ("base.mp4", "longer.mp4", "again.mp4"))
    known = made(base, "--frames", 20, "--no-refine")
    options = ("--model", "toy", *LOSSLESS, "-q")
    assert call("extend", base, "--frames", 36, "-o", longer, "--no-refine", *options) == 0
    assert levels(longer)[:20] == pytest.approx(known, abs=0.02)
    assert len(levels(longer)) == 36
    assert call("refine", base, "-o", again, *options) == 0
    assert np.allclose(levels(again), [-level for level in known], atol=0.02)
    capsys.readouterr()
    assert call("plan", "abc", "--model", "toy", "--frames", 40, "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"] == "toy"


def test_it_makes_batches(tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("abc\nabcdef\n")
    assert call("batch", rows, "--out-dir", tmp_path / "videos", "--model", "toy", "--frames", 20, "-q") == 0
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2
