"""`streamt2v weights`: what it prints, how it fails, and that a stopped pull can be continued."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamt2v import hub, weights
from tests.cli.helpers import call
from tests.hub_server import Hub, serving

NAME = "streamingt2v"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_list_shows_state_size_licence_and_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("weights", "list") == 0
    first, what, demo, _, *others = capsys.readouterr().out.splitlines()
    assert first.split() == [NAME, "absent", "size", "unknown", "research", "only"]
    assert "published" in what
    assert demo.split()[:2] == ["demo", "ok"]
    assert [line.split()[:2] for line in others[::2]] == [[name, "absent"] for name in weights.pipelines()]
    assert call("weights", "list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [*weights.families(), *weights.pipelines()]
    assert rows[0]["bytes"] == 0
    assert rows[1]["bytes"] > 30e6


def test_list_of_a_family_shows_files_and_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("weights", "list", NAME, "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["streamingt2v/stream/unet.safetensors"]["state"] == "absent"
    original = rows["PAIR/StreamingT2V/streaming_t2v.ckpt"]
    assert original["bytes"] == 25_568_849_525
    assert "--source original" in original["what"]
    assert all(row["licence"] and row["what"] for row in rows.values())


def test_path_and_verify(capsys: pytest.CaptureFixture[str], own_home: Path) -> None:
    assert call("weights", "path") == 0
    assert call("weights", "path", NAME) == 0
    assert call("weights", "path", "demo") == 0
    shown = capsys.readouterr().out.split()
    assert shown == [str(own_home), str(own_home / NAME), str(weights.PACKAGE / "demo")]
    assert call("weights", "verify") == 0  # what was never pulled is no failure
    assert f"{NAME}: not here" in capsys.readouterr().out
    assert call("weights", "verify", "--model", NAME) == 4
    assert not own_home.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["weights", "pull", "streamingt2"], 2, f"did you mean '{NAME}'"),
        (["weights", "pull", "demo"], 2, "nothing to pull"),
        (["weights", "pull", NAME, "--source", "copy"], 2, "known: vidxtend, original"),
        (["weights", "pull", NAME, "--offline"], 4, "no connection is made when offline"),
        (["generate", "a cat", "--model", NAME, "-o", "x.mp4"], 4, f"streamt2v weights pull {NAME}"),
    ],
)
def test_failures_are_sentences(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("list", "pull", "verify", "path", "convert"):
        assert call("weights", command, "--help") == 0
        assert f"streamt2v weights {command}" in capsys.readouterr().out


def test_nothing_heavy_is_loaded_to_list() -> None:
    code = (
        "import sys; from streamt2v.cli import main\n"
        "try: main(['weights', 'list'])\n"
        "except SystemExit: pass\n"
        "print('heavy', *({'torch', 'diffusers', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "heavy"


# ---------------------------------------------------------------------------------------------- a hub, own processes


@pytest.fixture
def server() -> Iterator[Hub]:
    repositories: dict[str, dict[str, bytes]] = {}
    for source in weights.family(NAME).sources:
        repositories.setdefault(source.repository, {})[source.path] = bytes(60_000)
    with serving(Hub(repositories)) as running:
        yield running


def start(server: Hub, home: Path) -> subprocess.Popen[str]:
    """Start a pull as its own process, with the variables that a user would set."""
    return subprocess.Popen(
        [sys.executable, "-m", "streamt2v", "weights", "pull", NAME],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={
            **os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home / "library"), "STREAMT2V_HOME": str(home),
            "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_pull_says_how_it_goes_on(server: Hub, own_home: Path, sent: signal.Signals, code: int) -> None:
    server.hold = threading.Event()
    process = start(server, own_home)
    began = time.monotonic()
    while not any(request.startswith("GET /benjamin-paine/") for request in server.asked):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert out == ""
    assert "goes on where it stopped" in err
    assert "Traceback" not in err
    assert "\x1b" not in err


def test_stopping_while_a_first_model_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "snapshot", stop)
    assert call("generate", "a ball", "--model", "demo", "--init", "modelscope", "-o", tmp_path / "x.mp4") == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_published_file_is_refused_and_kept_for_a_look(server: Hub, own_home: Path) -> None:
    process = start(server, own_home)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 4
    assert out == ""
    assert "vidxtend.fp16.safetensors is neither a safetensors file nor a checkpoint" in err
    assert not (own_home / NAME).exists()
