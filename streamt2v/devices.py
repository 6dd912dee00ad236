"""The device a run computes on: its name, its threads, its memory. No other file decides any of these.

Torch is imported when a device is resolved, not with this module.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from streamt2v.errors import ConfigError, stopped_by

if TYPE_CHECKING:
    import torch

Function = TypeVar("Function", bound=Callable[..., Any])
BACKEND = "inductor"  # of torch.compile
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """A device that is there, `name` as torch spells it: "cpu", "cuda:0", "mps"."""

    name: str

    @property
    def kind(self) -> str:
        """The name without its index."""
        return self.name.partition(":")[0]


def resolve(name: str = "auto") -> Device:
    """Find a device by name.

    Args:
        name: "auto" (the first CUDA device, else MPS, else the CPU), "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        ConfigError: the name means nothing, or this machine has no such device.
    """
    kind, index = parse(name)
    import torch

    has_mps = torch.backends.mps.is_available()
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if kind == "mps" and not has_mps:
        raise ConfigError("this machine has no mps device", "use --device cpu")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            why = "" if torch.version.cuda or torch.version.hip else "; the installed torch is a CPU build"
            found = f"{count} CUDA device{'s' if count != 1 else ''}"
            raise ConfigError(f"{name!r} is not there: torch finds {found}{why}", "use --device cpu, or auto")
    return Device(f"cuda:{int(index or 0)}" if kind == "cuda" else kind)


def parse(name: str) -> tuple[str, str]:
    """Split the name of a device into kind and index ("" where it has none); ConfigError where it means nothing."""
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (":" in name and not (kind == "cuda" and index.isdecimal())):
        raise ConfigError(f"{name!r} is no device", "devices are auto, cpu, cuda, cuda:0, cuda:1, ... and mps")
    return kind, index


def describe(device: Device) -> str:
    """One line for people: the device, its size and its number format."""
    import torch

    if device.kind == "cuda":
        facts = torch.cuda.get_device_properties(device.name)
        return f"{facts.name} ({device.name}), {facts.total_memory / 2**30:.0f} GiB"
    return f"{device.name}, {usable_cpus()} cores, {free_memory() / 2**30:.1f} GiB free"


def usable_cpus() -> int:
    """Cores that this process may use: its affinity, and the quota of its container when there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _first_line("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def default_threads() -> int:
    """Threads of a run that asks for none in particular: OMP_NUM_THREADS, else all usable cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else usable_cpus()


def set_threads(threads: int | None = None) -> int:
    """Fix the number of threads of CPU maths, and return it; None means `default_threads`.

    The number is part of what makes a run repeatable: sums split over other numbers of threads round differently.

    Raises:
        ConfigError: fewer than one thread is asked for.
    """
    import torch

    if threads is not None and threads < 1:
        raise ConfigError(f"{threads} threads cannot compute", "use --threads 1 or more")
    threads = default_threads() if threads is None else threads
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory() -> bool:
    """Let the C library keep freed blocks for the next tensor; returns whether it can (glibc only).

    By default glibc gives large blocks back to the system at once and asks for them again, zeroed page by page:
    decoding one 1280x720 frame took 1.7 s instead of 3.7 s with this set, for about a third more memory at the peak.
    """
    trim_threshold, mmap_threshold = -1, -3  # names of these limits in malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_threshold, 2**30)) and bool(mallopt(trim_threshold, 2**31 - 1))


def arrange(network: torch.nn.Module, device: Device) -> None:
    """Lay the weights of convolutions out as a device computes fastest: on a CPU with channels last, else as they are.

    Features then keep their channels last from one layer to the next, and nothing is reordered around a convolution:
    3 to 6 % less time for the UNets, 13 % for the VAE. On GPUs it is not measured yet (benchmarks/speed.py does it).
    """
    if device.kind == "cpu":
        import torch

        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for parameter in network.parameters():
            if parameter.ndim in formats:
                parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])


def has_bfloat16(device: Device) -> bool:
    """Tell whether a device multiplies bfloat16 faster than float32: GPUs, and CPUs with instructions for it."""
    import torch

    # Before torch 2.7 it could not be asked.
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.kind == "cuda" or (device.kind == "cpu" and bool(asked()))


def keep_compiled(folder: Path) -> None:
    """Keep what torch compiles for later processes in a folder, unless TORCHINDUCTOR_CACHE_DIR names one.

    To be called before diffusers or transformers is imported: they set the variable to a temporary folder.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def compiled(function: Function, device: Device, *, graphs: bool = False) -> Function:
    """Return a function of tensors that torch compiles at its first call, and again for tensors of other shapes.

    Where that fails, a warning says so and the function itself is called from then on.

    Args:
        function: computes without looking at values, so that one graph holds all of it.
        device: where it runs; a CPU needs a C++ compiler.
        graphs: on a CUDA device also record the kernels as graphs, which keep their memory until `release_memory`; for
            functions whose kernels take less time than their launch.
    """
    import torch

    mode = "reduce-overhead" if graphs and device.kind == "cuda" else None
    made: Callable[..., Any] | None = torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND, mode=mode)

    def call(*args: Any) -> Any:
        nonlocal made
        if made is not None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what torch thinks of the code of others while it compiles that
                    result = made(*args)
                # The next call of a recorded graph writes to the same memory.
                if mode:
                    result = tuple(map(torch.clone, result)) if isinstance(result, tuple) else result.clone()
                return result
            except Exception as error:  # of any kind: what is wrong with the function itself, its own call will say
                if stopped_by(error) or is_out_of_memory(error):
                    raise
                log.warning("not compiled, which is slower: %s", " ".join(str(error).splitlines()[:2]))
                made = None
        return function(*args)

    return cast(Function, call)


def wait(device: Device) -> None:
    """Return when the device has done what it was given; a CUDA device works behind our back."""
    if device.kind == "cuda":
        import torch

        torch.cuda.synchronize(device.name)


def release_memory(device: Device) -> None:
    """Give freed blocks of a CUDA device back, before another model wants them in other sizes."""
    if device.kind == "cuda":
        import torch

        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # recorded graphs keep theirs
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that the device or the host had too little memory."""
    import torch

    # The CPU's allocator has no class of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def glance(name: str = "auto") -> tuple[str, int]:
    """Kind and free bytes of the device that `resolve` would most likely find, without importing torch.

    Raises:
        ConfigError: the name means nothing.
    """
    from importlib.metadata import version  # not at import: it takes 15 ms of every command

    kind, _ = parse(name)
    if kind in ("auto", "cuda") and (kind == "cuda" or "+cpu" not in version("torch")):
        ask = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        try:
            said = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.split()
            return "cuda", int(said[0]) * 2**20
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            pass
    return "cpu" if kind == "auto" else kind, free_memory()


def offload(network: torch.nn.Module, device: Device) -> None:
    """Keep the weights of a network on the host; those of each layer are copied to the device while it runs."""
    import torch

    host: dict[torch.nn.Parameter, torch.Tensor] = {}

    def moved(value: Any) -> Any:
        return value.to(device.name) if isinstance(value, torch.Tensor) else value

    def fetch(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for parameter in layer.parameters(recurse=False):
            host[parameter] = parameter.data
            parameter.data = parameter.data.to(device.name, non_blocking=True, copy=True)
        return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}

    def give_back(layer: torch.nn.Module, *_: Any) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = host.pop(parameter)

    for buffer in network.buffers():
        buffer.data = moved(buffer.data)
    for layer in network.modules():
        if not any(True for _ in layer.parameters(recurse=False)):
            continue
        for parameter in layer.parameters(recurse=False):
            if device.kind == "cuda":
                parameter.data = parameter.data.pin_memory()  # copied without waiting
        layer.register_forward_pre_hook(fetch, with_kwargs=True)
        layer.register_forward_hook(give_back, always_call=True)


def free_memory(device: Device | None = None) -> int:
    """Bytes that can still be allocated on a device; None means the host, or its container if that is smaller."""
    if device is not None and device.kind == "cuda":
        import torch

        free: int = torch.cuda.mem_get_info(device.name)[0]
        return free
    limits = [_available_on_host()]
    limit, used = _first_line("/sys/fs/cgroup/memory.max"), _first_line("/sys/fs/cgroup/memory.current")
    if limit.isdecimal() and used.isdecimal():
        # Cached file pages count as used there although they give way.
        limits.append(int(limit) - int(used) + _field("/sys/fs/cgroup/memory.stat", "inactive_file"))
    return max(0, min(limits))


def _available_on_host() -> int:
    available = _field("/proc/meminfo", "MemAvailable:") * 1024
    if available:
        return available
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # no such file (macOS): all memory there is


def peak_memory(device: Device | None = None) -> int:
    """Largest number of bytes this process has held so far on a device; None means the host."""
    if device is not None and device.kind == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device.name))
    # The kernel's own mark starts anew with the program; ru_maxrss would count a larger parent process too.
    mark = _field("/proc/self/status", "VmHWM:") * 1024
    if mark:
        return mark
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text("utf-8").partition("\n")[0].strip()
    except OSError:
        return ""


def _field(path: str, name: str) -> int:
    """The first number behind `name` in a file of the system; 0 when there is none."""
    try:
        rows = [line.split() for line in Path(path).read_text("utf-8").splitlines() if line.startswith(name)]
    except OSError:
        return 0
    return int(rows[0][1]) if rows else 0
