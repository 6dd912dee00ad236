"""Everything about a job that is cheap to check, before torch is imported or a network loads."""

from __future__ import annotations

import json
from pathlib import Path

from streamt2v import devices, files, weights
from streamt2v.config import RunConfig, merge, to_flat, usual
from streamt2v.errors import ConfigError, InputError, OutputError
from streamt2v.families import choose
from streamt2v.jobs import needs, run_directory
from streamt2v.jobs.job import Job
from streamt2v.jobs.prepared import Prepared
from streamt2v.weights import folders, hub, lora, vocabulary

RING_SECONDS = 30
MAX_TEXT_BYTES = 24_000  # as JSON: the recipe, with two prompts, must fit the 64 KiB of a comment tag


def prepare(job: Job, note: hub.Note = lambda text: None) -> Prepared:
    """Return what is known of a job once it is checked; raises what `check` raises.

    A third-party model of the first frames is fetched where it is not here yet; `note` is told the size before that.
    """
    return check(Prepared(job, note))


def check(known: Prepared) -> Prepared:
    """Check everything about a job that is cheap to check; return what was given, with its notices.

    Raises:
        ConfigError, InputError, MemoryLimitError, OutputError, WeightsError: what would make the run fail later.
    """
    from streamt2v.media import ffmpeg

    job = known.job
    _check_text(str(job.output))
    follows = job.command == "generate" or known.family.reads_text
    if job.command == "extend" and not job.config.prompt.strip() and known.family.reads_text:
        raise ConfigError(f"what {job.source} shows is not written in it", 'say it: --prompt "a red ball over the sea"')
    check_wishes(job.config, prompt_needed=follows and job.command != "refine")
    if job.command == "generate" and choose.named(job.config) == choose.PRIOR:
        _check_prior(known)
    devices.check(job.device)
    devices.check_limit()
    if job.command == "refine":
        _check_refined(known)
    elif known.family.refines_only:
        raise ConfigError(f"model {known.family.name} makes no videos, it refines them", "use another --model")
    _check_output(job)
    ffmpeg.check_ffmpeg(pictures_only=True)  # what else is carried is checked when it is looked at
    needed = int(1.2 * needs.disk_bytes(job.config)) - (run_directory.size(job.run_path) if job.resume else 0)
    files.require_space(job.output, needed, "this run")
    weights.require(known.family, known.runs)
    _check_packing(known)
    if job.config.output.interpolate > 1:
        weights.require(weights.interpolator(job.config.output.interpolator))
        _check_interpolated(job.config)
    _check_unread(job.config, known.family, "refine." if job.command == "refine" else "")
    if job.command != "refine":
        _check_sizes(job.config, known.family)
    if job.config.loras:
        known.notices.extend(_check_loras(known))
    if known.family.pipeline and known.runs and (job.config.pictures or job.config.loop != "no"):
        raise ConfigError(f"model {known.family.name} makes no loops and is led to no pictures", "leave that out")
    if known.refining_base and job.config.loop != "no":
        raise ConfigError(f"{job.config.refine.model} refines no loops", "name another --refiner, or leave --loop out")
    if job.config.loop != "no" and job.command != "refine":
        _check_loop(known)
    if job.config.pictures:
        _check_pictures(known)
    if job.command == "generate":
        known.notices.extend(_check_initializer(known))
    if job.command == "extend":
        _check_continued(known)
    turns = [prompt for prompt in known.timeline if prompt.frame != prompt.asked]
    known.notices.extend(
        f"the prompt of frame {turn.asked} begins with the next chunk, at frame {turn.frame}" for turn in turns
    )
    known.notices.extend([*prompt_notices(known), *_source_notices(known)])
    return known


def check_wishes(config: RunConfig, prompt_needed: bool = True) -> None:
    """Check the prompts, pictures and LoRAs that a user gave. Raises ConfigError, InputError or WeightsError.

    A picture is enough for a model that reads no text.
    """
    prompts, reads_text = (config.prompt, *config.prompts.values()), weights.family(config.model).reads_text
    needed = prompts[0 if prompt_needed and (reads_text or not config.image) else 1 :]
    if not all(text.strip() for text in needed):
        raise ConfigError("the prompt is empty", 'try "a red ball floating over the sea at sunset"')
    for text in (*prompts, config.negative_prompt):
        _check_text(text)
    size = sum(len(json.dumps(text)) + 24 for text in prompts)  # with its key
    if size > MAX_TEXT_BYTES + 24:
        raise ConfigError(f"{len(prompts)} prompts of {size} bytes are too long", f"at most {MAX_TEXT_BYTES} together")
    if config.all_pictures:
        from streamt2v.media import pictures

        for path in config.all_pictures.values():
            pictures.read(Path(path))
    for one in config.all_loras.values():
        lora.read(Path(one.path))


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r} is not valid text (UTF-8)") from None
    size = len(json.dumps(text))
    if size > MAX_TEXT_BYTES or "\0" in text:
        raise ConfigError(f"a text of {size} bytes is too long or holds a NUL", f"at most {MAX_TEXT_BYTES} bytes")


def _check_unread(config: RunConfig, family: weights.Family, section: str) -> None:
    """Refuse what was asked for in a section of the settings, "" for all, and would change nothing."""
    refined = config.refine.enabled and choose.refiner_reads_text(config)
    if not section and config.prompts and not family.reads_text and not refined:
        raise ConfigError(f"model {family.name} reads no text: a later prompt would change nothing", "leave it out")
    foreign = config.refine.model != choose.OWN
    defaults = to_flat(merge(*choose.usual(config))) if foreign else usual(family.preset)
    for key, value in to_flat(config).items():
        if foreign and key.startswith("refine."):  # what another refiner has no use for it says itself
            continue
        if key.startswith(section) and key.startswith(family.unread) and value != defaults[key]:
            hint = f"leave it at {defaults[key]!r}"
            raise ConfigError(f"{key} is {value!r}, model {family.name} has no use for it", hint)


def _check_sizes(config: RunConfig, family: weights.Family) -> None:
    """Compare the settings with the sizes written in the weights' headers."""
    stream = config.stream
    if family.has("stream.vae"):
        # What a file does not say is the default of its network's class.
        factor = 2 ** (len(weights.read_header(family.path("stream.vae"))[1].get("block_out_channels", [64])) - 1)
        if stream.height % factor or stream.width % factor:
            raise ConfigError(f"the base size {stream.width}x{stream.height} must be made of multiples of {factor}")
    if not stream.cam:
        return
    if not family.has("stream.cam"):
        raise ConfigError(f"model {config.model} has no CAM", "use --set stream.cam=false")
    looked_at = weights.read_header(family.path("stream.cam"))[1].get("num_cond_frames", 8)
    if stream.overlap != looked_at and config.made > stream.chunk:
        raise ConfigError(f"stream.overlap is {stream.overlap}, the CAM of {config.model} looks at {looked_at} frames")


def _check_packing(known: Prepared) -> None:
    """Compare the settings with how a pipeline packs a video; it is fetched where it is not here yet."""
    config, family = known.job.config, known.family
    bases = {stage: family.pipeline for stage in ("stream", "refine") if family.pipeline and stage in known.runs}
    if known.refining_base:
        bases["refine"] = known.refining_base
    for stage, name in bases.items():
        folders.adapter(folders.locate(name, known.note), name)
        per, settings = folders.layout(name).frames_per_latent, config.stream if stage == "stream" else config.refine
        for what, frames in (("chunk", settings.chunk), ("overlap", settings.overlap)):
            fixed = name == family.pipeline and f"{stage}.{what}".startswith(family.unread)
            if not fixed and frames % per != 1 % per:
                near = max(1, (frames - 1) // per * per + 1)
                said = f"{stage}.{what} is {frames}, model {name} packs 1 frame and then {per} at a time"
                raise ConfigError(said, f"use {near} or {near + per}")
    if "stream" in bases:
        stream, side = config.stream, folders.layout(bases["stream"]).size_multiple
        if stream.height % side or stream.width % side:
            raise ConfigError(f"the base size {stream.width}x{stream.height} must be made of multiples of {side}")


def _check_initializer(known: Prepared) -> list[str]:
    run, family, chosen = known.job.config, known.family, known.chosen
    own = run.initialize
    idle = own.text_to_image and not (chosen and chosen.drawing)
    notices = [f"nothing here starts from a picture that is drawn: {own.text_to_image} is not used"] if idle else []
    if chosen is not None:
        return notices
    if run.image and not (family.has("initialize.image") or family.pipeline):
        raise ConfigError(f"model {family.name} cannot start from a picture by itself", "use --init svd")
    if not run.image and family.has("initialize.image") and not family.reads_text:
        raise ConfigError(
            f"model {family.name} starts from a picture and reads no text",
            "give one with --image, or use --init svd, for which one is drawn",
        )
    scales = [own.image_guidance_scale] * choose.pictured(run) + [own.guidance_scale] * (not run.image)
    if not own.num_inference_steps or not all(scales):
        raise ConfigError(
            "initialize.num_inference_steps or a guidance scale is 0, which only a third-party model understands",
            "name one with --init, or set them to at least 1",
        )
    return notices


def _check_prior(known: Prepared) -> None:
    """Refuse a prior where there is none, and where there is a picture already."""
    family = known.family
    if not family.has("initialize.prior"):
        raise ConfigError(f"the model {family.name} has no prior (prior.safetensors)", "leave --init prior out")
    if known.job.config.image:
        said = "--init prior draws the embedding of a picture from the prompt, and --image gives a picture"
        raise ConfigError(said, "leave one of them out")


def _check_loras(known: Prepared) -> list[str]:
    """Refuse LoRAs that would change nothing here; say where the first frames are made without them."""
    run, family, chosen = known.job.config, known.family, known.chosen
    if not known.drawing:
        raise ConfigError("nothing that draws runs here, so a LoRA would change nothing", "leave --lora out")
    reached = known.loras
    if known.job.command != "generate" or family.pipeline:
        own = ""
    elif chosen is not None:
        own = "" if known.drawing.get(chosen.name) in reached else chosen.name
    else:
        pictured = (
            choose.pictured(run) and family.has("initialize.image") and family.path("initialize.image") not in reached
        )
        own = "a network of its own" if pictured else ""
    return [f"the first frames are made by {own}, which no --lora changes"] if own else []


def _check_interpolated(run: RunConfig) -> None:
    """Refuse lengths and pictures that do not fit to frames of which every Nth is made."""
    factor, asked = run.output.interpolate, run.num_frames
    if run.loop != "no" and asked % factor:
        near = asked // factor * factor
        said = f"--frames is {asked}, a loop of which every {factor} frames one is made has a multiple of {factor}"
        raise ConfigError(said, f"use {near or factor} or {near + factor}")
    for frame in run.pictures:
        if between := frame % factor:
            made = f"frame {frame - between} or {frame - between + factor}"
            said = f"a picture is for frame {frame}, with --interpolate {factor} that one is not made"
            raise ConfigError(said, f"name {made}; for the last frame --frames decides")


def _check_loop(known: Prepared) -> None:
    """Refuse loops that nothing here can make."""
    job, run, own = known.job, known.job.config, known.family.reads_text and known.chosen is None
    factor = run.output.interpolate
    limit, shortest = int(RING_SECONDS * run.output.fps), factor * (run.stream.chunk + 1)
    if run.made < 2:
        raise ConfigError("a loop of 1 frame is a picture", f"give --frames {2 * factor} or more")
    if run.loop == "ring":
        if job.command != "generate" or choose.pictured(run) or not own:
            raise ConfigError("loop=ring begins with text alone, and with the model's own networks", "use --loop")
        if not factor * run.stream.chunk <= run.num_frames <= limit:
            said = f"from {factor * run.stream.chunk} to {limit} frames ({RING_SECONDS} s)"
            raise ConfigError(f"--frames is {run.num_frames}, loop=ring holds all frames at once: {said}", "use --loop")
    elif job.command == "generate" and run.num_frames < shortest and not own:
        raise ConfigError(f"--frames is {run.num_frames}, here a loop has at least {shortest} frames")


def _check_pictures(known: Prepared) -> None:
    """Refuse pictures that no chunk can be led to."""
    job, run = known.job, known.job.config
    factor = run.output.interpolate
    earliest, first = factor * (known.kept or run.stream.chunk - 1), min(run.pictures)
    if job.command == "refine":
        raise ConfigError("a video that is refined has all its frames: pictures change nothing", "leave them out")
    if run.loop == "ring" or (run.loop == "stream" and run.made <= run.stream.chunk):
        raise ConfigError(
            "a loop in one window has no chunk that leads to a picture", "give more --frames, with --loop"
        )
    if first < earliest:
        said = f"a picture is for frame {first}, the first that a chunk leads to is frame {earliest}"
        raise ConfigError(said, "--image gives the picture that the video starts from")


def _check_refined(known: Prepared) -> None:
    job, found = known.job, known.source
    assert found is not None
    config, factor = job.config, job.config.output.interpolate
    if not config.refine.enabled and factor == 1:
        raise ConfigError("refine.enabled is false, so there is nothing to do")
    if config.num_frames > found.frames * factor:
        there = found.frames if factor == 1 else f"{found.frames}, which make {found.frames * factor}"
        raise ConfigError(
            f"num_frames is {config.num_frames}, {job.source} has only {there}", "leave it out to refine all"
        )


def _check_continued(known: Prepared) -> None:
    job, config, found = known.job, known.job.config, known.source
    assert found is not None
    if found.frames < config.stream.chunk:
        raise InputError(
            f"{job.source} has {found.frames} frames, model {config.model} continues from {config.stream.chunk}",
            "streamt2v generate --image starts from a single picture",
        )
    if config.made <= found.frames:
        raise ConfigError(
            f"--frames is {config.num_frames}, {job.source} has {found.frames * config.output.interpolate} already",
            "it counts the frames of the whole video",
        )


def _source_notices(known: Prepared) -> list[str]:
    job, found = known.job, known.source
    notices = list(known.carried().notices)
    if found is None:
        return notices
    output, stream = job.config.output, job.config.stream
    if not found.clock.steady:
        uneven = f"the {found.clock.pictures} pictures of {job.source} come at uneven times"
        notices.append(f"{uneven}: {found.frames} frames at {found.fps:g} fps show each when it is due")
    if found.damaged:
        notices.append(f"{found.damaged} parts of {job.source} cannot be decoded; the pictures before them stay on")
    if job.command == "extend" and abs(found.width / found.height * stream.height / stream.width - 1) > 0.02:
        shapes = f"{found.width}x{found.height}, model {job.config.model} makes {stream.width}x{stream.height}"
        notices.append(f"{job.source} is {shapes}: what does not fit into that shape is cut off")
    if known.fit.width * known.fit.height < 0.95 * found.width * found.height:  # not for the pixel of an odd side
        size = f"{known.fit.width}x{known.fit.height}"
        notices.append(f"{job.source} is {found.width}x{found.height}, the result is {size}; --size changes it")
    fps = output.fps / output.interpolate
    if found.has_audio and job.audio is None and abs(found.fps - fps) > 1e-6:
        notices.append(f"the sound keeps its speed, the picture changes from {found.fps:g} to {fps:g} fps")
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
    run_directory.check_writable(path.parent)


def check_place(job: Job) -> None:
    """Refuse an output that is there, that is read, or in whose folder something is read. Raises OutputError."""
    inputs = (job.source, *job.config.all_files.values(), job.audio, *job.inputs)
    if job.output.suffix or not job.output.is_dir():
        check_target(job.output, job.overwrite or job.resume, *inputs)
        return
    if not (job.overwrite or job.resume) and any(job.output.iterdir()):
        raise OutputError(f"{job.output} is a folder with something in it", "choose another name, or --overwrite")
    run_directory.check_writable(job.output)
    for given in filter(None, (*inputs, job.preview)):
        if Path(str(given)).resolve().is_relative_to(job.output.resolve()):
            raise OutputError(f"{given} lies in {job.output}", "choose another name with -o")


def _check_output(job: Job) -> None:
    from streamt2v.media import exports

    if job.output.suffix.lower() not in exports.KINDS:
        endings = ", ".join(exports.KINDS[:-1])
        raise ConfigError(f"the output {job.output} must end in {endings}; without an ending it is a folder of PNGs")
    check_place(job)
    if job.preview is not None:
        if job.preview.suffix.lower() != ".png":
            raise ConfigError(f"the preview {job.preview} must end in .png")
        begun = job.resume and (run_directory.exists(job.run_path) or job.output.exists())  # it is that of the run
        check_target(
            job.preview,
            job.overwrite or begun,
            *(job.source, *job.config.all_files.values(), job.audio, *job.inputs, job.output),
        )
    if run_directory.exists(job.run_path) and not (job.resume or job.overwrite):
        run_directory.RunDirectory(job.run_path).close()  # refuses one that is being worked on
        raise OutputError(
            f"an unfinished run lies in {job.run_path}", "continue it with --resume, or start again with --overwrite"
        )


def prompt_notices(known: Prepared) -> list[str]:
    """Name the words of the prompts that the model does not know, and those it does."""
    job, words = known.job, known.family.vocabulary_path()
    if words is None:
        return []
    grammar = vocabulary.load(words)
    said = (job.config.prompt, *job.config.prompts.values(), job.config.negative_prompt)
    unknown = grammar.unknown_words(" ".join(said))
    if not unknown:
        return []
    plural = "words" if len(unknown) > 1 else "word"
    return [f"model {job.config.model} does not know the {plural} {', '.join(unknown)}", f"  it knows {grammar.hint()}"]
