"""The restoration network and the codec of pixels: they leave what they do not know, and no trick changes a number."""

from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamt2v.errors import ConfigError
from streamt2v.models import restorer
from streamt2v.models.encoders import decode_latents, encode_frames, latent_factor, latent_size
from streamt2v.models.restorer import PixelCodec, PixelCodecConfig, Restorer, RestorerConfig, cored, shift_frames
from streamt2v.models.unet3d import Conditioning, legal_canvas
from streamt2v.stages.refine import sees_source

SMALL = RestorerConfig(out_channels=12, block_out_channels=(16,), blocks=2, embedding=8)


def network(trained: bool = True) -> Restorer:
    torch.manual_seed(0)
    made = Restorer(SMALL).eval().requires_grad_(False)
    if trained:
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def told(made: Restorer, scale: float) -> Conditioning:
    return made.prepare(scale).rows(slice(1, 2))


def clips(batch: int, frames: int, height: int = 8, width: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy, source = torch.randn(2, batch, 12, frames, height, width, generator=generator)
    return noisy, source


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.floats(1, 10), st.integers(0, 999))
def test_a_fresh_network_leaves_its_source(frames: int, rows: int, columns: int, scale: float, timestep: int) -> None:
    made = network(trained=False)
    noisy, source = clips(1, frames, rows, columns)
    assert torch.equal(made(noisy, timestep, told(made, scale), source), source)


def test_everything_it_is_told_counts() -> None:
    made = network()
    noisy, source = clips(1, 5)
    plain = made(noisy, 10, told(made, 2), source)
    assert not torch.equal(made(noisy + 0.1, 10, told(made, 2), source), plain)
    assert not torch.equal(made(noisy, 300, told(made, 2), source), plain)
    assert not torch.equal(made(noisy, 10, told(made, 4), source), plain)
    for frame in range(5):  # also what lies three frames away, as many as there are blocks, and one
        other = source.clone()
        other[:, :, frame] += 0.1
        changed = (made(noisy, 10, told(made, 2), other) != plain).flatten(3).any(3).any(1)[0]
        assert all(changed[max(0, frame - 3) : frame + 4])


@torch.inference_mode()  # frame by frame only where nothing is learned
def test_pieces_batches_and_reuse_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made, (noisy, source) = network(), clips(2, 5)
    told = Conditioning((), torch.tensor([[1.0], [2.0]]))
    times = torch.tensor([10, 200])
    whole, deep = made.run(noisy, times, told, None, None, source)
    assert torch.allclose(made.run(noisy, times, told, None, deep, source)[0], whole, atol=1e-5)
    for row in range(2):
        rows = slice(row, row + 1)
        one = made(noisy[rows], times[rows], told.rows(rows), source[rows])
        assert torch.allclose(one, whole[rows], atol=1e-4)
    monkeypatch.setattr(restorer, "CELLS_AT_ONCE", 3 * 8 * 16)
    passed, features = made.run(noisy, times, told, None, None, source)
    assert torch.allclose(passed, whole, atol=1e-5)
    assert torch.allclose(features, deep, atol=1e-4)
    assert torch.equal(made.run(noisy, times, told, None, features, source)[0], passed)
    frames = [frame[0] for frame in source[:1].unbind(2)]
    one, other = (made(noisy[:1], 10, told.rows(slice(1)), given) for given in (source[:1], frames))
    assert torch.equal(one, other)
    unkept, none = made.run(noisy, times, told, None, None, source, keep=False)
    assert torch.equal(unkept, passed)
    assert none.numel() == 0


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 2))
def test_shifted_channels_come_from_the_neighbours(batch: int, frames: int, channels: int) -> None:
    x = torch.arange(batch * frames, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 6, 1, 1)
    shifted = shift_frames(x, frames, channels).view(batch, frames, 6)
    first = torch.arange(batch).view(-1, 1) * frames
    time = torch.arange(frames).view(1, -1)
    for channel in range(6):
        by = -1 if channel < channels else 1 if channel < 2 * channels else 0
        assert torch.equal(shifted[:, :, channel], (first + (time + by).clamp(0, frames - 1)).float())


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_the_codec_loses_nothing_of_eight_bits(frames: int, height: int, width: int, levels: int) -> None:
    codec = PixelCodec(PixelCodecConfig(block_out_channels=(3,) * (levels + 1)))
    assert latent_factor(codec) == 2**levels
    height, width = height * 2**levels, width * 2**levels
    pixels = torch.randint(0, 256, (frames, 3, height, width))
    latents = encode_frames(
        codec, pixels / 127.5 - 1, torch.randn(frames, 3 * 4**levels, height >> levels, width >> levels)
    )
    assert latents.shape == (frames, 3 * 4**levels, *latent_size(codec, height, width))
    back = decode_latents(codec, latents)
    assert torch.equal(((back + 1) * 127.5).round().long(), pixels)  # also of a picture of one colour


@given(st.integers(1, 100), st.integers(1, 100))
def test_its_canvas_is_the_smallest_that_it_accepts(height: int, width: int) -> None:
    canvas = legal_canvas(height, width, SMALL, 2)
    assert canvas == (-(-height // 2) * 2, -(-width // 2) * 2)
    assert sees_source(SMALL)


def test_sizes_are_checked() -> None:
    for sizes in ({"block_out_channels": (8, 16)}, {"block_out_channels": (20,)}, {"blocks": 0}):
        with pytest.raises(ConfigError):
            RestorerConfig.from_dict(asdict(SMALL) | sizes)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1), st.floats(0, 1, width=32))
def test_small_changes_are_cored(values: list[float], least: float) -> None:
    residual = torch.tensor(values, requires_grad=True)
    found = cored(residual, torch.tensor(least))
    wanted = residual.sign() * (residual.abs() - least).clamp(min=0)
    assert torch.allclose(found, wanted, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), residual)
    if least == 0:  # a fresh network, whose residual is zero, learns
        assert torch.equal(gradient, torch.ones_like(residual))


def test_only_what_is_not_enlarged_is_cored() -> None:
    made = network()
    noisy, source = clips(1, 3)
    changes = [(made(noisy, 10, told(made, scale), source) - source).abs().mean() for scale in (1.0, 2.0)]
    for parameter in made.conv_out.parameters():
        parameter.mul_(1e-3)
    faint = [(made(noisy, 10, told(made, scale), source) - source).abs().mean() for scale in (1.0, 2.0)]
    assert all(changes) and faint[0] == 0 < faint[1]
    made.train()  # a network that learns is not: what is small at first would get no gradient
    assert (made(noisy, 10, told(made, 1.0), source) != source).any()
