"""The device a run computes on: its name, threads and memory. No other file decides any of these.

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

from streamt2v.errors import (
    ConfigError,
    MemoryLimitError,
    StreamT2VError,
    address_limit,
    less_memory,
    spoken_bytes,
    stopped_by,
)
from streamt2v.memory import OWN_BYTES

if TYPE_CHECKING:
    import torch

Function = TypeVar("Function", bound=Callable[..., Any])
BACKEND = "inductor"  # of torch.compile
# The words of CUDA, HIP, MPS and Triton; of cuBLAS and cuDNN; of the CPU allocator.
_OUT_OF_MEMORY = re.compile(r"out of memory|_STATUS_ALLOC_FAILED|allocate memory", re.IGNORECASE)
TO_BEGIN = 700_000_000  # bytes that torch and the libraries beside it map when they are imported; below, they crash
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """A device of this machine; `name` as torch spells it: "cpu", "cuda:0", "mps"."""

    name: str

    @property
    def kind(self) -> str:
        """The name without its index."""
        return self.name.partition(":")[0]


class Glance(NamedTuple):
    """What can be known of a device without torch: its kind, free bytes, and the name of a GPU."""

    kind: str
    free: int
    card: str = ""


def resolve(name: str = "auto") -> Device:
    """Find a device by name; a CUDA device becomes the current one of this process.

    CUDA devices are numbered by slot, as in nvidia-smi, unless CUDA_DEVICE_ORDER says otherwise; only those in
    CUDA_VISIBLE_DEVICES count.

    Args:
        name: "auto" (the first CUDA device, else MPS, else the CPU), "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        ConfigError: the name is invalid, or this machine has no such device.
        MemoryLimitError: see `check_limit`.
    """
    kind, index = parse(name)
    check_limit()
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
            raise ConfigError(f"there is no {name!r}: torch finds {found}{why}", "use --device cpu, or auto")
    if kind != "cuda":
        return Device(kind)
    # Otherwise the first device would pin memory and record events.
    torch.cuda.set_device(int(index or 0))
    return Device(f"cuda:{int(index or 0)}")


def parse(name: str) -> tuple[str, str]:
    """Split the name of a device into kind and index ("" if it has none). Raises ConfigError for an invalid name."""
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (":" in name and not (kind == "cuda" and index.isdecimal())):
        raise ConfigError(f"{name!r} is not a device", "devices are auto, cpu, cuda, cuda:0, cuda:1, ... and mps")
    return kind, index


def check(name: str) -> None:
    """Refuse an invalid name, and at once what the installed torch cannot have. Raises ConfigError."""
    from importlib.metadata import version

    kind, _ = parse(name)
    if kind == "cuda" and "torch" not in sys.modules and "+cpu" in version("torch"):
        raise ConfigError(f"there is no {name!r}: the installed torch is a CPU build", "use --device cpu, or auto")


def check_limit() -> None:
    """Refuse a limit of this shell in which torch cannot even be loaded. Raises MemoryLimitError."""
    limit = address_limit()
    if limit is not None and limit < TO_BEGIN and "torch" not in sys.modules:
        raise MemoryLimitError(f"{spoken_bytes(TO_BEGIN)} are needed to load the libraries", less_memory())


def card(device: Device) -> str:
    """Return the name of a GPU, "" for other devices. Two GPUs of the same name compute the same bits."""
    if device.kind != "cuda":
        return ""
    import torch

    return str(torch.cuda.get_device_properties(device.name).name)


def caution(kind: str) -> str:
    """Return what users should know before a run on a kind of device, or ""."""
    if kind != "mps":
        return ""
    return (
        "streamt2v was never tested on MPS, where attention stores all pairs of positions, so large frames take far "
        "more memory than stated; --device cpu is tested"
    )


def describe(device: Device) -> str:
    """Describe a device in one line: its name and its size."""
    import torch

    if device.kind == "cuda":
        facts = torch.cuda.get_device_properties(device.name)
        return f"{facts.name} ({device.name}), {facts.total_memory / 2**30:.0f} GiB"
    return f"{device.name}, cores: {usable_cpus()}, {free_memory() / 2**30:.1f} GiB free"


def usable_cpus() -> int:
    """Return the number of cores this process may use, by its affinity and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _first_line("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def default_threads() -> int:
    """Return the number of threads of a run that does not set it: OMP_NUM_THREADS, else all usable cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else usable_cpus()


def set_threads(threads: int | None = None) -> int:
    """Set the number of threads for maths on the CPU and return it; None means `default_threads`.

    A run is only repeatable with the same number: sums split over other numbers of threads round differently.

    Raises:
        ConfigError: fewer than one thread.
    """
    import torch

    if threads is not None and threads < 1:
        raise ConfigError(f"a run cannot have {threads} threads", "use --threads 1 or more")
    threads = default_threads() if threads is None else threads
    torch.set_num_threads(threads)
    return threads


def repeat_exactly(device: Device) -> None:
    """Make a CUDA device use the same kernels for the same work, so that a run repeats to the bit.

    cuDNN then avoids kernels that sum in no fixed order, and does not time kernels against each other; cuBLAS gets its
    32 MiB of memory in advance. `benchmarks/gpu.py` measures the cost in time (not yet run on CUDA). When memory is
    nearly exhausted, cuDNN may still have to choose another kernel, and bits can differ.
    """
    if device.kind == "cuda":
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def limit_memory(device: Device, limit: int | None) -> None:
    """Limit this process to `limit` bytes of a CUDA device, its context included; None allows all of it.

    Allocations beyond it fail as if the device were full. Other devices are not limited.
    """
    if device.kind == "cuda":
        import torch

        there = torch.cuda.get_device_properties(device.name).total_memory
        wanted = there if limit is None else max(limit - OWN_BYTES, limit // 2)
        torch.cuda.set_per_process_memory_fraction(min(1.0, wanted / there), device.name)


def keep_freed_memory() -> bool:
    """Make the C library keep freed blocks for the next tensor; return whether it can (glibc only).

    By default glibc returns large blocks to the system at once and requests them again, zeroed page by page. Keeping
    them cut the decoding of a 1280x720 frame from 3.7 s to 1.7 s, for about a third more memory at the peak. All
    threads take from what is kept: with a store for each, what one has freed would be of no use to the next.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # names of these limits in malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    limits = {mmap_threshold: 2**30, trim_threshold: 2**31 - 1, arena_max: 1}
    return all(mallopt(name, limit) for name, limit in limits.items())


def arrange(network: torch.nn.Module, device: Device) -> None:
    """Arrange a network's weights as the device computes fastest: on a CPU, convolutions with channels last.

    Features then keep their channels last from layer to layer, and nothing is reordered around a convolution: 3 to 6 %
    less time for the UNets, 13 % for the VAE. On GPUs this is not measured yet (benchmarks/speed.py does it).

    A network that calls itself `narrow` becomes bfloat16 where that is faster than float32.
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
    """Return whether a device multiplies bfloat16 faster than float32: GPUs, and CPUs with AMX or AVX-512 for it.

    Not Intel's AVX-512 alone: where a virtual machine hides AMX, convolutions took 1.85 times as long as in float32.
    """
    import torch

    # Torch before 2.7 cannot tell. The vendor as Linux, and as Windows names it.
    amx, avx512 = (getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("amx_tile", "avx512_bf16"))
    intel = "GenuineIntel" in _text("/proc/cpuinfo") + os.environ.get("PROCESSOR_IDENTIFIER", "")
    return device.kind == "cuda" or (device.kind == "cpu" and bool(amx or (avx512 and not intel)))


def keep_compiled(folder: Path) -> None:
    """Cache what torch compiles in a folder, for later processes, unless TORCHINDUCTOR_CACHE_DIR is set.

    Call this before diffusers or transformers is imported: they set the variable to a temporary folder.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def compiled(function: Function, device: Device, *, graphs: bool = False) -> Function:
    """Return a function of tensors that torch compiles at its first call, and again for other shapes.

    If compiling fails, a warning is logged and the original function is called from then on.

    Args:
        function: must not depend on values of tensors, so that one graph holds all of it.
        device: where it runs; a CPU needs a C++ compiler.
        graphs: on a CUDA device also record the kernels as graphs, which keep their memory until `release_memory`; for
            functions whose kernels take less time than their launch.
    """
    import torch

    mode = "reduce-overhead" if graphs and device.kind == "cuda" else None
    made: Callable[..., Any] | None = torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND, mode=mode)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        if made is not None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns about the libraries it compiles
                    result = made(*args, **kwargs)
                # The next call of a recorded graph overwrites its results.
                if mode:
                    result = tuple(map(torch.clone, result)) if isinstance(result, tuple) else result.clone()
                return result
            except Exception as error:  # of any kind: the function's own errors will show up below
                if stopped_by(error) or is_out_of_memory(error):
                    raise
                log.warning("not compiled, which is slower: %s", " ".join(str(error).splitlines()[:2]))
                made = None
        return function(*args, **kwargs)

    return cast(Function, call)


def wait(device: Device) -> None:
    """Wait until the device has finished its work; a CUDA device works asynchronously."""
    if device.kind == "cuda":
        import torch

        torch.cuda.synchronize(device.name)


class Stopwatch:
    """Adds up the seconds of some work; on a CUDA device by its own clock, so that the host need not wait."""

    def __init__(self, device: Device) -> None:
        self.device, self._seconds = device, 0.0
        self._pending: deque[tuple[Any, Any]] = deque()  # events at the start and the end of some work

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time what is done in the block, not what was queued before it."""
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
        """Seconds so far; waits for the device."""
        wait(self.device)
        self._collect()
        return self._seconds


def send(values: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Copy a tensor from the host to a device, without waiting for a CUDA device that is still busy.

    An asynchronous copy needs pinned memory, so the values go there first.
    """
    if not str(device).startswith("cuda"):
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def release_memory(device: Device, *, graphs: bool = False) -> None:
    """Return freed blocks to a CUDA device, before another model needs them in other sizes.

    Args:
        device: the device.
        graphs: also release what recorded graphs keep; their functions are compiled again at the next call.
    """
    if device.kind == "cuda":
        import torch

        if graphs and "torch._inductor.cudagraph_trees" in sys.modules:
            torch.compiler.reset()
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the host ran out of memory.

    Only torch's allocators have an exception class for it; errors of libraries, pinned memory and graphs are known by
    their message.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, StreamT2VError):
        return False
    # Under a limit of the shell, oneDNN does not say why it fails.
    limited = "could not create a primitive" in str(error) and address_limit() is not None
    return limited or _OUT_OF_MEMORY.search(str(error)) is not None


def glance(name: str = "auto") -> Glance:
    """Look at the device that `resolve` would most likely find, without importing torch if possible.

    Raises:
        ConfigError: the name is invalid, or this machine has no such device.
    """
    from importlib.metadata import version  # importing it takes 15 ms

    check(name)
    kind, index = parse(name)
    if kind == "cuda" or (kind == "auto" and "+cpu" not in version("torch")):
        cards = _cards()
        if int(index or 0) < len(cards):
            return cards[int(index or 0)]
    if kind in ("cuda", "mps"):  # torch knows devices that nvidia-smi does not, and reports what is missing
        device = resolve(name)
        return Glance(kind, free_memory(device), card(device))
    apple = kind == "auto" and (sys.platform, platform.machine()) == ("darwin", "arm64")
    return Glance("mps" if apple else "cpu", free_memory())


def _cards() -> list[Glance]:
    """Return the GPUs in nvidia-smi that CUDA_VISIBLE_DEVICES allows, in the order of the latter."""
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
            break  # CUDA ignores everything after an invalid name
        seen.append(found[meant[0]])
    return seen


def offload(network: torch.nn.Module, device: Device) -> None:
    """Keep the weights of a network on the host, and copy those of each layer to the device while it runs."""
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
            parameter.data = host.pop(parameter, parameter.data)  # not there if memory ran out before

    for buffer in network.buffers():
        buffer.data = moved(buffer.data)
    for layer in network.modules():
        if not any(True for _ in layer.parameters(recurse=False)):
            continue
        for parameter in layer.parameters(recurse=False):
            if device.kind == "cuda":
                parameter.data = parameter.data.pin_memory()  # for asynchronous copies
        layer.register_forward_pre_hook(fetch, with_kwargs=True)
        layer.register_forward_hook(give_back, always_call=True)


def free_memory(device: Device | None = None) -> int:
    """Return the bytes that can still be allocated on a device; None means the host, or its container if smaller."""
    if device is not None and device.kind == "cuda":
        import torch

        free: int = torch.cuda.mem_get_info(device.name)[0]
        return free
    limits = [_available_on_host()]
    if (address := address_limit()) is not None:
        limits.append(address - _field("/proc/self/status", "VmSize:") * 1024)
    limit, used = _first_line("/sys/fs/cgroup/memory.max"), _first_line("/sys/fs/cgroup/memory.current")
    if limit.isdecimal() and used.isdecimal():
        # The cgroup counts cached file pages as used, although they can be reclaimed.
        limits.append(int(limit) - int(used) + _field("/sys/fs/cgroup/memory.stat", "inactive_file"))
    return max(0, min(limits))


def _available_on_host() -> int:
    available = _field("/proc/meminfo", "MemAvailable:") * 1024
    if available:
        return available
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # no such file (macOS): total memory


def working_memory() -> int:
    """Return the most bytes this process has held where it computes: on its GPU once torch uses one, else on the host.

    It neither imports torch nor waits for the GPU.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return peak_memory()


def peak_memory(device: Device | None = None) -> int:
    """Return the most bytes this process has held so far on a device; None means the host."""
    if device is not None and device.kind == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device.name))
    # The kernel resets this mark when the program starts; ru_maxrss would include a larger parent process.
    mark = _field("/proc/self/status", "VmHWM:") * 1024
    if mark:
        return mark
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _text(path: str) -> str:
    """Return what a system file says, "" if there is none."""
    with contextlib.suppress(OSError):
        return Path(path).read_text("utf-8")
    return ""


def _first_line(path: str) -> str:
    return _text(path).partition("\n")[0].strip()


def _field(path: str, name: str) -> int:
    """Return the first number after `name` in a system file, 0 if there is none."""
    rows = [line.split() for line in _text(path).splitlines() if line.startswith(name)]
    return int(rows[0][1]) if rows else 0
