"""Frames: conversions are exact where they can be, nothing is cut, clamped or padded silently."""

import numpy as np
import pytest
import torch

from streamt2v.errors import ConfigError, NumericsError
from streamt2v.media import frames, shape


def all_levels() -> frames.Frames:
    return np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)


def test_every_level_survives_the_trip_to_float_and_back() -> None:
    floats = frames.to_float(all_levels())
    assert floats.shape == (1, 3, 16, 16)
    assert floats.dtype == torch.float32
    assert floats.min() == -1.0
    assert floats.max() == 1.0
    assert np.array_equal(frames.to_u8(floats), all_levels())


def test_half_precision_keeps_every_level_too() -> None:
    assert np.array_equal(frames.to_u8(frames.to_float(all_levels()).half()), all_levels())


def test_to_u8_rounds_and_clamps() -> None:
    values = torch.tensor([-3.0, 99.6 / 127.5 - 1, 99.4 / 127.5 - 1, 3.0]).reshape(4, 1, 1, 1).expand(4, 3, 1, 1)
    assert frames.to_u8(values)[:, 0, 0, 0].tolist() == [0, 100, 99, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_to_u8_refuses_bad_numbers(bad: float) -> None:
    values = torch.zeros(2, 3, 4, 4)
    values[1, 2, 3, 3] = bad
    with pytest.raises(NumericsError, match="NaN or Inf"):
        frames.to_u8(values)


def test_to_float_leaves_its_input_alone() -> None:
    source = all_levels()
    source.setflags(write=False)
    frames.to_float(source).fill_(0)
    assert np.array_equal(source, all_levels())


def test_resize_keeps_constants_range_and_identity() -> None:
    constant = torch.full((2, 3, 9, 16), 0.25)
    for size in ((5, 7), (18, 32), (9, 16)):
        assert torch.allclose(frames.resize(constant, size), torch.tensor(0.25), atol=1e-6)
    edge = torch.where(torch.arange(16) < 8, -1.0, 1.0).expand(1, 3, 9, 16)
    assert frames.resize(edge, (18, 32)).abs().max() <= 1.0
    assert frames.resize(edge, (9, 16)) is edge


def test_resize_does_not_alias() -> None:
    stripes = (torch.arange(64) % 2 * 2.0 - 1.0).expand(1, 3, 64, 64)
    assert frames.resize(stripes, (64, 21)).abs().max() < 0.2


@pytest.mark.parametrize(
    ("source", "box", "mode", "expected"),
    [
        ((144, 256), (720, 1280), "contain", shape.Fit(720, 1280, 720, 1280, 0, 0)),
        ((100, 100), (720, 1280), "contain", shape.Fit(720, 720, 720, 720, 0, 0)),
        ((100, 100), (720, 1280), "pad", shape.Fit(720, 1280, 720, 720, 0, 280)),
        ((100, 100), (720, 1280), "cover", shape.Fit(720, 1280, 1280, 1280, -280, 0)),
        ((90, 160), (101, 101), "contain", shape.Fit(56, 100, 56, 100, 0, 0)),
    ],
)
def test_fits(source: tuple[int, int], box: tuple[int, int], mode: shape.FitMode, expected: shape.Fit) -> None:
    assert shape.fit_into(source, box, mode) == expected


def test_fit_refuses_nonsense() -> None:
    with pytest.raises(ConfigError, match="1x1"):
        shape.fit_into((10, 10), (1, 1))
    with pytest.raises(ConfigError, match="stretch"):
        shape.fit_into((10, 10), (10, 10), "stretch")  # type: ignore[arg-type]


def test_apply_fit_pads_with_black_and_crops_the_middle() -> None:
    columns = torch.linspace(-0.5, 0.5, 8).expand(1, 3, 4, 8)
    padded = frames.apply_fit(columns, shape.fit_into((4, 8), (8, 8), "pad"))
    assert torch.all(padded[..., :2, :] == -1)
    assert torch.all(padded[..., 6:, :] == -1)
    assert torch.equal(padded[..., 2:6, :], columns)
    covered = frames.apply_fit(columns, shape.fit_into((4, 8), (4, 4), "cover"))
    assert torch.equal(covered, columns[..., 2:6])


def test_letterbox_repeats_edges() -> None:
    content = torch.arange(8.0).view(1, 1, 2, 4).expand(1, 3, 2, 4) / 10
    boxed = frames.letterbox(content, (6, 4))
    assert torch.equal(boxed[..., 0, :], content[..., 0, :])
    assert torch.equal(boxed[..., 5, :], content[..., 1, :])


def numbered(*lengths: int) -> list[frames.Frames]:
    total = np.arange(sum(lengths), dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
    return np.split(total, np.cumsum(lengths)[:-1])


def test_frames_are_taken_one_by_one_and_no_further_than_asked() -> None:
    def source():  # type: ignore[no-untyped-def]
        yield from numbered(4, 0, 4)
        raise AssertionError("read past the end")

    taken = [next(reader) for reader in [frames.singly(source())] for _ in range(8)]
    assert [image.shape for image in taken] == [(1, 1, 1, 3)] * 8
    assert np.concatenate(taken)[:, 0, 0, 0].tolist() == list(range(8))


def test_contact_sheet_places_every_frame() -> None:
    sheet = frames.contact_sheet(np.stack([np.full((2, 3, 3), 100 + i, np.uint8) for i in range(5)]))
    assert sheet.shape == (2 * 6 + 4, 3 * 7 + 4, 3)
    assert sheet[4, 4, 0] == 100
    assert sheet[10, 11, 0] == 104
    assert sheet[10, 18, 0] == 24


def test_one_bad_value_among_many_is_found_and_large_ones_are_not_bad() -> None:
    values = torch.zeros(100, 1000)
    assert frames.is_finite(values)
    for bad in (torch.nan, torch.inf, -torch.inf):
        values[57, 3] = bad
        assert not frames.is_finite(values)
        values[57, 3] = 0
    assert frames.is_finite(torch.full((10,), 3e38))  # the sum overflows, no value does
    assert frames.is_finite(torch.full((10,), 60_000.0, dtype=torch.float16))


def test_a_dark_clip_is_not_black() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        dark = rng.integers(0, rng.integers(2, 40), (4, 8, 8, 3), dtype=np.uint8)
        dark[rng.integers(4), rng.integers(8), rng.integers(8)] = 3  # one pixel that can be told from black
        assert not frames.is_black(dark)
    assert frames.is_black(np.zeros((4, 8, 8, 3), np.uint8))
    assert frames.is_black(rng.integers(0, 2, (4, 8, 8, 3), dtype=np.uint8) // 2 + 2)
