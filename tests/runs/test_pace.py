"""The time left: right in a steady run, falling, never jumping; and the share of the work that is done."""

import itertools
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamt2v.runs.pace import Pace, Status
from streamt2v.runs.watch import Watch

COST = st.floats(0.01, 1000)


@settings(deadline=None)
@given(
    costs=st.tuples(COST, COST, COST), chunks=st.integers(3, 30), steps=st.integers(1, 4), machine=st.floats(0.3, 3),
    known=st.booleans(), random=st.randoms(use_true_random=False),
)  # fmt: skip
def test_the_time_left_of_a_steady_run_falls_and_is_right(
    costs: tuple[float, float, float], chunks: int, steps: int, machine: float, known: bool, random: Random
) -> None:
    """Two stages take turns, each step as long as the last to 3 %; the first chunk has a cost of its own."""
    begin, *later = costs
    prior = {"begin": begin, "stream": later[0], "refine": later[1]} if known else {}
    now, told = 100.0, list[tuple[float, float | None, float]]()
    pace = Pace({"begin": 1, "stream": chunks, "refine": chunks}, prior, now)
    assert (pace.left(now) is not None) is known
    now += begin * machine
    pace.passed("begin", now, 0)
    pace.mark(now)
    for chunk, (name, cost) in itertools.product(range(chunks), zip(("stream", "refine"), later, strict=True)):
        for step in range(1, steps + 1):
            now += cost / steps * machine * random.uniform(0.97, 1.03)
            pace.passed(name, now, chunks - chunk - step / steps)
        pace.mark(now)
        told.append((now, pace.left(now), pace.share))
    assert told[-1][1:] == (0.0, 1.0)
    assert [share for *_, share in told] == sorted(share for *_, share in told)
    for (before, earlier, _), (at, left, _) in itertools.pairwise(told[1:]):
        assert earlier is not None and left is not None
        assert left <= 1.1 * earlier
        assert left == pytest.approx(now - at, rel=0.07, abs=1e-6)
        assert pace.end is not None and before <= at


@settings(deadline=None)
@given(
    costs=st.tuples(COST, COST, COST), chunks=st.integers(4, 30), steps=st.integers(1, 4), known=st.booleans(),
    random=st.randoms(use_true_random=False),
)  # fmt: skip
def test_of_two_threads_the_one_that_ends_last_counts(
    costs: tuple[float, float, float], chunks: int, steps: int, known: bool, random: Random
) -> None:
    """The refiner makes each chunk after that of the stream, the last `steps` of them at the end; it waits for them."""
    begin, stream, refine = costs
    prior = {"begin": begin, "stream": stream, "refine": refine} if known else {}
    trailing = (steps + 1) / 2
    events = [(begin, "begin", 0.0)]
    for chunk in range(chunks):
        now = events[-1][0] + stream * random.uniform(0.97, 1.03)
        events.append((now, "stream", chunks - chunk - 1.0))
    ready = [at for at, *_ in events[1:]]
    now, waits = begin, list[tuple[float, str, float]]()
    for number in range(1, 2 * chunks + 1):  # in halves of a chunk
        left = chunks - number / 2
        arrives = ready[min(chunks - 1, number // 2)] if left >= trailing else ready[-1]
        waits.append((max(now, arrives), "waited", 0.0))
        now = max(now, arrives) + refine / 2
        waits.append((now, "refine", left))
    end = max(now, ready[-1])
    pace = Pace({"begin": 1, "stream": chunks, "refine": chunks}, prior, 0.0, ("begin", "stream"), trailing)
    told = list[tuple[float, float]]()
    for at, name, left in sorted(events + waits, key=lambda event: event[0]):
        if name == "waited":
            pace.waited(at)
            continue
        pace.passed(name, at, left)
        pace.mark(at)
        if (said := pace.left(at)) is not None:
            told.append((at, said))
    assert pace.works["stream"].total == pytest.approx(ready[-1] - begin)
    assert pace.works["refine"].total == pytest.approx(chunks * refine)
    assert told[-1][1] == pytest.approx(0, abs=1e-6)
    for at, said in told:
        assert said == pytest.approx(end - at, rel=0.07, abs=max(stream, refine) * 1.6)


def test_what_an_earlier_run_measured_counts_until_something_is_measured_here() -> None:
    pace = Pace({"stream": 4, "refine": 2}, {"stream": 10.0, "refine": 30.0}, 0.0)
    assert pace.left(0.0) == 100.0
    assert pace.left(60.0) == 40.0  # frozen between chunks: it only counts down
    assert pace.left(200.0) == 0.0
    pace.passed("stream", 20.0, 3)
    pace.mark(20.0)
    assert pace.left(20.0) == 3 * 20 + 2 * 60  # this machine takes twice as long, also for what is to come


def test_loading_and_what_was_made_before_do_not_count() -> None:
    pace = Pace({"begin": 1, "stream": 10, "refine": 0}, {}, 0.0)
    pace.skip("begin", 0)
    pace.skip("stream", 4)
    pace.idle(50.0)
    pace.passed("stream", 51.5)
    pace.passed("stream", 52.0, 3)
    pace.mark(52.0)
    assert pace.left(52.0) == pytest.approx(6)
    assert (pace.idled, pace.works["stream"].total) == (50.0, 2.0)
    assert pace.share == pytest.approx(8 / 11)


@given(chunks=st.integers(1, 12), steps=st.integers(1, 4))
def test_of_chunks_that_are_refined_by_turns_the_first_unfinished_is_shown(chunks: int, steps: int) -> None:
    """The refiner goes diagonally: a step of the leftmost chunk that can."""
    told, made = list[Status](), [0] * chunks
    known = SimpleNamespace(
        job=SimpleNamespace(command="refine"), stream_plan=(), refine_plan=range(chunks), made=chunks
    )
    watch = Watch(SimpleNamespace(tell=told.append), known, None)  # type: ignore[arg-type]
    while made[-1] < steps:
        ready = (one for one in range(chunks) if made[one] < steps and (one == 0 or made[one - 1] > made[one]))
        one = next(ready)
        made[one] += 1
        watch.step("refine", one, made[one], steps, chunks - sum(made) / steps)
    shown = [(status.chunk, status.step) for status in told]
    assert shown == sorted(shown)
    assert shown[-1] == (chunks, steps)
    assert len(watch.begun) <= steps + 1
