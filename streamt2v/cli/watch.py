"""The command that shows runs in a browser while they go on."""

from pathlib import Path
from typing import Annotated

from streamt2v.cli.options import argument, option
from streamt2v.cli.terminal import emit, say
from streamt2v.errors import InputError, OutputError
from streamt2v.jobs import run_directory


def watch(
    place: Annotated[Path, argument("An output, or a folder of them. Default: here.", metavar="OUT|DIR")] = Path(),
    open_browser: Annotated[bool, option("--open", "Open the page in the browser.")] = False,
    port: Annotated[
        int, option("--port", "Port of 127.0.0.1. Default: any that is free.", min=0, max=65535, show_default=False)
    ] = 0,
) -> None:
    """Show a run in the browser while it goes on: what is finished plays, with progress, prompts and the last frames.

    The page is for this machine only and changes nothing. Ctrl-C ends it, not the run.

    For a run on another machine, give a --port there and lead it here: ssh -N -L 8765:127.0.0.1:8765 HOST

    [b]streamt2v watch ball.mp4 --open[/b]

    [b]streamt2v watch videos/ --port 8765[/b]
    """
    from streamt2v.watching import seen

    whole = place.resolve()  # what the user names may be a link, nothing inside may
    output = run_directory.output_of(whole)
    single = output != whole or not whole.is_dir()
    if single and seen.state_of(output) == "gone":
        raise InputError(f"{place} is no video, no unfinished run and no folder", "a new run appears within seconds")
    from streamt2v.watching.serve import Server

    try:
        server = Server(output.parent if single else whole, output if single else None, port)
    except OSError as error:
        raise OutputError(f"port {port} cannot be used: {error.strerror}", "choose another --port, or none") from error
    with server:
        emit(server.url)
        say("Ctrl-C ends this page, not the run")
        if open_browser:
            import webbrowser

            webbrowser.open(server.url)
        server.serve_forever()
