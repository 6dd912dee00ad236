"""Pictures and numbers of what a network can do now: batched sampling, contact sheets, seam and drift measures."""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from streamt2v.diffusion import guidance, solvers
from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.models.apm import AppearanceTokens
from streamt2v.models.cam import ConditionalAttention
from streamt2v.models.encoders import embed_image
from streamt2v.models.unet3d import UNet3D
from streamt2v.training.captions import EXAMPLES
from streamt2v.training.data import CLIP_FRAMES, LATENT_SIZE, TextSource, decode, normal_like
from streamt2v.training.losses import DEMO_SCHEDULE

Predict = Callable[[Tensor, int], Tensor]
"""(latents of both branches [2B, C, F, h, w], unconditional first; timestep) -> model output."""


@torch.no_grad()
def sample(
    predict: Predict, noise: Tensor, steps: int, scale: float, rescale: float, eta: float, generator: torch.Generator
) -> Tensor:
    """Sample latents like noise [B, C, F, h, w] by DDIM with guidance; eta's fresh noise comes from the generator."""
    schedule = NoiseSchedule(DEMO_SCHEDULE)
    timesteps, alpha_bars = schedule.ddim_grid(steps)
    latents = noise
    for step, timestep in enumerate(timesteps.tolist()):
        if scale == 1.0:
            output = predict(latents, timestep)
        else:
            without, given = predict(torch.cat([latents, latents]), timestep).chunk(2)
            output = guidance.combine(without, given, scale, rescale)
        clean, epsilon = schedule.to_x0_eps(output, latents, timestep)
        share = eta if step < len(timesteps) - 1 else 0.0
        fresh = normal_like(latents, generator) if share else None
        latents = solvers.ddim_step(clean, epsilon, alpha_bars[step], alpha_bars[step + 1], share, fresh)
    return latents


def clip_noise(count: int, generator: torch.Generator, device: str | torch.device, frames: int = CLIP_FRAMES) -> Tensor:
    """Unit normals [count, 4, frames, 9, 16]."""
    return torch.randn(count, 4, frames, *LATENT_SIZE, generator=generator).to(device)


@torch.no_grad()
def first_chunks(
    unet: UNet3D,
    text: TextSource,
    prompts: list[str],
    seed: int = 0,
    steps: int = 12,
    scale: float = 2.0,
    rescale: float = 0.0,
    eta: float = 1.0,
    temporal: bool = True,
) -> Tensor:
    """Sample the first chunk of each prompt: latents [B, 4, 16, h, w], or one frame each without temporal layers."""
    both = [""] * len(prompts) + prompts if scale != 1.0 else prompts
    conditioning = unet.prepare(text.encode(both))
    device = unet.conv_in.weight.device
    generator = torch.Generator().manual_seed(seed)
    noise = clip_noise(len(prompts), generator, device, CLIP_FRAMES if temporal else 1)
    return sample(
        lambda x, t: unet(x, t, conditioning, temporal=temporal), noise, steps, scale, rescale, eta, generator
    )


@torch.no_grad()
def stream(
    unet: UNet3D,
    cam: ConditionalAttention | None,
    apm: tuple[AppearanceTokens, CLIPVisionModelWithProjection] | None,
    text: TextSource,
    vae: Any,
    prompts: list[str],
    first: Tensor,
    chunks: int,
    seed: int = 1,
    steps: int = 8,
    scale: float = 1.5,
    rescale: float = 0.0,
    eta: float = 1.0,
) -> Tensor:
    """Continue first chunks (frames [B, 16, 3, H, W]) by 8 frames per chunk: frames [B, 16 + 8 chunks, 3, H, W]."""
    branches = 2 if scale != 1.0 else 1
    context = text.encode(([""] * len(prompts) if branches == 2 else []) + prompts)
    tokens = None
    if apm is not None:
        grey = [torch.zeros_like(first[:, 0])] if branches == 2 else []
        tokens = apm[0](embed_image(apm[1], torch.cat([*grey, first[:, 0]])))
    conditioning = unet.prepare(context, tokens)
    own = cam.prepare(context) if cam is not None else None
    generator = torch.Generator().manual_seed(seed)
    frames = first
    for _ in range(chunks):
        last = frames[:, -8:]
        embedded = cam.embed_frames(last).repeat(branches, 1, 1, 1, 1) if cam is not None else None

        def predict(x: Tensor, t: int, embedded: Tensor | None = embedded) -> Tensor:
            if cam is None or own is None or embedded is None:
                return unet(x, t, conditioning)
            return unet(x, t, conditioning, cam(x[:, :, :8], t, own, embedded))

        noise = clip_noise(len(prompts), generator, first.device)
        latents = sample(predict, noise, steps, scale, rescale, eta, generator)
        frames = torch.cat([frames, decode(vae, latents[:, :, 8:])], 1)
    return frames


def write_sheet(path: Path, rows: Tensor) -> None:
    """Write frames [rows, columns, 3, H, W] in [-1, 1] as one picture."""
    count, columns, _, height, width = rows.shape
    picture = (
        ((rows.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 3, 1, 4, 2).reshape(count * height, columns * width, 3)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(picture.cpu().numpy())).save(path)


def text_sheet(path: Path, unet: UNet3D, text: TextSource, vae: Any) -> str:
    """Sample the example prompts, write every third frame, return spread and frame-to-frame change of the latents."""
    latents = first_chunks(unet, text, list(EXAMPLES))
    write_sheet(path, decode(vae, latents)[:, ::3])
    return f"std {latents.std():.2f} (data 1), change {latents.diff(dim=2).abs().mean():.3f}"


def seam_ratio(frames: Tensor, period: int = 8) -> tuple[float, float]:
    """Mean absolute change between frames at chunk seams and elsewhere; frames [B, F, 3, H, W], first seam at 16."""
    change = frames.diff(dim=1).abs().mean((0, 2, 3, 4))
    index = torch.arange(1, frames.shape[1], device=frames.device)
    seams = (index >= CLIP_FRAMES) & ((index - CLIP_FRAMES) % period == 0)
    return float(change[seams].mean()), float(change[~seams].mean())


def streaming_sheet(
    path: Path,
    unet: UNet3D,
    cam: ConditionalAttention,
    apm: tuple[AppearanceTokens, CLIPVisionModelWithProjection] | None,
    text: TextSource,
    vae: Any,
    chunks: int = 4,
) -> str:
    """Stream the example prompts, write every fourth frame, return the change at seams and elsewhere."""
    prompts = list(EXAMPLES)
    first = decode(vae, first_chunks(unet, text, prompts))
    frames = stream(unet, cam, apm, text, vae, prompts, first, chunks)
    write_sheet(path, frames[:, ::4])
    seam, inside = seam_ratio(frames)
    return f"change at seams {seam:.3f}, inside {inside:.3f}"
