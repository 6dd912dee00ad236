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

from streamt2v import weights
from streamt2v.weights import home, hub
from tests.cli.helpers import call
from tests.hub_server import Hub, serving

NAME = "streamingt2v"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_list_shows_state_size_licence_and_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("weights", "list") == 0
    first, what, later, _, demo, _, restore, _, *others = capsys.readouterr().out.splitlines()
    assert first.split() == [NAME, "absent", "10,032.3", "MB", "research", "only"]
    assert "published" in what
    assert later.split()[:2] == ["streamingsvd", "absent"]
    assert demo.split()[:2] == ["demo", "ok"]
    assert restore.split()[:2] == ["restore", "ok"]
    listed = dict.fromkeys((*weights.helpers(), *weights.pipelines()), "absent") | {"interpolate-small": "ok"}
    assert [line.split()[:2] for line in others[::2]] == [list(row) for row in listed.items()]
    assert call("weights", "list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [*weights.families(), *weights.helpers(), *weights.pipelines()]
    assert rows[0]["bytes"] == pytest.approx(10e9, rel=0.1)  # once converted
    assert rows[2]["bytes"] > 30e6


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
    assert call("weights", "path", "demo") == call("weights", "path", "interpolate-small") == 0
    shown = capsys.readouterr().out.split()
    assert shown == [str(own_home), str(own_home / NAME), *[str(weights.PACKAGE / "demo")] * 2]
    assert call("weights", "verify") == 0  # what was never pulled is no failure
    assert capsys.readouterr().out.startswith("demo: ")
    assert call("weights", "verify", NAME) == 4
    assert not own_home.exists()


def test_a_first_model_that_was_removed_is_not_listed_as_here(
    own_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository, folder = weights.pipelines()["svd"]["repository"], tmp_path / "snapshot"
    folder.mkdir()
    for name in ("a.json", "b.json"):
        (folder / name).write_text("{}")
    parts = {name: home.Recorded.of(folder / name).to_json() for name in ("a.json", "b.json")}
    row = {"commit": "1", "folder": str(folder), "files": parts}
    assert call("weights", "path", "svd") == call("weights", "verify", "svd") == 4
    home.remember("snapshots", {f"{repository} main *.json": row})
    capsys.readouterr()
    assert call("weights", "path", "svd") == call("weights", "verify", "svd") == 0
    assert capsys.readouterr().out == f"{folder}\nsvd: 2 files, all as recorded\n"
    (folder / "a.json").write_text("[]")
    assert call("weights", "verify", "svd") == 4
    assert "a.json is not as recorded" in capsys.readouterr().err
    for state in ("ok", "incomplete", "absent"):
        assert call("weights", "list", "--json") == 0
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
        assert rows["svd"]["state"] == state
        next(iter([*folder.iterdir(), tmp_path / "x"])).unlink(missing_ok=True)


@pytest.mark.parametrize("rows", ['"files": 3', '"snapshots": {"x": {}}', '"sources": {"x": 3}', '"files": {"x": {}}'])
def test_a_damaged_record_is_a_sentence(rows: str, own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_home.mkdir()
    (own_home / "weights.lock.json").write_text('{"schema": 1, ' + rows + "}")
    assert 4 in (call("weights", "list"), call("weights", "list", NAME))
    assert "cannot be used" in capsys.readouterr().err


def test_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("list", "pull", "verify", "path", "convert"):
        assert call("weights", command, "--help") == 0
        assert f"streamt2v weights {command}" in capsys.readouterr().out


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
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
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
    assert "repeat the command to continue" in err
    assert "Traceback" not in err
    assert "\x1b" not in err


def test_stopping_while_a_first_model_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "snapshot", stop)
    assert call("generate", "a ball", "--model", "demo", "--init", "modelscope", "-o", tmp_path / "x.mp4") == 130
    assert "repeat the command to continue" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_published_file_is_refused_and_kept_for_a_look(server: Hub, own_home: Path) -> None:
    process = start(server, own_home)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 4
    assert out == ""
    assert "vidxtend.fp16.safetensors is neither a safetensors file nor a torch checkpoint" in err
    assert not (own_home / NAME).exists()
