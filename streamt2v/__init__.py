"""Long videos from text by the StreamingT2V method (arXiv 2403.14773): initializer, streaming stage, refiner."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Job", "RunConfig", "StreamT2VError", "__version__", "prepare", "run"]

_HOMES = {
    "Job": "streamt2v.jobs.job",
    "prepare": "streamt2v.jobs.prepare",
    "run": "streamt2v.runs.pipeline",
    "RunConfig": "streamt2v.config",
    "StreamT2VError": "streamt2v.errors",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that importing the package is instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'streamt2v' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
