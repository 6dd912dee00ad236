"""Pairs of the demo's refiner: both sides of a patch show the same place, as the whole pictures do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamt2v.media.frames import resize
from streamt2v.training import refiner
from streamt2v.training.world.drawing import render
from streamt2v.training.world.scenes import sample_scenes

SMALL = torch.rand(1, 3, 72, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1


@settings(max_examples=12, deadline=None)
@given(scale=st.sampled_from(sorted(set(refiner.SCALES))), place=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_part_is_enlarged_as_in_the_whole_picture(scale: int, place: tuple[float, float]) -> None:
    size = (min(40, 72 * scale), 40)
    top, left = (
        int(at * (whole - -(-extent // scale))) for at, whole, extent in zip(place, (72, 128), size, strict=True)
    )
    whole = resize(SMALL, (72 * scale, 128 * scale))[..., scale * top :, scale * left :]
    part = refiner.enlarged_part(SMALL, scale, top, left, size)
    assert torch.allclose(part, whole[..., : size[0], : size[1]], atol=1e-4)


@pytest.mark.parametrize("scale", [2, 6])
def test_a_part_is_rendered_as_in_the_whole_picture(scale: int) -> None:
    scenes, start = sample_scenes(1, torch.Generator().manual_seed(3)), torch.tensor([5])
    part = refiner.true_part(scenes, start, scale, 30, 50, (40, 24))
    whole = render(scenes, refiner.frames_from(start), 72 * scale, 128 * scale)
    assert torch.allclose(part, whole[..., 30 * scale :, 50 * scale :][..., :40, :24], atol=1e-4)


class Exact:
    """A codec that loses nothing."""

    device = torch.device("cpu")


@pytest.mark.parametrize(("scale", "height"), [(10, refiner.PATCH), (2, 144)])
def test_patches_show_one_place_in_source_and_truth(scale: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the codec loses nothing and nothing disturbs it, the source made small is the truth made small."""
    monkeypatch.setattr(refiner, "encode", lambda vae, frames: frames.transpose(1, 2))
    monkeypatch.setattr(refiner, "decode", lambda vae, latents: latents.transpose(1, 2).clamp(-1, 1))
    monkeypatch.setattr(refiner, "normal_like", lambda values, generator: torch.zeros_like(values))
    monkeypatch.setattr(refiner, "SCALES", (scale,))
    patches = refiner.DrawnPatches(Exact(), torch.Generator().manual_seed(1), first=4).draw(3)
    assert patches.truth.shape == patches.source.shape == (3, 3, refiner.PATCH_FRAMES, height, refiner.PATCH)

    def small(clips: torch.Tensor) -> torch.Tensor:
        return resize(clips.transpose(1, 2).flatten(0, 1), (16, 16))

    apart, elsewhere = (
        float((small(patches.truth) - small(other)).abs().mean())
        for other in (patches.source, patches.source.roll(1, 0))
    )
    assert 0 < 10 * apart < elsewhere


def test_frames_lie_in_threes() -> None:
    clips = torch.arange(2 * 3 * 5).view(2, 3, 5, 1, 1).expand(-1, -1, -1, 2, 2).float()
    threes = refiner.in_threes(clips)
    assert threes.shape == (6, 9, 2, 2)
    assert torch.equal(threes[1], clips[0, :, 1:4].transpose(0, 1).flatten(0, 1))
    assert torch.equal(threes[3], clips[1, :, :3].transpose(0, 1).flatten(0, 1))


def test_the_critic_sees_the_same_part_of_both() -> None:
    clips = torch.arange(144.0 * 256).view(1, 144, 256)
    corners = set[float]()
    for seed in range(40):
        part = refiner.judged(clips, torch.Generator().manual_seed(seed))
        assert clips[part].shape == (1, 128, 128)
        corners.add(float(clips[part][0, 0, 0]))
    assert max(corners) // 256 in range(10, 17)
    assert min(corners) // 256 in range(5)
    assert len(corners) > 30
