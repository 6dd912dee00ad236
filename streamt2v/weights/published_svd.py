"""The published StreamingSVD file (`model.safetensors`, 12.5 GB): its networks, and how its keys become ours.

One file holds the denoiser with its mergers, CAM, an image encoder with what is left of its text half, and two
autoencoders, of which the encoder of one and the temporal decoder of the other are used.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from streamt2v.weights.keymaps import KeyMap, Rule, ignore, rename
from streamt2v.weights.published import CHECKPOINTS, RESNET_LAYERS, UNET_ENDS, Layout, Part, refiner_vae

LEVELS = (True, True, True, False)
"""Which levels of the published network have transformers."""


def unet(attention_levels: Sequence[bool] = LEVELS, layers: int = 2) -> KeyMap:
    """Return the key map of the denoiser and its mergers.

    The published network numbers its blocks consecutively, n layers and a downsampling per level; block 0 is the input.

    Args:
        attention_levels: which levels have transformers, as in the UNet's config.
        layers: layers per level on the way down.
    """
    merger = r"\.temporal_transformer\.(.+)"
    rules = [
        rename(rf"cross_attention_merger_input_blocks\.(\d+){merger}", r"cam_mergers.down.\1.\2"),
        rename(rf"cross_attention_merger_mid_block{merger}", r"cam_mergers.mid.\1"),
        *_encoder(attention_levels, layers),
    ]
    for level, attends in enumerate(reversed(attention_levels)):
        for layer in range(layers + 1):
            rules += _layer(f"output_blocks.{(layers + 1) * level + layer}", f"up_blocks.{level}", layer)
        source = f"output_blocks.{(layers + 1) * level + layers}.{2 if attends else 1}.conv"
        rules.append(rename(rf"{re.escape(source)}\.(.+)", rf"up_blocks.{level}.upsamplers.0.conv.\1"))
    return KeyMap("model.diffusion_model.", tuple(rules), "the denoiser")


def cam(attention_levels: Sequence[bool] = LEVELS, layers: int = 2) -> KeyMap:
    """Return the key map of the CAM extractor: pixel stack, way down, middle."""
    pixels = rename(r"controlnet_cond_embedding\.(.+)", r"cond_embedding.\1")
    return KeyMap("controlnet.", (pixels, *_encoder(attention_levels, layers)), "the CAM extractor")


def vae(levels: int = 4) -> KeyMap:
    """Return the key map of the autoencoder with a temporal decoder, whose halves lie in two places."""
    encoder, decoder = r"conditioner\.embedders\.3\.encoder\.", r"first_stage_model\."
    used = rf"(?:{encoder}(?=encoder\.|quant_conv\.)|{decoder}(?=decoder\.))"
    places = [(rf"mid\.block_{index + 1}\.", f"mid_block.resnets.{index}.", r"\1") for index in (0, 1)]
    for level in range(levels):
        places.append((rf"up\.{level}\.block\.(\d+)\.", rf"up_blocks.{levels - 1 - level}.resnets.\1.", r"\2"))
    rules = [rename(rf"{decoder}decoder\.conv_out\.time_mix_conv\.(.+)", r"decoder.time_conv_out.\1")]
    for pattern, target, name in places:
        start, spatial = rf"{decoder}decoder\.{pattern}", f"decoder.{target}spatial_res_block."
        rules += [
            rename(rf"{start}((?:norm|conv)[12]\.(?:weight|bias))", spatial + name),
            rename(rf"{start}nin_shortcut\.(weight|bias)", f"{spatial}conv_shortcut.{name}"),
            rename(rf"{start}mix_factor", f"decoder.{target}time_mixer.mix_factor"),
        ]
        for theirs, ours in RESNET_LAYERS.items():
            source = rf"{start}time_stack\.{re.escape(theirs)}\.(weight|bias)"
            rules.append(rename(source, f"decoder.{target}temporal_res_block.{ours}.{name}"))
    rules += [replace(rule, pattern=used + rule.pattern) for rule in refiner_vae(levels).rules]
    rules += [
        ignore(rf"{encoder}(?:decoder|post_quant_conv)\..+", "the image autoencoder's decoder is never called"),
        ignore(rf"{decoder}encoder\..+", "the second encoder is never called"),
        ignore(r"(?:model|controlnet|conditioner\.embedders\.0)\..+", "another network"),
    ]
    return KeyMap("", tuple(rules), "the VAE")


def _encoder(attention_levels: Sequence[bool], layers: int) -> list[Rule]:
    """The way down and the middle, which the denoiser and CAM share."""
    rules = [
        *UNET_ENDS,
        rename(r"label_emb\.0\.([02])\.(weight|bias)", r"text_embedding.\1.\2"),
        *_residual("middle_block.0", "mid_block.resnets.0"),
        *_transformer("middle_block.1", "mid_block.attentions.0"),
        *_residual("middle_block.2", "mid_block.resnets.1"),
    ]
    for level in range(len(attention_levels)):
        first = 1 + (layers + 1) * level
        for layer in range(layers):
            rules += _layer(f"input_blocks.{first + layer}", f"down_blocks.{level}", layer)
        downsampling = rf"input_blocks\.{first + layers}\.0\.op\.(.+)"
        rules.append(rename(downsampling, rf"down_blocks.{level}.downsamplers.0.conv.\1"))
    return rules


def _layer(source: str, target: str, layer: int) -> list[Rule]:
    return [
        *_residual(f"{source}.0", f"{target}.resnets.{layer}"),
        *_transformer(f"{source}.1", f"{target}.attentions.{layer}"),
    ]


def _residual(source: str, target: str) -> list[Rule]:
    start = re.escape(source)
    rules = [rename(rf"{start}\.(time_mixer\.mix_factor)", rf"{target}.\1")]
    for place, block in (("", "spatial_res_block"), (r"time_stack\.", "temporal_res_block")):
        for theirs, ours in RESNET_LAYERS.items():
            rules.append(rename(rf"{start}\.{place}{re.escape(theirs)}\.(weight|bias)", rf"{target}.{block}.{ours}.\1"))
    return rules


def _transformer(source: str, target: str) -> list[Rule]:
    start = re.escape(source)
    return [
        rename(rf"{start}\.time_stack\.0\.(.+)", rf"{target}.temporal_transformer_blocks.0.\1"),
        rename(rf"{start}\.time_pos_embed\.0\.(.+)", rf"{target}.time_pos_embed.linear_1.\1"),
        rename(rf"{start}\.time_pos_embed\.2\.(.+)", rf"{target}.time_pos_embed.linear_2.\1"),
        rename(rf"{start}\.((?:norm|proj_in|proj_out|transformer_blocks\.0|time_mixer)\..+)", rf"{target}.\1"),
    ]


# fmt: off
UNET_CONFIG: Mapping[str, Any] = {
    "in_channels": 8, "transformer_in_heads": 0, "text_tokens": 1, "pooled_text_dim": 768, "blends_time": True,
}
"""Denoiser and CAM: 8 channels are noisy and image latents, the one token is the picture's, 768 are three numbers."""
VAE_CONFIG: Mapping[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "latent_channels": 4, "scaling_factor": 0.18215,
}
_CLIP = CHECKPOINTS["streaming_t2v.ckpt"].parts["stream/vision"]  # the same tower in the same naming

LAYOUT = Layout({
    "svd/unet": Part("UNet3D", {**UNET_CONFIG, "cam": True}, unet()),
    "svd/cam": Part(
        "ConditionalAttention", {"unet": UNET_CONFIG, "num_cond_frames": 7, "pixel_norms": True}, cam(),
    ),
    "svd/vae": Part("AutoencoderKLTemporalDecoder", VAE_CONFIG, vae()),
    "svd/vision": replace(_CLIP, keys=replace(_CLIP.keys, prefix="conditioner.embedders.0.open_clip.model.")),
})
# fmt: on
"""What is in the published file."""
