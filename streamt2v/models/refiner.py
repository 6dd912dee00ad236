"""The refinement stage's denoiser: the video UNet without CAM and APM, and the canvas sizes it accepts."""

from streamt2v.models.unet3d import UNet3DConfig


def legal_canvas(height: int, width: int, config: UNet3DConfig, latent_factor: int = 8) -> tuple[int, int]:
    """Return the smallest canvas (H, W) in pixels, at least height x width, that VAE and refiner accept.

    The published refiner wants H = 16 (mod 64) and W = 0 (mod 64).
    """
    period = latent_factor * 2 ** (len(config.block_out_channels) - 1)
    heights = [h for h in range(height, height + period) if h % latent_factor == 0]
    widths = [w for w in range(width, width + period) if w % latent_factor == 0]
    return next((h, w) for h in heights for w in widths if config.accepts(h // latent_factor, w // latent_factor))
