"""The metrics on clips whose truth is known, and their parts against slow implementations written here."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("scenedetect")

import cv2
import scenedetect

from streamt2v import config
from streamt2v.chunks import refinement_plan, seams, streaming_plan
from streamt2v.cli.progress import Progress
from streamt2v.errors import ConfigError, InputError, WeightsError
from streamt2v.media import writing
from streamt2v.media.frames import Frames
from streamt2v.metrics import clip as clips
from streamt2v.metrics import evaluation, motion, report, scores
from streamt2v.metrics.evaluation import (
    SCORES,
    Measured,
    Settings,
    Subject,
    evaluate,
    inspect,
    measure,
    parse_seams,
    seams_of,
)
from streamt2v.timeline import Prompt

SIDE = 96


def texture(seed: int, side: int, blur: float = 2) -> Frames:
    """A smooth random picture with detail everywhere: what flow can be estimated on."""
    noise = np.random.default_rng(seed).normal(size=(side, side, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), blur)
    return np.clip(127 + 50 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def moving(count: int, step: tuple[int, int], seed: int = 0) -> Frames:
    """A window of SIDE x SIDE gliding over a texture by `step` (rows, columns) a frame: the flow is minus that."""
    start = [max(0, -count * by) for by in step]
    canvas = texture(seed, SIDE + count * max(map(abs, step)))
    corners = [(start[0] + step[0] * t, start[1] + step[1] * t) for t in range(count)]
    return np.stack([canvas[row : row + SIDE, column : column + SIDE] for row, column in corners])


def noise(count: int, seed: int = 0) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def flat(levels: list[int], side: int = SIDE) -> Frames:
    """Frames of one grey level each."""
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def measured(frames: Frames, other: Frames | None = None, **more: Any) -> Measured:
    """Measure frames without scaling them and, unless asked for, without CLIP."""
    facts = {name: more.pop(name) for name in ("prompt", "stream_seams", "refine_seams") if name in more}
    clip = more.pop("clip", None)
    subject = Subject("clip", len(frames), SIDE, SIDE, 8.0, **facts)
    against = None if other is None else iter([other])
    return measure(iter([frames[:5], frames[5:]]), subject, Settings(flow_size=SIDE, **more), clip, against)


# ---------------------------------------------------------------------------------------------- clips of known truth


def test_a_constant_translation() -> None:
    found = measured(moving(12, (2, -3))).scores
    assert found["flow"] == pytest.approx(math.hypot(2, 3), rel=0.03)
    assert found["flow_score"] == pytest.approx(13, rel=0.03)
    assert found["stagnation"] == pytest.approx(1, abs=0.02)
    assert found["flow_deviation"] == pytest.approx(0, abs=0.05)
    assert found["warp_error"] is not None
    # Unwarped, neighbours differ by far more than what is left after warping.
    still = scores.squared_error(*moving(2, (2, -3))) * 3
    assert found["warp_error"] < 0.02 * still
    assert found["mawe_paper"] == pytest.approx(found["warp_error"] / found["flow_score"])
    assert found["scene_cuts"] == 0


def test_the_flow_points_where_things_go() -> None:
    first, second = moving(2, (2, -3))
    flow = motion.dense_flow(first, second)
    inside = flow[12:-12, 12:-12]
    assert np.abs(inside - [3, -2]).max() < 0.15
    assert np.abs(motion.dense_flow(second, first)[12:-12, 12:-12] - [-3, 2]).max() < 0.15


def test_frames_are_averaged_when_shrunk_and_interpolated_when_enlarged() -> None:
    checks = np.repeat((np.indices((64, 64)).sum(axis=0) % 2 * 200)[..., None], 3, axis=2).astype(np.uint8)
    assert (motion.square(checks, 32) == 100).all()
    ramp = np.broadcast_to(np.arange(0, 240, 30, np.uint8)[None, :, None], (4, 8, 3)).copy()
    steps = np.diff(motion.square(ramp, 32).astype(int), axis=1)
    assert steps.min() >= 0 and steps.max() <= 8  # a quarter of 30 a pixel, no steps of 30


def test_a_frozen_clip() -> None:
    result = measured(np.repeat(texture(0, SIDE)[None], 40, axis=0), stream_seams=(16, 24, 32))
    still = ("scene_cuts", "warp_error", "flow_score", "flow", "flow_deviation", "colour_drift", "flicker")
    assert {name: result.scores[name] for name in still} == dict.fromkeys(still, 0)
    without_meaning = ("mawe_paper", "mawe_script", "stagnation", "seam_score")
    assert {name: result.scores[name] for name in without_meaning} == dict.fromkeys(without_meaning)


def test_pure_noise() -> None:
    first, second = noise(12), noise(12, seed=1)
    result = measured(first, second)
    found, spread = result.scores, (256**2 - 1) / 12  # the variance of a uniform byte
    assert np.nanmean(result.series["change"]) == pytest.approx((256**2 - 1) / (3 * 256), rel=0.01)
    assert found["mse"] == pytest.approx(2 * spread, rel=0.01)
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / (2 * spread)), abs=0.05)
    assert found["ssim"] == pytest.approx(0, abs=0.02)
    assert found["warp_error"] is not None
    assert found["warp_error"] > 3 * spread  # nothing is predicted: three channels, between one and two variances each
    # The mean of the grey levels of one cell, then a second difference (variance 6), then the mean of its size.
    of_cell = math.sqrt(spread * (0.299**2 + 0.587**2 + 0.114**2) / (SIDE / 16) ** 2)
    assert found["flicker"] == pytest.approx(math.sqrt(2 / math.pi) * math.sqrt(6) * of_cell / 4, rel=0.05)
    assert found["colour_drift"] is not None
    assert found["colour_drift"] < 2


def test_a_clip_against_itself_and_against_known_noise() -> None:
    frames = moving(6, (0, 2))
    found = measured(frames, frames).scores
    assert (found["mse"], found["psnr"]) == (0, None)
    assert found["ssim"] == pytest.approx(1, abs=1e-9)
    found = measured(frames // 2, frames // 2 + 10).scores
    assert found["mse"] == 100
    assert found["psnr"] == pytest.approx(28.13, abs=0.005)


@pytest.mark.parametrize("cut", [17, 30])
def test_a_hard_cut(cut: int) -> None:
    frames = np.concatenate([moving(cut, (1, 1)), moving(50 - cut, (1, 1), seed=5)[..., ::-1] // 2])
    result = measured(frames)
    assert result.cuts == [cut]
    assert result.scores["scene_cuts"] == 1
    assert int(np.nanargmax(result.series["change"])) == cut


class Recording(scenedetect.AdaptiveDetector):  # type: ignore[misc]
    """The detector, which also keeps how different it found each frame from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []
        made.append(self)

    def process_frame(self, *arguments: Any) -> Any:
        found = super().process_frame(*arguments)
        self.values.append(self._frame_score)
        return found


made: list[Recording] = []


def test_cuts_are_those_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fine detail, so that it matters how the frames are scaled; grey, as decoders differ in how they enlarge colours.
    pictures = [np.repeat(texture(seed, 640, blur=0.6)[:384, :, :1], 3, axis=2) // (1 + seed % 2) for seed in range(4)]
    path = tmp_path / "cuts.mp4"
    write(path, np.repeat(pictures, 20, axis=0))
    monkeypatch.setattr(evaluation, "AdaptiveDetector", Recording)
    ours = evaluate([path], Settings(clip="none", flow_size=32), Progress(quiet=True), lambda text: None)[0][0].cuts
    theirs = scenedetect.detect(str(path), Recording())
    assert ours == [scene[0].frame_num for scene in theirs[1:]] == [20, 40, 60]
    assert made[0].values == pytest.approx(made[1].values, rel=0.01, abs=0.2)


def test_motion_that_stagnates() -> None:
    frames = np.concatenate([moving(20, (0, 5)), moving(20, (0, 2), seed=3)])
    result = measured(frames, window=15)
    assert result.scores["stagnation"] == pytest.approx(0.4, rel=0.05)
    assert result.scores["flow_deviation"] == pytest.approx(1.5, rel=0.2)
    # The first frames are those after the first chunk, where chunks are known.
    assert measured(frames, window=15, stream_seams=(21,)).scores["stagnation"] == pytest.approx(1, abs=0.02)


def test_the_windows_of_a_long_video() -> None:
    assert scores.windows(1200, 16, 100) == (slice(16, 116), slice(1100, 1200))
    assert scores.windows(24, 16, 100) == (slice(16, 20), slice(20, 24))
    assert scores.windows(17, 16, 100) is None
    ramp = np.arange(1200.0)
    assert scores.stagnation(ramp, 16, 100) == pytest.approx(1149.5 / 65.5)
    assert scores.at_the_end(ramp, 10) == pytest.approx(1194.5)


def test_seams() -> None:
    steps = np.ones(48, int)
    steps[[16, 24, 32, 40]] = 3
    steps[[20, 36]] = 2
    frames = flat(list(np.cumsum(steps)))
    found = measured(frames, stream_seams=(16, 24, 32, 40), refine_seams=(20, 36)).scores
    assert found["seam_score"] == pytest.approx(3)
    assert found["seam_score_refine"] == pytest.approx(2)
    assert measured(frames, stream_seams=(5, 6)).scores["seam_score"] == pytest.approx(1)
    assert measured(frames).scores["seam_score"] is None
    changes = np.array([np.nan, 9, 4, 4, 4, 1, 1])
    assert scores.seam_score(changes, [1]) == pytest.approx(9 / 4)
    assert scores.seam_score(changes, [1], [2, 3, 4]) == 9
    assert scores.seam_score(changes, [1, 2, 3, 4, 5, 6]) is None


def test_flicker_is_what_jumps_there_and_back() -> None:
    assert measured(flat([100, 110] * 8)).scores["flicker"] == pytest.approx(5)
    assert measured(flat(list(range(40, 80, 2)))).scores["flicker"] == pytest.approx(0, abs=1e-6)
    local = flat([100] * 16)
    local[::2, : SIDE // 2] = 120
    assert measured(local).scores["flicker"] == pytest.approx(5)  # half the picture by 10 levels around its mean


def test_colours_that_drift() -> None:
    picture = texture(0, SIDE) // 2 + 50
    brighter = np.stack([picture + t for t in range(21)])
    assert measured(brighter, window=1).scores["colour_drift"] == pytest.approx(20)
    assert measured(brighter, window=5).scores["colour_drift"] == pytest.approx(18)
    rolled = np.stack([np.roll(picture, 3 * t, axis=1) for t in range(8)])
    assert measured(rolled).scores["colour_drift"] == pytest.approx(0, abs=1e-9)
    red = picture.copy()
    red[..., 0] += 30
    assert scores.colour_distance(scores.histograms(picture), scores.histograms(red)) == pytest.approx(10)


# ------------------------------------------------------------------------------------- parts against slow versions


def random_flow(seed: int, height: int = 14, width: int = 18, size: float = 2.5) -> motion.Plane:
    rough = np.random.default_rng(seed).normal(size=(height, width, 2)) * size
    return rough.astype(np.float32)


def sampled(image: Any, x: float, y: float) -> Any:
    """Bilinear sample with the edge repeated."""
    height, width = image.shape[:2]
    left, top = math.floor(x), math.floor(y)
    total = 0.0
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight = (1 - abs(x - column)) * (1 - abs(y - row))
        total = total + weight * image[min(max(row, 0), height - 1), min(max(column, 0), width - 1)].astype(float)
    return total


def test_warping_is_sampling_where_the_flow_points() -> None:
    image, flow = np.random.default_rng(0).normal(size=(14, 18, 3)), random_flow(1)
    slow = [[sampled(image, x + flow[y, x, 0], y + flow[y, x, 1]) for x in range(18)] for y in range(14)]
    assert np.abs(motion.warp(image, flow) - np.array(slow)).max() < 0.1  # OpenCV rounds to 1/32 of a pixel


def test_what_is_visible() -> None:
    forward = cv2.GaussianBlur(random_flow(1, size=8), (0, 0), 2)
    backward = -forward + random_flow(2, size=0.4)
    slow, clear = np.zeros((2, *forward.shape[:2]), bool)
    for y in range(14):
        for x in range(18):
            ahead = forward[y, x].astype(float)
            to_x, to_y = x + ahead[0], y + ahead[1]
            back = sampled(backward, to_x, to_y)
            apart = ((ahead + back) ** 2).sum()
            allowed = 0.01 * ((ahead**2).sum() + (back**2).sum()) + 0.5
            slow[y, x] = apart <= allowed and 0 <= to_x <= 17 and 0 <= to_y <= 13
            clear[y, x] = abs(apart - allowed) > 0.05  # as OpenCV rounds to 1/32 of a pixel
    assert 0.05 < slow.mean() < 0.95
    assert clear.mean() > 0.8
    assert (motion.visible(forward, backward) == slow)[clear].all()


def test_what_is_landed_on() -> None:
    flow = random_flow(3)
    slow = np.zeros(flow.shape[:2], bool)
    for y in range(14):
        for x in range(18):
            to_x, to_y = round(float(x + flow[y, x, 0])), round(float(y + flow[y, x, 1]))
            if 0 <= to_x <= 17 and 0 <= to_y <= 13:
                slow[to_y, to_x] = True
    assert 0.05 < slow.mean() < 0.95
    assert (motion.landed_on(flow) == slow).all()


def test_the_parts_of_mawe() -> None:
    ramp = np.linspace(0, 200, 18)[None, :, None] * np.array([1, 0.7, 0.4]) + np.linspace(0, 50, 14)[:, None, None]
    first, second = ramp.astype(np.uint8), (0.8 * ramp + 20).astype(np.uint8)
    forward = random_flow(1, size=0.2) + np.float32([1, -0.4])
    backward = random_flow(2, size=0.2) + np.float32([-0.6, 0.7])
    found = motion.compare(first, second, forward, backward)
    seen, hit = motion.visible(forward, backward), motion.landed_on(forward)
    own, script, magnitudes = [], [], []
    for y in range(14):
        for x in range(18):
            (fx, fy), (bx, by) = forward[y, x].tolist(), backward[y, x].tolist()
            magnitudes.append(math.hypot(fx, fy))
            if seen[y, x]:
                own.append(((first[y, x] - sampled(second, x + fx, y + fy)) ** 2).sum())
            if hit[y, x]:
                script.append(((second[y, x] - sampled(first, x + bx, y + by)) ** 2).sum())
    assert found.magnitude == pytest.approx(np.mean(magnitudes), rel=1e-5)
    assert found.squared_magnitude == pytest.approx(np.mean(np.square(magnitudes)), rel=1e-5)
    assert len(own) > 100
    assert found.warp_error == pytest.approx(np.mean(own), rel=0.01)
    assert found.script_warp_error == pytest.approx(np.mean(script), rel=0.01)


def test_the_two_kinds_of_mawe_differ_as_documented() -> None:
    missing = float("nan")
    errors, sizes = np.array([missing, 8.0, 30.0, missing]), np.array([missing, 2.0, 3.0, 0.0])
    squares = np.array([missing, 5.0, 9.0, 4.0])
    assert scores.mawe_paper(errors, squares) == pytest.approx(19 / 6)  # a ratio of means
    assert scores.mawe_script(errors, sizes) == pytest.approx((8 / (9.5 * 2) + 30 / (9.5 * 3)) / 2)  # a mean of ratios
    assert scores.mawe_script(errors, np.zeros(4)) is None
    everything_hidden = motion.compare(
        *noise(2), np.full((SIDE, SIDE, 2), 1e4, np.float32), np.zeros((SIDE, SIDE, 2), np.float32)
    )
    assert math.isnan(everything_hidden.warp_error)


def test_ssim_is_the_published_one() -> None:
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 255, (15, 17)).astype(np.float32)
    b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255).astype(np.float32)
    steps = np.arange(-5, 6)
    window = np.exp(-(steps[:, None] ** 2 + steps**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for y in range(5, 10):
        for x in range(5, 12):
            p, q = (image[y - 5 : y + 6, x - 5 : x + 6].astype(float) for image in (a, b))
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            both = (window * (p - mean_p) * (q - mean_q)).sum()
            c1, c2 = 2.55**2, 7.65**2
            top = (2 * mean_p * mean_q + c1) * (2 * both + c2)
            values.append(top / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
    assert scores.ssim(a, b) == pytest.approx(np.mean(values), abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- CLIP


def test_the_demo_clip_tells_prompts_apart() -> None:
    import torch

    from streamt2v import weights
    from streamt2v.media.frames import to_u8
    from streamt2v.training import sheets
    from streamt2v.training.denoisers import TextSource

    family = weights.families()["demo"]
    unet, vae, text, tokenizer = (
        weights.load(family, role, "cpu", torch.float32)
        for role in ("stream.unet", "stream.vae", "stream.text", "stream.tokenizer")
    )
    prompts = json.loads(family.vocabulary_path().read_text("utf-8"))["examples"][:3]
    models = sheets.models(unet, vae)
    made = [sheets.make_video(models, TextSource(tokenizer, text), prompt, seed=1)[:10] for prompt in prompts]
    frames = np.stack([to_u8(clip) for clip in made])
    demo = clips.load("auto", "cpu")  # nothing was fetched into this test's home
    assert "demo" in demo.name
    table = [[measured(row, clip=demo, prompt=p).scores["clip_text"] or 0 for p in prompts] for row in frames]
    assert np.argmax(table, axis=1).tolist() == [0, 1, 2]
    assert table[0][0] == pytest.approx(
        100 * np.mean([scores.cosine(demo.text(prompts[0]), demo.image(frame)) for frame in frames[0][::8]])
    )
    changed = np.concatenate([frames[0][:5], frames[1][5:]])
    result = measured(changed, clip=demo, clip_every=1, window=3)
    assert result.series["clip_image"][0] == pytest.approx(100)
    assert result.scores["clip_image"] == pytest.approx(
        100 * np.mean([scores.cosine(demo.image(changed[0]), demo.image(frame)) for frame in changed[-3:]])
    )
    assert result.scores["clip_text"] is None
    seen = [int(np.isfinite(measured(changed, clip=demo, clip_every=n).series["clip_image"]).sum()) for n in (1, 4)]
    assert seen == [10, 3]


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A tiny random CLIP as `save_pretrained` writes it."""
    from transformers import CLIPConfig, CLIPModel

    from tests import pipelines

    text = pipelines._clip_text(projected=True).config
    parts = CLIPConfig(text_config=text.to_dict(), vision_config=pipelines._eyes().config.to_dict(), projection_dim=8)
    CLIPModel(parts).save_pretrained(tmp_path)
    pipelines.clip_tokenizer(tmp_path / "words").save_pretrained(tmp_path)
    return tmp_path


def test_a_published_clip_from_a_folder(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = clips.load(str(clip_folder), "cpu")
    assert clip.name == str(clip_folder)
    assert clip.text("a cat").shape == clip.image(noise(1)[0]).shape == (8,)
    assert not np.allclose(clip.text("a cat"), clip.text("a dog"))
    asked = []
    monkeypatch.setattr(clips.hub, "snapshot", lambda name, *more: asked.append(name) or clip_folder)
    assert clips.load("hub:somebody/clip", "cpu").name == "somebody/clip"
    # Once it was fetched, it is what "auto" means.
    monkeypatch.setattr(clips.home, "recorded", lambda section: {f"{clips.PUBLISHED} main config.json": {}})
    assert clips.load("auto", "cpu").name == clips.PUBLISHED
    assert asked == ["somebody/clip", clips.PUBLISHED]


def test_what_is_no_clip(tmp_path: Path) -> None:
    for name in ("nonsense", "hub:nonsense"):
        with pytest.raises(ConfigError, match="nonsense"):
            clips.load(name, "cpu")
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        clips.load(str(tmp_path), "cpu")


# ------------------------------------------------------------------------------------------------ what a video says


def write(path: Path, frames: Iterator[Frames] | Frames, comment: str = "") -> None:
    """Write an mp4 as streamt2v does."""
    groups = [frames] if isinstance(frames, np.ndarray) else frames
    writer = None
    for group in groups:
        if writer is None:
            growing = path.with_suffix(".growing")
            writer = writing.SegmentWriter(growing, *group.shape[1:3], Fraction(8), crf=4)
        writer.append(group)
    assert writer is not None
    writer.finish(path, comment)
    writer.path.unlink()


def recipe(command: str = "generate", **more: Any) -> dict[str, Any]:
    run = config.merge(config.preset("demo"), {"prompt": "a red ball over the sea", **more})
    return {"streamt2v": "0.1.0", "command": command, "config": config.to_flat(run)}


def test_chunks_are_read_from_the_settings() -> None:
    stream, refine = seams_of(recipe(), 60)
    assert stream == seams(streaming_plan(60, 16, 8)) == (16, 24, 32, 40, 48, 56)
    assert refine == seams(refinement_plan(60, 24, 2, shift_back=False)) == (24, 46)
    assert seams_of(recipe("refine"), 60) == ((), refine)
    assert seams_of(recipe(**{"refine.enabled": False, "stream.chunk": 20}), 40) == ((20, 32), ())
    extended = recipe("extend") | {"source": {"name": "a.mp4", "frames": 40}}
    assert seams_of(extended, 60) == ((40, 48, 56), (48,))  # the last 16 frames of the 40 are the first chunk
    assert seams_of(extended, 20) == ((), ())
    for foreign in (
        {},
        recipe("extend"),
        {"command": "generate", "config": {"unknown": 1}},
        {"config": {"stream.chunk": "many"}},
    ):
        assert seams_of(foreign, 60) == ((), ())


def test_seams_that_are_given() -> None:
    assert parse_seams("16,24,40") == (16, 24, 40)
    assert parse_seams("16:48:8,50") == (16, 24, 32, 40, 50)
    for text in ("", "a", "1:2:3:4", "8:16:0", "1.5"):
        with pytest.raises(ConfigError, match="--seams"):
            parse_seams(text)


def test_a_video_is_looked_at_first(tmp_path: Path) -> None:
    path, other = tmp_path / "a.mp4", tmp_path / "b.mp4"
    write(path, moving(30, (1, 1)), json.dumps(recipe()))
    write(other, moving(29, (1, 1)))
    subject = inspect(path, Settings())
    assert (subject.frames, subject.prompt) == (30, "a red ball over the sea")
    assert (subject.stream_seams, subject.refine_seams) == ((16, 24), (24,))
    assert inspect(path, Settings(prompt="another")).prompt == "another"
    assert inspect(path, Settings(seams=(9, 5, 9))).stream_seams == (5, 9)
    assert inspect(other, Settings()).prompt == ""
    with pytest.raises(ConfigError, match="no chunk begins at 30"):
        inspect(path, Settings(seams=(30,)))
    with pytest.raises(InputError, match="29 frames"):
        inspect(path, Settings(against=other))


@pytest.mark.parametrize("wrong", [{"window": 0}, {"clip_every": 0}, {"flow_size": 8}, {"seams": (0,)}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Settings(**wrong)


def test_videos_of_one_frame_and_of_odd_shapes() -> None:
    alone = measured(noise(1))
    assert {name for name, value in alone.scores.items() if value is not None} == {"scene_cuts"}
    assert len(alone.thumbnails) == 1
    wide = np.random.default_rng(0).integers(0, 256, (4, 40, 600, 3), dtype=np.uint8)
    result = measure(iter([wide]), Subject("wide", 4, 600, 40, 8.0), Settings(flow_size=64))
    assert result.thumbnails[0].shape == (16, 240, 3)
    assert result.scores["flow"] is not None


# ---------------------------------------------------------------------------------------------------------- reports


def test_the_report_is_one_safe_file() -> None:
    spike = flat([100] * 40, side=16)
    spike[12] = 180
    subject = Subject("<script>alert(1)</script>.mp4", 40, 16, 16, 8.0, "a </p><script> & a \u202e cat", (16, 24))
    result = measure(iter([spike]), subject, Settings(flow_size=32))
    page = report.as_html([result, result], Settings())
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "://" not in page
    assert "default-src 'none'" in page
    assert page.count("data:image/jpeg;base64,") == 2 * 24
    assert page.count("data:image/webp;base64,") == 2
    assert page.count("<svg") >= 8
    assert all(name in page for name in SCORES)
    assert all(arrow in page for arrow in (report.LOW, report.HIGH, report.ONE))
    assert set(report.BETTER) < set(SCORES)


def test_a_long_plot_is_thinned_without_losing_its_extremes() -> None:
    series = np.sin(np.arange(1e5))
    series[[12_345, 67_890]] = 7, -5
    drawn = report.plot(series, seams=(16,), cuts=(20,))
    assert len(drawn) < 60_000
    assert all(text in drawn for text in (">7<", ">-5<", ">99999<"))
    assert drawn.count("<line") == 2
    heights = {point.split(",")[1] for point in drawn.split('points="')[1].split('"')[0].split()}
    assert {"4.0", "126.0"} <= heights


def test_the_documentation_defines_every_score() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text("utf-8")
    assert [name for name in SCORES if f"`{name}`" not in page] == []


# ------------------------------------------------------------------------------------------------------------ memory

_PEAKS = """
import sys
from pathlib import Path
from streamt2v import devices
from streamt2v.metrics.evaluation import Settings, evaluate
from streamt2v.cli.progress import Progress
for path in sys.argv[2:]:
    evaluate([Path(path)], Settings(flow_size=int(sys.argv[1])), Progress(quiet=True), print)
    print(devices.peak_memory())
"""


def long_video(path: Path, count: int, height: int, width: int) -> Path:
    rows, columns = np.mgrid[:height, :width].astype(np.float32)

    def groups() -> Iterator[Frames]:
        for start in range(0, count, 8):
            times = range(start, min(start + 8, count))
            yield np.stack(
                [
                    np.stack([128 + 100 * np.sin((columns + k * rows + 3 * t) / 20) for k in (0, 1, 2)], -1)
                    for t in times
                ]
            ).astype(np.uint8)

    write(path, groups(), json.dumps(recipe()))
    return path


def peaks(flow_size: int, *paths: Path) -> list[int]:
    """Peak memory in bytes of one process after each of the videos in turn."""
    command = [sys.executable, "-c", _PEAKS, str(flow_size), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    short, long = long_video(tmp_path / "short.mp4", 32, 180, 320), long_video(tmp_path / "long.mp4", 160, 180, 320)
    before, after = peaks(64, short, long)
    assert after - before < 14e6  # the frames of the longer one are 28 MB


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_at_full_size(tmp_path: Path) -> None:
    short = long_video(tmp_path / "short.mp4", 96, 720, 1280)  # after 32 frames the peak is not reached yet
    long = long_video(tmp_path / "long.mp4", 1200, 720, 1280)
    before, after = peaks(720, short, long)
    assert after - before < 60e6  # the frames of the longer one are 3.3 GB


def test_frames_are_compared_with_the_prompt_of_their_time() -> None:
    class Words:
        name = "words"

        def text(self, prompt: str) -> np.ndarray:
            return np.eye(2)[["red", "blue"].index(prompt)]

        def image(self, frame: np.ndarray) -> np.ndarray:
            return np.eye(2)[0 if frame[0, 0, 0] else 1]

    frames = np.zeros((8, 40, 40, 3), np.uint8)
    frames[:5, ..., 0] = 200
    turns = (Prompt(0, 0, "red"), Prompt(4, 5, "blue"))
    settings = Settings(flow_size=32, clip_every=1)
    for prompts, score in ((turns, 100), ((), 62.5)):
        subject = Subject("two", 8, 40, 40, 8.0, "red", prompts=prompts)
        assert measure(iter([frames]), subject, settings, Words()).scores["clip_text"] == pytest.approx(score)  # type: ignore[arg-type]
