"""Write docs/cli.md from the commands themselves: `make docs`; a test fails when the page is stale."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from streamt2v.cli import app

PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = """# Command line reference

Made by `make docs` from the commands. Results go to stdout, everything else to stderr. Exit codes: 0 done, 2 usage,
3 input, 4 weights, 5 output or disk, 6 memory, 7 bad numbers, 8 busy, 9 batch partly failed, 10 a rerun
gave other frames, 130, 143 and 129 interrupted, 1 a bug.

`--help` shows what is used every day; `--help-all` shows every option, as this page does.
"""


def page() -> str:
    """Return the whole reference."""
    return "\n".join([INTRODUCTION, *_sections(typer.main.get_command(app.app), "streamt2v")])


def _sections(command: Any, name: str) -> Iterator[str]:
    yield f"## {name}\n"
    # The same marks that the terminal shows bold are code here.
    yield re.sub(r"\[/?b\]", "`", command.help or "").strip() + "\n"
    for title, parameters in _panels(command).items():
        yield f"**{title}**\n"
        yield from (f"- {_row(parameter)}" for parameter in parameters)
        yield ""
    for sub in getattr(command, "commands", {}).values():
        yield from _sections(sub, f"{name} {sub.name}")


def _panels(command: Any) -> dict[str, list[Any]]:
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if "completion" in (parameter.name or ""):
            continue  # typer's own, different from version to version
        kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
        panels.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(parameter)
    return panels


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    else:
        names = ", ".join(f"`{name}`" for name in parameter.opts)
    return f"{names}: {parameter.help}"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
