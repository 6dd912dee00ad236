"""The prior's noise schedule, its loss, its score: from captions to the embeddings of frames that they describe."""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.models.encoders import embed_image
from streamt2v.models.prior import EmbeddingPrior, PriorConfig
from streamt2v.stages import prior
from streamt2v.stages.denoise import ChunkNoise, Sampling
from streamt2v.training import bundle
from streamt2v.training.batches import Ring, Rows
from streamt2v.training.denoisers import TextSource
from streamt2v.training.engine import Job
from streamt2v.training.losses import DEMO_SCHEDULE, draw_timesteps
from streamt2v.training.world.captions import canonical, compose
from streamt2v.training.world.drawing import render
from streamt2v.training.world.encoders import attribute_codes, build_vision, nearest_codes
from streamt2v.training.world.scenes import sample_scenes
from streamt2v.weights import save_module

if TYPE_CHECKING:
    from streamt2v.training.parts import Workshop

PRIOR_SCHEDULE = replace(DEMO_SCHEDULE, kind="squared_cosine", prediction="sample")
DROPPED = 0.1  # captions replaced by the empty one


def prior_loss(network: EmbeddingPrior, embeddings: Tensor, pooled: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean squared error of clean embeddings [B, D], estimated from noisy ones and pooled texts [B, P]."""
    timesteps = draw_timesteps(len(embeddings), generator).to(embeddings.device)
    noise = torch.randn(embeddings.shape, generator=generator).to(embeddings)
    noisy = NoiseSchedule(PRIOR_SCHEDULE).add_noise(embeddings, noise, timesteps)
    return functional.mse_loss(network(noisy, timesteps, pooled), embeddings)


def _pooled(text: TextSource, captions: list[str]) -> Tensor:
    pooled = text.encode(captions).pooled
    assert pooled is not None  # both encoders have a projection
    return pooled


@torch.no_grad()
def recovered(network: EmbeddingPrior, text: TextSource, count: int = 128) -> dict[str, float]:
    """Share of attributes that drawn embeddings show as their captions ask, for those that one frame shows.

    Sampled as the demo does it: 12 steps, guidance 2.
    """
    generator = torch.Generator().manual_seed(78)
    labels = sample_scenes(count, generator).labels()
    captions = [[""] * count, [canonical(row) for row in labels.tolist()]]
    device, shape = network.head.weight.device, (1, network.config.image_dim, count, 1, 1)

    def drawn(step: int = 0) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    sampling = Sampling(num_inference_steps=12, guidance_scale=2.0, eta=1.0)
    pooled = torch.stack([_pooled(text, each) for each in captions])
    made = prior.embeddings(network, NoiseSchedule(PRIOR_SCHEDULE), pooled, sampling, ChunkNoise(drawn(), drawn))
    return nearest_codes(made, labels, attribute_codes().to(device))


def prior_job(shop: Workshop) -> Job:
    """The prior, on frames of the drawn world; it needs both encoders."""
    network = shop.resumed("prior", EmbeddingPrior(PriorConfig()))
    text, vision = shop.text(), shop.frozen("vision", build_vision())
    batch = shop.many(128)

    @torch.no_grad()
    def pictured(count: int) -> Rows:
        scenes = sample_scenes(count, shop.generator).to(shop.device)
        pixels = render(scenes, torch.randint(0, 400, (count, 1), generator=shop.generator))[:, 0]
        return {"embeddings": embed_image(vision, pixels), "labels": scenes.labels()}

    pictures = Ring(pictured, 60_000, max(2, int(2048 * shop.first)), shop.generator, device=shop.device)

    def loss(progress: float) -> Tensor:
        rows = pictures.draw(batch, fresh=batch / 8)
        captions = [compose(labels, shop.generator) for labels in rows["labels"].tolist()]
        dropped = torch.rand(batch, generator=shop.generator) < DROPPED
        captions = ["" if drop else said for drop, said in zip(dropped.tolist(), captions, strict=True)]
        return prior_loss(network, rows["embeddings"], _pooled(text, captions), shop.generator)

    return Job(
        loss,
        list(network.parameters()),
        lambda folder: save_module(folder / "prior.safetensors", network, asdict(PRIOR_SCHEDULE)),
        lambda folder: f"recovered {recovered(network, text)}",
        adam=bundle.parameters_in(network, "embed.", "head.", "time."),
        learning_rate=2e-3,
        average=0.999,
        samples=batch,
        device=shop.device,
    )
