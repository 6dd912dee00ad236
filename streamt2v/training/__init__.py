"""Training of the demo family; what can be refused is refused before torch is loaded."""

from collections.abc import Collection

from streamt2v.errors import ConfigError

PARTS = [
    "vae",
    "text",
    "vision",
    "images",
    "base",
    "decoder",
    "cam",
    "apm",
    "joint",
    "image_to_video",
    "prior",
    "dit",
    "refiner",
    "restore",
    "interpolate",
]


def check(part: str, parts: Collection[str], minutes: float | None, steps: int | None) -> None:
    """Raise ConfigError unless there is such a part, and a limit above 0."""
    if part not in parts:
        raise ConfigError(f"there is no part {part!r} to train", f"parts: {', '.join(parts)}")
    limits = [limit for limit in (minutes, steps) if limit is not None]
    if not limits or not all(limit > 0 for limit in limits):
        raise ConfigError("training needs a limit above 0", "give --minutes or --steps")
