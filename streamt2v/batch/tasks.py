"""Rows of a batch to tasks: every row is checked before the first job starts.

A row holds what `generate` takes. Its output is found again by name and compared by recipe: a finished video is left
alone, an interrupted run continues, a video made with other settings is an error. So the same command can be repeated
until everything is there.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamt2v import files
from streamt2v.batch.rows import Row
from streamt2v.errors import ConfigError, FieldError, InputError, OutputError, StreamT2VError, explained
from streamt2v.jobs import again, asked, prepare, run_directory
from streamt2v.jobs.job import BEHAVIOUR, Job, Result
from streamt2v.jobs.prepared import Prepared
from streamt2v.weights import hub


@dataclass(frozen=True)
class Task:
    """A job that can run, or that is already finished: then `made` describes its output."""

    id: str
    line: int
    job: Job
    notices: tuple[str, ...] = ()
    made: Result | None = None


@dataclass(frozen=True)
class Refusal:
    """An invalid row."""

    id: str
    line: int
    error: StreamT2VError

    @property
    def field(self) -> str:
        """The invalid field; empty if it is not a single one."""
        known = {"input": "image", "output": "output", "weights": "model"}
        return self.error.field if isinstance(self.error, FieldError) else known.get(self.error.code, "")


@dataclass(frozen=True)
class Shared:
    """What all rows share: the output folder, arguments of `asked.resolve`, and how runs behave."""

    out_dir: Path
    arguments: Mapping[str, Any]
    behaviour: Mapping[str, Any]
    overwrite: bool


def shard_of(text: str) -> tuple[int, int]:
    """Parse ``i/n`` into (i - 1, n). Raises ConfigError."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and len(text) < 20 and 1 <= int(part) <= int(parts)):
        raise ConfigError(f"--shard is {text!r}, it must look like 1/4 (part 1 of 4)")
    return int(part) - 1, int(parts)


def check(
    rows: Sequence[Row], shared: Shared, shard: tuple[int, int] = (0, 1), note: hub.Note = lambda text: None
) -> tuple[list[Task], list[Refusal]]:
    """Check the rows of one shard; ids and outputs must be unique among all rows.

    Args:
        rows: all rows, whatever the shard.
        shared: what all rows share; the row's own fields win.
        shard: (index, count): every count-th row, starting with row `index`.
        note: called with the size of what has to be fetched.

    Raises:
        OutputError: the folder of outputs cannot be made.
    """
    files.make_directory(shared.out_dir)
    pictures = {files.identity(Path(str(row.fields["image"]))) for row in rows if "image" in row.fields} - {None}
    tasks, refusals, seen = list[Task](), list[Refusal](), dict[tuple[str, str], int]()
    for index, (row, name) in enumerate(zip(rows, _names(rows), strict=True)):
        mine = index % shard[1] == shard[0]
        try:
            output = _output(row, name, shared.out_dir, seen)
            if mine:
                task = _task(row, name, output, shared, note)
                for target in filter(None, (output, task.job.preview)):
                    if files.identity(target) in pictures:
                        raise OutputError(f"{target} is the picture that a row starts from", "choose another name")
                tasks.append(task)
        except (StreamT2VError, OSError) as error:
            if mine:
                refusals.append(Refusal(name, row.line, explained(error)))
    return tasks, refusals


def _names(rows: Sequence[Row]) -> list[str]:
    """Give every row an id: its own, its output's name, or the words of its prompt, numbered where these repeat."""
    given = [str(row.fields.get("id", str(row.fields.get("output", "")).removesuffix(".mp4"))) for row in rows]
    names, taken, alike = list[str](), {name.casefold() for name in given}, Counter[str]()
    for row, own in zip(rows, given, strict=True):
        words = f"line-{row.line}" if row.error else files.slug(str(row.fields.get("prompt", "")))
        name = own or words
        while not own and name.casefold() in taken:
            alike[words] += 1
            name = f"{words}-{alike[words] + 1}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _output(row: Row, name: str, folder: Path, seen: dict[tuple[str, str], int]) -> Path:
    """Return the output of a row: inside the folder, and like its preview not used by an earlier row."""
    own = row.fields.get("output")
    if own is not None and not isinstance(own, str):
        raise FieldError("output", f"output is {own!r}, it must be of type str", "write the name in quotes")
    path = _inside(folder, "id", f"{name}.mp4") if own is None else _inside(folder, "output", own)
    preview = [("preview", str(row.fields["preview"]))] if "preview" in row.fields else []
    for field, value in (("id", name), ("output", str(path)), *preview):
        before = seen.setdefault((field, value.casefold()), row.line)
        if before != row.line:
            raise FieldError(field, f"{field} {value!r} is already used in line {before}", "give each row its own")
    return path


def _inside(folder: Path, field: str, name: Any) -> Path:
    try:
        return files.inside(folder, str(name))
    except ConfigError as error:
        raise FieldError(field, error.message, error.hint) from None


def _task(row: Row, name: str, output: Path, shared: Shared, note: hub.Note) -> Task:
    if row.error:
        raise ConfigError(row.error)
    own = {key: value for key, value in row.fields.items() if key not in ("id", "output")}
    settings, arguments = asked.parse_row(own)
    behaviour = {**shared.behaviour, **{key: arguments.pop(key) for key in BEHAVIOUR if key in arguments}}
    if "preview" in own:
        behaviour["preview"] = _inside(shared.out_dir, "preview", own["preview"])
    run = asked.resolve(**{**shared.arguments, **arguments}, row=settings, seed_of_row=_seed(name))
    if not run.prompt.strip():
        raise FieldError("prompt", "the prompt is empty")
    if run.image and not Path(run.image).is_file():
        raise FieldError("image", f"{run.image} is not a file")
    job = Job("generate", run, output, **behaviour)
    known = Prepared(job, note)
    changed = None
    if output.exists():
        try:
            return Task(name, row.line, job, made=again.finished(known))
        except (InputError, OutputError) as error:
            changed = error.message
    if stopped := run_directory.exists(job.run_path):
        try:
            difference = again.difference(known, run_directory.recorded(job.run_path).recipe)
            changed = difference and f"the run in {job.run_path} was started with {difference}"
        except OutputError as error:
            changed = error.message
    if changed and not shared.overwrite:
        raise OutputError(changed, "make it again with --overwrite, or give the row another id")
    known = known.behaving(resume=not (stopped and changed), overwrite=shared.overwrite)
    for path in filter(None, (job.output, job.preview)):
        files.make_directory(path.parent)
    return Task(name, row.line, known.job, tuple(prepare.check(known).notices))


def _seed(name: str) -> int:
    """Return the seed of a row without one: always the same for the same id, on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:4]) >> 1
