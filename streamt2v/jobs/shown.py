"""A recipe as people read it: the command that asks for it, and what of it differs from the family's preset."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from streamt2v import config
from streamt2v.config import RunConfig
from streamt2v.errors import StreamT2VError
from streamt2v.families import choose
from streamt2v.jobs.recipe import recorded_run

# Settings that have an option of their own; the others are given by --set.
_OPTIONS = {
    "model": "--model", "num_frames": "--frames", "seed": "--seed", "output.fps": "--fps", "image": "--image",
    "negative_prompt": "--negative", "refine.model": "--refiner", "output.interpolate": "--interpolate",
}  # fmt: skip
_ALWAYS = ("model", "num_frames", "seed")
_SAID_ELSEWHERE = ("prompt", "output.width", "output.height", "refine.enabled")
MAIN = "main"


def _differing(run: RunConfig) -> dict[str, Any]:
    """Return {dotted key: value} of the settings that the family's preset has otherwise."""
    try:
        presets = choose.usual(run)
    except StreamT2VError:  # a family that is no longer here
        presets = []
    usual = config.to_flat(config.merge(*presets))
    return {key: value for key, value in config.to_flat(run).items() if value != usual.get(key)}


def settings(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of a recipe that differ from the preset, by section; prompts are left out.

    A recipe that this version does not take is returned as it is.
    """
    known = recorded_run(recipe)
    groups: dict[str, dict[str, Any]] = {}
    for key, value in (config.flatten(recipe) if known is None else _differing(known[0])).items():
        if known is None or not (key.startswith("prompts.") or key in ("prompt", *_ALWAYS)):
            section, _, name = key.rpartition(".")
            groups.setdefault(section or MAIN, {})[name] = value
    return groups


def command(recipe: Mapping[str, Any]) -> str:
    """Return the command that asks for what a recipe says, to copy into a shell; empty where it says too little."""
    known = recorded_run(recipe)
    if known is None:
        return ""
    run, verb, _ = known
    flat, given = config.to_flat(run), _differing(run)
    given |= {key: flat[key] for key in _ALWAYS}
    if choose.foreign(run):  # for which the command line has other defaults than the preset
        given |= {key: value for key, value in flat.items() if key.startswith("initialize.")}
    words = ["streamt2v", verb]
    if verb == "refine" and not run.refine.enabled:
        words[1:] = ["interpolate", str((recipe.get("source") or {}).get("name", "VIDEO"))]
        words += ["--factor", str(run.output.interpolate), *(["--loop"] if run.loop != "no" else [])]
        words += _set("output.interpolator", run.output.interpolator) if run.output.interpolator else []
        size = [f"{run.output.width}x{run.output.height}"] if run.output.width and run.output.height else []
        return shlex.join([*words, *(["--size", *size] if size else [])])
    if verb == "generate":
        words.append(run.prompt)
    else:
        given["output.fps"] = run.output.fps
        words.append(str((recipe.get("source") or {}).get("name", "VIDEO")))
        words += ["--prompt", run.prompt] if verb == "extend" or choose.refiner_reads_text(run) else []
    if not run.refine.enabled:
        words.append("--no-refine")
    sizes = [key for key in ("output.width", "output.height") if key in given]
    if run.output.width and run.output.height:
        words += ["--size", f"{run.output.width}x{run.output.height}"] * bool(sizes or not run.refine.enabled)
    elif run.refine.enabled:
        words += [part for key in sizes for part in _set(key, flat[key])]
    words += [word for key, option in _OPTIONS.items() if key in given for word in (option, str(given[key]))]
    for key, value in given.items():
        if key.startswith(("prompts.", "pictures.")):
            words += ["--at", key.partition(".")[2], str(value)]
        elif key.startswith("loras."):
            words += ["--lora", str(value)]
        elif key not in (*_OPTIONS, *_SAID_ELSEWHERE):
            words += _set(key, value)
    words += ["--", words.pop(2)] if words[2].startswith("-") else []
    return shlex.join(words)


def _set(key: str, value: Any) -> list[str]:
    return ["--set", f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
