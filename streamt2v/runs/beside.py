"""Work beside other work: a thread that makes one call after the other, and leaves nothing running."""

import ctypes
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")
GRACE = 0.5
"""Seconds that a call in progress has to end by itself."""
ROOM = 3
"""Items that `ahead` makes before they are asked for: a refiner takes several at once, then none for a while."""
_END: Any = object()


class _Stopped(SystemExit):
    """What stops a call. Nobody sees it: a thread ends on this quietly."""


class Beside:
    """A thread beside the one that makes this; a context manager. It begins with the first call.

    At the end of the block calls that wait are dropped. One in progress is stopped where it is, as a signal stops the
    main thread: between two operations of torch, or two frames that are encoded.
    """

    def __init__(self) -> None:
        self._calls = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]()
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), daemon=True)

    def do(self, call: Callable[[], Made]) -> Future[Made]:
        """Make a call after those before it; the future raises what the call raised."""
        future = Future[Made]()
        self._calls.put((future, call))
        if self._thread.ident is None:
            self._thread.start()
        return future

    def ahead(self, items: Iterator[Made], waited: Callable[[], None] = lambda: None) -> Iterator[Made]:
        """Yield what an iterator yields, ROOM items of which are made ahead; `waited` is called after every wait.

        Raises:
            BaseException: what the iterator raised, when its turn comes.
        """
        coming = deque(self.do(lambda: next(items, _END)) for _ in range(ROOM))
        while True:
            made = coming.popleft().result()
            waited()
            if made is _END:
                return
            coming.append(self.do(lambda: next(items, _END)))
            yield made

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # is true of a thread: sums would be split over other numbers than elsewhere
        while (asked := self._calls.get()) is not None:
            _answer(*asked)
            del asked  # large, and nothing may come for a while

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.ident is None:
            return
        while not self._calls.empty():
            self._calls.get()
        self._calls.put(None)
        try:
            self._thread.join(GRACE)
        finally:  # also where a second signal ends the waiting
            while self._thread.is_alive():
                stopped = ctypes.py_object(_Stopped)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), stopped)
                self._thread.join(GRACE)


def _answer(future: Future[Made], call: Callable[[], Made]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
