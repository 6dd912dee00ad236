"""What is known of a video that is here: size, clock, and the recipe it carries, if any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v import weights
from streamt2v.config import RunConfig, exact_rate, merge, up_to_date
from streamt2v.errors import ConfigError, StreamT2VError, VideoError
from streamt2v.jobs import run_directory
from streamt2v.media.clock import Clock
from streamt2v.timeline import Prompt, turns

if TYPE_CHECKING:
    from streamt2v.media.reading import VideoInfo


@dataclass(frozen=True)
class Source:
    """What `refine` and `extend` need to know of their input."""

    frames: int
    width: int
    height: int
    fps: float
    clock: Clock
    damaged: int
    has_audio: bool
    prompts: dict[int, str]
    """What it shows from which frame on, as far as it says so."""
    own: bool = False
    """Whether streamt2v made its frames, not only refined them."""


MAX_DEPTH = 6  # of a recipe


def _probe(path: Path) -> VideoInfo:
    if not path.exists():  # said before what decodes is loaded
        raise VideoError(f"{path} does not exist")
    from streamt2v.media import isolated

    return isolated.probe(path)


def inspect_source(path: Path) -> Source:
    """Probe a video and read the prompt that made it, if it carries one.

    Raises:
        VideoError: not a readable video.
    """
    found = _probe(path)
    recipe = recipe_of(found.comment)
    prompts = {prompt.frame: prompt.text for prompt in recorded_timeline(recipe, found.frames)}
    return Source(
        frames=found.frames,
        width=found.width,
        height=found.height,
        fps=float(exact_rate(found.fps)),
        clock=found.clock,
        damaged=found.damaged,
        has_audio=found.has_audio,
        prompts=prompts,
        own=bool(recipe) and not _only_refined(recipe),
    )


def _only_refined(recipe: Mapping[str, Any]) -> bool:
    """Whether no model made what a recipe refined or interpolated: it came from elsewhere, and still does.

    A video that is only interpolated keeps the prompt of its source, and one from elsewhere has none.
    """
    settings = recipe["config"]
    family = weights.families().get(str(settings.get("model")))
    between = recipe.get("command") == "refine" and settings.get("refine.enabled") is False
    return (family is not None and family.refines_only) or (between and not settings.get("prompt"))


def recipe_of(comment: str) -> dict[str, Any]:
    """Return the recipe in a comment tag, empty when there is none; anybody may have written the tag."""
    try:
        recipe = json.loads(comment, parse_constant=int)  # which refuses NaN and the infinities
    except (ValueError, RecursionError):
        return {}
    whole = isinstance(recipe, dict) and "streamt2v" in recipe and isinstance(recipe.get("config"), dict)
    return up_to_date(recipe) if whole and not _deeper(recipe, MAX_DEPTH) else {}


def _deeper(value: Any, depth: int) -> bool:
    """Tell whether tables and lists lie in each other more than `depth` times."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inside) and (not depth or any(_deeper(part, depth - 1) for part in inside))


def recorded_run(recipe: Mapping[str, Any]) -> tuple[RunConfig, str, int] | None:
    """Return the settings, the command and the number of continued frames of a recipe.

    None when it has none, or any that this version would not take: nothing of it is used unchecked.
    """
    try:
        run, command = merge(recipe["config"]), str(recipe["command"])
        kept = recipe["source"]["frames"] if command == "extend" else 0
    except (StreamT2VError, KeyError, TypeError, AttributeError):
        return None
    return (run, command, kept) if type(kept) is int and kept >= 0 else None


def recorded_timeline(recipe: Mapping[str, Any], num_frames: int) -> tuple[Prompt, ...]:
    """Return what a video of so many frames shows by its recipe, from which frame on; empty when it does not say."""
    recorded = recorded_run(recipe)
    if recorded is None or not recorded[0].prompt:
        return ()
    run, command, kept = recorded
    try:
        return turns(run, command, kept) if run.num_frames == num_frames else (Prompt(0, 0, run.prompt),)
    except ConfigError:
        return ()


@dataclass(frozen=True)
class Look:
    """What is there of an output, finished or not: its recipe, and what can be watched, if anything yet."""

    output: Path
    video: Path
    found: VideoInfo | None
    recipe: dict[str, Any]

    @property
    def unfinished(self) -> bool:
        """Whether its run is still to be continued."""
        return self.video != self.output


def look(path: Path) -> Look:
    """Look at a video, at the unfinished run of one, or at what a run directory belongs to.

    Raises:
        VideoError: neither is there. ResumeError: the run's record is damaged.
    """
    output = run_directory.output_of(path)
    run, growing = run_directory.directory_for(output), run_directory.directory_for(output) / run_directory.GROWING
    if output.exists() or not run_directory.exists(run):
        found = _probe(output)
        return Look(output, output, found, recipe_of(found.comment))
    begun = growing.is_file() and growing.stat().st_size
    return Look(output, growing, _probe(growing) if begun else None, run_directory.recorded(run).recipe)


def describe_video(path: Path) -> dict[str, Any]:
    """Return size, length and the recipe of a video, or of the run that is to make it. Raises as `look`."""
    seen = look(path)
    facts: dict[str, Any] = {}
    if (found := seen.found) is not None:
        facts = {"frames": found.frames, "width": found.width, "height": found.height, "fps": float(found.fps)}
    unfinished = {"unfinished": str(seen.video)} if seen.unfinished else {}
    return {**unfinished, "video": facts, "recipe": seen.recipe or "none: not made by streamt2v"}
