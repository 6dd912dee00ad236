"""Replacement: known frames take the place of the network's estimates of them, at every step."""

import torch
from torch import Tensor


def put_in_place(clean: Tensor, known: Tensor, carry: float = 0.0) -> Tensor:
    """Return estimates of x_0 with the known frames in place, and that change carried on to the frames after them.

    The change of the last known frame, d = known[Fc-1] - clean[Fc-1], tells where the network would jump. Frame Fc-1+k
    gets carry^k d on top: a cheap stand-in for reconstruction guidance, which needs the network's gradient.

    Args:
        clean: estimates [B, C, F, h, w].
        known: clean latents [B, C, Fc, h, w] of the first Fc frames, 1 <= Fc <= F.
        carry: 0 (known frames only) to 1 (all frames move as the last known one does).

    Source: arXiv 2204.03458 section 3.1: the replacement method, and reconstruction guidance.
    """
    count = known.shape[2]
    new = clean[:, :, count:]
    if carry:
        weights = carry ** torch.arange(1, new.shape[2] + 1, device=clean.device).to(clean)
        change = known[:, :, -1:] - clean[:, :, count - 1 : count]
        new = new + weights[:, None, None] * change
    return torch.cat([known.to(clean), new], dim=2)
