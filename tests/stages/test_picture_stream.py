"""Streaming from a picture: conditioning, guidance, groups of the decoder, exact lengths, resuming."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from streamt2v.chunks import Chunk, middles, streaming_plan
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.diffusion.schedules import align_your_steps
from streamt2v.models.cam import CamConfig, ConditionalAttention
from streamt2v.models.encoders import decode_clip
from streamt2v.models.unet3d import UNet3D, UNet3DConfig
from streamt2v.stages.picture_stream import (
    Anchor,
    Motion,
    PictureModels,
    PictureSampling,
    PictureStreamer,
    decode_groups,
    picture_noise,
)
from streamt2v.stages.stream import StreamState, continued

FRAMES, OVERLAP = 6, 2
MOTION, CHUNK = Motion(), Chunk(1, 4, 10, 6)
CONFIG = UNet3DConfig(
    in_channels=8, block_out_channels=(8, 16), attention_levels=(True, False), layers_per_block=1,
    cross_attention_dim=8, attention_head_dim=8, transformer_in_heads=0, norm_num_groups=4, text_tokens=1,
    pooled_text_dim=12, blends_time=True,
)  # fmt: skip


class TemporalVae(torch.nn.Module):
    """Stands in for the library's: latents are means of 8x8 pixels, frames are smeared over their group."""

    dtype = torch.float32
    config = SimpleNamespace(scaling_factor=0.5, block_out_channels=(1, 1, 1, 1))

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[int] = []

    def encode(self, frames: Tensor) -> Any:
        small = torch.nn.functional.avg_pool2d(frames, 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=torch.cat([small, small[:, :1]], dim=1)))

    def decode(self, latents: Tensor, num_frames: int) -> Any:
        assert len(latents) == num_frames
        self.groups.append(num_frames)
        near = torch.nn.functional.pad(latents.flatten(1).T[None], (1, 1), mode="replicate")
        mean = torch.nn.functional.avg_pool1d(near, 3, 1)[0].T.view_as(latents)
        return SimpleNamespace(sample=torch.nn.functional.interpolate(mean[:, :3].tanh(), scale_factor=8.0))


@pytest.fixture(scope="module")
def models() -> PictureModels:
    torch.manual_seed(0)
    unet = UNet3D(replace(CONFIG, cam=True))
    cam = ConditionalAttention(CamConfig(CONFIG, (4, 4, 4, 8), OVERLAP, pixel_norms=True))
    with torch.no_grad():
        for parameter in (*unet.parameters(), *cam.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return PictureModels(unet.eval(), TemporalVae(), cam.eval())


def video(num_frames: int = FRAMES, seed: int = 1) -> Tensor:
    return torch.rand(num_frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def streamer(
    models: PictureModels, seed: int = 0, anchor: Anchor | None = None, motion: Motion = MOTION, batched: bool = True,
    scales: tuple[float, float] = (1.5, 3.0),
) -> PictureStreamer:  # fmt: skip
    noise = picture_noise(SeededDraws(seed), FRAMES, (4, 4, 4), (3, 32, 32))
    sampling = PictureSampling(3, *scales, batched=batched)
    anchor = anchor or Anchor(video()[OVERLAP - 1], torch.ones(1, 8))
    return PictureStreamer(models, anchor, motion, sampling, noise, decode_groups(FRAMES, 4, 1))


@pytest.mark.parametrize("num_frames", [1, 6, 7, 10, 11, 23])
def test_any_length_is_exact(models: PictureModels, num_frames: int) -> None:
    plan, state = streaming_plan(num_frames, FRAMES, OVERLAP), StreamState.after_first_chunk(video(), OVERLAP, 1)
    frames = torch.cat(
        [video()[: plan[0].stop], *(new for new, _ in continued(streamer(models).new_frames, state, plan[1:]))]
    )
    assert frames.shape == (num_frames, 3, 32, 32)
    assert float(frames.abs().max()) <= 1


def test_a_run_goes_on_from_any_state(models: PictureModels) -> None:
    plan, state = streaming_plan(14, FRAMES, OVERLAP), StreamState.after_first_chunk(video(), OVERLAP, 1)
    (first, after), (second, _) = continued(streamer(models).new_frames, state, plan[1:])
    again = list(continued(streamer(models).new_frames, after, plan[2:]))
    assert torch.equal(again[0][0], second)
    assert torch.equal(after.conditioning_frames, first[-OVERLAP:])
    assert torch.equal(after.anchor, video()[1])


def test_every_condition_changes_the_chunk(models: PictureModels) -> None:
    known, anchor = video()[-OVERLAP:], Anchor(video()[1], torch.ones(1, 8))
    latents = streamer(models).chunk_latents(CHUNK, known)
    others = {
        "seed": streamer(models, seed=1).chunk_latents(CHUNK, known),
        "chunk": streamer(models).chunk_latents(Chunk(2, 8, 14, 10), known),
        "known frames": streamer(models).chunk_latents(CHUNK, -known),
        "no CAM": streamer(replace(models, cam=None)).chunk_latents(CHUNK, known),
        "anchor": streamer(models, anchor=Anchor(-anchor.frame, anchor.embedding)).chunk_latents(CHUNK, known),
        "embedding": streamer(models, anchor=Anchor(anchor.frame, -anchor.embedding)).chunk_latents(CHUNK, known),
        "rate": streamer(models, motion=Motion(fps_id=20)).chunk_latents(CHUNK, known),
        "motion": streamer(models, motion=Motion(motion_bucket_id=5)).chunk_latents(CHUNK, known),
        "noise": streamer(models, motion=Motion(noise_aug_strength=0.5)).chunk_latents(CHUNK, known),
        "guidance": streamer(models, scales=(1.5, 2.0)).chunk_latents(CHUNK, known),
    }
    same = [name for name, other in others.items() if torch.allclose(other, latents, atol=1e-4)]
    assert same == []
    assert torch.equal(streamer(models).chunk_latents(CHUNK, known), latents)


def test_guidance_branches_may_run_one_after_the_other(models: PictureModels) -> None:
    known = video()[-OVERLAP:]
    together, apart = (streamer(models, batched=b).chunk_latents(CHUNK, known) for b in (True, False))
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_guidance_of_one_at_the_first_frame_is_no_guidance_there(models: PictureModels) -> None:
    stage, known = streamer(models, scales=(1.0, 4.0)), video()[-OVERLAP:]
    plain = streamer(models, scales=(1.0, 1.0))
    rho, x = align_your_steps(3), torch.randn(1, 4, FRAMES, 4, 4)
    beside = stage.anchor_latents(torch.zeros(3, 32, 32))
    guided, unguided = (s.estimator(rho, beside, known, FRAMES)(x, 1) for s in (stage, plain))
    torch.testing.assert_close(guided[:, :, 0], unguided[:, :, 0])
    assert not torch.allclose(guided[:, :, 1], unguided[:, :, 1], atol=1e-4)


def test_the_anchor_is_encoded_unscaled_with_its_noise_and_withheld_from_one_branch(models: PictureModels) -> None:
    latents = streamer(models).anchor_latents(torch.ones(3, 32, 32))
    assert not latents[0].any()
    brighter = video()[1][None] + 0.02
    torch.testing.assert_close(latents[1, :, 0], models.vae.encode(brighter).latent_dist.mean[0])


def test_noise_belongs_to_frames_and_chunks() -> None:
    noise = picture_noise(SeededDraws(3), FRAMES, (4, 2, 2), (3, 16, 16))
    first, second = noise(CHUNK), noise(Chunk(2, 8, 14, 10))
    assert torch.equal(first.initial[:, :, -OVERLAP:], second.initial[:, :, :OVERLAP])
    assert not torch.equal(first.anchor, second.anchor)
    assert 0 <= float(first.anchor.min()) <= float(first.anchor.max()) < 1
    normal = picture_noise(SeededDraws(3), FRAMES, (4, 2, 2), (3, 16, 16), kind="normal")(CHUNK)
    assert float(normal.anchor.min()) < 0


def sizes(groups: tuple[Chunk, ...]) -> list[int]:
    return [group.size for group in groups]


def test_published_groups_leave_the_last_frame_alone_and_corrected_ones_do_not() -> None:
    assert sizes(decode_groups(25, 8, variant="published")) == [8, 8, 8, 1]
    assert sizes(decode_groups(25, 4, variant="published")) == [4, 4, 4, 4, 4, 4, 1]
    corrected = decode_groups(25)
    assert sizes(corrected) == [8, 8, 8, 8]
    # No frame but the first and last lies at the end of the group it is taken from.
    for group, own in zip(corrected, middles(corrected), strict=True):
        assert own.start > group.start or own.start == 0
        assert own.stop < group.stop or own.stop == 25


def test_groups_without_wanted_frames_are_not_decoded() -> None:
    vae, latents = TemporalVae(), torch.randn(25, 4, 2, 2)
    whole = decode_clip(vae, latents, decode_groups(25))
    assert vae.groups == [8] * 4
    vae.groups.clear()
    assert torch.equal(decode_clip(vae, latents, decode_groups(25), first=7), whole[7:])
    assert vae.groups == [8] * 3


def test_overlapping_groups_show_frames_their_neighbours() -> None:
    """The stand-in looks one frame to each side: any overlap of two is as good as one group."""
    vae, latents = TemporalVae(), torch.randn(25, 4, 2, 2)
    whole = decode_clip(vae, latents, decode_groups(25, 25))
    torch.testing.assert_close(decode_clip(vae, latents, decode_groups(25, 8, 2)), whole)
    published = decode_clip(vae, latents, decode_groups(25, 8, variant="published"))
    differing = [frame for frame in range(25) if not torch.allclose(published[frame], whole[frame])]
    assert differing == [7, 8, 15, 16, 23, 24]
