"""StreamingSVD: a picture model that continues its own video, and any other from 25 frames on; SDEdit refinement.

The first chunk is sampled by the same denoiser without CAM, from a picture, or comes from another model.
"""

from collections.abc import Sequence

from torch import Tensor

from streamt2v.chunks import Chunk
from streamt2v.families import sdedit
from streamt2v.families.makers import Makers
from streamt2v.families.networks import Networks
from streamt2v.media import frames
from streamt2v.models.cam import ConditionalAttention
from streamt2v.models.encoders import embed_image, latent_size
from streamt2v.stages import stream
from streamt2v.stages.picture_stream import (
    Anchor,
    Motion,
    PictureModels,
    PictureSampling,
    PictureStreamer,
    decode_groups,
    picture_noise,
)
from streamt2v.stages.stream import StreamState

FIRST_GUIDANCE = 1.0
"""Guidance of the first frame of a first chunk, which is the picture: as published with SVD."""


def build(networks: Networks) -> Makers:
    """Return the family's callables; each loads what it needs when it is first called."""
    run = networks.run

    def first(prompt: str, picture: Tensor | None) -> Tensor:
        assert picture is not None  # checked before the run: the family reads no text
        fitted = frames.fill(picture[None], run.stream.size)[0]
        own = run.initialize
        sampling = _sampling(networks, own.num_inference_steps, (FIRST_GUIDANCE, own.image_guidance_scale))
        stage = _streamer(networks, fitted.to(networks.device.name), sampling, None)
        stepped = networks.stepped(0, own.num_inference_steps)
        return stage.new_frames(Chunk(0, 0, run.stream.chunk, 0), fitted[None][:0], stepped)

    def extend(state: StreamState, prompt: str, chunk: Chunk) -> Tensor:
        def streamer() -> PictureStreamer:
            scales = (run.picture.min_guidance_scale, run.stream.guidance_scale)
            sampling = _sampling(networks, run.stream.num_inference_steps, scales)
            cam = networks.load("stream.cam") if run.stream.cam else None
            return _streamer(networks, state.anchor, sampling, cam)

        stepped = networks.stepped(chunk.index, run.stream.num_inference_steps)
        return networks.once("streamer", streamer).new_frames(chunk, state.conditioning_frames, stepped, state.ahead)

    return Makers(first, extend, lambda enlarged: sdedit.refine(networks, enlarged))


def _sampling(networks: Networks, steps: int, scales: Sequence[float]) -> PictureSampling:
    """Guidance never shrinks along a chunk: a lower one asked for holds for all its frames."""
    return PictureSampling(steps, min(scales), scales[1], networks.policy.batched_guidance)


def _streamer(
    networks: Networks, anchor: Tensor, sampling: PictureSampling, cam: ConditionalAttention | None
) -> PictureStreamer:
    """Return the stage that starts every chunk from an anchor frame [3, H, W] in [-1, 1]."""
    run, vae, unet = networks.run, networks.load("stream.vae"), networks.load("stream.unet")
    told, size, device = run.picture, run.stream.size, networks.device.name
    # Small networks: starting their kernels takes longer than the kernels.
    step = networks.once(
        "stream.step", lambda: networks.compiled(stream.network_step, graphs=networks.policy.keep_networks)
    )
    latent_shape = (unet.config.out_channels, *latent_size(vae, *size))
    return PictureStreamer(
        PictureModels(unet, vae, cam, step),
        Anchor(anchor, embed_image(networks.load("stream.image"), anchor[None])),
        Motion(told.fps - 1, told.motion_bucket_id, told.noise_aug_strength),
        sampling,
        picture_noise(networks.draws, run.stream.chunk, latent_shape, (3, *size), told.noise, device),
        decode_groups(run.stream.chunk, told.decode_chunk_size, told.decode_overlap, told.decode_groups),
    )
