"""Frames between frames: exact lengths and times, frames that are made untouched, cuts, sound, resuming, refusals."""

import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from streamt2v import chunks
from streamt2v.errors import NumericsError
from streamt2v.jobs import asked, run_directory, shown
from streamt2v.jobs.recipe import recipe_of
from streamt2v.media import isolated, reading, writing
from streamt2v.runs import interpolated, output
from streamt2v.weights import convert as checkpoints
from streamt2v.weights import hub
from tests import checkpoints as published
from tests.cli.helpers import PROMPT, TINY, call, digest, generate, result

LOSSLESS = ["--set", "output.crf=1"]


@pytest.fixture(scope="module", autouse=True)
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A weights home with a small network, pulled; it finds no motion and takes half of both frames."""
    folder = tmp_path_factory.mktemp("home")
    state = published.random_state(published.published_shapes(published.tiny_layouts())[published.IFNET])
    for key, value in state.items():
        if ".lastconv." in key:
            value.zero_()
    (folder / "frame_interpolation").mkdir()
    save_file(state, folder / "frame_interpolation" / "rife_v4.26.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMT2V_HOME", str(folder / "home"))
        patch.setattr(checkpoints, "convert", partial(checkpoints.convert, layouts=published.tiny_layouts()))
        for name in hub.OFFLINE:  # as --offline sets them, for all that is left of this process
            patch.setenv(name, "1")
        assert call("weights", "pull", "interpolate", "--from", folder, "--offline") == 0
        assert call("weights", "verify", "interpolate") == 0
        yield folder


def clip(path: Path, levels: list[int], fps: Fraction = Fraction(8)) -> Path:
    """A video of textured frames, each brighter by its level."""
    writer = writing.SegmentWriter(path.with_name("growing"), 32, 48, fps, crf=1)
    texture = np.random.RandomState(0).randint(0, 40, (4, 6, 3)).repeat(8, 0).repeat(8, 1)
    writer.append(np.stack([(texture + level).astype(np.uint8) for level in levels]))
    writer.finish(path, "")
    path.with_name("growing").unlink()
    return path


def levels(path: Path) -> list[float]:
    return [float(frame.mean()) for part in reading.read_frames(path) for frame in part]


@given(st.integers(1, 5000), st.integers(1, 64))
def test_no_more_frames_are_made_than_needed(wanted: int, factor: int) -> None:
    made = chunks.made(wanted, factor)
    assert factor * (made - 1) + 1 >= wanted
    assert made == 1 or factor * (made - 2) + 1 < wanted


@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 50))
def test_a_plan_in_frames_of_the_output_covers_them(count: int, factor: int, by: int) -> None:
    plan = chunks.refinement_plan(count, 9, 3)
    shown = chunks.interpolated(plan, factor, by)
    assert shown[-1].stop == factor * (count + by - 1) + 1
    assert [chunk.start for chunk in shown] == [factor * (chunk.start + by) for chunk in plan]


@pytest.mark.parametrize(("factor", "rate"), [(["--factor", 2], 16), (["--fps", 24], 24), ([], 16)])
def test_a_video_gets_frames_between_its_own(factor: list[object], rate: int, tmp_path: Path) -> None:
    """Every frame of the source is there, at its time; the length stays, as the last one is shown as long as it was."""
    source = clip(tmp_path / "in.mp4", [0, 20, 60, 100, 90])
    times = rate // 8
    assert call("interpolate", source, *factor, *LOSSLESS, "-q") == 0
    path, known = tmp_path / "in_smooth.mp4", levels(source)
    found, info = levels(path), isolated.probe(path)
    assert (len(found), info.fps) == (5 * times, rate)
    assert found[::times] == pytest.approx(known, abs=1.0)
    steps = [(known[at // times] * (times - at % times) + known[at // times + 1] * (at % times)) / times
             for at in range(4 * times)]  # fmt: skip
    half = [(known[at // times] + known[at // times + 1]) / 2 if at % times else steps[at] for at in range(4 * times)]
    assert found[: 4 * times] == pytest.approx(half, abs=1.5)  # a mask of zeros takes half of both
    assert found[4 * times :] == pytest.approx([known[-1]] * times, abs=1.0)
    assert shown.command(recipe_of(info.comment)) == (
        f"streamt2v interpolate in.mp4 --factor {times} --set output.interpolator=interpolate"
    )
    assert call("verify", path) == 0
    assert call("rerun", path, "--source", source, "-o", tmp_path / "again.mp4", "-q") == 0


def test_a_cut_stays_a_cut(tmp_path: Path) -> None:
    writer = writing.SegmentWriter(tmp_path / "growing", 32, 48, Fraction(8), crf=1)
    scenes = [np.random.RandomState(seed).randint(0, 255, (4, 6, 3)).repeat(8, 0).repeat(8, 1) for seed in (1, 2)]
    shown = np.stack([scenes[0], scenes[0], scenes[1], scenes[1]]).astype(np.uint8)
    writer.append(shown)
    writer.finish(tmp_path / "in.mp4", "")
    assert call("interpolate", tmp_path / "in.mp4", "--factor", 3, *LOSSLESS, "-o", tmp_path / "out.mp4", "-q") == 0
    found = np.concatenate(list(reading.read_frames(tmp_path / "out.mp4"))).astype(int)
    assert [int(np.abs(frame - shown[0]).mean() > 20) for frame in found] == [0] * 6 + [1] * 6
    dark = np.zeros_like(shown[:1])
    assert interpolated.is_cut(dark, shown[:1])
    assert not interpolated.is_cut(shown[:1], (shown[:1] * 0.5).astype(np.uint8))  # the light goes out


@pytest.mark.parametrize(
    ("frames", "factor", "made"), [(1, 2, 1), (2, 2, 2), (24, 2, 13), (25, 2, 13), (26, 3, 10), (41, 4, 11)]
)
def test_generate_writes_as_many_frames_as_asked(
    frames: int, factor: int, made: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.mp4"
    options = ["--interpolate", factor, "--no-refine"]
    assert call("plan", PROMPT, "--frames", frames, *TINY[:-1], *options) == 0
    assert made == frames or f"{made} are made" in capsys.readouterr().out
    assert generate(path, frames, *options, "--json") == 0
    facts = result(capsys)
    assert (facts["frames"], facts["fps"]) == (frames, 8 * factor)
    assert (len(levels(path)), isolated.probe(path).fps) == (frames, 8 * factor)
    assert generate(tmp_path / "made.mp4", made, "--no-refine", *LOSSLESS) == 0
    assert levels(path)[::factor] == pytest.approx(levels(tmp_path / "made.mp4")[: -(-frames // factor)], abs=1.5)


def test_lengths_and_times_are_those_of_the_output(tmp_path: Path) -> None:
    usual = asked.resolve(model="demo", duration="10s", interpolate=3)
    assert (usual.num_frames, usual.output.fps, usual.made) == (240, 24.0, 81)
    given = asked.resolve(model="demo", frames=100, interpolate=2, fps=30.0, at=["2s=a blue ball"], prompt="a red ball")
    assert (given.made, dict(given.prompts)) == (51, {60: "a blue ball"})
    path = tmp_path / "out.mp4"
    options = ["--interpolate", 2, "--no-refine", "--at", "20", "a blue ball"]
    assert generate(path, 60, *options) == 0
    assert call("info", path) == 0


def test_it_follows_the_refiner_and_extends(tmp_path: Path) -> None:
    first, longer, again = (tmp_path / f"{name}.mp4" for name in ("first", "longer", "again"))
    assert generate(first, 20, "--interpolate", 2) == 0
    assert digest(first)[0] == 20
    options = [*TINY, "--interpolate", 2]
    assert call("extend", first, "--frames", 61, "-o", longer, *options) == 0
    assert (digest(longer)[0], isolated.probe(longer).fps) == (61, 32)
    assert call("refine", first, "-o", again, "--refine-steps", 1, "--size", "80x48", "--interpolate", 2, "-q") == 0
    assert (digest(again)[0], isolated.probe(again).fps) == (40, 32)


@given(st.integers(1, 5000), st.integers(1, 64))
def test_of_a_loop_every_nth_frame_is_made(made: int, factor: int) -> None:
    assert chunks.made(made * factor, factor, closed=True) == made


def test_the_last_frame_of_a_loop_leads_to_its_first(tmp_path: Path) -> None:
    source, path = clip(tmp_path / "in.mp4", [0, 20, 40, 20]), tmp_path / "in_smooth.mp4"
    assert call("interpolate", source, "--loop", *LOSSLESS, "-q") == 0
    known, found = levels(source), levels(path)
    assert found[::2] == pytest.approx(known, abs=1.0)
    assert found[1::2] == pytest.approx([(known[at] + known[(at + 1) % 4]) / 2 for at in range(4)], abs=1.5)
    assert shown.command(recipe_of(isolated.probe(path).comment)).endswith(
        "--factor 2 --loop --set output.interpolator=interpolate"
    )


@pytest.mark.parametrize("how", [["--loop"], ["--set", "loop=ring"], ["--loop", "--refine-steps", 2]])
def test_a_loop_that_is_made_has_frames_between_its_ends(
    how: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpolated, "is_cut", lambda *_: False)  # one step makes frames as different as scenes
    path, made = tmp_path / "out.mp4", tmp_path / "made.mp4"
    options = [*how, *([] if "--refine-steps" in how else ["--no-refine"]), *LOSSLESS]
    assert generate(path, 48, "--interpolate", 2, *options) == generate(made, 24, *options) == 0
    known, found = levels(made), levels(path)
    assert len(found) == 48
    assert found[::2] == pytest.approx(known, abs=1.5)
    assert found[-1] == pytest.approx((known[-1] + known[0]) / 2, abs=1.5)


def test_a_picture_lies_among_the_frames_that_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, path, made = (tmp_path / name for name in ("end.png", "out.mp4", "made.mp4"))
    Image.fromarray(np.full((72, 128, 3), 250, np.uint8)).save(picture)
    assert generate(path, 61, "--interpolate", 2, "--no-refine", "--until", picture, *LOSSLESS) == 0
    assert generate(made, 31, "--no-refine", "--until", picture, *LOSSLESS) == 0
    assert levels(path)[::2] == pytest.approx(levels(made), abs=1.5)
    assert generate(path, 60, "--interpolate", 2, "--no-refine", "--until", picture, "--overwrite") == 2
    assert "frame 58 or 60" in capsys.readouterr().err


def test_a_loop_of_another_length_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "out.mp4", 61, "--interpolate", 2, "--loop") == 2
    assert "use 60 or 62" in capsys.readouterr().err


@pytest.mark.parametrize("how", [["--loop"], ["--no-refine"], pytest.param([], marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_with_the_same_frames(
    how: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--interpolate", 3, *how]
    whole, path = tmp_path / "whole.mp4", tmp_path / "out.mp4"
    assert generate(whole, 75, *options) == 0
    monkeypatch.setattr(output, "SAVING", 1)
    append, calls = output.Output.append, list[int]()

    def stopping(self: output.Output, finished: output.Finished) -> None:
        append(self, finished)
        calls.append(self.num_frames)
        if len(calls) in (1, 3):
            raise NumericsError("stopped")

    monkeypatch.setattr(output.Output, "append", stopping)
    assert generate(path, 75, *options) == 7
    assert call("resume", path, "-q") == 7
    assert call("resume", path, "-q") == 0
    assert digest(path) == digest(whole)
    assert len(calls) > 3


def test_a_run_whose_file_is_complete_only_needs_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.mp4"
    with monkeypatch.context() as patch:
        patch.setattr(output.Output, "finish", lambda self: (_ for _ in ()).throw(NumericsError("stopped")))
        assert generate(path, 24, "--interpolate", 2, "--no-refine") == 7
    assert call("resume", path, "-q") == 0
    assert digest(path)[0] == 24


def test_sound_stays_in_sync(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent, source = clip(tmp_path / "silent.mp4", [0, 20, 60, 100, 90, 80, 70, 60]), tmp_path / "in.mp4"
    tone = ["-f", "lavfi", "-i", "sine=frequency=440:duration=1", "-c:v", "copy", "-c:a", "aac", "-shortest"]
    import imageio_ffmpeg

    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", silent, *tone, source], check=True, capture_output=True)
    assert call("interpolate", source, "--fps", 24) == 0
    assert "changes from" not in capsys.readouterr().err
    found = isolated.probe(tmp_path / "in_smooth.mp4")
    assert found.has_audio
    assert (found.frames, found.fps) == (24, 24)


def moving(path: Path, count: int = 5) -> np.ndarray[Any, Any]:
    """A video of a grey texture that moves by eight pixels a frame; returns the frames between."""
    random, texture = np.random.RandomState(0), np.zeros((128, 320))
    for cells in (2, 4, 8, 16):  # coarse things are stronger than fine ones, as in pictures
        noise = Image.fromarray(random.randint(0, 256, (cells, 5 * cells // 2), np.uint8))
        texture += np.asarray(noise.resize((320, 128), Image.Resampling.BICUBIC)) / cells**0.5
    texture = (texture * 255 / texture.max()).astype(np.uint8)[..., None].repeat(3, -1)
    shown = np.stack([texture[:, 4 * at : 4 * at + 192] for at in range(2 * count - 1)])
    writer = writing.SegmentWriter(path.with_name("growing"), 128, 192, Fraction(8), crf=1)
    writer.append(shown[::2])
    writer.finish(path, "")
    return shown[1::2]


def test_the_bundled_network_needs_no_weights_and_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds the motion; a rerun takes it although a published one is here by then."""
    source, path = tmp_path / "in.mp4", tmp_path / "in_smooth.mp4"
    truth = moving(source)
    with monkeypatch.context() as patch:
        patch.setenv("STREAMT2V_HOME", str(tmp_path / "empty"))
        assert call("interpolate", source, *LOSSLESS, "-q") == 0
    made = np.concatenate(list(reading.read_frames(path))).astype(float)
    ends, between = made[::2], made[1::2][: len(truth)]
    error, blended = (np.square(shown - truth).mean() for shown in (between, (ends[:-1] + ends[1:]) / 2))
    assert error < 0.5 * blended
    recipe = recipe_of(isolated.probe(path).comment)
    assert list(recipe["weights"]) == ["demo/interpolator.safetensors"]
    assert call("rerun", path, "--source", source, "-o", tmp_path / "again.mp4", "-q") == 0
    assert recipe_of(isolated.probe(tmp_path / "again.mp4").comment)["weights"] == recipe["weights"]


def test_it_is_never_silent_about_missing_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "empty"))
    published_one = ["--set", "output.interpolator=interpolate"]
    assert generate(tmp_path / "out.mp4", 24, "--interpolate", 2, *published_one) == 4
    assert "streamt2v weights pull interpolate" in capsys.readouterr().err
    source = clip(tmp_path / "in.mp4", [0, 20])
    assert call("interpolate", source, *published_one) == 4
    assert "streamt2v weights pull interpolate" in capsys.readouterr().err
    assert call("interpolate", source, "--set", "output.interpolator=interpolat") == 2
    assert "did you mean 'interpolate'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fps", 20], "possible are 16, 24, 32"),
        (["--fps", 8], "possible are"),
        (["--fps", 24, "--factor", 2], "possible are"),
    ],
)
def test_rates_that_do_not_fit_are_refused(
    options: list[object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = clip(tmp_path / "in.mp4", [0, 20])
    assert call("interpolate", source, *options) == 2
    assert said in capsys.readouterr().err


def test_two_frames_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the factor, at most AT_ONCE frames and those of one step more are handed on together."""
    sizes, append = list[int](), output.Output.append

    def watch(self: Any, finished: output.Finished) -> None:
        sizes.append(len(finished.group.frames))
        append(self, finished)

    monkeypatch.setattr(output.Output, "append", watch)
    source = clip(tmp_path / "in.mp4", [0, 20, 60, 100, 90, 80, 70, 60] * 4)
    assert call("interpolate", source, "--factor", 8, "-q") == 0
    assert sum(sizes) == 256
    assert max(sizes) < interpolated.AT_ONCE + 2 * 8


def test_nothing_heavy_is_loaded_to_refuse() -> None:
    code = "import sys; from streamt2v.jobs import prepare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_watch_page_counts_frames_of_the_output(tmp_path: Path) -> None:
    assert generate(tmp_path / "out.mp4", 60, "--interpolate", 2, "--no-refine", "--keep-run") == 0
    assert run_directory.exists(run_directory.directory_for(tmp_path / "out.mp4"))
    assert call("report", tmp_path / "out.mp4", "-o", tmp_path / "out.html") == 0
