"""Options that several commands share, declared once and grouped by what they are about."""

import contextlib
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from streamt2v import config, weights
from streamt2v.config import Fit, Quality, Strength
from streamt2v.errors import ConfigError
from streamt2v.families.choose import OWN, PRIOR

Command = TypeVar("Command", bound=Callable[..., None])
Number = TypeVar("Number", int, float)
ADVANCED = "Advanced"
STEERING = "What is made"
RUNNING = "How the run behaves"
ALL = "all options"


def _panel(title: str | None) -> Callable[..., Any]:
    """Return a function that makes options of one help panel, from names, help text and arguments of `typer.Option`."""

    def option(*names_and_help: str, **more: Any) -> Any:
        *names, said = names_and_help
        return typer.Option(*names, help=said, rich_help_panel=title, **more)

    return option


option, _steering, advanced, _running = map(_panel, (None, STEERING, ADVANCED, RUNNING))


def argument(said: str, **more: Any) -> Any:
    """Return an argument with its help."""
    return typer.Argument(help=said, show_default=False, **more)


def _completing(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _among(choices: Any) -> Callable[[str], list[str]]:
    return _completing(lambda: get_args(choices))


def parse_rate(text: str | float) -> float:
    """Parse a rate such as ``24``, ``29.97`` or ``30000/1001``. Raises typer.BadParameter."""
    try:
        return float(config.parse_value("output.fps", str(text)))
    except ConfigError:
        raise typer.BadParameter(f"{text!r} is not a frame rate such as 24, 29.97 or 30000/1001") from None


def within(kind: Callable[[str], Number], low: Number, high: Number) -> Callable[[str | Number], Number]:
    """Return a parser of numbers in a range, which would take half of a narrow terminal as a range of typer."""

    def number(text: str | Number) -> Number:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(str(text))) <= high:
                return value
        raise typer.BadParameter(f"{str(text)!r} is no {'whole ' if kind is int else ''}number from {low} to {high}")

    return number


names_of_weights = _completing(lambda: [*weights.families(), *weights.helpers(), *weights.pipelines()])
_SIDE = within(int, 2, 16384)
_MODELS = _completing(lambda: [OWN, *weights.pipelines()])
_STARTS = _completing(lambda: [OWN, PRIOR, *weights.pipelines()])
_RATE = "Frames per second, such as 24 or 30000/1001. Default: "
_OUTPUT = (
    "The file to write: .mp4, .webm, .mov (ProRes), .gif or .webp; without an ending, a folder of PNGs. Default: "
    "date, prompt and seed."
)
_INIT = (
    "The model of the first frames: own, prior (own, from a picture's embedding that is drawn first), modelscope, "
    "animatediff, svd, hub:OWNER/NAME or a pipeline's folder."
)
_IMAGE_INIT = "The model that draws the picture --init starts from: sdxl, hub:OWNER/NAME, a folder, or PRIOR+DECODER."
_REFINER = "The model that refines: own, i2vgen-xl, wan, hub:OWNER/NAME or a folder. Default: set by the model."
_INTERPOLATE = "Make only every Nth frame and interpolate the others. Default: 1, all are made."
_FIT = "contain keeps the aspect ratio, cover crops, pad adds borders."
_MODEL = (
    "Model family, such as demo, streamingt2v or wan; hub:OWNER/NAME or the folder of a pipeline that can stream. "
    "Default: the best family that is installed and suits the device."
)
_QUALITY = "How much is computed: reference, balanced or fast. Default: set by the preset."
_STRENGTH = (
    "How far the refiner may depart from its input: faithful, balanced or creative. Default: faithful for a video that "
    "streamt2v did not make, else set by the preset."
)
_LORA = "Merge a LoRA (.safetensors) into the networks that draw, at a strength, 1 if none is given; repeatable."
_AT = "At a time (240 is a frame; 10s; 1:20), switch to another prompt or show a picture; repeatable."

# Options that some commands take individually; the others are declared in the groups below.
WeightsName = Annotated[str | None, argument("A name from `weights list`.", autocompletion=names_of_weights)]
Prompt = Annotated[str | None, argument("What to show; - reads it from standard input.")]
Frames = Annotated[
    str | None, option("--frames", "-n", "Exact number of frames to write, or a time: 10s, 2m, 1:20. Default: 24.")
]
Longer = Annotated[str | None, option("--frames", "-n", "Frames of the whole result, or a time: 10s, 2m, 1:20.")]
Duration = Annotated[str | None, option("--duration", "The same as --frames with a time: 10s, 2m, 1:20.")]
Count = Annotated[
    int, option("--count", "Videos to make, with seeds that follow and numbered names.", parser=within(int, 1, 10_000))
]
DryRun = Annotated[bool, option("--dry-run", "Show the plan, as `streamt2v plan` does, and make nothing.")]
Output = Annotated[Path | None, option("--output", "-o", _OUTPUT)]
Fps = Annotated[float | None, option("--fps", f"{_RATE}the model's; 8 for demo.", parser=parse_rate)]
SourceFps = Annotated[float | None, option("--fps", f"{_RATE}the source's.", parser=parse_rate)]
Image = Annotated[Path | None, _steering("--image", "Start from this picture.")]
At = Annotated[list[str] | None, _steering("--at", _AT, metavar="TIME PROMPT|PICTURE")]
Lora = Annotated[list[str] | None, _steering("--lora", _LORA, metavar="FILE[:STRENGTH]")]
Init = Annotated[str | None, _steering("--init", _INIT, autocompletion=_STARTS)]
ImageInit = Annotated[str | None, _steering("--image-init", _IMAGE_INIT, autocompletion=_MODELS)]
Interpolate = Annotated[int | None, _steering("--interpolate", _INTERPOLATE, parser=within(int, 1, 64))]
Refiner = Annotated[str | None, _steering("--refiner", _REFINER, autocompletion=_MODELS)]
Model = Annotated[str | None, option("--model", "-m", _MODEL, autocompletion=names_of_weights)]
Device = Annotated[str, _running("--device", "auto, cpu, cuda, cuda:1, mps.")]
Threads = Annotated[int | None, _running("--threads", "CPU threads. Default: all cores.", parser=within(int, 1, 4096))]
Memory = Annotated[
    float | None, _running("--memory", "GB it may use. Default: all that is free.", parser=within(float, 0.1, 1e6))
]
Json = Annotated[bool, _running("--json", "Print JSON on stdout: events where videos are made, and the result last.")]
Quiet = Annotated[bool, _running("--quiet", "-q", "Errors only.")]
Verbose = Annotated[bool, _running("--verbose", "-v", "Report more about each step.")]


def _panel_of(parameter: Parameter) -> int:
    """Return the place of an option's panel: the same for every command; those without one are first."""
    declared = next((part for part in getattr(parameter.annotation, "__metadata__", ())), None)
    return (None, STEERING, ADVANCED, RUNNING).index(getattr(declared, "rich_help_panel", None))


def knows(*groups: Callable[..., None], without: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Add the options of groups to a command, which receives them in its `**` parameter.

    Those named in `without` would change nothing there.
    """

    def extend(command: Command) -> Command:
        own = [p for p in signature(command).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        shared = [parameter for group in groups for parameter in signature(group).parameters.values()]
        known = [*own, *(parameter for parameter in shared if parameter.name not in without)]
        vars(command)["__signature__"] = Signature(sorted(known, key=_panel_of))
        return command

    return extend


def placing(
    size: Annotated[
        str | None,
        option("--size", "Box WxH to fit into. Default: the model's; 1280x720 for demo and footage."),
    ] = None,
    width: Annotated[
        int | None, option("--width", "Width instead of --size; alone it keeps the shape.", parser=_SIDE)
    ] = None,
    height: Annotated[
        int | None, option("--height", "Height instead of --size; alone it keeps the shape.", parser=_SIDE)
    ] = None,
    fit: Annotated[str | None, option("--fit", _FIT, autocompletion=_among(Fit))] = None,
    loop: Annotated[bool, _steering("--loop", "Make a loop: the last frame leads back to the first.")] = False,
    config_file: Annotated[Path | None, advanced("--config", "A TOML file of settings.")] = None,
    settings: Annotated[list[str] | None, advanced("--set", "Any setting, as section.key=value; repeatable.")] = None,
) -> None:
    """Options of every command that writes frames."""


@knows(placing)
def making(
    model: Model = None,
    seed: Annotated[int | None, option("--seed", "-s", "The seed. Default: random, printed and stored.")] = None,
    negative: Annotated[str | None, _steering("--negative", "--negative-prompt", "What to avoid.")] = None,
    quality: Annotated[str | None, _steering("--quality", _QUALITY, autocompletion=_among(Quality))] = None,
    interpolate: Interpolate = None,
    lora: Lora = None,
    strength: Annotated[str | None, _steering("--strength", _STRENGTH, autocompletion=_among(Strength))] = None,
    refiner: Refiner = None,
    refine_steps: Annotated[int | None, advanced("--refine-steps", "Steps of the refiner.")] = None,
    chunk: Annotated[int | None, advanced("--chunk", "Frames the refiner processes at once.")] = None,
    overlap: Annotated[int | None, advanced("--overlap", "Frames shared by neighbouring refiner chunks.")] = None,
    preset: Annotated[
        str | None, advanced("--preset", "A shipped preset by name.", autocompletion=_completing(config.presets))
    ] = None,
    compile: Annotated[
        bool | None, _running("--compile", "Compile the networks first: takes minutes once, then each step is faster.")
    ] = None,
) -> None:
    """Options of every command that makes frames; `asked.resolve` takes them by name."""


def streaming(
    at: At = None,
    timeline: Annotated[
        Path | None, _steering("--timeline", 'The same in a TOML or JSON file: {"0": "...", "10s": "..."}.')
    ] = None,
    until: Annotated[Path | None, _steering("--until", "The last frame shows this picture.")] = None,
    no_refine: Annotated[bool, _steering("--no-refine", "Stop after the streaming stage.")] = False,
    steps: Annotated[int | None, advanced("--steps", "Denoising steps of stages 1 and 2.")] = None,
    guidance: Annotated[float | None, advanced("--guidance", "--cfg", "Guidance of stages 1 and 2; 1 is off.")] = None,
) -> None:
    """Options of commands with a streaming stage."""


def starting(image: Image = None, init: Init = None, image_init: ImageInit = None) -> None:
    """Options of commands that start from nothing."""


def alone(
    resume: Annotated[bool, _running("--resume", "Continue an interrupted run.")] = False,
    resume_anyway: Annotated[
        bool, _running("--resume-anyway", "Continue it even with changed settings, which are recorded.")
    ] = False,
    preview: Annotated[Path | None, _running("--preview", "Write a PNG contact sheet, updated during the run.")] = None,
) -> None:
    """Options of commands that make one video."""


def computing(device: Device = "auto", threads: Threads = None, memory: Memory = None) -> None:
    """Where a run computes, and with how much."""


def writing(
    audio: Annotated[Path | None, _steering("--audio", "A file whose sound the video gets, cut to its length.")] = None,
    overwrite: Annotated[bool, _running("--overwrite", "-f", "Replace an existing output.")] = False,
    keep_run: Annotated[bool, _running("--keep-run", "Keep the run directory OUT.streamt2v/ after success.")] = False,
) -> None:
    """What is written, and what happens to existing files."""


def talking(json_output: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """What a command prints."""


class LeveledCommand(typer.core.TyperCommand):
    """A command whose --help leaves out the panels that --help-all shows."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        rare = [p for p in self.params if getattr(p, "rich_help_panel", None) in (ADVANCED, RUNNING)]
        short = ctx.find_root().obj != ALL
        for parameter in rare:
            vars(parameter)["hidden"] = short
        super().format_help(ctx, formatter)
        if rare and short:
            print(f"{len(rare)} more options: {ctx.command_path} --help-all")


# What people type, and what it is called here.
_MEANT = {
    "--length": "--duration", "--seconds": "--duration", "--num-frames": "--frames", "--video-length": "--frames",
    "--framerate": "--fps", "--frame-rate": "--fps", "--resolution": "--size", "--out": "-o", "--output-file": "-o",
    "--cfg-scale": "--guidance", "--guidance-scale": "--guidance", "--neg": "--negative",
    "--num-inference-steps": "--steps", "--sampling-steps": "--steps", "--denoise": "--strength",
    "--force": "--overwrite", "--seamless": "--loop", "--looping": "--loop",
    "--end-image": "--until", "--last-frame": "--until",
    "--adapter": "--lora", "--lora-scale": "--lora", "--lora-strength": "--lora",
    "--enhancer": "--refiner", "--smooth": "--interpolate", "--rife": "--interpolate",
    "--yes": "--overwrite", "--music": "--audio", "--sound": "--audio", "--soundtrack": "--audio",
    "--variations": "--count", "--batch-count": "--count", "--start-image": "--image", "--first-frame": "--image",
    "--gpu": "--device", "--vram": "--memory", "--upscale": "streamt2v refine", "--continue": "--resume",
    "make": "generate", "create": "generate", "run": "generate", "new": "generate", "upscale": "refine",
    "enhance": "refine", "continue": "resume (a run) or extend (a video)", "lengthen": "extend", "show": "info",
    "estimate": "plan", "check": "doctor", "models": "weights", "download": "weights pull", "score": "evaluate",
    "measure": "evaluate or bench", "thumbnail": "preview", "queue": "batch", "repeat": "rerun",
}  # fmt: skip


def meant(said: str, arguments: list[str]) -> str:
    """Return a hint for a usage error that another word would mend, "" if none would."""
    words = re.split(r"[\s:'\".]+", said)
    if "unexpected extra argument" in said:
        extra = said.rpartition("(")[2].rstrip(".)").split()
        if arguments[0] not in ("generate", "plan"):
            return "one at a time; what is written is named with -o" if extra else ""
        began = 1 if not arguments[1].startswith("-") else max(1, arguments.index(extra[0]) - 1)
        return f'quote the prompt: streamt2v {arguments[0]} "{" ".join([arguments[began], *extra][:8])}"'
    found = [near for word in words for near in difflib.get_close_matches(word, _MEANT, 1, 0.85)]
    return f"here that is {_MEANT[found[0]]}" if found else ""


def read_prompt(prompt: str | None) -> str | None:
    """Return a prompt, read from standard input when it is ``-``."""
    # Invalid UTF-8 is kept as it is; a later check names it.
    return sys.stdin.buffer.read().decode(errors="surrogateescape").strip() if prompt == "-" else prompt


def paired(arguments: list[str]) -> list[str]:
    """Join the two values of every ``--at`` to TIME=PROMPT, because typer repeats only options with one value."""
    joined: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        joined.append(argument)
        if argument == "--at":
            joined.append("=".join(value for value in (next(rest, None), next(rest, None)) if value is not None))
        elif argument == "--":
            joined += rest
    return joined
