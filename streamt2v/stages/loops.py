"""Loops from text: clips whose last frame leads back to the first, sampled as rings that have no end.

One window holds a short loop; a longer one is a ring of windows. A loop of any length at constant memory is a stream
whose last chunk holds the first frames in place (see `stages.stream`).

Source: arXiv 2502.20307 (Mobius: latents rolled along time at every step).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor

from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.stages.denoise import ChunkNoise, Observe, Predict, Sampling, ddim, guided

DrawCut = Callable[[int, int], int]
"""(window, step) -> how many of the frames that it shares with the one before it stay with that one."""


def stride(num_frames: int) -> int:
    """Return by how many frames a loop is rolled at each step: about a third of it, so that every frame is an end."""
    return next((by for by in range(max(1, num_frames // 3), num_frames) if gcd(by, num_frames) == 1), 1)


def rolled(predict: Predict, timesteps: Sequence[int]) -> Predict:
    """Return a network for latents [B, C, F, h, w] of a whole loop: it sees them from another frame on at every step.

    `timesteps` are those of all steps, in order.
    """
    step_of = {timestep: step for step, timestep in enumerate(timesteps)}

    def rolling(latents: Tensor, timestep: int, rows: slice) -> Tensor:
        num_frames = latents.shape[2]
        by = step_of[timestep] * stride(num_frames) % num_frames
        return predict(latents.roll(-by, 2), timestep, rows).roll(by, 2)

    return rolling


@torch.inference_mode()
def denoise_ring(
    predict_at: Callable[[int], Predict],
    schedule: NoiseSchedule,
    noise: ChunkNoise,
    sampling: Sampling,
    size: int,
    overlap: int,
    cut: DrawCut,
    observe: Observe | None = None,
) -> Tensor:
    """Sample latents [1, C, N, h, w] of a loop in windows of `size` frames around it, all at the same noise level.

    The windows move on at every step, and neighbours share frames as in randomized blending: all seams are alike, that
    from the last frame to the first too. All frames are in memory at once.

    Args:
        predict_at: the network for the window whose middle is a frame.
        noise: of all N frames, N >= size.
        size, overlap: frames of a window, and how many neighbours share; the last may share more.
        cut: drawn anew for each window and step, 0..overlap.
    """
    latents, (timesteps, alpha_bars) = noise.initial, schedule.ddim_grid(sampling.num_inference_steps)
    num_frames, total = latents.shape[2], schedule.config.num_train_timesteps
    starts = [*range(0, num_frames, size - overlap), num_frames]
    for step, timestep in enumerate(timesteps.tolist()):
        moved = step * stride(size - overlap)
        x0 = torch.empty_like(latents)
        for window, (start, after) in enumerate(pairwise(starts)):
            places = (torch.arange(start, start + size) + moved) % num_frames
            seen = latents[:, :, places]
            predict = predict_at(int(places[size // 2]))
            output = guided(predict, seen, timestep, sampling, total, sampling.batched)
            clean, _ = schedule.to_x0_eps(output, seen, timestep)
            own = slice(cut(window, step), after - start + cut((window + 1) % (len(starts) - 1), step))
            x0[:, :, places[own]] = clean[:, :, own]
        latents = ddim(latents, x0, alpha_bars, step, sampling, noise)
        if observe is not None:
            observe(step, x0, latents)
    return latents
