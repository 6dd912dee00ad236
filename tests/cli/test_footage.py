"""`refine` of a video from elsewhere: by the small network on pixels, which makes none itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from streamt2v import weights
from streamt2v.config import merge
from streamt2v.jobs import needs, shown
from streamt2v.jobs.recipe import describe_video
from streamt2v.media import reading
from streamt2v.media.frames import resize, to_float
from tests.cli.helpers import PROMPT, call, digest, generate, made


def model_of(path: Path) -> str:
    return str(describe_video(path)["recipe"]["config"]["model"])


def test_footage_is_restored_and_own_videos_are_refined_by_their_family(tmp_path: Path) -> None:
    footage, own, out = made(tmp_path / "in.mp4", 9), tmp_path / "own.mp4", tmp_path / "out.mp4"
    assert call("refine", footage, "-o", out, "--size", "64x32", "-q") == 0
    assert (digest(out)[0], model_of(out)) == (9, "restore")
    used = describe_video(out)["recipe"]["weights"]
    assert sorted(used) == ["restore/pixels.safetensors", "restore/refiner.safetensors"]
    given, shown = (np.concatenate(list(reading.read_frames(path))) for path in (footage, out))
    enlarged = resize(to_float(given), (32, 64))
    assert (to_float(shown) - enlarged).abs().mean() < 2 / 127.5  # nothing is invented
    assert generate(own, 17, "--no-refine") == 0
    assert call("refine", own, "-o", tmp_path / "again.mp4", "--size", "64x32", "-q") == 0
    assert model_of(tmp_path / "again.mp4") == "demo"
    assert call("refine", footage, "-o", tmp_path / "asked.mp4", "--size", "64x32", "-q", "--model", "demo") == 0
    assert model_of(tmp_path / "asked.mp4") == "demo"
    assert call("refine", out, "-o", tmp_path / "twice.mp4", "--size", "64x32", "-q") == 0
    assert model_of(tmp_path / "twice.mp4") == "restore"


def test_a_smaller_result_is_announced_and_an_odd_side_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    for number in range(2):
        Image.new("RGB", (121, 91), (90, 40 * number, 20)).save(odd / f"{number}.png")
    for size, announced in (("121x91", False), ("80x60", True)):
        assert call("refine", odd, "-o", tmp_path / f"{size}.mp4", "--size", size) == 0
        assert ("--size changes it" in capsys.readouterr().err) == announced


def test_a_killed_run_of_footage_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    footage, whole, out = made(tmp_path / "in.mp4", 60), tmp_path / "whole.mp4", tmp_path / "out.mp4"
    options = ["--size", "48x32", "--seed", 3, "-q"]
    assert call("refine", footage, "-o", whole, *options) == 0

    from streamt2v.media import writing

    append, written = writing.SegmentWriter.append, list[int]()

    def stop(writer: writing.SegmentWriter, frames: object) -> object:
        if written:
            raise KeyboardInterrupt
        written.append(1)
        return append(writer, frames)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(writing.SegmentWriter, "append", stop)
        assert call("refine", footage, "-o", out, *options) == 130
    assert call("resume", out) == 0
    assert digest(out) == digest(whole)


@pytest.mark.parametrize(
    ("more", "much"),
    [
        (["--strength", "faithful"], 4), (["--strength", "balanced"], 2), (["--strength", "creative"], 2),
        (["--model", "demo", "--refine-steps", "1"], 4), (["--model", "demo", "--overlap", "16"], 3),
    ],
)  # fmt: skip
def test_the_disk_that_states_need_is_known(
    more: list[str], much: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamt2v.jobs.run_directory import RunDirectory
    from streamt2v.runs import output

    save, sizes = RunDirectory.save_state, [0]

    def measured(directory: RunDirectory, name: str, tensors: Any, meta: Any) -> None:
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(directory, name, tensors, meta)

    monkeypatch.setattr(RunDirectory, "save_state", measured)
    monkeypatch.setattr(output, "SAVING", 1e9)  # after every group
    out = tmp_path / "out.mp4"
    given = ["--size", "48x32", "--seed", 3, *more, "-q"]
    assert call("refine", made(tmp_path / "in.mp4", 90), "-o", out, *given) == 0
    config = merge(describe_video(out)["recipe"]["config"])
    assert max(sizes) <= needs._state_bytes(config) + 1000 <= much * max(sizes) + 1000


def test_it_makes_no_videos_and_refuses_what_it_does_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("generate", PROMPT, "--frames", 20, "-o", tmp_path / "out.mp4", "--model", "restore", "-q") == 2
    assert "makes no videos" in capsys.readouterr().err
    assert weights.default_family() != "restore"
    footage = made(tmp_path / "in.mp4", 3)
    for option, text in (("--prompt", "a cat"), ("--negative", "fog")):
        assert call("refine", footage, "-o", tmp_path / "out.mp4", option, text, "-q") == 2
        assert f"{option} is '{text}', what refines here reads no text" in capsys.readouterr().err
    for setting in ("refine.guidance_scale=3", "refine.posterior=published"):
        assert call("refine", footage, "-o", tmp_path / "out.mp4", "--set", setting, "-q") == 2
        assert "has no use for it" in capsys.readouterr().err


def test_prompts_of_a_source_travel_on_where_the_refiner_reads_none(tmp_path: Path) -> None:
    own, out = tmp_path / "own.mp4", tmp_path / "out.mp4"
    assert generate(own, 17, "--no-refine") == 0
    assert call("refine", own, "-o", out, "--size", "64x32", "-q", "--model", "restore") == 0
    recipe = describe_video(out)["recipe"]
    assert recipe["config"]["prompt"] == PROMPT
    assert "--prompt" not in shown.command(recipe)  # which would be refused


def test_footage_with_frames_between_its_own_names_what_made_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    footage, smooth, again = made(tmp_path / "in.mp4", 9), tmp_path / "smooth.mp4", tmp_path / "again.mp4"
    assert call("interpolate", footage, "-o", smooth, "--dry-run") == 0
    assert "model    interpolate-small, 0.3 MB" in capsys.readouterr().out
    assert call("interpolate", footage, "-o", smooth) == 0
    assert "18 frames at 16 fps, model interpolate-small" in capsys.readouterr().err
    assert model_of(smooth) == weights.default_family()
    assert call("info", smooth) == 0
    said = capsys.readouterr().out
    assert "interpolate, model interpolate-small" in said and "steps" not in said
    assert call("refine", smooth, "-o", again, "--size", "64x32", "-q") == 0
    assert model_of(again) == "restore"  # it is still footage


def test_a_plan_of_footage_knows_the_time_after_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "home"))
    footage, out = made(tmp_path / "in.mp4", 24), tmp_path / "out.mp4"
    options = ["--size", "48x32", "--threads", 1, "-o", out]
    assert call("refine", footage, *options, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "time     unknown until the first run on this machine\n" in said  # bench makes videos, this model none
    assert "refine   1 chunk of up" in said
    assert call("refine", footage, *options, "-q") == 0
    capsys.readouterr()
    assert call("refine", footage, *options, "--overwrite", "--dry-run") == 0
    assert "time     about " in capsys.readouterr().out
