"""Is refined footage preferred to Lanczos, where nobody says which is which? Twenty pairs, left and right at random.

    python benchmarks/blind.py CLIPS FOLDER                          # writes FOLDER/01.png ... 20.png
    python benchmarks/blind.py CLIPS FOLDER --answers right left ... # the preferred sides, in order
    python benchmarks/blind.py CLIPS FOLDER --shown cityCC0.mpg      # FOLDER/refined.webp, the picture of README.md

CLIPS are those of refine_real.py, halved: each once as it is and once at crf 30, and four a second time. A pair is the
busiest part of the same frame, enlarged twice without smoothing. With answers, writes DATE-refine-blind.json.
"""

import argparse
import datetime
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import refine_real
from PIL import Image

from streamt2v.media import frames
from streamt2v.media.frames import Frames

SHOWN, CROP, BAR = 6, (240, 320), 8
AGAIN = 30  # frames later, for the clips that come a second time


def pairs(seed: int) -> list[tuple[str, int, int, str]]:
    """Return (clip, crf, frames later, side of the refined one) of twenty pairs in random order."""
    names, rng = list(refine_real.HELD_OUT), random.Random(seed)
    asked = [(name, crf, 0) for crf in (0, 30) for name in names] + [(name, 0, AGAIN) for name in names[:4]]
    rng.shuffle(asked)
    return [(*one, rng.choice(["left", "right"])) for one in asked]


def busiest(frame: Frames, height: int, width: int) -> tuple[int, int]:
    """Return the (top, left) of the part of a frame [H, W, 3] with the largest mean gradient."""
    grey = frame.mean(-1)
    slope = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    places = [(y, x) for y in range(0, grey.shape[0] - height + 1, 16) for x in range(0, grey.shape[1] - width + 1, 16)]
    return max(places, key=lambda at: float(slope[at[0] : at[0] + height, at[1] : at[1] + width].mean()))


def pair(path: Path, crf: int, later: int, side: str) -> Image.Image:
    """Return a pair of a clip, Lanczos and refined, the latter on `side`."""
    truth = refine_real.clip(path, SHOWN + later)[later:]
    size = (truth.shape[1], truth.shape[2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = frames.to_u8(frames.resize(frames.to_float(truth), (size[0] // 2, size[1] // 2)))
        source = refine_real.written(small, folder, "source", crf)
        plain = refine_real.written(refine_real.lanczos(refine_real.read(source), size), folder, "lanczos", 0)
        better, _ = refine_real.refined(source, size, folder / "refined.mp4", {})
        shown = [refine_real.read(plain)[SHOWN // 2], better[SHOWN // 2]]
    height, width = min(size[0], CROP[0]), min(size[1], CROP[1])
    top, left = busiest(truth[SHOWN // 2], height, width)
    parts = [frame[top : top + height, left : left + width] for frame in shown]
    if side == "left":
        parts.reverse()
    picture = Image.fromarray(np.concatenate([parts[0], np.full((height, BAR, 3), 128, np.uint8), parts[1]], 1))
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)


def found(clips: Path, name: str) -> Path:
    """Return a clip by its name, anywhere in a folder."""
    path = next(clips.rglob(name), None)
    if path is None:
        raise SystemExit(f"{name} is not in {clips}: see docs/photographs.md")
    return path


def main() -> None:
    """Write the pairs, or compare answers with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=20261128)
    parser.add_argument("--answers", nargs=20, choices=["left", "right"])
    parser.add_argument("--shown", metavar="CLIP")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.shown:
        shown = pair(found(asked.clips, asked.shown), 0, 0, "right")
        shown.save(asked.folder / "refined.webp", quality=75, method=6)
        return
    wanted = pairs(asked.seed)
    if asked.answers:
        rows = [
            {"clip": name, "crf": crf, "frames later": later, "refined": side, "preferred": answer}
            for (name, crf, later, side), answer in zip(wanted, asked.answers, strict=True)
        ]
        won = {str(crf): sum(r["refined"] == r["preferred"] for r in rows if r["crf"] == crf) for crf in (0, 30)}
        out = Path(__file__).parent / "results" / f"{datetime.date.today()}-refine-blind.json"
        out.write_text(json.dumps({"seed": asked.seed, "preferred by crf": won, "pairs": rows}, indent=1) + "\n")
        print(won)
        return
    for number, (name, crf, later, side) in enumerate(wanted, 1):
        pair(found(asked.clips, name), crf, later, side).save(asked.folder / f"{number:02}.png")
        print(f"{number}/{len(wanted)}", flush=True)


if __name__ == "__main__":
    main()
