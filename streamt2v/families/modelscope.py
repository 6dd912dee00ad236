"""ModelScope text-to-video as the initializer: its network, in our own sampling loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamt2v.chunks import Chunk
from streamt2v.config import RunConfig
from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.families.choose import Chosen
from streamt2v.families.diffusers_pipelines import check_parts, dtype_of, load_part, noise_schedule
from streamt2v.families.makers import First
from streamt2v.families.networks import Networks
from streamt2v.models.encoders import decode_latents, encode_text, latent_size
from streamt2v.stages.denoise import Observe, Sampling, denoise
from streamt2v.stages.stream import NoiseOfChunk, chunk_noise
from streamt2v.weights.folders import read_index


def first(networks: Networks, chosen: Chosen) -> First:
    """Return the maker of first frames: from text alone, at the size of the model's own setting."""

    def make(prompt: str, picture: Tensor | None) -> Tensor:
        run = networks.run
        model = load_modelscope(chosen.folder, networks.device.name)
        networks.merged(model.unet, chosen.folder / "unet")
        height, width = run.initialize.size or run.stream.size
        shape = (model.unet.config.out_channels, *latent_size(model.vae, height, width))
        noise = chunk_noise(networks.draws, run.stream.chunk, shape, networks.device.name)
        sampling = Sampling.of(run.initialize, networks.policy.batched_guidance)
        steps = sampling.num_inference_steps or MODELSCOPE_STEPS
        return from_modelscope(
            model, run, sampling, noise, lambda step, *_: networks.watch.step("stream", 0, step + 1, steps)
        )

    return make


def load_modelscope(folder: Path, device: str) -> ModelScope:
    """Load the parts of a ModelScope text-to-video folder for our own sampling loop.

    Raises:
        WeightsError: see `load`, or a noise schedule of another kind.
    """
    _, index = read_index(folder)
    dtype = dtype_of(device, index)
    wanted = ("unet", "vae", "text_encoder", "tokenizer")
    check_parts(folder, index, *wanted, "scheduler")
    unet, vae, text_encoder, tokenizer = (load_part(folder, name, index, dtype) for name in wanted)
    return ModelScope(unet.to(device), vae.to(device), text_encoder.to(device), tokenizer, noise_schedule(folder))


MODELSCOPE_STEPS, MODELSCOPE_GUIDANCE = 50, 9.0  # as published with StreamingT2V


@dataclass(frozen=True)
class ModelScope:
    """The parts of a ModelScope text-to-video model: library networks, its tokenizer, its noise schedule."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    schedule: NoiseSchedule


@torch.inference_mode()
def from_modelscope(
    model: ModelScope, config: RunConfig, sampling: Sampling, noise: NoiseOfChunk, observe: Observe | None = None
) -> Tensor:
    """Sample the first chunk from text with the library's 3D UNet: frames [F, 3, H, W] in [-1, 1].

    Steps or a guidance scale of 0 are the published ones.

    Source: arXiv 2308.06571 (ModelScope T2V); steps and guidance as StreamingT2V was published.
    """
    sampling = replace(
        sampling,
        num_inference_steps=sampling.num_inference_steps or MODELSCOPE_STEPS,
        guidance_scale=sampling.guidance_scale or MODELSCOPE_GUIDANCE,
    )
    text = encode_text(model.tokenizer, model.text_encoder, [config.negative_prompt, config.prompt]).tokens  # [2, S, D]

    def predict(latents: Tensor, timestep: int, rows: slice) -> Tensor:
        output: Tensor = model.unet(latents.to(model.unet.dtype), timestep, text[rows]).sample
        return output.float()

    latents = denoise(predict, model.schedule, noise(Chunk(0, 0, config.stream.chunk, 0)), sampling, observe)
    return decode_latents(model.vae, latents[0].transpose(0, 1))
