"""How fast is this machine, part by part; what does every exact gain bring; what fits into which memory?

    python benchmarks/speed.py                                          # everything but the two below
    python benchmarks/speed.py --memory 8,12,16,24,48,80                # also: a run within each of these GB
    python benchmarks/speed.py --run 1200                               # also: so many frames at `fast`, end to end
    python benchmarks/speed.py --run 1200 --compile                     # also: what compiling brings; and run so
    python benchmarks/speed.py --table                                  # nothing but docs/speed.md, from the results

On a GPU the published family is measured at its full size, filled with random numbers (what a network takes does not
depend on them, and no weights are needed); on a CPU the demo family. `--model` and `--set` choose otherwise. Every
section is written to benchmarks/results/DATE-speed-DEVICE-MODEL.json when it is done: run again on the same day, it
goes on with what that file lacks. docs/speed.md is made of all such files.

Times are medians of repeats after a warm-up: CUDA events on a GPU, seconds of this process on one core of a CPU, where
other programs do not count. Two ways of doing one thing are timed in turn. Shares are of the machine's own rate at a
large matrix product in the same number format, measured in the same run.
"""

import argparse
import contextlib
import copy
import gc
import json
import platform
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, profiler
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.random_networks import Networks, Work, settings, stand_ins
from benchmarks.speed_page import LENGTH, table
from streamt2v import config, devices, memory, weights
from streamt2v.chunks import length, refinement_plan, streaming_plan
from streamt2v.config import RunConfig
from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig
from streamt2v.errors import MemoryLimitError
from streamt2v.jobs import needs
from streamt2v.jobs.asked import parse_settings
from streamt2v.jobs.job import Job, Result
from streamt2v.models.encoders import decode_latents, encode_frames, latent_factor, latent_size
from streamt2v.models.unet3d import Conditioning, legal_canvas
from streamt2v.runs import pipeline
from streamt2v.runs.pace import Status
from streamt2v.stages import stream
from streamt2v.stages.denoise import Predict, both_branches
from streamt2v.stages.refine import noise_grid, sees_source

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
QUALITIES = ("reference", "balanced", "fast")
# torch counts the attention kernels of GPUs alone.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
CHUNK, CHUNK_STEP = "stage 2, a chunk", "refiner, a chunk-step"
UNGUIDED, REUSING = ", unguided", ", deep layers reused"
ENCODE, DECODE = "VAE, encode a frame", "VAE, decode a frame"
KINDS = {"convolution": r"conv", "matrix product": r"mm$|linear$|matmul$", "attention": r"attention", "norm": r"_norm$",
         "copy, join": r"cat$|copy_?$|clone$|contiguous$|pad|fill_?$|zero"}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- instruments


@dataclass(frozen=True)
class Instruments:
    """Time, work and memory on one device."""

    device: devices.Device
    repeats: int

    def seconds(self, *works: Work) -> list[float]:
        """Median seconds of each of `works`, which take turns."""
        for work in works:
            work()
        taken = [[self._once(work) for work in works] for _ in range(self.repeats)]
        return [statistics.median(times) for times in zip(*taken, strict=True)]

    def _once(self, work: Work) -> float:
        if self.device.kind != "cuda":
            began = time.process_time()
            work()
            return time.process_time() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device.name)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def measure(self, work: Work) -> dict[str, float]:
        """Seconds, 10^12 operations and the peak of memory in bytes, weights included, of some work."""
        work()  # what is kept from the first time is not counted
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            work()
        self.forget_peak()
        (seconds,) = self.seconds(work)
        tflop = counter.get_total_flops() / 1e12
        return {"seconds": seconds, "repeats": self.repeats, "tflop": tflop, "peak_bytes": self.peak()}

    def profile(self, work: Work) -> dict[str, float]:
        """Seconds of some work by kind of operation, and how long it took in all, which watching makes longer."""
        found, activities = Counter[str](), [profiler.ProfilerActivity.CPU]
        activities += [profiler.ProfilerActivity.CUDA] if self.device.kind == "cuda" else []
        with profiler.profile(activities=activities) as watched:
            devices.wait(self.device)
            began = time.perf_counter()
            work()
            devices.wait(self.device)
            whole = time.perf_counter() - began
        for event in watched.key_averages():
            if event.device_type != torch.autograd.DeviceType.CPU:
                continue  # kernels, which are counted with what started them
            name = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "all else")
            used = event.self_device_time_total if self.device.kind == "cuda" else event.self_cpu_time_total
            found[name] += used / 1e6
        return {name: found[name] for name in (*KINDS, "all else")} | {"whole": whole}

    def ceiling(self, dtype: torch.dtype) -> float:
        """10^12 operations per second of large matrix products or convolutions, whichever are faster, at their best.

        On CPUs they come from two libraries, and the convolutions are often the faster ones.
        """
        place: dict[str, Any] = {"device": self.device.name, "dtype": dtype}
        size, images = (8192, 64) if self.device.kind == "cuda" else (1024, 2)
        a, b = (torch.randn(size, size, **place) for _ in range(2))
        x, weight = torch.randn(images, 256, 64, 64, **place), torch.randn(256, 256, 3, 3, **place)
        x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
        products = self.seconds(*[lambda: a @ b] * 3)
        convolutions = self.seconds(*[lambda: functional.conv2d(x, weight, padding=1)] * 3)
        return max(2 * size**3 / min(products), 2 * x.numel() * 256 * 9 / min(convolutions)) / 1e12

    def forget_peak(self) -> None:
        """Begin a new peak of memory."""
        gc.collect()
        if self.device.kind == "cuda":
            torch.cuda.empty_cache()  # not what was compiled
            torch.cuda.reset_peak_memory_stats(self.device.name)
        else:
            with contextlib.suppress(OSError):  # Linux only; elsewhere the peak is the whole process's
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes taken from a GPU since then, whether used or only kept; on a CPU those of the whole process."""
        if self.device.kind == "cuda":
            return int(torch.cuda.max_memory_reserved(self.device.name))
        return devices.peak_memory()


def tell_part(name: str, row: Mapping[str, Any]) -> None:
    """Print what a part takes."""
    print(f"{name}: {row['seconds']:.4f} s", flush=True)


def measure_parts(
    networks: Networks,
    tools: Instruments,
    given: Mapping[str, Any],
    tell: Callable[[str, dict[str, Any]], None] = tell_part,
) -> dict[str, dict[str, Any]]:
    """What each part takes, by name, told one by one; all networks stay loaded."""
    found: dict[str, dict[str, Any]] = {}

    def measured(what: str, size: tuple[int, int], work: Work, **more: Any) -> None:
        found[what] = {"height": size[0], "width": size[1], **more, **tools.measure(work)}
        tell(what, found[what])

    base, own = networks.config.stream.size, networks.config.stream
    _, second = streaming_plan(length(2, own.chunk, own.overlap), own.chunk, own.overlap)
    state = stream.StreamState.after_first_chunk(networks.base_frames(own.chunk), own.overlap)
    for quality in QUALITIES:
        asked = settings(networks.config.model, quality, given)
        chunks = partial(stream.continued, networks.streamer(asked).new_frames, state, [second])
        more = {"frames": own.chunk, "steps": asked.stream.num_inference_steps}
        measured(f"{CHUNK}, {quality}", base, lambda chunks=chunks: next(chunks())[0], **more)
    canvas, square = networks.canvas(), networks.canvas(square=True)
    measured(CHUNK_STEP, canvas, networks.chunk_step(canvas), frames=networks.config.refine.chunk)
    measured(f"{CHUNK_STEP}, square", square, networks.chunk_step(square), frames=networks.config.refine.chunk)
    for guided in (True, False) if networks.config.refine.guidance_scale != 1 else (True,):
        if not guided:
            work = networks.chunk_step(canvas, guided=False)
            measured(step_name(False, False), canvas, work, frames=networks.config.refine.chunk)
        work = networks.chunk_step(canvas, reusing_step, guided=guided)
        measured(step_name(guided, True), canvas, work, frames=networks.config.refine.chunk)
    streaming, (unet, vae) = networks.streaming, networks.refining
    places = {"base": (base, streaming.unet, streaming.vae), "canvas": (canvas, unet, vae)}
    for where, (size, unet, vae) in places.items():
        channels = unet.config.out_channels
        frame, latents = networks.random(1, 3, *size), networks.random(1, channels, *latent_size(vae, *size))
        measured(f"{ENCODE}, {where}", size, partial(encode_frames, vae, frame))
        measured(f"{DECODE}, {where}", size, partial(decode_latents, vae, latents))
    return found


def totals(found: Mapping[str, Mapping[str, Any]], model: str, given: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds of `LENGTH` frames after their first chunk, from those of the parts: extrapolated, nothing overlapped."""
    result, path = {}, weights.family(model).path("refine.unet")
    for quality in QUALITIES:
        stream, refine = (asked := settings(model, quality, given)).stream, asked.refine
        chunks = len(streaming_plan(LENGTH, stream.chunk, stream.overlap)) - 1
        schedule = NoiseSchedule(ScheduleConfig.from_dict(weights.read_header(path)[2] or {}))
        stop = refine.guidance_stop * schedule.config.num_train_timesteps
        guided = [int(timestep) >= stop for timestep in noise_grid(schedule, refine)[0]]
        if refine.guidance_scale == 1:
            guided = [True] * len(guided)  # is as much work as without
        steps = (found[step_name(branches, bool(index % refine.reuse_interval))]["seconds"]
                 for index, branches in enumerate(guided))  # fmt: skip
        times = {
            "stage 2": chunks * found[f"{CHUNK}, {quality}"]["seconds"],
            "refiner": len(refinement_plan(LENGTH, refine.chunk, refine.overlap, refine.shift_back)) * sum(steps),
            "VAE of the refiner": LENGTH * sum(found[f"{way}, canvas"]["seconds"] for way in (ENCODE, DECODE)),
        }
        result[quality] = {**times, "together": sum(times.values())}
    return result


# ------------------------------------------------------------------------------------------------- on and off, in turn


def step_name(guided: bool, reusing: bool) -> str:
    """The name of a chunk-step of the refiner among the parts."""
    return CHUNK_STEP + UNGUIDED * (not guided) + REUSING * reusing


def reusing_step(unet: Any) -> Any:
    """A network that computes its deep layers when it is first called, and never again."""
    kept: dict[int, Tensor] = {}

    def run(
        latents: Tensor, timestep: Tensor, text: Conditioning, cam: None, deep: None, *source: Tensor
    ) -> tuple[Tensor, Tensor]:
        if len(latents) not in kept:
            kept[len(latents)] = unet.run(latents, timestep, text, None, None, *source)[1]
        return unet.run(latents, timestep, text, None, kept[len(latents)], *source)

    return run


def plain(network: Any) -> Any:
    """A copy of a network with the weights of convolutions laid out as torch does by itself."""
    return _laid_out(network, torch.contiguous_format, torch.contiguous_format)


def channels_last(network: Any) -> Any:
    """A copy of a network with the channels of its convolutions last."""
    return _laid_out(network, torch.channels_last, torch.channels_last_3d)


def _laid_out(network: Any, flat: torch.memory_format, deep: torch.memory_format) -> Any:
    network = copy.deepcopy(network)
    for parameter in network.parameters():
        if parameter.ndim in (4, 5):
            parameter.data = parameter.data.contiguous(memory_format=flat if parameter.ndim == 4 else deep)
    return network


def gains(networks: Networks, compiled: bool) -> Iterator[tuple[str, Work, Work]]:
    """Yield what is gained, the way without it and the way with it; in stage 2, of one guided step."""
    models, config, (unet, vae) = networks.streaming, networks.config, networks.refining
    canvas, square = networks.canvas(), networks.canvas(square=True)
    text, shown = networks.text(models.unet), networks.base_frames(config.stream.overlap)
    tokens = stream.anchor_tokens(models, shown[0])
    cells = latent_size(models.vae, *config.stream.size)
    latents = networks.random(1, models.unet.config.out_channels, config.stream.chunk, *cells)

    def prepare() -> tuple[Conditioning, Conditioning]:
        assert models.cam is not None
        return models.unet.prepare(text, tokens), models.cam.prepare(text)

    def step(predict: Predict, batched: bool = True) -> Tensor:
        return torch.cat(both_branches(predict, latents, 500, batched))

    def predictor(change: Callable[[Any], Any]) -> Predict:
        changed = replace(models, unet=change(models.unet), cam=change(models.cam))
        return stream.predictor(changed, *prepared, shown)

    prepared = prepare()
    predict = stream.predictor(models, *prepared, shown)

    def every_step() -> Tensor:
        return step(stream.predictor(models, *prepared, shown))

    yield "pixels of the conditioning frames once a chunk", every_step, lambda: step(predict)
    prompt = "keys and values of text and anchor once a prompt"
    yield prompt, lambda: step(stream.predictor(models, *prepare(), shown)), every_step
    yield "both branches in one batch, stage 2", lambda: step(predict, False), lambda: step(predict)
    if config.refine.guidance_scale != 1:
        one_by_one = networks.chunk_step(canvas, batched=False)
        yield "both branches in one batch, refiner", one_by_one, networks.chunk_step(canvas)
    frames = latents[0].transpose(0, 1)
    new = frames[config.stream.overlap :]
    decode = partial(decode_latents, models.vae)
    yield "only new frames are decoded, a chunk", lambda: decode(frames)[-len(new) :], lambda: decode(new)
    yield "no bars around a square clip, refiner", networks.chunk_step(canvas), networks.chunk_step(square)
    before, after = predictor(plain), predictor(channels_last)
    yield "channels last, stage 2", partial(step, before), partial(step, after)
    works = (networks.chunk_step(canvas, lambda unet, way=way: way(unet).run) for way in (plain, channels_last))
    yield "channels last, refiner", *works
    frame, packed = networks.random(1, 3, *canvas), (1, unet.config.out_channels, *latent_size(vae, *canvas))
    works = (("encode", encode_frames, frame), ("decode", decode_latents, networks.random(*packed)))
    before_vae, after_vae = plain(vae), channels_last(vae)
    for what, way, given in works:
        yield f"channels last, {what} a frame", partial(way, before_vae, given), partial(way, after_vae, given)
    if not compiled:
        return

    def compile(function: Any, graphs: bool = False) -> Any:
        return devices.compiled(function, networks.device, graphs=graphs)

    fast = replace(models, step=compile(stream.network_step, graphs=True))
    yield "compiled, stage 2", partial(step, predict), partial(step, stream.predictor(fast, *prepared, shown))
    yield "compiled, refiner", networks.chunk_step(canvas), networks.chunk_step(canvas, lambda unet: compile(unet.run))
    if not hasattr(vae, "encoder"):  # cells of pixels are only moved
        return
    fast_vae = copy.deepcopy(vae)
    for half in (fast_vae.get_submodule("encoder"), fast_vae.get_submodule("decoder")):
        half.forward = compile(half.forward)
    for what, way, given in works:
        yield f"compiled, {what} a frame", partial(way, vae, given), partial(way, fast_vae, given)


def near_gains(networks: Networks) -> Iterator[tuple[str, Work, Work]]:
    """Yield what is gained by doing less, the way without it and the way with it, at the steps of the settings."""
    config = networks.config
    own, refine = config.stream, config.refine
    _, second = streaming_plan(length(2, own.chunk, own.overlap), own.chunk, own.overlap)
    shown = networks.base_frames(own.overlap)

    def chunk(**change: Any) -> Work:
        asked = replace(config, stream=replace(own, **{"reuse_interval": 1, "guidance_stop": 0.0, **change}))
        return partial(networks.streamer(asked).chunk_latents, second, shown)

    yield "deep layers at every 2nd step, a chunk of stage 2", chunk(), chunk(reuse_interval=2)
    yield "no guidance below 40 % of the noise range, a chunk of stage 2", chunk(), chunk(guidance_stop=0.4)
    canvas = networks.canvas()
    two = (networks.chunk_step(canvas, steps=2, reuse_interval=interval) for interval in (1, 2))
    yield "deep layers at every 2nd step, two chunk-steps of the refiner", *two
    if refine.guidance_scale != 1:
        yield (
            "no guidance, a chunk-step of the refiner",
            networks.chunk_step(canvas),
            networks.chunk_step(canvas, guided=False),
        )


def difference(one: Tensor, other: Tensor) -> float | None:
    """The largest difference over the largest value; None where sizes differ."""
    one, other = one.float(), other.float()
    return float((other - one).abs().max() / one.abs().max()) if one.shape == other.shape else None


def rounding(networks: Networks) -> dict[str, float | None]:
    """What 16 bit (bfloat16 where the device is a CPU) changes against 32 in the plain networks."""
    short = torch.bfloat16 if networks.device.kind == "cpu" else torch.float16
    found = {}
    parts = {"stage 2": (networks.streaming.unet, networks.streaming.vae), "refiner": networks.refining}
    for name, (unet, vae) in parts.items():
        size = legal_canvas(*networks.config.stream.size, unet.config, latent_factor(vae))
        latents = networks.random(1, unet.config.out_channels, networks.config.stream.chunk, *latent_size(vae, *size))
        latents = latents.expand(2, -1, -1, -1, -1)
        beside = (latents,) if sees_source(unet.config) else ()
        ways = [plain(unet).to(dtype) for dtype in (torch.float32, short)]
        one, other = (way(latents, 500, networks.refining_text(way), *beside) for way in ways)
        found[name] = difference(one, other)
    return found


def measure_profile(networks: Networks, tools: Instruments) -> dict[str, dict[str, float]]:
    """What a guided step of stage 2, a chunk-step of the refiner and a decoded frame spend their time on."""
    models, config, (unet, vae), canvas = networks.streaming, networks.config, networks.refining, networks.canvas()
    assert models.cam is not None
    text, shown = networks.text(models.unet), networks.base_frames(config.stream.overlap)
    prepared = models.unet.prepare(text, stream.anchor_tokens(models, shown[0])), models.cam.prepare(text)
    predict = stream.predictor(models, *prepared, shown)
    shape = (models.unet.config.out_channels, config.stream.chunk, *latent_size(models.vae, *config.stream.size))
    latents = networks.random(1, *shape)
    cells = networks.random(1, unet.config.out_channels, *latent_size(vae, *canvas))
    works: dict[str, Work] = {
        "stage 2, a step": lambda: torch.cat(both_branches(predict, latents, 500, True)),
        CHUNK_STEP: networks.chunk_step(canvas),
        DECODE: partial(decode_latents, vae, cells),
    }
    for work in works.values():
        work()
    return {name: tools.profile(work) for name, work in works.items()}


def tell_gain(name: str, row: Mapping[str, Any]) -> None:
    """Print what a gain brings."""
    print(f"{name}: {row['without']:.4f} -> {row['with']:.4f} s", flush=True)


def measure_gains(
    tools: Instruments, gains: Iterator[tuple[str, Work, Work]], tell: Callable[[str, dict[str, Any]], None] = tell_gain
) -> dict[str, dict[str, Any]]:
    """Seconds without and with each gain, and the largest difference of the results over their largest value."""
    found: dict[str, dict[str, Any]] = {}
    for name, without, with_it in gains:
        change = difference(without(), with_it())
        before, after = tools.seconds(without, with_it)
        found[name] = {"without": before, "with": after, "repeats": tools.repeats, "difference": change}
        tell(name, found[name])
    return found


# ---------------------------------------------------------------------------------------------------------- whole runs


class Warnings:
    """A report that keeps what went otherwise than planned."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def tell(self, status: Status) -> None: ...

    def note(self, text: str, warning: bool = False) -> None:
        self.said += [text] if warning else []


def whole_run(asked: RunConfig, device: devices.Device, gigabytes: float | None = None) -> tuple[Result, list[str]]:
    """Make a video as the command does, into a folder that is removed; return what was made, and warnings."""
    report = Warnings()
    with tempfile.TemporaryDirectory() as folder:
        where = {"device": device.name, "threads": threads(device), "memory": gigabytes}
        job = Job("generate", asked, Path(folder) / "out.mp4", **where)
        return pipeline.run(job, report), report.said


def threads(device: devices.Device) -> int | None:
    """One on a CPU, so that its seconds can be added up; as many as usual beside a GPU."""
    return 1 if device.kind == "cpu" else None


def measure_tiers(
    asked: RunConfig, tools: Instruments, tiers: Sequence[float], tell: Callable[[dict[str, Any]], None] = print
) -> list[dict[str, Any]]:
    """Run two chunks of every stage within each of `tiers` GB, which a GPU then holds the process to."""
    one_step = {f"{stage}.num_inference_steps": 1 for stage in ("initialize", "stream", "refine")}
    frames = asked.refine.chunk + 1
    asked = config.merge(config.to_flat(asked), one_step, {"num_frames": frames})
    found = []
    for gigabytes in tiers:
        stages = needs.stages(asked)
        policy = memory.choose(int(gigabytes * 1e9), stages, tools.device.kind)
        row: dict[str, Any] = {
            "gigabytes": gigabytes,
            "policy": policy.describe(),
            "stated_bytes": memory.needed(stages, policy),
        }
        tools.forget_peak()
        try:
            _, warnings = whole_run(asked, tools.device, gigabytes)
            row |= {"peak_bytes": tools.peak(), "warnings": warnings}
        except MemoryLimitError as error:
            row |= {"peak_bytes": None, "warnings": [error.message]}
        found.append(row)
        tell(row)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "streamingt2v"), help="default: demo on a CPU, else streamingt2v")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", default="", help="GB, separated by commas")
    parser.add_argument("--run", type=int, default=0, metavar="FRAMES")
    parser.add_argument("--compile", action="store_true", help="also what compiling brings; --run is compiled")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=PAGE, help="the table made of them")
    parser.add_argument("--table", action="store_true", help="only write docs/speed.md again")
    asked = parser.parse_args(arguments)
    if not asked.table:
        measure_all(asked)
    asked.page.write_text(table(asked.results), "utf-8")


@torch.inference_mode()
def measure_all(asked: argparse.Namespace) -> None:
    """Measure what was asked for and write the result."""
    device = devices.resolve(asked.device)
    devices.set_threads(threads(device))
    devices.keep_freed_memory()
    model = asked.model or ("demo" if device.kind == "cpu" else "streamingt2v")
    given, tools = parse_settings(asked.set), Instruments(device, asked.repeats)
    dtype = torch.float32 if device.kind == "cpu" else torch.float16
    name = (
        devices.describe(device).partition(" (")[0] if device.kind == "cuda" else f"{platform.machine()} {device.kind}"
    )
    result: dict[str, Any] = {
        "date": date.today().isoformat(), "device": name, "model": model, "dtype": str(dtype).removeprefix("torch."),
        "clock": "CUDA events" if device.kind == "cuda" else "seconds of this process on one core",
        "versions": {package: version(package) for package in ("torch", "diffusers", "transformers")},
        "python": platform.python_version(), "settings": given,
        "parts": {}, "totals": {}, "rounding": {}, "gains": {}, "near_gains": {}, "profile": {}, "tiers": [],
        "run": None,
    }  # fmt: skip
    target = asked.results / f"{result['date']}-speed-{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{model}.json"

    if target.exists():
        result = json.loads(target.read_text("utf-8"))
        print(f"going on with {target}", flush=True)

    def keep(**more: Any) -> None:
        result.update(more)
        target.write_text(json.dumps(result, indent=1) + "\n", "utf-8")

    with stand_ins(model):
        fast = settings(model, "fast", given)
        networks = Networks(fast, device, dtype)
        if not result["parts"]:
            keep(ceiling_tflops=tools.ceiling(dtype), parts=measure_parts(networks, tools, given))
            keep(totals=totals(result["parts"], model, given))
        if not result["gains"]:
            keep(rounding=rounding(networks), gains=measure_gains(tools, gains(networks, asked.compile)))
        if not result.get("near_gains"):
            keep(near_gains=measure_gains(tools, near_gains(networks)))
        if not result.get("profile"):
            keep(profile=measure_profile(networks, tools))
        del networks  # what follows loads its own
        if not result["tiers"]:
            keep(tiers=measure_tiers(fast, tools, [float(tier) for tier in asked.memory.split(",") if tier]))
        if asked.run and not result["run"]:
            length_and_way = {"num_frames": asked.run, "compile": asked.compile}
            made, _ = whole_run(config.merge(config.to_flat(fast), length_and_way), device)
            keep(
                run={
                    "compiled": asked.compile,
                    "frames": made.frames,
                    "width": made.width,
                    "height": made.height,
                    "seconds": made.seconds,
                }
            )
    print(target)


if __name__ == "__main__":
    main()
