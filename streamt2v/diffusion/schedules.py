"""Noise schedules: how much signal and noise a latent holds at each training timestep, and which timesteps to visit.

A noisy latent is x_t = alpha_t x_0 + sigma_t n with alpha^2 + sigma^2 = 1; alpha_bar = alpha^2. In variance-exploding
coordinates x_t / alpha_t = x_0 + rho_t n, rho = sigma / alpha. Networks of the EDM kind know no timesteps: they are
told rho itself, which their own papers call sigma.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamt2v.config import Table
from streamt2v.errors import ConfigError

KINDS = ("scaled_linear", "linear", "squared_cosine", "cosine_logsnr")
PREDICTIONS = ("epsilon", "v", "sample")
SPACINGS = ("leading", "trailing")
ALIGNED_STEPS = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)
"""Noise levels rho of ten steps, optimised for Stable Video Diffusion (arXiv 2404.14507)."""


@dataclass(frozen=True)
class ScheduleConfig(Table):
    """What defines a noise schedule; the defaults are those of the published streaming stage."""

    kind: str = "scaled_linear"
    """scaled_linear (linear in sqrt(beta)), linear, squared_cosine (arXiv 2102.09672) or cosine_logsnr (the published
    refiner)."""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    prediction: str = "epsilon"
    """What the network outputs: epsilon, v or sample."""
    spacing: str = "leading"
    """Which timesteps a sampler visits: leading (from `steps_offset` upwards) or trailing (from the last downwards)."""
    steps_offset: int = 1
    zero_terminal_snr: bool = False
    """Stretch the schedule so that the last timestep is pure noise."""
    final_alpha_one: bool = False
    """Whether the last DDIM step arrives at alpha_bar = 1 rather than at that of timestep 0 (as published)."""
    logsnr_min: float = -15.0
    """Range and shift of cosine_logsnr: log-SNR between min and max, lowered by 2 ln(scale)."""
    logsnr_max: float = 15.0
    scale_min: float = 2.0
    scale_max: float = 4.0

    def __post_init__(self) -> None:
        for name, allowed in (("kind", KINDS), ("prediction", PREDICTIONS), ("spacing", SPACINGS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"schedule {name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.num_train_timesteps < 2:
            raise ConfigError(f"num_train_timesteps must be at least 2, not {self.num_train_timesteps}")


class NoiseSchedule:
    """A schedule as float32 tables over the training timesteps: `alpha_bars`, `alphas`, `sigmas`, each [T]."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        if config.kind == "cosine_logsnr":
            self.sigmas = _cosine_sigmas(config)
            self.alpha_bars = 1 - self.sigmas**2
            self.alphas = self.alpha_bars.sqrt()
        else:
            self.alpha_bars = _alpha_bars_from_betas(config)
            self.alphas = self.alpha_bars.sqrt()
            self.sigmas = (1 - self.alpha_bars).sqrt()
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def timesteps(self, num_steps: int) -> Tensor:
        """Return the training timesteps a sampler visits, int64 [N] in descending order.

        Args:
            num_steps: 1..num_train_timesteps.
        """
        total = self.config.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise ConfigError(f"the number of steps must lie in 1..{total}, not {num_steps}")
        if self.config.spacing == "leading":
            grid = [index * (total // num_steps) + self.config.steps_offset for index in reversed(range(num_steps))]
            # With very many steps the offset would point past the end of the table.
            return torch.tensor(grid).clamp(max=total - 1)
        return torch.tensor([round(total - index * total / num_steps) - 1 for index in range(num_steps)])

    def ddim_grid(self, num_steps: int) -> tuple[Tensor, Tensor]:
        """Return timesteps int64 [N] and the alpha_bars [N+1] a DDIM sampler passes, the one it arrives at last."""
        timesteps = self.timesteps(num_steps)
        final = torch.ones(1) if self.config.final_alpha_one else self.alpha_bars[:1]
        return timesteps, torch.cat([self.alpha_bars[timesteps], final])

    def refining_grid(self, start: int, num_steps: int, to_end: bool = False) -> tuple[Tensor, Tensor]:
        """Return the timesteps [N] and noise levels rho [N+1] of a refiner, see `sdedit_grid`."""
        return sdedit_grid(self, start, num_steps, to_end)

    def input_scale(self, rho: Tensor) -> Tensor:
        """Return by what x_0 + rho n is divided to be what the network sees."""
        scale: Tensor = (rho**2 + 1) ** 0.5
        return scale

    def log_rho(self) -> Tensor:
        """Return ln(sigma / alpha) of every timestep, float32 [T]; infinite where nothing but noise is left."""
        return self.sigmas.log() - self.alphas.log()

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor | int) -> Tensor:
        """Return x_t = alpha_t x_0 + sigma_t n for a timestep or one per batch item [B]."""
        alpha, sigma = self._at(timestep, clean)
        return alpha * clean + sigma * noise

    def velocity(self, clean: Tensor, noise: Tensor, timestep: Tensor | int) -> Tensor:
        """Return the training target v = alpha_t n - sigma_t x_0."""
        alpha, sigma = self._at(timestep, clean)
        return alpha * noise - sigma * clean

    def to_x0_eps(self, output: Tensor, noisy: Tensor, timestep: Tensor | int) -> tuple[Tensor, Tensor]:
        """Turn a network output at x_t into its estimates of the clean latent and of the noise."""
        alpha, sigma = self._at(timestep, noisy)
        if self.config.prediction == "v":
            return alpha * noisy - sigma * output, alpha * output + sigma * noisy
        if self.config.prediction == "epsilon":
            return (noisy - sigma * output) / alpha, output
        return output, (noisy - alpha * output) / sigma

    def to_x0(self, output: Tensor, noisy: Tensor, timestep: Tensor | float) -> Tensor:
        """Turn a network output at x_t into its estimate of the clean latent alone."""
        at = timestep if isinstance(timestep, Tensor) else int(timestep)
        return output if self.config.prediction == "sample" else self.to_x0_eps(output, noisy, at)[0]

    def _at(self, timestep: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Look up alpha and sigma, shaped to multiply with `like` [B, ...] in float32 or wider."""
        if not isinstance(timestep, Tensor):
            return self.alphas[timestep], self.sigmas[timestep]  # on the host: nothing waits for the device
        if like.device not in self._copies:
            self._copies[like.device] = self.alphas.to(like.device), self.sigmas.to(like.device)
        alphas, sigmas = self._copies[like.device]
        index = timestep.to(like.device)
        shape = (-1, *[1] * (like.ndim - 1)) if index.ndim else ()
        return alphas[index].reshape(shape), sigmas[index].reshape(shape)


class FlowSchedule(NoiseSchedule):
    """The levels of flow matching: x = (1 - sigma) x_0 + sigma n, where the network predicts the velocity n - x_0.

    Timesteps are 1000 sigma and may lie between whole numbers; in the tables number t stands for t + 1.

    Args:
        path: the model's own levels sigma [M+1] in very many steps, descending from about 1 to 0.
    """

    def __init__(self, path: Tensor) -> None:
        self.config, self.path, self._copies = ScheduleConfig(), path.double().cpu(), {}
        total = self.config.num_train_timesteps
        self.sigmas = torch.arange(1, total + 1) / total
        self.alphas = 1 - self.sigmas

    def refining_grid(self, start: int, num_steps: int, to_end: bool = False) -> tuple[Tensor, Tensor]:
        """Return timesteps and rho = sigma / (1 - sigma), evenly spaced on the model's path from sigma start / 1000.

        The path has one end, whatever the solver.
        """
        begin, last = start / self.config.num_train_timesteps, len(self.path) - 1
        after = min(max(int((self.path > begin).sum()), 1), last)  # the first level that is not above
        upper, lower = self.path[after - 1], self.path[after]
        place = after - 1 + float(((upper - begin) / (upper - lower)).clamp(0, 1))
        places = torch.linspace(place, last, num_steps + 1, dtype=torch.float64)
        below = places.long().clamp(max=last - 1)
        sigmas = torch.lerp(self.path[below], self.path[below + 1], places - below)
        sigmas[0], sigmas[-1] = begin, 0
        return (sigmas[:-1] * self.config.num_train_timesteps).float(), (sigmas / (1 - sigmas)).float()

    def input_scale(self, rho: Tensor) -> Tensor:
        """Return 1 + rho = 1 / (1 - sigma)."""
        return 1 + rho

    def to_x0(self, output: Tensor, noisy: Tensor, timestep: Tensor | float) -> Tensor:
        """Turn a velocity at x into the estimate of the clean latent, x - sigma v."""
        return noisy - timestep / self.config.num_train_timesteps * output


def sdedit_grid(
    schedule: NoiseSchedule, start_timestep_count: int, num_steps: int, to_end: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the refiner's timesteps int64 [N] and noise levels rho float32 [N+1], the last of which is 0.

    t_j = (T' - 1) - j T' / (N + 1) for j = 0..N-1: evenly spaced downwards, the last but one level left out, so that
    the final step jumps from t_{N-1} to the clean latent. Or, `to_end`, evenly spaced from T' - 1 to the schedule's
    first timestep. rho at fractional t interpolates ln rho linearly.

    Args:
        schedule: the refiner's schedule.
        start_timestep_count: T', the timesteps below the start (600: the video is noised to timestep 599).
        num_steps: N >= 1, exactly as many as asked for.
        to_end: visit the first timestep too, as DDIM does with "leading" timesteps.
    """
    total = schedule.config.num_train_timesteps
    if not 1 <= start_timestep_count <= total:
        raise ConfigError(f"the start of refinement must lie in 1..{total} timesteps, not {start_timestep_count}")
    if num_steps < 1:
        raise ConfigError(f"the number of refinement steps must be at least 1, not {num_steps}")
    gap = start_timestep_count / (num_steps + 1)
    if to_end:
        gap = max(0, start_timestep_count - 1 - schedule.config.steps_offset) / max(1, num_steps - 1)
    times = [max(start_timestep_count - 1 - index * gap, 0.0) for index in range(num_steps)]
    log_rho = schedule.log_rho().double()
    below = [math.floor(time) for time in times]
    above = [math.ceil(time) for time in times]
    share = torch.tensor([time - floor for time, floor in zip(times, below, strict=True)], dtype=torch.float64)
    # torch.lerp would turn 0 * infinity into NaN at the pure-noise end.
    visited = torch.where(share > 0, log_rho[below] * (1 - share) + log_rho[above] * share, log_rho[below])
    rho = torch.cat([visited.exp().float(), torch.zeros(1)])
    return torch.tensor([round(time) for time in times]), rho


def align_your_steps(num_steps: int) -> Tensor:
    """Return noise levels rho, float64 [N+1]: from 700 down to 0.002, then 0.

    Args:
        num_steps: N >= 1; other numbers than ten interpolate ln rho linearly.

    Source: arXiv 2404.14507 (Align Your Steps).
    """
    if num_steps < 1:
        raise ConfigError(f"the number of steps must be at least 1, not {num_steps}")
    table = torch.tensor(ALIGNED_STEPS, dtype=torch.float64).log()
    places = torch.linspace(0, len(table) - 1, num_steps, dtype=torch.float64)
    below = places.long().clamp(max=len(table) - 2)
    rho = torch.lerp(table[below], table[below + 1], places - below).exp()
    return torch.cat([rho, torch.zeros(1, dtype=torch.float64)])


class Preconditioning(NamedTuple):
    """How a network of the EDM kind is asked at a noise level: D(x) = c_skip x + c_out network(c_in x, c_noise)."""

    c_in: float
    c_skip: float
    c_out: float
    c_noise: float

    def clean(self, output: Tensor, noisy: Tensor) -> Tensor:
        """Turn the network's output at x = x_0 + rho n into its estimate of x_0."""
        return self.c_skip * noisy + self.c_out * output


def precondition(rho: float) -> Preconditioning:
    """Return the factors for a network that predicts v, at x = x_0 + rho n with data of unit deviation; rho > 0.

    c_in = (rho^2 + 1)^-1/2, c_skip = 1 / (rho^2 + 1), c_out = -rho (rho^2 + 1)^-1/2, c_noise = ln(rho) / 4.

    Source: arXiv 2206.00364 section 5 in the form of arXiv 2311.15127 appendix D.
    """
    c_in = (rho**2 + 1) ** -0.5
    return Preconditioning(c_in, c_in**2, -rho * c_in, 0.25 * math.log(rho))


def _alpha_bars_from_betas(config: ScheduleConfig) -> Tensor:
    """Return alpha_bar = prod(1 - beta), its root shifted and scaled for zero terminal SNR (arXiv 2305.08891)."""
    steps = config.num_train_timesteps
    if config.kind == "squared_cosine":
        grid = torch.arange(steps + 1, dtype=torch.float64) / steps
        curve = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999).float()
    elif config.kind == "scaled_linear":
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, steps, dtype=torch.float32) ** 2
    else:
        betas = torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float32)
    alpha_bars = torch.cumprod(1 - betas, dim=0)
    if config.zero_terminal_snr:
        roots = alpha_bars.sqrt()
        alpha_bars = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    return alpha_bars


def _cosine_sigmas(config: ScheduleConfig) -> Tensor:
    """Return sigma of the shifted cosine log-SNR schedule, optionally stretched to end at 1.

    In float32 like the published tables: near pure noise alpha depends on the last digits of sigma.
    """
    u = torch.linspace(1, 0, config.num_train_timesteps, dtype=torch.float32)
    start, end = math.atan(math.exp(-config.logsnr_min / 2)), math.atan(math.exp(-config.logsnr_max / 2))
    logsnr = -2 * torch.tan(start + u * (end - start)).log()
    shift_min, shift_max = 2 * math.log(config.scale_min), 2 * math.log(config.scale_max)
    sigmas = torch.sigmoid(-(u * (logsnr - shift_min) + (1 - u) * (logsnr - shift_max))).sqrt()
    if config.zero_terminal_snr:
        low, high = sigmas[0], sigmas[-1]
        sigmas = low + (1 - low) / (high - low) * (sigmas - low)
    return sigmas
