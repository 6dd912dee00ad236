"""From base frames to output frames: sizes on the way, and the refiner where it is on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
from torch import Tensor

from streamt2v.chunks import Chunk, covering
from streamt2v.families.makers import Enlarged, Refine
from streamt2v.families.networks import Networks
from streamt2v.jobs.prepared import Prepared
from streamt2v.media import frames, shape
from streamt2v.media.frames import Frames, Group
from streamt2v.runs.base import Base
from streamt2v.runs.output import Finished
from streamt2v.runs.watch import REFINE, Watch


@dataclass(frozen=True)
class Geometry:
    """Sizes from base frames to output frames: the visible content, and where it lies in the output."""

    base: tuple[int, int]
    fit: shape.Fit

    @property
    def content(self) -> tuple[int, int]:
        """(H, W) of the part of the picture that will be seen."""
        return min(self.fit.content_height, self.fit.height), min(self.fit.content_width, self.fit.width)

    @property
    def scale(self) -> float:
        """How many times base frames are enlarged, at least 1."""
        return max(1.0, self.fit.content_height / self.base[0])

    def enlarged(self, images: Tensor) -> Tensor:
        """Scale and crop base frames [F, 3, h, w] to the content [F, 3, H, W]."""
        fit, (height, width) = self.fit, self.content
        whole = replace(fit, height=height, width=width, top=min(0, fit.top), left=min(0, fit.left))
        return frames.apply_fit(images, whole)

    def output(self, content: Tensor) -> Frames:
        """Turn content [F, 3, H, W] into output frames; `pad` adds its bars here, so that no network sees them."""
        fit = self.fit
        bars = shape.Fit(fit.height, fit.width, *self.content, max(0, fit.top), max(0, fit.left))
        return frames.to_u8(frames.apply_fit(content, bars))


def kept(geometry: Geometry, base: Base, done: int) -> Iterator[Finished]:
    """Yield the frames of a continued video from `done` on, cropped to the base shape and scaled to the output."""
    if done >= base.known.kept:
        return
    for start, group in base.source(done):
        yield Finished(Group(start, geometry.output(frames.fill(frames.to_float(group), geometry.content))))


def unrefined(geometry: Geometry, base: Base, done: int) -> Iterator[Finished]:
    """Yield base frames, scaled to the output, from frame `done` of the output on."""
    offset = base.known.base_offset
    for start, group in base.groups(done - offset):
        yield Finished(Group(offset + start, geometry.output(geometry.enlarged(frames.to_float(group)))))


def groups(
    known: Prepared,
    geometry: Geometry,
    base: Base,
    refine: Refine,
    networks: Networks,
    report: Watch,
    done: int,
    state: dict[str, Tensor],
) -> Iterator[Finished]:
    """Yield refined frames from number `done` on, with the refiner's state after them; `state` is that before them.

    Frames of a continued video that it refines once more, as neighbours of new ones, the output has already.
    """
    offset, around = known.base_offset, known.around
    lead = 0 if around is None else around.lead

    def enlarged(start: int) -> Iterator[Tensor]:
        if not networks.policy.keep_networks:
            base.finish()
        source = base.ahead(start) if around is None else base.around(around.frame(start))
        first = list(islice(source, 1))  # the base video says first that it begins
        report.start(REFINE, known.num_frames, max(0, done - offset))
        for frame in frames.singly(group.frames for group in chain(first, source)):
            yield geometry.enlarged(frames.to_float(frame, networks.device.name))

    def prompt_of(chunk: Chunk) -> str:
        return known.prompt_of(chunk if around is None else replace(chunk, new_start=around.frame(chunk.new_start)))

    asked = Enlarged(enlarged, geometry.content, geometry.scale, known.refine_plan, around, prompt_of, state)
    for made in refine(asked):
        shown = np.concatenate([_output(geometry, frame, networks) for frame in made.frames])
        group = Group(offset + made.start - lead, shown).since(done)
        group = Group(group.start, group.frames[: max(0, known.made - group.start)])
        if len(group.frames):
            yield Finished(group, made.state)
        finished = group.stop - offset
        chunk = max(covering(known.refine_plan, lead + finished - 1))
        report.advance(REFINE, max(0, finished), chunk + 1, len(known.refine_plan))
        if finished >= known.num_frames:
            return


def _output(geometry: Geometry, frame: Tensor, networks: Networks) -> Frames:
    with networks.pixels():
        return geometry.output(frame)
