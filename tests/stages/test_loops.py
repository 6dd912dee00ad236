"""Loops: what is rolled comes back, all seams of a ring are alike, a refined loop has no beginning."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamt2v.chunks import Around, loop_plan
from streamt2v.diffusion.noise import Address, SeededDraws
from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig
from streamt2v.models.unet3d import Conditioning
from streamt2v.stages.denoise import BOTH, ChunkNoise, Sampling, denoise
from streamt2v.stages.loops import denoise_ring, rolled, stride
from streamt2v.stages.refine import Denoiser, Refiner
from streamt2v.stages.stream import side_by_side
from tests.stages.test_refine import Toy, config

SCHEDULE = NoiseSchedule(ScheduleConfig())


def network(latents: Tensor, timestep: int, rows: slice) -> Tensor:
    """Mixes neighbouring frames, and knows the first from the others, as networks with frame codes do."""
    mixed = torch.tanh(latents + 0.5 * latents.roll(1, 2))
    return mixed + torch.linspace(0, 3, latents.shape[2]).view(1, 1, -1, 1, 1)


def noise_of(frames: int, by: int = 0) -> ChunkNoise:
    def draw(seed: int) -> Tensor:
        return torch.randn(1, 2, frames, 2, 2, generator=torch.Generator().manual_seed(seed)).roll(by, 2)

    return ChunkNoise(draw(0), lambda step: draw(step + 1))


@given(st.integers(1, 200))
def test_the_stride_visits_every_frame(num_frames: int) -> None:
    assert math.gcd(stride(num_frames), num_frames) == 1


@given(st.integers(1, 20), st.integers(0, 5))
def test_a_network_that_knows_no_frame_from_another_is_the_same_when_rolled(frames: int, step: int) -> None:
    timesteps, latents = [900, 700, 500, 300, 100, 0], torch.randn(1, 2, frames, 2, 2)

    def alike(x: Tensor, timestep: int, rows: slice) -> Tensor:
        return torch.tanh(x + 0.5 * x.roll(1, 2))

    found = rolled(alike, timesteps)(latents, timesteps[step], BOTH)
    assert torch.equal(found, alike(latents, 0, BOTH))


def test_a_rolled_loop_closes_and_a_plain_clip_does_not() -> None:
    sampling, num_frames = Sampling(24, 1.0), 16

    def wrap(roll: bool) -> float:
        timesteps = SCHEDULE.timesteps(24).tolist()
        made = denoise(rolled(network, timesteps) if roll else network, SCHEDULE, noise_of(num_frames), sampling)
        changes = (made - made.roll(1, 2)).abs().mean(dim=(0, 1, 3, 4))  # the first is that of the end
        return float(changes[0] / changes[1:].median())

    assert wrap(False) > 1.5 * wrap(True)


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 40), st.integers(0, 7))
def test_every_frame_of_a_ring_comes_from_one_window(num_frames: int, overlap: int) -> None:
    made = list[Tensor]()

    def cut(window: int, step: int) -> int:
        return SeededDraws(1).integer("cut", (window, step), 0, overlap)

    latents = denoise_ring(
        lambda frame: lambda x, timestep, rows: torch.zeros_like(x),
        SCHEDULE, noise_of(num_frames), Sampling(3, 1.0), 8, overlap, cut, lambda step, x0, x: made.append(x0),
    )  # fmt: skip
    assert latents.shape[2] == num_frames
    assert all(torch.isfinite(x0).all() for x0 in made)
    plain = denoise(lambda x, timestep, rows: torch.zeros_like(x), SCHEDULE, noise_of(num_frames), Sampling(3, 1.0))
    torch.testing.assert_close(latents, plain, rtol=1e-4, atol=1e-4)  # as no window sees its neighbours here


@pytest.mark.parametrize(("num_frames", "overlap"), [(24, 4), (27, 4), (16, 0)])
def test_the_seam_of_a_ring_is_like_all_others(num_frames: int, overlap: int) -> None:
    def wrap(seed: int) -> Tensor:
        def cut(window: int, step: int) -> int:
            return SeededDraws(seed).integer("cut", (window, step), 0, overlap)

        made = denoise_ring(lambda frame: network, SCHEDULE, noise_of(num_frames), Sampling(24, 1.0), 8, overlap, cut)
        return (made - made.roll(1, 2)).abs().mean(dim=(0, 1, 3, 4))

    changes = torch.stack([wrap(seed) for seed in range(4)]).mean(0)
    assert changes[0] < changes[1:].max() * 1.05


class _Rolled:
    """The draws of another loop: every frame's are those of the frame `by` before it."""

    def __init__(self, by: int, around: Around, starts: int) -> None:
        self.draws, self.by, self.around, self.starts = SeededDraws(3), by, around, starts

    def normal(self, purpose: str, address: Address, shape: tuple[int, ...]) -> Tensor:
        return self.draws.normal(purpose, ((address[0] - self.by) % self.around.frames, *address[1:]), shape)

    def uniform(self, purpose: str, address: Address, shape: tuple[int, ...]) -> Tensor:
        raise AssertionError

    def integer(self, purpose: str, address: Address, low: int, high: int) -> int:
        chunk = (address[0] - self.by // self.starts) % self.around.chunks
        return self.draws.integer(purpose, (chunk, *address[1:]), low, high)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 8).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1))),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_rolling_a_loop_and_its_draws_rolls_the_refined_loop(
    sizes: tuple[int, int], rounds: int, steps: int, by: int
) -> None:
    size, overlap = sizes
    step = size - overlap
    num_frames, by = rounds * step, by % rounds * step
    source = torch.randn(num_frames, 2, 1, 2, generator=torch.Generator().manual_seed(1))
    plan, around = loop_plan(num_frames, size, overlap, steps * (size - 1))

    def refined(clip: Tensor, by: int) -> Tensor:
        denoiser = Denoiser(Toy().run, NoiseSchedule(ScheduleConfig(prediction="v")), lambda chunk: Conditioning(()))

        def encode(number: int) -> Tensor:
            return clip[around.frame(number)]

        draws = _Rolled(by, around, step)
        made = Refiner(denoiser, plan, config(size, overlap, steps), draws, encode, around=around)
        return torch.cat(list(made.run()))[around.lead : around.lead + num_frames]

    assert torch.equal(refined(source, 0).roll(by, 0), refined(source.roll(by, 0), by))


@given(st.integers(2, 24), st.data())
def test_of_two_windows_each_frame_is_heard_once_and_the_seam_moves(size: int, data: st.DataObject) -> None:
    shown = data.draw(st.integers(0, size - 1))
    frames, timesteps = data.draw(st.integers(size + 1, 2 * size)), list(range(990, 0, -10))
    latents = torch.arange(1, frames + 1, dtype=torch.float32).view(1, 1, -1, 1, 1)
    made = side_by_side(lambda x, t, rows: x, lambda x, t, rows: -x, size, shown, timesteps)
    seams = set[int]()
    for timestep in timesteps:
        heard = made(latents, timestep, BOTH).flatten()
        assert heard.abs().tolist() == list(range(1, frames + 1))  # each in its place
        seam = int((heard > 0).sum())
        assert max(shown, frames - size) <= seam <= size
        assert (heard[:seam] > 0).all()
        seams.add(seam)
    assert len(seams) == size - max(shown, frames - size) + 1
