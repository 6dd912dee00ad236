"""The refiner's sizes, schedule and loss: restore clips from photographs and the drawn world at any noise level.

Most rows show what SDEdit starts from, the source with a little noise, and ask for the truth: a faithful refiner. The
others are on the way of a run from much noise: the state holds some of the truth already, which is to be kept.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig
from streamt2v.models.restorer import PixelCodec, PixelCodecConfig, Restorer, RestorerConfig
from streamt2v.models.unet3d import Conditioning
from streamt2v.training import bundle, photographs
from streamt2v.training.engine import Job
from streamt2v.training.photographs import Pair, PairSource, Wear
from streamt2v.weights import save_module

if TYPE_CHECKING:
    from streamt2v.training.parts import Workshop

REFINER = RestorerConfig()
FACTOR = 2
REFINER_SCHEDULE = ScheduleConfig(kind="cosine_logsnr", prediction="sample")
PATCH, PATCH_FRAMES = 64, 5
EPSILON = (1 / 255) ** 2
"""Square of half a level: errors far below what eight bits can show do not count."""
FLICKER = 0.3
"""Weight of errors that change from frame to frame, beside that of all errors."""
FAITHFUL_SHARE, FAITHFUL_LEVELS, LEVELS = 0.8, 20, 700
NOISY_WEIGHT = 0.3
"""Weight of a row that is not faithful: the restoration leads."""
JUDGED = {
    "x2": Wear(2),
    "x2 blurred": Wear(2, blur=0.5),
    "x2 noisy": Wear(2, grain=3),
    "x2 crf 30": Wear(2, crf=30),
    "x4": Wear(4),
    "x1": Wear(1),
    "x1 crf 30": Wear(1, crf=30),
    "world x10": Wear(10, blur=0.4, chroma=False),
}
"""What the reports tell apart."""
JUDGED_OF = 10
"""One photograph in so many is only judged on."""


@dataclass(frozen=True)
class Patches:
    """A batch of clips [B, 3, F, P, P] in [-1, 1], and how many times each was enlarged [B]."""

    truth: Tensor
    source: Tensor
    scales: Tensor

    def to(self, device: str) -> Patches:
        """Move everything to a device."""
        return Patches(self.truth.to(device), self.source.to(device), self.scales.to(device))


class PatchSource:
    """Patches from the pairs made last; one new pair is made every few draws.

    Of several places the liveliest is taken half of the time: skies teach little.
    """

    def __init__(
        self, pairs: Iterator[Pair], generator: torch.Generator, kept: int = 48, draws_a_pair: int = 24
    ) -> None:
        self.pairs, self.generator, self.kept, self.draws_a_pair = pairs, generator, kept, draws_a_pair
        self.pool: list[Pair] = []
        self.draws = 0

    def draw(self, count: int) -> Patches:
        """Draw patches."""
        while len(self.pool) < min(self.kept, 16 + self.draws // self.draws_a_pair):
            self.pool.append(self._made())
        if self.draws % self.draws_a_pair == 0:
            self.pool[(self.draws // self.draws_a_pair) % len(self.pool)] = self._made()
        self.draws += 1
        rows = [self._patch(self.pool[self._below(len(self.pool))]) for _ in range(count)]
        truth, source = (torch.stack(clips).transpose(1, 2) for clips in ([r[0] for r in rows], [r[1] for r in rows]))
        return Patches(truth.float(), source.float(), torch.tensor([row[2] for row in rows]))

    def _made(self) -> Pair:
        pair = next(self.pairs)
        return Pair(pair.truth.half(), pair.source.half(), pair.scale)  # exact to a tenth of a level, half as large

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def _patch(self, pair: Pair) -> tuple[Tensor, Tensor, float]:
        frames, _, height, width = pair.truth.shape
        start = self._below(frames - PATCH_FRAMES + 1)
        tries = 3 if self._below(2) else 1
        best: tuple[float, int, int] | None = None
        for _ in range(tries):
            # Cells of the codec lie on a grid of the whole picture, source pixels on another: any offset occurs.
            top, left = self._below(height - PATCH + 1), self._below(width - PATCH + 1)
            part = pair.truth[start, :, top : top + PATCH, left : left + PATCH]
            lively = float(part.diff(dim=1).abs().mean() + part.diff(dim=2).abs().mean())
            best = max(best, (lively, top, left)) if best else (lively, top, left)
        assert best is not None
        _, top, left = best
        window = (slice(start, start + PATCH_FRAMES), slice(None), slice(top, top + PATCH), slice(left, left + PATCH))
        truth, source = pair.truth[window], pair.source[window]
        for axis in (2, 3):
            if self._below(2):
                truth, source = truth.flip(axis), source.flip(axis)
        if self._below(2):
            truth, source = truth.transpose(2, 3), source.transpose(2, 3)
        if self._below(2):
            truth, source = truth.flip(0), source.flip(0)
        return truth, source, pair.scale


def pack(clips: Tensor) -> Tensor:
    """Pixels [B, 3, F, H, W] to latents [B, C, F, h, w], as the pixel codec packs them."""
    return functional.pixel_unshuffle(clips.transpose(1, 2), FACTOR).transpose(1, 2)


def refiner_loss(network: Restorer, patches: Patches, schedule: NoiseSchedule, generator: torch.Generator) -> Tensor:
    """Return what is lost against the source, in logarithms of the squared error of each row: in decibels.

    So rows weigh alike whether their sources are a little or far from the truth; in levels those that nobody can
    restore would drown the others.
    """
    truth, source = pack(patches.truth), pack(patches.source)
    count = len(truth)
    faithful = torch.rand(count, generator=generator) < FAITHFUL_SHARE
    u = torch.rand(count, generator=generator)
    timesteps = torch.where(faithful, u * FAITHFUL_LEVELS, u * LEVELS).long()
    # How much of the source is left in the state: all of it at the start of a run, none of it late in one.
    left = torch.where(torch.rand(count, generator=generator) < 0.4, 1.0, torch.rand(count, generator=generator))
    left = torch.where(faithful, 1.0, left).view(-1, 1, 1, 1, 1).to(truth.device)
    noise = torch.randn(truth.shape, generator=generator).to(truth.device)
    timesteps, faithful = timesteps.to(truth.device), faithful.to(truth.device)
    noisy = schedule.add_noise(truth.lerp(source, left), noise, timesteps)
    conditioning = Conditioning((), patches.scales.log2().view(-1, 1))
    error, given = network(noisy, timesteps, conditioning, source) - truth, source - truth
    gains = log_error(given) - log_error(error)
    steady = log_error(given.diff(dim=2)) - log_error(error.diff(dim=2))
    weight = torch.where(faithful, 1.0, NOISY_WEIGHT)
    return -(weight * (gains + FLICKER * steady)).sum() / weight.sum()


def log_error(error: Tensor) -> Tensor:
    """Return the logarithm of the mean squared error of each row [B, ...]: [B]."""
    return (error.float().square().flatten(1).mean(1) + EPSILON).log()


class Judge:
    """Pairs of photographs that training does not see, and of the drawn world, one kind of wear beside the other."""

    def __init__(self, pictures: Sequence[Image.Image], count: int = 2, seed: int = 2) -> None:
        source = PairSource(pictures, torch.Generator().manual_seed(seed))
        self.pairs = {
            kind: [source.drawn(wear) if "world" in kind else source.filmed(wear) for _ in range(count)]
            for kind, wear in JUDGED.items()
        }

    @torch.no_grad()
    def gains(self, network: Restorer, schedule: NoiseSchedule) -> dict[str, float]:
        """Return the decibels won over the source for every kind, at the usual noise."""
        device = network.conv_out.weight.device
        found = {}
        for kind, pairs in self.pairs.items():
            gains = []
            for pair in pairs:
                truth, source = (pack(x[:6].transpose(0, 1)[None].to(device)) for x in (pair.truth, pair.source))
                truth, source = (x[..., : x.shape[-2] // 8 * 8, : x.shape[-1] // 8 * 8] for x in (truth, source))
                noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0)).to(device)
                time = torch.tensor([FAITHFUL_LEVELS // 2], device=device)
                told = Conditioning((), torch.tensor([[math.log2(pair.scale)]], device=device))
                made = network(schedule.add_noise(source, noise, time), time, told, source)
                gains.append(float(log_error(source - truth) - log_error(made - truth)))
            found[kind] = 10 / math.log(10) * sum(gains) / len(gains)
        return found


def fresh() -> Restorer:
    """Return a network that leaves its source as it is."""
    return Restorer(REFINER)


def save(folder: Path, network: Restorer) -> None:
    """Write the refiner and the codec that packs pixels for it."""
    save_module(folder / "refiner.safetensors", network, asdict(REFINER_SCHEDULE))
    save_module(folder / "pixels.safetensors", PixelCodec(PixelCodecConfig((3,) * (1 + FACTOR.bit_length() - 1))))


def refiner_job(shop: Workshop) -> Job:
    """The refiner, on photographs that lie in out/photographs and on the drawn world.

    Raises:
        WeightsError: photographs are missing.
    """
    network = shop.resumed("refiner", fresh())
    pictures = photographs.load(shop.out / "photographs")
    judge = Judge(pictures[::JUDGED_OF])
    trained = [picture for at, picture in enumerate(pictures) if at % JUDGED_OF]
    source = PatchSource(PairSource(trained, shop.generator).pairs(), shop.generator)
    schedule = NoiseSchedule(REFINER_SCHEDULE)
    batch = 8

    def loss(progress: float) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # pictures are made in full precision
            patches = source.draw(batch).to(shop.device)
        return refiner_loss(network, patches, schedule, shop.generator)

    def report(folder: Path) -> str:
        gains = judge.gains(network, schedule)
        return "dB: " + ", ".join(f"{kind} {gain:+.2f}" for kind, gain in gains.items())

    return Job(
        loss,
        list(network.parameters()),
        lambda folder: save(folder, network),
        report,
        # Layers at the rims and what is a sum over many of them: their steps must be small.
        adam=bundle.parameters_in(network, "enter", "conv_in", "conv_out", "embed", "spread"),
        # At twice that and half the batch the gains stood still from 200 to 600 steps.
        learning_rate=5e-4,
        average=0.999,
        samples=batch,
        device=shop.device,
        half=True,
    )
