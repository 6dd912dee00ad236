"""The base video: what is stored of it first, then what the family makes; every chunk is stored before it is used."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamt2v import devices
from streamt2v.chunks import Chunk
from streamt2v.errors import NumericsError
from streamt2v.families.makers import Makers
from streamt2v.families.networks import Networks
from streamt2v.jobs.prepared import Prepared
from streamt2v.jobs.run_directory import RunDirectory
from streamt2v.media import frames, isolated, pictures
from streamt2v.media.frames import Group
from streamt2v.runs.beside import Beside
from streamt2v.runs.watch import STREAM, Watch, look_at
from streamt2v.stages.stream import StreamState
from streamt2v.timeline import home_frames


class Base:
    """Groups of base frames from any one on, as often as asked; made once."""

    def __init__(
        self,
        known: Prepared,
        making: Makers,
        directory: RunDirectory,
        networks: Networks,
        report: Watch,
        beside: Beside | None = None,
    ) -> None:
        self.known, self.making, self.directory, self.networks = known, making, directory, networks
        self.report, self.device, self.beside = report, networks.device.name, beside
        # Before any frame is read: the store drops what no state accounts for.
        self.stored = directory.resume_point("stream")
        report.stored(directory.num_base_frames)

    def groups(self, start: int) -> Iterator[Group]:
        """Yield the base video from frame `start` on; of a video that is only refined, its own frames."""
        if self.known.job.command == "refine":
            yield from self.source(start)
            return
        stored = self.directory.num_base_frames
        yield from frames.numbered(self.directory.base_frames(start), start)
        if stored < self.known.num_frames:
            yield from frames.since(self._made(), max(start, stored))

    def ahead(self, start: int) -> Iterator[Group]:
        """Yield `groups`, some of which are made before they are asked for if another thread may do that."""
        made = self.groups(start)
        return made if self.beside is None else self.beside.ahead(made, self.report.waited)

    def source(self, start: int) -> Iterator[Group]:
        """Yield the frames of the source from one on, at their times; what is damaged is bridged, and said."""
        assert self.known.job.source is not None
        said = partial(self.report.note, warning=True)
        return frames.since(frames.numbered(isolated.read_frames(self.known.job.source, note=said)), start)

    def finish(self) -> None:
        """Make all base frames and drop the networks that made them."""
        self.complete()
        self.networks.release()

    def complete(self) -> None:
        """Make all base frames."""
        if self.known.job.command != "refine":
            for _ in self.groups(self.directory.num_base_frames):
                pass

    def around(self, start: int) -> Iterator[Group]:
        """Yield the frames of a loop from one on, without end; `groups` of the whole video, again and again."""
        self.complete()
        while True:
            yield from self.groups(start)
            start = 0

    def _made(self) -> Iterator[Group]:
        """Continue the base video from the stored state, or begin it; store every chunk before passing it on."""
        self.report.start(STREAM, self.known.num_frames, self.directory.num_base_frames)
        if self.stored is None:
            first = self._first_chunk()
            if not frames.is_finite(first):  # also in frames that only the next chunk looks at
                raise NumericsError("the first chunk holds NaN or Inf")
            stream, plan = self.known.job.config.stream, self.known.stream_plan
            stop = plan[0].stop if len(plan) > 1 else None
            state = StreamState.after_first_chunk(first, stream.overlap, stream.anchor, stop)
            state = replace(state, memory=self.making.remember(first))
            yield self._store(0, first[: plan[0].stop], state)
        else:
            tensors = {name: tensor.to(self.device) for name, tensor in self.stored.torch().items()}
            known, anchor = tensors.pop("conditioning_frames"), tensors.pop("anchor")
            state = StreamState(self.stored.meta["next_chunk"], known, anchor, memory=tensors)
        for chunk in self.known.stream_plan[state.next_chunk :]:
            new, state = self._next_chunk(state, chunk)
            yield self._store(chunk.index, new, state)

    @torch.inference_mode()
    def _next_chunk(self, state: StreamState, chunk: Chunk) -> tuple[Tensor, StreamState]:
        state = replace(state, ahead=dict(self._ahead(chunk)))
        new, after = state.after(chunk, self.making.extend(state, self.known.prompt_of(chunk), chunk))
        return new, replace(after, memory=self.making.remember(new))

    def _ahead(self, chunk: Chunk) -> Iterator[tuple[int, Tensor]]:
        """Yield what is known of a chunk's frames: pictures, and after the last frame of a loop its first ones."""
        run, end = self.known.job.config, self.known.num_frames
        home = home_frames(run) if run.loop != "no" and chunk.stop == end else 0
        reach = max(chunk.start + run.stream.chunk, chunk.stop + home)
        for asked, path in run.made_pictures.items():
            if chunk.new_start <= (number := asked - self.known.base_offset) < reach:
                picture = frames.to_float(pictures.read(Path(path))[None], self.device)
                yield number, frames.fill(picture, run.stream.size)[0]
        coming = range(end, min(reach, end + home))
        if coming:
            begin = self.source(0) if self.known.kept else frames.numbered(self.directory.base_frames(0), 0)
            shown = islice(frames.singly(group.frames for group in begin), len(coming))
            for number, frame in zip(coming, shown, strict=True):
                yield number, frames.fill(frames.to_float(frame, self.device), run.stream.size)[0]

    def _store(self, index: int, new: Tensor, state: StreamState) -> Group:
        """Store the new frames of one chunk and the state after it; return the frames."""
        group = Group(self.directory.num_base_frames, frames.to_u8(new))
        tensors = {"conditioning_frames": state.conditioning_frames, "anchor": state.anchor, **state.memory}
        with self.directory.joined:
            self.directory.append_base(index, group.frames)
            self.directory.save_state("stream", tensors, {"next_chunk": state.next_chunk})
        look_at(group, "base frames", self.directory, self.report)
        self.report.advance(STREAM, group.stop, index + 1, len(self.known.stream_plan))
        return group

    def _first_chunk(self) -> Tensor:
        """Return the first chunk [F, 3, H, W]: the end of a continued video, or what the initializer makes."""
        job, chosen = self.known.job, self.known.chosen
        if job.source is not None:
            shown = np.concatenate([group.frames for group in self.source(self.known.base_offset)])
            first = frames.to_float(shown, self.device)
        else:
            if chosen is not None:
                self.report.note(f"the first frames come from {chosen.name}")
            read = pictures.read(Path(job.config.image)) if job.config.image else None
            picture = None if read is None else frames.to_float(read[None])[0]
            first = self.making.first(job.config.prompt, picture).to(self.device)
            if chosen is not None:
                devices.release_memory(self.networks.device)
        return frames.fill(first, self.known.job.config.stream.size)
