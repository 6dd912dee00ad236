"""What was asked, as one checked config: options, files and presets in their order of precedence."""

import secrets
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from streamt2v import config, devices, weights
from streamt2v.config import RunConfig
from streamt2v.errors import ConfigError, FieldError
from streamt2v.families.choose import foreign, refiner_reads_text, usual
from streamt2v.jobs import again
from streamt2v.jobs.recipe import Source
from streamt2v.timeline import parse_at, parse_time, read_timeline, settings_at

# Options, and fields of a row of a batch, that stand for a setting of another name, or for several.
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "steps": ("initialize.num_inference_steps", "stream.num_inference_steps"),
    "guidance": ("initialize.guidance_scale", "initialize.image_guidance_scale", "stream.guidance_scale"),
    "negative": ("negative_prompt",),
    "refine_steps": ("refine.num_inference_steps",),
    "chunk": ("refine.chunk",),
    "overlap": ("refine.overlap",),
    "fps": ("output.fps",),
    "interpolate": ("output.interpolate",),
    "fit": ("output.fit",),
    "frames": ("num_frames",),
    "seed": ("seed",),
    "init": ("initialize.text_model", "initialize.picture_model"),
    "image_init": ("initialize.text_to_image",),
    "refiner": ("refine.model",),
}
_PATHS = ("config_file", "timeline", "preview", "audio", "until")
_TEXTS = ("model", "preset", "quality", "strength", "size", "device")
# What else a row may hold: arguments of `resolve` and of a job, with the type and the range of each.
_ARGUMENTS: Mapping[str, tuple[Any, float | None, float | None]] = {
    **dict.fromkeys((*_TEXTS, *_PATHS), (str, None, None)),
    **dict.fromkeys(("no_refine", "keep_run"), (bool, None, None)),
    **dict.fromkeys(("at", "lora"), (list, None, None)),
    "duration": (str, None, None),
    "width": (int, 1, 16384),
    "height": (int, 1, 16384),
    "threads": (int, 1, None),
    "memory": (float, 0.1, 1e6),
}


def said_by_option(message: str, typed: Sequence[str]) -> str:
    """Return a message about a setting in the words of its option, unless the setting itself was typed."""
    names = {key: f"--{name.replace('_', '-')}" for name, keys in _SETTINGS.items() for key in keys}
    names |= {"output.width": "--size", "output.height": "--size", "model": "--model", "prompt": "--prompt"}
    key, verb, rest = message.partition(" is ")
    known = key in names and not any(word.startswith(f"{key}=") for word in typed)
    return f"{names[key]}{verb}{rest}" if known and names[key] in typed else message


def row_fields() -> dict[str, str]:
    """Return {field of a row: setting or argument}: the settings by their keys, options by their long names."""
    options = {name.removesuffix("_file").replace("_", "-"): name for name in (*_SETTINGS, *_ARGUMENTS)}
    return {key: key for key in config.describe()} | options


def parse_row(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn {field: value} of a row into {dotted key: value} and {argument of `resolve` or of a job: value}.

    Raises:
        FieldError: an unknown field, or a value of another type or out of range.
    """
    known, settings, arguments = row_fields(), dict[str, Any](), dict[str, Any]()
    for field, given in row.items():
        if (name := known.get(field)) is None:
            raise FieldError(field, f"unknown field {field!r}", config.nearest(field, list(known)))
        try:
            if name == "frames" and isinstance(given, str) and not given.isdecimal():
                parse_length("frames", given, 1)
                arguments[name] = given
            elif name in _ARGUMENTS:
                arguments[name] = _argument(field, name, given)
            else:
                keys = _SETTINGS.get(name, (name,))
                if name == "loop" and isinstance(given, bool):  # as the option, which has no value
                    given = "stream" if given else "no"
                settings |= dict.fromkeys(keys, config.checked(field, config.describe()[keys[0]], given))
            if name == "size":
                settings["output.height"], settings["output.width"] = parse_size(arguments.pop(name))
            if name == "no_refine":
                settings["refine.enabled"] = not arguments.pop(name)
        except ConfigError as error:
            raise FieldError(field, error.message, error.hint) from None
    return settings, arguments


def _argument(field: str, name: str, given: Any) -> Any:
    kind, low, high = _ARGUMENTS[name]
    if kind is list:
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list) or not all(isinstance(part, str) for part in given):
            raise ConfigError(f"{field} is {given!r}, it must be a text or a list of texts")
        return given
    value = config.checked(field, {"type": kind, "low": low, "high": high}, given)
    return Path(value) if name in _PATHS else value


def parse_size(text: str) -> tuple[int, int]:
    """Turn ``WxH`` into (height, width).

    Raises:
        ConfigError: not two whole numbers with an x between them.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(text) < 20):
        raise ConfigError(f"--size is {text!r}, it must look like 1280x720 (width x height)")
    return int(height), int(width)


def parse_length(option: str, text: str, fps: float) -> int:
    """Turn a number of frames or a time into frames, of which there is at least one for any time.

    Raises:
        ConfigError: neither of them; the option is named.
    """
    try:
        frames = parse_time(text, fps)
    except ConfigError:
        hint = "such as 240 (frames), 10s, 2m or 1:20"
        raise ConfigError(f"{option} is {text!r}, it must be a number of frames or a time", hint) from None
    return frames if text.strip().isdecimal() else max(1, frames)


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


def refines_footage(command: str, source: Source | None) -> bool:
    """Whether a video from elsewhere is refined: where nothing else is asked, it is only restored and enlarged."""
    return command == "refine" and source is not None and not source.own


def usual_strength(command: str, source: Source | None) -> str | None:
    """Return the --strength that is meant where none is given."""
    return "faithful" if refines_footage(command, source) else None


def usual_model(command: str, source: Source | None, device: str | None) -> str:
    """Return the --model that is meant where none is given: the best that is here and fits the device."""
    name = weights.default_family(None if device is None else kind_of(device))
    return (refines_footage(command, source) and weights.family(name).footage) or name


def resolve(
    model: str | None = None,
    preset: str | None = None,
    quality: str | None = None,
    config_file: Path | None = None,
    settings: list[str] | None = None,
    size: str | None = None,
    strength: str | None = None,
    frames: str | int | None = None,
    duration: str | None = None,
    width: int | None = None,
    height: int | None = None,
    resume_from: Path | None = None,
    source: Source | None = None,
    no_refine: bool = False,
    loop: bool = False,
    at: list[str] | None = None,
    timeline: Path | None = None,
    until: Path | None = None,
    lora: list[str] | None = None,
    row: Mapping[str, Any] | None = None,
    seed_of_row: int | None = None,
    device: str | None = None,
    command: str = "generate",
    **flags: Any,
) -> RunConfig:
    """Merge options, files and presets in the order of precedence into one checked config.

    Args:
        model, preset, quality, config_file, settings, size, strength: the options of these names, None where not
            given.
        frames, duration: the length, in frames or as a time.
        width, height: as `size`; one alone keeps the shape of the video.
        resume_from: an output whose run gives the seed when no other was asked for.
        source: the video to refine or extend; its rate and prompt stand below the files and flags, its
            length above the files.
        no_refine: leave the last stage out.
        loop: let the last frame lead back to the first.
        at, timeline: prompts and pictures over time, as TIME=PROMPT or TIME=PICTURE and as a file.
        until: picture that the last frame shows.
        lora: FILE or FILE:STRENGTH each, in place of those that files and settings name.
        row: {dotted key: value} of a row of a batch, above all others.
        seed_of_row: its seed when nothing names one.
        device: what the default model has to fit; None where that is not known here.
        command: what the default model has to do.
        flags: other flags by name; None where not given.

    Raises:
        ConfigError: whatever is wrong with any of them.
    """
    from_file = config.flatten(config.read_toml(config_file)) if config_file else {}
    given = parse_settings(settings or [])
    given.update(
        {key: value for name, value in flags.items() if value is not None for key in _SETTINGS.get(name, (name,))}
    )
    if lora:
        from_file, given = (
            {key: value for key, value in layer.items() if not key.startswith("loras.")} for layer in (from_file, given)
        )
        given |= {f"loras.{number}": one for number, one in enumerate(lora, 1)}
    if no_refine:
        given["refine.enabled"] = False
    if loop and "loop" not in given:
        given["loop"] = "stream"
    if size is not None:
        given["output.height"], given["output.width"] = parse_size(size)
    given.update(row or {})
    if frames is not None and duration is not None:
        raise ConfigError("--frames and --duration both give the length", "leave one of them out")
    wanted = None if frames is None and duration is None else str(duration if frames is None else frames)
    if wanted is not None and not (row and "num_frames" in row):
        parse_length("--frames" if duration is None else "--duration", wanted, 1)
        given["num_frames"] = int(wanted) if wanted.isdecimal() else 10_000_000  # until the rate is known
    if size is not None and (width or height):
        raise ConfigError("--size and --width or --height both give the size", "leave one of them out")
    if width or height:
        given["output.height"], given["output.width"] = height or 0, width or 0  # until the shape is known
    if "image" in given:
        given["image"] = str(given["image"])
    interpolate = {**from_file, **given}.get("output.interpolate", 1)
    factor: int = config.checked("output.interpolate", config.describe()["output.interpolate"], interpolate)
    if factor > 1 and not {**from_file, **given}.get("output.interpolator"):
        given["output.interpolator"] = weights.interpolator().name  # so that a recipe says which
    if source is not None:
        given.setdefault("num_frames", source.frames * factor)
    asked = {**from_file, **given}
    refines = asked.get("refine.enabled") is not False
    chosen = model or asked.get("model") or usual_model(command if refines else "", source, device)
    given["model"] = chosen
    if "seed" not in asked:
        stored = again.recorded_seed(resume_from) if resume_from else seed_of_row
        given["seed"] = secrets.randbelow(2**31) if stored is None else stored
    if not refines and not {"output.width", "output.height"} & set(asked):
        # Unrefined frames keep their own size unless one is asked for.
        given["output.width"] = given["output.height"] = 0
    tables = (quality, strength)
    layers = [config.preset(weights.family(str(chosen)).preset)]
    layers += [config.preset(preset)] if preset else []
    layers = usual(config.merge(*layers, from_file, given), *((None, None) if preset else tables))
    if preset:
        layers.append(config.preset(preset, *tables))
    if foreign(config.merge(*layers, from_file, given)):
        # Steps and guidance of a preset are made for the family's own networks.
        keys = ("num_inference_steps", "guidance_scale", "image_guidance_scale")
        layers.append({f"initialize.{key}": 0 for key in keys})
    if source is not None:
        layers.append({"output.fps": source.fps})
        if "prompt" not in asked:
            shown = {frame * factor: text for frame, text in source.prompts.items()}
            known = {frame: text for frame, text in shown.items() if frame < given["num_frames"]}
            layers.append({f"prompts.{frame}" if frame else "prompt": text for frame, text in known.items()})
    if factor > 1:
        layers.append({"output.fps": float(config.exact_rate(config.merge(*layers).output.fps) * factor)})
    if wanted is not None and given["num_frames"] == 10_000_000:
        option = "--frames" if duration is None else "--duration"
        given["num_frames"] = parse_length(option, wanted, config.merge(*layers, from_file, given).output.fps)
    if bool(width) != bool(height):
        stream = config.merge(*layers, from_file, given).stream
        tall, wide = stream.size if source is None else (source.height, source.width)
        given["output.height"] = height or max(2, 2 * round((width or 0) * tall / wide / 2))
        given["output.width"] = width or max(2, 2 * round((height or 0) * wide / tall / 2))
    if rows := [*(read_timeline(timeline) if timeline else []), *map(parse_at, at or [])]:
        fps = config.merge(*layers, from_file, given).output.fps
        found = settings_at(rows, fps, source.frames * factor if source else 0)
        if both := {"prompt", "image"} & set(found) & set(given):
            raise ConfigError(f"two {both.pop()}s begin at frame 0", "leave one of them out")
        given.update(found)
    if until is not None:
        last = config.merge(*layers, from_file, given).num_frames - 1
        given[f"pictures.{last}"] = str(until)
    run = config.merge(*layers, from_file, given)
    if command == "refine" and not refiner_reads_text(run):
        typed = [key for key in asked if key in ("prompt", "negative_prompt") or key.startswith("prompts.")]
        if typed:  # the prompts of the source's recipe only travel on
            said = f"{typed[0]} is {asked[typed[0]]!r}, what refines here reads no text"
            raise ConfigError(said, "leave it out, or name a --model or a --refiner that reads one")
    return run
