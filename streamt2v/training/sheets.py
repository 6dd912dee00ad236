"""Pictures and numbers of what the networks can do so far: sampled videos, contact sheets, the change at seams."""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamt2v import files
from streamt2v.chunks import Chunk, seams, streaming_plan
from streamt2v.config import merge, preset
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.families.dit import Dit
from streamt2v.families.streamingt2v import from_text
from streamt2v.media.frames import to_u8
from streamt2v.media.pictures import write_image
from streamt2v.models.cam import ConditionalAttention
from streamt2v.models.dit import SpacetimeTransformer
from streamt2v.models.unet3d import UNet3D
from streamt2v.stages.denoise import Sampling
from streamt2v.stages.flow import FlowStreamer, Words
from streamt2v.stages.stream import NoiseOfChunk, Streamer, StreamModels, StreamState, chunk_noise, continued
from streamt2v.training.denoisers import AppearanceModule, Lesson, TextSource, sampled
from streamt2v.training.losses import DEMO_SCHEDULE
from streamt2v.training.world.captions import EXAMPLES, canonical
from streamt2v.training.world.clips import CLIP_FRAMES, LATENT_SIZE, decode, encode
from streamt2v.training.world.scenes import sample_scenes
from streamt2v.training.world.vae import psnr

OVERLAP = 8


def models(
    unet: UNet3D, vae: Any, cam: ConditionalAttention | None = None, apm: AppearanceModule | None = None
) -> StreamModels:
    """Join trained networks for the streaming stage."""
    network, vision = apm or (None, None)
    return StreamModels(unet, NoiseSchedule(DEMO_SCHEDULE), vae, cam, network, vision)


@torch.inference_mode()
def make_video(models: StreamModels, text: TextSource, prompt: str, chunks: int = 0, seed: int = 0) -> Tensor:
    """Make the first two stages' video with the demo's settings: frames [16 + 8 chunks, 3, H, W] in [-1, 1]."""
    demo = merge(preset("demo"))
    context = text.encode([demo.negative_prompt, prompt])
    first = from_text(models, context, Sampling.of(demo.initialize), _noise(models, seed), CLIP_FRAMES)
    return stream_video(models, text, prompt, first, chunks, seed) if chunks else first


@torch.inference_mode()
def stream_video(
    models: StreamModels, text: TextSource, prompt: str, first: Tensor, chunks: int, seed: int = 0, **settings: Any
) -> Tensor:
    """Continue a first chunk [16, 3, H, W] in [-1, 1] by `chunks` of 8 frames: frames [16 + 8 chunks, 3, H, W].

    `settings` are changes of the demo's settings for the stage.
    """
    plan = streaming_plan(CLIP_FRAMES + OVERLAP * chunks, CLIP_FRAMES, OVERLAP)
    streamer = demo_streamer(models, text, prompt, first[0], seed, **settings)
    state = StreamState.after_first_chunk(first, OVERLAP)
    return torch.cat([first, *(new for new, _ in continued(streamer.new_frames, state, plan[1:]))])


def demo_streamer(
    models: StreamModels, text: TextSource, prompt: str, anchor: Tensor, seed: int, **settings: Any
) -> Streamer:
    """Return the streaming stage with the demo's settings and some changes of them, for an anchor [3, H, W]."""
    demo = merge(preset("demo"), {f"stream.{name}": value for name, value in settings.items()})
    context = text.encode([demo.negative_prompt, prompt])
    return Streamer(models, context, anchor, Sampling.of(demo.stream), _noise(models, seed))


def _noise(models: StreamModels, seed: int) -> NoiseOfChunk:
    device = models.unet.conv_in.weight.device.type
    return chunk_noise(SeededDraws(seed), CLIP_FRAMES, (4, *LATENT_SIZE), device)


def write_sheet(path: Path, rows: Tensor) -> None:
    """Write frames [rows, columns, 3, H, W] in [-1, 1] as one picture."""
    files.make_directory(path.parent)
    write_image(path, np.concatenate([np.concatenate(list(to_u8(row)), axis=1) for row in rows]))


@torch.no_grad()
def image_sheet(path: Path, unet: UNet3D, lesson: Lesson) -> str:
    """Make single frames of 24 random prompts, always the same so that sheets can be compared, four rows of them."""
    count, generator = 24, torch.Generator().manual_seed(5)
    captions = [canonical(labels) for labels in sample_scenes(count, generator).labels().tolist()]
    asked = unet.prepare(lesson.text.encode(captions))
    empty = unet.prepare(lesson.text.encode([""] * count))

    def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        plain = unet(noisy, timesteps, empty, temporal=False)
        return plain + 1.5 * (unet(noisy, timesteps, asked, temporal=False) - plain)

    channels = unet.unet_config.in_channels
    noise = torch.randn(count, channels, 1, *LATENT_SIZE, generator=generator).to(unet.conv_in.weight.device)
    frames = decode(lesson.vae, sampled(denoise, noise, 12, generator, 12))[:, 0]
    write_sheet(path, frames.unflatten(0, (4, -1)))
    return ""


def sharpness(made: Tensor, true: Tensor) -> float:
    """Return the mean gradient of pictures [..., H, W] over that of the true ones."""
    edges = [clips.diff(dim=-1).abs().mean() + clips.diff(dim=-2).abs().mean() for clips in (made, true)]
    return float(edges[0] / edges[1])


@torch.no_grad()
def decoder_sheet(path: Path, vae: Any, frames: Tensor) -> str:
    """Write frames [N, 3, H, W] in [-1, 1] and below them what the VAE makes of them; return how near that comes."""
    made = decode(vae, encode(vae, frames[:, None]))[:, 0]
    write_sheet(path, torch.stack([frames[:8], made[:8]]))
    return f"PSNR {psnr(vae, frames):.2f} dB, sharpness {sharpness(made, frames):.2f}"


def text_sheet(path: Path, models: StreamModels, text: TextSource) -> str:
    """Make a first chunk of every example prompt, write every third frame, return the change between frames."""
    videos = torch.stack([make_video(models, text, prompt) for prompt in EXAMPLES])
    write_sheet(path, videos[:, ::3])
    return f"change {videos.diff(dim=1).abs().mean():.3f}"


def seam_change(frames: Tensor) -> tuple[float, float]:
    """Mean absolute change between frames at chunk seams and elsewhere; frames [B, F, 3, H, W]."""
    change = frames.diff(dim=1).abs().mean((0, 2, 3, 4))
    at = [seam - 1 for seam in seams(streaming_plan(frames.shape[1], CLIP_FRAMES, OVERLAP))]
    inside = torch.ones(len(change), dtype=torch.bool)
    inside[at] = False
    return float(change[at].mean()), float(change[inside].mean())


def streaming_sheet(path: Path, models: StreamModels, text: TextSource, chunks: int = 4) -> str:
    """Stream the example prompts, write every fourth frame, return the change at seams and elsewhere."""
    videos = torch.stack([make_video(models, text, prompt, chunks) for prompt in EXAMPLES])
    write_sheet(path, videos[:, ::4])
    seam, inside = seam_change(videos)
    return f"change at seams {seam:.3f}, inside {inside:.3f}"


@torch.inference_mode()
def spacetime_sheet(path: Path, network: SpacetimeTransformer, lesson: Lesson, chunks: int = 2, steps: int = 8) -> str:
    """As `streaming_sheet`, by the transformer, in few steps."""
    base, device = Dit({"transformer": network, "vae": lesson.vae}), network.embed.weight.device.type
    stage = FlowStreamer(base, SeededDraws(0), CLIP_FRAMES, (network.config.channels, *LATENT_SIZE), device)
    sampling, videos = Sampling(num_inference_steps=steps, guidance_scale=2.0), []
    for prompt in EXAMPLES:
        words = Words(*lesson.text.words(["", prompt]))
        video = stage.frames(Chunk(0, 0, CLIP_FRAMES, 0), None, words, sampling)
        for chunk in streaming_plan(CLIP_FRAMES + OVERLAP * chunks, CLIP_FRAMES, OVERLAP)[1:]:
            made = stage.frames(chunk, video[-OVERLAP:], words, sampling, video[0])
            video = torch.cat([video, made[OVERLAP:]])
        videos.append(video)
    write_sheet(path, torch.stack(videos)[:, ::4])
    seam, inside = seam_change(torch.stack(videos))
    return f"change at seams {seam:.3f}, inside {inside:.3f}"
