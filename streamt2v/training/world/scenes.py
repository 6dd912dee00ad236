"""Scenes of the drawn world: a light of one colour that moves endlessly over a quiet land.

A scene is a handful of numbers and every position a formula of the frame index. So loss masks and motion labels are
free, any frame can be rendered alone, and a clip has no end; with a period it repeats exactly.

Canvas coordinates: y in [0, 1] from the top down, x in [0, 16/9]; sizes and speeds are in canvas heights.
Shapes: B scenes, F frames.
"""

# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

ASPECT = 16 / 9
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "green", "blue", "yellow", "purple", "white"),
    "subject": ("ball", "star", "lantern", "moon"),
    "motion": ("drifting left", "drifting right", "floating", "rising", "circling"),
    "place": ("sea", "hills", "desert", "city"),
    "time": ("day", "sunset", "night"),
    "weather": ("clear", "clouds", "mist", "snow"),
}
LEFT, RIGHT, FLOATING, RISING, CIRCLING = range(5)
MIRRORED_MOTION = (RIGHT, LEFT, FLOATING, RISING, CIRCLING)  # the motion that a left-right mirrored clip shows
IN_PLACE = {FLOATING: CIRCLING, CIRCLING: FLOATING}  # motions around one place; to the eye they are near each other
Window = tuple[float, float, float, float]
"""Part of the canvas: (left, top, right, bottom) as fractions of it."""
WHOLE: Window = (0.0, 0.0, 1.0, 1.0)
MIDDLE_FRAME = 8  # where drifting and rising subjects pass their rest position


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; every field is a tensor [B]. Attribute fields are indices into `ATTRIBUTES`."""

    colour: Tensor
    subject: Tensor
    motion: Tensor
    place: Tensor
    time: Tensor
    weather: Tensor
    radius: Tensor  # of the subject, canvas heights
    x: Tensor  # rest position
    y: Tensor
    speed: Tensor  # canvas heights a frame (drifting, rising), or cycles a frame (floating, circling)
    phase: Tensor  # of the motion, cycles
    mirror: Tensor  # 1 = the whole picture is mirrored left to right
    horizon: Tensor
    light_x: Tensor  # where the sun stands
    relief: Tensor  # phase of waves, clouds, hills, dunes, roofs, cycles
    period: Tensor  # frames after which everything repeats; 0 = never

    def __len__(self) -> int:
        return self.colour.shape[0]

    def take(self, index: Tensor | slice) -> Scenes:
        """Select scenes by index."""
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Scenes:
        """Move every field to a device."""
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def mirrored(self) -> Scenes:
        """The same clips seen in a mirror: left and right motions swap names."""
        table = torch.tensor(MIRRORED_MOTION, device=self.motion.device)
        return replace(self, mirror=1 - self.mirror, motion=table[self.motion])

    def twins(self) -> Scenes:
        """Scenes that differ in the motion: mirrored ones, or, of motions in place, the same with the other motion."""
        other = self.motion.clone()
        for motion, exchanged in IN_PLACE.items():
            other[self.motion == motion] = exchanged
        changed, mirrored = vars(replace(self, motion=other)), vars(self.mirrored())
        return Scenes(**{name: torch.where(other != self.motion, changed[name], mirrored[name]) for name in changed})

    def looping(self, frames: int) -> Scenes:
        """The same scenes with speeds changed a little, so that frame n and frame n + `frames` are the same."""
        return replace(self, period=torch.full_like(self.period, frames))

    def labels(self) -> Tensor:
        """Attribute indices [B, 6] in the order of `ATTRIBUTES`."""
        return torch.stack([getattr(self, name) for name in ATTRIBUTES], 1)


def join_scenes(parts: list[Scenes]) -> Scenes:
    """Concatenate scenes."""
    return Scenes(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Scenes)})


def sample_scenes(count: int, generator: torch.Generator, **fixed: int) -> Scenes:
    """Draw random scenes; keyword arguments fix an attribute to one index.

    Drifting and rising subjects start so that frame 8 of a 16-frame clip shows them near the middle: at a given frame
    the side then tells the direction, which is what a short training run needs to learn the words.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    drawn = {
        name: torch.full((count,), fixed[name])
        if name in fixed
        else torch.randint(len(words), (count,), generator=generator)
        for name, words in ATTRIBUTES.items()
    }
    motion = drawn["motion"]
    speed = torch.where(motion < FLOATING, uniform(0.040, 0.055), uniform(0.050, 0.065))  # a cycle is 15-20 frames
    speed = torch.where(motion == RISING, uniform(0.026, 0.036), speed)
    return Scenes(
        **drawn,
        radius=uniform(0.15, 0.19),
        x=uniform(0.50, ASPECT - 0.50),
        y=torch.where(motion == RISING, uniform(0.36, 0.48), uniform(0.34, 0.42)),
        speed=speed,
        phase=uniform(0, 1),
        mirror=torch.zeros(count, dtype=torch.long),
        horizon=uniform(0.66, 0.73),
        light_x=uniform(0.2, ASPECT - 0.2),
        relief=uniform(0, 1),
        period=torch.zeros(count),
    )


def in_period(rate: Tensor, period: Tensor) -> Tensor:
    """The rate, in cycles a frame, nearest to `rate` that fits a whole number of cycles into `period` frames.

    Period 0 leaves the rate as it is. The two broadcast.
    """
    whole = (rate * period).round() / period.clamp(min=1)
    return torch.where(period > 0, whole, rate)


def wrap(value: Tensor, length: Tensor | float) -> Tensor:
    """`value` shifted by a multiple of `length` into [-length / 2, length / 2)."""
    return torch.remainder(value + length / 2, length) - length / 2


def positions(scenes: Scenes, frames: Tensor) -> Tensor:
    """Centres of the subject, [B, F, 2] as (x, y) on the canvas, for frame indices [F] or [B, F].

    Drifting and rising subjects leave the picture whole before they come back on the other side.
    """
    frames = frames.to(scenes.speed)
    frames = frames[None] if frames.dim() == 1 else frames
    motion, speed, period = scenes.motion[:, None], scenes.speed[:, None], scenes.period[:, None]
    x, y, radius = scenes.x[:, None], scenes.y[:, None], scenes.radius[:, None]
    track_x, track_y = ASPECT + 4 * radius, 1 + 4 * radius
    track = torch.where(motion == RISING, track_y, track_x)
    once = torch.maximum(speed / track, (period > 0) / period.clamp(min=1))  # a loop has at least one round
    travelled = track * in_period(once, period) * (frames - MIDDLE_FRAME)
    turn = 2 * math.pi * (in_period(speed, period) * frames + scenes.phase[:, None])
    # A mirrored scene stores the motion that is seen: undo the mirror, as the whole picture is turned below.
    direction = torch.where(motion == LEFT, -1.0, 1.0) * (1 - 2 * scenes.mirror[:, None])
    across = torch.where(motion < FLOATING, ASPECT / 2 + wrap(x + direction * travelled - ASPECT / 2, track_x), x)
    across = torch.where(motion == CIRCLING, x + 0.26 * turn.cos(), across)
    down = torch.where(motion == RISING, 0.45 + wrap(y - travelled - 0.45, track_y), y)
    down = torch.where(motion == FLOATING, y + 0.14 * turn.sin(), down)
    down = torch.where(motion == CIRCLING, y + 0.13 * turn.sin(), down)
    across, down = torch.broadcast_tensors(across, down)
    return torch.stack([torch.where(scenes.mirror[:, None] == 1, ASPECT - across, across), down], -1)


def framed(height: int, width: int) -> Window:
    """Return the part of the canvas that a picture of this shape shows: of its area, around its middle.

    What is wider or higher than the canvas shows more of the world there.
    """
    across = (width / height / ASPECT) ** 0.5
    return (1 - across) / 2, (1 - 1 / across) / 2, (1 + across) / 2, (1 + 1 / across) / 2


def cells(height: int, width: int, window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the middles of rows [height] and columns [width] of a grid over a part of the canvas, on the canvas."""
    left, top, right, bottom = window
    ys = top + (bottom - top) * (torch.arange(height, device=device) + 0.5) / height
    xs = (left + (right - left) * (torch.arange(width, device=device) + 0.5) / width) * ASPECT
    return ys, xs


def subject_mask(scenes: Scenes, frames: Tensor, height: int, width: int, window: Window = WHOLE) -> Tensor:
    """Soft mask exp(-(distance / (1.2 radius))^2) of the subject on a coarse grid, [B, F, height, width] in [0, 1]."""
    device = scenes.radius.device
    ys, xs = cells(height, width, window, device)
    centres = positions(scenes, frames.to(device))
    dx, dy = xs - centres[..., 0, None], ys - centres[..., 1, None]
    square = dy[..., :, None] ** 2 + dx[..., None, :] ** 2
    return torch.exp(-square / (1.2 * scenes.radius[:, None, None, None]) ** 2)
