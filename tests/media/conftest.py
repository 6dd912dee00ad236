"""Runs that write what they read: everything but the networks is as it is, and a run takes a moment."""

from collections.abc import Iterator
from typing import Any

import pytest

from streamt2v.runs import pipeline


@pytest.fixture
def unrefined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the refiner pass on its frames, so that colours and times of the source can be looked at in the result."""

    def passed_on(maker: Any, geometry: Any, state: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        yield from ((group, {}) for group in maker._unrefined(geometry, maker.writer.mark.frames - maker.base_offset))

    monkeypatch.setattr(pipeline._Maker, "_refined", passed_on)
