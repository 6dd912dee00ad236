"""Stage 1 from a prior: a text becomes the embedding of a picture, which the picture-to-video network starts from."""

import torch
from torch import Tensor

from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.models.prior import EmbeddingPrior
from streamt2v.stages.denoise import ChunkNoise, Sampling, denoise


@torch.inference_mode()
def embeddings(
    network: EmbeddingPrior, schedule: NoiseSchedule, pooled: Tensor, sampling: Sampling, noise: ChunkNoise
) -> Tensor:
    """Draw the embeddings [N, D] of pictures that N texts may describe, as latents of one cell are sampled.

    Args:
        network: the prior.
        schedule: its noise levels.
        pooled: the texts [2, N, P]: what guidance leads away from, and what to show.
        sampling: steps and guidance.
        noise: [1, D, N, 1, 1] and the same for every step.
    """

    def predict(latents: Tensor, timestep: int, rows: slice) -> Tensor:
        noisy = latents[..., 0, 0].transpose(1, 2)  # [B, N, D]
        clean: Tensor = network(noisy.flatten(0, 1), timestep, pooled[rows].flatten(0, 1))
        return clean.view_as(noisy).transpose(1, 2)[..., None, None]

    return denoise(predict, schedule, noise, sampling)[0, :, :, 0, 0].T
