"""Training: the optimizer learns, every part makes a step and a file, a run goes on where it stopped."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from benchmarks import concatenation, judge
from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.errors import ConfigError, NumericsError, OutputError, WeightsError
from streamt2v.media import reading
from streamt2v.models.dit import SpacetimeTransformer
from streamt2v.models.unet3d import TextContext
from streamt2v.training import (
    PARTS,
    batches,
    bundle,
    denoisers,
    engine,
    interpolation,
    losses,
    parts,
    photographs,
    prior,
    restorer,
    sheets,
)
from streamt2v.training.batches import Ring
from streamt2v.training.denoisers import TextSource
from streamt2v.training.engine import Job
from streamt2v.training.loop import train
from streamt2v.training.optimizer import Muon, orthogonalise
from streamt2v.training.parts import JOBS
from streamt2v.training.world import clips, vae
from streamt2v.training.world.captions import build_tokenizer, parse
from streamt2v.training.world.encoders import build_text, build_vision
from streamt2v.training.world.scenes import CIRCLING, FLOATING, LEFT, RIGHT, RISING, Scenes, framed, subject_mask
from streamt2v.training.world.vae import altered, build_vae, disturbed, held_out
from tests.cli.helpers import call

MICRO = {
    "block_out_channels": (8, 8), "attention_levels": (True, False), "norm_num_groups": 2, "attention_head_dim": 8,
}  # fmt: skip


@cache
def few_held_out(count: int = 32, seed: int = 999) -> torch.Tensor:
    """Drawn once; every job looks at them."""
    return held_out(min(count, 4), seed)


@pytest.fixture(autouse=True)
def micro_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two narrow levels, few pictures and clips, no sample sheets: every part in about a second."""
    for module, name in ((denoisers, "BASE"), (denoisers, "IMAGE_TO_VIDEO"), (concatenation, "SIZES")):
        monkeypatch.setattr(module, name, replace(getattr(module, name), **MICRO))
    monkeypatch.setattr(denoisers, "CAM", replace(denoisers.CAM, unet=replace(denoisers.CAM.unet, **MICRO)))
    monkeypatch.setattr(parts, "Workshop", partial(parts.Workshop, first=0.002))
    monkeypatch.setattr("streamt2v.training.loop.Workshop", parts.Workshop)
    monkeypatch.setattr(Ring, "draw", _few(Ring.draw))
    monkeypatch.setattr(denoisers, "DIT", replace(denoisers.DIT, width=12, depth=1, heads=1))
    monkeypatch.setattr(parts, "PATCHES", 240)
    for module in (parts, clips):
        monkeypatch.setattr(module, "LONGEST", 10)
    for name in ("text_sheet", "streaming_sheet", "image_sheet", "spacetime_sheet"):
        monkeypatch.setattr(parts, name, lambda *args: "")
    monkeypatch.setattr(vae, "WIDTHS", (4, 4, 8, 8))
    monkeypatch.setattr(vae, "held_out", few_held_out)
    monkeypatch.setattr(parts, "image_accuracy", lambda *args: {})
    monkeypatch.setattr(prior, "recovered", partial(prior.recovered, count=4))


@pytest.fixture(autouse=True)
def two_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stripes instead of the photographs, one to judge on, filmed for a moment."""
    stripes = Image.fromarray(np.indices((400, 600)).sum(0).astype(np.uint8) // 8 * 64).convert("RGB")
    monkeypatch.setattr(photographs, "load", lambda folder: [stripes, stripes])
    monkeypatch.setattr(photographs, "SIZE", (104, 112))
    monkeypatch.setattr(photographs, "CLIP_FRAMES", 5)
    monkeypatch.setattr(interpolation, "FURTHEST", 4)
    monkeypatch.setattr(interpolation, "PATCH", 32)


def _few(draw):  # type: ignore[no-untyped-def]
    return lambda self, count, fresh: draw(self, count, 0.0, 4)


def test_every_part_trains_on_what_the_parts_before_it_left(tmp_path: Path) -> None:
    for part in JOBS:
        lines: list[str] = []
        result = train(part, minutes=None, steps=2, out=tmp_path, seed=1, log=lines.append)
        assert result["steps"] == 2
        assert lines[-1].startswith("done: 2 steps")
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    networks = ["vae", "text", "vision", "unet", "cam", "apm", "image_to_video", "prior", "refiner", "pixels"]
    networks += ["dit", "interpolator"]
    assert files == {f"{name}.safetensors" for name in networks}
    assert {path.name for path in (tmp_path / "restore").iterdir()} == {"refiner.safetensors", "pixels.safetensors"}
    assert (tmp_path / "tokenizer.json").is_file()
    table = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [row["part"] for row in table] == list(JOBS)
    assert all(row["samples"] > 0 and row["seconds"] > 0 for row in table)

    before = load_file(tmp_path / "unet.safetensors")
    train("apm", minutes=None, steps=2, out=tmp_path, resume_from=tmp_path, seed=2, afresh=True)
    after = load_file(tmp_path / "unet.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    # CAM and APM off must stay the initializer: the base's own weights are frozen.
    assert changed
    assert all("cam_mergers" in key or ".apm." in key for key in changed)

    train("base", minutes=None, steps=1, out=tmp_path, resume_from=tmp_path, seed=3, afresh=True)
    resumed = load_file(tmp_path / "unet.safetensors")
    assert torch.equal(resumed["cam_mergers.mid.proj_in.weight"], after["cam_mergers.mid.proj_in.weight"])
    assert (resumed["conv_in.weight"] - after["conv_in.weight"]).abs().max() < 0.1


def test_the_folder_of_the_transformer_is_a_model(tmp_path: Path) -> None:
    """Also where the parts before it came from elsewhere; what it lacks is said before anything loads."""
    for part in ("vae", "text", "vision"):
        train(part, minutes=None, steps=1, out=tmp_path / "before", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "SHIPPED", tmp_path / "before")
        train("dit", minutes=None, steps=3, out=tmp_path / "dit", seed=1)
    given = ["a red ball rising over the sea", "--model", tmp_path / "dit", "--frames", 5, "--steps", 1, "-q"]
    assert call("generate", *given, "-o", tmp_path / "out.mp4") == 0
    assert reading.probe(tmp_path / "out.mp4").width == 128
    (tmp_path / "dit" / "text.safetensors").unlink()
    assert call("generate", *given, "-o", tmp_path / "other.mp4") == 4


def test_the_refiner_of_footage_reports_every_kind_of_wear(tmp_path: Path) -> None:
    lines: list[str] = []
    train("restore", minutes=None, steps=1, out=tmp_path, log=lines.append)
    assert all(f"{kind} " in lines[-1] for kind in restorer.JUDGED)


def test_the_interpolator_reports_both_distances(tmp_path: Path) -> None:
    lines: list[str] = []
    train("interpolate", minutes=None, steps=1, out=tmp_path, log=lines.append)
    assert "2 apart " in lines[-1] and "4 apart " in lines[-1]


def test_the_parts_that_only_benchmarks_use_train_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "FRAMES", 4)
    monkeypatch.setattr(judge, "held_out_accuracy", lambda network: {})
    for part in ("vae", "text", "vision", "images", "apm"):
        train(part, minutes=None, steps=1, out=tmp_path)
    jobs = {"judge": judge.judge_job, "concatenated": concatenation.concatenated_job}
    for part in jobs:
        assert train(part, minutes=None, steps=2, out=tmp_path, jobs=jobs)["steps"] == 2
    before = load_file(tmp_path / "unet.safetensors")
    after = load_file(tmp_path / "concatenated.safetensors")
    assert not any("cam_mergers" in key for key in after)
    assert after["conv_in.weight"].shape[1] == 2 * before["conv_in.weight"].shape[1]
    assert after["conv_in.weight"][:, 4:].abs().max() > 0  # the new channels learn


@pytest.mark.parametrize("other", [True, False])
def test_parts_that_begin_at_one_moment_share_their_words(
    other: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(path: Path, text: bytes) -> None:
        if other:
            path.write_bytes(text)
        raise OutputError("the temporary file is gone")

    monkeypatch.setattr(bundle.files, "write_bytes", taken)
    if other:
        assert len(bundle.write_words(tmp_path)) > 50
    else:
        with pytest.raises(OutputError):
            bundle.write_words(tmp_path)


def test_images_leave_the_temporal_layers_alone(tmp_path: Path) -> None:
    for part in ("vae", "text", "vision", "images"):
        train(part, minutes=None, steps=1, out=tmp_path, seed=1)
    before = load_file(tmp_path / "unet.safetensors")
    train("images", minutes=None, steps=1, out=tmp_path, seed=1)
    after = load_file(tmp_path / "unet.safetensors")
    for key, value in before.items():
        alone = any(part in key for part in ("temp_convs", "temp_attentions", "transformer_in", "cam_mergers", ".apm."))
        assert torch.equal(value, after[key]) or not alone
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])


def test_a_run_in_pieces_is_the_run_in_one(tmp_path: Path) -> None:
    lines: list[str] = []
    train("text", minutes=None, steps=4, out=tmp_path / "one", seed=5, steady=True)
    train("text", minutes=None, steps=2, out=tmp_path / "two", seed=5, steady=True)
    # The warm-up begins anew with a piece, so the second piece is compared without it.
    result = train("text", minutes=None, steps=2, out=tmp_path / "two", seed=99, steady=True, log=lines.append)
    assert result["steps"] == 4
    assert lines[0].startswith("going on after 2 steps")
    one, two = (torch.load(tmp_path / name / "state" / "text.pt", weights_only=True) for name in ("one", "two"))
    assert torch.equal(one["generator"], two["generator"])
    for first, second in zip(one["trained"], two["trained"], strict=True):
        assert torch.allclose(first, second, atol=2e-2)
    fresh = train("text", minutes=None, steps=1, out=tmp_path / "two", seed=5, afresh=True)
    assert fresh["steps"] == 1


def test_state_of_other_networks_is_refused(tmp_path: Path) -> None:
    train("text", minutes=None, steps=1, out=tmp_path)
    (tmp_path / "state" / "text.pt").rename(tmp_path / "state" / "vae.pt")
    with pytest.raises(WeightsError, match="other sizes"):
        train("vae", minutes=None, steps=1, out=tmp_path)


def test_a_part_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SHIPPED", tmp_path / "none")
    with pytest.raises(WeightsError, match="unet"):
        train("base", minutes=None, steps=1, out=tmp_path)
    assert list(JOBS) == PARTS
    with pytest.raises(ConfigError, match="no part"):
        train("unet", minutes=1, steps=None, out=tmp_path)
    with pytest.raises(WeightsError, match=r"text\.safetensors"):
        train("text", minutes=None, steps=1, out=tmp_path, resume_from=tmp_path / "none")
    with pytest.raises(OutputError, match="file/out"):
        (tmp_path / "file").touch()
        train("text", minutes=None, steps=1, out=tmp_path / "file" / "out")


@pytest.mark.parametrize(("minutes", "steps"), [(None, None), (0.0, None), (None, 0), (-1.0, 5), (float("nan"), None)])
def test_training_without_a_limit_above_zero_is_refused(
    minutes: float | None, steps: int | None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="limit"):
        train("vae", minutes=minutes, steps=steps, out=tmp_path)


def regression(rate: float = 5e-2) -> tuple[nn.Module, Job]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    inputs, targets = torch.randn(64, 8), torch.randn(64, 4)
    job = Job(
        lambda progress: (network(inputs) - targets).square().mean(),
        list(network.parameters()),
        lambda folder: None,
        learning_rate=rate,
        average=0.9,
    )
    return network, job


def test_the_loop_lowers_the_loss_and_leaves_the_average_in_place(tmp_path: Path) -> None:
    network, job = regression()
    result = engine.run(job, tmp_path, None, 200, lambda line: None, torch.Generator())
    assert result["loss"] < 0.8 * result["first_loss"]
    assert float(job.loss(1.0).detach()) < 0.8 * result["first_loss"]
    assert all(p.isfinite().all() for p in network.parameters())


def test_weights_are_looked_at_less_often_than_they_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SAVE_MINUTES", 0.0)
    _, job = regression()
    saved, lines = [], list[str]()
    job.save = lambda folder: saved.append(folder)
    job.report = lambda folder: "looked"
    engine.run(job, tmp_path, None, 7, lines.append, torch.Generator())
    assert len(saved) == 8  # after every step, and at the end
    assert [line.endswith("looked") for line in lines] == [True, False, False, True, False, False, True, True]


def test_a_diverging_run_stops(tmp_path: Path) -> None:
    _, job = regression()
    job.loss = lambda progress: job.trained[0].sum() * float("nan")
    with pytest.raises(NumericsError, match="nan"):
        engine.run(job, tmp_path, None, 5, lambda line: None, torch.Generator())


def test_orthogonalised_updates_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(24, 8, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_muon_treats_vectors_and_marked_groups_like_adam() -> None:
    start = torch.randn(4, 4)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon, adam = Muon([{"params": [one], "adam": True}], lr=0.1), torch.optim.Adam([other], lr=0.1, betas=(0.9, 0.99))
    for _ in range(3):
        for parameter, optimizer in ((one, muon), (other, adam)):
            optimizer.zero_grad()
            (parameter**3).sum().backward()
            optimizer.step()
    assert torch.allclose(one, other, atol=1e-5)


def test_matrices_are_orthogonalised_together_as_alone() -> None:
    stack = torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(0))
    for together, one in zip(orthogonalise(stack), stack, strict=True):
        assert torch.allclose(together, orthogonalise(one), atol=1e-5)


def small_source(seed: int = 0) -> clips.WorldSource:
    return clips.WorldSource(build_vae().eval(), torch.Generator().manual_seed(seed), first=0.05)


def test_pairs_differ_in_the_motion_alone() -> None:
    source = small_source(2)
    seen = set()
    for _ in range(12):
        batch = source.clips(4, pairs=1)
        assert len(batch.captions) == 4
        if batch.pairs is not None:
            first, second = (parse(batch.captions[row]) for row in batch.pairs[0].tolist())
            assert first[:2] == second[:2]
            assert first[3:] == second[3:]
            motions = frozenset((first[2], second[2]))
            assert motions in ({LEFT, RIGHT}, {FLOATING, CIRCLING}, {-1})
            seen.add(motions)
            if motions == {LEFT, RIGHT}:
                assert torch.allclose(batch.mask[0].flip(-1), batch.mask[1], atol=1e-3)
    assert len(seen) > 1


@pytest.mark.parametrize("size", clips.SIZES)
@pytest.mark.parametrize("continued", [False, True])
def test_pieces_are_parts_of_longer_clips_of_many_sizes(size: tuple[int, int], continued: bool) -> None:
    source, cells = small_source(), (size[0] // 8, size[1] // 8)
    begins = set[int]()
    for length in (1, 4, 7):
        batch = source.pieces(2, size, length, continued)
        rows = source._long[size].rows
        assert batch.latents.shape == (2, 4, length, *cells)
        assert batch.mask.shape == (2, length, *cells)
        assert (batch.anchors is not None) == continued
        if batch.anchors is not None:
            assert batch.anchors.shape == (2, 3, *size)
        whole = rows["latents"].float()
        for piece, mask in zip(batch.latents, batch.mask, strict=True):
            found = [
                (row, begin)
                for row in range(len(whole))
                for begin in range(whole.shape[2] - length + 1)
                if torch.equal(whole[row, :, begin : begin + length], piece)
            ]
            assert found
            row, begin = found[0]
            begins.add(begin)
            scene = Scenes(**{name: rows[name][[row]] for name in Scenes.__dataclass_fields__})
            frames = rows["start"][[row], None] + begin + torch.arange(length)
            torch.testing.assert_close(mask[None], subject_mask(scene, frames, *cells, framed(*size)))
    assert (begins == {0}) != continued


def lesson(text: TextSource | None = None) -> denoisers.Lesson:
    tokenizer = build_tokenizer()
    text = text or TextSource(tokenizer, build_text(len(tokenizer)))
    generator = torch.Generator().manual_seed(0)
    return denoisers.Lesson(text, build_vae().eval(), build_vision(), torch.ones(4), generator)


def piece(rows: int, length: int, continued: bool) -> batches.Batch:
    torch.manual_seed(0)
    latents, mask = torch.randn(rows, 4, length, 3, 4), torch.rand(rows, length, 3, 4)
    captions = ["a red ball rising", "a blue star circling over the sea"] * (rows // 2)
    return batches.Batch(latents, captions, mask, anchors=torch.rand(rows, 3, 24, 32) if continued else None)


@pytest.mark.parametrize("length", [1, 2, 12])
def test_a_network_that_knows_the_clips_has_no_flow_matching_loss(length: int) -> None:
    batch = piece(8, length, continued=False)

    def knowing(noisy: torch.Tensor, sigmas: torch.Tensor, *_: object) -> torch.Tensor:
        assert (sigmas > 0).all() and (sigmas.std(1, unbiased=False) == 0).all()
        return (noisy - batch.latents) / sigmas[:, None, :, None, None]

    assert denoisers.spacetime_loss(knowing, batch, lesson()) < 1e-6  # type: ignore[arg-type]
    wrong = denoisers.spacetime_loss(lambda *given: knowing(*given) + 0.1, batch, lesson())  # type: ignore[arg-type]
    assert wrong == pytest.approx(0.01, rel=1e-3)


def test_known_frames_are_clean_and_count_nothing() -> None:
    batch, seen, losses_seen = piece(40, 12, continued=True), list[tuple[torch.Tensor, ...]](), list[float]()
    for garbage in (0.0, 100.0):

        def network(noisy: torch.Tensor, sigmas: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
            seen.append((noisy, sigmas, *more))
            return garbage * (sigmas == 0).float()[:, None, :, None, None].expand_as(noisy)  # noqa: B023

        losses_seen.append(float(denoisers.spacetime_loss(network, batch, lesson())))  # type: ignore[arg-type]
    assert losses_seen[0] == losses_seen[1] > 1
    noisy, sigmas, words, mask, _ = seen[0]
    known = (sigmas == 0).sum(1)
    assert known.min() >= 1 and known.max() == denoisers.MOST_KNOWN
    assert 0.4 < float((known == denoisers.MOST_KNOWN).float().mean()) < 0.8
    assert all(
        (row[: int(count)] == 0).all() and (row[int(count) :] > 0).all()
        for row, count in zip(sigmas, known, strict=True)
    )
    held = (sigmas == 0)[:, None, :, None, None].expand_as(noisy)
    off = (noisy - batch.latents)[held]
    assert off.abs().max() > 0.05  # as frames of a stream have it
    assert off.std() < 0.25
    assert words.shape[:2] == mask.shape
    assert 0 < mask.mean() < 1


def test_a_small_spacetime_transformer_learns(tmp_path: Path) -> None:
    """Four clips by heart, in seconds: half of what one that predicts nothing loses, on average over all steps."""
    torch.manual_seed(0)
    network = SpacetimeTransformer(replace(denoisers.DIT, width=48, depth=2, heads=2))
    shade = torch.linspace(-1, 1, 4).view(4, 1, 1, 1, 1) + torch.linspace(-1, 1, 6).view(6, 1, 1)
    batch, given = replace(piece(4, 6, continued=True), latents=shade.expand(4, 4, 6, 3, 4).clone()), lesson()
    job = Job(
        lambda progress: denoisers.spacetime_loss(network, batch, given),
        list(network.parameters()),
        lambda folder: None,
        adam=[network.embed.weight, network.head.weight],
        learning_rate=3e-3,
        average=0.9,
    )
    result = engine.run(job, tmp_path, None, 150, lambda line: None, given.generator)
    assert result["loss"] < result["first_loss"] / 2


class Recorder:
    """Stands for a picture-to-video network: it keeps what it sees and returns what it is told to."""

    def __init__(self, answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.answer, self.tokens, self.seen = answer, torch.empty(0), torch.empty(0)

    def prepare(self, text: TextContext) -> None:
        self.tokens = text.tokens

    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: None) -> torch.Tensor:
        self.seen = noisy
        return self.answer(noisy, timesteps)


@pytest.mark.parametrize("loop", [False, True])
def test_a_picture_is_dropped_with_the_text_or_but_for_its_embedding(loop: bool) -> None:
    network, batch, given = Recorder(lambda noisy, at: noisy[:, :4]), piece(420, 2, continued=True), lesson()
    batch = replace(batch, latents=batch.latents + 3)
    denoisers.image_to_video_loss(network, batch, given, loop)  # type: ignore[arg-type]
    assert network.seen.shape[1] == denoisers.IMAGE_TO_VIDEO.in_channels
    assert (network.seen[:, 8] == loop).all()
    assert network.tokens.shape[1] == denoisers.IMAGE_TO_VIDEO.text_tokens
    empty = given.text.encode([""]).tokens[0]
    text = (network.tokens[:, :-1] - empty).abs().amax((1, 2)) > 1e-3
    embedding, latents = network.tokens[:, -1].abs().amax(1) > 0, network.seen[:, 4:8].abs().amax((1, 2, 3, 4)) > 0
    found = Counter(zip(text.tolist(), embedding.tolist(), latents.tolist(), strict=True))
    shares = {
        (False, False, False): 0.1,
        (False, True, True): 0.1,
        (True, True, False): 1 / 7,
        (True, True, True): 0.66,
    }
    assert set(found) == set(shares)
    assert all(abs(found[case] / 420 - share) < 0.06 for case, share in shares.items())


def test_the_end_of_a_loop_counts_as_a_change() -> None:
    """An error of 1 in the last of four frames: one of three changes is wrong in a clip, two of four in a loop."""
    batch = replace(piece(2, 4, continued=True), mask=torch.zeros(2, 4, 3, 4))
    schedule, wrong = NoiseSchedule(losses.DEMO_SCHEDULE), torch.tensor([0.0, 0, 0, 1]).view(1, 1, 4, 1, 1)
    network = Recorder(lambda noisy, at: losses.towards(schedule, batch.latents, noisy[:, :4], at) + wrong)
    for loop, wanted in ((False, 1 / 4 + 0.5 / 3), (True, 1 / 4 + 0.5 * 2 / 4)):
        loss = denoisers.image_to_video_loss(network, batch, lesson(), loop)  # type: ignore[arg-type]
        assert float(loss) == pytest.approx(wanted, rel=1e-3)


def test_loops_repeat_exactly() -> None:
    source = small_source()
    batch = source.first_frames(4, loop=True)
    rows = source._loops.rows
    scenes = Scenes(**{name: rows[name] for name in Scenes.__dataclass_fields__})
    assert (scenes.period == clips.CLIP_FRAMES).all()
    first, again = (clips.render(scenes, rows["start"][:, None] + frame)[:, 0] for frame in (0, clips.CLIP_FRAMES))
    torch.testing.assert_close(first, again, rtol=0, atol=2e-3)
    assert batch.latents.shape == (4, 4, clips.CLIP_FRAMES, 9, 16)
    assert not len(source._late)


def test_a_ring_grows_and_then_forgets_the_oldest(tmp_path: Path) -> None:
    made = iter(range(100))

    def make(count: int) -> batches.Rows:
        return {"number": torch.tensor([next(made) for _ in range(count)])}

    ring = Ring(make, 10, 4, torch.Generator().manual_seed(0), tmp_path / "ring.pt")
    assert set(batches.Ring.draw(ring, 50, 0.0)["number"].tolist()) <= set(range(4))
    for _ in range(4):
        ring.add(make(4))
    assert sorted(ring.rows["number"].tolist()) == list(range(10, 20))
    ring.save()
    again = Ring(make, 10, 4, torch.Generator(), tmp_path / "ring.pt")
    assert torch.equal(again.rows["number"], ring.rows["number"])


def test_rows_of_a_batch_join_to_the_batch() -> None:
    batch = small_source().chunks(3)
    joined = batches.join(batch.take([0, 1]), batch.take([2]))
    assert batch.shown is not None
    assert joined.shown is not None
    assert torch.equal(joined.latents, batch.latents)
    assert torch.equal(joined.shown, batch.shown)
    assert joined.captions == batch.captions


def test_known_frames_that_move_slowly_lead_to_true_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    source, frames = small_source(), 30 + torch.arange(16).expand(300, -1)
    found, slow = source._slowed(frames)
    assert 0.16 < slow.float().mean() < 0.34
    assert torch.equal(found[:, 7:], frames[:, 7:].float())
    assert torch.allclose(found[~slow], frames[~slow].float())
    steps = found[slow, :8].diff(dim=1)
    assert (steps >= 0).all()
    assert (steps < 1).all()
    assert 0.3 < (steps == 0).all(dim=1).float().mean() < 0.7  # half of them stand still
    monkeypatch.setattr(source, "_slowed", lambda frames: (torch.full_like(frames, 9), torch.tensor([False, True])))
    monkeypatch.setattr(source, "_conditioning", lambda _, latents, __: (None, latents))
    changes = source.chunks(2).latents.diff(dim=2).abs().amax(dim=(1, 3, 4))  # [B, F-1]
    assert changes[1, :7].max() < 1e-5
    assert changes[0, :7].min() > 1e-3


def test_a_light_counts_where_it_was_last_known_too() -> None:
    mask = torch.zeros(1, 16, 2, 3)
    mask[:, :7, 0, 0], mask[:, 7, 0, 1], mask[:, 8:, 0, 2] = 1.0, 0.5, 0.8
    found = denoisers.lasting(mask)
    assert torch.equal(found[:, :8], mask[:, :8])
    assert (found[:, 8:, 0] == torch.tensor([0.0, 0.5, 0.8])).all()
    assert not found[:, 8:, 1].any()


def test_darks_are_drawn_apart() -> None:
    levels = torch.tensor([0.0, 5.0, 200.0, 205.0, 255.0]) / 127.5 - 1
    seen = vae.lightened(levels)
    assert (seen.diff() > 0).all()
    assert seen[1] - seen[0] > 3 * (seen[3] - seen[2])
    assert torch.isfinite(vae.lightened(torch.tensor([-3.0, 3.0]))).all()  # of what a decoder may make


def test_lights_that_leave_are_seen_often(monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_source(3)
    monkeypatch.setattr(source, "_drawn", lambda scenes, frames, _: torch.zeros(*frames.shape, 3, 8, 8))
    rows = source._make_clips(800, late=1.0)
    scenes = clips.scenes_of(rows)
    frames = rows["start"][:, None] + torch.arange(16)
    jumps = (clips.positions(scenes, frames).diff(dim=1).abs() > 0.5).any(2).any(1)
    through = scenes.motion.unsqueeze(1).eq(torch.tensor([LEFT, RIGHT, RISING])).any(1)
    assert not jumps[~through].any()
    assert 0.55 < jumps[through].float().mean() < 0.75  # half, and those by chance
    assert rows["start"].min() >= 0


def test_mistakes_stay_near_the_clip_they_began_from() -> None:
    clean = torch.randn(2, 4, 4, 9, 16, generator=torch.Generator().manual_seed(0))
    schedule = NoiseSchedule(losses.DEMO_SCHEDULE)

    def oracle(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return losses.towards(schedule, clean, noisy, timesteps)

    own = denoisers.own_states(oracle, clean, 6, torch.Generator().manual_seed(1))
    assert (own - clean).abs().max() < 1e-3  # a network without mistakes comes back to the clip
    off = denoisers.own_states(lambda x, t: oracle(x, t) + 0.2, clean, 6, torch.Generator().manual_seed(1))
    assert (off - clean).abs().mean() > 0.01


def test_the_target_from_plain_noise_is_the_velocity() -> None:
    schedule = NoiseSchedule(losses.DEMO_SCHEDULE)
    clean, noise = torch.randn(2, 3, 4, 2, 5, 5)
    timesteps = torch.tensor([999, 500, 40])
    noisy = schedule.add_noise(clean, noise, timesteps)
    target = losses.towards(schedule, clean, noisy, timesteps)
    assert torch.allclose(target, schedule.velocity(clean, noise, timesteps), atol=1e-4)
    # From anywhere else it still leads to the clean latents.
    moved = noisy + 0.3
    back, _ = schedule.to_x0_eps(losses.towards(schedule, clean, moved, timesteps), moved, timesteps)
    assert torch.allclose(back, clean, atol=1e-3)


def test_a_quarter_of_the_rows_stays_plain_and_mistakes_count_by_the_clean_estimate() -> None:
    schedule, generator = NoiseSchedule(losses.DEMO_SCHEDULE), torch.Generator().manual_seed(0)
    clean, own, noise = torch.randn(3, 8, 4, 2, 3, 3, generator=generator)
    timesteps = torch.full((8,), 950)
    noisy, at, target, factor = denoisers._noised(clean, own, timesteps, noise, generator)
    assert torch.equal(noisy[:2], schedule.add_noise(clean[:2], noise[:2], timesteps[:2]))
    assert (at[:2] == 950).all()
    assert (factor[:2] == 1).all()
    assert (at[2:] <= 700).all()
    estimate, _ = schedule.to_x0_eps(target, noisy, at)
    assert torch.allclose(estimate, clean, atol=1e-3)
    # An error of 1 in the clean estimate is one of 1 / sigma in the velocity, and of 1 with the factor.
    assert torch.allclose(factor[2:].flatten(), schedule.sigmas[at[2:]], atol=1e-6)


def test_channels_count_by_what_they_do_to_pixels() -> None:
    decoder = build_vae().eval()
    with torch.no_grad():
        decoder.post_quant_conv.weight.zero_()
        decoder.post_quant_conv.weight[0, 0] = 1.0
    effect = losses.pixel_effect(decoder, torch.randn(2, 4, 9, 16))
    assert effect.mean() == pytest.approx(1.0)
    assert effect[1:].max() == 0


def test_altered_latents_fit_altered_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(40):
        latents, pixels = torch.randn(1, 4, 9, 16), torch.randn(1, 3, 72, 128)
        z, x, m = altered(latents, pixels, torch.zeros(1, 1, 72, 128), generator)
        assert x.shape[-2:] == (8 * z.shape[-2], 8 * z.shape[-1]) == m.shape[-2:]
        sizes.add(z.shape[-2])
    assert sizes == {9, 7, 6, 5}


def test_the_pair_contrast_sees_differences_only() -> None:
    target = torch.randn(2, 4, 16, 9, 16)
    mask, pairs, late = torch.rand(2, 16, 9, 16), torch.tensor([[0, 1]]), torch.tensor([900, 900])
    assert losses.pair_contrast(target + 0.7, target, pairs, late, mask) < 1e-10
    assert losses.pair_contrast(target.flip(0), target, pairs, late, mask) > 1
    assert losses.pair_contrast(target.flip(0), target, pairs, late - 500, mask) == 0


def test_a_steady_error_does_not_flicker() -> None:
    target, mask = torch.randn(2, 4, 16, 9, 16), torch.rand(2, 16, 9, 16)
    assert losses.flicker_error(target + torch.randn(2, 4, 1, 9, 16), target, mask) < 1e-10
    alternating = torch.tensor([1.0, -1.0]).repeat(8).view(1, 1, 16, 1, 1)
    assert losses.flicker_error(target + alternating, target, mask) == pytest.approx(2.0, rel=1e-4)


def test_the_tone_is_the_mean_of_a_frame() -> None:
    target, counts = torch.randn(2, 4, 16, 8, 16), denoisers.importance(8, 16)
    checked = torch.ones(8, 16)
    checked[::2, ::2] = checked[1::2, 1::2] = -1.0
    assert losses.tone_error(target + checked, target, counts) < 1e-10
    assert losses.tone_error(target + 0.5, target, counts) == pytest.approx(4.0, rel=1e-4)
    steep = [losses.tone_error(_off(target, frame), target, counts) for frame in (0, 8)]
    assert steep[1] / steep[0] == pytest.approx(4.0, rel=1e-3)


def test_frames_count_in_the_loss_as_they_count_in_a_stream() -> None:
    counts = denoisers.importance(8, 16)
    assert counts.tolist() == [0.5] * 8 + [2.0, 1.5] + [1.0] * 6
    assert denoisers.importance(8, 9).tolist() == [0.5] * 8 + [2.0]
    target, mask = torch.zeros(1, 4, 16, 9, 16), torch.zeros(1, 16, 9, 16)
    wrong = [losses.weighted_error(_off(target, frame), target, mask, counts) for frame in (0, 8, 15)]
    assert wrong[1] / wrong[0] == pytest.approx(4.0)
    assert wrong[1] / wrong[2] == pytest.approx(2.0)
    assert losses.weighted_error(target + 1, target, mask, counts) == pytest.approx(1.0)


def _off(target: torch.Tensor, frame: int) -> torch.Tensor:
    wrong = target.clone()
    wrong[:, :, frame] += 1
    return wrong


def test_an_error_of_the_conditioning_frames_fades_after_them() -> None:
    share = clips.fading(8, 16)
    assert share[:8].tolist() == [1.0] * 8
    assert share[8:].tolist() == pytest.approx([0.75**k for k in range(1, 9)])


def test_what_follows_disturbed_conditioning_frames_joins_them_and_ends_nearly_right() -> None:
    source = small_source(3)
    source.chunks(1)
    rows = {name: column[:2] for name, column in source._late.rows.items()}
    plain = rows["latents"].float()
    changed = []
    for _ in range(8):
        pixels, latents = source._conditioning(rows, plain, clips._frames(rows))
        assert pixels.shape == (2, 8, 3, 72, 128)
        assert latents.shape == plain.shape
        off = (latents - plain).abs().mean((0, 1, 3, 4))
        changed.append(bool(off.max() > 0))
        if changed[-1]:
            assert off[:8].min() > 0.5 * off.max()
            assert off[15] < 0.35 * off[7]
    assert {True, False} == set(changed)


def test_disturbed_latents_keep_their_place_and_their_variance() -> None:
    latents = torch.randn(400, 4, 9, 16, generator=torch.Generator().manual_seed(0))
    moved = disturbed(latents, torch.Generator().manual_seed(1))
    off = (moved - latents).square().mean((1, 2, 3))
    assert 0.3 < float((off == 0).float().mean()) < 0.5
    assert float(off.max()) < 1.2
    along = (moved * latents).mean((1, 2, 3))
    assert float(along.min()) > 0.15  # what they say is still there


def test_timesteps_cover_the_range_and_lean_towards_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    flat, leaning = (losses.draw_timesteps(1000, generator, power) for power in (1.0, 0.5))
    assert flat.min() < 5
    assert leaning.max() > 994
    assert abs(flat.float().mean() - 500) < 10
    assert leaning.float().mean() > 640


def test_the_seam_measure_finds_a_jump() -> None:
    frames = torch.zeros(1, 32, 3, 4, 4)
    frames[:, 16:] = 1.0
    seam, inside = sheets.seam_change(frames)
    assert seam == pytest.approx(0.5)
    assert inside == 0.0
