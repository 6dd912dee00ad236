"""`generate` and `refine` end to end on the shipped weights: exact counts, seeds, options, metadata."""

import json
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from streamt2v.media import reading
from tests.cli.helpers import PROMPT, TINY, call, digest, generate, result

COUNTS = (1, 7, 15, 16, 17, 24, 25, 40, 41, 100)


QUICK = [(1, True), (24, True), (25, True), (41, True), (1, False), (25, False)]
REST = [(frames, refine) for frames in COUNTS for refine in (True, False) if (frames, refine) not in QUICK]


# The rest in the deep suite; here all of them without networks, in the next test.
@pytest.mark.parametrize(("frames", "refine"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in REST)])
def test_exact_frame_counts(frames: int, refine: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.mp4"
    assert generate(path, frames, "--json", *([] if refine else ["--no-refine"])) == 0
    said = result(capsys)
    assert (said["frames"], said["width"], said["height"], said["output"]) == (frames, 80, 48, str(path))
    assert digest(path)[0] == frames
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("toy_family")
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("frames", COUNTS)
def test_exact_frame_counts_of_a_family_without_networks(frames: int, refine: bool, tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    more = [] if refine else ["--no-refine"]
    assert call("generate", "abc", "--model", "toy", "--frames", frames, "-o", path, "-q", *more) == 0
    assert digest(path)[0] == frames
    assert list(tmp_path.glob("*.mp4*")) == [path]


@pytest.mark.slow
@pytest.mark.parametrize("refine", [True, False])
def test_exact_frame_counts_of_long_videos(refine: bool, tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    assert generate(path, 241, *([] if refine else ["--no-refine"])) == 0
    assert digest(path)[0] == 241


def _clip(path: Path, frames: int, fps: Fraction, sound: bool) -> None:
    """Write a moving gradient, with a tone when `sound`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        audio = container.add_stream("aac", rate=16000) if sound else None
        for index in range(frames):
            image = np.broadcast_to((np.arange(96) * 2 + index * 3).astype(np.uint8)[None, :, None], (64, 96, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode(None))
        if audio is not None:
            samples = (np.sin(np.arange(int(16000 * frames / fps)) * 0.1) * 8000).astype(np.int16)
            tone = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            tone.sample_rate = 16000
            container.mux(audio.encode(tone))
            container.mux(audio.encode(None))


@pytest.mark.parametrize("frames", [1, 25, 57, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 23, 24, 40))])
def test_refine_keeps_count_rate_and_sound(frames: int, tmp_path: Path) -> None:
    source, path = tmp_path / "in.mp4", tmp_path / "out.mp4"
    fps = Fraction(30000, 1001) if frames == 25 else Fraction(8)
    _clip(source, frames, fps, sound=frames >= 5)
    assert call("refine", source, "-o", path, "--refine-steps", 1, "--size", "96x64", "--seed", 1, "--quiet") == 0
    made = reading.probe(path)
    assert (made.frames, made.fps, made.has_audio) == (frames, fps, frames >= 5)
    assert (made.width, made.height) == (96, 64)
    assert digest(path)[0] == frames


def test_one_seed_repeats_and_another_differs(tmp_path: Path) -> None:
    first, again, other = (tmp_path / f"{name}.mp4" for name in "abc")
    assert generate(first, 25) == generate(again, 25) == generate(other, 25, "--seed", 8) == 0
    assert digest(first) == digest(again) != digest(other)


def test_a_longer_video_begins_like_a_shorter_one(tmp_path: Path) -> None:
    short, long = tmp_path / "short.mp4", tmp_path / "long.mp4"
    assert generate(short, 20, "--no-refine", "--set", "output.crf=0") == 0
    assert generate(long, 40, "--no-refine", "--set", "output.crf=0") == 0
    first = np.concatenate(list(reading.read_frames(short)))
    assert np.array_equal(first, np.concatenate(list(reading.read_frames(long)))[:20])


@pytest.fixture(scope="module")
def made_plainly(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, str]]:
    """Make a video with options, once, and return the count of its frames and their digest."""

    @cache
    def make(*options: object) -> tuple[int, str]:
        path = tmp_path_factory.mktemp("plain") / "plain.mp4"
        assert call("generate", PROMPT, "-o", path, *options) == 0
        return digest(path)

    return make


# As few frames as show it: two chunks of the base video alone, or one that is refined in two chunks.
STREAMED: list[object] = ["--frames", 24, "--no-refine"]
REFINED: list[object] = ["--frames", 12, "--chunk", 8, "--overlap", 4]
THREE_CHUNKS: list[object] = ["--frames", 13, *REFINED[2:]]  # the last one overlaps as much as it has to
TWO_STEPS = [*STREAMED, "--steps", 2]
GUIDED = [*STREAMED, "--guidance", 4]


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (STREAMED, ["--steps", 2]), (STREAMED, ["--guidance", 5]), (STREAMED, ["--negative", "blue star"]),
        (REFINED, ["--refine-steps", 3]), (REFINED, ["--chunk", 12]), (THREE_CHUNKS, ["--overlap", 3]),
        (REFINED, ["--no-refine", "--size", "80x48"]), (STREAMED, ["--set", "output.crf=40"]),
        (STREAMED, ["--set", "stream.cam=false"]), (STREAMED, ["--set", "stream.apm=false"]),
        (TWO_STEPS, ["--set", "stream.replacement=false"]), (TWO_STEPS, ["--set", "stream.replacement_carry=0"]),
        (REFINED, ["--set", "refine.noise_level=300"]), (REFINED, ["--set", "refine.stochastic=false"]),
        ([*REFINED, "--quality", "fast"], ["--quality", "balanced"]),
        (STREAMED, ["--set", "initialize.guidance_scale=5"]), (TWO_STEPS, ["--set", "stream.reuse_interval=2"]),
        (TWO_STEPS, ["--set", "stream.eta=0"]), (TWO_STEPS, ["--set", "initialize.eta=0"]),
        (TWO_STEPS, ["--set", "stream.guidance_stop=0.9"]), (TWO_STEPS, ["--set", "initialize.guidance_stop=0.9"]),
        ([*REFINED, "--refine-steps", 2], ["--refine-steps", 2, "--set", "refine.reuse_interval=2"]),
        (GUIDED, ["--set", "stream.guidance_rescale=1"]), (GUIDED, ["--set", "initialize.guidance_rescale=1"]),
    ],
)  # fmt: skip
def test_every_option_changes_the_frames(
    base: list[object], change: list[object], tmp_path: Path, made_plainly: Callable[..., tuple[int, str]]
) -> None:
    changed, fixed = tmp_path / "changed.mp4", TINY[4:] if "--quality" in change else TINY
    plain = made_plainly(*fixed, *base)
    assert call("generate", PROMPT, "-o", changed, *fixed, *base, *change) == 0
    assert plain[0] == digest(changed)[0] == base[1]
    assert plain != digest(changed)


def test_starting_from_a_picture(tmp_path: Path) -> None:
    picture, path, plain = tmp_path / "start.png", tmp_path / "out.mp4", tmp_path / "plain.mp4"
    Image.new("RGB", (50, 70), (200, 30, 40)).save(picture)
    assert generate(path, 20, "--image", picture) == generate(plain, 20) == 0
    assert digest(path)[0] == 20
    assert digest(path) != digest(plain)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--size", "64x64"], (64, 38)),
        (["--size", "64x64", "--fit", "pad"], (64, 64)),
        (["--size", "64x64", "--fit", "cover"], (64, 64)),
    ],
)
def test_sizes_and_fit(options: list[str], size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    assert generate(path, 9, *options) == 0
    made = reading.probe(path)
    assert (made.width, made.height) == size


def test_native_size_without_refinement(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    arguments = [a for a in TINY if a not in ("--size", "80x48")]
    assert call("generate", PROMPT, "--frames", 5, "-o", path, *arguments, "--no-refine", "--fps", 12) == 0
    made = reading.probe(path)
    assert (made.width, made.height, made.fps) == (40, 24, 12)


def test_info_reads_the_recipe_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.mp4"
    assert generate(path, 17) == 0
    capsys.readouterr()
    assert call("info", path, "--json") == 0
    facts = result(capsys)
    assert facts["video"]["frames"] == 17
    assert facts["recipe"]["config"]["prompt"] == PROMPT
    assert facts["recipe"]["config"]["seed"] == 7
    assert facts["recipe"]["threads"] == 1
    assert call("info", path) == 0
    assert f"prompt    {PROMPT}\n" in capsys.readouterr().out
    assert call("info", path, "--all") == 0
    assert f"recipe.config.prompt = {PROMPT}\n" in capsys.readouterr().out


def test_a_stored_config_repeats_the_run(tmp_path: Path) -> None:

    path, again, file = tmp_path / "out.mp4", tmp_path / "again.mp4", tmp_path / "run.toml"
    assert generate(path, 17) == 0
    recipe = json.loads(reading.probe(path).comment)
    file.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in recipe["config"].items()))
    assert (
        call("generate", PROMPT, "--frames", 17, "--config", file, "--seed", 7, "--threads", 1, "--quiet", "-o", again)
        == 0
    )
    assert digest(path) == digest(again)


def test_preview_is_a_picture(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    assert generate(tmp_path / "out.mp4", 30, "--preview", sheet) == 0
    with Image.open(sheet) as image:
        assert image.width > 5 * 80


def test_default_name_and_calm_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("generate", "a Red/ball: ../sea", "--frames", 2, *[a for a in TINY if a != "--quiet"]) == 0
    captured = capsys.readouterr()
    (made,) = tmp_path.iterdir()
    assert made.name.endswith("_a-red-ball-sea_7.mp4")
    assert captured.out.strip() == made.name
    assert "\x1b" not in captured.err + captured.out
