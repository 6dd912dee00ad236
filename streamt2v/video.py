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
import hashlib
import io
import logging
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from streamt2v import files
from streamt2v.errors import ConfigError, InputError, OutputError, ResumeError, VideoError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from streamt2v.frames import Frames

log = logging.getLogger(__name__)

# Refuses scripts and playlists (concat, hls, ...) that would open other files, whatever the file is called.
_DEMUXERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif,yuv4mpegpipe"
_INPUT_OPTIONS = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
_MAX_PIXELS = 8192 * 4320
_MAX_COMMENT = 64 * 1024
_MP4_AUDIO = {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"}
# Plain swscale drops fractions and repeats chroma samples: a smooth picture came back at 37 dB and 1.2 levels darker,
# with these flags at 51 dB and unchanged in the mean. A video that is extended again and again would show it.
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
STALL_SECONDS = 60.0  # ffmpeg copies gigabytes in that time; its file neither grows nor changes only when it hangs
# Size, kind and name of an MP4 box that players pass over; the SHA-256 of all bytes before it follows.
_SEAL = (56).to_bytes(4, "big") + b"uuid" + b"streamt2v sha256"
_SEAL_BYTES = len(_SEAL) + 32


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds: exact frame count, size in pixels after rotation, rate, comment tag."""

    frames: int
    width: int
    height: int
    fps: Fraction
    has_audio: bool
    comment: str


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
        raise VideoError(f"{path} cannot be read as a video: {reason}", "is it a whole mp4, mkv or webm?") from error


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
    with _opened(path) as container:
        context = _video_stream(container, path).codec_context
        return context.height, context.width


def is_longer(path: Path, count: int) -> bool:
    """Tell whether a video has more than so many frames; none is decoded. Raises as `probe`."""
    with _opened(path) as container:
        stream = _video_stream(container, path)
        if "mp4" in container.format.name and stream.frames:  # its index, beside which there are none
            return stream.frames > count
        packets = (packet for packet in container.demux(stream) if packet.size)
        return next(islice(packets, count, None), None) is not None


def probe(path: Path) -> VideoInfo:
    """Measure a video: the frames are counted, not taken from the header.

    MP4 has one packet a frame, so its packets are counted; other containers are decoded. A file that ends before what
    its header announces is refused as truncated (Matroska would otherwise just be shorter).

    Raises:
        VideoError: the file is missing, empty, a directory, no video, damaged or truncated.
    """
    first = next(_decoded(path), None)
    if first is None:
        raise VideoError(f"{path} holds no video frame that can be decoded")
    with _opened(path) as container:
        stream = _video_stream(container, path)
        count_packets = "mp4" in container.format.name
        packets = frames = 0
        end = 0.0
        for packet in container.demux():
            if packet.is_corrupt:
                raise VideoError(f"{path} is damaged or truncated after {frames} frames")
            if packet.pts is not None and packet.time_base is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index:
                packets += packet.size > 0
                shown = packet.size > 0 and not packet.is_discard
                frames += shown if count_packets else len(stream.decode(packet))
        fps = stream.average_rate or stream.guessed_rate
        if not fps:
            raise VideoError(f"{path} has no frame rate")
        # Two frames of slack: containers differ in whether the last frame has a duration.
        declared = (container.duration or 0) / av.time_base
        if packets < stream.frames or (not count_packets and end < declared - 0.05 - float(2 / fps)):
            raise VideoError(f"{path} is truncated: it announces {declared:.1f} s and ends at {end:.1f} s")
        turned = bool(first.rotation % 180)
        return VideoInfo(
            frames=frames,
            width=first.height if turned else first.width,
            height=first.width if turned else first.height,
            fps=fps,
            has_audio=bool(container.streams.audio),
            comment=next((text for key, text in container.metadata.items() if key.lower() == "comment"), ""),
        )


def read_frames(path: Path, batch: int = 8) -> Iterator[Frames]:
    """Decode a video as a stream of uint8 arrays [<=batch,H,W,3] with flat memory.

    The rotation tag is applied. Colours are converted by the matrix and range that the file is tagged with; an untagged
    file is taken as BT.709 from 720 rows on and as BT.601 below, in limited range. Frames come in presentation
    order, each once: a variable rate duplicates and drops nothing.

    Raises:
        VideoError: see `probe`; also a frame size that changes midway.
    """
    pending: list[Frames] = []
    shape = None
    for frame in _decoded(path):
        rgb = _to_rgb(frame)
        shape = shape or rgb.shape
        if rgb.shape != shape:
            raise VideoError(f"{path} changes its frame size to {rgb.shape[1]}x{rgb.shape[0]} midway")
        pending.append(rgb)
        if len(pending) == batch:
            yield np.stack(pending)
            pending.clear()
    if pending:
        yield np.stack(pending)


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


def _decoded(path: Path) -> Iterator[VideoFrame]:
    with _opened(path) as container:
        yield from container.decode(_video_stream(container, path))


def _to_rgb(frame: VideoFrame) -> Frames:
    """Convert one decoded frame to upright uint8 RGB [H,W,3]."""
    matrix: int = frame.colorspace
    if matrix in (0, 2):  # RGB or untagged
        matrix = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    rgb = frame.reformat(
        format="rgb24",
        src_colorspace=matrix,
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        interpolation=_EXACT,
    ).to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90))


def read_image(path: Path) -> Frames:
    """Read a picture as uint8 RGB [H,W,3], upright by its orientation tag, transparency laid over white.

    Raises:
        InputError: the file is missing or no readable PNG, JPEG, WebP, BMP or TIFF.
    """
    from PIL import Image, ImageOps  # only images need it

    if not path.is_file():
        raise InputError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_IMAGE_FORMATS) as file:  # which reads the header only
                if file.width * file.height > _MAX_PIXELS:
                    raise InputError(f"{path} has {file.width}x{file.height} pixels", "up to 8192x4320 is read")
                image: Image.Image = ImageOps.exif_transpose(file)
                if image.mode.startswith("I"):  # 16-bit grey would be clipped, not scaled
                    return np.repeat((np.asarray(image, np.int64) // 257).astype(np.uint8)[..., None], 3, axis=2)
                if image.has_transparency_data:
                    layer = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
                return np.array(image.convert("RGB"))
    # What damaged pictures were seen to raise.
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Warning, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}", "use PNG, JPEG, WebP, BMP or TIFF") from error


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
        resume: continue at this mark; the file is cut back to it. None starts a new file.

    Raises:
        ConfigError: odd sizes or an impossible rate. ResumeError: the file is not what the mark says.
    """

    def __init__(
        self, path: Path, height: int, width: int, fps: Fraction, *, crf: int = 18, resume: SegmentMark | None = None
    ) -> None:
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise ConfigError(f"video of {width}x{height} pixels: both sizes must be even and at least 2")
        if not 0 < fps <= 1000 or max(fps.numerator, fps.denominator) > 2**24:
            raise ConfigError(f"a frame rate of {fps} cannot be written", "use a rate such as 8, 24 or 30000/1001")
        self.path, self.height, self.width, self.fps = path, height, width, fps
        # x264's macroblock tree is not deterministic, even with one thread: of 24,000 encodings of one 5-frame segment
        # 150 differed, of 33,000 without it none.
        self._options = {"crf": str(crf), "preset": "medium", "bf": "0", "g": "600", "x264-params": "mbtree=0"}
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
            stream = container.add_stream("libx264", rate=self.fps, options=dict(self._options))
            context = stream.codec_context
            stream.height, stream.width, stream.pix_fmt = self.height, self.width, "yuv420p"
            stream.time_base = context.time_base = 1 / self.fps
            context.thread_count = 1
            context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
            context.color_primaries = context.color_trc = 1
            for index, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=_EXACT,
                )
                frame.pts, frame.time_base = self.mark.frames + index, 1 / self.fps
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return buffer.getvalue()

    def finish(self, out_path: Path, comment: str = "", audio_from: Path | None = None) -> VideoInfo:
        """Copy the segments into the final file, check it by reading it again, and only then give it its name.

        Behind its end stands a seal, see `check_seal`.

        Args:
            out_path: the mp4; an existing file is replaced.
            comment: text for the comment tag, at most 64 KiB of UTF-8.
            audio_from: a video whose first audio track is copied (re-encoded as AAC where MP4 cannot hold it) and cut
                to the length of the video.

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
        mapping = ["-map", "0:v:0", "-c:v", "copy", "-map_metadata", "-1", "-metadata", f"comment={comment}"]
        codec = _audio_codec(audio_from) if audio_from else None
        if audio_from and codec:
            guards = [part for key, value in _INPUT_OPTIONS.items() for part in (f"-{key}", value)]
            length = float(self.mark.frames / self.fps)
            arguments += [*guards, "-t", f"{length:.6f}", "-i", _url(audio_from)]
            mapping += ["-map", "1:a:0", "-c:a"]
            mapping += ["copy"] if codec in _MP4_AUDIO else ["aac", "-b:a", "192k"]
        mapping += ["-movflags", "+faststart"]
        with files.replacing(out_path) as temporary:
            if codec or find_spec("imageio_ffmpeg"):
                _run_ffmpeg([*arguments, *mapping, "-fflags", "+bitexact", "-f", "mp4"], temporary, out_path)
            else:
                _copy_pictures(self.path, temporary, out_path, comment)
            try:
                info = probe(temporary)
            except VideoError as error:
                raise OutputError(f"{out_path} could not be written whole: {error.message}") from error
            found = (info.frames, info.width, info.height, info.fps, info.has_audio)
            wanted = (self.mark.frames, self.width, self.height, self.fps, bool(codec))
            if found != wanted:
                raise OutputError(f"{out_path} holds (frames, width, height, fps, audio) {found} instead of {wanted}")
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


def _audio_codec(path: Path) -> str | None:
    with _opened(path) as container:
        contexts = [stream.codec_context for stream in container.streams.audio if stream.codec_context is not None]
        return contexts[0].codec.canonical_name if contexts else None


def _run_ffmpeg(arguments: list[str], path: Path, out_path: Path) -> None:
    """Let the ffmpeg binary write `path`, which will be `out_path`; failures, hangs and its lack are OutputErrors."""
    try:
        import imageio_ffmpeg  # type: ignore[import-untyped]

        binary: str = imageio_ffmpeg.get_ffmpeg_exe()
        command = [binary, "-nostdin", "-v", "error", "-y", *arguments, _url(path)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except ImportError as error:
        raise OutputError(f"sound is copied by imageio-ffmpeg, which is not here: {error}", "install it") from error
    except (RuntimeError, OSError) as error:
        raise OutputError(f"the ffmpeg binary cannot be started: {error}", "streamt2v doctor says more") from error
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
    if said:
        log.warning("ffmpeg on %s: %s", out_path, said[-500:])


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


def encode_animation(images: Frames, fps: float, kind: str) -> bytes:
    """Return uint8 frames [F,H,W,3] as the bytes of a WEBP or GIF file that plays for ever at a rate."""
    from PIL import Image

    pictures = [Image.fromarray(np.ascontiguousarray(image)) for image in images]
    if kind == "GIF":  # Pillow's own choice of colours takes 20 s for 48 frames of 256x144, this 0.3 s
        pictures = [picture.quantize(method=Image.Quantize.FASTOCTREE) for picture in pictures]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, kind, save_all=True, append_images=pictures[1:], duration=max(1, round(1000 / fps)), loop=0
    )
    return buffer.getvalue()
