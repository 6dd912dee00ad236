"""The command line: all commands, global options, and how a failure becomes an exit code."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from streamt2v import __version__
from streamt2v.cli import options
from streamt2v.cli.admin import train, weights_convert, weights_list, weights_path, weights_pull, weights_verify
from streamt2v.cli.look import doctor, evaluate, info, preview, report, verify
from streamt2v.cli.make import RayCommand, batch, bench, extend, generate, interpolate, plan, refine, rerun, resume
from streamt2v.cli.options import option
from streamt2v.cli.terminal import complain, emit_failure, say, terminable
from streamt2v.cli.watch import watch
from streamt2v.errors import ConfigError, Interrupted, StreamT2VError, explained
from streamt2v.jobs.asked import said_by_option
from streamt2v.weights import hub

Command = Callable[..., None]
app = typer.Typer(
    name="streamt2v",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help", "--help-all"]},
    help="Make long videos from text on your own machine, with the StreamingT2V method.\n\n"
    '[b]streamt2v generate "a red ball floating over the sea at sunset" --frames 240 -o ball.mp4[/b]\n\n'
    "[b]streamt2v refine holiday.mp4 -o holiday_hd.mp4 --size 1280x720[/b]",
)
weights_app = typer.Typer(no_args_is_help=True, help="The installed weights, and whether they are intact.")
app.add_typer(weights_app, name="weights")


# In the order in which the help lists them.
_COMMANDS: list[Command] = [generate, refine, interpolate, extend, resume, verify, rerun, batch]
_COMMANDS += [plan, bench, info, watch, evaluate, preview, report, doctor, train]
_WEIGHTS: list[Command] = [weights_list, weights_pull, weights_path, weights_verify, weights_convert]
for command in _COMMANDS:
    app.command(cls=RayCommand if command is batch else options.LeveledCommand)(command)
for command in _WEIGHTS:
    weights_app.command(command.__name__.removeprefix("weights_"))(command)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"streamt2v {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, option("--version", "Show the version.", callback=_print_version, is_eager=True)] = False,
    debug: Annotated[bool, option("--debug", "Show a traceback when something fails.")] = False,
    offline: Annotated[bool, option("--offline", "Make no connection; STREAMT2V_OFFLINE=1 means the same.")] = False,
    no_color: Annotated[bool, option("--no-color", "No colours; NO_COLOR=1 means the same.")] = False,
) -> None:
    """Make long videos from text on your own machine."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with 0 or the exit code of the error."""
    argv = sys.argv[1:] if arguments is None else arguments
    end = argv.index("--") if "--" in argv else len(argv)
    asked, names = argv[:end], argv[end:]
    debug = "--debug" in asked
    if "--offline" in asked:
        os.environ |= dict.fromkeys(hub.OFFLINE, "1")
    if "--no-color" in asked:
        os.environ["NO_COLOR"] = "1"
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller: no file of ours may get its descriptor
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal cannot show every prompt
    anywhere = ("--debug", "--offline", "--no-color")
    try:
        with terminable():
            app(
                options.paired([argument for argument in asked if argument not in anywhere] + names),
                prog_name="streamt2v",
                obj=options.ALL if "--help-all" in asked else None,
            )
    except SystemExit as stop:
        if formatted := getattr(stop.__context__, "format_message", None):  # typer's usage errors
            hint = options.meant(said := formatted(), asked)
            if hint:
                say(f"  {hint}")
            if "--json" in asked:
                emit_failure(ConfigError(said, hint))
        raise
    except Exception as error:
        known = explained(error)
        known.message = said_by_option(known.message, asked)
        if "--json" in asked:
            emit_failure(known)
        if debug or known.exit_code == StreamT2VError.exit_code:
            raise
        complain(known.message if isinstance(known, Interrupted) else f"error: {known.message}", known.hint)
        sys.exit(known.exit_code)
    sys.exit(0)
