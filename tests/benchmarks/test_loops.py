"""benchmarks/loops.py: it measures the frames of the command, and asks its bars in the right direction."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from streamt2v.jobs import run_directory
from streamt2v.jobs.run_directory import RunDirectory
from streamt2v.media.frames import Frames
from tests.cli.helpers import call

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {"stream.height": 24, "stream.width": 40, "stream.num_inference_steps": 2, "initialize.num_inference_steps": 2}
SEED, FRAMES = 3, 34


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import loops  # type: ignore[import-not-found]

    found: ModuleType = loops
    return found


def base_frames(path: Path, prompt: str, frames: int, *more: object) -> Frames:
    """The base video of a run of the command."""
    settings = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    command = ["generate", prompt, "--frames", frames, "-o", path, "--seed", SEED, "--size", "80x48", *settings]
    assert call(*command, "--quality", "balanced", "--no-refine", "--keep-run", "--threads", 1, "-q", *more) == 0
    place = run_directory.directory_for(path)
    with RunDirectory.open(place, run_directory.recorded(place).recipe, resume=True) as directory:
        return np.concatenate(list(directory.base_frames()))


def test_what_is_measured_is_what_the_command_makes(tmp_path: Path, loops: ModuleType) -> None:
    prompt = loops.prompt_of(0, SEED)
    maker, picture = loops.Maker(prompt, SEED, tuple(SMALL.items())), np.full((24, 40, 3), (40, 200, 60), np.uint8)
    Image.fromarray(picture).save(tmp_path / "green.png")
    plain = maker.video(FRAMES)
    asked: dict[str, tuple[Frames, int, list[object]]] = {
        "plain": (plain, FRAMES, []),
        "window": (maker.video(16, "stream"), 16, ["--loop"]),
        "ring": (maker.video(FRAMES, "ring"), FRAMES, ["--set", "loop=ring"]),
        "home": (maker.video(FRAMES, "stream"), FRAMES, ["--loop"]),
        "until": (maker.video(FRAMES, shown={FRAMES - 1: picture[None]}), FRAMES, ["--until", tmp_path / "green.png"]),
    }
    for name, (made, frames, options) in asked.items():
        assert np.array_equal(made, base_frames(tmp_path / f"{name}.mp4", prompt, frames, *options)), name
        assert name == "plain" or not np.array_equal(made, plain[:frames])


def test_the_way_there_begins_where_the_video_departs(loops: ModuleType) -> None:
    plain = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    made = plain.copy()
    made[15:, ..., :] += 5
    found = loops.way_there(made, plain, np.full((1, 1, 3), 34, np.uint8))
    assert found == {"jump": 10.0, "plain_jump": 1.0, "even": pytest.approx(20 / 6), "led": 5}


def test_bars_and_the_worst_are_on_the_right_side(loops: ModuleType) -> None:
    rows: list[dict[str, Any]] = [
        {"home": {"wrap": wrap, "motion": 2 - wrap, "psnr": psnr}}
        for wrap, psnr in ((1.0, 99.0), (1.3, 30.0), (1.5, 9.0))
    ]
    found = loops.summary(rows)["home"]
    assert found["wrap"] == {"least": 1.0, "median": 1.3, "most": 1.5, "reached": 2}
    assert found["motion"] == {"least": 0.5, "median": 0.7, "most": 1.0, "reached": 1}
    assert found["psnr"]["reached"] == 2
    assert "| home | 2 (1.30, at most 1.50) |  | 1 (0.70, at least 0.50) | 2 " in loops.table(loops.summary(rows), 3)


def test_prompts_are_in_words_that_the_demo_knows(loops: ModuleType) -> None:
    known = loops.vocabulary.load(loops.score.WEIGHTS / "vocabulary.json")
    prompts = [loops.prompt_of(index, SEED) for index in range(20)]
    assert len(set(prompts)) > 15
    assert [prompt for prompt in prompts if known.unknown_words(prompt)] == []


def test_a_run_leaves_its_results_and_goes_on(tmp_path: Path) -> None:
    out, surroundings = tmp_path / "found.json", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        REPOSITORY / "benchmarks" / "loops.py",
        "--frames",
        FRAMES,
        "--out",
        out,
        "--sheets",
        tmp_path,
    ]
    command += ["--ways", "home", "until next", "--set", *(f"{key}={value}" for key, value in SMALL.items())]
    for prompts in (1, 2):
        said = subprocess.run(
            [*map(str, command), "--prompts", str(prompts)],
            env=surroundings,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert said.count("a ") >= 1
        assert f"{prompts}/{prompts} a " in said
    found = json.loads(out.read_text())
    assert "1/2" not in said  # made before
    assert [row["index"] for row in found["rows"]] == [0, 1]
    assert set(found["summary"]) == {"home", "until next"}
    assert found["settings"] == SMALL
    assert (tmp_path / "001.png").exists()
