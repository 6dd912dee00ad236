"""The command line: arguments to a config, one call into the pipeline, results to stdout, everything else to stderr."""

import dataclasses
import json
import os
import secrets
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from streamt2v import __version__, config, jobs, planning, weights
from streamt2v.config import Fit, Quality, RunConfig
from streamt2v.errors import ConfigError, Interrupted, StreamT2VError
from streamt2v.progress import Progress

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

ADVANCED = "Advanced"
STEERING = "What is made"
RUNNING = "How the run behaves"

Frames = Annotated[int, typer.Option("--frames", "-n", help="Frames of the video: exactly so many are written.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="The mp4 to write. Default: date, prompt and seed.")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Model family. Default: the best whose weights are here.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of every random draw. Default: random, printed, stored.")
]
Fps = Annotated[float | None, typer.Option("--fps", help="Frames per second.")]
Size = Annotated[str | None, typer.Option("--size", help="Box WxH that the video fits into, for example 1280x720.")]
FitOption = Annotated[
    Fit | None, typer.Option("--fit", help="contain keeps the aspect ratio, cover crops, pad adds borders.")
]
NoRefine = Annotated[
    bool, typer.Option("--no-refine", help="Stop after the streaming stage.", rich_help_panel=STEERING)
]
Negative = Annotated[str | None, typer.Option("--negative", help="What to avoid.", rich_help_panel=STEERING)]
Image = Annotated[Path | None, typer.Option("--image", help="Start from this picture.", rich_help_panel=STEERING)]
QualityOption = Annotated[
    Quality | None,
    typer.Option("--quality", help="Step counts: reference, balanced or fast.", rich_help_panel=STEERING),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps of stages 1 and 2.", rich_help_panel=ADVANCED)
]
Guidance = Annotated[
    float | None, typer.Option("--guidance", help="Guidance of stages 1 and 2; 1 is off.", rich_help_panel=ADVANCED)
]
RefineSteps = Annotated[
    int | None, typer.Option("--refine-steps", help="Steps of the refiner.", rich_help_panel=ADVANCED)
]
Chunk = Annotated[
    int | None, typer.Option("--chunk", help="Frames the refiner handles at once.", rich_help_panel=ADVANCED)
]
Overlap = Annotated[
    int | None, typer.Option("--overlap", help="Frames shared by refiner chunks.", rich_help_panel=ADVANCED)
]
Preset = Annotated[str | None, typer.Option("--preset", help="A shipped preset by name.", rich_help_panel=ADVANCED)]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A TOML file of settings.", rich_help_panel=ADVANCED)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, as section.key=value; repeatable.", rich_help_panel=ADVANCED),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=RUNNING)]
Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads. Default: all cores.", rich_help_panel=RUNNING)
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run that was interrupted.", rich_help_panel=RUNNING)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", "-f", help="Replace an existing output.", rich_help_panel=RUNNING)
]
KeepRun = Annotated[
    bool, typer.Option("--keep-run", help="Keep OUT.streamt2v/ after success.", rich_help_panel=RUNNING)
]
Preview = Annotated[
    Path | None, typer.Option("--preview", help="A PNG contact sheet, renewed while running.", rich_help_panel=RUNNING)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout at the end.", rich_help_panel=RUNNING)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.", rich_help_panel=RUNNING)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more about each step.", rich_help_panel=RUNNING)]


def _say(text: str) -> None:
    print(plain(text), file=sys.stderr, flush=True)


def plain(text: str) -> str:
    """Return text without control and bidirectional characters, so that a prompt cannot steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cf", "Cs"})


def parse_size(text: str) -> tuple[int, int]:
    """Turn ``WxH`` into (height, width).

    Raises:
        ConfigError: not two whole numbers with an x between them.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ConfigError(f"--size is {text!r}, it must look like 1280x720 (width x height)")
    return int(height), int(width)


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Turn ``key=value`` texts into {dotted key: value}.

    Raises:
        ConfigError: no equals sign, unknown key, wrong type.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set is {pair!r}, it must look like stream.eta=0.5")
        parsed[key.strip()] = config.parse_value(key.strip(), text.strip())
    return parsed


@dataclasses.dataclass(frozen=True)
class Given:
    """What the shared options say, before it is merged with presets and files."""

    model: str | None = None
    preset: str | None = None
    quality: Quality | None = None
    config_file: Path | None = None
    settings: list[str] | None = None
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    size: str | None = None

    def resolve(self) -> RunConfig:
        """Merge everything in the order of precedence into one checked config."""
        from_file = config.flatten(config.read_toml(self.config_file)) if self.config_file else {}
        settings = parse_settings(self.settings or [])
        model = self.model or settings.get("model") or from_file.get("model") or weights.default_family()
        family = weights.family(model)
        flags = {key: value for key, value in self.values.items() if value is not None}
        if self.size is not None:
            flags["output.height"], flags["output.width"] = parse_size(self.size)
        layers = [config.preset(family.preset, None if self.preset else self.quality)]
        if self.preset:
            layers.append(config.preset(self.preset, self.quality))
        return config.merge(*layers, from_file, settings, flags, {"model": model})


def _common_values(**named: Any) -> dict[str, Any]:
    """Spread the flags that reach several stages over their dotted keys."""
    keys = {
        "steps": ("initialize.num_inference_steps", "stream.num_inference_steps"),
        "guidance": ("initialize.guidance_scale", "initialize.image_guidance_scale", "stream.guidance_scale"),
        "negative": ("negative_prompt",),
        "refine_steps": ("refine.num_inference_steps",),
        "chunk": ("refine.chunk",),
        "overlap": ("refine.overlap",),
        "fps": ("output.fps",),
        "fit": ("output.fit",),
        "frames": ("num_frames",),
        "prompt": ("prompt",),
        "seed": ("seed",),
    }
    return {key: value for name, value in named.items() for key in keys[name]}


def _seed(seed: int | None, resume_from: Path | None) -> int | None:
    """Return the asked seed, the interrupted run's one when resuming, or a random one."""
    if seed is not None:
        return seed
    if resume_from is not None:
        from streamt2v import runs

        stored = runs.recorded_seed(resume_from)
        if stored is not None:
            return stored
    return secrets.randbelow(2**31)


def default_output(prompt: str, seed: int) -> Path:
    """Return a file name made of the date, the prompt's letters and the seed."""
    words = unicodedata.normalize("NFKC", prompt).lower()
    slug = "-".join("".join(c if c.isalnum() else " " for c in words).split())
    slug = slug.encode()[:48].decode(errors="ignore").strip("-") or "video"
    return Path(f"{datetime.now():%Y%m%d-%H%M%S}_{slug}_{seed}.mp4")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show; - reads it from standard input.", show_default=False)],
    frames: Frames = 24,
    output: Output = None,
    model: Model = None,
    seed: Seed = None,
    fps: Fps = None,
    size: Size = None,
    fit: FitOption = None,
    no_refine: NoRefine = False,
    negative: Negative = None,
    image: Image = None,
    quality: QualityOption = None,
    steps: Steps = None,
    guidance: Guidance = None,
    refine_steps: RefineSteps = None,
    chunk: Chunk = None,
    overlap: Overlap = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    device: DeviceOption = "auto",
    threads: Threads = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    keep_run: KeepRun = False,
    preview: Preview = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a video from a prompt.

    [b]streamt2v generate "a red ball bouncing over the sea at sunset" --frames 240 -o ball.mp4[/b]

    [b]streamt2v generate "a blue star drifting left" --image start.png --frames 48[/b]
    """
    if prompt == "-":
        prompt = sys.stdin.read().strip()
    values = _common_values(
        prompt=prompt, frames=frames, negative=negative, steps=steps, guidance=guidance,
        refine_steps=refine_steps, chunk=chunk, overlap=overlap, fps=fps, fit=fit,
    )  # fmt: skip
    values["seed"] = _seed(seed, output if resume else None)
    values["image"] = str(image) if image else None
    values["refine.enabled"] = False if no_refine else None
    given = Given(model, preset, quality, config_file, settings, values, size)
    resolved = given.resolve()
    target = output or default_output(prompt, resolved.seed)
    _run(
        "generate", resolved, None, target, device=device, threads=threads, resume=resume, overwrite=overwrite,
        keep_run=keep_run, preview=preview, json_output=json_output, quiet=quiet, verbose=verbose,
        native_size=no_refine and size is None,
    )  # fmt: skip


@app.command()
def refine(
    source: Annotated[Path, typer.Argument(help="The video to refine.", show_default=False)],
    output: Output = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What it shows. Default: the video's own prompt.")
    ] = None,
    model: Model = None,
    seed: Seed = None,
    fps: Annotated[float | None, typer.Option("--fps", help="Frames per second. Default: the source's.")] = None,
    size: Size = None,
    fit: FitOption = None,
    negative: Negative = None,
    quality: QualityOption = None,
    refine_steps: RefineSteps = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Guidance; 1 is off.", rich_help_panel=ADVANCED)
    ] = None,
    chunk: Chunk = None,
    overlap: Overlap = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    device: DeviceOption = "auto",
    threads: Threads = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    keep_run: KeepRun = False,
    preview: Preview = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Refine a video of any length: same frames, same sound, more detail.

    [b]streamt2v refine ball.mp4 -o ball_hd.mp4 --size 1280x720[/b]

    [b]streamt2v refine ball.mp4 --prompt "a red ball over the sea" --refine-steps 8 -o better.mp4[/b]
    """
    found = jobs.inspect_source(source)
    values = _common_values(
        prompt=prompt if prompt is not None else found.prompt, frames=found.frames, negative=negative,
        refine_steps=refine_steps, chunk=chunk, overlap=overlap, fit=fit, fps=fps if fps is not None else found.fps,
    )  # fmt: skip
    values["refine.guidance_scale"] = guidance
    values["seed"] = _seed(seed, output if resume else None)
    resolved = Given(model, preset, quality, config_file, settings, values, size).resolve()
    _run(
        "refine", resolved, source, output or source.with_name(f"{source.stem}_refined.mp4"), device=device,
        threads=threads, resume=resume, overwrite=overwrite, keep_run=keep_run, preview=preview,
        json_output=json_output, quiet=quiet, verbose=verbose,
    )  # fmt: skip


def _run(
    command: str,
    resolved: RunConfig,
    source: Path | None,
    target: Path,
    *,
    device: str,
    threads: int | None,
    resume: bool,
    overwrite: bool,
    keep_run: bool,
    preview: Path | None,
    json_output: bool,
    quiet: bool,
    verbose: bool,
    native_size: bool = False,
) -> None:
    job = jobs.Job(
        command=command, config=resolved, source=source, output=target, device=device, threads=threads, resume=resume,
        overwrite=overwrite, keep_run=keep_run, preview=preview, native_size=native_size,
    )  # fmt: skip
    # Everything cheap is checked before torch is imported or a model loads.
    notices = jobs.check(job)
    if not quiet:
        for notice in notices:
            _say(notice)
        length = f"{resolved.num_frames} frames at {resolved.output.fps:g} fps"
        _say(f"{target}: {length}, model {resolved.model}, seed {resolved.seed}")
    with _terminable(), Progress(quiet=quiet, verbose=verbose) as progress:
        from streamt2v import pipeline

        result = pipeline.run(job, progress)
    if json_output:
        print(json.dumps(result.as_dict(), ensure_ascii=False))
    else:
        print(result.output)


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the run can save its partial file as it does on Ctrl-C."""

    def stop(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise Interrupted("terminated", exit_code=143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def plan(
    prompt: Annotated[str, typer.Argument(help="What to show.", show_default=False)],
    frames: Frames = 24,
    model: Model = None,
    size: Size = None,
    no_refine: NoRefine = False,
    quality: QualityOption = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    json_output: Json = False,
) -> None:
    """Show chunks, memory and time of a run without loading any weights.

    [b]streamt2v plan "a red ball over the sea" --frames 1200[/b]
    """
    values = _common_values(prompt=prompt, frames=frames)
    values["refine.enabled"] = False if no_refine else None
    resolved = Given(model, preset, quality, config_file, settings, values, size).resolve()
    report = planning.plan(resolved)
    print(json.dumps(report.as_dict()) if json_output else report.as_text())


@app.command()
def info(
    video: Annotated[Path, typer.Argument(help="A video made by streamt2v.", show_default=False)],
    json_output: Json = False,
) -> None:
    """Show the settings that made a video, read from the file itself.

    [b]streamt2v info ball.mp4[/b]
    """
    facts = jobs.describe_video(video)
    if json_output:
        print(json.dumps(facts, ensure_ascii=False))
        return
    for key, value in config.flatten(facts).items():
        print(plain(f"{key} = {value}"))


@app.command()
def doctor(json_output: Json = False) -> None:
    """Check this machine: device, memory, ffmpeg, weights; what works and what to do.

    [b]streamt2v doctor[/b]
    """
    from streamt2v.doctor import checks

    results = checks()
    if json_output:
        print(json.dumps([dataclasses.asdict(result) for result in results]))
    else:
        for result in results:
            print(f"{'ok ' if result.ok else 'BAD'} {result.name}: {result.found}")
            if not result.ok:
                print(f"    -> {result.advice}")
    if not all(result.ok for result in results):
        raise typer.Exit(1)


@weights_app.command("list")
def weights_list(json_output: Json = False) -> None:
    """List the model families: state, size, licence.

    [b]streamt2v weights list[/b]
    """
    rows = [
        {
            "name": family.name,
            "state": "missing" if weights.missing(family) else "ok",
            "megabytes": round(family.num_bytes / 1e6, 1),
            "licence": family.licence,
            "title": family.title,
        }
        for family in weights.families().values()
    ]
    if json_output:
        print(json.dumps(rows))
        return
    for row in rows:
        print("{name:<14} {state:<8} {megabytes:>8} MB  {licence:<12} {title}".format(**row))


@weights_app.command("verify")
def weights_verify(model: Model = None) -> None:
    """Check every weight file against its recorded size and SHA-256.

    [b]streamt2v weights verify[/b]
    """
    chosen = [weights.family(model)] if model else list(weights.families().values())
    for family in chosen:
        weights.verify(family)
        print(f"{family.name}: {len(family.files)} files, all as recorded")


@app.command()
def train(
    part: Annotated[str, typer.Argument(help="vae, clip, base, cam, apm, image_to_video, refiner or judge.")],
    minutes: Annotated[float | None, typer.Option("--minutes", help="Stop after so many minutes.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Stop after so many optimiser steps.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of checkpoints, log and sample sheets.")] = Path(
        "training"
    ),
    resume_from: Annotated[
        Path | None, typer.Option("--from", help="Folder with the weights to start from. Default: the shipped ones.")
    ] = None,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Seed of data and initial weights.")] = 0,
    threads: Threads = None,
) -> None:
    """Train one part of the demo family on the procedural world.

    [b]streamt2v train base --minutes 30 --out training[/b]
    """
    if minutes is None and steps is None:
        raise ConfigError("train needs an end", "give --minutes or --steps")
    from streamt2v import devices
    from streamt2v.training import loop

    devices.set_threads(threads)
    with _terminable():
        loop.train(
            part, minutes=minutes, steps=steps, out=out, device=devices.resolve(device).name, seed=seed,
            resume_from=resume_from, log=_say,
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
) -> None:
    """Long videos from text on your own machine."""


def _report(error: StreamT2VError) -> None:
    _say(f"error: {error.message}")
    if error.hint:
        _say(f"  {error.hint}")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with the code of design's table."""
    argv = sys.argv[1:] if arguments is None else arguments
    sys.exit(_guarded(lambda: app(argv, standalone_mode=True), "--debug" in argv))


def _guarded(call: Callable[[], Any], debug: bool) -> int:
    try:
        call()
    except StreamT2VError as error:
        if debug:
            raise
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output went away: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        if debug:
            raise
        _report(StreamT2VError("out of memory", "try a smaller --size or --chunk"))
        return 6
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0
