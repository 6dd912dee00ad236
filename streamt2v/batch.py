"""A file of jobs to many videos: every row is checked before the first begins; then one by one here, or on Ray.

A row is what `generate` takes. Its output is found again by its name and compared by its recipe: what is finished is
left alone, what was stopped goes on, what was made with other settings is an error. So the same command can be given
again until everything is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v import devices, events, files, jobs, memory, options, planning, runs
from streamt2v.errors import (
    SIGNALS,
    BatchError,
    ConfigError,
    FieldError,
    InputError,
    Interrupted,
    OutputError,
    StreamT2VError,
    Terminated,
    explained,
)
from streamt2v.events import Event, JobReport, Tell, event
from streamt2v.initializers import OWN, named
from streamt2v.jobs import Job, Result
from streamt2v.rows import Row
from streamt2v.weights import hub

if TYPE_CHECKING:
    from streamt2v.pipeline import Loaded

OF_THE_BATCH = {"resume", "resume_anyway", "overwrite", "json", "quiet", "verbose", "set"}
"""Flags of `generate` that a row has not: they are of the whole batch, or have fields of their own."""
RETRIES = 3
"""How often Ray starts a job again whose worker died."""
SECONDS_TO_STOP = 5.0


@dataclass(frozen=True)
class Task:
    """A job that can run, or was finished before: then `made` says what is there."""

    id: str
    line: int
    job: Job
    notices: tuple[str, ...] = ()
    made: Result | None = None


@dataclass(frozen=True)
class Refusal:
    """A row that cannot be used."""

    id: str
    line: int
    error: StreamT2VError

    @property
    def field(self) -> str:
        """The field that is wrong, empty where it is not a single one."""
        known = {"input": "image", "output": "output", "weights": "model"}
        return self.error.field if isinstance(self.error, FieldError) else known.get(self.error.code, "")


# ----------------------------------------------------------------------------------------------------------- checking


@dataclass(frozen=True)
class Shared:
    """What holds for all rows: where outputs go, arguments of `options.resolve`, and how runs behave."""

    out_dir: Path
    arguments: Mapping[str, Any]
    behaviour: Mapping[str, Any]
    overwrite: bool


def shard_of(text: str) -> tuple[int, int]:
    """Turn ``i/n`` into (i - 1, n). Raises ConfigError: it is not like 1/4."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and len(text) < 20 and 1 <= int(part) <= int(parts)):
        raise ConfigError(f"--shard is {text!r}, it must look like 1/4 (part 1 of 4)")
    return int(part) - 1, int(parts)


def check(
    rows: Sequence[Row], shared: Shared, command: Callable[..., None], shard: tuple[int, int] = (0, 1),
    note: Callable[[str], None] = lambda text: None,
) -> tuple[list[Task], list[Refusal]]:  # fmt: skip
    """Check the rows of one shard; ids and outputs are compared among all.

    Args:
        rows: all of them, in every shard.
        shared: what holds for all rows; a row's own word comes first.
        command: the command line's `generate`, whose options rows have.
        shard: (index, count): every count-th row, from row index on.
        note: told the size of what must be fetched.

    Raises:
        OutputError: the folder of outputs cannot be made.
    """
    files.make_directory(shared.out_dir)
    fields = {name: field for name, field in options.fields_of(command).items() if name not in OF_THE_BATCH}
    pictures = {files.identity(Path(str(row.fields["image"]))) for row in rows if "image" in row.fields} - {None}
    tasks, refusals, seen = list[Task](), list[Refusal](), dict[tuple[str, str], int]()
    for index, (row, name) in enumerate(zip(rows, _names(rows), strict=True)):
        mine = index % shard[1] == shard[0]
        try:
            output = _output(row, name, shared.out_dir, seen)
            if mine:
                task = _task(row, name, output, shared, fields, note)
                for target in filter(None, (output, task.job.preview)):
                    if files.identity(target) in pictures:
                        raise OutputError(f"{target} is the picture that a row starts from", "choose another name")
                tasks.append(task)
        except (StreamT2VError, OSError) as error:
            if mine:
                refusals.append(Refusal(name, row.line, explained(error)))
    return tasks, refusals


def _names(rows: Sequence[Row]) -> list[str]:
    """Give every row an id: its own, its output's name, or the words of its prompt; counted where those are alike."""
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
    """Return the output of a row, a place inside the folder that no row before it has; nor has one its preview."""
    own = row.fields.get("output")
    if own is not None and not isinstance(own, str):
        raise FieldError("output", f"output is to be of type str, not {own!r}", "write the name in quotes")
    path = _inside(folder, "id", f"{name}.mp4") if own is None else _inside(folder, "output", own)
    preview = [("preview", str(row.fields["preview"]))] if "preview" in row.fields else []
    for field, value in (("id", name), ("output", str(path)), *preview):
        before = seen.setdefault((field, value.casefold()), row.line)
        if before != row.line:
            raise FieldError(field, f"{field} {value!r} is that of line {before} already", "give each row its own")
    return path


def _inside(folder: Path, field: str, name: Any) -> Path:
    try:
        return files.inside(folder, str(name))
    except ConfigError as error:
        raise FieldError(field, error.message, error.hint) from None


def _task(
    row: Row, name: str, output: Path, shared: Shared, fields: Mapping[str, options.Field], note: Callable[[str], None]
) -> Task:
    if row.error:
        raise ConfigError(row.error)
    own = {key: value for key, value in row.fields.items() if key not in ("id", "output")}
    settings, arguments = options.parse_row(own, fields)
    behaviour = {**shared.behaviour, **{key: arguments.pop(key) for key in jobs.BEHAVIOUR if key in arguments}}
    if "preview" in own:
        behaviour["preview"] = _inside(shared.out_dir, "preview", own["preview"])
    run = options.resolve(**{**shared.arguments, **arguments}, row=settings, seed_of_row=_seed(name))
    if not run.prompt.strip():
        raise FieldError("prompt", "the prompt is empty")
    if run.image and not Path(run.image).is_file():
        raise FieldError("image", f"{run.image} is not a file")
    job = Job("generate", run, output, **behaviour)
    changed = None
    if output.exists():
        try:
            return Task(name, row.line, job, made=jobs.finished(job))
        except (InputError, OutputError) as error:
            changed = error.message
    if stopped := runs.exists(job.run_path):
        try:
            difference = jobs.difference(job, runs.recorded(job.run_path).recipe)
            changed = difference and f"the run in {job.run_path} was started with {difference}"
        except OutputError as error:
            changed = error.message
    if changed and not shared.overwrite:
        raise OutputError(changed, "make it again with --overwrite, or give the row another id")
    job = replace(job, resume=not (stopped and changed), overwrite=shared.overwrite)
    for path in filter(None, (job.output, job.preview)):
        files.make_directory(path.parent)
    return Task(name, row.line, job, tuple(jobs.check(job, note)))


def _seed(name: str) -> int:
    """Return the seed of a row that names none: the same for the same id, today and on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:4]) >> 1


# ------------------------------------------------------------------------------------------------------------ running


def run(tasks: Sequence[Task], refusals: Sequence[Refusal], tell: Tell, *, keep_going: bool, ray: str | None) -> int:
    """Carry out what was checked and tell it as events, the result of the whole batch last.

    Args:
        tasks, refusals: from `check`.
        tell: takes each event.
        keep_going: make what can be made, although a row cannot be used or a job failed.
        ray: the address of a Ray cluster, "local" for one on this machine; None runs one job after the other here.

    Returns:
        The exit code: 0 when every output is there, 2 when a row stopped all, 9 when some jobs failed, 130 or 143.

    Raises:
        ConfigError: Ray is wanted and not to be had.
    """
    began, counts = time.monotonic(), Counter[str]()
    error: StreamT2VError | None = None
    total = len(tasks) + len(refusals)
    for refusal in refusals:
        counts["failed"] += 1
        where = {"job": refusal.id, "line": refusal.line, **({"field": refusal.field} if refusal.field else {})}
        tell(event("result", **where, **events.failed(refusal.error)))
    try:
        if refusals and not keep_going:
            error = ConfigError(
                f"{len(refusals)} of {total} rows cannot be used, nothing was started",
                "correct them, or make the others with --keep-going",
            )
        else:
            for task, outcome in _outcomes(tasks, tell, ray):
                counts[outcome.get("status", "failed")] += 1
                tell(event("result", job=task.id, line=task.line, **outcome))
                if not outcome["ok"] and not keep_going:
                    break
    except (*SIGNALS, Interrupted) as by:
        error = Interrupted("stopped", "the same command goes on where it stopped", by=by)
    left = total - counts.total()
    if error is None and counts["failed"]:
        hint = "correct the rows that cannot be used; " * bool(refusals) + "the same command makes what is missing"
        hint += "; --keep-going does not stop at a failure" * bool(left)
        error = BatchError(f"{counts['failed']} of {total} jobs failed", hint)
    facts = events.failed(error) if error else {"ok": True}
    counted = {key: counts[key] for key in ("made", "there", "failed")}
    exit_code = error.exit_code if error else 0
    seconds = round(time.monotonic() - began, 2)
    tell(event("result", jobs=total, **counted, left=left, seconds=seconds, exit_code=exit_code, **facts))
    return exit_code


def _outcomes(tasks: Sequence[Task], tell: Tell, ray: str | None) -> Generator[tuple[Task, Event]]:
    """Yield each task with the facts of its result, those that were made before first."""
    todo = list[Task]()
    for task in tasks:
        if task.made is None:
            todo.append(task)
        else:
            if not task.job.keep_run:
                runs.discard(task.job.run_path)
            yield task, {"ok": True, "status": "there", **asdict(task.made)}
    if todo:
        with contextlib.closing(_locally(todo, tell) if ray is None else _on_ray(todo, tell, ray)) as outcomes:
            yield from outcomes


def _locally(tasks: Iterable[Task], tell: Tell) -> Generator[tuple[Task, Event]]:
    loaded = _loaded()
    for task in tasks:
        yield task, _attempt(task, tell, loaded)


@cache
def _loaded() -> Loaded:
    """Return what stays loaded in this process from job to job, whoever sends them."""
    from streamt2v.pipeline import Loaded

    return Loaded()


def _attempt(task: Task, tell: Tell, loaded: Loaded) -> Event:
    """Run one job; return the facts of its result, also of a failure."""
    from streamt2v import pipeline

    run, output = task.job.config, str(task.job.output)
    facts = {"output": output, "frames": run.num_frames, "fps": run.output.fps, "seed": run.seed, "model": run.model}
    tell(event("start", job=task.id, line=task.line, **facts, host=socket.gethostname(), pid=os.getpid()))
    for notice in task.notices:
        tell(event("warning", job=task.id, message=notice))
    try:
        return {"ok": True, "status": "made", **asdict(pipeline.run(task.job, JobReport(task.id, tell), loaded))}
    except Interrupted:
        raise
    except Exception as error:
        if not isinstance(error, StreamT2VError | MemoryError):
            logging.getLogger(__name__).exception("job %s", task.id)
        return events.failed(error)


# ------------------------------------------------------------------------------------------------------------- on Ray


def _on_ray(tasks: Sequence[Task], tell: Tell, address: str) -> Generator[tuple[Task, Event]]:
    """Run each job as a Ray task; one whose worker dies is tried again and goes on where it was stopped."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to anybody
    # Ray handles SIGTERM, and prints notices of its own.
    with _given_back(signal.SIGTERM), contextlib.redirect_stdout(io.StringIO()):
        try:
            import ray
            from ray.util.queue import Queue
        except ImportError as error:
            hint = 'install it with `pip install "streamt2v[ray]"`'
            raise ConfigError(f"--ray cannot start: {error}", hint) from error
        _connect(address, max(task.job.threads or devices.default_threads() for task in tasks))
        stopped: list[int] = []  # nothing but KeyboardInterrupt may be raised while Ray waits
        signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        waiting: dict[Any, Task] = {}
        try:
            has_gpu = bool(ray.cluster_resources().get("GPU"))
            queue, remote = Queue(actor_options={"num_cpus": 0}), ray.remote(max_retries=RETRIES)(_remotely)
            for task in tasks:
                placed, resources = _placed(task, has_gpu)
                waiting[remote.options(**resources).remote(placed, Path.cwd(), queue)] = task
            begun = set[str]()
            while waiting:
                if stopped:
                    raise Terminated
                done, _ = ray.wait(list(waiting), timeout=0.2)
                for told in queue.get_nowait_batch(queue.qsize()):
                    if told["type"] == "start" and told["job"] in begun:
                        tell(event("warning", job=told["job"], message="its worker died, it goes on where it was"))
                    begun |= {told["job"]}
                    tell(told)
                for reference in done:
                    task = waiting.pop(reference)
                    try:
                        yield task, ray.get(reference)
                    except ray.exceptions.RayError as error:
                        yield task, events.failed(getattr(error, "cause", None) or error)
        finally:
            for reference in waiting:
                ray.cancel(reference)
            if waiting:
                ray.wait(list(waiting), num_returns=len(waiting), timeout=SECONDS_TO_STOP)
            ray.shutdown()


def _connect(address: str, threads: int) -> None:
    """Join a Ray cluster, or start one on this machine for jobs of so many threads."""
    import ray

    # Workers on other machines make no connections either.
    settings: dict[str, Any] = {"runtime_env": {"env_vars": dict.fromkeys(hub.OFFLINE, "1")}} if hub.offline() else {}
    if address == "local":
        cores = max(devices.usable_cpus(), threads)
        settings |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": 10**8}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        hint = "leave the address out to start one here"
        raise ConfigError(f"there is no Ray cluster at {address}: {error}", hint) from error


@contextlib.contextmanager
def _given_back(number: signal.Signals) -> Iterator[None]:
    """Put the handler of a signal back at the end."""
    before = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, before)


def _remotely(task: Task, folder: Path, queue: Any) -> Event:
    import ray

    sent: list[Any] = []

    def tell(told: Event) -> None:
        sent[:] = [queue.actor.put_nowait.remote(told)]  # not waited for: Ray lends the cores of a task that waits

    os.chdir(folder)  # so that relative names mean the same
    outcome = _attempt(task, tell, _loaded())
    ray.get(sent)  # those before it have arrived then, too
    return outcome


def _placed(task: Task, has_gpu: bool) -> tuple[Task, dict[str, float]]:
    """Return a task and what Ray must keep for it: its threads; or a GPU, or the share of one that its plan needs."""
    job = task.job
    kind = job.device if job.device != "auto" else "cuda" if has_gpu else "cpu"
    if kind.startswith("cuda:") or (kind == "cuda" and not has_gpu):
        found = "gives out the GPUs itself" if has_gpu else "has no GPU"
        raise ConfigError(f"the device of {task.id} is {kind}, Ray {found}", "use --device auto, cuda or cpu")
    if kind != "cuda":
        return task, {"num_cpus": job.threads or devices.default_threads()}
    seen, free, _ = devices.glance()  # the GPU of this machine stands for all
    stages = planning.stages(job.config)
    wanted = job.memory * 1e9 if job.memory else memory.needed(stages, memory.choose(free, stages, "cuda"))
    if seen != "cuda" or free < 2 * wanted or named(job.config) != OWN:
        return task, {"num_cpus": 1, "num_gpus": 1}
    jobs_at_once = int(free // wanted)
    # Each is told its share: it must not see more while it is alone.
    shared = replace(task, job=replace(job, memory=free / jobs_at_once / 1e9))
    return shared, {"num_cpus": 1, "num_gpus": int(10_000 / jobs_at_once) / 10_000}
