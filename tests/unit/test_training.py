"""Training: the optimizer learns, every part makes a step and a file, a run can be continued from shipped weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from streamt2v.errors import ConfigError, NumericsError, OutputError, WeightsError
from streamt2v.training import data, denoisers, engine, judge, losses, parts, sheets
from streamt2v.training.captions import parse
from streamt2v.training.engine import Job
from streamt2v.training.loop import PARTS, train
from streamt2v.training.optimizer import Muon, orthogonalise
from streamt2v.training.vae import build_vae

MICRO = {"block_out_channels": (8, 8), "attention_levels": (True, False), "norm_num_groups": 2}


@pytest.fixture(autouse=True)
def micro_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two narrow levels, few clips, no sample sheets: every part in about a second."""
    from dataclasses import replace

    for name in ("BASE", "CONCATENATED", "IMAGE_TO_VIDEO", "REFINER"):
        monkeypatch.setattr(denoisers, name, replace(getattr(denoisers, name), **MICRO))
    monkeypatch.setattr(denoisers, "CAM", replace(denoisers.CAM, unet=replace(denoisers.CAM.unet, **MICRO)))
    small: Callable[..., data.Clips] = data.make_clips
    windows: Callable[..., data.Clips] = data.make_windows
    monkeypatch.setattr(parts, "make_clips", lambda vae, pairs, generator, late: small(vae, 2, generator, late))
    monkeypatch.setattr(
        parts, "make_windows", lambda vae, count, frames, size, generator: windows(vae, 2, 2, (48, 64), generator)
    )
    monkeypatch.setattr(parts, "text_sheet", lambda *args: "")
    monkeypatch.setattr(parts, "streaming_sheet", lambda *args: "")
    monkeypatch.setattr(judge, "FRAMES", 4)
    monkeypatch.setattr(judge, "held_out_accuracy", lambda network: {})
    monkeypatch.setattr(parts, "image_accuracy", lambda *args: {})
    monkeypatch.setattr(data.ClipSource, "refill", _one_shard(data.ClipSource.refill))


def _one_shard(refill: Callable[[data.ClipSource], None]) -> Callable[[data.ClipSource], None]:
    def refill_once(self: data.ClipSource) -> None:
        if not self.shards:
            self.enough = 40
            refill(self)

    return refill_once


def test_every_part_trains_on_what_the_parts_before_it_left(tmp_path: Path) -> None:
    for part in PARTS:
        lines: list[str] = []
        result = train(part, minutes=None, steps=2, out=tmp_path, seed=1, log=lines.append)
        assert result["steps"] == 2
        assert lines[-1].startswith("done: 2 steps")
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    networks = ["vae", "text", "vision", "unet", "cam", "apm", "concatenated", "image_to_video", "refiner", "judge"]
    assert files == {f"{name}.safetensors" for name in networks}
    assert (tmp_path / "tokenizer.json").is_file()

    before = load_file(tmp_path / "unet.safetensors")
    train("apm", minutes=None, steps=2, out=tmp_path, resume_from=tmp_path, seed=2)
    after = load_file(tmp_path / "unet.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    # CAM and APM off must stay the initializer: the base's own weights are frozen.
    assert changed
    assert all("cam_mergers" in key or ".apm." in key for key in changed)

    train("base", minutes=None, steps=1, out=tmp_path, resume_from=tmp_path, seed=3)
    resumed = load_file(tmp_path / "unet.safetensors")
    assert torch.equal(resumed["cam_mergers.mid.proj_in.weight"], after["cam_mergers.mid.proj_in.weight"])
    assert (resumed["conv_in.weight"] - after["conv_in.weight"]).abs().max() < 0.1


def test_a_part_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SHIPPED", tmp_path / "none")
    with pytest.raises(WeightsError, match="text"):
        train("base", minutes=None, steps=1, out=tmp_path)
    with pytest.raises(ConfigError, match="no part"):
        train("unet", minutes=1, steps=None, out=tmp_path)
    with pytest.raises(WeightsError, match=r"judge\.safetensors"):
        train("judge", minutes=None, steps=1, out=tmp_path, resume_from=tmp_path / "none")
    with pytest.raises(OutputError, match="file/out"):
        (tmp_path / "file").touch()
        train("judge", minutes=None, steps=1, out=tmp_path / "file" / "out")


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
    result = engine.run(job, tmp_path, None, 200, lambda line: None)
    assert result["loss"] < 0.8 * result["first_loss"]
    assert float(job.loss(1.0).detach()) < 0.8 * result["first_loss"]
    assert all(p.isfinite().all() for p in network.parameters())


def test_a_diverging_run_stops(tmp_path: Path) -> None:
    _, job = regression()
    job.loss = lambda progress: job.trained[0].sum() * float("nan")
    with pytest.raises(NumericsError, match="nan"):
        engine.run(job, tmp_path, None, 5, lambda line: None)


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


def test_pairs_differ_in_the_direction_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    from streamt2v.training.world import sample_scenes

    left = sample_scenes(1, generator, motion=0)
    both = data.join([data.Clips(torch.zeros(1, 4, 16, 9, 16), s, torch.zeros(1)) for s in (left, left.mirrored())])
    source = object.__new__(data.TextSource)
    for _ in range(20):
        first, second = source.captions(both.scenes, generator, drop=0.3, pairs=1)
        assert bool(first) == bool(second)
        assert parse(first)[:2] == parse(second)[:2]
        assert {parse(first)[2], parse(second)[2]} in ({0, 1}, {-1})


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
    share = denoisers.fading(8, 16)
    assert share[:8].tolist() == [1.0] * 8
    assert share[8:].tolist() == pytest.approx([0.75**k for k in range(1, 9)])


def test_what_follows_disturbed_conditioning_frames_joins_them_and_ends_nearly_right() -> None:
    generator = torch.Generator().manual_seed(3)
    vae = build_vae().eval()
    clips = data.make_clips(vae, 1, generator, late=1.0)
    changed = []
    for _ in range(8):
        pixels, latents = denoisers.conditioning(clips, vae, generator)
        assert pixels.shape == (2, 8, 3, 72, 128)
        assert latents.shape == clips.latents.shape
        off = (latents - clips.latents).abs().mean((0, 1, 3, 4))
        changed.append(bool(off.max() > 0))
        if changed[-1]:
            assert off[:8].min() > 0.5 * off.max()
            assert off[15] < 0.35 * off[7]
    assert {True, False} == set(changed)


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
