"""Options that several commands share, and how they become one checked config."""

import json
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer

from streamt2v import config, devices, jobs, weights
from streamt2v.config import Fit, Quality, RunConfig, Strength
from streamt2v.errors import ConfigError, FieldError
from streamt2v.initializers import OWN, named

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


# Flags that set one thing in several places, or whose name differs from the setting's.
_KEYS = {
    "steps": ("initialize.num_inference_steps", "stream.num_inference_steps"),
    "guidance": ("initialize.guidance_scale", "initialize.image_guidance_scale", "stream.guidance_scale"),
    "refine_guidance": ("refine.guidance_scale",),
    "negative": ("negative_prompt",),
    "refine_steps": ("refine.num_inference_steps",),
    "chunk": ("refine.chunk",),
    "overlap": ("refine.overlap",),
    "fps": ("output.fps",),
    "fit": ("output.fit",),
    "frames": ("num_frames",),
    "init": ("initialize.text_model", "initialize.picture_model"),
    "image_init": ("initialize.text_to_image",),
}


@dataclass(frozen=True)
class Field:
    """What a row of a batch may say: the settings that it stands for, else the parameter that takes it."""

    spec: Mapping[str, Any]
    keys: tuple[str, ...] = ()
    parameter: str = ""


def fields_of(command: Callable[..., None]) -> dict[str, Field]:
    """Return every dotted setting, and every long flag of a command without its dashes."""
    settings, taken = config.describe(), signature(resolve).parameters
    fields = {key: Field(spec, (key,)) for key, spec in settings.items()}
    for parameter in signature(command).parameters.values():
        kinds, option = get_args(parameter.annotation)[:2]
        if isinstance(option, typer.models.OptionInfo):
            kind = next((kind for kind in get_args(kinds) if kind is not NoneType), kinds)
            own = (parameter.name,) if parameter.name in settings and parameter.name not in taken else ()
            keys = _KEYS.get(parameter.name, own)
            spec = settings[keys[0]] if keys else {"type": kind, "low": option.min, "high": option.max}
            # As typer has them in an annotation: the first name stands where a default would.
            names = [name for name in map(str, (option.default, *(option.param_decls or ()))) if name.startswith("--")]
            fields[names[0].removeprefix("--")] = Field(spec, keys, parameter.name)
    return fields


def parse_row(row: Mapping[str, Any], fields: Mapping[str, Field]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn {field: value} into {dotted key: value} and what has no key: {parameter: value}.

    Raises:
        FieldError: an unknown field, or a value of another type or out of range.
    """
    settings, arguments = dict[str, Any](), dict[str, Any]()
    for name, given in row.items():
        if name not in fields:
            raise FieldError(name, f"unknown field {name!r}", config.nearest(name, list(fields)))
        field, value = fields[name], given
        try:
            kind = field.spec["type"]
            if get_origin(kind) is not list:
                value = config.checked(name, {**field.spec, "type": str} if kind is Path else field.spec, given)
            elif not isinstance(given, list) or not all(isinstance(part, str) for part in given):
                raise ConfigError(f"{name} is {given!r}, it must be a list of texts")
            if name == "size":
                settings["output.height"], settings["output.width"] = parse_size(value)
        except ConfigError as error:
            raise FieldError(name, error.message, error.hint) from None
        if name == "no-refine":
            settings["refine.enabled"] = not value
        elif field.keys:
            settings.update(dict.fromkeys(field.keys, value))
        elif name != "size":
            arguments[field.parameter] = Path(value) if kind is Path else value
    return settings, arguments


def read_prompt(prompt: str | None) -> str | None:
    """Return a prompt, read from standard input when it is ``-``."""
    # Bytes that are no text are kept as they are, for the check that names them.
    return sys.stdin.buffer.read().decode(errors="surrogateescape").strip() if prompt == "-" else prompt


def parse_size(text: str) -> tuple[int, int]:
    """Turn ``WxH`` into (height, width).

    Raises:
        ConfigError: not two whole numbers with an x between them.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(text) < 20):
        raise ConfigError(f"--size is {text!r}, it must look like 1280x720 (width x height)")
    return int(height), int(width)


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


def parse_time(text: str, fps: float) -> int:
    """Turn a time into a frame: ``240`` is one, ``10s`` and ``1:20`` (minutes:seconds) are where it is in the video.

    Raises:
        ConfigError: none of these.
    """
    found = re.fullmatch(r"([0-9]{1,9})|([0-9]{1,9}(?:\.[0-9]{1,9})?)s|([0-9]{1,7}):([0-5]?[0-9])", text.strip())
    if not found:
        raise ConfigError(f"{text!r} is no time", "give a frame such as 240, or 10s, or 1:20")
    frame, seconds, minutes, rest = found.groups()
    if frame:
        return int(frame)
    return round((float(seconds) if seconds else 60 * int(minutes) + int(rest)) * fps)


def read_timeline(path: Path) -> list[tuple[str, str]]:
    """Read times and prompts from a TOML or JSON file.

    Raises:
        ConfigError: unreadable, not one table of texts, or a time that is named twice.
    """
    if path.suffix.lower() != ".json":
        rows = list(config.read_toml(path).items())
    else:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read the timeline {path}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, tuple) and isinstance(row[1], str) for row in rows):
        raise ConfigError(f"{path} is no timeline", 'it must look like {"0": "a red ball", "240": "a blue ball"}')
    return rows


def _prompts(rows: list[tuple[str, str]], fps: float, kept: int) -> dict[str, str]:
    """Turn times and prompts into settings; frame 0 is that of the prompt itself, and `kept` frames are there."""
    found: dict[str, str] = {}
    for time, text in rows:
        frame = parse_time(time, fps)
        key = f"prompts.{frame}" if frame else "prompt"
        if frame < kept:
            raise ConfigError(f"frame {frame} is there already: new ones begin at {kept}", "name a later time")
        if key in found:
            raise ConfigError(f"two prompts are to begin at frame {frame}", "leave one of them out")
        found[key] = text
    return found


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


@cache
def kind_of(device: str) -> str:
    """The kind of a device, by its name or by what is here; asked once, as a batch has many rows."""
    kind, _ = devices.parse(device)
    return devices.glance().kind if kind == "auto" else kind


def resolve(
    model: str | None,
    preset: str | None,
    quality: str | None,
    config_file: Path | None,
    settings: list[str] | None,
    size: str | None,
    strength: str | None = None,
    resume_from: Path | None = None,
    source: jobs.Source | None = None,
    no_refine: bool = False,
    at: list[str] | None = None,
    timeline: Path | None = None,
    row: Mapping[str, Any] | None = None,
    seed_of_row: int | None = None,
    device: str | None = None,
    **flags: Any,
) -> RunConfig:
    """Merge options, files and presets in the order of precedence into one checked config.

    Args:
        model, preset, quality, config_file, settings, size, strength: the options of these names, None where not
            given.
        resume_from: an output whose run gives the seed when no other was asked for.
        source: the video to refine or extend; its rate and prompt stand below the files and flags, its
            length above the files.
        no_refine: leave the last stage out.
        at, timeline: prompts over time, as TIME=PROMPT and as a file.
        row: {dotted key: value} of a row of a batch, above all others.
        seed_of_row: its seed when nothing names one.
        device: what the default model has to fit; None where that is not known here.
        flags: other flags by name; None where not given.

    Raises:
        ConfigError: whatever is wrong with any of them.
    """
    from_file = config.flatten(config.read_toml(config_file)) if config_file else {}
    given = parse_settings(settings or [])
    given.update({key: value for name, value in flags.items() if value is not None for key in _KEYS.get(name, (name,))})
    if no_refine:
        given["refine.enabled"] = False
    if size is not None:
        given["output.height"], given["output.width"] = parse_size(size)
    given.update(row or {})
    if "image" in given:
        given["image"] = str(given["image"])
    if source is not None:
        given.setdefault("num_frames", source.frames)
    asked = {**from_file, **given}
    chosen = model or asked.get("model") or weights.default_family(None if device is None else kind_of(device))
    given["model"] = chosen
    if "seed" not in asked:
        stored = jobs.recorded_seed(resume_from) if resume_from else seed_of_row
        given["seed"] = secrets.randbelow(2**31) if stored is None else stored
    if asked.get("refine.enabled") is False and not {"output.width", "output.height"} & set(asked):
        # Unrefined frames keep their own size unless one is asked for.
        given["output.width"] = given["output.height"] = 0
    tables = (quality, strength)
    layers = [config.preset(weights.family(str(chosen)).preset, *((None, None) if preset else tables))]
    if preset:
        layers.append(config.preset(preset, *tables))
    if named(config.merge(*layers, from_file, given)) != OWN:
        # Steps and guidance of a preset are made for the family's own networks.
        keys = ("num_inference_steps", "guidance_scale", "image_guidance_scale")
        layers.append({f"initialize.{key}": 0 for key in keys})
    if source is not None:
        layers.append({"output.fps": source.fps})
        if "prompt" not in asked:
            known = {frame: text for frame, text in source.prompts.items() if frame < given["num_frames"]}
            layers.append({f"prompts.{frame}" if frame else "prompt": text for frame, text in known.items()})
    rows = read_timeline(timeline) if timeline else []
    for pair in at or []:
        time, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError("--at needs a time and a prompt", 'it must look like --at 10s "a blue ball"')
        rows.append((time, text))
    if rows:
        fps = config.merge(*layers, from_file, given).output.fps
        if "prompt" in (found := _prompts(rows, fps, source.frames if source else 0)) and "prompt" in given:
            raise ConfigError("two prompts are to begin at frame 0", "leave one of them out")
        given.update(found)
    return config.merge(*layers, from_file, given)
