"""Guided predictions, and the denoising loop of the first two stages: DDIM steps, noise given from outside."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from streamt2v.config import InitializeConfig, SamplingConfig, StreamConfig, Variant
from streamt2v.diffusion import guidance, replacement, solvers
from streamt2v.diffusion.schedules import NoiseSchedule

Predict = Callable[[Tensor, int, slice], Tensor]
"""(latents [B, C, F, h, w], timestep, rows) -> model output [B, C, F, h, w]; B is the number of rows.

`rows` selects from everything prepared for guidance: BOTH, or UNCONDITIONAL or CONDITIONAL alone.
"""

BOTH, UNCONDITIONAL, CONDITIONAL = slice(0, 2), slice(0, 1), slice(1, 2)

Run = Callable[[Tensor, int, slice, Tensor | None], tuple[Tensor, Tensor]]
"""As `Predict`, with features of the deep layers, or None, given and returned as by `UNet3D.run`."""

Observe = Callable[[int, Tensor, Tensor], None]
"""Called with (step, guided model output, latents after the step), for tests and previews."""


@dataclass(frozen=True)
class Sampling(SamplingConfig):
    """How to sample: the settings of the first two stages; the initializer leaves the last five at their defaults.

    `batched` runs both branches of guidance in one batch, else one after the other with half the memory.
    """

    batched: bool = True
    eta: float = 0.0
    final_noise: Variant = "corrected"
    reuse_interval: int = 1
    replacement: bool = False
    replacement_carry: float = 0.0
    calibrate: bool = False

    @classmethod
    def of(cls, config: InitializeConfig | StreamConfig, batched: bool = True) -> "Sampling":
        """Take the settings of a stage."""
        names = {field.name for field in fields(cls)}
        return cls(batched=batched, **{name: value for name, value in vars(config).items() if name in names})


@dataclass(frozen=True)
class ChunkNoise:
    """The random numbers of a chunk: initial latents [1, C, F, h, w], and the fresh noise of a step, same shape."""

    initial: Tensor
    step: Callable[[int], Tensor]


def reusing(
    run: Run, kept: dict[int, Tensor] | None, reuses: Callable[[int], bool], place: str | None = None
) -> Predict:
    """Return `run` with the features of its deep layers reused at the timesteps for which `reuses` is true.

    There they are taken from `kept`, by row. At all other timesteps they are computed and put into `kept`, on the
    device `place` (None: where they are). Without `kept` they are always computed.

    Source: arXiv 2312.00858 (DeepCache).
    """

    def predict(latents: Tensor, timestep: int, rows: slice) -> Tensor:
        indices = range(BOTH.stop)[rows]
        if kept is not None and reuses(timestep):
            deep = torch.cat([kept[index].to(latents.device, non_blocking=True) for index in indices])
            return run(latents, timestep, rows, deep)[0]
        output, deep = run(latents, timestep, rows, None)
        if kept is not None:
            # The host never reads them, so nothing waits: the copy back queues behind the copy out.
            kept.update(zip(indices, deep.to(place or deep.device, non_blocking=True).chunk(len(indices)), strict=True))
        return output

    return predict


def both_branches(predict: Predict, latents: Tensor, timestep: int, batched: bool) -> tuple[Tensor, Tensor]:
    """Return the unconditional and the conditional output for latents [1, C, F, h, w]."""
    if not batched:
        return predict(latents, timestep, UNCONDITIONAL), predict(latents, timestep, CONDITIONAL)
    unconditional, conditional = predict(latents.expand(2, -1, -1, -1, -1), timestep, BOTH).chunk(2)
    return unconditional, conditional


def guided(
    predict: Predict, latents: Tensor, timestep: int, asked: SamplingConfig, num_train_timesteps: int, batched: bool
) -> Tensor:
    """Return the guided output for latents [1, C, F, h, w].

    Guidance is left out where it changes nothing (scale 1) and below the timestep at which it is asked to stop.
    """
    if asked.guidance_scale == 1.0 or timestep < asked.guidance_stop * num_train_timesteps:
        return predict(latents, timestep, CONDITIONAL)
    pair = both_branches(predict, latents, timestep, batched)
    return guidance.combine(*pair, asked.guidance_scale, asked.guidance_rescale)


def ddim(
    latents: Tensor,
    x0: Tensor,
    alpha_bars: Tensor,
    step: int,
    sampling: Sampling,
    noise: ChunkNoise,
    epsilon: Tensor | None = None,
) -> Tensor:
    """Take one DDIM step from latents by their clean estimate, and by its noise where that is known already."""
    if epsilon is None:
        epsilon = (latents - alpha_bars[step].sqrt() * x0) / (1 - alpha_bars[step]).sqrt()
    last = step == len(alpha_bars) - 2
    eta = 0.0 if last and sampling.final_noise == "corrected" else sampling.eta
    fresh = noise.step(step).to(latents) if eta > 0 else None
    return solvers.ddim_step(x0, epsilon, alpha_bars[step], alpha_bars[step + 1], eta, fresh)


@torch.inference_mode()
def denoise(
    predict: Predict,
    schedule: NoiseSchedule,
    noise: ChunkNoise,
    sampling: Sampling,
    observe: Observe | None = None,
    held: replacement.Held | None = None,
) -> Tensor:
    """Sample one chunk of latents [1, C, F, h, w] with DDIM and classifier-free guidance.

    What is `held` replaces the network's estimates at every step (`replacement`), so these frames run from their noise
    to what is known, and the others are denoised beside them.

    Source: arXiv 2403.14773 section 5 (DDIM, 50 steps, eta 1, guidance 7.5).
    """
    latents = noise.initial
    timesteps, alpha_bars = schedule.ddim_grid(sampling.num_inference_steps)
    for step, timestep in enumerate(timesteps.tolist()):
        total = schedule.config.num_train_timesteps
        output = guided(predict, latents, timestep, sampling, total, sampling.batched)
        epsilon: Tensor | None
        x0, epsilon = schedule.to_x0_eps(output, latents, timestep)
        if held is not None:
            carry, last = sampling.replacement_carry, step == len(timesteps) - 1
            # In the last step the network alone decides how what was shown goes on: what was carried leaves no trace.
            # What comes later has to be led to, until the end: it would be jumped to.
            x0 = replacement.put_in_place(x0, held, 0.0 if last else carry, lead=carry > 0)
            epsilon = None
        latents = ddim(latents, x0, alpha_bars, step, sampling, noise, epsilon)
        if observe is not None:
            observe(step, output, latents)
    return latents
