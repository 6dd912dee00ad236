"""What a user sees from the first second to the last line; a family without networks makes the videos."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamt2v.cli import progress
from streamt2v.jobs import run_directory
from streamt2v.media import writing
from streamt2v.runs import output
from streamt2v.runs.pace import Status
from tests.cli.helpers import SCHEMA, call, made

pytestmark = pytest.mark.usefixtures("toy_family")
TOY = ("--model", "toy", "--device", "cpu", "--threads", "1")


def interrupt_after(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when so many groups of frames are written; also where the tests run in a shell's background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    append, written = writing.SegmentWriter.append, list[int]()

    def counting(writer: writing.SegmentWriter, group: Any) -> writing.SegmentMark:
        if len(written) == groups:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            while True:  # in the main thread the signal ends this, in another one that ends with the run
                time.sleep(0.01)
        written.append(len(group))
        return append(writer, group)

    monkeypatch.setattr(writing.SegmentWriter, "append", counting)


def test_the_ending_says_what_was_made_and_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my ball.mp4"
    assert call("generate", "abc", "--frames", 20, "--seed", 7, "-o", path, *TOY) == 0
    said = capsys.readouterr()
    assert said.out == f"{path}\n"
    made, following = said.err.splitlines()[-2:]
    assert made.startswith("64x32, 20 frames (2.5 s), 0.0")
    assert made.endswith("frames/s, seed 7")
    assert following == f"next: streamt2v preview '{path}'; or extend --frames 40, rerun"
    again = tmp_path / "again.mp4"
    assert call("refine", path, "-o", again, *TOY) == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"rerun --source '{path}'")
    assert call("generate", "abc", "--frames", 20, "-o", tmp_path / "base.mp4", *TOY, "--no-refine") == 0
    assert "; or refine, extend" in capsys.readouterr().err
    assert call("generate", "abc", "--frames", 20, "-o", tmp_path / "quiet.mp4", *TOY, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_footage_is_not_offered_to_be_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    footage, refined, longer = made(tmp_path / "in.mp4", 16), tmp_path / "refined.mp4", tmp_path / "longer.mp4"
    assert call("refine", footage, "-o", refined, "--size", "64x32", *TOY[2:]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"next: streamt2v preview {refined}; or rerun --source {footage}"
    assert call("extend", footage, "--frames", 24, "-o", longer, *TOY) == 2
    assert 'is not written in it\n  say it: --prompt "' in capsys.readouterr().err
    assert call("extend", footage, "--frames", 24, "-o", longer, *TOY, "--prompt", "abc") == 0
    ending = capsys.readouterr().err.splitlines()[-2:]
    assert "frames/s" not in ending[0]  # most frames were there
    assert "extend --frames 48" in ending[1]


@pytest.mark.parametrize(
    ("groups", "said"), [(0, "16 frames are kept, none can be watched yet"), (2, "16 of 40 frames can be watched: ")]
)
def test_ctrl_c_says_what_can_be_watched_and_how_to_go_on(
    groups: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.mp4"
    monkeypatch.setattr(output, "SAVING", 1e9)  # a state after every group
    with monkeypatch.context() as patch:
        interrupt_after(groups, patch)
        assert call("generate", "abc", "--frames", 40, "-o", path, *TOY) == 130
    shown = capsys.readouterr().err.splitlines()[-2:]
    assert said in shown[0]
    assert groups == 0 or Path(shown[0].partition("watched: ")[2]).is_file()
    assert shown[1] == f"  streamt2v resume {path} continues"
    assert call("info", path) == 0
    assert ("nothing can be watched yet" in capsys.readouterr().out) == (groups == 0)
    assert call("preview", path) == (3 if groups == 0 else 0)
    assert ("or resume it" in capsys.readouterr().err) == (groups == 0)
    assert call("resume", path) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"next: streamt2v preview {path}")


@given(
    status=st.builds(
        Status,
        kind=st.sampled_from(["doing", "start", "step", "chunk"]),
        stage=st.sampled_from(["stream", "refine", "loading stream.unet, 12.3 MB"]),
        chunk=st.integers(0, 9999), chunks=st.integers(0, 9999), step=st.integers(0, 50), steps=st.integers(0, 50),
        share=st.floats(0, 1), seconds_left=st.none() | st.floats(0, 1e6), memory_mb=st.floats(0, 1e5),
    ),
    name=st.sampled_from(["", "3/12 a-red-ball-floating-over-the-sea-at-sunset"]),
    width=st.integers(20, 200),
)  # fmt: skip
def test_a_line_fits_the_terminal(status: Status, name: str, width: int) -> None:
    shown = progress.line(name, status, 1.0, 5.0, width)
    assert len(shown) < width
    assert "\n" not in shown


def test_sixty_columns_hold_all_that_matters() -> None:
    status = Status("step", "stream", 96, 240, 13, 29, 12, 30, 0.37, 80.0, 540.0)
    assert progress.line("", status, 0.0, 9.0, 60) == "stream chunk 13/29, step 12/30   37%  1:20 left  540 MB"
    assert (
        progress.line("2/3 ball", status, 0.0, 9.0, 60) == "2/3: stream chunk 13/29, step 12/30  ━━╌╌╌   37%  1:20 left"
    )
    writing = progress.line("", Status("doing", "writing " + "a" * 80, share=1.0), 0.0, 9.0, 60)
    assert writing.endswith("aaa  100%  0:09 so far")
    long = progress.line("2/3 a-blue-star-over-the-city", status, 0.0, 9.0, 100)
    assert long.startswith("2/3 a-blue-star-over-the: stream")  # cut at a word
    narrow = progress.line("2/3 a-blue-star-over-the-city", status, 0.0, 9.0, 62)
    assert narrow.startswith("2/3: stream")  # not "2/3 a: stream"
    wide = progress.line("2/3 ball", status, 20.0, 9.0, 100)
    assert wide.startswith("2/3 ball: stream chunk 13/29, step 12/30  ━")
    assert wide.endswith(" 37%  1:00 left  540 MB")


def test_frames_are_written_while_the_next_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write does not end before the second group is there; a state is saved after its frames."""
    given, order, second = output.Output.append, list[str](), threading.Event()
    write, save = writing.SegmentWriter.append, run_directory.RunDirectory.save_state

    def append(there: output.Output, finished: output.Finished) -> None:
        order.append("made")
        if order.count("made") == 2:
            second.set()
        given(there, finished)

    def writes(writer: writing.SegmentWriter, group: Any) -> writing.SegmentMark:
        assert second.wait(60)
        order.append("written")
        return write(writer, group)

    def saves(run: run_directory.RunDirectory, name: str, *more: Any) -> None:
        save(run, name, *more)
        order.extend(["saved"] * (name == "output"))

    monkeypatch.setattr(output, "SAVING", 1e9)  # a state after every group
    monkeypatch.setattr(output.Output, "append", append)
    monkeypatch.setattr(writing.SegmentWriter, "append", writes)
    monkeypatch.setattr(run_directory.RunDirectory, "save_state", saves)
    assert call("generate", "abc", "--frames", 40, "-o", tmp_path / "out.mp4", *TOY) == 0
    assert order[:3] == ["made", "made", "written"]
    assert [what for what in order if what != "made"] == ["written", "saved"] * order.count("made")


def test_the_line_stays_with_a_stage_while_another_works_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    shown, lines = progress._Shown(Status("start", "stream", 0, 48)), list[str]()
    told = [
        ("stream", 0.1, 0.2),
        ("refine", 0.2, 0.1),
        ("stream", 0.3, 0.1),
        ("refine", 0.4, 1.9),
        ("refine", 0.5, 0.3),
    ]
    for stage, share, seconds in told:
        clock.now += seconds
        shown.tell(Status("step", stage, 0, 48, 1, 3, 1, 2, share, 60.0))
        lines.append(shown.line("", 80))
    assert [(one.split()[0], re.findall(r"\d+%", one)) for one in lines] == [
        ("stream", ["10%"]), ("stream", ["20%"]), ("stream", ["30%"]), ("stream", ["40%"]), ("refine", ["50%"]),
    ]  # fmt: skip


class Terminal:
    """A terminal of so many columns as stderr, and what it saw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
        self.outer, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
        self.seen, self.file = b"", os.fdopen(inner, "w")
        monkeypatch.setattr(sys, "stderr", self.file)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.delenv("NO_COLOR", raising=False)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(self.outer, 1 << 16):
                self.seen += part

    def text(self) -> str:
        self.file.close()
        self.reader.join()
        return self.seen.decode()


@pytest.fixture
def drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is told is drawn, however busy the machine is that draws a few times a second."""
    tell = progress.Progress.tell

    def telling(shown: progress.Progress, status: Status, job: str = "") -> None:
        tell(shown, status, job)
        if shown.live is not None:
            shown.live.refresh()

    monkeypatch.setattr(progress.Progress, "tell", telling)


def test_the_time_goes_on_without_news(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 80)
    with progress.Progress() as shown:
        shown.doing("waiting")
        while not re.search(rb"waiting  \d:(?!00)\d\d so far", terminal.seen):
            time.sleep(0.02)
    terminal.text()


@pytest.mark.usefixtures("drawn_at_once")
@pytest.mark.parametrize("columns", [60, 80])
def test_a_terminal_shows_one_line_from_checking_to_writing(
    columns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch, columns)
    assert call("generate", "abc", "--frames", 400, "-o", tmp_path / "out.mp4", *TOY) == 0
    seen = terminal.text()
    assert capsys.readouterr().out == f"{tmp_path / 'out.mp4'}\n"
    for said in ("checking out.mp4", "stream chunk ", "refine chunk ", " left  ", "MB", "next: streamt2v preview"):
        assert said in seen
    drawn = [row for row in re.split(r"[\r\n]|\x1b\[\d*[A-K]", seen) if "chunk" in row]
    assert max(map(len, drawn)) < columns
    shares = [int(number) for number in re.findall(r"(\d+)%", seen)]
    assert shares == sorted(shares)
    assert shares[-1] > 80


@pytest.mark.usefixtures("drawn_at_once")
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_results_stand_on_lines_of_their_own(
    more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both streams are the same terminal: no path follows what is left of the live line."""
    rows, out = tmp_path / "rows.txt", tmp_path / "videos"
    rows.write_text("abc\nabcdef\n")
    terminal = Terminal(monkeypatch, 250)
    monkeypatch.setattr(sys, "stdout", terminal.file)
    assert call("batch", rows, "--out-dir", out, *TOY, "--frames", 20, *more) == 0
    seen = terminal.text()
    shown = [row.partition(": ")[0] for row in re.split(r"[\r\n]|\x1b\[[\d;?]*[A-Za-z]", seen) if row]
    assert [row for row in shown if row in (f"{out}/abc.mp4", f"{out}/abcdef.mp4")] == [
        f"{out}/abc.mp4",
        f"{out}/abcdef.mp4",
    ]
    assert more or " so far" in seen or " left  " in seen


def test_json_on_a_terminal_has_no_live_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 250)
    monkeypatch.setattr(sys, "stdout", terminal.file)
    assert call("generate", "abc", "--frames", 20, "-o", tmp_path / "out.mp4", *TOY, "--json") == 0
    rows = terminal.text().splitlines()
    assert "\x1b" not in "".join(rows)
    assert sum(row.startswith("{") for row in rows) == sum("{" in row for row in rows) > 5


def test_a_pipe_gets_few_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--frames", 40, "-o", tmp_path / "out.mp4", *TOY)
    assert call("generate", "abc", *options) == 0
    assert len(capsys.readouterr().err.splitlines()) == 3  # what begins, what was made, what comes next
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert call("generate", "abc", *options, "--overwrite") == 0
    said = capsys.readouterr().err
    assert re.search(r"^refine chunk \d+/9 .* \d+%  \d:\d\d left  \d+ MB$", said, re.MULTILINE)
    assert "\x1b" not in said


def test_a_single_video_streams_the_events_of_a_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generate", "abc", "--frames", 40, "-o", tmp_path / "out.mp4", *TOY, "--json") == 0
    said = capsys.readouterr()
    events = [json.loads(row) for row in said.out.splitlines()]
    for event in events:
        SCHEMA.validate(event)
    assert [event["type"] for event in events if event["type"] != "progress"] == ["start", *["chunk"] * 9, "result"]
    assert {event["job"] for event in events[:-1]} == {"out"}
    chunks = [event for event in events if event["type"] == "chunk"]
    assert chunks[-1]["share"] == 1.0
    assert chunks[-1]["seconds_left"] == 0.0
    assert min(event["memory_mb"] for event in chunks) > 50
    assert "loading torch" in {event.get("what") for event in events}
    assert events[-1]["frames"] == 40


def test_a_batch_says_which_of_how_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    rows = tmp_path / "rows.txt"
    rows.write_text("abc\nabcdef\n")
    assert call("batch", rows, "--out-dir", tmp_path / "videos", *TOY, "--frames", 20) == 0
    said = capsys.readouterr().err
    assert "1/2 abc: stream chunk 1/2" in said
    assert "2/2 abcdef: refine chunk " in said


@pytest.mark.parametrize("command", ["doctor", "preview", "report", "evaluate"])
def test_commands_that_take_long_say_what_they_do(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    monkeypatch.setattr(progress.Progress, "doing", lambda self, text: said.append(text))
    path = made(tmp_path / "in.mp4", 4)
    more = ["--clip", "none", "--flow-size", 32] if command == "evaluate" else []
    assert call(command, *([path] if command != "doctor" else []), *more) in (0, 4)
    assert said[0] in ("checking this machine", "reading in.mp4", "loading what measures")
