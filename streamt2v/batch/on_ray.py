"""The jobs of a batch on a Ray cluster, one task each."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamt2v import devices, memory
from streamt2v.batch import events
from streamt2v.batch.events import Event, Tell, event
from streamt2v.batch.here import attempt
from streamt2v.batch.tasks import Task
from streamt2v.errors import ConfigError, Terminated
from streamt2v.families.choose import foreign
from streamt2v.jobs import needs
from streamt2v.weights import hub

RETRIES = 3
"""How often Ray restarts a job whose worker died."""
SECONDS_TO_STOP = 5.0


def on_ray(tasks: Sequence[Task], tell: Tell, address: str) -> Generator[tuple[Task, Event]]:
    """Run each job as a Ray task; a job whose worker dies is retried and continues where it stopped."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no telemetry
    # Ray installs a SIGTERM handler and prints notices of its own.
    with _restored(signal.SIGTERM), contextlib.redirect_stdout(io.StringIO()):
        try:
            import ray
            from ray.util.queue import Queue
        except ImportError as error:
            hint = 'install it with `pip install ".[ray]"`, or `uv tool install ".[ray]"`, in a checkout'
            raise ConfigError(f"--ray cannot start: {error}", hint) from error
        _connect(address, max(task.job.threads or devices.default_threads() for task in tasks))
        stopped: list[int] = []  # while Ray waits, only KeyboardInterrupt may be raised
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
                        tell(event("warning", job=told["job"], message="its worker died; continuing where it stopped"))
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
    """Join a Ray cluster, or start one on this machine for jobs with that many threads."""
    import ray

    # Offline holds for workers on other machines too.
    settings: dict[str, Any] = {"runtime_env": {"env_vars": dict.fromkeys(hub.OFFLINE, "1")}} if hub.offline() else {}
    if address == "local":
        cores = max(devices.usable_cpus(), threads)
        settings |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": 10**8}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        hint = "omit the address to start one here"
        raise ConfigError(f"there is no Ray cluster at {address}: {error}", hint) from error


@contextlib.contextmanager
def _restored(number: signal.Signals) -> Iterator[None]:
    """Restore the handler of a signal at the end."""
    before = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, before)


def _remotely(task: Task, folder: Path, queue: Any) -> Event:
    import ray

    sent: list[Any] = []

    def tell(told: Event) -> None:
        sent[:] = [queue.actor.put_nowait.remote(told)]  # not awaited: Ray lends out the cores of a waiting task

    os.chdir(folder)  # so that relative paths mean the same
    outcome = attempt(task, tell)
    ray.get(sent)  # the earlier ones have arrived by then
    return outcome


def _placed(task: Task, has_gpu: bool) -> tuple[Task, dict[str, float]]:
    """Return a task and the resources Ray reserves for it: its threads, a GPU, or the share of one that it needs."""
    job = task.job
    kind = job.device if job.device != "auto" else "cuda" if has_gpu else "cpu"
    if kind.startswith("cuda:") or (kind == "cuda" and not has_gpu):
        found = "assigns the GPUs itself" if has_gpu else "has no GPU"
        raise ConfigError(f"the device of {task.id} is {kind}, but Ray {found}", "use --device auto, cuda or cpu")
    if kind != "cuda":
        return task, {"num_cpus": job.threads or devices.default_threads()}
    seen, free, _ = devices.glance()  # assuming that all GPUs are like this machine's
    stages = needs.stages(job.config)
    wanted = job.memory * 1e9 if job.memory else memory.needed(stages, memory.choose(free, stages, "cuda"))
    if seen != "cuda" or free < 2 * wanted or foreign(job.config):
        return task, {"num_cpus": 1, "num_gpus": 1}
    jobs_at_once = int(free // wanted)
    # Each job gets a fixed share, so that it does not take more while it is alone.
    shared = replace(task, job=replace(job, memory=free / jobs_at_once / 1e9))
    return shared, {"num_cpus": 1, "num_gpus": int(10_000 / jobs_at_once) / 10_000}
