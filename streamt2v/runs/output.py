"""The output of a run: the growing file, what lies behind it in the run directory, the preview, the finished file."""

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from streamt2v import __version__
from streamt2v.errors import ResumeError, VideoError
from streamt2v.families.networks import Networks
from streamt2v.jobs.prepared import Prepared
from streamt2v.jobs.run_directory import RunDirectory
from streamt2v.media import exports, frames, pictures, preview, reading
from streamt2v.media.frames import Frames, Group
from streamt2v.media.writing import SegmentMark, SegmentWriter
from streamt2v.runs.beside import Beside
from streamt2v.runs.watch import Watch, look_at

SAVING = 0.02  # of a run's time is spent on states: those of a refiner can be hundreds of megabytes


@dataclass(frozen=True)
class Finished:
    """Output frames, and what makes the state of the stage that made them, if it has one.

    Where `more` of a group follows, nothing can go on from here.
    """

    group: Group
    state: Callable[[], dict[str, Tensor]] | None = None
    more: bool = False


class Output:
    """Takes groups of frames in order, where the last one ended, and remembers how to go on; `size` is (H, W)."""

    def __init__(
        self,
        known: Prepared,
        size: tuple[int, int],
        directory: RunDirectory,
        report: Watch,
        networks: Networks,
        beside: Beside | None = None,
    ) -> None:
        self.known, self.size, self.directory, self.report, self.networks = known, size, directory, report, networks
        self._beside = beside
        self._writing: Future[None] | None = None
        job, output = known.job, known.job.config.output
        self._state = directory.load_state("output")
        mark = None if self._state is None else SegmentMark(**self._state.meta["mark"])
        begin = partial(
            SegmentWriter,
            directory.partial_path,
            *size,
            output.rate,
            crf=output.crf,
            lossless=job.output.suffix.lower() != ".mp4",
        )
        try:
            self.writer = begin(resume=mark)
        except ResumeError as error:  # nothing is lost: it is made again from the base frames
            report.note(f"{error.message}; it is made again", warning=True)
            self.writer, self._state = begin(), None
        self._due = 0.0
        self._sheet = _Sheet(job.preview, job.config.num_frames)
        if job.preview and self.num_frames:
            for group in frames.numbered(reading.read_frames(directory.partial_path)):
                self._sheet.add(group)

    @property
    def num_frames(self) -> int:
        """Frames written so far."""
        return self.writer.mark.frames

    @property
    def state(self) -> dict[str, Tensor]:
        """The state that was saved with the last group when the run was stopped; empty where there was none."""
        return {} if self._state is None else self._state.torch()

    def append(self, finished: Finished) -> None:
        """Write the next group, beside what comes next where another thread may do that.

        The state after it is saved when that is due: so much is lost at most by a crash. It is taken now, before the
        stage goes on. What goes wrong with a group is raised at the latest by the next one, or by `check_whole`.
        """
        self._settle()
        group, tensors, began = finished.group, None, time.monotonic()
        if group.start != self.num_frames:
            raise ValueError(f"frames {group.start}.. cannot follow {self.num_frames} frames")
        if not finished.more and (finished.state is None or began >= self._due):
            tensors = {} if finished.state is None else _taken(finished.state)
        write = partial(self._write, group, tensors, time.monotonic() - began)
        if self._beside is None:
            with self.networks.pixels():
                write()
        else:
            self._writing = self._beside.do(write)
        look_at(group, "frames", self.directory, self.report)

    def _write(self, group: Group, tensors: dict[str, Tensor] | None, taken: float) -> None:
        """Write a group, and then the state after it, which took so many seconds to take."""
        mark = self.writer.append(group.frames)
        if tensors is not None:
            began = time.monotonic()
            self.directory.save_state("output", tensors, {"mark": asdict(mark)})
            now = time.monotonic()
            self._due = now + (now - began + taken) / SAVING
        self._sheet.add(group)

    def _settle(self) -> None:
        """Wait until what was given is on the disk. Raises what went wrong with it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with self.networks.pixels():
                writing.result()

    def check_whole(self) -> None:
        """Raise VideoError unless every frame was written, and what went wrong with the last ones."""
        self._settle()
        wanted = self.known.job.config.num_frames
        if self.num_frames != wanted:
            raise VideoError(f"the video ended early, after {self.num_frames} of {wanted} frames")

    def finish(self) -> None:
        """Give the output its name."""
        job, directory = self.known.job, self.directory
        directory.require_room(self.writer.mark.size)
        changes = [{**change, "changed": sorted(change["changed"])} for change in directory.changes]
        recipe = {"streamt2v": __version__, **directory.recipe, **({"changes": changes} if changes else {})}
        with self.networks.pixels():
            extras = self.known.carried().extras
            if job.output.suffix.lower() == ".mp4":
                self.writer.finish(job.output, json.dumps(recipe), extras)
            else:
                exports.write(self.writer, job.output, json.dumps(recipe), extras)


def _taken(state: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    taken = dict[str, Tensor]()
    for name, tensor in state().items():
        taken[name] = tensor.cpu()
    return taken


class _Sheet:
    """A contact sheet of frames evenly spaced over the video, renewed while it grows."""

    def __init__(self, path: Path | None, num_frames: int) -> None:
        self.path, self.num_frames = path, num_frames
        self.shown: list[Frames] = []

    def add(self, group: Group) -> None:
        """Take what is wanted of a group, and rewrite the sheet when something was."""
        if self.path is None:
            return
        for chosen in preview.pick([group.frames], self.num_frames, preview.SHEET_FRAMES, group.start):
            self.shown.extend(preview.shrink(chosen))
            pictures.write_image(self.path, frames.contact_sheet(np.stack(self.shown)))
