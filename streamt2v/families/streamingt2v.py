"""Stage 1, the initializer: a prompt, or a picture and a prompt, to the first chunk of frames.

One function per kind of base model: the family's own two, ModelScope's network in our own loop, and any pipeline of
diffusers, which is called with what its signature knows.
"""

import torch
from torch import Tensor

from streamt2v.chunks import Chunk
from streamt2v.models.encoders import decode_latents, embed_image, encode_frames
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
