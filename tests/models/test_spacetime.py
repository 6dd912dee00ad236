"""Layers that blend space and time: equal to the library's network, and to themselves in every way of running."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from streamt2v.errors import ConfigError
from streamt2v.models.cam import CamConfig, ConditionalAttention
from streamt2v.models.layers import Attention, KeysValues, sinusoids
from streamt2v.models.unet3d import TextContext, UNet3D, UNet3DConfig

CONFIG = UNet3DConfig(
    in_channels=8, block_out_channels=(32, 64), attention_levels=(True, False), layers_per_block=2,
    cross_attention_dim=16, attention_head_dim=16, transformer_in_heads=0, text_tokens=1, pooled_text_dim=24,
    blends_time=True,
)  # fmt: skip
LEVEL = 0.275


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def shaken(network: nn.Module) -> nn.Module:
    """Give every parameter a value of its own: fresh networks hide mistakes behind zeros and ones."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def unet(config: UNet3DConfig = CONFIG) -> UNet3D:
    network = shaken(UNet3D(config))
    assert isinstance(network, UNet3D)
    return network


def context(numbers: Tensor) -> TextContext:
    return TextContext(torch.randn(2, 1, 16), sinusoids(numbers, 8).flatten(1).expand(2, -1))


NUMBERS = torch.tensor([[6.0, 127.0, 0.02]])


@torch.no_grad()
def test_it_computes_what_the_library_does() -> None:
    ours = unet()
    library = UNetSpatioTemporalConditionModel(
        in_channels=8, out_channels=4, down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), block_out_channels=(32, 64),
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, layers_per_block=2, cross_attention_dim=16,
        num_attention_heads=(2, 4),
    ).eval()  # fmt: skip
    names = {"text_embedding.0": "add_embedding.linear_1", "text_embedding.2": "add_embedding.linear_2"}
    library.load_state_dict({
        key.replace(key[:16], names.get(key[:16], key[:16])): value for key, value in ours.state_dict().items()
    })  # fmt: skip
    for name, layer in library.named_modules():
        if isinstance(layer, nn.GroupNorm) and "attentions" not in name:
            layer.eps = 1e-5
    latents, text = torch.randn(2, 8, 5, 6, 4), context(NUMBERS)
    expected = library(latents.transpose(1, 2), LEVEL, text.tokens, NUMBERS.expand(2, -1)).sample.transpose(1, 2)
    # The library's normalisations come in another order of sums; both compute in float32.
    torch.testing.assert_close(ours(latents, LEVEL, ours.prepare(text)), expected, rtol=1e-4, atol=1e-5)


def test_group_norms_have_the_published_epsilons() -> None:
    """1e-5 in residual blocks and at the end, 1e-6 in transformers and mergers."""
    network = UNet3D(replace(CONFIG, cam=True))
    for name, layer in network.named_modules():
        if isinstance(layer, nn.GroupNorm):
            assert layer.eps == (1e-6 if "attentions" in name or "merger" in name else 1e-5), name


@torch.no_grad()
def test_without_time_frames_are_unrelated() -> None:
    network, latents = unet(), torch.randn(1, 8, 3, 4, 4)
    prepared = network.prepare(context(NUMBERS)).rows(slice(0, 1))
    together = network(latents, LEVEL, prepared, temporal=False)
    alone = torch.cat([network(frame, LEVEL, prepared, temporal=False) for frame in latents.split(1, dim=2)], dim=2)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(network(latents, LEVEL, prepared), together, atol=1e-3)


@torch.no_grad()
def test_the_numbers_and_the_place_in_the_clip_matter() -> None:
    network, latents = unet(), torch.randn(1, 8, 1, 4, 4).expand(-1, -1, 3, -1, -1)
    text = context(NUMBERS)
    output = network(latents, LEVEL, network.prepare(text).rows(slice(0, 1)))
    assert not torch.allclose(output[:, :, 0], output[:, :, 2], atol=1e-3)
    other = TextContext(text.tokens, context(torch.tensor([[12.0, 127.0, 0.02]])).pooled)
    assert not torch.allclose(output, network(latents, LEVEL, network.prepare(other).rows(slice(0, 1))), atol=1e-3)


@torch.no_grad()
def test_deep_features_may_be_given_again() -> None:
    network = unet(replace(CONFIG, cam=True))
    cam = shaken(ConditionalAttention(CamConfig(CONFIG, (4, 8, 8, 8), 2, pixel_norms=True)))
    assert isinstance(cam, ConditionalAttention)
    latents, text = torch.randn(2, 8, 3, 4, 4), context(NUMBERS)
    embedded, given = cam.embed_frames(torch.randn(1, 2, 3, 32, 32)), cam.prepare(text)
    whole, deep = network.run(latents, LEVEL, network.prepare(text), cam(latents[:, :, :2], LEVEL, given, embedded))
    shallow = cam(latents[:, :, :2], LEVEL, given, embedded, shallow=True)
    again, _ = network.run(latents, LEVEL, network.prepare(text), shallow, deep)
    torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_norms_of_the_pixel_stack_act_on_the_channels_of_a_pixel() -> None:
    plain, normed = (
        ConditionalAttention(CamConfig(CONFIG, (4, 8, 8, 8), 2, pixel_norms=wanted)).cond_embedding
        for wanted in (False, True)
    )
    assert len(normed.state_dict()) == len(plain.state_dict()) + 12
    frames = torch.randn(2, 3, 16, 16)
    for layer in (normed.conv_out, normed.blocks[0]):
        layer.weight.normal_()
    first = normed(frames)
    for parameter in normed.blocks[0].parameters():
        parameter.mul_(3)
    torch.testing.assert_close(normed(frames), first, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_attention_to_one_token_is_that_of_many_equal_ones() -> None:
    layer, x = Attention(8, 2, 4, 6), torch.randn(6, 5, 8)
    one = layer.keys_values(torch.randn(2, 1, 6))
    many = KeysValues(one.keys.expand(-1, -1, 3, -1), one.values.expand(-1, -1, 3, -1))
    assert layer(x, one).shape == x.shape
    torch.testing.assert_close(layer(x, one), layer(x, many), rtol=1e-5, atol=1e-6)


def test_frame_codes_are_refused() -> None:
    with pytest.raises(ConfigError, match="frame_codes"):
        UNet3DConfig.from_dict(asdict(CONFIG) | {"frame_codes": True})
