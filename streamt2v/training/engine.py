"""The training loop: every part is a `Job` (networks, loss, report), and one function runs them all.

A run may take days, in several sittings: everything that a step depends on is written beside the weights now and then,
and the same command goes on from there. Steps on a CPU are few and expensive, so the loop uses Muon and an average of
the weights.
"""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamt2v import files
from streamt2v.devices import Device, has_bfloat16
from streamt2v.errors import NumericsError, WeightsError
from streamt2v.training.optimizer import Muon

Log = Callable[[str], None]
SAVE_MINUTES = 10.0  # between two savings
LOOK_EVERY = 3  # savings from one look at the weights to the next: sample sheets take a minute or two


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
    """Those of `trained` that learn five times as fast: new layers among trained ones."""
    learning_rate: float = 1e-3
    average: float = 0.995
    """Decay of the average a step."""
    samples: int = 1
    """Examples in one loss, for the log."""
    device: str = "cpu"
    half: bool = False
    """Run the loss in bfloat16 on a CPU that is faster in it: this pays for wide convolutions on large pictures.

    A GPU always does.
    """
    keep: Callable[[], None] = field(default=lambda: None)
    """Called when the state is saved, to save the examples that were made as well."""


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


def rate_factor(step: int, progress: float, steady: bool) -> float:
    """Learning rate factor: linear warm-up over 30 steps of this run, flat to 40 % of it, then linear to nearly zero.

    A steady run stays flat: it will be continued.
    """
    warm = min(1.0, (step + 1) / 30)
    return warm if steady else warm * min(1.0, max(0.02, (1 - progress) / 0.6))


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


@dataclass
class Progress:
    """How far a part has come, over all runs."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    smooth: float = 0.0  # loss
    first: float = 0.0

    def add(self, loss: float, samples: int) -> None:
        """Count one more step."""
        self.first = self.first if self.steps else loss
        self.smooth += max(0.01, 1 / (self.steps + 1)) * (loss - self.smooth)
        self.steps, self.samples = self.steps + 1, self.samples + samples

    def result(self) -> dict[str, float]:
        """What a run returns and records."""
        counts = {"steps": float(self.steps), "samples": float(self.samples)}
        return {**counts, "first_loss": self.first, "loss": self.smooth, "seconds": self.seconds}


class Checkpoint:
    """Everything a step depends on, in one file: weights, their average, the optimizer's memory, the random numbers."""

    def __init__(self, path: Path, job: Job, optimizer: Muon, average: Average, generator: torch.Generator) -> None:
        self.path, self.job, self.optimizer, self.average, self.generator = path, job, optimizer, average, generator

    def load(self) -> Progress:
        """Resume an earlier run, if there was one.

        Raises:
            WeightsError: the file is of other networks.
        """
        if not self.path.is_file():
            return Progress()
        state = torch.load(self.path, weights_only=True, map_location=self.job.device)
        shapes = [value.shape for value in state["trained"]]
        if shapes != [p.shape for p in self.job.trained]:
            raise WeightsError(f"{self.path} was left by networks of other sizes", "train that part afresh: --afresh")
        with torch.no_grad():
            for parameter, value in zip(self.job.trained, state["trained"], strict=True):
                parameter.copy_(value)
        self.average.values, self.average.count = state["average"], state["average_count"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        return Progress(**state["progress"])

    def save(self, progress: Progress) -> None:
        """Write the state, whole or not at all."""
        files.make_directory(self.path.parent)
        state = {
            "trained": [p.detach() for p in self.job.trained],
            "average": self.average.values,
            "average_count": self.average.count,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "progress": vars(progress),
        }
        with files.replacing(self.path) as part:
            torch.save(state, part)
        self.job.keep()


def run(
    job: Job,
    out: Path,
    minutes: float | None,
    steps: int | None,
    log: Log,
    generator: torch.Generator,
    state: Path | None = None,
    steady: bool = False,
) -> dict[str, float]:
    """Train a job for some minutes or steps, whichever ends first, from where an earlier run stopped.

    Args:
        job: what to train.
        out: folder for weights files and pictures.
        minutes: wall-clock limit of this run; at least one of the limits is needed.
        steps: step limit of this run.
        log: called with one line of text now and then.
        generator: of every draw of the job; its state is saved too.
        state: file that holds the run between sittings; None starts afresh and saves nothing.
        steady: keep the learning rate: this run will be continued.

    Returns:
        Number of steps, first and last smoothed loss, seconds and samples of this run and those before it.

    Raises:
        NumericsError: the loss is no longer finite.
        WeightsError: `state` is of other networks.
    """
    optimizer = Muon(_groups(job), lr=job.learning_rate)
    average = Average(job.trained, job.average)
    checkpoint = None if state is None else Checkpoint(state, job, optimizer, average, generator)
    done = Progress() if checkpoint is None else checkpoint.load()
    if done.steps:
        log(f"going on after {done.steps} steps, {done.seconds / 3600:.2f} h, loss {done.smooth:.4f}")
    before, steps_before = done.seconds, done.steps
    device = Device(job.device)
    narrow = device.kind == "cuda" or (job.half and has_bfloat16(device))
    start = last_saved = time.monotonic()
    savings = 0
    while True:
        now, step = time.monotonic(), done.steps - steps_before
        by_time = (now - start) / (60 * minutes) if minutes else 0.0
        progress = max(by_time, step / steps if steps else 0.0)
        if progress >= 1:
            break
        done.add(_step(job, optimizer, progress, rate_factor(step, progress, steady), narrow), job.samples)
        average.update()
        done.seconds = before + now - start
        if step + 1 in (20, 100):
            log(f"step {done.steps}  {now - start:.0f} s  loss {done.smooth:.4f}")
        if now - last_saved > 60 * SAVE_MINUTES:
            last_saved = now
            if checkpoint is not None:
                checkpoint.save(done)
            with average.swapped():
                job.save(out)
                found = job.report(out) if savings % LOOK_EVERY == 0 else ""
                log(f"step {done.steps}  {now - start:.0f} s  loss {done.smooth:.4f}  {found}".rstrip())
            savings += 1
    done.seconds = before + time.monotonic() - start
    if checkpoint is not None:
        checkpoint.save(done)
    average.exchange()
    job.save(out)
    log(f"done: {step} steps, {done.seconds - before:.0f} s, loss {done.smooth:.4f}; {job.report(out)}")
    return done.result()


def _step(job: Job, optimizer: Muon, progress: float, factor: float, narrow: bool) -> float:
    """Take one step with `factor` times the job's learning rate, in bfloat16 if `narrow`; return the loss before it."""
    kind = torch.device(job.device).type
    for group in optimizer.param_groups:
        group["lr"] = job.learning_rate * factor * (5.0 if group["quick"] else 1.0)
    with torch.autocast(kind, torch.bfloat16, enabled=narrow):
        loss = job.loss(progress)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericsError(f"the loss is {value} after {progress:.0%} of the run", "lower the learning rate")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(job.trained, 1.0)
    optimizer.step()
    return value


def record(folder: Path, part: str, device: str, result: dict[str, float]) -> None:
    """Append one line to folder/training.jsonl: the result of one run of a part."""
    row = {"part": part, "device": device, "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), **result}
    with (folder / "training.jsonl").open("a") as table:
        table.write(json.dumps(row) + "\n")
