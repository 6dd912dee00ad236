"""What a run tells while it goes on, what it notices, and how fast it was."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol

from streamt2v import devices
from streamt2v.chunks import amount
from streamt2v.families.networks import Networks
from streamt2v.jobs import forecast
from streamt2v.jobs.prepared import Prepared
from streamt2v.jobs.run_directory import RunDirectory
from streamt2v.media import frames
from streamt2v.media.frames import Group
from streamt2v.runs.pace import Pace, Status


class Report(Protocol):
    """What is told of a run's progress; a test or a caller may pass its own."""

    def tell(self, status: Status) -> None:
        """Something went on."""

    def note(self, text: str, warning: bool = False) -> None:
        """Something worth a line when the user asked for details, or a warning for everybody."""


BEGIN, STREAM, REFINE, INTERPOLATE = "begin", "stream", "refine", "interpolate"
Given = ParamSpec("Given")


def _in_turn(tell: Callable[Concatenate["Watch", Given], None]) -> Callable[Concatenate["Watch", Given], None]:
    @wraps(tell)
    def telling(watch: "Watch", /, *given: Given.args, **named: Given.kwargs) -> None:
        with watch.lock:
            tell(watch, *given, **named)

    return telling


class Watch:
    """Follows one run: what its stages and networks tell is counted, timed, and passed on to a report.

    Where base frames are made while others are refined (`together`), two threads tell: one after the other.
    """

    def __init__(
        self, report: Report, known: Prepared, prior: Mapping[str, float] | None, together: bool = False
    ) -> None:
        self.report, self.known, self.together = report, known, together
        self.lock, self._first = threading.RLock(), threading.get_ident()
        self.frames: dict[str, tuple[int, int]] = {}
        made, refined = known.job.command != "refine", len(known.refine_plan)
        later = len(known.stream_plan) - 1 if made else 0
        alone = known.made if not (made or refined) else 0  # beside other stages it counts with theirs
        chunks = {BEGIN: int(made), STREAM: later, REFINE: refined, INTERPOLATE: alone}
        costs = dict[str, float]()
        if prior is not None:
            pixels = prior["seconds_per_frame"] * known.num_frames * known.job.config.output.interpolate
            costs = {BEGIN: prior["fixed_seconds"], STREAM: prior["stream_seconds_per_chunk"]}
            if refined:
                costs[REFINE] = prior["refine_seconds_per_chunk"] + pixels / refined
            else:
                costs[STREAM] += pixels / max(1, later)
        second, trailing = ((BEGIN, STREAM), forecast.trailing(known.job.config)) if together else ((), 0.0)
        self.pace = Pace(chunks, costs, time.monotonic(), second, trailing)
        self.stepping: set[str] = set()  # stages that tell of steps, and so know best what is left of them
        self.begun = dict[int, int]()  # steps of the chunks that the refiner works on by turns

    @_in_turn
    def note(self, text: str, warning: bool = False) -> None:
        """Pass on a line."""
        self.report.note(text, warning)

    @_in_turn
    def doing(self, text: str) -> None:
        """Tell what else is going on, such as loading."""
        self._tell(Status("doing", text))

    @_in_turn
    def idle(self, seconds: float) -> None:
        """Let so much of the time since the last event count for no stage."""
        self.pace.idle(seconds, threading.get_ident() != self._first)

    @_in_turn
    def waited(self) -> None:
        """Let the time that the refiner waited for base frames count for no stage."""
        self.pace.waited(time.monotonic())

    @_in_turn
    def apart(self) -> None:
        """Follow one thread from now on."""
        self.together, self.pace.beside = False, ()
        self.pace.waited(time.monotonic())

    @_in_turn
    def pixels(self) -> None:
        """Let the time since the last event count for the last stage, whose frames were encoded, decoded or written."""
        begins, alone = self.pace.works[BEGIN].left > 0, self.pace.works[INTERPOLATE].chunks > 0
        last = INTERPOLATE if alone else REFINE if self.known.refine_plan else STREAM
        self.pace.passed(BEGIN if begins else last, time.monotonic())

    @_in_turn
    def stored(self, frames: int) -> None:
        """Note that so many base frames are there already."""
        if frames and self.known.job.command != "refine":
            self.pace.skip(BEGIN, 0)
            self.pace.skip(STREAM, sum(chunk.stop > frames for chunk in self.known.stream_plan[1:]))
            self.pace.mark(time.monotonic())

    @_in_turn
    def start(self, stage: str, total_frames: int, done: int = 0) -> None:
        """Begin a stage, or continue it after `done` frames."""
        self.frames[stage] = done, total_frames
        if stage == REFINE and done:
            self.pace.skip(REFINE, sum(chunk.stop > done for chunk in self.known.refine_plan))
            self.pace.mark(time.monotonic())
        elif stage == INTERPOLATE and done:
            self.pace.skip(INTERPOLATE, total_frames - done)
            self.pace.mark(time.monotonic())
        self._tell(Status("start", stage, done, total_frames))

    @_in_turn
    def step(self, stage: str, chunk: int, step: int, steps: int, left: float | None = None) -> None:
        """Count a denoising step, from 1, of a chunk, from 0; `left` chunks of the stage remain, in parts of one.

        Of chunks that are worked on by turns, for which alone `left` is given, the first that is not finished is shown.
        """
        chunks = len(self.known.refine_plan if stage == REFINE else self.known.stream_plan)
        remaining = chunks - chunk - step / steps if left is None else left
        first = stage == STREAM and chunk == 0
        self.stepping.add(BEGIN if first else stage)
        self.pace.passed(BEGIN if first else stage, time.monotonic(), 1 - step / steps if first else remaining)
        done, total = self.frames.get(stage, (0, 0))
        if left is not None:
            self.begun = {one: made for one, made in self.begun.items() if made < steps} | {chunk: step}
            chunk = min(self.begun)
            step = self.begun[chunk]
        self._tell(Status("step", stage, done, total, chunk + 1, chunks, step, steps))

    @_in_turn
    def advance(self, stage: str, done: int, chunk: int, num_chunks: int) -> None:
        """Count a finished chunk, from 1: `done` frames of the stage exist."""
        now, first = time.monotonic(), stage == STREAM and chunk == 1
        key = BEGIN if first else stage
        kept = self.pace.works[key].left if stage == REFINE and REFINE in self.stepping and chunk < num_chunks else None
        self.pace.passed(key, now, (0 if first else num_chunks - chunk) if kept is None else kept)
        self.pace.mark(now)
        self.frames[stage] = done, self.known.num_frames
        self._tell(Status("chunk", stage, done, self.known.num_frames, chunk, num_chunks))

    def remember(self, seconds: float, networks: Networks) -> None:
        """Keep the speed of this run of so many seconds for `plan`; one that is short or resumed says too little."""
        job, refined, later = self.known.job, amount(self.known.refine_plan), len(self.known.stream_plan) - 1
        alone = self.known.family.refines_only and self.known.made >= job.config.refine.chunk  # else `bench` tells
        if job.resume or not (alone or (job.command == "generate" and later and refined != 1)):
            return
        import torch

        fixed, pixels = self.pace.idled + self.pace.works[BEGIN].total, networks.pixel_time.seconds
        streamed = self.pace.works[STREAM].total
        chunks = streamed + self.pace.works[REFINE].total - pixels if self.together else seconds - fixed - pixels
        streamed = streamed if refined else chunks
        measured = {
            "fixed_seconds": fixed,
            "stream_seconds_per_chunk": streamed / max(1, later),
            "refine_seconds_per_chunk": max(0.0, chunks - streamed) / max(1.0, refined),
            "seconds_per_frame": pixels / job.config.num_frames,
            "peak_memory_bytes": devices.peak_memory(networks.device),
        }
        seen = devices.Glance(networks.device.kind, 0, devices.card(networks.device))
        forecast.remember(job.config, seen, torch.get_num_threads(), networks.policy, measured, self.together)

    def _tell(self, status: Status) -> None:
        left, memory = self.pace.left(time.monotonic()), devices.working_memory() / 2**20
        self.report.tell(replace(status, share=self.pace.share, seconds_left=left, memory_mb=round(memory, 1)))


def look_at(group: Group, what: str, directory: RunDirectory, report: Watch) -> None:
    """Warn of frames without a picture, and refuse to compute more than the disk can take."""
    if frames.is_black(group.frames):
        report.note(f"{what} {group.start} to {group.stop - 1} are black", warning=True)
    directory.require_room(2 * group.frames.nbytes)  # of what comes next, as large as this before compression
