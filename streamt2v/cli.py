"""The command line: arguments to a config, one call into the pipeline, results to stdout, everything else to stderr."""

import dataclasses
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Annotated, Any, NoReturn, TextIO

import typer

from streamt2v import (
    __version__,
    config,
    events,
    files,
    initializers,
    jobs,
    options,
    planning,
    runs,
    weights,
)
from streamt2v.errors import (
    ConfigError,
    DifferenceError,
    Interrupted,
    OutputError,
    StreamT2VError,
    Terminated,
    VideoError,
    WeightsError,
    explained,
    stopped_by,
)
from streamt2v.progress import Progress, plain, say, silence
from streamt2v.weights import home, hub

FETCHING = "stopped; the same command goes on where it stopped"
app = typer.Typer(
    name="streamt2v",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Long videos from text on your own machine, by the StreamingT2V method.\n\n"
    '[b]streamt2v generate "a red ball bouncing over the sea at sunset" --frames 240 -o ball.mp4[/b]\n\n'
    "[b]streamt2v refine ball.mp4 -o ball_hd.mp4 --size 1280x720[/b]",
)
weights_app = typer.Typer(no_args_is_help=True, help="The weights that are here, and whether they are whole.")
app.add_typer(weights_app, name="weights")


def _saying(quiet: bool) -> Callable[[str], None]:
    """Return what says a line on stderr, unless only errors are wanted."""
    return (lambda text: None) if quiet else say


def _emit(text: str, out: TextIO | None = None) -> None:
    """Print a result; when the reader of our output went away there is nobody to tell."""
    try:
        print(text, flush=True, file=out)
    except OSError as error:
        silence(out or sys.stdout)
        gone = isinstance(error, BrokenPipeError)
        if not gone:
            say(f"error: the result cannot be printed: {error.strerror}")
        raise SystemExit(141 if gone else OutputError.exit_code) from None  # no failure of a job that is being made


def default_output(prompt: str, seed: int) -> Path:
    """Return a file name made of the date, the prompt's letters and the seed."""
    return Path(f"{datetime.now():%Y%m%d-%H%M%S}_{files.slug(prompt)}_{seed}.mp4")


@app.command()
@options.knows(options.making, options.streaming, options.starting, options.running, options.alone)
def generate(
    prompt: options.Prompt = None,
    frames: options.Frames = None,
    output: options.Output = None,
    fps: options.Fps = None,
    **given: Any,
) -> None:
    """Make a video from a prompt.

    The demo model knows red, green, blue, yellow, purple or white; ball, star, cube or fish;

    drifting left or right, bouncing, rising or circling; sea, meadow, desert or city; day, sunset or night.

    [b]streamt2v generate "a red ball bouncing over the sea at sunset" --frames 240 -o ball.mp4[/b]

    [b]streamt2v generate "a red ball over the sea" --at 10s "a blue ball over the sea" --frames 240[/b]

    [b]streamt2v generate "a blue star drifting left" --image start.png --frames 48[/b]

    [b]streamt2v generate "a cat on the beach" --model streamingt2v --init svd --image-init sdxl --frames 240[/b]
    """
    _run("generate", None, output, given, prompt=options.read_prompt(prompt), frames=frames, fps=fps)


@app.command()
@options.knows(options.making, options.running, options.alone)
def refine(
    source: Annotated[Path, typer.Argument(help="The video to refine.", show_default=False)],
    output: options.Output = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What it shows. Default: the video's own prompts.")
    ] = None,
    fps: options.SourceFps = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Guidance; 1 is off.", rich_help_panel=options.ADVANCED)
    ] = None,
    **given: Any,
) -> None:
    """Refine a video of any length: same frames, same sound, more detail.

    [b]streamt2v refine holiday.mp4 -o holiday_hd.mp4 --size 1920x1080[/b]

    [b]streamt2v refine ball.mp4 --strength creative -o other.mp4[/b]
    """
    output = output or source.parent / f"{source.stem}_refined.mp4"
    _run("refine", source, output, given, prompt=prompt, fps=fps, refine_guidance=guidance)


@app.command()
@options.knows(options.making, options.streaming, options.running, options.alone)
def extend(
    source: Annotated[Path, typer.Argument(help="The video to continue.", show_default=False)],
    frames: Annotated[int, typer.Option("--frames", "-n", help="Frames of the whole result, the source's included.")],
    output: options.Output = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What it shows. Default: the video's last prompt.")
    ] = None,
    fps: options.SourceFps = None,
    **given: Any,
) -> None:
    """Continue a video: its own frames, then new ones that follow from its last 16.

    [b]streamt2v extend ball.mp4 --frames 240 -o longer.mp4[/b]

    [b]streamt2v extend beach.mp4 --prompt "waves on a beach" --frames 480 -o longer.mp4[/b]
    """
    output = output or source.parent / f"{source.stem}_extended.mp4"
    _run("extend", source, output, given, prompt=prompt, frames=frames, fps=fps)


def _run(command: str, source: Path | None, output: Path | None, given: dict[str, Any], **more: Any) -> None:
    """Carry out a command that makes a video; `given` are the options of the shared groups."""
    json_output, quiet, verbose = (given.pop(name) for name in ("json_output", "quiet", "verbose"))
    behaviour = {name: given.pop(name) for name in jobs.BEHAVIOUR if name in given}
    behaviour["inputs"] = tuple(filter(None, (given.get("config_file"), given.get("timeline"))))
    behaviour["resume"] |= behaviour["resume_anyway"]
    if behaviour["resume"] and output is None:
        raise ConfigError("--resume needs to know which output", "name it with -o")
    found = None if source is None else jobs.inspect_source(source)
    if command == "refine" and found is not None and not found.own:
        given["strength"] = given["strength"] or "faithful"
    more |= {"device": behaviour["device"], "resume_from": output if behaviour["resume"] else None, "source": found}
    resolved = options.resolve(**given, **more)
    output = output or default_output(resolved.prompt, resolved.seed)
    _make(jobs.Job(command, resolved, output, source, **behaviour), json_output, quiet, verbose)


def _make(job: jobs.Job, json_output: bool, quiet: bool, verbose: bool) -> None:
    """Carry out a job and print its result."""
    _emit_result(_made(job, quiet, verbose), json_output)


def _made(job: jobs.Job, quiet: bool, verbose: bool) -> jobs.Result:
    tell = _saying(quiet)
    with _terminable(FETCHING):
        # Everything cheap is checked before torch is imported or a model loads.
        notices = jobs.check(job, tell)
    for notice in notices:
        tell(notice)
    length = f"{job.config.num_frames} frames at {job.config.output.fps:g} fps"
    tell(f"{job.output}: {length}, model {job.config.model}, seed {job.config.seed}")
    with Progress(quiet=quiet, verbose=verbose) as progress:
        from streamt2v import pipeline

        return pipeline.run(job, progress)


def _emit_result(result: jobs.Result, json_output: bool) -> None:
    made = events.event("result", ok=True, **dataclasses.asdict(result))
    _emit(json.dumps(made) if json_output else result.output)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The output, or its run directory OUT.streamt2v.", show_default=False)],
    device: Annotated[
        str | None, typer.Option("--device", help="Another device of the same kind and name. Default: where it began.")
    ] = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Continue an interrupted run as it was begun, to the same frames.

    The same command with --resume does it too, and --resume-anyway with other settings.

    [b]streamt2v resume ball.mp4[/b]
    """
    output = runs.output_of(run)
    if output.exists() and not runs.exists(runs.directory_for(output)):
        result = jobs.made(output)
        runs.discard(runs.directory_for(output))
        _saying(quiet)(f"{output} is finished")
        _emit_result(result, json_output)
    else:
        job = jobs.resumed(output)
        _make(dataclasses.replace(job, device=device or job.device), json_output, quiet, verbose)


@app.command()
def verify(
    videos: Annotated[list[Path], typer.Argument(help="Videos made by streamt2v.", show_default=False)],
    json_output: options.Json = False,
) -> None:
    """Check that videos are whole: every bit as written, every frame decoded, as many as the recipe says.

    Exit code 3 at the first that is cut, damaged or changed. It knows no signatures: who forges a video can forge this.

    [b]streamt2v verify ball.mp4[/b]
    """
    for video in videos:
        facts = jobs.verify(video)
        _emit(json.dumps(facts) if json_output else f"{video}: whole, {facts['frames']} frames, {facts['seconds']:g} s")


@app.command()
@options.knows(options.running, options.alone)
def rerun(
    video: Annotated[Path, typer.Argument(help="A video made by streamt2v.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write. Default: VIDEO_rerun.mp4, of its kind.")
    ] = None,
    source: Annotated[Path | None, typer.Option("--source", help="What VIDEO was refined or extended from.")] = None,
    image: options.Image = None,
    init: options.Init = None,
    image_init: options.ImageInit = None,
    **given: Any,
) -> None:
    """Make a video again by the recipe inside it, and compare the frames: exit code 10 where they differ.

    The recipe decides what is made. Paths, the device, and models that weights.toml does not know, only you can name.

    [b]streamt2v rerun ball.mp4 -o again.mp4[/b]

    [b]streamt2v rerun ball_hd.mp4 --source ball.mp4[/b]
    """
    json_output, quiet, verbose = (given.pop(name) for name in ("json_output", "quiet", "verbose"))
    given["resume"] |= given["resume_anyway"]
    places: dict[str, str | None] = {
        "image": None if image is None else str(image), "initialize.text_model": init, "initialize.picture_model": init,
        "initialize.text_to_image": image_init,
    }  # fmt: skip
    command, settings, like = jobs.rerun(video, source, places)
    output, tell = output or video.with_name(f"{video.stem}_rerun{video.suffix}"), _saying(quiet)
    tell(f"{video} says: {command}, with")
    usual = config.to_flat(config.merge(config.preset(weights.family(settings.model).preset)))
    for key, value in config.to_flat(settings).items():
        if value != usual.get(key):
            tell(f"  {key} = {value}")
    result = _made(jobs.Job(command, settings, output, source, like=like, inputs=(video,), **given), quiet, verbose)
    if differences := jobs.compare(video, output):
        raise DifferenceError(f"the frames of {output} differ from those of {video}: {'; '.join(differences)}")
    tell(f"the frames are those of {video}")
    _emit_result(result, json_output)


@contextmanager
def _terminable(said: str = "stopped") -> Iterator[None]:
    """Turn SIGTERM into an exception, so that a run can say how it goes on as it does on Ctrl-C; and name both.

    Also where a library lost the exception and raises another one.
    """
    arrived: list[BaseException] = []

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        arrived.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise arrived[-1]

    # Started with SIGINT ignored, as in the background of a script, it stays ignored.
    both = [signal.SIGTERM, *([signal.SIGINT] if callable(signal.getsignal(signal.SIGINT)) else [])]
    before = {number: signal.signal(number, stop) for number in both}
    try:
        yield
    except StreamT2VError:
        raise
    except BaseException as error:
        if by := stopped_by(error) or (isinstance(error, Exception) and arrived and arrived[0]):
            raise Interrupted(said, by=by) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _RayCommand(typer.core.TyperCommand):
    """A command whose --ray may stand without an address: typer has no options with an optional value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare --ray its value; an address is auto, local, or has a colon."""
        for index, after in enumerate([*args[1:], ""]):
            if args[index] == "--ray" and not re.search("^(auto|local)$|:", after):
                args[index] = "--ray=local"
        return super().parse_args(ctx, args)


@app.command(cls=_RayCommand)
@options.knows(options.making, options.streaming, options.starting, options.running)
def batch(
    file: Annotated[
        str,
        typer.Argument(
            metavar="JOBS", show_default=False, help="Rows in .jsonl, .toml, .csv, .txt (a prompt a line); - is stdin."
        ),
    ],
    out_dir: Annotated[
        Path, typer.Option("--out-dir", help="Folder of the videos; no row writes elsewhere.", show_default=False)
    ],
    frames: options.Frames = None,
    fps: options.Fps = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Make what can be made when rows are wrong or jobs fail.")
    ] = False,
    shard: Annotated[
        str, typer.Option("--shard", metavar="I/N", help="Only every Nth row, from the Ith on: one part a machine.")
    ] = "1/1",
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="[ADDRESS]", help="Run on Ray: auto, HOST:PORT, or nothing to start it here."),
    ] = None,
    **given: Any,
) -> None:
    """Make many videos: a row is a prompt and any option of generate, by its name: frames, refine-steps, stream.eta.

    Options given here hold for rows that do not say otherwise. Rows without a seed get one from their id or prompt.
    What is finished is not made again, what was stopped goes on; --overwrite makes rows again that were changed.
    With --json every event is a line on stdout.

    [b]streamt2v batch jobs.jsonl --out-dir videos[/b]

    [b]streamt2v batch prompts.txt --out-dir videos --frames 240 --keep-going --ray --threads 2[/b]
    """
    from streamt2v import batch as batches
    from streamt2v import rows

    json_output, quiet, verbose, overwrite = (
        given.pop(name) for name in ("json_output", "quiet", "verbose", "overwrite")
    )
    behaviour = {name: given.pop(name) for name in jobs.BEHAVIOUR if name in given}
    behaviour["inputs"] = tuple(filter(None, (Path(file), given.get("config_file"), given.get("timeline"))))
    given |= {"frames": frames, "fps": fps, "device": None if ray else behaviour["device"]}  # a cluster has its own
    shared = batches.Shared(out_dir, given, behaviour, overwrite)
    with _terminable(FETCHING), Progress(quiet=quiet, verbose=verbose) as progress:
        part = batches.shard_of(shard)
        checked = batches.check(rows.read(file), shared, generate, part, _saying(quiet))
        code = batches.run(*checked, _follow(progress, json_output), keep_going=keep_going, ray=ray)
    raise typer.Exit(code)


def _follow(progress: Progress, json_output: bool) -> events.Tell:
    """Return what shows the events of a batch: results on stdout, all else on stderr; with JSON all on stdout too."""
    out = sys.stdout  # which Ray must not share

    def tell(event: events.Event) -> None:
        job = event.get("job", "")
        if json_output:
            _emit(json.dumps(event), out)
        if event["type"] == "start":
            progress.say("{job}: {output}: {frames} frames at {fps:g} fps, model {model}, seed {seed}".format(**event))
        elif event["type"] == "progress":
            progress.start(f"{job} {event['stage']}", event["total"], event["done"])
        elif event["type"] == "chunk":
            progress.advance(f"{job} {event['stage']}", event["done"], event["chunk"], event["chunks"])
        elif event["type"] == "warning":
            progress.note(f"{job}: {event['message']}", warning=True)
        elif "jobs" in event:
            progress.say("{made} made, {there} there already, {failed} failed, {left} left".format(**event))
        else:
            progress.end(*(f"{job} {stage}" for stage in ("stream", "refine")))
            if event["ok"] and not json_output:
                _emit(event["output"], out)
        if not event.get("ok", True):
            error, where = event["error"], [f"line {event['line']}"] if job else []
            if event.get("field", "") not in error["message"]:
                where.append(event["field"])
            stopped = error["code"] == Interrupted.code
            _complain(": ".join([*(["error"] * (not stopped)), *where, error["message"]]), error["hint"])

    return tell


@app.command()
@options.knows(options.making, options.streaming, options.starting)
def plan(
    prompt: options.Prompt = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    device: options.DeviceOption = "auto",
    threads: options.Threads = None,
    memory: options.Memory = None,
    json_output: options.Json = False,
    **given: Any,
) -> None:
    """Show chunks, memory and time of a run without loading any weights.

    [b]streamt2v plan "a red ball over the sea" --frames 1200[/b]

    [b]streamt2v plan "a cat on the beach" --model streamingt2v --device cuda --memory 12[/b]
    """
    resolved = options.resolve(prompt=options.read_prompt(prompt), frames=frames, fps=fps, device=device, **given)
    jobs.check_wishes(resolved)
    report = planning.plan(resolved, device, memory, threads)
    _emit(json.dumps(dataclasses.asdict(report)) if json_output else plain(report.as_text()))


@app.command()
@options.knows(options.making, options.streaming, options.starting)
def bench(
    frames: Annotated[int, typer.Option("--frames", "-n", help="Length that the time is then told for.")] = 1200,
    device: options.DeviceOption = "auto",
    threads: options.Threads = None,
    memory: options.Memory = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    **given: Any,
) -> None:
    """Measure this machine: make a short video, throw it away, and show what a long one will take.

    From then on `plan` knows, for the same model, sizes and steps.

    [b]streamt2v bench[/b]

    [b]streamt2v bench --model streamingt2v --quality fast --size 720x720[/b]
    """
    prompt = "a red ball bouncing over the sea at sunset"
    resolved = options.resolve(prompt=prompt, frames=frames, device=device, **given)
    short = dataclasses.replace(resolved, num_frames=planning.short_length(resolved))
    with TemporaryDirectory(prefix="streamt2v-") as folder, _terminable():
        job = jobs.Job("generate", short, Path(folder) / "bench.mp4", device=device, threads=threads, memory=memory)
        jobs.check(job, _saying(quiet))
        with Progress(quiet=quiet, verbose=verbose) as progress:
            from streamt2v import pipeline

            pipeline.run(job, progress)
    report = planning.plan(resolved, device, memory, threads)
    _emit(json.dumps(dataclasses.asdict(report)) if json_output else report.as_text())


@app.command()
def info(
    video: Annotated[
        Path, typer.Argument(help="A video made by streamt2v, or an unfinished run of one.", show_default=False)
    ],
    json_output: options.Json = False,
) -> None:
    """Show the settings that made a video, read from the file itself.

    [b]streamt2v info ball.mp4[/b]
    """
    facts = jobs.describe_video(video)
    if json_output:
        _emit(json.dumps(facts))
        return
    for key, value in config.flatten(facts).items():
        _emit(plain(f"{key} = {value}"))


@app.command()
def evaluate(
    videos: Annotated[list[Path], typer.Argument(help="Videos to measure, of any origin.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What they show, for CLIP. Default: each video's own prompt.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Compare every frame with this video's: PSNR, SSIM.")
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Write an HTML page with plots and a contact sheet.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the scores, one row a video.")] = None,
    frames_csv: Annotated[
        Path | None, typer.Option("--frames-csv", help="Write what was measured at every frame, one row each.")
    ] = None,
    seams: Annotated[
        str | None,
        typer.Option("--seams", help="Frames where chunks begin: 16,24,32 or 16:1200:8. Default: the video's own."),
    ] = None,
    window: Annotated[int, typer.Option("--window", help="Frames that count as the first, and as the last.")] = 100,
    flow_size: Annotated[
        int, typer.Option("--flow-size", help="Square that frames are scaled to before the flow; less is faster.")
    ] = 720,
    clip: Annotated[
        str,
        typer.Option("--clip", help="auto (the published one if fetched, else demo), demo, hub:OWNER/NAME, none."),
    ] = "auto",
    clip_every: Annotated[int, typer.Option("--clip-every", help="CLIP looks at every so manieth frame.")] = 8,
    device: Annotated[str, typer.Option("--device", help="Where CLIP runs: auto, cpu, cuda, cuda:1, mps.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", "-f", help="Replace files that exist.")] = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure videos: scene cuts, motion and warp error (MAWE), CLIP, drift, seams, stagnation, flicker.

    Any length at the same memory. docs/metrics.md defines every score.

    [b]streamt2v evaluate ball.mp4 --report ball.html[/b]

    [b]streamt2v evaluate videos/*.mp4 --json[/b]

    [b]streamt2v evaluate ball_fast.mp4 --against ball.mp4[/b]
    """
    try:
        from streamt2v.metrics import evaluation, report
    except ImportError as error:
        hint = 'install what it needs with `pip install "streamt2v[metrics]"`'
        raise ConfigError(f"evaluate cannot start: {error}", hint) from error
    settings = evaluation.Settings(
        prompt, against, None if seams is None else evaluation.parse_seams(seams), window, flow_size, clip,
        clip_every, device,
    )  # fmt: skip
    targets = [target for target in (report_file, csv_file, frames_csv) if target is not None]
    for number, target in enumerate(targets):
        jobs.check_target(target, overwrite, *videos, against, *targets[:number])
    with _terminable("stopped; nothing was written"), Progress(quiet=quiet) as progress:
        results, failures = evaluation.evaluate(videos, settings, progress, _saying(quiet))
    for failure in failures[not results :]:
        _complain(f"error: {failure.message}", failure.hint)
    if not results:
        raise failures[0]
    pages = {
        report_file: report.as_html(results, settings),
        csv_file: report.videos_csv(results),
        frames_csv: report.frames_csv(results),
    }
    for path, page in pages.items():
        if path is not None:
            files.write_bytes(path, page.encode(errors="replace"))
    if json_output:
        _emit(json.dumps(report.as_json(results, settings), ensure_ascii=False, allow_nan=False))
    else:
        _emit(plain(report.as_text(results)))
    if failures:
        raise VideoError(f"{len(failures)} of {len(videos)} videos could not be measured", "the others are above")


@app.command()
def preview(
    source: Annotated[
        Path, typer.Argument(metavar="VIDEO", help="Any video, or an unfinished run of one.", show_default=False)
    ],
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", "-o", help="A .png is a contact sheet; .webp and .gif move. Default: a .png and a .webp."
        ),
    ] = None,
    width: Annotated[int, typer.Option("--width", help="Width of a frame, at most.", min=16, max=4096)] = 320,
    overwrite: Annotated[bool, typer.Option("--overwrite", "-f", help="Replace files that exist.")] = False,
) -> None:
    """Make small pictures of a video: a contact sheet of 24 frames, and a preview of 96 that moves.

    [b]streamt2v preview ball.mp4[/b]

    [b]streamt2v preview ball.mp4 -o ball.gif --width 160[/b]
    """
    named = runs.output_of(source)
    targets = output or [named.parent / f"{named.stem}_preview{kind}" for kind in (".png", ".webp")]
    for number, target in enumerate(targets):
        jobs.check_target(target, overwrite, named, *targets[:number])
    from streamt2v import preview

    for target in targets:
        preview.check(target)
    seen = jobs.look(source)
    for target in targets:
        preview.write(seen.video, target, width)
        _emit(str(target))


@app.command()
def report(
    video: Annotated[Path, typer.Argument(help="A video, or an unfinished run of one.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML file. Default: the video's name.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", "-f", help="Replace a file that exists.")] = False,
) -> None:
    """Write how a video was made as one HTML file: recipe, prompts, chunks, contact sheet.

    [b]streamt2v report ball.mp4[/b]

    [b]streamt2v report ball.mp4 -o made.html[/b]
    """
    named = runs.output_of(video)
    target = output or named.parent / f"{named.stem}.html"
    jobs.check_target(target, overwrite, named)
    from streamt2v import report

    files.write_bytes(target, report.as_html(jobs.look(video)).encode(errors="replace"))
    _emit(str(target))


@app.command()
def doctor(json_output: options.Json = False) -> None:
    """Check this machine: device, memory, ffmpeg, weights; what works and what to do.

    Exit code 4 if something is missing.

    [b]streamt2v doctor[/b]
    """
    from streamt2v.doctor import checks

    results = checks()
    if json_output:
        _emit(json.dumps([dataclasses.asdict(result) for result in results]))
    else:
        for result in results:
            _emit(f"{'ok ' if result.ok else 'BAD'} {result.name}: {result.found}")
            if not result.ok:
                _emit(f"    -> {result.advice}")
    if not all(result.ok for result in results):
        raise typer.Exit(WeightsError.exit_code)


@weights_app.command("list")
def weights_list(
    name: Annotated[
        str | None, typer.Argument(help="A model family: list its files and where they come from.", show_default=False)
    ] = None,
    json_output: options.Json = False,
) -> None:
    """List the model families: state, size, licence, what they are; or the files of one.

    [b]streamt2v weights list[/b]

    [b]streamt2v weights list streamingt2v[/b]
    """
    rows = weights.describe_files(weights.family(name)) if name else weights.describe_families()
    if json_output:
        _emit(json.dumps(rows))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        size = f"{row['bytes'] / 1e6:,.1f} MB" if row["bytes"] else "size unknown"
        _emit(f"{row['name']:<{width}}  {row['state']:<10} {size:>13}  {row['licence']}")
        _emit(f"    {row['what']}")


@weights_app.command("pull")
def weights_pull(
    name: Annotated[
        str,
        typer.Argument(
            help="A name that `weights list` shows.", show_default=False, autocompletion=options.names_of_weights
        ),
    ],
    source: Annotated[
        str, typer.Option("--source", help="Which published copy, where there are several: see `weights list NAME`.")
    ] = "",
    folder: Annotated[
        Path | None, typer.Option("--from", help="Folder with published files that are here already.")
    ] = None,
) -> None:
    """Fetch a model family and convert it to 16-bit safetensors; or a model that makes first frames, as it is.

    Says the size before it starts; goes on where it was stopped. Files can be placed by hand: published ones in any
    folder (--from), converted ones in the folder that `weights path NAME` prints. --offline makes no connection.

    [b]streamt2v weights pull streamingt2v[/b]

    [b]streamt2v weights pull streamingt2v --source original --from ~/downloads[/b]

    [b]streamt2v weights pull svd[/b]
    """
    from streamt2v.weights import convert as checkpoints

    with _terminable(FETCHING):
        if (family := weights.listed(name)) is None:
            if source or folder:
                raise ConfigError(f"{name} comes from its repository alone", "leave --source and --from out")
            initializers.locate(name, say)
        else:
            hub.pull(family, checkpoints.convert, say, source, folder)
            start = config.merge(config.preset(family.preset)).initialize.text_model
            if start != initializers.OWN:
                say(f"{start}, which makes the first frames:")
                initializers.locate(start, say)
    _emit(f"{name}: ready")


@weights_app.command("path")
def weights_path(name: options.WeightsName = None) -> None:
    """Print the folder of the weights, or of one name that `weights list` shows. STREAMT2V_HOME sets it.

    [b]streamt2v weights path streamingt2v[/b]
    """
    _emit(str(weights.folder_of(name) if name else home.path()))


@weights_app.command("verify")
def weights_verify(name: options.WeightsName = None) -> None:
    """Check every weight file, or those of one name, against recorded sizes and SHA-256.

    [b]streamt2v weights verify[/b]

    [b]streamt2v weights verify svd[/b]
    """
    for one in [name] if name else [row["name"] for row in weights.describe_families() if row["state"] != "absent"]:
        if (family := weights.listed(one)) is None:
            count = weights.verify_snapshot(one)
        else:
            weights.verify(family)
            count = sum(len(file.parts) for file in family.files)
        _emit(f"{one}: {count} files, all as recorded")


@weights_app.command("convert")
def weights_convert(
    source: Annotated[Path, typer.Argument(help="A published checkpoint, or a folder of it.", show_default=False)],
    destination: Annotated[Path, typer.Argument(help="Folder for the converted files.", show_default=False)],
) -> None:
    """Turn a published checkpoint into files that streamt2v loads: 16 bit, no pickle, no optimizer state.

    Known: streaming_t2v.ckpt, VidXTend (file or folder), the three files of MS-Vid2Vid-XL, OpenCLIP ViT-H-14.

    [b]streamt2v weights convert streaming_t2v.ckpt weights/[/b]
    """
    from streamt2v.weights import convert as checkpoints

    for path in checkpoints.convert(source, destination, say):
        _emit(str(path))


@app.command()
def train(
    part: Annotated[
        str,
        typer.Argument(
            help="vae, text, vision, images, base, decoder, cam, apm, joint, concatenated, image_to_video or judge."
        ),
    ],
    minutes: Annotated[float | None, typer.Option("--minutes", help="Stop after so many minutes.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Stop after so many optimiser steps.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of checkpoints, log and sample sheets.")] = Path(
        "training"
    ),
    resume_from: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Folder with weights to start from, such as streamt2v/demo. Default: start afresh."
        ),
    ] = None,
    device: options.DeviceOption = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Seed of data and initial weights.")] = 0,
    steady: Annotated[
        bool, typer.Option("--steady", help="Keep the learning rate to the end: this run will be continued.")
    ] = False,
    afresh: Annotated[bool, typer.Option("--afresh", help="Forget what an earlier run of this part left.")] = False,
) -> None:
    """Train one part of the demo family on the drawn world. The same command again goes on where it stopped.

    [b]streamt2v train images --minutes 60 --out training[/b]
    """
    from streamt2v import devices
    from streamt2v.training import loop

    loop.train(
        part, minutes=minutes, steps=steps, out=out, device=devices.resolve(device).name, seed=seed,
        resume_from=resume_from, steady=steady, afresh=afresh, log=say,
    )  # fmt: skip


def _print_version(asked: bool) -> None:
    if asked:
        print(f"streamt2v {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Make no connection; STREAMT2V_OFFLINE=1 means the same.")
    ] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours; NO_COLOR=1 means the same.")] = False,
) -> None:
    """Long videos from text on your own machine."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with the code that the error, if any, stands for."""
    argv = sys.argv[1:] if arguments is None else arguments
    end = argv.index("--") if "--" in argv else len(argv)
    asked, names = argv[:end], argv[end:]
    debug = "--debug" in asked
    if "--offline" in asked:
        os.environ |= dict.fromkeys(hub.OFFLINE, "1")
    if "--no-color" in asked:
        os.environ["NO_COLOR"] = "1"
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us: no file of ours may take its number
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt may hold what a terminal of ASCII cannot show
    anywhere = ("--debug", "--offline", "--no-color")
    try:
        with _terminable():
            app(
                options.paired([argument for argument in asked if argument not in anywhere] + names),
                prog_name="streamt2v",
            )
    except SystemExit as stop:
        if "--json" in asked and (said := getattr(stop.__context__, "format_message", None)):  # typer's usage errors
            _emit_failure(ConfigError(said()))
        raise
    except Exception as error:
        known = explained(error)
        if "--json" in asked:
            _emit_failure(known)
        if debug or known.exit_code == StreamT2VError.exit_code:
            raise
        _complain(known.message if isinstance(known, Interrupted) else f"error: {known.message}", known.hint)
        sys.exit(known.exit_code)
    sys.exit(0)


def _emit_failure(error: StreamT2VError) -> None:
    _emit(json.dumps(events.event("result", **events.failed(error))))


def _complain(message: str, hint: str) -> None:
    say(message)
    if hint:
        say(f"  {hint}")
