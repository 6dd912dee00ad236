"""Prompts over time: how a time is written, at which frame a run switches to each prompt, and the chunks it has."""

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
    if later:
        stream, _ = plans(run, command, kept)
        followed = dict(zip(later, snap(later, seams(stream)), strict=True))
    changes = (Prompt(frame, followed.get(frame, frame), run.prompts[frame]) for frame in asked)
    return (Prompt(0, 0, run.prompt), *changes)


def plans(run: RunConfig, command: str = "generate", kept: int = 0) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
    """Return the chunks of the streaming and of the refinement stage, in frames of the output, interpolated ones too.

    The first chunk of a continued video starts with the last of its `kept` frames. A stage that the run leaves out has
    no chunks.
    """
    stream, refine = run.stream, run.refine
    begin = base_offset(kept, stream.chunk)
    made = run.made - begin
    first = streaming_plan(made, stream.chunk, stream.overlap) if command != "refine" else ()
    second = refinement_plan(made, refine.chunk, refine.overlap) if refine.enabled else ()
    factor = run.output.interpolate
    return interpolated(first, factor, begin), interpolated(second, factor, begin)


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


def prompts_at(rows: list[tuple[str, str]], fps: float, kept: int) -> dict[str, str]:
    """Turn times and prompts into settings; frame 0 sets the main prompt, and no change may lie in `kept` frames."""
    found: dict[str, str] = {}
    for time, text in rows:
        frame = parse_time(time, fps)
        key = f"prompts.{frame}" if frame else "prompt"
        if frame < kept:
            raise ConfigError(f"frame {frame} already exists: new ones begin at {kept}", "give a later time")
        if key in found:
            raise ConfigError(f"two prompts begin at frame {frame}", "leave one of them out")
        found[key] = text
    return found
