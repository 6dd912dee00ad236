"""Third-party models for the first frames: what a user names becomes a folder, which says what kind of pipeline it is.

Nothing heavy is imported with this module: `choose` runs before torch does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v.errors import ConfigError
from streamt2v.weights import hub
from streamt2v.weights.folders import ADAPTER, fingerprint, locate, read_index

if TYPE_CHECKING:
    from streamt2v.config import RunConfig


OWN = "own"
MODELSCOPE = "TextToVideoSDPipeline"


@dataclass(frozen=True)
class Chosen:
    """Whose pipeline makes the first frames.

    `kind` is the class that the folder names, `drawing` the text-to-image folders that belong to it: for an
    image-to-video pipeline without a picture those that draw one (a prior before its decoder), for a motion adapter the
    model that it animates.
    """

    name: str
    kind: str
    folder: Path
    drawing: tuple[Path, ...] = ()

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this model from another: names and SHA-256 of its files, hashed into one."""
        return {"name": self.name, "class": self.kind, "sha256": fingerprint(self.folder, *self.drawing)}


def named(run: RunConfig) -> str:
    """Return the setting that decides who makes the first frames: `own` is the family itself."""
    return run.initialize.picture_model if run.image else run.initialize.text_model


def choose(run: RunConfig, note: hub.Note = lambda text: None) -> Chosen | None:
    """Find the folders that stage 1 of a run needs; None where the family's own networks make the first frames.

    Args:
        run: names them.
        note: called with the size before anything is fetched.

    Raises:
        ConfigError: a name that means nothing, or a model that cannot start from what is given.
        WeightsError: a folder that is no pipeline, or files that cannot be had.
    """
    name = named(run)
    if name == OWN:
        return None
    folder = locate(name, note)
    kind, _ = read_index(folder)
    adapter = kind == ADAPTER
    if run.image and not takes_picture(kind):
        raise ConfigError(f"{name} ({kind}) makes videos from text alone", "leave --image out, or use --init svd")
    if not adapter and (run.image or not takes_picture(kind)):
        return Chosen(name, kind, folder)
    drawing = run.initialize.text_to_image or ("realistic-vision" if adapter else "sdxl")
    parts = [drawing] if Path(drawing).expanduser().is_dir() else drawing.split("+")
    return Chosen(name, kind, folder, tuple(locate(part, note) for part in parts))


def takes_picture(kind: str) -> bool:
    """Whether a pipeline class starts from a picture, by how diffusers names them: importing takes seconds."""
    return kind == "StableVideoDiffusionPipeline" or any(mark in kind for mark in ("ImageToVideo", "I2V", "Framepack"))
