"""Does each part do something? Seeded prompts, with and without the part, paired differences with bootstrap intervals.

    python benchmarks/ablation.py --prompts 8 --frames 240 --jobs 2

Writes benchmarks/results/DATE-ablation.json and the table docs/results.md. Variants: CAM off and APM off in the
streaming stage; independent chunks in the refiner. Every variant uses the same seeds. The prompts
leave the subject's colour open: a colour that the text names is kept by the text.

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
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamt2v import config, jobs, pipeline, video
from streamt2v.chunks import Chunk, refinement_plan, seams, streaming_plan
from streamt2v.frames import Frames, to_float
from streamt2v.progress import Progress
from streamt2v.training.captions import canonical
from streamt2v.training.judge import load_judge, verdict
from streamt2v.training.world import ATTRIBUTES, sample_scenes

ROOT = Path(__file__).parents[1]
STREAM_VARIANTS = {"full": {}, "no CAM": {"stream.cam": False}, "no APM": {"stream.apm": False}}
REFINE_VARIANTS = ("randomized", "independent")


def prompts(count: int, seed: int) -> list[str]:
    """Random prompts of the demo's world, without a colour."""
    labels = sample_scenes(count, torch.Generator().manual_seed(seed)).labels().tolist()
    return [canonical(row, colour=False) for row in labels]


def make(settings: dict[str, Any], source: Path | None = None) -> Frames:
    """Run one job and return all its frames [F, H, W, 3]."""
    built = config.merge(config.preset("demo"), {"output.crf": 1}, settings)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.mp4"
        command = "generate" if source is None else "refine"
        pipeline.run(jobs.Job(command, built, output, source=source), Progress(quiet=True))
        return np.concatenate(list(video.read_frames(output)))


def differences(frames: Frames) -> np.ndarray:
    """Return d(f) for f = 1.., at index f - 1."""
    return np.array([np.abs(a.astype(int) - b).mean() for a, b in pairwise(frames)])


def seam_score(frames: Frames, at: tuple[int, ...]) -> float:
    """Mean difference at seams over the median elsewhere."""
    d = differences(frames)
    inside = np.delete(d, [f - 1 for f in at])
    return float(d[[f - 1 for f in at]].mean() / np.median(inside))


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


def measure(prompt: str, seed: int, frames: int, refine: bool) -> dict[str, Any]:
    """Run all variants of one prompt."""
    torch.set_num_threads(1)
    stream_plan = streaming_plan(frames, 16, 8)
    base = {
        "prompt": prompt,
        "seed": seed,
        "num_frames": frames,
        "refine.enabled": False,
        "output.width": 0,
        "output.height": 0,
    }
    row: dict[str, Any] = {"prompt": prompt, "seed": seed}
    full: Frames | None = None
    for name, change in STREAM_VARIANTS.items():
        made = make({**base, **change})
        full = made if name == "full" else full
        first, last = judged(made[:16]), judged(made[-16:])
        row[name] = {
            "seam": seam_score(made, seams(stream_plan)),
            "kept": {name: int(first[name] == last[name]) for name in ATTRIBUTES},
            "colour_drift": float(np.abs(subject_colour(made[:16]) - subject_colour(made[-16:])).mean()),
            "motion": float(np.median(differences(made))),
        }
    if refine and full is not None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "base.mp4"
            writer = video.SegmentWriter(Path(folder) / "grow.mp4", full.shape[1], full.shape[2], Fraction(8), crf=1)
            writer.append(full)
            writer.finish(source)
            plan = refinement_plan(frames, 24, 8)
            for blending in REFINE_VARIANTS:
                settings = {"prompt": prompt, "seed": seed, "num_frames": frames, "refine.blending": blending}
                row[blending] = {"seam": overlap_score(make(settings, source), plan)}
    return row


def table(rows: list[dict[str, Any]], frames: int) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Results: what each part does",
        "",
        f"Made by `python benchmarks/ablation.py` on {datetime.date.today()}: {len(rows)} prompts,",
        f"{frames} frames each, one thread of a {platform.machine()} CPU, torch {torch.__version__}. The prompts name",
        "no colour; how things are measured stands in the script.",
        "Intervals are 95 % bootstrap intervals of the paired difference (variant minus full method).",
        "",
        "| measure | full method | variant | value | difference |",
        "|---|---|---|---|---|",
    ]

    def line(measure: str, full: str, variant: str, key: str) -> None:
        pairs = [row[variant][key] - row[full][key] for row in rows if variant in row]
        if not pairs:
            return
        low, high = interval(pairs)
        mean = [float(np.mean([row[name][key] for row in rows if name in row])) for name in (full, variant)]
        difference = f"{np.mean(pairs):+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(f"| {measure} | {mean[0]:.2f} | {variant} | {mean[1]:.2f} | {difference} |")

    line("seam (chunk borders / inside)", "full", "no CAM", "seam")
    line("subject colour drift, first to last chunk", "full", "no APM", "colour_drift")
    line("refiner seam (worst in overlap / outside)", "randomized", "independent", "seam")
    lines += [
        "",
        "| same in the first and last 16 frames, by the judge | full | no APM | no CAM |",
        "|---|---|---|---|",
    ]
    for name in ATTRIBUTES:
        shares = [np.mean([row[variant]["kept"][name] for row in rows]) for variant in ("full", "no APM", "no CAM")]
        lines.append(f"| {name} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, store after every prompt, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--no-refine", action="store_true")
    arguments = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-ablation.json"
    rows: list[dict[str, Any]] = []
    machine = {"machine": platform.machine(), "threads": 1, "torch": torch.__version__}
    asked = prompts(arguments.prompts, arguments.seed)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        tasks = [
            pool.submit(measure, prompt, arguments.seed + index, arguments.frames, not arguments.no_refine)
            for index, prompt in enumerate(asked)
        ]
        for task in as_completed(tasks):
            rows.append(task.result())
            path.write_text(json.dumps({**machine, "frames": arguments.frames, "rows": rows}, indent=1))
            (ROOT / "docs" / "results.md").write_text(table(rows, arguments.frames))
            print(f"{len(rows)}/{len(tasks)} {rows[-1]['prompt']}", flush=True)


if __name__ == "__main__":
    main()
