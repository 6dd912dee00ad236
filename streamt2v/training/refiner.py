"""The demo's refiner: from what the codec leaves of a small picture to a true rendering of the drawn world at 1280x720.

The network is that of footage, with larger cells: one of them shows less than a pixel of the source. It learns on
patches, as the drawn world can be rendered at any place and size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.media.frames import resize
from streamt2v.models.restorer import Restorer, RestorerConfig
from streamt2v.training import bundle
from streamt2v.training.batches import Ring, Rows
from streamt2v.training.critic import Critic
from streamt2v.training.engine import Job
from streamt2v.training.restorer import (
    DECIBELS,
    PATCH_FRAMES,
    SCHEDULE,
    Patches,
    log_error,
    restored,
    restoring_loss,
    save,
)
from streamt2v.training.sheets import sharpness, write_sheet
from streamt2v.training.world.clips import LATEST, SIZE, decode, encode, normal_like, scenes_of
from streamt2v.training.world.drawing import render
from streamt2v.training.world.scenes import ASPECT, Scenes, positions, sample_scenes
from streamt2v.training.world.vae import build_vae

if TYPE_CHECKING:
    from streamt2v.training.parts import Workshop

REFINER = RestorerConfig(out_channels=192, blocks=8)
SCALES = (10, 10, 10, 2, 4, 5, 6, 8, 12, 15)
"""How many times small pictures are enlarged; 10 makes 1280x720."""
PATCH = 256
"""Side of a patch, a multiple of that of a cell: with less around them, lights could not be known by their form."""
AROUND = 3
"""Pixels of the small picture around a patch that enlarging it looks at."""


class DrawnPatches:
    """Patches of small pictures as the codec leaves them, enlarged, and of true renderings of the same size.

    Latents are a little wrong as those of a stream are: of two clips in three in a way that stays, of two in three in
    one that changes from frame to frame.
    """

    def __init__(self, vae: Any, generator: torch.Generator, folder: Path | None = None, first: int = 256) -> None:
        self.vae, self.generator = vae, generator
        path = None if folder is None else folder / "small.pt"
        self.clips = Ring(self._make, 4000, first, generator, path, vae.device)

    def _make(self, count: int) -> Rows:
        scenes = sample_scenes(count, self.generator).to(self.vae.device)
        start = torch.randint(LATEST, (count,), generator=self.generator).to(self.vae.device)
        latents = encode(self.vae, render(scenes, frames_from(start)))
        steady, restless = (
            most * (torch.rand(count, 1, 1, 1, 1, generator=self.generator) * 1.5 - 0.5).clamp(min=0).to(latents)
            for most in (0.3, 0.15)
        )
        latents = latents + steady * normal_like(latents[:, :, :1], self.generator)
        shown = decode(self.vae, latents + restless * normal_like(latents, self.generator))
        return {"small": ((shown + 1) * 127.5).round().byte(), "start": start, **vars(scenes)}

    def draw(self, count: int) -> Patches:
        """Draw patches of various scales, half of them where the light is."""
        scale = SCALES[int(torch.randint(len(SCALES), (), generator=self.generator))]
        return self.patches(self.clips.draw(count, fresh=count / 8), scale)

    def patches(self, rows: Rows, scale: int) -> Patches:
        """Return a patch of every clip, `scale` times as large as in the small picture."""
        each = range(len(rows["start"]))
        pairs = [self._pair({name: column[at : at + 1] for name, column in rows.items()}, scale) for at in each]
        truth, source = (torch.cat(parts).transpose(1, 2) for parts in zip(*pairs, strict=True))
        return Patches(truth, source, torch.full((len(truth),), float(scale), device=truth.device))

    def _pair(self, row: Rows, scale: int) -> tuple[Tensor, Tensor]:
        """Return truth and source [1, F, 3, H, W] of a clip at some place."""
        scenes, start = scenes_of(row), row["start"]
        size = min(PATCH, scale * SIZE[0]), min(PATCH, scale * SIZE[1])
        side = torch.tensor([-(-extent // scale) for extent in size])
        room = torch.tensor(SIZE) - side
        corner = torch.rand(2, generator=self.generator) * (room + 1)
        if torch.rand((), generator=self.generator) < 0.5:
            x, y = positions(scenes, start[:, None])[0, 0].tolist()
            light = torch.tensor([y * SIZE[0], x / ASPECT * SIZE[1]])
            corner = light - side * torch.rand(2, generator=self.generator)
        top, left = corner.long().clamp(torch.zeros_like(room), room).tolist()
        truth = true_part(scenes, start, scale, top, left, size)
        return truth, enlarged_part(row["small"][0].float() / 127.5 - 1, scale, top, left, size)[None]


def frames_from(start: Tensor) -> Tensor:
    """The frames [B, F] of a patch that begins at `start` [B]."""
    return start[:, None] + torch.arange(PATCH_FRAMES, device=start.device)


def true_part(scenes: Scenes, start: Tensor, scale: int, top: int, left: int, size: tuple[int, int]) -> Tensor:
    """Render a part [B, F, 3, H, W] of pictures `scale` times as large as small ones.

    Args:
        scenes: B scenes.
        start: their first frames [B].
        scale: an integer.
        top: upper edge of the part, in pixels of the small picture.
        left: left edge, likewise.
        size: (H, W) of the part.
    """
    (height, width), (rows, columns) = size, SIZE
    window = (left / columns, top / rows, (left + width / scale) / columns, (top + height / scale) / rows)
    return render(scenes, frames_from(start), height, width, window)


def enlarged_part(small: Tensor, scale: int, top: int, left: int, size: tuple[int, int]) -> Tensor:
    """Return the same part [F, 3, H, W] of small pictures [F, 3, h, w] as it is when the whole of them is enlarged."""
    edges = []
    for first, length, whole in zip((top, left), size, small.shape[-2:], strict=True):
        edges.append((max(0, first - AROUND), min(whole, first - -length // scale + 1 + AROUND)))
    (y, below), (x, right) = edges
    wide = resize(small[..., y:below, x:right], (scale * (below - y), scale * (right - x)))
    y, x = scale * (top - y), scale * (left - x)
    return wide[..., y : y + size[0], x : x + size[1]]


def in_threes(clips: Tensor) -> Tensor:
    """Lay every three frames that follow each other into one picture: [B, 3, F, H, W] to [B (F - 2), 9, H, W].

    So a critic sees flicker, too.
    """
    frames = clips.transpose(1, 2)
    return torch.cat([frames[:, at : clips.shape[2] - 2 + at] for at in range(3)], 2).flatten(0, 1)


def judged(clips: Tensor, generator: torch.Generator) -> tuple[Any, ...]:
    """Draw what the critic, which takes longer than the refiner, sees of clips [..., H, W]: at most half of a patch."""
    side = PATCH // 2
    rooms = (max(extent - side, 0) + 1 for extent in clips.shape[-2:])
    return ..., *(slice(begin := int(torch.randint(room, (), generator=generator)), begin + side) for room in rooms)


class Examples:
    """Pairs that training does not see, half of them around lights, and what the refiner makes of them."""

    def __init__(self, vae: Any, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(77)
        source = DrawnPatches(vae, generator, first=count)
        self.patches = source.patches(source.clips.draw(count, 0.0), 10)

    @torch.no_grad()
    def report(self, network: Restorer, schedule: NoiseSchedule, path: Path) -> str:
        """Write sources, refined patches and true ones, a row each; return decibels won and how sharp."""
        truth, source = self.patches.truth, self.patches.source
        made = restored(network, self.patches, schedule)
        write_sheet(path, torch.stack([clips[:, :, 2] for clips in (source, made, truth)]))
        gain = DECIBELS * float((log_error(source - truth) - log_error(made - truth)).mean())
        return f"{gain:+.2f} dB, sharpness {sharpness(made, truth):.2f}, before {sharpness(source, truth):.2f}"


def refiner_job(shop: Workshop) -> Job:
    """The demo's refiner, on what the codec leaves of small pictures."""
    network = shop.resumed("refiner", Restorer(REFINER))
    vae = shop.frozen("vae", build_vae())
    source = DrawnPatches(vae, shop.generator, shop.out / "state" / "rings", max(2, int(256 * shop.first)))
    examples, schedule = Examples(vae, max(2, int(8 * shop.first))), NoiseSchedule(SCHEDULE)
    batch, critic = shop.many(3), Critic(9).to(shop.device)

    def loss(progress: float) -> Tensor:
        with torch.autocast(torch.device(shop.device).type, enabled=False):  # pictures are made in full precision
            patches = source.draw(batch)
        error, made = restoring_loss(network, patches, schedule, shop.generator)
        part = judged(made, shop.generator)
        pair = in_threes(made.float()[part]), in_threes(patches.truth[part])
        return critic.loss(error, *pair, network.conv_out.weight)

    return Job(
        loss,
        [*network.parameters(), *critic.parameters()],
        lambda folder: save(folder, network),
        lambda folder: examples.report(network, schedule, folder / "refiner.png"),
        adam=[*bundle.parameters_in(network, "conv_out", "embed"), *critic.parameters()],
        learning_rate=1e-3,
        average=0.999,
        samples=batch,
        device=shop.device,
        half=True,
        keep=source.clips.save,
    )
