"""Replacement: known frames take the place of the network's estimates of them, at every step."""

from bisect import bisect
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Held:
    """Frames of a chunk that are known: their places in it, in order, and their clean latents [B, C, n, h, w]."""

    places: tuple[int, ...]
    latents: Tensor


def put_in_place(clean: Tensor, held: Held, carry: float = 0.0, carry_back: float = 0.0) -> Tensor:
    """Return estimates of x_0 with the held frames in place, and that change carried on to the frames beside them.

    The change of a held frame, d = known - clean, tells where the network would jump. A new frame at distance k from
    the last held one before it gets carry^k d on top, and carry_back^k d from the next held one after it: a cheap
    stand-in for reconstruction guidance, which needs the network's gradient.

    Args:
        clean: estimates [B, C, F, h, w].
        held: 1 to F of these frames.
        carry: 0 (held frames only) to 1 (all frames after a held one move as it does).
        carry_back: the same for the frames before a held one.

    Source: arXiv 2204.03458 section 3.1: the replacement method, and reconstruction guidance.
    """
    places, known, placed = held.places, held.latents.to(clean), clean.clone()
    for frame in range(clean.shape[2]):  # one by one: a list of places would be copied to the device
        after = bisect(places, frame)
        if frame in places:
            placed[:, :, frame] = known[:, :, after - 1]
            continue
        for index, share in ((after - 1, carry), (after, carry_back)):
            if share and 0 <= index < len(places):
                change = known[:, :, index] - clean[:, :, places[index]]
                placed[:, :, frame] += share ** abs(frame - places[index]) * change
    return placed
