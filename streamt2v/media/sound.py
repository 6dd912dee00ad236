"""Sound, subtitles and chapters: what a source has besides its pictures, and how the result carries it.

Every track is tried before the work starts, with the arguments that write it at the end: copied if the container can
hold it, else re-encoded, else re-encoded with a plain rate and channels, else left out. So users hear first what cannot
be done. Times are kept on the source's own clock, on which frame 0 of the result is at `Clock.start`: sound and picture
stay in sync whichever begins first; sound before the first frame or after the last is cut off.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from streamt2v import files
from streamt2v.errors import InputError, OutputError, VideoError
from streamt2v.media import ffmpeg, isolated, reading
from streamt2v.media.reading import Track
from streamt2v.media.writing import Extras

_SMALL = 0.05  # seconds: a shorter lead over the picture is codec priming, which players skip


@dataclass(frozen=True)
class Holder:
    """What a container can hold: codecs that are copied, the encoder of all other sound, the subtitle format."""

    name: str
    copied: frozenset[str]
    encoder: str
    encoded: str
    text: str


_MP4 = frozenset({"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"})
HOLDERS = {
    ".mp4": Holder("MP4", _MP4, "aac", "AAC", "mov_text"),
    ".mov": Holder("QuickTime", _MP4 - {"opus", "flac"}, "aac", "AAC", "mov_text"),
    ".webm": Holder("WebM", frozenset({"opus", "vorbis"}), "libopus", "Opus", "webvtt"),
}
_TEXTS = {"subrip", "srt", "ass", "ssa", "mov_text", "webvtt", "text"}


@dataclass(frozen=True)
class Carried:
    """How the tracks of a source go into the result, and what users should know about it first."""

    extras: Extras = field(default_factory=Extras)
    notices: tuple[str, ...] = ()


def carry(source: Path, length: Fraction, suffix: str = ".mp4") -> Carried:
    """Find out how a result of `length` seconds carries what its source has besides pictures.

    Raises:
        VideoError: see `isolated.probe`. OutputError: there is no ffmpeg.
    """
    return _carry(source, length, suffix.lower(), files.stamp(source))


def add(path: Path, length: Fraction, suffix: str = ".mp4") -> Carried:
    """Find out how a result of `length` seconds gets the first sound of a file, cut to its length.

    Raises:
        InputError: the file has no sound that can be read. OutputError: there is no ffmpeg.
    """
    return _add(path, length, suffix.lower(), files.stamp(path))


@lru_cache(maxsize=8)
def _add(path: Path, length: Fraction, suffix: str, _stamp: tuple[int, int, int] | None) -> Carried:
    if not path.is_file():
        raise InputError(f"{path} is not a file", "--audio takes a file with sound, such as .mp3, .wav or .mp4")
    if (holder := HOLDERS.get(suffix)) is None:
        return Carried(notices=(f"a {suffix or 'folder'} cannot hold sound, which is left out",))
    ffmpeg.check_ffmpeg()
    inputs = ffmpeg.input_options(path, ffmpeg.SOUND_OPTIONS)
    track = next((track for track in isolated.tracks(path) if track.kind == "audio"), None)
    ways = _ways(track, holder) if track else iter(())
    way = next((way for way in ways if track and _works(inputs, track, way, length, suffix)), None)
    if track is None or way is None:
        raise InputError(f"{path} has no sound that can be read", "--audio takes a file such as .mp3, .wav or .mp4")
    return Carried(_extras(inputs, [(track, way)], 0, length))


@lru_cache(maxsize=8)
def _carry(source: Path, length: Fraction, suffix: str, _stamp: tuple[int, int, int] | None) -> Carried:
    found = isolated.probe(source)
    tracks = [track for track in found.tracks if track.kind in ("audio", "subtitle")]
    if (holder := HOLDERS.get(suffix)) is None:
        silent = f"a {suffix or 'folder'} cannot hold sound, which is left out"
        return Carried(Extras(), (silent,) if found.has_audio else ())
    if tracks:
        ffmpeg.check_ffmpeg()
    start = found.clock.start
    if found.clock.joined:  # ffmpeg then starts the first track at 0 and joins what follows
        start -= Fraction(min((track.begin for track in tracks), default=0.0))
    timing = [*([] if found.clock.joined else ["-copyts"]), "-itsoffset", f"{float(-start):.6f}"]
    inputs = [*timing, *ffmpeg.input_options(source)]
    kept, notices = list[tuple[Track, list[str]]](), list[str]()
    for track in tracks:
        name = _name(track, tracks)
        early = float(found.clock.start) - track.begin
        cut = ["-copypriorss", "0"] if track.kind == "audio" and early > _SMALL else []
        written, reason = None, f"{holder.name} cannot hold it, and it cannot be re-encoded"
        if -early >= length:
            reason = "it begins after the picture ends"
        else:
            tried = ([*cut, *way] for way in _ways(track, holder))
            written = next((way for way in tried if _works(inputs, track, way, length, suffix)), None)
        if written is None:
            notices.append(f"{source}: {name} is left out: {reason}")
            continue
        kept.append((track, written))
        if track.kind == "audio" and "copy" not in written:
            notices.append(f"{source}: {name} is re-encoded as {holder.encoded}")
        if cut:
            notices.append(f"{source}: the first {early:.2f} s of {name} come before the picture and are cut off")
    others = [track for track in found.tracks if track.kind not in ("audio", "subtitle")]
    if others:
        notices.append(f"{source}: {len(others)} data track{'s' * (len(others) > 1)} left out")
    return Carried(_extras(inputs, kept, found.chapters, length), tuple(notices))


def _name(track: Track, tracks: Sequence[Track]) -> str:
    kind = "sound" if track.kind == "audio" else "subtitles"
    same = [other.index for other in tracks if other.kind == track.kind]
    number = f" {same.index(track.index) + 1}" if len(same) > 1 else ""
    facts = ", ".join(filter(None, (track.codec, track.language if track.language != "und" else "")))
    return f"{kind}{number} ({facts or 'of an unknown kind'})"


def _ways(track: Track, holder: Holder) -> Iterator[list[str]]:
    """Yield the arguments that may write one track, best first; {} stands for its number in the result."""
    if track.kind == "subtitle":
        if track.codec in _TEXTS:
            yield ["-c:s:{}", holder.text]
        return
    if track.codec in holder.copied:
        yield ["-c:a:{}", "copy"]
    # Fills gaps, and starts at frame 0 wherever the track starts.
    filled = ["-filter:a:{}", "aresample=async=1:first_pts=0"]
    rate = f"{64 * max(3, track.channels)}k"
    yield ["-c:a:{}", holder.encoder, "-b:a:{}", rate, *filled]
    yield ["-c:a:{}", holder.encoder, "-b:a:{}", "192k", "-ar:a:{}", "48000", "-ac:a:{}", "2", *filled]


def _numbered(arguments: Sequence[str], number: int) -> list[str]:
    return [argument.replace("{}", str(number)) for argument in arguments]


def _works(source: Sequence[str], track: Track, way: Sequence[str], length: Fraction, suffix: str) -> bool:
    """Return whether one track can be written this way, by writing all of it to a temporary file."""
    with tempfile.TemporaryDirectory(prefix="streamt2v-") as folder:
        path = Path(folder) / f"track{suffix}"
        arguments = [*source, "-map", f"0:{track.index}", *_numbered(way, 0), "-t", f"{float(length):.6f}"]
        try:
            ffmpeg.run_ffmpeg([*arguments, "-map_chapters", "-1", "-f", suffix[1:]], path, path)
            return reading.holds_packets(path)
        except (OutputError, VideoError):
            return False


def _extras(inputs: Sequence[str], kept: Sequence[tuple[Track, list[str]]], chapters: int, length: Fraction) -> Extras:
    """Return the arguments for all tracks together: pictures come from input 0, tracks from input 1, the source."""
    if not kept and not chapters:
        return Extras()
    outputs = list[str]()
    for kind, letter in (("audio", "a"), ("subtitle", "s")):
        for number, (track, way) in enumerate((track, way) for track, way in kept if track.kind == kind):
            outputs += ["-map", f"1:{track.index}", *_numbered(way, number)]
            outputs += [f"-metadata:s:{letter}:{number}", f"language={track.language}"]
            if track.title:
                outputs += [f"-metadata:s:{letter}:{number}", f"title={track.title}"]
            outputs += [f"-disposition:{letter}:{number}", "default" if track.default else "0"]
    outputs += ["-t", f"{float(length):.6f}", "-map_chapters", "1" if chapters else "-1"]
    return Extras(tuple(inputs), tuple(outputs), sum(track.kind == "audio" for track, _ in kept))
