"""Training of the demo's VAE: AutoencoderKL, 8x smaller each way, four channels, whitened latents."""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from streamt2v.training.world.drawing import render
from streamt2v.training.world.scenes import Scenes, sample_scenes, subject_mask

WIDTHS = (16, 32, 64, 128)


def build_vae() -> Any:
    """A fresh VAE whose residual branches start at zero and whose posterior is narrow.

    The lowest level is wide and has attention: there the decoder sees the whole picture and mends what is wrong with
    its latents. Two norm groups: eight of two channels each would remove contrast.
    """
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS,
        norm_num_groups=2,
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
    """Frames [B, 3, 72, 128] and subject masks [B, 1, 72, 128]; a quarter are crops: magnified edges are seen too."""
    frames = torch.randint(0, 400, (len(scenes), 1), generator=generator)
    zoom = 1.0 if torch.rand((), generator=generator) < 0.75 else float(torch.rand((), generator=generator)) * 0.5 + 0.4
    left, top = (float(torch.rand((), generator=generator)) * (1 - zoom) for _ in range(2))
    pixels = render(scenes, frames, 72, 128, (left, top, left + zoom, top + zoom))[:, 0]
    mask = subject_mask(scenes, frames, 72, 128)[:, 0, None] if zoom == 1 else torch.zeros_like(pixels[:, :1])
    return pixels.contiguous(memory_format=torch.channels_last), mask


_SMALLER = ((7, 12), (6, 11), (5, 9))


def altered(latents: Tensor, pixels: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """In half of the cases the latents are mirrored or made smaller, and pixels and mask with them.

    What the decoder makes of mirrored or smaller latents should be the mirrored or smaller picture: such a latent space
    is smoother and easier to draw in. Source: Kouzelis et al. 2025, arXiv 2502.09509 (equivariance regularisation).
    """
    kind = float(torch.rand((), generator=generator))
    if kind < 0.25:
        return latents.flip(-1), pixels.flip(-1), mask.flip(-1)
    if kind < 0.5:
        height, width = _SMALLER[int(torch.randint(len(_SMALLER), (), generator=generator))]
        latents = functional.interpolate(latents, (height, width), mode="bilinear", antialias=True)
        pixels, mask = (
            functional.interpolate(value, (8 * height, 8 * width), mode="bilinear", antialias=True)
            for value in (pixels, mask)
        )
    return latents, pixels, mask


def disturbed(latents: Tensor, generator: torch.Generator, most: float = 0.6) -> Tensor:
    """Latents (1 - s) z + s e, in three of five pictures with s up to `most`, e white or smooth over some cells.

    A decoder that draws the clean picture from disturbed latents also mends what a denoiser gets a little wrong, and
    the encoder learns to say things in more than one place. Source: Yang et al. 2025,
    arXiv 2507.15856 (latent denoising).

    Args:
        latents: [B, C, h, w] of unit variance.
        generator: of the noise.
        most: largest share of noise.
    """
    count = len(latents)
    share = most * (torch.rand(count, generator=generator) - 0.4).clamp(min=0) / 0.6
    white = torch.randn(latents.shape, generator=generator)
    coarse = torch.randn(*latents.shape[:2], *((n + 1) // 2 for n in latents.shape[2:]), generator=generator)
    smooth = functional.interpolate(coarse, latents.shape[2:], mode="bicubic")
    smooth = smooth / smooth.std()
    which = (torch.rand(count, 1, 1, 1, generator=generator) < 0.5).float()
    noise = (which * white + (1 - which) * smooth).to(latents)
    return torch.lerp(latents, noise, share.view(-1, 1, 1, 1).to(latents))


def vae_loss(vae: Any, pixels: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """The decoder's loss on whitened latents that were disturbed and altered; pixels [B, 3, H, W].

    Whitened over the batch, so that the encoder cannot outgrow the disturbance; a touch of the KL term's pull on the
    mean keeps the raw scale near one.
    """
    mean = vae.encode(pixels).latent_dist.mean.float()
    white = (mean - mean.mean((0, 2, 3), keepdim=True)) / (mean.std((0, 2, 3), keepdim=True) + 1e-4)
    latents, pixels, mask = altered(disturbed(white, generator), pixels, mask, generator)
    return picture_error(vae.decode(latents).sample.float(), pixels, mask) + 1e-4 * mean.square().mean()


def lightened(pixels: Tensor) -> Tensor:
    """Pictures in [-1, 1] with their darks drawn apart, 2 sqrt(p + 0.05) - 1 for p in [0, 1].

    Roofs before a night sky differ from it by 3 to 8 levels of 255: in plain levels they are not worth a codec's while.
    """
    return 2 * ((pixels + 1) / 2 + 0.05).clamp(min=1e-3).sqrt() - 1


def picture_error(decoded: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
    """L1 + 2 MSE + 0.5 gradient L1 of pictures [B, 3, H, W], heavier on the subject; mask [B, 1, h, w] of any size."""
    error = decoded - pixels
    weight = 1 + 2 * functional.interpolate(mask, pixels.shape[-2:], mode="bilinear")
    detail = torch.stack([functional.l1_loss(decoded.diff(dim=d), pixels.diff(dim=d)) for d in (2, 3)]).sum()
    return (weight * (error.abs() + 2 * error.square())).mean() + 0.5 * detail


@torch.no_grad()
def whiten(vae: Any, pixels: Tensor) -> None:
    """Fold per-channel mean and spread of the latents of `pixels` into quant_conv, in place.

    The decoder was trained on whitened latents and stays as it is.
    """
    mean = vae.encode(pixels).latent_dist.mean
    centre, spread = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    channels, quant = mean.shape[1], vae.quant_conv
    quant.weight[:channels] /= spread[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - centre) / spread


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
