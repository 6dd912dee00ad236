"""Score the demo's files: what the judge sees in generated clips, at the start and after streaming."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamt2v.models.apm import AppearanceTokens
from streamt2v.models.cam import ConditionalAttention
from streamt2v.models.unet3d import UNet3D
from streamt2v.training import bundle, denoisers
from streamt2v.training.captions import build_tokenizer, canonical
from streamt2v.training.clip import DIM, build_text, build_vision
from streamt2v.training.data import TextSource, decode
from streamt2v.training.judge import Judge, score
from streamt2v.training.sheets import first_chunks, seam_ratio, stream
from streamt2v.training.vae import build_vae
from streamt2v.training.world import sample_scenes


@dataclass(frozen=True)
class Sampler:
    """Sampler settings of an evaluation: steps and guidance of the first chunk, then of streaming."""

    steps: int = 12
    guidance: float = 2.0
    rescale: float = 0.0
    eta: float = 1.0
    stream_steps: int = 8
    stream_guidance: float = 1.5
    cam: bool = True
    apm: bool = True


@dataclass(frozen=True)
class Scores:
    """Share of clips in which each attribute is as asked, first and last 16 frames, and the change between frames."""

    first: dict[str, float]
    last: dict[str, float]
    seam_change: float
    inside_change: float


def prompts(count: int, seed: int) -> tuple[list[str], Tensor]:
    """Random prompts of the world and their attribute indices [count, 5]."""
    labels = sample_scenes(count, torch.Generator().manual_seed(seed)).labels()
    return [canonical(row) for row in labels.tolist()], labels


@torch.no_grad()
def evaluate(
    folder: Path, judge: Judge, count: int = 20, chunks: int = 0, sampler: Sampler = Sampler(), seed: int = 10
) -> tuple[Scores, Tensor]:
    """Generate `count` videos from random prompts, ten at a time, and judge them.

    Args:
        folder: the weights files.
        judge: a trained judge.
        count: number of videos.
        chunks: chunks of 8 frames streamed after the first 16 frames.
        sampler: how to sample.
        seed: of prompts and noise.

    Returns:
        Scores, and the videos [count, 16 + 8 chunks, 3, 72, 128] in [-1, 1].
    """
    tokenizer = build_tokenizer()
    text = TextSource(tokenizer, bundle.freeze(bundle.read(folder, "text", build_text(len(tokenizer)))))
    vae = bundle.freeze(bundle.read(folder, "vae", build_vae()))
    unet = bundle.freeze(bundle.read(folder, "unet", UNet3D(denoisers.BASE)))
    cam = bundle.freeze(bundle.read(folder, "cam", ConditionalAttention(denoisers.CAM))) if sampler.cam else None
    apm = None
    if sampler.apm:
        network = bundle.read(folder, "apm", AppearanceTokens(DIM, 2 * DIM, denoisers.IMAGE_TOKENS, DIM))
        apm = (bundle.freeze(network), bundle.freeze(bundle.read(folder, "vision", build_vision())))
    captions, labels = prompts(count, seed)
    videos = []
    for start in range(0, count, 10):
        asked = captions[start : start + 10]
        latents = first_chunks(
            unet, text, asked, seed + start, sampler.steps, sampler.guidance, sampler.rescale, sampler.eta
        )
        frames = decode(vae, latents)
        if chunks:
            frames = stream(
                unet, cam, apm, text, vae, asked, frames, chunks, seed + start, sampler.stream_steps,
                sampler.stream_guidance, sampler.rescale, sampler.eta,
            )  # fmt: skip
        videos.append(frames)
    video = torch.cat(videos)
    seam, inside = seam_ratio(video) if chunks else (float("nan"), float(video.diff(dim=1).abs().mean()))
    return Scores(score(judge, video[:, :16], labels), score(judge, video[:, -16:], labels), seam, inside), video
