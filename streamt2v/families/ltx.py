"""LTX-Video (0.9.5 to 0.9.8) as a base: every token has its own time and place, so an anchor can lie before the chunk.

Everything is that of diffusers; here is how it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamt2v.stages.flow import Levels, Words

MAX_WORDS = 256
TIDY = False
DISTILLED = (1000.0, 993.0, 987.0, 981.0, 975.0, 909.0, 725.0, 0.03)
"""The times that the distilled models were trained for; eight steps are these."""


class Ltx:
    """An LTX transformer with its codec; see `stages.flow.Base`."""

    holds, multistep = True, False
    lookahead = 2
    """Its decoder looks ahead as far as it looks back; two latents decide nearly all of that."""

    def __init__(self, parts: dict[str, Any], settings: dict[str, Any], fps: float, *_: object) -> None:
        self.transformer, self.vae, self.scheduler = parts["transformer"], parts["vae"], parts["scheduler"]
        self.fps, self.frames_per_latent = fps, int(self.vae.temporal_compression_ratio)
        self.cell = int(self.vae.spatial_compression_ratio)

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames to latents, by the middle of the posterior."""
        packed = self.vae.encode(frames.transpose(0, 1)[None].to(self.vae.dtype)).latent_dist.mode().float()
        mean, deviation = self._statistics(packed)
        latents: Tensor = (packed - mean) / deviation
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to frames; a codec that takes a time is told that no noise is left."""
        mean, deviation = self._statistics(latents)
        packed = (latents * deviation / self.vae.config.scaling_factor + mean).to(self.vae.dtype)
        time = (
            torch.zeros(1, device=packed.device, dtype=packed.dtype) if self.vae.config.timestep_conditioning else None
        )
        # Some of its decoders draw noise, which belongs to nobody else's numbers.
        with torch.random.fork_rng([packed.device] if packed.device.type == "cuda" else []):
            torch.manual_seed(0)
            frames: Tensor = self.vae.decode(packed, time).sample.float()
        return frames[0].transpose(0, 1).clamp(-1, 1)

    def _statistics(self, like: Tensor) -> tuple[Tensor, ...]:
        return tuple(values.view(1, -1, 1, 1, 1).to(like) for values in (self.vae.latents_mean, self.vae.latents_std))

    def levels(self, num_steps: int, latent_shape: Sequence[int]) -> Levels:
        """Return the published levels: half of the steps near pure noise, then ever larger ones."""
        from diffusers.pipelines.ltx import pipeline_ltx_condition as published

        schedule: Any = published.linear_quadratic_schedule
        times = torch.tensor(DISTILLED) if num_steps == len(DISTILLED) else schedule(num_steps) * 1000
        self.scheduler.set_timesteps(timesteps=times)
        return Levels(self.scheduler.sigmas, self.scheduler.timesteps)

    def velocity(self, x: Tensor, timestep: Tensor, known: int, words: Words, anchor: Tensor | None) -> Tensor:
        """Predict n - x_0; tokens of known latents and of the anchor are at time 0, the anchor one latent earlier."""
        latents, times = x, timestep.to(x.device).expand(len(x), 1).float()
        places = self._places(x.shape[2:], 0, x.device)
        if known or anchor is not None:
            before = 0 if anchor is None else 1
            if anchor is not None:
                latents = torch.cat([anchor.expand(len(x), -1, -1, -1, -1), x], dim=2)
                earlier = self._places((1, *x.shape[3:]), -self.frames_per_latent, x.device)
                places = torch.cat([earlier, places], dim=2)
            cells = x.shape[3] * x.shape[4]
            noisy = torch.ones(latents.shape[2], cells, device=x.device)
            noisy[: before + known] = 0
            times = noisy.flatten() * times
        dtype = self.transformer.dtype
        predicted = self.transformer(
            hidden_states=latents.flatten(2).transpose(1, 2).to(dtype),  # [B, tokens, C]
            encoder_hidden_states=words.tokens.to(dtype),
            timestep=times,
            encoder_attention_mask=words.mask,
            video_coords=places.expand(len(x), -1, -1),
            return_dict=False,
        )[0]
        velocity: Tensor = predicted.float().transpose(1, 2).unflatten(2, latents.shape[2:])
        return velocity[:, :, latents.shape[2] - x.shape[2] :]

    def _places(self, shape: Sequence[int], frame: int, device: torch.device) -> Tensor:
        """Return where tokens lie [1, 3, tokens]: seconds from the beginning, rows and columns of pixels."""
        grid = torch.stack(torch.meshgrid(*(torch.arange(extent, device=device) for extent in shape), indexing="ij"))
        places = grid.flatten(1) * torch.tensor([[self.frames_per_latent], [self.cell], [self.cell]], device=device)
        places[0] = (places[0] + 1 - self.frames_per_latent).clamp(min=0) + frame
        placed = places.float()
        placed[0] = placed[0] * (1.0 / self.fps)
        return placed[None]


make = Ltx
