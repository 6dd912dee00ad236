"""Small, fast runs of the shipped weights, and what tests ask of the videos they make."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from streamt2v.cli.app import main
from streamt2v.media import reading, writing

SCHEMA = jsonschema.Draft202012Validator(
    json.loads(files("streamt2v").joinpath("event.schema.json").read_text("utf-8"))
)
PROMPT = "a red ball floating over the sea at sunset"
# Two steps at a thumbnail's size: every part of the machinery runs, nothing worth looking at comes out.
TINY = [
    *("--steps", "1", "--refine-steps", "2", "--overlap", "8", "--size", "80x48", "--seed", "7"),
    *("--device", "cpu", "--threads", "1"),
    *("--set", "stream.height=24", "--set", "stream.width=40", "--quiet"),
]

FolderOf = Callable[[str], Path]
# Which folders stand behind --init and --image-init, whether a picture is given, and which options it knows.
STARTS = {
    "modelscope": ("modelscope", "", False, ["--steps", "--guidance", "--negative"]),
    "animatediff": ("motion_adapter", "stable_diffusion", False, ["--steps", "--guidance", "--negative"]),
    "svd, picture": ("svd", "", True, ["--steps", "--guidance"]),
    "svd, sdxl": ("svd", "sdxl", False, ["--negative"]),
    "svd, unclip": ("svd", "unclip", False, ["--guidance"]),
    "ltx": ("ltx", "", False, ["--steps", "--guidance", "--negative"]),
    "ltx, picture": ("ltx_from_picture", "", True, ["--negative"]),
}


def call(*arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def generate(output: Path, frames: int, *more: object) -> int:
    return call("generate", PROMPT, "--frames", frames, "-o", output, *TINY, *more)


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start the command line as its own process, with Ctrl-C working: shells let background jobs ignore it."""
    return subprocess.Popen(
        [sys.executable, "-m", "streamt2v", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(folder: Path, pattern: str, count: int) -> None:
    """Wait until so many files of a run exist."""
    deadline = time.monotonic() + 120
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.005)


def made(path: Path, frames: int, comment: str = "") -> Path:
    """Write a small video with whatever in its comment tag."""
    writer = writing.SegmentWriter(path.with_name("growing"), 16, 32, Fraction(8))
    shades = np.arange(frames, dtype=np.uint8)[:, None, None, None]
    writer.append(np.broadcast_to(shades, (frames, 16, 32, 3)))
    writer.finish(path, comment)
    path.with_name("growing").unlink()
    return path


def digest(path: Path) -> tuple[int, str]:
    """Count the frames of a video and hash its RGB values."""
    count, sha = 0, hashlib.sha256()
    for frames in reading.read_frames(path):
        count += len(frames)
        sha.update(frames.tobytes())
    return count, sha.hexdigest()


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Parse the last JSON object on stdout."""
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return parsed
