"""Long videos from text by the StreamingT2V method (arXiv 2403.14773): initializer, streaming stage, refiner.

    import streamt2v

    video = streamt2v.generate("a red ball floating over the sea at sunset", "ball.mp4", frames=48, seed=1)
    longer = streamt2v.extend(video, frames="15s")
    larger = streamt2v.refine(longer, size="1920x1080")
    for image in larger.frames():  # PIL images, decoded one by one
        ...
    print(larger.path, larger.recipe["config"])

`generate`, `refine` and `extend` take the options of the command line by name, apply the presets of the model family as
it does, and raise `StreamT2VError` with a message and a hint. `callback=` is told of the progress as a `Status`.

`prepare` and `run` are the two halves of it, for a `Job` with a `RunConfig` of your own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamt2v.api import Video, extend, generate, refine
    from streamt2v.config import RunConfig
    from streamt2v.errors import StreamT2VError
    from streamt2v.jobs.job import Job
    from streamt2v.jobs.prepare import prepare
    from streamt2v.runs.pace import Status
    from streamt2v.runs.pipeline import run

__version__ = "0.1.0"
__all__ = [
    "Job", "RunConfig", "Status", "StreamT2VError", "Video", "__version__", "extend", "generate", "prepare", "refine",
    "run",
]  # fmt: skip

_HOMES = {
    **dict.fromkeys(("Video", "extend", "generate", "refine"), "streamt2v.api"),
    "Job": "streamt2v.jobs.job",
    "prepare": "streamt2v.jobs.prepare",
    "run": "streamt2v.runs.pipeline",
    "RunConfig": "streamt2v.config",
    "Status": "streamt2v.runs.pace",
    "StreamT2VError": "streamt2v.errors",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that importing the package is instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'streamt2v' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
