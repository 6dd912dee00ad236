"""A thread beside another: items in order, errors in their turn, nothing left running."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from streamt2v.errors import NumericsError
from streamt2v.runs.beside import ROOM, Beside


def test_items_come_in_order_and_a_few_are_made_ahead() -> None:
    made, where, go_on = list[int](), set[tuple[int, int]](), threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(10):
            where.add((threading.get_ident(), torch.get_num_threads()))
            made.append(number)
            go_on.release()
            yield number

    before, waits = torch.get_num_threads(), list[None]()
    torch.set_num_threads(3)
    try:
        with Beside() as beside:
            ahead = beside.ahead(items(), lambda: waits.append(None))
            assert made == []
            taken = [next(ahead)]
            for _ in range(1 + ROOM):
                assert go_on.acquire(timeout=60)
            assert not go_on.acquire(timeout=0.2)
            assert made == list(range(1 + ROOM))
            taken.extend(ahead)
        assert taken == list(range(10))
        assert len(waits) == 11
        ((thread, threads),) = where
        assert thread != threading.get_ident()
        assert threads == 3
    finally:
        torch.set_num_threads(before)


def test_an_error_is_raised_when_its_item_is_asked_for() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise NumericsError("the third is NaN")

    with Beside() as beside:
        ahead = beside.ahead(items())
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(NumericsError, match="the third is NaN"):
            next(ahead)
        assert next(ahead, None) is None


def test_calls_are_made_one_after_the_other_and_answered() -> None:
    done = list[int]()
    with Beside() as beside:
        answers = [beside.do(lambda number=number: done.append(number) or number) for number in range(50)]  # type: ignore[misc]
        failed = beside.do(lambda: 1 / 0)
        assert [answer.result(60) for answer in answers] == done == list(range(50))
        with pytest.raises(ZeroDivisionError):
            failed.result(60)


@pytest.mark.parametrize("stubborn", [False, True])
def test_at_the_end_nothing_is_left_running(stubborn: bool) -> None:
    """What runs is stopped between two operations, also where one stop was lost; what waits is never begun."""
    before, begun, later, stops = threading.active_count(), threading.Event(), list[int](), list[int]()

    def endless() -> None:
        begun.set()
        while True:
            try:
                while True:
                    torch.ones(8).sum()
            except SystemExit:
                stops.append(1)
                if len(stops) > stubborn:
                    raise

    with pytest.raises(KeyboardInterrupt), Beside() as beside:
        beside.do(endless)
        beside.do(lambda: later.append(1))
        assert begun.wait(60)
        raise KeyboardInterrupt
    assert threading.active_count() == before
    assert (len(stops), later) == (1 + stubborn, [])


def test_what_ends_soon_by_itself_is_not_stopped() -> None:
    begun, ended = threading.Event(), list[int]()

    def short() -> None:
        begun.set()
        time.sleep(0.05)
        ended.append(1)

    with Beside() as beside:
        beside.do(short)
        assert begun.wait(60)
    assert ended == [1]


def test_a_thread_that_nobody_asked_never_begins() -> None:
    before = threading.active_count()
    with Beside():
        assert threading.active_count() == before


def test_what_was_made_is_not_kept() -> None:
    """A clip of full size would be the largest thing in memory."""
    with Beside() as beside:
        made = beside.do(lambda: torch.ones(8)).result(60)
        seen = weakref.ref(made)
        del made
        for _ in range(100):  # until the thread waits for the next call
            gc.collect()
            if seen() is None:
                break
            time.sleep(0.05)
        assert seen() is None
