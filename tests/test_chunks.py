"""Chunk plans: every frame once, sizes as asked, the last chunk shifted back."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamt2v.chunks import count, covering, middles, refinement_plan, seams, snap, streaming_plan
from streamt2v.errors import ConfigError

frames = st.integers(1, 400)
sizes = st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1)))


@given(frames, sizes)
def test_streaming_plan_makes_every_frame_once(num_frames: int, sizes: tuple[int, int]) -> None:
    plan = streaming_plan(num_frames, *sizes)
    new = [frame for chunk in plan for frame in range(chunk.new_start, chunk.stop)]
    assert new == list(range(num_frames))
    assert all(chunk.new_start - chunk.start == sizes[1] for chunk in plan[1:])
    assert all(chunk.size <= sizes[0] for chunk in plan)


@given(frames, sizes)
def test_refinement_plan_covers_every_frame_with_whole_chunks(num_frames: int, sizes: tuple[int, int]) -> None:
    size, overlap = sizes
    plan = refinement_plan(num_frames, size, overlap)
    assert count(num_frames, *sizes) == len(plan) == len(streaming_plan(num_frames, *sizes))
    new = [frame for chunk in plan for frame in range(chunk.new_start, chunk.stop)]
    assert new == list(range(num_frames))
    assert {chunk.size for chunk in plan} == {min(size, num_frames)}
    assert plan[0].start == 0
    strides = {after.start - before.start for before, after in pairwise(plan[:-1])}
    assert strides <= {size - overlap}


@given(frames, sizes)
def test_covering_is_what_the_records_say(num_frames: int, sizes: tuple[int, int]) -> None:
    plan = refinement_plan(num_frames, *sizes)
    for frame in range(num_frames):
        assert covering(plan, frame) == tuple(c.index for c in plan if c.start <= frame < c.stop)


@given(frames, sizes, st.booleans())
def test_middles_give_every_frame_to_one_chunk_that_has_it(num_frames: int, sizes: tuple[int, int], side: bool) -> None:
    plan = streaming_plan(num_frames, sizes[0], 0) if side else refinement_plan(num_frames, *sizes)
    owned = middles(plan)
    assert [frame for own in owned for frame in own] == list(range(num_frames))
    assert all(chunk.start <= own.start <= own.stop <= chunk.stop for chunk, own in zip(plan, owned, strict=True))
    for (left, right), own in zip(pairwise(plan), owned, strict=False):
        # Neighbours share what both have in halves: the later one has at most one frame less.
        assert 0 <= (own.stop - right.start) - (left.stop - own.stop) <= 1


def test_published_lengths() -> None:
    assert len(streaming_plan(1200, 16, 8)) == 149
    assert [c.start for c in refinement_plan(41, 24, 8)] == [0, 16, 17]
    assert seams(streaming_plan(40, 16, 8)) == (16, 24, 32)


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(1, 60)))
def test_a_change_waits_for_the_next_start(asked_: set[int], starts_: set[int]) -> None:
    asked, starts = sorted(asked_), sorted(starts_)
    wanted = [min((start for start in starts if start >= frame), default=None) for frame in asked]
    if None in wanted or len(set(wanted)) < len(wanted):
        with pytest.raises(ConfigError, match=r"would never be seen|both begin"):
            snap(asked, starts)
    else:
        assert list(snap(asked, starts)) == wanted


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (8, 8), (8, 9), (8, -1)])
def test_impossible_sizes_are_refused(size: int, overlap: int) -> None:
    with pytest.raises(ConfigError):
        streaming_plan(10, size, overlap)
    with pytest.raises(ConfigError):
        refinement_plan(10, size, overlap)


@pytest.mark.parametrize("plan", [streaming_plan, refinement_plan])
def test_no_frames_is_refused(plan: object) -> None:
    with pytest.raises(ConfigError, match="at least 1 frame"):
        plan(0, 16, 8)  # type: ignore[operator]
