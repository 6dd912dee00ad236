"""The process of `streamt2v` and of `python -m streamt2v`."""

import gc
import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; quiet when it is stopped while it loads, and gone at once when it is done."""
    if (usual := signal.getsignal(signal.SIGINT)) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback: nothing has begun
    from streamt2v.cli import app

    signal.signal(signal.SIGINT, usual)
    try:
        app.main()
    finally:
        # Looking for garbage among the modules of torch and diffusers took 1.2 of the 1.4 s of every exit.
        gc.freeze()


if __name__ == "__main__":
    main()
