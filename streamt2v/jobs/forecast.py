"""What a run will do, before it does it: chunks, sizes, memory and time. Loads no weights and no torch."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamt2v import devices, files, memory
from streamt2v.chunks import Chunk, amount, length
from streamt2v.config import RunConfig, parse_lora, to_flat
from streamt2v.errors import ConfigError, OutputError
from streamt2v.families import choose
from streamt2v.jobs.prepared import Prepared
from streamt2v.timeline import Prompt
from streamt2v.weights import home

PER_CHUNK = ("stream_seconds_per_chunk", "refine_seconds_per_chunk")
MEASURED = ("fixed_seconds", *PER_CHUNK, "seconds_per_frame", "peak_memory_bytes")


def spoken(seconds: float) -> str:
    """Write a time as people say it: 40 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


@dataclass(frozen=True)
class Plan:
    """Chunks of both stages in frames of the output, sizes in pixels, and estimates.

    Estimates are None where this machine has not run the model yet.
    """

    model: str
    num_frames: int
    made: int
    fps: float
    initializer: str
    stream_chunks: tuple[Chunk, ...]
    refine_chunks: tuple[Chunk, ...]
    prompts: tuple[Prompt, ...]
    pictures: Mapping[int, str]
    loras: Mapping[int, str]
    base_height: int
    base_width: int
    height: int
    width: int
    weights_bytes: int
    device: str
    free_bytes: int
    policy: memory.MemoryPolicy
    together: bool
    needed_bytes: int
    measured: dict[str, float] | None
    seconds: float | None

    def as_text(self) -> str:
        """Return the plan as a few lines for people."""
        base, size = f"{self.base_width}x{self.base_height}", f"{self.width}x{self.height}"
        stream, refine, weighs = self.stream_chunks, "no", self.weights_bytes / 1e6
        lines = [
            f"model    {self.model}, {weighs:.{0 if weighs > 10 else 1}f} MB of weights",
            f"video    {size}, {self.num_frames} frames at {self.fps:g} fps, {self.num_frames / self.fps:.1f} s"
            + ("" if self.made == self.num_frames else f"; {self.made} are made, the others interpolated"),
        ]
        if stream:
            lines.append(f"start    {'the family itself' if self.initializer == choose.OWN else self.initializer}")
        first = f"stream   {_chunks(stream)} at {base}, the first of {stream[0].size} frames" if stream else ""
        if self.refine_chunks:
            refine = f"{_chunks(self.refine_chunks)} of up to {self.refine_chunks[0].size} frames, into {size}"
        lines += [first or f"source   {base}", f"refine   {refine}"]
        for prompt in self.prompts[1:]:
            asked = "" if prompt.asked == prompt.frame else f" (asked for at {prompt.asked})"
            lines.append(f"prompt   from frame {prompt.frame}{asked}: {prompt.text}")
        lines.extend(f"picture  at frame {frame}: {path}" for frame, path in self.pictures.items())
        lines.extend(f"lora     {one.path} at {one.strength:g}" for one in map(parse_lora, self.loras.values()))
        short = "; MORE THAN THERE IS" if self.needed_bytes > self.free_bytes else ""
        peak = self.needed_bytes if self.measured is None else self.measured["peak_memory_bytes"]
        said = f"up to {peak / 1e9:.1f}{' measured' * (self.measured is not None)} of {self.free_bytes / 1e9:.1f} GB"
        lines += [
            f"memory   {self.policy.describe(self.together)}",
            f"         {said} ({self.device}), for any length{short}",
        ]
        if caution := devices.caution(self.device):
            lines.append(f"         {caution}")
        if self.measured is None:
            measures = "; `streamt2v bench` measures it" if stream else ""
            lines.append(f"time     unknown until the first run on this machine{measures}")
        else:
            start, chunk, refined, frame, _ = (self.measured[name] for name in MEASURED)
            begun = f": {start:.3g} s to load and begin, {chunk:.3g} s a chunk" if stream else ""
            refining = "and beside that " * self.together
            refining += f"{refined:.3g} s a chunk of the refiner, " if self.refine_chunks else ""
            lines.append(f"time     about {spoken(self.seconds or 0)}{begun},")
            lines.append(f"         {refining}{frame:.3g} s a frame for its pixels")
        return "\n".join(lines)

    def as_line(self) -> str:
        """Return the plan in one line, for a list of them."""
        size = f"refined to {self.width}x{self.height}" if self.refine_chunks else "not refined"
        time = "time unknown" if self.seconds is None else f"about {spoken(self.seconds)}"
        return f"{self.num_frames} frames at {self.fps:g} fps, {size}; {time}; up to {self.needed_bytes / 1e9:.1f} GB"


def _chunks(plan: Sequence[Chunk]) -> str:
    return f"{len(plan)} chunk{'s' * (len(plan) > 1)}"


def plan(known: Prepared) -> Plan:
    """Plan a run on its device.

    Raises:
        ConfigError: the numbers of frames do not fit together, or no such device is here and no memory is given.
    """
    job, config = known.job, known.job.config
    seen = _look(job.device, job.memory)
    kind, free = seen.kind, seen.free if job.memory is None else int(job.memory * 1e9)
    policy = memory.choose(free, known.stages, kind)
    threads = known.threads(kind)
    together = known.side_by_side(kind, policy, free, threads)
    measured = expected(config, seen, threads, policy, together)
    (stream, refine), base, seconds = known.plans, known.base_size, None
    if measured is not None:
        made = max(0, len(stream) - 1) * measured["stream_seconds_per_chunk"]
        refined = amount(known.refine_plan) * measured["refine_seconds_per_chunk"]  # of a loop, all the way round
        refined += config.num_frames * measured["seconds_per_frame"]
        last = trailing(config) / len(known.refine_plan) if together else 1.0
        seconds = (measured["fixed_seconds"] if stream else 0.0) + max(made + min(1.0, last) * refined, refined)
    return Plan(
        model=job.maker,
        num_frames=config.num_frames,
        made=known.made,
        fps=config.output.fps,
        initializer=choose.named(config),
        stream_chunks=stream,
        refine_chunks=refine,
        prompts=known.timeline,
        pictures=config.pictures,
        loras=config.loras,
        base_height=base[0],
        base_width=base[1],
        height=known.fit.height,
        width=known.fit.width,
        weights_bytes=2 * known.num_values,
        device=kind,
        free_bytes=free,
        policy=policy,
        together=together,
        needed_bytes=memory.needed(known.stages, policy, together),
        measured=measured,
        seconds=seconds,
    )


def _look(device: str, gigabytes: float | None) -> devices.Glance:
    """Look at a device; one that is not here can be planned for where its memory is given."""
    try:
        return devices.glance(device)
    except ConfigError as error:
        kind, _ = devices.parse(device)
        if gigabytes is None:
            raise ConfigError(error.message, f"{error.hint}; or say with --memory what it has") from None
        return devices.Glance(kind, 0)


def trailing(config: RunConfig) -> float:
    """Return how many chunks of the refiner are left when the last base frames come, where it keeps up with them.

    A chunk cannot run a step before its right neighbour has run the one before, so the last n chunks of n steps lack
    n, n - 1, ... and 1 of them.
    """
    return (config.refine.num_inference_steps + 1) / 2


def expected(
    config: RunConfig, seen: devices.Glance, threads: int, policy: memory.MemoryPolicy, together: bool = False
) -> dict[str, float] | None:
    """Return what an earlier run with the same costs measured, by the names in `MEASURED`; None where none did.

    `together`: both stages at the same time.
    """
    return _timings().get(_key(config, seen, threads, policy, together))


def _timings_path() -> Path:
    return home.path() / "timings.json"


# Settings that the times depend on; those of the refiner only where it runs.
_TIMED = (
    *("model", "compile", "initialize.text_to_image", "initialize.num_inference_steps", "refine.enabled"),
    *("output.interpolate", "output.interpolator"),
    *(f"stream.{name}" for name in ("chunk", "overlap", "height", "width", "num_inference_steps", "guidance_stop")),
    *(f"stream.{name}" for name in ("cam", "apm", "reuse_interval", "replacement")),
)
_REFINED = (
    *(f"refine.{name}" for name in ("model", "chunk", "overlap", "num_inference_steps", "guidance_stop")),
    "refine.reuse_interval",
    *("output.height", "output.width", "output.fit"),
)


def _key(config: RunConfig, seen: devices.Glance, threads: int, policy: memory.MemoryPolicy, together: bool) -> str:
    """Return what the times depend on: of the memory policy only what makes them many times longer."""
    own, settings = config.initialize, to_flat(config)
    scales = [own.image_guidance_scale if choose.pictured(config) else own.guidance_scale]
    scales += [config.stream.guidance_scale]
    names = [*_TIMED, *(_REFINED if config.refine.enabled else ())]
    parts = [seen.kind, seen.card, threads, policy.offload, choose.named(config), *(settings[name] for name in names)]
    parts += ["together"] * together
    parts += [scale != 1 for scale in [*scales, *([config.refine.guidance_scale] if config.refine.enabled else [])]]
    return "/".join(map(str, parts))


def _timings() -> dict[str, dict[str, float]]:
    """Return what runs measured by their key; a damaged file counts as none."""
    try:
        table = json.loads(_timings_path().read_text(encoding="utf-8"))
        return {key: {name: float(row[name]) for name in MEASURED} for key, row in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def short_length(config: RunConfig) -> int:
    """Frames of a video that is just long enough to measure: two chunks of the refiner, and two after the first."""
    stream, refine = config.stream, config.refine
    made = max(length(3, stream.chunk, stream.overlap), length(2, refine.chunk, refine.overlap))
    return config.output.interpolate * (made - 1) + 1


def remember(
    config: RunConfig,
    seen: devices.Glance,
    threads: int,
    policy: memory.MemoryPolicy,
    measured: dict[str, float],
    together: bool = False,
) -> None:
    """Store what a finished run measured, for later plans; a cache that cannot be written is not an error."""
    with contextlib.suppress(OutputError):
        files.make_directory(home.path())
        files.write_json(_timings_path(), _timings() | {_key(config, seen, threads, policy, together): measured})
