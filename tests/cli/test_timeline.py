"""Prompts over time: what is asked, where it takes effect, what is stored."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamt2v.families import networks
from streamt2v.media import reading
from streamt2v.media.frames import Frames
from streamt2v.models.encoders import encode_text
from streamt2v.models.unet3d import TextContext
from tests import crash
from tests.cli.helpers import PROMPT, TINY, call, digest, generate, result

LATER = "a blue star rising over the desert at night"
LOSSLESS = ["--set", "output.crf=0"]


def pixels(path: Path) -> Frames:
    return np.concatenate(list(reading.read_frames(path)))


def first_difference(one: Path, other: Path) -> int:
    """The first frame in which two videos of one length differ."""
    return int((pixels(one) != pixels(other)).any(axis=(1, 2, 3)).argmax())


def test_frames_follow_the_new_prompt_from_its_chunk_on(tmp_path: Path) -> None:
    plain, changed = tmp_path / "plain.mp4", tmp_path / "changed.mp4"
    options = ["--no-refine", "--guidance", 5, *LOSSLESS]
    assert generate(plain, 32, *options) == generate(changed, 32, *options, "--at", 20, LATER) == 0
    assert first_difference(plain, changed) == 24
    assert json.loads(reading.probe(changed).comment)["config"]["prompts.20"] == LATER


def test_a_stored_timeline_is_followed_by_refine_and_extend(tmp_path: Path) -> None:
    made, again, refined, extended = (tmp_path / f"{name}.mp4" for name in ("made", "again", "refined", "extended"))
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"0": PROMPT, "2.5s": LATER, "0:04": PROMPT}))
    assert call("generate", "--timeline", file, "--frames", 40, "-o", made, *TINY, "--no-refine") == 0
    assert generate(again, 40, "--at", 20, LATER, "--at", 32, PROMPT, "--no-refine") == 0
    assert digest(made) == digest(again)
    tiny = ["--refine-steps", 1, "--size", "80x48", "--quiet"]
    assert call("refine", made, "-o", refined, *tiny) == 0
    recorded = json.loads(reading.probe(refined).comment)["config"]
    assert (recorded["prompt"], recorded["prompts.24"], recorded["prompts.32"]) == (PROMPT, LATER, PROMPT)
    more = [*TINY, "--no-refine", "--frames", 64, "--at", 50, LATER]
    assert call("extend", made, "-o", extended, *more, "--at", 39, PROMPT) == 2  # inside what is there
    assert call("extend", made, "-o", extended, *more) == 0
    recorded = json.loads(reading.probe(extended).comment)["config"]
    assert [key for key in recorded if key.startswith("prompts.")] == ["prompts.24", "prompts.32", "prompts.50"]
    assert call("extend", made, "-o", extended, "-f", *more, "--prompt", LATER) == 0
    recorded = json.loads(reading.probe(extended).comment)["config"]
    assert [key for key in recorded if key.startswith("prompts.")] == ["prompts.50"]


def test_a_killed_run_resumes_on_its_timeline(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.mp4", tmp_path / "out.mp4"
    options = ["--at", 20, LATER, "--at", 36, PROMPT, "--no-refine"]
    assert generate(whole, 48, *options) == 0
    crash.killed("stream", 3, "generate", PROMPT, "--frames", 48, "-o", path, *TINY, *options, log=tmp_path / "log")
    assert generate(path, 48, "--resume", "--at", 21, LATER, "--no-refine") == 5
    assert generate(path, 48, "--resume", *options) == 0
    assert digest(path) == digest(whole)


def test_a_text_is_encoded_once_and_a_moved_change_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []

    def encode(tokenizer: Any, encoder: Any, texts: list[str]) -> TextContext:
        encoded.append(texts[1])
        return encode_text(tokenizer, encoder, texts)

    monkeypatch.setattr(networks, "encode_text", encode)
    loud = [option for option in TINY if option != "--quiet"]
    turns, long = ["--at", 20, LATER, "--at", 28, PROMPT], "ball " * 4000
    assert call("generate", PROMPT, "--frames", 48, "-o", tmp_path / "out.mp4", *loud, *turns, "--at", 40, long) == 0
    assert encoded == [PROMPT, LATER, long]
    said = capsys.readouterr().err
    assert re.search(r"reads \d+ of 400\d tokens, the rest is cut off: 'ball ball ball", said)
    assert max(map(len, said.splitlines())) < 300
    assert "the prompt of frame 20 begins with the next chunk, at frame 24" in said
    assert "the prompt of frame 28 begins with the next chunk, at frame 32" in said


def test_plan_shows_asked_and_actual_frames(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", PROMPT, "--frames", 64, "--at", 20, LATER, "--at", "5s", PROMPT) == 0
    said = capsys.readouterr().out
    assert f"from frame 24 (asked for at 20): {LATER}\n" in said
    assert f"from frame 40: {PROMPT}\n" in said
    assert call("plan", PROMPT, "--frames", 64, "--at", 20, LATER, "--json") == 0
    assert result(capsys)["prompts"][1] == {"asked": 20, "frame": 24, "text": LATER}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--at", "64", "x"], "ends with frame 63"),
        (["--at", "9s", "x"], "ends with frame 63"),
        (["--at", "1:20", "x"], "frame 640"),
        (["--at", "60", "x"], "never be seen"),
        (["--at", "0", "x"], "two prompts begin at frame 0"),
        (["--at", "24", "x", "--at", "3s", "y"], "two prompts begin at frame 24"),
        (["--at", "20", "x", "--at", "24", "y"], "both begin"),
        (["--at", "-8", "x"], "'-8' is not a time"),
        (["--at", "soon", "x"], "'soon' is not a time"),
        (["--at", "1:60", "x"], "'1:60' is not a time"),
        (["--at", "9" * 5000, "x"], "is not a time"),
        (["--at", "24", " "], "prompt is empty"),
        (["--at", "24"], "needs a time and a prompt"),
        (["--at"], "needs a time and a prompt"),
        (["--at", "24", "x" * 30_000], "too long"),
        (["--timeline", "many.json", "--frames", "20000"], "too long"),
        (["--timeline", "none.toml"], "none.toml"),
        (["--timeline", "list.json"], "is not a timeline"),
        (["--timeline", "twice.json"], "two prompts begin at frame 24"),
        (["--timeline", "deep.toml"], "is not a timeline"),
        (["--timeline", "zero.toml"], "two prompts begin at frame 0"),
    ],
)
def test_times_that_cannot_be(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("many.json").write_text(json.dumps({str(frame): "x" for frame in range(16, 16000, 8)}))
    Path("list.json").write_text('["a", "b"]')
    Path("twice.json").write_text('{"24": "a", "24": "b"}')
    Path("deep.toml").write_text('[24]\nprompt = "a"')
    Path("zero.toml").write_text('0 = "a"')
    for command in (["plan"], ["generate", "-o", "out.mp4"]):
        assert call(*command, PROMPT, "--frames", 64, *options) == 2
        assert said in capsys.readouterr().err
