"""The jobs of a batch on this machine, one after the other."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Iterable
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING

from streamt2v.batch import events
from streamt2v.batch.events import Event, JobReport, Tell
from streamt2v.batch.tasks import Task
from streamt2v.errors import Interrupted, StreamT2VError
from streamt2v.runs.pace import Status

if TYPE_CHECKING:
    from streamt2v.families.networks import Loaded


def locally(tasks: Iterable[Task], tell: Tell) -> Generator[tuple[Task, Event]]:
    for task in tasks:
        yield task, attempt(task, tell)


@cache
def still_loaded() -> Loaded:
    """Return what this process keeps loaded from job to job."""
    from streamt2v.families.networks import Loaded

    return Loaded()


def attempt(task: Task, tell: Tell) -> Event:
    """Run one job; return the fields of its result, also for a failure."""
    report = JobReport(task.id, tell)
    report.start(task.job, line=task.line)
    for notice in task.notices:
        report.note(notice, warning=True)
    if "torch" not in sys.modules:
        report.tell(Status("doing", "loading torch"))
    from streamt2v.runs import pipeline

    try:
        return {"ok": True, "status": "made", **asdict(pipeline.run(task.job, report, still_loaded()))}
    except Interrupted:
        raise
    except Exception as error:
        if not isinstance(error, StreamT2VError | MemoryError):
            logging.getLogger(__name__).exception("job %s", task.id)
        return events.failed(error)
