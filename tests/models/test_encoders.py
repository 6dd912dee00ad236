"""Text, image and VAE encoders behind small functions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

from streamt2v.errors import ConfigError, NumericsError
from streamt2v.models import encoders
from streamt2v.models.clip import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from streamt2v.models.vae import AutoencoderConfig, AutoencoderKL

TEXT = CLIPTextConfig(
    vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=6, projection_dim=5, eos_token_id=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def vae() -> AutoencoderKL:
    sizes = AutoencoderConfig(
        block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5, mid_block_add_attention=False
    )
    return AutoencoderKL(sizes).eval()


def tokenizer(texts: list[str], max_length: int, **named: Any) -> SimpleNamespace:
    """Letters as numbers, padded: stands in for a library tokenizer."""
    assert named == {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    rows = [[1, *(3 + ord(letter) % 17 for letter in text[: max_length - 2]), 2] for text in texts]
    return SimpleNamespace(input_ids=torch.tensor([row + [0] * (max_length - len(row)) for row in rows]))


@torch.no_grad()
def test_text_is_the_last_hidden_state_and_the_pooled_vector_if_there_is_one() -> None:
    plain, projected = CLIPTextModel(TEXT).eval(), CLIPTextModelWithProjection(TEXT).eval()
    context = encoders.encode_text(tokenizer, plain, ["ab", "a longer text"])
    assert context.tokens.shape == (2, 6, 8)
    assert context.pooled is None
    pooled = encoders.encode_text(tokenizer, projected, ["ab"]).pooled
    assert pooled is not None
    assert pooled.shape == (1, 5)


@torch.no_grad()
def test_images_of_any_shape_are_embedded_and_not_normalised() -> None:
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=5,
        image_size=16, patch_size=8,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(config).eval()
    embedding = encoders.embed_image(encoder, torch.rand(2, 3, 20, 36) * 2 - 1)
    assert embedding.shape == (2, 5)
    assert not torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-3)


def test_clip_pixels_are_resized_and_normalised() -> None:
    same = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoders.CLIP_MEAN, encoders.CLIP_STD))
    torch.testing.assert_close(encoders.clip_pixels(same, 16), ((same + 1) / 2 - mean) / std)
    grey = encoders.clip_pixels(torch.zeros(1, 3, 90, 160), 16)
    torch.testing.assert_close(grey, ((0.5 - mean) / std).expand(1, 3, 16, 16))
    # A fine checkerboard shrinks to grey instead of aliasing.
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 3, 64, 64).view(1, 3, 128, 128)
    assert (encoders.clip_pixels(board, 16) - grey).abs().max() < 0.1


@torch.no_grad()
def test_latents_are_the_posterior_mean_or_a_draw_around_it(vae: AutoencoderKL) -> None:
    frames, noise = torch.rand(3, 3, 8, 12) * 2 - 1, torch.randn(3, 4, 4, 6)
    posterior = vae.encode(frames).latent_dist
    torch.testing.assert_close(encoders.encode_frames(vae, frames), 0.5 * posterior.mean)
    drawn = encoders.encode_frames(vae, frames, noise)
    torch.testing.assert_close(drawn, 0.5 * (posterior.mean + posterior.std * noise), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_frames_are_decoded_one_by_one_and_clamped(vae: AutoencoderKL) -> None:
    latents = torch.randn(3, 4, 4, 6)
    frames = encoders.decode_latents(vae, latents)
    torch.testing.assert_close(frames, vae.decode(latents / 0.5).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert encoders.decode_latents(vae, 1000 * latents).abs().max() == 1


def test_frame_sizes_that_the_vae_cannot_halve_are_named(vae: AutoencoderKL) -> None:
    assert encoders.latent_size(vae, 8, 12) == (4, 6)
    with pytest.raises(ConfigError, match="13x8"):
        encoders.latent_size(vae, 8, 13)


@pytest.fixture
def overflowing(vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> AutoencoderKL:
    """A VAE that computes in 32 bit but overflows whenever its weights are 16 bit wide."""
    narrow = vae.to(torch.bfloat16)
    for name in ("encode", "decode"):
        real = getattr(AutoencoderKL, name)

        def call(vae: AutoencoderKL, x: torch.Tensor, real: Any = real) -> Any:
            made = real(vae, x)
            values = made.sample if hasattr(made, "sample") else made.latent_dist.mean
            return made if vae.dtype == torch.float32 else (values[..., :1].fill_(torch.inf), made)[1]

        monkeypatch.setattr(AutoencoderKL, name, call)
    return narrow


@torch.no_grad()
def test_a_vae_that_overflows_in_16_bit_is_asked_once_more_in_32(
    overflowing: AutoencoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    latents, frames = torch.randn(2, 4, 4, 6), torch.rand(2, 3, 8, 12) * 2 - 1
    decoded, encoded = encoders.decode_latents(overflowing, latents), encoders.encode_frames(overflowing, frames)
    assert overflowing.dtype == torch.bfloat16
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == ["the VAE fails in 16 bit"] * 2
    assert torch.isfinite(decoded).all() and torch.isfinite(encoded).all()
    wide = overflowing.float()
    torch.testing.assert_close(decoded, encoders.decode_latents(wide, latents))
    torch.testing.assert_close(encoded, encoders.encode_frames(wide, frames))


@torch.no_grad()
def test_what_is_bad_in_32_bit_too_is_refused(overflowing: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(2, 4, 4, 6)
    with pytest.raises(NumericsError, match="a network produced"):
        encoders.decode_latents(overflowing, latents / 0)
    with pytest.raises(NumericsError, match="the VAE produced"):
        encoders.encode_frames(overflowing, torch.full((1, 3, 8, 12), 3e38))
    # Black is a picture, unless it follows an overflow; one value everywhere is none.
    black = SimpleNamespace(sample=torch.full((1, 3, 8, 12), -1.0).sub_(torch.rand(1, 3, 8, 12) / 1000))
    monkeypatch.setattr(AutoencoderKL, "decode", lambda vae, x: black)
    assert encoders.decode_latents(overflowing, torch.randn(1, 4, 4, 6)).max() == -1
    empty, dtypes = SimpleNamespace(sample=torch.zeros(1, 3, 8, 12)), []
    monkeypatch.setattr(AutoencoderKL, "decode", lambda vae, x: (dtypes.append(vae.dtype), empty)[1])
    with pytest.raises(NumericsError, match="a single value"):
        encoders.decode_latents(overflowing, torch.randn(1, 4, 4, 6))
    assert dtypes == [torch.bfloat16, torch.float32]
    full = SimpleNamespace(sample=torch.full((1, 3, 8, 12), torch.nan))
    monkeypatch.setattr(AutoencoderKL, "decode", lambda vae, x: black if vae.dtype == torch.float32 else full)
    with pytest.raises(NumericsError, match="nothing but black"):
        encoders.decode_latents(overflowing, torch.randn(1, 4, 4, 6))


@pytest.mark.parametrize("size", [(576, 1024), (300, 224), (256, 256)])
def test_a_wide_frame_is_resized_for_clip_as_the_library_does_for_its_pictures(size: tuple[int, int]) -> None:
    frames = torch.rand(1, 3, *size) * 2 - 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoders.CLIP_MEAN, encoders.CLIP_STD))
    found = (encoders.clip_pixels(frames, 224) * std + mean) * 2 - 1
    # Both blur in float32; the undone normalisation rounds once more.
    torch.testing.assert_close(found, _resize_with_antialiasing(frames, (224, 224)), rtol=1e-4, atol=1e-4)
