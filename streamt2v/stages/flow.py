"""Streaming with a transformer that was trained by flow matching: known latents are held clean, the rest is denoised.

Such a base packs a video into latents by a causal codec: the first latent holds one frame, each other one several. A
chunk begins with the last frames of the video, encoded again. A base that takes a time for each token is told that
these are clean; for any other they are put in place of its estimates at every step. Nothing is trained.

A noisy latent is x = (1 - sigma) x_0 + sigma n; the network predicts the velocity n - x_0. x / (1 - sigma) is x_0 plus
rho n with rho = sigma / (1 - sigma), so the solvers for those coordinates serve here too.

Sources: arXiv 2210.02747 and 2209.03003 (flow matching); arXiv 2407.01392 (noise levels of their own for known frames).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from streamt2v.chunks import Chunk, packed, packed_start
from streamt2v.diffusion import replacement, solvers
from streamt2v.diffusion.noise import Draws
from streamt2v.stages.denoise import Observe, Sampling, guided
from streamt2v.stages.stream import chunk_noise

TRAINED_TIMESTEPS = 1000


class Levels(NamedTuple):
    """Noise levels sigma [N+1], descending to 0, and the N times at which the network is asked, up to 1000."""

    sigmas: Tensor
    timesteps: Tensor


@dataclass(frozen=True)
class Words:
    """Text features of both branches, rows (negative, positive): [2, S, D], and which of them are words: [2, S]."""

    tokens: Tensor
    mask: Tensor

    def rows(self, rows: slice) -> "Words":
        """Return some of the branches."""
        return Words(self.tokens[rows], self.mask[rows])


class Base(Protocol):
    """A video transformer with its codec. Latents are [B, C, k, h, w], float32, of about unit deviation."""

    frames_per_latent: int
    holds: bool
    """Whether it takes a time for each latent, so that known ones can be clean while the others are not."""
    multistep: bool
    """Whether it was published with a solver that remembers its last estimate, rather than with Euler steps."""

    lookahead: int
    """Latents after a frame's own that its decoder should see."""

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames [F, 3, H, W] in [-1, 1], F = 1 + n frames_per_latent, to latents [1, C, 1 + n, h, w]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [1, C, 1 + n, h, w] to frames [F, 3, H, W] in [-1, 1]."""
        ...

    def levels(self, num_steps: int, latent_shape: Sequence[int]) -> Levels:
        """Return the noise levels that it was published with, for latents (k, h, w)."""
        ...

    def velocity(self, x: Tensor, timestep: Tensor, known: int, words: Words, anchor: Tensor | None) -> Tensor:
        """Predict n - x_0.

        Args:
            x: noisy latents [B, C, k, h, w].
            timestep: of all but the first `known` latents, which are clean; no dimensions, at most 1000.
            known: how many; 0 where it does not hold.
            words: of B branches.
            anchor: latents [1, C, 1, h, w] of a frame before all these, for a base that can look at it.
        """
        ...


@torch.inference_mode()
def sample(
    base: Base,
    noise: Tensor,
    words: Words,
    sampling: Sampling,
    known: Tensor | None = None,
    anchor: Tensor | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Sample a chunk of latents from unit normals [1, C, k, h, w]; the first n are `known`, clean [1, C, n, h, w]."""
    sigmas, timesteps = base.levels(sampling.num_inference_steps, noise.shape[2:])
    held = 0 if known is None or not base.holds else known.shape[2]
    placed = None if known is None else replacement.Held(tuple(range(known.shape[2])), known)
    x, before = noise, None

    for step, timestep in enumerate(timesteps):
        if held and known is not None:
            x = torch.cat([known, x[:, :, held:]], dim=2)

        def predict(latents: Tensor, _: int, rows: slice, timestep: Tensor = timestep) -> Tensor:
            return base.velocity(latents, timestep, held, words.rows(rows), anchor)

        sigma, after = sigmas[step], sigmas[step + 1]
        velocity = guided(predict, x, int(timestep), sampling, TRAINED_TIMESTEPS, sampling.batched)
        if placed is not None and not held:
            velocity = (x - replacement.put_in_place(x - sigma * velocity, placed)) / sigma
        if base.multistep:
            clean = x - sigma * velocity
            x, before = solvers.flow_step(x, clean, before, sigmas, step), clean
        else:
            x = x + (after - sigma) * velocity
        if observe is not None:
            observe(step, velocity, x)
    return x if known is None else torch.cat([known, x[:, :, known.shape[2] :]], dim=2)


class FlowStreamer:
    """Generates chunk after chunk of one size with a base.

    Args:
        base: the networks.
        draws: the run's random source; noise is addressed by the number of a latent in the video.
        size: frames denoised at once, 1 + n frames_per_latent, as are all numbers of known frames.
        latent_shape: (C, h, w).
        device: where the latents are.
    """

    def __init__(self, base: Base, draws: Draws, size: int, latent_shape: Sequence[int], device: str = "cpu") -> None:
        self.base, self.per_latent, self.size = base, base.frames_per_latent, size
        self.noise = chunk_noise(draws, packed(size, self.per_latent), latent_shape, device)

    @torch.inference_mode()
    def frames(
        self,
        chunk: Chunk,
        known: Tensor | None,
        words: Words,
        sampling: Sampling,
        anchor: Tensor | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Return the whole chunk [size, 3, H, W] in [-1, 1].

        Its first frames are the known ones [F, 3, H, W], encoded and decoded: they lead the decoder to the new ones,
        and show what the codec does to colours. An anchor frame is [3, H, W].
        """
        start = packed_start(chunk, self.per_latent)
        noise = self.noise(Chunk(chunk.index, start, start, start)).initial
        held = None if known is None else self.base.encode(known)
        looked_at = None if anchor is None else self.base.encode(anchor[None])
        return self.base.decode(sample(self.base, noise, words, sampling, held, looked_at, observe))
