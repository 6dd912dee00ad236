"""How far a job is and how long the rest takes: work counted in chunks, timed by the latest ones. Loads no torch."""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

RECENT = 8  # ends of chunks whose times are averaged


@dataclass(frozen=True)
class Status:
    """How far a job is: what displays, events and a caller's callback are told.

    A `step` is one inside a chunk, a `chunk` is finished, a stage `start`s or continues; `doing` is anything else, put
    into words by `stage`. `done` of `total` frames of the stage exist; chunks and steps count from 1. `share` of the
    whole job (0-1) is done, `seconds_left` is None until it can be known; `memory_mb` is the peak of the process.
    """

    kind: Literal["doing", "start", "step", "chunk"]
    stage: str
    done: int = 0
    total: int = 0
    chunk: int = 0
    chunks: int = 0
    step: int = 0
    steps: int = 0
    share: float = 0.0
    seconds_left: float | None = None
    memory_mb: float = 0.0


@dataclass
class _Work:
    """One kind of work: what is left of it in chunks, the cost of a chunk by earlier runs, and by this one.

    Of its `total` seconds, those of the chunks `done` since the last mark are in `seconds`.
    """

    chunks: float
    left: float
    prior: float | None
    done: float = 0.0
    seconds: float = 0.0
    total: float = 0.0
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def measured(self) -> float | None:
        done = sum(chunks for chunks, _ in self.recent)
        return sum(seconds for _, seconds in self.recent) / done if done else None


class Pace:
    """Time left of a job with several kinds of work; all times are given, in seconds of one monotonic clock.

    Time between two events of a thread belongs to the work that the second one tells of. The time left is estimated
    when a chunk ends and counts down from there. What was not measured yet costs what an earlier run measured, times
    the ratio of this run to that one in what was measured.

    Args:
        chunks: how many of each kind of work the job has.
        prior: seconds per chunk, as far as they are known.
        now: when the job begins.
        beside: of the works that a second thread does beside all others.
        trailing: how many chunks of these others are left when it ends, if they keep up with it.
    """

    def __init__(
        self,
        chunks: Mapping[str, int],
        prior: Mapping[str, float],
        now: float,
        beside: Collection[str] = (),
        trailing: float = 0.0,
    ) -> None:
        self.works = {name: _Work(count, count, prior.get(name)) for name, count in chunks.items()}
        self.beside, self.trailing, self.share, self.idled = beside, trailing, 0.0, 0.0
        self.last = dict.fromkeys((False, True), now)
        """The last event of either thread; that of the second one under True."""
        self.end: float | None = None
        self.mark(now)

    def idle(self, seconds: float, second: bool = False) -> None:
        """Let so much of the time since the last event of a thread belong to nothing, such as loading."""
        self.last[second] += seconds
        self.idled += seconds if second or not self.beside else 0.0  # what the second one does meanwhile is not idle

    def waited(self, now: float) -> None:
        """Let all of it belong to nothing: the first thread waited for the second one."""
        self.last[False] = now

    def skip(self, name: str, left: float) -> None:
        """Note that only `left` chunks of a kind are to be made: an earlier run made the others."""
        self.works[name].left = left

    def passed(self, name: str, now: float, left: float | None = None) -> None:
        """Count the time since the last event for one kind of work, of which `left` chunks remain; None: as before."""
        work = self.works[name]
        left = work.left if left is None else left
        second = name in self.beside
        work.seconds += now - self.last[second]
        work.total += now - self.last[second]
        work.done += max(0.0, work.left - left)
        work.left, self.last[second] = left, now
        works = [work for work in self.works.values() if work.chunks]
        costs = [self._cost(work) for work in works]
        weighed = list(zip(costs if None not in costs else [1.0] * len(costs), works, strict=True))
        whole = sum((cost or 0.0) * work.chunks for cost, work in weighed)
        rest = sum((cost or 0.0) * work.left for cost, work in weighed)
        self.share = max(self.share, min(1.0, 1 - rest / whole)) if whole else self.share

    def mark(self, now: float) -> None:
        """Estimate anew at the end of a chunk."""
        for work in self.works.values():
            if work.done:
                work.recent.append((work.done, work.seconds))
                work.done = work.seconds = 0.0
        rest = {name: (self._cost(work), work.left) for name, work in self.works.items() if work.left}
        known = all(cost is not None for cost, _ in rest.values())
        first, second, last = 0.0, 0.0, 0.0
        for name, (cost, left) in rest.items():
            if name in self.beside:
                second += (cost or 0.0) * left
            else:
                first += (cost or 0.0) * left
                last += (cost or 0.0) * min(left, self.trailing)
        self.end = now + max(first, second + last) if known else None

    def left(self, now: float) -> float | None:
        """Return the seconds left by the last estimate; None where some work never was measured."""
        return None if self.end is None else max(0.0, self.end - now)

    def _cost(self, work: _Work) -> float | None:
        if (measured := work.measured) is not None or work.prior is None:
            return measured
        both = [(other.measured, other.prior) for other in self.works.values() if other.measured and other.prior]
        return work.prior * (sum(now / then for now, then in both) / len(both) if both else 1.0)
