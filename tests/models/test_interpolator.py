"""The network between two frames: its published layout, shapes, and that it can learn motion."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamt2v.errors import ConfigError
from streamt2v.models.interpolator import Interpolator, InterpolatorConfig, guess, merge, warp
from streamt2v.weights.published import IFNET

SMALL = InterpolatorConfig(widths=(16, 8), layers=1, head_width=4, head_channels=2, features=2)
GUESSING = replace(SMALL, rounds=(2, 2, 0), sight=600)


def test_the_published_sizes() -> None:
    """RIFE 4.26: 22.7 MB in 32 bit."""
    with torch.device("meta"):
        state = Interpolator(InterpolatorConfig()).state_dict()
    assert sum(value.numel() for value in state.values()) == 5_664_776
    inputs = [tuple(state[f"blocks.{index}.conv0.0.0.weight"].shape[:2]) for index in range(5)]
    assert inputs == [(96, 15), (64, 28), (48, 28), (32, 28), (16, 28)]
    assert state["blocks.4.lastconv.0.weight"].shape == (32, 52, 4, 4)
    assert state["encode.cnn3.weight"].shape == (16, 4, 4, 4)


@pytest.mark.parametrize("authors", [False, True])
def test_both_published_namings_are_known_key_by_key(authors: bool) -> None:
    (part,) = IFNET.parts.values()
    with torch.device("meta"):
        state = Interpolator(InterpolatorConfig()).state_dict()
    named = {f"module.{key.replace('blocks.', 'block')}" if authors else key: value for key, value in state.items()}
    named |= {"module.caltime.0.weight": torch.empty(1)} if authors else {}
    found = part.keys.apply(named, {key: tuple(value.shape) for key, value in state.items()})
    assert found.keys() == state.keys()


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 2), st.sampled_from([SMALL, GUESSING]))
def test_any_size_comes_back(height: int, width: int, batch: int, config: InterpolatorConfig) -> None:
    torch.manual_seed(0)
    first, second = torch.rand(2, batch, 3, height, width)
    with torch.inference_mode():
        found = Interpolator(config)(first, second, 0.3)
    assert found.shape == first.shape
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


@given(st.integers(-3, 3), st.integers(-3, 3))
def test_a_whole_flow_moves_pixels(x: int, y: int) -> None:
    image = torch.arange(120.0).view(1, 1, 10, 12)
    flow = torch.tensor([float(x), float(y)]).view(1, 2, 1, 1).expand(1, 2, 10, 12)
    found = warp(image, flow)
    rows, columns = (torch.arange(10) + y).clamp(0, 9), (torch.arange(12) + x).clamp(0, 11)
    assert torch.allclose(found[0, 0], image[0, 0][rows][:, columns], atol=1e-3)


@settings(deadline=None, max_examples=10)
@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_the_motion_of_a_texture_is_guessed(x: int, y: int, seed: int, time: float) -> None:
    """Of two windows over one texture, wherever between them it is looked for."""
    coarse = torch.rand(1, 3, 12, 14, generator=torch.Generator().manual_seed(seed))
    texture = F.interpolate(coarse, scale_factor=8, mode="bicubic", align_corners=False)
    pair = [texture[..., 8 - way * y :, 8 - way * x :][..., :64, :80] for way in (0, 1)]
    inside = guess(pair, time, (3, 3, 3))[..., 16:-16, 16:-16]
    assert torch.allclose(inside.mean((0, 2, 3)), torch.tensor([x, y]).float(), atol=0.1)
    assert float(inside.std(dim=(2, 3)).max()) < 0.3


def test_where_nothing_is_seen_nothing_moves() -> None:
    pair = [torch.full((1, 3, 16, 24), level) for level in (0.2, 0.9)]
    assert not guess(pair, 0.5, (2, 2)).any()


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 10**6))
def test_large_frames_are_seen_smaller(height: int, width: int, sight: int) -> None:
    reduced = replace(SMALL, sight=sight).reduced(height, width)
    assert reduced == 1 if not sight else reduced >= 1
    if reduced > 1:
        assert height * width / (reduced + 0.5) ** 2 <= sight <= height * width / (reduced - 0.5) ** 2


@pytest.mark.parametrize(("rounds", "most"), [((), 1.0), ((3, 3, 3), 0.1)])
def test_blocks_correct_the_guess_or_begin_with_the_mean(rounds: tuple[int, ...], most: float) -> None:
    """Of blocks that say nothing: half of both frames, along the guess if there is one, at a smaller size too."""
    network = Interpolator(replace(GUESSING, rounds=rounds))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lastconv" in name:
                parameter.zero_()
    coarse = torch.rand(1, 3, 12, 14, generator=torch.Generator().manual_seed(0))
    texture = F.interpolate(coarse, scale_factor=8, mode="bicubic", align_corners=False)
    first, middle, second = (texture[..., 8:88, at : at + 100] for at in (2, 6, 10))
    with torch.inference_mode():
        errors = [network(first, second, 0.5) - middle, (first + second) / 2 - middle]
    made, mean = (float(error[..., 16:-16, 16:-16].square().mean()) for error in errors)
    assert made <= most * mean * 1.001


def test_rows_have_times_of_their_own() -> None:
    torch.manual_seed(0)
    network, pair, times = Interpolator(GUESSING), torch.rand(2, 2, 3, 16, 24), (0.2, 0.7)
    with torch.inference_mode():
        *_, (warped, _, mask) = network.steps([*pair], torch.tensor(times).view(2, 1, 1, 1))
        for row, time in enumerate(times):
            alone = network(*pair[:, [row]], time)
            assert torch.allclose(merge(warped, mask)[[row]].clamp(0, 1), alone, atol=1e-5)


def test_it_learns_where_things_are_in_between() -> None:
    """A minute of nothing but a moving edge: half of blending's error is gone."""
    torch.manual_seed(0)
    network = Interpolator(SMALL)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    columns = torch.arange(32.0)

    def edges(place: Tensor) -> Tensor:
        return torch.sigmoid(columns - place[:, None])[:, None, None].expand(-1, 3, 16, -1).contiguous()

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        place, move = torch.rand(2, 8, generator=generator) * torch.tensor([[16.0], [6.0]])
        return edges(8 + place - move), edges(8 + place + move), edges(8 + place)

    draws = torch.Generator().manual_seed(1)
    for _ in range(150):
        first, second, middle = sample(draws)
        loss = (network(first, second, 0.5) - middle).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first, second, middle = sample(torch.Generator().manual_seed(2))
    with torch.inference_mode():
        error = float((network(first, second, 0.5) - middle).abs().mean())
    assert error < 0.5 * float(((first + second) / 2 - middle).abs().mean())


def test_impossible_sizes_are_refused() -> None:
    for widths in ((), (5,)):
        with pytest.raises(ConfigError, match="widths"):
            InterpolatorConfig(widths=widths)
    with pytest.raises(ConfigError, match="rounds"):
        InterpolatorConfig(rounds=(1, -1))
