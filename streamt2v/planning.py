"""What a run will do, before it does it: chunks, sizes, memory and time. Loads no weights and no torch."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from streamt2v import home, initializers, weights
from streamt2v.chunks import Chunk, refinement_plan, streaming_plan
from streamt2v.config import RunConfig


@dataclass(frozen=True)
class Plan:
    """Chunks of both stages, sizes in pixels, and estimates; None where this machine has not run the model yet."""

    model: str
    num_frames: int
    fps: float
    initializer: str
    stream_chunks: tuple[Chunk, ...]
    refine_chunks: tuple[Chunk, ...]
    base_height: int
    base_width: int
    box_height: int
    box_width: int
    weights_bytes: int
    peak_memory_bytes: int | None
    seconds: float | None

    def as_text(self) -> str:
        """Return the plan as a few lines for people."""
        lines = [
            f"model    {self.model}, {self.weights_bytes / 1e6:.0f} MB of weights",
            f"video    {self.num_frames} frames at {self.fps:g} fps, {self.num_frames / self.fps:.1f} s",
            f"start    {'the family itself' if self.initializer == initializers.OWN else self.initializer}",
            f"stream   {len(self.stream_chunks)} chunks at {self.base_width}x{self.base_height}, "
            f"the first of {self.stream_chunks[0].size} frames",
        ]
        if self.refine_chunks:
            lines.append(
                f"refine   {len(self.refine_chunks)} chunks of up to {self.refine_chunks[0].size} frames, "
                f"into {self.box_width}x{self.box_height}"
            )
        else:
            lines.append("refine   no")
        unknown = "unknown until the first run on this machine"
        memory = (
            unknown
            if self.peak_memory_bytes is None
            else f"about {self.peak_memory_bytes / 1e6:.0f} MB, for any length"
        )
        lines.append(f"memory   {memory}")
        lines.append(f"time     {unknown if self.seconds is None else f'about {self.seconds:.0f} s'}")
        return "\n".join(lines)


def plan(config: RunConfig) -> Plan:
    """Plan a run.

    Raises:
        ConfigError: the numbers of frames do not fit together.
    """
    stream, refine, output = config.stream, config.refine, config.output
    family = weights.family(config.model)
    measured = _measured(config)
    streaming = streaming_plan(config.num_frames, stream.chunk, stream.overlap)
    refinement = refinement_plan(config.num_frames, refine.chunk, refine.overlap) if refine.enabled else ()
    seconds = None
    if measured is not None:
        seconds = measured["fixed_seconds"] + (len(streaming) - 1) * measured["stream_seconds_per_chunk"]
        seconds += len(refinement) * measured["refine_seconds_per_chunk"]
    return Plan(
        config.model, config.num_frames, output.fps, initializers.named(config), streaming, refinement,
        stream.height, stream.width, output.height, output.width, family.num_bytes,
        None if measured is None else int(measured["peak_memory_bytes"]), seconds,
    )  # fmt: skip


def _timings_path() -> Path:
    return home.path() / "timings.json"


def _key(config: RunConfig) -> str:
    """Return what the time of a chunk depends on."""
    stream, refine, output = config.stream, config.refine, config.output
    parts = [
        config.model, initializers.named(config), config.initialize.text_to_image,
        stream.chunk, stream.overlap, stream.height, stream.width,
        stream.num_inference_steps, stream.guidance_scale > 1, stream.guidance_stop, stream.cam, stream.apm,
        refine.enabled,
    ]  # fmt: skip
    if refine.enabled:
        parts += [
            refine.chunk,
            refine.overlap,
            refine.blending,
            refine.num_inference_steps,
            refine.guidance_scale > 1,
            output.height,
            output.width,
            output.fit,
        ]
    return "/".join(map(str, parts))


def _measured(config: RunConfig) -> dict[str, float] | None:
    try:
        table: dict[str, dict[str, float]] = json.loads(_timings_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return table.get(_key(config))


def remember(config: RunConfig, measured: dict[str, float]) -> None:
    """Store what a finished run measured, for later plans; a cache that cannot be written is not an error."""
    path = _timings_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        table[_key(config)] = measured
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(table, file)
        Path(file.name).replace(path)
    except (OSError, ValueError):
        return
