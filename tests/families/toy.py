"""A family without any network: frames of one grey level each. All that a new family needs is in this file."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from streamt2v.chunks import Chunk
from streamt2v.families.makers import Enlarged, Makers, Refined
from streamt2v.families.networks import Networks
from streamt2v.stages.stream import StreamState

PRESET = """
[stream]
height = 16
width = 32
cam = false
apm = false
[refine]
chunk = 8
overlap = 4
[output]
height = 32
width = 64
"""

ROW = """
[families.toy]
title = "grey levels, for a test"
licence = "none"
preset = "toy"
vocabulary = ""
builder = "toy"
components = {}
"""

GROUP = 8


def level(prompt: str, frame: int) -> float:
    """The grey level in [-1, 1] of a frame: it rises with time, from where the prompt begins."""
    return (len(prompt) + 4 * frame) % 200 / 100 - 1


def build(networks: Networks) -> Makers:
    """Return the three callables."""
    height, width = networks.run.stream.size

    def frames(prompt: str, start: int, stop: int) -> Tensor:
        levels = torch.tensor([level(prompt, frame) for frame in range(start, stop)])
        return levels.view(-1, 1, 1, 1).expand(-1, 3, height, width)

    def extend(state: StreamState, prompt: str, chunk: Chunk) -> Tensor:
        return frames(prompt, chunk.new_start, chunk.start + networks.run.stream.chunk)

    return Makers(lambda prompt, picture: frames(prompt, 0, networks.run.stream.chunk), extend, refine)


def refine(given: Enlarged) -> Iterator[Refined]:
    """Invert the frames: the state is how many are done."""
    done = int(given.state["done"]) if given.state else 0
    source = given.frames(done)
    while group := list(islice(source, GROUP)):
        start, done = done, done + len(group)
        yield Refined(start, (-frame for frame in group), lambda done=done: {"done": torch.tensor(done)})  # type: ignore[misc]
