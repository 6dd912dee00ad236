"""A procedural world: one large coloured subject moving for ever in front of a quiet landscape.

Every scene is a handful of numbers, so positions are analytic (loss masks and motion labels are free), any frame index
is legal (motions are periodic or wrap around), and a view window renders any crop at any size on any device.

Canvas coordinates: y in [0, 1] from the top down, x in [0, 16/9]; sizes and speeds are in canvas heights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

ASPECT = 16 / 9
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "green", "blue", "yellow", "purple", "white"),
    "subject": ("ball", "star", "cube", "fish"),
    "motion": ("drifting left", "drifting right", "bouncing", "rising", "circling"),
    "place": ("sea", "meadow", "desert", "city"),
    "time": ("day", "sunset", "night"),
}
MIRRORED_MOTION = (1, 0, 2, 3, 4)  # the motion a left-right mirrored clip shows

_SUBJECT_RGB = (
    (0.93, 0.08, 0.08), (0.05, 0.78, 0.15), (0.08, 0.20, 0.95), (1.0, 0.88, 0.05), (0.70, 0.10, 0.85), (0.97,) * 3,
)  # fmt: skip
_SKY_TOP = ((0.25, 0.55, 0.95), (0.35, 0.20, 0.50), (0.02, 0.03, 0.16))
_SKY_LOW = ((0.75, 0.90, 1.0), (1.0, 0.55, 0.25), (0.12, 0.14, 0.38))
_GROUND = ((0.05, 0.28, 0.60), (0.25, 0.58, 0.15), (0.88, 0.70, 0.40), (0.42, 0.42, 0.46))
_GROUND_TINT = ((1.0, 1.0, 1.0), (0.85, 0.55, 0.50), (0.36, 0.40, 0.60))
_SUBJECT_TINT = ((1.0, 1.0, 1.0), (1.0, 0.92, 0.88), (0.80, 0.82, 0.92))
_LIGHT = ((1.0, 1.0, 0.85), (1.0, 0.85, 0.45), (0.90, 0.92, 1.0))  # the sun or the moon


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; every field is a tensor [B]. Attribute fields are indices into `ATTRIBUTES`."""

    colour: Tensor
    subject: Tensor
    motion: Tensor
    place: Tensor
    time: Tensor
    radius: Tensor  # subject half-size, canvas heights
    x: Tensor  # rest position
    y: Tensor
    speed: Tensor  # canvas heights a frame (drifting, rising), or cycles a frame (bouncing, circling)
    phase: Tensor  # cycles
    mirror: Tensor  # 1 = the whole picture is mirrored left to right
    horizon: Tensor
    light_x: Tensor
    relief: Tensor  # phase of waves, hills, dunes, roofs

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

    def labels(self) -> Tensor:
        """Attribute indices [B, 5] in the order of `ATTRIBUTES`."""
        return torch.stack([getattr(self, name) for name in ATTRIBUTES], 1)


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
    radius = uniform(0.25, 0.34)
    drifting, rising = motion < 2, motion == 3
    mirror = torch.zeros(count, dtype=torch.long)
    speed = torch.where(motion == 2, uniform(0.085, 0.115), uniform(0.045, 0.065))  # a bounce lasts 9-12 frames
    speed = torch.where(motion == 4, uniform(0.055, 0.07), speed)  # a round lasts 14-18 frames
    x = torch.where(drifting | (motion == 4), uniform(0.60, 1.18), uniform(0.40, 1.38))
    y = torch.where(rising, uniform(0.35, 0.65), uniform(0.38, 0.62))
    return Scenes(
        **drawn,
        radius=radius,
        x=x,
        y=y,
        speed=speed,
        phase=uniform(0, 1),
        mirror=mirror,
        horizon=uniform(0.56, 0.66),
        light_x=uniform(0.2, ASPECT - 0.2),
        relief=uniform(0, 1),
    )


def _wrap(value: Tensor, period: Tensor | float) -> Tensor:
    return torch.remainder(value + period / 2, period) - period / 2


def wrap_periods(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Distances [B] after which a drifting (x) or rising (y) subject is drawn again on the other side."""
    return ASPECT + scenes.radius, 1 + scenes.radius


def positions(scenes: Scenes, frames: Tensor) -> Tensor:
    """Centres of the subject, [B, F, 2] as (x, y) on the canvas, for frame indices [F] or [B, F]."""
    frames = frames.float()
    if frames.dim() == 1:
        frames = frames[None]
    motion, speed = scenes.motion[:, None], scenes.speed[:, None]
    radius, phase = scenes.radius[:, None], scenes.phase[:, None]
    period_x, period_y = (p[:, None] for p in wrap_periods(scenes))
    x = scenes.x[:, None].expand(-1, frames.shape[1]).clone()
    y = scenes.y[:, None].expand(-1, frames.shape[1]).clone()
    # Undo the mirror for the motion word: a mirrored scene stores the word that is seen.
    sign = torch.where(motion == 0, -1.0, 1.0) * (1 - 2 * scenes.mirror[:, None])
    travel = speed * (frames - 8)
    drift_x = ASPECT / 2 + _wrap(x + sign * travel - ASPECT / 2, period_x)
    rise_y = 0.5 + _wrap(y - travel - 0.5, period_y)
    turn = 2 * math.pi * (speed * frames + phase)
    bounce_y = 0.95 - radius - (0.80 - 1.2 * radius) * torch.sin(turn / 2).abs()
    x = torch.where(motion < 2, drift_x, x)
    y = torch.where(motion == 3, rise_y, y)
    y = torch.where(motion == 2, bounce_y, y)
    x = torch.where(motion == 4, x + 0.24 * torch.cos(turn), x)
    y = torch.where(motion == 4, 0.5 + 0.20 * torch.sin(turn), y)
    x = torch.where(scenes.mirror[:, None] == 1, ASPECT - x, x)
    return torch.stack([x, y], -1)


def _smooth(distance: Tensor, pixel: float) -> Tensor:
    """Coverage in [0, 1] of a signed distance (negative inside), with an edge of about one pixel."""
    return (0.5 - distance / (1.2 * pixel)).clamp(0, 1)


def _shape_distance(dx: Tensor, dy: Tensor, subject: Tensor, facing: Tensor) -> Tensor:
    """Signed distance in units of the radius to each scene's own shape; coordinates [B, F, H, W] in radii."""
    out = torch.empty_like(dx)
    for index in range(len(ATTRIBUTES["subject"])):
        rows = (subject == index).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        x, y = dx[rows], dy[rows]
        if index == 0:
            value = (x * x + y * y).sqrt() - 0.95
        elif index == 1:  # five-pointed star: fold the plane into one arm, then the distance to the arm's edge
            angle = torch.atan2(x, -y)
            length = (x * x + y * y).sqrt()
            folded = (torch.remainder(angle + math.pi / 5, 2 * math.pi / 5) - math.pi / 5).abs()
            px, py = length * torch.cos(folded), length * torch.sin(folded)
            tip, inner = 1.15, 0.50
            ix, iy = inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)
            nx, ny = iy, tip - ix
            norm = math.hypot(nx, ny)
            value = ((px - tip) * nx + py * ny) / norm
        elif index == 2:
            value = torch.maximum(x.abs(), y.abs()) - 0.82
        else:
            u = x * facing[rows][:, None, None, None]
            body = (((u - 0.22) / 0.88) ** 2 + (y / 0.62) ** 2 + 1e-6).sqrt()
            body = (body - 1) * 0.62
            tail = torch.maximum((y.abs() - (-0.35 - u) * 1.1) * 0.67, -1.1 - u)
            value = torch.minimum(body, tail)
        out[rows] = value
    return out


def _shade(dx: Tensor, dy: Tensor, distance: Tensor, subject: Tensor, facing: Tensor) -> Tensor:
    """Brightness of the surface: rounder shapes darken to the rim, the cube has a light top, the fish an eye."""
    round_shade = 1.08 - 0.38 * ((dx + 0.35) ** 2 + (dy + 0.4) ** 2).sqrt()
    top = torch.sigmoid((-0.42 - dy) * 14)
    cube_shade = 0.80 + 0.35 * top
    u = dx * facing[:, None, None, None]
    eye = ((u - 0.62) ** 2 + (dy + 0.12) ** 2).sqrt()
    fish_shade = (1.0 - 0.35 * dy.abs()) * (1 - 0.85 * torch.sigmoid((0.13 - eye) * 25))
    kind = subject[:, None, None, None]
    shade = torch.where(kind == 2, cube_shade, torch.where(kind == 3, fish_shade, round_shade))
    return shade * (0.82 + 0.18 * (-distance * 5).clamp(0, 1))


def _table(rows: tuple[tuple[float, ...], ...], index: Tensor, device: torch.device) -> Tensor:
    """Colours [B, 3, 1, 1]."""
    return torch.tensor(rows, device=device)[index][:, :, None, None]


def _background(scenes: Scenes, x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """Landscape [B, 3, H, W] in [0, 1] on canvas coordinates x, y [B, H, W]."""
    device = x.device
    x = torch.where(scenes.mirror[:, None, None] == 1, ASPECT - x, x)
    horizon = scenes.horizon[:, None, None]
    relief = (scenes.relief * 2 * math.pi)[:, None, None]
    place = scenes.place[:, None, None]
    ramp = (y / horizon).clamp(0, 1)[:, None] ** 1.3
    top, low = (_table(t, scenes.time, device) for t in (_SKY_TOP, _SKY_LOW))
    sky = top + (low - top) * ramp
    light = (
        (x - scenes.light_x[:, None, None]) ** 2 + (y - torch.where(scenes.time == 1, 0.42, 0.18)[:, None, None]) ** 2
    ).sqrt()
    glow = 0.35 * torch.exp(-((light / 0.22) ** 2)) + 0.9 * _smooth(light - 0.085, pixel)
    sky = sky + (_table(_LIGHT, scenes.time, device) - sky) * glow.clamp(0, 1)[:, None]

    hills = horizon - 0.05 * torch.sin(x * 2.6 + relief)
    dunes = horizon + 0.06 * (torch.sin(x * 3.5 + relief).abs() - 0.5)
    block = torch.floor(x / 0.255 + scenes.relief[:, None, None] * 7)
    roofs = horizon - 0.05 - 0.20 * (0.5 + 0.5 * torch.sin(block * 2.4 + relief))
    edge = torch.where(place == 0, horizon, torch.where(place == 1, hills, torch.where(place == 2, dunes, roofs)))
    ground = _table(_GROUND, scenes.place, device) * _table(_GROUND_TINT, scenes.time, device)
    depth = ((y - edge) / (1 - horizon)).clamp(0, 1)
    stripes = torch.where(
        place == 0, 0.10 * torch.sin(depth * 14 + 0.6 * torch.sin(x * 3 + relief)), torch.zeros_like(x)
    )
    street = torch.where(place == 3, -0.45 * _smooth(0.82 - y, pixel), torch.zeros_like(x))
    shade = torch.where(place == 0, 1.15 - 0.35 * depth, 0.85 + 0.25 * depth) + stripes + street
    return torch.lerp(sky, (ground * shade[:, None]).clamp(0, 1), _smooth(edge - y, pixel)[:, None])


def render(
    scenes: Scenes,
    frames: Tensor,
    height: int = 72,
    width: int = 128,
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
) -> Tensor:
    """Render clips.

    Args:
        scenes: B scenes.
        frames: frame indices [F] or [B, F]; any integers or fractions.
        height: output rows.
        width: output columns.
        window: part of the canvas shown, (left, top, right, bottom) as fractions of the canvas.

    Returns:
        Frames [B, F, 3, H, W] in [-1, 1].
    """
    device = scenes.radius.device
    left, top, right, bottom = window
    pixel = (bottom - top) / height
    ys = top + (bottom - top) * (torch.arange(height, device=device) + 0.5) / height
    xs = (left + (right - left) * (torch.arange(width, device=device) + 0.5) / width) * ASPECT
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    count = len(scenes)
    picture = _background(scenes, x.expand(count, -1, -1), y.expand(count, -1, -1), pixel)

    centres = positions(scenes, frames.to(device))
    radius = scenes.radius[:, None, None, None]
    dx = x - centres[..., 0, None, None]
    dy = y - centres[..., 1, None, None]
    period_x, period_y = (p[:, None, None, None] for p in wrap_periods(scenes))
    motion = scenes.motion[:, None, None, None]
    dx = torch.where(motion < 2, _wrap(dx, period_x), dx) / radius
    dy = torch.where(motion == 3, _wrap(dy, period_y), dy) / radius
    facing = torch.where(scenes.motion == 0, -1.0, 1.0)
    facing = torch.where((scenes.motion >= 2) & (scenes.mirror == 1), -facing, facing)
    distance = _shape_distance(dx, dy, scenes.subject, facing)
    shade = _shade(dx, dy, distance, scenes.subject, facing)
    paint = _table(_SUBJECT_RGB, scenes.colour, device) * _table(_SUBJECT_TINT, scenes.time, device)
    cover = _smooth(distance * radius, pixel)[:, :, None]
    surface = (paint[:, None] * shade[:, :, None]).clamp(0, 1)
    return torch.lerp(picture[:, None].expand(-1, dx.shape[1], -1, -1, -1), surface, cover) * 2 - 1


def subject_mask(scenes: Scenes, frames: Tensor, height: int, width: int) -> Tensor:
    """Soft mask exp(-(distance / radius)^2) of the subject on a coarse grid, [B, F, height, width] in [0, 1]."""
    device = scenes.radius.device
    ys = (torch.arange(height, device=device) + 0.5) / height
    xs = (torch.arange(width, device=device) + 0.5) / width * ASPECT
    centres = positions(scenes, frames.to(device))
    dx, dy = xs - centres[..., 0, None], ys - centres[..., 1, None]
    period_x, period_y = (p[:, None, None] for p in wrap_periods(scenes))
    motion = scenes.motion[:, None, None]
    dx = torch.where(motion < 2, _wrap(dx, period_x), dx)
    dy = torch.where(motion == 3, _wrap(dy, period_y), dy)
    square = dy[..., :, None] ** 2 + dx[..., None, :] ** 2
    return torch.exp(-square / scenes.radius[:, None, None, None] ** 2)
