"""Colours as they are meant: profiles of pictures, high dynamic range, wide primaries, matrices that scalers refuse.

Reported for other tools as browser-use/video-use#6, LibrePhotos/librephotos#455, zfleeman/ffmpeg4discord#77 (HDR);
n00mkrad/flowframes#84 (matrices); siiptuo/pio#15, photopea/photopea#5918 (profiles); python-pillow/Pillow#7333,
thunder-project/thunder#58 (floating point). All inputs are made here; the values that HDR is compared with come from
zimg, which ffmpeg's zscale uses.
"""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from streamt2v.errors import InputError, VideoError
from streamt2v.media import colour, isolated, pictures
from tests.cli.helpers import call
from tests.media.makers import X264, ffmpeg, refine, where

TINT = (200, 100, 20)


def tinted(path: Path, transfer: str, primaries: str, matrix: str, tags: str = "", full: bool = False) -> Path:
    """Write one colour, converted by zimg into a transfer, primaries and a matrix, as 10 bits."""
    red, green, blue = TINT
    convert = f"t={transfer}:p={primaries}:m={matrix}:r={'pc' if full else 'tv'}:npl=203"
    ffmpeg(
        "-f", "lavfi", "-i", f"color=0x{red:02x}{green:02x}{blue:02x}:s=32x32:d=0.2:r=10", "-vf",
        "format=gbrp16le,setparams=color_primaries=bt709:color_trc=iec61966-2-1:colorspace=gbr:range=pc,"
        f"zscale=min=gbr:tin=iec61966-2-1:pin=709:{convert},format=yuv444p10le{tags}", "-c:v", "ffv1", path,
    )  # fmt: skip
    return path


def seen(path: Path) -> np.ndarray:
    info, frames = isolated.probe(path), np.concatenate(list(isolated.read_frames(path)))
    assert frames.shape[1:3] == (info.height, info.width)
    return frames[0, frames.shape[1] // 2, frames.shape[2] // 2].astype(int)


@pytest.mark.parametrize(
    ("matrix", "full"),
    [
        ("709", False), ("709", True), ("170m", False), ("170m", True), ("fcc", False), ("ycgco", False),
        ("chroma-derived-nc", False),
    ],
)  # fmt: skip
def test_every_matrix_gives_the_same_colour(matrix: str, full: bool, tmp_path: Path) -> None:
    path = tinted(tmp_path / "in.mkv", "709", "709", matrix, full=full)
    # BT.709 codes the light of sRGB a little brighter.
    assert np.abs(seen(path) - (203, 108, 33)).max() <= 3


@pytest.mark.parametrize(("primaries", "matrix"), [("2020", "2020_ncl"), ("smpte432", "709"), ("smpte431", "709")])
def test_wide_primaries_become_those_of_bt709(primaries: str, matrix: str, tmp_path: Path) -> None:
    path = tinted(tmp_path / "in.mkv", "709", primaries, matrix)
    assert np.abs(seen(path) - (203, 108, 33)).max() <= (8 if primaries == "smpte431" else 4)


@pytest.mark.parametrize(
    ("transfer", "matrix"),
    [
        ("smpte2084", "2020_ncl"),
        ("arib-std-b67", "2020_ncl"),
        ("smpte2084", "ictcp"),
        ("smpte2084", "chroma-derived-nc"),
    ],
)
def test_high_dynamic_range_becomes_ordinary(transfer: str, matrix: str, tmp_path: Path) -> None:
    path = tinted(tmp_path / "in.mkv", transfer, "2020", matrix)
    found = seen(path)
    # Below the knee of the curve, so near what it was; far from the grey that the codes themselves would show.
    assert np.abs(found - (200, 106, 32)).max() <= (24 if transfer == "arib-std-b67" else 6)


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_of_a_result_is_saturated(transfer: str, tmp_path: Path, unrefined: None) -> None:
    path, out = tmp_path / "in.mp4", tmp_path / "out.mp4"
    boxes = "drawbox=0:0:32:18:0xff0000:fill,drawbox=96:54:32:18:0x0000ff:fill"
    ffmpeg(
        "-f", "lavfi", "-i", f"color=0x505050:s=128x72:d=0.4:r=10,format=gbrp,{boxes}", "-vf",
        "format=gbrp16le,setparams=color_primaries=bt709:color_trc=iec61966-2-1:colorspace=gbr:range=pc,"
        f"zscale=min=gbr:tin=iec61966-2-1:pin=709:t={transfer}:p=2020:m=2020_ncl:r=tv:npl=203,format=yuv420p10le",
        "-c:v", "libx265", "-x265-params", "log-level=none", "-tag:v", "hvc1", path,
    )  # fmt: skip
    assert refine(path, out, "--size", "128x72") == 0
    found = where(np.concatenate(list(isolated.read_frames(out)))[0])
    assert (found["TL"], found["BR"], found["TR"]) == ("red", "blue", "other")


def test_constant_luminance_is_undone_exactly() -> None:
    # By BT.2020, table 4: Y'c of the luminance, differences scaled by the largest that there are.
    rgb = np.random.default_rng(0).random((500, 3))
    encode, _ = colour._curve(1)
    weights = colour.luma(9)
    coded, y = encode(rgb), encode(rgb @ weights)
    blue, red = coded[:, 2] - y, coded[:, 0] - y
    first = np.where(blue <= 0, blue / (2 * 0.9702), blue / (2 * 0.7910))
    second = np.where(red <= 0, red / (2 * 0.8591), red / (2 * 0.4969))
    back = colour.from_matrix(np.stack([y, first, second], -1), 10, 9, 1)
    assert np.abs(back - coded).max() < 0.004


def test_a_matrix_that_nobody_knows_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, path = tmp_path / "plain.mp4", tmp_path / "in.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=32x32:d=0.2:r=10", *X264, plain)
    ffmpeg("-i", plain, "-c", "copy", "-bsf:v", "h264_metadata=matrix_coefficients=11", path)
    assert call("refine", path, "-o", tmp_path / "out.mp4") == 3
    said = capsys.readouterr().err
    assert "matrix 11" in said and "zscale" in said
    with pytest.raises(VideoError):
        isolated.probe(path)


# ------------------------------------------------------------------------------------------------------- pure functions


@given(st.floats(0, 1))
@settings(deadline=None)
def test_transfers_are_undone(value: float) -> None:
    coded = np.array([value])
    assert colour.nits_to_pq(colour.pq_to_nits(coded)) == pytest.approx(coded, abs=1e-6)
    assert colour._scene_to_hlg(colour._hlg_to_scene(coded)) == pytest.approx(coded, abs=1e-5)


def test_known_values_of_the_standards() -> None:
    assert colour.pq_to_nits(np.array([0.0, 0.5081, 0.5807, 0.7518, 1.0])) == pytest.approx(
        [0, 100, 203, 1000, 10000], rel=3e-3
    )
    assert colour.hlg_to_nits(np.full((1, 3), 0.75))[0] == pytest.approx([203] * 3, rel=0.01)
    assert colour.hlg_to_nits(np.ones((1, 3)))[0] == pytest.approx([1000] * 3, rel=0.01)
    assert colour.luma(1) == pytest.approx([0.2126, 0.7152, 0.0722], abs=2e-4)
    assert colour.luma(9) == pytest.approx([0.2627, 0.6780, 0.0593], abs=2e-4)


@given(st.floats(0, 50), st.floats(0, 50))
@settings(deadline=None)
def test_the_tone_curve_rises_from_black_to_white(one: float, other: float) -> None:
    low, high = sorted((one, other))
    bent = colour.tone(np.array([0, low, high, 1000 / 203, 60.0]))
    assert bent[0] == 0 and bent[1] <= bent[2] + 1e-12 and bent[3:] == pytest.approx([1, 1])
    if high <= 0.3:
        assert bent[2] == high


def test_white_of_203_nits_is_217_and_greys_stay_grey() -> None:
    white = colour.to_sdr(colour.nits_to_pq(np.full((1, 3), 203.0)), 9, colour.PQ) * 255
    assert white[0] == pytest.approx([217] * 3, abs=0.5)
    greys = np.linspace(0, 1, 64)[:, None].repeat(3, 1)
    for transfer in (colour.PQ, colour.HLG, 1):
        made = colour.to_sdr(greys, 9, transfer)
        assert np.ptp(made, axis=1).max() < 2e-3
        assert (np.diff(made[:, 0]) >= 0).all()
        assert made[0] == pytest.approx([0] * 3) and made[-1] == pytest.approx([1] * 3)


def test_a_picture_is_converted_as_its_values_are() -> None:
    picture = np.random.default_rng(1).integers(0, 65536, (70, 9, 3), dtype=np.uint16)
    exact = colour.to_sdr(picture / 65535, 9, colour.PQ) * 255
    assert np.abs(colour.convert(picture, 9, colour.PQ) - exact).max() <= 0.51


# ------------------------------------------------------------------------------------------------------------ pictures


def profile(primaries: tuple[tuple[float, float], ...], gamma: float) -> bytes:
    """Make an ICC profile of a matrix and one curve, as ICC.1 lays it out."""
    xy_to_xyz = lambda xy: np.array([xy[0] / xy[1], 1.0, (1 - xy[0] - xy[1]) / xy[1]])  # noqa: E731
    corners = np.stack([xy_to_xyz(xy) for xy in primaries], axis=1)
    d65, d50 = xy_to_xyz((0.3127, 0.3290)), np.array([0.9642, 1.0, 0.8249])
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapt = np.linalg.inv(cone) @ np.diag((cone @ d50) / (cone @ d65)) @ cone
    columns = (adapt @ (corners * np.linalg.solve(corners, d65))).T
    fixed = lambda values: b"".join(round(value * 65536).to_bytes(4, "big", signed=True) for value in values)  # noqa: E731
    text = b"desc\0\0\0\0" + (5).to_bytes(4, "big") + b"test\0" + bytes(78)
    curve = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + b"\0\0"
    blocks = {b"desc": text, b"cprt": b"text\0\0\0\0free\0\0\0\0", b"wtpt": b"XYZ \0\0\0\0" + fixed(d50)}
    blocks |= {
        name: b"XYZ \0\0\0\0" + fixed(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    }
    blocks |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, data, place = b"", b"", 128 + 4 + 12 * len(blocks)
    for name, block in blocks.items():
        block += bytes(-len(block) % 4)
        table += name + (place + len(data)).to_bytes(4, "big") + len(block).to_bytes(4, "big")
        data += block
    body = len(blocks).to_bytes(4, "big") + table + data
    head = bytes(8) + b"\x02\x10\0\0" + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + fixed(d50) + bytes(48)
    return (128 + len(body)).to_bytes(4, "big") + head[4:] + body


P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
BT2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
PROPHOTO_LIKE = ((0.7, 0.29), (0.2, 0.75), (0.14, 0.05))


def saved(path: Path, colours: list[tuple[int, int, int]], icc: bytes, mode: str = "RGB", **more: object) -> Path:
    """Save sRGB colours as a picture in the space of a profile."""
    image = Image.fromarray(np.array([colours], np.uint8).repeat(8, 0).repeat(8, 1))
    given = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    moved = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), given, outputMode="RGB")
    assert moved is not None
    if mode == "RGBA":
        moved.putalpha(255)
    elif mode == "P":
        moved = moved.quantize(16)
    moved.save(path, icc_profile=icc, **more)
    return path


@pytest.mark.parametrize("name", ["p3.png", "p3.jpg", "p3.webp", "p3.tif", "adobe.png", "2020.png", "prophoto.png"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_profiles_become_srgb(name: str, mode: str, tmp_path: Path) -> None:
    space = {"p3": (P3, 2.2), "adobe": (ADOBE, 2.2), "2020": (BT2020, 2.4), "prophoto": (PROPHOTO_LIKE, 1.8)}
    if mode != "RGB" and not name.endswith(".png"):
        pytest.skip("that kind of file holds RGB")
    colours = [(255, 0, 0), (0, 200, 40), (30, 60, 200), (128, 128, 128)]
    more = {"quality": 100, "subsampling": 0} if name.endswith("jpg") else {"lossless": True} if "webp" in name else {}
    path = saved(tmp_path / name, colours, profile(*space[name.partition(".")[0]]), mode, **more)
    found = pictures.read(path)[4, 4::8].astype(int)
    assert np.abs(found - colours).max() <= 9
    assert np.abs(np.asarray(Image.open(path).convert("RGB"))[4, 4].astype(int) - colours[0]).max() > 15


def test_profiles_of_grey_cmyk_and_nonsense(tmp_path: Path) -> None:
    grey = Image.new("L", (8, 8), 128)
    grey.save(tmp_path / "bad.png", icc_profile=b"nonsense")
    assert pictures.read(tmp_path / "bad.png")[0, 0].tolist() == [128] * 3
    Image.new("RGB", (8, 8), "red").save(tmp_path / "cut.png", icc_profile=profile(P3, 2.2)[:200])
    assert pictures.read(tmp_path / "cut.png")[0, 0].tolist() == [255, 0, 0]
    grey.save(tmp_path / "unfit.png", icc_profile=profile(P3, 2.2))  # of RGB, in a picture of grey
    assert pictures.read(tmp_path / "unfit.png")[0, 0].tolist() == [128] * 3
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (8, 8), (200, 30, 30)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    lab.save(tmp_path / "lab.tif")
    assert np.abs(pictures.read(tmp_path / "lab.tif")[0, 0].astype(int) - (200, 30, 30)).max() <= 4
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert pictures.read(tmp_path / "cmyk.jpg")[0, 0, 0] > 200


LEVELS = {
    "0 to 1": (np.array([[0, 0.25, 1]], np.float32), [0, 64, 255]),
    "0 to 255": (np.array([[0, 64, 255]], np.float32), [0, 64, 255]),
    "0 to 65535": (np.array([[0, 32768, 65535]], np.float32), [0, 128, 255]),
    "below 0": (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
    "beyond": (np.array([[0, 500_000, 1_000_000]], np.float32), [0, 128, 255]),
    "integers of 8 bits": (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
    "integers of 16 bits": (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
    "integers of 32 bits": (np.array([[0, 2**29, 2**30]], np.int32), [0, 128, 255]),
    "one value": (np.array([[-5, -5]], np.float32), [0, 0]),
}


@pytest.mark.parametrize("name", LEVELS)
def test_values_of_any_range_are_scaled(name: str, tmp_path: Path) -> None:
    values, wanted = LEVELS[name]
    Image.fromarray(values).save(tmp_path / "in.tif")
    found = pictures.read(tmp_path / "in.tif")
    assert found.shape == (1, len(wanted), 3)
    assert found[0, :, 0].tolist() == wanted


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=20))
@settings(deadline=None)
def test_scaling_keeps_the_order(values: list[float]) -> None:
    made = pictures.to_levels(np.array([values], np.float32))[0]
    order = np.argsort(values, kind="stable")
    assert (np.diff(made[order].astype(int)) >= 0).all()


def test_nan_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "in.tif")
    with pytest.raises(InputError, match="NaN"):
        pictures.read(tmp_path / "in.tif")
