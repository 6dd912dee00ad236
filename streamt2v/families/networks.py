"""The networks of a run: each is loaded when it is first needed, and placed as the memory policy says."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from streamt2v import devices, weights
from streamt2v.config import RunConfig
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig
from streamt2v.memory import MemoryPolicy
from streamt2v.models.encoders import encode_text
from streamt2v.models.layers import slice_feed_forwards
from streamt2v.models.text import clean_prompt
from streamt2v.models.unet3d import TextContext
from streamt2v.weights import lora
from streamt2v.weights.home import path as home

ENCODERS = ("stream.text", "stream.image", "refine.text", "refine.image")
Made = TypeVar("Made")


@dataclass
class Loaded:
    """Networks that stay in memory from one run to the next, so that each is loaded once."""

    networks: dict[Path, Any] = field(default_factory=dict)
    loaded_for: object = None
    free: dict[devices.Device, int] = field(default_factory=dict)

    def free_memory(self, device: devices.Device) -> int:
        """Bytes that were free before the first run: what stays loaded must not make the next one more sparing."""
        return self.free.setdefault(device, devices.free_memory(device))

    def fitting(self, *loaded_for: object) -> dict[Path, Any]:
        """Return the networks for a run on a family, device and policy; first drop those loaded for any other."""
        if self.loaded_for != loaded_for:
            self.networks.clear()
            self.loaded_for = loaded_for
        return self.networks


class Watching(Protocol):
    """What is told of a run's networks; see `runs.watch.Watch`."""

    def note(self, text: str, warning: bool = False) -> None:
        """Say a line; a warning is for everybody."""

    def doing(self, text: str) -> None:
        """Something other than a step goes on."""

    def idle(self, seconds: float) -> None:
        """It is over, after so long."""

    def pixels(self) -> None:
        """Frames were encoded, decoded or written."""

    def step(self, stage: str, chunk: int, step: int, steps: int, left: float | None = None) -> None:
        """A step (from 1) of a chunk (from 0) was computed, or queued on the device."""


class Store(Protocol):
    """Where a family keeps what a resumed run should not compute again; see `jobs.run_directory.RunDirectory`."""

    def save_state(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Keep named tensors."""
        ...

    def load_state(self, name: str) -> Any:
        """Return what was kept, or None."""
        ...


class Networks:
    """What a family's builder is given: networks by role, the run's settings and draws, and where to compute.

    Args:
        run: the settings.
        prompts: every text that the run will follow.
        device: where it computes.
        policy: what may stay on the device.
        here: networks by path, some of them perhaps loaded by an earlier run.
        watch: is told what is loaded, and the steps of the stages.
        store: the run directory.
        loras: what is merged into a network, by its file or folder.
    """

    def __init__(
        self,
        run: RunConfig,
        prompts: Sequence[str],
        device: devices.Device,
        policy: MemoryPolicy,
        here: dict[Path, Any],
        watch: Watching,
        store: Store | None = None,
        loras: Mapping[Path, Sequence[lora.Given]] | None = None,
    ) -> None:
        self.store, self.loras = store, loras or {}
        self.run, self.prompts, self.watch, self.note = run, prompts, watch, watch.note
        self.device, self.policy, self.here = device, policy, here
        self.family, self.draws = weights.family(run.model), SeededDraws(run.seed)
        self.pixel_time = devices.Stopwatch(device)
        """Spent on the pixels of output frames: the refiner's VAE, writing, the final file."""
        self._made: dict[str, tuple[object, Any]] = {}
        self._loading, self._lock = False, threading.RLock()
        # Weights that come and go with every layer cannot be compiled in.
        self._compiles = run.compile and not policy.offload
        if run.compile and policy.offload:
            self.note("with weights on the host the networks are not compiled", warning=True)
        if self._compiles:
            devices.keep_compiled(home() / "compiled")

    def load(self, role: str) -> Any:
        """Return the network or tokenizer of a role, such as "stream.unet". Raises WeightsError."""

        def load() -> Any:
            precision = getattr(torch, self.policy.precision)
            return self.merged(weights.load(self.family, role, self._home(role), precision), path)

        path = self.family.path(role)
        return self.here[path] if path in self.here else self.keep(path, f"{role}, {self._size(role)}", role, load)

    def merged(self, network: Any, path: Path) -> Any:
        """Return a network with the LoRAs of the run that are for its file or folder. Raises WeightsError."""
        if path in self.loras:
            lora.merge(network, path, self.loras[path])
        return network

    def keep(self, path: Path, what: str, role: str, load: Callable[[], Any]) -> Any:
        """Return what lies at a path; what is loaded from there first is placed as the policy says for its role."""
        with self.loading():
            if path not in self.here:
                self.watch.doing(f"loading {what}")
                self.here[path] = self._placed(load(), role)
            return self.here[path]

    def drop(self, network: Any) -> None:
        """Forget a network that was kept, so that its memory is free."""
        for path in [path for path, kept in self.here.items() if kept is network]:
            del self.here[path]

    def _size(self, role: str) -> str:
        size = sum(part.bytes for part in self.family.file(role).parts.values())
        return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

    def _home(self, role: str) -> str:
        """Return where the weights of a role stay."""
        policy = self.policy
        on_host = policy.offload or (policy.encoders_on_host and role in ENCODERS)
        return "cpu" if on_host else self.device.name

    def _placed(self, network: Any, role: str) -> Any:
        if isinstance(network, torch.nn.Module):
            home = self._home(role)
            network.to(home)
            slice_feed_forwards(network, self.policy.feed_forward_rows)
            devices.arrange(network, self.device)
            if role.endswith(".vae"):
                for half in (network.get_submodule("encoder"), network.get_submodule("decoder")):
                    if any(True for _ in half.parameters()):  # else it only moves numbers
                        half.forward = self.compiled(half.forward)
            if home != self.device.name:
                devices.offload(network, self.device)
        return network

    def schedule(self, role: str) -> NoiseSchedule:
        """Return the noise schedule that the file of a network names."""
        _, _, schedule = weights.read_header(self.family.path(role))
        return NoiseSchedule(ScheduleConfig.from_dict(schedule or {}))

    def compiled(self, function: Callable[..., Any], graphs: bool = False) -> Callable[..., Any]:
        """Return a function compiled for the device where the run asks for that, else as it is."""
        return devices.compiled(function, self.device, graphs=graphs) if self._compiles else function

    @torch.inference_mode()
    def texts(self, stage: str) -> dict[str, TextContext]:
        """Encode every prompt of the run for one stage: rows (negative, positive).

        All at once, so that the encoder can go; one by one, as rounding may depend on the size of a batch.
        """
        tokenizer, encoder = self.load(f"{stage}.tokenizer"), self.load(f"{stage}.text")
        room, encoded = encoder.config.max_position_embeddings, {}
        for prompt in dict.fromkeys(self.prompts):
            texts = [self.run.negative_prompt, prompt]
            if self.family.file(f"{stage}.tokenizer").tidy:
                texts = [clean_prompt(text) for text in texts]
            for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
                if len(ids) > room:
                    cut = f"the text encoder reads {room} of {len(ids)} tokens, the rest is cut off: {text[:60]!r}..."
                    self.note(cut, warning=True)
            encoded[prompt] = encode_text(tokenizer, encoder, texts)
        if not self.policy.keep_networks:
            self.drop(encoder)
        return encoded

    def stepped(self, chunk: int, steps: int) -> Callable[..., None]:
        """Return what a streaming stage calls after each of its steps: (step, ...)."""
        return lambda step, *_: self.watch.step("stream", chunk, step + 1, steps)

    def once(self, name: str, make: Callable[[], Made], key: object = None) -> Made:
        """Return what `make` makes; it is kept under a name until `release`, or until another key is asked for."""
        with self.loading():
            if name not in self._made or self._made[name][0] != key:
                self._made.pop(name, None)  # its memory is free before the next takes any
                self._made[name] = key, make()
            made: Made = self._made[name][1]
            return made

    def release(self) -> None:
        """Drop every network and what was made from them."""
        self.here.clear()
        self._made.clear()
        devices.release_memory(self.device, graphs=True)

    @contextmanager
    def pixels(self) -> Iterator[None]:
        """Count what is done inside as work on the pixels of output frames."""
        with self.pixel_time.running():
            yield
        self.watch.pixels()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Let one thread at a time do what is inside; count its time for no stage, and once."""
        began = time.monotonic()
        with self._lock:
            outermost, self._loading = not self._loading, True
            try:
                yield
            finally:
                if outermost:
                    self._loading = False
                    self.watch.idle(time.monotonic() - began)
