"""The command line as scripts and terminals see it: real processes, their streams, and the demo's own weights."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from streamt2v import weights
from streamt2v.jobs.run_directory import directory_for
from streamt2v.weights import header
from tests import loras
from tests.cli.helpers import PROMPT, SCHEMA, TINY, digest, wait_for
from tests.cli.test_audio import heard, tone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LOUD = [option for option in TINY if option != "--quiet"]
ROWS = '{"prompt": "a red ball", "id": "a", "frames": "1s"}\n{"prompt": "a blue star", "duration": "17s"}\n'
REPOSITORY = Path(__file__).resolve().parents[2]


class Process:
    """A command line of its own; Ctrl-C works, stderr may be a terminal of so many columns."""

    def __init__(self, folder: Path, *arguments: object, columns: int = 0) -> None:
        self.outer, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns or 80, 0, 0))
        self.seen, before = b"", {key: os.environ[key] for key in os.environ if key not in ("NO_COLOR", "COLUMNS")}
        self.reader = threading.Thread(target=self._read)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "streamt2v", *map(str, arguments)], cwd=folder, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=inner if columns else subprocess.PIPE,
            env=before | {"TERM": "xterm-256color", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(inner)
        self.reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # the other end is closed
            while part := os.read(self.outer, 1 << 16):
                self.seen += part

    def end(self) -> tuple[int, str, str]:
        """Wait for its exit code, stdout, and what stderr or its terminal saw."""
        out, err = self.process.communicate(timeout=600)
        self.reader.join()
        os.close(self.outer)
        return self.process.returncode, out, err or self.seen.decode()

    def spent(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(folder: Path, *arguments: object, columns: int = 0) -> tuple[int, str, str]:
    return Process(folder, *arguments, columns=columns).end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short unrefined video, a sound, a LoRA, a file of jobs and a file that is no video."""
    folder = tmp_path_factory.mktemp("deep")
    (folder / "rows.jsonl").write_text(ROWS)
    (folder / "text.mp4").write_text("no video")
    tone(folder / "tone.wav", 6)
    shapes = {key: row.shape for key, row in header.read_index(weights.family("demo").path("stream.unet"))[1].items()}
    convolutions = [name for name in loras.layers(shapes) if name.endswith("conv1")]
    loras.written(folder / "style.safetensors", loras.tensors(shapes, "kohya", convolutions))
    code, out, err = run(
        folder, "generate", PROMPT, "-n", "2s", "--audio", "tone.wav", "-o", "in.mp4", *TINY, "--no-refine"
    )
    assert (code, out, err) == (0, "in.mp4\n", "")
    return folder


def events_of(out: str) -> list[dict[str, Any]]:
    """Parse NDJSON; every line must match the schema, and only the last may be without a job."""
    assert "\x1b" not in out
    events = [json.loads(line) for line in out.splitlines()]
    for event in events:
        SCHEMA.validate(event)
    assert events[-1]["type"] == "result" and "job" not in events[-1]
    assert all("job" in event for event in events[:-1])
    return events


VIDEOS = {
    "a time as frames": (["generate", PROMPT, "-n", "1s", "-o", "1.mp4", *LOUD], 0),
    "a duration": (["generate", PROMPT, "--duration", "0:02", "-o", "2.mp4", *LOUD, "--no-refine"], 0),
    "a rate of its own": (["generate", PROMPT, "--duration", "1s", "--fps", "24", "-o", "3.mp4", *LOUD], 0),
    "with sound": (["generate", PROMPT, "-n", "9", "--audio", "tone.wav", "-o", "4.webm", *LOUD], 0),
    "later prompts": (["generate", PROMPT, "-n", "24", "--at", "2s", "a blue ball", "-o", "5.mp4", *LOUD], 0),
    "an unknown word": (["generate", "a zebra", "-n", "8", "-o", "6.mp4", *LOUD, "--no-refine"], 0),
    "refine": (["refine", "in.mp4", "-o", "7.mp4", *LOUD[2:]], 0),
    "extend": (["extend", "in.mp4", "--duration", "3s", "-o", "8.mp4", *LOUD], 0),
    "frames between": (["interpolate", "in.mp4", "-o", "11.mp4", "--threads", "1"], 0),
    "a loop": (["generate", PROMPT, "-n", "20", "--loop", "-o", "12.mp4", *LOUD, "--no-refine"], 0),
    "a LoRA": (["generate", PROMPT, "-n", "8", "--lora", "style.safetensors:9", "-o", "13.mp4", *LOUD], 0),
    "every other frame is made": (["generate", PROMPT, "-n", "15", "--interpolate", "2", "-o", "14.mp4", *LOUD], 0),
    "variations": (["generate", PROMPT, "-n", "8", "--count", "2", "-o", "9.mp4", *LOUD, "--no-refine"], 0),
    "variations that are there": (["generate", PROMPT, "--count", "2", "-o", "9.mp4", *LOUD], 5),
    "a batch": (["batch", "rows.jsonl", "--out-dir", "videos", *LOUD, "--no-refine", "--shard", "1/2"], 0),
    "a batch, planned": (["batch", "rows.jsonl", "--out-dir", "videos", *LOUD, "--no-refine", "--dry-run"], 0),
    "variations, planned": (["generate", PROMPT, "--count", "3", "-o", "10.mp4", *LOUD, "--dry-run"], 0),
    "no prompt": (["generate", "", *LOUD], 2),
    "no multiple of the rate": (["interpolate", "in.mp4", "--fps", "9"], 2),
    "a loop of one frame": (["generate", PROMPT, "-n", "1", "--loop", *LOUD], 2),
    "no such LoRA": (["generate", PROMPT, "--lora", "none.safetensors", *LOUD], 4),
    "no variations": (["generate", PROMPT, "--count", "0", *LOUD], 2),
    "a prompt that nothing reads": (["refine", "in.mp4", "--model", "restore", "--prompt", "a cat", "-o", "15.mp4"], 2),
    "no such length": (["generate", PROMPT, "-n", "soon", *LOUD], 2),
    "two lengths": (["generate", PROMPT, "-n", "3", "--duration", "3s", *LOUD], 2),
    "no such option": (["generate", PROMPT, "--frmaes", "3"], 2),
    "unquoted": (["generate", "a", "red", "ball"], 2),
    "no such model": (["generate", PROMPT, "--model", "nobody"], 2),
    "no such device": (["generate", PROMPT, "--device", "cuda:99"], 2),
    "it exists": (["generate", PROMPT, "-o", "in.mp4", *LOUD], 5),
    "no such sound": (["generate", PROMPT, "--audio", "none.wav", *LOUD], 3),
    "no video": (["refine", "text.mp4", *LOUD[2:]], 3),
    "over itself": (["refine", "in.mp4", "-o", "in.mp4", *LOUD[2:], "-f"], 5),
    "no run": (["resume", "in2.mp4"], 5),
    "no rows": (["batch", "none.jsonl", "--out-dir", "videos"], 3),
    "no weights": (["generate", PROMPT, "--model", "streamingt2v"], 4),
}


def test_every_line_of_json_is_an_event(folder: Path) -> None:
    """In this order, as some look at what others made; failures too end with a result that says why."""
    for name, (command, wanted) in VIDEOS.items():
        code, out, err = run(folder, *command, "--json")
        assert code == wanted, (name, err)
        events = events_of(out)
        assert events[-1]["ok"] == (wanted == 0), name
        assert "Traceback" not in err, name
        if wanted:
            error = events[-1]["error"]
            assert error["exit_code"] == wanted and error["message"], name
            assert len(err.splitlines()) <= 8, (name, err)
    assert not (folder / "10-1.mp4").exists()
    assert sorted(path.name for path in (folder / "videos").iterdir()) == ["a.mp4"]
    assert {digest(folder / name)[0] for name in ("1.mp4", "9-1.mp4", "9-2.mp4", "videos/a.mp4")} == {8}
    lengths = {2: 16, 3: 24, 5: 24, 7: 16, 8: 24, 11: 32, 12: 20, 13: 8, 14: 15}
    assert {number: digest(folder / f"{number}.mp4")[0] for number in lengths} == lengths
    assert digest(folder / "13.mp4") != digest(folder / "1.mp4")
    assert digest(folder / "9-1.mp4") != digest(folder / "9-2.mp4")
    assert heard(folder / "4.webm")[0] == pytest.approx(9 / 8, abs=0.1)
    assert heard(folder / "7.mp4") == (pytest.approx(2, abs=0.1), pytest.approx(440, abs=5))
    assert heard(folder / "8.mp4")[1] == heard(folder / "11.mp4")[1] == pytest.approx(440, abs=5)


@pytest.mark.parametrize(
    "command",
    [
        ["plan", PROMPT, "--duration", "2m"], ["generate", PROMPT, "-n", "1:20", "--dry-run"], ["info", "in.mp4"],
        ["refine", "in.mp4", "--dry-run", "--device", "cpu"], ["verify", "in.mp4"], ["weights", "list"],
        ["interpolate", "in.mp4", "--fps", "24", "--dry-run"], ["info", "in.mp4", "--all"],
        ["generate", PROMPT, "-n", "60", "--loop", "--lora", "style.safetensors", "--dry-run"],
        ["extend", "in.mp4", "--duration", "1m", "--dry-run"], ["evaluate", "in.mp4", "--flow-size", "64"],
    ],
    ids=lambda command: " ".join(command[:1] + [word for word in command if word[0] == "-"]),
)  # fmt: skip
def test_what_only_looks_prints_one_object(command: Sequence[str], folder: Path) -> None:
    before = set(folder.rglob("*"))
    code, out, err = run(folder, *command, "--json")
    assert code == 0, err
    assert out.count("\n") == 1 and isinstance(json.loads(out), dict | list)
    assert set(folder.rglob("*")) == before


def test_aliases_make_the_same_frames(folder: Path) -> None:
    common = ["--frames", "8", "--steps", "1", "--threads", "1", "--no-refine", "-q"]
    small = ["--set", "stream.height=24", "--set", "stream.width=40"]
    for number, names in enumerate(
        (
            ["-s", "7", "--cfg", "3", "--negative-prompt", "night", "--width", "80"],
            ["--seed", "7", "--guidance", "3", "--negative", "night", "--size", "80x48"],
        )
    ):
        assert run(folder, "generate", PROMPT, *names, *common, *small, "-o", f"alias{number}.mp4")[0] == 0
    assert digest(folder / "alias0.mp4") == digest(folder / "alias1.mp4")


def drawn(seen: str) -> list[str]:
    """Return the rows that a terminal showed, without what moves the cursor or colours."""
    rows = re.split(r"[\r\n]|\x1b\[\d*[A-K]", seen)
    return [text for row in rows if (text := re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", row).rstrip())]


@pytest.mark.parametrize("columns", [60, 80])
def test_a_terminal_sees_one_line_until_the_end(columns: int, folder: Path) -> None:
    options, said = [*LOUD, "--steps", "8"], "next: streamt2v preview "
    commands = {
        "generate": (["generate", PROMPT, "-n", "40", "-o", f"t{columns}.mp4", *options], said),
        "refine": (["refine", "in.mp4", "-o", f"r{columns}.mp4", *LOUD[2:]], said),
        "interpolate": (["interpolate", "in.mp4", "-o", f"i{columns}.mp4", "--factor", "4"], said),
        "batch": (["batch", "rows.jsonl", "--out-dir", f"v{columns}", *options], "2 made, 0 already there, 0 failed"),
    }
    for name, (command, last) in commands.items():
        code, out, seen = run(folder, *command, columns=columns)
        assert code == 0, seen
        assert len(out.splitlines()) == (2 if name == "batch" else 1) and "\x1b" not in out
        assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") > 0, "the cursor comes back"
        rows = drawn(seen)
        live = [row for row in rows if re.search(r"chunk \d+/\d+|^(loading|checking|writing|reading) ", row)]
        assert live and max(map(len, live)) < columns
        assert any(re.search(r"\d+%  [\d:]+ (left|so far)", row) for row in live), name
        assert last in rows[-1], name
        shares = [int(share) for row in live for share in re.findall(r"(\d+)%", row)]
        assert name == "batch" or shares == sorted(shares)
        if name == "batch":
            assert any(row.startswith("2/2 ") for row in rows)


@contextmanager
def going_on(folder: Path, path: str, frames: int = 400) -> Iterator[Process]:
    """A run that will take a while, with its first chunk stored."""
    process = Process(folder, "generate", PROMPT, "--frames", frames, "-o", path, *LOUD)
    try:
        wait_for(directory_for(folder / path) / "base", "*.mkv", 2)
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
            process.end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_at_once(number: signal.Signals, folder: Path) -> None:
    """Within two seconds on an idle machine: it is said within half a second, and 0.2 s of processor time remain."""
    path = f"stopped{number}.mp4"
    with going_on(folder, path) as process:
        before = process.spent()
        process.process.send_signal(number)
        _, status, usage = os.wait4(process.process.pid, 0)
        process.process.returncode = os.waitstatus_to_exitcode(status)
        code, out, err = process.end()
    assert (code, out) == (128 + number, "")
    assert usage.ru_utime + usage.ru_stime - before < 1.0
    assert f"streamt2v resume {path} continues" in err.splitlines()[-1]
    assert "can be watched: " in err or "none can be watched yet" in err


def test_watch_follows_a_run_through_a_kill_to_its_end(folder: Path) -> None:
    with going_on(folder, "seen.mp4", 160) as process:
        watching = Process(folder, "watch", "seen.mp4")
        assert watching.process.stdout is not None
        url = watching.process.stdout.readline().strip()
        _, page = _fetched(url)
        assert "://" not in re.sub(r"http://127\.0\.0\.1\S*|http://www\.w3\.org\S*", "", page)
        states = [_state(url)]
        wait_for(directory_for(folder / "seen.mp4") / "base", "*.mkv", 6)
        states.append(_state(url))
        process.process.kill()
        process.end()
        states.append(_state(url))
        assert run(folder, "resume", "seen.mp4", "-q")[0] == 0
        states.append(_state(url))
    assert [state["state"] for state in states] == ["running", "running", "stopped", "finished"]
    done = [state["stages"][0]["done"] for state in states[:3]]
    assert done == sorted(done) and done[0] < done[1]
    assert states[-1]["size"] == (folder / "seen.mp4").stat().st_size
    assert digest(folder / "seen.mp4")[0] == 160
    for outside in ("../in.mp4", "..%2fin.mp4", "%2e%2e/in.mp4", "//etc/passwd", "nothing"):
        assert _fetched(url + outside)[0] in (400, 403, 404)
    assert _fetched(re.sub(r"/[^/]+/?$", "/", url))[0] == 403  # without its token
    watching.process.send_signal(signal.SIGINT)
    code, _, err = watching.end()
    assert code in (0, 130)
    assert "Traceback" not in err


def _state(url: str) -> dict[str, Any]:
    time.sleep(1.1)  # what the server knows may be a second old
    found: dict[str, Any] = json.loads(_fetched(f"{url}state")[1])
    return found


def _fetched(url: str) -> tuple[int, str]:
    """Return the status and the text of an answer."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, ""
