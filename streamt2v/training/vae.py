"""Training of the demo's VAE: AutoencoderKL, 8x smaller each way, four channels, whitened latents."""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from streamt2v.training.world import Scenes, render, sample_scenes, subject_mask

WIDTHS = (16, 32, 64, 64)


def build_vae() -> Any:
    """A fresh VAE whose residual branches start at zero and whose posterior starts narrow.

    Two norm groups: eight of two channels each would remove contrast.
    """
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS,
        norm_num_groups=2,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        sample_size=128,
    )
    for module in vae.modules():
        if hasattr(module, "conv2") and hasattr(module, "conv_shortcut"):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -5.0
    return vae.to(memory_format=torch.channels_last)


def training_frames(scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames [B, 3, 72, 128] and subject masks [B, 1, 72, 128]; a third are crops: magnified edges are seen too."""
    frames = torch.randint(0, 200, (len(scenes), 1), generator=generator)
    zoom = 1.0 if torch.rand((), generator=generator) < 0.67 else float(torch.rand((), generator=generator)) * 0.5 + 0.4
    left, top = (float(torch.rand((), generator=generator)) * (1 - zoom) for _ in range(2))
    pixels = render(scenes, frames, 72, 128, (left, top, left + zoom, top + zoom))[:, 0]
    mask = subject_mask(scenes, frames, 72, 128)[:, 0, None] if zoom == 1 else torch.zeros_like(pixels[:, :1])
    return pixels.contiguous(memory_format=torch.channels_last), mask


def vae_loss(vae: Any, pixels: Tensor, mask: Tensor, generator: torch.Generator, kl_weight: float = 2e-4) -> Tensor:
    """L1 + 2 MSE + 0.5 gradient L1, heavier on the subject, plus a small KL term; pixels [B, 3, H, W]."""
    posterior = vae.encode(pixels).latent_dist
    mean, log_variance = posterior.mean.float(), posterior.logvar.float().clamp(-12, 4)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    decoded = vae.decode(mean + (0.5 * log_variance).exp() * noise).sample.float()
    weight = 1 + 2 * mask
    error = decoded - pixels
    detail = sum((functional.l1_loss(decoded.diff(dim=d), pixels.diff(dim=d)) for d in (2, 3)), torch.zeros(()))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return (weight * (error.abs() + 2 * error.square())).mean() + 0.5 * detail + kl_weight * kl


@torch.no_grad()
def whiten(vae: Any, pixels: Tensor) -> None:
    """Fold per-channel mean and spread of the latents of `pixels` into quant_conv and post_quant_conv, in place."""
    mean = vae.encode(pixels).latent_dist.mean
    centre, spread = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    channels = mean.shape[1]
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= spread[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - centre) / spread
    quant.bias[channels:] -= 2 * spread.log()
    post.bias += post.weight[:, :, 0, 0] @ centre
    post.weight *= spread[None, :, None, None]


@torch.no_grad()
def psnr(vae: Any, pixels: Tensor) -> float:
    """Mean round-trip PSNR in dB over frames [B, 3, H, W]."""
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    error = (decoded - pixels).square().mean((1, 2, 3)) / 4
    return float((-10 * error.log10()).mean())


def held_out(count: int = 32, seed: int = 999) -> Tensor:
    """Frames [count, 3, 72, 128] that no training seed draws."""
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(count, generator)
    return render(scenes, torch.randint(0, 200, (count, 1), generator=generator))[:, 0].contiguous(
        memory_format=torch.channels_last
    )
