"""Helios as a family: its public pipeline makes one chunk a call, from the latents of those before and the first one.

A chunk is nine latents, decoded on their own: 33 frames. What is known goes from call to call as latents, so a video
equals that of one long call, bit by bit. Helios refines nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streamt2v.chunks import Chunk
from streamt2v.config import SamplingConfig
from streamt2v.errors import ConfigError
from streamt2v.families import bases
from streamt2v.families.makers import Enlarged, Makers
from streamt2v.families.networks import Networks
from streamt2v.media import frames
from streamt2v.stages.flow import Words
from streamt2v.stages.stream import StreamState

MAX_WORDS = 512
TIDY = True
HISTORY = 19  # latents: 16, 2 and 1, seen ever more finely
NOISE = (0.111, 0.135)  # published range of how much of a picture is noise


def make(parts: dict[str, Any], settings: dict[str, Any], fps: float, device: str = "cpu") -> Any:
    """Build the pipeline around its networks, which compute on a device wherever their weights are.

    Prompts come as features.
    """
    import diffusers

    kind: Any = diffusers.HeliosPyramidPipeline if "is_distilled" in settings else diffusers.HeliosPipeline
    kind = type(kind.__name__, (kind,), {"_execution_device": torch.device(device)})
    told = {name: settings[name] for name in ("is_cfg_zero_star", "is_distilled") if name in settings}
    gamma = parts["scheduler"].config.gamma
    covariance = torch.eye(4, device=device) * (1 + gamma) - gamma
    if told and torch.linalg.cholesky_ex(covariance).info:
        # The published 1/3 is singular to the last digit: not every machine can draw the noise of its 2x2 blocks.
        parts["scheduler"].register_to_config(gamma=gamma * (1 - 1e-4))
    pipeline = kind(tokenizer=None, text_encoder=None, **parts, **told)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(networks: Networks) -> Makers:
    """Return the family's callables; each loads what it needs when it is first called."""
    run, name, draws = networks.run, networks.family.pipeline, networks.draws
    made: dict[str, Tensor] = {}

    def chunk(
        prompt: str, number: int, sampling: SamplingConfig, guidance: float, known: Mapping[str, Tensor]
    ) -> Tensor:
        words = networks.once("texts", lambda: bases.texts(networks, name))[prompt]
        pipeline, steps = bases.base(networks, name), sampling.num_inference_steps
        generator, stepped = draws.generator("stream.helios", (number,)), networks.stepped(number, steps)
        shown, latents = one_chunk(pipeline, words, run.stream.size, steps, guidance, known, generator, stepped)
        made.update(remembered(known, latents))
        return shown

    def first(prompt: str, picture: Tensor | None) -> Tensor:
        known, own = dict[str, Tensor](), run.initialize
        if picture is not None:
            fitted = frames.fill(picture[None], run.stream.size)
            known = from_picture(bases.base(networks, name), fitted.to(networks.device.name), run.stream.chunk)
            known = {part: noised(latents, networks, index) for index, (part, latents) in enumerate(known.items())}
        scale = own.guidance_scale if picture is None else own.image_guidance_scale
        return chunk(prompt, 0, own, scale, known)

    def extend(state: StreamState, prompt: str, planned: Chunk) -> Tensor:
        return chunk(prompt, planned.index, run.stream, run.stream.guidance_scale, state.memory)

    @torch.inference_mode()
    def remember(shown: Tensor) -> dict[str, Tensor]:
        if not made:  # the frames are from elsewhere
            pipeline = bases.base(networks, name)
            made.update(first=encoded(pipeline, shown[:1]), history=encoded(pipeline, shown))
        return made

    def refine(given: Enlarged) -> Any:
        raise ConfigError(f"model {name} does not refine", "leave the refiner out")

    return Makers(first, extend, refine, remember)


@torch.inference_mode()
def one_chunk(
    pipeline: Any,
    words: Words,
    size: tuple[int, int],
    num_steps: int,
    guidance_scale: float,
    known: Mapping[str, Tensor],
    generator: torch.Generator,
    stepped: Any = lambda step: None,
) -> tuple[Tensor, Tensor]:
    """Call the pipeline once.

    Args:
        pipeline: HeliosPipeline or HeliosPyramidPipeline.
        words: text features.
        size: (H, W).
        num_steps: of the whole pyramid, where it is one.
        guidance_scale: 1 is off.
        known: `history`, up to 19 latents [1, C, n, h, w], and `first`, the first latent of the video; a picture's
            latents are `first` and `moving`; empty at the beginning of a video from text.
        generator: every random number of the call.
        stepped: called with the number of every step.

    Returns:
        Frames [33, 3, H, W] in [-1, 1], and their latents [1, C, 9, h, w].
    """
    latents, done = torch.empty(0), 0

    def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal latents, done
        latents, done = tensors["latents"], done + 1
        stepped(min(done, num_steps) - 1)
        return tensors

    pyramid = hasattr(pipeline.config, "is_distilled")
    counts: dict[str, Any] = {"num_inference_steps": num_steps}
    if pyramid:
        distilled_start = pipeline.config.is_distilled and "history" not in known
        counts = {"pyramid_num_inference_steps_list": spread(num_steps), "is_amplify_first_chunk": distilled_start}
    result = pipeline(
        prompt_embeds=words.tokens[1:],
        negative_prompt_embeds=words.tokens[:1],
        height=size[0],
        width=size[1],
        num_frames=33,
        guidance_scale=guidance_scale,
        generator=generator,
        image_latents=known.get("first"),
        fake_image_latents=known.get("moving"),
        video_latents=known.get("history"),
        add_noise_to_image_latents=False,
        add_noise_to_video_latents=False,
        output_type="pt",
        callback_on_step_end=after_step,
        **counts,
    )
    return result.frames[0].float() * 2 - 1, latents.float()


def spread(num_steps: int) -> list[int]:
    """Spread steps over the three sizes of the pyramid, at least one each, the larger sizes getting what is left."""
    return [max(1, (num_steps + level) // 3) for level in range(3)]


def remembered(known: Mapping[str, Tensor], latents: Tensor) -> dict[str, Tensor]:
    """Return what the next chunk is given after one with these latents."""
    before = known.get("history", known.get("moving"))
    history = latents if before is None else torch.cat([before, latents], dim=2)
    return {"first": known.get("first", latents[:, :, :1]), "history": history[:, :, -HISTORY:]}


def encoded(pipeline: Any, images: Tensor) -> Tensor:
    """Encode frames [F, 3, H, W] in [-1, 1] to latents [1, C, n, h, w], by the middle of the posterior."""
    from streamt2v.families.wan import Wan

    return Wan({"transformer": None, "vae": pipeline.vae, "scheduler": None}, {}).encode(images)


@torch.inference_mode()
def from_picture(pipeline: Any, picture: Tensor, num_frames: int) -> dict[str, Tensor]:
    """Return the latents of a picture [1, 3, H, W], and of the end of a clip that shows nothing else."""
    still = encoded(pipeline, picture.expand(num_frames, -1, -1, -1))
    return {"first": encoded(pipeline, picture), "moving": still[:, :, -1:]}


def noised(latents: Tensor, networks: Networks, number: int) -> Tensor:
    """Mix a picture's latents with noise, as published, against drift."""
    share = NOISE[0] + (NOISE[1] - NOISE[0]) * networks.draws.uniform("stream.picture", (number, 0), (1,))
    noise = networks.draws.normal("stream.picture", (number, 1), latents.shape)
    return share.to(latents) * noise.to(latents) + (1 - share.to(latents)) * latents
