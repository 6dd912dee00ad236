"""The interpolator's sizes, triplets and loss: the frame between two others of a film, at any time between them.

The films are the refiner's, with exact truth. Their cameras move slowly: frames further apart, a window that moves over
the film, and parts of other films that pass in front add the rest.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from streamt2v.media.frames import to_float
from streamt2v.models.interpolator import Interpolator, InterpolatorConfig, merge
from streamt2v.training import bundle, photographs
from streamt2v.training.engine import Job
from streamt2v.training.photographs import Camera, FilmMaker
from streamt2v.training.restorer import Films, films_of

if TYPE_CHECKING:
    from streamt2v.training.parts import Workshop

INTERPOLATOR = InterpolatorConfig(
    widths=(48, 32),
    layers=3,
    head_width=8,
    head_channels=2,
    features=2,
    rounds=(3, 3, 3, 3, 0),
    sight=640 * 360,
)
PATCH, BATCH = 128, 4
FURTHEST = 8
"""Frames from the first to the second of a triplet, at most."""
FASTEST = 44
"""Pixels that the window or what passes in front moves from the first to the second, at most."""
PASSING = 0.4
"""Share of triplets in which something passes in front."""
STILL = 0.4
"""Share of triplets whose flow is known: nothing moves but windows over one frame."""
FLOW, FLOW_EPSILON = 0.3, 0.1
"""Weight of a known flow, and pixels that do not count."""
EPSILON = 0.5 / 255
"""Errors below half a level do not count: eight bits cannot show them."""
STEPS = (0.5, 1.0)
"""Weights of what the blocks make, coarsest first."""


@dataclass(frozen=True)
class Triplets:
    """Two frames and what lies between, [B, 3, P, P] in [0, 1].

    `time` [B, 1, 1, 1] is from 0 to 1. `flow` [B, 4, P, P] leads from the middle to the first and to the second, x and
    y in pixels, in the rows where it is `known` [B].
    """

    first: Tensor
    middle: Tensor
    second: Tensor
    time: Tensor
    flow: Tensor
    known: Tensor

    def to(self, device: str) -> Triplets:
        """Move everything to a device."""
        return Triplets(**{name: value.to(device) for name, value in vars(self).items()})


class TripletSource:
    """Triplets of films."""

    def __init__(self, films: Films, generator: torch.Generator) -> None:
        self.films, self.camera = films, Camera(generator)

    def draw(self, count: int) -> Triplets:
        """Draw triplets."""
        films = self.films.some()
        rows = [self._still(films) if self.camera.happens(STILL) else self._moving(films) for _ in range(count)]
        shown, times, flows = zip(*rows, strict=True)
        first, middle, second = torch.stack(shown, dim=1).permute(0, 1, 4, 2, 3).float() / 255
        known = torch.tensor([flow is not None for flow in flows])
        none = torch.zeros(4, PATCH, PATCH)
        flow = torch.stack([none if flow is None else flow for flow in flows])
        return Triplets(first, middle, second, torch.tensor(times).view(-1, 1, 1, 1), flow, known)

    def _moving(self, films: int) -> tuple[Tensor, float, None]:
        """Return frames [3, P, P, 3] in levels, and the middle one's time."""
        camera = self.camera
        apart = 2 + camera.below(FURTHEST - 1)
        start, between = camera.below(photographs.CLIP_FRAMES - apart), 1 + camera.below(apart - 1)
        numbers = (start, start + between, start + apart)
        shown, _ = self._scene(films, numbers, numbers)
        for axis in (1, 2):
            if camera.happens(0.5):
                shown = shown.flip(axis)
        if camera.happens(0.5):
            shown = shown.transpose(1, 2)
        time = between / apart
        return (shown.flip(0), 1 - time, None) if camera.happens(0.5) else (shown, time, None)

    def _still(self, films: int) -> tuple[Tensor, float, Tensor]:
        """Return the same of one frame, over which only windows move: the flow is known."""
        apart = 2 + self.camera.below(FURTHEST - 1)
        numbers = (0, 1 + self.camera.below(apart - 1), apart)
        shown, flow = self._scene(films, numbers, (self.camera.below(photographs.CLIP_FRAMES),) * 3)
        return shown, numbers[1] / apart, flow

    def _scene(self, films: int, numbers: Sequence[int], filmed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return frames of a film under a window that moves, mostly with another's in front; the windows' flow."""
        camera, apart = self.camera, numbers[-1] - numbers[0]
        speed = self._speed(apart)
        shown, flow = self._window(camera.below(films), numbers, filmed, speed), flow_of(numbers, speed)
        if camera.happens(PASSING):
            speed = self._speed(apart)
            mask = passing(camera, numbers, speed)
            front = self._window(camera.below(films), numbers, filmed, speed)
            shown = shown.float().lerp(front.float(), mask).round()
            flow = torch.where(mask[1, ..., 0] > 0.5, flow_of(numbers, speed), flow)
        return shown, flow.expand(-1, PATCH, PATCH)

    def _speed(self, apart: int) -> tuple[int, int]:
        """Rows and columns per frame, whole ones so that the truth stays exact; mostly some."""
        if self.camera.happens(0.15):
            return 0, 0
        length, heading = self.camera.uniform(0, FASTEST) / apart, self.camera.uniform(0, 2 * math.pi)
        return round(length * math.sin(heading)), round(length * math.cos(heading))

    def _window(self, film: int, numbers: Sequence[int], filmed: Sequence[int], speed: tuple[int, int]) -> Tensor:
        """Return frames [3, P, P, 3] of a film under a window that moves; of two places the livelier one."""
        with self.films.opened(film) as opened:
            truth = opened.get_slice("truth")
            found = []
            for _ in range(2):
                ways = []
                for extent, step in zip(truth.get_shape()[1:3], speed, strict=True):
                    moved = [step * (number - numbers[0]) for number in numbers]
                    start = self.camera.below(extent - PATCH - abs(moved[-1]) + 1) - min(0, moved[-1])
                    ways.append([start + by for by in moved])
                windows = zip(filmed, *ways, strict=True)
                found.append(torch.stack([truth[frame, y : y + PATCH, x : x + PATCH] for frame, y, x in windows]))
        return max(found, key=lambda shown: float((shown[0].float() - shown[-1]).abs().mean()))


def flow_of(numbers: Sequence[int], speed: tuple[int, int]) -> Tensor:
    """Return where a window's content is in the first and second frame, seen from the middle: x, y, x, y [4, 1, 1]."""
    rows, columns = speed
    ways = [numbers[1] - number for number in (numbers[0], numbers[-1])]
    return torch.tensor([step * way for way in ways for step in (columns, rows)]).float().view(4, 1, 1)


def passing(camera: Camera, numbers: Sequence[int], speed: tuple[int, int]) -> Tensor:
    """Return where something in front is, [3, P, P, 1] from 0 to 1, moving as a window of that speed sees it."""
    coarse = torch.randn(1, 1, 7, 7, generator=camera.generator)
    whole = functional.interpolate(coarse, size=PATCH + 2 * FASTEST, mode="bicubic", align_corners=True)[0, 0]
    shape = ((whole - camera.uniform(0.2, 1.2)) * 16).clamp(0, 1)
    middle = numbers[0] + (numbers[-1] - numbers[0]) // 2
    places = [[FASTEST + step * (number - middle) for step in speed] for number in numbers]
    return torch.stack([shape[y : y + PATCH, x : x + PATCH] for y, x in places])[..., None]


def interpolation_loss(network: Interpolator, triplets: Triplets) -> Tensor:
    """Return the logarithm of the absolute error of each row, and where it is known that of the flow, of every block.

    So triplets weigh alike whether little or much of them can be known.
    """
    lost = triplets.time.new_zeros(())
    made = network.steps((triplets.first, triplets.second), triplets.time)
    for weight, (warped, flow, mask) in zip(STEPS, made, strict=True):
        lost = lost + weight * log_error(merge(warped, mask) - triplets.middle, EPSILON).mean()
        missed = log_error(flow - triplets.flow, FLOW_EPSILON)
        lost = lost + weight * FLOW * (missed * triplets.known).mean()
    return lost


def log_error(error: Tensor, least: float) -> Tensor:
    """Return the logarithm of the mean absolute error of each row [B, ...], to which `least` is added: [B]."""
    return (error.abs().flatten(1).mean(1) + least).log()


class Judge:
    """Clips of photographs that training does not see, and of the drawn world."""

    def __init__(self, pictures: Sequence[Image.Image], count: int = 4, seed: int = 3) -> None:
        maker = FilmMaker(pictures, torch.Generator().manual_seed(seed))
        made = [maker.filmed() for _ in range(count)] + [maker.drawn() for _ in range(count)]
        self.clips = [(to_float(clip) + 1) / 2 for clip in made]  # [F, 3, H, W] in [0, 1]

    @torch.no_grad()
    def gains(self, network: Interpolator) -> dict[str, float]:
        """Return the decibels won over the mean of both frames, by how far apart these are."""
        device = network.encode.cnn0.weight.device
        network.eval()
        found = {}
        for apart in (2, 4):
            errors = []
            for clip in self.clips:
                first, middle, second = (clip[[number]].to(device) for number in (0, apart // 2, apart))
                for made in (network(first, second, 0.5), (first + second) / 2):
                    errors.append(10 * ((made - middle).square().mean() + EPSILON**2).log10())
            found[f"{apart} apart"] = float((torch.stack(errors[1::2]) - torch.stack(errors[::2])).mean())
        network.train()
        return found


def fresh() -> Interpolator:
    """Return a network that begins with the guess, and the mean of both frames moved by it."""
    network = Interpolator(INTERPOLATOR)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lastconv" in name:
                parameter.zero_()
    return network


def interpolate_job(shop: Workshop) -> Job:
    """The interpolator, on the films of the refiner: photographs that lie in out/photographs and the drawn world.

    Raises:
        WeightsError: photographs are missing.
    """
    network = shop.resumed("interpolator", fresh()).to(memory_format=torch.channels_last)
    films, judged = films_of(shop)
    judge, source = Judge(judged), TripletSource(films, shop.generator)

    def report(folder: Path) -> str:
        return "dB: " + ", ".join(f"{kind} {gain:+.2f}" for kind, gain in judge.gains(network).items())

    return Job(
        lambda progress: interpolation_loss(network, source.draw(BATCH).to(shop.device)),
        list(network.parameters()),
        lambda folder: bundle.write(folder, "interpolator", network),
        report,
        adam=bundle.parameters_in(network, "beta", "cnn0"),
        learning_rate=3e-3,
        average=0.995,
        samples=BATCH,
        device=shop.device,
    )
