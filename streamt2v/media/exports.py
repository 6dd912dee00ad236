"""Outputs other than MP4: WebM, QuickTime with ProRes, GIF, WebP, and a folder of PNGs, chosen by the name.

They are encoded at the end, from a growing file that is lossless in this case, so nothing is compressed twice. The
recipe lies in a file beside them, with the SHA-256 of what was written, and also in the comment tag if there is one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from fractions import Fraction
from pathlib import Path

from streamt2v import files
from streamt2v.errors import OutputError, VideoError
from streamt2v.media import ffmpeg, reading, seal, stills, writing

_TAGS = "-color_primaries bt709 -color_trc bt709 -colorspace bt709 -color_range tv"
_BT709 = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
_PALETTE = "split[a][b];[a]palettegen=stats_mode=full[p];[b][p]paletteuse=dither=sierra2_4a"
_ENCODING = {
    ".webm": f"-vf {_BT709},format=yuv420p {_TAGS} -c:v libvpx-vp9 -crf 24 -b:v 0 -row-mt 1",
    ".mov": f"-vf {_BT709},format=yuv422p10le {_TAGS} -c:v prores_ks -profile:v 3 -vendor apl0",
    ".gif": f"-vf {_PALETTE} -loop 0",
    ".webp": "-c:v libwebp_anim -quality 90 -loop 0 -pix_fmt yuv420p",
}
KINDS = (".mp4", *_ENCODING, "")
"""Endings of outputs; the empty one means a folder of PNGs."""
_MAX_GIF_RATE = 50  # viewers play anything faster at 10 frames a second


def sidecar(path: Path) -> Path:
    """Return the path of the recipe of an output that cannot hold it itself."""
    return path / stills.RECIPE if not path.suffix else path.with_name(f"{path.name}.json")


def write(writer: writing.SegmentWriter, out_path: Path, recipe: str, extras: writing.Extras) -> None:
    """Encode the frames of a writer as an output other than MP4, which appears complete or not at all.

    Raises:
        OutputError: the output cannot be written, or does not hold what it should.
    """
    kind = out_path.suffix.lower()
    files.append_bytes(writer.path, b"", writer.mark.size)
    given = ["-i", ffmpeg.url(writer.path), *extras.inputs, "-map", "0:v:0"]
    if not kind:
        _folder(given, writer, out_path, recipe)
        return
    arguments = [*given, *_ENCODING[kind].split(), "-map_metadata:g", "-1", "-map_metadata:s", "-1"]
    if kind == ".gif" and writer.fps > _MAX_GIF_RATE:
        arguments[arguments.index("-vf") + 1] = f"fps={_MAX_GIF_RATE},{_PALETTE}"
    if kind in (".webm", ".mov"):
        arguments += [*extras.outputs, "-metadata", f"comment={recipe[:30_000]}"]
    with files.replacing(out_path) as part:
        if said := ffmpeg.run_ffmpeg([*arguments, "-fflags", "+bitexact", "-f", kind[1:]], part, out_path):
            writing.log.warning("ffmpeg on %s: %s", out_path, said)
        _check(part, kind, writer, extras, out_path)
        files.write_bytes(sidecar(out_path), _with_digest(recipe, sha256_of(part)))


def _folder(given: list[str], writer: writing.SegmentWriter, out_path: Path, recipe: str) -> None:
    temporary = files.temporary_name(out_path)
    with files.output_errors(out_path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            ffmpeg.run_ffmpeg([*given, "-start_number", "0", "-f", "image2"], temporary / "%06d.png", out_path)
            found = stills.numbered(temporary)
            if len(found) != writer.mark.frames:
                raise OutputError(f"{out_path} holds {len(found)} pictures instead of {writer.mark.frames}")
            files.write_bytes(temporary / stills.RECIPE, _with_digest(recipe, sha256_of(temporary)))
            for old in [*stills.numbered(out_path), out_path / stills.RECIPE] if out_path.is_dir() else []:
                old.unlink(missing_ok=True)
            if out_path.is_dir():  # other files in it are kept
                for new in temporary.iterdir():
                    new.replace(out_path / new.name)
            else:
                temporary.rename(out_path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _check(part: Path, kind: str, writer: writing.SegmentWriter, extras: writing.Extras, out_path: Path) -> None:
    if kind == ".webp":  # `part` does not end in .webp, by which `probe` knows it
        from PIL import Image

        with Image.open(part) as picture:
            found: tuple[object, ...] = (picture.size, getattr(picture, "n_frames", 1) > 1 or writer.mark.frames == 1)
        wanted: tuple[object, ...] = ((writer.width, writer.height), True)
    else:
        info = reading.probe(part)
        near = abs(float(info.frames / info.fps * writer.fps / writer.mark.frames) - 1) < 0.02 or kind == ".gif"
        exact = info.frames if kind != ".gif" else writer.mark.frames
        found = (exact, info.width, info.height, near, sum(track.kind == "audio" for track in info.tracks))
        wanted = (writer.mark.frames, writer.width, writer.height, True, extras.sounds if kind != ".gif" else 0)
    if found != wanted:
        raise OutputError(f"{out_path} holds {found} instead of {wanted}")


def _with_digest(recipe: str, digest: str) -> bytes:
    return (json.dumps({**json.loads(recipe), "sha256": digest}, indent=1) + "\n").encode()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of the pictures in a folder."""
    if not path.is_dir():
        return files.hashed(path).hexdigest()
    sha256 = hashlib.sha256()
    for part in stills.numbered(path):
        sha256.update(part.name.encode() + part.read_bytes())
    return sha256.hexdigest()


def recipe_beside(path: Path) -> str | None:
    """Return the recipe of an output other than MP4, or None."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        text = sidecar(path).read_text("utf-8")
        if path.suffix.lower() in KINDS[1:] and isinstance(table := json.loads(text), dict) and "streamt2v" in table:
            return text
    return None


def check_seal(path: Path) -> None:
    """Compare an output with the SHA-256 in its recipe, or an MP4 with its own seal.

    Raises:
        VideoError: the output is missing, truncated, changed since, or was not written by streamt2v.
    """
    if path.suffix.lower() not in KINDS[1:]:
        seal.check_seal(path)
        return
    if not path.exists():
        raise VideoError(f"{path} does not exist")
    if (recipe := recipe_beside(path)) is None:
        raise VideoError(
            f"{path} has no recipe beside it", f"{sidecar(path)} is gone, or another program made the video"
        )
    if json.loads(recipe).get("sha256") != sha256_of(path):
        raise VideoError(f"{path} is damaged: its content is not what was written")


def rate_is_kept(path: Path, found: Fraction, asked: Fraction) -> bool:
    """Return whether the rate of an output is the requested one, as exactly as its format can store it."""
    kind = path.suffix.lower()
    if kind in (".gif", ".webp"):
        return True  # ticks of 10 ms and 1 ms, and equal frames are merged
    return found == asked if kind in (".mp4", "", ".mov") else abs(float(found / asked) - 1) < 0.001
