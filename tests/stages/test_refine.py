"""The refinement stage's order of work, on a toy network: same numbers in any order, constant memory, exact resume."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.blending import blended
from streamt2v.chunks import Chunk, refinement_plan
from streamt2v.config import RefineConfig
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig
from streamt2v.memory import chunks_kept
from streamt2v.models.unet3d import Conditioning
from streamt2v.stages.refine import Denoiser, Refiner, RefineState
from tests.sweep import Sweep


class Toy:
    """A network whose output depends on all frames of its chunk and on the timestep, by way of deep features."""

    def __init__(self) -> None:
        self.given: list[bool] = []

    def run(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, cam: None, deep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self.given.append(deep is not None)
        if deep is None:
            deep = latents.mean(dim=2, keepdim=True) * 0.3 + timestep / 1000
        return torch.tanh(latents + deep), deep


class Looking(Toy):
    """A network whose output depends on the source, too; it is told whether its features are `kept`."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.kept = kept

    def run(  # type: ignore[override]
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, cam: None, deep: Tensor | None,
        source: list[Tensor], keep: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert keep == self.kept
        output, deep = super().run(latents, timestep, conditioning, cam, deep)
        return output + torch.stack(source, 1).cumsum(1).cos(), deep


def refiner(
    num_frames: int,
    config: RefineConfig,
    state: RefineState | None = None,
    seed: int = 3,
    looks: bool = False,
    kind: type[Refiner] = Refiner,
) -> Refiner:
    schedule = NoiseSchedule(ScheduleConfig(prediction="v"))
    run = Looking(config.reuse_interval > 1).run if looks else Toy().run
    denoiser = Denoiser(run, schedule, lambda chunk: Conditioning(()), sees_source=looks)
    source = torch.randn(num_frames, 2, 1, 2, generator=torch.Generator().manual_seed(1))
    plan = refinement_plan(num_frames, config.chunk, config.overlap, config.shift_back)
    return kind(denoiser, plan, config, SeededDraws(seed), source.__getitem__, state)


def config(chunk: int, overlap: int, steps: int, **more: Any) -> RefineConfig:
    return RefineConfig(chunk=chunk, overlap=overlap, num_inference_steps=steps, **{"guidance_scale": 1.0, **more})


def all_frames(made: Refiner) -> Tensor:
    return torch.cat(list(made.run()))


shapes = st.integers(1, 9).flatmap(
    lambda c: st.tuples(st.integers(1, 40), st.just(c), st.integers(0, c - 1), st.integers(1, 4))
)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 3), st.booleans(), st.booleans())
def test_sweep_and_diagonal_are_bit_identical(
    shape: tuple[int, int, int, int], interval: int, looks: bool, shift_back: bool
) -> None:
    num_frames, chunk, overlap, steps = shape
    setup = config(chunk, overlap, steps, reuse_interval=interval, shift_back=shift_back)
    diagonal = all_frames(refiner(num_frames, setup, looks=looks))
    sweep = all_frames(refiner(num_frames, setup, looks=looks, kind=Sweep))
    assert len(diagonal) == num_frames
    assert torch.equal(diagonal, sweep)


def test_memory_is_constant_in_length() -> None:
    def most_held(num_frames: int, looks: bool) -> tuple[int, int]:
        made = refiner(num_frames, config(24, 8, 5), looks=looks)
        held = [(len(made.state.latents), len(made.state.clean)) for _ in made.run()]
        return max(latents for latents, _ in held), max(clean for _, clean in held)

    assert most_held(1200, False) == most_held(240, False) <= (5 * 24, 0)
    # The source's latents are kept for as long as the noisy ones, for a network that looks at them.
    assert most_held(1200, True) == most_held(240, True) == most_held(240, False)[:1] * 2


@pytest.mark.parametrize("steps", [1, 3])
def test_the_network_sees_the_frames_that_are_kept_and_no_copies(steps: int) -> None:
    made, chunks = refiner(240, config(24, 8, steps), looks=True), list[list[int]]()
    run = made.denoiser.run

    def looking(*given: Any) -> tuple[Tensor, Tensor]:
        kept = {id(tensor): frame for frame, tensor in made.state.clean.items()}
        chunks.append([kept[id(tensor)] for tensor in given[5]])
        return run(*given)

    made.denoiser = replace(made.denoiser, run=looking)
    all_frames(made)
    assert sorted(chunks) == sorted([*range(chunk.start, chunk.stop)] for chunk in made.plan for _ in range(steps))


def test_first_frames_come_early() -> None:
    made = refiner(1200, config(24, 8, 5))
    next(made.run())
    assert made.state.encoded <= 24 + 5 * 16


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 4))
def test_deep_layers_run_at_every_nth_step_of_each_chunk(shape: tuple[int, int, int, int], interval: int) -> None:
    """What is kept between them is no more than memory planning counts, at any length."""
    num_frames, chunk, overlap, steps = shape
    toy = Toy()
    made = refiner(num_frames, config(chunk, overlap, steps, reuse_interval=interval))
    made.denoiser = replace(made.denoiser, run=toy.run)
    run_step, held = made._run_step, [0]

    def counted(chunk: Chunk) -> None:
        run_step(chunk)
        held.append(len(made.deep))

    with patch.object(made, "_run_step", counted):
        assert len(all_frames(made)) == num_frames
    assert toy.given.count(False) == len(made.plan) * -(-steps // interval)
    assert toy.given.count(True) == len(made.plan) * (steps - -(-steps // interval))
    assert max(held) <= chunks_kept(steps, interval, chunk, overlap)
    assert not made.deep and not made.state.whole


@pytest.mark.parametrize("num_frames", [217, 223])
def test_a_last_chunk_that_shifted_back_is_one_more_that_waits(num_frames: int) -> None:
    made, held = refiner(num_frames, config(24, 8, 10, reuse_interval=2)), [0]
    run_step = made._run_step
    with patch.object(made, "_run_step", lambda chunk: (run_step(chunk), held.append(len(made.deep)))):
        all_frames(made)
    assert max(held) == chunks_kept(10, 2, 24, 8) == 7


def test_deep_features_of_both_branches_wait_where_they_are_told_to() -> None:
    """Guidance stops before the last step, which needs one branch; the toy takes both in one batch or in two passes."""
    setup = config(8, 2, 4, reuse_interval=2, guidance_scale=3.0, guidance_stop=0.2)
    made = refiner(20, setup)
    plain = all_frames(made)
    for change in ({"batched": False}, {"place": "cpu"}):
        other = refiner(20, setup)
        other.denoiser = replace(other.denoiser, **change)
        torch.testing.assert_close(all_frames(other), plain)
    elsewhere = refiner(20, setup)
    elsewhere.denoiser = replace(elsewhere.denoiser, place="meta")
    with pytest.raises(RuntimeError, match="meta"):
        all_frames(elsewhere)


@settings(max_examples=25, deadline=None)
@given(
    shapes, st.integers(0, 6), st.integers(1, 3), st.sampled_from([600, 3]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_resume_after_any_group_is_exact(
    shape: tuple[int, int, int, int], groups: int, interval: int, level: int, looks: bool, shift_back: bool
) -> None:
    """Also where the grid visits a timestep twice, as it has fewer than there are steps."""
    num_frames, chunk, overlap, steps = shape
    setup = config(chunk, overlap, steps, reuse_interval=interval, noise_level=level, shift_back=shift_back)
    whole = all_frames(refiner(num_frames, setup, looks=looks))
    first = refiner(num_frames, setup, looks=looks)
    done = [group for _, group in zip(range(groups), first.run(), strict=False)]
    saved = {name: tensor.clone() for name, tensor in first.state.tensors().items()}
    if first.state.finished == num_frames:
        return
    again = refiner(num_frames, setup, RefineState.from_tensors(saved) if done else None, looks=looks)
    assert torch.equal(torch.cat([*done, *again.run()]), whole)


def test_a_state_of_frames_in_one_piece_is_read() -> None:
    tables = {"steps_done": torch.tensor([2, 1]), "counts": torch.tensor([3, 7])}
    latents = torch.rand(2, 4, 1, 1)
    state = RefineState.from_tensors(tables | {"latents": latents.clone(), "latents.slots": torch.tensor([5, 6])})
    now = RefineState.from_tensors(tables | {"latents.5": latents[0], "latents.6": latents[1]})
    assert list(state.latents) == list(now.latents) == [5, 6]
    assert all(torch.equal(state.latents[at], now.latents[at]) for at in (5, 6))
    assert (state.steps_done, state.finished, state.encoded) == ([2, 1], 3, 7) == (now.steps_done, 3, 7)


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 4}, {"noise_level": 400}, {"stochastic": False}, {"start_scale": "published"},
        {"chunk": 8}, {"overlap": 3}, {"cut_range": "published"}, {"reuse_interval": 2}, {"shift_back": False},
    ],
)  # fmt: skip
def test_every_setting_changes_the_result(change: dict[str, Any]) -> None:
    base = {"chunk": 10, "overlap": 4, "num_inference_steps": 3, "guidance_scale": 1.0}
    plain = all_frames(refiner(30, RefineConfig(**base)))
    changed = all_frames(refiner(30, RefineConfig(**{**base, **change})))
    assert not torch.equal(plain, changed)


def test_a_network_that_looks_is_given_the_source() -> None:
    assert not torch.equal(
        all_frames(refiner(12, config(8, 2, 2))), all_frames(refiner(12, config(8, 2, 2), looks=True))
    )


def test_seed_changes_the_result() -> None:
    assert not torch.equal(all_frames(refiner(12, config(8, 2, 2))), all_frames(refiner(12, config(8, 2, 2), seed=4)))


@settings(max_examples=20, deadline=None)
@given(shapes, st.sampled_from(["shared", "independent"]), st.integers(1, 3), st.booleans())
def test_without_blending_each_chunk_is_refined_alone(
    shape: tuple[int, int, int, int], way: str, interval: int, looks: bool
) -> None:
    num_frames, chunk, overlap, steps = shape
    setup = config(chunk, overlap, steps, reuse_interval=interval)
    with blended(way):
        apart = list(refiner(num_frames, setup, looks=looks).run())
    assert [len(group) for group in apart] == [one.num_new for one in refinement_plan(num_frames, chunk, overlap)]
    with blended("randomized"):
        together = all_frames(refiner(num_frames, setup, looks=looks))
    assert torch.equal(together, all_frames(refiner(num_frames, setup, looks=looks)))
    if len(apart) == 1 and way == "shared":
        assert torch.equal(apart[0], together)


def test_the_ablation_of_blending_shows_its_order() -> None:
    """Where the frames of a chunk agree, seams of independent chunks are worse than with shared noise, then blended."""
    schedule = NoiseSchedule(ScheduleConfig(prediction="sample"))

    def agreeing(latents: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return latents.mean(dim=2, keepdim=True).expand_as(latents), latents

    def seam(way: str, seed: int) -> float:
        made = refiner(32, config(24, 16, 6), seed=seed)
        made.denoiser = replace(made.denoiser, run=agreeing, schedule=schedule)
        with blended(way):
            return float(all_frames(made).diff(dim=0)[7:24].abs().amax(0).mean())

    randomized, shared, independent = (
        sum(seam(way, seed) for seed in range(40)) for way in ("randomized", "shared", "independent")
    )
    assert randomized < 0.8 * shared
    assert shared < 0.8 * independent
