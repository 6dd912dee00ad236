"""Small random LoRAs as trainers write them, and the same change made by hand."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
RANK, ALPHA = 3, 2.0

# How a layer `down_blocks.0.conv` is named in a file.
NAMINGS: dict[str, Callable[[str], str]] = {
    "peft": lambda name: f"{name}.lora_A.weight {name}.lora_B.weight",
    "unet": lambda name: f"unet.{name}.lora_A.weight unet.{name}.lora_B.weight",
    "transformer": lambda name: f"transformer.{name}.lora_A.default.weight transformer.{name}.lora_B.default.weight",
    "comfy": lambda name: f"diffusion_model.{name}.lora_down.weight diffusion_model.{name}.lora_up.weight",
    "diffusers, old": lambda name: f"unet.{name}.lora.down.weight unet.{name}.lora.up.weight",
    "kohya": lambda name: "lora_unet_{0}.lora_down.weight lora_unet_{0}.lora_up.weight".format(name.replace(".", "_")),
}

_WAN = [
    (r"\.attn1\.to_([qkv])$", r".self_attn.\1"), (r"\.attn1\.to_out\.0$", ".self_attn.o"),
    (r"\.attn2\.to_([qkv])$", r".cross_attn.\1"), (r"\.attn2\.to_out\.0$", ".cross_attn.o"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"), (r"\.ffn\.net\.2$", ".ffn.2"), (r"^proj_out$", "head.head"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.(\w+)_embedder\.linear_1$", r"\1_embedding.0"),
    (r"^condition_embedder\.(\w+)_embedder\.linear_2$", r"\1_embedding.2"),
]  # fmt: skip
_LTX = [(r"^proj_in$", "patchify_proj"), (r"^time_embed\.", "adaln_single.")]


def as_published(name: str, kind: str) -> str:
    """The name that the authors of a transformer gave a layer."""
    for pattern, target in {"wan": _WAN, "ltx": _LTX}[kind]:
        name = re.sub(pattern, target, name)
    return name


def layers(shapes: Shapes) -> list[str]:
    """The layers that a LoRA can change."""
    return [key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight") and len(shape) > 1]


def tensors(
    shapes: Shapes, naming: str = "peft", only: Iterable[str] | None = None, alpha: bool = True, published: str = ""
) -> dict[str, Tensor]:
    """A LoRA for some layers, by default all: rank 3, alpha 2 unless it is left out."""
    generator, found = torch.Generator().manual_seed(5), dict[str, Tensor]()
    for name in layers(shapes) if only is None else only:
        rows, *columns = shapes[f"{name}.weight"]
        given = as_published(name, published) if published else name
        down, up = NAMINGS[naming](given).split()
        found[down] = torch.randn(RANK, *columns, generator=generator) * 0.3
        found[up] = torch.randn(rows, RANK, *(1 for _ in columns[1:]), generator=generator) * 0.3
        if alpha:
            found[re.sub(r"\.lora.*", ".alpha", down)] = torch.tensor(ALPHA)
    return found


def written(path: Path, values: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a file."""
    save_file({key: value.contiguous() for key, value in values.items()}, path, metadata)
    return path


def by_hand(state: Mapping[str, Tensor], strength: float, only: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The weights with the LoRA of `tensors` for the same layers, merged in 64 bit."""
    shapes, merged = {key: tuple(value.shape) for key, value in state.items()}, dict(state)
    changed = layers(shapes) if only is None else list(only)
    values = tensors(shapes, only=changed)
    for name in changed:
        down, up = (values[f"{name}.lora_{half}.weight"].double() for half in "AB")
        change = torch.einsum("or,ri->oi", up.reshape(len(up), -1), down.reshape(len(down), -1))
        weights = state[f"{name}.weight"]
        merged[f"{name}.weight"] = weights.double() + strength * ALPHA / RANK * change.reshape(weights.shape)
    return merged
