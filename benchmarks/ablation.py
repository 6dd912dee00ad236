"""Does each part do something? Seeded prompts, with and without the part, paired differences with bootstrap intervals.

    python benchmarks/ablation.py --prompts 8 --frames 240 --jobs 2

Writes benchmarks/results/DATE-ablation.json and the table docs/results.md. Variants: CAM off and APM off in the
streaming stage, independent chunks in the refiner; same seeds for all. Every prompt is streamed from two starts:

- clip: 16 rendered frames of the prompt's scene, and a prompt that leaves the subject's colour open. Only the frames
  say what the colour is, as when a video is continued; the start is decided and the same for every variant.
- text: the first chunk is generated, and the prompt names the colour.

Measures, with d(f) the mean absolute difference of frames f-1 and f (levels of 255):
- seam: mean of d at the first new frame of each chunk, over the median of d elsewhere. A real video is near 1.
- refiner seam: the largest d inside each overlap of refiner chunks, over the median of d outside overlaps.
- colour drift: distance of the mean colour of the moving subject, first to last 16 frames, in levels.
- kept: share of videos whose first and last 16 frames show the same, by the judge of docs/demo.md.
"""

import argparse
import datetime
import json
import platform
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from score import WEIGHTS, load

from streamt2v import config, jobs, pipeline, video
from streamt2v.chunks import Chunk, refinement_plan, seams, streaming_plan
from streamt2v.frames import Frames, to_float, to_u8
from streamt2v.metrics import scores
from streamt2v.progress import Progress
from streamt2v.stages.stream import StreamModels
from streamt2v.training.captions import canonical
from streamt2v.training.data import CLIP_FRAMES, TextSource
from streamt2v.training.judge import load_judge, verdict
from streamt2v.training.sheets import OVERLAP, make_video, stream_video, write_sheet
from streamt2v.training.world import ATTRIBUTES, Scenes, render, sample_scenes

ROOT = Path(__file__).parents[1]
STARTS = ("clip", "text")
STREAM_VARIANTS = ("full", "no CAM", "no APM")
REFINE_VARIANTS = ("randomized", "independent")


def scenes(count: int, seed: int) -> list[Scenes]:
    """Random scenes of the demo's world, one by one."""
    many = sample_scenes(count, torch.Generator().manual_seed(seed))
    return [many.take(slice(i, i + 1)) for i in range(count)]


def stream(models: StreamModels, text: TextSource, scene: Scenes, start: str, frames: int, seed: int) -> torch.Tensor:
    """Make the first two stages' video of a scene: frames [F, 3, H, W] in [-1, 1]."""
    prompt = canonical(scene.labels().tolist()[0], colour=start == "text")
    chunks = len(streaming_plan(frames, CLIP_FRAMES, OVERLAP)) - 1
    if start == "text":
        return make_video(models, text, prompt, chunks, seed)[:frames]
    first = render(scene, torch.arange(CLIP_FRAMES)[None])[0]
    return stream_video(models, text, prompt, first, chunks, seed)[:frames]


def refine(frames: Frames, prompt: str, seed: int, blending: str) -> Frames:
    """Refine frames [F, H, W, 3] as the command does."""
    settings = {"prompt": prompt, "seed": seed, "num_frames": len(frames), "refine.blending": blending}
    built = config.merge(config.preset("demo"), {"output.crf": 1}, settings)
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "base.mp4", Path(folder) / "out.mp4"
        writer = video.SegmentWriter(Path(folder) / "grow.mp4", *frames.shape[1:3], Fraction(8), crf=1)
        writer.append(frames)
        writer.finish(source)
        pipeline.run(jobs.Job("refine", built, output, source=source), Progress(quiet=True))
        return np.concatenate(list(video.read_frames(output)))


def differences(frames: Frames) -> np.ndarray:
    """Return d(f) for f = 1.., at index f - 1."""
    return np.array([np.abs(a.astype(int) - b).mean() for a, b in pairwise(frames)])


def seam_score(frames: Frames, at: tuple[int, ...]) -> float:
    """The seam score of `streamt2v evaluate`; the frames have seams and move."""
    found = scores.seam_score(np.concatenate([[np.nan], differences(frames)]), at)
    assert found is not None
    return found


def overlap_score(frames: Frames, plan: tuple[Chunk, ...]) -> float:
    """Largest difference inside each overlap, averaged, over the median outside."""
    d = differences(frames)
    zones = [range(after.start, before.stop + 1) for before, after in pairwise(plan)]
    peaks = [max(d[f - 1] for f in zone if 1 <= f < len(frames)) for zone in zones]
    outside = np.delete(d, sorted({f - 1 for zone in zones for f in zone if 1 <= f < len(frames)}))
    return float(np.mean(peaks) / np.median(outside))


def subject_colour(frames: Frames) -> np.ndarray:
    """Return the mean colour of what moves: pixels that differ most from the clip's median picture."""
    values = frames.astype(float)
    distance = np.abs(values - np.median(values, axis=0)).sum(-1)
    mask = distance > np.quantile(distance, 0.95)
    return values[mask].mean(0)


def judged(frames: Frames) -> dict[str, int]:
    """Return the judge's verdict on 16 frames, as indices by attribute."""
    judge = load_judge(ROOT / "benchmarks")
    found = verdict(judge, to_float(frames).unsqueeze(0))[0].tolist()
    return dict(zip(ATTRIBUTES, found, strict=True))


def interval(pairs: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    draw = np.random.default_rng(seed)
    values = np.array(pairs)
    means = draw.choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def measure(scene: Scenes, seed: int, frames: int, folder: Path | None) -> dict[str, Any]:
    """Run all variants of one prompt; `folder` takes a sheet of each."""
    torch.set_num_threads(1)
    models, text = load(WEIGHTS)
    variants = {"full": models, "no CAM": replace(models, cam=None), "no APM": replace(models, apm=None)}
    prompt = canonical(scene.labels().tolist()[0])
    row: dict[str, Any] = {"prompt": prompt, "seed": seed}
    for start in STARTS:
        row[start] = {}
        for name, networks in variants.items():
            made = stream(networks, text, scene, start, frames, seed)
            if folder is not None:
                write_sheet(folder / f"{seed}-{start}-{name}.png", made[None, :: max(1, frames // 12)])
            shown = to_u8(made)
            first, last = judged(shown[:CLIP_FRAMES]), judged(shown[-CLIP_FRAMES:])
            drift = np.abs(subject_colour(shown[:CLIP_FRAMES]) - subject_colour(shown[-CLIP_FRAMES:])).mean()
            row[start][name] = {
                "seam": seam_score(shown, seams(streaming_plan(frames, CLIP_FRAMES, OVERLAP))),
                "kept": {key: int(first[key] == last[key]) for key in ATTRIBUTES},
                "colour_drift": float(drift),
                "motion": float(np.median(differences(shown))),
            }
            if (start, name) == ("text", "full"):
                base = shown
    plan = refinement_plan(frames, 24, 8)
    refined = {name: {"seam": overlap_score(refine(base, prompt, seed, name), plan)} for name in REFINE_VARIANTS}
    return {**row, "refine": refined}


def table(rows: list[dict[str, Any]], frames: int) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Results: what each part does",
        "",
        f"Made by `python benchmarks/ablation.py` on {datetime.date.today()}: {len(rows)} prompts of {frames} frames,",
        f"one thread of a {platform.machine()} CPU, torch {torch.__version__}. A start from a *clip* shows 16 rendered",
        "frames and the prompt names no colour; a start from *text* generates them and names it. How things are",
        "measured stands in the script. Intervals: 95 % bootstrap of the paired difference (variant minus full).",
        "",
        "| measure | start | full method | variant | value | difference |",
        "|---|---|---|---|---|---|",
    ]

    def line(measure: str, start: str, full: str, variant: str, key: str) -> None:
        pairs = [row[start][variant][key] - row[start][full][key] for row in rows]
        low, high = interval(pairs)
        mean = [float(np.mean([row[start][name][key] for row in rows])) for name in (full, variant)]
        difference = f"{np.mean(pairs):+.2f} [{low:+.2f}, {high:+.2f}]"
        shown = "refined" if start == "refine" else start
        lines.append(f"| {measure} | {shown} | {mean[0]:.2f} | {variant} | {mean[1]:.2f} | {difference} |")

    for start in STARTS:
        line("seam (chunk borders / inside)", start, "full", "no CAM", "seam")
    for start in STARTS:
        line("subject colour drift, first to last chunk (levels)", start, "full", "no APM", "colour_drift")
    line("refiner seam (worst in overlap / outside)", "refine", "randomized", "independent", "seam")
    columns = [(start, variant) for start in STARTS for variant in STREAM_VARIANTS]
    titles = " | ".join(f"{start}: {variant}" for start, variant in columns)
    lines += [
        "",
        f"| same in the first and last 16 frames, by the judge | {titles} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name in ATTRIBUTES:
        shares = [np.mean([row[start][variant]["kept"][name] for row in rows]) for start, variant in columns]
        lines.append(f"| {name} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, store after every prompt, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    asked = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-ablation.json"
    rows: list[dict[str, Any]] = []
    machine = {"machine": platform.machine(), "threads": 1, "torch": torch.__version__, "frames": asked.frames}
    with ProcessPoolExecutor(asked.jobs) as pool:
        running = [
            pool.submit(measure, scene, asked.seed + index, asked.frames, asked.sheets)
            for index, scene in enumerate(scenes(asked.prompts, asked.seed))
        ]
        for task in as_completed(running):
            rows.append(task.result())
            path.write_text(json.dumps({**machine, "rows": rows}, indent=1))
            (ROOT / "docs" / "results.md").write_text(table(rows, asked.frames))
            print(f"{len(rows)}/{len(running)} {rows[-1]['prompt']}", flush=True)


if __name__ == "__main__":
    main()
