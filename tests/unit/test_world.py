"""The procedural world: analytic positions, mirrors, windows and endless motion."""

import pytest
import torch

from streamt2v.training.world import (
    ASPECT,
    ATTRIBUTES,
    Scenes,
    positions,
    render,
    sample_scenes,
    subject_mask,
    wrap_periods,
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


def test_a_frame_is_in_range_and_has_the_asked_size() -> None:
    clip = render(scenes(3), torch.arange(2), 36, 64)
    assert clip.shape == (3, 2, 3, 36, 64)
    assert -1 <= clip.min() < clip.max() <= 1


def test_a_mirrored_scene_is_the_mirrored_picture_and_swaps_the_direction() -> None:
    batch = scenes(8, subject=3)  # balls and stars keep their light from the left
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
def test_drifting_and_rising_wrap_around_without_an_end(motion: int, axis: int) -> None:
    scene = scenes(1, motion=motion)
    period = float(wrap_periods(scene)[axis] / scene.speed)
    times = torch.tensor([[3.0, 3.0 + period, 3.0 + 1000 * period]])
    centres = positions(scene, times)[0, :, axis]
    assert torch.allclose(centres, centres[:1].expand(3), atol=2e-2)


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
