"""What a denoiser is trained on, wherever it comes from: the trainer knows batches, not the world that draws them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamt2v import files

Rows = dict[str, Tensor]
"""Columns of a table: tensors with one row an example."""


@dataclass(frozen=True)
class Batch:
    """Encoded clips and what is known of them.

    Shapes: B clips of F frames; C channels of h x w latent cells; Fc conditioning frames of H x W pixels in [-1, 1].
    """

    latents: Tensor  # [B, C, F, h, w]
    captions: list[str]
    mask: Tensor  # [B, F, h, w] in [0, 1]: where errors count more
    shown: Tensor | None = None  # [B, Fc, 3, H, W]: the first frames, as CAM will meet them
    anchors: Tensor | None = None  # [B, 3, H, W]: a frame of the past
    own: Tensor | None = None  # [B, C, F, h, w]: what the network itself made of the clips
    pairs: Tensor | None = None  # rows [P, 2] of clips that differ in the motion and its word only

    def __len__(self) -> int:
        return len(self.captions)

    def columns(self) -> Rows:
        """The tensors that hold a row for each clip, by name."""
        columns = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        columns.pop("pairs", None)
        return columns

    def take(self, rows: list[int]) -> Batch:
        """Some of the clips; pairs are forgotten."""
        captions = [self.captions[row] for row in rows]
        return Batch(captions=captions, **{name: column[rows] for name, column in self.columns().items()})


def join(first: Batch, second: Batch) -> Batch:
    """Concatenate two batches of one kind; pairs are forgotten."""
    columns = {name: torch.cat([column, second.columns()[name]]) for name, column in first.columns().items()}
    return Batch(captions=first.captions + second.captions, **columns)


class Ring:
    """A table of examples that are expensive to make: it grows to its capacity, then the oldest give way.

    Args:
        make: makes about as many new rows as asked for, as columns.
        capacity: rows kept.
        first: rows made before the first draw.
        generator: decides which rows are drawn.
        path: where the table lies between runs; None keeps it in memory only.
        device: where rows are made and kept, also those of earlier runs elsewhere.
    """

    def __init__(
        self,
        make: Callable[[int], Rows],
        capacity: int,
        first: int,
        generator: torch.Generator,
        path: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.make, self.capacity, self.first, self.generator, self.path = make, capacity, first, generator, path
        self.device = torch.device(device)
        kept = {} if path is None or not path.is_file() else torch.load(path, weights_only=True, map_location="cpu")
        self.rows: Rows = {name: column.to(self.device) for name, column in kept.items()}
        self.oldest, self.owed = 0, 0.0

    def __len__(self) -> int:
        return len(next(iter(self.rows.values()))) if self.rows else 0

    def draw(self, count: int, fresh: float, at_once: int = 16) -> Rows:
        """Draw rows; `fresh` new ones are made for every draw on average, `at_once` at a time."""
        self.owed += fresh
        while len(self) < self.first or self.owed >= at_once:
            self.owed = max(0.0, self.owed - at_once)
            # Examples are made in 32 bit and kept as float16; training computes in bfloat16.
            with torch.autocast(self.device.type, enabled=False):
                self.add(self.make(at_once))
        index = torch.randint(len(self), (count,), generator=self.generator)
        return {name: column[index.to(column.device)] for name, column in self.rows.items()}

    def add(self, new: Rows) -> None:
        """Append rows, or put them where the oldest are."""
        count, room = len(next(iter(new.values()))), self.capacity - len(self)
        if room > 0:
            self.rows = {k: torch.cat([self.rows[k], v[:room]]) if self.rows else v[:room] for k, v in new.items()}
        if count > room:
            index = (self.oldest + torch.arange(count - max(room, 0))) % self.capacity
            for name, column in new.items():
                self.rows[name][index.to(column.device)] = column[max(room, 0) :]
            self.oldest = (self.oldest + len(index)) % self.capacity

    def save(self) -> None:
        """Write the table for a later run."""
        if self.path is not None and self.rows:
            files.make_directory(self.path.parent)
            with files.replacing(self.path) as part:
                torch.save(self.rows, part)
