"""Classifier-free guidance: combine an unconditional and a conditional prediction."""

import torch
from torch import Tensor


def per_frame(first: float, last: float, frames: int) -> Tensor:
    """Return scales that grow linearly along a clip, [F, 1, 1]: the first frame, near its picture, needs less.

    Source: arXiv 2311.15127 section 4.3.
    """
    return torch.linspace(first, last, frames)[:, None, None]


def combine(unconditional: Tensor, conditional: Tensor, scale: float | Tensor, rescale: float = 0.0) -> Tensor:
    """Return u + scale (c - u), optionally with its standard deviation moved towards that of c.

    Args:
        unconditional: u [B, ...], noise, velocity or clean latents alike.
        conditional: c, same shape.
        scale: 1 is c itself; a tensor broadcasts, as that of `per_frame` does with clips [B, C, F, h, w].
        rescale: share r in [0, 1] of the correction: the result is multiplied by r std(c) / std(result) + 1 - r, with
            one standard deviation over all elements of a batch item.

    Source: arXiv 2207.12598 equation 6; rescaling arXiv 2305.08891 section 3.4.
    """
    guided = unconditional + scale * (conditional - unconditional)
    if not rescale:
        return guided
    # In float32: a sum of squares over a whole clip overflows half precision.
    wanted, found = (t.float().flatten(1).std(dim=1) for t in (conditional, guided))
    factor = rescale * wanted / (found + 1e-12) + (1 - rescale)
    return guided * factor.to(guided.dtype).view(-1, *[1] * (guided.ndim - 1))
