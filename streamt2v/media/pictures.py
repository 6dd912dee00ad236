"""Pictures: read from files of any depth and colour profile, written as PNG, JPEG or animations."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from streamt2v import files
from streamt2v.errors import InputError
from streamt2v.media.shape import MAX_PIXELS, MAX_SIZE

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

    from streamt2v.media.frames import Frames

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


@contextlib.contextmanager
def opened(path: Path, *formats: str) -> Iterator[ImageFile]:
    """Open a picture of known formats; whatever a damaged one raises in the body becomes an InputError naming it."""
    from PIL import Image  # slow to import, and only pictures need it

    if not path.is_file():
        raise InputError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats or _FORMATS) as file:  # reads only the header
                if file.width * file.height > MAX_PIXELS:
                    raise InputError(f"it has {file.width}x{file.height} pixels", f"the limit is {MAX_SIZE}")
                yield file
    except InputError as error:
        raise InputError(f"{path}: {error.message}", error.hint) from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Warning, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}", "use PNG, JPEG, WebP, BMP or TIFF") from error


def read(path: Path) -> Frames:
    """Read a picture as uint8 RGB [H,W,3]: upright by its orientation tag, in sRGB, transparency over white.

    Raises:
        InputError: the file is missing or not a readable PNG, JPEG, WebP, BMP or TIFF.
    """
    from PIL import ImageOps

    with opened(path) as file:
        image: Image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):  # Pillow would clip these instead of scaling them
            deep = image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PNG")
            grey = to_levels(np.asarray(image), 65535 if deep else None)
            return np.repeat(grey[..., None], 3, axis=2)
        return over_white(to_srgb(image))


def over_white(image: Image) -> Frames:
    """Return a picture as uint8 RGB [H,W,3], its transparent parts over white."""
    from PIL import Image

    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(image.convert("RGB"))


def to_srgb(picture: Image) -> Image:
    """Convert a picture to RGB or RGBA in sRGB by its ICC profile, unless the profile is broken.

    Relative colorimetric with black point compensation, as in browsers.
    """
    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if picture.mode in ("P", "PA", "1", "LA", "La", "RGBa", "RGBX"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if picture.mode == "LAB":
        given: Any = ImageCms.createProfile("LAB")
    elif not profile:
        return picture
    else:
        try:
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        except (ImageCms.PyCMSError, OSError):
            return picture
    alpha = picture.getchannel("A") if picture.mode == "RGBA" else None
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    try:
        plain, screen = picture if alpha is None else picture.convert("RGB"), ImageCms.createProfile("sRGB")
        shown = ImageCms.profileToProfile(plain, given, screen, intent, "RGB", flags=flags)
    except (ImageCms.PyCMSError, ValueError):  # such as a CMYK profile in an RGB picture
        return picture
    assert shown is not None
    if alpha is not None:
        shown.putalpha(alpha)
    return shown


def to_levels(values: npt.NDArray[Any], most: int | None = None) -> npt.NDArray[np.uint8]:
    """Scale grey values [H,W] of any range to levels 0..255.

    Floating-point values from 0 to 1 run from black to white. Integers, and floats above 1, count as 8 bits if none
    exceeds 255, else as 16 bits if none exceeds 65535. Anything larger, or below 0, is stretched to the full
    range.

    Args:
        values: floats or integers.
        most: the value of white if the file defines it: 65535 for 16 bits.

    Raises:
        InputError: a value is NaN or infinite.
    """
    wide = np.asarray(values, np.float64)
    if not np.isfinite(wide).all():
        raise InputError("the picture holds NaN or infinite values", "save it as PNG")
    low, high = float(wide.min()), float(wide.max())
    if most is None:
        floating = np.issubdtype(values.dtype, np.floating)
        most = next((white for white in ((1,) if floating else ()) + (255, 65535) if high <= white), None)
    if most is None or low < 0:
        wide, most = (wide - low) / ((high - low) or 1), 1
    return np.asarray(wide * (255 / most) + 0.5, np.uint8)


def write_image(path: Path, image: Frames) -> None:
    """Write one uint8 picture [H,W,3] as PNG; the file appears complete or not at all."""
    files.write_bytes(path, encode_image(image, "PNG"))


def encode_image(image: Frames, kind: str) -> bytes:
    """Return one uint8 picture [H,W,3] as the bytes of a PNG or JPEG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, kind, quality=90)
    return buffer.getvalue()


def animation_times(count: int, fps: Fraction, tick: int, least: int) -> list[tuple[int, int]]:
    """Return (frame, milliseconds) of an animation that lasts as long as its frames do.

    Delays are whole ticks, whose rounding errors never accumulate; frames that come faster than viewers show them are
    dropped.

    Args:
        count: number of frames, at least 1.
        fps: their rate.
        tick: unit of a delay in ms: 10 in GIF, 1 in WebP.
        least: shortest delay that viewers honour, in ms; below 20 they play a GIF at 10 frames a second.
    """
    times: list[tuple[int, int]] = []
    begun, end = 0, round(1000 * count / fps / tick) * tick
    for frame in range(count):
        until = min(end, round(1000 * (frame + 1) / fps / tick) * tick)
        if until - begun >= least:
            times.append((frame, until - begun))
            begun = until
    if not times:
        return [(0, max(end, least))]
    frame, shown = times[-1]
    return [*times[:-1], (frame, shown + end - begun)]


def encode_animation(images: Frames, fps: Fraction, kind: str) -> bytes:
    """Return uint8 frames [F,H,W,3] as the bytes of a WEBP or GIF file that loops at a rate."""
    from PIL import Image

    times = animation_times(len(images), fps, 10 if kind == "GIF" else 1, 20 if kind == "GIF" else 5)
    pictures = [Image.fromarray(np.ascontiguousarray(images[frame])) for frame, _ in times]
    if kind == "GIF":  # Pillow's default quantizer takes 20 s for 48 frames of 256x144, this one 0.3 s
        pictures = [picture.quantize(method=Image.Quantize.FASTOCTREE) for picture in pictures]
    buffer = io.BytesIO()
    delays = [shown for _, shown in times]
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:], duration=delays, loop=0)
    return buffer.getvalue()
