"""The device a run computes on: its name, its threads, its memory. No other file decides any of these.

Torch is imported when a device is resolved, not with this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from streamt2v.errors import ConfigError, StreamT2VError, stopped_by
from streamt2v.memory import OWN_BYTES

if TYPE_CHECKING:
    import torch

Function = TypeVar("Function", bound=Callable[..., Any])
BACKEND = "inductor"  # of torch.compile
# CUDA, HIP, MPS and Triton say the first, cuBLAS and cuDNN the second, the allocator of a CPU the third.
_OUT_OF_MEMORY = re.compile(r"out of memory|_STATUS_ALLOC_FAILED|allocate memory", re.IGNORECASE)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """A device that is there, `name` as torch spells it: "cpu", "cuda:0", "mps"."""

    name: str

    @property
    def kind(self) -> str:
        """The name without its index."""
        return self.name.partition(":")[0]


class Glance(NamedTuple):
    """What can be known of a device without torch: its kind, its free bytes, and the name of a GPU."""

    kind: str
    free: int
    card: str = ""


def resolve(name: str = "auto") -> Device:
    """Find a device by name; a CUDA device becomes the one that this process works on.

    CUDA devices are counted in the order of their slots, as nvidia-smi does, unless CUDA_DEVICE_ORDER says otherwise;
    and only those that CUDA_VISIBLE_DEVICES leaves.

    Args:
        name: "auto" (the first CUDA device, else MPS, else the CPU), "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        ConfigError: the name means nothing, or this machine has no such device.
    """
    kind, index = parse(name)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
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
    if kind != "cuda":
        return Device(kind)
    # Else memory would be pinned, and events recorded, by the first device.
    torch.cuda.set_device(int(index or 0))
    return Device(f"cuda:{int(index or 0)}")


def parse(name: str) -> tuple[str, str]:
    """Split the name of a device into kind and index ("" where it has none); ConfigError where it means nothing."""
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (":" in name and not (kind == "cuda" and index.isdecimal())):
        raise ConfigError(f"{name!r} is no device", "devices are auto, cpu, cuda, cuda:0, cuda:1, ... and mps")
    return kind, index


def card(device: Device) -> str:
    """Name of a GPU; "" for other devices. Two of one name compute the same bits."""
    if device.kind != "cuda":
        return ""
    import torch

    return str(torch.cuda.get_device_properties(device.name).name)


def caution(kind: str) -> str:
    """What a user should know before a run on a kind of device; "" where there is nothing to say."""
    if kind != "mps":
        return ""
    return (
        "streamt2v was never tried on MPS: its attention keeps all pairs of positions there, so large frames take far "
        "more memory than is stated; --device cpu is tested"
    )


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


def repeat_exactly(device: Device) -> None:
    """Let a CUDA device answer the same question by the same kernels, so that a run repeats to the bit.

    cuDNN then leaves out what adds up in no fixed order, and tries no kernels against each other; cuBLAS gets its
    memory beforehand, 32 MiB. What that costs in time, `benchmarks/gpu.py` measures (not run on CUDA yet). Where hardly
    any memory is free, cuDNN may still have to take another kernel: then bits can differ.
    """
    if device.kind == "cuda":
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def limit_memory(device: Device, limit: int | None) -> None:
    """Hold this process to so many bytes of a CUDA device, its context included; None: to no less than there are.

    What asks for more fails as if there were no more. Other devices are not held to anything.
    """
    if device.kind == "cuda":
        import torch

        there = torch.cuda.get_device_properties(device.name).total_memory
        wanted = there if limit is None else max(limit - OWN_BYTES, limit // 2)
        torch.cuda.set_per_process_memory_fraction(min(1.0, wanted / there), device.name)


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

    A network that says it is `narrow` enough becomes bfloat16 where that is faster than float32.

    Features then keep their channels last from one layer to the next, and nothing is reordered around a convolution:
    3 to 6 % less time for the UNets, 13 % for the VAE. On GPUs it is not measured yet (benchmarks/speed.py does it).
    """
    import torch

    if getattr(network, "narrow", False) and has_bfloat16(device):
        network.to(torch.bfloat16)
    if device.kind == "cpu":
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


class Stopwatch:
    """Adds up the seconds of some work; on a CUDA device by the device's own clock, so that nobody waits for it."""

    def __init__(self, device: Device) -> None:
        self.device, self._seconds = device, 0.0
        self._pending: deque[tuple[Any, Any]] = deque()  # events: when some work began, and when it ended

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done inside the block; what was queued before it does not belong to it."""
        if self.device.kind != "cuda":
            began = time.monotonic()
            yield
            self._seconds += time.monotonic() - began
            return
        import torch

        cuda: Any = torch.cuda
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._pending.append((start, end))
        self._collect()

    def _collect(self) -> None:
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.popleft()
            self._seconds += start.elapsed_time(end) / 1000

    @property
    def seconds(self) -> float:
        """What was counted so far; waits for the device."""
        wait(self.device)
        self._collect()
        return self._seconds


def send(values: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device; a CUDA device may still be busy then, and nobody waits for it.

    Only out of pinned memory can a copy be left to the device, so the values go there first.
    """
    if not str(device).startswith("cuda"):
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def release_memory(device: Device, *, graphs: bool = False) -> None:
    """Give freed blocks of a CUDA device back, before another model wants them in other sizes.

    Args:
        device: where.
        graphs: also those that recorded graphs keep; what is called again after that is compiled anew.
    """
    if device.kind == "cuda":
        import torch

        if graphs and "torch._inductor.cudagraph_trees" in sys.modules:
            torch.compiler.reset()
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that the device or the host had too little memory.

    Only the allocators of torch have a class of their own for that: of libraries, of pinned memory and of graphs there
    is the message alone.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return not isinstance(error, StreamT2VError) and _OUT_OF_MEMORY.search(str(error)) is not None


def glance(name: str = "auto") -> Glance:
    """Look at the device that `resolve` would most likely find, without importing torch where that can be helped.

    Raises:
        ConfigError: the name means nothing, or this machine has no such device.
    """
    from importlib.metadata import version  # not at import: it takes 15 ms of every command

    kind, index = parse(name)
    if kind == "cuda" or (kind == "auto" and "+cpu" not in version("torch")):
        cards = _cards()
        if int(index or 0) < len(cards):
            return cards[int(index or 0)]
    if kind in ("cuda", "mps"):  # torch knows of devices that nvidia-smi does not, and says what it lacks
        device = resolve(name)
        return Glance(kind, free_memory(device), card(device))
    apple = kind == "auto" and (sys.platform, platform.machine()) == ("darwin", "arm64")
    return Glance("mps" if apple else "cpu", free_memory())


def _cards() -> list[Glance]:
    """The GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves, in the order of the latter."""
    ask = ["nvidia-smi", "--query-gpu=index,uuid,memory.free,name", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout
        rows = [[cell.strip() for cell in line.split(",", 3)] for line in said.splitlines() if line.strip()]
        found = {(index, uuid): Glance("cuda", int(free) * 2**20, name) for index, uuid, free, name in rows}
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(found.values())
    seen = list[Glance]()
    for asked in map(str.strip, named.split(",")):
        meant = [key for key in found if asked == key[0] or (asked.startswith("GPU-") and key[1].startswith(asked))]
        if not meant:
            break  # CUDA sees nothing of what comes behind a name that means nothing
        seen.append(found[meant[0]])
    return seen


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
            parameter.data = host.pop(parameter, parameter.data)  # not fetched where memory ended before

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
