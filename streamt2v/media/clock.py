"""Time: exact frame rates, and the steady clock on which the pictures of a video are shown.

The pictures of a file have times of their own; the networks and the written video know frames, one every 1/rate
seconds. A `Clock` connects the two and guarantees that frame `i` shows what a player shows at `start + i / rate`, and
that there are exactly `frames` of them, whatever the decoder yields.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, TypeVar

from streamt2v.config import exact_rate

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Picture = TypeVar("Picture")

MAX_RATE = 1000
_USUAL = tuple(
    [Fraction(rate) for rate in (5, 6, 8, 10, 12, 12.5, 15, 16, 20, 24, 25, 30, 48, 50, 60, 72, 90, 100, 120, 240)]
    + [Fraction(1000 * rate, 1001) for rate in (15, 24, 30, 48, 60, 120, 240)]
)
_STEADY = 0.49  # frames: how far a picture may be off its place while each place has exactly one picture
_ON_GRID = 0.25  # the same where places may be empty
_MAX_REPEATS = 4  # frames per picture: more would be mostly work on repeated frames


@dataclass(frozen=True)
class Clock:
    """When the frames of a video are shown.

    Args:
        start: time of frame 0, in seconds on the clock of the file, which its sound shares.
        rate: frames per second.
        frames: number of frames.
        pictures: number of pictures in the file.
        steady: whether frames and pictures correspond one to one.
        joined: whether the times of the file jump, as where recordings were joined.
    """

    start: Fraction
    rate: Fraction
    frames: int
    pictures: int
    steady: bool = True
    joined: bool = False

    def place(self, time: Fraction) -> int:
        """Return the first frame that shows a picture of this time."""
        return math.floor((time - self.start) * self.rate + Fraction(1, 2))


def measure(
    times: Sequence[int] | npt.NDArray[np.int64], time_base: Fraction, announced: Iterable[Fraction], hold: int = 0
) -> Clock:
    """Find the clock of a video from the times of its pictures.

    A declared rate is kept if it gives every picture its own frame, less than half a frame from its time; or if all
    pictures lie on its grid and some places are empty. Otherwise the rate is the common one nearest to most intervals
    between pictures, or a lower one where that would mostly repeat frames.

    Args:
        times: of the pictures, in ticks; at least one.
        time_base: seconds per tick.
        announced: declared rates, the most trusted first.
        hold: how long the last picture is shown, in ticks; 0 if unknown.
    """
    import numpy as np  # callers that need only exact rates should not pay for it

    ticks = np.sort(np.asarray(times, np.int64))
    start, count = int(ticks[0]) * time_base, len(ticks)
    seconds = (ticks - ticks[0]) * float(time_base)
    rates = [exact_rate(rate) for rate in announced if 0 < rate <= MAX_RATE]
    for rate in rates:
        if np.abs(seconds * float(rate) - np.arange(count)).max() < _STEADY:
            return Clock(start, rate, count, count)
    for rate in rates:
        places = np.floor(seconds * float(rate) + 0.5)
        off = np.abs(seconds * float(rate) - places).max()
        if off < _ON_GRID and len(np.unique(places)) == count and places[-1] < 2 * count:
            return _uneven(start, rate, seconds, float(hold * time_base))
    return _uneven(start, _usual_rate(seconds, rates), seconds, float(hold * time_base))


def _uneven(start: Fraction, rate: Fraction, seconds: npt.NDArray[np.float64], hold: float) -> Clock:
    last = int(seconds[-1] * float(rate) + 0.5)
    held = max(1, min(round(hold * float(rate)), _MAX_REPEATS * len(seconds)))
    return Clock(start, rate, last + held, len(seconds), last + held == len(seconds))


def _usual_rate(seconds: npt.NDArray[np.float64], announced: Sequence[Fraction]) -> Fraction:
    import numpy as np

    gaps = np.diff(seconds)
    gaps = gaps[gaps > 0]
    if not len(gaps):
        return next(iter(announced), Fraction(25))
    middle = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    found = 1 / float(gaps[(gaps >= middle / 2) & (gaps <= middle * 1.5)].mean())
    found = min(found, _MAX_REPEATS * len(seconds) / float(seconds[-1]), MAX_RATE)
    nearest = min(_USUAL, key=lambda rate: abs(float(rate) / found - 1))
    if abs(float(nearest) / found - 1) < 0.005:
        return nearest
    return max(Fraction(found).limit_denominator(1001), Fraction(1, 100))


class Straightened:
    """Turns the times of pictures, in the order they are shown, into one time line that never runs backwards.

    Args:
        step: assumed interval between two pictures, in ticks.
        jump: ticks forward beyond which another recording begins; None where long pauses are intended.
    """

    def __init__(self, step: int, jump: int | None = None) -> None:
        self.step, self.jump = max(1, step), jump
        self.last: int | None = None
        self.joined = False
        self._offset = 0

    def add(self, time: int | None) -> int:
        """Return the straightened time of the next picture; None stands for a time that the file does not give."""
        if self.last is None:
            self.last = 0 if time is None else time
            return self.last
        if time is None:
            self.last += self.step
            return self.last
        now = time + self._offset
        back, ahead = now < self.last - 25 * self.step, self.jump is not None and now > self.last + self.jump
        if back or ahead:
            self.joined = True
            self._offset += self.last + self.step - now
            now = self.last + self.step
        self.last = max(self.last, now)
        return now


def placed(pictures: Iterable[tuple[Fraction, Picture]], clock: Clock) -> Iterator[tuple[Picture, int, int]]:
    """Yield (picture, its first frame, how many frames show it), in order, covering every frame of a clock.

    Of pictures that share a frame the last is shown; a frame without one repeats the previous picture, and the first
    picture is shown from frame 0. So the counts add up to `clock.frames` if there is any picture.

    Args:
        pictures: (time, picture) in display order.
        clock: the clock.
    """
    held: list[Picture] = []
    done = 0
    for time, picture in pictures:
        place = min(clock.place(time), clock.frames)
        if held and place > done:
            yield held[0], done, place - done
            done = place
        if done >= clock.frames:
            return
        held = [picture]
    if held and done < clock.frames:
        yield held[0], done, clock.frames - done
