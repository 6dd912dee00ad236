"""Clips with exact truth for the refiner: photographs under a moving camera, and what cameras and codecs do to them.

A camera pans, zooms, turns and shakes over a photograph, which gives a sharp clip of any size. The poor version is made
from it: blurred, made smaller, made noisy, coded, and enlarged again as the pipeline does it.
"""

from __future__ import annotations

import io
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from streamt2v.errors import WeightsError
from streamt2v.media import reading
from streamt2v.media.frames import Frames, resize, to_float, to_u8
from streamt2v.weights.home import sha256_of

LIST = Path(__file__).with_name("photographs.toml")
CLIP_FRAMES, SIZE = 12, (240, 360)
LONGEST = 3000
"""Photographs are shrunk to this many pixels: most show no more detail than that."""
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
SHARES = (0.25, 0.05, 0.5, 0.05, 0.08, 0.03, 0.04)


def listed() -> list[dict[str, str]]:
    """Return the rows of the list: name, package, origin, author, licence, sha256."""
    rows: list[dict[str, str]] = tomllib.loads(LIST.read_text())["photographs"]
    return rows


def load(folder: Path) -> list[Image.Image]:
    """Find every listed photograph below a folder, by name and checksum.

    Raises:
        WeightsError: none or not all are there; says how to get them.
    """
    rows = listed()
    there = {path.name: path for path in sorted(folder.rglob("*")) if path.is_file()} if folder.is_dir() else {}
    lost = [row for row in rows if row["name"] not in there or sha256_of(there[row["name"]]) != row["sha256"]]
    if lost:
        packages = ", ".join(sorted({row["package"] for row in lost}))
        raise WeightsError(
            f"{len(lost)} of {len(rows)} photographs are not in {folder}",
            f"unpack these packages there (docs/photographs.md says how): {packages}",
        )
    return [_open(there[row["name"]]) for row in rows]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.draft("RGB", (LONGEST, LONGEST))
        found = image.convert("RGB")
    found.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return found


class Camera:
    """Random numbers of one clip, from a torch generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        """Draw a number."""
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def normal(self, deviation: float) -> float:
        """Draw a number around zero."""
        return deviation * float(torch.randn((), generator=self.generator))

    def happens(self, probability: float) -> bool:
        """Draw whether something happens."""
        return self.uniform(0, 1) < probability

    def below(self, count: int) -> int:
        """Draw an index."""
        return int(torch.randint(count, (), generator=self.generator))

    def path(self, frames: int, liveliness: float) -> list[tuple[float, float, float, float]]:
        """Return (x, y) in output pixels, zoom and angle of every frame: steady motion and some shaking."""
        if self.happens(0.2):
            return [(0.0, 0.0, 1.0, 0.0)] * frames
        speed = liveliness * self.uniform(0, 1) ** 2 * 12
        heading = self.uniform(0, 2 * math.pi)
        zoom, turn = self.normal(0.003 * liveliness), self.normal(0.003 * liveliness)
        shake = self.uniform(0, 1.2) if self.happens(0.4) else 0.0
        steps = []
        for frame in range(frames):
            t = frame - frames / 2
            x = t * speed * math.cos(heading) + self.normal(shake)
            y = t * speed * math.sin(heading) + self.normal(shake)
            steps.append((x, y, math.exp(t * zoom), t * turn))
        return steps


def photograph_clip(photographs: Sequence[Image.Image], size: tuple[int, int], camera: Camera) -> Frames:
    """Film a photograph: frames uint8 [F, H, W, 3], drawn at twice the size and averaged."""
    picture = photographs[camera.below(len(photographs))]
    height, width = size
    # Photograph pixels a pixel of the clip: never enlarged, so that the truth is sharp.
    most = min(picture.height / height, picture.width / width) / 1.1
    ratio = min(math.exp(camera.uniform(math.log(1.0), math.log(3.5))), max(most, 0.7))
    if ratio > 2.4:
        picture, ratio = picture.reduce(2), ratio / 2
    scale = ratio / 2
    margin_x, margin_y = (picture.width - width * ratio) / 2, (picture.height - height * ratio) / 2
    centre = (
        picture.width / 2 + camera.uniform(-1, 1) * max(margin_x - 20, 0),
        picture.height / 2 + camera.uniform(-1, 1) * max(margin_y - 20, 0),
    )
    mirror = -1 if camera.happens(0.5) else 1
    quarter = camera.below(4) * math.pi / 2 if camera.happens(0.3) else 0.0
    shown = []
    for x, y, zoom, angle in camera.path(CLIP_FRAMES, 1.0):
        turn, by = angle + quarter, scale * zoom
        cos, sin = math.cos(turn) * by, math.sin(turn) * by
        a, b, d, e = mirror * cos, -mirror * sin, sin, cos
        cx, cy = centre[0] + x * ratio, centre[1] + y * ratio
        matrix = (a, b, cx - a * width - b * height, d, e, cy - d * width - e * height)
        corners = [
            (a * u + b * v + matrix[2], d * u + e * v + matrix[5]) for u in (0, 2 * width) for v in (0, 2 * height)
        ]
        left, top = (max(0, int(min(c[axis] for c in corners)) - 3) for axis in (0, 1))
        right = min(picture.width, int(max(c[0] for c in corners)) + 4)
        bottom = min(picture.height, int(max(c[1] for c in corners)) + 4)
        if right - left < 4 or bottom - top < 4:
            left, top, right, bottom = 0, 0, picture.width, picture.height
        part = np.pad(
            np.asarray(picture.crop((left, top, right, bottom))),
            ((64, 64), (64, 64), (0, 0)),
            "symmetric" if min(right - left, bottom - top) > 64 else "edge",
        )
        moved = (a, b, matrix[2] - left + 64, d, e, matrix[5] - top + 64)
        large = Image.fromarray(part).transform(
            (2 * width, 2 * height), Image.Transform.AFFINE, moved, Image.Resampling.BICUBIC
        )
        shown.append(np.asarray(large.reduce(2)))
    return np.stack(shown)


def put_in_front(frames: Frames, other: Frames, camera: Camera) -> Frames:
    """Let a part of another clip move across, with an outline of a blob or of letters: things that cover others."""
    count, height, width, _ = frames.shape
    shape = Image.new("L", (4 * width, 4 * height))
    draw = ImageDraw.Draw(shape)
    letters = camera.happens(0.5)
    colour = None
    if letters:
        colour = np.array([camera.below(256) for _ in range(3)])
        colour = colour if camera.happens(0.5) else np.array([255, 255, 255] if camera.happens(0.5) else [0, 0, 0])
        for _ in range(1 + camera.below(8)):
            text = "".join(
                chr(33 + camera.below(94)) if camera.happens(0.85) else " " for _ in range(3 + camera.below(22))
            )
            points = 4 * camera.uniform(7, 40)
            at = (camera.uniform(-0.1, 0.8) * 4 * width, camera.uniform(0, 0.9) * 4 * height)
            draw.text(at, text, 255, ImageFont.load_default(points))
    else:
        cx, cy, r = camera.uniform(0, 4 * width), camera.uniform(0, 4 * height), camera.uniform(0.1, 0.4) * 4 * height
        sides = 3 + camera.below(9)
        points_ = [
            (
                cx + r * camera.uniform(0.5, 1) * math.cos(k * 2 * math.pi / sides),
                cy + r * camera.uniform(0.5, 1) * math.sin(k * 2 * math.pi / sides),
            )
            for k in range(sides)
        ]
        draw.polygon(points_, 255)
    made = []
    for frame, (x, y, zoom, angle) in enumerate(camera.path(count, 0.8)):
        cos, sin = math.cos(angle) * zoom * 2, math.sin(angle) * zoom * 2
        matrix = (
            cos,
            -sin,
            2 * width + 4 * x - cos * width + sin * height,
            sin,
            cos,
            2 * height + 4 * y - sin * width - cos * height,
        )
        outline = shape.transform(
            (2 * width, 2 * height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        ).reduce(2)
        mask = np.asarray(outline)[..., None] / 255
        front = other[frame] if colour is None else colour
        made.append(np.round(frames[frame] * (1 - mask) + front * mask).astype(np.uint8))
    return np.stack(made)


@dataclass(frozen=True)
class Wear:
    """What a camera and a codec do to a clip; nothing but chroma at half its size where only a scale is given."""

    scale: float
    """How many times fewer pixels."""
    blur: float = 0.0
    """Deviation in pixels of the smaller clip."""
    rule: str = "bicubic"
    """How it is made smaller: bicubic, bilinear or box (each antialiased) or lanczos."""
    grain: float = 0.0
    """Deviation in levels of 255."""
    coarse: bool = False
    """Grain of three pixels."""
    grey: bool = False
    """Grain of brightness, mostly."""
    crf: int | None = None
    preset: str = "medium"
    jpeg: int | None = None
    """Quality."""
    levels: int | None = None
    """Of brightness: banding."""
    chroma: bool = True
    """Colours at half the size, as in nearly all videos."""

    def side(self, extent: int) -> int:
        """Return the side of the smaller clip."""
        return max(8, round(extent / self.scale))

    @classmethod
    def draw(cls, camera: Camera, drawn: bool = False) -> Wear:
        """Draw one: half of them only make smaller, most others code as well; the drawn world is often soft, as bases.

        What is rare in real videos is rare here: what a small network learns of one kind it unlearns of others.
        """
        scale = SCALES[int(torch.multinomial(torch.tensor(SHARES), 1, generator=camera.generator))]
        if scale not in (1, 2) and camera.happens(0.5):
            scale = max(1.0, scale * camera.uniform(0.8, 1.2))
        if drawn and camera.happens(0.5):  # soft, and never coded
            return cls(10.0 if camera.happens(0.5) else scale, blur=camera.uniform(0.2, 1.0), chroma=False)
        if camera.happens(0.5):
            return cls(scale)
        how = camera.uniform(0, 1)
        return cls(
            scale,
            blur=camera.uniform(0.2, 0.7) if camera.happens(0.2) else 0.0,
            rule="bicubic" if camera.happens(0.7) else ("bilinear", "box", "lanczos")[camera.below(3)],
            grain=camera.uniform(0, 1) ** 2 * 6 if camera.happens(0.2) else 0.0,
            coarse=camera.happens(0.3),
            grey=camera.happens(0.5),
            crf=int(camera.uniform(18, 36)) if how < 0.8 else None,
            preset="veryfast" if camera.happens(0.5) else "medium",
            jpeg=40 + camera.below(55) if how > 0.95 else None,
            levels=24 + camera.below(40) if camera.happens(0.02) else None,
        )


def poorer(truth: Tensor, wear: Wear, camera: Camera) -> Tensor:
    """Leave the clip [F, 3, H, W] as a camera or a codec would, `wear.scale` times smaller, and enlarge it again."""
    height, width = truth.shape[-2:]
    small = (wear.side(height), wear.side(width))
    x = blur(truth, wear.blur * wear.scale) if wear.blur else truth
    if small == (height, width):
        pass
    elif wear.rule == "box" and height % small[0] == width % small[1] == 0:
        x = functional.avg_pool2d(x, (height // small[0], width // small[1]))
    elif wear.rule == "bilinear":
        x = functional.interpolate(x, size=small, mode="bilinear", antialias=True)
    elif wear.rule == "lanczos":
        images = map(Image.fromarray, to_u8(x))
        x = to_float(np.stack([np.asarray(i.resize(small[::-1], Image.Resampling.LANCZOS)) for i in images]))
    else:
        x = resize(x, small)
    if wear.grain:
        grain = torch.randn(x.shape, generator=camera.generator)
        if wear.grey:
            grain = grain.mean(1, keepdim=True) * 3**0.5 * 0.8 + grain * 0.3
        if wear.coarse:
            grain = functional.avg_pool2d(grain, 3, 1, 1) * 2
        x = x + grain * (wear.grain / 127.5)
    shown = to_u8(x)
    if wear.jpeg is not None:
        shown = np.stack([_jpeg(frame, wear.jpeg) for frame in shown])
    if wear.levels is not None:
        shown = (np.round(shown / 255 * wear.levels) / wear.levels * 255).astype(np.uint8)
    if wear.crf is not None:
        shown = coded(shown, wear.crf, wear.preset)
    elif wear.chroma:
        shown = halved_chroma(shown)
    return resize(to_float(shown), (height, width))


def halved_chroma(frames: Frames) -> Frames:
    """Return frames as a lossless video in yuv420p shows them; an odd last row or column is repeated for it."""
    _, height, width, _ = frames.shape
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    return np.stack([_unpacked(_packed(frame))[:height, :width] for frame in even])


def _packed(frame: Frames) -> VideoFrame:
    """Pack a frame [H, W, 3] as videos are written here; plain conversion darkens it, which would be learned."""
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    bt709 = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
    return picture.reformat(format="yuv420p", interpolation=reading.EXACT, **bt709)


def _unpacked(picture: VideoFrame) -> Frames:
    """Return the frame [H, W, 3] of a picture as videos are read here."""
    bt709 = {"src_colorspace": Colorspace.ITU709, "src_color_range": ColorRange.MPEG}
    shown = picture.reformat(format="rgb24", interpolation=reading.EXACT, **bt709).to_ndarray()
    frame: Frames = shown.astype(np.uint8, copy=False)
    return frame


def blur(x: Tensor, sigma: float) -> Tensor:
    """Smooth frames [F, 3, H, W] by a Gaussian of `sigma` pixels."""
    reach = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), 0)
    for shape, padding in (((1, 1, 1, -1), (reach, reach, 0, 0)), ((1, 1, -1, 1), (0, 0, reach, reach))):
        x = functional.conv2d(
            functional.pad(x, padding, mode="replicate"), kernel.view(shape).expand(3, -1, -1, -1), groups=3
        )
    return x


def coded(frames: Frames, crf: int, preset: str = "medium") -> Frames:
    """Code frames as H.264 in yuv420p and decode them again; an odd last row or column is repeated for it."""
    count, height, width, _ = frames.shape
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    file = io.BytesIO()
    # Repeatable only without the tree of macroblocks, and with one thread.
    options = {"crf": str(crf), "preset": preset, "x264-params": "mbtree=0:threads=1:lookahead-threads=1"}
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = even.shape[1], even.shape[2], "yuv420p"
        for array in even:
            container.mux(stream.encode(_packed(array)))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file, "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        found = np.stack([_unpacked(frame) for frame in container.decode(video=0)])
    assert len(found) == count
    shown: Frames = found[:, :height, :width].astype(np.uint8, copy=False)
    return shown


def _jpeg(frame: Frames, quality: int) -> Frames:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "jpeg", quality=quality)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def world_clip(size: tuple[int, int], camera: Camera) -> Tensor:
    """Render a clip of the drawn world [F, 3, H, W], all of it or a part."""
    from streamt2v.training.world.drawing import render
    from streamt2v.training.world.scenes import sample_scenes

    scenes = sample_scenes(1, camera.generator)
    # A picture of 1280x720 would show 1/zoom times as much as this clip.
    zoom = min(1.0, size[1] / 1280 * camera.uniform(1.0, 2.0)) if camera.happens(0.8) else 1.0
    left, top = camera.uniform(0, 1 - zoom), camera.uniform(0, 1 - zoom)
    high = zoom * size[0] / size[1] * 16 / 9
    view = (left, min(top, 1 - high), left + zoom, min(top, 1 - high) + high)
    start = camera.below(400)
    return render(scenes, torch.arange(start, start + CLIP_FRAMES)[None], *size, view)[0].clamp(-1, 1)


@dataclass(frozen=True)
class Film:
    """A clip as it should be, uint8 [F, H, W, 3], and whether it shows the drawn world, not a photograph."""

    truth: Frames
    drawn: bool


class FilmMaker:
    """Films of photographs and of the drawn world."""

    def __init__(self, photographs: Sequence[Image.Image], generator: torch.Generator, world: float = 0.3) -> None:
        self.photographs, self.world, self.camera = photographs, world, Camera(generator)

    def make(self) -> Film:
        """Make a film of `SIZE`."""
        drawn = self.camera.happens(self.world)
        return Film(self.drawn() if drawn else self.filmed(), drawn)

    def drawn(self) -> Frames:
        """Draw a clip of the drawn world."""
        return to_u8(world_clip(SIZE, self.camera))

    def filmed(self) -> Frames:
        """Film photographs as a video shows them: nobody need know what none can show.

        Half of them is softer than a photograph made smaller, as lenses and sensors are, and a third was coded well:
        videos that are watched are no sharper, and what is sharpened beyond them is wrong.
        """
        camera = self.camera
        shown = photograph_clip(self.photographs, SIZE, camera)
        if camera.happens(0.2):
            shown = put_in_front(shown, photograph_clip(self.photographs, SIZE, camera), camera)
        if camera.happens(0.5):
            shown = to_u8(blur(to_float(shown), camera.uniform(0.3, 0.9)))
        return coded(shown, int(camera.uniform(12, 24))) if camera.happens(0.3) else halved_chroma(shown)
