"""Streams that the networks in training make themselves, and what should have followed in each of their chunks.

True known frames, however disturbed, do not show where a stream gets by its own mistakes: a light that stopped at the
edge, a colour that wandered. Here the known frames are a stream's own, sampled as a user's are; what should follow is
looked up in the scene the stream began with, from the moment that looks most like its last frame.

Source: arXiv 1011.0686 (DAgger: learn where one's own steps lead).
"""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from streamt2v.chunks import streaming_plan
from streamt2v.stages.stream import StreamModels, StreamState
from streamt2v.training.batches import Batch, join
from streamt2v.training.denoisers import Lesson
from streamt2v.training.sheets import OVERLAP, demo_streamer
from streamt2v.training.world.captions import UNSPECIFIED, compose, parse
from streamt2v.training.world.clips import CLIP_FRAMES, COND_FRAMES, LATEST, decode, encode, fading
from streamt2v.training.world.drawing import render
from streamt2v.training.world.scenes import Scenes, sample_scenes, subject_mask

SHORTEST, LONGEST = 3, 20  # chunks of a stream
NEAR = 28  # frames around the expected moment in which the likest one is sought: a round of a light takes up to 60
BEFORE = 3  # frames back to the second one that is compared


def likest(scene: Scenes, known: Tensor, expected: int) -> int:
    """Return the frame of one scene, of those near the expected one, that looks most like the last of known frames.

    Only places where the light might be in one of them are compared, as clouds move too; without their mean colour, as
    streams are tinted; and coarsely, as the light may be a little off its path. The frame `BEFORE` tells up from down.

    Args:
        scene: one scene.
        known: frames [Fc, 3, H, W] in [-1, 1].
        expected: where the last of them should be in the scene.
    """
    size = known.shape[2:]
    moments = torch.arange(expected - NEAR - BEFORE, expected + NEAR + 1, device=known.device)[None]
    where, frames = subject_mask(scene, moments, *size)[0].amax(0), render(scene, moments, *size)[0]

    def errors(picture: Tensor) -> Tensor:
        wrong = frames - picture
        tint = (where * wrong).sum((2, 3), keepdim=True) / where.sum()
        return functional.avg_pool2d(where * (wrong - tint), 17, stride=8).square().mean((1, 2, 3))

    last, before = errors(known[-1]), errors(known[-1 - BEFORE])
    return int(moments[0, BEFORE + (last[BEFORE:] + 0.25 * before[:-BEFORE]).argmin()])


def what_follows(vae: torch.nn.Module, scene: Scenes, known: Tensor, moment: int) -> tuple[Tensor, Tensor]:
    """Return latents [1, C, F, h, w] of a chunk that goes on truly from its known frames, and its mask [1, F, h, w].

    What is wrong with the last known frame fades from the target, but for the light: its place may be wrong.

    Args:
        vae: the encoder.
        scene: one scene.
        known: the stream's last frames [COND_FRAMES, 3, H, W] in [-1, 1].
        moment: the frame of the scene that the last of them shows.
    """
    ahead = torch.arange(CLIP_FRAMES - COND_FRAMES + 1, device=known.device)  # from the last known frame on
    seen, true = encode(vae, known[None]), encode(vae, render(scene, moment + ahead[None], *known.shape[2:]))
    frames = torch.arange(CLIP_FRAMES, device=known.device) - (COND_FRAMES - 1) + moment
    mask = subject_mask(scene, frames, *seen.shape[3:])
    wrong = (seen[:, :, -1:] - true[:, :, :1]) * (1 - mask[:, None, COND_FRAMES - 1 : COND_FRAMES])
    share = fading(COND_FRAMES, CLIP_FRAMES)[COND_FRAMES:, None, None].to(true)
    following = true[:, :, 1:] + share * wrong * (1 - mask[:, None, COND_FRAMES:])
    return torch.cat([seen, following], 2), mask


class OwnStreams:
    """Several streams that go on by turns; one that ended gives way to another scene's.

    Args:
        models: the networks in training, as they are at every chunk.
        lesson: text encoder and source of randomness.
        count: streams.
    """

    def __init__(self, models: StreamModels, lesson: Lesson, count: int = 4) -> None:
        self.models, self.lesson = models, lesson
        self.streams = [self._endless() for _ in range(count)]

    def make(self) -> Batch:
        """Let every stream make one chunk: a batch of what it went on from, what should follow, and what it made."""
        return reduce(join, map(next, self.streams))

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self._stream(self._drawn(SHORTEST, LONGEST + 1))

    def _drawn(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.lesson.generator))

    def _stream(self, chunks: int) -> Iterator[Batch]:
        vae, generator, device = self.lesson.vae, self.lesson.generator, self.lesson.vae.device
        scene, start = sample_scenes(1, generator).to(device), self._drawn(0, LATEST)
        caption = moving(scene.labels()[0].tolist(), generator)
        begin = render(scene, start + torch.arange(CLIP_FRAMES, device=device)[None])
        first = decode(vae, encode(vae, begin))[0]
        state, moment = StreamState.after_first_chunk(first, OVERLAP), start + CLIP_FRAMES - 1
        seed = self._drawn(0, 2**31)
        for chunk in streaming_plan(CLIP_FRAMES + OVERLAP * chunks, CLIP_FRAMES, OVERLAP)[1:]:
            known = state.conditioning_frames
            moment = likest(scene, known, moment)
            latents, mask = what_follows(vae, scene, known, moment)
            streamer = demo_streamer(self.models, self.lesson.text, caption, first[0], seed)  # weights have changed
            own = streamer.chunk_latents(chunk, known).clone()  # an ordinary tensor, which may have gradients
            yield Batch(latents, [caption], mask, shown=known[None], anchors=first[:1], own=own)
            new = decode(vae, own[:, :, COND_FRAMES:])[0]
            state, moment = state.after(chunk, new)[1], moment + len(new)


def moving(labels: list[int], generator: torch.Generator) -> str:
    """Return a caption that names the motion."""
    while parse(caption := compose(labels, generator))[2] == UNSPECIFIED:
        pass
    return caption


def plain_or_own(batch: Batch, generator: torch.Generator) -> Batch:
    """Forget in half of all cases what the networks made of a batch: it is learned from pure noise, too."""
    return batch if torch.rand((), generator=generator) < 0.5 else replace(batch, own=None)
