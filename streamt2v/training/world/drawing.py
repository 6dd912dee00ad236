"""Drawing of the world: sky, clouds, land or water, mist, and the light that colours them all.

Light is laid over a picture by `screen`, so it never clips. Edges and small things are as wide as a pixel at least, so
a scene is the same picture at every size. Time enters by angles alone (`_View.angle`): a scene with a period repeats.

Shapes: N frames (of any scenes), H before W; colours are [N, 3, 1, 1], everything else [N, 1, 1] or [N, H, W].
"""

# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from streamt2v.training.world.scenes import (
    ASPECT,
    ATTRIBUTES,
    WHOLE,
    Scenes,
    Window,
    cells,
    in_period,
    positions,
)

DAY, SUNSET, NIGHT = range(3)
CLOUDS, MIST, SNOW = 1, 2, 3
SEA, HILLS, DESERT, CITY = range(4)
BALL, STAR, LANTERN, MOON = range(4)

Colours = Sequence[Sequence[float]]
PAINT: Colours = (
    *((1.0, 0.10, 0.07), (0.08, 0.92, 0.26), (0.10, 0.36, 1.0)),
    *((1.0, 0.70, 0.05), (0.66, 0.16, 1.0), (1.0, 0.96, 0.90)),
)
# By time of day: the sky at the top, half way and at the horizon; the sun; what light falls on the land.
_SKY_TOP: Colours = ((0.16, 0.36, 0.62), (0.10, 0.09, 0.30), (0.010, 0.018, 0.075))
_SKY_MIDDLE: Colours = ((0.36, 0.58, 0.78), (0.46, 0.20, 0.42), (0.030, 0.055, 0.17))
_SKY_LOW: Colours = ((0.80, 0.84, 0.84), (1.0, 0.55, 0.28), (0.10, 0.17, 0.33))
_SUN: Colours = ((1.0, 0.96, 0.84), (1.0, 0.74, 0.38), (0.62, 0.74, 1.0))
_AMBIENT: Colours = ((1.0, 1.0, 1.0), (0.78, 0.56, 0.56), (0.22, 0.29, 0.50))
_SUN_POWER = (0.42, 0.80, 0.16)
_SPILL = (0.62, 0.80, 1.0)  # how much of the subject's light shows: less against a bright sky
_LAND: Colours = ((0.05, 0.20, 0.32), (0.13, 0.27, 0.17), (0.74, 0.50, 0.30), (0.12, 0.14, 0.20))
_SNOW = (0.86, 0.90, 0.96)
_LAMP = (1.0, 0.76, 0.40)  # lit windows
_GREY = (0.299, 0.587, 0.114)

# Ridges from far to near: base below the horizon, height of the relief, how near (0 far, 1 near).
_HILLS = ((-0.10, 1.2, 0.22), (0.0, 0.95, 0.50), (0.12, 0.72, 0.78), (0.235, 0.6, 0.98))
_DUNES = ((-0.045, 0.75), (0.055, 1.0), (0.19, 0.9))
# Rows of houses from far to near: width of a house, height of the quay, of the tallest house, darkness.
_HOUSES = ((0.150, 0.075, 0.24, 0.55), (0.215, 0.030, 0.17, 0.90))


@dataclass(frozen=True)
class _View:
    """What is drawn, frame by frame: coordinates, the scene's numbers and its light."""

    x: Tensor  # canvas coordinates, [N, H, W], as if not mirrored
    y: Tensor
    frame: Tensor
    period: Tensor
    horizon: Tensor
    relief: Tensor  # angle
    phase: Tensor  # angle
    sun_x: Tensor
    power: Tensor  # of the sun
    radius: Tensor
    centre_x: Tensor
    centre_y: Tensor
    place: Tensor
    subject: Tensor
    day: Tensor  # 1 or 0, as the next five
    sunset: Tensor
    night: Tensor
    cloudy: Tensor
    misty: Tensor
    snowy: Tensor
    top: Tensor  # colours
    middle: Tensor
    low: Tensor
    sun: Tensor
    ambient: Tensor
    paint: Tensor
    spill: Tensor
    pixel: Tensor  # height of a pixel

    def take(self, rows: Tensor) -> _View:
        """Select frames."""
        return _View(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def angle(self, rate: float) -> Tensor:
        """The angle reached by now at `rate` radians a frame."""
        cycles = in_period(torch.full_like(self.period, rate / (2 * math.pi)), self.period)
        return 2 * math.pi * cycles * self.frame

    def edge(self, distance: Tensor, width: float = 0.012) -> Tensor:
        """Coverage in (0, 1) where `distance` is positive, over `width` or a pixel, whichever is more."""
        return torch.sigmoid(4 * distance / self.pixel.clamp(min=width))

    def away(self) -> Tensor:
        """Distance from the sun, which stands behind the horizon except by day."""
        down = self.y - self.horizon + 0.02 + 0.32 * self.day
        return ((self.x - self.sun_x).square() / 1.6 + down.square() + 1e-6).sqrt()

    def dimmed(self) -> Tensor:
        """The share of the sun that the weather lets through."""
        return 1 - 0.55 * (0.8 * self.cloudy + 0.7 * self.misty + self.snowy).clamp(max=1)


def render(
    scenes: Scenes,
    frames: Tensor,
    height: int = 72,
    width: int = 128,
    window: Window = WHOLE,
    at_once: int = 64,
) -> Tensor:
    """Render clips.

    Args:
        scenes: B scenes.
        frames: frame indices [F], [1, F] or [B, F]; any integers or fractions.
        height: output rows.
        width: output columns.
        window: part of the canvas shown; beyond the canvas the world goes on.
        at_once: frames drawn together; bounds the memory and changes nothing else.

    Returns:
        Frames [B, F, 3, H, W] in [-1, 1].
    """
    device = scenes.radius.device
    frames = frames.to(device).expand(len(scenes), -1)
    y, x = torch.meshgrid(*cells(height, width, window, device), indexing="ij")
    centres = positions(scenes, frames).flatten(0, 1)
    rows = torch.arange(len(scenes), device=device).repeat_interleave(frames.shape[1])
    times = frames.flatten().to(centres)
    drawn = [
        _draw(_view(scenes.take(rows[part]), centres[part], times[part], x, y, (window[3] - window[1]) / height))
        for part in torch.arange(len(rows), device=device).split(at_once)
    ]
    return torch.cat(drawn).unflatten(0, frames.shape) * 2 - 1


def screen(base: Tensor, light: Tensor) -> Tensor:
    """Lay light over a picture, both in [0, 1]: 1 - (1 - base) (1 - light)."""
    return 1 - (1 - base) * (1 - light)


def _smooth(value: Tensor) -> Tensor:
    value = value.clamp(0, 1)
    return value * value * (3 - 2 * value)


def _fraction(value: Tensor) -> Tensor:
    """A random-looking number in [0, 1) for every value."""
    return torch.frac(value.sin().abs() * 43.7)


def _colour(table: Colours | Sequence[float], index: Tensor | None, like: Tensor) -> Tensor:
    """Colours [N, 3, 1, 1], or one colour [1, 3, 1, 1] without an index."""
    rows = torch.tensor(table, device=like.device, dtype=like.dtype)
    return (rows[None] if index is None else rows[index])[:, :, None, None]


def _view(scenes: Scenes, centres: Tensor, frame: Tensor, x: Tensor, y: Tensor, pixel: float) -> _View:
    """Gather what the drawing needs, with the sky paled by the weather."""

    def column(values: Tensor) -> Tensor:
        return values[:, None, None].to(x)

    def level(table: Sequence[float]) -> Tensor:
        return column(torch.tensor(table, device=x.device)[scenes.time])

    count = len(scenes)
    mirrored = column(scenes.mirror) == 1
    centre_x = column(centres[:, 0])
    ambient = _colour(_AMBIENT, scenes.time, x)
    cloudy, misty, snowy = (column(scenes.weather == kind) for kind in (CLOUDS, MIST, SNOW))
    pale = (0.55 * snowy + 0.35 * misty + 0.30 * cloudy)[:, None]

    def paled(table: Colours, lift: float) -> Tensor:
        colour = _colour(table, scenes.time, x)
        grey = (colour * _colour(_GREY, None, x)).sum(1, keepdim=True)
        return torch.lerp(colour, grey + lift * ambient * (1 - grey), pale)

    return _View(
        x=torch.where(mirrored, ASPECT - x, x.expand(count, -1, -1)),
        y=y.expand(count, -1, -1),
        frame=column(frame),
        period=column(scenes.period),
        horizon=column(scenes.horizon),
        relief=2 * math.pi * column(scenes.relief),
        phase=2 * math.pi * column(scenes.phase),
        sun_x=column(scenes.light_x),
        power=level(_SUN_POWER),
        radius=column(scenes.radius),
        centre_x=torch.where(mirrored, ASPECT - centre_x, centre_x),
        centre_y=column(centres[:, 1]),
        place=scenes.place,
        subject=scenes.subject,
        day=column(scenes.time == DAY),
        sunset=column(scenes.time == SUNSET),
        night=column(scenes.time == NIGHT),
        cloudy=cloudy,
        misty=misty,
        snowy=snowy,
        top=paled(_SKY_TOP, 0.10),
        middle=paled(_SKY_MIDDLE, 0.10),
        low=paled(_SKY_LOW, 0.0),
        sun=_colour(_SUN, scenes.time, x),
        ambient=ambient,
        paint=_colour(PAINT, scenes.colour, x),
        spill=level(_SPILL),
        pixel=torch.full_like(centre_x, pixel),
    )


def _draw(view: _View) -> Tensor:
    """Draw frames [N, 3, H, W] in [0, 1], from the back to the front."""
    picture, lit = _sky(view), _air_light(view)
    for place, land in enumerate((_sea, _hills, _desert, _city)):
        rows = (view.place == place).nonzero()[:, 0]
        if len(rows):
            ground, on_ground = land(view.take(rows), picture[rows], lit[rows])
            picture, lit = picture.index_copy(0, rows, ground), lit.index_copy(0, rows, on_ground)
    picture = _mist(view, picture.clamp(0, 1))
    picture = screen(picture, (view.spill * lit).clamp(0, 0.95)[:, None] * view.paint)
    picture = _subject(view, picture)
    corner = ((view.x / ASPECT - 0.5) * 1.2).square() + ((view.y - 0.5) * 1.1).square()
    return (picture * (1 - 0.32 * corner)[:, None]).clamp(0, 1)


def _gradient(view: _View, height: Tensor) -> Tensor:
    """Colour of the clear sky at a height: 0 at the horizon, 1 at the top."""
    height = height.clamp(0, 1)[:, None]
    sky = view.low + (view.middle - view.low) * _smooth(height / 0.5)
    return sky + (view.top - view.middle) * _smooth((height - 0.25) / 0.75)


def _sky(view: _View) -> Tensor:
    """Gradient, banks of clouds that drift, and the glow of the sun."""
    x, y, relief = view.x, view.y, view.relief
    away = view.away()
    warp = 0.8 * torch.sin(1.7 * x + relief + view.angle(0.010))
    bank = (
        torch.sin(2.1 * x + 7.0 * y + relief + warp + view.angle(0.016))
        + 0.8 * torch.sin(3.9 * x - 10.5 * y + 2.2 * relief + 1.2 * warp + view.angle(0.024))
        + 0.55 * torch.sin(7.1 * x + 17 * y - 1.7 * relief - warp + view.angle(0.034))
        + 0.3 * torch.sin(12.7 * x - 26 * y + 3.1 * relief + 2 * warp + view.angle(0.040))
    )
    more = 1.35 * view.cloudy + 0.55 * view.snowy + 0.2 * view.misty
    cover = torch.sigmoid((bank - 1.05 + more) * 2.6) * torch.sigmoid((view.horizon - 0.05 - y) * 16)
    cloud = (0.62 * view.low + 0.38 * view.middle) * (0.86 + 0.20 * view.day[:, None])
    shine = view.power * (0.18 + 0.55 * torch.exp(-((away / 0.6) ** 2))) * (1 - 0.6 * view.snowy)
    cloud = (cloud + view.sun * shine[:, None]).clamp(0, 1)
    picture = torch.lerp(_gradient(view, 1 - y / view.horizon), cloud, (cover * (0.50 + 0.28 * view.cloudy))[:, None])
    glow = 0.55 * torch.exp(-((away / 0.16) ** 1.4)) + 0.45 * torch.exp(-((away / 0.5) ** 1.5))
    glow = view.power * view.dimmed() * glow * (1 - 0.35 * cover)
    return screen(picture, glow[:, None] * view.sun)


def _air_light(view: _View) -> Tensor:
    """How much of the subject's light the air around it scatters."""
    far = ((view.x - view.centre_x).square() + (view.y - view.centre_y).square() + 1e-6).sqrt()
    light = 0.34 * torch.exp(-((far / 0.26) ** 1.3)) + 0.16 * torch.exp(-((far / 0.70) ** 1.8))
    return light * (1 + 0.8 * view.misty + 0.3 * view.snowy + 0.2 * view.cloudy)


def _ground(view: _View, place: int, snow: float) -> Tensor:
    """Colour of the land, white by `snow` where there is any."""
    land = _colour(_LAND[place], None, view.x)
    return torch.lerp(land, _colour(_SNOW, None, view.x), snow * view.snowy[:, None])


def _water(view: _View, picture: Tensor, lit: Tensor, reflected: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Water below the horizon: waves, the mirrored sky, glitter under the sun and under the subject."""
    x, relief = view.x, view.relief
    near = ((view.y - view.horizon) / (1 - view.horizon)).clamp(0, 1)
    depth = torch.log(near + 0.10)
    swell = 0.9 * torch.sin(2.2 * x + relief)
    ripples = 1.4 * torch.sin(3.1 * x - relief + view.angle(0.04))
    chop = 2.2 * torch.sin(4.3 * x + 2 * relief - view.angle(0.05))
    wave = (
        0.50 * torch.sin(7.5 * depth + swell - view.angle(0.16))
        + 0.35 * torch.sin(12.5 * depth + ripples - view.angle(0.23) + 1.7 * x)
        + 0.25 * torch.sin(21 * depth + chop - view.angle(0.31) - 2.6 * x)
    ) * _smooth(near / 0.10)
    water = (reflected * 0.60 + ground * view.ambient * 0.55) * (1.02 - 0.38 * near[:, None])
    water = water + (0.085 * wave * (1 - 0.4 * view.night))[:, None] * (view.low * 0.6 + 0.2)
    glitter = torch.exp(-(((x - view.sun_x) / (0.07 + 0.26 * near)) ** 2)) * (0.42 + 0.58 * wave).clamp(min=0)
    glitter = 0.85 * glitter * torch.exp(-0.6 * near) * view.power * view.dimmed()
    water = screen(water.clamp(0, 1), glitter[:, None] * view.sun)
    over = view.horizon - view.centre_y  # the subject's height above the water
    strength = torch.exp(-((over.clamp(min=0) / 0.75) ** 2)) * torch.sigmoid((over + 0.10) / 0.04)
    column = ((x - view.centre_x - 0.025 * wave) / (view.radius * (0.62 + near))).abs() ** 1.8
    column = torch.exp(-column - ((near - 0.30) / 0.75) ** 2) * (0.52 + 0.62 * wave).clamp(min=0.08)
    shore = view.edge(view.y - view.horizon)
    return torch.lerp(picture, water, shore[:, None]), torch.lerp(lit, 1.05 * column * strength + 0.30 * lit, shore)


def _sea(view: _View, picture: Tensor, lit: Tensor) -> tuple[Tensor, Tensor]:
    near = ((view.y - view.horizon) / (1 - view.horizon)).clamp(0, 1)
    return _water(view, picture, lit, _gradient(view, 0.8 * near), _ground(view, SEA, 0.34))


def _ridge(x: Tensor, angle: Tensor, waves: Sequence[tuple[float, float]]) -> Tensor:
    """A soft line of hills: sines of (frequency, height), each with a phase of its own made of `angle`."""
    line = torch.zeros_like(x)
    for index, (frequency, height) in enumerate(waves):
        line = line + height * torch.sin(frequency * x + angle * (3 + 2.3 * index) + index)
    return line


def _hills(view: _View, picture: Tensor, lit: Tensor) -> tuple[Tensor, Tensor]:
    """Four ridges, paler with distance, with mist in the valleys."""
    x, y, snowy = view.x, view.y, view.snowy
    ground = _ground(view, HILLS, 0.88) * view.ambient
    toward_sun = torch.tanh((view.sun_x - x) / 0.3)
    sunward = torch.exp(-(((x - view.sun_x) / 0.6) ** 2)) * view.power
    fog = view.low * 0.86 + 0.06 * view.sun * sunward[:, None]
    for index, (base, height, near) in enumerate(_HILLS):
        angle = view.relief * (1 + 0.6 * index)
        first, second, third = 2.1 + index, 4.7 + 1.3 * index, 9.5 + index
        crest = view.horizon + base + height * _ridge(x, angle, ((first, 0.055), (second, 0.030), (third, 0.010)))
        slope = 0.7 * torch.cos(first * x + 3 * angle) + 0.5 * torch.cos(second * x + 5.3 * angle + 1)
        below = ((y - crest) / 0.24).clamp(0, 1)
        face = 1 + 0.16 * torch.tanh(slope * toward_sun) * torch.exp(-1.5 * below) + 0.10 * torch.exp(-6 * below)
        stone = view.low * (0.66 * (1 - near)) + view.middle * 0.12 + ground * (0.25 + 0.75 * near) * face[:, None]
        haze = (0.50 + 0.35 * view.misty + 0.1 * snowy) * _smooth(below) * (1 - 0.8 * near * (1 - 0.45 * view.misty))
        covered = view.edge(y - crest)
        picture = torch.lerp(picture, torch.lerp(stone, fog, haze[:, None]), covered[:, None])
        glow = torch.exp(-(((x - view.centre_x) / 0.34) ** 2) - 2.2 * below)
        glow = glow * torch.exp(-(((crest - view.centre_y).clamp(min=0) / 0.45) ** 2))
        lit = torch.lerp(lit, _air_light(view) * (0.80 + 0.1 * index) + 0.26 * glow, covered)
    return picture, lit


def _desert(view: _View, picture: Tensor, lit: Tensor) -> tuple[Tensor, Tensor]:
    """Three dunes with a sunlit and a shadowed side and fine ripples."""
    x, y = view.x, view.y
    ground = _ground(view, DESERT, 0.88) * view.ambient
    toward_sun = torch.tanh((view.sun_x - x) / 0.25)
    for index, (base, height) in enumerate(_DUNES):
        angle = view.relief * (1 + index)
        first, second = 2.4 + 0.7 * index, 5.2 - 0.6 * index
        crest = view.horizon + base + height * _ridge(x, angle, ((first, 0.045), (second, 0.016)))
        below = ((y - crest) / 0.30).clamp(0, 1)
        facing = torch.tanh(2.2 * torch.cos(first * x + 3 * angle) * toward_sun)
        sunny = 0.30 * facing * torch.exp(-2.2 * below) * (1 - 0.5 * view.night)
        fine = (0.006 / view.pixel).clamp(0.45, 1)
        ripple = 0.05 * fine * torch.sin(46 * (y - crest) + 3 * torch.sin(3 * x + view.relief) + 8 * x)
        shade = 0.78 + sunny - 0.26 * below + 0.06 * index + ripple * torch.exp(-2.5 * below)
        gleam = view.power * 0.16 * facing.clamp(min=0) * torch.exp(-2 * below) * (1 - 0.5 * view.snowy)
        sand = ground * shade[:, None] + view.sun * gleam[:, None]
        haze = (0.30 - 0.10 * index + 0.40 * view.misty) * (1 - 0.3 * index) * (0.4 + 0.6 * below)
        sand = torch.lerp(sand, view.low * 0.85, haze.clamp(0, 1)[:, None])
        covered = view.edge(y - crest)
        picture = torch.lerp(picture, sand, covered[:, None])
        pool = torch.exp(-(((x - view.centre_x) / 0.38) ** 2)) * (0.20 + 0.42 * torch.exp(-1.8 * below))
        pool = pool * torch.exp(-(((crest - view.centre_y).clamp(min=0) / 0.5) ** 2))
        lit = torch.lerp(lit, 0.45 * _air_light(view) + 0.62 * pool, covered)
    return picture, lit


def _city(view: _View, picture: Tensor, lit: Tensor) -> tuple[Tensor, Tensor]:
    """Two rows of houses with lit windows behind water that mirrors them."""
    x, y, relief = view.x, view.y, view.relief
    lamp = _colour(_LAMP, None, x)
    ground = _ground(view, CITY, 0.0) * view.ambient
    snow = _colour(_SNOW, None, x) * view.ambient
    after_dark = 0.10 + 0.30 * view.sunset + 0.62 * view.night
    for row, (size, quay, tallest, dark) in enumerate(_HOUSES):
        street = x / size + relief * (1.3 + row)
        house = torch.floor(street)
        inside = torch.frac(street) - 0.5
        half = 0.36 + 0.10 * _fraction(house * 5.17 + relief * 3)
        tall = tallest * (0.25 + 0.75 * (0.5 + 0.5 * torch.sin(house * 2.4 + relief * (2 + row))))
        line = view.horizon - 0.6 * quay
        roof = torch.where(inside.abs() < half, view.horizon - quay - tall, line)
        walls = view.edge((half - inside.abs()) * size, 0.010) * view.edge(y - roof)
        covered = torch.maximum(walls, view.edge(y - line))
        wall = view.low * (0.62 * (1 - dark)) + view.middle * 0.20 + ground * dark
        haze = 0.40 * _smooth((y - view.horizon + 0.20) / 0.20) * (1 - 0.45 * row)
        wall = torch.lerp(wall, view.low * 0.9, haze[:, None])
        capped = 0.75 * view.snowy * torch.exp(-(y - roof).clamp(min=0) / 0.022) * (inside.abs() < half)
        picture = torch.lerp(picture, torch.lerp(wall, snow, capped[:, None]), covered[:, None])
        across, storey = inside * (3 + row) + 8, (y - roof) / 0.058
        home = _fraction(torch.floor(across) * 9.7 + torch.floor(storey) * 37.1 + house * 17.3 + relief) > 0.45
        pane = ((torch.frac(across) - 0.5) / 0.27) ** 4 + ((torch.frac(storey) - 0.5) / 0.27) ** 4
        window = torch.exp(-pane) * home * walls * view.edge(y - roof - 0.03) * view.edge(view.horizon - 0.012 - y)
        picture = screen(picture, (window * after_dark * (0.45 + 0.55 * row))[:, None] * lamp)
    near = ((y - view.horizon) / (1 - view.horizon)).clamp(0, 1)
    shadow = torch.exp(-near / 0.42)[:, None]
    lights = (0.1 + 0.4 * view.sunset + 0.7 * view.night) * (0.55 + 0.45 * torch.sin(x * 23 + relief * 4))
    reflected = _gradient(view, 0.8 * near) * (1 - 0.55 * shadow) + 0.30 * shadow * lights[:, None] * lamp
    return _water(view, picture, lit, reflected, _ground(view, CITY, 0.34))


def _mist(view: _View, picture: Tensor) -> Tensor:
    """Banks along the horizon that wander, and a thin veil everywhere; snow in the air is a veil, too."""
    x, relief = view.x, view.relief
    height = view.y - view.horizon - 0.03 - 0.035 * torch.sin(2.3 * x + relief + view.angle(0.03))
    band = torch.exp(-((height / (0.20 + 0.05 * torch.sin(1.3 * x - 2 * relief - view.angle(0.02)))) ** 2))
    dark = view.night[:, None]
    colour = view.low * (0.80 + 0.25 * dark) + view.middle * 0.12 + view.ambient * (0.10 + 0.12 * dark)
    colour = colour + view.sun * (view.power * 0.22 * torch.exp(-((view.away() / 0.5) ** 2)))[:, None]
    veil = view.misty * (0.34 + 0.50 * band) + 0.22 * view.snowy
    return torch.lerp(picture, colour.clamp(0, 1), veil.clamp(0, 0.9)[:, None])


def shape(kind: int, x: Tensor, y: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A subject's body (opacity), white heat in its heart, and distance from it; coordinates and pixel in radii."""

    def soft(distance: Tensor, width: float) -> Tensor:
        return torch.sigmoid(-4 * distance / pixel.clamp(min=width))

    r = (x * x + y * y + 1e-6).sqrt()
    if kind == BALL:
        return soft(r - 1, 0.22), torch.exp(-((r / 0.68) ** 2.4)), r - 1
    if kind == STAR:  # four points
        reach = (x.abs() ** 0.66 + y.abs() ** 0.66 + 1e-6) ** (1 / 0.66) - 1.8
        body = torch.maximum(soft(0.45 * reach, 0.24), soft(r - 0.60, 0.26)) * (1 - 0.30 * _smooth(r / 1.6))
        return body, torch.exp(-((r / 0.54) ** 1.7)), r - 0.8
    if kind == LANTERN:
        side = ((x / 0.78).abs() ** 3 + (y / 1.15).abs() ** 3 + 1e-6) ** (1 / 3) - 1
        ribs = 1 - 0.10 * torch.cos(15 * y).clamp(min=0)
        heart = torch.exp(-((x / 0.52) ** 2) - ((y - 0.20) / 0.74) ** 2) * ribs
        return soft(0.85 * side, 0.18), heart * (1 - 0.75 * torch.sigmoid((y.abs() - 0.92) * 14)), 0.85 * side
    hollow = (x * x + (y + 0.64) ** 2 + 1e-6).sqrt()  # open above, as it looks in a mirror: no word names a side
    outside = torch.maximum(r - 1.12, 0.86 - hollow)
    return soft(outside, 0.20), 0.95 * torch.sigmoid(-9 * (outside + 0.12)), outside


def _subject(view: _View, picture: Tensor) -> Tensor:
    """Halo, body and glowing heart of the subject."""
    x, y, pixel = (value / view.radius for value in (view.x - view.centre_x, view.y - view.centre_y, view.pixel))
    body, heart, outside = (torch.zeros_like(x) for _ in range(3))
    for kind in range(len(ATTRIBUTES["subject"])):
        rows = (view.subject == kind).nonzero()[:, 0]
        if len(rows):
            body[rows], heart[rows], outside[rows] = shape(kind, x[rows], y[rows], pixel[rows])
    halo = torch.exp(-(outside + 0.25).clamp(min=0) / 0.55)
    breath = 1 + 0.04 * torch.sin(view.angle(0.5) + view.phase)
    picture = torch.lerp(picture, view.paint, (0.34 * (1 - 0.75 * view.night) * halo)[:, None])
    shine = (0.40 * view.spill * halo * (1 + 0.3 * view.misty) * breath).clamp(max=0.9)
    picture = screen(picture, shine[:, None] * view.paint)
    picture = torch.lerp(picture, view.paint * (0.86 + 0.14 * heart[:, None]), (0.96 * body)[:, None])
    heat = (0.30 + 0.70 * view.paint.sqrt()).clamp(max=1)
    return screen(picture, (0.95 * (heart * breath).clamp(0, 1))[:, None] * heat)
