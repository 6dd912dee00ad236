"""Joins the three stages with the run directory: a stream of frames from stage to stage, one output file.

Frames are pulled: the writer asks the refiner, the refiner asks the streaming stage. So refined frames appear while the
stream is still running, and memory does not grow with length. Every stage leaves its small state in the run directory,
written after the frames it belongs to: a run that dies at any instant continues from there.
"""

import gc
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamt2v import __version__, devices, memory, weights
from streamt2v.chunks import Chunk, covering, refinement_plan, streaming_plan
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig
from streamt2v.errors import Interrupted, MemoryLimitError, NumericsError, ResumeError, VideoError, stopped_by
from streamt2v.families import choose, diffusers_pipelines, modelscope, streamingt2v
from streamt2v.jobs import again, forecast, prepare, run_directory
from streamt2v.jobs.job import Job, Result
from streamt2v.jobs.prepare import check
from streamt2v.jobs.recipe import inspect_source
from streamt2v.jobs.run_directory import RunDirectory, State
from streamt2v.media import exports, frames, isolated, pictures, preview, reading, writing
from streamt2v.media.frames import Frames
from streamt2v.memory import MemoryPolicy
from streamt2v.models import refiner
from streamt2v.models.encoders import decode_latents, encode_frames, encode_text, latent_factor, latent_size
from streamt2v.models.layers import slice_feed_forwards
from streamt2v.models.text import clean_prompt
from streamt2v.models.unet3d import Conditioning, TextContext
from streamt2v.runs.watch import Report
from streamt2v.stages import stream
from streamt2v.stages.denoise import Sampling
from streamt2v.stages.refine import Denoiser, Refiner, RefineState, noise_grid
from streamt2v.timeline import prompt_at
from streamt2v.weights.home import path as home

STREAM, REFINE = "stream", "refine"
ENCODERS = ("stream.text", "stream.image", "refine.text")
RETRIES = 3  # with less memory each


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
        """Return the networks for a run on a family, device and policy; those of any other are let go first."""
        if self.loaded_for != loaded_for:
            self.networks.clear()
            self.loaded_for = loaded_for
        return self.networks


def run(job: Job, report: Report, loaded: Loaded | None = None) -> Result:
    """Make the video of a job.

    Args:
        job: what to make.
        report: told how it goes on.
        loaded: what earlier runs of this process have loaded, and later ones will find; None keeps nothing.

    Raises:
        StreamT2VError: what `jobs.check` finds, and what shows only while running (disk full, bad numbers, a signal).
    """
    check(job)
    began = time.monotonic()
    loaded = Loaded() if loaded is None else loaded
    device = devices.resolve(job.device)
    earlier = (
        run_directory.recorded(job.run_path).recipe
        if job.resume and run_directory.exists(job.run_path)
        else job.like or {}
    )
    # Sums split over other numbers of threads round differently: a run keeps the number it began with.
    threads = devices.set_threads(earlier.get("threads") if job.threads is None else job.threads)
    devices.keep_freed_memory()
    devices.repeat_exactly(device)
    devices.limit_memory(device, None if job.memory is None else int(job.memory * 1e9))
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    policy = _policy(job, device, loaded, earlier, report)
    cold = not loaded.fitting(job.config.model, device, policy, job.config.compile)
    recipe = {
        **job.recipe(), "version": __version__, "device": device.kind, "threads": threads, "libraries": libraries,
        "memory": asdict(policy), **({"card": name} if (name := devices.card(device)) else {}),
    }  # fmt: skip
    with RunDirectory.open(
        job.run_path, recipe, resume=job.resume, overwrite=job.overwrite,
        local={**job.local(), "device": device.name}, may_change=job.may_change,
    ) as directory:  # fmt: skip
        try:
            prepare.check_place(job)  # another run may just have made it
            if job.resume and not (job.overwrite or directory.resumed) and job.output.exists():
                there = again.finished(job)
                directory.remove()
                return there
            maker, (width, height) = _make(job, report, directory, device, policy, loaded)
            maker.finish()
        except BaseException as error:
            shown = directory.load_state("output")
            if not directory.num_base_frames and shown is None:
                directory.remove()  # nothing is finished: the next try need not say --resume
            if by := stopped_by(error):
                raise _interrupted(job, directory, shown, by) from None
            if isinstance(error, NumericsError):
                hint = "16 bit may be too narrow: --device cpu computes in 32; or try another --seed or --guidance, "
                where = f"{error.message}, after {directory.num_base_frames} base frames"
                raise NumericsError(where, f"{hint}with --resume-anyway to go on from what is finished") from error
            raise
        seconds = time.monotonic() - began
        if cold:
            maker.remember(seconds)
        if not job.keep_run:
            directory.remove()
    return Result.of(job, width, height, seconds, device)


def _make(
    job: Job,
    report: Report,
    directory: RunDirectory,
    device: devices.Device,
    policy: MemoryPolicy,
    loaded: Loaded,
) -> tuple["_Maker", tuple[int, int]]:
    """Produce every frame; wherever memory ends, go on from what is stored with the next more sparing policies."""
    sparing = memory.more_sparing(policy, device.kind)
    for lower in [*sparing[:RETRIES], None]:
        networks = loaded.fitting(job.config.model, device, policy, job.config.compile)
        maker = _Maker(job, report, directory, device, policy, networks)
        try:
            return maker, maker.make()
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
        loaded.networks.clear()
        del maker  # only now, without the error and its frames, its tensors can be freed
        gc.collect()
        devices.release_memory(device, graphs=True)
        if lower is not None:
            report.note(f"out of memory; going on with {lower.describe()}", warning=True)
            policy = lower
            directory.change({**directory.recipe, "memory": asdict(policy)})
    raise MemoryLimitError(f"out of memory, also with {policy.describe()}", _more_room(job, device, sparing[RETRIES:]))


def _more_room(job: Job, device: devices.Device, untried: list[MemoryPolicy]) -> str:
    """Name the cheapest plan, and what it needs."""
    cheapest = untried[-1] if untried else memory.ladder(device.kind)[-1]
    need, free = memory.needed(_stages(job), cheapest) / 1e9, devices.free_memory(device) / 1e9
    said = f"the cheapest plan ({cheapest.describe()}) needs about {need:.1f} GB, {free:.1f} are free; "
    if untried:
        return f"{said}--resume-anyway --memory {need:.1f} goes on with it"
    return f"{said}a smaller --size or --chunk needs less, or end other programs and go on with --resume"


def _stages(job: Job) -> tuple[memory.Stage, ...]:
    source = inspect_source(job.source) if job.source and job.command == "refine" else None
    return forecast.stages(job.config, None if source is None else (source.height, source.width))


def _policy(
    job: Job, device: devices.Device, loaded: Loaded, earlier: Mapping[str, Any], report: Report
) -> MemoryPolicy:
    """What the memory allows; a run keeps the policy it began with, as other batches round differently."""
    kept = [policy for policy in memory.ladder(device.kind) if asdict(policy) == earlier.get("memory")]
    if job.memory is None and kept:
        return kept[0]
    free = loaded.free_memory(device) if job.memory is None else int(job.memory * 1e9)
    known = _stages(job)
    policy = memory.choose(free, known, device.kind)
    need = memory.needed(known, policy)
    if caution := devices.caution(device.kind):
        report.note(caution, warning=True)
    report.note(f"memory: {policy.describe()}: up to {need / 1e9:.1f} of {free / 1e9:.1f} GB", warning=need > free)
    return policy


def _interrupted(job: Job, directory: RunDirectory, shown: State | None, by: BaseException) -> Interrupted:
    if not run_directory.exists(directory.path):
        return Interrupted("interrupted before anything was finished", by=by)
    playable = "" if shown is None else f"; what is finished can be watched: {directory.partial_path}"
    return Interrupted(f"interrupted{playable}", f"streamt2v resume {shlex.quote(str(job.output))} continues", by=by)


@dataclass(frozen=True)
class Geometry:
    """Sizes from base frames to output frames: the visible content, the canvas it is refined on, the output."""

    fit: frames.Fit
    canvas: tuple[int, int]

    @property
    def content(self) -> tuple[int, int]:
        """(H, W) of the part of the picture that will be seen."""
        return min(self.fit.content_height, self.fit.height), min(self.fit.content_width, self.fit.width)

    def into_canvas(self, images: Tensor) -> Tensor:
        """Scale and crop base frames [F, 3, h, w] to the content and place it on the canvas."""
        fit, (height, width) = self.fit, self.content
        whole = replace(fit, height=height, width=width, top=min(0, fit.top), left=min(0, fit.left))
        return frames.letterbox(frames.apply_fit(images, whole), self.canvas)

    def output(self, content: Tensor) -> Frames:
        """Turn content [F, 3, H, W] into output frames; `pad` adds its bars here, so that no network sees them."""
        fit = self.fit
        bars = frames.Fit(fit.height, fit.width, *self.content, max(0, fit.top), max(0, fit.left))
        return frames.to_u8(frames.apply_fit(content, bars))


class _Preview:
    """A contact sheet of frames evenly spaced over the video, renewed while it grows."""

    def __init__(self, path: Path | None, num_frames: int) -> None:
        self.path, self.num_frames = path, num_frames
        self.shown: list[Frames] = []

    def add(self, start: int, group: Frames) -> None:
        """Take what is wanted of frames start.. and rewrite the sheet when something was."""
        if self.path is None:
            return
        for chosen in preview.pick([group], self.num_frames, preview.SHEET_FRAMES, start):
            self.shown.extend(preview.shrink(chosen))
            pictures.write_image(self.path, frames.contact_sheet(np.stack(self.shown)))


class _Maker:
    """One run: loads what it needs, pulls frames through the stages, records what is finished."""

    def __init__(
        self,
        job: Job,
        report: Report,
        directory: RunDirectory,
        device: devices.Device,
        policy: MemoryPolicy,
        networks: dict[Path, Any],
    ) -> None:
        self.job, self.config, self.report, self.directory = job, job.config, report, directory
        self.device, self.policy, self.networks = device, policy, networks
        self.family = weights.family(job.config.model)
        # Weights that come and go with every layer cannot be compiled in.
        self.compiles = job.config.compile and not policy.offload
        if job.config.compile and policy.offload:
            report.note("with weights on the host the networks are not compiled", warning=True)
        if self.compiles:
            devices.keep_compiled(home() / "compiled")
        self.draws = SeededDraws(self.config.seed)
        # A continued video keeps its frames; the last of them are the first chunk of the base video.
        kept = inspect_source(job.source).frames if job.source and job.command == "extend" else 0
        self.num_kept, self.base_offset = kept, max(0, kept - self.config.stream.chunk)
        self.num_frames = self.config.num_frames - self.base_offset  # of the base video
        self.stream_plan = streaming_plan(self.num_frames, self.config.stream.chunk, self.config.stream.overlap)
        self.refine_plan = refinement_plan(self.num_frames, self.config.refine.chunk, self.config.refine.overlap)
        self.timeline = job.timeline()
        # Loading and the first chunk; later chunks; what the refiner's pixels take: its VAE, writing, the final file.
        self.fixed_seconds = self.stream_seconds = 0.0
        self.frame_time = devices.Stopwatch(device)
        self.writer: writing.SegmentWriter | None = None
        # Before any frame is read: the store drops what no state accounts for.
        self.stream_state = directory.resume_point("stream")

    # -- output

    def make(self) -> tuple[int, int]:
        """Produce every frame; return (width, height)."""
        geometry = self._geometry()
        state = self.directory.load_state("output")
        mark = None if state is None else writing.SegmentMark(**state.meta["mark"])
        begin = partial(
            writing.SegmentWriter, self.directory.partial_path, geometry.fit.height, geometry.fit.width,
            self.config.output.rate,
            crf=self.config.output.crf, lossless=self.job.output.suffix.lower() != ".mp4",
        )  # fmt: skip
        try:
            self.writer = begin(resume=mark)
        except ResumeError as error:  # nothing is lost: it is made again from the base frames
            self.report.note(f"{error.message}; it is made again", warning=True)
            self.writer, state = begin(), None
        sheet = _Preview(self.job.preview, self.config.num_frames)
        if self.job.preview and self.writer.mark.frames:
            shown = 0
            for part in reading.read_frames(self.directory.partial_path):
                sheet.add(shown, part)
                shown += len(part)
        for group, tensors in self._groups(geometry, state):
            start = self.writer.mark.frames
            with self.frame_time.running():
                mark = self.writer.append(group)
            self.directory.save_state("output", tensors, {"mark": asdict(mark)})
            self._look_at(group, f"frames {start} to {mark.frames - 1}")
            sheet.add(start, group)
        if self.writer.mark.frames != self.config.num_frames:
            made = f"{self.writer.mark.frames} of {self.config.num_frames} frames"
            raise VideoError(f"the video ended early, after {made}")
        return geometry.fit.width, geometry.fit.height

    def _look_at(self, group: Frames, what: str) -> None:
        """Warn of frames without a picture, and refuse to compute more than the disk can take."""
        if frames.is_black(group):
            self.report.note(f"{what} are black", warning=True)
        self.directory.require_room(2 * group.nbytes)  # of what comes next, as large as this before compression

    def _groups(self, geometry: Geometry, state: State | None) -> Iterator[tuple[Frames, dict[str, Tensor]]]:
        """Yield (output frames, state after them): a continued video's own frames, then what the stages make."""
        assert self.writer is not None
        for group in self._kept_frames(geometry, self.writer.mark.frames):
            yield group, {}
        done = self.writer.mark.frames
        if not self.config.refine.enabled:
            for group in self._unrefined(geometry, done - self.base_offset):
                yield group, {}
            return
        tensors = {} if state is None else state.torch()
        resumed = RefineState.from_tensors(tensors, self.device.name) if tensors else None
        # Until a refined frame is written, the refiner begins with frames that the source has already shown.
        extra = self.num_kept - self.base_offset if done == self.num_kept else 0
        for group, tensors in self._refined(geometry, resumed):
            if len(group) > extra:
                yield group[extra:], tensors
            extra = max(0, extra - len(group))

    def _source_frames(self, start: int) -> Iterator[Frames]:
        """Yield the frames of the source from one on, at their times; what is damaged is bridged, and said."""
        assert self.job.source is not None
        return frames.skip(isolated.read_frames(self.job.source, note=partial(self.report.note, warning=True)), start)

    def _kept_frames(self, geometry: Geometry, start: int) -> Iterator[Frames]:
        """Yield the frames of a continued video from `start` on, cropped to the base shape and scaled to the output."""
        if start >= self.num_kept:
            return
        for group in self._source_frames(start):
            images = frames.to_float(group)
            content = frames.fit_into((images.shape[-2], images.shape[-1]), geometry.content, "cover")
            yield geometry.output(frames.apply_fit(images, content))

    def finish(self) -> None:
        """Give the output its name."""
        assert self.writer is not None
        self.directory.require_room(self.writer.mark.size)
        changes = [{**change, "changed": sorted(change["changed"])} for change in self.directory.changes]
        recipe = {"streamt2v": __version__, **self.directory.recipe, **({"changes": changes} if changes else {})}
        with self.frame_time.running():
            extras = self.job.carried().extras if self.job.source else writing.Extras()
            if self.job.output.suffix.lower() == ".mp4":
                self.writer.finish(self.job.output, json.dumps(recipe), extras)
            else:
                exports.write(self.writer, self.job.output, json.dumps(recipe), extras)

    def remember(self, seconds: float) -> None:
        """Keep this run's speed for `plan`; short runs say too little."""
        later_chunks = len(self.stream_plan) - 1
        unlike = self.job.command != "generate" or self.job.resume or self.directory.changes
        if unlike or not later_chunks or len(self.refine_plan) < 2:
            return
        rest = seconds - self.fixed_seconds - self.stream_seconds
        frame_seconds = self.frame_time.seconds if self.config.refine.enabled else rest
        measured = {
            "fixed_seconds": self.fixed_seconds,
            "stream_seconds_per_chunk": self.stream_seconds / later_chunks,
            "refine_seconds_per_chunk": (rest - frame_seconds) / len(self.refine_plan),
            "seconds_per_frame": frame_seconds / self.config.num_frames,
            "peak_memory_bytes": devices.peak_memory(self.device),
        }
        seen = devices.Glance(self.device.kind, 0, devices.card(self.device))
        forecast.remember(self.config, seen, torch.get_num_threads(), self.policy, measured)

    def _prompt_of(self, chunk: Chunk) -> str:
        """Return what a chunk of either plan follows: the prompt of its first new frame."""
        return prompt_at(self.timeline, self.base_offset + chunk.new_start)

    # -- sizes

    def _base_size(self) -> tuple[int, int]:
        if self.job.source is None or self.job.command == "extend":
            return self.config.stream.size
        found = isolated.probe(self.job.source)
        return found.height, found.width

    def _geometry(self) -> Geometry:
        base, output = self._base_size(), self.config.output
        fit = frames.fit_into(base, (output.height or base[0], output.width or base[1]), output.fit)
        content = Geometry(fit, (0, 0)).content
        return Geometry(fit, content)

    # -- stage 3

    def _unrefined(self, geometry: Geometry, start: int) -> Iterator[Frames]:
        for group in self._base_frames(start):
            content = geometry.into_canvas(frames.to_float(group))
            yield geometry.output(content)

    def _refined(self, geometry: Geometry, state: RefineState | None) -> Iterator[tuple[Frames, dict[str, Tensor]]]:
        """Yield (output frames, state after them) group by group."""
        settings, device, schedule = self.config.refine, self.device.name, self._schedule("refine.unet")
        noise_grid(schedule, settings)  # what it refuses should not cost a first chunk
        if not self.policy.keep_networks:
            self._finish_base()
        base = self._base_frames(0 if state is None else state.encoded)
        first = list(islice(base, 1))  # before the refiner's networks take memory: a model of others may need it all
        texts = self._texts("refine") if self.family.has("refine.text") else {}
        vae, unet = self._load("refine.vae"), self._load("refine.unet")

        @lru_cache(maxsize=settings.num_inference_steps + 2)  # those of the chunks in flight, at any length
        def prepared(prompt: str) -> Conditioning:
            return refiner.prepare(unet, texts.get(prompt), scale)

        denoiser = Denoiser(
            self._compiled(unet.run), schedule, lambda chunk: prepared(self._prompt_of(chunk)),
            self.policy.batched_guidance, "cpu" if self.policy.encoders_on_host else None,
            refiner.sees_source(unet.config),
        )  # fmt: skip
        geometry = Geometry(geometry.fit, refiner.legal_canvas(*geometry.content, unet.config, latent_factor(vae)))
        scale = max(1.0, geometry.fit.content_height / self._base_size()[0])
        source = frames.singly(chain(first, base))

        def encode(start: int, stop: int) -> Tensor:
            return torch.cat([encode_frame(frame) for frame in range(start, stop)])

        def encode_frame(frame: int) -> Tensor:
            if (taken := next(source, None)) is None:
                raise VideoError(f"the video ended early, after {frame} of {self.num_frames} frames")
            image = geometry.into_canvas(frames.to_float(taken, device))
            noise = None
            if settings.posterior == "published":
                shape = (unet.config.out_channels, *latent_size(vae, *geometry.canvas))
                noise = self.draws.normal("refine.posterior", (frame,), shape).unsqueeze(0)
            with self.frame_time.running():
                return encode_frames(vae, image, noise)

        stage = Refiner(denoiser, self.refine_plan, settings, self.draws, encode, state)
        assert self.writer is not None
        self.report.start(REFINE, self.num_frames, max(0, self.writer.mark.frames - self.base_offset))
        for latents in stage.run():
            # One frame at a time: decoded floats of a whole group would be the largest thing in memory.
            decoded = (decode_latents(vae, latent.unsqueeze(0)) for latent in latents)
            with self.frame_time.running():
                shown = [geometry.output(frames.unletterbox(frame, geometry.content)) for frame in decoded]
            yield np.concatenate(shown), stage.state.tensors()
            done = self.writer.mark.frames - self.base_offset
            self.report.advance(REFINE, done, max(covering(self.refine_plan, done - 1)) + 1, len(self.refine_plan))

    def _finish_base(self) -> None:
        """Make all base frames and let go of the networks that made them."""
        if self.job.command != "refine":
            for _ in self._base_frames(self.directory.num_base_frames):
                pass
        self.networks.clear()
        vars(self).pop("_stream_parts", None)
        devices.release_memory(self.device, graphs=True)

    # -- stages 1 and 2

    def _base_frames(self, start: int) -> Iterator[Frames]:
        """Yield base frames from `start` on: what is stored, then what the first two stages make; or the source's."""
        if self.job.source is not None and self.job.command == "refine":
            yield from self._source_frames(start)
            return
        stored = self.directory.num_base_frames
        yield from self.directory.base_frames(start)
        if stored < self.num_frames:
            yield from frames.skip(self._stream(), max(0, start - stored))

    def _stream(self) -> Iterator[Frames]:
        """Continue the base video from the stored state, or begin it; store every chunk before passing it on."""
        config, num_stored = self.config.stream, self.directory.num_base_frames
        self.report.start(STREAM, self.num_frames, num_stored)
        stored = self.stream_state
        if stored is None:
            began = time.monotonic() - self.fixed_seconds
            first = self._given_first_chunk()  # before the stream's networks take memory
            first = self._own_first_chunk() if first is None else first
            if not frames.is_finite(first):  # also in frames that only the next chunk looks at
                raise NumericsError("the first chunk holds NaN or Inf")
            self.fixed_seconds = time.monotonic() - began
            state = stream.StreamState.after_first_chunk(first, config.overlap)
            yield self._store(0, first[: self.num_frames], state, time.monotonic())
        else:
            tensors = {name: tensor.to(self.device.name) for name, tensor in stored.torch().items()}
            state = stream.StreamState(stored.meta["next_chunk"], tensors["conditioning_frames"], tensors["anchor"])
        left = self.stream_plan[state.next_chunk :]
        if not left:
            return
        models, texts, noise = self._stream_parts
        sampling = Sampling.of(config, self.policy.batched_guidance)
        began = time.monotonic()
        for prompt, group in groupby(left, self._prompt_of):
            chunks = list(group)
            streamer = stream.Streamer(models, texts[prompt], state.anchor, sampling, noise)
            for chunk, made in zip(chunks, streamer.run(state, chunks), strict=True):
                new, state = made
                yield self._store(chunk.index, new, state, began)
                began = time.monotonic()

    def _store(self, index: int, new: Tensor, state: stream.StreamState, began: float) -> Frames:
        """Store the new frames of one chunk and the state after it; return the frames as uint8."""
        images, start = frames.to_u8(new), self.directory.num_base_frames
        self.directory.append_base(index, images)
        tensors = {"conditioning_frames": state.conditioning_frames, "anchor": state.anchor}
        self.directory.save_state("stream", tensors, {"next_chunk": state.next_chunk})
        self._look_at(images, f"base frames {start} to {start + len(images) - 1}")
        self.stream_seconds += time.monotonic() - began
        self.report.advance(STREAM, self.directory.num_base_frames, index + 1, len(self.stream_plan))
        return images

    def _given_first_chunk(self) -> Tensor | None:
        """Take the first chunk [F, 3, H, W] from the source or a model of others; None: the family makes its own."""
        if self.job.source is not None:
            made = np.concatenate(list(self._source_frames(self.base_offset)))
            first = frames.to_float(made, self.device.name)
        elif (chosen := choose.choose(self.config)) is not None:
            self.report.note(f"the first frames come from {chosen.name}")
            first = self._borrowed_chunk(chosen).to(self.device.name)
            devices.release_memory(self.device)
        else:
            return None
        return frames.apply_fit(
            first, frames.fit_into((first.shape[-2], first.shape[-1]), self.config.stream.size, "cover")
        )

    def _borrowed_chunk(self, chosen: choose.Chosen) -> Tensor:
        """Run a model of others at its own size and let go of it."""
        config, device = self.config, self.device.name
        if chosen.kind == choose.MODELSCOPE:
            model = modelscope.load_modelscope(chosen.folder, device)
            height, width = config.initialize.size or config.stream.size
            shape = (model.unet.config.out_channels, *latent_size(model.vae, height, width))
            noise = stream.chunk_noise(self.draws, config.stream.chunk, shape, device)
            return modelscope.from_modelscope(model, config, self._first_sampling, noise)
        if chosen.kind == choose.ADAPTER:
            pipeline = self._pipeline(chosen.folder, chosen.drawing[0])
            return diffusers_pipelines.from_pipeline(pipeline, config, self.draws.generator("initialize"))
        picture = self._picture("cpu") if self.config.image else None
        if chosen.drawing:
            artists = [self._pipeline(folder) for folder in chosen.drawing]
            picture = diffusers_pipelines.draw_picture(artists, config, self.draws.generator("initialize.picture"))
            del artists
            devices.release_memory(self.device)
        pipeline, at_once = self._pipeline(chosen.folder), 8 if self.policy.keep_networks else 2
        return diffusers_pipelines.from_pipeline(pipeline, config, self.draws.generator("initialize"), picture, at_once)

    def _pipeline(self, folder: Path, base: Path | None = None) -> Any:
        self.report.note(f"loading {folder}")
        pipeline = diffusers_pipelines.load(folder, self.device.name, base, self.policy)
        if self.config.negative_prompt and diffusers_pipelines.ignores_negative_prompt(pipeline):
            self.report.note(f"{type(pipeline).__name__} knows no negative prompt", warning=True)
        return pipeline

    def _picture(self, device: str) -> Tensor:
        """Read the picture to start from: [3, h, w] in [-1, 1]."""
        return frames.to_float(pictures.read(Path(self.config.image))[None], device)[0]

    def _own_first_chunk(self) -> Tensor:
        """Run the family's own initializer: frames [F, 3, H, W] in [-1, 1]."""
        config, size = self.config.initialize, self.config.stream.chunk
        models, texts, noise = self._stream_parts
        text, sampling = texts[self.config.prompt], self._first_sampling
        if not self.config.image:
            return streamingt2v.from_text(models, text, sampling, noise, size)
        picture = self._picture(self.device.name).unsqueeze(0)
        base = self.config.stream.size
        picture = frames.apply_fit(picture, frames.fit_into((picture.shape[-2], picture.shape[-1]), base, "cover"))
        unet = self._load("initialize.image")
        sampling = replace(sampling, guidance_scale=config.image_guidance_scale)
        return streamingt2v.from_image(models, unet, picture[0], text, sampling, noise, size)

    @property
    def _first_sampling(self) -> Sampling:
        return Sampling.of(self.config.initialize, self.policy.batched_guidance)

    # -- networks

    @cached_property
    def _stream_parts(self) -> tuple[stream.StreamModels, dict[str, TextContext], stream.NoiseOfChunk]:
        texts = self._texts("stream")
        config, models = self.config.stream, self._stream_models()
        shape = (models.unet.config.out_channels, *latent_size(models.vae, config.height, config.width))
        noise = stream.chunk_noise(self.draws, config.chunk, shape, self.device.name)
        return models, texts, noise

    def _stream_models(self) -> stream.StreamModels:
        config, family = self.config.stream, self.family
        apm = config.apm and family.has("stream.apm")
        starts_from_picture = self.config.image and choose.named(self.config) == choose.OWN
        return stream.StreamModels(
            unet=self._load("stream.unet"),
            schedule=self._schedule("stream.unet"),
            vae=self._load("stream.vae"),
            cam=self._load("stream.cam") if config.cam else None,
            apm=self._load("stream.apm") if apm else None,
            image_encoder=self._load("stream.image") if apm or starts_from_picture else None,
            # Small networks: starting their kernels takes longer than the kernels.
            step=self._compiled(stream.network_step, graphs=self.policy.keep_networks),
        )

    def _compiled(self, function: Callable[..., Any], graphs: bool = False) -> Callable[..., Any]:
        if not self.compiles:
            return function
        return devices.compiled(function, self.device, graphs=graphs)

    def _load(self, role: str) -> Any:
        began = time.monotonic()
        path = self.family.path(role)
        if path not in self.networks:
            self.report.note(f"loading {role}")
            policy = self.policy
            on_host = policy.offload or (policy.encoders_on_host and role in ENCODERS)
            place = "cpu" if on_host else self.device.name
            network = weights.load(self.family, role, place, getattr(torch, policy.precision))
            if isinstance(network, torch.nn.Module):
                slice_feed_forwards(network, policy.feed_forward_rows)
                devices.arrange(network, self.device)
                if role.endswith(".vae"):
                    for half in (network.get_submodule("encoder"), network.get_submodule("decoder")):
                        half.forward = self._compiled(half.forward)
                if on_host:
                    devices.offload(network, self.device)
            self.networks[path] = network
        self.fixed_seconds += time.monotonic() - began
        return self.networks[path]

    def _schedule(self, role: str) -> NoiseSchedule:
        _, _, schedule = weights.read_header(self.family.path(role))
        return NoiseSchedule(ScheduleConfig.from_dict(schedule or {}))

    @torch.inference_mode()
    def _texts(self, stage: str) -> dict[str, TextContext]:
        """Encode every prompt of the timeline for one stage: rows (negative, positive).

        All at once, so that the encoder can go; one by one, as rounding may depend on the size of a batch.
        """
        tokenizer, encoder = self._load(f"{stage}.tokenizer"), self._load(f"{stage}.text")
        room, encoded = encoder.config.max_position_embeddings, {}
        for prompt in dict.fromkeys(turn.text for turn in self.timeline):
            texts = [self.config.negative_prompt, prompt]
            if self.family.file(f"{stage}.tokenizer").tidy:
                texts = [clean_prompt(text) for text in texts]
            for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
                if len(ids) > room:
                    cut = f"the text encoder reads {room} of {len(ids)} tokens, the rest is cut off: {text[:60]!r}..."
                    self.report.note(cut, warning=True)
            encoded[prompt] = encode_text(tokenizer, encoder, texts)
        if not self.policy.keep_networks:
            del self.networks[self.family.path(f"{stage}.text")]
        return encoded
