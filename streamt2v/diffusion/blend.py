"""Randomized blending: which chunk's clean estimate a frame takes at one denoising step. Integers only.

Where chunk c shares O frames with the one before it, a cut q is drawn anew for every step: the first q shared frames
keep the earlier chunk, the others take chunk c (arXiv 2403.14773 section 4.3). Chunks are written in order, so where
more than two cover a frame the latest one whose cut lies before it owns it.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from streamt2v.chunks import Chunk

CutRange = Literal["published", "corrected"]

DrawCut = Callable[[int, int, int], int]
"""(low, high, chunk index) -> a uniform integer of the closed range, the same whenever it is asked within one step."""


def cut(plan: Sequence[Chunk], index: int, draw: DrawCut, cut_range: CutRange = "corrected") -> int:
    """Return how many of the frames that chunk `index` shares with the one before it keep the earlier chunk.

    Args:
        plan: chunks in order.
        index: which chunk; the first shares nothing, and nothing is drawn where nothing is shared.
        draw: source of the random cut.
        cut_range: the published code draws from 0..O-1, the paper from 0..O.
    """
    shared = max(plan[index - 1].stop - plan[index].start, 0) if index else 0
    if not shared:
        return 0
    return draw(0, shared - 1 if cut_range == "published" else shared, index)


def owned(plan: Sequence[Chunk], index: int, draw: DrawCut, cut_range: CutRange = "corrected") -> range:
    """Return the frames that chunk `index` owns at the step whose cuts `draw` yields; empty if later chunks take all.

    Over a plan these ranges cover every covered frame exactly once.
    """
    first, stop = plan[index].start + cut(plan, index, draw, cut_range), plan[index].stop
    later = index + 1
    while later < len(plan) and plan[later].start < plan[index].stop:
        stop = min(stop, plan[later].start + cut(plan, later, draw, cut_range))
        later += 1
    return range(first, max(first, stop))
