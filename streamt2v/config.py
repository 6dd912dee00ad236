"""The configuration of a run: frozen dataclasses, read from TOML, overrides by dotted key.

Precedence: defaults (the published values) < family preset < `--preset` < `--quality` < `--config` < `--set` < flags.
Every value is checked against the range declared with it; an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast, get_args, get_type_hints

from streamt2v.chunks import check_chunking, made
from streamt2v.errors import ConfigError

Fit = Literal["contain", "cover", "pad"]
Variant = Literal["published", "corrected"]
Quality = Literal["reference", "balanced", "fast"]
Strength = Literal["faithful", "balanced", "creative"]
Loop = Literal["no", "stream", "ring"]
PRESETS = Path(__file__).parent / "presets"
MAX_LORA_STRENGTH = 10


def _value(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def _rescale(default: float) -> Any:
    return _value(default, "share by which the guided deviation returns to the conditional one", 0, 1)


def _reuse_interval() -> Any:
    return _value(1, "compute the deep layers of the network at every n-th step only; 1: at every step", 1, 1000)


@dataclass(frozen=True)
class SamplingConfig:
    """What all denoising has in common: the number of steps and the guidance."""

    num_inference_steps: int = _value(50, "denoising steps", 1, 1000)
    guidance_scale: float = _value(7.5, "classifier-free guidance; 1 switches it off", 1, 100)
    guidance_rescale: float = _rescale(0.0)
    guidance_stop: float = _value(0.0, "share of the noise range, at its clean end, denoised without guidance", 0, 1)


@dataclass(frozen=True)
class InitializeConfig(SamplingConfig):
    """Stage 1: prompt, or picture and prompt, to the first chunk."""

    text_model: str = _value(
        "own", "what starts from a prompt: own, prior, a name of weights.toml, hub:OWNER/NAME, a folder"
    )
    picture_model: str = _value("own", "what starts from a picture, named in the same way")
    text_to_image: str = _value(
        "", "what draws the picture if none is given (prior and decoder joined by +); empty: the model's usual choice"
    )
    height: int = _value(0, "rows a third-party model works at, pixels; 0: its own area, shaped as the base", 0, 8192)
    width: int = _value(0, "columns a third-party model works at, pixels", 0, 8192)
    num_inference_steps: int = _value(50, "denoising steps; 0: a third-party model's own number", 0, 1000)
    guidance_scale: float = _value(
        9.0, "classifier-free guidance; 1 switches it off, 0: a third-party model's own", 0, 100
    )
    image_guidance_scale: float = _value(3.0, "guidance_scale when starting from a picture", 0, 100)
    eta: float = _value(0.0, "DDIM's share of fresh noise per step", 0, 1)

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) that a third-party model works at; None leaves the choice to it."""
        return (self.height, self.width) if self.height and self.width else None


@dataclass(frozen=True)
class StreamConfig(SamplingConfig):
    """Stage 2: the autoregressive streaming stage."""

    chunk: int = _value(16, "frames denoised at once", 1, 1024)
    overlap: int = _value(8, "conditioning frames, re-created by the next chunk", 0, 1023)
    height: int = _value(256, "rows of the base video, pixels", 8, 8192)
    width: int = _value(256, "columns of the base video, pixels", 8, 8192)
    eta: float = _value(1.0, "DDIM's share of fresh noise per step", 0, 1)
    final_noise: Variant = _value(
        "corrected", "published: noise is also added after the last step; corrected: it is not"
    )
    reuse_interval: int = _reuse_interval()
    replacement: bool = _value(False, "hold the conditioning frames in place at every step (replacement method)")
    replacement_carry: float = _value(
        0.0, "with replacement: share of its change carried on; 0 also stops leading", 0, 1
    )
    replacement_lead: int = _value(
        1, "chunks that are made at once where they lead to known frames: to a picture, or home in a loop", 1, 2
    )
    cam: bool = _value(True, "condition on the last frames (conditional attention module)")
    apm: bool = _value(True, "condition on the anchor frame (appearance preservation module)")
    calibrate: bool = _value(
        False, "correct the colours of new frames by what the chunk made of the conditioning frames, against drift"
    )
    anchor: int = _value(0, "number of the anchor frame in the first chunk", 0, 1023)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of base frames."""
        return self.height, self.width


@dataclass(frozen=True)
class PictureConfig:
    """What a network that streams from the anchor frame, not from text, is told besides it, and how it decodes."""

    fps: int = _value(7, "frames per second that it is told; the output plays at its own rate", 1, 256)
    motion_bucket_id: int = _value(127, "amount of motion that it is told, from still to much", 0, 255)
    noise_aug_strength: float = _value(0.02, "how much noise is added to the anchor frame", 0, 10)
    noise: Literal["uniform", "normal"] = _value(
        "uniform", "what is added: uniform from 0 to 1, as published, which brightens a little; or normal"
    )
    min_guidance_scale: float = _value(
        1.5, "guidance of a chunk's first frame; it grows to stream.guidance_scale, and is never above it", 1, 100
    )
    decode_chunk_size: int = _value(8, "frames that the temporal decoder sees at once", 1, 1024)
    decode_overlap: int = _value(2, "frames that neighbouring groups of the decoder share", 0, 1023)
    decode_groups: Variant = _value(
        "corrected", "published: side by side, so that a last frame may be left alone; corrected: equal, overlapping"
    )


@dataclass(frozen=True)
class RefineConfig(SamplingConfig):
    """Stage 3: SDEdit in overlapping chunks with randomized blending."""

    enabled: bool = _value(True, "run the refinement stage")
    model: str = _value("own", "what refines: own, a name of weights.toml, hub:OWNER/NAME, a folder")
    solver: Literal["dpmpp", "ddim"] = _value(
        "dpmpp", "dpmpp: DPM-Solver++(2M), as published with MS-Vid2Vid; ddim: one estimate a step, as with I2VGen-XL"
    )
    chunk: int = _value(24, "frames refined at once", 1, 1024)
    overlap: int = _value(8, "frames shared by neighbouring chunks", 0, 1023)
    shift_back: bool = _value(True, "the last chunk is as long as others, from an earlier frame on; else it is shorter")
    num_inference_steps: int = _value(30, "denoising steps", 1, 1000)
    noise_level: int = _value(600, "timestep t' up to which the clip is noised, of 1000", 1, 1000)
    guidance_rescale: float = _rescale(0.2)
    reuse_interval: int = _reuse_interval()
    stochastic: bool = _value(True, "fresh noise at every step (SDE), or none (ODE)")
    cut_range: Variant = _value("corrected", "published: cut in 0..overlap-1; corrected: 0..overlap, as in the paper")
    posterior: Variant = _value("corrected", "published: encode to a sample of the posterior; corrected: to its mean")
    start_scale: Variant = _value(
        "corrected", "published: starts at sigma times the trained input scale; corrected: at the trained one"
    )


@dataclass(frozen=True)
class OutputConfig:
    """The written video."""

    width: int = _value(1280, "box width, pixels; 0: the base video's own", 0, 16384)
    height: int = _value(720, "box height, pixels; 0: the base video's own", 0, 16384)
    fit: Fit = _value("contain", "contain keeps the aspect ratio, cover crops, pad adds borders")
    fps: float = _value(8.0, "frames per second", 0.01, 1000)
    interpolate: int = _value(1, "frames written for every one that is made: those between are interpolated", 1, 64)
    interpolator: str = _value("", "what interpolates, a name of weights.toml; empty: the best that is installed")
    crf: int = _value(18, "H.264 quality: lower is better and larger", 0, 51)

    @property
    def rate(self) -> Fraction:
        """Exact frames per second: the fraction that `fps` is the float of."""
        return exact_rate(self.fps)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the frames of a run."""

    model: str = _value("demo", "model family, a name of weights.toml")
    prompt: str = _value("", "what to show")
    prompts: Mapping[int, str] = field(
        default_factory=dict,
        metadata={"help": "what to show from a later frame on: prompts.240 takes over at frame 240"},
    )
    negative_prompt: str = _value("", "what to avoid")
    image: str = _value("", "picture to start from")
    pictures: Mapping[int, str] = field(
        default_factory=dict, metadata={"help": "picture that a later frame shows: pictures.240 is that of frame 240"}
    )
    loras: Mapping[int, str] = field(
        default_factory=dict,
        metadata={"help": "FILE:STRENGTH merged into the networks that draw: loras.1 is the first, loras.2 the next"},
    )
    loop: Loop = _value(
        "no",
        "let the last frame lead back to the first. stream: the last chunk comes home, at any length and constant"
        " memory; ring: windows all around, from text alone, with all frames in memory, up to 30 s",
    )
    num_frames: int = _value(24, "frames of the output video", 1, 10_000_000)
    seed: int = _value(0, "seed of every random draw", 0, 2**63 - 1)
    compile: bool = _value(False, "compile the networks with torch: takes minutes once and rounds differently")
    initialize: InitializeConfig = field(default_factory=InitializeConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    picture: PictureConfig = field(default_factory=PictureConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @property
    def all_pictures(self) -> dict[str, str]:
        """{key of the setting: path} of all pictures that are asked for."""
        later = {f"pictures.{frame}": path for frame, path in self.pictures.items()}
        return {"image": self.image, **later} if self.image else later

    @property
    def all_loras(self) -> dict[str, Lora]:
        """{key of the setting: file and strength} of all LoRAs, in order."""
        return {f"loras.{number}": parse_lora(text) for number, text in self.loras.items()}

    @property
    def all_files(self) -> dict[str, str]:
        """{key of the setting: path} of all files that are asked for."""
        return {**self.all_pictures, **{key: lora.path for key, lora in self.all_loras.items()}}

    @property
    def made(self) -> int:
        """Frames that the stages make; the others of `num_frames` are interpolated."""
        return made(self.num_frames, self.output.interpolate, closed=self.loop != "no")

    @property
    def made_pictures(self) -> dict[int, str]:
        """{number among the frames that are made: path} of the pictures of later frames."""
        return {frame // self.output.interpolate: path for frame, path in self.pictures.items()}

    def __post_init__(self) -> None:
        for key, spec, value in _leaves(self):
            _check(key, spec, value)
        for text in self.loras.values():
            parse_lora(text)
        check_chunking(self.stream.chunk, self.stream.overlap, "stream")
        check_chunking(self.refine.chunk, self.refine.overlap, "refine")
        check_chunking(self.picture.decode_chunk_size, self.picture.decode_overlap, "picture.decode")
        if self.stream.anchor >= self.stream.chunk:
            last = f"the first chunk ends with frame {self.stream.chunk - 1}"
            raise ConfigError(f"stream.anchor is {self.stream.anchor}, {last}")
        for what, later in {"prompt begins at": self.prompts, "picture is for": self.pictures}.items():
            if later and max(later) >= self.num_frames:
                end = f"but the video ends with frame {self.num_frames - 1}"
                raise ConfigError(f"a {what} frame {max(later)}, {end}", "name an earlier time")


class Lora(NamedTuple):
    """A file, and how much of it is merged."""

    path: str
    strength: float


def parse_lora(text: str) -> Lora:
    """Parse ``FILE`` or ``FILE:STRENGTH``; without one it is 1.

    Raises:
        ConfigError: no file, or a strength out of range.
    """
    path, colon, strength = text.rpartition(":")
    try:
        found = Lora(path, float(strength)) if colon else Lora(text, 1.0)
    except ValueError:  # the colon belongs to the name
        found = Lora(text, 1.0)
    if not found.path or not abs(found.strength) <= MAX_LORA_STRENGTH:
        limits = f"{-MAX_LORA_STRENGTH}..{MAX_LORA_STRENGTH}"
        raise ConfigError(f"--lora is {text!r}, it must be FILE or FILE:STRENGTH, which must lie in {limits}")
    return found


def file_of(key: str, value: str) -> str:
    """Return the path in the value of the setting of a file."""
    return parse_lora(value).path if key.startswith("loras.") else value


def at_path(key: str, value: str, path: str) -> str:
    """Return the value of the setting of a file where that is at another path; a LoRA keeps its strength."""
    return f"{path}:{parse_lora(value).strength}" if key.startswith("loras.") else path


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield (dotted key, {type, help, low, high}, value) of every leaf."""
    kind: Any = type(config)
    for name, spec in _specs(kind):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{key}", {**spec, **_PROMPT}, text) for key, text in value.items())
        else:
            yield prefix + name, spec, value


_PROMPT = {"type": str, "low": None, "high": None}
_REMOVED = {"stream.solver": ("ddim",), "refine.blending": ("randomized",), "refine.order": ("diagonal", "sweep")}
"""Settings of earlier versions, with those of their values whose frames are still made."""


def up_to_date(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with the settings that there are now.

    Removed ones that change nothing are left out; `merge` refuses those that would. New ones have their defaults, which
    are what always happened before.
    """
    if not isinstance(config := recipe.get("config"), dict):
        return recipe
    kept = {key: value for key, value in config.items() if value not in _REMOVED.get(key, ())}
    whole = "model" in kept  # as every run records it; a part of a recipe stays one
    return recipe | {"config": {**to_flat(merge()), **kept} if whole else kept}


def _describe(key: str) -> dict[str, Any]:
    """Return what `describe` says about one key; frames may have prompts and pictures, and there may be many LoRAs."""
    options = describe()
    if re.fullmatch(r"(prompts|pictures|loras)\.[1-9][0-9]{0,7}", key):
        return _PROMPT
    if key in _REMOVED:
        raise ConfigError(f"{key} is no longer a setting", f"leave it out: {_REMOVED[key][0]} is what always happens")
    if key not in options:
        raise ConfigError(f"unknown setting {key!r}", nearest(key, list(options)))
    return options[key]


@cache
def _specs(kind: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, {type, help, low, high}) of each field; a batch of a thousand rows asks a million times."""
    hints = get_type_hints(kind)
    return [(item.name, {"type": hints[item.name], **item.metadata}) for item in dataclasses.fields(kind)]


@cache
def describe() -> dict[str, dict[str, Any]]:
    """Return {dotted key: {type, help, low, high}} of every option."""
    return {key: spec for key, spec, _ in _leaves(RunConfig())}


def _check(key: str, spec: Mapping[str, Any], value: Any) -> None:
    choices = get_args(spec["type"])
    expected = str if choices else spec["type"]
    if type(value) is not expected:
        raise ConfigError(f"{key} is {value!r}, it must be of type {expected.__name__}")
    if choices and value not in choices:
        raise ConfigError(f"{key} is {value!r}, it must be one of {', '.join(choices)}", nearest(value, choices))
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}, it must be a finite number")
    low, high = spec["low"], spec["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        raise ConfigError(f"{key} is {value}, it must lie in {low}..{high}")


class Table:
    """A base for dataclasses that are stored as JSON."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from parsed JSON, where tuples are lists; an unknown key raises ConfigError that names the nearest."""
        known = [item.name for item in dataclasses.fields(cast("Any", cls))]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"unknown setting {unknown[0]!r} of {cls.__name__}", nearest(unknown[0], known))
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a hint that names the known word nearest to `word`, or all of them when none is near."""
    close = difflib.get_close_matches(word, known, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return meant + ("" if close and len(known) > 9 else f"known: {', '.join(known)}")


def parse_value(key: str, text: str) -> Any:
    """Turn the text of `--set key=text` into a value of the key's type.

    Raises:
        ConfigError: unknown key, or text that is not of the key's type.
    """
    return _parse(key, _describe(key)["type"], text)


def _parse(key: str, kind: Any, text: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{key} is {text!r}, it must be true or false")
        return text.lower() == "true"
    if kind not in (int, float):
        return text
    try:
        return float(Fraction(text)) if kind is float and "/" in text else kind(text)  # such as 30000/1001
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ConfigError(f"{key} is {text!r}, it must be of type {kind.__name__}") from None


def checked(key: str, spec: Mapping[str, Any], value: Any) -> Any:
    """Return a value from a file as the type that a row of `describe` names; text is parsed.

    Raises:
        ConfigError: another type, or out of range.
    """
    parsed = _parse(key, spec["type"], value) if isinstance(value, str) else _widened(spec["type"], value)
    _check(key, spec, parsed)
    return parsed


def _widened(kind: Any, value: Any) -> Any:
    """Return a whole number as a float where the key is one: TOML, JSON and command lines write 8 for 8.0."""
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            return float(value)
    return value


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def merge(*layers: Mapping[str, Any]) -> RunConfig:
    """Build a config from layers of {dotted key: value}, later ones winning.

    Raises:
        ConfigError: unknown key, wrong type or out of range; the key is named.
    """
    tables: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for key, given in layer.items():
            section, _, name = key.rpartition(".")
            tables.setdefault(section, {})[name] = _widened(_describe(key)["type"], given)
    sections = {
        "initialize": InitializeConfig,
        "stream": StreamConfig,
        "picture": PictureConfig,
        "refine": RefineConfig,
        "output": OutputConfig,
    }
    parts: dict[str, Any] = {name: build(**tables.get(name, {})) for name, build in sections.items()}
    for name in ("prompts", "pictures", "loras"):
        parts[name] = dict(sorted((int(number), text) for number, text in tables.get(name, {}).items()))
    return RunConfig(**tables.get("", {}), **parts)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: missing, unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    except (ValueError, RecursionError) as error:  # also for a number of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


@cache
def presets() -> list[str]:
    """Return the names of the shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


@cache
def _read_preset(name: str) -> dict[str, Any]:
    return read_toml(PRESETS / f"{name}.toml")


def preset(name: str, quality: str | None = None, strength: str | None = None) -> dict[str, Any]:
    """Return {dotted key: value} of a shipped preset, with one of its `quality` and of its `strength` tables on top.

    Raises:
        ConfigError: no such preset, or the preset has no such quality or strength.
    """
    if name not in (known := presets()):
        raise ConfigError(f"unknown preset {name!r}", nearest(name, known))
    table = _read_preset(name)
    asked = {"quality": quality, "strength": strength}
    found = flatten({key: value for key, value in table.items() if key not in asked})
    for what, choice in asked.items():
        choices = cast("dict[str, dict[str, Any]]", table.get(what, {}))
        if choice is not None and choice not in choices:
            raise ConfigError(f"unknown {what} {choice!r} of preset {name}", nearest(choice, sorted(choices)))
        found |= flatten(choices.get(choice or "", {}))
    return found


@cache
def usual(name: str) -> dict[str, Any]:
    """Return {dotted key: value} of every setting where only a shipped preset is given."""
    return to_flat(merge(preset(name)))


def maker(command: str, settings: Mapping[str, Any]) -> str:
    """Name the model that makes the frames, by {dotted key: value}: no family where frames only come between others."""
    only_between = command == "refine" and settings.get("refine.enabled") is False
    return str((settings.get("output.interpolator") if only_between else "") or settings.get("model"))


def to_flat(config: RunConfig) -> dict[str, Any]:
    """Return {dotted key: value} of every leaf, in order."""
    return {key: value for key, _, value in _leaves(config)}


_MAX_DENOMINATOR = 2**20
"""Two fractions below 1000 with denominators up to this never share a float, so the float names one exactly."""


def exact_rate(fps: float | Fraction) -> Fraction:
    """Return the one fraction that a frame rate stands for, with a denominator of at most 2**20.

    A fraction of that kind below 1000 that went through a float, as in a recipe, comes back as it was.
    """
    return Fraction(fps).limit_denominator(_MAX_DENOMINATOR)
