"""The published checkpoints: which networks each file holds, how keys become ours, what is left out and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from streamt2v.weights.keymaps import KeyMap, Rule, ignore, rename

if TYPE_CHECKING:
    from torch import Tensor


def _thirds(tensor: Tensor) -> Sequence[Tensor]:
    """Split fused query, key and value projections, which are stacked along the rows."""
    return tensor.chunk(3)


def _transposed(tensor: Tensor) -> Sequence[Tensor]:
    """Turn a projection stored for x @ W into one for W @ x."""
    return [tensor.T.contiguous()]


def _squeezed(tensor: Tensor) -> Sequence[Tensor]:
    """Turn a convolution of size 1 into a linear layer."""
    return [tensor.flatten(1)]


_UNET = r"(?:conv_in|conv_norm_out|conv_out|time_embedding|transformer_in|down_blocks|mid_block|up_blocks)\."
_APM = r"(.+\.attentions\.\d+\.transformer_blocks\.0\.attn2)\."
_VAE = r"(?:encoder|decoder|quant_conv|post_quant_conv)\."


def _open_clip_blocks(pattern: str, target: str) -> tuple[Rule, ...]:
    """Transformer blocks in open_clip naming; `pattern` ends where the names inside a block begin."""
    attention = f"{target}self_attn."
    projections = tuple(f"{attention}{name}_proj" for name in "qkv")
    return (
        Rule(rf"{pattern}attn\.in_proj_weight", tuple(f"{p}.weight" for p in projections), _thirds),
        Rule(rf"{pattern}attn\.in_proj_bias", tuple(f"{p}.bias" for p in projections), _thirds),
        rename(rf"{pattern}attn\.out_proj\.(weight|bias)", rf"{attention}out_proj.\2"),
        rename(rf"{pattern}ln_([12])\.(weight|bias)", rf"{target}layer_norm\2.\3"),
        rename(rf"{pattern}mlp\.c_fc\.(weight|bias)", rf"{target}mlp.fc1.\2"),
        rename(rf"{pattern}mlp\.c_proj\.(weight|bias)", rf"{target}mlp.fc2.\2"),
    )


OPEN_CLIP_VISUAL: tuple[Rule, ...] = (
    rename(r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    rename(r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    rename(r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    rename(r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    rename(r"visual\.ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    rename(r"visual\.proj", "visual_projection.weight", _transposed),
    *_open_clip_blocks(r"visual\.transformer\.resblocks\.(\d+)\.", r"vision_model.encoder.layers.\1."),
    ignore(r"(?:token_embedding|ln_final)\..+|positional_embedding|text_projection|logit_scale", "text tower, unused"),
    ignore(r"transformer\..+", "text tower, unused"),
    ignore(r"attn_mask", "constant"),
)

LIBRARY_VISUAL: tuple[Rule, ...] = (
    ignore(r"(?:vision|text)_model\.embeddings\.position_ids", "constant"),
    rename(r"(vision_model\..+|visual_projection\.weight)", r"\1"),
    ignore(r"text_model\..+|text_projection\.weight|logit_scale", "text tower, unused"),
)
"""The same tower, alone or with the rest of CLIP, as the transformers library names it."""

UNET_ENDS: tuple[Rule, ...] = (
    rename(r"time_embed\.0\.(weight|bias)", r"time_embedding.linear_1.\1"),
    rename(r"time_embed\.2\.(weight|bias)", r"time_embedding.linear_2.\1"),
    rename(r"input_blocks\.0\.0\.(weight|bias)", r"conv_in.\1"),
    rename(r"out\.0\.(weight|bias)", r"conv_norm_out.\1"),
    rename(r"out\.2\.(weight|bias)", r"conv_out.\1"),
)
"""The ends of a UNet that numbers its blocks consecutively; an encoder has no such keys under `out`."""

# fmt: off
RESNET_LAYERS = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}
STREAM: Mapping[str, KeyMap] = {
    "unet": KeyMap("base_model.", (
        rename(r"cross_attention_merger_down_blocks\.(\d+)\.temporal_transformer\.(.+)", r"cam_mergers.down.\1.\2"),
        rename(r"cross_attention_merger_mid_block\.temporal_transformer\.(.+)", r"cam_mergers.mid.\1"),
        rename(_APM + r"(alpha|conv\.(?:weight|bias))", r"\1.apm.\2"),
        rename(_APM + r"conv_ln\.(weight|bias)", r"\1.apm.norm.\2"),
        rename(rf"({_UNET}.+)", r"\1"),
    ), "the streaming UNet"),
    "cam": KeyMap("unet.", (
        rename(r"controlnet_cond_embedding\.(.+)", r"cond_embedding.\1"),
        rename(rf"({_UNET}.+)", r"\1"),
    ), "the CAM extractor"),
    "apm": KeyMap("resampler.", (
        rename(r"context_embedding\.0\.(weight|bias)", r"linear_1.\1"),
        rename(r"context_embedding\.2\.(weight|bias)", r"linear_2.\1"),
    ), "the APM token network"),
    "vae": KeyMap("vae.", (rename(rf"({_VAE}.+)", r"\1"),), "the VAE"),
    "text": KeyMap("text_encoder.", (
        ignore(r"(?:text_model\.)?embeddings\.position_ids", "constant"),
        rename(r"(?:text_model\.)?((?:embeddings|encoder|final_layer_norm)\..+)", r"\1"),
    ), "the text encoder"),
    "vision": KeyMap("image_encoder.model.", OPEN_CLIP_VISUAL, "the image encoder"),
}
# fmt: on
"""The networks in `streaming_t2v.ckpt`; `text` fits a CLIP text model without a projection."""


def refiner_unet(attention_levels: Sequence[bool] = (True, True, True, False), layers: int = 2) -> KeyMap:
    """Return the key map of `non_ema_0035000.pth`.

    The published network numbers its blocks consecutively, n layers and a downsampling per level; block 0 is the input.

    Args:
        attention_levels: which levels have transformers, as in the UNet's config.
        layers: layers per level on the way down.
    """
    levels = len(attention_levels)
    rules = [*UNET_ENDS, *_temporal_transformer("input_blocks.0.1", "transformer_in")]
    for level, attends in enumerate(attention_levels):
        for layer in range(layers):
            block = f"input_blocks.{1 + (layers + 1) * level + layer}"
            rules += _layer(block, f"down_blocks.{level}", layer, attends)
        source, target = f"input_blocks.{(layers + 1) * (level + 1)}.op", f"down_blocks.{level}.downsamplers.0.conv"
        rules += [rename(rf"{re.escape(source)}\.(weight|bias)", rf"{target}.\1")] if level < levels - 1 else []
    for level, attends in enumerate(reversed(attention_levels)):
        for layer in range(layers + 1):
            block = f"output_blocks.{(layers + 1) * level + layer}"
            rules += _layer(block, f"up_blocks.{level}", layer, attends)
        source = f"output_blocks.{(layers + 1) * level + layers}.{3 if attends else 1}.conv"
        target = f"up_blocks.{level}.upsamplers.0.conv"
        rules += [rename(rf"{re.escape(source)}\.(weight|bias)", rf"{target}.\1")] if level < levels - 1 else []
    rules += _resnet("middle_block.0", "mid_block", 0) + _resnet("middle_block.3", "mid_block", 1)
    rules += _spatial_transformer("middle_block.1", "mid_block.attentions.0")
    rules += _temporal_transformer("middle_block.2", "mid_block.temp_attentions.0")
    return KeyMap("", tuple(rules), "the refiner")


def _layer(source: str, target: str, layer: int, attends: bool) -> list[Rule]:
    rules = _resnet(f"{source}.0", target, layer)
    if attends:
        rules += _spatial_transformer(f"{source}.1", f"{target}.attentions.{layer}")
        rules += _temporal_transformer(f"{source}.2", f"{target}.temp_attentions.{layer}")
    return rules


def _resnet(source: str, target: str, layer: int) -> list[Rule]:
    """A residual block of the refiner; the published spelling of its temporal convolutions is `temopral`."""
    start = re.escape(source)
    return [
        rename(rf"{start}\.temopral_conv\.(conv[1-4]\.\d\.(?:weight|bias))", rf"{target}.temp_convs.{layer}.\1"),
        *(
            rename(rf"{start}\.{re.escape(theirs)}\.(weight|bias)", rf"{target}.resnets.{layer}.{ours}.\1")
            for theirs, ours in RESNET_LAYERS.items()
        ),
    ]


def _spatial_transformer(source: str, target: str) -> list[Rule]:
    return [rename(rf"{re.escape(source)}\.((?:norm|proj_in|proj_out|transformer_blocks\.0)\..+)", rf"{target}.\1")]


def _temporal_transformer(source: str, target: str) -> list[Rule]:
    """In the refiner the projections around a temporal transformer are convolutions of length 1."""
    projection = rename(rf"{re.escape(source)}\.(proj_(?:in|out)\.weight)", rf"{target}.\1", _squeezed)
    return [projection, *_spatial_transformer(source, target)]


def refiner_vae(levels: int = 4, prefix: str = "first_stage_model.") -> KeyMap:
    """Return the key map of the VAE in `v2-1_512-ema-pruned.ckpt`, whose decoder numbers its levels in reverse."""
    part = r"(encoder|decoder)\."
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    rules = [
        rename(part + r"(conv_in|conv_out)\.(weight|bias)", r"\1.\2.\3"),
        rename(part + r"norm_out\.(weight|bias)", r"\1.conv_norm_out.\2"),
        rename(r"((?:post_)?quant_conv\.(?:weight|bias))", r"\1"),
        rename(r"encoder\.down\.(\d+)\.downsample\.(conv\..+)", r"encoder.down_blocks.\1.downsamplers.0.\2"),
    ]
    places = [(r"encoder\.down\.(\d+)\.block\.(\d+)", r"encoder.down_blocks.\1.resnets.\2.", r"\3")]
    for level in range(levels):
        ours = f"decoder.up_blocks.{levels - 1 - level}."
        places.append((rf"decoder\.up\.{level}\.block\.(\d+)", rf"{ours}resnets.\1.", r"\2"))
        rules.append(rename(rf"decoder\.up\.{level}\.upsample\.conv\.(weight|bias)", rf"{ours}upsamplers.0.conv.\1"))
    for index in (0, 1):
        places.append((rf"{part}mid\.block_{index + 1}", rf"\1.mid_block.resnets.{index}.", r"\2"))
    for pattern, target, name in places:
        rules.append(rename(rf"{pattern}\.((?:norm|conv)[12]\.(?:weight|bias))", target + name))
        rules.append(rename(rf"{pattern}\.nin_shortcut\.(weight|bias)", f"{target}conv_shortcut.{name}"))
    for theirs, ours in attention.items():
        start, target = rf"{part}mid\.attn_1\.{theirs}\.", rf"\1.mid_block.attentions.0.{ours}."
        rules.append(rename(f"{start}weight", f"{target}weight", None if theirs == "norm" else _squeezed))
        rules.append(rename(f"{start}bias", f"{target}bias"))
    return KeyMap(prefix, tuple(rules), "the refiner's VAE")


_SCHEDULE_BUFFERS = ["betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_", "logvar", "scale_factor"]
REFINER_VAE_IGNORED: Mapping[str, str] = {
    **dict.fromkeys(["model.", "model_ema."], "Stable Diffusion's own denoiser"),
    "cond_stage_model.": "Stable Diffusion's text encoder",
    **dict.fromkeys(_SCHEDULE_BUFFERS, "schedule"),
}
"""Prefixes of the other keys in the VAE's file, and why they are left out."""


def open_clip_text(num_layers: int = 23) -> KeyMap:
    """Return the key map of `open_clip_pytorch_model.bin` to a CLIP text model of its first `num_layers` layers.

    The refiner reads the second-to-last layer through the final norm, so the last layer is left out.
    """
    kept = "|".join(str(layer) for layer in range(num_layers))
    return KeyMap(
        "",
        (
            rename(r"token_embedding\.weight", "embeddings.token_embedding.weight"),
            rename(r"positional_embedding", "embeddings.position_embedding.weight"),
            rename(r"ln_final\.(weight|bias)", r"final_layer_norm.\1"),
            *_open_clip_blocks(rf"transformer\.resblocks\.({kept})\.", r"encoder.layers.\1."),
            ignore(rf"transformer\.resblocks\.{num_layers}\..+", "the last layer is not used"),
            ignore(r"text_projection|logit_scale", "only for comparing text with images"),
            ignore(r"visual\..+", "image tower"),
            ignore(r"attn_mask", "constant"),
        ),
        "the text encoder",
    )


@dataclass(frozen=True)
class Part:
    """One network in a published file: class and config for our weights file, its keys, the schedule of a denoiser."""

    network: str
    config: Mapping[str, Any]
    keys: KeyMap
    schedule: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Layout:
    """A published file: its networks by our names, the name of the tokenizer they were trained with (it is not in the
    file), and the prefixes of keys that are left out, with the reason."""

    parts: Mapping[str, Part]
    tokenizer: str | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)


# fmt: off
_VAE_CONFIG = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "scaling_factor": 0.18215,
}
_TEXT_CONFIG = {
    "vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu",
}
_VISION_CONFIG = {
    "image_size": 224, "patch_size": 14, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 16, "projection_dim": 1024, "hidden_act": "gelu",
}
_APM_CONFIG = {"embed_dim": 1024, "hidden_dim": 1280, "num_tokens": 16, "context_dim": 1024}
REFINER_SCHEDULE = {"kind": "cosine_logsnr", "prediction": "v", "spacing": "trailing", "zero_terminal_snr": True}

_STREAM_PARTS = {
    "stream/unet": Part("UNet3D", {"cam": True, "image_tokens": 16}, STREAM["unet"], schedule={}),
    "stream/cam": Part("ConditionalAttention", {}, STREAM["cam"]),
    "stream/apm": Part("AppearanceTokens", _APM_CONFIG, STREAM["apm"]),
    "stream/vae": Part("AutoencoderKL", _VAE_CONFIG, STREAM["vae"]),
    "stream/text": Part("CLIPTextModel", _TEXT_CONFIG, STREAM["text"]),
}


def _vision(rules: tuple[Rule, ...], prefix: str = "") -> dict[str, Part]:
    keys = KeyMap(prefix, rules, "the image encoder")
    return {"stream/vision": Part("CLIPVisionModelWithProjection", _VISION_CONFIG, keys)}


# VidXTend stores the same networks; two prefixes differ.
_VIDXTEND = _STREAM_PARTS | {
    name: replace(_STREAM_PARTS[name], keys=replace(_STREAM_PARTS[name].keys, prefix=prefix))
    for name, prefix in {"stream/unet": "unet.", "stream/cam": "controlnet."}.items()
}
CHECKPOINTS: Mapping[str, Layout] = {
    "streaming_t2v.ckpt": Layout(
        _STREAM_PARTS | _vision(OPEN_CLIP_VISUAL, "image_encoder.model."), "stream/tokenizer",
    ),
    "vidxtend.safetensors": Layout(_VIDXTEND, "stream/tokenizer"),
    "non_ema_0035000.pth": Layout({
        "refine/unet": Part("UNet3D", {"downsample_padding": [2, 1]}, refiner_unet(), REFINER_SCHEDULE),
    }),
    "v2-1_512-ema-pruned.ckpt": Layout(
        {"refine/vae": Part("AutoencoderKL", _VAE_CONFIG, refiner_vae())}, ignored=REFINER_VAE_IGNORED,
    ),
    "open_clip_pytorch_model.bin": Layout(
        {"refine/text": Part("CLIPTextModel", _TEXT_CONFIG, open_clip_text())} | _vision(OPEN_CLIP_VISUAL),
        "refine/tokenizer",
    ),
    "the image tower of CLIP": Layout(_vision(LIBRARY_VISUAL)),
}
# fmt: on
"""The published files by name; the two towers of OpenCLIP share one file without prefixes."""

_IFNET_LAYER = r"(?:conv0\.[01]\.0|convblock\.\d+\.conv|lastconv\.0)\.(?:weight|bias)|convblock\.\d+\.beta"
_IFNET = (
    rename(r"(?:module\.)?(encode\.cnn[0-3]\.(?:weight|bias))", r"\1"),
    rename(rf"(?:module\.)?blocks?\.?(\d+)\.({_IFNET_LAYER})", r"blocks.\1.\2"),
    ignore(r"(?:module\.)?(?:teacher|caltime)\..+", "only training uses it"),
)
IFNET = Layout({"ifnet": Part("Interpolator", {}, KeyMap("", _IFNET, "the interpolator"))})
"""The file of RIFE 4.26, under the names of its authors or of its safetensors copy."""
