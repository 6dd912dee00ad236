"""The network between two frames: its published layout, shapes, and that it can learn motion."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamt2v.errors import ConfigError
from streamt2v.models.interpolator import Interpolator, InterpolatorConfig, warp
from streamt2v.weights.published import IFNET

SMALL = InterpolatorConfig(widths=(16, 8), layers=1, head_width=4, head_channels=2, features=2)


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
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 2))
def test_any_size_comes_back(height: int, width: int, batch: int) -> None:
    torch.manual_seed(0)
    first, second = torch.rand(2, batch, 3, height, width)
    with torch.inference_mode():
        found = Interpolator(SMALL)(first, second, 0.3)
    assert found.shape == first.shape
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


@given(st.integers(-3, 3), st.integers(-3, 3))
def test_a_whole_flow_moves_pixels(x: int, y: int) -> None:
    image = torch.arange(120.0).view(1, 1, 10, 12)
    flow = torch.tensor([float(x), float(y)]).view(1, 2, 1, 1).expand(1, 2, 10, 12)
    found = warp(image, flow)
    rows, columns = (torch.arange(10) + y).clamp(0, 9), (torch.arange(12) + x).clamp(0, 11)
    assert torch.allclose(found[0, 0], image[0, 0][rows][:, columns], atol=1e-3)


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
