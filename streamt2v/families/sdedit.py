"""Refining by SDEdit with randomized blending, by the networks that a family has for the `refine` roles."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from streamt2v.chunks import Chunk
from streamt2v.errors import VideoError
from streamt2v.families.makers import Enlarged, Refined
from streamt2v.families.networks import Networks
from streamt2v.media import frames
from streamt2v.models.encoders import decode_latents, encode_frames, latent_factor, latent_size
from streamt2v.models.unet3d import Conditioning, legal_canvas
from streamt2v.stages.refine import Denoiser, Refiner, RefineState, noise_grid, refiner_conditioning, sees_source


def refine(networks: Networks, given: Enlarged) -> Iterator[Refined]:
    """Refine by SDEdit with randomized blending on the smallest canvas that the networks accept."""
    settings, policy, device = networks.run.refine, networks.policy, networks.device.name
    schedule = networks.schedule("refine.unet")
    noise_grid(schedule, settings)  # what it refuses should not cost a first chunk
    state = RefineState.from_tensors(given.state, device) if given.state else None
    source = given.frames(0 if state is None else state.encoded)
    first = next(source, None)  # before the refiner's networks take memory: whatever makes it may need it all
    texts = networks.texts("refine") if networks.family.has("refine.text") else {}
    vae, unet = networks.load("refine.vae"), networks.load("refine.unet")
    canvas = legal_canvas(*given.size, unet.config, latent_factor(vae))

    @lru_cache(maxsize=settings.num_inference_steps + 2)  # those of the chunks in flight, at any length
    def prepared(prompt: str) -> Conditioning:
        return refiner_conditioning(unet, texts.get(prompt), given.scale)

    denoiser = Denoiser(
        networks.compiled(unet.run),
        schedule,
        lambda chunk: prepared(given.prompt_of(chunk)),
        policy.batched_guidance,
        "cpu" if policy.encoders_on_host else None,
        sees_source(unet.config),
    )

    def encode(start: int, stop: int) -> Tensor:
        return torch.cat([encode_frame(frame) for frame in range(start, stop)])

    def encode_frame(number: int) -> Tensor:
        nonlocal first
        frame, first = (next(source, None) if first is None else first), None
        if frame is None:
            raise VideoError(f"the video ended early, after {number} of {given.plan[-1].stop} frames")
        noise = None
        if settings.posterior == "published":
            shape = (unet.config.out_channels, *latent_size(vae, *canvas))
            place = number if given.around is None else given.around.frame(number)
            noise = networks.draws.normal("refine.posterior", (place,), shape).unsqueeze(0)
        with networks.pixels():
            return encode_frames(vae, frames.letterbox(frame, canvas), noise)

    def decode(latent: Tensor) -> Tensor:
        with networks.pixels():
            return frames.unletterbox(decode_latents(vae, latent.unsqueeze(0)), given.size)

    def stepped(chunk: Chunk, state: RefineState) -> None:
        left = len(given.plan) - sum(state.steps_done) / settings.num_inference_steps
        networks.watch.step("refine", chunk.index, state.steps_done[chunk.index], settings.num_inference_steps, left)

    stage = Refiner(denoiser, given.plan, settings, networks.draws, encode, state, stepped, given.around)
    for latents in stage.run():
        yield Refined(stage.state.finished - len(latents), map(decode, latents), stage.state.tensors)
        del latents  # large, and the next chunk needs its place
