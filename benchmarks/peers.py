"""How fast are the library's video UNets, and how fast are ours, on the same weights and sizes?

    python benchmarks/peers.py                     # about a minute of one core; writes a result and docs/speed.md
    python benchmarks/peers.py --frames 16 --size 40x64 --widths 128,256,512,512

diffusers' `UNet3DConditionModel`, `UNetSpatioTemporalConditionModel` (SVD) and `I2VGenXLUNet` against `UNet3D`, in
float32 and bfloat16. Both networks of a pair hold the same random numbers and get the same inputs: two rows, as with
guidance. They take turns. Ours is arranged as in a run (channels last on a CPU), and its text is prepared once before,
as a run does for all steps; theirs is as it comes, and projects the text in every call. Outputs are compared in
float32. We have no I2VGen-XL: its trunk is that of UNet3D, so ours of the same trunk stands beside it, without what
theirs adds for the picture, which the table says in operations; their outputs differ and are not compared.

Times are medians of seconds of this process on one core of a CPU, where other programs do not count, or of a GPU's own
clock. Memory is what a forward adds at its peak to the networks. Results: benchmarks/results/DATE-peers-DEVICE.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from streamt2v import devices
from streamt2v.models.layers import sinusoids
from streamt2v.models.unet3d import TextContext, UNet3D, UNet3DConfig
from streamt2v.weights import quiet

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from benchmarks.speed import PAGE, RESULTS, Instruments, table  # noqa: E402 - the checkout need not be installed

Work = Callable[[], Tensor]
LEVELS = (True, True, True, False)
NUMBERS = torch.tensor([[6.0, 127.0, 0.02]])  # of SVD: frame rate, motion, noise
TEXT, HEAD, PICTURE_TOKENS = 77, 64, 1


def pairs(widths: tuple[int, ...], frames: int, size: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """What to measure: name -> builder of (theirs, ours, call of theirs, call of ours, whether outputs are equal)."""
    config = UNet3DConfig(block_out_channels=widths, attention_levels=LEVELS, cross_attention_dim=256)
    return {
        "UNet3DConditionModel": partial(modelscope, config, frames, size),
        "UNetSpatioTemporalConditionModel (SVD)": partial(svd, config, frames, size),
        "I2VGenXLUNet": partial(i2vgen, config, frames, size),
    }


def filled(network: nn.Module) -> nn.Module:
    """Give every parameter a value: fresh temporal layers are zero, and nothing of them would show."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.05
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + scale * torch.randn(parameter.shape, generator=draws))
    return network.eval().requires_grad_(False)


def kinds(suffix: str) -> dict[str, tuple[str, ...]]:
    """The library's names of the levels of a UNet."""
    down = tuple(f"{'CrossAttn' * attends}DownBlock{suffix}" for attends in LEVELS)
    up = tuple(f"{'CrossAttn' * attends}UpBlock{suffix}" for attends in reversed(LEVELS))
    return {"down_block_types": down, "up_block_types": up}


def modelscope(config: UNet3DConfig, frames: int, size: tuple[int, int]) -> Any:
    """The UNet of ModelScope and of StreamingT2V, without CAM and APM."""
    from diffusers import UNet3DConditionModel

    theirs = UNet3DConditionModel(
        **kinds("3D"), block_out_channels=config.block_out_channels, attention_head_dim=HEAD,
        cross_attention_dim=config.cross_attention_dim,
    )  # fmt: skip
    ours = UNet3D(config)
    ours.load_state_dict(filled(theirs).state_dict())
    latents, text = torch.randn(2, 4, frames, *size), torch.randn(2, TEXT, config.cross_attention_dim)

    def call(network: Any) -> Work:
        like = next(network.parameters())
        return lambda: network(latents.to(like), 500, text.to(like)).sample

    return theirs, ours, call, partial(prepared, latents=latents, text=TextContext(text)), True


def svd(config: UNet3DConfig, frames: int, size: tuple[int, int]) -> Any:
    """The UNet of SVD and of StreamingSVD, without CAM."""
    from diffusers import UNetSpatioTemporalConditionModel

    theirs = UNetSpatioTemporalConditionModel(
        **kinds("SpatioTemporal"), block_out_channels=config.block_out_channels, addition_time_embed_dim=64,
        projection_class_embeddings_input_dim=3 * 64, cross_attention_dim=config.cross_attention_dim,
        num_attention_heads=tuple(width // HEAD for width in config.block_out_channels),
    )  # fmt: skip
    config = replace(
        config, in_channels=8, transformer_in_heads=0, text_tokens=PICTURE_TOKENS, pooled_text_dim=192, blends_time=True
    )
    ours, names = (
        UNet3D(config),
        {"add_embedding.linear_1": "text_embedding.0", "add_embedding.linear_2": "text_embedding.2"},
    )
    state = filled(theirs).state_dict()
    ours.load_state_dict({key.replace(key[:22], names.get(key[:22], key[:22])): value for key, value in state.items()})
    for name, layer in theirs.named_modules():  # the published network has 1e-5 there, as ours; the library 1e-6
        if isinstance(layer, nn.GroupNorm) and "attentions" not in name:
            layer.eps = 1e-5
    latents, text = torch.randn(2, 8, frames, *size), torch.randn(2, PICTURE_TOKENS, config.cross_attention_dim)
    pooled = sinusoids(NUMBERS, 64).flatten(1).expand(2, -1)

    def call(network: Any) -> Work:
        like = next(network.parameters())
        numbers = NUMBERS.to(like).expand(2, -1)
        return lambda: network(latents.transpose(1, 2).to(like), 0.275, text.to(like), numbers).sample.transpose(1, 2)

    return theirs, ours, call, partial(prepared, latents=latents, text=TextContext(text, pooled), timestep=0.275), True


def i2vgen(config: UNet3DConfig, frames: int, size: tuple[int, int]) -> Any:
    """The UNet of I2VGen-XL, and ours of the same trunk, which sees as many tokens and channels."""
    from diffusers import I2VGenXLUNet

    theirs = I2VGenXLUNet(
        **kinds("3D"), block_out_channels=config.block_out_channels, num_attention_heads=HEAD,
        cross_attention_dim=config.cross_attention_dim,
    )  # fmt: skip
    trunk, state = UNet3D(replace(config, in_channels=8)), filled(theirs).state_dict()
    trunk.load_state_dict({key: state[key] for key in trunk.state_dict()})
    latents, picture = (torch.randn(2, 4, frames, *size) for _ in range(2))
    text, embedding = torch.randn(2, TEXT, config.cross_attention_dim), torch.randn(2, config.cross_attention_dim)
    tokens = torch.randn(2, TEXT + 4 + 64, config.cross_attention_dim)  # text, 4 of the embedding, 8 x 8 of the picture

    def call(network: Any) -> Work:
        like = next(network.parameters())
        given = [value.to(like) for value in (latents, picture, embedding, text)]
        fps = torch.full((2,), 8)
        return lambda: network(given[0], 500, fps, given[1], given[2], given[3]).sample

    seen = torch.cat([latents, picture], dim=1)
    return theirs, trunk, call, partial(prepared, latents=seen, text=TextContext(tokens)), False


def prepared(network: UNet3D, latents: Tensor, text: TextContext, timestep: float = 500) -> Work:
    """Return a call of ours with its text prepared."""
    conditioning, latents = network.prepare(text), latents.to(network.conv_in.weight.dtype)
    return lambda: network(latents, timestep, conditioning)


def added(tools: Instruments, work: Work) -> int:
    """Bytes that some work adds at its peak to what the process or the GPU held before."""
    gc.collect()
    if tools.device.kind == "cpu":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # what is kept for later would hide what is taken
    tools.forget_peak()
    before = tools.peak()
    work()
    return tools.peak() - before


@torch.inference_mode()
def measured(tools: Instruments, build: Callable[[], Any], dtype: torch.dtype) -> dict[str, Any]:
    """Time, operations and memory of both networks of a pair, and the largest difference of their outputs."""
    torch.manual_seed(0)
    theirs, ours, call, call_ours, equal = build()
    theirs, ours = (network.to(tools.device.name, dtype) for network in (theirs, ours))
    devices.arrange(ours, tools.device)
    works = [call(theirs), call_ours(ours)]
    with FlopCounterMode(display=False) as counter:
        found = works[0]().float()
    flops = [counter.get_total_flops()]
    with FlopCounterMode(display=False) as counter:
        own = works[1]().float()
    flops.append(counter.get_total_flops())
    memory = [added(tools, work) for work in works]
    seconds = tools.seconds(*works)
    row: dict[str, Any] = {
        side: {"seconds": s, "tflop": f / 1e12, "peak_bytes": m}
        for side, s, f, m in zip(("theirs", "ours"), seconds, flops, memory, strict=True)
    }
    if equal:
        row["difference"] = float((own - found).abs().max() / found.abs().max())
    return row


def main(arguments: list[str] | None = None) -> None:
    """Measure every pair and write the result and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--widths", default="64,128,256,256")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", default="16x24", help="height x width of the latents")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    widths = tuple(map(int, given.widths.split(",")))
    height, width = map(int, given.size.split("x"))
    quiet("diffusers")
    device = devices.resolve(given.device)
    threads = devices.set_threads(1 if device.kind == "cpu" else None)
    devices.repeat_exactly(device)
    tools, rows = Instruments(device, given.repeats), dict[str, Any]()
    for name, build in pairs(widths, given.frames, (height, width)).items():
        for dtype in (torch.float32, torch.bfloat16):
            row = measured(tools, build, dtype)
            kind = str(dtype).removeprefix("torch.")
            rows[f"{name}, {kind}"] = row
            ratio = row["ours"]["seconds"] / row["theirs"]["seconds"]
            taken = f"{row['theirs']['seconds']:.3g} s, ours {row['ours']['seconds']:.3g} s, {ratio:.2f}"
            print(f"{name}, {kind}: {taken}", flush=True)
    described = devices.card(device) or devices.describe(device).partition(",")[0]
    result = {
        "date": str(date.today()), "device": described, "threads": threads, "widths": widths, "frames": given.frames,
        "height": height, "width": width, "repeats": given.repeats,
        "versions": {package: version(package) for package in ("torch", "diffusers")}, "rows": rows,
    }  # fmt: skip
    given.results.mkdir(exist_ok=True)
    name = "-".join(described.lower().split())
    (given.results / f"{date.today()}-peers-{name}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    given.page.write_text(table(given.results), "utf-8")


if __name__ == "__main__":
    main()
