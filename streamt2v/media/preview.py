"""Small pictures of a video: a contact sheet or a moving preview."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from streamt2v import files
from streamt2v.chunks import evenly
from streamt2v.errors import ConfigError
from streamt2v.media import frames, isolated, pictures
from streamt2v.media.frames import Frames

log = logging.getLogger(__name__)
SHEET_FRAMES, ANIMATED_FRAMES, WIDTH = 24, 96, 320
ANIMATIONS = {".webp": "WEBP", ".gif": "GIF"}


def shrink(images: Frames, width: int = WIDTH) -> Frames:
    """Scale frames [F,H,W,3] down to a width; narrower ones are returned unchanged."""
    scale = min(1.0, width / images.shape[2])
    size = max(1, round(images.shape[1] * scale)), max(1, round(images.shape[2] * scale))
    return frames.to_u8(frames.resize(frames.to_float(images), size))


def pick(source: Iterable[Frames], num_frames: int, count: int, start: int = 0) -> Iterator[Frames]:
    """Yield those of `count` frames, evenly spaced over the whole video, that are in a stream starting at `start`."""
    wanted = set(evenly(num_frames, count))
    for part in source:
        chosen = [part[index] for index in range(len(part)) if start + index in wanted]
        start += len(part)
        if chosen:
            yield np.stack(chosen)


def thumbnails(path: Path, count: int = SHEET_FRAMES, width: int = WIDTH) -> Frames:
    """Return up to `count` small, evenly spaced frames of a video: [F,h,w,3]. Raises VideoError."""
    num_frames, source = isolated.probe(path).frames, isolated.read_frames(path, note=log.warning)
    return np.concatenate([shrink(part, width) for part in pick(source, num_frames, count)])


def check(target: Path) -> None:
    """Raise ConfigError unless the ending of a name says what to make."""
    if target.suffix.lower() not in (".png", *ANIMATIONS):
        raise ConfigError(f"the preview {target} must end in .png (a contact sheet), .webp or .gif (moving)")


def write(path: Path, target: Path, width: int = WIDTH) -> None:
    """Write a preview of a video: a contact sheet as PNG, or 96 frames at the video's rate as WebP or GIF.

    Raises:
        VideoError: the video cannot be read. OutputError: the preview cannot be written. ConfigError: see `check`.
    """
    check(target)
    if target.suffix.lower() == ".png":
        pictures.write_image(target, frames.contact_sheet(thumbnails(path, SHEET_FRAMES, width)))
    else:
        moving, fps = thumbnails(path, ANIMATED_FRAMES, width), isolated.probe(path).fps
        files.write_bytes(target, pictures.encode_animation(moving, fps, ANIMATIONS[target.suffix.lower()]))
