"""Addressed randomness: every draw is a function of (seed, purpose, address), never of what was drawn before.

Resume, chunk order, batching and the number of workers can therefore not change a pixel, and overlapping chunks
share noise because they share frames. Draws are made on the CPU in float32, so that they do not depend on the device.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Address = tuple[int, ...]
"""Integers such as (frame, step) or (chunk, step)."""


class Draws(Protocol):
    """Where a stage takes its random numbers from; a test may inject recorded ones."""

    def normal(self, purpose: str, address: Address, shape: Sequence[int]) -> Tensor:
        """Return unit normals of `shape`, float32 on the CPU."""

    def uniform(self, purpose: str, address: Address, shape: Sequence[int]) -> Tensor:
        """Return uniform numbers from [0, 1) of `shape`, float32 on the CPU."""

    def integer(self, purpose: str, address: Address, low: int, high: int) -> int:
        """Return a uniform integer from the closed range [low, high]."""


@dataclass(frozen=True)
class SeededDraws:
    """The addressed draws of one run: equal addresses give equal numbers, whatever was asked before."""

    seed: int

    def generator(self, purpose: str, address: Address = ()) -> torch.Generator:
        """Return a fresh generator for third-party code, which draws from it in its own order."""
        text = "/".join((str(self.seed), purpose, *map(str, address)))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        # 63 bits: the seed must fit the signed range.
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def normal(self, purpose: str, address: Address, shape: Sequence[int]) -> Tensor:
        """Return unit normals of `shape`, float32 on the CPU."""
        return torch.randn(tuple(shape), generator=self.generator(purpose, address))

    def uniform(self, purpose: str, address: Address, shape: Sequence[int]) -> Tensor:
        """Return uniform numbers from [0, 1) of `shape`, float32 on the CPU."""
        return torch.rand(tuple(shape), generator=self.generator(purpose, address))

    def integer(self, purpose: str, address: Address, low: int, high: int) -> int:
        """Return a uniform integer from the closed range [low, high]."""
        return int(torch.randint(low, high + 1, (1,), generator=self.generator(purpose, address)))


def per_frame(draws: Draws, purpose: str, frames: Iterable[int], shape: Sequence[int], *address: int) -> Tensor:
    """Draw one tensor of `shape` for each frame f, addressed (f, *address), and stack them: [F, *shape]."""
    return torch.stack([draws.normal(purpose, (frame, *address), shape) for frame in frames])
