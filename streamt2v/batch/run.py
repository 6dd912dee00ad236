"""Running a batch: each task once, its events emitted, the result of the whole batch last."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import asdict

from streamt2v.batch import events
from streamt2v.batch.events import Event, Tell, event
from streamt2v.batch.here import locally
from streamt2v.batch.on_ray import on_ray
from streamt2v.batch.tasks import Refusal, Task
from streamt2v.errors import SIGNALS, BatchError, ConfigError, Interrupted, StreamT2VError
from streamt2v.jobs import forecast, run_directory
from streamt2v.jobs.prepared import Prepared


def run(
    tasks: Sequence[Task], refusals: Sequence[Refusal], tell: Tell, *, keep_going: bool, ray: str | None, dry_run: bool
) -> int:
    """Run checked tasks and emit events, with the result of the whole batch last.

    Args:
        tasks, refusals: from `check`.
        tell: called with each event.
        keep_going: go on although a row is invalid or a job failed.
        ray: the address of a Ray cluster, "local" for one on this machine; None runs the jobs here in turn.
        dry_run: emit the plan of each job that would run, and run none.

    Returns:
        The exit code: 0 if every output is there, 2 if an invalid row stopped everything, 9 if jobs failed, 130 or 143.

    Raises:
        ConfigError: Ray is requested but not available.
    """
    began, counts = time.monotonic(), Counter[str]()
    error: StreamT2VError | None = None
    foreseen: float | None = None
    total = len(tasks) + len(refusals)
    for refusal in refusals:
        counts["failed"] += 1
        where = {"job": refusal.id, "line": refusal.line, **({"field": refusal.field} if refusal.field else {})}
        tell(event("result", **where, **events.failed(refusal.error)))
    try:
        if refusals and not keep_going:
            error = ConfigError(
                f"{len(refusals)} of {total} rows are invalid, nothing was started",
                "correct them, or make the others with --keep-going",
            )
        else:
            foreseen = _plan(tasks, tell) if dry_run else None
            for task, outcome in _outcomes(tasks, tell, ray, dry_run):
                counts[outcome.get("status", "failed")] += 1
                tell(event("result", job=task.id, line=task.line, **outcome))
                if not outcome["ok"] and not keep_going:
                    break
    except (*SIGNALS, Interrupted) as by:
        error = Interrupted("stopped", "repeat the command to continue", by=by)
    left = total - counts.total()
    if error is None and counts["failed"]:
        hint = "correct the invalid rows; " * bool(refusals) + "repeat the command to make what is missing"
        hint += "; --keep-going does not stop at a failure" * bool(left)
        error = BatchError(f"{counts['failed']} of {total} jobs failed", hint)
    facts = events.failed(error) if error else {"ok": True}
    counted: Event = {key: counts[key] for key in ("made", "there", "failed")}
    counted |= {} if foreseen is None else {"seconds_left": round(foreseen, 2)}
    exit_code = error.exit_code if error else 0
    seconds = round(time.monotonic() - began, 2)
    tell(event("result", jobs=total, **counted, left=left, seconds=seconds, exit_code=exit_code, **facts))
    return exit_code


def _plan(tasks: Sequence[Task], tell: Tell) -> float | None:
    """Emit what each job that is left would be; return their seconds, None where one never was measured."""
    todo = [task for task in tasks if task.made is None]
    plans = [forecast.plan(Prepared(task.job)) for task in todo]
    for task, planned in zip(todo, plans, strict=True):
        for notice in task.notices:
            tell(event("warning", job=task.id, message=notice))
        facts = {"output": str(task.job.output), "seed": task.job.config.seed, "summary": planned.as_line()}
        tell(event("plan", job=task.id, line=task.line, **facts, **asdict(planned)))
    seconds = [planned.seconds for planned in plans if planned.seconds is not None]
    return sum(seconds) if len(seconds) == len(plans) else None


def _outcomes(tasks: Sequence[Task], tell: Tell, ray: str | None, dry_run: bool) -> Generator[tuple[Task, Event]]:
    """Yield each task with the fields of its result, starting with those that were already made."""
    todo = [] if dry_run else [task for task in tasks if task.made is None]
    for task in tasks:
        if task.made is not None:
            if not (task.job.keep_run or dry_run):
                run_directory.discard(task.job.run_path)
            yield task, {"ok": True, "status": "there", **asdict(task.made)}
    if todo:
        with contextlib.closing(locally(todo, tell) if ray is None else on_ray(todo, tell, ray)) as outcomes:
            yield from outcomes
