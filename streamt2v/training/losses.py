"""Losses of the denoisers: velocity error, heavier on the subject, and the contrast of pairs."""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig

DEMO_SCHEDULE = ScheduleConfig(
    kind="scaled_linear", prediction="v", spacing="trailing", zero_terminal_snr=True, final_alpha_one=True
)
"""Noise schedule of every demo denoiser: the last timestep holds no signal, so sampling may start from pure noise."""

SUBJECT_WEIGHT = 4.0


def draw_timesteps(count: int, generator: torch.Generator, power: float = 1.0) -> Tensor:
    """Timesteps [count] = 999 u^power; a power below one favours high noise, where the text decides the motion.

    The draws are stratified over the batch, which lowers the variance of its loss.
    """
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return (999 * u**power).round().long()


@torch.no_grad()
def pixel_effect(vae: Any, latents: Tensor) -> Tensor:
    """How much a change of each latent channel moves the decoded pixels, [C], with mean one.

    Channels of a VAE differ in what they do to the picture; a loss that counts them alike spends effort where nobody
    sees it.

    Args:
        vae: the decoder.
        latents: [N, C, h, w], about which the effect is measured.
    """
    clean = vae.decode(latents).sample
    generator = torch.Generator().manual_seed(0)
    effects = []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        step = 0.3 * torch.randn(latents[:, channel].shape, generator=generator)
        moved[:, channel] += step.to(latents)
        effects.append((vae.decode(moved).sample - clean).square().mean())
    effect = torch.stack(effects)
    return effect / effect.mean()


def towards(schedule: NoiseSchedule, clean: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The velocity that leads from any noisy latents to the clean ones, whatever they were made of.

    With x_t = alpha x_0 + sigma e the noise that would explain x_t is e = (x_t - alpha x_0) / sigma; the velocity is
    that of this pair. For latents noised in the ordinary way it is the ordinary target.

    Args:
        schedule: alpha and sigma.
        clean: what is wanted, [B, C, F, h, w].
        noisy: latents at `timesteps`, of the same shape.
        timesteps: [B]; very low ones are treated as if they had a little noise, against division by nearly nothing.
    """
    alpha, sigma = (t.to(clean)[timesteps].view(-1, 1, 1, 1, 1) for t in (schedule.alphas, schedule.sigmas))
    return schedule.velocity(clean, (noisy - alpha * clean) / sigma.clamp(min=0.05), timesteps)


def weighted_error(
    prediction: Tensor, target: Tensor, mask: Tensor, frames: Tensor | None = None, channels: Tensor | None = None
) -> Tensor:
    """Mean squared error of latents [B, C, F, h, w] with weight 1 + 4 mask; mask [B, F, h, w] in [0, 1].

    A subject covers few cells of the latent: unweighted, the background is learned first and the subject hardly at all.
    `frames` [F] and `channels` [C] weigh those as well.
    """
    weight = 1 + SUBJECT_WEIGHT * mask[:, None]
    if frames is not None:
        weight = weight * frames[:, None, None]
    error = (prediction - target).square()
    if channels is not None:
        error = error * channels[:, None, None, None]
    return (error * weight).mean() / weight.mean()


def flicker_error(
    prediction: Tensor, target: Tensor, mask: Tensor, frames: Tensor | None = None, channels: Tensor | None = None
) -> Tensor:
    """Half the weighted error of the changes from frame to frame: errors that flicker count for more than steady ones.

    Shapes as in `weighted_error`, but `frames` [F - 1] weighs the changes.
    """
    return 0.5 * weighted_error(prediction.diff(dim=2), target.diff(dim=2), mask[:, 1:], frames, channels)


def tone_error(prediction: Tensor, target: Tensor, frames: Tensor) -> Tensor:
    """Sixteen times the squared error of every frame's mean over the picture; shapes as in `weighted_error`.

    A picture that is a little too bright everywhere hardly counts cell by cell, but the eye sees it flash.
    """
    off = (prediction - target).mean((3, 4)).square() * frames
    return 16 * off.mean() / frames.mean()


def pair_contrast(prediction: Tensor, target: Tensor, pairs: Tensor, timesteps: Tensor, mask: Tensor) -> Tensor:
    """How wrongly the prediction changes between the two clips of a pair.

    Args:
        prediction: [B, C, F, h, w].
        target: like prediction.
        pairs: rows [P, 2] of clips that differ only in the motion and its word, and share noise and timestep.
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
