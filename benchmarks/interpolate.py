"""Are interpolated frames better than a blend, and than optical flow? Clips that training never saw.

    python benchmarks/interpolate.py PHOTOGRAPHS CLIPS [--network FILE] [--pictures FOLDER]

PHOTOGRAPHS is the folder that training reads, CLIPS one with the files of `REAL` anywhere in it; docs/photographs.md
says which packages hold them. Rendered clips are films as in training, of the photographs that it leaves out and of the
drawn world, from other seeds. Every frame between two that are 2 or 6 apart (of real clips: every second frame) is made
from these and compared with the true one.

blend: the mean of both frames. DIS: OpenCV's flow (medium preset) from both to both, brought to the time between as in
Super SloMo (arXiv 1712.00080), both frames moved along it and mixed. PSNR of RGB in dB, means over frames; a blend that
is exact (PSNR above 50) tells nothing and is left out. Writes benchmarks/results/DATE-interpolate.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from streamt2v import weights
from streamt2v.media import frames, isolated
from streamt2v.media.frames import Frames
from streamt2v.metrics import scores
from streamt2v.models.interpolator import Interpolator
from streamt2v.runs import interpolated
from streamt2v.training import photographs
from streamt2v.training.photographs import FilmMaker
from streamt2v.training.restorer import JUDGED_OF

HERE = Path(__file__).parent
REAL = ("bikes.mp4", "carphone_pristine.mp4", "vtest.avi", "bigbuckbunny.mp4")
SKIPPED, COUNT = 20, 30  # frames of a real clip: titles and fades, and those that are read
CLIPS, SEED = 6, 100_000
EXACT = 50.0
SIZES = ((144, 256), (360, 640), (720, 1280))

Method = Callable[[Frames, Frames], Frames]
"""Two frames [H, W, 3] to the one half way between."""


def rendered(folder: Path) -> dict[str, list[Frames]]:
    """Return clips of the photographs that training leaves out, and of the drawn world."""
    maker = FilmMaker(photographs.load(folder)[::JUDGED_OF], torch.Generator().manual_seed(SEED))
    return {
        "photographs": [maker.filmed() for _ in range(CLIPS)],
        "drawn world": [maker.drawn() for _ in range(CLIPS)],
    }


def real(folder: Path, name: str) -> Frames:
    """Read some frames of a clip."""
    (path,) = folder.rglob(name)
    found: list[Frames] = []
    for group in frames.since(frames.numbered(isolated.read_frames(path)), SKIPPED):
        found.append(group.frames)
        if sum(map(len, found)) >= COUNT:
            break
    return np.concatenate(found)[:COUNT]


def triplets(clips: list[Frames], apart: int) -> Iterator[tuple[Frames, Frames, Frames]]:
    """Yield (first, middle, second) of clips, without those between which a scene ends."""
    for clip in clips:
        for start in range(0, len(clip) - apart, apart):
            first, middle, second = (clip[start + step] for step in (0, apart // 2, apart))
            if not interpolated.is_cut(first[None], second[None]):
                yield first, middle, second


def blend(first: Frames, second: Frames) -> Frames:
    """Mix both frames."""
    mean: Frames = np.round((first.astype(np.float32) + second) / 2).astype(np.uint8)
    return mean


def dis(first: Frames, second: Frames) -> Frames:
    """Move both frames along OpenCV's flow and mix them."""
    finder = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    there, back = (finder.calc(*pair, None) for pair in (grey, grey[::-1]))  # type: ignore[call-overload]
    height, width = first.shape[:2]
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
    moved = [
        cv2.remap(frame, grid + flow, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[call-overload]
        for frame, flow in ((first, (back - there) / 4), (second, (there - back) / 4))
    ]
    return blend(*moved)


def ours(network: Interpolator) -> Method:
    """Return the network as the command uses it."""

    @torch.inference_mode()
    def between(first: Frames, second: Frames) -> Frames:
        pair = [(frames.to_float(frame[None]) + 1) / 2 for frame in (first, second)]
        return frames.to_u8(network(*pair, 0.5) * 2 - 1)[0]

    return between


def table(rows: Iterator[tuple[Frames, Frames, Frames]], methods: dict[str, Method]) -> dict[str, Any]:
    """Return the mean PSNR of every method and how many frames were compared."""
    found: list[list[float]] = []
    for first, middle, second in rows:
        errors = [scores.psnr(scores.squared_error(make(first, second), middle)) for make in methods.values()]
        values = [99.0 if error is None else min(error, 99.0) for error in errors]
        if values[list(methods).index("blend")] < EXACT:
            found.append(values)
    means = np.mean(found, axis=0)
    return {"frames": len(found), **{name: round(float(mean), 2) for name, mean in zip(methods, means, strict=True)}}


def speed(network: Interpolator) -> dict[str, float]:
    """Return CPU seconds a frame on one thread by size, and the largest memory of this process in MB."""
    found = {}
    for height, width in SIZES:
        pair = torch.rand(2, 1, 3, height, width)
        taken = []
        with torch.inference_mode():
            for _ in range(5):
                began = time.process_time()
                network(*pair, 0.5)
                taken.append(time.process_time() - began)
        found[f"{width}x{height}"] = round(min(taken), 3)
    return found | {"peak MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)}


def strips(folder: Path, name: str, rows: Iterator[tuple[Frames, Frames, Frames]], methods: dict[str, Method]) -> None:
    """Write pictures of some triplets: first, blend, DIS, ours, truth, second, beside each other."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [row for row in rows if not np.array_equal(row[0], row[2])][::3][:4]
    shown = [
        np.concatenate([first, *(make(first, second) for make in methods.values()), middle, second], axis=1)
        for first, middle, second in kept
    ]
    Image.fromarray(np.concatenate(shown)).save(folder / f"{name}.png")


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("photographs", type=Path)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--network", type=Path)
    parser.add_argument("--pictures", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    path = asked.network or weights.interpolator("interpolate-small").path("interpolate.flow")
    network: Any = weights.load_module(path, "cpu", torch.float32)
    result: dict[str, Any] = {"cpu_seconds_a_frame": speed(network)}
    print(result, flush=True)
    methods: dict[str, Method] = {"blend": blend, "DIS": dis, "ours": ours(network)}
    held_out = rendered(asked.photographs)
    clips = {f"{name}, {apart} apart": (made, apart) for name, made in held_out.items() for apart in (2, 6)}
    clips |= {name: ([real(asked.clips, name)], 2) for name in REAL}
    for name, (made, apart) in clips.items():
        result[name] = table(triplets(made, apart), methods)
        print(f"{name:24} {result[name]}", flush=True)
        if asked.pictures:
            strips(asked.pictures, name.replace(", ", "-").replace(" ", "-"), triplets(made, apart), methods)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = {"date": today, "machine": platform.platform(), "torch": torch.__version__, "network": path.name}
    values = sum(parameter.numel() for parameter in network.parameters())
    written = HERE / "results" / f"{today}-interpolate.json"
    written.write_text(json.dumps(about | {"values": values, "psnr": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
