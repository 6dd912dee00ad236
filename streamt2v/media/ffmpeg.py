"""The ffmpeg binary: where it is, whether it starts, and running it without waiting for one that hangs."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from streamt2v import files
from streamt2v.errors import OutputError
from streamt2v.media import containers

# Whatever its name, a file that is a script or playlist (concat, hls, ...) must not make ffmpeg open other files.
INPUT_OPTIONS = {"format_whitelist": containers.DEMUXERS, "protocol_whitelist": "file"}
SOUND_OPTIONS = {**INPUT_OPTIONS, "format_whitelist": containers.SOUNDS}
STALL_SECONDS = 60.0  # ffmpeg copies gigabytes in this time; only when it hangs does its file stay the same


def url(path: Path) -> str:
    """Return a file's name such that ffmpeg takes no part of it for an option or a protocol."""
    return f"file:{path.absolute()}"


def input_options(path: Path, options: Mapping[str, str] = INPUT_OPTIONS) -> list[str]:
    """Return the arguments by which ffmpeg reads one file, and no other file that it may refer to."""
    return [part for key, value in options.items() for part in (f"-{key}", value)] + ["-i", url(path)]


def check_ffmpeg(pictures_only: bool = False) -> None:
    """Raise OutputError unless ffmpeg can be started; without it, PyAV still writes videos that have no sound."""
    if pictures_only and find_spec("imageio_ffmpeg") is None:
        return
    binary = _binary()
    _check_starts(binary, files.stamp(Path(binary)))


@lru_cache(maxsize=1)
def _check_starts(binary: str, _stamp: object) -> None:
    """Start ffmpeg, once for all rows of a batch. Raises OutputError."""
    with _started(binary, ["-version"]) as process:
        try:
            process.communicate(timeout=STALL_SECONDS)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise OutputError(f"ffmpeg printed no version within {STALL_SECONDS:.0f} s", "install it again") from error
        if process.returncode:  # such as 127: a library is missing
            raise OutputError(f"{binary} ends with code {process.returncode}", "install it again")


def _binary() -> str:
    try:
        import imageio_ffmpeg  # type: ignore[import-untyped]

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except ImportError as error:
        raise OutputError(
            f"sound is copied with imageio-ffmpeg, which is not installed: {error}", "install it"
        ) from error
    except (RuntimeError, OSError) as error:
        raise OutputError(f"the ffmpeg binary cannot be started: {error}", "`streamt2v doctor` shows more") from error


def _started(binary: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    command, nothing = [binary, *arguments], subprocess.DEVNULL
    try:
        return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=subprocess.PIPE)
    except OSError as error:
        raise OutputError(f"the ffmpeg binary cannot be started: {error}", "`streamt2v doctor` shows more") from error


def run_ffmpeg(arguments: list[str], path: Path, out_path: Path) -> str:
    """Let ffmpeg write `path`, the future `out_path`, and return its complaints.

    Raises:
        OutputError: ffmpeg is missing, fails or hangs.
    """
    process = _started(_binary(), ["-nostdin", "-v", "error", "-y", *arguments, url(path)])
    with process:
        try:
            said = _last_words(process, path).decode(errors="replace").strip()
        except subprocess.TimeoutExpired as error:
            stalled = f"ffmpeg made no progress on {out_path} for {STALL_SECONDS:.0f} s"
            raise OutputError(stalled, "the run continues with --resume") from error
        finally:
            process.kill()  # no effect if it has ended
    if "No space left on device" in said:
        raise files.explain(out_path, OSError(28, "No space left on device"))
    if process.returncode:
        raise OutputError(f"ffmpeg failed on {out_path} with code {process.returncode}: {said[-500:]}")
    return said[-500:]


def _last_words(process: subprocess.Popen[bytes], path: Path) -> bytes:
    """Wait for a process as long as the file it writes keeps changing; raise TimeoutExpired when it stalls."""
    seen, since = None, time.monotonic()
    while True:
        try:
            return process.communicate(timeout=min(1.0, STALL_SECONDS))[1]
        except subprocess.TimeoutExpired:
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                before, seen = seen, (status.st_size, status.st_mtime_ns)
                since = since if seen == before else time.monotonic()
            if time.monotonic() - since >= STALL_SECONDS:
                raise
