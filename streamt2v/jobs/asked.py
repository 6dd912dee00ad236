"""What was asked, as one checked config: options, files and presets in their order of precedence."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import typer

from streamt2v import config, devices, weights
from streamt2v.config import RunConfig
from streamt2v.errors import ConfigError, FieldError
from streamt2v.families.choose import OWN, named
from streamt2v.jobs import again
from streamt2v.jobs.recipe import Source
from streamt2v.timeline import parse_at, prompts_at, read_timeline

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


def parse_size(text: str) -> tuple[int, int]:
    """Turn ``WxH`` into (height, width).

    Raises:
        ConfigError: not two whole numbers with an x between them.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(text) < 20):
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
    source: Source | None = None,
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
        stored = again.recorded_seed(resume_from) if resume_from else seed_of_row
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
    if rows := [*(read_timeline(timeline) if timeline else []), *map(parse_at, at or [])]:
        fps = config.merge(*layers, from_file, given).output.fps
        if "prompt" in (found := prompts_at(rows, fps, source.frames if source else 0)) and "prompt" in given:
            raise ConfigError("two prompts are to begin at frame 0", "leave one of them out")
        given.update(found)
    return config.merge(*layers, from_file, given)
