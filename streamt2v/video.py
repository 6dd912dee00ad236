"""Video in and out: the one module that knows PyAV and the ffmpeg binary.

Reading, the lossless store and the encoding of segments run in this process (PyAV): errors are raised, and nothing
goes on writing after we die. Measured for 16 frames of 256x144 (two cores, four encoder threads): 40 ms a segment here,
60 ms through a process of the ffmpeg binary. The final file is a copy (no re-encoding) made by the ffmpeg binary,
audio included.

The growing output is fragmented MP4: one `moov`, then one `moof` + `mdat` pair a segment. It plays in any player at
any moment, keeps exact timestamps at any rate (MPEG-TS rounds them to 1/90000 s), grows by plain appending, and is
whole again after being cut back to the end of a segment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
import subprocess
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from streamt2v import colour, containers, files, pictures, shape, stills
from streamt2v.clock import MAX_RATE, Clock, Straightened, exact_rate, measure, placed
from streamt2v.errors import ConfigError, OutputError, ResumeError, VideoError

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from streamt2v.frames import Frames

log = logging.getLogger(__name__)

# Refuses scripts and playlists (concat, hls, ...) that would open other files, whatever the file is called.
_INPUT_OPTIONS = {"format_whitelist": containers.DEMUXERS, "protocol_whitelist": "file"}
_MAX_PIXELS = 8192 * 4320
_MAX_COMMENT = 64 * 1024
# Plain swscale drops fractions and repeats chroma samples: a smooth picture came back at 37 dB and 1.2 levels darker,
# with these flags at 51 dB and unchanged in the mean. A video that is extended again and again would show it.
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
STALL_SECONDS = 60.0  # ffmpeg copies gigabytes in that time; its file neither grows nor changes only when it hangs
# Size, kind and name of an MP4 box that players pass over; the SHA-256 of all bytes before it follows.
_SEAL = (56).to_bytes(4, "big") + b"uuid" + b"streamt2v sha256"
_SEAL_BYTES = len(_SEAL) + 32


@dataclass(frozen=True)
class Track:
    """What a file holds beside its pictures: one stream, and when it begins, seconds on the clock of the file."""

    kind: str
    index: int
    codec: str
    begin: float
    channels: int
    language: str
    title: str
    default: bool


@dataclass(frozen=True)
class Extras:
    """What a finished video gets besides its pictures: arguments of ffmpeg for one more input, and for the output."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    sounds: int = 0


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds: frames on a steady clock, size in square pixels as it is shown, sound, comment tag.

    `damaged` counts what could not be decoded, as far as the video was decoded to be measured.
    """

    width: int
    height: int
    clock: Clock
    tracks: tuple[Track, ...]
    comment: str
    chapters: int = 0
    damaged: int = 0

    @property
    def frames(self) -> int:
        """Number of frames that `read_frames` gives."""
        return self.clock.frames

    @property
    def fps(self) -> Fraction:
        """Exact frame rate."""
        return self.clock.rate

    @property
    def has_audio(self) -> bool:
        """Whether there is sound."""
        return any(track.kind == "audio" for track in self.tracks)


# -- reading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    """Open a local video; every failure of the library in the body becomes a VideoError that names the file."""
    if not path.exists():
        raise VideoError(f"{path} does not exist")
    if not path.is_file():
        raise VideoError(f"{path} is not a file", "give the path of a video file")
    try:
        if path.stat().st_size == 0:
            raise VideoError(f"{path} is empty (0 bytes)")
        url = f"file:{path.absolute()}"
        with av.open(url, options=dict(_INPUT_OPTIONS), metadata_errors="replace") as container:
            yield container
    except PermissionError as error:
        raise VideoError(f"{path} cannot be read: permission denied") from error
    # What hostile files were seen to raise from the library, besides its own errors.
    except (av.error.FFmpegError, OSError, ValueError, IndexError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"{path} cannot be read as a video: {reason}", containers.hint(path)) from error


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    """Return the first real video stream (cover art is not one), set up for threaded decoding."""
    for stream in container.streams.video:
        if stream.disposition & stream.disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise VideoError(f"{path} uses a video format that is not known")
        width, height = stream.codec_context.width, stream.codec_context.height
        if not 0 < width * height <= _MAX_PIXELS:
            raise VideoError(f"{path} declares frames of {width}x{height} pixels", "up to 8192x4320 is read")
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}  # also of what it did not declare
        return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no"
    raise VideoError(f"{path} holds no video ({kinds} streams only)")


def declared_size(path: Path) -> tuple[int, int]:
    """Return the (H, W) that a video announces, nothing of which was decoded. Raises as `probe`."""
    if stills.handles(path):
        return next((picture.shape[0], picture.shape[1]) for _, picture in stills.read(path))
    with _opened(path) as container:
        context = _video_stream(container, path).codec_context
        return context.height, context.width


def is_longer(path: Path, count: int) -> bool:
    """Tell whether a video has more than so many frames; none is decoded. Raises as `probe`."""
    if stills.handles(path):
        return path.is_dir() and len(stills.numbered(path)) > count
    with _opened(path) as container:
        stream = _video_stream(container, path)
        if "mp4" in container.format.name and stream.frames:  # its index, beside which there are none
            return stream.frames > count
        packets = (packet for packet in container.demux(stream) if packet.size)
        return next(islice(packets, count, None), None) is not None


def probe(path: Path) -> VideoInfo:
    """Measure a video: its frames are counted by the times of its pictures, not taken from the header.

    MP4 tells these without decoding; other containers are decoded. A file that ends before what its header announces is
    refused as truncated (Matroska would otherwise just be shorter).

    Raises:
        VideoError: the file is missing, empty, a directory, no video, damaged or truncated.
    """
    if stills.handles(path):
        clock, height, width = stills.measured(path)
        return VideoInfo(width, height, clock, (), "")
    with _opened(path) as container:
        stream = _video_stream(container, path)
        time, first = next(_pictures(container, stream), (None, None))
        if first is None or time is None:
            raise VideoError(f"{path} holds no video frame that can be decoded")
        shown = _to_rgb(first, _Reading(stream, first, path))
    with _opened(path) as container:
        stream = _video_stream(container, path)
        announced = [rate for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate) if rate]
        scan = _Scan(container, stream, path)
        times = scan.of_packets(time) if _tells_times(container) else scan.of_pictures()
        if not announced and len(times) < 2:
            raise VideoError(f"{path} has no frame rate")
        time_base = stream.time_base or Fraction(1, 90_000)
        clock = measure(times, time_base, announced, scan.hold)
        scan.check_length(float(2 / clock.rate))
        return VideoInfo(
            width=shown.shape[1],
            height=shown.shape[0],
            clock=dataclasses.replace(clock, joined=scan.joined),
            tracks=tuple(_track(other) for other in container.streams if other.type != "video"),
            chapters=len(container.chapters()),
            comment=next((text for key, text in container.metadata.items() if key.lower() == "comment"), ""),
            damaged=scan.damaged,
        )


def _track(stream: Any) -> Track:
    context, meta = stream.codec_context, {key.lower(): text for key, text in stream.metadata.items()}
    return Track(
        kind=stream.type,
        index=stream.index,
        codec="" if context is None else context.codec.canonical_name,
        begin=float((stream.start_time or 0) * (stream.time_base or 0)),
        channels=getattr(context, "channels", 0) or 0,
        language=meta.get("language", "und"),
        title=meta.get("title", "").replace("\0", ""),
        default=bool(stream.disposition & stream.disposition.default),
    )


def _tells_times(container: InputContainer) -> bool:
    """Tell whether the container has one packet a picture, with the time at which it is shown."""
    return "mp4" in container.format.name


class _Scan:
    """One pass over a file: when its pictures are shown, where it ends, and what cannot be decoded."""

    def __init__(self, container: InputContainer, stream: VideoStream, path: Path) -> None:
        self.container, self.stream, self.path = container, stream, path
        self.packets = self.damaged = self.hold = 0
        self.end = 0.0
        self.joined = False

    def _packets(self) -> Iterator[Packet[Any]]:
        cut_is_damage = not self.container.format.name.startswith("mpeg")  # a broadcast goes on after a gap
        for packet in self.container.demux():
            if packet.is_corrupt and cut_is_damage:
                raise VideoError(f"{self.path} is damaged or truncated after {self.packets} frames")
            if packet.pts is not None and packet.time_base is not None:
                self.end = max(self.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == self.stream.index:
                self.packets += packet.size > 0
                yield packet

    def of_packets(self, first: int) -> array[int]:
        """Return the times of the packets, from that of the first picture that could be decoded on."""
        times, last = array("q"), first
        for packet in self._packets():
            time = packet.pts if packet.pts is not None else packet.dts
            if packet.size and not packet.is_discard and time is not None and time >= first:
                times.append(time)
                if time >= last:
                    last, self.hold = time, packet.duration or 0
        return times or array("q", [first])

    def of_pictures(self) -> array[int]:
        """Return the times of the pictures that can be decoded."""
        times, straight = array("q"), _straightened(self.container, self.stream)
        for packet in self._packets():
            for frame in _decode(self.stream, packet, self._count):
                times.append(straight.add(_time_of(self.container, frame)))
                self.hold = frame.duration or 0
        self.joined = straight.joined
        return times

    def _count(self, _: str) -> None:
        self.damaged += 1

    def check_length(self, slack: float) -> None:
        """Refuse a file that is shorter than it announces; containers differ in whether the last frame has a duration.

        Raises:
            VideoError: with both lengths.
        """
        name, declared = self.container.format.name, (self.container.duration or 0) / av.time_base
        if name == "avi":  # which counts what it leaves out, and announces what was planned
            cut = containers.is_cut_avi(self.path)
        elif _tells_times(self.container) and self.packets >= self.stream.frames:
            cut = False
        else:
            cut = self.end < declared - 0.05 - slack
        if cut:
            raise VideoError(f"{self.path} is truncated: it announces {declared:.1f} s and ends at {self.end:.1f} s")


def _straightened(container: InputContainer, stream: VideoStream) -> Straightened:
    base = stream.time_base or Fraction(1, 90_000)
    rate = stream.guessed_rate or stream.average_rate or Fraction(25)
    joins = container.format.name in ("mpegts", "mpeg")
    return Straightened(round(1 / (rate * base)), round(10 / base) if joins else None)


def _time_of(container: InputContainer, frame: VideoFrame) -> int | None:
    """Return the time of a decoded picture, ticks. AVI stores none: its pictures come one after the other."""
    return frame.dts if container.format.name == "avi" else frame.pts


def _decode(stream: VideoStream, packet: Packet[Any], broken: Callable[[str], None]) -> list[VideoFrame]:
    """Decode one packet; where it cannot be, say so and go on with the next one."""
    # Decoders in several threads tell an error some packets later: what holds no picture must not come to them.
    if 0 < packet.size < 1000 and containers.says_only(stream.codec_context.codec.canonical_name, bytes(packet)):
        return []
    try:
        return stream.decode(packet)
    except av.error.InvalidDataError as error:
        broken(error.strerror or "invalid data")
        return []


def _pictures(
    container: InputContainer, stream: VideoStream, broken: Callable[[str], None] = lambda reason: None
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (time in ticks, picture) of a video; `broken` is told why what cannot be decoded is passed over."""
    straight = _straightened(container, stream)
    for packet in container.demux(stream):
        for frame in _decode(stream, packet, broken):
            yield straight.add(_time_of(container, frame)), frame


def read_frames(
    path: Path, batch: int = 8, clock: Clock | None = None, note: Callable[[str], None] | None = None
) -> Iterator[Frames]:
    """Decode a video as a stream of uint8 arrays [<=batch,H,W,3] with flat memory.

    Pictures are turned, mirrored and stretched as they are to be shown. Colours are converted by the matrix and range
    that the file is tagged with; an untagged file is taken as BT.709 from 720 rows on and as BT.601 below, in limited
    range. High dynamic range and wide primaries become those of BT.709, see `colour`.

    Args:
        path: the video.
        batch: frames of an array.
        clock: gives exactly its frames, each at its time; None gives every picture once, in order.
        note: told what cannot be decoded, with the frames that show the picture before instead; None refuses that.

    Raises:
        VideoError: see `probe`.
    """
    pending: list[Frames] = []
    for frame, count in read_pictures(path, clock, note):
        for _ in range(count):
            pending.append(frame)
            if len(pending) == batch:
                yield np.stack(pending)
                pending.clear()
    if pending:
        yield np.stack(pending)


def read_pictures(
    path: Path, clock: Clock | None = None, note: Callable[[str], None] | None = None
) -> Iterator[tuple[Frames, int]]:
    """Yield (frame [H,W,3], how many frames show it) as `read_frames` does, each picture once."""
    if stills.handles(path):
        timed_stills = stills.read(path)
        if clock is None:
            yield from ((picture, 1) for _, picture in timed_stills)
        else:
            yield from ((picture, count) for picture, _, count in placed(timed_stills, clock))
        return
    broken: list[str] = []
    with _opened(path) as container:
        stream = _video_stream(container, path)
        base = stream.time_base or Fraction(1, 90_000)
        timed = ((time * base, frame) for time, frame in _pictures(container, stream, broken.append))
        plan = ((frame, place, 1) for place, (_, frame) in enumerate(timed)) if clock is None else placed(timed, clock)
        reading: _Reading | None = None
        for frame, first, shown in plan:
            reading = reading or _Reading(stream, frame, path, note)
            lost = f"frames {first + 1} to {first + shown - 1}" if shown > 2 else f"frame {first + 1}"
            if broken and (shown > 1 or clock is None):  # the decoder may have told it some frames before
                if note is None:
                    raise VideoError(f"{path} is damaged: {lost} cannot be decoded ({broken[0].lower()})")
                note(f"{path} is damaged: {lost} cannot be decoded, frame {first} is shown instead")
                broken.clear()
            elif shown > 1 and note is not None and clock is not None and clock.steady:
                note(f"{path} has no picture for {lost}: frame {first} is shown instead")
            yield _to_rgb(frame, reading), shown
        if broken and note is None:
            raise VideoError(f"{path} is damaged: not all of it can be decoded ({broken[0].lower()})")
        if reading is None:
            raise VideoError(f"{path} holds no video frame that can be decoded")


def check_seal(path: Path) -> None:
    """Compare a finished video with the SHA-256 that `SegmentWriter.finish` put behind it: every bit counts.

    Raises:
        VideoError: the file is missing, cut short, changed since, or was not written here.
    """
    try:
        size = path.stat().st_size - _SEAL_BYTES
        with path.open("rb") as file:
            file.seek(max(0, size))
            seal = file.read()
        if not seal.startswith(_SEAL):
            raise VideoError(
                f"{path} does not end as a video of streamt2v does",
                "it is cut short, was changed by another program, or comes from somewhere else",
            )
        if _hashed(path, size).digest() != seal[len(_SEAL) :]:
            raise VideoError(f"{path} is damaged: its {size} bytes are not those that were written")
    except OSError as error:
        raise VideoError(f"{path} cannot be read: {error.strerror or error}") from error


def _hashed(path: Path, size: int) -> hashlib._Hash:
    """Hash the first `size` bytes of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (data := file.read(min(size, 1 << 20))):
            sha256.update(data)
            size -= len(data)
    return sha256


class _Reading:
    """What holds for all pictures of a video: how its first one is turned, and at what size it is shown."""

    def __init__(
        self, stream: VideoStream, first: VideoFrame, path: Path, note: Callable[[str], None] | None = None
    ) -> None:
        data: Any = first.side_data  # a mapping to its types, a sequence to who iterates
        matrix = next((bytes(one) for one in data if one.type.name == "DISPLAYMATRIX"), b"")
        self.turns, self.mirrored = shape.orientation(matrix) if matrix else (0, False)
        self.coded = first.height, first.width
        self.size = shape.squared(first.height, first.width, stream.sample_aspect_ratio or None)
        if self.size[0] * self.size[1] > _MAX_PIXELS:
            self.size = self.coded
        self.path, self.note = path, note

    def check(self, frame: VideoFrame) -> None:
        """Say, once, that pictures of another size are scaled to that of the first."""
        if (frame.height, frame.width) != self.coded:
            if self.note is None:
                raise VideoError(f"{self.path} changes its frame size to {frame.width}x{frame.height} midway")
            height, width = self.size
            self.note(f"{self.path} changes its frame size to {frame.width}x{frame.height}; scaled to {width}x{height}")
            self.coded = frame.height, frame.width


def _to_rgb(frame: VideoFrame, reading: _Reading) -> Frames:
    """Convert one decoded frame to upright uint8 RGB [H,W,3] of BT.709."""
    reading.check(frame)
    matrix: int = frame.colorspace
    transfer = int(frame.color_trc)
    primaries = colour.primaries_of(int(frame.color_primaries), matrix)
    plain = colour.is_plain(primaries, transfer, matrix)
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    odd = frame.format.is_planar and not frame.format.is_rgb and len(frame.format.components) >= 3
    if matrix in colour.ODD and odd:
        coded = colour.from_matrix(_luma_chroma(frame, reading.size, full), matrix, primaries, transfer)
        deep = np.asarray(np.clip(coded, 0, 1) * 65535 + 0.5, np.uint16)
        rgb = colour.convert(deep, primaries, transfer) if not plain else np.asarray(deep // 257, np.uint8)
    else:
        if matrix not in (0, 2, *colour.DIRECT):
            raise VideoError(
                f"{reading.path} has colours of matrix {matrix}, which cannot be converted",
                f"convert it with: ffmpeg -i {reading.path.name} -vf zscale=matrix=709 -c:a copy converted.mp4",
            )
        if matrix in (0, 2):  # RGB or untagged
            matrix = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
        scaled: Any = frame.reformat(
            width=reading.size[1],
            height=reading.size[0],
            format="rgb24" if plain else "rgb48le",
            src_colorspace=matrix,
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            interpolation=_EXACT,
        ).to_ndarray()
        rgb = scaled if plain else colour.convert(scaled, primaries, transfer)
    return shape.upright(rgb, reading.turns, reading.mirrored)


def _luma_chroma(frame: VideoFrame, size: tuple[int, int], full: bool) -> colour.Values:
    """Return Y'CbCr [H,W,3] of a frame: 0..1 and -0.5..0.5."""
    kept, same = ColorRange.JPEG if full else ColorRange.MPEG, Colorspace.ITU709  # which then changes nothing
    wide = frame.reformat(
        width=size[1], height=size[0], format="yuv444p16le", src_color_range=kept, dst_color_range=kept,
        src_colorspace=same, dst_colorspace=same, interpolation=_EXACT,
    ).to_ndarray()  # fmt: skip
    planes = wide.astype(np.float64)
    if full:
        return (planes - (0, 32768, 32768)) / 65535
    return (planes - (16 * 256, 32768, 32768)) / (219 * 256, 224 * 256, 224 * 256)


def read_image(path: Path) -> Frames:
    """Read a picture as `pictures.read` does: uint8 RGB [H,W,3]. Raises InputError."""
    return pictures.read(path)


# -- lossless segments ------------------------------------------------------------------------------------------------


def write_lossless(path: Path, frames: Frames) -> None:
    """Write uint8 frames [F,H,W,3] exactly, as FFV1 in Matroska with the SHA-256 of the pixels in a tag.

    Equal frames give equal bytes. The file appears under its name only when whole.

    Raises:
        OutputError: it cannot be written.
    """
    files.write_bytes(path, _encode_lossless(frames))


def _encode_lossless(frames: Frames) -> bytes:
    buffer = io.BytesIO()
    # Without the flag the container gets a random id. Intra frames (g=1) measured fastest: 3.5 ms each at 256x144.
    with av.open(buffer, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        container.metadata["SHA256"] = _digest(frames)
        stream = container.add_stream("ffv1", rate=25, options={"level": "3", "g": "1"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "bgr0"
        stream.codec_context.thread_count = 1
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format="bgr0")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def read_lossless(path: Path) -> Frames:
    """Read a lossless segment as uint8 frames [F,H,W,3], bit for bit what was written.

    The digest is needed: the decoder conceals damaged slices even where their checksums fail and it is told to stop.

    Raises:
        VideoError: the segment is missing, damaged or cut short.
    """
    with _opened(path) as container:
        expected = container.metadata.get("SHA256")
        decoded = container.decode(_video_stream(container, path))
        images: list[Frames] = [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in decoded]
    frames: Frames = np.stack(images) if images else np.zeros((0, 0, 0, 3), np.uint8)
    if _digest(frames) != expected:
        raise VideoError(f"{path} is damaged: its {len(frames)} frames are not those that were written")
    return frames


def _digest(frames: Frames) -> str:
    digest = hashlib.sha256(f"{frames.shape}".encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()


# -- the growing output -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SegmentMark:
    """How far a growing file is whole: segments, frames in them, and the bytes they take from the start of the file.

    `sha256` is that of these bytes.
    """

    segments: int
    frames: int
    size: int
    sha256: str


class SegmentWriter:
    """Encodes groups of frames as closed H.264 segments and appends them to one file that plays while it grows.

    It encodes in this process and into memory, where there is nobody to wait for; so it needs no limit of time.

    Every `append` starts a fresh encoder without B-frames: a segment's bytes depend on its frames, its place and the
    settings only, so a run that was cut and continued gives the same file. Pixels are
    yuv420p, really converted with the BT.709 matrix in limited range, and tagged so.

    Args:
        path: the growing file; fragmented MP4 whatever its name.
        height, width: pixels, even.
        fps: exact frame rate.
        crf: x264 quality, 0-51, lower is better.
        lossless: keep every bit of the RGB values, for an output that is made from the whole file.
        resume: continue at this mark; the file is cut back to it. None starts a new file.

    Raises:
        ConfigError: odd sizes or an impossible rate. ResumeError: the file is not what the mark says.
    """

    def __init__(
        self,
        path: Path,
        height: int,
        width: int,
        fps: Fraction,
        *,
        crf: int = 18,
        lossless: bool = False,
        resume: SegmentMark | None = None,
    ) -> None:
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise ConfigError(f"video of {width}x{height} pixels: both sizes must be even and at least 2")
        if not 0 < fps <= MAX_RATE or fps != exact_rate(fps):
            raise ConfigError(f"a frame rate of {fps} cannot be written", "use a rate such as 8, 24 or 30000/1001")
        self.path, self.height, self.width, self.fps = path, height, width, fps
        # x264's macroblock tree is not deterministic, even with one thread: of 24,000 encodings of one 5-frame segment
        # 150 differed, of 33,000 without it none.
        self._options = {"crf": str(crf), "preset": "medium", "bf": "0", "g": "600", "x264-params": "mbtree=0"}
        self.lossless = lossless
        if lossless:
            self._options |= {"crf": "0", "preset": "veryfast"}
        self._sha256 = hashlib.sha256()
        self.mark = resume or SegmentMark(0, 0, 0, self._sha256.hexdigest())
        self._init = b""
        if self.mark.size:
            if not path.is_file():
                raise ResumeError(f"{path} is gone")
            with files.output_errors(path), path.open("rb") as file:
                self._init = _header(file.read(1 << 16))
                self._sha256 = _hashed(path, self.mark.size)
            if self._sha256.hexdigest() != self.mark.sha256:
                raise ResumeError(f"{path} is damaged: its first {self.mark.size} bytes are not those recorded for it")
        files.append_bytes(path, b"", self.mark.size)

    def append(self, frames: Frames) -> SegmentMark:
        """Encode uint8 frames [F,H,W,3] as one segment and append it durably.

        Returns:
            The mark to record: everything up to it is whole and on the disk.

        Raises:
            OutputError: the disk is full, the file cannot be written or the encoder failed; the file is as before,
                append may be retried.
        """
        if frames.shape[1:] != (self.height, self.width, 3):
            raise ConfigError(f"frames of shape {frames.shape[1:]} do not fit a {self.width}x{self.height} video")
        if not len(frames):
            return self.mark
        try:
            data = self._encode(frames)
        except av.error.FFmpegError as error:
            raise OutputError(f"the encoder failed on {self.path}: {error}") from error
        header = _header(data)
        if self.mark.size and header != self._init:
            raise ResumeError(f"{self.path} was encoded with other settings or another encoder version")
        body = memoryview(data)[len(header) if self.mark.size else 0 :]
        size = files.append_bytes(self.path, body, self.mark.size)
        self._init = header
        self._sha256.update(body)
        self.mark = SegmentMark(self.mark.segments + 1, self.mark.frames + len(frames), size, self._sha256.hexdigest())
        return self.mark

    def _encode(self, frames: Frames) -> bytes:
        """Return ftyp, moov, moof and mdat of one segment whose timestamps continue at the current mark."""
        buffer = io.BytesIO()
        options = {
            "movflags": "empty_moov+default_base_moof+frag_custom+frag_discont+skip_trailer",
            "fragment_index": str(self.mark.segments + 1),
            "use_editlist": "0",
            "avoid_negative_ts": "disabled",
            "fflags": "+bitexact",
        }
        with av.open(buffer, "w", format="mp4", options=options) as container:
            pixels = "bgr0" if self.lossless else "yuv420p"
            codec = "libx264rgb" if self.lossless else "libx264"
            stream: VideoStream = container.add_stream(codec, rate=self.fps, options=dict(self._options))  # type: ignore[assignment]
            context = stream.codec_context
            stream.height, stream.width, stream.pix_fmt = self.height, self.width, pixels
            stream.time_base = context.time_base = 1 / self.fps
            context.thread_count = 1
            if not self.lossless:
                context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
            context.color_primaries = context.color_trc = 1
            for index, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                if self.lossless:
                    frame = frame.reformat(format=pixels)
                else:
                    frame = frame.reformat(
                        format=pixels,
                        dst_colorspace=Colorspace.ITU709,
                        dst_color_range=ColorRange.MPEG,
                        interpolation=_EXACT,
                    )
                frame.pts, frame.time_base = self.mark.frames + index, 1 / self.fps
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return buffer.getvalue()

    def finish(self, out_path: Path, comment: str = "", extras: Extras = Extras()) -> VideoInfo:
        """Copy the segments into the final file, check it by reading it again, and only then give it its name.

        Behind its end stands a seal, see `check_seal`.

        Args:
            out_path: the mp4; an existing file is replaced.
            comment: text for the comment tag, at most 64 KiB of UTF-8.
            extras: what it gets besides its pictures, see `sound.carry`.

        Raises:
            ConfigError: nothing was appended, or a comment that is too long.
            OutputError: it cannot be written, or what was written does not hold exactly the frames appended.
        """
        if not self.mark.frames:
            raise ConfigError("a video needs at least 1 frame")
        # A lone surrogate cannot be encoded; it becomes "?" here and no longer equals the text.
        encoded = comment.encode(errors="replace")
        if "\0" in comment or len(encoded) > _MAX_COMMENT or encoded.decode() != comment:
            raise ConfigError(f"the comment tag takes at most {_MAX_COMMENT} bytes of Unicode text without NUL")
        # An interruption may have come between bytes and mark.
        files.append_bytes(self.path, b"", self.mark.size)
        arguments = ["-i", _url(self.path)]
        mapping = ["-map", "0:v:0", "-c:v", "copy", "-map_metadata:g", "-1", "-map_metadata:s", "-1"]
        mapping += ["-metadata", f"comment={comment}"]
        arguments += extras.inputs
        mapping += [*extras.outputs, "-movflags", "+faststart"]
        with files.replacing(out_path) as temporary:
            if not extras.inputs and find_spec("imageio_ffmpeg") is None:
                _copy_pictures(self.path, temporary, out_path, comment)
            elif said := run_ffmpeg(
                [*arguments, *mapping, "-fflags", "+bitexact", "-f", "mp4"], temporary, out_path
            ):  # fmt: skip
                log.warning("ffmpeg on %s: %s", out_path, said)
            try:
                info = probe(temporary)
            except VideoError as error:
                raise OutputError(f"{out_path} could not be written whole: {error.message}") from error
            sounds = sum(track.kind == "audio" for track in info.tracks)
            found = (info.frames, info.width, info.height, info.fps, sounds)
            wanted = (self.mark.frames, self.width, self.height, self.fps, extras.sounds)
            if found != wanted:
                raise OutputError(f"{out_path} holds (frames, width, height, fps, sounds) {found} instead of {wanted}")
            size = temporary.stat().st_size
            files.append_bytes(temporary, _SEAL + _hashed(temporary, size).digest(), size)
        return info


def _header(data: bytes) -> bytes:
    """Return the leading boxes of an MP4 up to its first fragment: ftyp and moov."""
    position = 0
    while position + 8 <= len(data) and data[position + 4 : position + 8] != b"moof":
        position += max(8, int.from_bytes(data[position : position + 4], "big"))
    return data[:position]


def _url(path: Path) -> str:
    """Name a file so that ffmpeg takes no part of the name for an option or a protocol."""
    return f"file:{path.absolute()}"


def input_options(path: Path) -> list[str]:
    """Return the arguments by which ffmpeg reads a file, and nothing else that it may name."""
    return [part for key, value in _INPUT_OPTIONS.items() for part in (f"-{key}", value)] + ["-i", _url(path)]


def holds_packets(path: Path) -> bool:
    """Tell whether something is in the first stream of a file. Raises VideoError: it cannot be read."""
    with _opened(path) as container:
        return any(packet.size for packet in container.demux(0))


def check_ffmpeg(pictures_only: bool = False) -> None:
    """Raise OutputError unless there is an ffmpeg that can be started; pictures alone PyAV writes where none is."""
    if pictures_only and find_spec("imageio_ffmpeg") is None:
        return
    binary = _binary()
    _check_starts(binary, files.stamp(Path(binary)))


@lru_cache(maxsize=1)
def _check_starts(binary: str, _stamp: object) -> None:
    """Start ffmpeg once for all rows of a batch. Raises OutputError."""
    with _started(binary, ["-version"]) as process:
        try:
            process.communicate(timeout=STALL_SECONDS)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise OutputError(f"ffmpeg said no version within {STALL_SECONDS:.0f} s", "install it again") from error


def _binary() -> str:
    try:
        import imageio_ffmpeg  # type: ignore[import-untyped]

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except ImportError as error:
        raise OutputError(f"sound is copied by imageio-ffmpeg, which is not here: {error}", "install it") from error
    except (RuntimeError, OSError) as error:
        raise OutputError(f"the ffmpeg binary cannot be started: {error}", "streamt2v doctor says more") from error


def _started(binary: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    command, nothing = [binary, *arguments], subprocess.DEVNULL
    try:
        return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=subprocess.PIPE)
    except OSError as error:
        raise OutputError(f"the ffmpeg binary cannot be started: {error}", "streamt2v doctor says more") from error


def run_ffmpeg(arguments: list[str], path: Path, out_path: Path) -> str:
    """Let the ffmpeg binary write `path`, which will be `out_path`, and return what it complains of.

    Raises:
        OutputError: it is not there, fails or hangs.
    """
    process = _started(_binary(), ["-nostdin", "-v", "error", "-y", *arguments, _url(path)])
    with process:
        try:
            said = _last_words(process, path).decode(errors="replace").strip()
        except subprocess.TimeoutExpired as error:
            stalled = f"ffmpeg did nothing for {STALL_SECONDS:.0f} s on {out_path}"
            raise OutputError(stalled, "the run continues with --resume") from error
        finally:
            process.kill()  # does nothing to one that has ended
    if "No space left on device" in said:
        raise files.explain(out_path, OSError(28, "No space left on device"))
    if process.returncode:
        raise OutputError(f"ffmpeg failed on {out_path} with code {process.returncode}: {said[-500:]}")
    return said[-500:]


def _copy_pictures(source: Path, path: Path, out_path: Path, comment: str) -> None:
    """Write `path`, which will be `out_path`, as the ffmpeg binary does of a video without sound, where it is not here.

    A machine may have PyAV and not the binary, which is twice as large.
    """
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    try:
        with av.open(_url(source)) as given, av.open(_url(path), "w", format="mp4", options=options) as made:
            made.metadata["comment"] = comment
            stream = made.add_stream_from_template(given.streams.video[0])
            for packet in given.demux(given.streams.video[0]):
                if packet.size:  # the last one only says that nothing follows
                    packet.stream = stream
                    made.mux(packet)
    except OSError as error:
        raise files.explain(out_path, error) from error
    except av.error.FFmpegError as error:
        raise OutputError(f"{out_path} could not be written: {error}") from error


def _last_words(process: subprocess.Popen[bytes], path: Path) -> bytes:
    """Wait for a process, however long, while the file it writes changes; raise TimeoutExpired when it stalls."""
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


# -- previews ---------------------------------------------------------------------------------------------------------


def write_image(path: Path, image: Frames) -> None:
    """Write one uint8 picture [H,W,3] as PNG; it appears whole or not at all."""
    files.write_bytes(path, encode_image(image, "PNG"))


def encode_image(image: Frames, kind: str) -> bytes:
    """Return one uint8 picture [H,W,3] as the bytes of a PNG or JPEG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, kind, quality=90)
    return buffer.getvalue()


def animation_times(count: int, fps: Fraction, tick: int, least: int) -> list[tuple[int, int]]:
    """Return (frame, milliseconds) of an animation that takes as long as its frames do.

    Its delays are whole ticks, whose rounding never adds up; where frames come faster than viewers show them, some are
    left out.

    Args:
        count: frames, at least 1.
        fps: their rate.
        tick: unit of a delay, ms: 10 in GIF, 1 in WebP.
        least: shortest delay that viewers keep, ms: below 20 they play a GIF at 10 frames a second.
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
    """Return uint8 frames [F,H,W,3] as the bytes of a WEBP or GIF file that plays for ever at a rate."""
    from PIL import Image

    times = animation_times(len(images), fps, 10 if kind == "GIF" else 1, 20 if kind == "GIF" else 5)
    pictures = [Image.fromarray(np.ascontiguousarray(images[frame])) for frame, _ in times]
    if kind == "GIF":  # Pillow's own choice of colours takes 20 s for 48 frames of 256x144, this 0.3 s
        pictures = [picture.quantize(method=Image.Quantize.FASTOCTREE) for picture in pictures]
    buffer = io.BytesIO()
    delays = [shown for _, shown in times]
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:], duration=delays, loop=0)
    return buffer.getvalue()
