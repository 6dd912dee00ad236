"""The autoencoder and CLIP's towers compute what the libraries' do, bit for bit, from the same weights."""

from typing import Any

import diffusers
import pytest
import torch
import transformers

from streamt2v.errors import ConfigError
from streamt2v.models import clip, vae
from streamt2v.weights.networks import config_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "projection_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def library_vae(**more: Any) -> Any:
    widths = (16, 32, 32)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return diffusers.AutoencoderKL(**blocks, block_out_channels=widths, norm_num_groups=4, **more)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sizes", [{"layers_per_block": 2}, {"mid_block_add_attention": False, "latent_channels": 3}])
def test_the_autoencoder(sizes: dict[str, Any], layout: torch.memory_format, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    library = library_vae(**sizes).eval()
    own = vae.AutoencoderKL(vae.AutoencoderConfig.from_dict(config_of(library))).eval()
    own.load_state_dict(library.state_dict())
    for network in (library, own):
        torch.nn.Module.to(network, dtype, memory_format=layout)
    frames = torch.rand(2, 3, 24, 40).to(dtype) * 2 - 1
    wanted, found = library.encode(frames).latent_dist, own.encode(frames).latent_dist
    assert torch.equal(wanted.mean, found.mean)
    assert torch.equal(wanted.std, found.std)
    assert torch.equal(library.decode(wanted.mean).sample, own.decode(wanted.mean).sample)


@pytest.mark.parametrize(
    "other", [{"act_fn": "relu"}, {"shift_factor": 0.1}, {"up_block_types": ("AttnUpDecoderBlock2D",) * 3}, {"wide": 1}]
)
def test_an_autoencoder_that_computes_something_else_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter([*other, "AttnUp"])) + "|AttnUp"):
        vae.AutoencoderConfig.from_dict({**config_of(library_vae()), **other})


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_the_text_tower(name: str, act: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "max_position_embeddings": 9, "hidden_act": act, "bos_token_id": 1, "eos_token_id": 3}
    library = getattr(transformers, name)(transformers.CLIPTextConfig(**TOWER, **sizes)).eval().to(dtype)
    own = getattr(clip, name)(clip.CLIPTextConfig.from_dict(config_of(library))).eval().to(dtype)
    own.load_state_dict(library.state_dict())
    ids = torch.tensor([[1, 5, 6, 3, 0, 0, 0, 0, 0], [1, 7, 3, 8, 3, 0, 0, 0, 0]])
    wanted, found = library(input_ids=ids), own(input_ids=ids)
    assert torch.equal(wanted.last_hidden_state, found.last_hidden_state)
    if "Projection" in name:
        assert torch.equal(wanted.text_embeds, found.text_embeds)
    assert (own.dtype, own.device) == (library.dtype, library.device)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_image_tower(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**TOWER, image_size=24, patch_size=8, hidden_act="gelu")
    library = transformers.CLIPVisionModelWithProjection(config).eval().to(dtype)
    own = clip.CLIPVisionModelWithProjection(clip.CLIPVisionConfig.from_dict(config_of(library))).eval().to(dtype)
    own.load_state_dict(library.state_dict())
    pixels = torch.randn(2, 3, 24, 24).to(dtype)
    assert torch.equal(library(pixel_values=pixels).image_embeds, own(pixel_values=pixels).image_embeds)


def test_a_tower_that_computes_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="relu"):
        clip.CLIPTextConfig(hidden_act="relu")
    with pytest.raises(ConfigError, match="7 heads"):
        clip.CLIPVisionConfig(num_attention_heads=7)
