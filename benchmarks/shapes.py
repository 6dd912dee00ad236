"""Does the demo draw what its world draws? Scores that an attribute judge cannot see, at both ends of a stream.

    python benchmarks/shapes.py --prompts 8 --frames 64 --json
    python benchmarks/shapes.py --prompts 20 --frames 48 --sheets sheets

Random prompts (not picked ones) are made by the first two stages and compared with renderings of the same prompts:

- iou: overlap of the light's body, found by its colour, with the best fitting ideal shape of its kind. `codec` is what
  the same measure says of renderings that went through the VAE: no network can be expected above it.
- ball_deviation: how much the outline of a ball differs from a circle (deviation of its radius, relative).
- frechet_ratio: Frechet distance of generated frames to renderings in the judge's features, divided by that of as many
  other renderings of the same prompts to the same ones. 1 = as near as the truth is to itself.
- flicker_ratio: mean change from frame to frame, divided by that of the renderings of the same prompts.
- sharpness_ratio: mean gradient, divided likewise.
- told_apart: share of held-out crops that a small classifier, trained on crops of half of the videos and renderings,
  assigns rightly (0.5 = cannot tell).

The last line with --json is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from judge import SIZE, Judge, load_judge
from score import HERE, WEIGHTS, load, scene
from torch import Tensor, nn
from torch.nn import functional

from streamt2v.chunks import streaming_plan
from streamt2v.models.encoders import decode_latents, encode_frames
from streamt2v.training import sheets
from streamt2v.training.world.captions import canonical
from streamt2v.training.world.clips import CLIP_FRAMES
from streamt2v.training.world.drawing import PAINT, render, screen, shape
from streamt2v.training.world.scenes import ASPECT, Scenes, join_scenes, sample_scenes

BALL = 0
SOLID = (0.5, 0.76, 0.5, 0.5)  # opacity from which each kind of light has its own colour
NEAR = 0.12  # RGB distance up to which a pixel has the light's colour
SMALLEST = 0.008  # of the picture; a light that is leaving it is not measured


def light_colours(colour: int, count: int = 8) -> Tensor:
    """Colours of a light's body from its rim to its heart, [count, 3]."""
    paint = torch.tensor(PAINT[colour])
    heart = torch.linspace(0, 1, count)[:, None]
    return screen(paint * (0.86 + 0.14 * heart), 0.95 * heart * (0.30 + 0.70 * paint.sqrt()).clamp(max=1))


def body_masks(frames: Tensor, colour: int) -> np.ndarray:
    """The largest patch of a light's colours in frames [F, 3, H, W] in [-1, 1]: bool [F, H, W]."""
    pixels = (frames.clamp(-1, 1) + 1) / 2
    far = torch.stack([
        (pixels - shade[:, None, None]).square().sum(1).sqrt() for shade in light_colours(colour)
    ]).amin(0)  # fmt: skip
    masks = np.zeros(far.shape, bool)
    for index, close in enumerate((far < NEAR).numpy().astype(np.uint8)):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(close, connectivity=4)
        if count > 1:
            masks[index] = labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    return masks


def fit(masks: Tensor, kind: int) -> Tensor:
    """Best overlap (intersection over union) of masks [F, H, W] with a shape of any place and size, [F]."""
    _, height, width = masks.shape
    ys, xs = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width * ASPECT
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    solid = masks.float()
    area = solid.sum((1, 2)).clamp(min=1)
    middle_x, middle_y = (solid * x).sum((1, 2)) / area, (solid * y).sum((1, 2)) / area
    radius = (area / height**2 / torch.pi).sqrt()
    best = torch.zeros(len(masks))
    for turned in (1.0, -1.0):
        found = torch.stack([middle_x, middle_y, radius], 1)

        def overlap(guess: Tensor, turned: float = turned) -> Tensor:
            dx, dy = ((a - guess[:, i, None, None]) / guess[:, 2, None, None] for i, a in enumerate((x, y)))
            body, _, _ = shape(kind, turned * dx, dy, 1 / height / guess[:, 2, None, None])
            inside = (body > SOLID[kind]).float()
            return (inside * solid).sum((1, 2)) / (inside + solid).clamp(max=1).sum((1, 2)).clamp(min=1)

        score, step = overlap(found), torch.tensor([0.06, 0.06, 0.05])
        for _ in range(14):
            for axis in range(3):
                for sign in (1, -1):
                    moved = found.clone()
                    moved[:, axis] += sign * step[axis]
                    moved[:, 2].clamp_(min=0.05)
                    value = overlap(moved)
                    better = value > score
                    found[better], score[better] = moved[better], value[better]
            step = step * 0.72
        best = torch.maximum(best, score)
    return best


def deviation(mask: np.ndarray) -> float:
    """Deviation of the outline's distance from its centre, relative to the mean; nan where it touches the border."""
    if mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any():
        return float("nan")
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = max(outlines, key=len)[:, 0].astype(float)
    rows, columns = mask.nonzero()
    distance = np.hypot(points[:, 0] - columns.mean(), points[:, 1] - rows.mean())
    return float(distance.std() / distance.mean())


@dataclass(frozen=True)
class Fit:
    """How well the lights of some videos fit."""

    iou: list[float]
    deviations: list[float]
    lost: int  # frames without a light

    def summary(self) -> dict[str, float | None]:
        deviations = [value for value in self.deviations if np.isfinite(value)]
        return {
            "iou": float(np.mean(self.iou)) if self.iou else 0.0,
            "ball_deviation": float(np.mean(deviations)) if deviations else None,
            "lost": self.lost / max(1, self.lost + len(self.iou)),
        }


def fitted(videos: Tensor, scenes: Scenes) -> Fit:
    """Fit the lights of videos [B, F, 3, H, W] in [-1, 1] of known colours and kinds."""
    iou: list[float] = []
    deviations: list[float] = []
    lost = 0
    for row, video in enumerate(videos):
        kind = int(scenes.subject[row])
        masks = body_masks(video, int(scenes.colour[row]))
        seen = masks.mean((1, 2)) > SMALLEST
        touching = masks[:, 0].any(1) | masks[:, -1].any(1) | masks[:, :, 0].any(1) | masks[:, :, -1].any(1)
        lost += int((~seen).sum())
        whole = masks[seen & ~touching]
        if len(whole):
            iou += fit(torch.from_numpy(whole), kind).tolist()
            deviations += [deviation(mask) for mask in whole] if kind == BALL else []
    return Fit(iou, deviations, lost)


@torch.no_grad()
def features(judge: Judge, videos: Tensor) -> Tensor:
    """The judge's view of every frame of videos [B, F, 3, H, W]: [B * F, 128]."""
    found = []
    for video in videos:
        small = functional.interpolate(video, SIZE, mode="bilinear", antialias=True)
        maps = judge.features(small)
        found.append(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1))
    return torch.cat(found)


def frechet(one: Tensor, other: Tensor) -> float:
    """Frechet distance of two sets of features [N, D] taken as normal distributions."""
    one, other = one.double(), other.double()
    mean = (one.mean(0) - other.mean(0)).square().sum()
    first, second = torch.cov(one.T), torch.cov(other.T)
    product = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    return float(mean + first.trace() + second.trace() - 2 * product)


def crops(videos: Tensor, per_video: int, generator: torch.Generator, side: int = 40) -> Tensor:
    """Square crops at random places and frames, [B * per_video, 3, side, side]."""
    out = []
    for video in videos:
        for _ in range(per_video):
            frame, top, left = (
                int(torch.randint(high, (), generator=generator))
                for high in (len(video), video.shape[-2] - side + 1, video.shape[-1] - side + 1)
            )
            out.append(video[frame, :, top : top + side, left : left + side])
    return torch.stack(out)


def told_apart(made: Tensor, true: Tensor, seed: int = 0, steps: int = 300) -> float:
    """How well a fresh classifier tells crops of made videos from rendered ones, on videos it did not learn from."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    half = len(made) // 2
    layers: list[nn.Module] = []
    for narrow, wide in ((3, 16), (16, 32), (32, 48)):
        layers += [nn.Conv2d(narrow, wide, 3, 2, 1), nn.GroupNorm(4, wide), nn.SiLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(steps):
        x = torch.cat([crops(v[:half], 2, generator) for v in (made, true)])
        y = torch.cat([torch.ones(len(x) // 2), torch.zeros(len(x) // 2)])
        loss = functional.binary_cross_entropy_with_logits(network(x)[:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = [((network(crops(v[half:], 24, generator))[:, 0] > 0) == w).float() for v, w in ((made, 1), (true, 0))]
    return float(torch.cat(right).mean())


def gradient(videos: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels."""
    return float(videos.diff(dim=-1).abs().mean() + videos.diff(dim=-2).abs().mean())


def truth(scenes: Scenes, frames: int, seed: int) -> Tensor:
    """Other scenes of the same words, rendered: [B, F, 3, H, W] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    other = join_scenes([
        sample_scenes(1, generator, **{name: int(getattr(scenes, name)[row]) for name in WORDS})
        for row in range(len(scenes))
    ])  # fmt: skip
    return render(other, torch.arange(frames))


WORDS = ("colour", "subject", "motion", "place", "time", "weather")


def main() -> None:
    """Make, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--frames", type=int, default=64, help="length of the stream; 16 measures first chunks alone")
    parser.add_argument("--seed", type=int, default=7000)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--sheets", type=Path, help="folder for a picture of every video")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    models, text = load(asked.weights)
    judge = load_judge(HERE)
    scenes = join_scenes([scene(index, asked.seed) for index in range(asked.prompts)])
    chunks = len(streaming_plan(asked.frames, CLIP_FRAMES, sheets.OVERLAP)) - 1
    made = []
    for row in range(asked.prompts):
        prompt = canonical(scenes.labels()[row].tolist())
        made.append(sheets.make_video(models, text, prompt, chunks, asked.seed + row)[: asked.frames])
        print(prompt, flush=True)
        if asked.sheets is not None:
            asked.sheets.mkdir(parents=True, exist_ok=True)
            sheets.write_sheet(asked.sheets / f"{row:03d}.png", made[-1][None, :: max(1, asked.frames // 12)])
    videos = torch.stack(made)
    true, again = (truth(scenes, asked.frames, seed) for seed in (1, 2))
    with torch.inference_mode():
        coded = decode_latents(models.vae, encode_frames(models.vae, true[:, :CLIP_FRAMES].flatten(0, 1)))
    coded = coded.unflatten(0, (len(true), CLIP_FRAMES))
    seen = [features(judge, group) for group in (videos, true, again)]
    first, last = (fitted(part, scenes) for part in (videos[:, :CLIP_FRAMES], videos[:, -CLIP_FRAMES:]))
    both = Fit(first.iou + last.iou, first.deviations + last.deviations, first.lost + last.lost)
    row: dict[str, Any] = {
        **both.summary(),
        "frechet_ratio": frechet(seen[0], seen[1]) / frechet(seen[2], seen[1]),
        "flicker_ratio": float(videos.diff(dim=1).abs().mean() / true.diff(dim=1).abs().mean()),
        "sharpness_ratio": gradient(videos) / gradient(true),
        "told_apart": told_apart(videos, true) if asked.prompts > 1 else None,
        "first": first.summary(),
        "last": last.summary(),
        "codec": fitted(coded, scenes).summary(),
        "truth": fitted(true[:, :CLIP_FRAMES], scenes).summary(),
        "prompts": asked.prompts,
        "frames": asked.frames,
    }
    if not asked.json:
        for name, value in row.items():
            print(f"{name:16} {value}")
    else:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
