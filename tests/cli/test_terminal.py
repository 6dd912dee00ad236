"""What a shell and a terminal see: completion, colours only where they are wanted, a start that feels instant."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from rich.live import Live

from streamt2v.cli.progress import Progress
from streamt2v.errors import Terminated
from tests.cli.helpers import made

HEAVY = ("torch", "diffusers", "transformers", "av", "numpy", "cv2", "scenedetect", "huggingface_hub", "ray", "jinja2")
# The console script in a process of its own, which says in its last line what it imported.
SCRIPT = (
    "import sys; sys.argv = ['streamt2v', *sys.argv[1:]]; from streamt2v.cli.app import main\n"
    "try: main()\n"
    f"finally: print('heavy', *({set(HEAVY)!r} & set(sys.modules)), file=sys.__stderr__)"
)
LIGHT = (["--help"], ["--version"], ["plan", "a red ball"], ["weights", "list"], ["generate", "--help"])


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "NO_COLOR")}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, env=environment | variables
    )


def completed(shell: str, line: str) -> set[str]:
    """Ask for the completion of a line as each shell does."""
    words = line.split(" ")
    done = run(
        _STREAMT2V_COMPLETE=f"complete_{shell}", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1),
        _TYPER_COMPLETE_ARGS=line, _TYPER_COMPLETE_FISH_ACTION="get-args",
    )  # fmt: skip
    assert done.stderr == "heavy\n"
    return set(re.findall(r"[\w-]+", done.stdout))


@pytest.mark.parametrize(
    ("shell", "line", "names"),
    [
        ("bash", "streamt2v ref", {"refine"}),
        ("bash", "streamt2v generate x --pre", {"--preset", "--preview"}),
        ("bash", "streamt2v generate x --model d", {"demo"}),
        ("bash", "streamt2v plan x --preset s", {"streamingt2v"}),
        ("bash", "streamt2v plan x --quality f", {"fast"}),
        ("zsh", "streamt2v plan x --init m", {"modelscope"}),
        ("fish", "streamt2v weights pull s", {"streamingt2v", "svd", "sdxl"}),
    ],
)
def test_shells_complete_commands_options_and_names(shell: str, line: str, names: set[str]) -> None:
    found = completed(shell, line)
    assert names <= found
    assert not {"generate", "--seed", "animatediff", "balanced"} & found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_asks_this_command(shell: str) -> None:
    assert "_STREAMT2V_COMPLETE" in run(_STREAMT2V_COMPLETE=f"source_{shell}").stdout


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    assert run(*arguments).stderr.splitlines()[-1] == "heavy"


def test_light_commands_start_at_once() -> None:
    """0.27 s of processor time where this was written. The bar is 0.4 s on an idle machine; slow ones have twice."""
    for arguments in LIGHT[:4]:
        seconds = []
        for _ in range(3):
            before = os.times()
            run(*arguments)
            after = os.times()
            spent = after.children_user + after.children_system - before.children_user - before.children_system
            seconds.append(spent)
        assert median(seconds) < 0.8, arguments


CHEAP = (
    ["train", "base"], ["train", "nobody", "--steps", "1"], ["train", "base", "--steps", "1", "--device", "cuda:99"],
    ["evaluate", "text.mp4"], ["evaluate", "none.mp4"], ["evaluate", "ok.mp4", "--against", "none.mp4"],
    ["evaluate", "ok.mp4", "--report", "text.mp4"], ["report", "none.mp4"], ["report", "text.mp4"],
    ["preview", "text.mp4"], ["refine", "text.mp4"], ["refine", "ok.mp4", "-o", "ok.mp4"], ["extend", "ok.mp4"],
    ["refine", "none.mp4"], ["info", "none.mp4"], ["rerun", "none.mp4"], ["watch", "none.mp4"],
    ["generate", "a red ball", "-o", "text.mp4"], ["generate", "a red ball", "--audio", "text.mp4"],
    ["generate", "a red ball", "--image", "text.mp4"], ["generate", "a red ball", "--device", "cuda:99"],
    ["batch", "none.jsonl", "--out-dir", "videos"], ["generate", "a cat", "--model", "streamingt2v"],
)  # fmt: skip


@pytest.mark.parametrize("arguments", CHEAP, ids=" ".join)
def test_failures_are_said_before_anything_slow_is_loaded(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured: 0.2 s of processor time, 0.4 s where a file has to be decoded. The bar is 0.5 s on an idle machine."""
    made(tmp_path / "ok.mp4", 4)
    (tmp_path / "text.mp4").write_text("no video")
    monkeypatch.chdir(tmp_path)
    before = os.times()
    done = run(*arguments, STREAMT2V_HOME=str(tmp_path), PYTHONPATH=os.pathsep.join(map(os.path.abspath, sys.path)))
    spent = sum(os.times()[2:4]) - sum(before[2:4])
    assert done.returncode in (2, 3, 4, 5), done.stderr
    assert set(done.stderr.splitlines()[-1].split()) <= {"heavy", "av", "numpy"}
    assert spent < 1.0  # slow machines have twice


PIPED = (*LIGHT, ["nonsense"], ["plan", "x", "--frmaes", "3"], ["plan", "\x1b[31mred\x1b[0m", "--at", "16", "\x1b]0;x"])


@pytest.mark.parametrize("arguments", PIPED, ids=range(len(PIPED)))
def test_no_escape_codes_in_a_pipe(arguments: list[str]) -> None:
    done = run(*arguments, TERM="xterm-256color")
    assert "\x1b" not in done.stdout + done.stderr


def on_terminal(*arguments: str, **variables: str) -> str:
    """Run with stderr on a terminal and stdout in a pipe; return what the terminal saw."""
    outer, inner = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "streamt2v", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=inner,
        env=environment | {"TERM": "xterm-256color"} | variables, text=True,
    )  # fmt: skip
    os.close(inner)
    out, _ = process.communicate(timeout=60)
    assert "\x1b" not in out
    seen, deadline = b"", time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            part = os.read(outer, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(outer)
    return seen.decode()


def test_colours_are_for_terminals_that_want_them() -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert colour.search(on_terminal("nonsense"))
    assert not colour.search(on_terminal("nonsense", "--no-color"))
    assert not colour.search(on_terminal("nonsense", NO_COLOR="1"))
    assert "\x1b" not in on_terminal("nonsense", TERM="dumb")


def process(code: str) -> tuple[int, str]:
    """Run the command line as its own process, after some code; Ctrl-C works. Return exit code and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nfrom streamt2v.__main__ import main\nmain()", "--version"], text=True,
        capture_output=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    return done.returncode, done.stderr


def test_ctrl_c_while_the_command_line_loads_says_nothing() -> None:
    stopping = (
        "import os, signal, sys\n"
        "class Stopping:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stopping())"
    )
    assert process(stopping) == (-signal.SIGINT, "")


def test_a_process_ends_without_looking_for_garbage() -> None:
    """With torch loaded that took 1.2 s, also after Ctrl-C."""
    code, said = process(
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count() > 1000, file=sys.stderr))"
    )
    assert (code, said) == (0, "True\n")


def test_a_signal_while_the_display_begins_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Live] = []

    def interrupted(*_: object, **__: object) -> None:
        raise Terminated

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(Live, "start", interrupted)
    monkeypatch.setattr(Live, "stop", lambda self: ended.append(self))
    with pytest.raises(Terminated), Progress():
        pass
    assert len(ended) == 1
