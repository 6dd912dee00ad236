"""`train`: one part of the demo, by name, for some minutes or steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from streamt2v import files
from streamt2v.training import bundle, check, engine
from streamt2v.training.parts import JOBS, Workshop


def train(
    part: str,
    *,
    minutes: float | None,
    steps: int | None,
    out: Path,
    device: str = "cpu",
    seed: int = 0,
    resume_from: Path | None = None,
    steady: bool = False,
    afresh: bool = False,
    jobs: Mapping[str, Callable[[Workshop], engine.Job]] = JOBS,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Train one part and write its weights into `out`; called again, it goes on where the last run stopped.

    Later parts build on earlier ones: vae, text and vision come first, then images, base, decoder, and cam and apm, or
    joint for all three; image_to_video needs base, prior text and vision, dit vae and text, refiner decoder,
    restore and interpolate nothing. What `out` lacks comes from the package.

    Args:
        part: a name of `jobs`.
        minutes: wall-clock limit of this run; the learning rate is annealed towards it.
        steps: step limit, instead or in addition.
        out: folder of the weights files, tokenizer, vocabulary, sample sheets, `training.jsonl` (a line a run) and
            `state/`, which holds what the next run goes on from.
        device: "cpu" or "cuda".
        seed: of the initial weights and every draw.
        resume_from: folder with the part's weights to start from, where no earlier run left its state.
        steady: keep the learning rate, because this run will be continued.
        afresh: forget the state that an earlier run left.
        jobs: parts by name; the benchmarks train some of their own.
        log: receives lines of progress.

    Returns:
        steps, samples, first_loss, loss, seconds, of all runs together.

    Raises:
        ConfigError: unknown part, or no limit above 0.
        OutputError: `out` cannot be written.
        WeightsError: a part that this one builds on is missing or of other sizes.
        NumericsError: training diverged.
    """
    check(part, jobs, minutes, steps)
    files.make_directory(out)
    bundle.write_words(out)
    workshop = Workshop(out, device, bundle.seeded(seed), resume_from)
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)  # narrow networks: a second thread waits more than it works
    state = out / "state" / f"{part}.pt"
    if afresh:
        state.unlink(missing_ok=True)
    try:
        result = engine.run(jobs[part](workshop), out, minutes, steps, log, workshop.generator, state, steady)
    finally:
        torch.set_num_threads(threads)
    engine.record(out, part, device, result)
    return result
