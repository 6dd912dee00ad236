"""The refiner in the published order of work: every chunk takes a step before any takes the next one."""

from streamt2v.chunks import Chunk
from streamt2v.stages.refine import Refiner


class Sweep(Refiner):
    """Holds the whole video at once; otherwise the same, to the bit."""

    def _next_ready(self) -> Chunk | None:
        if self.state.encoded < self.num_frames:
            return None
        done = self.state.steps_done
        return min(self._ready(), key=lambda chunk: (done[chunk.index], chunk.index), default=None)
