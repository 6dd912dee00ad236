"""Runs that write what they read: everything but the networks is as it is, and a run takes a moment."""

from collections.abc import Iterator
from typing import Any

import pytest

from streamt2v.runs import refined
from streamt2v.runs.output import Finished


@pytest.fixture
def unrefined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the refiner pass on its frames, so that colours and times of the source can be looked at in the result."""

    def passed_on(known: Any, geometry: Any, base: Any, *more: Any) -> Iterator[Finished]:
        yield from refined.unrefined(geometry, base, more[-2])

    monkeypatch.setattr(refined, "groups", passed_on)
