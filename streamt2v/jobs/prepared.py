"""One record of all that can be known of a job before torch is imported; found out once, handed down."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v import devices, files, memory, weights
from streamt2v.chunks import Around, Chunk, base_offset, interpolated, loop_plan
from streamt2v.config import at_path, to_flat
from streamt2v.families import choose
from streamt2v.jobs import needs
from streamt2v.jobs.job import Job
from streamt2v.jobs.recipe import Source, inspect_source
from streamt2v.media import shape
from streamt2v.timeline import Prompt, made_plans, prompt_at, turns
from streamt2v.weights import folders, hub, lora

if TYPE_CHECKING:
    from streamt2v.media.sound import Carried


NARROW = 64  # channels of the finest level; measured at 32, where a second thread brings an operation hardly anything
LOOP_STEPS = 4
"""Frames of a loop are refined beside all that so many steps can mix into them; more would cost more than it shows."""


@dataclass(frozen=True)
class Prepared:
    """A job, and what follows from it and from the files it names; each fact is found when it is first asked for.

    Frames are numbered twice, before others are interpolated: those of the output from 0, and those of the base video,
    which begins with frame `base_offset` of the output: a continued video keeps its frames, and the last of them are
    the first chunk.
    """

    job: Job
    note: hub.Note = lambda text: None
    """Told the size before a third-party model is fetched."""
    notices: list[str] = field(default_factory=list)
    """What the user should know before it begins."""

    def behaving(self, **changes: Any) -> Prepared:
        """Return the same for a run that behaves otherwise, by fields of `Job`: what was found out is kept."""
        other, given = replace(self, job=replace(self.job, **changes)), {field.name for field in fields(self)}
        vars(other).update({name: found for name, found in vars(self).items() if name not in given})
        return other

    @cached_property
    def family(self) -> weights.Family:
        """The model family. Raises ConfigError where there is none of that name."""
        return weights.family(self.job.config.model)

    @property
    def num_values(self) -> int:
        """Parameters of the family's networks; where frames only come between others, of what makes those."""
        name = self.family.pipeline
        if self.job.command == "refine" and not self.job.config.refine.enabled:
            return sum(file.num_values for file in self.helpers)
        return sum(folders.values(name).values() if name else (file.num_values for file in self.family.files))

    @property
    def runs(self) -> tuple[str, ...]:
        """The stages that use files of the family, as roles of networks name them: a third-party refiner does not."""
        refines = self.job.config.refine.enabled and self.refiner is None
        made = () if self.job.command == "refine" else ("initialize", "stream")
        return (*made, *(["refine"] if refines else []))

    @property
    def helpers(self) -> tuple[weights.WeightFile, ...]:
        """The files that are used besides those of the family."""
        output = self.job.config.output
        return weights.interpolator(output.interpolator).files if output.interpolate > 1 else ()

    @cached_property
    def source(self) -> Source | None:
        """The video that is refined or continued. Raises VideoError where it is none."""
        return None if self.job.source is None else inspect_source(self.job.source)

    @cached_property
    def chosen(self) -> choose.Chosen | None:
        """The third-party model of the first frames; None where the family makes them. Raises as `choose.choose`."""
        return choose.choose(self.job.config, self.note) if self.job.command == "generate" else None

    @cached_property
    def refiner(self) -> choose.Chosen | None:
        """The third-party model that refines; None where the family does, or nothing. Raises as `choose.refiner`."""
        return choose.refiner(self.job.config, self.note)

    @property
    def refining_base(self) -> str:
        """The name of the third-party refiner where it is a pipeline that streams too, else ""."""
        return self.refiner.name if self.refiner is not None and self.refiner.kind != choose.I2VGEN else ""

    @cached_property
    def drawing(self) -> dict[str, Path]:
        """Where the networks lie that a LoRA may be merged into, by the name of their model.

        They are those that draw: the denoiser of the streaming stage, a pipeline that streams, also where it refines,
        and ModelScope for first frames, whose network the published streaming stage grew from. Not the others that
        make first frames or refine.
        """
        found, name = dict[str, Path](), self.family.pipeline
        if name and self.runs:
            found[name] = folders.place(folders.locate(name, self.note), "transformer")
        elif "stream" in self.runs and self.family.has("stream.unet"):
            found[self.family.name] = self.family.path("stream.unet")
        if self.chosen is not None and self.chosen.kind == choose.MODELSCOPE:
            found[self.chosen.name] = self.chosen.folder / "unet"
        if self.refining_base:
            found[self.refining_base] = folders.place(folders.locate(self.refining_base, self.note), "transformer")
        return found

    @cached_property
    def loras(self) -> dict[Path, tuple[lora.Given, ...]]:
        """The LoRAs that go into each of these networks. Raises as `lora.assign`."""
        given = [(Path(one.path), one.strength) for one in self.job.config.all_loras.values()]
        return lora.assign(given, self.drawing) if given else {}

    @property
    def kept(self) -> int:
        """Frames of a continued video."""
        return self.source.frames if self.source and self.job.command == "extend" else 0

    @property
    def base_offset(self) -> int:
        """The frame of the output that the base video begins with."""
        return base_offset(self.kept, self.job.config.stream.chunk)

    @property
    def num_frames(self) -> int:
        """Frames of the base video."""
        return self.made - self.base_offset

    @property
    def made(self) -> int:
        """Frames of the output that are not interpolated: of a video that is only refined at most its own."""
        refined = self.source if self.job.command == "refine" else None
        return self.job.config.made if refined is None else min(self.job.config.made, refined.frames)

    @property
    def base_size(self) -> tuple[int, int]:
        """(H, W) of the base video."""
        refined = self.source if self.job.command == "refine" else None
        return self.job.config.stream.size if refined is None else (refined.height, refined.width)

    @cached_property
    def fit(self) -> shape.Fit:
        """Where the base video lies in the output: in the box that the run asks for, 0 being its own size."""
        (height, width), output = self.base_size, self.job.config.output
        return shape.fit_into((height, width), (output.height or height, output.width or width), output.fit)

    @cached_property
    def timeline(self) -> tuple[Prompt, ...]:
        """The prompts, with the frames at which the run turns to them. Raises as `timeline.turns`."""
        return turns(self.job.config, self.job.command, self.kept)

    def prompt_of(self, chunk: Chunk) -> str:
        """Return what a chunk of either plan follows: the prompt of its first new frame."""
        frame = self.base_offset + chunk.new_start
        return prompt_at(self.timeline, frame * self.job.config.output.interpolate)

    @cached_property
    def _made_plans(self) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
        return made_plans(self.job.config, self.num_frames, self.job.command, self.kept)

    @property
    def plans(self) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
        """The chunks of the streaming stage and of the refiner, in frames of the output, as `timeline.plans`."""
        (stream, refine), factor = self._made_plans, self.job.config.output.interpolate
        return interpolated(stream, factor, self.base_offset), interpolated(refine, factor, self.base_offset)

    @property
    def stream_plan(self) -> tuple[Chunk, ...]:
        """The chunks of the streaming stage, in frames of the base video; none of a video that is refined."""
        return self._made_plans[0]

    @property
    def refine_plan(self) -> tuple[Chunk, ...]:
        """The chunks of the refiner, in frames of the base video or `around` it; none where it is off."""
        return self._made_plans[1] if self._rounds is None else self._rounds[0]

    @property
    def around(self) -> Around | None:
        """How the refiner goes round a loop; None where it does not."""
        return None if self._rounds is None else self._rounds[1]

    @cached_property
    def _rounds(self) -> tuple[tuple[Chunk, ...], Around] | None:
        run, refine = self.job.config, self.job.config.refine
        if not refine.enabled or run.loop == "no" or self.job.command == "extend":
            return None
        reach = min(refine.num_inference_steps, LOOP_STEPS) * (refine.chunk - 1)
        return loop_plan(self.num_frames, refine.chunk, refine.overlap, reach)

    @cached_property
    def stages(self) -> tuple[memory.Stage, ...]:
        """What the stages need."""
        return needs.stages(self.job.config, self.base_size if self.job.command == "refine" else None)

    @property
    def paired(self) -> bool:
        """Whether base frames and refined ones are made by networks of their own, one after the other as they come."""
        own = {"stream", "refine"} <= {*self.runs} and not self.family.pipeline
        return own and self.around is None and not self.job.config.compile

    def threads(self, kind: str, recorded: int | None = None) -> int:
        """Return how many threads split a sum: of a run that goes on as many as before, as others round differently.

        Narrow stages that are paired get half of the threads each on a CPU.
        """
        if recorded is not None and self.job.threads is None:
            return recorded
        narrow = self.paired and kind == "cpu" and all(stage.width <= NARROW for stage in self.stages)
        return max(1, self._all_threads // 2) if narrow else self._all_threads

    def side_by_side(self, kind: str, policy: memory.MemoryPolicy, free: int, threads: int) -> bool:
        """Whether base frames are made while others are refined: where `free` bytes and the threads are enough for it.

        No bit depends on it.
        """
        enough = 2 * threads <= self._all_threads and memory.needed(self.stages, policy, together=True) <= free
        return kind == "cpu" and self.paired and policy.keep_networks and enough

    @property
    def _all_threads(self) -> int:
        return devices.default_threads() if self.job.threads is None else self.job.threads

    def carried(self) -> Carried:
        """Return how the result carries the sound that it is given, or what its source has besides pictures."""
        from streamt2v.media import sound

        config, suffix = self.job.config, self.job.output.suffix
        length = config.num_frames / config.output.rate
        if self.job.audio is not None:
            return sound.add(self.job.audio, length, suffix)
        return sound.carry(self.job.source, length, suffix) if self.job.source else sound.Carried()

    def recipe(self) -> dict[str, Any]:
        """Return what decides the frames: a run may only be resumed by a job with an equal recipe."""
        config, source = self.job.config, self.job.source
        used = [*(self.family.used(self.runs) if self.runs else ()), *self.helpers]
        settings = to_flat(config)
        return {
            "command": self.job.command,
            # Of files the names say enough: a recipe travels with the video, the folder stays private.
            "config": settings
            | {key: at_path(key, settings[key], Path(path).name) for key, path in config.all_files.items()},
            "source": source and self.source and {**_fingerprint(source), "frames": self.source.frames},
            "image": None,
            **{key: _fingerprint(Path(path)) for key, path in config.all_files.items()},
            "initializer": None if self.chosen is None else self.chosen.fingerprint(),
            **({} if self.refiner is None else {"refiner": self.refiner.fingerprint()}),
            "weights": self._pipeline() | {name: part.sha256 for file in used for name, part in file.parts.items()},
        }

    def _pipeline(self) -> dict[str, str]:
        """Return the SHA-256 of the files of a family that is a pipeline, hashed into one."""
        name = self.family.pipeline if self.runs else ""
        return {name: folders.fingerprint(folders.locate(name, self.note))} if name else {}


def _fingerprint(path: Path) -> dict[str, Any]:
    size = sum(part.stat().st_size for part in path.iterdir()) if path.is_dir() else path.stat().st_size
    return {"name": path.name, "bytes": size, "sha256": contents_hash(path, files.stamp(path))}


@lru_cache(maxsize=8)
def contents_hash(path: Path, _stamp: tuple[int, int, int] | None) -> str:
    """Return the SHA-256 of a file, or of the pictures in a folder; an unchanged one is read once."""
    from streamt2v.media import exports

    return exports.sha256_of(path)
