"""A run that dies at any instant continues to the same frames; Ctrl-C leaves a playable partial file."""

import signal
from pathlib import Path

import pytest

from streamt2v import runs
from tests.cli.helpers import PROMPT, TINY, call, digest, generate, start, wait_for

FRAMES = 72


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    path = tmp_path_factory.mktemp("whole") / "out.mp4"
    assert generate(path, FRAMES) == 0
    return digest(path)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("base/*.mkv", 1), ("base/*.mkv", 3), ("state/output-*", 1), ("state/output-*3.safetensors", 1)],
    ids=["stage 2, first chunk", "stage 2", "stage 3, first group", "stage 3"],
)
def test_killed_runs_resume_to_the_same_frames(
    pattern: str, count: int, tmp_path: Path, whole: tuple[int, str]
) -> None:
    path = tmp_path / "out.mp4"
    process = start("generate", PROMPT, "--frames", FRAMES, "-o", path, *TINY)
    wait_for(runs.directory_for(path), pattern, count)
    process.kill()
    process.communicate()
    assert not path.exists()
    assert generate(path, FRAMES) == 5  # neither lost nor overwritten without a word
    assert generate(path, FRAMES, "--resume") == 0
    assert digest(path) == whole
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_a_playable_part(
    sent: signal.Signals, code: int, tmp_path: Path, whole: tuple[int, str]
) -> None:
    path = tmp_path / "out.mp4"
    process = start("generate", PROMPT, "--frames", FRAMES, "-o", path, *TINY)
    wait_for(runs.directory_for(path), "state/output-*", 1)
    process.send_signal(sent)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert "--resume" in said
    assert "Traceback" not in said
    partial = tmp_path / "out.partial.mp4"
    assert 0 < digest(partial)[0] < FRAMES
    assert generate(path, FRAMES, "--resume") == 0
    assert digest(path) == whole
    assert list(tmp_path.iterdir()) == [path]  # the partial file is gone too


def test_resume_refuses_other_settings_and_accepts_a_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.mp4"
    assert generate(path, 20, "--keep-run") == 0
    assert runs.exists(runs.directory_for(path))
    assert generate(path, 20, "--resume", "--guidance", 9) == 5
    assert "guidance" in capsys.readouterr().err
    assert generate(path, 20, "--overwrite") == 0
    before = path.stat().st_mtime_ns
    assert generate(path, 20, "--resume") == 0
    assert path.stat().st_mtime_ns == before
    assert generate(path, 20, "--resume", "--guidance", 9) == 5
    without_seed = [argument for argument in TINY if argument not in ("--seed", "7")]
    assert call("generate", PROMPT, "--frames", 20, "-o", path, *without_seed, "--resume") == 0
    assert path.stat().st_mtime_ns == before


def test_refine_resumes_too(tmp_path: Path) -> None:
    source, path, again = (tmp_path / f"{name}.mp4" for name in ("in", "out", "again"))
    assert generate(source, 60, "--no-refine") == 0
    options = ["--refine-steps", 2, "--size", "160x96", "--seed", 4, "--threads", 1, "--quiet"]
    assert call("refine", source, "-o", again, *options) == 0
    process = start("refine", source, "-o", path, *options)
    wait_for(runs.directory_for(path), "state/output-*", 1)
    process.kill()
    process.communicate()
    assert call("refine", source, "-o", path, *options, "--resume") == 0
    assert digest(path) == digest(again)
