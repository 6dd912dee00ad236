"""Third-party models for the first frames and for refining: what a user names becomes a folder of a known kind.

Nothing heavy is imported with this module: `choose` runs before torch does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v import config, weights
from streamt2v.errors import ConfigError
from streamt2v.weights import hub
from streamt2v.weights.folders import ADAPTER, fingerprint, locate, read_index

if TYPE_CHECKING:
    from streamt2v.config import RunConfig


OWN, PRIOR = "own", "prior"
"""The family's own networks make the first frames: from what is given, or from an embedding that its prior draws."""
MODELSCOPE, I2VGEN = "TextToVideoSDPipeline", "I2VGenXLPipeline"
REFINER = "i2vgen-xl"
"""The name, and the preset, of I2VGen-XL as a refiner."""


@dataclass(frozen=True)
class Chosen:
    """Whose pipeline makes the first frames, or refines.

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
    """Return the setting that decides who makes the first frames: `own` and `prior` are the family itself."""
    return run.initialize.picture_model if run.image else run.initialize.text_model


def foreign(run: RunConfig) -> bool:
    """Whether a third-party model makes the first frames."""
    return named(run) not in (OWN, PRIOR)


def pictured(run: RunConfig) -> bool:
    """Whether the family's own first frames come from a picture, or from the embedding of one."""
    return bool(run.image) or named(run) == PRIOR


def refiner_reads_text(run: RunConfig) -> bool:
    """Whether what refines, if anything does, follows a prompt; so do models that are not listed."""
    own = weights.families().get(run.model)
    return run.refine.model != OWN or own is None or own.has("refine.text") or not own.has("refine.unet")


def usual(run: RunConfig, quality: str | None = None, strength: str | None = None) -> list[dict[str, Any]]:
    """Return the presets of a run's family and of its refiner as layers of settings, the later one winning.

    A third-party refiner begins with the defaults: what a family's preset says of `refine` is meant for its own.

    Raises:
        ConfigError, WeightsError: a name that means nothing, or a folder that is no pipeline.
    """
    layers = [config.preset(weights.family(run.model).preset, quality, strength)]
    if run.refine.model != OWN:
        base = refining_base(run.refine.model)
        own = config.preset(base.preset if base else REFINER, quality, strength)
        layers += [_refining(config.to_flat(config.merge())), _refining(own)]
    return layers


def _refining(settings: dict[str, Any]) -> dict[str, Any]:
    kept = ("refine.enabled", "refine.model")
    return {key: value for key, value in settings.items() if key.startswith("refine.") and key not in kept}


def refining_base(name: str) -> weights.Family | None:
    """Return the model family that a refiner is, if it is a pipeline that streams too; None where it is another.

    Raises:
        ConfigError, WeightsError: a name that means nothing, a model that cannot refine, or a folder that is none.
    """
    row, hint = weights.pipelines().get(name), f"refiners are own, {REFINER}, and pipelines that stream, such as wan"
    if name == OWN or (row is not None and "refiner" in row.get("use", "")):
        return None
    kind = row["what"] if row is not None else read_index(locate(name, small=True))[0]
    if row is None and kind == I2VGEN:
        return None
    try:
        return weights.family(name)
    except ConfigError as error:
        raise ConfigError(f"{name} ({kind}) cannot refine videos: {error.message}", hint) from None


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
    if not foreign(run):
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


def refiner(run: RunConfig, note: hub.Note = lambda text: None) -> Chosen | None:
    """Find the folder of the model that refines; None where the family's own networks do, or nothing does.

    Raises:
        ConfigError: a name that means nothing, a model that cannot refine, or a setting that it has no use for.
        WeightsError: a folder that is no pipeline, or files that cannot be had.
    """
    name = run.refine.model
    if name == OWN or not run.refine.enabled:
        return None
    base = refining_base(name)
    unread = base.unread if base else ("refine.reuse_interval",)
    settings, defaults = (config.to_flat(given) for given in (run, config.merge(*usual(run))))
    for key in settings:
        if key.startswith("refine.") and key.startswith(unread) and settings[key] != defaults[key]:
            raise ConfigError(f"{key} is {settings[key]!r}, {name} has no use for it", f"leave it at {defaults[key]!r}")
    folder = locate(name, note)
    return Chosen(name, read_index(folder)[0], folder)


def takes_picture(kind: str) -> bool:
    """Whether a pipeline class starts from a picture, by how diffusers names them: importing takes seconds."""
    return kind == "StableVideoDiffusionPipeline" or any(mark in kind for mark in ("ImageToVideo", "I2V", "Framepack"))
