"""Compiling: every network is one graph for all steps, a failure leads back to the plain path, runs do as asked."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.speed import Warnings
from streamt2v import config, devices, memory
from streamt2v.families import ltx, wan
from streamt2v.jobs.job import Job
from streamt2v.models.cam import CamConfig, ConditionalAttention
from streamt2v.models.encoders import decode_latents, encode_frames
from streamt2v.models.unet3d import TextContext, UNet3D, UNet3DConfig
from streamt2v.runs import pipeline
from streamt2v.stages.flow import Words
from streamt2v.stages.stream import network_step
from streamt2v.training.world.vae import build_vae
from tests import pipelines

SIZES = UNet3DConfig(
    block_out_channels=(8, 16), attention_levels=(True, False), layers_per_block=1, cross_attention_dim=12,
    attention_head_dim=8, transformer_in_heads=1, norm_num_groups=4, text_tokens=5, pooled_text_dim=6, frame_codes=True,
)  # fmt: skip
SMALL = {
    "prompt": "a red ball", "num_frames": 17, "stream.height": 24, "stream.width": 40, "output.height": 24,
    "output.width": 40, "initialize.num_inference_steps": 1, "stream.num_inference_steps": 1,
}  # fmt: skip
CPU = devices.Device("cpu")
Compile = Callable[[Callable[..., Any]], tuple[Callable[..., Any], CompileCounterWithBackend]]


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compile]:
    """Compile as runs do, but for the last step: to what the plain path calls."""

    def compile(function: Callable[..., Any]) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
        counter = CompileCounterWithBackend("eager")
        monkeypatch.setattr(devices, "BACKEND", counter)
        return devices.compiled(function, CPU), counter

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # takes most of the time when captured
    torch.manual_seed(0)
    with torch.inference_mode():
        yield compile
    torch.compiler.reset()


def randomised(network: nn.Module) -> Any:
    """A network of which nothing is zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def text() -> TextContext:
    return TextContext(torch.randn(2, 5, 12), torch.randn(2, 6))


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_a_transformer_of_a_library_is_one_graph(name: str, compiled: Compile) -> None:
    parts: dict[str, Any] = pipelines.ltx_parts() if name == "ltx" else {}
    parts = parts or {"transformer": pipelines.wan_transformer(), "vae": pipelines.wan_vae(), "scheduler": None}
    transformer = parts["transformer"].eval()
    base = ltx.Ltx(parts, {}, 25) if name == "ltx" else wan.Wan(parts, {"expand_timesteps": True})
    latents, words = torch.randn(1, 8, 3, 2, 4), Words(torch.randn(1, 5, pipelines.WIDTH), torch.ones(1, 5))
    plain = [base.velocity(latents, torch.tensor(time), 1, words, None) for time in (900.0, 500.0)]
    transformer.forward, counter = compiled(transformer.forward)
    for time, wanted in zip((900.0, 500.0), plain, strict=True):
        torch.testing.assert_close(base.velocity(latents, torch.tensor(time), 1, words, None), wanted)
    assert counter.frame_count == 1


def test_a_streaming_step_is_one_graph_for_all_steps_of_a_kind(compiled: Compile) -> None:
    sizes = replace(SIZES, block_out_channels=(8,), attention_levels=(True,))  # compiling takes its time
    unet = randomised(UNet3D(replace(sizes, cam=True, image_tokens=3)))
    cam = randomised(ConditionalAttention(CamConfig(sizes, (4, 6, 8), num_cond_frames=2)))
    embedded = cam.embed_frames(torch.randn(1, 2, 3, 16, 24))
    prepared = unet.prepare(text(), torch.randn(2, 3, 12)), cam.prepare(text())
    fast, counter = compiled(network_step)
    deep = None
    for timestep in (999, 500, 200, 1):
        given = (unet, cam, torch.randn(2, 4, 4, 4, 6), torch.full((1,), timestep), *prepared, embedded, deep)
        output, features = network_step(*given)
        torch.testing.assert_close(fast(*given), (output, features), rtol=1e-4, atol=1e-5)
        deep = features if timestep <= 500 else None
    assert counter.frame_count == 2  # one more for what takes deep features of an earlier step


def test_a_refining_step_is_one_graph_for_all_steps_of_a_kind(compiled: Compile) -> None:
    sizes = replace(SIZES, downsample_padding=(2, 1), pooled_text_dim=0, frame_codes=False)
    unet = randomised(UNet3D(sizes))
    prepared = unet.prepare(TextContext(torch.randn(2, 5, 12)))
    fast, counter = compiled(unet.run)
    deep = None
    for timestep in (599, 500, 200, 1):
        given = (torch.randn(2, 4, 3, 6, 8), torch.full((1,), timestep), prepared, None, deep)
        output, features = unet.run(*given)
        torch.testing.assert_close(fast(*given), (output, features), rtol=1e-4, atol=1e-5)
        deep = features if timestep <= 500 else None
    assert counter.frame_count == 2  # one more for what takes deep features of an earlier step


def test_the_halves_of_a_vae_are_one_graph_each(compiled: Compile) -> None:
    vae = randomised(build_vae())
    frames = torch.randn(2, 3, 16, 24).clamp(-1, 1)
    latents = encode_frames(vae, frames)
    plain = decode_latents(vae, latents)
    counters = []
    for half in (vae.encoder, vae.decoder):
        half.forward, counter = compiled(half.forward)
        counters.append(counter)
    torch.testing.assert_close(encode_frames(vae, frames), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode_latents(vae, latents), plain, rtol=1e-4, atol=1e-4)
    assert [counter.frame_count for counter in counters] == [1, 1]


def test_what_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def broken(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        tries.append(graph)
        raise RuntimeError("no compiler was found\nand much more")

    monkeypatch.setattr(devices, "BACKEND", broken)
    double = devices.compiled(lambda x: 2 * x, CPU)
    with caplog.at_level(logging.WARNING):
        assert [double(torch.tensor([value])).item() for value in (1.0, 2.0)] == [2, 4]
    (said,) = (record.getMessage() for record in caplog.records if record.name == devices.__name__)
    assert "no compiler was found" in said and "much more" not in said
    assert len(tries) == 1


def test_too_little_memory_is_no_failure_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must reach who knows what to do about it."""

    def broken(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        def run(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    monkeypatch.setattr(devices, "BACKEND", broken)
    with pytest.raises(torch.OutOfMemoryError):
        devices.compiled(lambda x: 3 * x, CPU)(torch.ones(1))


def test_a_run_compiles_what_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []
    called: set[str] = set()
    report = Warnings()

    def compiled(function: Callable[..., Any], device: devices.Device, graphs: bool = False) -> Any:
        name = function.__qualname__
        asked.append((name, graphs))
        return lambda *given: called.add(name) or function(*given)

    def make(name: str, compile: bool) -> None:
        settings = config.merge(config.preset("demo", "fast"), SMALL, {"compile": compile})
        pipeline.run(Job("generate", settings, tmp_path / name, device="cpu"), report)

    monkeypatch.setattr(devices, "compiled", compiled)
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is restored
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    make("not asked for.mp4", False)
    assert not asked
    make("compiled.mp4", True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "home" / "compiled")
    names = ["Decoder.forward", "Encoder.forward", "Restorer.run", "network_step"]
    assert sorted(asked) == [(name, name == "network_step") for name in names]
    assert sorted(called) == names
    asked.clear()
    offloads = replace(memory.ladder("cuda")[-1], precision="float32")
    monkeypatch.setattr(pipeline, "_policy", lambda *_: (offloads, False))
    make("offloaded.mp4", True)
    assert "not compiled" in report.said[-1] and not asked


@pytest.mark.slow
def test_what_was_compiled_is_kept_for_later_processes(tmp_path: Path) -> None:
    """With the real compiler: the same numbers, and a second process finds its work."""
    code = """
import sys, torch
from pathlib import Path
from streamt2v import devices
from streamt2v.runs import pipeline
devices.keep_compiled(Path(sys.argv[1]))
from transformers import CLIPTextModel
from torch._dynamo.utils import counters
from streamt2v.models.layers import ResnetBlock
block = ResnetBlock(8, 16, 32, groups=4)
given = torch.randn(2, 8, 6, 6), torch.randn(1, 32)
with torch.inference_mode():
    fast = devices.compiled(block, devices.Device("cpu"))
    torch.testing.assert_close(fast(*given), block(*given), rtol=1e-4, atol=1e-5)
print(counters["inductor"]["fxgraph_cache_hit"])
"""
    env = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    hits = [
        int(subprocess.run([sys.executable, "-c", code, tmp_path], env=env, capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    assert hits == [0, 1]
