"""Text, image and VAE encoders, ours or a library's, behind a few small functions; the VAE works frame by frame.

Shapes: B batch, F frames, C latent channels, S tokens, D features; H, W pixels, h, w latent cells.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamt2v.chunks import Chunk, middles
from streamt2v.errors import ConfigError, NumericsError
from streamt2v.media.frames import is_black, is_finite, is_picture, to_u8
from streamt2v.models.unet3d import TextContext

log = logging.getLogger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def encode_text(tokenizer: Any, text_encoder: Any, texts: Sequence[str]) -> TextContext:
    """Encode texts: the last hidden state after the final norm [B, S, D], and the pooled vector if there is one.

    Texts are cut or padded to the encoder's length; padding is attended to, as in the published models.
    """
    length = text_encoder.config.max_position_embeddings
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    encoded = text_encoder(input_ids=tokens.input_ids.to(text_encoder.device))
    return TextContext(encoded.last_hidden_state, getattr(encoded, "text_embeds", None))


def embed_image(image_encoder: Any, frames: Tensor) -> Tensor:
    """Embed frames [B, 3, H, W] in [-1, 1] by CLIP: [B, P], not normalised.

    Source: StreamingT2V's anchor frame: bicubic resize with aligned corners, ignoring the aspect ratio.
    """
    pixels = clip_pixels(frames, image_encoder.config.image_size)
    return image_encoder(pixel_values=pixels.to(image_encoder.dtype)).image_embeds


def clip_pixels(frames: Tensor, size: int) -> Tensor:
    """Resize frames [B, 3, H, W] in [-1, 1] to CLIP's input [B, 3, size, size], with CLIP's mean and deviation."""
    x = frames.float()
    shrink = [extent / size for extent in frames.shape[-2:]]
    if max(shrink) > 1:
        x = _blur(x, [max((factor - 1) / 2, 0.001) for factor in shrink])
    x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=True)
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((x + 1) / 2 - mean) / std


def _blur(x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Smooth rows and columns by Gaussians (reflected at the border) against aliasing; nothing at 256 -> 224 pixels."""
    for axis, sigma in zip((2, 3), sigmas, strict=True):
        taps = int(max(4 * sigma, 3)) | 1
        offsets = torch.arange(taps, device=x.device, dtype=x.dtype) - taps // 2
        kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)
        shape = [1, 1, 1, 1]
        shape[axis] = taps
        padding = (0, 0, taps // 2, taps // 2) if axis == 2 else (taps // 2, taps // 2, 0, 0)
        x = F.conv2d(F.pad(x, padding, mode="reflect"), kernel.view(shape).expand(3, -1, -1, -1), groups=3)
    return x


def latent_factor(vae: Any) -> int:
    """Return how many pixels a side of one latent cell covers."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def latent_size(vae: Any, height: int, width: int) -> tuple[int, int]:
    """Return the latent size (h, w) of frames of height x width pixels.

    Raises:
        ConfigError: a side is not a multiple of the VAE's factor.
    """
    factor = latent_factor(vae)
    if height % factor or width % factor:
        raise ConfigError(f"frames of {width}x{height} pixels: both sides must be multiples of {factor}")
    return height // factor, width // factor


def encode_frames(vae: Any, frames: Tensor, noise: Tensor | None = None) -> Tensor:
    """Encode frames [F, 3, H, W] in [-1, 1] one by one to scaled latents [F, C, h, w], float32 unless the VAE says so.

    Args:
        vae: a library autoencoder with a `scaling_factor` in its config.
        frames: pixels.
        noise: unit normals [F, C, h, w] to draw from the posterior; None takes its mean.

    Raises:
        NumericsError: NaN or Inf, in 32 bit too.
    """

    def encode() -> Tensor:
        latents = []
        for index, frame in enumerate(frames.to(vae.dtype).split(1)):
            posterior = vae.encode(frame).latent_dist
            latent = posterior.mean
            if noise is not None:
                latent = latent + posterior.std * noise[index : index + 1].to(latent)
            latents.append((latent.float() * vae.config.scaling_factor).to(getattr(vae, "latent_dtype", torch.float32)))
        return torch.cat(latents)

    return _checked(vae, frames, encode)


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Decode scaled latents [F, C, h, w] one by one to frames [F, 3, H, W], float32 clamped to [-1, 1].

    Raises:
        NumericsError: NaN or Inf in the latents or, in 32 bit too, in the frames.
    """
    return _decoded(vae, latents, lambda scaled: (vae.decode(latent).sample for latent in scaled.split(1)))


def decode_clip(vae: Any, latents: Tensor, groups: Sequence[Chunk], first: int = 0) -> Tensor:
    """Decode scaled latents [F, C, h, w] in groups by a temporal decoder: frames `first`.. [F - first, 3, H, W].

    A frame looks different next to other frames, and alone it has none: overlapping groups give every frame its
    neighbours, and each frame is taken from the group in which it lies further from the end.

    Args:
        vae: a library autoencoder with a temporal decoder.
        latents: of one clip.
        groups: which frames are decoded at once, a plan over F frames.
        first: frames before it are not wanted; groups with no others are left out.

    Raises:
        NumericsError: as `decode_latents`.
    """
    kept = [(group, range(max(own.start, first), own.stop)) for group, own in zip(groups, middles(groups), strict=True)]

    def decode(scaled: Tensor) -> Iterator[Tensor]:
        for group, own in kept:
            if own:
                clip = vae.decode(scaled[group.start : group.stop], num_frames=group.size).sample
                yield clip[own.start - group.start : own.stop - group.start]

    return _decoded(vae, latents, decode)


def _decoded(vae: Any, latents: Tensor, decode: Callable[[Tensor], Iterable[Tensor]]) -> Tensor:
    def run() -> Tensor:
        scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
        return torch.cat([frames.float() for frames in decode(scaled)])

    # Checked before clamping, which would turn Inf into white.
    return _checked(vae, latents, run, lambda frames: is_black(to_u8(frames))).clamp_(-1, 1)


def _checked(
    vae: Any, given: Tensor, compute: Callable[[], Tensor], is_bad: Callable[[Tensor], bool] = lambda result: False
) -> Tensor:
    """Run the VAE; where that overflows or shows nothing in 16 bit, run it in 32, and let `is_bad` judge that too.

    Only the input decides what is run again, so a resumed run does the same.
    """
    result = compute()
    # From a lossless codec a picture of one colour is no failure.
    if is_finite(result) if getattr(vae, "lossless", False) else is_picture(result):
        return result
    if not is_finite(given):  # checked only now: non-finite input never becomes a picture
        raise NumericsError("a network produced NaN or Inf")
    narrow = vae.dtype
    if narrow.itemsize == 2:
        log.warning("the VAE fails in 16 bit; these frames are computed in 32")
        vae.float()
        try:
            result = compute()
        finally:
            torch.nn.Module.to(vae, narrow)  # the library's own would warn about the cast just undone
        if is_picture(result) and not is_bad(result):
            return result
    raise NumericsError("the VAE produced NaN, Inf, a single value or nothing but black")
