"""Refining by SDEdit with randomized blending: by the networks that a family has for it, or by a third-party model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from streamt2v.chunks import Chunk
from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.errors import VideoError
from streamt2v.families.makers import Enlarged, Refined
from streamt2v.families.networks import Networks
from streamt2v.media import frames
from streamt2v.models.encoders import decode_latents, encode_frames, latent_factor, latent_size
from streamt2v.models.unet3d import Conditioning, legal_canvas
from streamt2v.stages.refine import Denoiser, Refiner, RefineState, noise_grid, refiner_conditioning, sees_source


@dataclass(frozen=True)
class Model:
    """What refines, loaded: its VAE, its denoiser with `channels` of latents, and the canvas (H, W) that they accept.

    `look` is called with the number of every frame, its pixels on the canvas [1, 3, H, W] and its clean latents
    [1, C, h, w]; `left` with every chunk whose last step was made. `state` is kept with that of the stage.
    """

    vae: Any
    denoiser: Denoiser
    channels: int
    canvas: tuple[int, int]
    look: Callable[[int, Tensor, Tensor], None] = lambda number, pixels, latents: None
    left: Callable[[Chunk], None] = lambda chunk: None
    state: Callable[[], dict[str, Tensor]] = dict


def refine(networks: Networks, given: Enlarged) -> Iterator[Refined]:
    """Refine by the family's own networks, on the smallest canvas that they accept."""
    schedule = networks.schedule("refine.unet")

    def load() -> Model:
        texts = networks.texts("refine") if networks.family.has("refine.text") else {}
        vae, unet = networks.load("refine.vae"), networks.load("refine.unet")

        @lru_cache(maxsize=networks.run.refine.num_inference_steps + 2)  # of chunks in flight, at any length
        def prepared(prompt: str) -> Conditioning:
            return refiner_conditioning(unet, texts.get(prompt), given.scale)

        denoiser = Denoiser(
            networks.compiled(unet.run),
            schedule,
            lambda chunk: prepared(given.prompt_of(chunk)),
            networks.policy.batched_guidance,
            "cpu" if networks.policy.encoders_on_host else None,
            sees_source(unet.config),
        )
        canvas = legal_canvas(*given.size, unet.config, latent_factor(vae))
        return Model(vae, denoiser, unet.config.out_channels, canvas)

    return refined(networks, given, schedule, load)


def refined(
    networks: Networks, given: Enlarged, schedule: NoiseSchedule, load: Callable[[], Model]
) -> Iterator[Refined]:
    """Refine by a model, which is loaded when the first frame is there: whatever makes it may need all memory."""
    settings = networks.run.refine
    noise_grid(schedule, settings)  # what it refuses should not cost a first chunk
    state = RefineState.from_tensors(given.state, networks.device.name) if given.state else None
    source = given.frames(0 if state is None else state.encoded)
    first = next(source, None)
    model = load()
    vae = model.vae

    def encode(number: int) -> Tensor:
        nonlocal first
        frame, first = (next(source, None) if first is None else first), None
        if frame is None:
            raise VideoError(f"the video ended early, after {number} of {given.plan[-1].stop} frames")
        noise = None
        if settings.posterior == "published":
            shape = (model.channels, *latent_size(vae, *model.canvas))
            place = number if given.around is None else given.around.frame(number)
            noise = networks.draws.normal("refine.posterior", (place,), shape).unsqueeze(0)
        with networks.pixels():
            pixels = frames.letterbox(frame, model.canvas)
            latents = encode_frames(vae, pixels, noise)
            model.look(number, pixels, latents)
        return latents[0]

    def decode(latent: Tensor) -> Tensor:
        with networks.pixels():
            return frames.unletterbox(decode_latents(vae, latent.unsqueeze(0)), given.size)

    def stepped(chunk: Chunk, state: RefineState) -> None:
        done, steps = state.steps_done[chunk.index], settings.num_inference_steps
        if done == steps:
            model.left(chunk)
        networks.watch.step("refine", chunk.index, done, steps, len(given.plan) - sum(state.steps_done) / steps)

    stage = Refiner(model.denoiser, given.plan, settings, networks.draws, encode, state, stepped, given.around)
    for latents in stage.run():
        start = stage.state.finished - len(latents)
        yield Refined(start, map(decode, latents), lambda: stage.state.tensors() | model.state())
        del latents  # large, and the next chunk needs its place
