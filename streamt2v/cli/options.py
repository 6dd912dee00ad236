"""Options that several commands share, and how they become one checked config."""

import sys
from collections.abc import Callable, Iterable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from streamt2v import config, weights
from streamt2v.config import Fit, Quality, Strength
from streamt2v.errors import ConfigError
from streamt2v.families.choose import OWN

Command = TypeVar("Command", bound=Callable[..., None])
ADVANCED = "Advanced"
STEERING = "What is made"
RUNNING = "How the run behaves"


def _panel(title: str | None) -> Callable[..., Any]:
    """Return what makes options of one panel of the help: of names, the text, and what else `typer.Option` takes."""

    def option(*names_and_help: str, **more: Any) -> Any:
        *names, said = names_and_help
        return typer.Option(*names, help=said, rich_help_panel=title, **more)

    return option


_main, _steering, _advanced, _running = map(_panel, (None, STEERING, ADVANCED, RUNNING))


def _completing(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def parse_rate(text: str | float) -> float:
    """Turn ``24``, ``29.97`` or ``30000/1001`` into a rate. Raises typer.BadParameter: none of these."""
    try:
        return float(config.parse_value("output.fps", str(text)))
    except ConfigError:
        raise typer.BadParameter(f"{text!r} is no rate; write it like 24, 29.97 or 30000/1001") from None


names_of_weights = _completing(lambda: [*weights.families(), *weights.pipelines()])
_INITIALIZERS = _completing(lambda: [OWN, *weights.pipelines()])
WeightsName = Annotated[
    str | None,
    typer.Argument(help="A name that `weights list` shows.", show_default=False, autocompletion=names_of_weights),
]
Prompt = Annotated[str | None, typer.Argument(help="What to show; - reads it from standard input.", show_default=False)]
Frames = Annotated[
    int | None, _main("--frames", "-n", "Frames of the video: exactly so many are written. Default: 24.")
]
Output = Annotated[
    Path | None,
    _main(
        "--output",
        "-o",
        "The file to write: .mp4, .webm, .mov (ProRes), .gif, .webp; without ending a folder of PNGs. Default: date, "
        "prompt and seed.",
    ),
]
Model = Annotated[
    str | None,
    _main(
        "--model", "-m", "Model family. Default: the best whose weights are here and which suits the device.",
        autocompletion=_completing(weights.families),
    ),
]  # fmt: skip
Seed = Annotated[int | None, _main("--seed", "Seed of every random draw. Default: random, printed, stored.")]
Fps = Annotated[
    float | None,
    _main("--fps", "Frames per second, such as 24 or 30000/1001. Default: the model's, 8 for demo.", parser=parse_rate),
]
SourceFps = Annotated[
    float | None,
    _main("--fps", "Frames per second, such as 24 or 30000/1001. Default: the source's.", parser=parse_rate),
]
Size = Annotated[
    str | None, _main("--size", "Box WxH that the video fits into. Default: the model's, 256x144 for demo.")
]
FitOption = Annotated[
    str | None,
    _main(
        "--fit", "contain keeps the aspect ratio, cover crops, pad adds borders.",
        autocompletion=_completing(lambda: get_args(Fit)),
    ),
]  # fmt: skip
NoRefine = Annotated[bool, _steering("--no-refine", "Stop after the streaming stage.")]
At = Annotated[
    list[str] | None,
    _steering("--at", "Another prompt from a time on: 240 (a frame), 10s, 1:20; repeatable.", metavar="TIME PROMPT"),
]
TimelineFile = Annotated[
    Path | None, _steering("--timeline", 'Prompts over time in a TOML or JSON file: {"0": "...", "10s": "..."}.')
]
Negative = Annotated[str | None, _steering("--negative", "What to avoid.")]
Image = Annotated[Path | None, _steering("--image", "Start from this picture.")]
Init = Annotated[
    str | None,
    _steering(
        "--init",
        "Who makes the first frames: own, modelscope, animatediff, svd, hub:OWNER/NAME or a pipeline's folder.",
        autocompletion=_INITIALIZERS,
    ),
]
ImageInit = Annotated[
    str | None,
    _steering(
        "--image-init",
        "Who draws the picture that --init starts from: sdxl, hub:OWNER/NAME or a folder; PRIOR+DECODER for two.",
        autocompletion=_INITIALIZERS,
    ),
]
QualityOption = Annotated[
    str | None,
    _steering(
        "--quality",
        "How much is computed: reference, balanced or fast; by default as the preset says.",
        autocompletion=_completing(lambda: get_args(Quality)),
    ),
]
StrengthOption = Annotated[
    str | None,
    _steering(
        "--strength",
        "How far the refiner may go from what it is given: faithful, balanced or creative. Default: faithful for a "
        "video that streamt2v did not make, else as the preset says.",
        autocompletion=_completing(lambda: get_args(Strength)),
    ),
]
Steps = Annotated[int | None, _advanced("--steps", "Denoising steps of stages 1 and 2.")]
Guidance = Annotated[float | None, _advanced("--guidance", "Guidance of stages 1 and 2; 1 is off.")]
RefineSteps = Annotated[int | None, _advanced("--refine-steps", "Steps of the refiner.")]
Chunk = Annotated[int | None, _advanced("--chunk", "Frames the refiner handles at once.")]
Overlap = Annotated[int | None, _advanced("--overlap", "Frames shared by refiner chunks.")]
Preset = Annotated[
    str | None, _advanced("--preset", "A shipped preset by name.", autocompletion=_completing(config.presets))
]
ConfigFile = Annotated[Path | None, _advanced("--config", "A TOML file of settings.")]
Settings = Annotated[list[str] | None, _advanced("--set", "Any setting, as section.key=value; repeatable.")]
DeviceOption = Annotated[str, _running("--device", "auto, cpu, cuda, cuda:1, mps.")]
Threads = Annotated[int | None, _running("--threads", "CPU threads. Default: all cores.", min=1)]
Memory = Annotated[float | None, _running("--memory", "GB it may take. Default: what is free.", min=0.1, max=1e6)]
Compile = Annotated[
    bool | None, _running("--compile", "Compile the networks first: minutes once, then every step is faster.")
]
Resume = Annotated[bool, _running("--resume", "Continue the run that was interrupted.")]
ResumeAnyway = Annotated[bool, _running("--resume-anyway", "The same with other settings, which is recorded.")]
Overwrite = Annotated[bool, _running("--overwrite", "-f", "Replace an existing output.")]
KeepRun = Annotated[bool, _running("--keep-run", "Keep OUT.streamt2v/ after success.")]
Preview = Annotated[Path | None, _running("--preview", "A PNG contact sheet, renewed while running.")]
Json = Annotated[bool, _running("--json", "Print one JSON object on stdout at the end.")]
Quiet = Annotated[bool, _running("--quiet", "-q", "Errors only.")]
Verbose = Annotated[bool, _running("--verbose", "-v", "Say more about each step.")]


def making(
    model: Model = None,
    seed: Seed = None,
    size: Size = None,
    fit: FitOption = None,
    negative: Negative = None,
    quality: QualityOption = None,
    strength: StrengthOption = None,
    refine_steps: RefineSteps = None,
    chunk: Chunk = None,
    overlap: Overlap = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    compile: Compile = None,
) -> None:
    """What every command that makes frames knows; `resolve` takes these by name."""


def streaming(
    at: At = None,
    timeline: TimelineFile = None,
    no_refine: NoRefine = False,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """What those with a streaming stage know besides."""


def starting(image: Image = None, init: Init = None, image_init: ImageInit = None) -> None:
    """What those know that begin from nothing."""


def alone(resume: Resume = False, resume_anyway: ResumeAnyway = False, preview: Preview = None) -> None:
    """How a run of one video behaves."""


def running(
    device: DeviceOption = "auto",
    threads: Threads = None,
    memory: Memory = None,
    overwrite: Overwrite = False,
    keep_run: KeepRun = False,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """How a run behaves."""


def knows(*groups: Callable[..., None]) -> Callable[[Command], Command]:
    """Give a command the options of groups; it receives them in its `**` parameter."""

    def extend(command: Command) -> Command:
        own = [p for p in signature(command).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        shared = [parameter for group in groups for parameter in signature(group).parameters.values()]
        vars(command)["__signature__"] = Signature([*own, *shared])
        return command

    return extend


def read_prompt(prompt: str | None) -> str | None:
    """Return a prompt, read from standard input when it is ``-``."""
    # Bytes that are no text are kept as they are, for the check that names them.
    return sys.stdin.buffer.read().decode(errors="surrogateescape").strip() if prompt == "-" else prompt


def paired(arguments: list[str]) -> list[str]:
    """Join the two values of every ``--at``, as typer repeats only options of one: TIME PROMPT to TIME=PROMPT."""
    joined: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        joined.append(argument)
        if argument == "--at":
            joined.append("=".join(value for value in (next(rest, None), next(rest, None)) if value is not None))
        elif argument == "--":
            joined += rest
    return joined
