"""The networks of a family at its own sizes, of random numbers where its weights are not here, and work for them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from streamt2v import config, devices, weights
from streamt2v.chunks import refinement_plan
from streamt2v.config import RunConfig
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig
from streamt2v.models.encoders import latent_factor, latent_size
from streamt2v.models.unet3d import Conditioning, TextContext, UNet3D, legal_canvas
from streamt2v.stages import stream
from streamt2v.stages.denoise import Sampling
from streamt2v.stages.refine import Denoiser, Refiner, refiner_conditioning, sees_source
from streamt2v.weights import convert, published

PROMPT = "a red ball floating over the sea at sunset"
Work = Callable[[], Tensor]


def parts(model: str) -> dict[Path, published.Part]:
    """What the published files of a family would be converted to, by path in the weights home."""
    layouts = {**convert.LAYOUTS, **published.CHECKPOINTS}
    listed = {name: part for layout in layouts.values() for name, part in layout.parts.items()}
    family = weights.family(model)

    def name(path: Path) -> str:
        return path.relative_to(family.root).with_suffix("").as_posix().partition("/")[2]

    return {path: listed[name(path)] for path in map(family.path, family.components) if path.suffix == ".safetensors"}


def random_network(path: Path, part: published.Part, device: str, dtype: torch.dtype) -> nn.Module:
    """A network of the part's size: weights of unit gain, norms of one, no biases, so that numbers stay moderate."""
    network = weights.build(path, part.network, part.config)
    draws = torch.Generator(device).manual_seed(0)

    def numbers(key: str, shape: torch.Size) -> Tensor:
        if len(shape) < 2:
            return torch.full(shape, float(key.endswith("weight")), dtype=dtype, device=device)
        values = torch.empty(shape, dtype=dtype, device=device).normal_(generator=draws)
        return values.div_(shape[1:].numel() ** 0.5)

    return weights.furnish(
        network, {key: numbers(key, value.shape) for key, value in network.state_dict().items()}, device
    )


class AnyWords:
    """Stands in for a tokenizer: every text is as many tokens as there is room for."""

    def __call__(self, texts: Sequence[str], max_length: int = 77, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.ones(len(texts), max_length, dtype=torch.long))


@contextlib.contextmanager
def stand_ins(model: str) -> Iterator[None]:
    """Let a family whose weights must be pulled be made of random numbers while this lasts."""
    if not weights.family(model).sources:
        yield
        return
    listed = parts(model)

    def header(path: Path) -> tuple[str, Mapping[str, Any], Mapping[str, Any] | None]:
        return listed[path].network, listed[path].config, listed[path].schedule

    def load(family: weights.Family, role: str, device: str, dtype: torch.dtype) -> Any:
        path = family.path(role)
        return AnyWords() if path.suffix == ".json" else random_network(path, listed[path], device, dtype)

    with (
        mock.patch.object(weights, "read_header", header),
        mock.patch.object(weights, "load", load),
        mock.patch.object(weights, "require", lambda *_: None),
    ):
        yield


def settings(model: str, quality: str, given: Mapping[str, Any]) -> RunConfig:
    """The family's settings at a quality; it makes its first frames itself, and the whole box is refined."""
    own = {"model": model, "prompt": PROMPT, "initialize.text_model": "own", "output.fit": "cover"}
    return config.merge(config.preset(weights.family(model).preset, quality), own, given)


@dataclass(frozen=True)
class Networks:
    """The networks of a family on a device, and what they need to run once; loaded when they are first asked for."""

    config: RunConfig
    device: devices.Device
    dtype: torch.dtype

    def load(self, role: str) -> Any:
        network = weights.load(weights.family(self.config.model), role, self.device.name, self.dtype)
        devices.arrange(network, self.device)
        return network

    def schedule(self, role: str) -> NoiseSchedule:
        found = weights.read_header(weights.family(self.config.model).path(role))[2]
        return NoiseSchedule(ScheduleConfig.from_dict(found or {}))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.device.name)

    def text(self, unet: UNet3D) -> TextContext:
        sizes = unet.unet_config
        pooled = self.random(2, sizes.pooled_text_dim) if sizes.pooled_text_dim else None
        return TextContext(self.random(2, sizes.text_tokens, sizes.cross_attention_dim), pooled)

    def refining_text(self, unet: Any) -> Conditioning:
        """What a chunk of the refiner is told: random text, or that its source was enlarged tenfold."""
        return refiner_conditioning(unet, None if sees_source(unet.config) else self.text(unet), 10.0)

    @cached_property
    def streaming(self) -> stream.StreamModels:
        roles = {"unet": "stream.unet", "vae": "stream.vae", "cam": "stream.cam", "apm": "stream.apm",
                 "image_encoder": "stream.image"}  # fmt: skip
        loaded = {name: self.load(role) for name, role in roles.items()}
        return stream.StreamModels(schedule=self.schedule("stream.unet"), **loaded)

    @cached_property
    def refining(self) -> tuple[Any, nn.Module]:
        return self.load("refine.unet"), self.load("refine.vae")

    def streamer(self, config: RunConfig) -> stream.Streamer:
        """The streaming stage at the settings of `config`."""
        models = self.streaming
        shape = (models.unet.config.out_channels, *latent_size(models.vae, *config.stream.size))
        noise = stream.chunk_noise(SeededDraws(0), config.stream.chunk, shape, self.device.name)
        anchor, sampling = self.base_frames(1)[0], Sampling.of(config.stream)
        return stream.Streamer(models, self.text(models.unet), anchor, sampling, noise)

    def base_frames(self, count: int) -> Tensor:
        """Frames [F, 3, H, W] in [-1, 1] of the size that is streamed."""
        return self.random(count, 3, *self.config.stream.size).clamp(-1, 1)

    def canvas(self, square: bool = False) -> tuple[int, int]:
        """(H, W) that the refiner works on, for what fills the box or for a square as high."""
        height, width = self.config.output.height, self.config.output.width
        unet, vae = self.refining
        return legal_canvas(height, height if square else width, unet.config, latent_factor(vae))

    def chunk_step(
        self, canvas: tuple[int, int], way: Callable[[UNet3D], Any] = lambda unet: unet.run, batched: bool = True,
        guided: bool = True, steps: int = 1, reuse_interval: int = 1,
    ) -> Work:  # fmt: skip
        """Steps of one chunk of the refiner, its draws and its solver included; `way` changes the network."""
        unet, vae = self.refining
        stop = 0.0 if guided else 1.0
        refine = replace(
            self.config.refine, num_inference_steps=steps, guidance_stop=stop, reuse_interval=reuse_interval
        )  # fmt: skip
        latents = self.random(refine.chunk, unet.config.out_channels, *latent_size(vae, *canvas))
        latents = latents.to(getattr(vae, "latent_dtype", torch.float32))
        text, looks = self.refining_text(unet), sees_source(unet.config)
        schedule = self.schedule("refine.unet")
        denoiser = Denoiser(way(unet), schedule, lambda chunk: text, batched, sees_source=looks)
        plan = refinement_plan(refine.chunk, refine.chunk, refine.overlap)
        return lambda: torch.cat(
            list(Refiner(denoiser, plan, refine, SeededDraws(0), latents.__getitem__).run())
        )  # fmt: skip
