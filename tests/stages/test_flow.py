"""Bases in one chunk, bit by bit against the pipelines of diffusers; known latents; steps against its schedulers."""
# mypy: disable-error-code="no-untyped-call"

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from streamt2v.diffusion import solvers
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.diffusion.schedules import FlowSchedule
from streamt2v.families import bases, wan
from streamt2v.media.frames import to_float
from streamt2v.stages.denoise import Sampling
from streamt2v.stages.flow import FlowStreamer, Words, sample
from tests import pipelines

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE = (32, 64)
STEPS = 3


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(length: int = 5) -> Words:
    return Words(normals(2, length, pipelines.WIDTH, seed=1), torch.ones(2, length))


def sampling(steps: int = STEPS, guidance: float = 3.0, batched: bool = False) -> Sampling:
    return Sampling(num_inference_steps=steps, guidance_scale=guidance, batched=batched)


def wan_parts(expand: bool) -> dict[str, Any]:
    torch.manual_seed(3)
    return {
        "transformer": pipelines.wan_transformer().eval(),
        "vae": pipelines.wan_vae(16 if expand else 8).eval(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


def wan_base(expand: bool = True) -> wan.Wan:
    return wan.Wan(wan_parts(expand), {"expand_timesteps": expand})


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_chunk_of_wan_from_a_picture_is_that_of_the_library(guidance: float) -> None:
    base, noise, said = wan_base(), normals(1, 8, 4, 2, 4), words()
    library = diffusers.WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, image_encoder=None, image_processor=None, expand_timesteps=True,
        **wan_parts(True),
    )  # fmt: skip
    library.set_progress_bar_config(disable=True)
    for kind in ("latent", "pt"):
        theirs = library(
            picture(), height=SIZE[0], width=SIZE[1], num_frames=13, num_inference_steps=STEPS, latents=noise,
            guidance_scale=guidance, prompt_embeds=said.tokens[1:], negative_prompt_embeds=said.tokens[:1],
            output_type=kind,
        ).frames  # fmt: skip
        with torch.inference_mode():
            known = base.encode(to_float(np.asarray(picture())[None]))
            ours = sample(base, noise, said, sampling(guidance=guidance), known)
            ours = ours if kind == "latent" else (base.decode(ours)[None] / 2 + 0.5)
        assert float((ours - theirs).abs().max()) == 0.0
        assert float(theirs.std()) > 0.01


@pytest.mark.parametrize("expand", [True, False])
def test_a_chunk_of_wan_from_text_is_that_of_the_library(expand: bool) -> None:
    base, said = wan_base(expand), words()
    noise = normals(1, 8, 4, 2, 4)
    library = diffusers.WanPipeline(tokenizer=None, text_encoder=None, expand_timesteps=expand, **wan_parts(expand))
    library.set_progress_bar_config(disable=True)
    cell = 16 if expand else 8
    theirs = library(
        height=2 * cell, width=4 * cell, num_frames=13, num_inference_steps=STEPS, latents=noise, guidance_scale=3.0,
        prompt_embeds=said.tokens[1:], negative_prompt_embeds=said.tokens[:1], output_type="latent",
    ).frames  # fmt: skip
    ours = sample(base, noise, said, sampling())
    assert float((ours - theirs).abs().max()) == 0.0


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("multistep", [True, False])
def test_known_latents_stay_and_decide_what_follows(expand: bool, multistep: bool) -> None:
    base, noise = wan_base(expand), normals(1, 8, 4, 2, 4)
    if multistep:
        base = wan.Wan(wan_parts(expand) | {"scheduler": pipelines.multistep()}, {"expand_timesteps": expand})
        assert base.multistep
    made = [sample(base, noise, words(), sampling(), normals(1, 8, 2, 2, 4, seed=seed)) for seed in (5, 6)]
    for seed, latents in zip((5, 6), made, strict=True):
        assert torch.equal(latents[:, :, :2], normals(1, 8, 2, 2, 4, seed=seed))
        assert torch.isfinite(latents).all()
    assert not torch.equal(made[0][:, :, 2:], made[1][:, :, 2:])


def test_a_chunk_is_addressed_by_its_latents() -> None:
    """A later chunk draws for the latents that it shares what the chunk before it drew for them."""
    stage = FlowStreamer(wan_base(), SeededDraws(1), 17, (8, 2, 4))
    first, second = (stage.noise(bases.FIRST).initial, stage.noise(bases.Chunk(1, 3, 3, 3)).initial)
    assert first.shape == (1, 8, 5, 2, 4)
    assert torch.equal(first[:, :, 3:], second[:, :, :2])


def test_known_frames_begin_the_chunk() -> None:
    stage = FlowStreamer(wan_base(), SeededDraws(1), 17, (8, 2, 4))
    known = to_float(np.random.default_rng(0).integers(0, 256, (5, *SIZE, 3), dtype=np.uint8))
    made = stage.frames(bases.Chunk(1, 12, 29, 17), known, words(), sampling())
    assert made.shape == (17, 3, *SIZE)
    with torch.inference_mode():
        assert torch.equal(made[:5], stage.base.decode(stage.base.encode(known)))


def flow_levels(steps: int, shift: float) -> Tensor:
    times = torch.linspace(1, 1 / steps, steps)
    return torch.cat([shift * times / (1 + (shift - 1) * times), torch.zeros(1)])


@given(st.integers(1, 12), st.floats(1, 12))
def test_euler_steps_are_those_of_the_library(steps: int, shift: float) -> None:
    """x + (sigma' - sigma) v; and the first-order step where x / (1 - sigma) = x_0 + rho n."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    x = normals(2, 3, seed=9)
    sigmas = scheduler.sigmas.double().clamp(max=1 - 1e-9)  # at 1 there is no x / (1 - sigma)
    for step, timestep in enumerate(scheduler.timesteps):
        velocity, before = normals(2, 3, seed=step), x
        x = scheduler.step(velocity, timestep, x).prev_sample
        assert torch.equal(before + (scheduler.sigmas[step + 1] - scheduler.sigmas[step]) * velocity, x)
        clean = before.double() - sigmas[step] * velocity
        in_rho = solvers.flow_step(before.double(), clean, None, sigmas, step)
        torch.testing.assert_close(in_rho.float(), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_multistep_steps_are_those_of_the_library(steps: int) -> None:
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, lower_order_final=False
    )
    scheduler.set_timesteps(steps)
    x = ours = normals(2, 3, seed=9)
    before = None
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = normals(2, 3, seed=step)
        x = scheduler.step(velocity, timestep, x).prev_sample
        clean = ours - scheduler.sigmas[step] * velocity
        ours, before = solvers.flow_step(ours, clean, before, scheduler.sigmas, step), clean
        torch.testing.assert_close(ours, x, atol=1e-6, rtol=1e-6)


@given(st.integers(1, 999), st.integers(1, 30), st.floats(1, 9))
def test_refining_levels_lie_on_the_models_own_path(start: int, steps: int, shift: float) -> None:
    path = flow_levels(1000, shift)
    timesteps, rho = FlowSchedule(path).refining_grid(start, steps)
    assert len(timesteps) == steps == len(rho) - 1
    assert float(timesteps[0]) == start
    assert float(rho[-1]) == 0
    sigmas = rho.double() / (1 + rho.double())
    assert bool((sigmas.diff() < 0).all())
    torch.testing.assert_close(sigmas[:-1] * 1000, timesteps.double(), atol=1e-3, rtol=1e-5)
    # Even steps in the time that the shift bends.
    unbent = sigmas / (shift - (shift - 1) * sigmas)
    torch.testing.assert_close(unbent.diff(), unbent.diff().mean().expand(steps), atol=2e-5, rtol=2e-3)


def test_a_velocity_gives_back_what_it_was_made_of() -> None:
    schedule, clean, noise = FlowSchedule(flow_levels(100, 5.0)), normals(1, 4, seed=1), normals(1, 4, seed=2)
    noisy = schedule.add_noise(clean, noise, 299)
    torch.testing.assert_close(noisy, 0.7 * clean + 0.3 * noise)
    torch.testing.assert_close(schedule.to_x0(noise - clean, noisy, 300.0), clean)
    rho = torch.tensor(0.3 / 0.7)
    torch.testing.assert_close((clean + rho * noise) / schedule.input_scale(rho), noisy)
