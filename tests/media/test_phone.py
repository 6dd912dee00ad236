"""One clip as phones make them: turned, uneven in time, HLG, two tracks of sound, comes out right in all of it."""

from pathlib import Path

import numpy as np
import pytest

from streamt2v.media import isolated
from tests.cli.helpers import call
from tests.media.makers import FLASHES, beep_times, ffmpeg, flash_times, gaps, kinds, refine, where


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Portrait, shown by a display matrix; 30 pictures a second with gaps; HEVC of 10 bits in HLG and BT.2020."""
    folder = tmp_path_factory.mktemp("phone")
    when = "+".join(f"between(t,{time - 0.001},{time + 0.199})" for time in FLASHES)
    boxes = "drawbox=0:0:18:18:0xff0000:fill,drawbox=54:110:18:18:0x0000ff:fill"
    ffmpeg(
        "-f", "lavfi", "-i", f"color=0x404040:s=72x128:d=2.6:r=30,format=gbrp,{boxes},"
        f"drawbox=20:30:30:60:white:fill:enable='{when}'", "-f", "lavfi", "-i",
        f"sine=1000:d=2.6:sample_rate=48000,volume='gt({when},0)':eval=frame", "-map", "0:v", "-map", "1:a", "-map",
        "1:a", "-vf",
        "select='mod(n,7)*not(between(n,40,52))+between(n,28,33)',transpose=cclock,format=gbrp16le,"
        "setparams=color_primaries=bt709:color_trc=iec61966-2-1:colorspace=gbr:range=pc,"
        "zscale=min=gbr:tin=iec61966-2-1:pin=709:t=arib-std-b67:p=2020:m=2020_ncl:r=tv:npl=203,format=yuv420p10le",
        "-fps_mode", "vfr", "-c:v", "libx265", "-x265-params", "log-level=none", "-tag:v", "hvc1", "-c:a", "aac",
        "-metadata:s:a:0", "language=eng", "-metadata:s:a:1", "language=fra", folder / "flat.mov",
    )  # fmt: skip
    ffmpeg("-display_rotation", "-90", "-i", folder / "flat.mov", "-map", "0", "-c", "copy", folder / "in.mov")
    return folder / "in.mov"


@pytest.mark.parametrize("refined", [False, True])
def test_it_is_upright_in_time_in_colour_and_sounds(
    refined: bool, clip: Path, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    if not refined:  # with the networks the little picture is too rough to look for flashes
        request.getfixturevalue("unrefined")
    out = tmp_path / "out.mp4"
    assert refine(clip, out, "--size", "72x128", "--refine-steps", 1, quiet=False) == 0
    found, frames = isolated.probe(out), np.concatenate(list(isolated.read_frames(out)))
    assert (found.width, found.height, found.fps) == (72, 128, 30)
    assert {name: colour for name, colour in where(frames[0]).items() if colour != "other"} == {
        "TL": "red",
        "BR": "blue",
    }
    assert kinds(out) == ["video", "audio aac eng", "audio aac fra"]
    assert "come at uneven times" in capsys.readouterr().err
    assert call("verify", out) == 0
    for track in (0, 1):
        moved = [time - float(isolated.probe(clip).clock.start) for time in beep_times(clip, track)]
        assert max(gaps(beep_times(out, track), moved)) < 0.01
    if not refined:
        assert max(gaps(flash_times(out), beep_times(out))) < 1 / 30 + 0.01
