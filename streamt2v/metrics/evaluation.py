"""Measuring videos: one pass over the frames keeps a few numbers per frame, which give the scores at the end."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector
from scenedetect.scene_manager import compute_downscale_factor

from streamt2v import chunks, devices
from streamt2v.errors import ConfigError, InputError, VideoError
from streamt2v.jobs.recipe import recipe_of, recorded_run, recorded_timeline
from streamt2v.media import isolated
from streamt2v.media.frames import Frames
from streamt2v.metrics import clip as clips
from streamt2v.metrics import motion, scores
from streamt2v.metrics.scores import Series
from streamt2v.runs.pace import Pace, Status
from streamt2v.timeline import Prompt, plans
from streamt2v.weights import hub

if TYPE_CHECKING:
    from streamt2v.runs.watch import Report

GROUP = 8  # frames read at once
MOST_SEAMS = 1_000_000
THUMBNAILS, THUMBNAIL_WIDTH = 24, 240

# name of a score -> what it says
SCORES: Mapping[str, str] = {
    "scene_cuts": "cuts that PySceneDetect's AdaptiveDetector finds with its defaults",
    "mawe_paper": "motion-aware warp error as printed: warp error / mean squared flow",
    "mawe_script": "the same as in the released script: mean of warp error / (9.5 mean flow)",
    "warp_error": "squared RGB distance of a frame to the next one warped back, where both are visible",
    "flow_score": "mean squared flow magnitude, pixels^2",
    "flow": "mean flow magnitude, pixels per frame",
    "flow_deviation": "standard deviation of the flow magnitude over the frames",
    "stagnation": "flow in the last frames / flow in the first ones",
    "clip_text": "mean cosine between prompt and frame by CLIP, x 100",
    "clip_image": "cosine between the first frame and the last ones by CLIP, x 100",
    "colour_drift": "distance between the colours of the first frame and the last ones, levels",
    "seam_score": "change into chunks of the streaming stage / median change elsewhere",
    "seam_score_refine": "the same for chunks of the refinement stage",
    "wrap": "change from the last frame to the first / median change: 1 in a loop that nobody sees the end of",
    "flicker": "local brightness that jumps back and forth, levels",
    "mse": "mean squared difference from the other video",
    "psnr": "dB against the other video; none if they are equal",
    "ssim": "structural similarity to the other video",
}


@dataclass(frozen=True)
class Settings:
    """What is measured and how.

    Args:
        prompt: text to compare the frames with; None means the prompt stored in the video, if any.
        against: another video to compare with, frame by frame.
        seams: frames at which chunks begin; None reads them from the recipe in the video.
        window: how many frames count as the first and as the last ones.
        flow_size: side of the square that frames are scaled to for the flow; 720 in the paper.
        clip: which CLIP, see `clip.load`; "none" leaves it out.
        clip_every: CLIP is applied to every `clip_every`-th frame.
        device: where CLIP runs.

    Raises:
        ConfigError: a number is out of range.
    """

    prompt: str | None = None
    against: Path | None = None
    seams: tuple[int, ...] | None = None
    window: int = 100
    flow_size: int = 720
    clip: str = clips.AUTO
    clip_every: int = 8
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.window < 1 or self.clip_every < 1:
            raise ConfigError("a window or step must have at least 1 frame")
        if not 32 <= self.flow_size <= 4096:
            raise ConfigError(f"a flow size of {self.flow_size} pixels is out of range", "give 32 to 4096")
        if self.seams is not None and min(self.seams, default=1) < 1:
            raise ConfigError("a chunk can only begin at frame 1 or later")


@dataclass(frozen=True)
class Subject:
    """A video to measure, known before any frame is read: what it holds, and where the chunks of each stage begin."""

    video: str
    frames: int
    width: int
    height: int
    fps: float
    prompt: str = ""
    stream_seams: tuple[int, ...] = ()
    refine_seams: tuple[int, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    """The prompts of a timeline, of which `prompt` is the first; empty if one prompt holds for all frames."""


@dataclass
class Measured:
    """The result of one pass over a video: scores by name, series of one value per frame, cuts, a few small frames."""

    subject: Subject
    clip: str
    scores: dict[str, float | None]
    series: dict[str, Series]
    cuts: list[int]
    thumbnails: list[Frames] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Everything but frames and series, ready for JSON."""
        return {**dataclasses.asdict(self.subject), "clip": self.clip, "cuts": self.cuts, "scores": self.scores}


def parse_seams(text: str) -> tuple[int, ...]:
    """Parse ``16,24,32`` into frame numbers; ``16:48:8`` means every eighth from 16 up to, but not including, 48.

    Raises:
        ConfigError: the text is neither.
    """
    found: list[int] = []
    try:
        for item in text.split(","):
            numbers = [int(number) for number in item.split(":")]
            several = range(*numbers) if len(numbers) > 1 else numbers
            # Of more frames than any video has, the ends are enough to be refused.
            found += several if len(several) <= MOST_SEAMS else (several[0], several[-1])
    except (ValueError, TypeError):
        hint = "give frame numbers such as 16,24,32, or first:end:step such as 16:1200:8"
        raise ConfigError(f"--seams is {text!r}", hint) from None
    return tuple(found)


def seams_of(recipe: Mapping[str, Any], num_frames: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the frames at which chunks of the streaming and refinement stages begin, by the recipe in a video."""
    if (recorded := recorded_run(recipe)) is None:
        return (), ()
    run, command, kept = recorded
    try:
        stream, refine = plans(dataclasses.replace(run, num_frames=num_frames), command, kept)
    except ConfigError:  # fewer frames than are kept
        return (), ()
    return chunks.seams(stream), chunks.seams(refine)


def inspect(path: Path, settings: Settings) -> Subject:
    """Look at a video before anything is measured.

    Raises:
        VideoError: the video cannot be read. InputError: it cannot be compared with the other one.
        ConfigError: a seam lies outside the video.
    """
    found = isolated.probe(path)
    recipe = recipe_of(found.comment)
    stream, refine = seams_of(recipe, found.frames)
    if settings.seams is not None:
        stream, refine = tuple(sorted(set(settings.seams))), ()
        if stream and stream[-1] >= found.frames:
            raise ConfigError(f"{path} has {found.frames} frames, no chunk begins at {stream[-1]}")
    if settings.against is not None:
        other = isolated.probe(settings.against)
        pair = [(info.frames, info.width, info.height) for info in (found, other)]
        if pair[0] != pair[1]:
            sizes = ["{} frames of {}x{}".format(*sizes) for sizes in pair]
            raise InputError(f"{path} has {sizes[0]}, {settings.against} has {sizes[1]}", "both must be equal")
        if min(found.width, found.height) < 11:
            raise InputError(f"{path} is {found.width}x{found.height}, too small for SSIM", "it needs at least 11x11")
    prompt = str(recipe.get("config", {}).get("prompt", "")) if settings.prompt is None else settings.prompt
    timeline = recorded_timeline(recipe, found.frames) if settings.prompt is None else ()
    prompts, fps = timeline if len(timeline) > 1 else (), float(found.fps)
    return Subject(str(path), found.frames, found.width, found.height, fps, prompt.strip(), stream, refine, prompts)


def evaluate(
    paths: Sequence[Path], settings: Settings, report: Report, note: hub.Note
) -> tuple[list[Measured], list[VideoError]]:
    """Measure videos one after the other; all of them are inspected before the first is measured.

    Args:
        paths: the videos.
        settings: what is measured and how.
        report: called with the progress.
        note: called with the size of a CLIP that has to be fetched.

    Returns:
        The measurements, and the errors of the other videos. A damaged video is not measured, because a repeated frame
        would change its scores.

    Raises:
        VideoError, InputError, ConfigError, WeightsError: see `inspect` and `clip.load`.
    """
    subjects = [inspect(path, settings) for path in paths]
    device = devices.resolve(settings.device).name
    clip = None if settings.clip == "none" else clips.load(settings.clip, device, note)
    results, failures = list[Measured](), list[VideoError]()
    for path, subject in zip(paths, subjects, strict=True):
        other = None if settings.against is None else isolated.read_frames(settings.against, GROUP)
        stream = _told(isolated.read_frames(path, GROUP), subject, report)
        try:
            results.append(measure(stream, subject, settings, clip, other))
        except VideoError as error:
            failures.append(error)
    return results, failures


def _told(stream: Iterator[Frames], subject: Subject, report: Report) -> Iterator[Frames]:
    """Pass on a stream and report each group after use."""
    name, done, groups = Path(subject.video).name, 0, -(-subject.frames // GROUP)
    report.tell(Status("start", name, 0, subject.frames))
    pace = Pace({name: groups}, {}, time.monotonic())
    for index, group in enumerate(stream):
        yield group
        done, now = done + len(group), time.monotonic()
        pace.passed(name, now, groups - index - 1)
        pace.mark(now)
        memory = devices.working_memory() / 2**20
        status = Status(
            "chunk", name, done, subject.frames, index + 1, groups, 0, 0, pace.share, pace.left(now), memory
        )
        report.tell(status)


def measure(
    stream: Iterator[Frames],
    subject: Subject,
    settings: Settings,
    clip: clips.Clip | None = None,
    other: Iterator[Frames] | None = None,
) -> Measured:
    """Measure one stream of RGB frames, keeping only two frames and a few thumbnails in memory.

    Args:
        stream: uint8 groups [F,H,W,3].
        subject: what the stream holds.
        settings: what is measured and how.
        clip: the encoders; None leaves out their scores.
        other: the frames of another video of the same size and length.
    """
    meter = _Meter(subject, settings, clip)
    others = itertools.repeat(None) if other is None else itertools.chain.from_iterable(other)
    for frame, compared in zip(itertools.chain.from_iterable(stream), others, strict=other is not None):
        meter.add(frame, compared)
    return meter.result()


_SERIES = (
    *("change", "flow", "squared_flow", "warp_error", "script_warp_error", "colour_drift", "flicker"),
    *("clip_text", "clip_image", "mse", "ssim"),
)


class _Meter:
    """Takes frame after frame; keeps the last one, and one number per frame and series."""

    def __init__(self, subject: Subject, settings: Settings, clip: clips.Clip | None) -> None:
        self.subject, self.settings, self.clip = subject, settings, clip
        self.series = {name: np.full(subject.frames, np.nan) for name in _SERIES}
        self.count = 0
        self.detector = _Cuts(subject)
        timeline = subject.prompts or (Prompt(0, 0, subject.prompt),)
        self.texts = {turn.frame: clip.text(turn.text) for turn in timeline if clip and turn.text.strip()}
        self.thumbnails: list[Frames] = []
        self.shown = set(chunks.evenly(subject.frames, THUMBNAILS))
        self.first: Frames | None = None
        self.last: Frames | None = None
        self.last_square: Frames | None = None
        self.cells: list[Series] = []

    def add(self, frame: Frames, other: Frames | None) -> None:
        """Measure one frame, and compare it with its counterpart in the other video."""
        now = self._motion(frame) | self._colour(frame) | self._brightness(frame) | self._content(frame)
        for name, value in (now | self._difference(frame, other)).items():
            self.series[name][self.count] = value
        self.detector.add(frame)
        if self.count in self.shown:
            size = THUMBNAIL_WIDTH, max(1, round(frame.shape[0] * THUMBNAIL_WIDTH / frame.shape[1]))
            self.thumbnails.append(np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA)))
        self.first = frame if self.first is None else self.first
        self.last = frame
        self.count += 1

    def _motion(self, frame: Frames) -> dict[str, float]:
        square, before = motion.square(frame, self.settings.flow_size), self.last_square
        self.last_square = square
        if before is None or self.last is None:
            return {}
        found = motion.compare(before, square, motion.dense_flow(before, square), motion.dense_flow(square, before))
        return {
            "change": float(cv2.absdiff(frame, self.last).mean()),
            "flow": found.magnitude,
            "squared_flow": found.squared_magnitude,
            "warp_error": found.warp_error,
            "script_warp_error": found.script_warp_error,
        }

    def _colour(self, frame: Frames) -> dict[str, float]:
        now = scores.histograms(frame)
        if not self.count:
            self.first_colours = now
        return {"colour_drift": scores.colour_distance(self.first_colours, now)}

    def _brightness(self, frame: Frames) -> dict[str, float]:
        self.cells = [*self.cells[-2:], scores.cells(_grey(frame))]
        return {"flicker": scores.flicker(*self.cells)} if len(self.cells) == 3 else {}

    def _content(self, frame: Frames) -> dict[str, float]:
        if self.clip is None or self.count % self.settings.clip_every:
            return {}
        now = self.clip.image(frame)
        text = next((text for start, text in reversed(self.texts.items()) if start <= self.count), None)
        if not self.count:
            self.first_content = now
        found = {"clip_image": 100 * scores.cosine(self.first_content, now)}
        return found if text is None else {**found, "clip_text": 100 * scores.cosine(text, now)}

    def _difference(self, frame: Frames, other: Frames | None) -> dict[str, float]:
        if other is None:
            return {}
        return {"mse": scores.squared_error(frame, other), "ssim": scores.ssim(_grey(frame), _grey(other))}

    def result(self) -> Measured:
        """Return the scores of the frames so far."""
        series, subject, window = self.series, self.subject, self.settings.window
        stream, refine = subject.stream_seams, subject.refine_seams
        cuts, error = self.detector.found, scores.mean(series["mse"])
        found = {
            "scene_cuts": float(len(cuts)),
            "mawe_paper": scores.mawe_paper(series["warp_error"], series["squared_flow"]),
            "mawe_script": scores.mawe_script(series["script_warp_error"], series["flow"]),
            "warp_error": scores.mean(series["warp_error"]),
            "flow_score": scores.mean(series["squared_flow"]),
            "flow": scores.mean(series["flow"]),
            "flow_deviation": scores.deviation(series["flow"]),
            "stagnation": scores.stagnation(series["flow"], stream[0] if stream else 0, window),
            "clip_text": scores.mean(series["clip_text"]),
            "clip_image": scores.at_the_end(series["clip_image"], window),
            "colour_drift": scores.at_the_end(series["colour_drift"], window),
            "seam_score": scores.seam_score(series["change"], stream, refine),
            "seam_score_refine": scores.seam_score(series["change"], refine, stream),
            "wrap": scores.wrap(self.first, self.last, series["change"]),
            "flicker": scores.mean(series["flicker"]),
            "mse": error,
            "psnr": scores.psnr(error),
            "ssim": scores.mean(series["ssim"]),
        }
        name = "none" if self.clip is None else self.clip.name
        return Measured(subject, name, found, series, cuts, self.thumbnails)


def _grey(frame: Frames) -> scores.Grey:
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.float32)


class _Cuts:
    """PySceneDetect's AdaptiveDetector with its defaults, fed with frames scaled as by its scene manager."""

    def __init__(self, subject: Subject) -> None:
        self.detector = AdaptiveDetector()
        self.fps = subject.fps
        factor = compute_downscale_factor(max(subject.width, subject.height))
        self.size = (max(1, round(subject.width / factor)), max(1, round(subject.height / factor)))
        self.count = 0
        self.found: list[int] = []

    def add(self, frame: Frames) -> None:
        """Take the next RGB frame."""
        small = frame if self.size == frame.shape[1::-1] else cv2.resize(frame, self.size)
        cuts = self.detector.process_frame(FrameTimecode(self.count, self.fps), cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        self.found += [int(cut.frame_num) for cut in cuts]
        self.count += 1
