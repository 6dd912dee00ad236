"""Third-party models for the first frames and for refining: what a user names becomes a folder of a known kind.

A name is a row of `weights.toml`, `hub:OWNER/NAME` or a local folder. A folder is data: only safetensors are read, only
classes of diffusers and transformers are built, and every parameter must come from the files. Nothing heavy is imported
with this module: `choose` runs before torch does.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v import config, weights
from streamt2v.errors import ConfigError, WeightsError
from streamt2v.weights import hub

if TYPE_CHECKING:
    from streamt2v.config import RunConfig


OWN = "own"
MODELSCOPE, ADAPTER = "TextToVideoSDPipeline", "MotionAdapter"
REFINERS = {"I2VGenXLPipeline": "i2vgen"}
"""By pipeline class: the module of this package whose `refine` makes a refiner of its folder."""
REFINER_PRESET = "i2vgen-xl"
"""The preset of the third-party models that refine."""
# Of a repository: no copies of the whole model in one file, no pickles, no example pictures.
SMALL_FILES, ALL_WEIGHTS = ("*.json", "*/*.txt", "*/*.model"), "*/*.safetensors"
FINGERPRINTED = (".json", ".txt", ".model", ".safetensors")


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
        parts = [weights.contents(folder, FINGERPRINTED) for folder in (self.folder, *self.drawing)]
        listed = json.dumps(parts, sort_keys=True).encode()
        return {"name": self.name, "class": self.kind, "sha256": hashlib.sha256(listed).hexdigest()}


def named(run: RunConfig) -> str:
    """Return the setting that decides who makes the first frames: `own` is the family itself."""
    return run.initialize.picture_model if run.image else run.initialize.text_model


def usual(run: RunConfig, quality: str | None = None, strength: str | None = None) -> list[dict[str, Any]]:
    """Return the presets of a run's family and of its refiner as layers of settings, the later one winning."""
    layers = [config.preset(weights.family(run.model).preset, quality, strength)]
    if run.refine.model != OWN:
        layers.append(config.preset(REFINER_PRESET, quality, strength))
    return layers


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


def refiner(run: RunConfig, note: hub.Note = lambda text: None) -> Chosen | None:
    """Find the folder of the model that refines; None where the family's own networks do, or nothing does.

    Raises:
        ConfigError: a name that means nothing, a model that cannot refine, or a setting that it has no use for.
        WeightsError: a folder that is no pipeline, or files that cannot be had.
    """
    name = run.refine.model
    if name == OWN or not run.refine.enabled:
        return None
    folder = locate(name, note)
    kind, _ = read_index(folder)
    if kind not in REFINERS:
        raise ConfigError(f"{name} ({kind}) cannot refine videos", f"known: {', '.join(REFINERS)}")
    if run.refine.reuse_interval != 1:
        raise ConfigError(
            f"refine.reuse_interval is {run.refine.reuse_interval}, {name} has no use for it", "leave it at 1"
        )
    return Chosen(name, kind, folder)


def takes_picture(kind: str) -> bool:
    """Whether a pipeline class starts from a picture, by how diffusers names them: importing takes seconds."""
    return kind == "StableVideoDiffusionPipeline" or any(mark in kind for mark in ("ImageToVideo", "I2V", "Framepack"))


def locate(name: str, note: hub.Note = lambda text: None) -> Path:
    """Find or fetch the folder of a named, hub or local pipeline; `note` is told the size before it is fetched.

    Raises:
        ConfigError: the name means nothing.
        WeightsError: its files cannot be had.
    """
    folder, rows = Path(name).expanduser(), weights.pipelines()
    row = rows.get(name, {})
    repository = row.get("repository", name.removeprefix("hub:"))
    if name.startswith("hub:"):
        if len(repository.split("/")) != 2 or not all(repository.split("/")):
            raise ConfigError(f"{name!r} names no repository", "it must look like hub:OWNER/NAME")
    elif not row:
        if folder.is_dir():
            return folder
        hint = config.nearest(name, [OWN, *sorted(rows), "hub:OWNER/NAME", "the folder of a diffusers pipeline"])
        raise ConfigError(f"there is no model and no folder {name!r}", hint)
    return hub.snapshot(repository, row.get("revision"), (*SMALL_FILES, row.get("weights", ALL_WEIGHTS)), note)


def here(name: str) -> Path | None:
    """Return the folder of a named, hub or local pipeline where it is here already."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    repository = weights.pipelines().get(name, {}).get("repository", name.removeprefix("hub:"))
    return weights.snapshot_of(repository)[0]


def read_index(folder: Path) -> tuple[str, dict[str, Any]]:
    """Read and check the class and the parts that `model_index.json` names, or the config of a lone motion adapter.

    Raises:
        WeightsError: no pipeline, or one that would need code from elsewhere.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        path = folder / "config.json"
    try:
        table = json.loads(path.read_text("utf-8"))
        kind = table["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        hint = "it must hold model_index.json, as `save_pretrained` writes it"
        raise WeightsError(f"{folder} is no diffusers pipeline: {error}", hint) from None
    if not isinstance(kind, str) or not kind.isidentifier() or (path.name == "config.json" and kind != ADAPTER):
        raise WeightsError(f"{folder} is of the class {kind!r}, which is no pipeline of diffusers")
    parts = {} if kind == ADAPTER else {key: value for key, value in table.items() if not key.startswith("_")}
    for name, value in parts.items():
        if isinstance(value, list) and value != [None, None] and not _is_library_class(value):
            raise WeightsError(f"{folder}: {name} wants code from {value}", "only diffusers and transformers are used")
    return kind, parts


def _is_library_class(value: list[Any]) -> bool:
    """Whether [library, class] lies in transformers, diffusers or one of the folders of diffusers' pipelines."""
    if len(value) != 2 or not all(isinstance(item, str) and item.isidentifier() for item in value):
        return False
    if value[0] in ("diffusers", "transformers"):
        return True
    spec = find_spec("diffusers")
    roots = [Path(place) / "pipelines" for place in (spec.submodule_search_locations or [])] if spec else []
    return any((root / inner / value[0]).is_dir() for root in roots for inner in (".", "deprecated"))
