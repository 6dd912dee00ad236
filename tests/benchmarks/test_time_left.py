"""The time left over a whole run, on a clock of its own: every chunk takes its time, and no more."""

import types
from pathlib import Path
from random import Random

import pytest

from benchmarks import time_left
from benchmarks.time_left import Sample, Told
from streamt2v.jobs import forecast
from streamt2v.runs import watch
from streamt2v.runs.pace import Status
from tests.cli.helpers import call


def test_the_display_counts_down_from_what_was_told_last() -> None:
    told = [Told(1.0, None, 0), Told(2.0, 9.0, 1), Told(4.0, 5.0, 2), Told(4.5, 5.0, 2), Told(6.0, 2.0, 3)]
    seen = time_left.samples(told, 8.0)
    assert [(one.at, one.shown, one.left) for one in seen[:3]] == [(4.0, 5.0, 4.0), (4.25, 4.75, 3.75), (4.5, 5.0, 3.5)]
    assert seen[-1] == (7.75, 0.25, 0.25)
    assert Sample(0.0, 8.0, 10.0).error(20.0) == pytest.approx(0.2)
    assert Sample(0.0, 1.0, 0.0).error(20.0) == pytest.approx(0.5)
    assert Sample(0.0, None, 10.0).error(20.0) == 1.0


@pytest.mark.usefixtures("toy_family")
@pytest.mark.parametrize("slower", [None, 1.0, 2.5], ids=["the first run here", "as before", "slower than before"])
def test_the_time_left_of_a_run_is_right_from_the_second_chunk_on(
    slower: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages take turns, chunks differ by 5 %; an earlier run was as fast, 2.5 times as fast, or there was none."""
    clock, random, told, ended = types.SimpleNamespace(now=100.0), Random(0), list[Told](), list[float]()
    cost = {watch.STREAM: 3.0, watch.REFINE: 1.2}
    advance, tell, finish = watch.Watch.advance, watch.Watch._tell, watch.Watch.doing

    def advancing(self: watch.Watch, stage: str, done: int, chunk: int, num_chunks: int) -> None:
        first = stage == watch.STREAM and chunk == 1
        clock.now += 6.0 if first else cost[stage] * random.uniform(0.95, 1.05)
        advance(self, stage, done, chunk, num_chunks)

    def telling(self: watch.Watch, status: Status) -> None:
        tell(self, status)
        chunks = status.chunk if status.stage == watch.STREAM else told[-1].chunks if told else 0
        told.append(Told(clock.now, self.pace.left(clock.now), chunks))

    def doing(self: watch.Watch, text: str) -> None:
        if text.startswith("writing"):
            clock.now += 0.5
            ended.append(clock.now)
        finish(self, text)

    monkeypatch.setattr(watch, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    for name, method in (("advance", advancing), ("_tell", telling), ("doing", doing)):
        monkeypatch.setattr(watch.Watch, name, method)
    before = None
    if slower is not None:
        seconds = [6.0, cost[watch.STREAM], cost[watch.REFINE], 0.0, 1e9]
        before = {name: value / slower for name, value in zip(forecast.MEASURED, seconds, strict=True)}
    monkeypatch.setattr(forecast, "expected", lambda *_: before)
    assert call("generate", "abc", "--model", "toy", "--frames", 240, "-o", tmp_path / "out.mp4", "-q") == 0
    seen = time_left.samples(told, ended[0])
    errors = [one.error(ended[0] - 100.0) for one in seen]
    known = [error for one, error in zip(seen, errors, strict=True) if one.shown is not None]
    assert len(known) / len(seen) > (0.9 if slower is None else 0.99)  # the refiner has to begin once
    assert max(known) < time_left.BAR
    time_left.plot(seen, tmp_path / "plot.png", ended[0])
    assert (tmp_path / "plot.png").stat().st_size > 1000
