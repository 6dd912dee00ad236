"""The prior: from a text to the embedding of a picture that it may describe, by denoising the embedding itself.

Source: arXiv 2204.06125 section 2.2 (DALL-E 2: a diffusion prior that predicts the clean embedding).
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return"

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamt2v.config import Table
from streamt2v.models.layers import TimestepEmbedding

WAVES = 64  # of a timestep


@dataclass(frozen=True)
class PriorConfig(Table):
    """Sizes of a prior; the defaults are those of the demo: 0.7 million parameters."""

    text_dim: int = 128
    """Features of the pooled text."""
    image_dim: int = 128
    """Features of an embedded picture."""
    width: int = 192
    depth: int = 4


class EmbeddingPrior(nn.Module):
    """Residual layers on a noisy embedding, which see text and time.

    Shapes: B batch, P features of the pooled text, D of an embedded picture.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.time = TimestepEmbedding(WAVES, width)
        self.embed = nn.Linear(config.image_dim + config.text_dim, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.depth + 1))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(config.depth)
        )
        self.head = nn.Linear(width, config.image_dim)

    def forward(self, noisy: Tensor, timestep: Tensor | float, pooled: Tensor) -> Tensor:
        """Predict the clean embedding.

        Args:
            noisy: embeddings [B, D] with noise, any precision: the network computes in its own.
            timestep: training index 0..999, one or one per row.
            pooled: texts [B, P].

        Returns:
            The estimate [B, D], in the precision of `noisy`.
        """
        kind = self.embed.weight.dtype
        times = timestep if isinstance(timestep, Tensor) else torch.full((1,), timestep, device=noisy.device)
        time = self.time(times.reshape(-1))
        x = self.embed(torch.cat([noisy.to(kind), pooled.to(kind)], dim=1))
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x) + time)
        return self.head(self.norms[-1](x)).to(noisy.dtype)
