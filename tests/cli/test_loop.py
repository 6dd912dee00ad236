"""Loops by the commands: exact lengths, home in every way, resumed, refined and extended."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from streamt2v.media import reading
from streamt2v.media.frames import Frames
from tests import crash
from tests.cli.helpers import PROMPT, TINY, call, digest, generate

BASE = ["--no-refine", "--set", "output.crf=0"]


def pixels(path: Path) -> Frames:
    return np.concatenate(list(reading.read_frames(path)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Frames]:
    """Frames of a video that is no loop, of so many frames; made once."""

    @cache
    def make(frames: int) -> Frames:
        path = tmp_path_factory.mktemp("plain") / "plain.mp4"
        assert generate(path, frames, *BASE, "--steps", 2) == 0
        return pixels(path)

    return make


@pytest.mark.parametrize("frames", [2, 11, 16, 17, 30])
@pytest.mark.parametrize("how", ["--loop", "ring"])
def test_a_loop_has_the_length_that_was_asked_for(
    frames: int, how: str, tmp_path: Path, plain: Callable[[int], Frames]
) -> None:
    path = tmp_path / "loop.mp4"
    asked = ["--steps", 2, *(["--loop"] if how == "--loop" else ["--set", "loop=ring"])]
    if how == "ring" and frames < 16:
        assert generate(path, frames, *BASE, *asked) == 2
        return
    assert generate(path, frames, *BASE, *asked) == 0
    made = pixels(path)
    assert len(made) == frames
    assert (made != plain(frames)).any()
    assert json.loads(reading.probe(path).comment)["config"]["loop"] == ("stream" if how == "--loop" else "ring")


def test_the_last_chunk_is_made_between_what_was_shown_and_the_first_frames(tmp_path: Path) -> None:
    """It has 12 new frames. Before them nothing changes, and all of them know what is ahead."""
    path, plain = tmp_path / "loop.mp4", tmp_path / "plain.mp4"
    assert generate(path, 45, *BASE, "--loop") == generate(plain, 45, *BASE) == 0
    differs = (pixels(path) != pixels(plain)).any(axis=(1, 2, 3))
    assert not differs[:33].any()
    assert differs[33:].all()


def test_a_killed_loop_resumes_to_the_same_frames(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.mp4", tmp_path / "out.mp4"
    options = ["--loop", "--set", "output.crf=0", "--size", "40x24"]
    assert generate(whole, 41, *options) == 0
    for stored in (2, 1):
        command = ["generate", PROMPT, "--frames", 41, "-o", path, *TINY, *options, "--resume"]
        crash.killed("stream", stored, *command, log=tmp_path / "log")
    assert call("resume", path, "--quiet") == 0
    assert digest(path) == digest(whole)


def test_a_video_is_brought_home(tmp_path: Path) -> None:
    base, path, plain = (tmp_path / f"{name}.mp4" for name in ("base", "loop", "plain"))
    assert generate(base, 20, *BASE) == 0
    more = [*TINY, *BASE, "--frames", 30]
    assert call("extend", base, "-o", path, *more, "--loop") == 0
    assert call("extend", base, "-o", plain, *more) == 0
    loop, straight = pixels(path), pixels(plain)
    assert len(loop) == 30
    assert (loop[:20] == straight[:20]).all()
    assert (loop[20:] != straight[20:]).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--frames", 1, "--loop"], "a loop of 1 frame"),
        (["--frames", 241, "--set", "loop=ring"], "from 16 to 240 frames"),
        (["--frames", 24, "--set", "loop=circle"], "must be one of no, stream, ring"),
    ],
)
def test_loops_that_cannot_be_made_are_refused(
    arguments: list[object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("generate", PROMPT, "-o", tmp_path / "x.mp4", *arguments) == 2
    assert said in capsys.readouterr().err
