"""Chunk plans: which frames each chunk of a stage covers. Integers only; no other file adds frame numbers.

A plan is a tuple of records. Every frame of the video belongs to at least one chunk and is produced exactly once:
the last chunk shifts back (overlapping more) or is shorter, instead of frames being cut off or invented.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from streamt2v.errors import ConfigError


@dataclass(frozen=True)
class Chunk:
    """Frames [start, stop) handled at once; [new_start, stop) are those that no earlier chunk covers."""

    index: int
    start: int
    stop: int
    new_start: int

    @property
    def size(self) -> int:
        """Frames handled at once."""
        return self.stop - self.start

    @property
    def num_new(self) -> int:
        """Frames this chunk adds to the video."""
        return self.stop - self.new_start


def check_chunking(size: int, overlap: int, what: str) -> None:
    """Raise ConfigError unless 0 <= overlap < size and size >= 1."""
    if size < 1:
        raise ConfigError(f"{what}: chunk is {size}, it must be at least 1 frame")
    if not 0 <= overlap < size:
        raise ConfigError(f"{what}: overlap is {overlap}, it must lie in 0..{size - 1} for chunks of {size} frames")


def _first(num_frames: int, size: int, overlap: int, what: str) -> Chunk:
    if num_frames < 1:
        raise ConfigError(f"frames is {num_frames}, a video needs at least 1 frame")
    check_chunking(size, overlap, what)
    return Chunk(0, 0, min(size, num_frames), 0)


def streaming_plan(
    num_frames: int, size: int, overlap: int, ends: Sequence[int] = (), whole_first: bool = False, lead: int = 1
) -> tuple[Chunk, ...]:
    """Plan the streaming stage: chunk 0 is the initializer's, later ones repeat `overlap` frames and add the rest.

    Chunks are generated whole even when the video ends inside one: the last record's `stop` is cut to the video's
    end, so `num_new` says how many of its new frames are kept. The more new frames lie between what was shown and what
    is held, the better they meet: a chunk that ends with held frames may add `lead` times as many as others, and the
    one in front of it is cut for it.

    Args:
        num_frames: frames of the video, >= 1.
        size: frames denoised at once (F = 16 in the paper).
        overlap: conditioning frames (8 in the paper).
        ends: where runs of frames that are held in place end, above `size` where the first chunk is `whole_first`,
            else at least `size`; the last may lie behind the video, and a chunk then reaches so far.
        whole_first: never cut the first chunk, which exists already.
        lead: >= 1.

    Raises:
        ConfigError: sizes out of range.
    """
    chunks, step = [_first(num_frames, size, overlap, "streaming")], size - overlap
    first, most = next(iter(sorted(ends)), None), lead * step
    if first is not None and not whole_first and step < first < size + most:
        chunks[0] = Chunk(0, 0, min(max(first - most, overlap, 1), num_frames), 0)
    while chunks[-1].stop < num_frames:
        new_start = chunks[-1].stop
        stop = new_start + step
        shown = max((end for end in ends if new_start < end <= stop), default=new_start)
        if shown == new_start:
            stop = next((end for end in sorted(ends) if stop < end <= new_start + most), stop)
            shown = stop if stop in ends else shown
        cut = next((end - most for end in sorted(ends) if stop < end < stop + most), stop)
        stop = cut if cut > shown else stop  # what is held stays in the chunk that leads to it
        chunks.append(Chunk(len(chunks), new_start - overlap, min(stop, num_frames), new_start))
    return tuple(chunks)


def refinement_plan(num_frames: int, size: int, overlap: int, shift_back: bool = True) -> tuple[Chunk, ...]:
    """Plan the refinement stage: chunks of `size` frames, the last one shifted back to end with the video, or shorter.

    A video shorter than a chunk is one chunk of its own length.

    Raises:
        ConfigError: sizes out of range.
    """
    chunks = [_first(num_frames, size, overlap, "refinement")]
    while chunks[-1].stop < num_frames:
        previous = chunks[-1]
        start = min(previous.stop - overlap, num_frames - size if shift_back else num_frames)
        chunks.append(Chunk(len(chunks), start, min(start + size, num_frames), previous.stop))
    return tuple(chunks)


@dataclass(frozen=True)
class Around:
    """How a plan counts that goes round a loop of `frames` frames in `chunks` chunks.

    It begins `lead` frames and `first` chunks before frame 0 of the loop, and goes on after its end.
    """

    frames: int
    lead: int
    chunks: int
    first: int

    def frame(self, number: int) -> int:
        """The frame of the loop that frame `number` of the plan is."""
        return (number - self.lead) % self.frames

    def chunk(self, index: int) -> int:
        """The chunk of the loop that chunk `index` of the plan is."""
        return (index - self.first) % self.chunks


def loop_plan(num_frames: int, size: int, overlap: int, reach: int) -> tuple[tuple[Chunk, ...], Around]:
    """Plan the refinement of a loop: chunks along the endless video, of which one round is kept.

    The chunks of one round begin at frames 0, S, 2S, ... with S = size - overlap; the last stride may be shorter. As
    every round is the same, frames that have `reach` frames on either side come out the same in every round.

    Raises:
        ConfigError: sizes out of range.
    """
    _first(num_frames, size, overlap, "refinement")
    starts = range(0, num_frames, size - overlap)
    first = 0
    while _start(-first, starts, num_frames) > -reach:
        first += 1
    lead, chunks = -_start(-first, starts, num_frames), list[Chunk]()
    while not chunks or chunks[-1].stop < lead + num_frames + reach:
        start = lead + _start(len(chunks) - first, starts, num_frames)
        chunks.append(Chunk(len(chunks), start, start + size, chunks[-1].stop if chunks else 0))
    return tuple(chunks), Around(num_frames, lead, len(starts), first)


def _start(index: int, starts: range, num_frames: int) -> int:
    """Where chunk `index` of an endless loop begins, from chunk 0 at frame 0 on in both directions."""
    rounds, place = divmod(index, len(starts))
    return rounds * num_frames + starts[place]


def middles(plan: Sequence[Chunk]) -> tuple[range, ...]:
    """Return the frames that each chunk keeps where chunks that overlap share them in halves: every frame once."""
    cuts = [0, *((left.stop + right.start + 1) // 2 for left, right in pairwise(plan)), plan[-1].stop]
    return tuple(map(range, cuts, cuts[1:]))


def length(num_chunks: int, size: int, overlap: int) -> int:
    """Return the number of frames that so many chunks cover."""
    return size + (num_chunks - 1) * (size - overlap)


def count(num_frames: int, size: int, overlap: int) -> int:
    """Return how many chunks cover so many frames, without their plan."""
    return 1 + max(0, -(-(num_frames - size) // (size - overlap)))


def amount(plan: Sequence[Chunk]) -> float:
    """Return how many chunks of the first one's size the chunks of a plan make up: the last one may be shorter."""
    return sum(chunk.size for chunk in plan) / plan[0].size if plan else 0.0


def packed(num_frames: int, per_latent: int) -> int:
    """Return how many latents hold so many frames: the first one holds one, each other `per_latent`."""
    return 1 + max(0, -(-(num_frames - 1) // per_latent))


def unpacked(num_latents: int, per_latent: int) -> int:
    """Return how many frames so many latents hold: the number of the first frame after them."""
    return max(0, 1 + (num_latents - 1) * per_latent)


def packed_window(first: int, stop: int, per_latent: int) -> range:
    """Return the frames from which a causal codec makes latents [first, stop) of a video, on their own.

    The first of them is then made from one frame, the last one that it holds in the video.
    """
    return range(first * per_latent, (stop - 1) * per_latent + 1)


def packed_start(chunk: Chunk, per_latent: int) -> int:
    """Return the number of the first latent of a streaming chunk whose sizes are whole numbers of latents."""
    return chunk.start // per_latent


def covering(plan: Sequence[Chunk], frame: int) -> tuple[int, ...]:
    """Return the indices of the chunks that cover `frame`, in order. Starts and stops both grow along a plan."""
    first = bisect_right(plan, frame, key=lambda chunk: chunk.stop)
    after = bisect_right(plan, frame, key=lambda chunk: chunk.start)
    return tuple(range(first, after))


def base_offset(kept: int, size: int) -> int:
    """Return the frame at which the base video begins if `kept` frames are continued: their last `size` start it."""
    return max(0, kept - size)


def made(num_frames: int, factor: int, closed: bool = False) -> int:
    """Return how many frames have to be made for so many, of which every `factor`-th is made.

    The last one is the video's last or comes after it; of a `closed` loop the first one follows the last.
    """
    return -(-num_frames // factor) if closed else -(-(num_frames - 1) // factor) + 1


def interpolated(plan: Sequence[Chunk], factor: int, by: int = 0) -> tuple[Chunk, ...]:
    """Return a plan in frames of the output, which begins `by` made frames before it: frame n is its `factor` n-th."""
    shown = [(chunk.index, chunk.start + by, chunk.stop - 1 + by, chunk.new_start + by) for chunk in plan]
    return tuple(Chunk(index, factor * start, factor * last + 1, factor * new) for index, start, last, new in shown)


def seams(plan: Sequence[Chunk]) -> tuple[int, ...]:
    """Return the frames at which a later chunk's new frames begin: where a seam would show."""
    return tuple(chunk.new_start for chunk in plan[1:])


def evenly(num_frames: int, count: int) -> tuple[int, ...]:
    """Return up to `count` frames evenly spaced over a video, the first and the last among them."""
    count = min(count, num_frames)
    return tuple(index * (num_frames - 1) // max(1, count - 1) for index in range(count))


def snap(asked: Sequence[int], starts: Sequence[int]) -> tuple[int, ...]:
    """Return where changes take effect: each at the first of `starts` that is not before it.

    Args:
        asked: frames at which something should change, in order.
        starts: frames at which it can change, in order.

    Raises:
        ConfigError: nothing starts at or after a change, or two changes would take effect at once.
    """
    found: list[int] = []
    for frame in asked:
        index = bisect_left(starts, frame)
        if index == len(starts):
            last = f"the last chunk begins at frame {starts[-1]}" if starts else "there is only one chunk"
            raise ConfigError(f"a change at frame {frame} would never be seen: {last}", "change earlier, or add frames")
        if found and found[-1] == starts[index]:
            both = f"the changes at frames {asked[len(found) - 1]} and {frame} both begin with the chunk at"
            raise ConfigError(f"{both} frame {starts[index]}", "only one of them could be seen: move or drop one")
        found.append(starts[index])
    return tuple(found)
