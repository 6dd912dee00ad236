"""Losses of the denoisers: velocity error, heavier on the subject, and the contrast of mirrored pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from streamt2v.diffusion.schedules import ScheduleConfig

DEMO_SCHEDULE = ScheduleConfig(
    kind="scaled_linear", prediction="v", spacing="trailing", zero_terminal_snr=True, final_alpha_one=True
)
"""Noise schedule of every demo denoiser: the last timestep holds no signal, so sampling may start from pure noise."""

SUBJECT_WEIGHT = 4.0


def draw_timesteps(count: int, generator: torch.Generator, power: float = 1.0, top: int = 999) -> Tensor:
    """Timesteps [count] = top * u^power; a power below one favours high noise, where the text decides the motion.

    The draws are stratified over the batch, which lowers the variance of its loss.
    """
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return (top * u**power).round().long()


def weighted_error(prediction: Tensor, target: Tensor, mask: Tensor, frames: Tensor | None = None) -> Tensor:
    """Mean squared error of latents [B, C, F, h, w] with weight 1 + 4 mask; mask [B, F, h, w] in [0, 1].

    A subject covers few cells of the latent: unweighted, the background is learned first and the subject hardly at all.
    `frames` [F] weighs the frames as well.
    """
    weight = 1 + SUBJECT_WEIGHT * mask[:, None]
    if frames is not None:
        weight = weight * frames[:, None, None]
    return ((prediction - target).square() * weight).mean() / weight.mean()


def flicker_error(prediction: Tensor, target: Tensor, mask: Tensor, frames: Tensor | None = None) -> Tensor:
    """Half the weighted error of the changes from frame to frame: errors that flicker count for more than steady ones.

    Shapes as in `weighted_error`, but `frames` [F - 1] weighs the changes.
    """
    return 0.5 * weighted_error(prediction.diff(dim=2), target.diff(dim=2), mask[:, 1:], frames)


def tone_error(prediction: Tensor, target: Tensor, frames: Tensor) -> Tensor:
    """Sixteen times the squared error of every frame's mean over the picture; shapes as in `weighted_error`.

    A picture that is a little too bright everywhere hardly counts cell by cell, but the eye sees it flash.
    """
    off = (prediction - target).mean((3, 4)).square() * frames
    return 16 * off.mean() / frames.mean()


def pair_contrast(prediction: Tensor, target: Tensor, pairs: Tensor, timesteps: Tensor, mask: Tensor) -> Tensor:
    """How wrongly the prediction changes between the two clips of a mirrored pair.

    Args:
        prediction: [B, C, F, h, w].
        target: like prediction.
        pairs: rows [P, 2] of clips that differ only in direction and its word, and share noise and timestep.
        timesteps: [B]; only pairs above timestep 500 count, below it the layout is visible in the input.
        mask: [B, F, h, w] in [0, 1].

    Returns:
        Scalar: mean square of (difference of predictions - difference of targets).
    """
    pairs = pairs[timesteps[pairs[:, 0]] > 500]
    if len(pairs) == 0:
        return prediction.new_zeros(())
    first, second = pairs[:, 0], pairs[:, 1]
    difference = (prediction[first] - prediction[second]) - (target[first] - target[second])
    weight = 1 + SUBJECT_WEIGHT * (mask[first] + mask[second])[:, None]
    return (difference.square() * weight).mean() / weight.mean()
