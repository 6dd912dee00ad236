"""The checks behind `streamt2v doctor`: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streamt2v import config, devices, files, memory, weights
from streamt2v.errors import StreamT2VError
from streamt2v.families import choose
from streamt2v.jobs import needs

LOW_DISK_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Check:
    """One check: what was examined, whether it is fine, what was found, and what to do if it is not fine."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def checks(folder: Path | None = None, device: str = "auto") -> list[Check]:
    """Check everything a run needs; never raises.

    Args:
        folder: where videos will be written; None means the current folder.
        device: the device to check, as in `devices.resolve`.
    """
    place = folder or Path.cwd()
    questions: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("torch", lambda: _torch(device)),
        ("memory", lambda: _memory(device)),
        ("ffmpeg", _ffmpeg),
        ("PyAV", _pyav),
        ("writing", lambda: _writing(place)),
        ("disk", lambda: _disk(place)),
    ]
    return [_answer(name, ask) for name, ask in questions] + _weights()


def _answer(name: str, ask: Callable[[], Check]) -> Check:
    """Run one check and turn any failure into a finding: a report of what is broken must not break itself."""
    try:
        return ask()
    except StreamT2VError as error:
        return Check(name, False, error.message, error.hint)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Check(name, False, f"{type(error).__name__}: {error}", "install streamt2v again in a fresh environment")


def _python() -> Check:
    names = ("diffusers", "transformers", "numpy")
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return Check("python", True, f"{platform.python_version()} on {platform.platform()}, with {libraries}")


def _torch(name: str) -> Check:
    import torch

    device = devices.resolve(name)
    caution = devices.caution(device.kind)
    return Check("torch", True, f"{torch.__version__}: {devices.describe(device)}{caution and f'; {caution}'}")


def _memory(name: str) -> Check:
    """Check whether the default family fits into the device's memory at its default size."""
    device = devices.resolve(name)
    family = weights.family(weights.default_family(device.kind))
    free = devices.free_memory(device)
    run = config.merge(config.preset(family.preset), {"model": family.name})
    known = needs.stages(config.merge(*choose.usual(run), {"model": family.name}))
    policy = memory.choose(free, known, device.kind)
    need = memory.needed(known, policy)
    found = f"{family.name}: {policy.describe()}: up to {need / 1e9:.1f} of {free / 1e9:.1f} GB free"
    return Check("memory", need <= free, found, "close other programs, or try a smaller --size or --chunk")


def _ffmpeg() -> Check:
    try:
        import imageio_ffmpeg  # type: ignore[import-untyped]
    except ImportError:
        found = "no imageio-ffmpeg: PyAV writes the videos, and sound is not copied"
        return Check("ffmpeg", True, found, "install imageio-ffmpeg")

    binary = imageio_ffmpeg.get_ffmpeg_exe()
    said = subprocess.run(
        [binary, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
    )
    ok = said.returncode == 0 and " libx264 " in said.stdout
    found = f"{imageio_ffmpeg.get_ffmpeg_version()} {'with' if ok else 'without'} libx264, {binary}"
    return Check("ffmpeg", ok, found, "unset IMAGEIO_FFMPEG_EXE, or install imageio-ffmpeg again")


def _pyav() -> Check:
    import av
    from av.codec import codecs_available

    absent = sorted({"libx264", "ffv1"} - codecs_available)
    lacks = f", lacks {', '.join(absent)}" if absent else ""
    found = f"{av.__version__} with FFmpeg {av.ffmpeg_version_info}{lacks}"
    return Check("PyAV", not absent, found, "install the wheel of av from the package index")


def _writing(place: Path) -> Check:
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".streamt2v-") as stream:
            stream.write(b"streamt2v")
            stream.flush()
    except OSError as error:
        return Check("writing", False, files.explain(place, error).message, "choose another place with -o")
    return Check("writing", True, f"{place} can be written")


def _disk(place: Path) -> Check:
    free, advice = files.free_bytes(place), "free some space, or choose another place with -o"
    return Check("disk", free >= LOW_DISK_BYTES, f"{free / 1e9:.1f} GB free in {place}", advice)


def _weights() -> list[Check]:
    try:
        known = weights.families() | weights.helpers()
    except StreamT2VError as error:
        return [Check("weights", False, error.message, error.hint)]
    found = []
    for family in known.values():
        if weights.is_absent(family):
            fetch = f"not here; `streamt2v weights pull {family.name}` fetches them"
            found.append(Check(f"weights {family.name}", True, fetch))
            continue
        problems = weights.missing(family, family.usual_stages)
        size = f"{len(family.files)} files, {family.num_bytes / 1e6:.1f} MB"
        again = f"run `streamt2v weights pull {family.name}`"
        advice = again if family.sources else "install streamt2v again, then run `streamt2v weights verify`"
        found.append(Check(f"weights {family.name}", not problems, "; ".join(problems[:3]) or size, advice))
    return found
