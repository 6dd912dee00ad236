"""Triplets for the interpolator: the truth lies where the flow says, and the loss tells better from worse."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from streamt2v.models.interpolator import warp
from streamt2v.training import interpolation, photographs
from streamt2v.training.interpolation import Triplets, TripletSource
from streamt2v.training.photographs import Film
from streamt2v.training.restorer import Films

PATCH = 32


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PATCH": PATCH, "FASTEST": 12, "FURTHEST": 5}.items():
        monkeypatch.setattr(interpolation, name, value)


def film(at: int) -> Film:
    """Noise that stands still; no two films are alike."""
    one = np.random.default_rng(at).integers(0, 256, (1, 70, 80, 3), np.uint8)
    truth = np.repeat(one, photographs.CLIP_FRAMES, axis=0)
    return Film(truth, False)


def drawn(folder: Path, monkeypatch: pytest.MonkeyPatch, still: float, passing: float) -> Triplets:
    monkeypatch.setattr(interpolation, "STILL", still)
    monkeypatch.setattr(interpolation, "PASSING", passing)
    return TripletSource(Films(folder, film, 4), torch.Generator().manual_seed(5)).draw(16)


def wrong(triplets: Triplets, other: Tensor, flow: Tensor) -> Tensor:
    """Return the share of pixels that the flow takes from elsewhere, of those that are inside both frames: [B]."""
    levels = (warp(other, flow) - triplets.middle).abs().amax(1) > 0.02
    rows, columns = torch.meshgrid(torch.arange(PATCH), torch.arange(PATCH), indexing="ij")
    at = torch.stack([columns, rows]) + flow
    inside = ((at >= 0) & (at <= PATCH - 1)).all(1)
    return (levels & inside).flatten(1).sum(1) / inside.flatten(1).sum(1)


@pytest.mark.parametrize(("passing", "most"), [(0.0, 0.0), (1.0, 0.35)])
def test_a_known_flow_leads_to_the_same_place(
    passing: float, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everywhere; where something is in front, but for what it covers and its soft outline."""
    triplets = drawn(tmp_path, monkeypatch, 1.0, passing)
    assert triplets.known.all()
    assert triplets.first.shape == (16, 3, PATCH, PATCH) and triplets.flow.shape == (16, 4, PATCH, PATCH)
    for other, flow in ((triplets.first, triplets.flow[:, :2]), (triplets.second, triplets.flow[:, 2:])):
        assert float(wrong(triplets, other, flow).median()) <= most
    apart = (triplets.flow[:, 2:] - triplets.flow[:, :2]).abs()
    assert 0 < float(apart.max()) <= 12 + 3  # whole pixels a frame
    assert torch.allclose(
        triplets.flow[:, :2], triplets.time * (triplets.flow[:, :2] - triplets.flow[:, 2:]), atol=1e-4
    )


def test_what_is_filmed_has_no_known_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triplets = drawn(tmp_path, monkeypatch, 0.0, 0.5)
    assert not triplets.known.any() and not triplets.flow.any()
    assert 0 < float(triplets.time.min()) < float(triplets.time.max()) < 1
    assert len({float(row.sum()) for row in triplets.middle}) == 16


class Told:
    """Stands in for a network: what it makes, and by which flow, is known."""

    def __init__(self, made: Tensor, flow: Tensor) -> None:
        self.made, self.flow = made, flow

    def steps(self, pair: Sequence[Tensor], time: Tensor) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
        yield from [([self.made, self.made], self.flow, torch.zeros_like(self.made[:, :1]))] * len(interpolation.STEPS)


def test_the_loss_falls_with_either_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triplets = drawn(tmp_path, monkeypatch, 0.5, 0.5)
    assert 0 < int(triplets.known.sum()) < 16

    def loss(part: float, missed: float) -> float:
        told = Told(triplets.middle + 0.4 * part, triplets.flow + missed)
        return float(interpolation.interpolation_loss(told, triplets))  # type: ignore[arg-type]

    assert loss(0.0, 0.0) < loss(0.1, 0.0) < loss(0.5, 0.0)
    assert loss(0.5, 0.0) < loss(0.5, 0.3) < loss(0.5, 3.0)
    # Ten times less error is worth as much everywhere.
    assert loss(0.5, 1) - loss(0.05, 1) == pytest.approx(sum(interpolation.STEPS) * np.log(10), rel=0.1)
