"""A job: what to make, from what, where to; and everything that can be checked before torch is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v import devices, files, initializers, runs, weights
from streamt2v.clock import Clock, exact_rate
from streamt2v.config import Prompt, RunConfig, merge, to_flat, turns
from streamt2v.errors import ConfigError, InputError, OutputError, ResumeError, StreamT2VError, VideoError
from streamt2v.weights import hub, vocabulary
from streamt2v.weights.home import sha256_of

if TYPE_CHECKING:
    from streamt2v.sound import Carried
    from streamt2v.video import VideoInfo

# What fixes the number and the sizes of frames and states: no run goes on after a change there.
_FIXED = (
    "command", "source", "config.model", "config.num_frames", "config.stream.chunk", "config.stream.overlap",
    "config.stream.height", "config.stream.width", "config.refine.enabled", "config.refine.chunk",
    "config.refine.overlap", "config.refine.blending", "config.refine.num_inference_steps",
    "config.refine.reuse_interval", "config.output",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One command: what to make, from what, where to, and how the run behaves."""

    command: str
    config: RunConfig
    output: Path
    source: Path | None = None
    device: str = "auto"
    threads: int | None = None
    resume: bool = False
    resume_anyway: bool = False
    overwrite: bool = False
    keep_run: bool = False
    preview: Path | None = None
    inputs: tuple[Path, ...] = ()
    """What the command reads besides source and picture: it must not be written over."""
    memory: float | None = None
    """Gigabytes that the run may take; None means what is free."""
    like: Mapping[str, Any] | None = None
    """Threads and memory policy of the run to repeat, where none are asked for."""

    @property
    def run_path(self) -> Path:
        """The run directory, beside the output."""
        return runs.directory_for(self.output)

    def timeline(self) -> tuple[Prompt, ...]:
        """Return the prompts and the frames at which the run turns to them, see `timeline.turns`."""
        kept = inspect_source(self.source).frames if self.source and self.command == "extend" else 0
        return turns(self.config, self.command, kept)

    def recipe(self) -> dict[str, Any]:
        """Return what decides the frames: a run may only be resumed by a job with an equal recipe."""
        chosen = initializers.choose(self.config) if self.command == "generate" else None
        return {
            "command": self.command,
            # Of a picture the name says enough: a recipe travels with the video, the folder stays private.
            "config": to_flat(self.config) | {"image": Path(self.config.image).name},
            "source": self.source and {**_fingerprint(self.source), "frames": inspect_source(self.source).frames},
            "image": _fingerprint(Path(self.config.image)) if self.config.image else None,
            "initializer": None if chosen is None else chosen.fingerprint(),
            "weights": {
                name: part.sha256
                for file in weights.family(self.config.model).files
                for name, part in file.parts.items()
            },
        }

    def carried(self) -> Carried:
        """Return how the result carries what the source has besides its pictures; there must be one."""
        assert self.source is not None
        from streamt2v import sound

        return sound.carry(self.source, self.config.num_frames / self.config.output.rate, self.output.suffix)

    def local(self) -> dict[str, Any]:
        """Return what `resumed` needs besides the recipe; it stays on this machine.

        Paths are kept as they are and as seen from the output, as folders are moved with all that is in them.
        """
        paths = {"source": self.source, "image": self.config.image or None, "preview": self.preview}
        given = {name: Path(path).absolute() for name, path in paths.items() if path}
        folder = self.output.absolute().parent
        seen = {name: os.path.relpath(path, folder) for name, path in given.items() if path.anchor == folder.anchor}
        absolute = {name: str(given[name]) if name in given else None for name in paths}
        return {**absolute, "from_output": seen, "keep_run": self.keep_run}

    def may_change(self, key: str) -> bool:
        """Tell whether the run may be continued although its recipe changed at a dotted key."""
        return self.resume_anyway and not key.startswith(_FIXED)


BEHAVIOUR = ("device", "threads", "resume", "resume_anyway", "overwrite", "keep_run", "preview", "memory")
"""Fields of a job that say how it runs, not what it makes."""


@dataclass(frozen=True)
class Result:
    """What was made."""

    output: str
    frames: int
    width: int
    height: int
    fps: float
    seconds: float
    seed: int
    model: str
    peak_memory_mb: float

    @classmethod
    def of(cls, job: Job, width: int, height: int, seconds: float, device: devices.Device | None = None) -> Result:
        """Describe the finished output of a job."""
        config = job.config
        return cls(
            str(job.output), config.num_frames, width, height, config.output.fps, round(seconds, 2), config.seed,
            config.model, round(devices.peak_memory(device) / 2**20, 1),
        )  # fmt: skip


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
    """Whether streamt2v made it."""


MAX_DEPTH = 6  # of a recipe
MAX_TEXT_BYTES = 24_000  # as JSON: the recipe, with two prompts, must fit the 64 KiB of a comment tag


def _fingerprint(path: Path) -> dict[str, Any]:
    size = sum(part.stat().st_size for part in path.iterdir()) if path.is_dir() else path.stat().st_size
    return {"name": path.name, "bytes": size, "sha256": _sha256(path, files.stamp(path))}


@lru_cache(maxsize=8)
def _sha256(path: Path, _stamp: tuple[int, int, int] | None) -> str:
    from streamt2v import exports

    return exports.sha256_of(path) if path.is_dir() else sha256_of(path)


def inspect_source(path: Path) -> Source:
    """Probe a video and read the prompt that made it, if it carries one.

    Raises:
        VideoError: not a readable video.
    """
    from streamt2v import foreign

    found = foreign.probe(path)
    recipe = recipe_of(found.comment)
    prompts = {prompt.frame: prompt.text for prompt in recorded_timeline(recipe, found.frames)}
    return Source(
        found.frames, found.width, found.height, float(exact_rate(found.fps)), found.clock, found.damaged,
        found.has_audio, prompts, bool(recipe),
    )  # fmt: skip


def recipe_of(comment: str) -> dict[str, Any]:
    """Return the recipe in a comment tag, empty when there is none; anybody may have written the tag."""
    try:
        recipe = json.loads(comment, parse_constant=int)  # which refuses NaN and the infinities
    except (ValueError, RecursionError):
        return {}
    whole = isinstance(recipe, dict) and "streamt2v" in recipe and isinstance(recipe.get("config"), dict)
    return recipe if whole and not _deeper(recipe, MAX_DEPTH) else {}


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


def resumed(path: Path) -> Job:
    """Return the job of the unfinished run of an output, or in a run directory, as it was asked.

    Raises:
        ResumeError: there is none, or its record is damaged.
    """
    output = runs.output_of(path)
    recipe, _, local = runs.recorded(runs.directory_for(output))
    try:
        source, image = (_found_again(name, output, recipe, local) for name in ("source", "image"))
        settings = merge(recipe["config"], {"image": "" if image is None else str(image)})
        preview = _moved("preview", output, local)
        return Job(
            recipe["command"], settings, output, source, local.get("device", recipe["device"]), resume=True,
            keep_run=local["keep_run"], preview=preview,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        hint = "continue it by the command that began it, with --resume"
        raise ResumeError(f"{runs.directory_for(output)} does not say how it was begun", hint) from error


def _moved(name: str, output: Path, local: Mapping[str, Any]) -> Path | None:
    """Return a recorded path where its folder is now: as seen from the output where that moved, else as it was."""
    if not local[name]:
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
        if recipe[name] is None or _sha256(place, files.stamp(place)) == recipe[name]["sha256"]:
            return place
    found = f"{there[0]} has other contents than the run began with" if there else f"{was} does not exist"
    raise ResumeError(found, f"put {was.name} into {output.absolute().parent}, and the same command goes on")


def verify(path: Path) -> dict[str, Any]:
    """Check that a finished video is what was written, and decodes to as many frames as its recipe says.

    Raises:
        VideoError: it is cut, damaged, changed by another program, or was not made by streamt2v.
    """
    from streamt2v import exports, foreign

    exports.check_seal(path)
    found = foreign.probe(path)
    settings = recipe_of(found.comment).get("config", {})
    frames, digest = foreign.digest(path)
    made, fps = (frames, found.fps), settings.get("output.fps")
    asked = settings.get("num_frames"), exact_rate(fps) if isinstance(fps, int | float) else fps
    kept = frames == asked[0] or path.suffix.lower() in (".gif", ".webp")  # which join frames that are alike
    if settings and not (kept and isinstance(asked[1], Fraction) and exports.rate_is_kept(path, found.fps, asked[1])):
        raise VideoError("{} holds {} frames at {} fps instead of {} at {}".format(path, *made, *asked))
    return {"video": str(path), "frames": frames, "seconds": float(frames / found.fps), "digest": digest}


def rerun(
    path: Path, source: Path | None, given: Mapping[str, str | None]
) -> tuple[str, RunConfig, dict[str, Any]]:  # fmt: skip
    """Read from a video how to make it again: the command, its settings, and what `Job.like` takes.

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
    from streamt2v import foreign

    recipe = recipe_of(foreign.probe(path).comment)
    command = recipe.get("command")
    if command not in ("generate", "refine", "extend"):
        raise InputError(f"{path} carries no recipe", "only videos made by streamt2v can be made again")
    settings = dict(recipe["config"])
    trusted = {"", initializers.OWN, *weights.pipelines()}
    for key, value in given.items():
        if value is not None:
            settings[key] = value
        elif not set(str(settings.get(key, "")).split("+")) <= trusted:
            option = {"image": "--image", "initialize.text_to_image": "--image-init"}.get(key, "--init")
            raise ConfigError(
                f"{path} was made with {key} = {settings[key]!r}", f"name it with {option} if you trust it"
            )
    if recipe.get("source") and source is None:
        raise ConfigError(f"{path} was made by {command} from another video", "name that with --source")
    for file, was in ((source, recipe.get("source")), (given.get("image"), recipe.get("image"))):
        if file and isinstance(was, dict) and Path(file).is_file() and Path(file).stat().st_size != was.get("bytes"):
            raise InputError(f"{file} is not what {path} was made from: that had {was.get('bytes')} bytes")
    threads = recipe.get("threads")
    like = {"memory": recipe.get("memory"), "threads": threads if type(threads) is int and 0 < threads < 1025 else None}
    return command, merge(settings), like


def compare(path: Path, again: Path) -> list[str]:
    """Return how the recipes of two videos differ where their frames do; nothing where the frames are equal."""
    from streamt2v import foreign

    if foreign.digest(path) == foreign.digest(again):
        return []
    first, second = (recipe_of(foreign.probe(each).comment) for each in (path, again))
    return [said for _, said in runs.differences(first, second)] or ["by the same recipe"]


def recorded_seed(output: Path) -> int | None:
    """Return the seed of the interrupted or finished run of an output, None when there is neither."""
    seed = runs.recorded_seed(output)
    if seed is None and output.exists():
        from streamt2v import foreign

        found = recorded_run(recipe_of(foreign.probe(output).comment))
        seed = None if found is None else found[0].seed
    return seed


def difference(job: Job, recorded: dict[str, Any]) -> str | None:
    """Name the first setting in which a recorded recipe differs from the job's, None when there is none."""
    asked = job.recipe()
    return next((said for _, said in runs.differences({key: recorded.get(key) for key in asked}, asked)), None)


def finished(job: Job) -> Result:
    """Describe the output of a job that was made before.

    Raises:
        VideoError: it is no readable video. OutputError: it was made with other settings.
    """
    from streamt2v import foreign

    found = foreign.probe(job.output)
    if changed := difference(job, recipe_of(found.comment)):
        message = f"{job.output} was made with other settings: {changed}"
        raise OutputError(message, "choose another name with -o, or --overwrite")
    return Result.of(job, found.width, found.height, 0.0)


def made(path: Path) -> Result:
    """Describe a finished video that its own recipe tells of, once it is known to be whole.

    Raises:
        VideoError: see `verify`; also a recipe that this version does not take.
    """
    from streamt2v import foreign

    verify(path)
    found = foreign.probe(path)
    if (known := recorded_run(recipe_of(found.comment))) is None:
        raise VideoError(
            f"{path} does not say what made it", "another version made it; streamt2v info shows what it holds"
        )
    return Result.of(Job(known[1], known[0], path), found.width, found.height, 0.0)


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
    from streamt2v import foreign

    output = runs.output_of(path)
    run, growing = runs.directory_for(output), runs.directory_for(output) / runs.GROWING
    if output.exists() or not runs.exists(run):
        found = foreign.probe(output)
        return Look(output, output, found, recipe_of(found.comment))
    begun = growing.is_file() and growing.stat().st_size
    return Look(output, growing, foreign.probe(growing) if begun else None, runs.recorded(run).recipe)


def describe_video(path: Path) -> dict[str, Any]:
    """Return size, length and the recipe of a video, or of the run that is to make it. Raises as `look`."""
    seen = look(path)
    facts: dict[str, Any] = {}
    if (found := seen.found) is not None:
        facts = {"frames": found.frames, "width": found.width, "height": found.height, "fps": float(found.fps)}
    unfinished = {"unfinished": str(seen.video)} if seen.unfinished else {}
    return {**unfinished, "video": facts, "recipe": seen.recipe or "none: not made by streamt2v"}


# ---------------------------------------------------------------------------------------------- cheap checks


def check(job: Job, note: hub.Note = lambda text: None) -> list[str]:
    """Check everything that is cheap to check and return notices for the user.

    Stage 1's model of others is fetched where it is not here yet; `note` is told the size before that.

    Raises:
        ConfigError, InputError, OutputError, WeightsError: what would make the run fail later.
    """
    from streamt2v import video

    _check_text(str(job.output))
    check_wishes(job.config, prompt_needed=job.command != "refine")
    devices.parse(job.device)
    if job.command == "refine":
        _check_refined(job)
    _check_output(job)
    video.check_ffmpeg(pictures_only=True)  # what else is carried is checked when it is looked at
    needed = int(1.2 * _disk_bytes(job.config)) - (runs.size(job.run_path) if job.resume else 0)
    files.require_space(job.output, needed, "this run")
    family, notices = weights.family(job.config.model), list[str]()
    weights.require(family)
    if job.command != "refine":
        _check_sizes(job.config, family)
    if job.command == "generate":
        notices += _check_initializer(job.config, family, note)
    if job.command == "extend":
        _check_continued(job)
    turns = [prompt for prompt in job.timeline() if prompt.frame != prompt.asked]
    notices += [f"the prompt of frame {turn.asked} begins with the next chunk, at frame {turn.frame}" for turn in turns]
    return notices + _prompt_notices(job, family.vocabulary_path()) + _source_notices(job)


def check_wishes(config: RunConfig, prompt_needed: bool = True) -> None:
    """Check what somebody wrote and drew: the prompts and the picture. Raises ConfigError or InputError."""
    prompts = (config.prompt, *config.prompts.values())
    if prompt_needed and not all(text.strip() for text in prompts):
        raise ConfigError("the prompt is empty", 'try "a red ball bouncing over the sea at sunset"')
    for text in (*prompts, config.negative_prompt):
        _check_text(text)
    size = sum(len(json.dumps(text)) + 24 for text in prompts)  # with its key
    if size > MAX_TEXT_BYTES + 24:
        raise ConfigError(f"{len(prompts)} prompts of {size} bytes are too long", f"at most {MAX_TEXT_BYTES} together")
    if config.image:
        from streamt2v import video

        video.read_image(Path(config.image))


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r} is not valid text (UTF-8)") from None
    size = len(json.dumps(text))
    if size > MAX_TEXT_BYTES or "\0" in text:
        raise ConfigError(f"a text of {size} bytes is too long or holds a NUL", f"at most {MAX_TEXT_BYTES} bytes")


def _check_sizes(config: RunConfig, family: weights.Family) -> None:
    """Compare the settings with the sizes written in the weights' headers."""
    stream = config.stream
    # What a file does not say is the default of its network's class.
    factor = 2 ** (len(weights.read_header(family.path("stream.vae"))[1].get("block_out_channels", [64])) - 1)
    if stream.height % factor or stream.width % factor:
        raise ConfigError(f"the base size {stream.width}x{stream.height} must be made of multiples of {factor}")
    if not stream.cam:
        return
    if not family.has("stream.cam"):
        raise ConfigError(f"model {config.model} has no CAM", "use --set stream.cam=false")
    looked_at = weights.read_header(family.path("stream.cam"))[1].get("num_cond_frames", 8)
    if stream.overlap != looked_at and config.num_frames > stream.chunk:
        raise ConfigError(f"stream.overlap is {stream.overlap}, the CAM of {config.model} looks at {looked_at} frames")


def _check_initializer(run: RunConfig, family: weights.Family, note: hub.Note) -> list[str]:
    own, chosen = run.initialize, initializers.choose(run, note)
    idle = own.text_to_image and not (chosen and chosen.drawing)
    notices = [f"nothing here starts from a picture that is drawn: {own.text_to_image} is not used"] if idle else []
    if chosen is not None:
        return notices
    if run.image and not family.has("initialize.image"):
        raise ConfigError(f"model {family.name} cannot start from a picture by itself", "use --init svd")
    if not own.num_inference_steps or not (own.image_guidance_scale if run.image else own.guidance_scale):
        raise ConfigError(
            "initialize.num_inference_steps or a guidance scale is 0, which only a model of others understands",
            "name one with --init, or set them to at least 1",
        )
    return notices


def _check_refined(job: Job) -> None:
    assert job.source is not None
    if not job.config.refine.enabled:
        raise ConfigError("refine.enabled is false, so there is nothing to do")
    if job.config.num_frames > (found := inspect_source(job.source)).frames:
        raise ConfigError(
            f"num_frames is {job.config.num_frames}, {job.source} has only {found.frames}", "leave it out to refine all"
        )


def _check_continued(job: Job) -> None:
    assert job.source is not None
    config, found = job.config, inspect_source(job.source)
    if found.frames < config.stream.chunk:
        raise InputError(
            f"{job.source} has {found.frames} frames, model {config.model} continues from {config.stream.chunk}",
            "streamt2v generate --image starts from a single picture",
        )
    if config.num_frames <= found.frames:
        raise ConfigError(
            f"--frames is {config.num_frames}, {job.source} has {found.frames} already",
            "it counts the frames of the whole video",
        )


def _source_notices(job: Job) -> list[str]:
    if job.source is None:
        return []
    found, output, stream = inspect_source(job.source), job.config.output, job.config.stream
    notices = list(job.carried().notices)
    if not found.clock.steady:
        uneven = f"the {found.clock.pictures} pictures of {job.source} come at uneven times"
        notices.append(f"{uneven}: {found.frames} frames at {found.fps:g} fps show each when it is due")
    if found.damaged:
        notices.append(f"{found.damaged} parts of {job.source} cannot be decoded; the pictures before them stay on")
    if job.command == "extend" and abs(found.width / found.height * stream.height / stream.width - 1) > 0.02:
        shapes = f"{found.width}x{found.height}, model {job.config.model} makes {stream.width}x{stream.height}"
        notices.append(f"{job.source} is {shapes}: what does not fit into that shape is cut off")
    if job.command == "refine" and output.width and (found.width > output.width or found.height > output.height):
        box = f"{output.width}x{output.height}"
        notices.append(f"{job.source} is {found.width}x{found.height}, the result fits into {box}; --size changes it")
    if found.has_audio and abs(found.fps - output.fps) > 1e-6:
        notices.append(f"the sound keeps its speed, the picture changes from {found.fps:g} to {output.fps:g} fps")
    return notices


def check_target(path: Path, overwrite: bool, *inputs: Path | str | None) -> None:
    """Refuse a name that a file cannot be written to, or that is one of the files that are read, links included.

    Raises:
        OutputError: with the reason.
    """
    for given in inputs:
        if given and files.is_same(path, Path(given)):
            raise OutputError(f"{path} is read by this command: it is not written over", "choose another name")
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "give the name of a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already", "choose another name, or --overwrite")
    runs.check_writable(path.parent)


def check_place(job: Job) -> None:
    """Refuse an output that is there, that is read, or in whose folder something is read. Raises OutputError."""
    inputs = (job.source, job.config.image, *job.inputs)
    if job.output.suffix or not job.output.is_dir():
        check_target(job.output, job.overwrite or job.resume, *inputs)
        return
    if not (job.overwrite or job.resume) and any(job.output.iterdir()):
        raise OutputError(f"{job.output} is a folder with something in it", "choose another name, or --overwrite")
    runs.check_writable(job.output)
    for given in filter(None, (*inputs, job.preview)):
        if Path(str(given)).resolve().is_relative_to(job.output.resolve()):
            raise OutputError(f"{given} lies in {job.output}", "choose another name with -o")


def _check_output(job: Job) -> None:
    from streamt2v import exports

    if job.output.suffix.lower() not in exports.KINDS:
        endings = ", ".join(exports.KINDS[:-1])
        raise ConfigError(f"the output {job.output} must end in {endings}; without an ending it is a folder of PNGs")
    check_place(job)
    if job.preview is not None:
        if job.preview.suffix.lower() != ".png":
            raise ConfigError(f"the preview {job.preview} must end in .png")
        begun = job.resume and (runs.exists(job.run_path) or job.output.exists())  # it is that of the run
        check_target(job.preview, job.overwrite or begun, job.source, job.config.image, *job.inputs, job.output)
    if runs.exists(job.run_path) and not (job.resume or job.overwrite):
        runs.RunDirectory(job.run_path).close()  # refuses one that is being worked on
        raise OutputError(
            f"an unfinished run lies in {job.run_path}", "continue it with --resume, or start again with --overwrite"
        )


def _disk_bytes(config: RunConfig) -> int:
    """Estimate what run directory and output take: lossless base frames at half their size, the video twice."""
    stream, output = config.stream, config.output
    return config.num_frames * (stream.height * stream.width * 3 // 2 + output.height * output.width // 4)


def _prompt_notices(job: Job, words: Path | None) -> list[str]:
    if words is None:
        return []
    known = vocabulary.load(words)
    said = (job.config.prompt, *job.config.prompts.values(), job.config.negative_prompt)
    unknown = known.unknown_words(" ".join(said))
    if not unknown:
        return []
    plural = "words" if len(unknown) > 1 else "word"
    return [f"model {job.config.model} does not know the {plural} {', '.join(unknown)}", f"  it knows {known.hint()}"]
