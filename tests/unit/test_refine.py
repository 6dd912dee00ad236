"""The refinement stage's order of work, on a toy network: same numbers in any order, constant memory, exact resume."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamt2v.chunks import refinement_plan
from streamt2v.config import RefineConfig
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig
from streamt2v.models.unet3d import Conditioning
from streamt2v.stages.refine import Denoiser, Refiner, RefineState


class Toy:
    """A network whose output depends on all frames of its chunk and on the timestep."""

    calls = 0

    def __call__(self, latents: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
        self.calls += 1
        return torch.tanh(latents + latents.mean(dim=2, keepdim=True) * 0.3 + timestep / 1000)


def refiner(num_frames: int, config: RefineConfig, state: RefineState | None = None, seed: int = 3) -> Refiner:
    schedule = NoiseSchedule(ScheduleConfig(prediction="v"))
    denoiser = Denoiser(Toy(), schedule, lambda chunk: Conditioning(()))  # type: ignore[arg-type]
    source = torch.randn(num_frames, 2, 1, 2, generator=torch.Generator().manual_seed(1))
    plan = refinement_plan(num_frames, config.chunk, config.overlap)
    return Refiner(denoiser, plan, config, SeededDraws(seed), lambda start, stop: source[start:stop], state)


def config(chunk: int, overlap: int, steps: int, **more: Any) -> RefineConfig:
    return RefineConfig(chunk=chunk, overlap=overlap, num_inference_steps=steps, guidance_scale=1.0, **more)


def all_frames(made: Refiner) -> Tensor:
    return torch.cat(list(made.run()))


shapes = st.integers(1, 9).flatmap(
    lambda c: st.tuples(st.integers(1, 40), st.just(c), st.integers(0, c - 1), st.integers(1, 4))
)


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(["randomized", "shared", "independent"]))
def test_sweep_and_diagonal_are_bit_identical(shape: tuple[int, int, int, int], blending: Any) -> None:
    num_frames, chunk, overlap, steps = shape
    diagonal = all_frames(refiner(num_frames, config(chunk, overlap, steps, blending=blending)))
    sweep = all_frames(refiner(num_frames, config(chunk, overlap, steps, blending=blending, order="sweep")))
    assert len(diagonal) == num_frames
    assert torch.equal(diagonal, sweep)


def test_memory_is_constant_in_length() -> None:
    def most_held(num_frames: int) -> int:
        made = refiner(num_frames, config(24, 8, 5))
        return max(len(made.state.latents) for _ in made.run())

    assert most_held(1200) == most_held(240) <= 5 * 24


def test_first_frames_come_early() -> None:
    made = refiner(1200, config(24, 8, 5))
    next(made.run())
    assert made.state.encoded <= 24 + 5 * 16


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(0, 6), st.sampled_from(["randomized", "independent"]))
def test_resume_after_any_group_is_exact(shape: tuple[int, int, int, int], groups: int, blending: Any) -> None:
    num_frames, chunk, overlap, steps = shape
    setup = config(chunk, overlap, steps, blending=blending)
    whole = all_frames(refiner(num_frames, setup))
    first = refiner(num_frames, setup)
    done = [group for _, group in zip(range(groups), first.run(), strict=False)]
    saved = {name: tensor.clone() for name, tensor in first.state.tensors().items()}
    if first.state.finished == len(first.frames):
        return
    again = refiner(num_frames, setup, RefineState.from_tensors(saved) if done else None)
    assert torch.equal(torch.cat([*done, *again.run()]), whole)


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 4}, {"noise_level": 400}, {"stochastic": False}, {"blending": "shared"},
        {"blending": "independent"}, {"start_scale": "published"}, {"chunk": 8}, {"overlap": 3},
        {"cut_range": "published"},
    ],
)  # fmt: skip
def test_every_setting_changes_the_result(change: dict[str, Any]) -> None:
    base = {"chunk": 10, "overlap": 4, "num_inference_steps": 3, "guidance_scale": 1.0}
    plain = all_frames(refiner(30, RefineConfig(**base)))
    changed = all_frames(refiner(30, RefineConfig(**{**base, **change})))
    assert not torch.equal(plain, changed)


def test_seed_changes_the_result() -> None:
    assert not torch.equal(all_frames(refiner(12, config(8, 2, 2))), all_frames(refiner(12, config(8, 2, 2), seed=4)))
