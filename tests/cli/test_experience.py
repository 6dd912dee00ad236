"""What a user sees from the first second to the last line; a family without networks makes the videos."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from streamt2v.media import writing
from tests.cli.helpers import call

pytestmark = pytest.mark.usefixtures("toy_family")
TOY = ("--model", "toy", "--device", "cpu", "--threads", "1")


def interrupt_after(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when so many groups of frames are written."""
    append, written = writing.SegmentWriter.append, list[int]()

    def counting(writer: writing.SegmentWriter, group: Any) -> writing.SegmentMark:
        if len(written) == groups:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        written.append(len(group))
        return append(writer, group)

    monkeypatch.setattr(writing.SegmentWriter, "append", counting)


def test_the_ending_says_what_was_made_and_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my ball.mp4"
    assert call("generate", "abc", "--frames", 20, "--seed", 7, "-o", path, *TOY) == 0
    said = capsys.readouterr()
    assert said.out == f"{path}\n"
    made, following = said.err.splitlines()[-2:]
    assert made.startswith("64x32, 2.5 s (20 frames), 0.0")
    assert made.endswith("frames/s with seed 7")
    assert following == f"next: streamt2v preview '{path}'; or refine, extend --frames 40, rerun"
    again = tmp_path / "again.mp4"
    assert call("refine", path, "-o", again, *TOY) == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"rerun --source '{path}'")
    assert call("generate", "abc", "--frames", 20, "-o", tmp_path / "quiet.mp4", *TOY, "--quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("groups", "said"), [(0, "16 frames are kept, none can be watched yet"), (2, "8 of 40 frames can be watched: ")]
)
def test_ctrl_c_says_what_can_be_watched_and_how_to_go_on(
    groups: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.mp4"
    with monkeypatch.context() as patch:
        interrupt_after(groups, patch)
        assert call("generate", "abc", "--frames", 40, "-o", path, *TOY) == 130
    shown = capsys.readouterr().err.splitlines()[-2:]
    assert said in shown[0]
    assert groups == 0 or Path(shown[0].partition("watched: ")[2]).is_file()
    assert shown[1] == f"  streamt2v resume {path} continues"
    assert call("resume", path) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"next: streamt2v preview {path}")
