"""The drawn world: analytic positions, mirrors, windows, loops, endless motion, and a picture at every size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamt2v.training.world.drawing import render
from streamt2v.training.world.scenes import (
    ASPECT,
    ATTRIBUTES,
    CIRCLING,
    FLOATING,
    LEFT,
    RIGHT,
    RISING,
    Scenes,
    framed,
    in_period,
    positions,
    sample_scenes,
    subject_mask,
)


def scenes(count: int, seed: int = 0, **fixed: int) -> Scenes:
    return sample_scenes(count, torch.Generator().manual_seed(seed), **fixed)


def centre_of(difference: torch.Tensor) -> tuple[float, float]:
    """Centre of mass (x, y) on the canvas of a map [H, W]."""
    height, width = difference.shape
    total = difference.sum()
    x = (difference.sum(0) * (torch.arange(width) + 0.5)).sum() / total / width * ASPECT
    y = (difference.sum(1) * (torch.arange(height) + 0.5)).sum() / total / height
    return float(x), float(y)


@pytest.mark.parametrize("motion", range(5), ids=ATTRIBUTES["motion"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_positions_say_where_the_pixels_are(motion: int, mirrored: bool) -> None:
    # White against red on the same background: only the subject differs between the two renderings.
    one = scenes(1, motion=motion, subject=0, colour=5, time=0)
    other = Scenes(**{**vars(one), "colour": torch.tensor([0])})
    if mirrored:
        one, other = one.mirrored(), other.mirrored()
    frame = torch.tensor([8])
    difference = (render(one, frame, 144, 256) - render(other, frame, 144, 256))[0, 0].abs().sum(0)
    mask = difference > 0.3
    x, y = centre_of(mask.float())
    expected = positions(one, frame)[0, 0]
    assert abs(x - float(expected[0])) < 0.03
    assert abs(y - float(expected[1])) < 0.03


@given(st.integers(8, 400), st.integers(8, 400))
def test_a_picture_of_any_shape_shows_as_much_of_the_world_with_square_pixels(height: int, width: int) -> None:
    left, top, right, bottom = framed(height, width)
    assert (right - left) * (bottom - top) == pytest.approx(1)
    assert (right - left) * ASPECT / width == pytest.approx((bottom - top) / height)
    assert (left + right, top + bottom) == pytest.approx((1, 1))


def test_a_frame_is_in_range_and_has_the_asked_size() -> None:
    clip = render(scenes(3), torch.arange(2), 36, 64)
    assert clip.shape == (3, 2, 3, 36, 64)
    assert -1 <= clip.min() < clip.max() <= 1


def test_twins_differ_in_the_motion_alone() -> None:
    many = scenes(200)
    twins, mirrored = many.twins(), many.mirrored()
    for name, value in vars(twins).items():
        in_place = (many.motion == FLOATING) | (many.motion == CIRCLING)
        if name != "motion":
            expected = torch.where(in_place, getattr(many, name), getattr(mirrored, name))
            assert torch.equal(value, expected), name
    expected = torch.tensor([RIGHT, LEFT, CIRCLING, RISING, FLOATING])[many.motion]
    assert torch.equal(twins.motion, expected)
    again = twins.twins()
    assert torch.equal(again.motion, many.motion)
    assert torch.equal(again.mirror, many.mirror)


def test_a_mirrored_scene_is_the_mirrored_picture_and_swaps_the_direction() -> None:
    batch = scenes(8)
    plain, mirrored = (render(s, torch.arange(3), 36, 64) for s in (batch, batch.mirrored()))
    assert torch.allclose(plain.flip(-1), mirrored, atol=1e-3)
    left = scenes(1, motion=0)
    assert ATTRIBUTES["motion"][int(left.mirrored().motion)] == "drifting right"


def test_a_window_shows_the_same_picture_as_the_crop() -> None:
    batch = scenes(2)
    whole = render(batch, torch.arange(1), 288, 512)
    part = render(batch, torch.arange(1), 144, 256, (0.25, 0.5, 0.75, 1.0))
    assert torch.allclose(whole[..., 144:, 128:384], part, atol=1e-4)


@pytest.mark.parametrize(("motion", "axis"), [(0, 0), (1, 0), (3, 1)])
def test_drifting_and_rising_leave_the_picture_and_come_back_without_an_end(motion: int, axis: int) -> None:
    scene = scenes(1, motion=motion)
    track = (ASPECT, 1.0)[axis] + 4 * float(scene.radius)
    period = track / float(scene.speed)
    times = torch.tensor([[3.0, 3.0 + period, 3.0 + 1000 * period]])
    centres = positions(scene, times)[0, :, axis]
    assert torch.allclose(centres, centres[:1].expand(3), atol=2e-2)
    path = positions(scene, torch.arange(0, int(period) + 2).float())[0, :, axis]
    jumps = path.diff().abs() > 0.2
    assert int(jumps.sum()) == 1
    before, after = path[:-1][jumps], path[1:][jumps]
    for place in (before, after):  # out of sight where it jumps
        beyond = torch.maximum(-place, place - (ASPECT, 1.0)[axis])
        assert float(beyond) > float(scene.radius)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(8, 90), st.integers(-50, 500))
def test_a_looping_scene_repeats_exactly(seed: int, period: int, frame: int) -> None:
    loop = scenes(5, seed, motion=seed % 5).looping(period)
    first, second = render(loop, torch.tensor([frame, frame + period]), 18, 32).unbind(1)
    assert torch.allclose(first, second, atol=2e-3)


def test_a_loop_still_moves() -> None:
    loop = scenes(40).looping(24)
    centres = positions(loop, torch.arange(24))
    assert (centres.diff(dim=1).abs().amax((1, 2)) > 0.005).all()


@given(st.floats(0, 0.2), st.integers(1, 500))
def test_rates_in_a_period_are_whole_numbers_of_cycles(rate: float, period: int) -> None:
    fitted = in_period(torch.tensor(rate, dtype=torch.double), torch.tensor(period, dtype=torch.double))
    cycles = float(fitted) * period
    assert cycles == pytest.approx(round(cycles), abs=1e-6)
    assert abs(float(fitted) - rate) <= 0.5 / period + 1e-9
    assert float(in_period(torch.tensor(rate), torch.tensor(0.0))) == pytest.approx(rate)


def test_a_scene_is_the_same_picture_at_every_size() -> None:
    batch = scenes(12)
    large = torch.nn.functional.interpolate(
        render(batch, torch.tensor([5]), 288, 512)[:, 0], (72, 128), mode="bilinear", antialias=True
    )
    assert (large - render(batch, torch.tensor([5]))[:, 0]).abs().mean() < 0.012


def test_a_frame_does_not_depend_on_what_is_drawn_with_it() -> None:
    batch = scenes(7)
    together = render(batch, torch.arange(3), 18, 32)
    alone = render(batch.take(slice(4, 5)), torch.arange(2, 3), 18, 32, at_once=1)
    assert torch.allclose(together[4, 2], alone[0, 0], atol=1e-5)


@pytest.mark.parametrize("attribute", [name for name in ATTRIBUTES if name != "motion"])
def test_every_word_changes_the_picture(attribute: str) -> None:
    pictures = [
        render(scenes(4, **{attribute: index}), torch.tensor([8])) for index in range(len(ATTRIBUTES[attribute]))
    ]
    for index, one in enumerate(pictures):
        for other in pictures[:index]:
            assert (one - other).abs().mean() > 0.004


def test_words_and_movement_agree() -> None:
    for motion, sign in ((0, -1), (1, 1)):
        step = positions(scenes(16, motion=motion), torch.tensor([7, 8]))[..., 0].diff(dim=1)
        assert (step * sign > 0).all()
    assert (positions(scenes(16, motion=3), torch.tensor([7, 8]))[..., 1].diff(dim=1) < 0).all()


def test_the_mask_peaks_at_the_subject() -> None:
    scene = scenes(1, motion=2)
    mask = subject_mask(scene, torch.tensor([5]), 9, 16)[0, 0]
    row, column = divmod(int(mask.argmax()), 16)
    x, y = positions(scene, torch.tensor([5]))[0, 0].tolist()
    assert abs((column + 0.5) / 16 * ASPECT - x) < 0.08
    assert abs((row + 0.5) / 9 - y) < 0.08


def test_scenes_follow_the_seed_and_the_fixed_attributes() -> None:
    assert torch.equal(scenes(5, 1).labels(), scenes(5, 1).labels())
    assert (scenes(9, 2, place=3).place == 3).all()
