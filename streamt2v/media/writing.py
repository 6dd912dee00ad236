"""Writing: the growing output, segment by segment, and the finished MP4 with sound and recipe.

Segments are encoded in this process with PyAV: errors are raised, and nothing writes on after the process died.
Measured for 16 frames of 256x144 (two cores, four encoder threads): 40 ms a segment, 60 ms with the ffmpeg binary. The
final file, sound included, is copied by the ffmpeg binary without re-encoding.

The growing output is fragmented MP4: one `moov`, then a `moof` and an `mdat` per segment. It plays in any player at any
moment, keeps exact timestamps at any rate (MPEG-TS rounds them to 1/90000 s), grows by appending, and is whole again
once it is cut back to the end of a segment.
"""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import av.error
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from streamt2v import files
from streamt2v.config import exact_rate
from streamt2v.errors import ConfigError, OutputError, ResumeError, VideoError
from streamt2v.media.clock import MAX_RATE
from streamt2v.media.ffmpeg import run_ffmpeg, url
from streamt2v.media.reading import EXACT, VideoInfo, probe
from streamt2v.media.seal import seal

if TYPE_CHECKING:
    from av.video.stream import VideoStream

    from streamt2v.media.frames import Frames

log = logging.getLogger(__name__)
_MAX_COMMENT = 64 * 1024


@dataclass(frozen=True)
class Extras:
    """What a finished video has besides its pictures: ffmpeg's arguments for another input and for the output."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    sounds: int = 0


@dataclass(frozen=True)
class SegmentMark:
    """How much of a growing file is complete: segments, frames in them, the bytes they take and their SHA-256."""

    segments: int
    frames: int
    size: int
    sha256: str


class SegmentWriter:
    """Encodes groups of frames as closed H.264 segments and appends them to one file that plays while it grows.

    Every `append` starts a fresh encoder without B-frames: the bytes of a segment depend only on its frames, its
    position and the settings, so a run that was interrupted and resumed gives the same file. Pixels are yuv420p,
    converted with the BT.709 matrix in limited range and tagged accordingly.

    Args:
        path: the growing file; fragmented MP4 whatever its name.
        height, width: pixels, even.
        fps: exact frame rate.
        crf: x264 quality, 0-51, lower is better.
        lossless: keep every bit of the RGB values, for an output that is encoded from the complete file.
        resume: continue at this mark, after cutting the file back to it. None starts a new file.

    Raises:
        ConfigError: odd sizes or an impossible rate. ResumeError: the file does not match the mark.
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
            raise ConfigError(f"a video of {width}x{height} pixels: both sizes must be even and at least 2")
        if not 0 < fps <= MAX_RATE or fps != exact_rate(fps):
            raise ConfigError(f"a frame rate of {fps} cannot be written", "use a rate such as 8, 24 or 30000/1001")
        self.path, self.height, self.width, self.fps = path, height, width, fps
        # x264's macroblock tree is not deterministic, even with one thread: 150 of 24,000 encodings of one 5-frame
        # segment differed, none of 33,000 without it.
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
                self._sha256 = files.hashed(path, self.mark.size)
            if self._sha256.hexdigest() != self.mark.sha256:
                raise ResumeError(f"{path} is damaged: its first {self.mark.size} bytes are not those recorded")
        files.append_bytes(path, b"", self.mark.size)

    def append(self, frames: Frames) -> SegmentMark:
        """Encode uint8 frames [F,H,W,3] as one segment and append it durably.

        Returns:
            The mark to record: everything up to it is complete and on disk.

        Raises:
            OutputError: the disk is full, the file cannot be written or the encoder failed; the file is unchanged, and
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
        buffer, tick = io.BytesIO(), 1 / self.fps
        options = {
            "movflags": "empty_moov+default_base_moof+frag_custom+frag_discont+skip_trailer",
            "fragment_index": str(self.mark.segments + 1),
            "use_editlist": "0",
            "avoid_negative_ts": "disabled",
            "fflags": "+bitexact",
        }
        codec, pixels = ("libx264rgb", "bgr0") if self.lossless else ("libx264", "yuv420p")
        target: dict[str, Any] = {"format": pixels}
        if not self.lossless:
            target |= {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG, "interpolation": EXACT}
        with av.open(buffer, "w", format="mp4", options=options) as container:
            stream: VideoStream = container.add_stream(codec, rate=self.fps, options=dict(self._options))  # type: ignore[assignment]
            context = stream.codec_context
            stream.height, stream.width, stream.pix_fmt = self.height, self.width, pixels
            stream.time_base = context.time_base = tick
            context.thread_count = 1
            if not self.lossless:
                context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
            context.color_primaries = context.color_trc = 1
            for index, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(**target)
                frame.pts, frame.time_base = self.mark.frames + index, tick
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return buffer.getvalue()

    def finish(self, out_path: Path, comment: str = "", extras: Extras = Extras()) -> VideoInfo:
        """Copy the segments into the final file, read it back to check it, seal it, and only then give it its name.

        Args:
            out_path: the MP4; an existing file is replaced.
            comment: text for the comment tag, at most 64 KiB of UTF-8.
            extras: what the file has besides its pictures, see `sound.carry`.

        Raises:
            ConfigError: nothing was appended, or the comment is too long.
            OutputError: the file cannot be written, or does not hold exactly the frames appended.
        """
        if not self.mark.frames:
            raise ConfigError("a video needs at least 1 frame")
        # A lone surrogate cannot be encoded; it becomes "?" and the text no longer compares equal.
        encoded = comment.encode(errors="replace")
        if "\0" in comment or len(encoded) > _MAX_COMMENT or encoded.decode() != comment:
            raise ConfigError(f"the comment tag takes at most {_MAX_COMMENT} bytes of Unicode text without NUL")
        # An interruption may have come between writing the bytes and recording the mark.
        files.append_bytes(self.path, b"", self.mark.size)
        arguments = ["-i", url(self.path), *extras.inputs, "-map", "0:v:0", "-c:v", "copy"]
        arguments += ["-map_metadata:g", "-1", "-map_metadata:s", "-1", "-metadata", f"comment={comment}"]
        arguments += [*extras.outputs, "-movflags", "+faststart", "-fflags", "+bitexact", "-f", "mp4"]
        with files.replacing(out_path) as temporary:
            if not extras.inputs and find_spec("imageio_ffmpeg") is None:
                _copy_pictures(self.path, temporary, out_path, comment)
            elif said := run_ffmpeg(arguments, temporary, out_path):
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
            seal(temporary)
        return info


def _header(data: bytes) -> bytes:
    """Return the leading boxes of an MP4 up to its first fragment: ftyp and moov."""
    position = 0
    while position + 8 <= len(data) and data[position + 4 : position + 8] != b"moof":
        position += max(8, int.from_bytes(data[position : position + 4], "big"))
    return data[:position]


def _copy_pictures(source: Path, path: Path, out_path: Path, comment: str) -> None:
    """Write `path`, the future `out_path`, as the ffmpeg binary would for a video without sound.

    A machine may have PyAV but not the binary, which is twice as large.
    """
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    try:
        with av.open(url(source)) as given, av.open(url(path), "w", format="mp4", options=options) as made:
            made.metadata["comment"] = comment
            stream = made.add_stream_from_template(given.streams.video[0])
            for packet in given.demux(given.streams.video[0]):
                if packet.size:  # an empty one marks the end
                    packet.stream = stream
                    made.mux(packet)
    except OSError as error:
        raise files.explain(out_path, error) from error
    except av.error.FFmpegError as error:
        raise OutputError(f"{out_path} could not be written: {error}") from error
