"""Pipelines of diffusers as families: a transformer trained by flow matching makes, continues and refines frames.

Which module adapts a folder is said by the class of its transformer, see `weights.folders.BASES`. The text encoder,
often the largest network, runs first and goes; what it said lies in the run directory, so that a resumed run does
without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamt2v import devices
from streamt2v.chunks import Chunk, covering, packed, packed_window, refinement_plan, unpacked
from streamt2v.diffusion.schedules import FlowSchedule
from streamt2v.errors import VideoError
from streamt2v.families.choose import Chosen
from streamt2v.families.diffusers_pipelines import dtype_of, load_part
from streamt2v.families.makers import Enlarged, Makers, Refine, Refined
from streamt2v.families.networks import Networks
from streamt2v.media import frames
from streamt2v.memory import MANY_ROWS
from streamt2v.models.text import tidied
from streamt2v.stages.denoise import Sampling
from streamt2v.stages.flow import Base, FlowStreamer, Words
from streamt2v.stages.refine import Denoiser, Refiner, RefineState
from streamt2v.stages.stream import StreamState, calibrated
from streamt2v.weights import folders

FIRST = Chunk(0, 0, 0, 0)
CONTEXT = 4
"""Latents that the codec sees before a group of the refiner's: of a causal codec they decide nearly all of it."""
STEPS_OF_PATH = 1000


def build(networks: Networks) -> Makers:
    """Return the family's callables; each loads what it needs when it is first called."""
    run, name = networks.run, networks.family.pipeline
    latents = folders.layout(name)

    def streamer() -> FlowStreamer:
        height, width = run.stream.size
        shape = (latents.channels, height // latents.cell, width // latents.cell)
        return FlowStreamer(base(networks, name), networks.draws, run.stream.chunk, shape, networks.device.name)

    def words(prompt: str) -> Words:
        encoded = networks.once("texts", lambda: texts(networks, name))
        return encoded[prompt]

    def first(prompt: str, picture: Tensor | None) -> Tensor:
        sampling = Sampling.of(run.initialize, networks.policy.batched_guidance)
        known = None
        if picture is not None:
            known = frames.fill(picture[None], run.stream.size).to(networks.device.name)
            sampling = replace(sampling, guidance_scale=run.initialize.image_guidance_scale)
        said = words(prompt)  # the text encoder goes before the others come
        stage, stepped = networks.once("streamer", streamer), networks.stepped(0, sampling.num_inference_steps)
        return stage.frames(FIRST, known, said, sampling, None, stepped)

    def extend(state: StreamState, prompt: str, chunk: Chunk) -> Tensor:
        sampling, known = Sampling.of(run.stream, networks.policy.batched_guidance), state.conditioning_frames
        said, stepped = words(prompt), networks.stepped(chunk.index, sampling.num_inference_steps)
        anchor = state.anchor if run.stream.apm else None
        made = networks.once("streamer", streamer).frames(chunk, known, said, sampling, anchor, stepped)
        again, new = made[: len(known)], made[len(known) :]
        return calibrated(new, known, again) if run.stream.calibrate else new

    return Makers(first, extend, lambda enlarged: refine(networks, name, enlarged))


def refiner(networks: Networks, chosen: Chosen) -> Refine:
    """Return the refiner of any family that is made of a base."""
    return lambda enlarged: refine(networks, chosen.name, enlarged)


class _Source:
    """Latents of a growing number of frames: every group is encoded with a few latents before it, as planned.

    Args:
        base: the codec.
        frames: yields frame after frame [1, 3, H, W], from `start` on.
        start: number of the first one.
        num_frames: of the video; what the last latent lacks repeats the last frame.
    """

    def __init__(self, base: Base, frames: Iterator[Tensor], start: int, num_frames: int) -> None:
        self.base, self.frames, self.start, self.num_frames = base, frames, start, num_frames
        self.held: list[Tensor] = []

    def encode(self, group: range) -> Tensor:
        """Return latents [n, C, h, w] of a group; groups come in order."""
        before = min(CONTEXT, group.start)
        window = packed_window(group.start - before, group.stop, self.base.frames_per_latent)
        del self.held[: window.start - self.start]
        self.start = window.start
        while self.start + len(self.held) < min(window.stop, self.num_frames):
            if (frame := next(self.frames, None)) is None:
                reached = self.start + len(self.held)
                raise VideoError(f"the video ended early, after {reached} of {self.num_frames} frames")
            self.held.append(frame)
        images = torch.cat([*self.held, *[self.held[-1]] * (len(window) - len(self.held))])
        return self.base.encode(images)[0].transpose(0, 1)[before:]


@torch.inference_mode()
def refine(networks: Networks, name: str, given: Enlarged) -> Iterator[Refined]:
    """Refine by SDEdit with randomized blending in the latents of a base.

    Where latents hold several frames, the first one of a chunk holds but one, unlike in the middle of a video: no
    later chunk's is ever used.
    """
    settings, device, num_frames = networks.run.refine, networks.device.name, given.plan[-1].stop
    said = texts(networks, name)
    model: Base = base(networks, name)
    per, side = model.frames_per_latent, folders.layout(name).size_multiple
    sizes = packed(num_frames, per), packed(settings.chunk, per), packed(settings.overlap, per)
    plan = refinement_plan(*sizes, settings.shift_back)
    canvas = (-(-given.size[0] // side) * side, -(-given.size[1] // side) * side)
    state = RefineState.from_tensors(given.state, device) if given.state else None
    encoded, context = 0, torch.empty(0)
    if state is not None:
        encoded, context = state.encoded, given.state["context"].to(device)
    start = max(0, encoded - CONTEXT) * per
    fitted = (frames.letterbox(frame, canvas) for frame in given.frames(start))
    kept = CONTEXT + model.lookahead
    source, waiting = _Source(model, fitted, start, num_frames), dict[int, Tensor]()

    def encode(number: int) -> Tensor:
        if number not in waiting:
            group = range(number, plan[covering(plan, number)[0]].stop)
            with networks.pixel_time.running():
                waiting.update(zip(group, source.encode(group), strict=True))
        return waiting.pop(number)

    def run(latents: Tensor, time: Tensor, words: Words, *_: object) -> tuple[Tensor, Tensor]:
        velocity = model.velocity(latents, time[0], 0, words, None)
        return velocity, velocity

    path = model.levels(STEPS_OF_PATH, (plan[0].size, *(extent // side for extent in canvas))).sigmas
    denoiser = Denoiser(
        run,
        FlowSchedule(path),
        lambda chunk: said[given.prompt_of(given.plan[chunk.index])],
        networks.policy.batched_guidance,
        first_cut=int(per > 1),
    )

    def stepped(chunk: Chunk, state: RefineState) -> None:
        left = len(plan) - sum(state.steps_done) / settings.num_inference_steps
        networks.watch.step("refine", chunk.index, state.steps_done[chunk.index], settings.num_inference_steps, left)

    stage = Refiner(denoiser, plan, settings, networks.draws, encode, state, stepped)
    for latents in stage.run():
        done = stage.state.finished
        whole = torch.cat([context, latents]) if len(context) else latents
        # Frames whose neighbours are not there yet wait for the next group.
        begun, ready = (max(0, count - model.lookahead) for count in (done - len(latents), done))
        ready = plan[-1].stop if done == plan[-1].stop else ready
        drop = unpacked(len(whole) - (done - begun), per)
        with networks.pixel_time.running():
            decoded = model.decode(whole.transpose(0, 1)[None])[drop:]
        first, stop = unpacked(begun, per), min(unpacked(ready, per), num_frames)
        images, context = frames.unletterbox(decoded[: stop - first], given.size), whole[-kept:].clone()
        tensors = partial(lambda stage, context: stage.state.tensors() | {"context": context}, stage, context)
        if len(images):
            yield Refined(first, iter(images[:, None]), tensors)
        del latents, whole, decoded, images  # large, and the next chunk needs their place


def base(networks: Networks, name: str) -> Any:
    """Load the transformer and the codec of a pipeline, and adapt them to the stages, or to its family."""
    folder = folders.locate(name)
    adapter, (_, index) = import_module(f"streamt2v.families.{folders.adapter(folder)}"), folders.read_index(folder)

    def load() -> Any:
        parts = {
            part: _part(networks, folder, index, part) for part in ("transformer", "vae", "scheduler") if part in index
        }
        if networks.policy.keep_networks:
            parts["vae"].float()  # as published, where there is room for it
        if networks.policy.feed_forward_rows < MANY_ROWS and folders.layout(name).frames_per_latent > 1:
            parts["vae"].enable_tiling()
        return adapter.make(parts, index, networks.run.output.fps, networks.device.name)

    return networks.once(f"base {name}", load)


def _part(networks: Networks, folder: Path, index: dict[str, Any], part: str) -> Any:
    """Load a part once for all runs of this process that have the same settings of memory."""
    path = folders.place(folder, part)
    if path not in networks.here:
        networks.watch.doing(f"loading {part} of {folder.name}")
        network = networks.merged(load_part(folder, part, index, dtype_of(networks.device.name, index)), path)
        if isinstance(network, torch.nn.Module):
            if networks.policy.offload:
                devices.offload(network, networks.device)
            else:
                network.to(networks.device.name)
                devices.arrange(network, networks.device)
            if part == "transformer":
                network.forward = networks.compiled(network.forward)
        networks.here[path] = network
    return networks.here[path]


@torch.inference_mode()
def texts(networks: Networks, name: str) -> dict[str, Words]:
    """Return what the text encoder says of every prompt of the run; it is asked once, and its answers are kept."""
    run, folder = networks.run, folders.locate(name)
    adapter, (_, index) = import_module(f"streamt2v.families.{folders.adapter(folder)}"), folders.read_index(folder)
    wanted = dict.fromkeys([run.negative_prompt, *networks.prompts])
    keys = {text: hashlib.sha256(text.encode()).hexdigest()[:32] for text in wanted}
    kept = networks.store.load_state("text") if networks.store else None
    said: dict[str, Tensor] = {} if kept is None else kept.torch()
    if not set(keys.values()) <= set(said):
        encode = _encoder(networks, folder, index, adapter)
        said = {key: encode(text) for text, key in keys.items()}
        del encode, networks.here[folders.place(folder, "text_encoder")]
        devices.release_memory(networks.device)
        if networks.store:
            networks.store.save_state("text", said)

    def padded(text: str) -> tuple[Tensor, Tensor]:
        features = said[keys[text]].to(networks.device.name)
        absent = adapter.MAX_WORDS - len(features)
        mask = torch.ones(len(features), device=features.device)
        return torch.nn.functional.pad(features, (0, 0, 0, absent)), torch.nn.functional.pad(mask, (0, absent))

    pairs = {prompt: (padded(run.negative_prompt), padded(prompt)) for prompt in networks.prompts}
    return {prompt: Words(*map(torch.stack, zip(*pair, strict=True))) for prompt, pair in pairs.items()}


def _encoder(networks: Networks, folder: Path, index: dict[str, Any], adapter: Any) -> Callable[[str], Tensor]:
    """Load the text encoder; it turns a text into features [S, D] of its tokens."""
    tokenizer, encoder = (_part(networks, folder, index, part) for part in ("tokenizer", "text_encoder"))
    room = adapter.MAX_WORDS

    def encode(text: str) -> Tensor:
        text = tidied(text) if adapter.TIDY else text
        if len(tokenizer([text]).input_ids[0]) > room:
            networks.note(f"the text encoder reads {room} tokens, the rest is cut off: {text[:60]!r}...", warning=True)
        given = tokenizer([text], padding="max_length", max_length=room, truncation=True, return_tensors="pt")
        ids, mask = given.input_ids.to(networks.device.name), given.attention_mask.to(networks.device.name)
        features: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        return features[: int(mask.sum())].float()

    return encode
