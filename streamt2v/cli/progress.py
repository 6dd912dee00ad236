"""Progress of jobs on stderr: one live line for each on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from streamt2v.cli.terminal import plain, say
from streamt2v.runs.pace import Status

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.live import Live
    from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
REFRESHES = 4  # a second
STEADY = 2.0  # seconds that a stage stays on the line while others, at work at the same time, tell of steps and chunks
FEWEST_BAR, MOST_BAR = 5, 30


def clock(seconds: float) -> str:
    """Write a time as 1:05 or 2:01:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def line(name: str, status: Status, since: float, elapsed: float, width: int) -> str:
    """Return one line of fewer than `width` columns on how far a job is.

    Args:
        name: of the job, where there are several: its number, such as 2/3, and what it is called.
        status: what was told last.
        since: seconds since then.
        elapsed: seconds since the job began.
        width: of the terminal, in columns.
    """
    head = plain(status.stage)
    if status.kind != "doing":
        head += f" chunk {status.chunk}/{status.chunks}" if status.chunks else ""
        head += f", step {status.step}/{status.steps}" if status.steps else ""
    left = None if status.seconds_left is None else max(0.0, status.seconds_left - since)
    tail = [f"{clock(elapsed)} so far" if left is None else f"{clock(left)} left"]
    if status.share or status.kind != "doing":
        tail.insert(0, f"{status.share:4.0%}")
    memory = f"{status.memory_mb:.0f} MB" if status.memory_mb < 10_000 else f"{status.memory_mb / 1000:.1f} GB"
    head = head[: max(8, width - 3 - len("  ".join(tail)))]
    room = width - 1 - len(head) - len("  ".join(tail)) - 4
    named, _, title = name.partition(" ")
    named = named if room >= len(named) + 2 else ""
    room -= len(named) + 2
    if status.memory_mb and room >= len(memory) + 2:
        tail.append(memory)
        room -= len(memory) + 2
    if named and title and room > 6:
        title = _cut(title, min(24, room - 3))
        named, room = f"{named} {title}".rstrip(), room - len(title) - 1
    head = f"{named}: {head}" if named else head
    room = 0 if status.kind == "doing" and not status.share else room
    full = round(min(MOST_BAR, room) * status.share)
    bar = ["━" * full + "╌" * (min(MOST_BAR, room) - full)] if room >= FEWEST_BAR else []
    return "  ".join([head, *bar, *tail])[: width - 1]


def _cut(title: str, most: int) -> str:
    """Cut a name at one of its words, which dashes part; "" where too little would be left to know it by."""
    cut = title if len(title) <= most else title[: most + 1].rpartition("-")[0]
    return cut if len(cut) >= min(8, len(title)) else ""


class _Shown:
    """What was told last of a job, when, and when it began."""

    def __init__(self, status: Status) -> None:
        self.began, self.heard, self.stage = time.monotonic(), 0.0, status.stage
        self.tell(status)

    def tell(self, status: Status) -> None:
        self.told = now = time.monotonic()
        if status.stage == self.stage or status.kind in ("doing", "start") or now - self.heard > STEADY:
            self.status, self.stage, self.heard = status, status.stage, now
        else:
            share, left, memory = status.share, status.seconds_left, status.memory_mb
            self.status = replace(self.status, share=share, seconds_left=left, memory_mb=memory)

    def line(self, name: str, width: int, status: Status | None = None) -> str:
        now = time.monotonic()
        return line(name, status or self.status, now - self.told, now - self.began, width)


class Progress:
    """Reports on stderr: live with rich on a terminal, elsewhere a plain line at most every ten seconds."""

    def __init__(self, quiet: bool = False, verbose: bool = False, alone: bool = True) -> None:
        """`alone` is false where results go on and on to stdout, which must not be the same terminal then."""
        self.quiet, self.verbose = quiet, verbose
        self.live_wanted = not quiet and sys.stderr.isatty() and (alone or not sys.stdout.isatty())
        self.shown: dict[str, _Shown] = {}
        self.last_line = time.monotonic()
        self.live: Live | None = None

    def __enter__(self) -> Progress:
        if self.live_wanted:
            from rich.console import Console
            from rich.live import Live

            # Results go to stdout as they are.
            self.live = Live(
                self, console=Console(stderr=True), refresh_per_second=REFRESHES, transient=True, redirect_stdout=False
            )
            try:
                self.live.start(refresh=True)
            except BaseException:  # such as a signal: the cursor may already be hidden
                self.live.stop()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            try:
                self.live.stop()
            finally:  # also where a signal arrives while it stops
                self.live.console.show_cursor()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the live line away while something else writes to the terminal."""
        if self.live is not None:
            self.live.stop()
        yield
        if self.live is not None:
            self.live.start()

    def tell(self, status: Status, job: str = "") -> None:
        """Show how far a job is: at once on a terminal, elsewhere every ten seconds."""
        shown = self.shown.setdefault(job, _Shown(status))
        shown.tell(status)
        now = time.monotonic()
        due = now - self.last_line >= SECONDS_BETWEEN_LINES and status.kind != "doing"
        if self.live is None and (due or (self.verbose and status.kind != "step")):
            self.last_line = now
            self.say(shown.line(job, 100, status))

    def doing(self, text: str) -> None:
        """Show what goes on before a job says so itself."""
        self.tell(Status("doing", text))

    def end(self, job: str) -> None:
        """Stop showing a job."""
        self.shown.pop(job, None)

    def note(self, text: str, warning: bool = False) -> None:
        """Print a warning, or a detail if the user asked for details."""
        if self.verbose or warning:
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line, unless the user wants errors only."""
        if not self.quiet:
            say(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> list[Text]:
        from rich.text import Text

        room = options.max_width - 2  # for ^C behind it, which must not begin another line
        rows = [Text(shown.line(name, room)) for name, shown in [*self.shown.items()]]
        return rows[: max(1, (console.height or 25) - 2)]
