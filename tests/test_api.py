"""`import streamt2v`: the same videos as from the command line, lazily, and nothing heavy before the first."""

import pydoc
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import streamt2v
from streamt2v import weights
from streamt2v.jobs import asked
from tests.cli.helpers import call, digest, made

REPOSITORY = Path(__file__).resolve().parents[1]
TOY = {"model": "toy", "device": "cpu", "threads": 1}
CLI = ("--model", "toy", "--device", "cpu", "--threads", "1", "-q")


@pytest.mark.usefixtures("toy_family")
def test_videos_are_those_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, told = tmp_path / "a.mp4", list[streamt2v.Status]()
    options = {"at": {"2s": "abcdefgh"}, "size": "96x48", "refine_steps": 3, "stream.eta": 0.5}
    video = streamt2v.generate("abc", path, frames="4s", seed=3, callback=told.append, **TOY, **options)
    typed = ["--at", "2s", "abcdefgh", "--size", "96x48", "--refine-steps", 3, "--set", "stream.eta=0.5"]
    assert call("generate", "abc", "--frames", 32, "--seed", 3, "-o", tmp_path / "b.mp4", *typed, *CLI) == 0
    assert (video.path, video.result.frames, video.result.seed) == (path, 32, 3)
    capsys.readouterr()
    assert digest(path) == digest(tmp_path / "b.mp4")
    assert video.recipe["config"]["refine.num_inference_steps"] == 3
    assert video.recipe["config"]["stream.width"] == 32  # the family's preset
    assert told[-1].share == 1.0
    assert {status.kind for status in told} == {"doing", "start", "chunk"}
    frames = video.frames()
    assert isinstance(first := next(frames), Image.Image)
    assert first.size == (96, 48)
    assert sum(1 for _ in frames) == 31
    longer = streamt2v.extend(video, frames=40, **TOY, no_refine=True)
    assert (longer.path.name, longer.result.frames) == ("a_extended.mp4", 40)
    larger = streamt2v.refine(longer, size="64x32", **TOY)
    assert (larger.path.name, larger.result.width) == ("a_extended_refined.mp4", 64)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("toy_family")
def test_mistakes_are_typed_errors(tmp_path: Path) -> None:
    with pytest.raises(streamt2v.StreamT2VError, match="unknown field 'sized'") as caught:
        streamt2v.generate("abc", tmp_path / "a.mp4", sized="64x32", **TOY)
    assert "size" in caught.value.hint
    made(tmp_path / "b.mp4", 4)
    with pytest.raises(streamt2v.StreamT2VError, match="exists already"):
        streamt2v.generate("abc", tmp_path / "b.mp4", frames=4, **TOY)
    assert streamt2v.generate("abc", tmp_path / "b.mp4", frames=4, overwrite=True, **TOY).result.frames == 4


@pytest.mark.usefixtures("toy_family")
def test_the_page_s_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs" / "python.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "default_family", lambda kind: "toy")
    scope: dict[str, object] = {}
    compiled = compile(example, "docs/python.md", "exec")
    exec(compiled, scope)
    assert {path.name for path in tmp_path.glob("*.*")} >= {"ball.mp4", "first.png", "longer.mp4", "larger.mp4"}
    assert np.asarray(Image.open("first.png")).shape == (32, 64, 3)


def test_help_explains_and_importing_is_instant() -> None:
    text = pydoc.plain(pydoc.render_doc(streamt2v))
    for said in (
        "streamt2v.generate(",
        "generate(prompt: 'str'",
        "frames(self)",
        "callback: called with",
        "extend(source",
    ):
        assert said in text, said
    assert set(streamt2v.__all__) <= set(dir(streamt2v))
    code = "import sys, streamt2v; print(len([name for name in sys.modules if name.startswith('streamt2v')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_what_the_docstring_names_are_options() -> None:
    named = ("model", "size", "fps", "quality", "image", "negative", "no-refine", "refine-steps", "device", "threads")
    assert {*named, "audio", "at", "stream.eta"} <= set(asked.row_fields())
