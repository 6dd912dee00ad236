"""CAM and APM, the two modules the method adds: their formulas, and that they start as nothing."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from benchmarks import concatenation
from streamt2v.chunks import Chunk, streaming_plan
from streamt2v.diffusion import replacement
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.errors import ConfigError
from streamt2v.families.streamingt2v import from_image, look
from streamt2v.models.apm import AppearanceTokens, TokenMixing
from streamt2v.models.cam import CamConfig, ConditionalAttention, init_from_unet
from streamt2v.models.encoders import encode_frames
from streamt2v.models.unet3d import CamMerger, TextContext, UNet3D, UNet3DConfig
from streamt2v.stages.denoise import BOTH, ChunkNoise, Sampling, denoise
from streamt2v.stages.stream import Streamer, StreamModels, chunk_noise, predictor
from streamt2v.training.losses import DEMO_SCHEDULE
from streamt2v.training.world.encoders import build_vision
from streamt2v.training.world.vae import build_vae

SIZES = UNet3DConfig(
    block_out_channels=(16, 32),
    attention_levels=(True, False),
    layers_per_block=1,
    cross_attention_dim=24,
    attention_head_dim=8,
    norm_num_groups=4,
    pooled_text_dim=6,
    frame_codes=True,
)
CAM = CamConfig(SIZES, (4, 6, 8), num_cond_frames=3)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def text(batch: int = 2) -> TextContext:
    return TextContext(torch.randn(batch, 5, 24), torch.randn(batch, 6))


@torch.no_grad()
def test_a_fresh_cam_sees_what_the_denoisers_encoder_sees() -> None:
    unet, cam = UNet3D(replace(SIZES, cam=True, image_tokens=2)).eval(), ConditionalAttention(CAM).eval()
    init_from_unet(cam, unet)
    latents, context, timestep = torch.randn(2, 4, 3, 4, 6), text(), torch.tensor([9, 800])
    features = cam(latents, timestep, cam.prepare(context), cam.embed_frames(torch.randn(1, 3, 3, 16, 24)))
    step = unet.begin(latents, timestep, unet.prepare(context), True, False)
    skips = unet.descend(unet.enter(latents, step), step)
    assert [f.shape[1] for f in features.down] == SIZES.skip_channels
    for feature, skip in zip(features.down, skips, strict=True):
        torch.testing.assert_close(feature.transpose(1, 2).flatten(0, 1), skip)
    torch.testing.assert_close(features.mid.transpose(1, 2).flatten(0, 1), unet.mid_block(skips[-1], step))


@torch.no_grad()
def test_cam_sees_frames_and_one_embedding_serves_both_branches() -> None:
    cam = ConditionalAttention(CAM).eval()
    torch.nn.init.normal_(cam.cond_embedding.conv_out.weight)
    latents, conditioning = torch.randn(2, 4, 3, 4, 6), cam.prepare(text())
    frames = torch.randn(1, 3, 3, 16, 24)
    once = cam.embed_frames(frames)
    assert once.shape == (1, 16, 3, 4, 6)
    shared = cam(latents, 7, conditioning, once)
    twice = cam(latents, 7, conditioning, cam.embed_frames(frames.expand(2, -1, -1, -1, -1)))
    other = cam(latents, 7, conditioning, cam.embed_frames(frames.flip(1)))
    torch.testing.assert_close(shared.mid, twice.mid)
    assert not torch.allclose(shared.mid, other.mid, rtol=1e-2)


def test_cam_settings_survive_json_and_mistakes_are_named() -> None:
    assert CamConfig.from_dict(json.loads(json.dumps(asdict(CAM)))) == CAM
    with pytest.raises(ConfigError, match="frames"):
        CamConfig.from_dict({"frames": 8})
    with pytest.raises(ConfigError, match="conv_in"):
        init_from_unet(ConditionalAttention(CAM), UNet3D(replace(SIZES, block_out_channels=(32, 32))))


@torch.no_grad()
def test_a_merger_is_attention_over_the_conditioning_frames_of_each_pixel() -> None:
    merger = CamMerger(16, head_dim=16, groups=4, frame_codes=False)
    x, features = torch.randn(5, 16, 2, 3), torch.randn(1, 16, 4, 2, 3)
    torch.testing.assert_close(merger(x, 5, features), x)
    torch.nn.init.normal_(merger.proj_out.weight)
    clip = x.transpose(0, 1)[None]  # [1, C, F, h, w]
    z = merger.proj_in(functional.group_norm(clip, 4, eps=1e-6)[0, :, :, 1, 2].T)  # [F, C]
    e = features[0, :, :, 1, 2].T  # [Fc, C]
    attention = merger.attention
    weights = torch.softmax(attention.to_q(z) @ attention.to_k(e).T / 4, dim=1)
    added = merger.proj_out(attention.to_out[0](weights @ attention.to_v(e)))
    torch.testing.assert_close(merger(x, 5, features)[:, :, 1, 2], x[:, :, 1, 2] + added, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_token_mixing_slides_along_the_features_with_tokens_as_channels() -> None:
    mixing = TokenMixing(3, 2, 6)
    context = torch.randn(1, 5, 6)
    torch.testing.assert_close(mixing(context), context[:, :3])
    mixing.alpha.fill_(1.5)
    weight, bias = mixing.conv.weight, mixing.conv.bias
    assert bias is not None
    padded = functional.pad(context[0], (1, 1))
    mixed = torch.stack(
        [
            torch.stack([bias[o] + (weight[o] * padded[:, j : j + 3]).sum() for j in range(6)])
            for o in range(3)
        ]
    )  # fmt: skip
    share = 1.5 / (1 + torch.tensor(-1.5).exp())
    expected = context[0, :3] + share * functional.layer_norm(mixed, (6,))
    torch.testing.assert_close(mixing(context)[0], expected)


def test_anchor_tokens_average_several_anchors() -> None:
    tokens = AppearanceTokens(embed_dim=5, hidden_dim=7, num_tokens=4, context_dim=6)
    embeddings = torch.randn(2, 3, 5)
    assert tokens(embeddings).shape == (2, 4, 6)
    torch.testing.assert_close(tokens(embeddings), tokens(embeddings.mean(dim=1)))
    assert AppearanceTokens(**tokens.config)(embeddings).shape == (2, 4, 6)


@torch.no_grad()
@pytest.mark.parametrize("batched", [True, False])
@torch.inference_mode()
def test_deep_layers_run_at_every_nth_step_of_a_chunk(batched: bool) -> None:
    """Five steps, the last two unguided: deep features of both branches, then those of one."""
    unet, cam = UNet3D(replace(SIZES, cam=True)).eval(), ConditionalAttention(CAM).eval()
    for parameter in [*unet.parameters(), *cam.parameters()]:
        parameter.add_(0.05 * torch.randn_like(parameter))
    rows: list[int] = []
    for network in (unet, cam):
        network.mid_block.register_forward_hook(lambda layer, given, made: rows.append(len(made)))
    plan, prepared, frames = streaming_plan(13, 5, 3)[1:4], text(), torch.rand(13, 3, 16, 16)
    models = StreamModels(unet, NoiseSchedule(DEMO_SCHEDULE), build_vae(), cam)
    noise = chunk_noise(SeededDraws(0), 5, (4, 4, 4))

    def latents(interval: int, chunks: Sequence[Chunk], batched: bool) -> list[Tensor]:
        sampling = Sampling(5, 2.0, guidance_stop=0.5, batched=batched, reuse_interval=interval)
        streamer = Streamer(models, prepared, frames[0], sampling, noise)
        return [streamer.chunk_latents(chunk, frames[chunk.start :][:3]) for chunk in chunks]

    whole = latents(1, plan[:1], batched)
    rows.clear()
    reusing = latents(2, plan, batched)
    # Steps 0, 2 and 4: CAM's three frames and the denoiser's five of every row.
    both = [6, 10] if batched else [3, 5, 3, 5]
    assert rows == [*both, *both, 3, 5] * len(plan)
    assert 1e-4 < (reusing[0] - whole[0]).abs().max() < 1
    torch.testing.assert_close(latents(2, plan[1:2], not batched)[0], reusing[1], rtol=1e-4, atol=1e-4)


def test_concatenation_gives_a_wider_denoiser_the_frames_latents_beside_its_own() -> None:
    unet, vae = UNet3D(replace(SIZES, in_channels=8)).eval(), build_vae()
    latents_for_cam: Any = concatenation.Latents(vae)
    models = StreamModels(unet, NoiseSchedule(DEMO_SCHEDULE), vae, latents_for_cam, step=concatenation.step)
    denoiser = models.unet.prepare(text())
    frames, latents = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 5, 2, 2)
    clean = encode_frames(models.vae, frames)  # [3, 4, 2, 2]
    joined = torch.zeros(2, 8, 5, 2, 2)
    joined[:, :4] = latents
    joined[:, 4:, :3] = clean.transpose(0, 1)
    found = predictor(models, denoiser, None, frames)(latents, 700, BOTH)
    torch.testing.assert_close(found, models.unet(joined, 700, denoiser))


def test_the_network_for_a_picture_is_told_of_a_loop() -> None:
    unet, seen = UNet3D(replace(SIZES, in_channels=9, cross_attention_dim=128)).eval(), list[Tensor]()
    unet.register_forward_pre_hook(lambda network, given: seen.append(given[0]))
    models = StreamModels(unet, NoiseSchedule(DEMO_SCHEDULE), build_vae().eval(), image_encoder=build_vision().eval())
    context, picture = TextContext(torch.randn(2, 5, 128), torch.randn(2, 6)), look(models, torch.rand(1, 3, 16, 16))
    noise = chunk_noise(SeededDraws(0), 5, (4, 2, 2))
    for loop in (False, True):
        from_image(models, unet, picture, context, Sampling(2, 2.0), noise, 5, loop=loop)
    clip, loop = torch.stack(seen[:2]), torch.stack(seen[2:])
    torch.testing.assert_close(clip[:, :, 4:8], loop[:, :, 4:8])  # the picture
    assert torch.equal(clip[0, :, :4], loop[0, :, :4])  # the noise
    assert (clip[:, :, 8] == 0).all()
    assert (loop[:, :, 8] == 1).all()


@pytest.mark.parametrize("known_frames", [1, 3])
def test_known_frames_run_from_their_noise_to_what_is_known(known_frames: int) -> None:
    """Without fresh noise they are sqrt(b) x_0 + sqrt(1 - b) n at every level b, whatever the network says."""
    schedule, noise, known = NoiseSchedule(DEMO_SCHEDULE), torch.randn(1, 4, 5, 2, 2), torch.randn(1, 4, 5, 2, 2)
    known = known[:, :, :known_frames]
    levels = schedule.ddim_grid(6)[1].tolist()

    def check(step: int, output: Tensor, latents: Tensor) -> None:
        level = levels[step + 1]
        wanted = level**0.5 * known + (1 - level) ** 0.5 * noise[:, :, :known_frames]
        torch.testing.assert_close(latents[:, :, :known_frames], wanted, rtol=1e-4, atol=1e-4)

    def predict(latents: Tensor, timestep: int, rows: slice) -> Tensor:
        return torch.randn(len(latents), *noise.shape[1:])

    given, sampling = ChunkNoise(noise, lambda step: torch.randn_like(noise)), Sampling(6, 1.0)
    held = replacement.Held(tuple(range(known_frames)), known)
    denoise(predict, schedule, given, sampling, check, held)
    stochastic = denoise(predict, schedule, given, replace(sampling, eta=1.0), held=held)
    final = levels[-1] ** 0.5 * known + (1 - levels[-1]) ** 0.5 * noise[:, :, :known_frames]
    assert (stochastic[:, :, :known_frames] - final).abs().max() < 0.1


@torch.inference_mode()
def test_replacement_keeps_the_conditioning_frames_in_place() -> None:
    unet = UNet3D(SIZES).eval()
    for parameter in unet.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    models, frames = StreamModels(unet, NoiseSchedule(DEMO_SCHEDULE), build_vae()), torch.rand(5, 3, 16, 16) * 2 - 1
    (_, chunk), prepared, noise = streaming_plan(7, 5, 3), text(), chunk_noise(SeededDraws(0), 5, (4, 2, 2))

    def latents(replacement: bool, cond_frames: int = 3, carry: float = 0.5) -> Tensor:
        sampling = Sampling(3, 2.0, replacement=replacement, replacement_carry=carry)
        streamer = Streamer(models, prepared, frames[0], sampling, noise)
        return streamer.chunk_latents(chunk, frames[:cond_frames])

    plain, held = latents(False), latents(True)
    known = encode_frames(models.vae, frames[:3]).transpose(0, 1)
    torch.testing.assert_close(held[0, :, :3], known, rtol=1e-3, atol=1e-3)
    assert (plain[0, :, :3] - known).abs().max() > 0.1
    assert (plain[:, :, 3:] - held[:, :, 3:]).abs().max() > 1e-3  # the new frames see them
    assert (latents(True, carry=0.0)[:, :, 3:] - held[:, :, 3:]).abs().max() > 1e-3
    assert torch.equal(latents(True, 0), latents(False, 0))


def test_a_chunk_leads_to_what_comes_later_until_its_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, place = list[tuple[float, bool]](), replacement.put_in_place

    def recording(clean: Tensor, held: replacement.Held, carry: float, lead: bool) -> Tensor:
        asked.append((carry, lead))
        return place(clean, held, carry, lead)

    monkeypatch.setattr(replacement, "put_in_place", recording)
    noise, held = torch.randn(1, 4, 6, 2, 2), replacement.Held((0, 5), torch.randn(1, 4, 2, 2, 2))
    given = ChunkNoise(noise, lambda step: torch.zeros_like(noise))
    for carry, wanted in ((0.5, [(0.5, True), (0.5, True), (0.0, True)]), (0.0, [(0.0, False)] * 3)):
        asked.clear()
        sampling = Sampling(3, 1.0, replacement=True, replacement_carry=carry)
        denoise(lambda latents, timestep, rows: latents * 0, NoiseSchedule(DEMO_SCHEDULE), given, sampling, held=held)
        assert asked == wanted


@pytest.mark.parametrize("carry", [0.0, 0.5, 1.0])
def test_what_replacement_changes_is_carried_on(carry: float) -> None:
    clean, known = torch.randn(2, 4, 6, 3, 3), torch.randn(2, 4, 2, 3, 3)
    placed = replacement.put_in_place(clean, replacement.Held((0, 1), known), carry)
    torch.testing.assert_close(placed[:, :, :2], known)
    for k in range(1, 5):
        expected = clean[:, :, 1 + k] + carry**k * (known[:, :, 1] - clean[:, :, 1])
        torch.testing.assert_close(placed[:, :, 1 + k], expected)
    same, moved = replacement.Held((0, 1, 2), clean[:, :, :3]), replacement.Held(tuple(range(6)), clean + 1)
    torch.testing.assert_close(replacement.put_in_place(clean, same, carry), clean)  # nothing to correct
    torch.testing.assert_close(replacement.put_in_place(clean, moved, carry), clean + 1)  # all known


@given(st.sets(st.integers(0, 7), min_size=1), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_new_frames_follow_the_held_ones_on_both_sides(places: set[int], carry: float, lead: bool) -> None:
    clean, held = torch.zeros(1, 1, 8, 1, 1), sorted(places)
    known = torch.tensor([float(2 + place) for place in held]).view(1, 1, -1, 1, 1)
    placed = replacement.put_in_place(clean, replacement.Held(tuple(held), known), carry, lead).flatten()
    for frame in range(8):
        if frame in places:
            assert placed[frame] == 2 + frame
            continue
        before, after = [p for p in held if p < frame][-1:], [p for p in held if p > frame][:1]
        last = max([-1, *before])
        expected = sum(carry ** (frame - place) * (2 + place) for place in before)
        expected += lead * sum((frame - last) / (place - last) * (2 + place) for place in after)
        assert float(placed[frame]) == pytest.approx(expected)
