"""Schedules, solvers, guidance and blending: against the library step by step, and against what must always hold."""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamt2v.chunks import Chunk, refinement_plan
from streamt2v.diffusion import blend, guidance
from streamt2v.diffusion.schedules import (
    ALIGNED_STEPS,
    NoiseSchedule,
    ScheduleConfig,
    align_your_steps,
    precondition,
    sdedit_grid,
)
from streamt2v.diffusion.solvers import ddim_step, dpmpp_2m_step, euler_step
from streamt2v.errors import ConfigError
from streamt2v.weights import published

PUBLISHED = ScheduleConfig()
REFINER_SCHEDULE = ScheduleConfig.from_dict(published.REFINER_SCHEDULE)
SCHEDULES = [
    PUBLISHED,
    ScheduleConfig(prediction="v", spacing="trailing", zero_terminal_snr=True, final_alpha_one=True),
    ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02, prediction="sample", num_train_timesteps=500),
    REFINER_SCHEDULE,
]


def library_ddim(config: ScheduleConfig) -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.kind,
        clip_sample=False,
        set_alpha_to_one=config.final_alpha_one,
        steps_offset=config.steps_offset,
        prediction_type={"v": "v_prediction"}.get(config.prediction, config.prediction),
        timestep_spacing=config.spacing,
        rescale_betas_zero_snr=config.zero_terminal_snr,
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("config", SCHEDULES[:3])
def test_tables_and_grids_equal_the_library(config: ScheduleConfig) -> None:
    ours, theirs = NoiseSchedule(config), library_ddim(config)
    torch.testing.assert_close(ours.alpha_bars, theirs.alphas_cumprod, rtol=1e-5, atol=1e-8)
    for steps in (1, 4, 10, 50, 100):
        theirs.set_timesteps(steps)
        assert ours.timesteps(steps).tolist() == theirs.timesteps.tolist()


def test_published_landmarks() -> None:
    """Values written down from the published samplers."""
    stream, refiner = NoiseSchedule(PUBLISHED), NoiseSchedule(REFINER_SCHEDULE)
    assert stream.timesteps(50).tolist() == list(range(981, 0, -20))
    torch.testing.assert_close(stream.alpha_bars[[0, 1, 981]], torch.tensor([0.99914998, 0.99829602, 0.00577550]))
    torch.testing.assert_close(
        refiner.sigmas[[0, 38, 300, 599]], torch.tensor([0.00110626, 0.1229519, 0.7825689, 0.9723633])
    )
    assert float(refiner.sigmas[-1]) == 1.0
    timesteps, rho = sdedit_grid(refiner, 600, 30)
    assert timesteps[:5].tolist() == [599, 580, 560, 541, 522]
    assert timesteps[-3:].tolist() == [76, 57, 38]
    torch.testing.assert_close(rho[[0, 1, -3, -2, -1]], torch.tensor([4.16477, 3.85701, 0.188229, 0.122918, 0.0]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 999), st.integers(1, 80))
def test_refinement_grid_always_has_the_asked_steps(start: int, steps: int) -> None:
    timesteps, rho = sdedit_grid(NoiseSchedule(REFINER_SCHEDULE), start, steps)
    assert len(timesteps) == steps
    assert len(rho) == steps + 1
    assert int(timesteps[0]) == start - 1
    assert rho[-1] == 0
    assert timesteps.min() >= 0
    assert (timesteps[1:] <= timesteps[:-1]).all()
    assert (rho[1:] <= rho[:-1]).all()


@pytest.mark.parametrize("config", SCHEDULES)
def test_signal_and_noise_share_the_variance(config: ScheduleConfig) -> None:
    schedule = NoiseSchedule(config)
    torch.testing.assert_close(schedule.alphas**2 + schedule.sigmas**2, torch.ones(config.num_train_timesteps))
    assert (schedule.alphas.diff() < 0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_a_perfect_prediction_gives_back_latents_and_noise(prediction: str) -> None:
    schedule = NoiseSchedule(ScheduleConfig(prediction=prediction))
    clean, drawn, timestep = noise(3, 4, 2, 5, 5), noise(3, 4, 2, 5, 5, seed=1), torch.tensor([40, 300, 800])
    noisy = schedule.add_noise(clean, drawn, timestep)
    output = {"epsilon": drawn, "v": schedule.velocity(clean, drawn, timestep), "sample": clean}[prediction]
    x0, epsilon = schedule.to_x0_eps(output, noisy, timestep)
    torch.testing.assert_close(x0, clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(epsilon, drawn, rtol=1e-4, atol=1e-4)
    one, _ = schedule.to_x0_eps(output[1], noisy[1], 300)
    torch.testing.assert_close(one, clean[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ScheduleConfig(kind="cosine"), "kind"),
        (lambda: ScheduleConfig(prediction="velocity"), "prediction"),
        (lambda: ScheduleConfig.from_dict({"beta": 1}), "beta"),
        (lambda: NoiseSchedule(PUBLISHED).timesteps(0), "steps"),
        (lambda: NoiseSchedule(PUBLISHED).timesteps(1001), "1001"),
        (lambda: sdedit_grid(NoiseSchedule(REFINER_SCHEDULE), 1001, 5), "1001"),
        (lambda: sdedit_grid(NoiseSchedule(REFINER_SCHEDULE), 600, 0), "steps"),
    ],
)
def test_settings_out_of_range_are_named(call: Callable[[], Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        call()


def test_schedule_config_survives_json() -> None:
    assert ScheduleConfig.from_dict(asdict(REFINER_SCHEDULE)) == REFINER_SCHEDULE


# ----------------------------------------------------------------------------------------------------------- solvers


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("config", SCHEDULES[:2])
def test_ddim_equals_the_library_at_every_step(config: ScheduleConfig, eta: float) -> None:
    schedule, theirs = NoiseSchedule(config), library_ddim(config)
    # In float32 the library's square root of what should be 0 is 2e-4 where a step starts from pure noise.
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.set_timesteps(10)
    timesteps, alpha_bars = schedule.ddim_grid(10)
    latents = noise(1, 4, 3, 2, 2)
    for step, timestep in enumerate(timesteps.tolist()):
        output, fresh = noise(1, 4, 3, 2, 2, seed=10 + step), noise(1, 4, 3, 2, 2, seed=100 + step)
        x0, epsilon = schedule.to_x0_eps(output, latents, timestep)
        found = ddim_step(x0, epsilon, alpha_bars[step], alpha_bars[step + 1], eta, fresh)
        expected = theirs.step(output, timestep, latents, eta=eta, variance_noise=fresh).prev_sample.float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        latents = expected


def test_ddim_ends_at_the_clean_latent_where_no_noise_is_left() -> None:
    clean, epsilon = noise(2, 3), noise(2, 3, seed=1)
    torch.testing.assert_close(ddim_step(clean, epsilon, 0.9, 1.0, eta=1.0, noise=epsilon), clean)
    with pytest.raises(ValueError, match="noise"):
        ddim_step(clean, epsilon, 0.5, 0.9, eta=1.0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("stochastic", [False, True])
def test_dpmpp_2m_equals_the_library_at_every_step(stochastic: bool) -> None:
    """The library works on x = alpha (x_0 + rho n); ours on x / alpha."""
    theirs = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, solver_order=2, prediction_type="sample",
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++", solver_type="midpoint",
        final_sigmas_type="zero", lower_order_final=False, timestep_spacing="linspace",
    )  # fmt: skip
    theirs.set_timesteps(12)
    rho = theirs.sigmas.double()
    alpha = (1 + rho**2).rsqrt()
    x, previous = rho[0] * noise(2, 5).double(), None
    theirs_x = x * alpha[0]
    for step, timestep in enumerate(theirs.timesteps):
        clean, fresh = noise(2, 5, seed=step + 10).double(), noise(2, 5, seed=step + 100).double()
        x = dpmpp_2m_step(x, clean, previous, rho, step, fresh if stochastic else None)
        theirs_x = theirs.step(clean, timestep, theirs_x, variance_noise=fresh).prev_sample
        previous = clean
        torch.testing.assert_close(x * alpha[step + 1], theirs_x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_first_step_of_dpmpp_2m_is_one_of_ddim(eta: float) -> None:
    alpha_bars = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    rho = ((1 - alpha_bars) / alpha_bars).sqrt()
    for step, (a, b) in enumerate(pairwise(alpha_bars)):
        x, clean, fresh = (noise(2, 5, seed=step + shift).double() for shift in (0, 10, 20))
        expected = dpmpp_2m_step(x / a.sqrt(), clean, None, rho, step, fresh if eta else None) * b.sqrt()
        epsilon = (x - a.sqrt() * clean) / (1 - a).sqrt()
        torch.testing.assert_close(ddim_step(clean, epsilon, a, b, eta, fresh if eta else None), expected)


@pytest.mark.parametrize("order", [1, 2])
def test_extrapolation_makes_a_second_order(order: int) -> None:
    """Of Gaussian data the best estimate and the ODE's solution are known: twice the steps, half or a quarter."""

    def error(steps: int) -> float:
        rho = 10 * torch.logspace(0, -2, steps + 1, dtype=torch.float64)
        x, previous = torch.ones(1, dtype=torch.float64), None
        for step in range(steps):
            clean = x * 0.25 / (0.25 + rho[step] ** 2)  # of deviation 0.5
            x = dpmpp_2m_step(x, clean, previous, rho, step, None)
            previous = clean if order == 2 else None
        return abs(float(x - ((0.25 + rho[-1] ** 2) / (0.25 + rho[0] ** 2)).sqrt()))

    assert [math.log2(error(steps) / error(2 * steps)) for steps in (40, 80)] == pytest.approx([order, order], abs=0.2)


def test_dpmpp_2m_is_exact_for_a_constant_estimate() -> None:
    """With one clean latent everywhere the ODE's exact solution is a straight line in rho."""
    rho = torch.tensor([4.0, 2.5, 1.0, 0.3, 0.0])
    clean = noise(3, 3)
    x = start = clean + rho[0] * noise(3, 3, seed=1)
    previous = None
    for step in range(4):
        x = dpmpp_2m_step(x, clean, previous, rho, step, None)
        previous = clean
        torch.testing.assert_close(x, clean + rho[step + 1] / rho[0] * (start - clean))


def test_the_sde_keeps_the_noise_level() -> None:
    """Around a known clean latent the stochastic step goes from deviation rho to deviation rho'."""
    rho = torch.tensor([4.0, 1.5, 0.5])
    clean = torch.zeros(200_000)
    x = dpmpp_2m_step(4.0 * noise(200_000), clean, None, rho, 0, noise(200_000, seed=1))
    assert float(x.std()) == pytest.approx(1.5, rel=0.01)


# ---------------------------------------------------------------------------------------------------------- guidance


def test_guidance_is_linear_and_one_is_the_conditional_branch() -> None:
    u, c = noise(2, 4, 3, 2, 2), noise(2, 4, 3, 2, 2, seed=1)
    torch.testing.assert_close(guidance.combine(u, c, 1.0), c)
    torch.testing.assert_close(guidance.combine(u, c, 0.0), u)
    torch.testing.assert_close(guidance.combine(u, c, 7.5), -6.5 * u + 7.5 * c)


@settings(max_examples=30, deadline=None)
@given(st.floats(1.5, 20.0), st.floats(0.01, 1.0))
def test_rescaling_moves_each_items_deviation_towards_the_conditional_one(scale: float, share: float) -> None:
    u, c = noise(2, 4, 3, 2, 2), noise(2, 4, 3, 2, 2, seed=1) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    plain, rescaled = guidance.combine(u, c, scale), guidance.combine(u, c, scale, share)
    for item in range(2):
        wanted = share * c[item].std() + (1 - share) * plain[item].std()
        torch.testing.assert_close(rescaled[item].std(), wanted, rtol=1e-4, atol=1e-5)
        alone = guidance.combine(u[item : item + 1], c[item : item + 1], scale, share)
        torch.testing.assert_close(alone[0], rescaled[item])


# ---------------------------------------------------------------------------------------------------------- blending

plans = st.integers(1, 9).flatmap(
    lambda size: st.builds(refinement_plan, st.integers(1, 50), st.just(size), st.integers(0, size - 1))
)
ranges: Any = st.sampled_from(["published", "corrected"])


def drawn(seed: int) -> blend.DrawCut:
    """Cuts of one step: the same whenever they are asked for."""

    def draw(low: int, high: int, index: int) -> int:
        return random.Random(f"{seed}/{index}").randint(low, high)

    return draw


def owners_of(plan: tuple[Chunk, ...], draw: blend.DrawCut, cut_range: blend.CutRange) -> list[int]:
    owner = {frame: chunk.index for chunk in plan for frame in blend.owned(plan, chunk.index, draw, cut_range)}
    return [owner[frame] for frame in range(plan[-1].stop)]


@given(plans, st.integers(0, 99), ranges)
def test_every_frame_has_one_owner_and_the_owner_covers_it(
    plan: tuple[Chunk, ...], seed: int, cut_range: blend.CutRange
) -> None:
    draw = drawn(seed)
    frames = [(frame, chunk) for chunk in plan for frame in blend.owned(plan, chunk.index, draw, cut_range)]
    assert sorted(frame for frame, _ in frames) == list(range(plan[-1].stop))
    assert all(chunk.start <= frame < chunk.stop for frame, chunk in frames)


@given(plans, st.integers(0, 99), ranges)
def test_ownership_is_that_of_chunks_written_over_each_other(
    plan: tuple[Chunk, ...], seed: int, cut_range: blend.CutRange
) -> None:
    """The published rule: in order, every chunk overwrites its frames from the cut on."""
    draw = drawn(seed)
    owners = [-1] * plan[-1].stop
    for chunk in plan:
        first = chunk.start + blend.cut(plan, chunk.index, draw, cut_range)
        owners[first : chunk.stop] = [chunk.index] * (chunk.stop - first)
    assert owners == owners_of(plan, draw, cut_range)


@given(plans, st.integers(0, 99), ranges)
def test_blending_equal_estimates_changes_nothing(
    plan: tuple[Chunk, ...], seed: int, cut_range: blend.CutRange
) -> None:
    estimate = noise(plan[-1].stop, 2, seed=seed)
    merged = torch.full_like(estimate, torch.nan)
    for chunk in plan:
        own = blend.owned(plan, chunk.index, drawn(seed), cut_range)
        merged[own.start : own.stop] = estimate[chunk.start : chunk.stop][
            own.start - chunk.start : own.stop - chunk.start
        ]
    assert torch.equal(merged, estimate)


@pytest.mark.parametrize(("cut_range", "values"), [("published", range(8)), ("corrected", range(9))])
def test_cuts_are_uniform_over_their_range(cut_range: blend.CutRange, values: range) -> None:
    plan = refinement_plan(40, 24, 8)
    seen = Counter(blend.cut(plan, 1, drawn(seed), cut_range) for seed in range(9000))
    assert set(seen) == set(values)
    assert max(seen.values()) < 1.2 * min(seen.values())
    # In the paper frame f = 1..O of an overlap stays with the left chunk with probability 1 - f / (O + 1).
    kept = sum(count for cut, count in seen.items() if cut >= 3) / 9000
    assert kept == pytest.approx(1 - 3 / len(values), abs=0.02)


def test_an_overlap_of_one_frame_goes_to_the_newer_chunk_as_published() -> None:
    plan = refinement_plan(10, 4, 1)
    assert [owners_of(plan, drawn(1), "published")[frame] for frame in (3, 6)] == [1, 2]
    assert {owners_of(plan, drawn(seed), "corrected")[3] for seed in range(20)} == {0, 1}


# ------------------------------------------------------------------------------------------------- networks told rho

levels = st.floats(0.002, 700)


@given(st.integers(1, 200))
def test_aligned_steps_fall_from_noise_to_nothing(num_steps: int) -> None:
    rho = align_your_steps(num_steps)
    assert len(rho) == num_steps + 1
    assert float(rho[-1]) == 0
    assert all(before > after for before, after in pairwise(rho.tolist()))
    assert float(rho[0]) == pytest.approx(700)
    if num_steps > 1:
        assert float(rho[-2]) == pytest.approx(0.002)


def test_ten_aligned_intervals_are_the_published_ones_and_others_lie_on_lines_between_them() -> None:
    torch.testing.assert_close(align_your_steps(11)[:-1], torch.tensor(ALIGNED_STEPS, dtype=torch.float64))
    logs = align_your_steps(21)[:-1].log()
    torch.testing.assert_close(logs[1::2], (logs[:-1:2] + logs[2::2]) / 2)
    with pytest.raises(ConfigError, match="at least 1"):
        align_your_steps(0)


@given(levels, st.integers(0, 99))
def test_the_true_velocity_gives_the_clean_latents(rho: float, seed: int) -> None:
    """In coordinates of unit variance, c_in x = alpha x_0 + sigma n, whose velocity is alpha n - sigma x_0."""
    clean, fresh = noise(1, 4, seed=seed).double(), noise(1, 4, seed=seed + 100).double()
    factor = precondition(rho)
    noisy = clean + rho * fresh
    velocity = factor.c_in * fresh - rho * factor.c_in * clean
    torch.testing.assert_close(factor.clean(velocity, noisy), clean, rtol=1e-6, atol=1e-6)
    assert (factor.c_in * rho) ** 2 + factor.c_in**2 == pytest.approx(1)
    assert factor.c_skip + factor.c_out**2 == pytest.approx(1)
    assert math.exp(4 * factor.c_noise) == pytest.approx(rho)


@given(levels, st.floats(0, 1), st.integers(0, 99))
def test_an_euler_step_is_a_ddim_step_in_other_coordinates(rho: float, share: float, seed: int) -> None:
    clean, x = noise(1, 4, seed=seed).double(), rho * noise(1, 4, seed=seed + 100).double()
    following = share * rho
    a, b = (1 / (1 + level**2) for level in (rho, following))
    moved = ddim_step(clean, (x - clean) / rho, a, b) / math.sqrt(b)
    torch.testing.assert_close(euler_step(x, clean, rho, following), moved, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(euler_step(x, clean, rho, 0.0), clean, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the library's
def test_euler_steps_equal_the_library_step_by_step() -> None:
    rho = align_your_steps(30)
    library = EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", timestep_spacing="leading", sigma_min=0.002,
        sigma_max=700.0,
    )  # fmt: skip
    library.set_timesteps(sigmas=rho.tolist())
    torch.testing.assert_close(library.sigmas.double(), rho, rtol=1e-6, atol=0)
    x = noise(1, 4, 5) * float(library.init_noise_sigma)
    assert float(library.init_noise_sigma) == pytest.approx(math.sqrt(700.0**2 + 1))
    for step, timestep in enumerate(library.timesteps):
        factor = precondition(float(rho[step]))
        assert factor.c_noise == pytest.approx(float(timestep), abs=1e-6)
        torch.testing.assert_close(library.scale_model_input(x, timestep), factor.c_in * x)
        output = noise(1, 4, 5, seed=step)
        found = euler_step(x, factor.clean(output, x), float(rho[step]), float(rho[step + 1]))
        x = library.step(output, timestep, x).prev_sample
        torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@given(st.floats(0, 10), st.floats(0, 10), st.integers(1, 30), st.integers(0, 99))
def test_guidance_per_frame_is_guidance_of_every_frame(first: float, last: float, frames: int, seed: int) -> None:
    scales = guidance.per_frame(first, last, frames)
    assert scales.shape == (frames, 1, 1)
    unconditional, conditional = noise(2, 3, frames, 2, 2, seed=seed), noise(2, 3, frames, 2, 2, seed=seed + 100)
    guided = guidance.combine(unconditional, conditional, scales)
    for frame in range(frames):
        scale = first + (last - first) * (frame / (frames - 1) if frames > 1 else 0.0)
        expected = guidance.combine(unconditional[:, :, frame], conditional[:, :, frame], scale)
        torch.testing.assert_close(guided[:, :, frame], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero", [False, True])
def test_squared_cosine_equals_the_library(zero: bool) -> None:
    config = ScheduleConfig(kind="squared_cosine", prediction="v", zero_terminal_snr=zero, final_alpha_one=True)
    theirs = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=zero, prediction_type="v_prediction"
    )
    # The library goes from alpha bars to betas and back, in float32.
    torch.testing.assert_close(NoiseSchedule(config).alpha_bars, theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
