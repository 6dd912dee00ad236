"""The transformer of the demo as a base: frames are encoded one by one, each token has a time, an anchor lies before.

A folder that `train dit` wrote is such a family: `--model DIR`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamt2v.models.dit import SpacetimeTransformer
from streamt2v.models.encoders import decode_latents, encode_frames
from streamt2v.stages.flow import Levels, Words

MAX_WORDS = 24
TIDY = False
SHIFT = 3.0
"""How far steps are moved towards noise, where the text decides; not yet tried on trained weights."""


class Dit:
    """A spacetime transformer with the demo's codec; see `stages.flow.Base`."""

    frames_per_latent, holds, multistep, lookahead = 1, True, False, 0

    def __init__(self, parts: dict[str, Any], *_: object) -> None:
        self.transformer: SpacetimeTransformer = parts["transformer"]
        self.vae = parts["vae"]

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames to latents, by the middle of the posterior."""
        return encode_frames(self.vae, frames).transpose(0, 1)[None]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to frames, one by one."""
        return decode_latents(self.vae, latents[0].transpose(0, 1))

    def levels(self, num_steps: int, latent_shape: Sequence[int]) -> Levels:
        """Return even steps from pure noise, shifted towards noise."""
        even = torch.linspace(1, 0, num_steps + 1)
        sigmas = SHIFT * even / (1 + (SHIFT - 1) * even)
        return Levels(sigmas, sigmas[:-1] * 1000)

    def velocity(self, x: Tensor, timestep: Tensor, known: int, words: Words, anchor: Tensor | None) -> Tensor:
        """Predict n - x_0; known latents and the anchor are clean."""
        sigmas = (timestep.to(x.device) / 1000).expand(len(x), x.shape[2]).clone()
        sigmas[:, :known] = 0
        dtype = self.transformer.embed.weight.dtype
        given = None if anchor is None else anchor.expand(len(x), -1, -1, -1, -1).to(dtype)
        predicted: Tensor = self.transformer(x.to(dtype), sigmas, words.tokens.to(dtype), words.mask, given)
        return predicted.float()


make = Dit
