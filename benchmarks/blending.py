"""The refiner without randomized blending, in the two ways that arXiv 2403.14773 compares it with.

In both, every chunk is refined alone, and a frame is taken from the chunk that adds it. Chunks with shared noise draw
the same noise for the frames they have in common; independent ones do not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor

from streamt2v.chunks import Chunk
from streamt2v.diffusion.noise import Address, Draws
from streamt2v.stages.refine import Refiner

WAYS = ("randomized", "shared", "independent")


@dataclass(frozen=True)
class _OfChunk:
    """The draws of one chunk, whose frames are counted from 0."""

    draws: Draws
    chunk: Chunk
    shared: bool

    def normal(self, purpose: str, address: Address, shape: Sequence[int]) -> Tensor:
        """Return unit normals: those of the video's frame, or of this chunk's frame alone."""
        frame, *step = address
        place = (self.chunk.start + frame,) if self.shared else (-1, self.chunk.index, frame)
        return self.draws.normal(purpose, (*place, *step), shape)


@contextmanager
def blended(way: str) -> Iterator[None]:
    """Let every refiner work in one of `WAYS` inside the block. Runs cannot be resumed in the last two."""
    together = Refiner.run

    def apart(refiner: Refiner) -> Iterator[Tensor]:
        clean = torch.empty(0)
        for chunk in refiner.plan:
            known = clean[len(clean) - (chunk.new_start - chunk.start) :]
            clean = torch.stack([*known, *map(refiner.encode, range(chunk.new_start, chunk.stop))])
            text = refiner.denoiser.text(chunk)
            alone = Refiner(
                replace(refiner.denoiser, text=lambda _, text=text: text),
                [Chunk(0, 0, chunk.size, 0)],
                refiner.settings,
                _OfChunk(refiner.draws, chunk, way == "shared"),
                clean.__getitem__,
            )
            refined = torch.cat(list(together(alone)))[chunk.new_start - chunk.start :]
            refiner.state.finished = chunk.stop
            yield refined

    with patch.object(Refiner, "run", together if way == "randomized" else apart):
        yield
