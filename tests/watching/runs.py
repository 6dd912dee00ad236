"""Runs that grow without any network: drawn frames, stored as a run stores them."""

from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from streamt2v import config
from streamt2v.jobs import run_directory
from streamt2v.jobs.run_directory import RunDirectory
from streamt2v.media.frames import Frames
from streamt2v.media.writing import SegmentWriter

STRIDE, FIRST = 8, 16


def drawn(start: int, stop: int, width: int = 128, height: int = 72) -> Frames:
    """A ball that moves over a ground whose colour changes, with the number of each frame."""
    images = []
    for frame in range(start, stop):
        image = Image.new("RGB", (width, height), (40 + frame % 120, 90, 160 - frame % 120))
        draw, size = ImageDraw.Draw(image), height // 4
        left, top = (7 * frame * width // 256) % (width - size), int(height / 2 + height / 5 * np.sin(frame / 4))
        draw.ellipse((left, top - size / 2, left + size, top + size / 2), fill=(220, 40, 40))
        draw.text((4, 2), str(frame), fill=(255, 255, 255), font=ImageFont.load_default(height / 6))
        images.append(np.asarray(image))
    return np.stack(images)


class Growing:
    """A run in this process that makes `frames` frames, a chunk at every `step`; `finish` ends it, `kill` drops it."""

    def __init__(self, output: Path, frames: int = 64, prompt: str = "a red ball", **more: object) -> None:
        self.output, self.frames = output, frames
        small = {"prompt": prompt, "num_frames": frames, "output.height": 144, "output.width": 256}
        self.run = config.merge(config.preset("demo"), small, more)
        recipe = {"command": "generate", "config": config.to_flat(self.run), "source": None}
        self.directory = RunDirectory.open(run_directory.directory_for(output), recipe, resume=False)
        size = self.run.output.height, self.run.output.width
        lossless = output.suffix != ".mp4"
        self.writer = SegmentWriter(self.directory.partial_path, *size, self.run.output.rate, lossless=lossless)

    def __enter__(self) -> "Growing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def base(self) -> None:
        """Store the next chunk of the base video."""
        start = self.directory.num_base_frames
        stop = min(self.frames, start + (STRIDE if start else FIRST))
        self.directory.append_base(self.directory.num_base_chunks, drawn(start, stop))

    def output_frames(self, count: int = STRIDE) -> None:
        """Write the next frames of the output, and the state after them."""
        start, (height, width) = self.writer.mark.frames, (self.writer.height, self.writer.width)
        self.writer.append(drawn(start, min(self.frames, start + count), width, height))
        self.directory.save_state("output", {}, {"mark": asdict(self.writer.mark)})

    def step(self) -> bool:
        """Take one step of each stage, the output one chunk behind; False at the end."""
        if self.directory.num_base_frames < self.frames:
            self.base()
        if self.directory.num_base_chunks > 1 and self.writer.mark.frames < self.frames:
            self.output_frames()
        return self.writer.mark.frames < self.frames

    def kill(self) -> None:
        """Free the lock, as the kernel does when the process dies."""
        self.directory.close()

    def finish(self, comment: str = "") -> None:
        """Give the output its name and remove the run."""
        self.writer.finish(self.output, comment)
        self.directory.remove()
