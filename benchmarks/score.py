"""Does the demo do what its prompts say, and does it hold? Random prompts of its world, judged at both ends.

    python benchmarks/score.py --prompts 100 --frames 16 --jobs 2
    python benchmarks/score.py --prompts 20 --frames 1200 --refine --jobs 2
    python benchmarks/score.py --prompts 40 --frames 480 --model DIR --set stream.height=80 stream.width=144

Makes the first two stages' video of every prompt and writes benchmarks/results/DATE-demo-FRAMES.json after each; run
again, it goes on. The judge of docs/demo.md says what the first and the last 16 frames show; the rest is what
`streamt2v evaluate` measures (flow at 144x144). With --refine the same is said of the video refined to 256x144, too.
With --model the videos are those of `generate`, unrefined: so is judged what `train dit` wrote, at any settings.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge import load_judge, verdict
from torch import Tensor

from streamt2v import config, weights
from streamt2v.chunks import refinement_plan, seams, streaming_plan
from streamt2v.cli.progress import Progress
from streamt2v.jobs.job import Job
from streamt2v.media import reading, writing
from streamt2v.media.frames import Frames, to_float, to_u8
from streamt2v.metrics.evaluation import Settings, Subject, measure
from streamt2v.runs import pipeline
from streamt2v.stages.stream import StreamModels
from streamt2v.training import sheets
from streamt2v.training.denoisers import TextSource
from streamt2v.training.world.captions import canonical
from streamt2v.training.world.clips import CLIP_FRAMES
from streamt2v.training.world.scenes import ATTRIBUTES, Scenes, sample_scenes
from streamt2v.weights import folders

HERE = Path(__file__).parent
WEIGHTS = HERE.parent / "streamt2v" / "demo"
FLOW_SIZE = 144
Work = Callable[[int], dict[str, Any]]
SMALL = {"output.height": 144, "output.width": 256}  # of 1200 frames all are in memory
SCORES = ("scene_cuts", "seam_score", "seam_score_refine", "stagnation", "flow_deviation", "flicker")


def scene(index: int, seed: int) -> Scenes:
    """A random scene of the demo's world."""
    return sample_scenes(1, torch.Generator().manual_seed(seed + index))


def load(folder: Path) -> tuple[StreamModels, TextSource]:
    """Load the networks of the first two stages from a folder."""
    pad = weights.families()["demo"].file("stream.tokenizer").pad
    text = TextSource(weights.load_tokenizer(folder / "tokenizer.json", pad), network(folder, "text"))
    unet, vae, cam, apm, vision = (network(folder, name) for name in ("unet", "vae", "cam", "apm", "vision"))
    return sheets.models(unet, vae, cam, (apm, vision)), text


def network(folder: Path, name: str) -> Any:
    """Load a network as its file describes it."""
    return weights.load_module(folder / f"{name}.safetensors", "cpu", torch.float32)


def judged(frames: Frames) -> list[int]:
    """Return the judge's verdict on 16 frames, as indices in the order of `ATTRIBUTES`."""
    seen: list[int] = verdict(load_judge(HERE), to_float(frames).unsqueeze(0))[0].tolist()
    return seen


def measured(frames: Frames, seams_at: Iterable[int] = (), refine_seams: Iterable[int] = ()) -> dict[str, float | None]:
    """Return what `evaluate` says of frames [F, H, W, 3]."""
    count, height, width, _ = frames.shape
    subject = Subject("", count, width, height, 8.0, "", tuple(seams_at), tuple(refine_seams))
    found = measure(iter([frames]), subject, Settings(clip="none", flow_size=FLOW_SIZE)).scores
    return {name: found[name] for name in SCORES}


def refine(frames: Frames, prompt: str, seed: int, settings: dict[str, Any]) -> Frames:
    """Refine frames [F, H, W, 3] as the command does; returns the refined ones, decoded from its file."""
    own = {"prompt": prompt, "seed": seed, "num_frames": len(frames), "output.crf": 1}
    built = config.merge(config.preset("demo"), own, settings)
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "base.mp4", Path(folder) / "out.mp4"
        writer = writing.SegmentWriter(Path(folder) / "grow.mp4", *frames.shape[1:3], Fraction(8), crf=1)
        writer.append(frames)
        writer.finish(source)
        pipeline.run(Job("refine", built, output, source=source), Progress(quiet=True))
        return np.concatenate(list(reading.read_frames(output)))


def generated(prompt: str, seed: int, frames: int, model: str, settings: dict[str, Any]) -> tuple[Frames, list[int]]:
    """Make a video as `generate` does, unrefined: frames [F, H, W, 3], and where its chunks meet."""
    own = {"model": model, "prompt": prompt, "seed": seed, "num_frames": frames, "output.crf": 1}
    own |= {"refine.enabled": False, "output.height": 0, "output.width": 0}
    built = config.merge(config.preset(folders.family(model).preset), own, settings)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.mp4"
        pipeline.run(Job("generate", built, output), Progress(quiet=True))
        made = np.concatenate(list(reading.read_frames(output)))
    return made, seams(streaming_plan(frames, built.stream.chunk, built.stream.overlap))


def score_model(index: int, seed: int, frames: int, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Make and measure the video of one random prompt by a model."""
    torch.set_num_threads(1)
    asked = scene(index, seed).labels().tolist()[0]
    shown, borders = generated(canonical(asked), seed + index, frames, model, settings)
    return {"index": index, "prompt": canonical(asked), "seed": seed + index, **described(shown, asked, borders)}


def score(index: int, seed: int, frames: int, weights: Path, refined: bool, sheet: Path | None) -> dict[str, Any]:
    """Make and measure the video of one random prompt, refined too if asked; `sheet` takes a picture of it."""
    torch.set_num_threads(1)
    models, text = load(weights)
    asked = scene(index, seed).labels().tolist()[0]
    prompt = canonical(asked)
    plan = streaming_plan(frames, CLIP_FRAMES, sheets.OVERLAP)
    made: Tensor = sheets.make_video(models, text, prompt, len(plan) - 1, seed + index)[:frames]
    if sheet is not None:
        sheets.write_sheet(sheet / f"{index:03d}.png", made[None, :: max(1, frames // 24)])
    shown = to_u8(made)
    row = {"index": index, "prompt": prompt, "seed": seed + index, **described(shown, asked, seams(plan))}
    if refined:
        demo = config.merge(config.preset("demo")).refine
        borders = seams(refinement_plan(frames, demo.chunk, demo.overlap, demo.shift_back))
        row["refined"] = described(refine(shown, prompt, seed + index, SMALL), asked, seams(plan), borders)
    return row


def described(
    frames: Frames, asked: list[int], seams_at: Iterable[int], refine_seams: Iterable[int] = ()
) -> dict[str, Any]:
    """Return which attributes are right in the first and in the last 16 frames, and the scores."""
    ends = {"first": judged(frames[:CLIP_FRAMES]), "last": judged(frames[-CLIP_FRAMES:])}
    right = {end: dict(zip(ATTRIBUTES, np.equal(seen, asked).tolist(), strict=True)) for end, seen in ends.items()}
    return {**right, **measured(frames, seams_at, refine_seams)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the share of prompts followed at both ends, the share of those held, and the means of the scores.

    `held` counts videos whose first 16 frames were right, and among them those whose last 16 frames are, too.
    """
    shares: dict[str, Any] = {}
    for name in ATTRIBUTES:
        began = [row for row in rows if row["first"][name]]
        shares[name] = {
            "right_at_first": len(began) / len(rows),
            "held": sum(row["last"][name] for row in began) / len(began) if began else None,
            "chance": 1 / len(ATTRIBUTES[name]),
        }
    known = {name: [row[name] for row in rows if row[name] is not None] for name in SCORES}
    means = {name: float(np.mean(values)) for name, values in known.items() if values}
    refined = {"refined": summary([row["refined"] for row in rows])} if "refined" in rows[0] else {}
    return {"prompts": len(rows), **shares, **means, **refined}


def machine(frames: int, weights: Path) -> dict[str, Any]:
    """Return what a results file says of the length, the weights, the versions and the machine."""
    digest = hashlib.sha256(b"".join((weights / f"{name}.safetensors").read_bytes() for name in ("unet", "cam", "apm")))
    return {
        "frames": frames, "flow_size": FLOW_SIZE, "weights": digest.hexdigest()[:16], "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a video",
    }  # fmt: skip


def options(about: str | None, prompts: int, frames: int, seed: int) -> argparse.ArgumentParser:
    """Return the options of a script that makes a row for every prompt."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--frames", type=int, default=frames)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--sheets", type=Path, help="folder for a picture of every video")
    parser.add_argument("--out", type=Path, help="the JSON file; by default one of today in benchmarks/results")
    return parser


def collect(path: Path, header: dict[str, Any], work: Work, count: int, at_once: int) -> list[dict[str, Any]]:
    """Make what is missing of rows 0..count-1 and store the file after each; return all rows.

    A file of another length, of other weights or versions is begun again.
    """
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = before["rows"] if all(before.get(key) == value for key, value in header.items()) else []
    done = {row["index"] for row in rows}
    with ProcessPoolExecutor(at_once) as pool:
        for task in as_completed([pool.submit(work, index) for index in range(count) if index not in done]):
            rows = sorted([*rows, task.result()], key=lambda row: int(row["index"]))
            path.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
            print(f"{len(rows)}/{count} {task.result()['prompt']}", flush=True)
    return rows


def main() -> None:
    """Score, store after every prompt, add the summary and print it."""
    parser = options(__doc__, prompts=100, frames=CLIP_FRAMES, seed=5000)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--refine", action="store_true", help="refine every video, too, with the shipped refiner")
    parser.add_argument("--model", help="a model whose videos are judged, such as the folder of `train dit`")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of that model")
    asked = parser.parse_args()
    name, header = "demo", {**machine(asked.frames, asked.weights), "refined": asked.refine}
    work: Work = partial(
        score, seed=asked.seed, frames=asked.frames, weights=asked.weights, refined=asked.refine, sheet=asked.sheets
    )  # fmt: skip
    if asked.model:
        name, given = Path(asked.model).name, (pair.partition("=") for pair in asked.set)
        settings = {key: config.parse_value(key, text) for key, _, text in given}
        header |= {"weights": folders.fingerprint(folders.locate(asked.model))[:16], "settings": settings}
        work = partial(score_model, seed=asked.seed, frames=asked.frames, model=asked.model, settings=settings)
    path = asked.out or HERE / "results" / f"{datetime.date.today()}-{name}-{asked.frames}.json"
    rows = collect(path, header, work, asked.prompts, asked.jobs)
    path.write_text(json.dumps({**header, "summary": summary(rows), "rows": rows}, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
