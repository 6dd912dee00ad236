"""Does each part do something? Seeded prompts, with and without the part, paired differences with bootstrap intervals.

    python benchmarks/ablation.py --prompts 8 --frames 240 --jobs 2
    python benchmarks/train.py concatenated --steps 400 --out DIR
    python benchmarks/ablation.py --concatenated DIR

Writes benchmarks/results/DATE-ablation.json after every prompt and the table docs/results.md; run again, it goes on.
All variants have the same seeds. Every prompt is streamed from two starts:

- clip: 16 rendered frames of the prompt's scene, and a prompt that leaves the subject's colour open. Only the frames
  say what the colour is, as when a video is continued; the start is decided and the same for every variant.
- text: the first chunk is generated, and the prompt names the colour.

The streaming stage is the paper's, without the replacement that the demo adds to it, except in the variants of that
name. The full method's video from text is then refined: with randomized blending, with shared noise only (every frame
from the chunk that adds it), with independent chunks; as the demo does it, and from further up the noise, where the
refiner decides more.

Measures, beside those of `streamt2v evaluate` (flow at 144x144):
- refiner seam: the largest change between frames inside each overlap of refiner chunks, over the median outside.
- colour drift: distance of the mean colour of the moving subject, first to last 16 frames, in levels.
- kept: share of videos whose first and last 16 frames show the same, by the judge of docs/demo.md.
- velocity error: mean square, one denoising step of rendered clips at a timestep, by what the network sees of the
  conditioning frames; for frames that were shown, the first new one, and the others.
"""

import datetime
import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import blending
import concatenation
import numpy as np
import torch
from score import HERE, WEIGHTS, collect, judged, load, machine, measured, options, refine, scene

from streamt2v import config
from streamt2v.chunks import Chunk, refinement_plan, seams, streaming_plan
from streamt2v.media.frames import Frames, to_u8
from streamt2v.models.encoders import encode_frames
from streamt2v.stages.denoise import CONDITIONAL
from streamt2v.stages.stream import StreamModels, anchor_tokens, predictor
from streamt2v.training.denoisers import TextSource
from streamt2v.training.sheets import OVERLAP, make_video, stream_video, write_sheet
from streamt2v.training.world.captions import canonical
from streamt2v.training.world.clips import CLIP_FRAMES
from streamt2v.training.world.drawing import render
from streamt2v.training.world.scenes import ATTRIBUTES, Scenes, sample_scenes

STARTS = ("clip", "text")
LEVELS = {"as shipped": {}, "from t = 400": {"refine.noise_level": 400, "refine.num_inference_steps": 8}}


def begin(models: StreamModels, text: TextSource, scene: Scenes, start: str, seed: int) -> tuple[str, torch.Tensor]:
    """Return the prompt of a scene and its first 16 frames [16, 3, H, W] in [-1, 1]."""
    prompt = canonical(scene.labels().tolist()[0], colour=start == "text")
    if start == "text":
        return prompt, make_video(models, text, prompt, seed=seed)
    return prompt, render(scene, torch.arange(CLIP_FRAMES)[None])[0]


def overlap_score(frames: Frames, plan: tuple[Chunk, ...]) -> float:
    """Largest change between frames inside each overlap, averaged, over the median outside."""
    changes = np.array([np.nan] + [np.abs(a.astype(int) - b).mean() for a, b in pairwise(frames)])
    zones = [range(after.start, before.stop + 1) for before, after in pairwise(plan)]
    inside = [[frame for frame in zone if 1 <= frame < len(frames)] for zone in zones]
    outside = np.delete(changes, sorted({0, *(frame for zone in inside for frame in zone)}))
    return float(np.mean([changes[zone].max() for zone in inside]) / np.median(outside))


def subject_colour(frames: Frames) -> np.ndarray:
    """Return the mean colour of what moves: pixels that differ most from the clip's median picture."""
    values = frames.astype(float)
    distance = np.abs(values - np.median(values, axis=0)).sum(-1)
    mask = distance > np.quantile(distance, 0.95)
    return values[mask].mean(0)


def interval(differences: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    values = np.array(differences)
    means = np.random.default_rng(seed).choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def networks(concatenated: Path | None) -> tuple[dict[str, tuple[StreamModels, bool]], TextSource]:
    """Return the variants of the streaming stage by name, with or without replacement, and the text encoder."""
    models, text = load(WEIGHTS)
    blind = replace(models, cam=None)
    variants = {"full": (models, False), "no CAM": (blind, False), "no APM": (replace(models, apm=None), False)}
    if concatenated is not None:
        variants["concatenated"] = (concatenation.concatenated(models, concatenated), False)
    return {**variants, "full, replacement": (models, True), "no CAM, replacement": (blind, True)}, text


def ablate(index: int, seed: int, frames: int, concatenated: Path | None, sheets: Path | None) -> dict[str, Any]:
    """Run all variants of one prompt; `sheets` takes a picture of each."""
    torch.set_num_threads(1)
    variants, text = networks(concatenated)
    drawn = scene(index, seed)
    prompt, plan = canonical(drawn.labels().tolist()[0]), streaming_plan(frames, CLIP_FRAMES, OVERLAP)
    row: dict[str, Any] = {"index": index, "prompt": prompt, "seed": seed + index}
    for start in STARTS:
        row[start] = {}
        said, chunk = begin(variants["full"][0], text, drawn, start, seed + index)  # the same, whatever continues it
        for name, (models, replaces) in variants.items():
            made = stream_video(
                models, text, said, chunk, len(plan) - 1, seed + index, replacement=replaces
            )[:frames]  # fmt: skip
            if sheets is not None:
                write_sheet(sheets / f"{index}-{start}-{name}.png", made[None, :: max(1, frames // 12)])
            shown = to_u8(made)
            first, last = judged(shown[:CLIP_FRAMES]), judged(shown[-CLIP_FRAMES:])
            drift = np.abs(subject_colour(shown[:CLIP_FRAMES]) - subject_colour(shown[-CLIP_FRAMES:])).mean()
            row[start][name] = {
                **measured(shown, seams(plan)),
                "kept": {key: int(a == b) for key, a, b in zip(ATTRIBUTES, first, last, strict=True)},
                "colour_drift": float(drift),
            }
            if (start, name) == ("text", "full"):
                base = shown
    own = config.merge(config.preset("demo")).refine
    refined_plan = refinement_plan(frames, own.chunk, own.overlap, own.shift_back)
    for level, settings in LEVELS.items():
        row[level] = {}
        for name in blending.WAYS:
            with blending.blended(name):
                refined = refine(base, prompt, seed + index, settings)
            row[level][name] = {**measured(refined), "overlap_seam": overlap_score(refined, refined_plan)}
    return row


@torch.inference_mode()
def velocity_errors(concatenated: Path, clips: int = 24, seed: int = 4242) -> dict[str, dict[str, float]]:
    """One step of the networks on rendered clips, by "network, t = timestep" and frames."""
    variants, text = networks(concatenated)
    names = {"CAM": "full", "concatenated": "concatenated", "neither": "no CAM"}
    ways = {name: variants[variant][0] for name, variant in names.items()}
    full = ways["CAM"]
    draws = torch.Generator().manual_seed(seed)
    found: dict[str, list[torch.Tensor]] = {}
    for _ in range(clips):
        drawn = sample_scenes(1, draws)
        start = int(torch.randint(0, 200, (1,), generator=draws))
        clip = render(drawn, start + torch.arange(CLIP_FRAMES)[None])[0]
        latents, shown = encode_frames(full.vae, clip).transpose(0, 1)[None], clip[:OVERLAP]
        context, tokens = text.encode([canonical(drawn.labels().tolist()[0])] * 2), anchor_tokens(full, clip[0])
        predicts = {}
        for name, models in ways.items():
            extractor = None if models.cam is None else models.cam.prepare(context)
            predicts[name] = predictor(models, models.unet.prepare(context, tokens), extractor, shown)
        for timestep in (900, 600, 300):
            noise = torch.randn(latents.shape, generator=draws)
            noisy = full.schedule.add_noise(latents, noise, timestep)
            target = full.schedule.velocity(latents, noise, timestep)
            for name, predict in predicts.items():
                error = (predict(noisy, timestep, CONDITIONAL) - target).square().mean((0, 1, 3, 4))
                found.setdefault(f"{name}, t = {timestep}", []).append(error)
    means = {name: torch.stack(errors).mean(0) for name, errors in found.items()}
    parts = {"shown": slice(OVERLAP), "first new": slice(OVERLAP, OVERLAP + 1), "other new": slice(OVERLAP + 1, None)}
    return {name: {part: float(error[at].mean()) for part, at in parts.items()} for name, error in means.items()}


def table(rows: list[dict[str, Any]], command: str, header: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Results: what each part does",
        "",
        f"Made by `{command}` on {datetime.date.today()}: {len(rows)} prompts of {header['frames']} frames,",
        f"{header['machine']}, torch {header['torch']}. A start from a *clip* shows 16 rendered frames and the prompt",
        "names no colour; a start from *text* generates them, and the prompt names it; this video is then refined.",
        "The script says how all is measured. Intervals: 95 % bootstrap of the paired difference (variant minus full).",
        "",
        "| measure | start | full method | variant | value | difference |",
        "|---|---|---|---|---|---|",
    ]

    def line(measure: str, group: str, variant: str, key: str, full: str = "full") -> None:
        if variant not in rows[0][group]:
            return
        differences = [row[group][variant][key] - row[group][full][key] for row in rows]
        low, high = interval(differences)
        mean = [float(np.mean([row[group][name][key] for row in rows])) for name in (full, variant)]
        shown = f"{np.mean(differences):+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(f"| {measure} | {group} | {mean[0]:.2f} | {variant} | {mean[1]:.2f} | {shown} |")

    for start in STARTS:
        for variant in ("no CAM", "concatenated", "full, replacement", "no CAM, replacement"):
            line("seam (chunk borders / inside)", start, variant, "seam_score")
            line("flow deviation (pixels)", start, variant, "flow_deviation")
        line("scene cuts", start, "no CAM", "scene_cuts")
        line("scene cuts", start, "concatenated", "scene_cuts")
    for start in STARTS:
        line("subject colour drift, first to last chunk (levels)", start, "no APM", "colour_drift")
    for level in LEVELS:
        for name in blending.WAYS[1:]:
            line("refiner seam (worst in overlap / outside)", level, name, "overlap_seam", "randomized")
            line("flow deviation (pixels)", level, name, "flow_deviation", "randomized")
    columns = [(start, variant) for start in STARTS for variant in rows[0][start]]
    titles = " | ".join(f"{start}: {variant}" for start, variant in columns)
    lines += [
        "",
        f"| same in the first and last 16 frames, by the judge | {titles} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name in ATTRIBUTES:
        shares = [np.mean([row[start][variant]["kept"][name] for row in rows]) for start, variant in columns]
        lines.append(f"| {name} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    if errors := header.get("velocity_errors"):
        lines += ["", "| velocity error | " + " | ".join(next(iter(errors.values()))) + " |", "|---|---|---|---|"]
    for name, row in (errors or {}).items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in row.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, store after every prompt, write the table."""
    parser = options(__doc__, prompts=8, frames=240, seed=1000)
    parser.add_argument("--concatenated", type=Path, help="folder of a denoiser that train.py made")
    asked = parser.parse_args()
    work = partial(
        ablate, seed=asked.seed, frames=asked.frames, concatenated=asked.concatenated, sheets=asked.sheets
    )  # fmt: skip
    path = asked.out or HERE / "results" / f"{datetime.date.today()}-ablation.json"
    command = f"python benchmarks/ablation.py --prompts {asked.prompts} --frames {asked.frames}"
    command += "" if asked.concatenated is None else " --concatenated DIR"
    header = machine(asked.frames, WEIGHTS)
    rows = collect(path, header, work, asked.prompts, asked.jobs)
    if asked.concatenated is not None:
        header["velocity_errors"] = velocity_errors(asked.concatenated)
        path.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    if asked.out is None:
        (HERE.parent / "docs" / "results.md").write_text(table(rows, command, header))


if __name__ == "__main__":
    main()
