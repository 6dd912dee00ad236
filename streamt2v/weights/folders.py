"""Folders in the layout of diffusers: found by name, read without running anything, and taken as model families.

A name is a row of `weights.toml`, `hub:OWNER/NAME` or a local folder. A folder is data: only safetensors are read, only
classes of diffusers and transformers are built, or our own: the index of a folder that `train` wrote names its files as
the parts, such as `"vae": ["streamt2v", "vae.safetensors"]`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from streamt2v import config, files
from streamt2v.errors import ConfigError, WeightsError
from streamt2v.weights import catalog, header, hub, inventory
from streamt2v.weights.catalog import Family

ADAPTER = "MotionAdapter"
# Of a repository: no copies of the whole model in one file, no pickles, no example pictures.
SMALL_FILES, ALL_WEIGHTS = ("*.json", "*/*.txt", "*/*.model"), "*/*.safetensors"
INDEX, OURS = "model_index.json", "streamt2v"
FINGERPRINTED = (".json", ".txt", ".model", ".safetensors")
BASES: Mapping[str, str] = {
    "WanTransformer3DModel": "wan",
    "LTXVideoTransformer3DModel": "ltx",
    "HeliosTransformer3DModel": "helios",
    "SpacetimeTransformer": "dit",
}
"""By the class of a folder's transformer: the preset of the family that it makes, and the module that adapts it."""


def locate(name: str, note: hub.Note = lambda text: None, small: bool = False) -> Path:
    """Find or fetch the folder of a named, hub or local pipeline; `note` is told the size before it is fetched.

    Args:
        name: see above.
        note: called with a sentence.
        small: fetch only what describes the model, not its weights.

    Raises:
        ConfigError: the name means nothing.
        WeightsError: its files cannot be had.
    """
    folder, rows = Path(name).expanduser(), catalog.pipelines()
    row = rows.get(name, {})
    repository = row.get("repository", name.removeprefix("hub:"))
    if name.startswith("hub:"):
        if len(repository.split("/")) != 2 or not all(repository.split("/")):
            raise ConfigError(f"{name!r} names no repository", "it must look like hub:OWNER/NAME")
    elif not row:
        if folder.is_dir():
            return folder
        hint = config.nearest(name, ["own", *sorted(rows), "hub:OWNER/NAME", "the folder of a diffusers pipeline"])
        raise ConfigError(f"there is no model and no folder {name!r}", hint)
    patterns = SMALL_FILES if small else (*SMALL_FILES, row.get("weights", ALL_WEIGHTS))
    return hub.snapshot(repository, row.get("revision"), patterns, note)


def read_index(folder: Path) -> tuple[str, dict[str, Any]]:
    """Read and check the class and the parts that `model_index.json` names, or the config of a lone motion adapter.

    Raises:
        WeightsError: no pipeline, or one that would need code from elsewhere.
    """
    path = folder / INDEX
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
        if isinstance(value, list) and value != [None, None] and not (_ours(value) or _is_library_class(value)):
            raise WeightsError(f"{folder}: {name} wants code from {value}", "only diffusers and transformers are used")
    return kind, parts


def _ours(value: object) -> str:
    """Return the name of the file of ours, in the folder itself, that a part is; "" where it is none."""
    if not isinstance(value, list) or len(value) != 2 or value[0] != OURS or not isinstance(value[1], str):
        return ""
    return value[1] if value[1].endswith((".safetensors", ".json")) and Path(value[1]).name == value[1] else ""


def place(folder: Path, part: str) -> Path:
    """Return where a part of a pipeline lies: in a folder of its own, or in a file of ours. Raises as `read_index`."""
    own = folder / part
    return own if own.is_dir() else folder / (_ours(read_index(folder)[1].get(part)) or part)


def _is_library_class(value: list[Any]) -> bool:
    """Whether [library, class] lies in transformers, diffusers or one of the folders of diffusers' pipelines."""
    if len(value) != 2 or not all(isinstance(item, str) and item.isidentifier() for item in value):
        return False
    if value[0] in ("diffusers", "transformers"):
        return True
    spec = find_spec("diffusers")
    roots = [Path(place) / "pipelines" for place in (spec.submodule_search_locations or [])] if spec else []
    return any((root / inner / value[0]).is_dir() for root in roots for inner in (".", "deprecated"))


def fingerprint(*parts: Path) -> str:
    """Return what tells the contents of folders from others: names and SHA-256 of their files, hashed into one."""
    listed = json.dumps([_contents(folder) for folder in parts], sort_keys=True)
    return hashlib.sha256(listed.encode()).hexdigest()


def _contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the files of a pipeline; where they are ours, others may lie beside them."""
    index = dict[str, Any]()
    with suppress(WeightsError):  # what is said where it is loaded
        index = read_index(folder)[1]
    ours, found = set(filter(None, map(_ours, index.values()))), inventory.contents(folder, FINGERPRINTED)
    return {name: digest for name, digest in found.items() if not ours or name in {INDEX, *ours}}


def sizes(folder: Path, part: str) -> dict[str, Any]:
    """Read the config of one part of a pipeline, such as its transformer. Raises WeightsError where there is none."""
    if (file := place(folder, part)).suffix == ".safetensors":
        kind, arguments, _ = header.read_header(file)
        return {"_class_name": kind, **arguments}
    try:
        found: dict[str, Any] = json.loads((folder / part / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{folder} has no {part}: {error}", "the folder was copied in part") from None
    return found


def family(name: str) -> Family:
    """Return a model family: of the catalog, or a pipeline whose transformer can stream.

    Raises:
        ConfigError: no such name, or a pipeline that is none of those that can stream.
        WeightsError: a folder that is no pipeline, or whose description cannot be had.
    """
    known, rows = catalog.families(), catalog.pipelines()
    row = rows.get(name, {})
    if name not in known and "preset" in row:
        return _pipeline(name, row)
    if name in known or not (name.startswith("hub:") or Path(name).expanduser().is_dir()):
        streaming = [key for key, row in rows.items() if "preset" in row]
        return catalog.family(name, also=[*streaming, "hub:OWNER/NAME", "the folder of a diffusers pipeline"])
    folder = locate(name, small=True)
    preset = adapter(folder, name)
    row = {"what": f"{name}, as {preset}", "licence": "see its model card", "preset": preset}
    words = "vocabulary.json"  # which `train` writes
    return replace(_pipeline(name, row), root=folder, vocabulary=words if (folder / words).is_file() else "")


def adapter(folder: Path, name: str = "") -> str:
    """Return the preset, and name of the module, that suits a folder's transformer.

    Raises:
        ConfigError: none does.
        WeightsError: it is no pipeline, or a file of ours is missing.
    """
    kind, parts = read_index(folder)
    network = (parts.get("transformer") or ["", kind])[1] or kind
    for file in filter(None, map(_ours, parts.values())):
        if not (folder / file).is_file():
            raise WeightsError(f"{folder} has no {file}", "train that part first: streamt2v train ... --out DIR")
    if _ours(parts.get("transformer")):
        network = sizes(folder, "transformer")["_class_name"]
    said = f"{name or folder} ({network}) cannot stream"
    if network not in BASES:
        raise ConfigError(said, f"transformers that can: {', '.join(BASES)}; --init may use it for the first frames")
    if (parts.get("transformer_2") or [None])[0] is not None:
        raise ConfigError(f"{said}: it has two transformers, for high and low noise", "use one with a single one")
    made = _layout(folder, _stamps(folder)).channels
    if (given := sizes(folder, "transformer").get("in_channels", made)) != made:
        raise ConfigError(
            f"{said}: it takes {given} channels, its latents have {made}", "use one that reads text alone"
        )
    return BASES[network]


def _pipeline(name: str, row: Mapping[str, Any]) -> Family:
    base = catalog.bases()[row["preset"]]
    return Family(
        name=name,
        title=row["what"],
        licence=row["licence"],
        preset=row["preset"],
        vocabulary="",
        components={},
        files=(),
        root=catalog.PACKAGE,
        builder=base.get("builder", "bases"),
        unread=tuple(base["unread"]),
        pipeline=name,
    )


@dataclass(frozen=True)
class Layout:
    """How a base packs a video: frames per latent, latent channels, pixels per latent cell, and what sides divide by.

    A clip of 1 + n frames_per_latent frames is packed into 1 + n latents: the first one holds one frame. Of its
    transformer: channels, latent cells along the shorter side of a token, and whether tokens have a time each.
    """

    frames_per_latent: int
    channels: int
    cell: int
    size_multiple: int
    width: int
    token: int
    timed: bool


def here(name: str) -> Path | None:
    """Return the folder of a pipeline where it need not be fetched, at least what describes it."""
    repository = catalog.pipelines().get(name, {}).get("repository", name.removeprefix("hub:"))
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else inventory.snapshot_of(repository)[0]


def layout(name: str) -> Layout:
    """Return how the base of a name packs a video: as listed while it is not here. Raises as `locate`."""
    row = catalog.pipelines().get(name, {})
    folder = here(name) or (None if "sizes" in row else locate(name, small=True))
    return Layout(**row["sizes"]) if folder is None else _layout(folder, _stamps(folder))


def _stamps(folder: Path) -> object:
    parts = (place(folder, part) for part in ("vae", "transformer"))
    return tuple(files.stamp(part if part.suffix == ".safetensors" else part / "config.json") for part in parts)


@lru_cache(maxsize=8)
def _layout(folder: Path, _seen: object) -> Layout:
    (kind, index), vae, network = read_index(folder), sizes(folder, "vae"), sizes(folder, "transformer")
    width = network.get("num_attention_heads", 0) * network.get("attention_head_dim", 0)
    if vae.get("_class_name") == "AutoencoderKL":  # of pictures
        cell = 2 ** (len(vae.get("block_out_channels", [64])) - 1)
        return Layout(1, vae.get("latent_channels", 4), cell, cell, network["width"], min(network["patch"]), False)
    if "latent_channels" in vae:  # of LTX
        halvings = 2 ** sum(vae["spatio_temporal_scaling"])
        cell = vae.get("spatial_compression_ratio") or vae["patch_size"] * halvings
        frames = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * halvings
        return Layout(frames, vae["latent_channels"], cell, cell, width, 1, True)
    cell, token = vae.get("scale_factor_spatial", 8), network.get("patch_size", (1, 2, 2))[1]
    side = cell * token * (4 if kind == "HeliosPyramidPipeline" else 1)  # which begins at a quarter of the size
    frames, channels = vae.get("scale_factor_temporal", 4), vae.get("z_dim", 16)
    return Layout(frames, channels, cell, side, width, token, bool(index.get("expand_timesteps")))


def values(name: str) -> dict[str, int]:
    """Return the number of parameters of the networks of a pipeline: as listed while it is not here."""
    row, folder = catalog.pipelines().get(name, {}), here(name)
    if folder is None:
        return dict(row.get("values", {}))
    return {part: count(folder, part) for part in ("transformer", "vae", "text_encoder")}


def count(folder: Path, part: str) -> int:
    """Count the parameters in the files of a network; of one that is not here yet, by the size in its index."""
    at = place(folder, part)
    if found := [at] if at.is_file() else sorted(at.glob("*.safetensors")):
        indices = (header.read_index(path)[1] for path in found)
        return sum(math.prod(row.shape) for index in indices for row in index.values())
    totals = (json.loads(path.read_text("utf-8"))["metadata"]["total_size"] for path in at.glob("*.index.json"))
    return int(sum(totals) // 2)


def features(preset: str) -> dict[str, float]:
    """Return what a plan counts with for the bases of a preset."""
    return dict(catalog.bases()[preset]["features"])
