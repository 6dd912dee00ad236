"""The prior: embeddings drawn for several texts at once are those of each, and what the network knows comes out."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.errors import WeightsError
from streamt2v.models.prior import EmbeddingPrior, PriorConfig
from streamt2v.stages.denoise import ChunkNoise, Sampling
from streamt2v.stages.prior import embeddings
from streamt2v.training.prior import PRIOR_SCHEDULE
from streamt2v.weights import networks, read_header

SIZES = PriorConfig(text_dim=5, image_dim=7, width=16, depth=2)
SCHEDULE = NoiseSchedule(PRIOR_SCHEDULE)


def noise_of(count: int) -> ChunkNoise:
    def draw(seed: int) -> Tensor:
        return torch.randn(1, 7, 4, 1, 1, generator=torch.Generator().manual_seed(seed))[:, :, :count]

    return ChunkNoise(draw(0), lambda step: draw(step + 1))


@pytest.fixture
def network() -> EmbeddingPrior:
    torch.manual_seed(0)
    return EmbeddingPrior(SIZES).eval()


def test_the_demos_prior_is_small() -> None:
    assert 500_000 < sum(values.numel() for values in EmbeddingPrior(PriorConfig()).parameters()) < 1_000_000


def test_a_text_is_drawn_alike_alone_and_beside_others(network: EmbeddingPrior) -> None:
    pooled, sampling = torch.randn(2, 4, 5), Sampling(3, 2.0, eta=1.0)
    together = embeddings(network, SCHEDULE, pooled, sampling, noise_of(4))
    assert together.shape == (4, 7)
    torch.testing.assert_close(embeddings(network, SCHEDULE, pooled[:, :1], sampling, noise_of(1)), together[:1])
    split = embeddings(network, SCHEDULE, pooled, Sampling(3, 2.0, eta=1.0, batched=False), noise_of(4))
    torch.testing.assert_close(split, together)
    other = embeddings(network, SCHEDULE, pooled.flip(1), sampling, noise_of(4))
    assert (other - together).abs().amax(1).min() > 1e-3  # every text counts


@pytest.mark.parametrize("steps", [1, 2, 12, 50])
def test_what_the_network_is_sure_of_comes_out_and_guidance_leads_away_from_the_other_text(steps: int) -> None:
    def sure(noisy: Tensor, timestep: int, pooled: Tensor) -> Tensor:
        assert noisy.shape[1] == 7
        return pooled.repeat(1, 2)[:, :7]

    pooled = torch.randn(2, 3, 5)
    away, towards = pooled.repeat(1, 1, 2)[..., :7]
    for scale in (1.0, 1.5):
        made = embeddings(sure, SCHEDULE, pooled, Sampling(steps, scale, eta=1.0), noise_of(3))  # type: ignore[arg-type]
        torch.testing.assert_close(made, away + scale * (towards - away), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_its_file_holds_sizes_and_schedule(network: EmbeddingPrior, tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    networks.save_module(path, network, asdict(PRIOR_SCHEDULE))
    loaded = networks.load_module(path, "cpu", torch.float32)
    noisy, pooled, at = torch.randn(3, 7), torch.randn(3, 5), torch.tensor([0, 400, 999])
    found = network(noisy, at, pooled)
    assert found.shape == noisy.shape
    torch.testing.assert_close(loaded(noisy, at, pooled), found, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(network(noisy[2:], 999, pooled[2:]), found[2:])
    assert (network(noisy, 999, pooled) - found).abs()[:2].max() > 1e-4  # it sees the time
    assert read_header(path)[1:] == (asdict(SIZES), asdict(PRIOR_SCHEDULE))
    with pytest.raises(WeightsError, match="does not describe"):
        networks.build(path, "EmbeddingPrior", {"breadth": 3})
