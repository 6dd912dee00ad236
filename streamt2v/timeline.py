"""Prompts and pictures over time: how a time is written, where each takes effect, and the chunks that follow."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamt2v import config
from streamt2v.chunks import Chunk, base_offset, interpolated, refinement_plan, seams, snap, streaming_plan
from streamt2v.config import RunConfig
from streamt2v.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """A prompt of a timeline: the frame it was requested for, and the frame at which the run switches to it."""

    asked: int
    frame: int
    text: str


def turns(run: RunConfig, command: str = "generate", kept: int = 0) -> tuple[Prompt, ...]:
    """Return the prompts of a run in order, with the frames at which the run switches to them.

    A change waits for the next streaming chunk. A video that is only refined has none, so every change takes effect
    where it was requested, as do changes inside the `kept` made frames of a video that is continued.

    Raises:
        ConfigError: a change would never be seen.
    """
    asked = sorted(run.prompts)
    later = [] if command == "refine" else [frame for frame in asked if frame >= kept * run.output.interpolate]
    followed = dict[int, int]()
    if later and run.loop != "ring":  # whose windows each follow what they show
        stream, _ = plans(run, command, kept)
        followed = dict(zip(later, snap(later, seams(stream)), strict=True))
    changes = (Prompt(frame, followed.get(frame, frame), run.prompts[frame]) for frame in asked)
    return (Prompt(0, 0, run.prompt), *changes)


def plans(run: RunConfig, command: str = "generate", kept: int = 0) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
    """Return the chunks of the streaming and of the refinement stage, in frames of the output, interpolated ones too.

    The first chunk of a continued video starts with the last of its `kept` frames. A stage that the run leaves out has
    no chunks.
    """
    begin = base_offset(kept, run.stream.chunk)
    stream, refine = made_plans(run, run.made - begin, command, kept)
    return interpolated(stream, run.output.interpolate, begin), interpolated(refine, run.output.interpolate, begin)


def made_plans(
    run: RunConfig, num_frames: int, command: str = "generate", kept: int = 0
) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
    """Return the same chunks in frames of the base video, which has `num_frames`."""
    first = base_plan(run, num_frames, kept) if command != "refine" else ()
    refine = run.refine
    second = refinement_plan(num_frames, refine.chunk, refine.overlap, refine.shift_back) if refine.enabled else ()
    return first, second


def base_plan(run: RunConfig, num_frames: int, kept: int = 0) -> tuple[Chunk, ...]:
    """Return the chunks of the streaming stage, in frames of the base video; it continues `kept` frames, if any.

    A picture ends a chunk, so that as many new frames as possible lead to it. What comes home has a last chunk that
    ends with the first frames. Either may be as long as `stream.replacement_lead` chunks. A ring has one chunk: nothing
    of it is finished before all is.
    """
    stream = run.stream
    if run.loop == "ring":
        return (Chunk(0, 0, num_frames, 0),)
    ends = [frame + 1 - base_offset(kept, stream.chunk) for frame in run.made_pictures]
    if run.loop == "stream" and num_frames > stream.chunk:
        ends.append(num_frames + home_frames(run))
    lead = stream.replacement_lead
    return streaming_plan(num_frames, stream.chunk, stream.overlap, ends, whole_first=kept > 0, lead=lead)


def home_frames(run: RunConfig) -> int:
    """How many of its first frames the last chunk of a stream that comes home ends with."""
    return run.stream.overlap // 2


def prompt_at(timeline: Sequence[Prompt], frame: int) -> str:
    """Return the prompt at a frame."""
    return next(prompt.text for prompt in reversed(timeline) if prompt.frame <= frame)


def parse_time(text: str, fps: float) -> int:
    """Parse a time into a frame number: ``240`` (a frame), ``10s``, ``2m``, ``1h``, ``1m30s`` or ``1:20``.

    Raises:
        ConfigError: the text is none of these.
    """
    written, number = text.strip(), r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"
    if re.fullmatch("[0-9]{1,9}", written):
        return int(written)
    found = re.fullmatch(r"(?:([0-9]{1,7}):)?([0-9]{1,7}):([0-5]?[0-9])", written)
    found = found or re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s)?", written)
    if not written or not found:
        raise ConfigError(f"{text!r} is not a time", "give a frame such as 240, or 10s, 2m or 1:20")
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return round((3600 * hours + 60 * minutes + seconds) * fps)


def parse_at(pair: str) -> tuple[str, str]:
    """Split ``TIME=PROMPT``. Raises ConfigError where one of them is missing."""
    time, equals, text = pair.partition("=")
    if not equals:
        raise ConfigError("--at needs a time and a prompt", 'it must look like --at 10s "a blue ball"')
    return time, text


def read_timeline(path: Path) -> list[tuple[str, str]]:
    """Read times and prompts from a TOML or JSON file.

    Raises:
        ConfigError: the file is unreadable or not a table of texts.
    """
    if path.suffix.lower() != ".json":
        rows = list(config.read_toml(path).items())
    else:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read the timeline {path}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, tuple) and isinstance(row[1], str) for row in rows):
        raise ConfigError(f"{path} is not a timeline", 'it must look like {"0": "a red ball", "240": "a blue ball"}')
    return rows


def is_picture(text: str) -> bool:
    """Tell whether what is to be seen at a time is the name of a picture, not a prompt."""
    return text.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"))


def settings_at(rows: list[tuple[str, str]], fps: float, kept: int) -> dict[str, str]:
    """Turn times with prompts or names of pictures into settings; no time may lie in `kept` frames.

    Frame 0 sets the main prompt, or the picture to start from.
    """
    found: dict[str, str] = {}
    for time, text in rows:
        frame, what = parse_time(time, fps), "pictures" if is_picture(text) else "prompts"
        key = f"{what}.{frame}" if frame else {"pictures": "image", "prompts": "prompt"}[what]
        if frame < kept:
            raise ConfigError(f"frame {frame} already exists: new ones begin at {kept}", "give a later time")
        if key in found:
            verb = "begin at" if what == "prompts" else "are for"
            raise ConfigError(f"two {what} {verb} frame {frame}", "leave one of them out")
        found[key] = text
    return found
