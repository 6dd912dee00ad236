"""The commands that make videos: generate, refine, extend, resume, rerun and batch; and plan and bench."""

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamt2v import config, files
from streamt2v.batch import events
from streamt2v.cli import options
from streamt2v.cli.options import argument, option
from streamt2v.cli.progress import Progress, clock
from streamt2v.cli.terminal import FETCHING, complain, emit, plain, terminable
from streamt2v.errors import ConfigError, DifferenceError, Interrupted
from streamt2v.families import choose
from streamt2v.jobs import again, asked, forecast, prepare, run_directory
from streamt2v.jobs.job import BEHAVIOUR, Job, Result, beside, default_output
from streamt2v.jobs.prepared import Prepared
from streamt2v.jobs.recipe import inspect_source
from streamt2v.runs.pace import Status
from streamt2v.timeline import parse_at, parse_time

if TYPE_CHECKING:
    from streamt2v.runs.watch import Report

_RUNNING = (options.computing, options.writing, options.talking)


@options.knows(options.making, options.streaming, options.starting, *_RUNNING, options.alone)
def generate(
    prompt: options.Prompt = None,
    frames: options.Frames = None,
    duration: options.Duration = None,
    output: options.Output = None,
    fps: options.Fps = None,
    count: options.Count = 1,
    dry_run: options.DryRun = False,
    **given: Any,
) -> None:
    """Make a video from a prompt.

    The demo model knows red, green, blue, yellow, purple and white; ball, star, lantern and moon;

    drifting left or right, floating, rising and circling; sea, hills, desert and city; day, sunset and night;

    clear, clouds, mist and snow.

    [b]streamt2v generate "a red ball floating over the sea at sunset" --frames 240 -o ball.mp4[/b]

    [b]streamt2v generate "a red ball over the sea" --at 10s "a blue ball over the sea" --frames 240[/b]

    [b]streamt2v generate "a blue star drifting left" --image start.png --frames 48[/b]

    [b]streamt2v generate "a cat on the beach" --model streamingt2v --init svd --image-init sdxl --frames 240[/b]
    """
    length: dict[str, Any] = {"frames": frames, "duration": duration, "fps": fps}
    _run("generate", None, output, given, count, dry_run, prompt=options.read_prompt(prompt), **length)


@options.knows(options.making, *_RUNNING, options.alone)
def refine(
    source: Annotated[Path, argument("The video to refine.")],
    output: options.Output = None,
    prompt: Annotated[str | None, option("--prompt", "What the video shows. Default: its own prompts, if any.")] = None,
    fps: options.SourceFps = None,
    guidance: Annotated[float | None, options.advanced("--guidance", "--cfg", "Guidance; 1 is off.")] = None,
    dry_run: options.DryRun = False,
    **given: Any,
) -> None:
    """Refine a video of any length: more detail, the same number of frames, the same sound.

    [b]streamt2v refine holiday.mp4 -o holiday_hd.mp4 --size 1920x1080[/b]

    [b]streamt2v refine ball.mp4 --refiner i2vgen-xl --strength creative -o other.mp4[/b]
    """
    output = output or beside(source, "refine")
    more: dict[str, Any] = {"refine.guidance_scale": guidance}
    _run("refine", source, output, given, 1, dry_run, prompt=prompt, fps=fps, **more)


@options.knows(options.making, options.streaming, *_RUNNING, options.alone)
def extend(
    source: Annotated[Path, argument("The video to continue.")],
    frames: options.Longer = None,
    duration: options.Duration = None,
    output: options.Output = None,
    prompt: Annotated[str | None, option("--prompt", "What the video shows. Default: its last prompt.")] = None,
    fps: options.SourceFps = None,
    dry_run: options.DryRun = False,
    **given: Any,
) -> None:
    """Continue a video: its own frames, then new ones generated from its last 16.

    [b]streamt2v extend ball.mp4 --frames 240 -o longer.mp4[/b]

    [b]streamt2v extend beach.mp4 --prompt "waves on a beach" --frames 480 -o longer.mp4[/b]
    """
    output = output or beside(source, "extend")
    if frames is None and duration is None:
        raise ConfigError("the new length is missing", "give it with --frames 240 or --duration 30s, source included")
    _run("extend", source, output, given, 1, dry_run, prompt=prompt, frames=frames, duration=duration, fps=fps)


@options.knows(options.placing, *_RUNNING, options.alone)
def interpolate(
    source: Annotated[Path, argument("The video to put frames into.")],
    output: options.Output = None,
    factor: Annotated[
        int | None, option("--factor", "Frames for every one that is there.", parser=options.within(int, 2, 64))
    ] = None,
    fps: Annotated[
        float | None, option("--fps", "The new rate, a multiple of the source's.", parser=options.parse_rate)
    ] = None,
    dry_run: options.DryRun = False,
    **given: Any,
) -> None:
    """Put frames between those of a video: a higher rate, the same length, cuts and sound. Twice as many by default.

    Once `streamt2v weights pull interpolate` has fetched the published network, that one is used, not the small one of
    the package.

    [b]streamt2v interpolate ball.mp4 --fps 24 -o smooth.mp4[/b]
    """
    rate = config.exact_rate(inspect_source(source).fps)
    if fps is not None:
        ratio = config.exact_rate(fps) / rate
        if ratio.denominator != 1 or not 1 < ratio <= 64 or factor not in (None, ratio):
            near = ", ".join(f"{float(rate * number):g}" for number in (2, 3, 4))
            raise ConfigError(f"--fps is {fps:g}, {source} has {float(rate):g}", f"possible are {near} ...")
        factor = int(ratio)
    output = output or source.with_name(f"{source.stem}_smooth.mp4")
    _run("refine", source, output, given, 1, dry_run, no_refine=True, interpolate=factor or 2)


def _run(
    command: str,
    source: Path | None,
    output: Path | None,
    given: dict[str, Any],
    count: int = 1,
    dry_run: bool = False,
    **more: Any,
) -> None:
    """Carry out a command that makes a video; `given` are the options of the shared groups."""
    progress, as_json = _talking(given)
    behaviour = _behaviour(given)
    if behaviour["resume"] and output is None:
        raise ConfigError("--resume needs to know which output", "name it with -o")
    found = None if source is None else inspect_source(source)
    given["strength"] = given.get("strength") or asked.usual_strength(command, found)
    more |= {"device": behaviour["device"], "resume_from": output if behaviour["resume"] else None, "source": found}
    more["command"] = command
    resolved = asked.resolve(**given, **more)
    output = output or default_output(resolved.prompt, resolved.seed)
    job = Job(command, resolved, output, source, **behaviour)
    if count > 1:
        _vary(job, count, dry_run, progress, as_json)
    elif dry_run:
        prepare.prepare(job, progress.say)
        _tell_plan(job, as_json, progress)
    else:
        _end(job, _make(job, progress, as_json), progress, as_json)


def _vary(job: Job, count: int, dry_run: bool, progress: Progress, as_json: bool) -> None:
    """Make a job several times, with the seeds that follow and numbered names, as a batch does."""
    from streamt2v.batch import run, tasks

    made = list[tasks.Task]()
    with terminable(FETCHING), progress:
        progress.doing(f"checking {count} videos")
        for number in range(count):
            name = job.output.with_name(f"{job.output.stem}-{number + 1:0{len(str(count))}}{job.output.suffix}")
            settings = dataclasses.replace(job.config, seed=job.config.seed + number)
            one = dataclasses.replace(job, config=settings, output=name)
            made.append(tasks.Task(name.stem, number + 1, one, tuple(prepare.prepare(one, progress.say).notices)))
        names = [task.id for task in made]
        code = run.run(made, [], _follow(progress, as_json, names), keep_going=True, ray=None, dry_run=dry_run)
    raise typer.Exit(code)


def _talking(given: dict[str, Any]) -> tuple[Progress, bool]:
    """Take out of the options how a command reports: its progress, and whether the result is JSON."""
    quiet, verbose, as_json = (given.pop(name) for name in ("quiet", "verbose", "json_output"))
    return Progress(quiet, verbose, alone=not as_json), as_json


def _behaviour(given: dict[str, Any], *inputs: Path) -> dict[str, Any]:
    """Take out of the options those that say how a run behaves, and add the files that the command reads."""
    behaviour = {name: given.pop(name) for name in BEHAVIOUR if name in given}
    if behaviour.get("resume_anyway"):
        behaviour["resume"] = True
    return behaviour | {"inputs": tuple(filter(None, (*inputs, given.get("config_file"), given.get("timeline"))))}


def _make(job: Job, progress: Progress, as_json: bool = False) -> Result:
    report: Report = progress
    with progress, terminable(FETCHING):
        progress.doing(f"checking {job.output.name}")
        # All cheap checks come before torch is imported or a model loads.
        known = prepare.prepare(job, progress.say)
        if as_json:
            report = events.JobReport(job.output.stem, _follow(progress, as_json))
            report.start(job)
        for notice in known.notices:
            report.note(notice, warning=True)
        length = f"{job.config.num_frames} frames at {job.config.output.fps:g} fps"
        progress.say(f"{job.output}: {length}, model {job.maker}, seed {job.config.seed}")
        report.tell(Status("doing", "loading torch"))
        from streamt2v.runs import pipeline

        return pipeline.make(known, report)


def _end(job: Job, result: Result, progress: Progress, as_json: bool) -> None:
    """Say what was made and what can be done with it, then print the result."""
    size = f", {job.output.stat().st_size / 1e6:.2g} MB" if job.output.is_file() else ""
    took, fresh = f"in {clock(result.seconds)}", job.command != "extend" and not job.resume  # else some were there
    took += f" at {result.frames / max(result.seconds, 0.01):.3g} frames/s" * fresh
    made = f"{result.width}x{result.height}, {result.frames} frames ({result.frames / result.fps:.4g} s){size}"
    progress.say(f"{made} {took}, seed {result.seed}")
    name = shlex.quote(result.output if result.output[0] != "-" else f"./{result.output}")
    others = ["refine"] * (not job.config.refine.enabled)
    if job.command != "refine" or job.config.prompt:  # else it has to be said what is shown
        others.append(f"extend --frames {2 * result.frames}")
    others.append("rerun" if job.source is None else f"rerun --source {shlex.quote(str(job.source))}")
    progress.say(f"next: streamt2v preview {name}; or {', '.join(others)}")
    _tell(result, as_json)


def _tell(result: Result, as_json: bool) -> None:
    emit(json.dumps(events.event("result", ok=True, **dataclasses.asdict(result))) if as_json else result.output)


def _tell_plan(job: Job, as_json: bool, progress: Progress) -> None:
    for notice in prepare.prompt_notices(known := Prepared(job)):
        progress.say(notice)
    report = forecast.plan(known)
    emit(json.dumps(dataclasses.asdict(report)) if as_json else plain(report.as_text()))


@options.knows(options.talking)
def resume(
    run: Annotated[Path, argument("The output, or its run directory OUT.streamt2v.")],
    device: Annotated[
        str | None, option("--device", "Another device of the same kind and name. Default: the one the run began on.")
    ] = None,
    **given: Any,
) -> None:
    """Continue an interrupted run with its own settings; the frames are those of an uninterrupted one.

    Repeating the original command with --resume does the same; with --resume-anyway, settings may change.

    [b]streamt2v resume ball.mp4[/b]
    """
    progress, as_json = _talking(given)
    output = run_directory.output_of(run)
    if output.exists() and not run_directory.exists(run_directory.directory_for(output)):
        result = again.made(output)
        run_directory.discard(run_directory.directory_for(output))
        progress.say(f"{output} is finished")
        _tell(result, as_json)
    else:
        job = again.resumed(output)
        job = dataclasses.replace(job, device=device or job.device)
        _end(job, _make(job, progress, as_json), progress, as_json)


@options.knows(*_RUNNING, options.alone)
def rerun(
    video: Annotated[Path, argument("A video made by streamt2v.")],
    output: Annotated[
        Path | None, option("--output", "-o", "The file to write. Default: VIDEO_rerun.mp4, of its kind.")
    ] = None,
    source: Annotated[Path | None, option("--source", "The video that VIDEO was refined or extended from.")] = None,
    image: options.Image = None,
    at: options.At = None,
    lora: options.Lora = None,
    init: options.Init = None,
    image_init: options.ImageInit = None,
    model: options.Model = None,
    refiner: options.Refiner = None,
    **given: Any,
) -> None:
    """Make a video again from the recipe inside it and compare the frames; exit code 10 if they differ.

    The recipe decides what is made. Paths, the device and models that weights.toml does not list have to be given.

    [b]streamt2v rerun ball.mp4 -o again.mp4[/b]

    [b]streamt2v rerun ball_hd.mp4 --source ball.mp4[/b]
    """
    progress, as_json = _talking(given)
    behaviour = _behaviour(given, video)
    places: dict[str, str | None] = dict.fromkeys(("initialize.text_model", "initialize.picture_model"), init)
    places["model"] = model
    places |= {f"pictures.{parse_time(time, 1)}": path for time, path in map(parse_at, at or [])}
    places |= {f"loras.{number}": one for number, one in enumerate(lora or [], 1)}
    places |= {
        "initialize.text_to_image": image_init,
        "refine.model": refiner,
        "image": None if image is None else str(image),
    }
    command, settings, like = again.rerun(video, source, places)
    output = output or video.with_name(f"{video.stem}_rerun{video.suffix}")
    progress.say(f"{video} says: {command}, with")
    usual = config.to_flat(config.merge(*choose.usual(settings)))
    for key, value in config.to_flat(settings).items():
        if value != usual.get(key):
            progress.say(f"  {key} = {value}")
    result = _make(Job(command, settings, output, source, like=like, **behaviour), progress, as_json)
    if differences := again.compare(video, output):
        raise DifferenceError(f"the frames of {output} differ from those of {video}: {'; '.join(differences)}")
    progress.say(f"the frames are those of {video}")
    _tell(result, as_json)


class RayCommand(options.LeveledCommand):
    """A command whose --ray needs no address, because typer has no options with an optional value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare --ray its value; an address is auto, local or contains a colon."""
        for index, after in enumerate([*args[1:], ""]):
            if args[index] == "--ray" and not re.search("^(auto|local)$|:", after):
                args[index] = "--ray=local"
        return super().parse_args(ctx, args)


@options.knows(options.making, options.streaming, options.starting, *_RUNNING)
def batch(
    file: Annotated[
        str, argument("Rows in .jsonl, .toml, .csv or .txt (a prompt a line); - is stdin.", metavar="JOBS")
    ],
    out_dir: Annotated[Path, option("--out-dir", "Folder of the videos; no row writes elsewhere.", show_default=False)],
    frames: options.Frames = None,
    duration: options.Duration = None,
    fps: options.Fps = None,
    keep_going: Annotated[bool, option("--keep-going", "Go on when rows are invalid or jobs fail.")] = False,
    shard: Annotated[
        str, option("--shard", "Only every Nth row, starting with the Ith: one part per machine.", metavar="I/N")
    ] = "1/1",
    ray: Annotated[
        str | None, option("--ray", "Run on Ray: auto, HOST:PORT, or no address to start it here.", metavar="[ADDRESS]")
    ] = None,
    dry_run: options.DryRun = False,
    **given: Any,
) -> None:
    """Make many videos: each row is a prompt with any option of generate by name, such as frames or refine-steps.

    Settings such as stream.eta work too. Options given here apply to rows that do not set them. Rows without a seed get
    one from their id or prompt. Finished videos are skipped, interrupted ones continue; --overwrite makes changed rows
    again. With --json every event is a line on stdout.

    [b]streamt2v batch jobs.jsonl --out-dir videos[/b]

    [b]streamt2v batch prompts.txt --out-dir videos --frames 240 --keep-going --ray --threads 2[/b]
    """
    from streamt2v.batch import rows, run, tasks

    progress, as_json = _talking(given)
    behaviour = _behaviour(given, Path(file))
    overwrite = behaviour.pop("overwrite")
    # A cluster has its own devices.
    given |= {"frames": frames, "duration": duration, "fps": fps, "device": None if ray else behaviour["device"]}
    shared = tasks.Shared(out_dir, given, behaviour, overwrite)
    with terminable(FETCHING), progress, files.no_new_folders(out_dir) if dry_run else nullcontext():
        part = tasks.shard_of(shard)
        progress.doing(f"checking {file}")
        checked = tasks.check(rows.read(file), shared, part, progress.say)
        names = [job.id for group in checked for job in group]
        tell = _follow(progress, as_json, names)
        code = run.run(*checked, tell, keep_going=keep_going, ray=ray, dry_run=dry_run)
    raise typer.Exit(code)


def _follow(progress: Progress, as_json: bool, jobs: Sequence[str] = ()) -> events.Tell:
    """Return a function that shows the events of jobs: results or JSON on stdout, text on stderr."""
    out = sys.stdout  # Ray replaces it

    def numbered(job: str) -> str:
        return f"{jobs.index(job) + 1}/{len(jobs)} {job}" if job in jobs else ""

    def tell(event: events.Event) -> None:
        job = event.get("job", "")
        if as_json:
            emit(json.dumps(event), out)
        if event["type"] in ("start", "plan"):
            progress.end("")  # the line of what came before the jobs
        if event["type"] == "start":
            if job in jobs:
                said = "{output}: {frames} frames at {fps:g} fps, model {model}, seed {seed}".format(**event)
                progress.say(f"{numbered(job).partition(' ')[0]} {said}")
        elif event["type"] in ("progress", "chunk"):
            progress.tell(events.status_of(event), numbered(job))
        elif event["type"] == "plan":
            if not as_json:
                with progress.aside():
                    emit(plain("{output}: {summary}".format(**event)), out)
        elif event["type"] == "warning":
            progress.note(f"{job}: {event['message']}" if jobs else event["message"], warning=True)
        elif "jobs" in event:
            left = f", about {forecast.spoken(event['seconds_left'])}" if "seconds_left" in event else ""
            progress.say("{made} made, {there} already there, {failed} failed, {left} left".format(**event) + left)
        else:
            progress.end(numbered(job))
            if event["ok"] and not as_json:
                with progress.aside():
                    emit(event["output"], out)
        if not event.get("ok", True):
            error, where = event["error"], [f"line {event['line']}"] if job else []
            if event.get("field", "") not in error["message"]:
                where.append(event["field"])
            stopped = error["code"] == Interrupted.code
            complain(": ".join([*(["error"] * (not stopped)), *where, error["message"]]), error["hint"])

    return tell


@options.knows(options.making, options.streaming, options.starting, options.computing)
def plan(
    prompt: options.Prompt = None,
    frames: options.Frames = None,
    duration: options.Duration = None,
    fps: options.Fps = None,
    json_output: options.Json = False,
    **given: Any,
) -> None:
    """Show the chunks, memory and time of a run without loading any weights.

    [b]streamt2v plan "a red ball over the sea" --frames 1200[/b]

    [b]streamt2v plan "a cat on the beach" --model streamingt2v --device cuda --memory 12[/b]
    """
    threads, memory = given.pop("threads"), given.pop("memory")
    length: dict[str, Any] = {"frames": frames, "duration": duration, "fps": fps}
    resolved = asked.resolve(prompt=options.read_prompt(prompt), **length, **given)
    prepare.check_wishes(resolved, prompt_needed=prompt is not None)  # the plan is the same for any
    job = Job("generate", resolved, Path(), threads=threads, memory=memory, device=given["device"])
    _tell_plan(job, json_output, Progress())


@options.knows(
    options.making,
    options.streaming,
    options.starting,
    options.computing,
    options.talking,
    without=("seed", "negative", "at", "timeline", "until", "loop", "lora"),  # the time hangs on none of these
)
def bench(
    frames: Annotated[str, option("--frames", "-n", "Length to plan for, in frames or as a time.")] = "1200",
    **given: Any,
) -> None:
    """Measure this machine: make a short video, discard it, and show what a long one will take.

    From then on `plan` knows the time for the same model, sizes and steps.

    [b]streamt2v bench[/b]

    [b]streamt2v bench --model streamingt2v --quality fast --size 720x720[/b]
    """
    progress, as_json = _talking(given)
    device, threads, memory = given["device"], given.pop("threads"), given.pop("memory")
    resolved = asked.resolve(prompt="a red ball floating over the sea at sunset", frames=frames, **given)
    short = dataclasses.replace(resolved, num_frames=forecast.short_length(resolved))
    with TemporaryDirectory(prefix="streamt2v-") as folder, terminable():
        job = Job("generate", short, Path(folder) / "bench.mp4", device=device, threads=threads, memory=memory)
        with progress:
            progress.doing("measuring this machine")
            known = prepare.prepare(job, progress.say)
            from streamt2v.runs import pipeline

            pipeline.make(known, progress)
    _tell_plan(dataclasses.replace(job, config=resolved), as_json, progress)
