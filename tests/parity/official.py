"""Names and shapes of the published refiner's tensors for any size, and the recipe that fills them without a file."""

import hashlib
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


def make_weight(name: str, shape: Shape, seed: int, gain: float) -> Tensor:
    """Fill one tensor: a hash of (name, seed, element index) spread evenly, scaled by the tensor's rank and name."""
    index = np.arange(math.prod(shape), dtype=np.uint64)
    key = np.uint64(zlib.crc32(name.encode()) ^ seed)
    x = (index * np.uint64(0x9E3779B1) + key) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint64(shift)
        x = (x * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(16)
    u = x.astype(np.float64) / 2**31 - 1
    if len(shape) >= 2:
        values = u * math.sqrt(3 / math.prod(shape[1:])) * gain
    else:
        values = 0.05 * u if name.endswith(".bias") else 1 + 0.1 * u
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def make_weights(names: Named, seed: int, gain: float, half: bool) -> dict[str, Tensor]:
    """Fill a whole network; `half` rounds every value through float16."""
    weights = {name: make_weight(name, shape, seed, gain) for name, shape in names}
    return {name: value.half().float() for name, value in weights.items()} if half else weights


def checksum(weights: Mapping[str, Tensor]) -> str:
    """Return the sha256 over the float32 bytes in sorted key order."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].float().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def norm(name: str, channels: int) -> Named:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def layer(name: str, inputs: int, outputs: int, *kernel: int, bias: bool = True) -> Named:
    yield f"{name}.weight", (outputs, inputs, *kernel)
    if bias:
        yield f"{name}.bias", (outputs,)


# ------------------------------------------------------------------------------------------------------------- UNet


def attends(config: Mapping[str, Any]) -> list[bool]:
    """Which levels have transformers: those at the scales 1, 1/2 and 1/4 unless the folder says otherwise."""
    scales = config.get("attn_scales", [1.0, 0.5, 0.25])
    return [2.0**-level in scales for level in range(len(config["dim_mult"]))]


def unet(config: Mapping[str, Any]) -> Named:
    """The video UNet of the refiner, from {dim, context_dim, dim_mult, num_heads, head_dim, num_res_blocks}."""
    dim, context, count = config["dim"], config["context_dim"], config["num_res_blocks"]
    channels, levels = config.get("in_dim", 4), len(config["dim_mult"])
    widths = [dim * factor for factor in config["dim_mult"]]
    attention = attends(config)

    def block(name: str, inputs: int, outputs: int, attending: bool) -> Named:
        yield from resnet(f"{name}.0", inputs, outputs, 4 * dim)
        if attending:
            yield from transformer(f"{name}.1", outputs, outputs, context)
            yield from transformer(f"{name}.2", outputs, outputs, None)

    yield from layer("time_embed.0", dim, 4 * dim)
    yield from layer("time_embed.2", 4 * dim, 4 * dim)
    yield from layer("input_blocks.0.0", channels, dim, 3, 3)
    yield from transformer("input_blocks.0.1", dim, config["num_heads"] * config["head_dim"], None)
    skips, index, width = [dim], 1, dim
    for level, outputs in enumerate(widths):
        for _ in range(count):
            yield from block(f"input_blocks.{index}", width, outputs, attention[level])
            width, index = outputs, index + 1
            skips.append(width)
        if level < levels - 1:
            yield from layer(f"input_blocks.{index}.op", width, width, 3, 3)
            index += 1
            skips.append(width)
    yield from resnet("middle_block.0", width, width, 4 * dim)
    yield from transformer("middle_block.1", width, width, context)
    yield from transformer("middle_block.2", width, width, None)
    yield from resnet("middle_block.3", width, width, 4 * dim)
    index = 0
    for level, outputs in reversed(list(enumerate(widths))):
        for position in range(count + 1):
            yield from block(f"output_blocks.{index}", width + skips.pop(), outputs, attention[level])
            width = outputs
            if position == count and level > 0:
                name = f"output_blocks.{index}.{3 if attention[level] else 1}.conv"
                yield from layer(name, width, width, 3, 3)
            index += 1
    yield from norm("out.0", width)
    yield from layer("out.2", width, config.get("out_dim", 4), 3, 3)


def resnet(name: str, inputs: int, outputs: int, embedding: int) -> Named:
    yield from norm(f"{name}.in_layers.0", inputs)
    yield from layer(f"{name}.in_layers.2", inputs, outputs, 3, 3)
    yield from layer(f"{name}.emb_layers.1", embedding, outputs)
    yield from norm(f"{name}.out_layers.0", outputs)
    yield from layer(f"{name}.out_layers.3", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from layer(f"{name}.skip_connection", inputs, outputs, 1, 1)
    for number in (1, 2, 3, 4):
        yield from norm(f"{name}.temopral_conv.conv{number}.0", outputs)
        yield from layer(f"{name}.temopral_conv.conv{number}.{2 if number == 1 else 3}", outputs, outputs, 3, 1, 1)


def transformer(name: str, channels: int, inner: int, context: int | None) -> Named:
    """A spatial transformer, or with `context` None a temporal one, whose projections are convolutions of length 1."""
    kernel = (1,) if context is None else ()
    yield from norm(f"{name}.norm", channels)
    yield from layer(f"{name}.proj_in", channels, inner, *kernel)
    block = f"{name}.transformer_blocks.0"
    for attention, width in (("attn1", inner), ("attn2", inner if context is None else context)):
        yield from layer(f"{block}.{attention}.to_q", inner, inner, bias=False)
        yield from layer(f"{block}.{attention}.to_k", width, inner, bias=False)
        yield from layer(f"{block}.{attention}.to_v", width, inner, bias=False)
        yield from layer(f"{block}.{attention}.to_out.0", inner, inner)
    yield from layer(f"{block}.ff.net.0.proj", inner, 8 * inner)
    yield from layer(f"{block}.ff.net.2", 4 * inner, inner)
    for number in (1, 2, 3):
        yield from norm(f"{block}.norm{number}", inner)
    yield from layer(f"{name}.proj_out", inner, channels, *kernel)


# -------------------------------------------------------------------------------------------------------------- VAE


def vae(widths: list[int], layers: int = 2, latent: int = 4) -> Named:
    """The autoencoder in its first naming, without the prefix `first_stage_model.`."""
    levels, lowest = len(widths), widths[-1]

    def block(name: str, inputs: int, outputs: int) -> Named:
        yield from norm(f"{name}.norm1", inputs)
        yield from layer(f"{name}.conv1", inputs, outputs, 3, 3)
        yield from norm(f"{name}.norm2", outputs)
        yield from layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            yield from layer(f"{name}.nin_shortcut", inputs, outputs, 1, 1)

    def middle(name: str) -> Named:
        yield from block(f"{name}.block_1", lowest, lowest)
        yield from norm(f"{name}.attn_1.norm", lowest)
        for projection in ("q", "k", "v", "proj_out"):
            yield from layer(f"{name}.attn_1.{projection}", lowest, lowest, 1, 1)
        yield from block(f"{name}.block_2", lowest, lowest)

    yield from layer("encoder.conv_in", 3, widths[0], 3, 3)
    width = widths[0]
    for level, outputs in enumerate(widths):
        for index in range(layers):
            yield from block(f"encoder.down.{level}.block.{index}", width, outputs)
            width = outputs
        if level < levels - 1:
            yield from layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    yield from middle("encoder.mid")
    yield from norm("encoder.norm_out", lowest)
    yield from layer("encoder.conv_out", lowest, 2 * latent, 3, 3)
    yield from layer("quant_conv", 2 * latent, 2 * latent, 1, 1)
    yield from layer("post_quant_conv", latent, latent, 1, 1)
    yield from layer("decoder.conv_in", latent, lowest, 3, 3)
    yield from middle("decoder.mid")
    for level, outputs in reversed(list(enumerate(widths))):
        for index in range(layers + 1):
            yield from block(f"decoder.up.{level}.block.{index}", width, outputs)
            width = outputs
        if level > 0:
            yield from layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    yield from norm("decoder.norm_out", widths[0])
    yield from layer("decoder.conv_out", widths[0], 3, 3, 3)


# ------------------------------------------------------------------------------------------------------- text tower


def text(width: int, layers: int, mlp: int, vocab: int, context: int) -> Named:
    """The text tower in open_clip naming, without the scalar `logit_scale`."""
    yield "positional_embedding", (context, width)
    yield "text_projection", (width, width)
    yield "token_embedding.weight", (vocab, width)
    for index in range(layers):
        name = f"transformer.resblocks.{index}"
        yield from norm(f"{name}.ln_1", width)
        yield f"{name}.attn.in_proj_weight", (3 * width, width)
        yield f"{name}.attn.in_proj_bias", (3 * width,)
        yield from layer(f"{name}.attn.out_proj", width, width)
        yield from norm(f"{name}.ln_2", width)
        yield from layer(f"{name}.mlp.c_fc", width, mlp)
        yield from layer(f"{name}.mlp.c_proj", mlp, width)
    yield from norm("ln_final", width)
