"""Replacement: known frames take the place of the network's estimates of them, at every step."""

from bisect import bisect
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Held:
    """Frames of a chunk that are known: their places in it, in order, and their clean latents [B, C, n, h, w]."""

    places: tuple[int, ...]
    latents: Tensor


def put_in_place(clean: Tensor, held: Held, carry: float = 0.0, lead: bool = False) -> Tensor:
    """Return estimates of x_0 with the held frames in place, and that change carried on to the frames beside them.

    The change of a held frame, d = known - clean, tells where the network would jump. A new frame at distance k from
    the last held one before it gets carry^k d on top: a cheap stand-in for reconstruction guidance, which needs the
    network's gradient. What comes later has to be met, so the whole way leads there: n frames after the last held one,
    and k before the next, a new frame gets n / (n + k) of the next one's d.

    Args:
        clean: estimates [B, C, F, h, w].
        held: 1 to F of these frames.
        carry: 0 (held frames only) to 1 (all frames after a held one move as it does).
        lead: whether new frames lead to the next held one; before the first, the way counts from frame -1.

    Source: arXiv 2204.03458 section 3.1: the replacement method, and reconstruction guidance. To lead is our own idea.
    """
    places, known, placed = held.places, held.latents.to(clean), clean.clone()

    def change(index: int) -> Tensor:
        return known[:, :, index] - clean[:, :, places[index]]

    for frame in range(clean.shape[2]):  # one by one: a list of places would be copied to the device
        after = bisect(places, frame)
        last = places[after - 1] if after else -1
        if frame == last:
            placed[:, :, frame] = known[:, :, after - 1]
            continue
        if carry and after:
            placed[:, :, frame] += carry ** (frame - last) * change(after - 1)
        if lead and after < len(places):
            placed[:, :, frame] += (frame - last) / (places[after] - last) * change(after)
    return placed
