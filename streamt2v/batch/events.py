"""What `--json` prints: one JSON object per line, as described by `event.schema.json` in the package."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from streamt2v.errors import explained
from streamt2v.jobs.job import Job
from streamt2v.runs.pace import Status

SCHEMA = "streamt2v.event/1"
"""New fields may appear under the same number; a changed field raises it."""

Event = dict[str, Any]
Tell = Callable[[Event], None]


def event(kind: str, **facts: Any) -> Event:
    """Make an event: start, progress, chunk, warning or result."""
    return {"schema": SCHEMA, "type": kind, **facts}


def status_of(told: Event) -> Status:
    """Return what a progress or chunk event tells."""
    names = {item.name for item in fields(Status)} - {"kind"}
    known = {key: value for key, value in told.items() if key in names}
    kind: Any = "chunk" if told["type"] == "chunk" else "step" if told["step"] else "start"
    if told["stage"] == "other":
        return Status(**{**known, "kind": "doing", "stage": told["what"]})
    return Status(kind=kind, **known)


def failed(error: BaseException) -> Event:
    """Return the fields of a failed result."""
    known = explained(error)
    said = {"code": known.code, "exit_code": known.exit_code, "message": known.message, "hint": known.hint}
    return {"ok": False, "error": said}


@dataclass(frozen=True)
class JobReport:
    """A `watch.Report` of one job of a batch, emitted as events."""

    job: str
    send: Tell
    every: float = 0.5
    """Seconds between two steps that are told, at least."""
    _last: list[float] = field(default_factory=lambda: [0.0])

    def start(self, job: Job, **facts: Any) -> None:
        """Report that the job begins."""
        run = job.config
        facts |= {"output": str(job.output), "frames": run.num_frames, "fps": run.output.fps}
        facts |= {"seed": run.seed, "model": job.maker, "host": socket.gethostname(), "pid": os.getpid()}
        self.send(event("start", job=self.job, **facts))

    def tell(self, status: Status) -> None:
        """Report progress: the ends of chunks, stages and whatever else begins, and steps now and then."""
        now = time.monotonic()
        if status.kind == "step" and now - self._last[0] < self.every:
            return
        self._last[0] = now
        facts = {key: value for key, value in asdict(status).items() if key != "kind" and value is not None}
        if status.kind == "doing":
            facts |= {"stage": "other", "what": status.stage}
        self.send(event("chunk" if status.kind == "chunk" else "progress", job=self.job, **facts))

    def note(self, text: str, warning: bool = False) -> None:
        """Pass on warnings; drop details."""
        if warning:
            self.send(event("warning", job=self.job, message=text))
