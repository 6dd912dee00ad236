"""The alternative that arXiv 2403.14773 compares CAM with: conditioning frames as channels beside the noisy latents.

The network is a copy of the base with twice the input channels. The streaming stage and its training see no difference:
what stands in for CAM hands on the latents of the conditioning frames, and the network puts them beside its input.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamt2v.models.apm import AppearanceTokens
from streamt2v.models.unet3d import Conditioning, TextContext, UNet3D
from streamt2v.stages.stream import StreamModels
from streamt2v.training import bundle, denoisers, parts
from streamt2v.training.engine import Job
from streamt2v.training.parts import Workshop
from streamt2v.training.world.clips import CLIP_FRAMES, encode
from streamt2v.training.world.encoders import DIM

SIZES = replace(denoisers.BASE, in_channels=8, cam=False)


def beside(conditioning: Tensor, latents: Tensor) -> Tensor:
    """Put conditioning latents [B or 1, C, Fc, h, w], then zeros, beside the channels of latents [B, C, F, h, w]."""
    padding = (0, 0, 0, 0, 0, latents.shape[2] - conditioning.shape[2])
    return torch.cat([latents, functional.pad(conditioning, padding).expand(len(latents), -1, -1, -1, -1)], dim=1)


class Latents:
    """Stands in for CAM: what it says of the conditioning frames are their latents."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def prepare(self, text: TextContext) -> Conditioning:
        """Look at no text."""
        return Conditioning(())

    def embed_frames(self, frames: Tensor) -> Tensor:
        """Encode conditioning frames [B, Fc, 3, H, W] in [-1, 1] as [B, C, Fc, h, w]."""
        return encode(self.vae, frames)

    def __call__(self, noisy: Tensor, timesteps: Tensor, text: Conditioning, embedded: Tensor) -> Tensor:
        """Return the latents as they are."""
        return embedded


class Beside:
    """Stands in for the denoiser in training: takes the latents where the denoiser takes CAM's features."""

    def __init__(self, unet: UNet3D) -> None:
        self.unet, self.prepare = unet, unet.prepare

    def __call__(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, latents: Tensor) -> Tensor:
        """Predict as the network does."""
        prediction: Tensor = self.unet(beside(latents, noisy), timesteps, conditioning)
        return prediction


def step(
    unet: UNet3D, cam: Any, latents: Tensor, timestep: Tensor, denoiser: Conditioning, seen: Any, embedded: Tensor,
    deep: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Stand in for `stream.network_step`."""
    return unet.run(beside(embedded, latents), timestep, denoiser, None, deep)


def concatenated(models: StreamModels, folder: Path) -> StreamModels:
    """Return the networks of the streaming stage with a denoiser from a folder, which `train.py concatenated` made."""
    unet = bundle.freeze(bundle.read(folder, "concatenated", UNet3D(SIZES)))
    cam: Any = Latents(models.vae)
    return replace(models, unet=unet, cam=cam, step=step)


def concatenated_job(shop: Workshop) -> Job:
    """A copy of the base that sees the conditioning frames' latents, all of it trained."""
    network = UNet3D(SIZES)
    if shop.resume is not None:
        bundle.read(shop.resume, "concatenated", network)
    else:
        network.load_state_dict(parts.widened(shop, SIZES.in_channels, parts.MERGERS))
    network.to(shop.device)
    lesson = shop.lesson()
    apm = (shop.frozen("apm", AppearanceTokens(DIM, 2 * DIM, denoisers.IMAGE_TOKENS, DIM)), lesson.vision)
    source, batch = shop.source(lesson.vae), shop.many(4)
    unet: Any = Beside(network)
    cam: Any = Latents(lesson.vae)
    return Job(
        lambda progress: denoisers.streaming_loss(unet, cam, apm, source.chunks(batch), lesson),
        list(network.parameters()),
        lambda folder: bundle.write(folder, "concatenated", network, denoiser=True),
        adam=bundle.parameters_in(network, "conv_in.weight", "conv_out.weight", "frame_codes", "apm.alpha"),
        quick=[network.conv_in.weight],
        learning_rate=1e-3,
        samples=batch * CLIP_FRAMES,
        device=shop.device,
        keep=source.save,
    )
