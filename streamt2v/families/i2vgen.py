"""I2VGen-XL as the refiner of any family: an image-to-video network whose picture is the first frame of each chunk.

As published with StreamingSVD, but for that picture: there the first frames of all chunks are refined together before
anything else, which takes the whole video and grows with it. Here each is the source's own frame.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamt2v.chunks import Chunk
from streamt2v.families import sdedit
from streamt2v.families.choose import Chosen
from streamt2v.families.diffusers_pipelines import check_parts, dtype_of, load_part, noise_schedule
from streamt2v.families.makers import Enlarged, Refine, Refined
from streamt2v.families.networks import Networks
from streamt2v.models.encoders import embed_image, latent_factor
from streamt2v.stages.refine import Denoiser
from streamt2v.weights.folders import read_index

QUALITY = "High Quality, HQ, detailed."
"""Joins every prompt; alone as published, where no prompt is read."""
AVOIDED = (
    "Distorted, blurry, discontinuous, Ugly, blurry, low resolution, motionless, static, disfigured, "
    "disconnected limbs, Ugly faces, incomplete arms"
)
"""The published negative prompt, where the run has none."""
FPS = 38  # frames per second that it is told, as published: not the rate of the video
CLIP_SKIP = 1  # last layers of the text encoder that are left out, as the model was trained


@dataclass(frozen=True)
class Told:
    """What the network is told of a chunk of F frames; rows (unconditional, conditional) of text and embedding.

    `picture` are the latents of its first frame, then a plane for every other one that says how far into the chunk it
    is [1, C, F, h, w].
    """

    text: Tensor
    embedding: Tensor
    picture: Tensor

    def rows(self, rows: slice) -> "Told":
        """Return some of the branches; both see the picture's latents."""
        text = self.text[rows]
        return Told(text, self.embedding[rows], self.picture.expand(len(text), -1, -1, -1, -1))


def refiner(networks: Networks, chosen: Chosen) -> Refine:
    """Return the refiner made of an I2VGen-XL folder."""
    folder = chosen.folder
    _, index = read_index(folder)
    check_parts(folder, index, "tokenizer", "text_encoder", "image_encoder", "unet", "vae", "scheduler")
    dtype = dtype_of(networks.device.name, index)

    def part(name: str, role: str) -> Any:
        return networks.keep(
            folder / name, f"{folder.name}/{name}", role, lambda: load_part(folder, name, index, dtype)
        )

    def run(given: Enlarged) -> Iterator[Refined]:
        schedule = noise_schedule(folder)

        def load() -> sdedit.Model:
            texts = _texts(networks, part("tokenizer", "refine.tokenizer"), part("text_encoder", "refine.text"))
            vae, unet = part("vae", "refine.vae"), part("unet", "refine.unet")
            pictures = Pictures(given, part("image_encoder", "refine.image"), networks.device.name)

            def told(chunk: Chunk) -> Told:
                return pictures.told(chunk, texts[given.prompt_of(chunk)])

            def step(latents: Tensor, time: Tensor, told: Told, *_: None) -> tuple[Tensor, Tensor]:
                output: Tensor = unet(
                    latents.to(dtype),
                    time,
                    torch.full((len(latents),), FPS, device=latents.device),
                    told.picture.to(dtype),
                    told.embedding.to(dtype),
                    told.text.to(dtype),
                    return_dict=False,
                )[0]
                return output.float(), output

            factor = latent_factor(vae)
            height, width = (-(-side // factor) * factor for side in given.size)
            denoiser = Denoiser(networks.compiled(step), schedule, told, networks.policy.batched_guidance)
            return sdedit.Model(
                vae, denoiser, unet.config.out_channels, (height, width), pictures.look, pictures.left, pictures.state
            )

        return sdedit.refined(networks, given, schedule, load)

    return run


class Pictures:
    """The picture of every chunk in flight, by its frame: latents [C, h, w] and CLIP embedding [P].

    Args:
        given: what is refined; its state tells of pictures seen before.
        encoder: embeds them.
        device: where they are wanted.
    """

    def __init__(self, given: Enlarged, encoder: Any, device: str) -> None:
        self.encoder, self.starts = encoder, {chunk.start for chunk in given.plan}
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        if "pictures" in given.state:
            stored = (given.state[name].to(device) for name in ("pictures", "embeddings"))
            self.seen = dict(zip(given.state["picture_frames"].tolist(), zip(*stored, strict=True), strict=True))

    @torch.inference_mode()
    def look(self, number: int, pixels: Tensor, latents: Tensor) -> None:
        """Keep the frame if a chunk begins with it; CLIP sees the square in its middle."""
        if number not in self.starts:
            return
        side = min(pixels.shape[-2:])
        top, left = ((extent - side) // 2 for extent in pixels.shape[-2:])
        embedding = embed_image(self.encoder, pixels[..., top : top + side, left : left + side])
        self.seen[number] = latents[0], embedding[0].float()

    def told(self, chunk: Chunk, text: Tensor) -> Told:
        """Return what the network is told of a chunk with a text [2, S, D]."""
        latents, embedding = self.seen[chunk.start]
        return Told(text, torch.stack([torch.zeros_like(embedding), embedding])[:, None], placed(latents, chunk.size))

    def left(self, chunk: Chunk) -> None:
        """Forget the picture of a chunk."""
        self.seen.pop(chunk.start, None)

    def state(self) -> dict[str, Tensor]:
        """Return the pictures as named tensors."""
        if not self.seen:
            return {}
        latents, embeddings = (torch.stack(list(part)) for part in zip(*self.seen.values(), strict=True))
        return {"picture_frames": torch.tensor(list(self.seen)), "pictures": latents, "embeddings": embeddings}


def placed(latents: Tensor, num_frames: int) -> Tensor:
    """Return latents [C, h, w] as those of the first frame, then planes of i / (F - 1): [1, C, F, h, w].

    Source: arXiv 2311.04145 in the public conversion of its weights.
    """
    places = torch.arange(num_frames, device=latents.device) / max(1, num_frames - 1)
    planes = places.to(latents).view(1, -1, 1, 1).repeat(len(latents), 1, *latents.shape[1:])
    planes[:, 0] = latents
    return planes.unsqueeze(0)


@torch.inference_mode()
def _texts(networks: Networks, tokenizer: Any, encoder: Any) -> dict[str, Tensor]:
    """Encode every prompt of the run, all at once so that the encoder can go: rows (negative, positive) [2, S, D]."""
    found = {}
    for prompt in dict.fromkeys(networks.prompts):
        wanted = f"{prompt.rstrip('. ')}. {QUALITY}" if prompt.strip() else QUALITY
        found[prompt] = encoded(tokenizer, encoder, [networks.run.negative_prompt or AVOIDED, wanted])
    if not networks.policy.keep_networks:
        networks.drop(encoder)
    return found


def encoded(tokenizer: Any, encoder: Any, texts: Sequence[str]) -> Tensor:
    """Encode texts as the model was trained: the layer before the last, through the last norm [B, S, D]."""
    room = tokenizer.model_max_length
    tokens = tokenizer(list(texts), padding="max_length", max_length=room, truncation=True, return_tensors="pt")
    layers = encoder(input_ids=tokens.input_ids.to(encoder.device), output_hidden_states=True).hidden_states
    # Its place differs between versions of the library.
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    hidden: Tensor = norm(layers[-1 - CLIP_SKIP])
    return hidden
