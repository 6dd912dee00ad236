"""The speed benchmark, at sizes where it takes seconds: both families, every row of the table."""

import json
import logging
from pathlib import Path

import pytest
import torch

from benchmarks import random_networks, speed
from streamt2v import devices, weights
from streamt2v.jobs.asked import parse_settings
from streamt2v.models.unet3d import CamFeatures, TextContext, UNet3D
from streamt2v.weights import published
from tests.checkpoints import tiny_layouts

TINY = ["--repeats", "1", "--set", "initialize.num_inference_steps=1"]
SIZES = {
    "demo": ["stream.height=24", "stream.width=40", "output.height=48", "output.width=80"],
    "streamingt2v": ["stream.height=32", "stream.width=32", "output.height=80", "output.width=128"],
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("model", ["streamingt2v", pytest.param("demo", marks=pytest.mark.slow)])
def test_one_command_makes_the_whole_table(
    model: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "CHECKPOINTS", tiny_layouts())
    steps = ["stream.num_inference_steps=1", "refine.num_inference_steps=1", "refine.chunk=8", "refine.overlap=2"]
    given = [word for pair in [*SIZES[model], *steps] for word in ("--set", pair)]
    where = ["--results", str(tmp_path), "--page", str(tmp_path / "speed.md")]
    speed.main([*TINY, *given, *where, "--model", model, "--device", device, "--memory", "1", "--run", "17"])

    (written,) = tmp_path.glob("*-speed-*.json")
    result = json.loads(written.read_text())

    def moved(name: str) -> bool:
        """Whether a part only moves numbers: cells of pixels, which are the demo's codec of the refiner."""
        return model == "demo" and name.startswith("VAE")

    for name, row in result["parts"].items():
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 1e6
        assert row["tflop"] > 0 or moved(name)
    assert all(row["together"] > 0 for row in result["totals"].values())
    for name, row in result["gains"].items():
        assert (row["difference"] is None) == name.startswith("no bars")
        assert (row["difference"] or 0) < (1e-4 if device == "cpu" else 0.1)
    near = result["near_gains"]
    assert len(near) == (4 if model == "streamingt2v" else 3)  # the demo's refiner has no guidance
    for name, row in result["profile"].items():
        spent = sum(seconds for kind, seconds in row.items() if kind != "whole")
        assert 0 < row["convolution"] < spent or moved(name)
        assert spent < 1.05 * row["whole"]
    assert all(row["without"] > 0 and row["with"] > 0 for row in near.values())
    assert all(1e-4 < gap < 0.2 for gap in result["rounding"].values())
    (tier,) = result["tiers"]
    assert tier["gigabytes"] == 1 and tier["peak_bytes"] > 1e6
    assert (result["run"]["frames"], result["run"]["seconds"] > 0) == (17, True)
    page = (tmp_path / "speed.md").read_text()
    assert all(
        f"| {name} " in page
        for name in [*result["parts"], *result["gains"], *near, *result["totals"], *result["profile"]]
    )
    assert "**extrapolated**" in page and "**really made**" in page
    assert ("target (H100)" in page) == (model == "streamingt2v")


def test_work_is_counted_in_full() -> None:
    """One branch of the published streaming network, 16 frames of 256x256: the reference counts 5.042 TFLOP."""
    part = published.CHECKPOINTS["streaming_t2v.ckpt"].parts["stream/unet"]
    unet = weights.build(Path(part.network), part.network, part.config).to("meta")
    assert isinstance(unet, UNet3D)
    config, count = unet.config, speed.Instruments(devices.Device("cpu"), 1)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    sides = [32, 32, 32, 16, 16, 16, 8, 8, 8, 4, 4, 4]
    features = [empty(1, width, 8, side, side) for width, side in zip(config.skip_channels, sides, strict=True)]
    cam = CamFeatures(tuple(features), empty(1, 1280, 8, 4, 4))

    def forward() -> torch.Tensor:
        text = unet.prepare(TextContext(empty(1, 77, 1024)), empty(1, 16, 1024))
        return unet(empty(1, 4, 16, 32, 32), 500, text, cam)  # type: ignore[no-any-return]

    with torch.inference_mode():
        assert count.measure(forward)["tflop"] == pytest.approx(5.042, rel=0.02)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_16_bit_no_gain_changes_more_than_rounding_does(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two ways in 16 bit, each as far from 32 bit as the plain one is, are at most twice as far from each other."""
    given = parse_settings(SIZES["demo"])
    asked = random_networks.settings("demo", "fast", given | {"refine.chunk": 4, "refine.overlap": 2})
    networks = random_networks.Networks(asked, devices.Device("cpu"), torch.bfloat16)
    monkeypatch.setattr(devices, "BACKEND", "eager")  # compiled to what is called without: done in seconds
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    with torch.inference_mode():
        gap = max(speed.rounding(networks).values(), key=lambda found: found or 0)
        found = {name: speed.difference(old(), new()) for name, old, new in speed.gains(networks, compiled)}
    torch.compiler.reset()
    assert gap is not None
    assert "not compiled" not in caplog.text
    assert max(change or 0 for change in found.values()) <= 2 * gap
    assert len(found) > 5
    assert sum(name.startswith("compiled, ") for name in found) == 4 * compiled
