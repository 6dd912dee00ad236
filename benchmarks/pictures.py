"""The moving picture of README.md: pieces of one long video, sped up, each frame with its number.

    make pictures                                                     # 1200 frames, about as long as `plan` says
    python benchmarks/pictures.py "PROMPT" --frames 1200 --seed 1     # the same with another prompt
    python benchmarks/pictures.py --video ball.mp4 --pieces 1 --step 25

The video is made first, or continued, unless --video names one. Of each of --pieces parts of it, spread from the first
frame to the last, every --step-th frame is shown. Writes `docs/long.webp`, as good as fits into 200 kB, and prints what
README says of it: the line that shows it, and what the video cost.
"""

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from streamt2v.chunks import evenly
from streamt2v.media import preview, reading
from streamt2v.media.frames import Frames

REPOSITORY = Path(__file__).resolve().parents[1]
PROMPT = "a red ball floating over the sea at sunset"
WIDTH = 256  # of what is shown
MOST_BYTES, QUALITIES = 200_000, (90, 80, 70, 60, 50, 40, 30, 20)


def chosen(num_frames: int, pieces: int, shown: int, step: int) -> list[int]:
    """Return the frames to show: `shown` of each piece, every `step`-th, from the first to the last."""
    length = min((shown - 1) * step + 1, num_frames)
    starts = evenly(num_frames - length + 1, pieces)
    return [frame for start in starts for frame in range(start, start + length, step)]


def numbered(frames: Frames, numbers: Sequence[int], of: int) -> list[Image.Image]:
    """Write its number into the corner of each frame [F,H,W,3]."""
    pictures, font = [], ImageFont.load_default(max(10, frames.shape[1] // 12))
    for frame, number in zip(frames, numbers, strict=True):
        picture = Image.fromarray(frame)
        place = (frames.shape[2] - 4, frames.shape[1] - 3)
        said = f"frame {number + 1} of {of}"
        ImageDraw.Draw(picture).text(place, said, "white", font, "rs", stroke_width=1, stroke_fill="black")
        pictures.append(picture)
    return pictures


def encode(pictures: Sequence[Image.Image], fps: float, most: int = MOST_BYTES) -> tuple[bytes, int]:
    """Return the moving picture at the best quality that fits, and that quality. Raises SystemExit where none does."""
    for quality in QUALITIES:
        data, first = io.BytesIO(), pictures[0]
        more = {"append_images": pictures[1:], "save_all": True, "loop": 0, "method": 6}
        first.save(data, "WEBP", quality=quality, duration=round(1000 / fps), **more)
        if data.tell() <= most:
            return data.getvalue(), quality
    raise SystemExit(f"{len(pictures)} frames do not fit into {most} bytes: show fewer")


def make(prompt: str, frames: int, seed: int, path: Path) -> None:
    """Make the video, or go on with it; print what it costs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "streamt2v", "generate", prompt, "--frames", str(frames), "--seed", str(seed)]
    command += ["--resume", "--json", "-o", str(path)]
    told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=REPOSITORY).stdout
    result = json.loads(told.splitlines()[-1])
    memory = f"{result['peak_memory_mb'] / 1000:.1f} GB"
    print(f"{frames} frames: {result['seconds']:.0f} s on {os.cpu_count()} cores, {memory} (all of one run, if new)")


def main() -> None:
    """Make what is missing, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--frames", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--video", type=Path, help="a finished video")
    parser.add_argument("--pieces", type=int, default=4)
    parser.add_argument("--shown", type=int, default=15, help="frames of a piece")
    parser.add_argument("--step", type=int, default=2)
    parser.add_argument("--fps", type=float, default=8)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "long.webp")
    asked = parser.parse_args()
    video = asked.video or REPOSITORY / "build" / f"long-{asked.frames}-{asked.seed}.mp4"
    if asked.video is None:
        make(asked.prompt, asked.frames, asked.seed, video)
    num_frames = reading.probe(video).frames
    numbers = chosen(num_frames, asked.pieces, asked.shown, asked.step)
    wanted, found, start = set(numbers), dict[int, Frames](), 0
    for group in reading.read_frames(video):
        found |= {start + index: group[index] for index in range(len(group)) if start + index in wanted}
        start += len(group)
    shown = preview.shrink(np.stack([found[number] for number in numbers]), WIDTH)
    data, quality = encode(numbered(shown, numbers, num_frames), asked.fps)
    asked.out.write_bytes(data)
    print(
        f"{asked.out}: {len(numbers)} frames, {len(data) / 1000:.0f} kB, quality {quality}; look at it. In README.md:"
    )
    size = f'width="{2 * shown.shape[2]}"'
    print(f'<img src="docs/{asked.out.name}" {size} alt="{asked.prompt}, {num_frames} frames, sped up">')


if __name__ == "__main__":
    main()
