"""The first ten minutes on a GPU: what is not known without one, in order of value, every answer on disk at once.

    python benchmarks/gpu.py --out FOLDER                       # all steps, 560 s in all; rows in FOLDER/DATE-gpu.jsonl
    python benchmarks/gpu.py --out FOLDER --only micro,parts    # some of them
    python benchmarks/gpu.py --small                            # on a CPU, with small networks: does the script work?
    python benchmarks/gpu.py --table                            # docs/speed.md, from all rows in benchmarks/results

Each step is a process of its own with a limit of time; what it printed before it failed or was stopped is kept, and the
next one begins. No weights but the demo's are needed. `benchmarks/pack_gpu.sh` packs what must travel to a machine that
has torch and nothing else.
"""

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # the checkout need not be installed
TOTAL = 560  # seconds: what one call of ten minutes leaves
REPEATS = 3
PATIENCE = 4  # times the limit of a step, for a CPU that others use too
# What --small makes of the settings: every part of the machinery, nothing to look at.
SMALL = {
    "stream.height": 24, "stream.width": 40, "output.height": 48, "output.width": 80, "num_frames": 17,
    "initialize.num_inference_steps": 1, "stream.num_inference_steps": 1, "refine.num_inference_steps": 1,
    "refine.chunk": 8, "refine.overlap": 2,
}  # fmt: skip


class Step(NamedTuple):
    """What is asked, and after how many seconds it is stopped."""

    seconds: float
    ask: Callable[[bool], None]


def say(name: str, **row: Any) -> None:
    """Print a row; whoever started this step has it on disk before the next one."""
    print(json.dumps({"name": name, **row}), flush=True)


def timed(name: str, way: str, small: bool, work: Callable[[], Any], repeats: int = 10, **more: Any) -> None:
    """Say how many milliseconds some work takes, the median of some; or how it fails."""
    import torch

    def once() -> float:
        if small:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    try:
        once(), once()
        say(name, way=way, ms=round(1000 * statistics.median(once() for _ in range(repeats)), 4), **more)
    except Exception as error:  # the next one may work
        say(name, way=way, error=f"{type(error).__name__}: {error}"[:300])


# -------------------------------------------------------------------------------------------------------------- steps


def facts(small: bool) -> None:
    """What is here, how long it takes to import, and what the card can do at best."""
    import torch

    device = "cpu" if small else "cuda"
    packages = {}
    for package in ("torch", "diffusers", "transformers", "triton", "av", "imageio-ffmpeg"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not here"
    card = platform.machine() if small else torch.cuda.get_device_name()
    memory = 0 if small else torch.cuda.get_device_properties(0).total_memory
    cudnn = None if small else torch.backends.cudnn.version()
    say("machine", card=card, small=small, date=date.today().isoformat(), python=platform.python_version(),
        memory=memory, cores=os.cpu_count(), cuda=torch.version.cuda, cudnn=cudnn, packages=packages)  # fmt: skip
    for module in ("diffusers", "transformers", "av", "streamt2v.runs.pipeline"):
        began = time.perf_counter()
        try:
            __import__(module)
            say("import", way=module, ms=round(1000 * (time.perf_counter() - began)))
        except Exception as error:
            say("import", way=module, error=f"{type(error).__name__}: {error}"[:300])
    size = 256 if small else 8192
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        timed("product of large matrices", str(dtype), small, partial(torch.matmul, a, b), tflop=2 * size**3 / 1e12)
    many = torch.empty(2**20 if small else 2**31, dtype=torch.uint8, device=device)
    timed("copy on the device", "2 GiB", small, many.clone, gb=2 * many.numel() / 1e9)
    host = torch.empty(2**18 if small else 442_000_000, dtype=torch.uint8)
    timed("copy up, 442 MB", "pageable", small, lambda: host.to(device), gb=host.numel() / 1e9)
    if not small:
        pinned = host.pin_memory()
        timed("copy up, 442 MB", "pinned", small, lambda: pinned.to(device, non_blocking=True), gb=host.numel() / 1e9)


EXHAUSTED = {
    "allocator": "torch.empty(1 << 45, dtype=torch.uint8, device=device)",
    "cuBLAS": "full(); torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)",
    "cuDNN": "full(); torch.nn.functional.conv2d(torch.ones(1, 8, 64, 64, device=device), "
    "torch.ones(8, 8, 3, 3, device=device))",
    "pinned memory": "torch.empty(1 << 42, dtype=torch.uint8).pin_memory()",
    "host": "torch.empty(1 << 60, dtype=torch.uint8)",
}


def rules(small: bool) -> None:
    """Do runs work, repeat, go on and agree with a CPU; is exhausted memory recognised; do the tests for a GPU pass?"""
    import numpy as np
    import torch

    from streamt2v import devices, memory

    kind, device = ("cpu", "cpu") if small else ("cuda", "cuda:0")
    ladder, made = memory.ladder(kind), {}
    ways: dict[str, tuple[str, Any]] = {"run": (device, ladder[0]), "again": (device, ladder[0])}
    ways |= {"one stage at a time": (device, ladder[1]), "most sparing": (device, ladder[-1])}
    if not small:
        half = ladder[0]
        ways["the same on the CPU"] = ("cpu", half)
    for name, (place, policy) in ways.items():
        began = time.perf_counter()
        try:
            made[name] = whole_run(place, policy)
        except Exception as error:
            say("whole run", way=name, error=f"{type(error).__name__}: {error}"[:300])
            continue
        off = np.abs(made[name].astype(int) - made["run"].astype(int)) if "run" in made else np.zeros(1)
        say("whole run", way=name, ms=round(1000 * (time.perf_counter() - began)), equal=not off.any(),
            mean_levels=float(off.mean()), largest_levels=int(off.max()))  # fmt: skip

    if not small:
        count_waits(device, ladder[0])
    held: list[torch.Tensor] = []

    def full() -> None:
        free = torch.cuda.mem_get_info()[0]
        held.append(torch.empty(free - (12 << 20), dtype=torch.uint8, device=device))

    for what, code in EXHAUSTED.items():
        if small and what != "host":
            continue
        try:
            exec(code, {"torch": torch, "device": device, "full": full})
            say("exhausted memory", way=what, said="nothing")
        except Exception as error:
            found = devices.is_out_of_memory(error)
            say("exhausted memory", way=what, recognised=found, kind=type(error).__name__, said=str(error)[:200])
        held.clear()
        if not small:
            torch.cuda.empty_cache()
    files = ["tests/test_devices.py", *([] if small else ["tests/benchmarks/test_speed.py"])]
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", "-W", "default", *files]
    ended = subprocess.run([*command, "-m", "gpu"], cwd=ROOT, capture_output=True, text=True)
    last = (ended.stdout.strip() or ended.stderr.strip()).splitlines()[-1:]
    say("tests for a GPU", code=ended.returncode, said="".join(last)[:200])


def whole_run(place: str, policy: Any) -> Any:
    """Frames [F, H, W, 3] of a short video of the demo, made by the policy."""
    import numpy as np

    from benchmarks import random_networks, speed
    from streamt2v import config, memory
    from streamt2v.jobs.job import Job
    from streamt2v.media import reading
    from streamt2v.runs import pipeline

    asked = config.merge(config.preset("demo"), SMALL, {"prompt": random_networks.PROMPT, "output.crf": 1})
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(memory, "choose", lambda *_: policy):
        path = Path(folder) / "out.mp4"
        pipeline.run(Job("generate", asked, path, device=place, threads=1), speed.Warnings())
        return np.concatenate(list(reading.read_frames(path)))


def count_waits(place: str, policy: Any) -> None:
    """Say what torch itself sees the host wait for, by line: to be compared with the pretended GPU of the tests."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        whole_run(place, policy)
        torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in said if "synchroniz" in str(one.message))
    say("waits of a whole run", count=lines.total(), lines=dict(lines.most_common(20)))


def micro(small: bool) -> None:
    """Which attention, which norm, which layout: at the shapes of the published networks."""
    import torch
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device, dtype = ("cpu", torch.float32) if small else ("cuda", torch.float16)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def cut(extent: int) -> int:
        return max(1, extent // 256) if small and extent > 77 else extent

    shapes = {
        "of pixels, 720p": (48, 5, 14400, 14400), "of frames, 720p": (28800, 5, 24, 24),
        "of frames, first layer, 720p": (28800, 8, 24, 24), "to the text, 720p": (2, 5, 345600, 77),
        "of pixels, 256x256": (32, 5, 1024, 1024), "of frames, 256x256": (2048, 5, 16, 16),
        "to CAM, 256x256": (2048, 5, 16, 8),
    }  # fmt: skip
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with torch.inference_mode():
        for what, (batch, heads, queries, keys) in shapes.items():
            batch, queries, keys = cut(batch), cut(queries), cut(keys)
            q, k, v = (new(batch, n, heads, 64).transpose(1, 2) for n in (queries, keys, keys))
            attend, work = partial(F.scaled_dot_product_attention, q, k, v), 4 * batch * heads * queries * keys * 64
            timed(f"attention {what}", "torch's choice", small, attend, tflop=work / 1e12)
            for backend in backends if not small else ():
                with sdpa_kernel(backend):
                    timed(f"attention {what}", backend.name, small, attend, tflop=work / 1e12)
            del q, k, v
        norms = {"clip, 720p": (2, 320, 24, 14400), "images, 720p": (48, 320, 14400), "VAE, a frame": (1, 128, 921600),
                 "clip, 256x256": (2, 320, 16, 1024)}  # fmt: skip
        for what, shape in norms.items():
            x = new(*shape[:2], *map(cut, shape[2:]))
            weight, bias, gigabytes = new(shape[1]), new(shape[1]), 2 * x.numel() * x.element_size() / 1e9

            def norm(x: torch.Tensor, weight: Any = weight, bias: Any = bias) -> torch.Tensor:
                return F.silu(F.group_norm(x, 32, weight, bias))

            timed(f"GroupNorm and SiLU, {what}", "eager", small, partial(norm, x), gb=gigabytes)
            if not small:
                fused = torch.compile(norm, dynamic=False)
                timed(f"GroupNorm and SiLU, {what}", "compiled", small, partial(fused, x), gb=gigabytes)
            del x
        y = new(2, 320, 24, cut(14400)).permute(0, 3, 2, 1)
        linear = torch.nn.Linear(320, 320).to(device, dtype)
        timed("first projection of a temporal layer", "as it is", small, lambda: linear(y))
        timed("first projection of a temporal layer", "made contiguous", small, lambda: linear(y.contiguous()))
        x = new(48 if not small else 2, 320, *((90, 160) if not small else (9, 16)))
        for form in (torch.contiguous_format, torch.channels_last):
            conv = torch.nn.Conv2d(320, 320, 3, padding=1).to(device, dtype).to(memory_format=form)
            given, tflop = x.contiguous(memory_format=form), 2 * x.numel() * 320 * 9 / 1e12
            for exact in (True, False):
                torch.backends.cudnn.deterministic = exact
                way = f"{str(form).removeprefix('torch.')}, {'deterministic' if exact else 'any kernel'}"
                timed("convolution 3x3 of 320 channels, 720p", way, small, partial(conv, given), tflop=tflop)


@contextmanager
def measured(small: bool) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Yield the networks to measure, the instruments for it, and the settings given."""
    import torch

    from benchmarks import random_networks, speed
    from streamt2v import devices

    device = devices.resolve("cpu" if small else "cuda")
    devices.repeat_exactly(device)
    model, given = ("demo", SMALL) if small else ("streamingt2v", {})
    dtype = torch.float32 if small else torch.float16
    with random_networks.stand_ins(model), torch.inference_mode():
        networks = random_networks.Networks(random_networks.settings(model, "fast", given), device, dtype)
        yield networks, speed.Instruments(device, 1 if small else REPEATS), given


def parts(small: bool) -> None:
    """What each part of a run takes, and where its time goes."""
    from benchmarks import speed, speed_page

    with measured(small) as (networks, tools, given):

        def tell(name: str, row: dict[str, Any]) -> None:
            size = f"{row['width']}x{row['height']}"
            say(name, way=size, ms=round(1000 * row["seconds"], 3), tflop=row["tflop"], peak_bytes=row["peak_bytes"])

        found = speed.measure_parts(networks, tools, given, tell)
        for quality, row in speed.totals(found, networks.config.model, given).items():
            say(f"{speed_page.LENGTH} frames, extrapolated", way=quality, ms=round(1000 * row["together"]))
        for name, row in speed.measure_profile(networks, tools).items():
            say(f"where the time goes: {name}", shares={kind: round(row[kind] / row["whole"], 3) for kind in row})


COMPILED = ("stage 2", "refiner", "encode a frame", "decode a frame")


def compiling(small: bool) -> None:
    """What compiling brings: processes side by side fill one cache, then each is timed in turn."""
    from benchmarks import speed
    from streamt2v import devices

    alone = os.environ.get("STREAMT2V_COMPILE_ONLY")
    if small:
        devices.BACKEND = "eager"  # the machinery, not the code
    if alone is None:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            began, side_by_side = time.perf_counter(), []
            for name in COMPILED if not small else ():
                environment = {**os.environ, "STREAMT2V_COMPILE_ONLY": name}
                command = [sys.executable, __file__, "--step", "compile"]
                side_by_side.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
            codes = [process.wait() for process in side_by_side]
            say("compiling, side by side", ms=round(1000 * (time.perf_counter() - began)), codes=codes)
            with measured(small) as (networks, tools, _):
                chosen = COMPILED[2:] if small else COMPILED
                wanted = {f"compiled, {name}" for name in chosen}
                ways = (row for row in speed.gains(networks, True) if row[0] in wanted)
                speed.measure_gains(tools, ways, tell_gain)
        return
    with measured(small) as (networks, _, _):
        for name, _, fast in speed.gains(networks, True):
            if name == f"compiled, {alone}":
                fast()


def tell_gain(name: str, row: dict[str, Any]) -> None:
    """Say what a gain brings."""
    say(name, way="without", ms=round(1000 * row["without"], 3))
    say(name, way="with", ms=round(1000 * row["with"], 3), difference=row["difference"])


def tiers(small: bool) -> None:
    """How much memory a run really takes within each limit, beside what was stated."""
    from benchmarks import speed

    with measured(small) as (networks, tools, _):

        def tell(row: dict[str, Any]) -> None:
            kept = {key: row[key] for key in ("stated_bytes", "peak_bytes", "warnings")}
            say(f"within {row['gigabytes']:g} GB", way=row["policy"], **kept)

        speed.measure_tiers(networks.config, tools, [1] if small else [8, 12, 24], tell)


def train(small: bool) -> None:
    """How many steps of training a second, by the command that users give."""
    limit = ["--steps", "2"] if small else ["--minutes", "0.3"]
    for part in ("text",) if small else ("base", "refiner", "vae"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "streamt2v", "train", part, *limit, "--out", folder]
            command += ["--device", "cpu" if small else "cuda"]
            began = time.perf_counter()
            path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
            seconds, said = time.perf_counter() - began, ended.stderr.strip().splitlines()
        done = re.search(r"(\d+) steps, (\d+) s", said[-1] if said else "")
        rate = (
            {"steps": int(done[1]), "steps_per_second": round(int(done[1]) / max(1, int(done[2])), 3)} if done else {}
        )
        say("training", way=part, ms=round(1000 * seconds), code=ended.returncode, **rate, said=said[-1:] or [""])


STEPS = {
    "facts": Step(30, facts), "rules": Step(70, rules), "micro": Step(80, micro), "parts": Step(100, parts),
    "compile": Step(170, compiling), "tiers": Step(60, tiers), "train": Step(80, train),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the script


def command_of(step: str, small: bool) -> list[str]:
    """What carries out a step in a process of its own."""
    return [sys.executable, str(Path(__file__).resolve()), "--step", step, *(["--small"] if small else [])]


def run(steps: Sequence[str], table: Path, total: float, small: bool) -> None:
    """Carry out steps one after the other; every row is appended to `table` and synced as it comes."""
    end = time.monotonic() + total
    with table.open("a", encoding="utf-8") as rows, table.with_suffix(".log").open("a", encoding="utf-8") as errors:

        def keep(row: dict[str, Any]) -> None:
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            os.fsync(rows.fileno())
            print(json.dumps(row)[:300], flush=True)

        for step in steps:
            limit = min(STEPS[step].seconds * (PATIENCE if small else 1), end - time.monotonic())
            if limit < 5:
                keep({"step": step, "name": "end", "code": None, "seconds": 0, "stopped": "no time was left"})
                continue
            began = time.monotonic()
            process = subprocess.Popen(
                command_of(step, small), stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
            stopped: list[str] = []

            def stop(process: subprocess.Popen[str] = process, stopped: list[str] = stopped) -> None:
                stopped.append(f"after {limit:.0f} s")  # noqa: B023 - called before the next step begins
                os.killpg(process.pid, signal.SIGKILL)  # with what it started

            guard = threading.Timer(limit, stop)
            guard.start()
            with process:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("{"):
                        keep({"step": step, **json.loads(line)})
            guard.cancel()
            code = process.returncode
            took = round(time.monotonic() - began, 1)
            keep(
                {
                    "step": step,
                    "name": "end",
                    "code": code,
                    "seconds": took,
                    **({"stopped": stopped[0]} if stopped else {}),
                }
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the rows")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds in all")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, separated by commas")
    parser.add_argument("--small", action="store_true", help="on a CPU, with small networks")
    parser.add_argument("--table", action="store_true", help="only write docs/speed.md again")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.step:
        STEPS[asked.step].ask(asked.small)
        return
    if asked.table:
        from benchmarks import speed

        speed.main(["--table"])
        return
    steps = [step for step in asked.only.split(",") if step]
    if unknown := set(steps) - set(STEPS):
        parser.error(f"there is no step {', '.join(sorted(unknown))}; steps are {', '.join(STEPS)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    run(steps, asked.out / f"{date.today().isoformat()}-gpu{'-small' * asked.small}.jsonl", asked.total, asked.small)


if __name__ == "__main__":
    main()
