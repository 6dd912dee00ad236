"""600 files made at random of what the other tests look at one by one: read as promised, or refused in a sentence."""

import random
from pathlib import Path

import numpy as np
import pytest

from streamt2v.errors import StreamT2VError
from streamt2v.media import exports, isolated, sound, writing
from tests.media.makers import FLASHES, beep_times, ffmpeg, flash_times

PICTURES = {  # by container
    ".mp4": ["libx264", "libx265", "mpeg4"], ".mkv": ["libx264", "ffv1", "libvpx", "mpeg2video"],
    ".mov": ["prores_ks", "mjpeg", "libx264"], ".avi": ["mpeg4", "mjpeg", "libx264"], ".ts": ["libx264", "mpeg2video"],
    ".webm": ["libvpx", "libvpx-vp9"], ".flv": ["flv1", "libx264"], ".wmv": ["wmv2"],
}  # fmt: skip
SOUNDS = {
    ".mp4": ["aac", "libmp3lame", "ac3", "alac", ""],
    ".mkv": ["aac", "libvorbis", "pcm_s16le", "flac", "libmp3lame", ""],
    ".mov": ["pcm_s16be", "aac", "alac", ""], ".avi": ["libmp3lame", "pcm_s16le", "ac3", ""], ".ts": ["mp2", "aac", ""],
    ".webm": ["libopus", "libvorbis", ""], ".flv": ["aac", "libmp3lame", ""], ".wmv": ["wmav2", ""],
}  # fmt: skip
SELECTS = ["1", "1", "not(mod(n,2))", "mod(n,5)", "not(between(t,1.3,1.8))", "lt(n,30)+not(mod(n,4))"]


def random_file(folder: Path, draw: random.Random) -> tuple[Path, str]:
    """Write a clip of 2.4 s with a flash and a beep at each of `FLASHES`; return it and how it was made."""
    kind = draw.choice(list(PICTURES))
    picture, voice = draw.choice(PICTURES[kind]), draw.choice(SOUNDS[kind])
    rate, select = draw.choice(["12", "24000/1001", "25", "30", "30000/1001", "50", "59.94"]), draw.choice(SELECTS)
    size, pixel = draw.choice(["64x36", "50x38", "96x54"]), draw.choice(["1", "1", "16/11", "8/9"])
    when = "+".join(f"between(t,{time - 0.001},{time + 0.199})" for time in FLASHES)
    path = folder / f"in{kind}"
    arguments: list[object] = [
        "-f", "lavfi", "-i",
        f"color=black:s={size}:d=2.4:r={rate},drawbox=0:0:iw:ih:white:fill:enable='{when}',"
        f"select='{select}',setsar={pixel}",
    ]  # fmt: skip
    if voice:
        arguments += ["-f", "lavfi", "-i", f"sine=900:d=2.4:sample_rate=48000,volume='gt({when},0)':eval=frame"]
        hertz = {"libopus": [48000], "ac3": [48000]}.get(voice, [22050, 44100, 48000])
        arguments += ["-c:a", voice, "-ar", draw.choice(hertz), "-ac", draw.choice([1, 2])]
    arguments += ["-c:v", picture, "-fps_mode", "vfr"]
    arguments += ["-pix_fmt", "yuv420p"] if picture not in ("mjpeg", "prores_ks", "ffv1") else []
    arguments += ["-x265-params", "log-level=none"] if picture == "libx265" else []
    try:
        ffmpeg(*arguments, path)
    except Exception:  # a rate or size that the encoder does not take
        return random_file(folder, draw)
    made = f"{kind} {picture} {voice} {rate} {select} {size} {pixel}"
    change = draw.choice(["", "", "", "shifted", "turned", "cut", "noise"])
    if change == "shifted" and kind in (".mp4", ".mkv", ".mov", ".ts"):
        moved, by = folder / f"moved{kind}", draw.choice([0.3, 0.7])
        which = (
            ["-itsoffset", by, "-i", path, "-i", path]
            if draw.random() < 0.5
            else ["-i", path, "-itsoffset", by, "-i", path]
        )
        ffmpeg(*which, "-map", "0:v", "-map", "1:a?", "-c", "copy", moved)
        path = moved
    elif change == "turned" and kind in (".mp4", ".mov"):
        moved = folder / f"moved{kind}"
        ffmpeg("-display_rotation", draw.choice([3, 90, 180, 270]), "-i", path, "-c", "copy", moved)
        path = moved
    elif change in ("cut", "noise"):
        data = bytearray(path.read_bytes())
        if change == "cut":
            data = data[: draw.randrange(len(data))]
        else:
            for _ in range(draw.choice([1, 4, 30])):
                data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
    else:
        change = ""
    return path, f"{made} {change}"


def check(path: Path, made: str, folder: Path) -> str:
    """Do what a run does, without networks, and compare; return what came of it."""
    notes: list[str] = []
    try:
        found = isolated.probe(path)
        carried = sound.carry(path, found.frames / found.fps)
        writer = writing.SegmentWriter(folder / "growing", found.height // 2 * 2, found.width // 2 * 2, found.fps)
        for group in isolated.read_frames(path, note=notes.append):
            assert group.shape[1:3] == (found.height, found.width), made
            writer.append(np.ascontiguousarray(group[:, : writer.height, : writer.width]))
        assert writer.mark.frames == found.frames, made
        writer.finish(folder / "out.mp4", extras=carried.extras)
    except StreamT2VError as error:
        assert "\n" not in error.message.strip() or "ffmpeg" in error.message, made
        assert made.endswith(("cut", "noise")), f"{made}: {error.message}"
        return "refused"
    exports.check_seal(folder / "out.mp4")
    again = isolated.probe(folder / "out.mp4")
    assert (again.frames, again.fps) == (found.frames, found.fps), made
    if made.endswith(("cut", "noise")) or not again.has_audio:
        return "read"
    # Sound that comes after the last picture is cut off, between two of its packets.
    end, one = float(found.clock.start + found.frames / found.fps), 1 / float(found.fps)
    beeps, flashes = [beep for beep in beep_times(path) if beep < end + one], flash_times(path)
    heard, shown = beep_times(folder / "out.mp4"), flash_times(folder / "out.mp4")
    surely = sum(beep < end - 0.05 for beep in beeps)
    assert surely <= len(heard) <= len(beeps) and len(shown) == len(flashes) == len(FLASHES), made
    before = [beep - flash for beep, flash in zip(beeps, flashes, strict=False)]
    after = [beep - flash for beep, flash in zip(heard, shown, strict=False)]
    assert max(abs(a - b) for a, b in zip(after, before, strict=False)) < one + 0.012, (made, after, before)
    return "in time"


@pytest.mark.parametrize(
    "part",
    [0, *(pytest.param(part, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]) for part in range(1, 31))],
)
def test_files_of_every_kind(part: int, tmp_path: Path) -> None:
    """Part 0 is 4 files; 30 parts of 20 are the deep suite."""
    draw = random.Random(f"media {part}")
    seen = []
    for _ in range(4 if part == 0 else 20):
        path, made = random_file(tmp_path, draw)
        seen.append(check(path, made, tmp_path))
    assert "in time" in seen
