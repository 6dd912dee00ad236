"""The footage refiner's sizes, schedule and loss: restore clips of photographs and the drawn world at any noise level.

Most rows show what SDEdit starts from, the source with a little noise, and ask for the truth: a faithful refiner. The
others are on the way of a run from much noise: the state holds some of the truth already, which is to be kept.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from streamt2v import files
from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig
from streamt2v.media.frames import to_float, to_u8
from streamt2v.models.restorer import PixelCodec, PixelCodecConfig, Restorer, RestorerConfig
from streamt2v.models.unet3d import Conditioning
from streamt2v.training import bundle, photographs
from streamt2v.training.engine import Job
from streamt2v.training.photographs import Camera, Film, FilmMaker, Wear, poorer
from streamt2v.weights import save_module

if TYPE_CHECKING:
    from streamt2v.training.parts import Workshop

RESTORER = RestorerConfig()
SCHEDULE = ScheduleConfig(kind="cosine_logsnr", prediction="sample")
PATCH, PATCH_FRAMES, AROUND = 64, 5, 16
EPSILON = (1 / 255) ** 2
"""Square of half a level: errors far below what eight bits can show do not count."""
SLIGHT = (2 / 127.5) ** 2
"""Square of two levels: a row whose source is no further from the truth counts half or less."""
DECIBELS = 10 / math.log(10)
"""Of a natural logarithm of squared errors."""
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


class Films:
    """Films on disk: some are made before the first draw, then one every few draws until there are enough.

    Films are what takes long to make, patches of them are cheap: a step sees more of them than it could wait for. Each
    has a seed of its own, so that those of an earlier run go on to serve.
    """

    def __init__(
        self, folder: Path, make: Callable[[int], Film], first: int = 40, most: int = 640, draws_a_film: int = 12
    ) -> None:
        self.folder, self.make, self.first, self.most, self.draws_a_film = folder, make, first, most, draws_a_film
        self.count = next(at for at in itertools.count() if not self._path(at).is_file())
        self.draws = 0

    def _path(self, at: int) -> Path:
        return self.folder / f"{at:04d}.safetensors"

    def some(self) -> int:
        """Return of how many films to draw, for one draw more."""
        due = self.first if self.draws == 0 else self.count + (self.draws % self.draws_a_film == 0)
        while self.count < min(due, self.most):
            if not self._path(self.count).is_file():  # another process may make films ahead
                self._write(self.make(self.count))
            self.count += 1
        self.draws += 1
        return self.count

    def _write(self, film: Film) -> None:
        tables: dict[str, np.ndarray[Any, Any]] = {"truth": film.truth, "drawn": np.array([film.drawn])}
        files.make_directory(self.folder)
        files.write_bytes(self._path(self.count), safetensors.numpy.save(tables))

    def opened(self, at: int) -> Any:
        """Open a film; parts of its tables are read as they are asked for."""
        return safetensors.safe_open(self._path(at), "pt")


class PatchSource:
    """Patches of films, made poorer as they are drawn: no two are alike.

    Of several places the liveliest is taken half of the time: skies teach little.
    """

    def __init__(self, films: Films, generator: torch.Generator) -> None:
        self.films, self.camera = films, Camera(generator)

    def draw(self, count: int) -> Patches:
        """Draw patches."""
        films = self.films.some()
        truth, source, scales = zip(*(self._patch(self.camera.below(films)) for _ in range(count)), strict=True)
        return Patches(torch.stack(truth), torch.stack(source), torch.tensor(scales))

    def _patch(self, at: int) -> tuple[Tensor, Tensor, float]:
        """Return truth and source [3, F, P, P], and the scale.

        A codec and a filter see more than the patch. Pixels of the source lie on the grid of cells as in a whole
        picture, where both begin at its edge: a network that had to find out how they lie would learn far less.
        """
        camera, around = self.camera, PATCH + 2 * AROUND
        with self.films.opened(at) as film:
            whole, drawn = film.get_slice("truth"), bool(film.get_tensor("drawn"))
            frames, height, width, _ = whole.get_shape()
            start = camera.below(frames - PATCH_FRAMES + 1)
            best: tuple[float, int, int] | None = None
            for _ in range(3 if camera.happens(0.5) else 1):
                top, left = camera.below(height - around + 1), camera.below(width - around + 1)
                part = whole[start, top : top + around, left : left + around].float()
                lively = float(part.diff(dim=0).abs().mean() + part.diff(dim=1).abs().mean())
                best = max(best, (lively, top, left)) if best else (lively, top, left)
            assert best is not None
            _, top, left = best
            shown = whole[start : start + PATCH_FRAMES, top : top + around, left : left + around]
        for axis in (1, 2):
            if camera.happens(0.5):
                shown = shown.flip(axis)
        if camera.happens(0.5):
            shown = shown.transpose(1, 2)
        if camera.happens(0.5):
            shown = shown.flip(0)
        truth, wear = to_float(shown.numpy()), Wear.draw(camera, drawn)
        source = to_float(to_u8(poorer(truth, wear, camera)))
        top, left = (RESTORER.factor * camera.below(2 * AROUND // RESTORER.factor + 1) for _ in range(2))
        patch = (slice(None), slice(None), slice(top, top + PATCH), slice(left, left + PATCH))
        return truth[patch].transpose(0, 1), source[patch].transpose(0, 1), around / wear.side(around)


def pack(clips: Tensor, factor: int = RESTORER.factor) -> Tensor:
    """Pixels [B, 3, F, H, W] to latents [B, C, F, h, w], as a pixel codec of `factor` packs them."""
    return functional.pixel_unshuffle(clips.transpose(1, 2), factor).transpose(1, 2)


def unpack(latents: Tensor, factor: int) -> Tensor:
    """Latents [B, C, F, h, w] to pixels [B, 3, F, H, W]."""
    return functional.pixel_shuffle(latents.transpose(1, 2), factor).transpose(1, 2)


def restoring_loss(
    network: Restorer, patches: Patches, schedule: NoiseSchedule, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return what is lost against the source, in logarithms of the squared error of each row: in decibels; and what is
    made, [B, 3, F, H, W].

    So rows weigh alike whether their sources are a little or far from the truth; in levels those that nobody can
    restore would drown the others. But a row whose source is as good as the truth counts little: a tenth of a level
    costs it more than the same change wins elsewhere, and until it is told apart nothing would change anywhere.
    """
    truth, source = (pack(clips, network.config.factor) for clips in (patches.truth, patches.source))
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
    made = network(noisy, timesteps, conditioning, source)
    error, given = made - truth, source - truth
    gains = log_error(given) - log_error(error)
    steady = log_error(given.diff(dim=2)) - log_error(error.diff(dim=2))
    harm = given.float().square().flatten(1).mean(1)
    weight = torch.where(faithful, 1.0, NOISY_WEIGHT) * harm / (harm + SLIGHT)
    return -(weight * (gains + FLICKER * steady)).sum() / weight.sum(), unpack(made, network.config.factor)


def log_error(error: Tensor) -> Tensor:
    """Return the logarithm of the mean squared error of each row [B, ...]: [B]."""
    return (error.float().square().flatten(1).mean(1) + EPSILON).log()


class Judge:
    """Pairs of photographs that training does not see, and of the drawn world, one kind of wear beside the other."""

    def __init__(self, pictures: Sequence[Image.Image], count: int = 2, seed: int = 2) -> None:
        maker = FilmMaker(pictures, torch.Generator().manual_seed(seed))
        filmed, drawn = ([to_float(make()[:6]) for _ in range(count)] for make in (maker.filmed, maker.drawn))
        self.pairs = {
            kind: [(truth, poorer(truth, wear, maker.camera)) for truth in (drawn if "world" in kind else filmed)]
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
                truth, source = (shown.transpose(0, 1)[None].to(device) for shown in pair)
                patches = Patches(truth, source, torch.tensor([JUDGED[kind].scale], device=device))
                error = restored(network, patches, schedule) - truth
                gains.append(float(log_error(source - truth) - log_error(error)))
            found[kind] = DECIBELS * sum(gains) / len(gains)
        return found


@torch.no_grad()
def restored(network: Restorer, patches: Patches, schedule: NoiseSchedule) -> Tensor:
    """Return what the network makes of the sources of patches at the usual noise, always the same: [B, 3, F, P, P]."""
    source = pack(patches.source, network.config.factor)
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0)).to(source.device)
    time = torch.tensor([FAITHFUL_LEVELS // 2], device=source.device)
    network.eval()
    made = network(
        schedule.add_noise(source, noise, time), time, Conditioning((), patches.scales.log2().view(-1, 1)), source
    )
    network.train()
    return unpack(made, network.config.factor)


def fresh() -> Restorer:
    """Return a network that leaves its source as it is."""
    return Restorer(RESTORER)


def save(folder: Path, network: Restorer) -> None:
    """Write a refiner of pixels and the codec that packs them for it."""
    save_module(folder / "refiner.safetensors", network, asdict(SCHEDULE))
    save_module(folder / "pixels.safetensors", PixelCodec(PixelCodecConfig((3,) * network.config.factor.bit_length())))


def films_of(shop: Workshop) -> tuple[Films, list[Image.Image]]:
    """Return the films in out/films, of the photographs in out/photographs, and those that are only judged on.

    Raises:
        WeightsError: photographs are missing.
    """
    pictures = photographs.load(shop.out / "photographs")
    trained = [picture for at, picture in enumerate(pictures) if at % JUDGED_OF]

    def film(at: int) -> Film:
        return FilmMaker(trained, torch.Generator().manual_seed(at)).make()

    return Films(shop.out / "films", film, max(1, int(40 * shop.first))), pictures[::JUDGED_OF]


def restore_job(shop: Workshop) -> Job:
    """The refiner of footage, on photographs in out/photographs and the drawn world; written to out/restore.

    Raises:
        WeightsError: photographs are missing.
    """
    network = shop.resumed("restore/refiner", fresh())
    films, judged = films_of(shop)
    judge, source = Judge(judged), PatchSource(films, shop.generator)
    schedule = NoiseSchedule(SCHEDULE)
    batch = 8

    def loss(progress: float) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # pictures are made in full precision
            patches = source.draw(batch).to(shop.device)
        return restoring_loss(network, patches, schedule, shop.generator)[0]

    def report(folder: Path) -> str:
        gains = judge.gains(network, schedule)
        return "dB: " + ", ".join(f"{kind} {gain:+.2f}" for kind, gain in gains.items())

    return Job(
        loss,
        list(network.parameters()),
        lambda folder: save(folder / "restore", network),
        report,
        adam=bundle.parameters_in(network, "conv_out", "embed"),
        learning_rate=1e-3,
        average=0.999,
        samples=batch,
        device=shop.device,
        half=True,
    )
