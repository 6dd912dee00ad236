"""Containers: which kinds of video files are read, and the hint given for others."""

from __future__ import annotations

from pathlib import Path

# Formats that hold pictures themselves, unlike scripts and playlists (concat, hls, ...), which would open other files.
DEMUXERS = (
    "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif,apng,asf,dv,mxf,ivf,obu,h264,hevc,m4v,mpegvideo,yuv4mpegpipe,nut"
)
SOUNDS = f"{DEMUXERS},wav,w64,aiff,mp3,aac,flac"  # where sound alone will do
_NAMES = "mp4, mov, mkv, webm, avi, wmv, ts, mpg, flv, ogv, dv, mxf, gif, apng, y4m and raw h264, hevc or av1"


def hint(path: Path) -> str:
    """Return what to do about a video that cannot be read."""
    return f"{_NAMES} can be read, if undamaged; convert others: ffmpeg -i {path.name} converted.mp4"


def is_cut_avi(path: Path) -> bool:
    """Return whether an AVI file is shorter than its first RIFF chunk says; a file never closed does not say."""
    with path.open("rb") as file:
        head = file.read(12)
    size = int.from_bytes(head[4:8], "little")
    return head[:4] == b"RIFF" and 0 < size < 2**32 - 1 and size + 8 > path.stat().st_size + 1


def says_only(codec: str, data: bytes) -> bool:
    """Return whether a packet holds only delimiters, messages and parameters, so that dropping it loses no picture.

    Only H.264 and H.265 are known to have such packets. Their units are laid out as in ITU-T H.264 and H.265, annex B,
    or as in ISO/IEC 14496-15.
    """
    if codec not in ("h264", "hevc"):
        return not data
    units, place = list[bytes](), 0
    while place + 4 < len(data):  # each after its length, which may look like a start code
        size = int.from_bytes(data[place : place + 4], "big")
        units.append(data[place + 4 : place + 4 + size])
        place += 4 + size
    if place != len(data):
        if not data.startswith((b"\0\0\1", b"\0\0\0\1")):
            return False
        units = [unit for unit in data.split(b"\0\0\1") if unit.strip(b"\0")]
    kinds = {unit[0] & 31 if codec == "h264" else unit[0] >> 1 & 63 for unit in units if unit}
    return kinds <= set(range(6, 14) if codec == "h264" else range(32, 41))
