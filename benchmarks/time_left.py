"""How wrong is the time left that a user sees? Runs `generate`, and compares what it told with how it went.

    python benchmarks/time_left.py --frames 240 --threads 2          # on idle cores
    python benchmarks/time_left.py --frames 240 --fresh              # as on a machine that never made a video

The display counts down from what was told last, so it is looked at four times a second, from the end of the second
chunk to the end of the run. An error is a share of the time that is really left; in the last tenth of the run, of
that tenth. The bar is 15 %. Writes `DATE-time-left-FRAMES.json` and a plot of the same name.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

BAR, LAST, EVERY = 0.15, 0.1, 0.25
RESULTS = Path(__file__).parent / "results"


class Told(NamedTuple):
    """What was told at a time: the seconds left, None while they are unknown, and how many base chunks are finished."""

    at: float
    left: float | None
    chunks: int


class Sample(NamedTuple):
    """What the display shows at a time, None while it cannot know, and what is really left."""

    at: float
    shown: float | None
    left: float

    def error(self, whole: float) -> float:
        """Return the error as a share of what is left; nothing shown is wholly wrong."""
        return 1.0 if self.shown is None else abs(self.shown - self.left) / max(self.left, LAST * whole)


def samples(told: Sequence[Told], end: float) -> list[Sample]:
    """Look at the display from the end of the second chunk to the end of the run, which began at 0."""
    begin = next(one.at for one in told if one.chunks >= 2)
    found = []
    for at in takewhile(lambda at: at < end, (begin + EVERY * number for number in count())):
        last = [one for one in told if one.at <= at][-1]
        shown = None if last.left is None else max(0.0, last.left - (at - last.at))
        found.append(Sample(at, shown, end - at))
    return found


def listen(arguments: Sequence[str], home: Path | None) -> tuple[list[Told], float]:
    """Run `generate` and note when it tells what; the second value is when it ended. Seconds from its start."""
    surroundings = os.environ | ({"STREAMT2V_HOME": str(home)} if home else {})
    began, told, chunks = time.monotonic(), list[Told](), 0
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-m", "streamt2v", "generate", *arguments, "--json", "-o", f"{folder}/out.mp4"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=surroundings,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["type"] == "chunk" and event["stage"] == "stream":
                chunks = event["chunk"]
            if event["type"] in ("progress", "chunk"):
                told.append(Told(time.monotonic() - began, event.get("seconds_left"), chunks))
            if event["type"] == "result":
                assert event["ok"], event
                return told, time.monotonic() - began
    raise SystemExit("the run said nothing of its end")


def plot(seen: Sequence[Sample], path: Path, whole: float, size: tuple[int, int] = (800, 400)) -> None:
    """Draw what was shown (red) and what was left (grey, with the bar around it) over the time of the run."""
    width, height = size
    most = max(max(one.left, one.shown or 0) for one in seen)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)

    def place(at: float, left: float) -> tuple[float, float]:
        return 40 + at / whole * (width - 50), height - 25 - left / most * (height - 40)

    def line(values: Sequence[tuple[float, float | None]], colour: str) -> None:
        draw.line([place(at, left) for at, left in values if left is not None], colour, 2)

    for factor in (1 - BAR, 1 + BAR):
        line([(one.at, min(most, one.left * factor)) for one in seen], "#dddddd")
    line([(one.at, one.left) for one in seen], "#888888")
    line([(one.at, one.shown) for one in seen], "#cc2222")
    draw.text((4, 4), f"{most:.0f} s left", "black")
    draw.text((width - 60, height - 18), f"{whole:.0f} s", "black")
    picture.save(path)


def main() -> None:
    """Run once, write the record and the plot, say the worst error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--fresh", action="store_true", help="know no earlier run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--prompt", default="a red ball floating over the sea at sunset")
    asked, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as home:
        arguments = [asked.prompt, "--frames", str(asked.frames), "--seed", "1", *more]
        told, end = listen(arguments, Path(home) if asked.fresh else None)
    seen = samples(told, end)
    errors = [one.error(end) for one in seen]
    worst = max(zip(errors, seen, strict=True), key=lambda pair: pair[0])
    record = {
        "date": f"{datetime.date.today()}", "machine": platform.machine(), "cores": os.cpu_count(),
        "load": os.getloadavg()[0], "frames": asked.frames, "fresh": asked.fresh, "options": more,
        "seconds": round(end, 2), "from": round(seen[0].at, 2), "worst_error": round(worst[0], 4),
        "worst_at": round(worst[1].at, 2), "mean_error": round(sum(errors) / len(errors), 4),
        "told": [[round(one.at, 2), one.left, one.chunks] for one in told],
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"{record['date']}-time-left-{asked.frames}{'-fresh' * asked.fresh}.json"
    path.write_text(json.dumps(record), "utf-8")
    plot(seen, path.with_suffix(".png"), end)
    print(f"{path}: worst error {worst[0]:.1%} at {worst[1].at:.0f} of {end:.0f} s, mean {record['mean_error']:.1%}")
    raise SystemExit(worst[0] > BAR)


if __name__ == "__main__":
    main()
