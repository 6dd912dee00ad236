"""Chunk plans: every frame once, sizes as asked, the last chunk shifted back."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamt2v import chunks
from streamt2v.chunks import amount, count, covering, loop_plan, middles, refinement_plan, seams, snap, streaming_plan
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


@given(frames, sizes, st.sets(st.integers(0, 450), max_size=4), st.booleans(), st.integers(1, 3))
def test_streaming_plan_gives_held_frames_all_the_room_there_is(
    num_frames: int, sizes: tuple[int, int], ends: set[int], whole_first: bool, lead: int
) -> None:
    size, overlap = sizes
    ends = {end for end in ends if size <= end}
    plan = streaming_plan(num_frames, size, overlap, sorted(ends), whole_first, lead)
    new = [frame for chunk in plan for frame in range(chunk.new_start, chunk.stop)]
    assert new == list(range(num_frames))
    assert all(chunk.new_start - chunk.start == overlap for chunk in plan[1:])
    assert all(chunk.num_new >= 1 for chunk in plan)
    assert plan[0].stop == min(size, num_frames) or not whole_first
    step, before = size - overlap, 0
    most = lead * step
    assert plan[0].stop >= min(overlap, num_frames)  # the next chunk repeats so many
    for chunk in plan[1:]:
        last = chunk.stop in ends or chunk.stop == num_frames  # only what leads somewhere may be long
        assert chunk.num_new <= (most if last else step)
    for end in sorted(ends):
        # Nothing held lies nearer before it, so a chunk ends with it, with as many new frames as it may have.
        if end - before >= most + step and end > size + most and end <= num_frames:
            assert any(chunk.stop == end and chunk.num_new == most for chunk in plan)
        before = end


def test_a_stream_that_comes_home_ends_with_the_first_frames() -> None:
    plan = streaming_plan(45, 16, 8, [49])
    assert [(chunk.start, chunk.stop, chunk.new_start) for chunk in plan] == [
        (0, 16, 0), (8, 24, 16), (16, 32, 24), (24, 40, 32), (32, 41, 40), (33, 45, 41)
    ]  # fmt: skip
    assert [chunk.stop for chunk in streaming_plan(45, 16, 8, [49], lead=2)] == [16, 24, 32, 33, 45]
    assert [chunk.stop for chunk in streaming_plan(17, 16, 8, [21])] == [13, 17]  # the first chunk is cut for it
    assert [chunk.stop for chunk in streaming_plan(17, 16, 8, [21], lead=2)] == [8, 17]
    assert [chunk.stop for chunk in streaming_plan(17, 16, 8, [21], whole_first=True)] == [16, 17]


@given(st.integers(1, 90), sizes, st.integers(0, 60))
def test_every_round_of_a_loop_plan_is_the_same(num_frames: int, sizes: tuple[int, int], reach: int) -> None:
    size, overlap = sizes
    plan, around = loop_plan(num_frames, size, overlap, reach)
    assert {chunk.size for chunk in plan} == {size}
    assert plan[0].start == 0
    assert around.lead >= reach
    assert plan[-1].stop >= around.lead + num_frames + reach
    assert around.frame(around.lead) == 0
    assert around.chunk(around.first) == 0
    assert all(before.start < after.start <= before.stop for before, after in pairwise(plan))
    begins = {around.chunk(chunk.index): around.frame(chunk.start) for chunk in plan}
    assert all(around.frame(chunk.start) == begins[around.chunk(chunk.index)] for chunk in plan)


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
def test_a_last_chunk_may_be_shorter(num_frames: int, sizes: tuple[int, int]) -> None:
    plan, shifted = (refinement_plan(num_frames, *sizes, shift_back) for shift_back in (False, True))
    assert [chunk.new_start for chunk in plan] == [chunk.new_start for chunk in shifted]
    assert plan[:-1] == shifted[:-1]
    assert plan[-1].stop == num_frames
    assert all(after.start == before.stop - sizes[1] for before, after in pairwise(plan))
    assert sum(chunk.size for chunk in plan) == num_frames + sizes[1] * (len(plan) - 1)
    assert amount(shifted) == len(shifted)
    assert amount(plan) * plan[0].size == pytest.approx(sum(chunk.size for chunk in plan))


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


@given(st.integers(1, 2000), st.integers(1, 12))
def test_latents_hold_all_frames_and_no_latent_too_many(num_frames: int, per: int) -> None:
    count = chunks.packed(num_frames, per)
    assert chunks.unpacked(count, per) >= num_frames > chunks.unpacked(count - 1, per)
    assert chunks.packed(chunks.unpacked(count, per), per) == count


@given(st.integers(1, 1500), st.integers(1, 8), st.integers(2, 20), st.data())
def test_chunks_of_latents_are_chunks_of_frames(num_frames: int, per: int, size: int, data: st.DataObject) -> None:
    """Whole numbers of latents: as many chunks, and each chunk's new latents hold the first new frame of its own."""
    overlap = data.draw(st.integers(1, size - 1))
    frames = chunks.refinement_plan(num_frames, chunks.unpacked(size, per), chunks.unpacked(overlap, per))
    latents = chunks.refinement_plan(chunks.packed(num_frames, per), size, overlap)
    assert len(frames) == len(latents)
    for shown, packed in zip(frames, latents, strict=True):
        assert chunks.unpacked(packed.new_start, per) == shown.new_start
    stream = chunks.streaming_plan(num_frames, chunks.unpacked(size, per), chunks.unpacked(overlap, per))
    for chunk in stream[1:]:
        assert chunks.unpacked(chunks.packed_start(chunk, per) + overlap, per) == chunk.new_start


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 8))
def test_a_window_of_a_codec_ends_with_its_latents(first: int, count: int, per: int) -> None:
    window = chunks.packed_window(first, first + count, per)
    assert len(window) == chunks.unpacked(count, per)
    assert window.stop == chunks.unpacked(first + count, per)
    assert first or window.start == 0
