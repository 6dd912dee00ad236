"""A recipe for people: the command asks for exactly what the recipe says."""

import shlex
from typing import Any

import pytest

from streamt2v import config
from streamt2v.cli import options
from streamt2v.jobs import asked, shown

SETTINGS: list[dict[str, Any]] = [
    {},
    {"seed": 7, "stream.eta": 0.5, "compile": True},
    {"prompts.24": 'it\'s a "star"', "prompts.32": "= a cube"},
    {"output.width": 80, "output.height": 48, "output.fps": 12.5},
    {"output.width": 0, "output.height": 0, "refine.enabled": False},
    {"output.width": 80, "output.height": 48, "refine.enabled": False},
    {"output.height": 0},
    {"negative_prompt": "rain", "refine.noise_level": 250, "refine.num_inference_steps": 6},
    {"initialize.text_model": "modelscope"},
    {"loras.1": "style.safetensors:0.5", "loras.2": "a:b.safetensors"},
    {"prompt": "-v"},
]


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """The verb, and what `asked.resolve` is given for a command."""
    program, verb, *words = options.paired(shlex.split(line))
    assert program == "streamt2v"
    given: dict[str, Any] = dict.fromkeys(("model", "preset", "quality", "config_file", "size"))
    given |= {"settings": [], "at": [], "lora": [], "no_refine": False}
    kinds: dict[str, Any] = {"frames": int, "seed": int, "fps": float}
    rest = iter(words)
    for word in rest:
        name = word.removeprefix("--").replace("-", "_")
        if word == "--":
            given["prompt"] = next(rest)
        elif not word.startswith("--"):
            given["prompt"] = word
        elif name == "no_refine":
            given[name] = True
        elif name in ("set", "at", "lora"):
            given["settings" if name == "set" else name].append(next(rest))
        else:
            given[name] = kinds.get(name, str)(next(rest))
    return verb, given


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_command_asks_for_what_the_recipe_says(settings: dict[str, Any]) -> None:
    run = config.merge(config.preset("demo"), {"prompt": "a red ball", "num_frames": 40}, settings)
    verb, given = parsed(shown.command({"command": "generate", "config": config.to_flat(run)}))
    assert verb == "generate"
    assert asked.resolve(**given) == run


def test_only_what_differs_is_shown_in_groups() -> None:
    run = config.merge(config.preset("demo"), {"prompt": "x", "num_frames": 40, "stream.eta": 0.5, "seed": 3})
    recipe = {"command": "generate", "config": config.to_flat(run)}
    assert shown.settings(recipe) == {"stream": {"eta": 0.5}}
    assert shown.command(recipe) == "streamt2v generate x --model demo --frames 40 --seed 3 --set stream.eta=0.5"


def test_a_video_from_another_and_a_recipe_that_says_too_little() -> None:
    run = config.to_flat(config.merge(config.preset("demo"), {"num_frames": 40, "prompt": "x", "output.fps": 24}))
    recipe = {"command": "extend", "config": run, "source": {"name": "my clip.mp4", "frames": 16}}
    assert shown.command(recipe).startswith("streamt2v extend 'my clip.mp4' --prompt x --model demo --frames 40")
    assert "--fps 24.0" in shown.command(recipe)
    for odd in ({}, {"config": 3}, {"command": "generate", "config": {"a.b": 1}}):
        assert shown.command(odd) == ""
    assert shown.settings({"command": "generate", "config": {"a.b": 1}}) == {
        "main": {"command": "generate"},
        "config.a": {"b": 1},
    }
