"""Sizes and losses of the demo's denoisers: base video UNet, CAM and APM, image-to-video, refiner."""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection

from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.models.apm import AppearanceTokens
from streamt2v.models.cam import CamConfig, ConditionalAttention
from streamt2v.models.encoders import embed_image
from streamt2v.models.unet3d import TextContext, UNet3D, UNet3DConfig
from streamt2v.stages.stream import beside
from streamt2v.training.captions import MAX_TOKENS
from streamt2v.training.clip import DIM
from streamt2v.training.data import Clips, ClipSource, TextSource, decode, encode, normal_like
from streamt2v.training.losses import (
    DEMO_SCHEDULE,
    draw_timesteps,
    flicker_error,
    pair_contrast,
    tone_error,
    weighted_error,
)
from streamt2v.training.world import ATTRIBUTES, render

IMAGE_TOKENS = 8

BASE = UNet3DConfig(
    block_out_channels=(32, 64, 96),
    attention_levels=(True, True, True),
    layers_per_block=1,
    cross_attention_dim=DIM,
    attention_head_dim=8,
    transformer_in_heads=4,
    norm_num_groups=8,
    text_tokens=MAX_TOKENS,
    image_tokens=IMAGE_TOKENS,
    cam=True,
    pooled_text_dim=DIM,
    frame_codes=True,
)
IMAGE_TO_VIDEO = replace(BASE, in_channels=8, text_tokens=MAX_TOKENS + 1, image_tokens=0, cam=False)
CONCATENATED = replace(BASE, in_channels=8, cam=False)
CAM = CamConfig(replace(BASE, cam=False, image_tokens=0), cond_embed_channels=(16, 32, 48, 64), num_cond_frames=8)
REFINER = replace(
    BASE, block_out_channels=(32, 48, 96), attention_levels=(False, False, True), image_tokens=0, cam=False,
    transformer_in_heads=0, frame_codes=False,
)  # fmt: skip


@cache
def _schedule() -> NoiseSchedule:
    return NoiseSchedule(DEMO_SCHEDULE)


def _noised(clips: Clips, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of clips, a timestep for each, and noise of their shape."""
    timesteps = draw_timesteps(len(clips), generator, power=0.7).to(clips.latents.device)
    return clips.latents, timesteps, normal_like(clips.latents, generator)


def image_loss(
    unet: UNet3D, source: ClipSource, text: TextSource, generator: torch.Generator, batch: int = 32
) -> Tensor:
    """Loss on single frames with every temporal layer bypassed: layout, colours and shapes come cheaply this way."""
    clips, _ = source.draw(batch)
    device = clips.latents.device
    frame = torch.randint(clips.latents.shape[2], (batch,), generator=generator).to(device)
    rows = torch.arange(batch, device=device)
    latents = clips.latents[rows, :, frame][:, :, None]
    mask = clips.mask()[rows, frame][:, None]
    timesteps = draw_timesteps(batch, generator, power=0.8).to(clips.latents.device)
    noise = normal_like(latents, generator)
    context = text.encode(text.captions(clips.scenes, generator, drop=0.1))
    prediction = unet(
        _schedule().add_noise(latents, noise, timesteps), timesteps, unet.prepare(context), temporal=False
    )
    return weighted_error(prediction, _schedule().velocity(latents, noise, timesteps), mask)


def video_loss(
    unet: UNet3D,
    source: ClipSource,
    text: TextSource,
    generator: torch.Generator,
    progress: float,
    batch: int = 4,
    pairs: int = 1,
) -> Tensor:
    """Loss on clips; in the first 80 % of the run it includes mirrored pairs with exchanged direction words.

    Timesteps 999 u^p favour high noise, where the text decides on motion, and become nearly uniform at the end.
    """
    paired = pairs if progress < 0.8 else 0
    clips, rows = source.draw(batch, paired)
    latents, mask = clips.latents, clips.mask()
    timesteps = draw_timesteps(batch, generator, power=0.5 if progress < 0.5 else 0.7).to(clips.latents.device)
    noise = normal_like(latents, generator)
    if len(rows):
        timesteps[rows[:, 1]] = timesteps[rows[:, 0]]
        noise[rows[:, 1]] = noise[rows[:, 0]]
    context = text.encode(text.captions(clips.scenes, generator, drop=0.1, pairs=len(rows)))
    prediction = unet(_schedule().add_noise(latents, noise, timesteps), timesteps, unet.prepare(context))
    target = _schedule().velocity(latents, noise, timesteps)
    loss = weighted_error(prediction, target, mask) + flicker_error(prediction, target, mask)
    return loss + pair_contrast(prediction, target, rows, timesteps, mask) if len(rows) else loss


def refiner_loss(
    unet: UNet3D, source: ClipSource, text: TextSource, generator: torch.Generator, batch: int = 2, top: int = 450
) -> Tensor:
    """Loss of the refiner below the SDEdit start, on windows that hold a sharp and a poor version.

    The noisy input is made of the sharp latents moved part of the way to the poor ones, less so where little noise is
    left; the target is always the sharp ones: the refiner learns to repair what SDEdit gives it, not only to keep it.
    """
    clips, _ = source.draw(batch)
    sharp, poor = clips.latents.chunk(2, dim=1)
    timesteps = draw_timesteps(batch, generator, top=top).to(sharp.device)
    share = torch.rand(batch, generator=generator).mul(1.6).clamp(max=1).to(sharp.device)
    share = share * (timesteps / 150).clamp(max=1)
    mixed = sharp + share.view(-1, 1, 1, 1, 1) * (poor - sharp)
    noisy = _schedule().add_noise(mixed, normal_like(sharp, generator), timesteps)
    alpha, sigma = (t.to(sharp)[timesteps].view(-1, 1, 1, 1, 1) for t in (_schedule().alphas, _schedule().sigmas))
    implied = (noisy - alpha * sharp) / sigma.clamp(min=1e-3)  # the noise that leads from sharp latents to the input
    target = _schedule().velocity(sharp, implied, timesteps)
    context = text.encode(text.captions(clips.scenes, generator, drop=0.1))
    prediction = unet(noisy, timesteps, unet.prepare(context))
    loss: Tensor = (prediction - target).square().mean()
    return loss


def conditioning(clips: Clips, vae: Any, generator: torch.Generator, frames: int = 8) -> tuple[Tensor, Tensor]:
    """The first frames of clips as CAM will meet them, and what is to follow them.

    While streaming, CAM sees what the model itself made. So some are rendered, some decoded from disturbed latents,
    and all carry a little noise: otherwise small errors are copied and grow from chunk to chunk. Half of the rendered
    batches have a false tint, and some show false subjects: true colours and shapes must then come from the anchor or
    the text, which do not drift. Tints and disturbances leave the target gradually (`fading`): were they gone at the
    first new frame, the network would learn to jump at every seam.

    Returns:
        Pixels [B, frames, 3, 72, 128] in [-1, 1], latents of the whole chunk [B, C, F, h, w].
    """
    latents = clips.latents
    share = fading(frames, latents.shape[2]).to(latents)
    if torch.rand((), generator=generator) < 0.35:
        steady, restless = (0.35 * torch.rand(2, generator=generator)).tolist()
        latents = latents + share[:, None, None] * steady * normal_like(latents[:, :, :1], generator)
        seen = latents[:, :, :frames]
        pixels = decode(vae, seen + restless * normal_like(seen, generator))
    else:
        tinted = bool(torch.rand((), generator=generator) < 0.5)
        at = clips.frames() if tinted else clips.frames()[:, :frames]
        true = shown = render(clips.scenes, at)
        if torch.rand((), generator=generator) < 0.15:
            subjects = torch.randint(len(ATTRIBUTES["subject"]), (len(clips),), generator=generator)
            shown = render(replace(clips.scenes, subject=subjects.to(clips.scenes.subject.device)), at)
        if tinted:
            gain, shift = torch.rand(2, len(clips), 1, 3, 1, 1, generator=generator).to(true).mul(2).sub(1)
            much = share[:, None, None, None]
            true, shown = (
                (pixels * (1 + 0.35 * gain * much) + 0.25 * shift * much).clamp(-1, 1) for pixels in (true, shown)
            )
            latents = encode(vae, true)
        pixels = shown[:, :frames]
        if torch.rand((), generator=generator) < 0.5:  # as soft as the VAE leaves it
            small = functional.avg_pool2d(pixels.flatten(0, 1), 2)
            pixels = functional.interpolate(small, scale_factor=2, mode="bilinear").view_as(pixels)
    strength = 0.08 * float(torch.rand((), generator=generator))
    return pixels + strength * normal_like(pixels, generator), latents


def fading(frames: int, length: int, rate: float = 0.75) -> Tensor:
    """How much of an error of the conditioning frames each frame of a chunk still carries, [length] in (0, 1].

    All of it for as long as they last, `rate` times as much with every new frame.
    """
    return rate ** (torch.arange(length) - frames + 1).clamp(min=0)


def anchors(clips: Clips, generator: torch.Generator) -> Tensor:
    """One frame of each clip's past, up to 200 frames back, [B, 3, 72, 128]."""
    back = torch.randint(0, 200, (len(clips), 1), generator=generator).to(clips.start.device)
    return render(clips.scenes, clips.start[:, None] - back)[:, 0]


def streaming_loss(
    unet: UNet3D,
    cam: ConditionalAttention | None,
    apm: tuple[AppearanceTokens, CLIPVisionModelWithProjection] | None,
    vae: Any,
    source: ClipSource,
    text: TextSource,
    generator: torch.Generator,
    batch: int = 4,
) -> Tensor:
    """Loss of CAM (apm None, the paper's first phase) or of CAM and APM together (its second phase).

    Without CAM the conditioning frames' latents are concatenated to the input instead: the paper's comparison.

    A chunk of 16 frames is denoised while CAM sees its first 8 frames as pixels. Text alone, anchor alone and both are
    dropped 5 % of the time each. Source: arXiv 2403.14773 section 4 and supplement.
    """
    clips, _ = source.draw(batch)
    _, timesteps, noise = _noised(clips, generator)
    with torch.no_grad():
        pixels, latents = conditioning(clips, vae, generator, CAM.num_cond_frames)
    noisy = _schedule().add_noise(latents, noise, timesteps)
    chance = torch.rand(batch, generator=generator)
    captions = text.captions(clips.scenes, generator, drop=0.0)
    context = text.encode(["" if p < 0.10 else caption for p, caption in zip(chance.tolist(), captions, strict=True)])
    tokens = None
    if apm is not None:
        network, vision = apm
        pictures = anchors(clips, generator)
        pictures[(chance >= 0.05) & (chance < 0.15)] = 0.0
        with torch.no_grad():
            embedding = embed_image(vision, pictures)
        tokens = network(embedding)
    shown = noisy if cam is not None else beside(encode(vae, pixels), noisy)
    features = None
    if cam is not None:
        first = noisy[:, :, : pixels.shape[1]]
        features = cam(first, timesteps, cam.prepare(context), cam.embed_frames(pixels))
    prediction = unet(shown, timesteps, unet.prepare(context, tokens), features)
    target, mask = _schedule().velocity(latents, noise, timesteps), clips.mask()
    counts = importance(CAM.num_cond_frames, latents.shape[2]).to(latents)
    loss = weighted_error(prediction, target, mask, counts) + flicker_error(prediction, target, mask, counts[1:])
    return loss + tone_error(prediction, target, counts)


def importance(frames: int, length: int) -> Tensor:
    """How much each frame of a chunk counts in the loss, [length]: the first `frames` of it are thrown away after
    sampling, the one after them makes the seam."""
    counts = torch.ones(length)
    counts[:frames] = 0.5
    counts[frames : frames + 2] = torch.tensor([2.0, 1.5])[: length - frames]
    return counts


def image_to_video_loss(
    unet: UNet3D,
    vision: CLIPVisionModelWithProjection,
    source: ClipSource,
    text: TextSource,
    generator: torch.Generator,
    batch: int = 4,
) -> Tensor:
    """Loss of the picture-to-video denoiser.

    The first frame's latents stand beside every frame's, its embedding beside the text.

    In one case of ten text and picture are dropped together, in one of ten the text alone.
    """
    clips, _ = source.draw(batch)
    latents, timesteps, noise = _noised(clips, generator)
    chance = torch.rand(batch, generator=generator)
    captions = text.captions(clips.scenes, generator, drop=0.0)
    context = text.encode(["" if p < 0.2 else caption for p, caption in zip(chance.tolist(), captions, strict=True)])
    kept = (chance >= 0.1).float().to(latents.device)
    with torch.no_grad():
        picture = render(clips.scenes, clips.start[:, None])[:, 0]
        embedding = embed_image(vision, picture)[:, None] * kept[:, None, None]
    strength = 0.1 * float(torch.rand((), generator=generator))
    first = latents[:, :, :1] + strength * normal_like(latents[:, :, :1], generator)
    concatenated = (first * kept.view(-1, 1, 1, 1, 1)).expand_as(latents)
    noisy = torch.cat([_schedule().add_noise(latents, noise, timesteps), concatenated], dim=1)
    joint = TextContext(torch.cat([context.tokens, embedding], dim=1), context.pooled)
    prediction = unet(noisy, timesteps, unet.prepare(joint))
    return weighted_error(prediction, _schedule().velocity(latents, noise, timesteps), clips.mask())
