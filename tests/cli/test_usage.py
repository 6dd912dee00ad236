"""The command line before any model loads: help, errors, exit codes, clean streams."""

import json
import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from streamt2v import jobs, planning, video, weights
from streamt2v.cli import main
from streamt2v.config import merge, preset
from streamt2v.errors import ConfigError
from streamt2v.runs import RunDirectory, directory_for


def call(*arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["generate", ""], 2, "the prompt is empty"),
        (["generate", "a red ball", "--frames", "0"], 2, "num_frames is 0"),
        (["generate", "a red ball", "--model", "dmeo"], 2, "did you mean 'demo'"),
        (["generate", "a red ball", "--set", "stream.etta=1"], 2, "did you mean 'stream.eta'"),
        (["generate", "a red ball", "--set", "nonsense"], 2, "must look like"),
        (["generate", "a red ball", "--size", "big"], 2, "1280x720"),
        (["plan", "a red ball", "--size", "9" * 5000 + "x3"], 2, "1280x720"),
        (["plan", "a red ball", "--memory", "inf"], 2, "--memory"),
        (["generate", "a red ball", "--fps", "0"], 2, "output.fps is 0"),
        (["generate", "a red ball", "-o", "out.avi"], 2, "must end in .mp4"),
        (["generate", "a red ball", "--image", "none.png", "-o", "x.mp4"], 3, "none.png"),
        (["generate", "a red ball", "--preset", "dmeo"], 2, "unknown preset"),
        (["generate", "a red ball", "--config", "none.toml"], 2, "cannot read"),
        (["generate", "a red ball", "-o", "/proc/nowhere/x.mp4"], 5, "/proc"),
        (["generate", "a red ball", "--quality", "superb"], 2, "superb"),
        (["refine", "none.mp4"], 3, "none.mp4"),
        (["info", "none.mp4"], 3, "none.mp4"),
        (["generate", "a red ball", "--resume", "-o", "."], 3, "not a file"),
        (["refine", ""], 3, "not a file"),
        (["extend", "/", "--frames", "30"], 3, "not a file"),
        (["plan", "a red ball", "--device", "banana"], 2, "'banana' is no device"),
        (["plan", "a red ball", "--device", "cuda:x"], 2, "'cuda:x' is no device"),
        (["generate", "\u044f" * 9000, "-o", "x.mp4"], 2, "too long"),
        (["train", "base"], 2, "needs a limit"),
        (["evaluate"], 2, "Missing argument"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_mistakes_are_one_clear_sentence(
    arguments: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"just text\n" * 50, bytes(range(256)) * 40])
def test_files_that_are_no_video(content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "odd.mp4"
    path.write_bytes(content)
    assert call("refine", str(path)) == 3
    assert "odd.mp4" in capsys.readouterr().err


def made(path: Path, frames: int, comment: str = "") -> Path:
    """Write a small video."""
    writer = video.SegmentWriter(path.with_suffix(".growing"), 16, 32, Fraction(8))
    writer.append(np.zeros((frames, 16, 32, 3), np.uint8))
    writer.finish(path, comment)
    return path


def test_more_frames_than_a_video_has_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = made(tmp_path / "in.mp4", 3)
    assert call("refine", str(path), "--set", "num_frames=4") == 2
    assert "num_frames is 4" in capsys.readouterr().err
    assert not (tmp_path / "in_refined.mp4").exists()


def test_a_recipe_with_half_a_character_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Anybody may have written the tag of a video."""
    path = made(tmp_path / "in.mp4", 3, r'{"streamt2v": "1", "config": {"prompt": "\ud800"}}')
    assert call("info", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["config"]["prompt"] == "\ud800"
    assert call("info", str(path)) == 0
    assert "prompt" in capsys.readouterr().out


def test_a_preview_that_is_a_folder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "sheet.png").mkdir()
    output = str(tmp_path / "x.mp4")
    assert call("generate", "a red ball", "-o", output, "--preview", str(tmp_path / "sheet.png")) == 5
    assert "is a folder" in capsys.readouterr().err


def test_what_weights_do_not_say_is_their_networks_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "read_header", lambda path: ("any", {}, None))
    wish = merge(preset("demo"), {"prompt": "a red ball", "num_frames": 40, "stream.overlap": 4})
    with pytest.raises(ConfigError, match="looks at 8 frames"):
        jobs.check(jobs.Job("generate", wish, tmp_path / "out.mp4"))


def test_a_run_of_another_version_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    recipe = {"command": "generate", "version": "0.0.1", "memory": {"old": 1}, "config": {"seed": 7}}
    RunDirectory.open(directory_for(path), recipe, resume=False).close()
    assert call("generate", "a red ball", "--resume", "-o", str(path)) == 5
    assert '"0.0.1", now it is' in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": {"fixed_seconds": 1}}', '{"a": null}'])
def test_damaged_timings_are_forgotten(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path))
    (tmp_path / "timings.json").write_text(text)
    wish = merge(preset("demo"), {"prompt": "a red ball"})
    assert planning.plan(wish, "cpu").seconds is None
    planning.remember(wish, dict.fromkeys(planning.MEASURED, 2.0))
    assert planning.plan(wish, "cpu").seconds == 2.0 + 2 * 2.0


def test_existing_output_is_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_text("precious")
    assert call("generate", "a red ball", "-o", str(path)) == 5
    assert "--overwrite" in capsys.readouterr().err
    assert path.read_text() == "precious"


def test_unknown_words_are_named(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    notices = jobs.check(
        jobs.Job("generate", merge(preset("demo"), {"prompt": "a red zebra over the sea"}), path, overwrite=True)
    )
    assert "zebra" in notices[0]
    assert "red" not in notices[0]
    assert "red" in notices[1]


def test_an_artist_that_is_not_asked_is_named(tmp_path: Path) -> None:
    wish = merge(preset("demo"), {"prompt": "a red ball", "initialize.text_to_image": "sdxl"})
    assert "sdxl is not used" in jobs.check(jobs.Job("generate", wish, tmp_path / "out.mp4"))[0]


def test_plan_is_json_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "a red ball", "--frames", "1200", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_frames"] == 1200
    assert len(plan["stream_chunks"]) == 149
    assert plan["refine_chunks"][-1]["stop"] == 1200
    assert call("plan", "a red ball", "--frames", "1200") == 0
    assert "149 chunks" in capsys.readouterr().out


def _children_seconds() -> float:
    """CPU time of finished child processes: on a shared machine the clock says less."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_instant_and_light() -> None:
    began = _children_seconds()
    out = subprocess.run(
        [sys.executable, "-m", "streamt2v", "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert "generate" in out
    assert _children_seconds() - began < 0.5
    heavy = python(
        "import sys; from streamt2v.cli import main\n"
        "try: main(['plan', 'a red ball'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'av', 'numpy', 'cv2', 'scenedetect'}\n"
        "print('heavy', *(heavy & set(sys.modules)))"
    )
    assert heavy.splitlines()[-1] == "heavy"


def test_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "refine", "resume", "verify", "rerun", "plan", "evaluate", "info", "doctor", "train"):
        assert call(command, "--help") == 0
        assert f"streamt2v {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--device", "nonsense"], 2, "nonsense"),
        (["--device", "cuda:77"], 2, "cuda:77"),
        (["--set", "stream.height=73"], 2, "multiples of 8"),
        (["--set", "stream.overlap=4", "--frames", "40"], 2, "looks at 8 frames"),
        (["--set", "refine.noise_level=1000"], 2, "noise"),
        (["--threads", "0"], 2, "0 threads"),
        (["--resume", "--set", "output.crf=99"], 2, "output.crf"),
        (["--negative", "\udcff"], 2, "UTF-8"),
    ],
)
def test_a_refused_run_leaves_nothing_behind(
    options: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "out.mp4"
    assert call("generate", "a red ball", "-o", str(path), *options) == code
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_config_file_with_a_wrong_type_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("model = 3")
    assert call("generate", "a red ball", "--config", str(file)) == 2
    assert "'3'" in capsys.readouterr().err


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "streamt2v", "generate", b"a red ball \xff", "-o", str(tmp_path / "x.mp4")],
        capture_output=True,
    )
    assert done.returncode == 2
    assert b"UTF-8" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m streamt2v weights list | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 141)  # 0 where the pipe took everything before it was closed
    assert done.stderr == ""
