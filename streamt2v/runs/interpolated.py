"""Frames between frames: the last stage, two frames at a time, so that memory does not grow with the video."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from streamt2v import weights
from streamt2v.families.networks import Networks
from streamt2v.jobs.prepared import Prepared
from streamt2v.media import frames
from streamt2v.media.frames import Frames, Group
from streamt2v.runs.output import Finished
from streamt2v.runs.watch import INTERPOLATE, Watch

LEFT, FIRST = KEPT = ("interpolate.left", "interpolate.first")
"""In the output's state: the last frame that was made, and of a loop the first one, uint8 [1, H, W, 3]."""
AT_ONCE = 32  # frames handed on, which are encoded together
CUT, ALIKE, CELLS = 0.1, 0.8, 16
"""Two frames are two scenes where their CELLS x CELLS mean colours differ by more than CUT of the range on average, and
the correlation of their brightness is below ALIKE. In twelve real clips and three of the demo, frames of one scene that
are three apart differ by at most 0.083; clips that have nothing in common by 0.16 or more."""

Between = Callable[[Frames, Frames, float], Frames]
"""(first, second, time) -> the frame at a time from 0 to 1 between two, uint8 [1, H, W, 3]."""


def groups(
    known: Prepared, made: Iterator[Finished], networks: Networks, report: Watch, kept: Mapping[str, Tensor]
) -> Iterator[Finished]:
    """Put frames between the ones that are made; those are kept as they are.

    A cut stays one: until it, the last frame before it is shown. After the last frame of a loop come those that lead to
    its first; else, if the video is longer than what was made of it, it is shown as long as it was in its source.

    Args:
        known: the job.
        made: groups of output-sized frames, numbered as they were made.
        networks: loads and places the network.
        report: is told where no other stage tells of these frames.
        kept: what an earlier run left of the output's state under the names `KEPT`.
    """
    factor, total = known.job.config.output.interpolate, known.job.config.num_frames
    helper = weights.interpolator(known.job.config.output.interpolator)
    before, home = (kept[name].numpy() if name in kept else None for name in KEPT)
    is_loop, between = known.job.config.loop != "no", None
    alone = report.pace.works[INTERPOLATE].chunks > 0
    for finished in made:
        if between is None:
            between = _between(networks, helper)
            if alone:
                report.start(INTERPOLATE, known.made, finished.group.start)
        group, waiting, start = finished.group, list[Frames](), 0
        for number, frame in enumerate(frames.singly([group.frames]), group.start):
            start = start if waiting else max(0, factor * (number - 1) + 1)
            waiting += [] if before is None else _led(before, frame, factor, between)
            waiting.append(frame)
            home = frame if is_loop and home is None else home
            if number + 1 == known.made:
                waiting += (
                    [frame] * (total - factor * number - 1) if home is None else _led(frame, home, factor, between)
                )
            before, last = frame, number + 1 == group.stop
            if last or len(waiting) >= AT_ONCE:
                shown = np.concatenate(waiting)[: total - start]
                yield Finished(Group(start, shown), _state(finished, frame, home), more=not last)
                waiting = []
                if alone:
                    report.advance(INTERPOLATE, number + 1, number + 1, known.made)


def _led(first: Frames, second: Frames, factor: int, between: Between) -> list[Frames]:
    """Return the frames between two; across a cut the first one stays on."""
    if is_cut(first, second):
        return [first] * (factor - 1)
    return [between(first, second, step / factor) for step in range(1, factor)]


def _state(finished: Finished, left: Frames, home: Frames | None) -> Callable[[], dict[str, Tensor]]:
    def state() -> dict[str, Tensor]:
        made = finished.state() if finished.state else {}
        found = {LEFT: left, FIRST: home}
        return made | {name: torch.from_numpy(frame) for name, frame in found.items() if frame is not None}

    return state


def _between(networks: Networks, helper: weights.Family) -> Between:
    role, device = "interpolate.flow", networks.device.name

    def load() -> torch.nn.Module:
        network: torch.nn.Module = weights.load(helper, role, device, torch.float32)  # 16 bit are too few for places
        return network

    network = networks.keep(helper.path(role), role, role, load)

    @torch.inference_mode()
    def between(first: Frames, second: Frames, time: float) -> Frames:
        with networks.pixels():
            pair = [(frames.to_float(frame, device) + 1) / 2 for frame in (first, second)]
            return frames.to_u8(network(*pair, time) * 2 - 1)

    return between


def is_cut(first: Frames, second: Frames) -> bool:
    """Tell whether two frames [1, H, W, 3] belong to two scenes."""
    pair = frames.to_float(np.concatenate([first, second])) / 2
    cells = adaptive_avg_pool2d(pair, CELLS)  # [2, 3, CELLS, CELLS]
    if float((cells[0] - cells[1]).abs().mean()) <= CUT:
        return False
    likeness = torch.corrcoef(cells.mean(dim=1).flatten(1))[0, 1]
    return not float(likeness) > ALIKE  # NaN where a frame has one colour
