"""Sizes and losses of the demo's denoisers: base video UNet, CAM and APM, image-to-video."""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, PreTrainedTokenizerFast

from streamt2v.diffusion import solvers
from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.models.apm import AppearanceTokens
from streamt2v.models.cam import CamConfig, ConditionalAttention
from streamt2v.models.dit import SpacetimeConfig, SpacetimeTransformer
from streamt2v.models.encoders import embed_image, encode_text
from streamt2v.models.unet3d import TextContext, UNet3D, UNet3DConfig
from streamt2v.training.batches import Batch, join
from streamt2v.training.losses import (
    DEMO_SCHEDULE,
    draw_timesteps,
    flicker_error,
    pair_contrast,
    tone_error,
    towards,
    weighted_error,
)
from streamt2v.training.world.captions import MAX_TOKENS
from streamt2v.training.world.clips import COND_FRAMES, encode, fading, normal_like
from streamt2v.training.world.encoders import DIM

IMAGE_TOKENS = 8

BASE = UNet3DConfig(
    block_out_channels=(32, 64, 96),
    attention_levels=(True, True, True),
    layers_per_block=1,
    cross_attention_dim=DIM,
    attention_head_dim=32,
    transformer_in_heads=1,
    norm_num_groups=8,
    text_tokens=MAX_TOKENS,
    image_tokens=IMAGE_TOKENS,
    cam=True,
    pooled_text_dim=DIM,
    frame_codes=True,
)
IMAGE_TO_VIDEO = replace(BASE, in_channels=9, text_tokens=MAX_TOKENS + 1, image_tokens=0, cam=False)
"""Noisy latents, those of the picture, and a plane that says whether the clip is a loop: 1 everywhere, or 0."""
CAM = CamConfig(
    replace(BASE, cam=False, image_tokens=0), cond_embed_channels=(16, 32, 48, 64), num_cond_frames=COND_FRAMES
)

DIT = SpacetimeConfig(text_dim=DIM)
MOST_KNOWN = COND_FRAMES  # frames that a clip may begin with

AppearanceModule = tuple[AppearanceTokens, CLIPVisionModelWithProjection]
Denoise = Callable[[Tensor, Tensor], Tensor]
"""Velocity of noisy latents [B, C, F, h, w] at timesteps [B]."""


class TextSource:
    """Turns captions into text contexts by the frozen text encoder."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: CLIPTextModelWithProjection) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.eval()

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextContext:
        """Encode captions: tokens [B, S, D], pooled [B, P]."""
        return encode_text(self.tokenizer, self.encoder, captions)

    def words(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Encode captions: tokens [B, S, D], and 1 where they are of words [B, S]."""
        tokens = self.encode(captions).tokens
        mask = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=tokens.shape[1], return_tensors="pt"
        ).attention_mask
        return tokens, mask.to(tokens)


@dataclass(frozen=True)
class Lesson:
    """What the losses share: the networks that do not learn, and the source of randomness."""

    text: TextSource
    vae: Any
    vision: CLIPVisionModelWithProjection
    channels: Tensor  # weight of each latent channel, see `losses.pixel_effect`
    generator: torch.Generator

    def chance(self, count: int) -> list[float]:
        """Random numbers in [0, 1), one a row."""
        return torch.rand(count, generator=self.generator).tolist()

    def context(self, captions: list[str], dropped: list[bool]) -> TextContext:
        """Encoded captions, those to be dropped replaced by the empty one."""
        return self.text.encode(_without(captions, dropped))


def _without(captions: list[str], dropped: list[bool]) -> list[str]:
    return ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]


@cache
def _schedule() -> NoiseSchedule:
    return NoiseSchedule(DEMO_SCHEDULE)


def image_loss(unet: UNet3D, batch: Batch, lesson: Lesson) -> Tensor:
    """Loss on single frames with every temporal layer bypassed: layout, colours and shapes come cheaply this way."""
    timesteps = draw_timesteps(len(batch), lesson.generator, power=0.8).to(batch.latents.device)
    noise = normal_like(batch.latents, lesson.generator)
    noisy = _schedule().add_noise(batch.latents, noise, timesteps)
    context = lesson.context(batch.captions, [p < 0.1 for p in lesson.chance(len(batch))])
    prediction = unet(noisy, timesteps, unet.prepare(context), temporal=False)
    target = _schedule().velocity(batch.latents, noise, timesteps)
    return weighted_error(prediction, target, batch.mask, channels=lesson.channels)


def video_loss(unet: UNet3D, batch: Batch, lesson: Lesson) -> Tensor:
    """Loss on clips, or on what the network made of them where `batch.own` holds that (see `own_states`).

    Pairs, if there are any, learn the difference that the motion's word makes. Timesteps 999 u^p favour
    high noise, where the text decides on motion.
    """
    pairs, generator = batch.pairs, lesson.generator
    timesteps = draw_timesteps(len(batch), generator, power=0.6).to(batch.latents.device)
    noise, drops = normal_like(batch.latents, generator), lesson.chance(len(batch))
    for first, second in [] if pairs is None else pairs.tolist():
        timesteps[second], noise[second], drops[second] = timesteps[first], noise[first], drops[first]
    noisy, timesteps, target, factor = _noised(batch.latents, batch.own, timesteps, noise, generator)
    context = lesson.context(batch.captions, [p < 0.1 for p in drops])
    prediction, target = factor * unet(noisy, timesteps, unet.prepare(context)), factor * target
    loss = weighted_error(prediction, target, batch.mask, channels=lesson.channels)
    loss = loss + flicker_error(prediction, target, batch.mask, channels=lesson.channels)
    return loss if pairs is None else loss + pair_contrast(prediction, target, pairs, timesteps, batch.mask)


def _noised(
    clean: Tensor, own: Tensor | None, timesteps: Tensor, noise: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noise clips, or the network's own versions of them, for a step that leads to the clean ones.

    With `own` a quarter of the rows stay plain. The others are noised by less than 0.7 of the range, where the input
    shows a layout to be repaired; half of them are the network's own as they are, the rest lie between. Their velocity
    would count a mistake by 1 / sigma^2, so they are weighed by sigma: that is the error of the clean estimate.

    Returns:
        Noisy latents, the timesteps [B] they were noised for, the velocities to learn, and a factor [B, 1, 1, 1, 1] for
        both prediction and velocity.
    """
    factor = torch.ones(len(clean), 1, 1, 1, 1).to(clean)
    mixed = clean
    if own is not None:
        share = (2 * torch.rand(len(clean), generator=generator)).clamp(max=1).to(clean)
        share[: max(1, len(clean) // 4)] = 0
        low = (60 + 640 * torch.rand(len(clean), generator=generator)).long().to(timesteps)
        timesteps = torch.where(share > 0, low, timesteps)
        share = share.view(-1, 1, 1, 1, 1)
        mixed = clean + share * (own - clean)
        sigma = _schedule().sigmas.to(clean)[timesteps].view(-1, 1, 1, 1, 1)
        factor = torch.where(share > 0, sigma, factor)
    noisy = _schedule().add_noise(mixed, noise, timesteps)
    return noisy, timesteps, towards(_schedule(), clean, noisy, timesteps), factor


@torch.no_grad()
def own_states(denoise: Denoise, clean: Tensor, highest: int, generator: torch.Generator, steps: int = 8) -> Tensor:
    """What the sampler makes of clips that were noised part of the way: the network's own mistakes, near a true clip.

    Args:
        denoise: the network with its conditioning.
        clean: true clips [B, C, F, h, w].
        highest: start at most so many steps before the end; `steps` of them begin with pure noise.
        generator: of the noise.
        steps: of the sampler, eta 1.

    Returns:
        Sampled clips of the same shape.
    """
    begin = int(torch.randint(2, highest + 1, (), generator=generator))
    timesteps, _ = _schedule().ddim_grid(steps)
    start = timesteps[steps - begin].expand(len(clean)).to(clean.device)
    return sampled(denoise, _schedule().add_noise(clean, normal_like(clean, generator), start), begin, generator, steps)


@torch.no_grad()
def sampled(denoise: Denoise, noisy: Tensor, begin: int, generator: torch.Generator, steps: int = 8) -> Tensor:
    """The last `begin` of `steps` sampler steps at eta 1, from latents [B, C, F, h, w] noised up to there."""
    timesteps, levels = _schedule().ddim_grid(steps)
    timesteps, levels = timesteps[steps - begin :], levels[steps - begin :]
    x = noisy
    for index, timestep in enumerate(timesteps.tolist()):
        now = torch.full((len(x),), timestep, device=x.device)
        clear, noise = _schedule().to_x0_eps(denoise(x, now), x, timestep)
        eta = 0.0 if index == begin - 1 else 1.0
        x = solvers.ddim_step(clear, noise, levels[index], levels[index + 1], eta, normal_like(x, generator))
    return x


class OwnStates:
    """Clips with what the network made of them; the oldest give way, and every sixth draw makes new ones.

    Args:
        make: a batch with the network's own version of it.
        generator: decides which clips are drawn.
        capacity: clips kept.
    """

    def __init__(self, make: Callable[[], Batch], generator: torch.Generator, capacity: int = 256) -> None:
        self.make, self.generator, self.capacity = make, generator, capacity
        self.kept: Batch | None = None
        self.draws = 0

    def draw(self, count: int) -> Batch:
        """Draw some clips."""
        if self.kept is None or self.draws % 6 == 0:
            made = self.make()
            clips = made if self.kept is None else join(self.kept, made)
            self.kept = clips.take(list(range(len(clips)))[-self.capacity :])
        self.draws += 1
        return self.kept.take(torch.randint(len(self.kept), (count,), generator=self.generator).tolist())


def streamed(
    unet: UNet3D,
    cam: ConditionalAttention,
    apm: AppearanceModule | None,
    batch: Batch,
    lesson: Lesson,
    dropping: bool = True,
) -> Denoise:
    """The streaming denoiser for a batch of chunks: text, CAM's look at the shown frames, APM's at the anchor.

    Text alone, anchor alone and both are dropped 5 % of the time each.

    Source: arXiv 2403.14773 section 4 and supplement.
    """
    assert batch.shown is not None
    shown = batch.shown
    chance = torch.rand(len(batch), generator=lesson.generator) if dropping else torch.ones(len(batch))
    context = lesson.context(batch.captions, [p < 0.10 for p in chance.tolist()])
    tokens = None
    if apm is not None:
        network, vision = apm
        assert batch.anchors is not None
        pictures = batch.anchors.clone()
        pictures[(chance >= 0.05) & (chance < 0.15)] = 0.0
        with torch.no_grad():
            embedding = embed_image(vision, pictures)
        tokens = network(embedding)
    conditioning = unet.prepare(context, tokens)
    looks, seen = cam.prepare(context), cam.embed_frames(shown)

    def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        features = cam(noisy[:, :, : shown.shape[1]], timesteps, looks, seen)
        return unet(noisy, timesteps, conditioning, features)

    return denoise


def streaming_loss(
    unet: UNet3D, cam: ConditionalAttention, apm: AppearanceModule | None, batch: Batch, lesson: Lesson
) -> Tensor:
    """Loss of CAM (apm None, the paper's first phase) or of CAM and APM together (its second phase).

    A chunk, or what the network made of it (`batch.own`), is denoised while CAM sees its first frames as pixels.
    """
    generator = lesson.generator
    timesteps = draw_timesteps(len(batch), generator, power=0.7).to(batch.latents.device)
    noise = normal_like(batch.latents, generator)
    noisy, timesteps, target, factor = _noised(batch.latents, batch.own, timesteps, noise, generator)
    prediction, target = factor * streamed(unet, cam, apm, batch, lesson)(noisy, timesteps), factor * target
    counts = importance(COND_FRAMES, batch.latents.shape[2]).to(batch.latents)
    mask = lasting(batch.mask)
    loss = weighted_error(prediction, target, mask, counts, lesson.channels)
    loss = loss + flicker_error(prediction, target, mask, counts[1:], lesson.channels)
    return loss + tone_error(prediction, target, counts)


def lasting(mask: Tensor) -> Tensor:
    """A chunk's mask [B, F, h, w] that marks in new frames also where the light was in the last known one.

    Without it, keeping a light that should leave would cost a fifth of what losing one costs.
    """
    new = mask[:, COND_FRAMES:].maximum(mask[:, COND_FRAMES - 1 : COND_FRAMES])
    return torch.cat([mask[:, :COND_FRAMES], new], 1)


def importance(frames: int, length: int) -> Tensor:
    """How much each frame of a chunk counts in the loss, [length]: the first `frames` are thrown away after sampling,
    the next one makes the seam."""
    counts = torch.ones(length)
    counts[:frames] = 0.5
    counts[frames : frames + 2] = torch.tensor([2.0, 1.5])[: length - frames]
    return counts


def image_to_video_loss(unet: UNet3D, batch: Batch, lesson: Lesson, loop: bool = False) -> Tensor:
    """Loss of the picture-to-video denoiser: a batch whose anchors are its first frames.

    The first frame's latents are concatenated to every frame's, its embedding to the text. In one case of ten text and
    picture are dropped together, in one of ten the text alone, and in one of seven the latents alone: then the
    embedding decides what is seen, as it does where a prior drew it. The network is told whether the clips are loops;
    of these the change from the last frame to the first counts like any other.

    Source: arXiv 2404.09172 (LoopAnimate: loops in training), but with exact loops: clips played forth and back would
    show motions that their captions do not name.
    """
    latents, generator = batch.latents, lesson.generator
    assert batch.anchors is not None
    timesteps = draw_timesteps(len(batch), generator, power=0.7).to(latents.device)
    noise = normal_like(latents, generator)
    chance = torch.rand(len(batch), generator=generator)
    context = lesson.context(batch.captions, [p < 0.2 for p in chance.tolist()])
    kept = (chance >= 0.1).float().to(latents.device)
    shown = kept * ((chance < 0.2) | (chance >= 0.2 + 1 / 7)).to(kept)
    with torch.no_grad():
        embedding = embed_image(lesson.vision, batch.anchors)[:, None] * kept[:, None, None]
    strength = 0.1 * float(torch.rand((), generator=generator))
    first = latents[:, :, :1] + strength * normal_like(latents[:, :, :1], generator)
    concatenated = (first * shown.view(-1, 1, 1, 1, 1)).expand_as(latents)
    told = torch.full_like(latents[:, :1], float(loop))
    noisy = torch.cat([_schedule().add_noise(latents, noise, timesteps), concatenated, told], dim=1)
    joint = TextContext(torch.cat([context.tokens, embedding], dim=1), context.pooled)
    prediction = unet(noisy, timesteps, unet.prepare(joint))
    target = _schedule().velocity(latents, noise, timesteps)
    loss = weighted_error(prediction, target, batch.mask, channels=lesson.channels)
    prediction, target = (torch.cat([t, t[:, :, :1]], dim=2) if loop else t for t in (prediction, target))
    mask = torch.cat([batch.mask, batch.mask[:, :1]], dim=1) if loop else batch.mask
    return loss + flicker_error(prediction, target, mask, channels=lesson.channels)


def spacetime_loss(network: SpacetimeTransformer, batch: Batch, lesson: Lesson) -> Tensor:
    """Flow matching loss of the spacetime transformer: the velocity n - x_0 of frames that are not known.

    Clips with anchors begin with known frames, in half of them as many as a stream gives: clean latents at time 0, but
    a little wrong, as those of a stream are; what is wrong with all of them fades from the target (`fading`). Three
    batches in four of these see the anchor. Noise levels are sigmoids of normals. Text is dropped in one case of ten.

    Sources: arXiv 2210.02747 (flow matching), 2403.03206 section 3.1 (noise levels).
    """
    latents, generator, (rows, length) = batch.latents, lesson.generator, (len(batch), batch.latents.shape[2])
    known, anchor = torch.zeros(rows, dtype=torch.long), None
    given = latents
    if batch.anchors is not None:
        most = min(MOST_KNOWN, length - 1)
        known = torch.randint(1, most + 1, (rows,), generator=generator)
        known[torch.rand(rows, generator=generator) < 0.5] = most
        if torch.rand((), generator=generator) < 0.75:
            anchor = encode(lesson.vae, batch.anchors[:, None])
        latents, given = _worn(latents, known, generator)
    held = (torch.arange(length) < known[:, None]).to(latents.device)[:, None, :, None, None]
    quantiles = draw_timesteps(rows, generator).add(0.5) / 1000
    sigmas = (0.5 + torch.special.ndtri(quantiles)).sigmoid().to(latents)[:, None].expand(rows, length)
    sigmas = sigmas * ~held[:, 0, :, 0, 0]
    noise, levels = normal_like(latents, generator), sigmas[:, None, :, None, None]
    noisy = torch.where(held, given, latents + levels * (noise - latents))
    captions = _without(batch.captions, [p < 0.1 for p in lesson.chance(rows)])
    prediction = network(noisy, sigmas, *lesson.text.words(captions), anchor)
    target = noise - latents
    prediction = torch.where(held, target, prediction)
    loss = weighted_error(prediction, target, batch.mask, channels=lesson.channels)
    return loss if length == 1 else loss + flicker_error(prediction, target, batch.mask, channels=lesson.channels)


def _worn(latents: Tensor, known: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What to learn after the first `known` [B] frames of latents, and these as a stream may have them.

    One row in three has an error that stays the same over the known frames and fades after them; all known frames have
    a little noise.
    """
    rows, length = len(latents), latents.shape[2]
    steady, restless = torch.rand(2, rows, 1, 1, 1, 1, generator=generator).to(latents)
    steady = 0.35 * steady * (torch.rand(rows, 1, 1, 1, 1, generator=generator) < 0.35).to(latents)
    share = torch.stack([fading(frames, length) for frames in known.tolist()]).to(latents)[:, None, :, None, None]
    latents = latents + share * steady * normal_like(latents[:, :, :1], generator)
    return latents, latents + 0.1 * restless * normal_like(latents, generator)
