"""Reading videos with PyAV: what a file holds, and its pictures as upright RGB frames on a steady clock.

This runs in the calling process. Files from users are read through `isolated`, which runs this module in a process of
its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from streamt2v.errors import VideoError
from streamt2v.media import colour, containers, shape, stills
from streamt2v.media.clock import Clock, Straightened, measure, placed
from streamt2v.media.ffmpeg import INPUT_OPTIONS, url
from streamt2v.media.shape import MAX_PIXELS, MAX_SIZE

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from streamt2v.media.frames import Frames

# Plain swscale truncates and repeats chroma samples: a smooth picture came back at 37 dB and 1.2 levels darker, with
# these flags at 51 dB and the same mean. A video that is extended again and again would show the difference.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class Track:
    """One stream besides the pictures; `begin` is its start in seconds on the clock of the file."""

    kind: str
    index: int
    codec: str
    begin: float
    channels: int
    language: str
    title: str
    default: bool


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds: frames on a steady clock, size as shown (in square pixels), other tracks, comment tag.

    `damaged` counts the packets that could not be decoded, as far as measuring had to decode them.
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
        """Number of frames that `read_frames` yields."""
        return self.clock.frames

    @property
    def fps(self) -> Fraction:
        """Exact frame rate."""
        return self.clock.rate

    @property
    def has_audio(self) -> bool:
        """Whether there is sound."""
        return any(track.kind == "audio" for track in self.tracks)


@contextlib.contextmanager
def opened(path: Path, options: Mapping[str, str] = INPUT_OPTIONS) -> Iterator[InputContainer]:
    """Open a local video; any failure of the library in the body becomes a VideoError that names the file."""
    if not path.exists():
        raise VideoError(f"{path} does not exist")
    if not path.is_file():
        raise VideoError(f"{path} is not a file", "give the path of a video file")
    try:
        if path.stat().st_size == 0:
            raise VideoError(f"{path} is empty (0 bytes)")
        with av.open(url(path), options=dict(options), metadata_errors="replace") as container:
            yield container
    except PermissionError as error:
        raise VideoError(f"{path} cannot be read: permission denied") from error
    # Besides its own errors, hostile files have made the library raise these.
    except (av.error.FFmpegError, OSError, ValueError, IndexError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"{path} cannot be read as a video: {reason}", containers.hint(path)) from error


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """Return the first real video stream (cover art is not one), set up for threaded decoding."""
    for stream in container.streams.video:
        if stream.disposition & stream.disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise VideoError(f"{path} uses an unknown video format")
        width, height = stream.codec_context.width, stream.codec_context.height
        if not 0 < width * height <= MAX_PIXELS:
            raise VideoError(f"{path} declares frames of {width}x{height} pixels", f"the limit is {MAX_SIZE}")
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # frames may be larger than declared
        return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no"
    raise VideoError(f"{path} holds no video ({kinds} streams only)")


def declared_size(path: Path) -> tuple[int, int]:
    """Return the (H, W) that a video declares, without decoding anything. Raises as `probe` does."""
    if stills.handles(path):
        return next((picture.shape[0], picture.shape[1]) for _, picture in stills.read(path))
    with opened(path) as container:
        context = video_stream(container, path).codec_context
        return context.height, context.width


def is_longer(path: Path, count: int) -> bool:
    """Return whether a video has more than `count` frames, without decoding any. Raises as `probe` does."""
    if stills.handles(path):
        return path.is_dir() and len(stills.numbered(path)) > count
    with opened(path) as container:
        stream = video_stream(container, path)
        if _tells_times(container) and stream.frames:  # the index of an MP4 lists every frame
            return stream.frames > count
        packets = (packet for packet in container.demux(stream) if packet.size)
        return next(islice(packets, count, None), None) is not None


def probe(path: Path) -> VideoInfo:
    """Measure a video: its frames are counted by the times of its pictures, not taken from the header.

    An MP4 lists these times; other containers have to be decoded. A file that ends before its header says is refused as
    truncated (a cut Matroska file would otherwise pass as a shorter one).

    Raises:
        VideoError: the file is missing, empty, a directory, not a video, damaged or truncated.
    """
    if stills.handles(path):
        clock, height, width = stills.measured(path)
        return VideoInfo(width, height, clock, (), "")
    with opened(path) as container:
        stream = video_stream(container, path)
        time, first = next(_pictures(container, stream), (None, None))
        if first is None or time is None:
            raise VideoError(f"{path} holds no video frame that can be decoded")
        shown = _to_rgb(first, _Reading(stream, first, path))
    with opened(path) as container:
        stream = video_stream(container, path)
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
            tracks=tuple(track(other) for other in container.streams if other.type != "video"),
            chapters=len(container.chapters()),
            comment=next((text for key, text in container.metadata.items() if key.lower() == "comment"), ""),
            damaged=scan.damaged,
        )


def track(stream: Any) -> Track:
    """Describe a stream of an open container."""
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
    """Return whether the container stores one packet per picture, with the time at which it is shown."""
    return "mp4" in container.format.name


class _Scan:
    """One pass over a file: when its pictures are shown, where it ends, how much of it cannot be decoded."""

    def __init__(self, container: InputContainer, stream: VideoStream, path: Path) -> None:
        self.container, self.stream, self.path = container, stream, path
        self.packets = self.damaged = self.hold = 0
        self.end = 0.0
        self.joined = False

    def _packets(self) -> Iterator[Packet[Any]]:
        cut_is_damage = not self.container.format.name.startswith("mpeg")  # broadcasts have gaps
        for packet in self.container.demux():
            if packet.is_corrupt and cut_is_damage:
                raise VideoError(f"{self.path} is damaged or truncated after {self.packets} frames")
            if packet.pts is not None and packet.time_base is not None:
                self.end = max(self.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == self.stream.index:
                self.packets += packet.size > 0
                yield packet

    def of_packets(self, first: int) -> array[int]:
        """Return the times of the packets, starting with the first picture that can be decoded."""
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
        for time, frame in _timed(self.container, self.stream, self._packets(), self._count):
            times.append(straight.add(time))
            self.hold = frame.duration or 0
        self.joined = straight.joined
        return times

    def _count(self, _: str) -> None:
        self.damaged += 1

    def check_length(self, slack: float) -> None:
        """Raise VideoError for a file shorter than it declares, by more than `slack` seconds.

        Containers differ in whether the last frame has a duration, hence the slack.
        """
        name, declared = self.container.format.name, (self.container.duration or 0) / av.time_base
        if name == "avi":  # it counts omitted frames too, and declares the planned length
            cut = containers.is_cut_avi(self.path)
        elif _tells_times(self.container) and self.packets >= self.stream.frames:
            cut = False
        else:
            cut = self.end < declared - 0.05 - slack
        if cut:
            raise VideoError(f"{self.path} is truncated: it declares {declared:.1f} s and ends at {self.end:.1f} s")


def _straightened(container: InputContainer, stream: VideoStream) -> Straightened:
    base = stream.time_base or Fraction(1, 90_000)
    rate = stream.guessed_rate or stream.average_rate or Fraction(25)
    joins = container.format.name in ("mpegts", "mpeg")
    return Straightened(round(1 / (rate * base)), round(10 / base) if joins else None)


def _decode(stream: VideoStream, packet: Packet[Any], broken: Callable[[str], None]) -> list[VideoFrame]:
    """Decode one packet; if that fails, report the reason to `broken` and return nothing."""
    # A threaded decoder reports an error some packets late, so packets without a picture are kept away from it.
    if 0 < packet.size < 1000 and containers.says_only(stream.codec_context.codec.canonical_name, bytes(packet)):
        return []
    try:
        return stream.decode(packet)
    except av.error.InvalidDataError as error:
        broken(error.strerror or "invalid data")
        return []


def _timed(
    container: InputContainer, stream: VideoStream, packets: Iterable[Packet[Any]], broken: Callable[[str], None]
) -> Iterator[tuple[int | None, VideoFrame]]:
    """Decode packets; yield (time in ticks, if it is known, picture).

    AVI stores no times: its pictures follow each other evenly, and the first is shown at the time of the first packet.
    A decoder that changes their order gives each with the time of a later packet: so late are all of them.
    """
    even = container.format.name == "avi"
    first: int | None = None
    late: int | None = None

    def lost(reason: str) -> None:
        nonlocal first
        first = None
        broken(reason)

    for packet in packets:
        first = packet.dts if first is None and packet.size else first
        for frame in _decode(stream, packet, lost):
            if not even or frame.dts is None:
                yield (None if even else frame.pts), frame
                continue
            if late is None:
                late = 0 if first is None else max(0, frame.dts - first)
            yield frame.dts - late, frame


def _pictures(
    container: InputContainer, stream: VideoStream, broken: Callable[[str], None] = lambda reason: None
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (time in ticks, picture); `broken` is called with the reason for every packet that is skipped."""
    straight = _straightened(container, stream)
    for time, frame in _timed(container, stream, container.demux(stream), broken):
        yield straight.add(time), frame


def read_frames(
    path: Path, batch: int = 8, clock: Clock | None = None, note: Callable[[str], None] | None = None
) -> Iterator[Frames]:
    """Decode a video as a stream of uint8 arrays [<=batch,H,W,3], in constant memory.

    Pictures are rotated, mirrored and stretched as a player would. Colours are converted by the matrix and range in the
    file's tags; an untagged file counts as BT.709 from 720 rows on and as BT.601 below, in limited range. High dynamic
    range and wide primaries are mapped to BT.709, see `colour`.

    Args:
        path: the video.
        batch: frames per array.
        clock: yields exactly the frames of this clock, each at its time; None yields every picture once, in order.
        note: called with what cannot be decoded and which frames repeat the previous picture instead; None makes
            damage an error.

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
    """Yield (picture [H,W,3], how many frames show it); arguments and errors as in `read_frames`."""
    if stills.handles(path):
        timed_stills = stills.read(path)
        if clock is None:
            yield from ((picture, 1) for _, picture in timed_stills)
        else:
            yield from ((picture, count) for picture, _, count in placed(timed_stills, clock))
        return
    broken: list[str] = []
    with opened(path) as container:
        stream = video_stream(container, path)
        base = stream.time_base or Fraction(1, 90_000)
        timed = ((time * base, frame) for time, frame in _pictures(container, stream, broken.append))
        plan = ((frame, place, 1) for place, (_, frame) in enumerate(timed)) if clock is None else placed(timed, clock)
        reading: _Reading | None = None
        for frame, first, shown in plan:
            reading = reading or _Reading(stream, frame, path, note)
            lost = f"frames {first + 1} to {first + shown - 1}" if shown > 2 else f"frame {first + 1}"
            if broken and (shown > 1 or clock is None):  # reported up to some frames ago
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


class _Reading:
    """What all pictures of a video share: orientation and the size at which they are shown, from the first one."""

    def __init__(
        self, stream: VideoStream, first: VideoFrame, path: Path, note: Callable[[str], None] | None = None
    ) -> None:
        data: Any = first.side_data  # typed as a mapping, iterates as a sequence
        matrix = next((bytes(one) for one in data if one.type.name == "DISPLAYMATRIX"), b"")
        self.turns, self.mirrored = shape.orientation(matrix) if matrix else (0, False)
        self.coded = first.height, first.width
        self.size = shape.squared(first.height, first.width, stream.sample_aspect_ratio or None)
        if self.size[0] * self.size[1] > MAX_PIXELS:
            self.size = self.coded
        self.path, self.note = path, note

    def check(self, frame: VideoFrame) -> None:
        """Report, once per change, that pictures of another size are scaled to that of the first."""
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
            interpolation=EXACT,
        ).to_ndarray()
        rgb = scaled if plain else colour.convert(scaled, primaries, transfer)
    return upright(rgb, reading.turns, reading.mirrored)


def upright(picture: Frames, turns: int, mirrored: bool) -> Frames:
    """Mirror and rotate a picture [H,W,C] as `shape.orientation` says."""
    return np.ascontiguousarray(np.rot90(picture[:, ::-1] if mirrored else picture, turns))


def _luma_chroma(frame: VideoFrame, size: tuple[int, int], full: bool) -> colour.Values:
    """Return Y'CbCr [H,W,3] of a frame: 0..1 and -0.5..0.5."""
    shades, matrix = ColorRange.JPEG if full else ColorRange.MPEG, Colorspace.ITU709
    # The same on both sides, so that only the format and the size change.
    same = {"src_color_range": shades, "dst_color_range": shades, "src_colorspace": matrix, "dst_colorspace": matrix}
    wide = frame.reformat(size[1], size[0], "yuv444p16le", interpolation=EXACT, **same)
    planes = wide.to_ndarray().astype(np.float64)
    if full:
        return (planes - (0, 32768, 32768)) / 65535
    return (planes - (16 * 256, 32768, 32768)) / (219 * 256, 224 * 256, 224 * 256)


def holds_packets(path: Path) -> bool:
    """Return whether the first stream of a file has any content. Raises VideoError if the file cannot be read."""
    with opened(path) as container:
        return any(packet.size for packet in container.demux(0))
