"""Stage 1, the initializer: a prompt, or a picture and a prompt, to the first chunk of frames.

One function per kind of base model: the family's own two, ModelScope's network in our own loop, and any pipeline of
diffusers, which is called with what its signature knows.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from streamt2v.chunks import Chunk
from streamt2v.config import RunConfig
from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.errors import ConfigError
from streamt2v.frames import apply_fit, fit_into, to_u8
from streamt2v.models.encoders import decode_latents, embed_image, encode_frames, encode_text
from streamt2v.models.unet3d import TextContext, UNet3D
from streamt2v.stages.denoise import Sampling, denoise
from streamt2v.stages.stream import NoiseOfChunk, StreamModels


@torch.inference_mode()
def from_text(
    models: StreamModels, text: TextContext, sampling: Sampling, noise: NoiseOfChunk, num_frames: int
) -> Tensor:
    """Sample the first chunk from text alone, CAM and APM off: frames [F, 3, H, W] in [-1, 1]."""
    conditioning = models.unet.prepare(text)
    latents = denoise(
        lambda latents, timestep, rows: models.unet(latents, timestep, conditioning.rows(rows)),
        models.schedule, noise(Chunk(0, 0, num_frames, 0)), sampling,
    )  # fmt: skip
    return decode_latents(models.vae, latents[0].transpose(0, 1))


@torch.inference_mode()
def from_image(
    models: StreamModels, unet: UNet3D, image: Tensor, text: TextContext, sampling: Sampling, noise: NoiseOfChunk,
    num_frames: int,
) -> Tensor:  # fmt: skip
    """Sample the first chunk from a picture [3, H, W] in [-1, 1] the way SVD does: frames [F, 3, H, W] in [-1, 1].

    The picture's latents are concatenated to every frame's noisy latents, its CLIP embedding joins the text as one
    more token. The unconditional branch sees zeros for both.

    Source: arXiv 2311.15127 section 4.2 (image-to-video by concatenation and CLIP context).
    """
    latent = encode_frames(models.vae, image.unsqueeze(0), None)  # [1, C, h, w]
    assert models.image_encoder is not None  # the family ships one, checked when its files are listed
    embedding = embed_image(models.image_encoder, image.unsqueeze(0)).unsqueeze(1)  # [1, 1, D]
    tokens = torch.cat([text.tokens, torch.cat([torch.zeros_like(embedding), embedding])], dim=1)
    conditioning = unet.prepare(TextContext(tokens, text.pooled))
    concatenated = latent[:, :, None].expand(-1, -1, num_frames, -1, -1)  # [1, C, F, h, w]

    pictures = torch.cat([torch.zeros_like(concatenated), concatenated])

    def predict(latents: Tensor, timestep: int, rows: slice) -> Tensor:
        return unet(torch.cat([latents, pictures[rows]], dim=1), timestep, conditioning.rows(rows))  # type: ignore[no-any-return]

    latents = denoise(predict, models.schedule, noise(Chunk(0, 0, num_frames, 0)), sampling)
    return decode_latents(models.vae, latents[0].transpose(0, 1))


# ------------------------------------------------------------------------------------------------- models of others

MODELSCOPE_STEPS, MODELSCOPE_GUIDANCE = 50, 9.0  # as published with StreamingT2V
SIDE = 64  # what both sides of a working size are multiples of: it divides evenly in every network known


@dataclass(frozen=True)
class Wish:
    """What is asked of a model of others; zeros leave the choice to it.

    `base` is the size (H, W) of base frames, `working` the one that the model is to work at.
    """

    prompt: str
    negative_prompt: str
    num_frames: int
    base: tuple[int, int]
    working: tuple[int, int]
    num_inference_steps: int
    guidance_scale: float
    image_guidance_scale: float
    decode_chunk_size: int = 8

    @classmethod
    def of(cls, config: RunConfig, sparing: bool = False) -> "Wish":
        """Take the settings of a run; `sparing` lets SVD's temporal decoder see fewer frames at once."""
        own, stream = config.initialize, config.stream
        return cls(
            config.prompt, config.negative_prompt, stream.chunk, (stream.height, stream.width),
            (own.height, own.width), own.num_inference_steps, own.guidance_scale, own.image_guidance_scale,
            2 if sparing else 8,
        )  # fmt: skip


@dataclass(frozen=True)
class ModelScope:
    """The parts of a ModelScope text-to-video model: library networks, its tokenizer, its noise schedule."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    schedule: NoiseSchedule


@torch.inference_mode()
def from_modelscope(model: ModelScope, wish: Wish, sampling: Sampling, noise: NoiseOfChunk) -> Tensor:
    """Sample the first chunk from text with the library's 3D UNet: frames [F, 3, H, W] in [-1, 1].

    Steps or a guidance scale of 0 are the published ones.

    Source: arXiv 2308.06571 (ModelScope T2V); steps and guidance as StreamingT2V was published.
    """
    sampling = replace(
        sampling,
        num_inference_steps=sampling.num_inference_steps or MODELSCOPE_STEPS,
        guidance_scale=sampling.guidance_scale or MODELSCOPE_GUIDANCE,
    )
    text = encode_text(model.tokenizer, model.text_encoder, [wish.negative_prompt, wish.prompt]).tokens  # [2, S, D]

    def predict(latents: Tensor, timestep: int, rows: slice) -> Tensor:
        output: Tensor = model.unet(latents.to(model.unet.dtype), timestep, text[rows]).sample
        return output.float()

    latents = denoise(predict, model.schedule, noise(Chunk(0, 0, wish.num_frames, 0)), sampling)
    return decode_latents(model.vae, latents[0].transpose(0, 1))


def draw_picture(pipelines: Sequence[Any], wish: Wish, generator: torch.Generator) -> Tensor:
    """Draw a picture by text-to-image pipelines, a prior before its decoder: [3, H, W] in [-1, 1]."""
    wanted: dict[str, Any] = _texts(wish)
    for prior in pipelines[:-1]:
        wanted |= dict(_call(prior, wanted, wish.num_inference_steps, wish.guidance_scale, generator))
    decoder = pipelines[-1]
    wanted |= _sides(_working_size(decoder, wish.base)) | {"output_type": "np"}
    result = _call(decoder, wanted, wish.num_inference_steps, wish.guidance_scale, generator)
    return _to_frames(result[0])[0]


def from_pipeline(pipeline: Any, wish: Wish, generator: torch.Generator, picture: Tensor | None = None) -> Tensor:
    """Make the first chunk by a text- or image-to-video pipeline of diffusers: frames [F, 3, H, W] in [-1, 1].

    Args:
        pipeline: its signature decides what it is given.
        wish: what is asked.
        generator: every random number of the pipeline comes from here.
        picture: [3, h, w] in [-1, 1], for an image-to-video pipeline.

    Raises:
        ConfigError: the pipeline needs a picture, takes none, or refuses its settings.
    """
    known = inspect.signature(pipeline.__call__).parameters
    name = type(pipeline).__name__
    if picture is not None and "image" not in known:
        raise ConfigError(f"{name} takes no picture", "leave --image out, or use --init svd")
    if picture is None and "image" in known and known["image"].default is inspect.Parameter.empty:
        raise ConfigError(f"{name} starts from a picture", "give one with --image")
    wanted: dict[str, Any] = _texts(wish) | {
        "num_frames": _num_frames(pipeline, wish.num_frames),
        "decode_chunk_size": wish.decode_chunk_size,
        "output_type": "np",
    }
    size = wish.working if all(wish.working) else _working_size(pipeline, wish.base)
    wanted |= _sides(size)
    if picture is not None:
        shape = (picture.shape[-2], picture.shape[-1])
        fitted = apply_fit(picture.unsqueeze(0), fit_into(shape, size or wish.base, "cover"))
        wanted["image"] = Image.fromarray(to_u8(fitted)[0])
    scale = wish.guidance_scale if picture is None else wish.image_guidance_scale
    made = _to_frames(_call(pipeline, wanted, wish.num_inference_steps, scale, generator)[0][0])
    if len(made) < wish.num_frames:
        raise ConfigError(f"{name} made {len(made)} frames, the first chunk needs {wish.num_frames}")
    return made[: wish.num_frames]


def ignores_negative_prompt(pipeline: Any) -> bool:
    """Whether a pipeline reads a prompt and yet has no place for a negative one."""
    known = inspect.signature(pipeline.__call__).parameters
    return "prompt" in known and "negative_prompt" not in known


def _texts(wish: Wish) -> dict[str, Any]:
    """An empty negative prompt is not passed: some pipelines have one of their own."""
    return {"prompt": wish.prompt} | ({"negative_prompt": wish.negative_prompt} if wish.negative_prompt else {})


def _sides(size: tuple[int, int] | None) -> dict[str, int]:
    return {} if size is None else {"height": size[0], "width": size[1]}


def _call(
    pipeline: Any, wanted: dict[str, Any], num_inference_steps: int, guidance_scale: float, generator: torch.Generator
) -> Any:
    """Call a pipeline with what it knows of the wanted arguments, and with steps and guidance by their endings."""
    known = inspect.signature(pipeline.__call__).parameters
    arguments = {name: value for name, value in (wanted | {"generator": generator}).items() if name in known}
    if num_inference_steps:
        arguments |= {name: num_inference_steps for name in known if name.endswith("num_inference_steps")}
    if guidance_scale:
        # SVD's guidance grows along the frames; only its upper end is a matter of taste.
        scales = (name for name in known if name.endswith("guidance_scale") and name != "min_guidance_scale")
        arguments |= dict.fromkeys(scales, guidance_scale)
    devices = [pipeline.device] if pipeline.device.type == "cuda" else []
    # Whatever a pipeline draws past its generator is seeded too, and nobody else's numbers move.
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(generator.initial_seed())
        try:
            return pipeline(**arguments)
        except (TypeError, ValueError, ArithmeticError) as error:
            hint = "another size is --set initialize.height=H --set initialize.width=W"
            raise ConfigError(f"{type(pipeline).__name__} refuses its settings: {error}", hint) from error


def _num_frames(pipeline: Any, wanted: int) -> int:
    """At least `wanted` frames: the number that a network was made for, or the next that its video VAE can pack."""
    for name in ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"):
        ratio = getattr(pipeline, name, None)
        if ratio:
            return int(ratio) * math.ceil((wanted - 1) / int(ratio)) + 1
    made_for = getattr(getattr(getattr(pipeline, "unet", None), "config", None), "num_frames", None) or 0
    return max(wanted, int(made_for))


def _working_size(pipeline: Any, base: tuple[int, int]) -> tuple[int, int] | None:
    """A size (H, W) of the area that the pipeline prefers, in the shape of base frames; None where it says nothing.

    So nothing has to be cropped away afterwards, and no bars are ever drawn.
    """
    known = inspect.signature(pipeline.__call__).parameters
    height, width = (known[name].default if name in known else None for name in ("height", "width"))
    if not (isinstance(height, int) and isinstance(width, int)):
        config = getattr(getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None), "config", None)
        factor = getattr(pipeline, "vae_scale_factor", None) or getattr(pipeline, "vae_scale_factor_spatial", None)
        side = getattr(config, "sample_size", None)
        height, width = getattr(config, "sample_height", None) or side, getattr(config, "sample_width", None) or side
        if not (isinstance(height, int) and isinstance(width, int) and factor):
            return None
        height, width = height * factor, width * factor
    root = math.sqrt(height * width / (base[0] * base[1]))
    rows, columns = (max(SIDE, round(side * root / SIDE) * SIDE) for side in base)
    return rows, columns


def _to_frames(pixels: Any) -> Tensor:
    """Turn a pipeline's arrays [F, H, W, 3] in [0, 1] into frames [F, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.asarray(pixels, dtype=np.float32)).permute(0, 3, 1, 2).mul(2).sub(1).clamp(-1, 1)
