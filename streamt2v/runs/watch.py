"""What a run tells while it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    pass


class Report(Protocol):
    """What the pipeline tells of its progress; a test or a caller may pass its own."""

    def start(self, stage: str, total_frames: int, done: int = 0) -> None:
        """A stage begins, or continues after `done` frames."""
        ...

    def advance(self, stage: str, done: int, chunk: int, num_chunks: int) -> None:
        """`done` frames of the stage exist, chunk number `chunk` (from 1) of `num_chunks` is finished."""
        ...

    def note(self, text: str, warning: bool = False) -> None:
        """Something worth a line when the user asked for details, or a warning for everybody."""
        ...
