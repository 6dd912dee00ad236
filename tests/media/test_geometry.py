"""Properties of frame geometry and frame streams that hold for every size."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamt2v.media import frames, shape

sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
boxes = st.tuples(st.integers(2, 4000), st.integers(2, 4000))
small = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(sizes, boxes, st.sampled_from(["contain", "cover", "pad"]))
def test_a_fit_is_even_and_inside_the_box(source: tuple[int, int], box: tuple[int, int], mode: shape.FitMode) -> None:
    fit = shape.fit_into(source, box, mode)
    assert fit.height % 2 == fit.width % 2 == 0
    assert 2 <= fit.height <= box[0]
    assert 2 <= fit.width <= box[1]
    if mode != "contain":
        assert (fit.height, fit.width) == (box[0] // 2 * 2, box[1] // 2 * 2)


@given(sizes, boxes)
def test_contain_touches_the_box_and_keeps_the_aspect_within_a_pixel(
    source: tuple[int, int], box: tuple[int, int]
) -> None:
    fit = shape.fit_into(source, box, "contain")
    even = (box[0] // 2 * 2, box[1] // 2 * 2)
    assert fit.height == even[0] or fit.width == even[1]
    exact_h, exact_w = fit.width * source[0] / source[1], fit.height * source[1] / source[0]
    # Two pixels is the least an even size can be, whatever the aspect ratio.
    assert min(abs(fit.height - exact_h), abs(fit.width - exact_w)) <= 1 or 2 in (fit.height, fit.width)


@given(sizes, boxes)
def test_cover_leaves_no_bar_and_crops_one_axis_only(source: tuple[int, int], box: tuple[int, int]) -> None:
    fit = shape.fit_into(source, box, "cover")
    assert fit.content_height >= fit.height
    assert fit.content_width >= fit.width
    assert fit.content_height == fit.height or fit.content_width == fit.width
    assert fit.top <= 0 <= fit.content_height + fit.top - fit.height
    assert fit.left <= 0 <= fit.content_width + fit.left - fit.width


@given(small, small, st.sampled_from(["contain", "cover", "pad"]))
def test_applying_a_fit_gives_its_size(source: tuple[int, int], extra: tuple[int, int], mode: shape.FitMode) -> None:
    fit = shape.fit_into(source, (1 + extra[0], 1 + extra[1]), mode)
    assert frames.apply_fit(torch.zeros(1, 3, *source), fit).shape == (1, 3, fit.height, fit.width)


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_cropping_undoes_letterboxing(size: tuple[int, int], extra: tuple[int, int]) -> None:
    content = torch.rand(2, 3, *size)
    canvas = (size[0] + extra[0], size[1] + extra[1])
    boxed = frames.letterbox(content, canvas)
    assert boxed.shape[-2:] == canvas
    assert torch.equal(frames.unletterbox(boxed, size), content)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 60))
def test_skipping_keeps_the_other_frames_in_order(lengths: list[int], skipped: int) -> None:
    total = np.arange(sum(lengths), dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
    stream = np.split(total, np.cumsum(lengths)[:-1])
    groups = list(frames.since(frames.numbered(iter(stream)), skipped))
    assert np.array_equal(np.concatenate([total[:0], *(group.frames for group in groups)]), total[skipped:])
    assert all(np.array_equal(group.frames, total[group.start : group.stop]) for group in groups)
