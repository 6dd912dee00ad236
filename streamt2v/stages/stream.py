"""Stage 2, streaming: from a first chunk on, each chunk re-creates the last frames and adds new ones, without end.

Three signals condition each chunk (arXiv 2403.14773 section 4): the text, the last frames through CAM, and one anchor
frame through APM. The state between chunks is small and explicit: the last frames and the anchor, as floats.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from streamt2v.chunks import Chunk
from streamt2v.devices import send
from streamt2v.diffusion.noise import Draws, per_frame
from streamt2v.diffusion.replacement import Held
from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.models.apm import AppearanceTokens
from streamt2v.models.cam import ConditionalAttention
from streamt2v.models.encoders import decode_latents, embed_image, encode_frames
from streamt2v.models.unet3d import Conditioning, TextContext, UNet3D
from streamt2v.stages.denoise import ChunkNoise, Observe, Predict, Sampling, denoise, reusing
from streamt2v.stages.loops import stride

NoiseOfChunk = Callable[[Chunk], ChunkNoise]
NOTHING: Mapping[int, Tensor] = MappingProxyType({})


def network_step(
    unet: UNet3D,
    cam: ConditionalAttention | None,
    latents: Tensor,
    timestep: Tensor,
    denoiser: Conditioning,
    extractor: Conditioning | None,
    embedded: Tensor | None,
    deep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the networks for one denoising step, in one function to compile: CAM, then the denoiser's `run`."""
    features = None
    if cam is not None and extractor is not None and embedded is not None:
        features = cam(latents[:, :, : embedded.shape[2]], timestep, extractor, embedded, shallow=deep is not None)
    return unet.run(latents, timestep, denoiser, features, deep)


def side_by_side(near: Predict, far: Predict, size: int, shown: int, timesteps: Sequence[int]) -> Predict:
    """Return a network for latents [B, C, F, h, w] of more than `size` frames, at most twice as many: two windows.

    One sees the first `size` frames, the other the last. The frame from which on the second is heard moves at every
    step through all that both see, so that there is no seam.

    Args:
        near, far: the networks of the windows.
        size: frames of a window.
        shown: frames at the beginning that are the first window's, fewer than `size`.
        timesteps: those of all steps, in order.
    """
    step_of = {timestep: step for step, timestep in enumerate(timesteps)}

    def predict(latents: Tensor, timestep: int, rows: slice) -> Tensor:
        begin = latents.shape[2] - size
        first = max(begin, shown)
        places = size - first + 1
        seam = first + step_of[timestep] * stride(places) % places
        heard = near(latents[:, :, :size], timestep, rows)[:, :, :seam]
        return torch.cat([heard, far(latents[:, :, begin:], timestep, rows)[:, :, seam - begin :]], dim=2)

    return predict


@dataclass(frozen=True)
class StreamModels:
    """The networks of the stage; `cam` None switches CAM off, `apm` None switches APM off.

    `step` is `network_step` or what was compiled from it.
    """

    unet: UNet3D
    schedule: NoiseSchedule
    vae: torch.nn.Module
    cam: ConditionalAttention | None = None
    apm: AppearanceTokens | None = None
    image_encoder: torch.nn.Module | None = None
    step: Callable[..., tuple[Tensor, Tensor]] = network_step


@dataclass(frozen=True)
class StreamState:
    """What the next chunk needs: its index, the last frames [Fc, 3, H, W] and the anchor frame [3, H, W] in [-1, 1].

    `ahead` are frames [3, H, W] in [-1, 1] after the last ones that are known already, by their numbers in the video;
    `memory` is what a family keeps besides.
    """

    next_chunk: int
    conditioning_frames: Tensor
    anchor: Tensor
    ahead: Mapping[int, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def after_first_chunk(cls, frames: Tensor, overlap: int, anchor: int = 0, stop: int | None = None) -> "StreamState":
        """Start from the initializer's frames [F, 3, H, W] in [-1, 1], or the first `stop` of them.

        `anchor` is the number of one of them.
        """
        stop = len(frames) if stop is None else stop
        return cls(1, frames[stop - overlap : stop], frames[anchor])

    def after(self, chunk: Chunk, new: Tensor) -> "tuple[Tensor, StreamState]":
        """Continue with a chunk: (the frames of `new` that the video takes, the state after them).

        Args:
            chunk: of a streaming plan.
            new: the frames [n, 3, H, W] that it adds when it is generated whole.
        """
        taken = new[: chunk.num_new]
        shown = torch.cat([self.conditioning_frames, taken])
        kept = shown[len(shown) - (chunk.new_start - chunk.start) :]
        return taken, StreamState(chunk.index + 1, kept, self.anchor, self.ahead, self.memory)


MAX_GAIN, MAX_OFFSET = 0.1, 0.1


def calibrated(new: Tensor, shown: Tensor, again: Tensor) -> Tensor:
    """Correct the colours of new frames by what became of known ones in the same chunk.

    Per channel a = std(shown) / std(again), b = mean(shown) - a mean(again), and new frames become a new + b. What a
    chunk does to contrast and colour of the frames that it was given, it does to new ones, and the next chunk again.

    Args:
        new: frames [n, 3, H, W] in [-1, 1].
        shown: frames [Fc, 3, H, W] that the chunk was given.
        again: the same frames as the chunk has them.

    Returns:
        Frames in [-1, 1]. a differs from 1 by at most MAX_GAIN, and b from 0 by at most MAX_OFFSET, so that a chunk
        that lost its known frames cannot throw the others off.
    """
    statistics = (torch.std_mean(part.float(), dim=(0, 2, 3), keepdim=True) for part in (shown, again))
    (wide, bright), (wide_again, bright_again) = statistics
    gain = (wide / wide_again.clamp(min=1e-3)).clamp(1 - MAX_GAIN, 1 + MAX_GAIN)
    offset = (bright - gain * bright_again).clamp(-MAX_OFFSET, MAX_OFFSET)
    return (gain * new + offset).clamp(-1, 1)


def chunk_noise(draws: Draws, chunk_size: int, latent_shape: Sequence[int], device: str = "cpu") -> NoiseOfChunk:
    """Return the addressed noise of every chunk: frame f of the video draws the same whichever chunk denoises it.

    Args:
        draws: the run's random source.
        chunk_size: frames denoised at once; a longer chunk has noise for all its frames.
        latent_shape: (C, h, w) of one frame.
        device: where the numbers are wanted; they are drawn on the CPU.
    """

    def noise(chunk: Chunk) -> ChunkNoise:
        frames = range(chunk.start, chunk.start + max(chunk_size, chunk.size))

        def draw(purpose: str, *address: int) -> Tensor:
            drawn = per_frame(draws, purpose, frames, latent_shape, *address)  # [F, C, h, w]
            return send(drawn, device).transpose(0, 1).unsqueeze(0)  # [1, C, F, h, w]

        return ChunkNoise(draw("stream.start"), lambda step: draw("stream.step", step))

    return noise


def hold(vae: torch.nn.Module, chunk: Chunk, size: int, known: Mapping[int, Tensor]) -> Held | None:
    """Return what is held of a chunk of `size` frames: those of the frames known by number that lie in it, if any."""
    inside = [frame for frame in sorted(known) if chunk.start <= frame < chunk.start + size]
    if not inside:
        return None
    latents = encode_frames(vae, torch.stack([known[frame] for frame in inside])).transpose(0, 1)
    return Held(tuple(frame - chunk.start for frame in inside), latents.unsqueeze(0))


def anchor_tokens(models: StreamModels, anchor: Tensor) -> Tensor | None:
    """Turn the anchor [3, H, W] into APM's tokens for both branches [2, tokens, D]; None with APM off.

    The unconditional branch sees a grey image (zeros in [-1, 1]). Source: arXiv 2403.14773 section 4.2.
    """
    if models.apm is None or models.image_encoder is None:
        return None
    pair = torch.stack([torch.zeros_like(anchor), anchor])
    tokens: Tensor = models.apm(embed_image(models.image_encoder, pair))
    return tokens


def predictor(
    models: StreamModels,
    denoiser: Conditioning,
    extractor: Conditioning | None,
    frames: Tensor,
    whole_at: Collection[int] | None = None,
) -> Predict:
    """Return the network conditioned on frames [Fc, 3, H, W]; both branches see the same ones.

    `whole_at` are the timesteps at which its deep layers are computed, None: all (see `reusing`).
    """
    # The pixel stack depends on neither step nor branch: once per chunk.
    embedded = None if models.cam is None else models.cam.embed_frames(frames.unsqueeze(0))  # [1, C, Fc, h, w]

    def run(latents: Tensor, timestep: int, rows: slice, deep: Tensor | None) -> tuple[Tensor, Tensor]:
        # As a tensor: for every new plain number compiled code would be compiled again.
        time = torch.full((1,), timestep, device=latents.device)
        seen = None if extractor is None else extractor.rows(rows)
        return models.step(models.unet, models.cam, latents, time, denoiser.rows(rows), seen, embedded, deep)

    return reusing(run, None if whole_at is None else {}, lambda timestep: timestep not in (whole_at or ()))


def continued(
    new_frames: Callable[[Chunk, Tensor], Tensor], state: StreamState, chunks: Sequence[Chunk]
) -> Iterator[tuple[Tensor, StreamState]]:
    """Yield (new frames [n, 3, H, W], state after them) for each of `chunks`, which continue the state.

    Args:
        new_frames: (chunk, conditioning frames [Fc, 3, H, W]) -> the frames that the whole chunk adds, as a streamer's.
        state: where to go on.
        chunks: of a streaming plan, in order.
    """
    for chunk in chunks:
        new, state = state.after(chunk, new_frames(chunk, state.conditioning_frames))
        yield new, state


class Streamer:
    """Generates chunk after chunk; text and anchor are prepared once.

    `window` is how many frames the networks see at once, None: all those of a chunk.
    """

    def __init__(
        self,
        models: StreamModels,
        text: TextContext,
        anchor: Tensor,
        sampling: Sampling,
        noise: NoiseOfChunk,
        window: int | None = None,
    ) -> None:
        self.models, self.sampling, self.noise, self.window = models, sampling, noise, window
        with torch.inference_mode():
            self.denoiser = models.unet.prepare(text, anchor_tokens(models, anchor))
            self.extractor = None if models.cam is None else models.cam.prepare(text)

    @torch.inference_mode()
    def chunk_latents(
        self,
        chunk: Chunk,
        conditioning_frames: Tensor,
        observe: Observe | None = None,
        ahead: Mapping[int, Tensor] = NOTHING,
    ) -> Tensor:
        """Sample one chunk: conditioning frames [Fc, 3, H, W] in [-1, 1] -> latents [1, C, F, h, w].

        The first Fc frames of the result re-create the conditioning frames (with replacement they are the same), the
        others are new. Frames `ahead` are held in place. A chunk that is longer than the window is two of them, side by
        side: CAM's features are for the frames of the first, and the other window knows the way by what both share.
        """
        schedule, sampling = self.models.schedule, self.sampling
        timesteps = schedule.timesteps(sampling.num_inference_steps).tolist()
        whole_at = timesteps[:: sampling.reuse_interval] if sampling.reuse_interval > 1 else None
        predict = predictor(self.models, self.denoiser, self.extractor, conditioning_frames, whole_at)
        noise = self.noise(replace(chunk, stop=max([chunk.stop, *(frame + 1 for frame in ahead)])))
        frames, shown = noise.initial.shape[2], len(conditioning_frames)
        if self.window is not None and frames > self.window:
            bare = replace(self.models, cam=None)
            far = predictor(bare, self.denoiser, None, conditioning_frames, whole_at)
            predict = side_by_side(predict, far, self.window, shown, timesteps)
        known = dict(enumerate(conditioning_frames, chunk.start)) if sampling.replacement else {}
        held = hold(self.models.vae, chunk, frames, {**known, **ahead})
        return denoise(predict, schedule, noise, sampling, observe, held)

    @torch.inference_mode()
    def new_frames(
        self,
        chunk: Chunk,
        conditioning_frames: Tensor,
        observe: Observe | None = None,
        ahead: Mapping[int, Tensor] = NOTHING,
    ) -> Tensor:
        """Return the frames [n, 3, H, W] in [-1, 1] that the whole chunk adds; to calibrate them all are decoded."""
        overlap = chunk.new_start - chunk.start
        latents = self.chunk_latents(chunk, conditioning_frames, observe, ahead)[0].transpose(0, 1)
        if not self.sampling.calibrate:
            return decode_latents(self.models.vae, latents[overlap:])
        frames = decode_latents(self.models.vae, latents)
        return calibrated(frames[overlap:], conditioning_frames, frames[:overlap])
