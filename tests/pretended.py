"""A pretended GPU: whole runs on a machine that has none, with real numbers and the rules of two devices.

Every tensor stays where it is, on the CPU; the storage behind it carries the name of the device that it would lie on.
While `pretended` lasts,

- `device="cuda:1"`, `.to("cuda:1")`, `.cpu()`, `.device` answer as they would: a copy, with the other name;
- an operation on tensors of two devices raises, as on a GPU; only a number of the CPU may join pixel-wise operations,
  and indices may lie there;
- so do a generator of one device that should fill a tensor of the other, `.numpy()` of what lies on the GPU, and a look
  at what is still on its way down;
- all that makes the host wait for the GPU is counted in `waits`, by what it was and by the lines that asked for it.

What it cannot see: kernels that do not exist for a device or number format, memory, and time.
"""

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import safetensors
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CPU = torch.device("cpu")
ANYWHERE = torch.device("meta")  # zeros that autograd makes for a missing gradient, where that would have been
NAME = "Pretended GPU"
PACKAGE = "/streamt2v/"
# Beside pixel-wise operations, those that take a number of the CPU for a tensor of the GPU.
TAKE_A_NUMBER = {"fill_", "masked_fill", "masked_fill_", "_foreach_mul", "_foreach_mul_", "_foreach_add_"}
COUNT_RESULTS = {"nonzero", "argwhere", "masked_select", "_unique2", "unique_consecutive", "unique_dim"}
PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
NAMED = {"to", "cpu", "cuda", "numpy", "__array__", "tolist", "new_tensor"}  # these ask for a place by what they are
LOOKS = {"_local_scalar_dense", "item", "equal", "allclose", "is_nonzero"}


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments or results, lists of them included; torch's own search takes most of a run."""
    found = list[Tensor]()
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            found.append(value)
        elif kind is list or kind is tuple:
            found += tensors(value)
        elif kind not in PLAIN and isinstance(value, Tensor):
            found.append(value)
    return found


@cache
def _facts(func: Any) -> tuple[str, bool, bool]:
    """The name of an operation, whether it only looks at its tensor in another way, whether a number may join it."""
    name = func._schema.name.removeprefix("aten::")
    return name, func.is_view, torch.Tag.pointwise in func.tags or name in TAKE_A_NUMBER


def place(tensor: Tensor) -> torch.device:
    """Where a tensor is said to lie."""
    return getattr(tensor.untyped_storage(), "place", CPU) if tensor.layout == torch.strided else CPU


def put(tensor: Tensor, where: torch.device) -> Tensor:
    if not tensor.is_meta and place(tensor) != where:
        tensor.untyped_storage().place = where  # type: ignore[attr-defined]
    return tensor


def parsed(device: Any) -> torch.device:
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", 0) if found.type == "cuda" and found.index is None else found


def asker(depth: int = 3) -> str:
    """The lines of the package that asked for what is being done, the innermost first: file, line and function."""
    found, frame = list[str](), sys._getframe(1)
    while frame is not None and len(found) < depth:
        file, line = frame.f_code.co_filename, frame.f_lineno
        if PACKAGE in file:
            found.append(f"{file.rpartition(PACKAGE)[2]}:{line} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or "not asked by the package"


def _in_backward() -> bool:
    """Whether autograd asks, from another language."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


class Waits(Counter[tuple[str, str]]):
    """How often the host waited for the GPU, by (what for, who asked)."""

    def add(self, what: str) -> None:
        self[what, asker()] += 1

    def report(self) -> str:
        return "\n".join(f"{count:5d}  {what}: {where}" for (what, where), count in self.most_common())

    def by_function(self) -> Counter[str]:
        """Counts by the innermost function, without lines, which move: "frames.py to_u8"."""
        found = Counter[str]()
        for (_, where), count in self.items():
            found[re.sub(r":\d+", "", where).partition(" < ")[0]] += count
        return found


class _Rules(TorchDispatchMode):
    """Every operation: its tensors lie on one device, and so does what it makes."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits, self.landing = waits, True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while this lasts; to see to that at every operation would take a tenth of the time."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, (name, is_view, joins) = kwargs or {}, _facts(func)
        given = [tensor for tensor in tensors((*args, *kwargs.values())) if not tensor.is_meta]
        where = self.common(name, joins, given)
        if self.landing and not is_view:
            for tensor in given:
                landed = getattr(tensor.untyped_storage(), "landing", None)
                if landed is not None and landed == self.waits.total():  # to count them takes longer than the rest
                    raise RuntimeError(f"{name} looks at a copy that is still on its way down ({asker()})")
        if where != CPU and name in LOOKS:
            self.waits.add("a number looked at")
        elif where != CPU and name in COUNT_RESULTS:
            self.waits.add("the number of results")
        result = func(*args, **kwargs)
        if not given and _in_backward():
            where = ANYWHERE
        if where != CPU:
            old = {tensor.untyped_storage()._cdata for tensor in given}
            for tensor in tensors((result,)):
                if tensor.untyped_storage()._cdata not in old:
                    put(tensor, where)
        return result

    def common(self, name: str, joins: bool, given: list[Tensor]) -> torch.device:
        """The device of an operation; a number may join some from the CPU. Raises RuntimeError where there are two."""
        places = {place(tensor) for tensor in given} - {ANYWHERE}
        if name.startswith("index") and places - {CPU}:
            return self.indexed(name, given)
        if len(places) < 2 or name == "_has_compatible_shallow_copy_type":  # the data of a parameter is exchanged
            return next(iter(places), CPU)
        if name == "copy_":
            self.copied(given[1], place(given[0]))
            return place(given[0])
        places = {place(tensor) for tensor in given if tensor.ndim or place(tensor) != CPU or not joins}
        return self.one(name, places - {ANYWHERE})

    @staticmethod
    def one(name: str, places: set[torch.device]) -> torch.device:
        if len(places) > 1:
            found = " and ".join(sorted(map(str, places)))
            raise RuntimeError(f"Expected all tensors to be on the same device, found {found} ({name}, {asker()})")
        return places.pop()

    def indexed(self, name: str, given: list[Tensor]) -> torch.device:
        """Indices of a tensor of the GPU may lie on the CPU, and so may a number that is put there."""
        where = place(given[0])
        is_index = [not tensor.is_floating_point() for tensor in given[1:]]
        for tensor, index in zip(given[1:], is_index, strict=True):
            if place(tensor) == where or (not index and not tensor.ndim):
                continue
            if name not in ("index", "index_put_", "index_put") or not index or where == CPU:
                self.one(name, {where, place(tensor)})
            self.waits.add("an index copied up")
        if any(tensor.dtype == torch.bool and tensor.ndim for tensor in given[1:]) and not (
            name.startswith("index_put") and given[-1].numel() == 1  # filled, not counted
        ):
            self.waits.add("the number of results")
        return where

    def copied(self, source: Tensor, there: torch.device, non_blocking: bool = False) -> None:
        """Count a copy between devices: only from pinned memory, and when asked to, nobody waits."""
        pinned = there == CPU or getattr(source.untyped_storage(), "pinned", False)
        if source.numel() and not (non_blocking and pinned):
            self.waits.add("copied down" if there == CPU else "copied up")


class _Names(TorchFunctionMode):
    """What names a device: a GPU is answered by the CPU, and the result bears the GPU's name."""

    def __init__(self, rules: _Rules) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) == "__get__":
            return self.attribute(func, args)
        if not kwargs and name not in NAMED:
            return func(*args)
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self.moved(args[0], *(args[1:] if func is Tensor.to else (name,)), **kwargs)
        if name in ("numpy", "__array__") and place(args[0]) != CPU:
            raise TypeError(f"can't convert {place(args[0])} device type tensor to numpy ({asker()})")
        if isinstance(generator := kwargs.get("generator"), _GENERATOR):
            tensor = next((leaf for leaf in args if isinstance(leaf, Tensor)), None)
            there = kwargs.get("device") or (CPU if tensor is None else place(tensor))
            if getattr(generator, "place", CPU) != parsed(there):
                raise RuntimeError(f"Expected a generator of the device {there} ({name}, {asker()})")
        if func is Tensor.tolist and place(args[0]) != CPU:
            self.rules.waits.add("numbers looked at")
        if name == "new_tensor" and place(args[0]) != CPU:
            kwargs.setdefault("device", place(args[0]))
        if kwargs.get("device") is None or parsed(kwargs["device"]).type == "meta":
            return func(*args, **kwargs)
        return self.made(func, args, kwargs)

    @staticmethod
    def attribute(func: Any, args: Any) -> Any:
        asked, tensor = ASKED.get(func.__self__), args[0]
        if asked is None:
            return func(*args)
        if asked == "device":
            return func(*args) if tensor.is_meta else place(tensor)
        return place(tensor).type == asked

    def made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A new tensor on a named device."""
        where = parsed(kwargs["device"])
        source = next((leaf for leaf in args if isinstance(leaf, Tensor)), None)
        if func is torch.as_tensor and source is not None:
            return self.moved(source, where, kwargs.get("dtype"))
        if where != CPU and (func in (torch.tensor, torch.as_tensor, torch.asarray) or func.__name__ == "new_tensor"):
            self.rules.waits.add("a number copied up")
        made = func(*args, **{**kwargs, "device": CPU})
        for tensor in tensors((made,)):
            put(tensor, where)
        return made

    def moved(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What `tensor.to(...)` returns."""
        if args and isinstance(args[0], Tensor):
            args = (place(args[0]), args[0].dtype, *args[1:])
        kept = {key: kwargs.pop(key) for key in ("copy", "memory_format") if key in kwargs}
        device, dtype, non_blocking, form = torch._C._nn._parse_to(*args, **kwargs)
        here, there = place(tensor), place(tensor) if device is None else parsed(device)
        if tensor.is_meta or there.type == "meta":
            return tensor.to(*args, **kwargs, **kept)
        form = kept.get("memory_format", form)
        more = {} if form is None else {"memory_format": form}
        if here == there:
            return put(tensor.to(dtype or tensor.dtype, copy=kept.get("copy", False), **more), there)
        self.rules.copied(tensor, there, non_blocking)
        self.rules.landing = False  # the copy itself comes after the one that is on its way
        made = put(tensor.to(dtype or tensor.dtype, copy=True, **more), there)
        self.rules.landing = True
        if there == CPU and non_blocking:
            _pinned(made).untyped_storage().landing = self.rules.waits.total()  # type: ignore[attr-defined]
        return made


_GENERATOR = torch.Generator
ASKED = {Tensor.device: "device", Tensor.is_cuda: "cuda", Tensor.is_cpu: "cpu"}


class _Generator(torch.Generator):
    """A generator of a device, whose numbers are those of the CPU's."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made: _Generator = super().__new__(cls, "cpu")
        made.place = parsed(device)
        return made

    place: torch.device


def _pinned(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().pinned = True  # type: ignore[attr-defined]
    return tensor


class _Opened:
    """safetensors asks a library in another language for a device by its name."""

    def __init__(self, opened: Callable[..., Any], path: Any, framework: str, device: Any = "cpu") -> None:
        self.file, self.device = opened(path, framework), device

    def __enter__(self) -> Any:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def get_tensor(self, name: str) -> Tensor:
        found = self.file.get_tensor(name)
        return put(found.clone(), parsed(self.device)) if isinstance(found, Tensor) else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class _Event:
    """An event of a stream, by the host's clock."""

    def __init__(self, waits: Waits, **_: Any) -> None:
        self.waits = waits

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.waits.add("an event")

    def elapsed_time(self, end: "_Event") -> float:
        return 1000 * (end.at - self.at)


class _Autocast(torch.autocast):
    """Number formats of the GPU, kept by the CPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


@contextmanager
def unseen() -> Iterator[None]:
    """Do something on the CPU that the pretended GPU takes no notice of."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


@contextmanager
def pretended(*cards: str, free: int = 80 * 10**9) -> Iterator[Waits]:
    """Let torch say that it has GPUs of these names while this lasts; yield what the host waited for."""
    waits, current, opened, cards = Waits(), [0], safetensors.safe_open, cards or (NAME,)

    def properties(device: Any = None) -> SimpleNamespace:
        index = current[0] if device is None else parsed(device).index
        return SimpleNamespace(name=cards[index], total_memory=free, major=9, minor=0, multi_processor_count=1)

    def synchronize(device: Any = None) -> None:
        waits.add("everything")

    cuda: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: len(cards), "current_device": lambda: current[0],
        "set_device": lambda device: current.__setitem__(0, parsed(device).index), "synchronize": synchronize,
        "get_device_properties": properties, "get_device_name": lambda device=None: properties(device).name,
        "get_device_capability": lambda device=None: (9, 0), "mem_get_info": lambda device=None: (free, free),
        "max_memory_allocated": lambda device=None: 1, "max_memory_reserved": lambda device=None: 1,
        "reset_peak_memory_stats": lambda device=None: None, "empty_cache": lambda: None, "_lazy_init": lambda: None,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8), "is_initialized": lambda: False,
        "set_rng_state": lambda *_, **__: None, "manual_seed_all": lambda seed: None, "is_bf16_supported": lambda: True,
        "set_per_process_memory_fraction": lambda fraction, device=None: None, "Event": lambda **_: _Event(waits),
        "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    rules = _Rules(waits)
    with ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: _pinned(tensor.clone())))
        stack.enter_context(mock.patch.object(torch, "autocast", _Autocast))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        # Compiled code would be that of a CPU: what is compiled is called as it is.
        stack.enter_context(mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda f: f)))
        stack.enter_context(
            mock.patch.object(safetensors, "safe_open", lambda *given, **named: _Opened(opened, *given, **named))
        )
        stack.enter_context(rules)
        stack.enter_context(_Names(rules))
        yield waits
