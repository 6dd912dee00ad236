"""On a pretended GPU: nothing is on two devices, frames are those of a CPU, and the host waits for what is stated."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks import random_networks, speed
from benchmarks.random_networks import random_network as draw
from streamt2v import config, devices, memory, weights
from streamt2v.diffusion import guidance
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.errors import Interrupted
from streamt2v.jobs.job import Job
from streamt2v.jobs.recipe import recipe_of
from streamt2v.media import frames, reading, writing
from streamt2v.media.frames import Frames
from streamt2v.memory import MemoryPolicy
from streamt2v.models.cam import ConditionalAttention
from streamt2v.runs import output, pipeline
from streamt2v.training import interpolation, parts, restorer
from streamt2v.training.loop import train
from streamt2v.training.parts import Workshop
from streamt2v.weights import networks, published
from tests import loras
from tests.checkpoints import tiny_layouts
from tests.cli.helpers import PROMPT, call, made
from tests.copies import Copies
from tests.pretended import Waits, pretended, unseen
from tests.training.test_training import micro_networks as micro_networks
from tests.training.test_training import two_photographs as two_photographs

TINY = {
    "prompt": PROMPT, "num_frames": 10, "seed": 3, "output.crf": 1, "refine.chunk": 6, "refine.overlap": 2,
    "stream.chunk": 9, "stream.overlap": 8,
    "stream.guidance_scale": 4, "initialize.text_model": "own",
    "initialize.num_inference_steps": 1, "stream.num_inference_steps": 2, "refine.num_inference_steps": 2,
    "stream.reuse_interval": 2, "refine.reuse_interval": 2,
}  # fmt: skip
SETTINGS = {
    "demo": {"stream.height": 24, "stream.width": 40, "output.height": 24, "output.width": 40},
    "streamingt2v": {
        "stream.height": 32,
        "stream.width": 32,
        "output.height": 32,
        "output.width": 32,
        "refine.guidance_scale": 2,
    },
    "streamingsvd": {
        "stream.height": 32,
        "stream.width": 32,
        "output.height": 32,
        "output.width": 32,
        "stream.overlap": 7,
        "refine.guidance_scale": 2,
        "stream.reuse_interval": 1,
        "initialize.picture_model": "own",
        "refine.model": "own",
        "picture.decode_chunk_size": 4,
    },
}
POLICIES = dict(
    zip(("all loaded", "one stage", "slices", "two passes", "on the host"), memory.ladder("cuda"), strict=True)
)


@pytest.fixture(autouse=True)
def as_a_gpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights lie as on a GPU, where convolutions round otherwise than with channels last; published ones are small."""
    monkeypatch.setattr(devices, "arrange", lambda *_: None)
    monkeypatch.setattr(published, "CHECKPOINTS", tiny_layouts())
    monkeypatch.setattr(random_networks, "random_network", drawn_once)


MADE: dict[tuple[Path, torch.dtype], Copies] = {}


def once(path: Path, dtype: torch.dtype, make: Callable[[], torch.nn.Module], device: str) -> torch.nn.Module:
    """Copies of a network that was made once: that was half of a run."""
    with unseen():
        if (path, dtype) not in MADE:
            MADE[path, dtype] = Copies(make())
        network: torch.nn.Module = MADE[path, dtype].make()
    return network.to(device)


def drawn_once(path: Path, part: published.Part, device: str, dtype: torch.dtype) -> torch.nn.Module:
    return once(path, dtype, lambda: draw(path, part, "cpu", dtype), device)


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of networks are read once, too, where nobody looks at how that goes on a GPU."""
    load = networks.load_module
    monkeypatch.setattr(
        networks, "load_module", lambda path, device, dtype: once(path, dtype, lambda: load(path, "cpu", dtype), device)
    )


def make(
    path: Path, policy: MemoryPolicy, device: str = "cuda", model: str = "demo", command: str = "generate",
    source: Path | None = None, **more: Any,
) -> Frames:  # fmt: skip
    """Make a small video; in bfloat16, which is held to the same rules as float16 and computed faster by a CPU."""
    if command == "generate" and not weights.family(model).reads_text:
        more["image"] = str(picture(path.parent))
    settings = config.merge(config.preset(model), {"model": model}, TINY, SETTINGS[model], more)
    wanted = replace(policy, precision="bfloat16")  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch, random_networks.stand_ins(model):
        patch.setattr(memory, "choose", lambda *_: wanted)
        pipeline.run(Job(command, settings, path, source, device, threads=1), speed.Warnings())
    return np.concatenate(list(reading.read_frames(path)))


# --------------------------------------------------------------------------------------------------------- whole runs


PAIRS = [("all loaded", "one stage", "slices"), ("two passes", "on the host")]
slow = pytest.mark.slow


# Every policy with the smallest networks; with the others the one that moves most, the rest in the deep suite.
@pytest.mark.parametrize(
    ("names", "model"),
    [*((names, "streamingt2v") for names in PAIRS)]
    + [(("on the host",), model) for model in ("demo", "streamingsvd")]
    + [pytest.param(names, model, marks=slow) for names in PAIRS for model in ("demo", "streamingsvd")],
    ids=str,
)
def test_every_policy_makes_the_frames_of_a_cpu(names: tuple[str, ...], model: str, tmp_path: Path) -> None:
    plain = make(tmp_path / "cpu.mp4", replace(POLICIES[names[0]], offload=False), "cpu", model)
    for name in names:
        with pretended():
            made = make(tmp_path / f"{name}.mp4", POLICIES[name], model=model)
        assert np.array_equal(made, plain), name


def test_a_lora_is_merged_wherever_weights_lie(tmp_path: Path) -> None:
    """On the host they stay there, and are copied to the device layer by layer."""
    index = weights.read_index(weights.family("demo").path("stream.unet"))[1]
    values = loras.tensors({key: row.shape for key, row in index.items()}, "kohya")
    path = loras.written(tmp_path / "lora.safetensors", values)
    given: dict[str, Any] = {"loras.1": f"{path}:0.2", "num_frames": 10, "refine.enabled": False}
    changed = make(tmp_path / "cpu.mp4", replace(POLICIES["on the host"], offload=False), "cpu", **given)
    with pretended():
        assert np.array_equal(make(tmp_path / "cuda.mp4", POLICIES["on the host"], **given), changed)


STARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "from a picture": lambda folder: {"image": str(picture(folder))},
    "refine": lambda folder: {"command": "refine", "source": made(folder / "source.mp4", 5), "num_frames": 5},
    "extend": lambda folder: {"command": "extend", "source": made(folder / "source.mp4", 11), "num_frames": 13},
}


def picture(folder: Path) -> Path:
    Image.fromarray(np.linspace(0, 255, 30 * 50 * 3).astype(np.uint8).reshape(30, 50, 3)).save(folder / "start.png")
    return folder / "start.png"


@pytest.mark.parametrize(
    ("start", "model"),  # the published family starts from text alone
    [("from a picture", "demo"), ("refine", "demo"), ("refine", "streamingt2v"), ("extend", "streamingsvd")]
    + [pytest.param("refine", "streamingsvd", marks=slow)]  # the refiner of streamingt2v
    + [pytest.param("extend", model, marks=slow) for model in ("demo", "streamingt2v")],  # streams as from text
)
def test_every_start_makes_the_frames_of_a_cpu(start: str, model: str, tmp_path: Path) -> None:
    given = STARTS[start](tmp_path)
    plain = make(tmp_path / "cpu.mp4", POLICIES["two passes"], "cpu", model, **given)
    with pretended():
        assert np.array_equal(make(tmp_path / "gpu.mp4", POLICIES["on the host"], model=model, **given), plain)


def test_a_batch_keeps_its_networks_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second video is made of networks that lie there, and the third is found finished."""
    monkeypatch.setattr(memory, "choose", lambda *_: replace(POLICIES["all loaded"], precision="bfloat16"))
    loaded: list[str] = []
    load = weights.load
    monkeypatch.setattr(weights, "load", lambda family, role, *more: loaded.append(role) or load(family, role, *more))
    rows = tmp_path / "rows.txt"
    rows.write_text("a red ball\na blue star\n")
    options = [f"--set={key}={value}" for key, value in {**TINY, **SETTINGS["demo"]}.items() if "." in key]
    command = ["batch", rows, "--out-dir", tmp_path, "--frames", 10, "--device", "cuda", "--threads", 1, *options, "-q"]
    with pretended():
        assert call(*command) == 0
    assert len(list(tmp_path.glob("*.mp4"))) == 2
    assert loaded and len(loaded) == len(set(loaded))


def stopped(path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped after its first group of frames."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        append = writing.SegmentWriter.append
        written: list[int] = []

        def stop(writer: writing.SegmentWriter, group: Frames) -> writing.SegmentMark:
            if written:
                raise KeyboardInterrupt
            written.append(len(group))
            return append(writer, group)

        patch.setattr(writing.SegmentWriter, "append", stop)
        make(path, POLICIES["two passes"], device)


@pytest.mark.usefixtures("loaded_once")
def test_a_run_goes_on_on_another_gpu_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, places = tmp_path / "out.mp4", list[str]()
    load = weights.load

    def watch(family: Any, role: str, device: str, dtype: torch.dtype) -> Any:
        places.append(str(device))
        return load(family, role, device, dtype)

    monkeypatch.setattr(weights, "load", watch)
    monkeypatch.setattr(memory, "choose", lambda *_: replace(POLICIES["two passes"], precision="bfloat16"))
    with pretended("A", "A", "B"):
        whole = make(tmp_path / "whole.mp4", POLICIES["two passes"], "cuda:0")
        stopped(path, "cuda:0", monkeypatch)
        assert call("resume", path, "--device", "cuda:2") == 5
        assert 'card = "A", now it is "B"' in capsys.readouterr().err
        assert call("resume", path, "--device", "cuda:3") == 2
        assert "torch finds 3 CUDA devices" in capsys.readouterr().err
        places.clear()
        assert call("resume", path, "--device", "cuda:1") == 0
        assert "cuda:1" in places and "cuda:0" not in places
        assert np.array_equal(np.concatenate(list(reading.read_frames(path))), whole)

        other = tmp_path / "other.mp4"
        stopped(other, "cuda:1", monkeypatch)
        places.clear()
        assert call("resume", other) == 0  # where it began
        assert "cuda:1" in places and "cuda:0" not in places
    recipe = recipe_of(reading.probe(path).comment)
    assert (recipe["device"], recipe["card"]) == ("cuda", "A")


def test_a_run_is_held_to_its_memory_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_make", lambda *_: pytest.fail("seen enough"))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    held: list[tuple[float, str]] = []
    with pretended(free=10**10):
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: held.append(given))
        for gigabytes in (4.6, 1.0, 99, None):
            settings = config.merge(config.preset("demo"), TINY, SETTINGS["demo"])
            job = Job("generate", settings, tmp_path / "out.mp4", device="cuda", threads=1, memory=gigabytes)
            with pytest.raises(pytest.fail.Exception):
                pipeline.run(job, speed.Warnings())
    # Without the 0.6 GB of the context, but at least half; and all there is without a wish.
    assert [share for share, _ in held] == pytest.approx([0.4, 0.05, 1, 1])
    assert {name for _, name in held} == {"cuda:0"}
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


# -------------------------------------------------------------------------------------------------------------- waits

MEANS = {
    "media/frames.py extremes": "are these pictures, or must the VAE try again in 32 bit",
    "media/frames.py to_u8": "frames leave the device",
    "jobs/states.py _array": "the state of the stream is stored",
    "runs/output.py _taken": "the state of the refiner leaves the device, before another thread stores it",
    "stages/refine.py run": "are all estimates of this group finite, before the state is stored",
}


def waits_of(path: Path, policy: MemoryPolicy, **more: Any) -> Waits:
    with pretended() as waits:
        make(path, policy, **more)
    return waits


def waits_of_two_more_steps(folder: Path, policy: MemoryPolicy, **given: Any) -> Waits:
    counts = []
    for steps in (2, 4):
        more: dict[str, Any] = dict(given)
        more |= {f"{stage}.num_inference_steps": steps for stage in ("initialize", "stream", "refine")}
        more["refine.chunk"] = TINY["num_frames"]  # one chunk
        counts.append(waits_of(folder / f"{steps}.mp4", policy, **more))
    return Waits(counts[1] - counts[0])


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(("name", "model"), [("all loaded", "demo"), ("on the host", "streamingt2v")])
def test_a_denoising_step_waits_for_nothing(name: str, model: str, tmp_path: Path) -> None:
    more = waits_of_two_more_steps(tmp_path, POLICIES[name], model=model)
    assert not more, more.report()


@pytest.mark.usefixtures("loaded_once")
def test_a_chunk_waits_for_what_is_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more chunk of the stream, and one more group of the refiner: what the host waits for, and why."""
    monkeypatch.setattr(output, "SAVING", 1e9)  # a state after every group
    policy = POLICIES["all loaded"]
    streamed = [waits_of(tmp_path / f"{count}.mp4", policy, num_frames=count, **{"refine.enabled": False})
                for count in (10, 11)]  # fmt: skip
    found = Waits(streamed[1] - streamed[0])
    stated = {"media/frames.py extremes": 2, "media/frames.py to_u8": 1, "jobs/states.py _array": 2}
    assert found.by_function() == stated, found.report()

    refined = []
    for count in (10, 14):
        source = made(tmp_path / f"source{count}.mp4", count)
        refined.append(waits_of(tmp_path / f"refined{count}.mp4", policy, command="refine", source=source,
                                num_frames=count))  # fmt: skip
    found = Waits(refined[1] - refined[0])
    frames_each = 4
    stated = {
        "media/frames.py extremes": 2 * frames_each, "media/frames.py to_u8": frames_each, "stages/refine.py run": 1,
        "runs/output.py _taken": 21,  # what is in progress, and its source
    }  # fmt: skip
    assert found.by_function() == stated, found.report()
    assert {*stated, "jobs/states.py _array"} == set(MEANS)


# ------------------------------------------------------------------------------------------------------ planted faults


class Fault(NamedTuple):
    """A mistake that a CPU forgives, and what the pretended GPU says of it."""

    plant: Callable[[pytest.MonkeyPatch], None]
    said: str
    policy: str = "all loaded"


def _cpu_tensor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(frames, "send", lambda values, device: values)


def _wide_tensor(patch: pytest.MonkeyPatch) -> None:
    def embed(cam: ConditionalAttention, shown: Tensor) -> Tensor:
        return cam.cond_embedding(shown.flatten(0, 1)).unflatten(0, shown.shape[:2]).transpose(1, 2)  # type: ignore[no-any-return]

    patch.setattr(ConditionalAttention, "embed_frames", embed)


def _generator(patch: pytest.MonkeyPatch) -> None:
    def normal(draws: SeededDraws, purpose: str, address: Any, shape: Any) -> Tensor:
        return torch.randn(tuple(shape), generator=draws.generator(purpose, address), device="cuda:0")

    patch.setattr(SeededDraws, "normal", normal)


def _hook(patch: pytest.MonkeyPatch) -> None:
    offload = devices.offload

    def forgetful(network: torch.nn.Module, device: devices.Device) -> None:
        offload(network, device)
        if hasattr(network, "conv_in"):
            network.conv_in._forward_pre_hooks.clear(), network.conv_in._forward_hooks.clear()

    patch.setattr(devices, "offload", forgetful)


FAULTS = {
    "a tensor of the CPU in a network of the GPU": Fault(_cpu_tensor, "same device, found cpu and cuda:0"),
    "32 bit into 16": Fault(_wide_tensor, "type"),
    "a generator of the wrong device": Fault(_generator, "generator"),
    "an offload hook left out": Fault(_hook, "same device, found cpu and cuda:0", "on the host"),
}


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    fault.plant(monkeypatch)
    with pretended(), pytest.raises(RuntimeError, match=fault.said) as caught:
        make(tmp_path / "out.mp4", POLICIES[fault.policy])
    assert not devices.is_out_of_memory(caught.value)


@pytest.mark.usefixtures("loaded_once")
def test_a_planted_wait_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    combine = guidance.combine

    def curious(unconditional: Tensor, conditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
        made = combine(unconditional, conditional, scale, rescale)
        assert float(made.mean()) == float(made.mean())
        return made

    monkeypatch.setattr(guidance, "combine", curious)
    more = waits_of_two_more_steps(tmp_path, POLICIES["all loaded"], **{"refine.enabled": False})
    assert {where.partition(":")[0] for _, where in more} == {"stages/denoise.py"}


# ----------------------------------------------------------------------------------------------------------- the rules


def test_the_rules_of_two_devices() -> None:
    with pretended("A", "A"):
        here, there, other = torch.ones(3), torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1")
        assert (here.device.type, there.device, other.device.index) == ("cpu", torch.device("cuda:0"), 1)
        assert there.view(3, 1).is_cuda and (there * 2).is_cuda and not there.cpu().is_cuda
        assert (there * torch.tensor(2.0)).is_cuda  # a number of the CPU
        wrong: list[Callable[[], Any]] = [
            lambda: here + there,
            lambda: there @ other,
            lambda: torch.stack([there.sum(), torch.tensor(2.0)]),
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: functional.linear(torch.ones(1, 3, device="cuda"), torch.ones(2, 3)),
            lambda: there.normal_(generator=torch.Generator()),
            lambda: torch.rand(2, generator=torch.Generator("cuda")),
        ]
        for mistake in wrong:
            with pytest.raises(RuntimeError, match="device"):
                mistake()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


@pytest.mark.parametrize("inference", [False, True])
def test_what_the_host_waits_for(inference: bool) -> None:
    with pretended() as waits, torch.inference_mode(inference):
        here, there, first = torch.ones(3), torch.ones(3, device="cuda"), torch.tensor([0])
        number, mask = there.sum(), there > 1
        free: list[Callable[[], Any]] = [
            lambda: there.to("cuda:0"), there.half, there.clone, lambda: there.add_(1), lambda: there[:2],
            lambda: devices.send(here, "cuda:0"), lambda: torch.full((2,), 7, device="cuda"), here.tolist,
            lambda: there[mask.long()], lambda: torch.arange(3, device="cuda"), lambda: there.masked_fill_(mask, 0),
        ]  # fmt: skip
        for work in free:
            work()
            assert not waits, waits.report()
        waiting: list[Callable[[], Any]] = [
            number.item, number.tolist, lambda: float(number), lambda: bool(mask[0]), there.tolist, there.cpu,
            lambda: here.to("cuda"), lambda: here.pin_memory().to("cuda"), lambda: there[mask], lambda: there[first],
            lambda: there.new_tensor([1.0]), lambda: torch.tensor([1.0], device="cuda"), there.nonzero,
            lambda: torch.equal(there, there), torch.cuda.synchronize,
        ]  # fmt: skip
        for done, work in enumerate(waiting, 1):
            work()
            assert waits.total() == done, waits.report()


def test_a_copy_on_its_way_down_may_only_be_sent_back() -> None:
    with pretended():
        values = torch.ones(4, device="cuda")
        down = values.to("cpu", non_blocking=True)
        assert torch.equal(down[:2].to("cuda", non_blocking=True) + 1, values[:2] + 1)
        down = values.to("cpu", non_blocking=True)
        with pytest.raises(RuntimeError, match="still on its way"):
            down + 1
        torch.cuda.synchronize()
        assert float((down + 1).sum()) == 8


# ----------------------------------------------------------------------------------------------------------- training


class SixteenBit(torch.autocast):
    """What a GPU is always asked for, on a CPU: wherever a number format is named, it is taken."""

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> None:
        super().__init__(device_type, dtype, enabled=enabled or dtype is not None)


# What `cam` and `joint` do, `apm` and `base` do; the deep suite takes all.
FEWER = [part for part in parts.JOBS if part not in ("cam", "joint")]


@pytest.mark.usefixtures("micro_networks", "two_photographs")
@pytest.mark.parametrize("jobs", [FEWER, pytest.param(list(parts.JOBS), marks=slow)], ids=["fewer", "all"])
def test_every_part_trains_as_on_a_cpu(jobs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workshop, "many", lambda shop, count: count)  # a GPU takes more at once
    for judge in (restorer.Judge, interpolation.Judge):
        monkeypatch.setattr(judge, "gains", lambda *given: {})  # slow, and asked for nothing here
    (tmp_path / "cpu").mkdir()
    for part in jobs:
        learn = partial(train, part, minutes=None, steps=1, seed=1)
        # From the same finished parts; each encodes clips of its own.
        shutil.copytree(tmp_path / "cpu", tmp_path / "gpu", ignore=shutil.ignore_patterns("clips"), dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "autocast", SixteenBit)
            plain = learn(out=tmp_path / "cpu")
        with pretended():
            made = learn(out=tmp_path / "gpu", device="cuda:0")
        assert made["steps"] == 1
        assert made["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-5), part
