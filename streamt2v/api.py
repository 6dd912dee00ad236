"""What `import streamt2v` offers: generate, refine and extend, with the options of the command line.

Nothing is printed: a callback is told of the progress, and warnings go to the logger `streamt2v`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v.jobs import asked
from streamt2v.jobs.job import BEHAVIOUR, Job, Result, beside, default_output
from streamt2v.jobs.recipe import inspect_source, recipe_of
from streamt2v.runs.pace import Status

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("streamt2v")
Name = str | os.PathLike[str]
Callback = Callable[[Status], None]


@dataclass(frozen=True)
class Video:
    """A finished video: the file, and what is known of it."""

    path: Path
    result: Result

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything that made the video, read from the file; `recipe["config"]` are all settings by dotted key."""
        from streamt2v.media import isolated

        return recipe_of(isolated.probe(self.path).comment)

    def frames(self) -> Iterator[Image]:
        """Yield the frames as PIL images, each decoded when it is asked for."""
        from PIL import Image

        from streamt2v.media import isolated

        for group in isolated.read_frames(self.path):
            yield from map(Image.fromarray, group)

    def __fspath__(self) -> str:
        return str(self.path)


def generate(
    prompt: str,
    output: Name | None = None,
    *,
    frames: int | str = 24,
    seed: int | None = None,
    callback: Callback | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Video:
    """Make a video from a prompt.

    Args:
        prompt: what to show.
        output: the file to write; its ending decides the kind. None: a name of date, prompt and seed, here.
        frames: exact number of frames, or a time such as "10s" or "2m".
        seed: of all randomness; None draws one, which `Video.result` knows.
        callback: called with a `Status` at every denoising step, chunk and change of stage, never twice at once; on a
            CPU also from a second thread.
        resume: continue an interrupted run of the same output.
        overwrite: replace an existing output.
        options: every option of `streamt2v generate` by its name with underscores, such as model, size, fps, quality,
            image, negative, no_refine, refine_steps, device, threads or audio; `at={"10s": "another prompt"}`;
            `lora={"style.safetensors": 0.8}`; and every setting by its key, as in `**{"stream.eta": 0.5}`.

    Raises:
        StreamT2VError: whatever is wrong, with `message`, `hint` and the `exit_code` of the command line.
    """
    named = {"prompt": prompt, "frames": frames, "seed": seed}
    return _make("generate", None, output, callback, resume, overwrite, named | options)


def refine(
    source: Name,
    output: Name | None = None,
    *,
    callback: Callback | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Video:
    """Refine a video of any length: more detail, the same number of frames, the same sound.

    `source` is a `Video` or a file; all else is as in `generate`, with the options of `streamt2v refine`. None as
    `output` is the source's name with _refined.
    """
    return _make("refine", Path(source), output, callback, resume, overwrite, options)


def extend(
    source: Name,
    output: Name | None = None,
    *,
    frames: int | str,
    callback: Callback | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Video:
    """Continue a video from its last frames; `frames` is the length of the whole result, the source included.

    The other arguments are those of `refine`, with the options of `streamt2v extend`.
    """
    return _make("extend", Path(source), output, callback, resume, overwrite, {"frames": frames, **options})


@dataclass(frozen=True)
class _Report:
    callback: Callback | None

    def tell(self, status: Status) -> None:
        if self.callback is not None:
            self.callback(status)

    def note(self, text: str, warning: bool = False) -> None:
        log.log(logging.WARNING if warning else logging.INFO, "%s", text)


def _make(
    command: str,
    source: Path | None,
    output: Name | None,
    callback: Callback | None,
    resume: bool,
    overwrite: bool,
    options: Mapping[str, Any],
) -> Video:
    given = dict(options)
    if isinstance(given.get("at"), Mapping):
        given["at"] = [f"{time}={text}" for time, text in given["at"].items()]
    if isinstance(given.get("lora"), Mapping):
        given["lora"] = [f"{os.fspath(file)}:{strength}" for file, strength in given["lora"].items()]
    known = asked.row_fields()
    plain = {
        name if name in known else name.replace("_", "-"): os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in given.items()
        if value is not None
    }
    settings, arguments = asked.parse_row(plain)
    behaviour = {name: arguments.pop(name) for name in BEHAVIOUR if name in arguments}
    target = None if output is None else Path(output)
    if target is None and source is not None:
        target = beside(source, command)
    found = None if source is None else inspect_source(source)
    arguments.setdefault("strength", asked.usual_strength(command, found))
    device = behaviour.get("device", "auto")
    again = target if resume else None
    config = asked.resolve(row=settings, source=found, device=device, command=command, resume_from=again, **arguments)
    target = target or default_output(config.prompt, config.seed)
    from streamt2v.runs import pipeline

    job = Job(command, config, target, source, resume=resume, overwrite=overwrite, **behaviour)
    return Video(target, pipeline.run(job, _Report(callback)))
