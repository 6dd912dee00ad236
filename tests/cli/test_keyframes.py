"""Pictures over time: shown at their frames, kept in recipe, batch and plan; resumed, made again, or refused."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from streamt2v import weights
from streamt2v.media import reading
from streamt2v.media.frames import Frames, to_float, to_u8
from streamt2v.models.encoders import decode_latents, encode_frames
from tests import crash
from tests.cli.helpers import PROMPT, TINY, call, digest, generate

BASE = ["--no-refine", "--set", "output.crf=0"]


def pixels(path: Path) -> Frames:
    return np.concatenate(list(reading.read_frames(path)))


@pytest.fixture
def green(tmp_path: Path) -> Path:
    path = tmp_path / "secret" / "green.png"
    path.parent.mkdir()
    Image.new("RGB", (80, 48), (40, 200, 60)).save(path)
    return path


@cache
def drawn() -> tuple[float, ...]:
    """The mean colour of the green picture as the VAE shows it."""
    vae = weights.load(weights.family("demo"), "stream.vae", "cpu", torch.float32)
    picture = to_float(np.full((1, 24, 40, 3), (40, 200, 60), dtype=np.uint8))
    with torch.inference_mode():
        return tuple(to_u8(decode_latents(vae, encode_frames(vae, picture)))[0].mean(axis=(0, 1)))


def shows(frame: Frames) -> bool:
    """Whether a frame is the green picture."""
    return bool(np.abs(frame.mean(axis=(0, 1)) - drawn()).max() < 3)


def test_pictures_are_shown_at_their_frames(tmp_path: Path, green: Path) -> None:
    path, plain = tmp_path / "out.mp4", tmp_path / "plain.mp4"
    assert generate(path, 45, *BASE, "--at", 20, green, "--until", green) == 0
    assert generate(plain, 45, *BASE) == 0
    made, usual = pixels(path), pixels(plain)
    assert len(made) == 45
    assert shows(made[20])
    assert [frame for frame in range(45) if (made[frame] == made[20]).all()] == [20, 44]
    assert not any(map(shows, usual))
    assert (made[:8] == usual[:8]).all()  # the first chunk is cut, so that many frames lead to frame 20
    assert (made[8:20] != usual[8:20]).any(axis=(1, 2, 3)).all()


def test_the_recipe_names_pictures_and_keeps_their_folder_private(tmp_path: Path, green: Path) -> None:
    path, again = tmp_path / "out.mp4", tmp_path / "again.mp4"
    assert generate(path, 24, *BASE, "--until", green, "--at", 18, green, "--at", 18, "a blue star") == 0
    comment = reading.probe(path).comment
    recipe = json.loads(comment)
    assert "secret" not in comment
    assert recipe["config"]["pictures.23"] == recipe["config"]["pictures.18"] == "green.png"
    assert recipe["pictures.23"]["sha256"]
    assert recipe["config"]["prompts.18"] == "a blue star"
    assert call("rerun", path, "-o", again, "--quiet") == 2
    assert call("rerun", path, "-o", again, "--at", 23, green, "--at", 18, green, "--quiet") == 0
    assert digest(again) == digest(path)


def test_a_killed_run_finds_its_pictures_again(tmp_path: Path, green: Path) -> None:
    whole, path = tmp_path / "whole.mp4", tmp_path / "out.mp4"
    options = [*BASE, "--at", 30, green, "--loop"]
    assert generate(whole, 48, *options) == 0
    crash.killed("stream", 2, "generate", PROMPT, "--frames", 48, "-o", path, *TINY, *options, log=tmp_path / "log")
    beside = tmp_path / "green.png"
    green.rename(beside)
    assert call("resume", path, "--quiet") == 0  # moved beside the output
    assert digest(path) == digest(whole)
    assert shows(pixels(path)[30])


def test_a_video_is_continued_to_a_picture(tmp_path: Path, green: Path) -> None:
    base, path = tmp_path / "base.mp4", tmp_path / "out.mp4"
    assert generate(base, 20, *BASE) == 0
    assert call("extend", base, "-o", path, *TINY, *BASE, "--frames", 30, "--until", green) == 0
    made = pixels(path)
    assert shows(made[29])
    assert not any(map(shows, made[:26]))


def test_rows_and_plans_have_pictures(tmp_path: Path, green: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "jobs.jsonl"
    row = {"id": "a", "prompt": PROMPT, "until": str(green), "at": [f"18={green}"], "loop": False}
    rows.write_text(json.dumps(row))
    assert call("batch", rows, "--out-dir", tmp_path / "out", *TINY, "--frames", 24, "--no-refine") == 0
    made = pixels(tmp_path / "out" / "a.mp4")
    assert shows(made[18])
    assert shows(made[23])
    capsys.readouterr()
    assert call("plan", PROMPT, "--frames", 240, "--until", green) == 0
    assert f"picture  at frame 239: {green}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--at", 5, "{}"], 2, "the first that a chunk leads to is frame 15"),
        (["--at", 99, "{}"], 2, "a picture is for frame 99, but the video ends with frame 23"),
        (["--at", 20, "none.png"], 3, "none.png"),
        (["--until", "{}", "--at", 20, "{}", "--at", 20, "{}"], 2, "two pictures are for frame 20"),
        (["--until", "{}", "--set", "loop=ring"], 2, "a loop in one window"),
        (["--until", "{}", "-o", "{}"], 2, "must end in"),
    ],
)
def test_pictures_that_cannot_be_shown_are_refused(
    arguments: list[object], code: int, said: str, tmp_path: Path, green: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(argument).format(green) for argument in arguments]
    assert call("generate", PROMPT, "--frames", 24, "-o", tmp_path / "x.mp4", *given) == code
    assert said in capsys.readouterr().err


def test_pictures_change_nothing_of_a_video_that_is_refined(
    tmp_path: Path, green: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.mp4"
    assert generate(base, 20, *BASE) == 0
    assert call("refine", base, "--set", f"pictures.18={green}") == 2
    assert "pictures change nothing" in capsys.readouterr().err
