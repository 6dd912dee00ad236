"""Clips for the denoisers: rendered, encoded once and kept in a folder of shards."""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast

from streamt2v import files
from streamt2v.models.encoders import encode_text
from streamt2v.models.unet3d import TextContext
from streamt2v.training.captions import compose
from streamt2v.training.world import Scenes, render, sample_scenes, subject_mask

CLIP_FRAMES = 16
LATENT_SIZE = (9, 16)


@dataclass(frozen=True)
class Clips:
    """Encoded clips. Pairs stand side by side: row 2i + 1 is row 2i in a mirror."""

    latents: Tensor  # [B, 4, F, h, w]
    scenes: Scenes
    start: Tensor  # [B] first frame index

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, rows: Tensor) -> Clips:
        """Select clips by index; latents become float32."""
        return Clips(self.latents[rows].float(), self.scenes.take(rows), self.start[rows])

    def frames(self) -> Tensor:
        """Frame indices [B, F]."""
        return self.start[:, None] + torch.arange(self.latents.shape[2], device=self.start.device)

    def to(self, device: str) -> Clips:
        """Move everything to a device."""
        return Clips(self.latents.to(device), self.scenes.to(device), self.start.to(device))

    def mask(self) -> Tensor:
        """Subject masks [B, F, h, w]."""
        return subject_mask(self.scenes, self.frames(), *LATENT_SIZE)


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Frames [B, F, 3, H, W] in [-1, 1] to latents [B, 4, F, h, w]; the posterior's mean."""
    images = pixels.flatten(0, 1).to(vae.device).contiguous(memory_format=torch.channels_last)
    latents = torch.cat([vae.encode(piece).latent_dist.mean for piece in images.split(16)]).to(pixels.device)
    return latents.unflatten(0, pixels.shape[:2]).transpose(1, 2).contiguous()


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, 4, F, h, w] to frames [B, F, 3, H, W] in [-1, 1]."""
    images = latents.transpose(1, 2).flatten(0, 1).to(vae.device).contiguous(memory_format=torch.channels_last)
    pixels = torch.cat([vae.decode(piece).sample for piece in images.split(16)]).to(latents.device)
    return pixels.clamp(-1, 1).unflatten(0, (latents.shape[0], latents.shape[2]))


def make_clips(vae: Any, pairs: int, generator: torch.Generator, late: float) -> Clips:
    """Render and encode `pairs` clips and their mirror images; a share `late` of the pairs starts at a random frame."""
    one = sample_scenes(pairs, generator)
    other = one.mirrored()
    scenes = Scenes(**{k: torch.stack([v, getattr(other, k)], 1).flatten() for k, v in vars(one).items()})
    start = torch.randint(0, 400, (pairs,), generator=generator)
    start[torch.rand(pairs, generator=generator) >= late] = 0
    start = start.repeat_interleave(2)
    frames = start[:, None] + torch.arange(CLIP_FRAMES)
    latents = torch.cat([
        encode(vae, render(scenes.take(slice(i, i + 2)), frames[i : i + 2])) for i in range(0, 2 * pairs, 2)
    ])  # fmt: skip
    return Clips(latents.half(), scenes, start)


def make_windows(vae: Any, count: int, frames: int, size: tuple[int, int], generator: torch.Generator) -> Clips:
    """Windows for the refiner: latents [count, 8, F, h, w], channels 0-3 sharp, 4-7 as the base model would deliver it.

    The poor version is rendered at half the size, encoded, disturbed a little, decoded and enlarged. Half of the
    windows show the whole canvas, the others a part, as crops of larger pictures would.
    """
    height, width = size
    scenes = sample_scenes(count, generator)
    start = torch.randint(0, 400, (count,), generator=generator)
    latents = []
    for row in range(count):
        zoom = 1.0 if row % 2 == 0 else float(torch.rand((), generator=generator)) * 0.5 + 0.2
        left, top = (float(torch.rand((), generator=generator)) * (1 - zoom) for _ in range(2))
        view = (left, top, left + zoom, top + zoom)
        scene, times = scenes.take(slice(row, row + 1)), start[row : row + 1, None] + torch.arange(frames)
        sharp = encode(vae, render(scene, times, height, width, view))
        small = encode(vae, render(scene, times, height // 2, width // 2, view))
        strength = 0.3 * float(torch.rand((), generator=generator))
        small = decode(vae, small + strength * normal_like(small, generator))[0]
        large = functional.interpolate(small, size, mode="bicubic", antialias=True).clamp(-1, 1)
        latents.append(torch.cat([sharp, encode(vae, large[None])], dim=1))
    return Clips(torch.cat(latents).half(), scenes, start)


def write_shard(path: Path, clips: Clips) -> None:
    """Save clips, whole or not at all."""
    with files.replacing(path) as part:
        torch.save({"latents": clips.latents, "scenes": vars(clips.scenes), "start": clips.start}, part)


def read_shards(folder: Path) -> Iterator[Clips]:
    """Load the shards of a folder."""
    for path in sorted(folder.glob("*.pt")):
        data = torch.load(path, weights_only=True)
        yield Clips(data["latents"], Scenes(**data["scenes"]), data["start"])


class ClipSource:
    """Random clips from a folder of shards, which grows while training draws from it.

    Args:
        folder: where shards are kept.
        generator: decides which clips are drawn.
        device: where drawn clips are wanted.
        make: renders and encodes one more shard.
        enough: number of clips at which no more are made. The first draw makes a fortieth of them.
    """

    def __init__(
        self, folder: Path, generator: torch.Generator, device: str, make: Callable[[], Clips], enough: int
    ) -> None:
        files.make_directory(folder)
        self.folder, self.generator, self.device = folder, generator, device
        self.make, self.enough = make, enough
        self.shards = list(read_shards(folder))
        self.draws = 0

    def refill(self) -> None:
        """Make shards until there are some, then one now and then while there are not enough clips."""
        while True:
            count = sum(map(len, self.shards))
            if count >= self.enough or (count >= self.enough // 40 and self.draws % 5 != 4):
                break
            self.shards.append(self.make())
            name = f"{self.generator.initial_seed():06d}_{len(self.shards):05d}.pt"
            write_shard(self.folder / name, self.shards[-1])
            if count >= self.enough // 40:
                break

    def draw(self, count: int, pairs: int = 0) -> tuple[Clips, Tensor]:
        """Draw `count` clips, of which the first 2 * pairs are mirrored pairs of drifting subjects.

        Returns:
            Clips, and the row numbers [pairs, 2] of the pairs; there are none while no clip shows a drifting subject.
        """
        self.refill()
        self.draws += 1
        picked = []
        drifting = [shard for shard in self.shards if (shard.scenes.motion < 2).any()] if pairs else []
        pairs = pairs if drifting else 0
        for index in range(count - pairs):
            paired = index < pairs
            shards = drifting if paired else self.shards
            shard = shards[int(torch.randint(len(shards), (), generator=self.generator))]
            choice = (shard.scenes.motion[::2] < 2).nonzero()[:, 0] * 2 if paired else torch.arange(len(shard))
            row = choice[torch.randint(len(choice), (), generator=self.generator)]
            picked.append(shard.take(torch.stack([row, row + 1]) if paired else row[None]))
        return join(picked).to(self.device), torch.arange(2 * pairs, device=self.device).view(pairs, 2)


def normal_like(values: Tensor, generator: torch.Generator) -> Tensor:
    """Unit normals of the shape of `values` and on its device, drawn on the generator's."""
    return torch.randn(values.shape, generator=generator).to(values.device)


def join(parts: list[Clips]) -> Clips:
    """Concatenate clips."""
    scenes = Scenes(**{k: torch.cat([vars(p.scenes)[k] for p in parts]) for k in vars(parts[0].scenes)})
    return Clips(torch.cat([p.latents for p in parts]), scenes, torch.cat([p.start for p in parts]))


class TextSource:
    """Captions to text contexts through the frozen text encoder."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: CLIPTextModelWithProjection) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.eval()

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextContext:
        """Encode captions: tokens [B, S, D], pooled [B, P]."""
        return encode_text(self.tokenizer, self.encoder, captions)

    def captions(self, scenes: Scenes, generator: torch.Generator, drop: float, pairs: int = 0) -> list[str]:
        """Captions of scenes, empty with probability `drop`; those of a pair differ only in the direction's word."""
        labels = scenes.labels().tolist()
        captions = []
        for row, label in enumerate(labels):
            state = generator.get_state()
            dropped = bool(torch.rand((), generator=generator) < drop)
            text = compose(label, generator)
            if row < 2 * pairs and row % 2 == 0:
                first = state
            elif row < 2 * pairs:
                replay = torch.Generator()
                replay.set_state(first)
                dropped = bool(torch.rand((), generator=replay) < drop)
                text = compose(label, replay)
            captions.append("" if dropped else text)
        return captions
