"""Stage 1 by models of others, end to end on tiny random pipelines; and a user's own video as the start."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamt2v.jobs.recipe import recipe_of
from streamt2v.media import reading, writing
from streamt2v.media.frames import Frames
from tests.cli.helpers import PROMPT, STARTS, TINY, FolderOf, call, digest, generate, result

# The library's Euler scheduler hands a tensor to numpy in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# Only stage 1 is looked at: one chunk, not refined, nearly lossless.
FIRST = [
    *TINY,
    "--steps",
    "2",
    "--no-refine",
    "--set",
    "output.crf=1",
    "--set",
    "initialize.height=32",
    "--set",
    "initialize.width=32",
]
VALUES = {"--seed": 8, "--steps": 3, "--guidance": 5, "--negative": "blue star"}


def first(path: Path, *more: object, prompt: str = PROMPT) -> tuple[int, str]:
    assert call("generate", prompt, "--frames", 16, "-o", path, *FIRST, *more) == 0
    return digest(path)


@pytest.mark.parametrize("name", STARTS)
def test_every_start_obeys_its_options(name: str, tmp_path: Path, start: Callable[[str], list[object]]) -> None:
    options = [*start(name), "--guidance", 4]
    plain = first(tmp_path / "plain.mp4", *options)
    assert plain[0] == 16
    assert first(tmp_path / "again.mp4", *options) == plain
    changed = ["--seed", *STARTS[name][3]]
    made = {first(tmp_path / f"{option}.mp4", *options, option, VALUES[option]) for option in changed}
    assert len(made | {plain}) == 1 + len(changed)


def test_a_whole_video_starts_from_another_model(
    tmp_path: Path, start: Callable[[str], list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.mp4"
    options = ["--set", "initialize.height=32", "--set", "initialize.width=32", *start("svd, sdxl")]
    assert generate(path, 41, *options, "--json") == 0
    assert result(capsys)["frames"] == digest(path)[0] == 41
    recipe = json.loads(reading.probe(path).comment)
    assert recipe["initializer"]["class"] == "StableVideoDiffusionPipeline"
    assert recipe["config"]["initialize.text_model"].endswith("svd")
    assert list(tmp_path.iterdir()) == [path]


def test_the_working_size_changes_the_frames_and_not_their_size(
    tmp_path: Path, start: Callable[[str], list[object]]
) -> None:
    small, large = tmp_path / "small.mp4", tmp_path / "large.mp4"
    options = start("modelscope")
    assert first(small, *options) != first(large, *options, "--set", "initialize.width=64")
    assert reading.probe(small).width == reading.probe(large).width == 80


def test_other_files_in_the_folder_cannot_continue_a_run(
    tmp_path: Path, start: Callable[[str], list[object]], folder_of: FolderOf, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.mp4"
    first(path, *start("modelscope"))
    again = [PROMPT, "--frames", 16, "-o", path, *FIRST, *start("modelscope"), "--resume"]
    assert call("generate", *again) == 0  # finished before
    config = folder_of("modelscope") / "unet" / "config.json"
    config.write_text(config.read_text() + " ")
    assert call("generate", *again) == 5
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--init", "modelskope"], 2, "'modelscope'"),
        (["--init", "hub:nobody"], 2, "hub:OWNER/NAME"),
        (["--init", "EMPTY"], 4, "no diffusers pipeline"),
        (["--init", "modelscope", "--image", "PICTURE"], 2, "from text alone"),
        (["--init", "svd"], 2, "no model and no folder 'paintr'"),
        (["--set", "initialize.guidance_scale=0"], 2, "only a third-party model"),
    ],
)
def test_mistakes_are_said_before_anything_loads(
    options: list[str], code: int, said: str, tmp_path: Path, folder_of: FolderOf, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, picture, path = tmp_path / "empty", tmp_path / "start.png", tmp_path / "out.mp4"
    empty.mkdir()
    Image.new("RGB", (8, 8)).save(picture)
    places = {"EMPTY": empty, "PICTURE": picture, "modelscope": folder_of("modelscope"), "svd": folder_of("svd")}
    given = [places.get(option, option) for option in options]
    assert generate(path, 16, *given, "--image-init", "paintr") == code
    assert said in capsys.readouterr().err
    assert not path.exists()


def test_plan_names_the_initializer(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", PROMPT, "--init", "svd", "--image-init", "sdxl") == 0
    assert "start    svd" in capsys.readouterr().out
    assert call("plan", PROMPT, "--json") == 0
    assert result(capsys)["initializer"] == "own"


# ------------------------------------------------------------------------------------------------------------ extend


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 21 frames that carries its prompt, at twice the base size."""
    path = tmp_path_factory.mktemp("source") / "in.mp4"
    assert generate(path, 21, "--no-refine", "--set", "output.crf=1", "--fps", 12) == 0
    return path


EXTEND = ["--size", "80x48", "--steps", "1", "--refine-steps", "2", "--seed", "7", "--device", "cpu", "--threads", "1"]
EXTEND += ["--set", "stream.height=24", "--set", "stream.width=40", "--set", "output.crf=1", "--quiet"]


@pytest.mark.parametrize(("frames", "refine"), [(22, True), (29, False), (50, True)])
def test_extending_keeps_the_source_and_counts_exactly(
    frames: int, refine: bool, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, more = tmp_path / "out.mp4", [] if refine else ["--no-refine"]
    assert call("extend", source, "--frames", frames, "-o", path, "--json", *EXTEND, *more) == 0
    assert result(capsys)["frames"] == frames
    made, before = (np.concatenate(list(reading.read_frames(item))).astype(float) for item in (path, source))
    assert len(made) == frames
    assert reading.probe(path).fps == Fraction(12)
    assert np.abs(made[:21] - before).mean() < 1  # encoded twice, not generated again
    assert np.abs(made[21:] - before[-1]).mean() > 1
    assert list(tmp_path.iterdir()) == [path]
    assert recipe_of(reading.probe(path).comment)["source"]["frames"] == 21  # where its chunks begin follows


def test_an_extended_video_depends_on_its_source_and_its_seed(source: Path, tmp_path: Path) -> None:
    def new_frames(name: str, *more: object) -> bytes:
        path = tmp_path / name
        assert call("extend", source, "--frames", 30, "-o", path, *EXTEND, "--no-refine", *more) == 0
        return np.concatenate(list(reading.read_frames(path)))[21:].tobytes()

    plain = new_frames("a.mp4")
    assert new_frames("b.mp4") == plain
    assert new_frames("c.mp4", "--seed", 8) != plain
    assert new_frames("d.mp4", "--prompt", "a blue star") != plain


@pytest.fixture(scope="module")
def extended(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    path = tmp_path_factory.mktemp("extended") / "whole.mp4"
    assert call("extend", source, "--frames", 50, *EXTEND, "-o", path) == 0
    return digest(path)


@pytest.mark.parametrize("group", [2, 4])
def test_an_interrupted_extension_resumes_to_the_same_frames(
    group: int, source: Path, extended: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.mp4"
    arguments = ["extend", source, "--frames", 50, *EXTEND]
    append, written = writing.SegmentWriter.append, []

    def stop(writer: writing.SegmentWriter, frames: Frames) -> writing.SegmentMark:
        if len(written) == group:
            raise KeyboardInterrupt
        written.append(len(frames))
        return append(writer, frames)

    with monkeypatch.context() as patched:
        patched.setattr(writing.SegmentWriter, "append", stop)
        assert call(*arguments, "-o", path) == 130
    assert call(*arguments, "-o", path, "--resume") == 0
    assert digest(path) == extended


@pytest.mark.parametrize(
    ("frames", "more", "code", "said"),
    [(21, [], 2, "has 21 already"), (40, ["--set", "stream.chunk=24"], 3, "continues from 24")],
)
def test_extending_says_what_is_wrong(
    frames: int, more: list[str], code: int, said: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("extend", source, "--frames", frames, "-o", tmp_path / "out.mp4", *EXTEND, *more) == code
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
