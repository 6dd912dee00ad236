"""StreamingT2V (arXiv 2403.14773), published or of the demo: its own initializer, CAM and APM, SDEdit refinement."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from streamt2v.chunks import Chunk
from streamt2v.devices import send
from streamt2v.families import choose, sdedit
from streamt2v.families.makers import Makers
from streamt2v.families.networks import Networks
from streamt2v.media import frames
from streamt2v.models.encoders import decode_latents, embed_image, encode_frames, latent_size
from streamt2v.models.unet3d import TextContext, UNet3D
from streamt2v.stages import loops, prior, stream
from streamt2v.stages.denoise import ChunkNoise, Observe, Predict, Sampling, denoise
from streamt2v.stages.stream import NoiseOfChunk, Streamer, StreamModels, StreamState, chunk_noise
from streamt2v.timeline import prompt_at, turns


def build(networks: Networks) -> Makers:
    """Return the family's callables; each loads what it needs when it is first called."""
    run, device, policy = networks.run, networks.device.name, networks.policy

    def first(prompt: str, picture: Tensor | None) -> Tensor:
        if run.loop == "ring":
            return _ring(networks)
        whole = run.loop == "stream" and run.made <= run.stream.chunk
        num_frames = run.made if whole else run.stream.chunk
        models, text, noise = _models(networks), _texts(networks, prompt), _noise(networks, num_frames)
        sampling = Sampling.of(run.initialize, policy.batched_guidance)
        stepped = networks.stepped(0, sampling.num_inference_steps)
        if not choose.pictured(run):
            return from_text(models, text, sampling, noise, num_frames, stepped, whole)
        if picture is None:
            seen = _imagined(networks, text, sampling)
        else:
            seen = look(models, frames.fill(picture[None].to(device), run.stream.size))
        sampling = replace(sampling, guidance_scale=run.initialize.image_guidance_scale)
        unet = networks.load("initialize.image")
        return from_image(models, unet, seen, text, sampling, noise, num_frames, stepped, whole)

    def extend(state: StreamState, prompt: str, chunk: Chunk) -> Tensor:
        def streamer() -> Streamer:
            sampling, noise = Sampling.of(run.stream, policy.batched_guidance), _noise(networks, run.stream.chunk)
            text = _texts(networks, prompt)
            return Streamer(_models(networks), text, state.anchor, sampling, noise, run.stream.chunk)

        stepped = networks.stepped(chunk.index, run.stream.num_inference_steps)
        return networks.once("streamer", streamer, prompt).new_frames(
            chunk, state.conditioning_frames, stepped, state.ahead
        )

    return Makers(first, extend, lambda enlarged: sdedit.refine(networks, enlarged))


def _texts(networks: Networks, prompt: str) -> TextContext:
    return networks.once("stream.texts", lambda: networks.texts("stream"))[prompt]


def _models(networks: Networks) -> StreamModels:
    run, load = networks.run, networks.load
    apm = run.stream.apm and networks.family.has("stream.apm")
    from_picture = run.image and choose.named(run) == choose.OWN
    return networks.once(
        "stream",
        lambda: StreamModels(
            unet=load("stream.unet"),
            schedule=networks.schedule("stream.unet"),
            vae=load("stream.vae"),
            cam=load("stream.cam") if run.stream.cam else None,
            apm=load("stream.apm") if apm else None,
            image_encoder=load("stream.image") if apm or from_picture else None,
            # Small networks: starting their kernels takes longer than the kernels.
            step=networks.compiled(stream.network_step, graphs=networks.policy.keep_networks),
        ),
    )


def _noise(networks: Networks, num_frames: int) -> NoiseOfChunk:
    models, config = _models(networks), networks.run.stream
    shape = (models.unet.config.out_channels, *latent_size(models.vae, config.height, config.width))
    return chunk_noise(networks.draws, num_frames, shape, networks.device.name)


class Seen(NamedTuple):
    """What the picture-to-video network knows of a picture: its embedding [1, D]; its latents [1, C, h, w], if any."""

    embedding: Tensor
    latents: Tensor | None = None


@torch.inference_mode()
def look(models: StreamModels, picture: Tensor) -> Seen:
    """See a picture [1, 3, H, W] in [-1, 1]."""
    assert models.image_encoder is not None  # the family ships one, checked when its files are listed
    return Seen(embed_image(models.image_encoder, picture), encode_frames(models.vae, picture))


def _imagined(networks: Networks, text: TextContext, sampling: Sampling) -> Seen:
    """Draw the embedding of a picture that the text may describe."""
    network, schedule = networks.load("initialize.prior"), networks.schedule("initialize.prior")
    assert text.pooled is not None  # the prior was trained on it

    def noise(*step: int) -> Tensor:
        drawn = networks.draws.normal("prior", step, (1, network.config.image_dim, 1, 1, 1))
        return send(drawn, networks.device.name)

    return Seen(prior.embeddings(network, schedule, text.pooled[:, None], sampling, ChunkNoise(noise(), noise)))


@torch.inference_mode()
def _ring(networks: Networks) -> Tensor:
    """Sample a whole loop from text as a ring of windows: frames [N, 3, H, W] in [-1, 1]."""
    run, models = networks.run, _models(networks)
    sampling, timeline = Sampling.of(run.initialize, networks.policy.batched_guidance), turns(run)
    conditioning = cache(lambda prompt: models.unet.prepare(_texts(networks, prompt)))

    def predict_at(frame: int) -> Predict:
        text = conditioning(prompt_at(timeline, frame * run.output.interpolate))
        return lambda latents, timestep, rows: models.unet(latents, timestep, text.rows(rows))

    def cut(window: int, step: int) -> int:
        return networks.draws.integer("loop.cut", (window, step), 0, run.stream.overlap)

    noise = _noise(networks, run.made)(Chunk(0, 0, run.made, 0))
    stepped = networks.stepped(0, sampling.num_inference_steps)
    sizes = (run.stream.chunk, run.stream.overlap)
    latents = loops.denoise_ring(predict_at, models.schedule, noise, sampling, *sizes, cut, stepped)
    return decode_latents(models.vae, latents[0].transpose(0, 1))


@torch.inference_mode()
def from_text(
    models: StreamModels,
    text: TextContext,
    sampling: Sampling,
    noise: NoiseOfChunk,
    num_frames: int,
    observe: Observe | None = None,
    loop: bool = False,
) -> Tensor:
    """Sample the first chunk from text alone, or a loop, CAM and APM off: frames [F, 3, H, W] in [-1, 1]."""
    conditioning = models.unet.prepare(text)

    def predict(latents: Tensor, timestep: int, rows: slice) -> Tensor:
        return models.unet(latents, timestep, conditioning.rows(rows))  # type: ignore[no-any-return]

    return _sampled(models, predict, sampling, noise(Chunk(0, 0, num_frames, 0)), observe, loop)


def _sampled(
    models: StreamModels,
    predict: Predict,
    sampling: Sampling,
    noise: ChunkNoise,
    observe: Observe | None,
    rolling: bool,
) -> Tensor:
    timesteps = models.schedule.timesteps(sampling.num_inference_steps).tolist()
    network = loops.rolled(predict, timesteps) if rolling else predict
    latents = denoise(network, models.schedule, noise, sampling, observe)
    return decode_latents(models.vae, latents[0].transpose(0, 1))


@torch.inference_mode()
def from_image(
    models: StreamModels,
    unet: UNet3D,
    seen: Seen,
    text: TextContext,
    sampling: Sampling,
    noise: NoiseOfChunk,
    num_frames: int,
    observe: Observe | None = None,
    loop: bool = False,
) -> Tensor:
    """Sample the first chunk from a picture the way SVD does, or from its embedding: frames [F, 3, H, W] in [-1, 1].

    The picture's latents are concatenated to every frame's noisy latents, its CLIP embedding joins the text as one
    more token. The unconditional branch sees zeros for both, the other one zeros for latents that nobody knows. One
    more channel says whether the clip is a loop; as the network does not yet close it by that alone, it is rolled, too.

    Sources: arXiv 2311.15127 section 4.2 (image-to-video by concatenation and CLIP context), 2204.06125 (the embedding
    alone, as a prior draws it).
    """
    given, embedding = noise(Chunk(0, 0, num_frames, 0)), seen.embedding.unsqueeze(1)  # [1, 1, D]
    tokens = torch.cat([text.tokens, torch.cat([torch.zeros_like(embedding), embedding])], dim=1)
    conditioning = unet.prepare(TextContext(tokens, text.pooled))
    pictures = torch.zeros_like(given.initial).repeat(2, 1, 1, 1, 1)  # [2, C, F, h, w]
    if seen.latents is not None:
        pictures[1] = seen.latents[0, :, None]
    pictures = torch.cat([pictures, torch.full_like(pictures[:, :1], float(loop))], dim=1)

    def predict(latents: Tensor, timestep: int, rows: slice) -> Tensor:
        return unet(torch.cat([latents, pictures[rows]], dim=1), timestep, conditioning.rows(rows))  # type: ignore[no-any-return]

    return _sampled(models, predict, sampling, given, observe, rolling=loop)
