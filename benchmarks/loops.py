"""Do loops close, do they still move, and is a picture that a video ends on led to?

    python benchmarks/loops.py                        # 20 prompts, about 16 minutes of one core
    python benchmarks/loops.py --prompts 4 --ways home until --sheets sheets --out FILE

Base videos of random prompts of the demo, `--quality balanced`. Loops are made in each of three ways: one window (16
frames), a ring of windows, and a stream that comes home (--frames); "plain" is the video of the same seed that is no
loop. wrap is the change from the last frame to the first over the median change, motion the median change over that of
the plain video.

picture: one window from the first frame of the plain video, by the picture-to-video network told that it is a loop, as
it learned (LoopAnimate), and its latents rolled; "told" and "rolled" are one of both. They are compared with what it
makes of the picture without a loop.

until: the stream ends on a picture, the last frame of another video: of the same prompt, or of the next one. psnr
compares the last frame with the picture as the VAE draws it, vae_psnr that with the picture; 99 means the same.

jump is the largest change on the way, home or to the picture, over the median change of the plain video; plain_jump is
that of the plain video in the same frames. even is what jump would be if every pixel went there straight and at even
speed, as in a cross-fade: nothing can have less.

What no picture leads is made once for all of them. Writes benchmarks/results/DATE-loops.json after each prompt and goes
on with it when run again; the figures of docs/known_frames.md.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import cv2
import numpy as np
import score
import torch

from streamt2v import devices, memory, weights
from streamt2v.cli.progress import Progress
from streamt2v.families import makers, streamingt2v
from streamt2v.families.networks import Networks
from streamt2v.jobs import asked as options
from streamt2v.jobs.job import Job
from streamt2v.jobs.prepared import Prepared
from streamt2v.media import pictures
from streamt2v.media.frames import Frames, to_float, to_u8
from streamt2v.metrics import scores
from streamt2v.metrics.scores import Series
from streamt2v.models.encoders import decode_latents, encode_frames
from streamt2v.runs.watch import Watch
from streamt2v.stages.stream import StreamState
from streamt2v.timeline import home_frames
from streamt2v.weights import vocabulary

LOOPS, PICTURED, PICTURES = (
    ("window", "ring", "home"),
    ("picture", "picture told", "picture rolled"),
    ("until same", "until next"),
)
WAYS = (*LOOPS, *PICTURED, *PICTURES)
WINDOW, QUALITY, BETWEEN = 16, "balanced", 500  # BETWEEN: from a seed to that of the other video
BARS = {"wrap": 1.3, "jump": 1.4, "motion": 0.85, "psnr": 30.0}
AT_MOST = ("wrap", "jump")
Settings = tuple[tuple[str, Any], ...]


def prompt_of(index: int, seed: int) -> str:
    """Return a random prompt in the words that the shipped demo knows."""
    random, known = Random(seed + index), vocabulary.load(score.WEIGHTS / "vocabulary.json")
    said = {
        name: random.choice(sorted({known.canonical[word] for word in words}))
        for name, words in known.attributes.items()
    }
    when = "by day" if said["time"] == "day" else f"at {said['time']}"
    return f"a {said['colour']} {said['subject']} {said['motion']} over the {said['place']} {when}"


@cache
def loaded() -> dict[Path, Any]:
    """Return the networks of this process, empty at first."""
    return {}


class Maker:
    """Makes base videos of one prompt and seed as `runs.base` does; what no known frame changes is made once."""

    def __init__(self, prompt: str, seed: int, settings: Settings = ()) -> None:
        self.asked = {"prompt": prompt, "seed": seed, "refine.enabled": False, **dict(settings)}
        self.begun: dict[int, Any] = {}  # by the frame at which a chunk starts

    def _networks(self, row: Mapping[str, Any]) -> tuple[Prepared, Networks]:
        known = Prepared(Job("generate", options.resolve(row=row, quality=QUALITY), Path("loop.mp4")))
        run, watch = known.job.config, Watch(Progress(quiet=True), known, None)
        return known, Networks(run, [run.prompt], devices.resolve("cpu"), memory.ladder("cpu")[0], loaded(), watch)

    def from_picture(self, picture: Frames, told: bool, rolled: bool) -> Frames:
        """Return one window [F, H, W, 3] from a picture [H, W, 3]."""
        row = {**self.asked, "num_frames": WINDOW, "loop": "stream" if told else "no", "image": "picture.png"}
        _, networks = self._networks(row)
        sampled = streamingt2v._sampled

        def rolling(*given: Any, **_: Any) -> torch.Tensor:
            return sampled(*given, rolling=rolled)

        with mock.patch.object(streamingt2v, "_sampled", rolling):
            return to_u8(makers.build(networks, None).first(networks.run.prompt, to_float(picture[None])[0]))

    def video(self, num_frames: int, loop: str = "no", shown: Mapping[int, Frames] | None = None) -> Frames:
        """Return frames [F, H, W, 3]; those of `shown` are pictures [1, H, W, 3]."""
        named = {f"pictures.{frame}": "picture.png" for frame in shown or {}}
        known, networks = self._networks({**self.asked, "num_frames": num_frames, "loop": loop, **named})
        run, plan, making = known.job.config, known.stream_plan, makers.build(networks, None)
        if len(plan) == 1 and loop != "no":
            return to_u8(making.first(run.prompt, None))
        if not self.begun:
            self.begun[0] = making.first(run.prompt, None)
        first = self.begun[0]
        there = {frame: to_float(picture)[0] for frame, picture in (shown or {}).items()}
        home = home_frames(run) if loop != "no" else 0
        there |= dict(enumerate(to_float(to_u8(first[:home])), num_frames))
        made, state = [first[: plan[0].stop]], StreamState.after_first_chunk(first, run.stream.overlap, 0, plan[0].stop)
        for chunk in plan[1:]:
            reach = max(chunk.start + run.stream.chunk, chunk.stop + (home if chunk.stop == num_frames else 0))
            ahead = {frame: there[frame] for frame in there if chunk.new_start <= frame < reach}
            new = None if ahead else self.begun.get(chunk.start)
            if new is None:
                new = making.extend(replace(state, ahead=ahead), run.prompt, chunk)
            if not ahead:
                self.begun[chunk.start] = new
            taken, state = state.after(chunk, new)
            made.append(taken)
        return to_u8(torch.cat(made))


@lru_cache(3)
def maker_of(prompt: str, seed: int, settings: Settings) -> Maker:
    """Return a maker; the next prompt finds what its video began with."""
    return Maker(prompt, seed, settings)


def change(before: Frames, after: Frames) -> float:
    """Return the mean absolute difference of two frames in levels."""
    return float(cv2.absdiff(before, after).mean())


def changes(frames: Frames) -> Series:
    """Return the change into each frame but the first."""
    return np.array([change(*pair) for pair in pairwise(frames)])


def way_there(made: Frames, plain: Frames, goal: Frames) -> dict[str, float]:
    """Say how a video departs from the plain one to reach a goal, the frame that it ends on or that follows it."""
    led = next(frame for frame in range(len(made)) if (made[frame] != plain[frame]).any())
    usual, way = float(np.median(changes(plain))), np.concatenate([made[led - 1 :], goal[None]])
    return {
        "jump": float(changes(way).max()) / usual,
        "plain_jump": float(changes(plain[led - 1 :]).max()) / usual,
        "even": change(made[led - 1], goal) / (len(way) - 1) / usual,
        "led": len(made) - led,
    }


def motion(made: Frames, plain: Frames) -> float:
    """Return the median change over that of the plain video."""
    return float(np.median(changes(made)) / np.median(changes(plain)))


def looped(made: Frames, plain: Frames) -> dict[str, float]:
    """Measure a loop."""
    wraps = {
        name: change(video[-1], video[0]) / np.median(changes(video))
        for name, video in (("wrap", made), ("plain_wrap", plain))
    }
    return {name: float(value) for name, value in wraps.items()} | {"motion": motion(made, plain)}


def psnr(one: Frames, other: Frames) -> float:
    """Compare two frames, in dB; 99 where they are the same."""
    found = scores.psnr(scores.squared_error(one, other))
    return 99.0 if found is None else found


def until(maker: Maker, plain: Frames, picture: Frames) -> tuple[Frames, dict[str, float]]:
    """End a video on a picture [H, W, 3], and measure that."""
    made = maker.video(len(plain), shown={len(plain) - 1: picture[None]})
    vae = loaded()[weights.family("demo").path("stream.vae")]
    with torch.inference_mode():
        drawn = to_u8(decode_latents(vae, encode_frames(vae, to_float(picture[None]))))[0]
    found = {
        "psnr": psnr(made[-1], drawn),
        "vae_psnr": psnr(drawn, picture),
        "motion": motion(made, plain),
    }
    return made, found | way_there(made[:-1], plain, made[-1])


def measure(
    index: int, seed: int, frames: int, ways: Sequence[str], settings: Settings, sheets: Path | None
) -> dict[str, Any]:
    """Make the videos of one random prompt in some ways, and measure them."""
    torch.set_num_threads(1)
    prompt = prompt_of(index, seed)
    maker = maker_of(prompt, seed + index, settings)
    plain = maker.video(frames)
    if set(ways) & set(PICTURED):
        straight = maker.from_picture(plain[0], told=False, rolled=False)
    row: dict[str, Any] = {"index": index, "prompt": prompt}
    rows = [plain]
    for way in ways:
        if way == "window":
            made = maker.video(WINDOW, "stream")
            row[way] = looped(made, plain[:WINDOW])
        elif way in LOOPS:
            made = maker.video(frames, {"ring": "ring", "home": "stream"}[way])
            row[way] = looped(made, plain) | (way_there(made, plain, made[0]) if way == "home" else {})
        elif way in PICTURED:
            made = maker.from_picture(plain[0], told="rolled" not in way, rolled="told" not in way)
            row[way] = looped(made, straight)
        else:
            if way == "until same":
                other = maker_of(prompt, seed + index + BETWEEN, settings)
            else:
                other = maker_of(prompt_of(index + 1, seed), seed + index + 1, settings)
            made, row[way] = until(maker, plain, other.video(WINDOW)[-1])
        rows.append(made)
    if sheets is not None:
        sheets.mkdir(parents=True, exist_ok=True)
        shown = [np.concatenate([*video[-18:], *video[:2]], axis=1) for video in rows if len(video) >= 18]
        pictures.write_image(sheets / f"{index:03d}.png", np.concatenate(shown))
    return row


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return for each way and score how it is distributed, and for how many prompts it reaches its bar."""
    found: dict[str, Any] = {}
    for way in (way for way in WAYS if way in rows[0]):
        found[way] = {}
        for name in rows[0][way]:
            values = [row[way][name] for row in rows]
            least, median, most = (round(float(np.quantile(values, share)), 3) for share in (0, 0.5, 1))
            found[way][name] = {"least": least, "median": median, "most": most}
            if name in BARS:
                reached = [value <= BARS[name] if name in AT_MOST else value >= BARS[name] for value in values]
                found[way][name]["reached"] = sum(reached)
    return found


def table(found: Mapping[str, Any], prompts: int) -> str:
    """Return the table of docs/known_frames.md."""
    bars = [f"{name} {'<=' if name in AT_MOST else '>='} {bar:g}" for name, bar in BARS.items()]
    lines = [f"| of {prompts} prompts | " + " | ".join(bars) + " |", "|---" * (len(BARS) + 1) + "|"]
    for way, measured in found.items():
        cells = []
        for name in BARS:
            one = measured.get(name)
            worst = "most" if name in AT_MOST else "least"
            cells.append(f"{one['reached']} ({one['median']:.2f}, at {worst} {one[worst]:.2f})" if one else "")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, store after every prompt, add the summary and print it."""
    parser = score.options(__doc__, prompts=20, frames=48, seed=9000)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=NUMBER", help="other settings")
    asked = parser.parse_args()
    settings = tuple((key, json.loads(value)) for key, value in (pair.split("=") for pair in asked.set))
    path = asked.out or score.HERE / "results" / f"{datetime.date.today()}-loops.json"
    header = score.machine(asked.frames, score.WEIGHTS)
    header |= {"seed": asked.seed, "quality": QUALITY, "ways": asked.ways, "settings": dict(settings)}
    work = partial(
        measure, seed=asked.seed, frames=asked.frames, ways=asked.ways, settings=settings, sheets=asked.sheets
    )
    rows = score.collect(path, header, work, asked.prompts, asked.jobs)
    found = summary(rows)
    path.write_text(json.dumps({**header, "summary": found, "rows": rows}, indent=1) + "\n")
    print(table(found, len(rows)))


if __name__ == "__main__":
    main()
