"""Pairs for the refiner: films of photographs keep their truth, and what is poorer stays in its place."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.errors import WeightsError
from streamt2v.media.frames import to_float, to_u8
from streamt2v.training import photographs, restorer
from streamt2v.training.photographs import Camera, Film, FilmMaker, Wear


def camera(seed: int) -> Camera:
    return Camera(torch.Generator().manual_seed(seed))


def picture(width: int = 400, height: int = 300) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    waves = 127 + 60 * np.sin(rows / 9) + 60 * np.cos(columns / 13)
    return Image.fromarray(np.stack([waves, waves[::-1], 255 - waves], -1).astype(np.uint8))


def test_every_photograph_is_listed_with_its_licence() -> None:
    rows = photographs.listed()
    assert len({row["name"] for row in rows}) == len(rows) >= 25
    for row in rows:
        assert set(row) == {"name", "package", "origin", "author", "licence", "sha256"}
        assert all(row.values()) and len(row["sha256"]) == 64
        assert row["licence"].startswith(("CC0", "CC-BY", "public domain"))
    text = (Path(__file__).parents[2] / "docs" / "photographs.md").read_text()
    assert all(row["name"] in text and row["author"] in text and row["sha256"] in text for row in rows)


def test_photographs_are_found_by_name_and_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="are not in") as caught:
        photographs.load(tmp_path / "nowhere")
    assert "docs/photographs.md" in str(caught.value.hint) and "scikit-image" in str(caught.value.hint)
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "a.png"
    picture(4000, 40).save(path)
    row = {"name": "a.png", "package": "p", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    monkeypatch.setattr(photographs, "listed", lambda: [row])
    assert [image.size for image in photographs.load(tmp_path)] == [(photographs.LONGEST, 30)]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="1 of 1"):
        photographs.load(tmp_path)


@pytest.fixture
def small_films(monkeypatch: pytest.MonkeyPatch) -> None:
    """A film takes seconds at its usual size."""
    monkeypatch.setattr(photographs, "SIZE", (104, 112))
    monkeypatch.setattr(photographs, "CLIP_FRAMES", 5)


@pytest.mark.usefixtures("small_films")
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_films_keep_the_size_of_their_truth_and_hang_on_the_seed_alone(seed: int) -> None:
    one, two = (FilmMaker([picture()], torch.Generator().manual_seed(seed)).make() for _ in range(2))
    assert np.array_equal(one.truth, two.truth) and one.drawn == two.drawn
    assert one.truth.shape == (photographs.CLIP_FRAMES, *photographs.SIZE, 3)


@pytest.mark.parametrize("scale", [1.0, 1.7, 2.0, 10.0])
def test_what_is_poorer_is_not_displaced(scale: float) -> None:
    """A bright spot stays where it is."""
    for seed in range(12):
        clip = torch.full((3, 3, 60, 80), -1.0)
        clip[:, :, 20:40, 40:60] = 1.0
        wear = replace(Wear.draw(camera(seed)), scale=scale)
        poor = (photographs.poorer(clip, wear, camera(seed)).mean((0, 1)) + 1).clamp(min=0.2) - 0.2
        rows, columns = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
        assert abs(float((rows * poor).sum() / poor.sum()) - 29.5) < 0.7
        assert abs(float((columns * poor).sum() / poor.sum()) - 49.5) < 0.7


def test_each_wear_costs_something_and_no_wear_nothing() -> None:
    truth = to_float(np.stack([np.asarray(picture(96, 64))] * 3))

    def error(wear: Wear) -> float:
        return float((photographs.poorer(truth, wear, camera(3)) - truth).square().mean())

    assert error(Wear(1, chroma=False)) == 0
    assert error(Wear(1)) < error(Wear(2)) < error(Wear(4))
    for rule in ("bilinear", "box", "lanczos"):
        assert 0 < error(Wear(2, rule=rule)) < 3 * error(Wear(2))
    harms = [{"blur": 0.6}, {"grain": 4}, {"crf": 32}, {"jpeg": 40}, {"levels": 24}]
    for harm in harms:
        assert error(Wear(2, **harm)) > 1.02 * error(Wear(2)), harm  # type: ignore[arg-type]
    assert error(Wear(1, grain=4)) == pytest.approx((4 / 127.5) ** 2, rel=0.5)
    grey, coarse = Wear(1, grain=4, grey=True), Wear(1, grain=4, coarse=True)
    assert len({error(Wear(1, grain=4)), error(grey), error(coarse)}) == 3


def test_half_of_the_wears_is_of_scale_alone_and_most_others_are_coded() -> None:
    of_one = camera(5)
    wears = [Wear.draw(of_one) for _ in range(600)]
    plain = [w for w in wears if w == Wear(w.scale)]
    assert 0.45 < len(plain) / len(wears) < 0.65
    assert 0.6 < sum(w.crf is not None for w in wears) / (len(wears) - len(plain)) < 0.9
    assert 0.4 < sum(w.scale == 2 for w in wears) / len(wears) < 0.6 and min(w.scale for w in wears) == 1
    soft = [w for w in (Wear.draw(of_one, drawn=True) for _ in range(200)) if w.blur and not w.chroma]
    assert 0.4 < len(soft) / 200 < 0.6 and not any(w.crf for w in soft)


def test_colours_are_halved_brightness_is_not() -> None:
    chart = np.zeros((2, 33, 57, 3), np.uint8)
    chart[:, :, ::2] = 255  # stripes of one pixel
    assert np.array_equal(photographs.halved_chroma(chart), chart)
    smooth = np.stack([np.asarray(picture(96, 64))] * 2)
    for shown in (photographs.halved_chroma(smooth), photographs.coded(smooth, 1)):
        assert abs(shown.mean() - smooth.mean()) < 0.2  # no darker, as plain conversion would make it
    chart[:, :, ::2, 1] = 0
    assert photographs.halved_chroma(chart).shape == chart.shape
    assert np.ptp(photographs.halved_chroma(chart)[..., 0].astype(int)) < 255


def test_the_codec_keeps_frames_and_odd_sizes() -> None:
    clip = np.stack([np.asarray(picture(57, 33))] * 4)
    for preset in ("veryfast", "medium"):
        assert photographs.coded(clip, 18, preset).shape == clip.shape
    good, bad = (np.abs(photographs.coded(clip, crf).astype(int) - clip).mean() for crf in (18, 37))
    assert good < bad < 30


def noise_film(at: int) -> Film:
    return Film(np.random.default_rng(at).integers(0, 256, (8, 100, 110, 3), np.uint8), False)


def test_patches_show_the_same_place_of_both_on_the_grid_of_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wear = Wear(2, rule="box", chroma=False)
    monkeypatch.setattr(Wear, "draw", lambda camera, drawn: wear)
    generator = torch.Generator().manual_seed(2)
    patches = restorer.PatchSource(restorer.Films(tmp_path, noise_film, 3), generator).draw(8)
    size = (8, 3, restorer.PATCH_FRAMES, restorer.PATCH, restorer.PATCH)
    assert patches.truth.shape == patches.source.shape == size and patches.truth.abs().max() <= 1
    assert patches.scales.tolist() == [2] * 8
    for truth, source in zip(patches.truth, patches.source, strict=True):
        alone = photographs.poorer(truth.transpose(0, 1), wear, camera(0)).transpose(0, 1)
        assert torch.allclose(alone[..., 8:-8, 8:-8], source[..., 8:-8, 8:-8], atol=2 / 127.5)
    assert len({float(patch.sum()) for patch in patches.truth}) == 8


def test_films_are_made_once_and_more_as_they_are_needed(tmp_path: Path) -> None:
    made: list[int] = []

    def make(at: int) -> Film:
        made.append(at)
        return noise_film(at)

    films = restorer.Films(tmp_path / "films", make, first=2, most=4, draws_a_film=3)
    assert [films.some() for _ in range(10)] == [2, 2, 2, 3, 3, 3, 4, 4, 4, 4] and made == [0, 1, 2, 3]
    assert restorer.Films(tmp_path / "films", make, first=2, most=4).some() == 4 and len(made) == 4
    with films.opened(3) as film:
        assert np.array_equal(film.get_tensor("truth").numpy(), noise_film(3).truth)


def test_frames_of_a_film_are_bytes() -> None:
    film = photographs.photograph_clip([picture()], (48, 64), camera(1))
    assert film.shape == (photographs.CLIP_FRAMES, 48, 64, 3) and film.dtype == np.uint8
    front = photographs.put_in_front(film, film[:, ::-1], camera(4))
    assert front.shape == film.shape and (front != film).any()
    assert np.array_equal(to_u8(to_float(film)), film)


class Told(torch.nn.Module):
    """A network that knows the truth, and tells a part of it."""

    config = restorer.RESTORER

    def __init__(self, truth: torch.Tensor, part: float) -> None:
        super().__init__()
        self.conv_out = torch.nn.Conv2d(1, 1, 1)
        self.truth, self.part = truth, part

    def forward(self, noisy: torch.Tensor, time: object, told: object, source: torch.Tensor) -> torch.Tensor:
        return source.lerp(self.truth, self.part)


def test_the_loss_counts_decibels_of_every_row_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(4, 3, 5, 16, 16, generator=generator)
    error = torch.randn(truth.shape, generator=generator)
    schedule = NoiseSchedule(restorer.SCHEDULE)

    def loss(size: float, part: float) -> float:
        patches = restorer.Patches(truth, truth + size * error, torch.full((4,), 2.0))
        network = Told(restorer.pack(truth), part)
        return float(restorer.restoring_loss(network, patches, schedule, generator)[0])  # type: ignore[arg-type]

    assert loss(0.1, 0.0) == 0
    for size in (0.03, 0.3):  # half of the error is left, whatever its size: a quarter of its square
        assert loss(size, 0.5) == pytest.approx((1 + restorer.FLICKER) * np.log(0.25), rel=0.05)
    assert loss(0.1, -0.5) > 0
    assert abs(loss(1e-4, 0.5)) < 0.01  # what eight bits do not show


def test_sources_as_good_as_the_truth_count_little() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 3, 5, 16, 16, generator=generator)
    error = torch.randn(truth.shape, generator=generator) * torch.tensor([0.1, 0.002]).view(2, 1, 1, 1, 1)
    packed = restorer.pack(truth)
    schedule = NoiseSchedule(restorer.SCHEDULE)

    def loss(moved: int) -> float:
        """One row gets an error of a level more, everywhere."""
        wrong = error.clone()
        wrong[moved] += 1 / 127.5
        network = Told(packed, 0.0)
        network.forward = lambda noisy, time, told, source: packed + restorer.pack(wrong)  # type: ignore[method-assign]
        patches = restorer.Patches(truth, truth + error, torch.full((2,), 2.0))
        return float(restorer.restoring_loss(network, patches, schedule, torch.Generator().manual_seed(1))[0])  # type: ignore[arg-type]

    assert 0 < loss(0) < loss(1) < 0.1


@pytest.mark.usefixtures("small_films")
def test_the_judge_tells_kinds_of_wear_apart() -> None:
    judge = restorer.Judge([picture()], count=1)
    schedule = NoiseSchedule(restorer.SCHEDULE)
    fresh = restorer.fresh()
    assert judge.gains(fresh, schedule) == dict.fromkeys(restorer.JUDGED, 0.0)
    for parameter in fresh.conv_out.parameters():
        torch.nn.init.constant_(parameter, 1.0)
    gains = judge.gains(fresh, schedule)
    assert all(gain < 0 for gain in gains.values()) and gains["x1"] < gains["x4"]
