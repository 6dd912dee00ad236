"""Small inputs of every kind, made where they are needed, and what a player would show and play of a file."""

import subprocess
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np

from tests.cli.helpers import call

FLASHES = (1.0, 2.0)
X264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "2", "-g", "25"]


def ffmpeg(*arguments: object) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


def flashing(path: Path, *codecs: str, seconds: float = 3, rate: str = "25", select: str = "1") -> Path:
    """Write a black clip that turns white, and beeps, for 0.2 s at each of `FLASHES`; lossless unless codecs are given.

    `select` picks the pictures that stay, each at its own time.
    """
    when = "+".join(f"between(t,{time - 0.001},{time + 0.199})" for time in FLASHES)
    white = f"drawbox=0:0:iw:ih:white:fill:enable='{when}'"
    beep = f"sine=1000:d={seconds}:sample_rate=48000,volume='gt({when},0)':eval=frame"
    ffmpeg(
        "-f", "lavfi", "-i", f"color=black:s=64x36:d={seconds}:r={rate},{white},select='{select}'", "-f", "lavfi",
        "-i", beep, "-fps_mode", "vfr", *(codecs or ("-c:v", "ffv1", "-c:a", "pcm_s16le")), path,
    )  # fmt: skip
    return path


def corners(
    path: Path, *arguments: object, size: str = "64x36", frames: int = 4, before: Sequence[object] = ()
) -> Path:
    """Write a grey clip with a red box at the top left and a blue one at the bottom right."""
    boxes = "drawbox=0:0:iw/4:ih/4:0xff0000:fill,drawbox=3*iw/4:3*ih/4:iw/4:ih/4:0x0000ff:fill"
    picture = f"color=0x505050:s={size}:r=10:d={frames / 10},format=rgb24,{boxes}"
    ffmpeg(*before, "-f", "lavfi", "-i", picture, *(arguments or X264), path)
    return path


def where(frame: np.ndarray) -> dict[str, str]:
    """Name what stands in the corners of a frame [H,W,3]."""
    y, x = max(1, frame.shape[0] // 10), max(1, frame.shape[1] // 10)
    parts = {"TL": frame[:y, :x], "TR": frame[:y, -x:], "BL": frame[-y:, :x], "BR": frame[-y:, -x:]}
    found = {}
    for name, part in parts.items():
        red, green, blue = part.reshape(-1, 3).mean(0)
        found[name] = "red" if red > 130 > max(green, blue) else "blue" if blue > 130 > max(red, green) else "other"
    return found


def flash_times(path: Path) -> list[float]:
    """Seconds at which a video turns white, as a player shows it. AVI tells no times: its pictures come in turn."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(frame.pts, frame.dts, frame.to_ndarray(format="gray").mean()) for frame in container.decode(stream)]
        base = float(stream.time_base or 0)
        shown = [(pts * base, level) for pts, _, level in frames if pts is not None]
    if path.suffix == ".avi":
        with av.open(str(path)) as container:
            turns = [packet.dts for packet in container.demux(container.streams.video[0]) if packet.size]
        delay = turns.index(frames[0][1])  # a decoder gives pictures out when so many packets more are there
        later = turns[delay:]
        shown = [((turn - later[0]) * base, level) for turn, (*_, level) in zip(later, frames, strict=False)]
    levels = [level for _, level in shown]
    middle = (min(levels) + max(levels)) / 2
    return [time for (time, level), (_, before) in zip(shown[1:], shown, strict=False) if level > middle >= before]


def beep_times(path: Path, track: int = 0) -> list[float]:
    """Seconds at which a track of sound begins to beep, as a player plays it."""
    found, last, begin = [], -1.0, 0.0
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("fltp", "mono", 48000)
        for frame in container.decode(container.streams.audio[track]):
            if frame.pts is not None:  # else it follows what was before
                begin = float(frame.pts * frame.time_base)
            for part in resampler.resample(frame):
                loud = np.abs(part.to_ndarray()[0])
                for index in range(0, len(loud), 48):
                    time = begin + index / 48000
                    if loud[index : index + 48].max() > 0.05:
                        if time - last > 0.3:
                            found.append(time)
                        last = time
                begin += part.samples / 48000
    return found


def kinds(path: Path) -> list[str]:
    """Kinds of the streams of a file, with the codec and the language of sound and text."""
    with av.open(str(path)) as container:
        return [
            f"{stream.type} {stream.codec_context.codec.canonical_name} {stream.metadata.get('language', '')}".strip()
            if stream.type in ("audio", "subtitle") and stream.codec_context else stream.type
            for stream in container.streams
        ]  # fmt: skip


def repacked(source: Path, target: Path, change: dict[int, bytes | None], kind: str | None = None) -> Path:
    """Copy the pictures of a file packet by packet; some with other bytes, or left out (None)."""
    with av.open(str(source)) as given, av.open(str(target), "w", format=kind) as made:
        stream = given.streams.video[0]
        copy = made.add_stream_from_template(stream)
        for index, packet in enumerate(packet for packet in given.demux(stream) if packet.size):
            data = change.get(index, bytes(packet))
            if data is not None:
                again = av.Packet(data)
                again.pts, again.dts, again.time_base = packet.pts, packet.dts, packet.time_base
                again.duration, again.is_keyframe, again.stream = packet.duration, packet.is_keyframe, copy
                made.mux(again)
    return target


def not_coded(index: int) -> bytes:
    """An MPEG-4 picture that says that nothing changed, the `index`th of a second of 25."""
    bits = f"01{'0'}1{index:05b}10"  # type P, same second, marker, time, marker, not coded
    bits += "0" + "1" * (-(len(bits) + 1) % 8)
    return b"\0\0\1\xb6" + int(bits, 2).to_bytes(len(bits) // 8, "big")


def refine(source: Path, out: Path, *more: object, quiet: bool = True) -> int:
    options = ["--size", "64x36", "--threads", 1, "--seed", 1, *(["-q"] if quiet else [])]
    return call("refine", source, "-o", out, *options, *more)


def gaps(found: Iterable[float], wanted: Iterable[float]) -> list[float]:
    """Differences of times that belong together; a count that differs is one of a day."""
    found, wanted = list(found), list(wanted)
    return [abs(a - b) for a, b in zip(found, wanted, strict=True)] if len(found) == len(wanted) else [86400.0]


def rate_of(path: Path) -> Fraction:
    with av.open(str(path)) as container:
        rate: Any = container.streams.video[0].average_rate
        return Fraction(rate)
