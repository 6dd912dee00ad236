"""A run: the makers of a family joined with the run directory and one output file.

Frames are pulled: the output asks the refiner, the refiner asks the base video. So refined frames appear while the
stream is still running, and memory does not grow with length. Where cores and memory are enough, a second thread makes
the next base frames meanwhile, and a third writes the last refined ones; what is kept on the disk, and in which order,
does not change. Every stage leaves its small state in the run directory, written after the frames it belongs to: a run
that dies at any instant continues from there.
"""

import gc
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from streamt2v import __version__, devices, files, memory
from streamt2v.errors import Interrupted, MemoryLimitError, NumericsError, address_limit, less_memory, stopped_by
from streamt2v.families import makers
from streamt2v.families.networks import Loaded, Networks
from streamt2v.jobs import again, forecast, prepare, run_directory
from streamt2v.jobs.job import Job, Result
from streamt2v.jobs.prepared import Prepared
from streamt2v.jobs.run_directory import RunDirectory
from streamt2v.memory import MemoryPolicy
from streamt2v.runs import interpolated, refined
from streamt2v.runs.base import Base
from streamt2v.runs.beside import Beside
from streamt2v.runs.output import Finished, Output
from streamt2v.runs.watch import Report, Watch

RETRIES = 3  # with less memory each


def run(job: Job, report: Report, loaded: Loaded | None = None) -> Result:
    """Prepare a job and make its video; raises what `prepare` and `make` raise."""
    return make(prepare.prepare(job), report, loaded)


def make(known: Prepared, report: Report, loaded: Loaded | None = None) -> Result:
    """Make the video of a prepared job.

    Args:
        known: the job, checked.
        report: told how it goes on.
        loaded: what earlier runs of this process have loaded, and later ones will find; None keeps nothing.

    Raises:
        StreamT2VError: what shows only while running (disk full, out of memory, bad numbers, a signal).
    """
    job, began = known.job, time.monotonic()
    loaded = Loaded() if loaded is None else loaded
    device = devices.resolve(job.device)
    begun = job.resume and run_directory.exists(job.run_path)
    earlier = run_directory.recorded(job.run_path).recipe if begun else job.like or {}
    threads = devices.set_threads(known.threads(device.kind, earlier.get("threads")))
    devices.keep_freed_memory()
    devices.repeat_exactly(device)
    devices.limit_memory(device, None if job.memory is None else int(job.memory * 1e9))
    policy, together = _policy(known, device, loaded, earlier, threads, report)
    cold = not _kept(known, loaded, device, policy)
    card = devices.card(device)
    recipe = {
        **known.recipe(),
        "version": __version__,
        "device": device.kind,
        "threads": threads,
        "libraries": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "memory": asdict(policy),
        **({"card": card} if card else {}),
    }
    with RunDirectory.open(
        job.run_path,
        recipe,
        resume=job.resume,
        overwrite=job.overwrite,
        local={**job.local(), "device": device.name},
        may_change=job.may_change,
    ) as directory:
        try:
            prepare.check_place(job)  # another run may just have made it
            if job.resume and not (job.overwrite or directory.resumed) and job.output.exists():
                there = again.finished(known)
                directory.remove()
                return there
            seen = devices.Glance(device.kind, 0, card)
            prior = forecast.expected(job.config, seen, threads, policy, together)
            watch = Watch(report, known, prior, together)
            output, networks = _make(known, watch, directory, device, policy, loaded)
            watch.doing(f"writing {job.output.name}")
            output.finish()
        except BaseException as error:
            told = _explained(error, job, directory)
            if told is error:
                raise
            raise told from (None if isinstance(told, Interrupted) else error)
        seconds = time.monotonic() - began
        if cold and not directory.changes:
            watch.remember(seconds, networks)
        if not job.keep_run:
            directory.remove()
    height, width = output.size
    return Result.of(job, width, height, seconds, device)


def _kept(known: Prepared, loaded: Loaded, device: devices.Device, policy: MemoryPolicy) -> dict[Path, Any]:
    """Return the networks of earlier runs that are as this one needs them."""
    config = known.job.config
    merged = [(given, files.stamp(given[0])) for place in known.loras.values() for given in place]
    return loaded.fitting(config.model, device, policy, config.compile, merged)


def _make(
    known: Prepared,
    report: Watch,
    directory: RunDirectory,
    device: devices.Device,
    policy: MemoryPolicy,
    loaded: Loaded,
) -> tuple[Output, Networks]:
    """Produce every frame; wherever memory ends, go on from what is stored with the next more sparing policies."""
    config = known.job.config
    sparing = memory.more_sparing(policy, device.kind)
    for lower in [*sparing[:RETRIES], None]:
        here, prompts = _kept(known, loaded, device, policy), [turn.text for turn in known.timeline]
        networks = Networks(config, prompts, device, policy, here, report, directory, known.loras)
        try:
            with Beside() as streaming, Beside() as writing:
                return _attempt(known, report, directory, networks, streaming, writing), networks
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
        report.apart()
        here.clear()
        del networks  # only now, without the error and its frames, its tensors can be freed
        gc.collect()
        devices.release_memory(device, graphs=True)
        if lower is not None:
            report.note(f"out of memory; going on with {lower.describe()}", warning=True)
            policy = lower
            directory.change({**directory.recipe, "memory": asdict(policy)})
    hint = _more_room(known, device, sparing[RETRIES:])
    raise MemoryLimitError(f"out of memory, also with {policy.describe()}", hint)


def _attempt(
    known: Prepared,
    report: Watch,
    directory: RunDirectory,
    networks: Networks,
    streaming: Beside,
    writing: Beside,
) -> Output:
    """Produce every frame with one set of networks, from wherever the run directory stands."""
    making = makers.build(networks, known.chosen, known.refiner)
    base = Base(known, making, directory, networks, report, streaming if report.together else None)
    geometry, beside = refined.Geometry(known.base_size, known.fit), writing if networks.policy.keep_networks else None
    output = Output(known, (geometry.fit.height, geometry.fit.width), directory, report, networks, beside)
    for group in _groups(known, geometry, base, making, networks, report, output):
        output.append(group)
    output.check_whole()
    return output


def _groups(
    known: Prepared,
    geometry: refined.Geometry,
    base: Base,
    making: makers.Makers,
    networks: Networks,
    report: Watch,
    output: Output,
) -> Iterator[Finished]:
    """Yield what the output still lacks: what was made, with frames between where they are asked for."""
    factor, state = known.job.config.output.interpolate, output.state
    kept = {name: state.pop(name) for name in interpolated.KEPT if name in state}
    whole = output.num_frames == known.job.config.num_frames
    done = known.made if whole else -(-output.num_frames // factor)
    made = _made(known, geometry, base, making, networks, report, done, state)
    return made if factor == 1 else interpolated.groups(known, made, networks, report, kept)


def _made(
    known: Prepared,
    geometry: refined.Geometry,
    base: Base,
    making: makers.Makers,
    networks: Networks,
    report: Watch,
    done: int,
    state: dict[str, Tensor],
) -> Iterator[Finished]:
    """Yield the frames that are made from number `done` on: a continued video's own, then those of the stages."""
    yield from refined.kept(geometry, base, done)
    done = max(done, known.kept)
    if known.job.config.refine.enabled:
        yield from refined.groups(known, geometry, base, making.refine, networks, report, done, state)
    else:
        yield from refined.unrefined(geometry, base, done)


def _policy(
    known: Prepared,
    device: devices.Device,
    loaded: Loaded,
    earlier: Mapping[str, Any],
    threads: int,
    report: Report,
) -> tuple[MemoryPolicy, bool]:
    """What the memory allows, and whether that is both stages at once.

    A run keeps the policy it began with, as other batches round differently.
    """
    limit, kind = known.job.memory, device.kind
    free = loaded.free_memory(device) if limit is None else int(limit * 1e9)
    kept = [policy for policy in memory.ladder(kind) if limit is None and asdict(policy) == earlier.get("memory")]
    policy = kept[0] if kept else memory.choose(free, known.stages, kind)
    together = known.side_by_side(kind, policy, free, threads)
    if not kept:
        need = memory.needed(known.stages, policy, together)
        if caution := devices.caution(kind):
            report.note(caution, warning=True)
        described = policy.describe(together)
        report.note(f"memory: {described}: up to {need / 1e9:.1f} of {free / 1e9:.1f} GB", warning=need > free)
    return policy, together


def _more_room(known: Prepared, device: devices.Device, untried: list[MemoryPolicy]) -> str:
    """Name the cheapest plan, and what it needs."""
    cheapest = untried[-1] if untried else memory.ladder(device.kind)[-1]
    need, free = memory.needed(known.stages, cheapest) / 1e9, devices.free_memory(device) / 1e9
    said = f"the cheapest plan ({cheapest.describe()}) needs about {need:.1f} GB, {free:.1f} are free; "
    if address_limit() is not None:
        return f"{said}{less_memory()} and go on with --resume"
    if untried:
        return f"{said}--resume-anyway --memory {need:.1f} goes on with it"
    return f"{said}a smaller --size or --chunk needs less, or end other programs and go on with --resume"


def _explained(error: BaseException, job: Job, directory: RunDirectory) -> BaseException:
    """Say of what ended a run how it goes on; a run directory without anything finished is removed."""
    shown = directory.load_state("output")
    if not directory.num_base_frames and shown is None:
        directory.remove()  # nothing is finished: the next try need not say --resume
    if by := stopped_by(error):
        if not run_directory.exists(directory.path):
            return Interrupted("interrupted before anything was finished", "repeat the command", by=by)
        goes_on = f"streamt2v resume {shlex.quote(str(job.output))} continues"
        if shown is None:
            there = f"{directory.num_base_frames} frames are kept, none can be watched yet"
        else:
            there = f"{shown.meta['mark']['frames']} of {job.config.num_frames} frames can be watched: "
            there += str(directory.partial_path)
        return Interrupted(f"interrupted; {there}", goes_on, by=by)
    if isinstance(error, NumericsError):
        hint = "16 bit may be too narrow: --device cpu computes in 32; or try another --seed or --guidance, "
        where = f"{error.message}, after {directory.num_base_frames} base frames"
        return NumericsError(where, f"{hint}with --resume-anyway to go on from what is finished")
    return error
