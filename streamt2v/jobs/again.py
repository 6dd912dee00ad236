"""Jobs from what was made before: resume a run, verify a video, make it again, compare the two."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from streamt2v import files, weights
from streamt2v.config import RunConfig, at_path, exact_rate, file_of, merge
from streamt2v.errors import ConfigError, InputError, OutputError, ResumeError, VideoError
from streamt2v.families import choose
from streamt2v.jobs import run_directory
from streamt2v.jobs.job import Job, Result
from streamt2v.jobs.prepared import Prepared, contents_hash
from streamt2v.jobs.recipe import recipe_of, recorded_run


def resumed(path: Path) -> Job:
    """Return the job of an unfinished run, as it was first asked for; `path` is its output or its run directory.

    Raises:
        ResumeError: there is none, or its record is damaged.
    """
    output = run_directory.output_of(path)
    recipe, _, local = run_directory.recorded(run_directory.directory_for(output))
    try:
        source = _found_again("source", output, recipe, local)
        there = {name: _found_again(name, output, recipe, local) for name in recipe["config"] if _is_file(name)}
        given = {name: at_path(name, recipe["config"][name], str(path or "")) for name, path in there.items()}
        settings = merge(recipe["config"], given)
        preview, audio = _moved("preview", output, local), _moved("audio", output, local)
        device, keep_run = local.get("device", recipe["device"]), local["keep_run"]
        more = {"keep_run": keep_run, "preview": preview, "audio": audio}
        return Job(recipe["command"], settings, output, source, device, resume=True, **more)
    except (KeyError, TypeError, AttributeError) as error:
        hint = "continue it by the command that began it, with --resume"
        raise ResumeError(f"{run_directory.directory_for(output)} does not say how it was begun", hint) from error


def _is_file(key: str) -> bool:
    return key == "image" or key.startswith(("pictures.", "loras."))


def _moved(name: str, output: Path, local: Mapping[str, Any]) -> Path | None:
    """Return a recorded path where its folder is now: as seen from the output where that moved, else as it was."""
    if not local.get(name):
        return None
    seen = local.get("from_output", {}).get(name)
    was = Path(local[name])
    return was if not seen or was.parent.is_dir() else output.parent / str(seen)


def _found_again(name: str, output: Path, recipe: Mapping[str, Any], local: Mapping[str, Any]) -> Path | None:
    """Return the file that a run began with: where it was, beside the output as it was, or simply beside it.

    Raises:
        ResumeError: it is at none of these places, or has other contents.
    """
    if not local[name]:
        return None
    was, seen = Path(local[name]), local.get("from_output", {}).get(name)
    places: list[Path] = [was, *([output.parent / str(seen)] if seen else []), output.parent / was.name]
    there = [place for place in places if place.exists()]
    for place in there:
        if recipe[name] is None or contents_hash(place, files.stamp(place)) == recipe[name]["sha256"]:
            return place
    found = f"{there[0]} has other contents than the run began with" if there else f"{was} does not exist"
    raise ResumeError(found, f"put {was.name} into {output.absolute().parent}, and the same command goes on")


def verify(path: Path) -> dict[str, Any]:
    """Check that a finished video is what was written, and decodes to as many frames as its recipe says.

    Raises:
        VideoError: it is cut, damaged, changed by another program, or was not made by streamt2v.
    """
    from streamt2v.media import exports, isolated

    exports.check_seal(path)
    found = isolated.probe(path)
    settings = recipe_of(found.comment).get("config", {})
    frames, digest = isolated.digest(path)
    made, fps = (frames, found.fps), settings.get("output.fps")
    asked = settings.get("num_frames"), exact_rate(fps) if isinstance(fps, int | float) else fps
    kept = frames == asked[0] or path.suffix.lower() in (".gif", ".webp")  # which join frames that are alike
    if settings and not (kept and isinstance(asked[1], Fraction) and exports.rate_is_kept(path, found.fps, asked[1])):
        raise VideoError("{} holds {} frames at {} fps instead of {} at {}".format(path, *made, *asked))
    return {"video": str(path), "frames": frames, "seconds": float(frames / found.fps), "digest": digest}


class Again(NamedTuple):
    """How to make a video again: the command, its settings, and what `Job.like` takes."""

    command: str
    settings: RunConfig
    like: dict[str, Any]


def rerun(path: Path, source: Path | None, given: Mapping[str, str | None]) -> Again:
    """Read from a video how to make it again.

    Anybody may have written the recipe. It may set what is made; paths and models that others published are the
    user's to choose.

    Args:
        path: the video.
        source: what it was refined or extended from, None where not given.
        given: paths and models by dotted key of the settings, None where not given.

    Raises:
        ConfigError: the recipe sets what is not valid, or needs what only the user may give.
        InputError: no readable video with a recipe, or an input that is not the one it was made from.
    """
    from streamt2v.media import isolated

    recipe = recipe_of(isolated.probe(path).comment)
    command = recipe.get("command")
    if command not in ("generate", "refine", "extend"):
        raise InputError(f"{path} carries no recipe", "only videos made by streamt2v can be made again")
    settings = dict(recipe["config"])
    trusted = {"", choose.OWN, choose.PRIOR, *weights.families(), *weights.pipelines()}
    asked: dict[str, str | None] = {**dict.fromkeys(filter(_is_file, settings)), **given}
    for key, value in asked.items():
        if value is not None:
            settings[key] = _named_again(key, value, settings)
        elif not set(str(settings.get(key, "")).split("+")) <= trusted:
            names = {"image": "--image", "initialize.text_to_image": "--image-init"}
            names |= {"model": "--model", "refine.model": "--refiner"}
            names |= {name: "--lora" for name in settings if name.startswith("loras.")}
            frame = key.removeprefix("pictures.")
            option = names.get(key, "--init") if frame == key else f"--at {frame}"
            raise ConfigError(
                f"{path} was made with {key} = {settings[key]!r}", f"name it with {option} if you trust it"
            )
    if recipe.get("source") and source is None:
        raise ConfigError(f"{path} was made by {command} from another video", "name that with --source")
    named = {key: file_of(key, str(settings[key])) for key, value in given.items() if value and _is_file(key)}
    inputs = [(source, recipe.get("source")), *((file, recipe.get(key)) for key, file in named.items())]
    for file, was in inputs:
        if file and isinstance(was, dict) and Path(file).is_file():
            now = {"bytes": Path(file).stat().st_size, "sha256": contents_hash(Path(file), files.stamp(Path(file)))}
            if other := [name for name in now if now[name] != was.get(name)]:
                said = f"{other[0]} was {was.get(other[0])}, now it is {now[other[0]]}"
                raise InputError(f"{file} is not what {path} was made from: {said}")
    threads = recipe.get("threads")
    like = {"memory": recipe.get("memory"), "threads": threads if type(threads) is int and 0 < threads < 1025 else None}
    return Again(command, merge(settings), like)


def _named_again(key: str, value: str, settings: Mapping[str, Any]) -> str:
    """Return what a setting becomes by what a user gives for it: a LoRA without a strength keeps that of the recipe."""
    if not key.startswith("loras."):
        return value
    if key not in settings:
        raise ConfigError(f"the recipe has no {key}", "leave a --lora out")
    return value if file_of(key, value) != value else at_path(key, str(settings[key]), value)


def compare(path: Path, again: Path) -> list[str]:
    """Return how the recipes of two videos differ where their frames do; nothing where the frames are equal."""
    from streamt2v.media import isolated

    if isolated.digest(path) == isolated.digest(again):
        return []
    first, second = (recipe_of(isolated.probe(each).comment) for each in (path, again))
    said = dict(run_directory.differences(first, second))
    others = [name.removeprefix("weights.") for name in said if name.startswith("weights.")]
    found = [text for name, text in said.items() if not name.startswith("weights.")]
    if others:  # digests say nothing to anyone
        found.append(f"other weights of {', '.join(others)}")
    return found or ["by the same recipe"]


def recorded_seed(output: Path) -> int | None:
    """Return the seed of the interrupted or finished run of an output, None when there is neither."""
    seed = run_directory.recorded_seed(output)
    if seed is None and output.exists():
        from streamt2v.media import isolated

        found = recorded_run(recipe_of(isolated.probe(output).comment))
        seed = None if found is None else found[0].seed
    return seed


def difference(known: Prepared, recorded: dict[str, Any]) -> str | None:
    """Name the first setting in which a recorded recipe differs from the job's, None when there is none."""
    asked = known.recipe()
    return next((said for _, said in run_directory.differences({key: recorded.get(key) for key in asked}, asked)), None)


def finished(known: Prepared) -> Result:
    """Describe the output of a job that was made before.

    Raises:
        VideoError: it is no readable video. OutputError: it was made with other settings.
    """
    from streamt2v.media import isolated

    job = known.job
    found = isolated.probe(job.output)
    if changed := difference(known, recipe_of(found.comment)):
        message = f"{job.output} was made with other settings: {changed}"
        raise OutputError(message, "choose another name with -o, or --overwrite")
    return Result.of(job, found.width, found.height, 0.0)


def made(path: Path) -> Result:
    """Describe a finished video that its own recipe tells of, once it is known to be whole.

    Raises:
        VideoError: see `verify`; also a recipe that this version does not take.
    """
    from streamt2v.media import isolated

    verify(path)
    found = isolated.probe(path)
    if (known := recorded_run(recipe_of(found.comment))) is None:
        raise VideoError(
            f"{path} does not say what made it", "another version made it; streamt2v info shows what it holds"
        )
    return Result.of(Job(known[1], known[0], path), found.width, found.height, 0.0)
