"""The refinement stage's denoisers, the video UNet and the restoration network: canvases, and what they are told."""

from typing import Any

from streamt2v.models.restorer import Restorer, RestorerConfig
from streamt2v.models.unet3d import Conditioning, TextContext


def legal_canvas(height: int, width: int, config: Any, latent_factor: int = 8) -> tuple[int, int]:
    """Return the smallest canvas (H, W) in pixels, at least height x width, that VAE and refiner accept.

    The published refiner wants H = 16 (mod 64) and W = 0 (mod 64), the restoration network of pixels multiples of 16.
    """
    period = latent_factor * 2 ** max(3, len(config.block_out_channels) - 1)
    heights = [h for h in range(height, height + period) if h % latent_factor == 0]
    widths = [w for w in range(width, width + period) if w % latent_factor == 0]
    return next((h, w) for h in heights for w in widths if config.accepts(h // latent_factor, w // latent_factor))


def sees_source(config: Any) -> bool:
    """Tell whether a network of these sizes takes the source's latents beside the noisy ones."""
    return isinstance(config, RestorerConfig)


def prepare(network: Any, text: TextContext | None, scale: float) -> Conditioning:
    """Compute what a refiner needs that does not depend on timestep and frame.

    Args:
        network: a UNet, which reads the text, or a restoration network, which is told the scale.
        text: rows (negative, positive), None for a family whose refiner reads none.
        scale: how many times the source was enlarged, at least 1.
    """
    if isinstance(network, Restorer):
        return network.prepare(scale)
    prepared: Conditioning = network.prepare(text)
    return prepared
