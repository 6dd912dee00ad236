"""Streams that training makes itself: where they are in their scene, and what should follow."""

from dataclasses import replace

import pytest
import torch

from streamt2v.training import denoisers, streams
from streamt2v.training.batches import Batch
from streamt2v.training.denoisers import Lesson, TextSource
from streamt2v.training.sheets import models
from streamt2v.training.world.captions import UNSPECIFIED, build_tokenizer, parse
from streamt2v.training.world.clips import encode
from streamt2v.training.world.drawing import render
from streamt2v.training.world.encoders import DIM, build_text, build_vision
from streamt2v.training.world.scenes import (
    CIRCLING,
    FLOATING,
    LEFT,
    RISING,
    Scenes,
    positions,
    sample_scenes,
    subject_mask,
)
from streamt2v.training.world.vae import build_vae


def one(motion: int, seed: int = 0) -> Scenes:
    return sample_scenes(1, torch.Generator().manual_seed(seed), motion=motion, weather=0)


@pytest.mark.parametrize("motion", [LEFT, FLOATING, RISING, CIRCLING])
@pytest.mark.parametrize("off", [-20, 0, 3, 20])
def test_the_moment_that_pictures_show_is_found(motion: int, off: int) -> None:
    """Darker, tinted and noisy; of motions that repeat every round will do."""
    scene, last = one(motion, seed=motion), 60
    known = 0.8 * render(scene, last - 7 + torch.arange(8)[None])[0] + torch.tensor([0.1, 0.0, -0.1])[:, None, None]
    known = known + 0.05 * torch.randn(known.shape, generator=torch.Generator().manual_seed(0))
    found = streams.likest(scene, known, last + off)
    places = positions(scene, torch.tensor([[found, last, found - 3, last - 3]]))[0]
    assert (places[0] - places[1]).norm() < 0.08
    assert (places[2] - places[3]).norm() < 0.1


def test_a_light_that_stood_still_goes_on_from_where_it_is() -> None:
    scene = one(LEFT)
    known = render(scene, torch.full((1, 8), 30))[0]
    assert abs(streams.likest(scene, known, 38) - 30) <= 1


def test_what_follows_begins_like_the_known_frames_and_ends_like_the_scene() -> None:
    vae, scene = build_vae().eval(), one(LEFT)
    true = render(scene, torch.arange(23, 39)[None])
    known = (true[0, :8] + 0.3).clamp(-1, 1)  # too bright
    latents, mask = streams.what_follows(vae, scene, known, 30)
    assert torch.equal(latents[:, :, :8], encode(vae, known[None]))
    assert torch.equal(mask, subject_mask(scene, torch.arange(23, 39), 9, 16))
    wrong = (latents - encode(vae, true)).abs().mean((0, 1, 3, 4))
    assert (wrong[8:].diff() < 0).all()
    assert wrong[8] > 0.5 * wrong[7]
    assert wrong[15] < 0.15 * wrong[7]
    exact, _ = streams.what_follows(vae, scene, true[0, :8], 30)
    assert torch.allclose(exact, encode(vae, true), atol=1e-4)


def test_streams_go_on_by_turns_from_what_they_made(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "block_out_channels": (8, 8), "attention_levels": (True, False), "norm_num_groups": 2, "attention_head_dim": 8
    }  # fmt: skip
    monkeypatch.setattr(streams, "SHORTEST", 2)
    monkeypatch.setattr(streams, "LONGEST", 2)
    base = replace(denoisers.BASE, **sizes)
    unet = denoisers.UNet3D(base)
    cam = denoisers.ConditionalAttention(replace(denoisers.CAM, unet=replace(denoisers.CAM.unet, **sizes)))
    apm = denoisers.AppearanceTokens(DIM, 2 * DIM, denoisers.IMAGE_TOKENS, DIM)
    tokenizer, vae = build_tokenizer(), build_vae().eval()
    text = TextSource(tokenizer, build_text(len(tokenizer)))
    lesson = Lesson(text, vae, build_vision().eval(), torch.ones(4), torch.Generator().manual_seed(0))
    own = streams.OwnStreams(models(unet, vae, cam, (apm, lesson.vision)), lesson, count=2)
    made = [own.make() for _ in range(3)]
    for batch in made:
        assert batch.own is not None
        assert batch.shown is not None
        assert batch.latents.shape == batch.own.shape == (2, 4, 16, 9, 16)
        assert batch.mask.shape == (2, 16, 9, 16)
        assert not batch.own.is_inference()
        assert torch.allclose(batch.own[:, :, :8], encode(vae, batch.shown), atol=1e-4)  # held
        assert all(parse(caption)[2] != UNSPECIFIED for caption in batch.captions)
    first, second, third = made
    assert first.captions == second.captions
    assert first.captions != third.captions  # two chunks were made, other scenes follow
    assert first.anchors is not None
    assert second.anchors is not None
    assert torch.equal(first.anchors, second.anchors)
    loss = denoisers.streaming_loss(unet, cam, (apm, lesson.vision), second, lesson)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)


def test_half_of_the_chunks_are_learned_from_noise() -> None:
    batch = Batch(torch.zeros(1, 4, 2, 1, 1), [""], torch.zeros(1, 2, 1, 1), own=torch.ones(1, 4, 2, 1, 1))
    generator = torch.Generator().manual_seed(0)
    kept = [streams.plain_or_own(batch, generator).own is not None for _ in range(200)]
    assert 0.4 < sum(kept) / 200 < 0.6
