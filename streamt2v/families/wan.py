"""Wan as a base: 2.2 TI2V 5B, which takes a time for each token, and 2.1 from text, by replacement.

Everything is that of diffusers; here is how it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamt2v.stages.flow import Levels, Words

MAX_WORDS = 512
TIDY = True
"""Prompts are cleaned as they were for its training."""


class Wan:
    """A Wan transformer with its codec; see `stages.flow.Base`."""

    lookahead = 0

    def __init__(self, parts: dict[str, Any], settings: dict[str, Any], *_: object) -> None:
        self.transformer, self.vae, self.scheduler = parts["transformer"], parts["vae"], parts["scheduler"]
        config = self.vae.config
        self.frames_per_latent: int = config.scale_factor_temporal
        self.holds = bool(settings.get("expand_timesteps"))
        self.multistep = "Multistep" in type(self.scheduler).__name__
        self.mean, self.deviation = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames to latents, by the middle of the posterior."""
        packed = self.vae.encode(frames.transpose(0, 1)[None].to(self.vae.dtype)).latent_dist.mode().float()
        latents: Tensor = (packed - self.mean.to(packed)) * (1 / self.deviation.to(packed))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to frames; the codec looks back only, so what comes first leads to the rest."""
        packed = latents / (1 / self.deviation.to(latents)) + self.mean.to(latents)
        frames: Tensor = self.vae.decode(packed.to(self.vae.dtype)).sample.float()
        return frames[0].transpose(0, 1)

    def levels(self, num_steps: int, latent_shape: Sequence[int]) -> Levels:
        """Return the levels of its own scheduler, shifted towards noise."""
        self.scheduler.set_timesteps(num_steps)
        return Levels(self.scheduler.sigmas, self.scheduler.timesteps)

    def velocity(self, x: Tensor, timestep: Tensor, known: int, words: Words, anchor: Tensor | None) -> Tensor:
        """Predict n - x_0; tokens of known latents are at time 0."""
        times = timestep.to(x.device).expand(len(x))
        if self.holds:
            _, rows, columns = self.transformer.config.patch_size
            noisy = torch.ones(x.shape[2], -(-x.shape[3] // rows), -(-x.shape[4] // columns), device=x.device)
            noisy[:known] = 0
            times = (noisy * timestep).flatten().expand(len(x), -1)
        dtype = self.transformer.dtype
        predicted = self.transformer(x.to(dtype), times, words.tokens.to(dtype), return_dict=False)[0]
        return predicted.float()  # type: ignore[no-any-return]


make = Wan
