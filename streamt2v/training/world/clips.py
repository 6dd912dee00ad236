"""Batches of the drawn world, in several sizes: rendered, encoded, kept in rings, given a new caption at every draw."""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamt2v.training.batches import Batch, Ring, Rows
from streamt2v.training.world.captions import compose
from streamt2v.training.world.drawing import render
from streamt2v.training.world.scenes import (
    ATTRIBUTES,
    Scenes,
    framed,
    join_scenes,
    positions,
    sample_scenes,
    subject_mask,
)

CLIP_FRAMES = 16
COND_FRAMES = 8
SIZE, LATENT_SIZE = (72, 128), (9, 16)
SIZES = (SIZE, (96, 96), (128, 72), (72, 160))
"""(H, W) of the clips that pieces are cut from."""
LONGEST = 32  # frames of these
LATEST = 400  # frame index up to which late clips start


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Frames [B, F, 3, H, W] in [-1, 1] to latents [B, 4, F, h, w]; the posterior's mean."""
    images = pixels.to(vae.device).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    latents = torch.cat([vae.encode(piece).latent_dist.mean for piece in images.split(_at_once(vae))])
    return latents.unflatten(0, pixels.shape[:2]).transpose(1, 2).contiguous()


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, 4, F, h, w] to frames [B, F, 3, H, W] in [-1, 1]."""
    images = latents.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    pixels = torch.cat([vae.decode(piece).sample for piece in images.split(_at_once(vae))])
    return pixels.clamp(-1, 1).unflatten(0, (latents.shape[0], latents.shape[2]))


def _at_once(vae: Any) -> int:
    return 16 if vae.device.type == "cpu" else 256


def normal_like(values: Tensor, generator: torch.Generator) -> Tensor:
    """Unit normals of the shape of `values` and on its device, drawn on the generator's."""
    return torch.randn(values.shape, generator=generator).to(values.device)


def _columns(latents: Tensor, scenes: Scenes, start: Tensor) -> Rows:
    return {"latents": latents.half(), "start": start, **vars(scenes)}


def _frames(rows: Rows) -> Tensor:
    """Frame indices [B, F] of clips."""
    return rows["start"][:, None] + torch.arange(rows["latents"].shape[2], device=rows["start"].device)


def scenes_of(rows: Rows) -> Scenes:
    """The scenes that a table holds."""
    return Scenes(**{name: rows[name] for name in Scenes.__dataclass_fields__})


class WorldSource:
    """Images, clips and chunks of the drawn world on a device.

    Args:
        vae: encodes what is rendered; decides the device.
        generator: of every draw, on the CPU.
        folder: keeps the rings between runs; None keeps them in memory only.
        first: share of the usual number of examples made before the first batch; small in tests.
    """

    def __init__(self, vae: Any, generator: torch.Generator, folder: Path | None = None, first: float = 1.0) -> None:
        self.vae, self.generator, self.device = vae, generator, vae.device

        def ring(name: str, make: Any, capacity: int, at_first: int) -> Ring:
            path = None if folder is None else folder / f"{name}.pt"
            return Ring(make, capacity, max(2, int(at_first * first)), generator, path, self.device)

        self._images = ring("images", self._make_images, 60_000, 2048)
        self._early = ring("clips", lambda count: self._make_clips(count, late=0.2), 3000, 128)
        self._late = ring("chunks", lambda count: self._make_clips(count, late=1.0), 3000, 128)
        self._loops = ring("loops", lambda count: self._make_clips(count, late=1.0, loop=True), 3000, 128)
        self._long = {
            size: ring(
                f"long_{size[0]}x{size[1]}", partial(self._make_clips, late=0.3, length=LONGEST, size=size), 1500, 32
            )
            for size in SIZES
        }

    def save(self) -> None:
        """Keep what was rendered for a later run."""
        for ring in (self._images, self._early, self._late, self._loops, *self._long.values()):
            ring.save()

    def _make_images(self, count: int) -> Rows:
        scenes = sample_scenes(count, self.generator).to(self.device)
        start = torch.randint(0, LATEST, (count,), generator=self.generator).to(self.device)
        early = torch.randint(0, CLIP_FRAMES, (count,), generator=self.generator).to(self.device)
        start = torch.where(torch.arange(count, device=self.device) % 2 == 0, start, early)
        return _columns(encode(self.vae, render(scenes, start[:, None])), scenes, start)

    def _make_clips(
        self, count: int, late: float, length: int = CLIP_FRAMES, size: tuple[int, int] = SIZE, loop: bool = False
    ) -> Rows:
        """Clips and their twins, side by side; a share `late` of the pairs starts at a random frame.

        Half of these in which the light passes through the picture are placed so that it leaves or comes back in them:
        that is what streams lose first.
        """
        count = max(1, count // 2)
        one = sample_scenes(count, self.generator)
        one = one.looping(length) if loop else one
        order = torch.arange(2 * count).view(2, count).T.flatten()
        scenes = join_scenes([one, one.twins()]).take(order).to(self.device)
        start = torch.randint(0, LATEST, (count,), generator=self.generator)
        passing = (positions(one, torch.arange(LATEST)).diff(dim=1).abs() > 0.5).any(-1)  # where it jumps
        passing &= torch.rand(count, 1, generator=self.generator) < 0.5
        for row in passing.any(1).nonzero()[:, 0].tolist():
            jump = int(passing[row].float().multinomial(1, generator=self.generator))
            start[row] = (jump - start[row] % length).clamp(min=0)
        start[torch.rand(count, generator=self.generator) >= late] = 0
        start = start.repeat_interleave(2).to(self.device)
        frames = start[:, None] + torch.arange(length, device=self.device)
        parts = torch.arange(2 * count, device=self.device).split(2 if self.device.type == "cpu" else 64)
        latents = [encode(self.vae, self._drawn(scenes.take(part), frames[part], size)) for part in parts]
        return _columns(torch.cat(latents), scenes, start)

    def _drawn(self, scenes: Scenes, frames: Tensor, size: tuple[int, int]) -> Tensor:
        return render(scenes, frames, *size, framed(*size))

    def _batch(self, rows: Rows, captions: list[str], frames: Tensor | None = None) -> Batch:
        latents = rows["latents"].float()
        size = (latents.shape[3], latents.shape[4])
        frames = _frames(rows) if frames is None else frames
        return Batch(latents, captions, subject_mask(scenes_of(rows), frames, *size, framed(*size)))

    def _captions(self, rows: Rows) -> list[str]:
        return [compose(labels, self.generator) for labels in scenes_of(rows).labels().tolist()]

    def images(self, count: int) -> Batch:
        """Single frames of scenes that mostly differ."""
        rows = self._images.draw(count, fresh=count / 8)
        return self._batch(rows, self._captions(rows))

    def clips(self, count: int, pairs: int = 0) -> Batch:
        """Clips that mostly start at frame 0; pairs of twins have one wording but for the motion."""
        rows = self._early.draw(count, fresh=count / 16)
        captions = self._captions(rows)
        ring = self._early.rows
        differing = (ring["motion"][::2] != ring["motion"][1::2]).nonzero()[:, 0]
        if not pairs or not len(differing):
            return self._batch(rows, captions)
        choice = torch.randint(len(differing), (pairs,), generator=self.generator).to(self.device)
        first = 2 * differing[choice]
        index = torch.stack([first, first + 1], 1).flatten()
        for name, column in rows.items():
            column[: 2 * pairs] = ring[name][index]
        captions[: 2 * pairs] = list(self._paired_captions(scenes_of(rows), pairs))
        places = torch.arange(2 * pairs, device=self.device).view(pairs, 2)
        return replace(self._batch(rows, captions), pairs=places)

    def _paired_captions(self, scenes: Scenes, pairs: int) -> Iterator[str]:
        for row, labels in enumerate(scenes.labels()[: 2 * pairs].tolist()):
            if row % 2 == 0:
                state = self.generator.get_state()
                yield compose(labels, self.generator)
            else:
                same_wording = torch.Generator()
                same_wording.set_state(state)
                yield compose(labels, same_wording)

    def chunks(self, count: int) -> Batch:
        """Clips that start anywhere, with the frames that CAM and APM see."""
        rows = self._late.draw(count, fresh=count / 16)
        frames, slow = self._slowed(_frames(rows))
        batch = self._batch(rows, self._captions(rows), frames)
        if slow.any():
            known = encode(self.vae, render(scenes_of(rows).take(slow), frames[slow, :COND_FRAMES]))
            batch.latents[slow, :, :COND_FRAMES] = known.to(batch.latents)
        shown, latents = self._conditioning(rows, batch.latents, frames)
        back = torch.randint(0, 200, (count, 1), generator=self.generator).to(self.device)
        anchors = render(scenes_of(rows), rows["start"][:, None] - back)[:, 0]
        return replace(batch, latents=latents, shown=shown, anchors=anchors)

    def pieces(self, count: int, size: tuple[int, int], length: int, continued: bool) -> Batch:
        """Pieces of clips of one of SIZES, up to LONGEST frames.

        They begin with their clip, or anywhere in it where they are `continued`; these have a frame of their past, up
        to 200 frames back, as anchor.
        """
        rows = self._long[size].draw(count, fresh=count * length / LONGEST / 8)
        begin = int(torch.randint(LONGEST - length + 1, (), generator=self.generator)) if continued else 0
        rows |= {"latents": rows["latents"][:, :, begin : begin + length], "start": rows["start"] + begin}
        batch = self._batch(rows, self._captions(rows))
        if not continued:
            return batch
        back = torch.randint(0, 200, (count, 1), generator=self.generator).to(self.device)
        return replace(batch, anchors=self._drawn(scenes_of(rows), rows["start"][:, None] - back, size)[:, 0])

    def pictured(self, count: int) -> Batch:
        """Clips as from `clips`, with all of their frames as pixels."""
        rows = self._early.draw(count, fresh=count / 16)
        return replace(self._batch(rows, self._captions(rows)), shown=render(scenes_of(rows), _frames(rows)))

    def first_frames(self, count: int, loop: bool = False) -> Batch:
        """Clips that start anywhere, with their first frame as anchor: a picture to start from.

        The last frame of a `loop` leads back to the first: the world repeats exactly after that many frames.
        """
        rows = (self._loops if loop else self._late).draw(count, fresh=count / 16)
        batch = self._batch(rows, self._captions(rows))
        return replace(batch, anchors=render(scenes_of(rows), rows["start"][:, None])[:, 0])

    def _slowed(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """In one clip of four the known frames stand still, or move more slowly than they should, up to the last one.

        A stream that has slowed down, as it does where a light leaves the picture, must find back to the motion that
        the text names: who only ever saw true motion keeps what is there.

        Returns:
            Frame indices [B, F] with fractions, rows [B] that are slow.
        """
        chance, rate = torch.rand(2, len(frames), 1, generator=self.generator).to(self.device)
        rate = torch.where(chance < 1 / 4, (2 * rate - 1).clamp(min=0), 1.0)
        ago = torch.arange(frames.shape[1], device=self.device) - (COND_FRAMES - 1)
        return frames[:, COND_FRAMES - 1 :][:, :1] + torch.where(ago < 0, rate * ago, ago), rate[:, 0] < 1

    def _conditioning(self, rows: Rows, latents: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The first frames of clips as CAM will meet them, and the latents to learn after them.

        While streaming, CAM sees what the model itself made. So some are rendered, some decoded from disturbed latents,
        and all carry a little noise: otherwise small errors are copied and grow from chunk to chunk. Half of the
        rendered batches have a false tint, and some show false subjects: true colours and shapes must then come from
        the anchor or the text, which do not drift. Tints and disturbances leave the target gradually (`fading`): were
        they gone at the first new frame, the network would learn to jump at every seam.

        Returns:
            Pixels [B, COND_FRAMES, 3, H, W] in [-1, 1], latents of the whole chunk [B, C, F, h, w].
        """
        generator, scenes = self.generator, scenes_of(rows)

        def chance(p: float) -> bool:
            return bool(torch.rand((), generator=generator) < p)

        share = fading(COND_FRAMES, latents.shape[2]).to(latents)
        if chance(0.35):
            steady, restless = (0.35 * torch.rand(2, generator=generator)).tolist()
            latents = latents + share[:, None, None] * steady * normal_like(latents[:, :, :1], generator)
            seen = latents[:, :, :COND_FRAMES]
            pixels = decode(self.vae, seen + restless * normal_like(seen, generator))
        else:
            tinted = chance(0.5)
            at = frames if tinted else frames[:, :COND_FRAMES]
            true = shown = render(scenes, at)
            if chance(0.15):
                subjects = torch.randint(len(ATTRIBUTES["subject"]), (len(scenes),), generator=generator)
                shown = render(replace(scenes, subject=subjects.to(self.device)), at)
            if tinted:
                gain, shift = torch.rand(2, len(scenes), 1, 3, 1, 1, generator=generator).to(true).mul(2).sub(1)
                much = share[:, None, None, None]
                true, shown = (
                    (pixels * (1 + 0.35 * gain * much) + 0.25 * shift * much).clamp(-1, 1) for pixels in (true, shown)
                )
                latents = encode(self.vae, true)
            pixels = shown[:, :COND_FRAMES]
            if chance(0.5):  # as soft as the VAE leaves it
                small = functional.avg_pool2d(pixels.flatten(0, 1), 2)
                pixels = functional.interpolate(small, scale_factor=2, mode="bilinear").view_as(pixels)
        strength = 0.08 * float(torch.rand((), generator=generator))
        return pixels + strength * normal_like(pixels, generator), latents


def fading(frames: int, length: int, rate: float = 0.75) -> Tensor:
    """How much of an error of the conditioning frames each frame of a chunk still carries, [length] in (0, 1].

    All of it for as long as they last, `rate` times as much with every new frame.
    """
    return rate ** (torch.arange(length) - frames + 1).clamp(min=0)
