"""What `--json` prints: one JSON object a line, as `event.schema.json` beside this file says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from streamt2v.errors import explained

SCHEMA = "streamt2v.event/1"
"""Fields may be added to it; a change of one raises the number."""

Event = dict[str, Any]
Tell = Callable[[Event], None]


def event(kind: str, **facts: Any) -> Event:
    """Make an event: start, progress, chunk, warning or result."""
    return {"schema": SCHEMA, "type": kind, **facts}


def failed(error: BaseException) -> Event:
    """Return the facts of a result that is a failure."""
    known = explained(error)
    said = {"code": known.code, "exit_code": known.exit_code, "message": known.message, "hint": known.hint}
    return {"ok": False, "error": said}


@dataclass(frozen=True)
class JobReport:
    """A `progress.Report` of one job among others, told as events."""

    job: str
    tell: Tell

    def start(self, stage: str, total_frames: int, done: int = 0) -> None:
        """A stage begins, or continues after `done` frames."""
        self.tell(event("progress", job=self.job, stage=stage, done=done, total=total_frames))

    def advance(self, stage: str, done: int, chunk: int, num_chunks: int) -> None:
        """A chunk of a stage is finished."""
        self.tell(event("chunk", job=self.job, stage=stage, done=done, chunk=chunk, chunks=num_chunks))

    def note(self, text: str, warning: bool = False) -> None:
        """Pass warnings on; details are left out."""
        if warning:
            self.tell(event("warning", job=self.job, message=text))
