"""The training loop: every part is a `Job` (networks, loss, report), and one function runs them all.

Steps are few and dear on a CPU, so the loop uses Muon, a learning rate that follows the clock (the run ends annealed
whenever its minutes end), an average of the weights, and saves usable files every few minutes.
"""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamt2v.errors import NumericsError
from streamt2v.training.optimizer import Muon

Log = Callable[[str], None]


@dataclass
class Job:
    """What to train and how to judge it."""

    loss: Callable[[float], Tensor]
    """One training loss; the argument is the progress of the run in [0, 1]."""
    trained: list[nn.Parameter]
    """Parameters to update."""
    save: Callable[[Path], None]
    """Write weights files into a folder; called with the averaged weights in place."""
    report: Callable[[Path], str] = field(default=lambda folder: "")
    """Judge the averaged weights: may write pictures into a folder, returns text for the log."""
    adam: list[nn.Parameter] = field(default_factory=list)
    """Those of `trained` that Muon does not suit: embeddings, first and last layers."""
    quick: list[nn.Parameter] = field(default_factory=list)
    """Those of `trained` that learn five times as fast: new layers beside trained ones."""
    learning_rate: float = 1e-3
    average: float = 0.995
    autocast: bool = False
    """Run the loss in bfloat16 on a CPU: pays for wide convolutions on large pictures only."""


class Average:
    """An exponential average of parameters that can be swapped in for a moment."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.count = parameters, decay, 0
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present values; early on it follows them closely."""
        self.count += 1
        weight = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], weight)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averaged values into the networks inside the block."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the averaged and the present values."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def rate_factor(step: int, progress: float, warm_up: int = 30) -> float:
    """Learning rate factor: linear warm-up over some steps, flat to 40 % of the run, then linear to nearly zero."""
    return min(1.0, (step + 1) / warm_up) * min(1.0, max(0.02, (1 - progress) / 0.6))


def _groups(job: Job) -> list[dict[str, Any]]:
    """Sort the parameters by rule and speed."""
    adam, quick = {id(p) for p in job.adam}, {id(p) for p in job.quick}
    groups = []
    for rule in (False, True):
        for speed in (False, True):
            members = [p for p in job.trained if (id(p) in adam, id(p) in quick) == (rule, speed)]
            if members:
                groups.append({"params": members, "adam": rule, "quick": speed})
    return groups


def run(
    job: Job, out: Path, minutes: float | None, steps: int | None, log: Log, report_minutes: float = 4.0
) -> dict[str, float]:
    """Train a job for some minutes or steps, whichever ends first.

    Args:
        job: what to train.
        out: folder for weights files and pictures.
        minutes: wall-clock limit; at least one of the limits is needed.
        steps: step limit.
        log: called with one line of text now and then.
        report_minutes: time between two savings.

    Returns:
        Number of steps, first and last smoothed loss, seconds.

    Raises:
        NumericsError: the loss is no longer finite.
    """
    optimizer = Muon(_groups(job), lr=job.learning_rate)
    average = Average(job.trained, job.average)
    start = last_report = time.monotonic()
    step, smooth, first = 0, 0.0, 0.0
    while True:
        now = time.monotonic()
        by_time = (now - start) / (60 * minutes) if minutes else 0.0
        progress = max(by_time, step / steps if steps else 0.0)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = job.learning_rate * rate_factor(step, progress) * (5.0 if group["quick"] else 1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=job.autocast):
            loss = job.loss(progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(job.trained, 1.0)
        optimizer.step()
        average.update()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NumericsError(f"the loss is {value} after {step} steps", "lower the learning rate")
        smooth = value if step == 0 else smooth + max(0.02, 1 / (step + 1)) * (value - smooth)
        first = value if step == 0 else first
        step += 1
        if step in (20, 100):
            log(f"step {step}  {now - start:.0f} s  loss {smooth:.4f}")
        if now - last_report > 60 * report_minutes:
            last_report = now
            with average.swapped():
                job.save(out)
                log(f"step {step}  {now - start:.0f} s  loss {smooth:.4f}  {job.report(out)}")
    average.exchange()
    job.save(out)
    summary = job.report(out)
    seconds = time.monotonic() - start
    log(f"done: {step} steps, {seconds:.0f} s, loss {smooth:.4f}; {summary}")
    return {"steps": float(step), "first_loss": first, "loss": smooth, "seconds": seconds}
