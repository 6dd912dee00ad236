"""What `--json` prints: one JSON object per line, as described by `event.schema.json` in the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from streamt2v.errors import explained

SCHEMA = "streamt2v.event/1"
"""New fields may appear under the same number; a changed field raises it."""

Event = dict[str, Any]
Tell = Callable[[Event], None]


def event(kind: str, **facts: Any) -> Event:
    """Make an event: start, progress, chunk, warning or result."""
    return {"schema": SCHEMA, "type": kind, **facts}


def failed(error: BaseException) -> Event:
    """Return the fields of a failed result."""
    known = explained(error)
    said = {"code": known.code, "exit_code": known.exit_code, "message": known.message, "hint": known.hint}
    return {"ok": False, "error": said}


@dataclass(frozen=True)
class JobReport:
    """A `watch.Report` of one job of a batch, emitted as events."""

    job: str
    tell: Tell

    def start(self, stage: str, total_frames: int, done: int = 0) -> None:
        """Begin a stage, or continue it after `done` frames."""
        self.tell(event("progress", job=self.job, stage=stage, done=done, total=total_frames))

    def advance(self, stage: str, done: int, chunk: int, num_chunks: int) -> None:
        """Report a finished chunk."""
        self.tell(event("chunk", job=self.job, stage=stage, done=done, chunk=chunk, chunks=num_chunks))

    def note(self, text: str, warning: bool = False) -> None:
        """Pass on warnings; drop details."""
        if warning:
            self.tell(event("warning", job=self.job, message=text))
