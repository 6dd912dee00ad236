"""Progress of a run on stderr: live on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from streamt2v import devices
from streamt2v.cli.terminal import plain, say

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0


class _Stage:
    def __init__(self, total: int, done: int) -> None:
        self.total, self.first, self.done = total, done, done
        self.chunk, self.num_chunks = 0, 0
        self.began = time.monotonic()

    def text(self, name: str) -> str:
        elapsed = max(time.monotonic() - self.began, 1e-6)
        rate = (self.done - self.first) / elapsed
        left = clock((self.total - self.done) / rate) if rate > 0 else "--:--"
        return (
            f"{name}: frame {self.done}/{self.total}, chunk {self.chunk}/{self.num_chunks}, "
            f"{rate:.2f} frames/s, {left} left, {devices.peak_memory() / 2**20:.0f} MB"
        )


def clock(seconds: float) -> str:
    """Write a time as 1:05 or 2:01:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Reports a run on stderr: live with rich on a terminal, elsewhere a plain line at most every ten seconds."""

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose
        self.live_wanted = not quiet and sys.stderr.isatty()
        self.stages: dict[str, _Stage] = {}
        self.last_line = time.monotonic()
        self.live: Live | None = None

    def __enter__(self) -> Progress:
        if self.live_wanted:
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), refresh_per_second=4, get_renderable=self._render)
            try:
                self.live.start()
            except BaseException:  # such as a signal: the cursor may already be hidden
                self.live.stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def start(self, stage: str, total_frames: int, done: int = 0) -> None:
        """Begin a stage, or continue it after `done` frames."""
        self.stages[stage] = _Stage(total_frames, done)
        if self.live is None and self.verbose:
            self.say(f"{stage}: {total_frames} frames" + (f", {done} of them already there" if done else ""))

    def advance(self, stage: str, done: int, chunk: int, num_chunks: int) -> None:
        """Show progress: at once on a terminal, elsewhere every ten seconds and at the end."""
        state = self.stages[stage]
        state.done, state.chunk, state.num_chunks = done, chunk, num_chunks
        now = time.monotonic()
        due = now - self.last_line >= SECONDS_BETWEEN_LINES or done == state.total or self.verbose
        if self.live is None and due:
            self.last_line = now
            self.say(state.text(stage))

    def end(self, *stages: str) -> None:
        """Stop showing these stages."""
        for stage in stages:
            self.stages.pop(stage, None)

    def note(self, text: str, warning: bool = False) -> None:
        """Print a warning, or a detail if the user asked for details."""
        if self.verbose or warning:
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line, unless the user wants errors only."""
        if not self.quiet:
            say(text)

    def _render(self) -> Text:
        from rich.text import Text

        return Text("\n".join(stage.text(plain(name)) for name, stage in self.stages.items()))
