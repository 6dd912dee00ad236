"""A family is three callables: it makes first frames, it continues frames, it refines frames.

A new family is a file beside this one with a function `build`, and a row of the table below. What it may load and how
it is placed is decided by the `Networks` it is given; order, storage and resuming are not its business.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

from torch import Tensor

from streamt2v.chunks import Around, Chunk
from streamt2v.families.choose import I2VGEN, MODELSCOPE, Chosen
from streamt2v.families.networks import Networks
from streamt2v.stages.stream import StreamState

First = Callable[[str, Tensor | None], Tensor]
"""(prompt, picture [3, h, w] in [-1, 1] or None) -> the first chunk, frames [F, 3, H, W] in [-1, 1]."""

Extend = Callable[[StreamState, str, Chunk], Tensor]
"""(what is known, prompt, chunk) -> the frames [n, 3, H, W] in [-1, 1] that the whole chunk adds."""


@dataclass(frozen=True)
class Enlarged:
    """What a refiner is given: frames that are scaled to their final size already, and what they show.

    Args:
        frames: called once, with the first frame that is wanted: yields [1, 3, H, W] in [-1, 1], frame after frame.
        size: their (H, W).
        scale: how many times they were enlarged, at least 1.
        plan: chunks of the whole video.
        around: how the plan goes round, if the video is a loop.
        prompt_of: what a chunk shows.
        state: as it was handed out with the last group that is finished; empty at the beginning.
    """

    frames: Callable[[int], Iterator[Tensor]]
    size: tuple[int, int]
    scale: float
    plan: Sequence[Chunk]
    around: Around | None
    prompt_of: Callable[[Chunk], str]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Refined:
    """A group of refined frames: [1, 3, H, W] in [-1, 1] each, from frame `start` on, and the state after them.

    Frames are decoded as they are asked for: decoded floats of a whole group would be the largest thing in memory.
    """

    start: int
    frames: Iterator[Tensor]
    state: Callable[[], dict[str, Tensor]]


Refine = Callable[[Enlarged], Iterator[Refined]]

Remember = Callable[[Tensor], dict[str, Tensor]]
"""(new frames) -> what else the next chunk needs; asked after every chunk, and stored with them."""


@dataclass(frozen=True)
class Makers:
    """What makes the frames of a run."""

    first: First
    extend: Extend
    refine: Refine
    remember: Remember = lambda shown: {}


BUILDERS = {name: f"streamt2v.families.{name}" for name in ("streamingt2v", "streamingsvd", "bases", "helios")}
"""By the `builder` of a family in weights.toml: the module whose `build` turns its networks into callables."""


def build(networks: Networks, initializer: Chosen | None, refiner: Chosen | None = None) -> Makers:
    """Return what makes the frames of a run; third-party models make the first ones or refine where they are given."""
    makers: Makers = import_module(BUILDERS[networks.family.builder]).build(networks)
    if initializer is not None:
        place = "modelscope" if initializer.kind == MODELSCOPE else "diffusers_pipelines"
        makers = replace(makers, first=import_module(f"streamt2v.families.{place}").first(networks, initializer))
    if refiner is not None:
        place = "i2vgen" if refiner.kind == I2VGEN else "bases"
        makers = replace(makers, refine=import_module(f"streamt2v.families.{place}").refiner(networks, refiner))
    return makers
