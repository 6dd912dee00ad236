"""Stage 2 from a picture, streaming: a network that starts from one picture continues a video without end.

Every chunk is conditioned on the anchor frame in two ways (its CLIP embedding, and its latents beside the noisy ones),
on three numbers (frame rate, amount of motion, noise on the anchor), and on the last frames through CAM. The network is
of the EDM kind and is asked at noise levels, not timesteps. It reads no text.

Sources: arXiv 2311.15127 (Stable Video Diffusion), and the published StreamingSVD.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from streamt2v.chunks import Chunk, refinement_plan, streaming_plan
from streamt2v.config import Variant
from streamt2v.diffusion import guidance, solvers
from streamt2v.diffusion.noise import Draws
from streamt2v.diffusion.replacement import Held, put_in_place
from streamt2v.diffusion.schedules import align_your_steps, precondition
from streamt2v.models.cam import ConditionalAttention
from streamt2v.models.encoders import decode_clip, encode_frames
from streamt2v.models.layers import sinusoids
from streamt2v.models.unet3d import TextContext, UNet3D
from streamt2v.stages.denoise import CONDITIONAL, Observe, both_branches
from streamt2v.stages.stream import NOTHING, chunk_noise, hold, network_step

Estimate = Callable[[Tensor, int], Tensor]
"""(x, step) -> estimate of x_0, at the noise level of that step."""


@dataclass(frozen=True)
class PictureModels:
    """The networks of the stage; `cam` None switches CAM off. `step` is `network_step` or what was compiled from it."""

    unet: UNet3D
    vae: torch.nn.Module
    cam: ConditionalAttention | None = None
    step: Callable[..., tuple[Tensor, Tensor]] = network_step


@dataclass(frozen=True)
class Anchor:
    """The frame every chunk starts from, [3, H, W] in [-1, 1], and its CLIP embedding [1, D], not normalised."""

    frame: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class Motion:
    """What the network is told besides the picture: frames per second, amount of motion, noise added to the picture.

    `fps_id` is the rate minus one; motion_bucket_id is 0 (still) to 255; noise_aug_strength is a deviation.
    """

    fps_id: int = 6
    motion_bucket_id: int = 127
    noise_aug_strength: float = 0.02

    def waves(self, width: int) -> Tensor:
        """Return the three numbers as waves [1, width], a third for each."""
        numbers = torch.tensor([[self.fps_id, self.motion_bucket_id, self.noise_aug_strength]])
        return sinusoids(numbers, width // 3).flatten(1)


@dataclass(frozen=True)
class PictureSampling:
    """How to sample: steps, and guidance that grows along the chunk.

    `batched` runs both branches of guidance in one batch, else one after the other with half the memory.
    """

    num_inference_steps: int = 30
    guidance_first: float = 1.5
    guidance_last: float = 3.0
    batched: bool = True


@dataclass(frozen=True)
class PictureNoise:
    """The random numbers of one chunk: unit normals [1, C, F, h, w], and what is added to the anchor [3, H, W]."""

    initial: Tensor
    anchor: Tensor


NoiseOfChunk = Callable[[Chunk], PictureNoise]


def picture_noise(
    draws: Draws,
    chunk_size: int,
    latent_shape: Sequence[int],
    frame_shape: Sequence[int],
    kind: Literal["uniform", "normal"] = "uniform",
    device: str = "cpu",
) -> NoiseOfChunk:
    """Return the addressed noise of every chunk.

    Args:
        draws: the run's random source.
        chunk_size: frames denoised at once.
        latent_shape: (C, h, w) of one frame.
        frame_shape: (3, H, W).
        kind: what is added to the anchor; uniform from [0, 1) as published, which brightens it a little, or normal.
        device: where the numbers are wanted; they are drawn on the CPU.
    """
    latents = chunk_noise(draws, chunk_size, latent_shape, device)
    draw = draws.uniform if kind == "uniform" else draws.normal

    def noise(chunk: Chunk) -> PictureNoise:
        return PictureNoise(latents(chunk).initial, draw("stream.anchor", (chunk.index,), frame_shape).to(device))

    return noise


def decode_groups(
    num_frames: int, decode_chunk_size: int = 8, overlap: int = 2, variant: Variant = "corrected"
) -> tuple[Chunk, ...]:
    """Return which frames of a chunk the temporal decoder sees at once.

    Args:
        num_frames: F.
        decode_chunk_size: frames at once.
        overlap: frames that neighbouring groups share.
        variant: published: groups side by side, so that a single frame left over is decoded without neighbours;
            corrected: groups overlap and all have the same size.

    Raises:
        ConfigError: sizes out of range.
    """
    if variant == "published":
        return streaming_plan(num_frames, decode_chunk_size, 0)
    return refinement_plan(num_frames, decode_chunk_size, overlap)


def sample(
    estimate: Estimate, rho: Tensor, noise: Tensor, observe: Observe | None = None, held: Held | None = None
) -> Tensor:
    """Follow the probability flow from noise to latents of the same shape by Euler steps.

    Args:
        estimate: guided clean estimates.
        rho: noise levels [N+1], descending to 0.
        noise: unit normals [B, ...].
        observe: called with (step, clean estimate, latents after the step).
        held: frames that replace the estimates of them at every step.
    """
    levels = rho.tolist()
    x = noise * math.sqrt(1 + levels[0] ** 2)
    for step in range(len(levels) - 1):
        clean = estimate(x, step) if held is None else put_in_place(estimate(x, step), held)
        x = solvers.euler_step(x, clean, levels[step], levels[step + 1])
        if observe is not None:
            observe(step, clean, x)
    return x


class PictureStreamer:
    """Generates chunk after chunk; what the anchor and the numbers say is prepared once.

    `new_frames` continues a video chunk by chunk (see `stream.continued`) from any first chunk; `groups` are the frames
    that the decoder sees at once.
    """

    def __init__(
        self,
        models: PictureModels,
        anchor: Anchor,
        motion: Motion,
        sampling: PictureSampling,
        noise: NoiseOfChunk,
        groups: Sequence[Chunk],
    ) -> None:
        self.models, self.anchor, self.motion, self.sampling = models, anchor, motion, sampling
        self.noise, self.groups = noise, groups
        with torch.inference_mode():
            token = anchor.embedding[:, None]  # [1, 1, D]
            waves = motion.waves(models.unet.config.pooled_text_dim).to(token.device)
            # The unconditional branch sees no picture, but is told the same numbers.
            context = TextContext(torch.cat([torch.zeros_like(token), token]), waves.expand(2, -1))
            self.denoiser = models.unet.prepare(context)
            self.extractor = None if models.cam is None else models.cam.prepare(context)

    def anchor_latents(self, noise: Tensor) -> Tensor:
        """Encode the anchor with noise [3, H, W] added, not scaled, for both branches [2, C, 1, h, w]."""
        frame = self.anchor.frame + self.motion.noise_aug_strength * noise
        vae: Any = self.models.vae
        latents = encode_frames(vae, frame[None]) / vae.config.scaling_factor
        return torch.cat([torch.zeros_like(latents), latents]).unsqueeze(2)

    @torch.inference_mode()
    def chunk_latents(
        self,
        chunk: Chunk,
        conditioning_frames: Tensor,
        observe: Observe | None = None,
        ahead: Mapping[int, Tensor] = NOTHING,
    ) -> Tensor:
        """Sample one chunk: conditioning frames [Fc, 3, H, W] in [-1, 1] -> latents [1, C, F, h, w].

        The first Fc frames of the result re-create the conditioning frames, the others are new. Frames `ahead` that lie
        in the chunk are held in place.
        """
        noise = self.noise(chunk)
        rho = align_your_steps(self.sampling.num_inference_steps)
        frames = noise.initial.shape[2]
        estimate = self.estimator(rho, self.anchor_latents(noise.anchor), conditioning_frames, frames)
        return sample(estimate, rho, noise.initial, observe, hold(self.models.vae, chunk, frames, ahead))

    def estimator(self, rho: Tensor, beside: Tensor, conditioning_frames: Tensor, frames: int) -> Estimate:
        """Return the guided network at noise levels rho [N+1].

        Args:
            rho: noise levels; nothing is estimated at the last.
            beside: result of `anchor_latents`.
            conditioning_frames: [Fc, 3, H, W] in [-1, 1]; both branches see them.
            frames: F of the chunk.
        """
        models, sampling = self.models, self.sampling
        factors = [precondition(level) for level in rho[:-1].tolist()]
        scales = guidance.per_frame(sampling.guidance_first, sampling.guidance_last, frames)
        beside = beside.expand(-1, -1, frames, -1, -1)  # [2, C, F, h, w]
        # The pixel stack depends on neither step nor branch: once per chunk.
        embedded = None if models.cam is None else models.cam.embed_frames(conditioning_frames[None])

        def predict(latents: Tensor, step: int, rows: slice) -> Tensor:
            given = torch.cat([latents, beside[rows].to(latents)], dim=1)
            # As a tensor: for every new plain number compiled code would be compiled again.
            level = torch.full((1,), factors[step].c_noise, device=latents.device)
            seen = None if self.extractor is None else self.extractor.rows(rows)
            return models.step(models.unet, models.cam, given, level, self.denoiser.rows(rows), seen, embedded, None)[0]

        def estimate(x: Tensor, step: int) -> Tensor:
            if sampling.guidance_first == sampling.guidance_last == 1:
                return factors[step].clean(predict(factors[step].c_in * x, step, CONDITIONAL), x)
            pair = both_branches(predict, factors[step].c_in * x, step, sampling.batched)
            return factors[step].clean(guidance.combine(*pair, scales.to(x)), x)

        return estimate

    @torch.inference_mode()
    def new_frames(
        self,
        chunk: Chunk,
        conditioning_frames: Tensor,
        observe: Observe | None = None,
        ahead: Mapping[int, Tensor] = NOTHING,
    ) -> Tensor:
        """Return the frames [n, 3, H, W] in [-1, 1] that the whole chunk adds.

        The re-created frames are decoded as far as new ones need them as neighbours.
        """
        latents = self.chunk_latents(chunk, conditioning_frames, observe, ahead)[0].transpose(0, 1)  # [F, C, h, w]
        return decode_clip(self.models.vae, latents, self.groups, first=chunk.new_start - chunk.start)
