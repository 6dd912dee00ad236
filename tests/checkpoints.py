"""Checkpoints as they are published, in tiny form: layouts with small networks, names and shapes, random tensors."""

import dataclasses
import json
import lzma
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamt2v.weights import convert, networks, published
from tests.parity import official

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]

STREAM, VIDXTEND = "streaming_t2v.ckpt", "vidxtend.safetensors"
REFINER, VAE, CLIP = "non_ema_0035000.pth", "v2-1_512-ema-pruned.ckpt", "open_clip_pytorch_model.bin"
STREAMING_SVD, SVD_KEYS = "streaming_svd.safetensors", Path(__file__).parent / "data" / "streamingsvd"
IMAGE_TOWER, IFNET = "the image tower of CLIP", "rife_v4.26.safetensors"

UNET = {
    "block_out_channels": [16, 32], "attention_levels": [True, False], "layers_per_block": 1, "cross_attention_dim": 16,
    "attention_head_dim": 8, "transformer_in_heads": 2, "norm_num_groups": 8,
}  # fmt: skip
CAM = {"unet": UNET, "cond_embed_channels": [8, 8, 8, 16]}
AUTOENCODER = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 16, 16], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 8,
    "scaling_factor": 0.18215,
}  # fmt: skip
TEXT = {
    "vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu",
}  # fmt: skip
VISION = {
    "image_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "projection_dim": 16, "hidden_act": "gelu",
}  # fmt: skip
APM = {"embed_dim": 16, "hidden_dim": 8, "num_tokens": 4, "context_dim": 16}
SVD_UNET = {
    "in_channels": 8, "block_out_channels": [32, 64, 128, 128], "attention_levels": [True, True, True, False],
    "cross_attention_dim": 64, "attention_head_dim": 16, "transformer_in_heads": 0, "text_tokens": 1,
    "pooled_text_dim": 48, "blends_time": True,
}  # fmt: skip
SVD = {
    "svd/unet": SVD_UNET | {"cam": True},
    "svd/cam": {"unet": SVD_UNET, "num_cond_frames": 7, "pixel_norms": True, "cond_embed_channels": [8, 16, 24, 32]},
    "svd/vae": {
        "down_block_types": ["DownEncoderBlock2D"] * 4, "block_out_channels": [32, 32, 64, 64], "layers_per_block": 2,
        "scaling_factor": 0.18215,
    },
    "svd/vision": VISION | {"projection_dim": 64},
}  # fmt: skip
"""Sizes of the recorded tiny networks, but for the number of frames that CAM looks at."""
SMALL = {
    "stream/unet": UNET | {"cam": True, "image_tokens": 4}, "stream/cam": CAM, "stream/apm": APM,
    "stream/vae": AUTOENCODER, "stream/text": TEXT, "stream/vision": VISION,
    "refine/unet": UNET | {"downsample_padding": [2, 1]}, "refine/vae": AUTOENCODER, "refine/text": TEXT, **SVD,
    "ifnet": {"widths": [16, 8], "layers": 1, "head_width": 4, "head_channels": 2, "features": 2},
}  # fmt: skip


def tiny_layouts() -> dict[str, published.Layout]:
    """The published layouts with small networks; the key maps that depend on depth follow."""
    keys = {"refine/unet": published.refiner_unet([True, False], 1), "refine/text": published.open_clip_text(2)}
    return {
        file: dataclasses.replace(
            layout,
            parts={
                name: dataclasses.replace(part, config=SMALL[name], keys=keys.get(name, part.keys))
                for name, part in layout.parts.items()
            },
        )
        for file, layout in convert.LAYOUTS.items()
    }


def published_shapes(layouts: Mapping[str, published.Layout]) -> dict[str, Shapes]:
    """Names and shapes as the published files have them, for networks of the sizes in `layouts`."""

    def shapes(file: str, part: str) -> Shapes:
        found = layouts[file].parts[part]
        return networks.shapes(networks.build(Path(part), found.network, found.config))

    def config(file: str, part: str) -> Any:
        return layouts[file].parts[part].config

    stream = {
        f"base_model.{_merger_name(key)}": shape for key, shape in shapes(STREAM, "stream/unet").items()
    } | {
        f"unet.{key.replace('cond_embedding.', 'controlnet_cond_embedding.')}": shape
        for key, shape in shapes(STREAM, "stream/cam").items()
    }  # fmt: skip
    for key, shape in shapes(STREAM, "stream/apm").items():
        stream[f"resampler.context_embedding.{'0' if 'linear_1' in key else '2'}.{key.split('.')[1]}"] = shape
    stream |= {f"vae.{key}": shape for key, shape in shapes(STREAM, "stream/vae").items()}
    stream |= {f"text_encoder.text_model.{key}": shape for key, shape in shapes(STREAM, "stream/text").items()}
    others = {
        key.replace("base_model.", "unet.")
        if key.startswith("base_model.")
        else re.sub(r"^unet\.", "controlnet.", key): s
        for key, s in stream.items()
    }

    vision, text = config(STREAM, "stream/vision"), config(CLIP, "refine/text")
    visual = _visual(vision)
    width = text["hidden_size"]
    rest: Shapes = {
        "positional_embedding": (77, width), "text_projection": (width, width), "logit_scale": (),
        "token_embedding.weight": (text["vocab_size"], width), "ln_final.weight": (width,), "ln_final.bias": (width,),
    }  # fmt: skip
    stream |= {f"image_encoder.model.{key}": shape for key, shape in (visual | rest).items()}

    vae, unet = config(VAE, "refine/vae"), config(REFINER, "refine/unet")
    sizes = {
        "dim": 320, "context_dim": 1024, "dim_mult": [1, 2, 4, 4], "num_heads": 8, "head_dim": 64, "num_res_blocks": 2
    }  # fmt: skip
    if "block_out_channels" in unet:
        sizes = {
            "dim": 16, "context_dim": 16, "dim_mult": [1, 2], "num_heads": 2, "head_dim": 8, "num_res_blocks": 1,
            "attn_scales": [1.0],
        }  # fmt: skip
    first_stage = dict(official.vae(list(vae["block_out_channels"])))
    layers = text["num_hidden_layers"] + 1
    tower = dict(official.text(width, layers, text["intermediate_size"], text["vocab_size"], 77)) | {"logit_scale": ()}
    return {
        STREAM: stream,
        VIDXTEND: others,
        REFINER: dict(official.unet(sizes)),
        VAE: {f"first_stage_model.{key}": shape for key, shape in first_stage.items()}
        | {"model.diffusion_model.out.2.bias": (4,), "cond_stage_model.logit_scale": (), "betas": (1000,)},
        CLIP: tower | visual,
        STREAMING_SVD: _streaming_svd() if "block_out_channels" in unet else manifests()[STREAMING_SVD],
        IMAGE_TOWER: shapes(IMAGE_TOWER, "stream/vision") | {"logit_scale": ()},
        IFNET: shapes(IFNET, "ifnet"),
    }


def _streaming_svd() -> Shapes:
    """The recorded names and shapes of tiny networks, with an image tower and what is left of its text half."""
    recorded: dict[str, list[int]] = {}
    for name in ("a1_keys.json", "a1_vae_keys.json"):
        recorded |= json.loads((SVD_KEYS / name).read_text())
    tower = _visual(SVD["svd/vision"]) | {"logit_scale": ()}
    start = "conditioner.embedders.0.open_clip.model."
    return {key: tuple(shape) for key, shape in recorded.items()} | {start + key: tower[key] for key in tower}


def _merger_name(key: str) -> str:
    key = re.sub(r"cam_mergers\.down\.(\d+)\.", r"cross_attention_merger_down_blocks.\1.temporal_transformer.", key)
    key = key.replace("cam_mergers.mid.", "cross_attention_merger_mid_block.temporal_transformer.")
    return key.replace(".apm.norm.", ".conv_ln.").replace(".apm.", ".")


def _visual(vision: Mapping[str, Any]) -> Shapes:
    """The image tower in open_clip naming."""
    width, patch = vision["hidden_size"], vision["patch_size"]
    named: Shapes = {
        "class_embedding": (width,), "positional_embedding": ((vision["image_size"] // patch) ** 2 + 1, width),
        "proj": (width, vision["projection_dim"]), "conv1.weight": (width, 3, patch, patch),
        **dict(official.norm("ln_pre", width)), **dict(official.norm("ln_post", width)),
    }  # fmt: skip
    blocks = official.text(width, vision["num_hidden_layers"], vision["intermediate_size"], 1, 1)
    named |= {key: shape for key, shape in blocks if key.startswith("transformer.")}
    return {f"visual.{key}": shape for key, shape in named.items()}


def manifests() -> dict[str, Shapes]:
    """Names and shapes of every tensor of the published files, as recorded; of OpenCLIP only the text tower."""
    data = lzma.decompress((Path(__file__).parent / "data" / "manifests.json.xz").read_bytes())
    return {file: {key: tuple(shape) for key, shape in tensors.items()} for file, tensors in json.loads(data).items()}


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> State:
    """Tensors that networks survive: small values, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * 0.05
        state[key] = value + 1 if re.search(r"(norm|ln_)[^.]*\.weight$", key) else value
    return state
