"""Weights files: find them in `weights.toml`, check them, and load them strictly into the network they name.

A weights file is a safetensors file whose metadata says what it is: `format` ("streamt2v/1"), `class` (a name of
`NETWORKS`), `config` (the arguments of that class as JSON) and, for denoisers, `schedule` (the noise schedule as JSON).
Nothing else is trusted: a tensor that is missing, extra or of another shape is refused before it reaches a network.
Torch and the libraries are imported when a file is loaded, not with this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

from streamt2v import config, files
from streamt2v.errors import ConfigError, OutputError, WeightsError, signals_wait
from streamt2v.weights import home
from streamt2v.weights.home import Recorded

if TYPE_CHECKING:
    import torch

PACKAGE = Path(__file__).resolve().parent.parent
FORMAT = "streamt2v/1"
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 20_000
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_CLIP = "transformers.models.clip"
_CLIP_TEXT = (f"{_CLIP}.configuration_clip", "CLIPTextConfig")
# class name -> (module, class, module and name of its config class, None where the config is the keyword arguments)
NETWORKS: Mapping[str, tuple[str, str, tuple[str, str] | None]] = {
    "UNet3D": ("streamt2v.models.unet3d", "UNet3D", ("streamt2v.models.unet3d", "UNet3DConfig")),
    "ConditionalAttention": ("streamt2v.models.cam", "ConditionalAttention", ("streamt2v.models.cam", "CamConfig")),
    "AppearanceTokens": ("streamt2v.models.apm", "AppearanceTokens", None),
    "AutoencoderKL": ("diffusers.models.autoencoders.autoencoder_kl", "AutoencoderKL", None),
    "CLIPTextModel": (f"{_CLIP}.modeling_clip", "CLIPTextModel", _CLIP_TEXT),
    "CLIPTextModelWithProjection": (f"{_CLIP}.modeling_clip", "CLIPTextModelWithProjection", _CLIP_TEXT),
    "CLIPVisionModelWithProjection": (
        f"{_CLIP}.modeling_clip",
        "CLIPVisionModelWithProjection",
        (f"{_CLIP}.configuration_clip", "CLIPVisionConfig"),
    ),
}


@dataclass(frozen=True)
class WeightFile:
    """One file row of `weights.toml`: path relative to the family's root, licence, what it is, and what must lie there.

    `parts` are the real files by path: usually the file itself, several for a network that is split, none before the
    family was pulled. `source` is the published file that they were converted from. `tokens` is for tokenizers only:
    keyword arguments such as `pad_token` that their file does not carry; `tidy` says that texts are cleaned first.
    """

    path: str
    licence: str
    what: str
    parts: Mapping[str, Recorded]
    source: str = ""
    tokens: Mapping[str, str | int] = dataclasses.field(default_factory=dict)
    tidy: bool = False
    values: int = 0

    @property
    def num_values(self) -> int:
        """Numbers in the file, which are stored in 16 bit; as listed where nothing was pulled yet."""
        return sum(part.bytes for part in self.parts.values()) // 2 or self.values


@dataclass(frozen=True)
class Source:
    """One published file that a family is made from; `makes` are the paths of the files converted from it.

    Of the sources with a `choice`, one choice is enough; those without are always needed. Size, SHA-256 and revision
    are given only where they are known: what is not is recorded when the file is fetched for the first time.
    """

    repository: str
    path: str
    licence: str
    what: str
    makes: tuple[str, ...]
    choice: str = ""
    revision: str = ""
    bytes: int = 0
    sha256: str = ""

    @property
    def name(self) -> str:
        """Repository and path in one."""
        return f"{self.repository}/{self.path}"


@dataclass(frozen=True)
class Family:
    """A model family: which file plays which role ("stream.unet", "refine.vae", ...), its preset and its vocabulary.

    `root` is the package, or the weights home where the family is converted from published files (`sources`).
    """

    name: str
    title: str
    licence: str
    preset: str
    vocabulary: str
    components: Mapping[str, str]
    files: tuple[WeightFile, ...]
    root: Path
    sources: tuple[Source, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of all files of the family together, in bytes; 0 before it was pulled."""
        return sum(part.bytes for file in self.files for part in file.parts.values())

    def path(self, role: str) -> Path:
        """Absolute path of the file that plays `role`. Raises WeightsError when the family has no such role."""
        if role not in self.components:
            known = ", ".join(sorted(self.components))
            raise WeightsError(f"the model family {self.name!r} has no {role!r}", f"it has: {known}")
        return self.root / self.components[role]

    def file(self, role: str) -> WeightFile:
        """The row of the file that plays `role`; raises as `path` does."""
        wanted = self.path(role)
        return next(file for file in self.files if self.root / file.path == wanted)

    def has(self, role: str) -> bool:
        """Whether the family names a file for `role`; optional parts (such as APM) may be absent."""
        return role in self.components

    def sources_of(self, choice: str = "") -> tuple[Source, ...]:
        """What a pull needs: the sources without a choice, and those of one choice (by default the first).

        Raises:
            ConfigError: there is no such choice, or nothing to pull.
        """
        if not self.sources:
            raise ConfigError(f"the model {self.name!r} is part of streamt2v, there is nothing to pull")
        known = list(dict.fromkeys(source.choice for source in self.sources if source.choice))
        if choice and choice not in known:
            raise ConfigError(f"{self.name} has no source {choice!r}", config.nearest(choice, known))
        return tuple(source for source in self.sources if source.choice in ("", choice or known[0]))

    def vocabulary_path(self) -> Path | None:
        """Absolute path of the list of words that the family knows, or None when it takes any text."""
        return self.root / self.vocabulary if self.vocabulary else None


# ---------------------------------------------------------------------------------------------- the list of weights

_INSTALL = "install streamt2v again; after training, record the new files"


def _manifest(root: Path) -> Path:
    """`weights.toml` lies in the package folder of a wheel, and one level above it in a checkout."""
    inside = root / "weights.toml"
    return inside if inside.is_file() else root.parent / "weights.toml"


def _inside(root: Path, path: str) -> str:
    """Return `path` unchanged when it stays inside `root`; the list of weights may name no other place.

    The name is what counts: a user may link a folder of the weights home to a larger disk.
    """
    seen = PureWindowsPath(path)  # which takes both kinds of slashes for what they are
    if seen.anchor or ".." in seen.parts or "\0" in path:
        raise WeightsError(f"weights.toml names {path!r}, which lies outside {root}")
    return path


def _file(row: Mapping[str, Any], root: Path, recorded: Mapping[str, Any] | None) -> WeightFile:
    """A file row with what must lie under `root`: as the row says, or as was recorded when it was made."""
    own = {key: value for key, value in row.items() if key not in ("bytes", "sha256")}
    if "bytes" in row:
        return WeightFile(**own, parts={_inside(root, row["path"]): Recorded(row["bytes"], row["sha256"])})
    made = {"parts": {}} if recorded is None else recorded
    parts = {_inside(root, name): Recorded.from_json(part) for name, part in made["parts"].items()}
    return WeightFile(**own, parts=parts, source=made.get("source", ""))


def families(root: Path = PACKAGE) -> dict[str, Family]:
    """All model families that `weights.toml` lists, by name; `root` is the folder their files lie in.

    Raises:
        WeightsError: the list is missing, unreadable or of another schema.
    """
    manifest, stamps = _manifest(root), (files.stamp(_manifest(root)), files.stamp(home.record_path()))
    return dict(_families(root, manifest, home.path(), stamps))


@lru_cache(maxsize=8)
def _families(root: Path, manifest: Path, pulled: Path, _stamps: object) -> dict[str, Family]:
    if not manifest.is_file():
        raise WeightsError(f"the list of weights is missing: {manifest}", "install streamt2v again")
    try:
        raw = tomllib.loads(manifest.read_text("utf-8"))
        if raw["schema"] != 1:
            raise WeightsError(f"{manifest} has schema {raw['schema']}, this version reads 1", "update streamt2v")
        rows = {row["path"]: row for row in raw["files"]}
        found = {}
        for name, table in raw["families"].items():
            roles = config.flatten(table["components"])
            used = dict.fromkeys([*roles.values(), *filter(None, [table["vocabulary"]])])
            head = {key: table[key] for key in ("title", "licence", "preset", "vocabulary")}
            sources = tuple(Source(**{**row, "makes": tuple(row["makes"])}) for row in table.get("sources", ()))
            place = pulled if sources else root
            known = home.recorded("files") if sources else {}
            listed = tuple(_file(rows[path], place, known.get(path)) for path in used)
            if stray := {path for source in sources for path in source.makes}.difference(used):
                raise ValueError(f"{name} does not use {min(stray)!r}")
            found[name] = Family(name=name, components=roles, files=listed, root=place, sources=sources, **head)
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{manifest} cannot be used: {error}", "install streamt2v again") from error


def family(name: str, root: Path = PACKAGE) -> Family:
    """One family by name. Raises ConfigError that names the known ones, nearest first."""
    known = families(root)
    if name not in known:
        raise ConfigError(f"there is no model {name!r}", config.nearest(name, sorted(known)))
    return known[name]


def listed(name: str) -> Family | None:
    """The family of a name that `weights list` shows, None for a stage-1 model of others. Raises as `family` does."""
    known, others = families(), pipelines()
    if name not in known and name not in others:
        raise ConfigError(f"there is no model {name!r}", config.nearest(name, [*known, *others]))
    return known.get(name)


def default_family(root: Path = PACKAGE) -> str:
    """Name of the best family whose files are all here: `weights.toml` lists the best first. Else the last one."""
    known = families(root)
    complete = [name for name, listed in known.items() if not missing(listed)]
    return complete[0] if complete else list(known)[-1]


def pipelines(root: Path = PACKAGE) -> dict[str, dict[str, str]]:
    """Stage-1 models of others that `weights.toml` knows by name: repository, licence, what; revision where pinned."""
    rows: dict[str, dict[str, str]] = tomllib.loads(_manifest(root).read_text("utf-8"))["pipelines"]
    return rows


def snapshot_of(repository: str) -> tuple[Path | None, dict[Path, Recorded]]:
    """Folder of a fetched repository, and what its files must be; (None, {}) where it was never fetched."""
    rows = home.recorded("snapshots").items()
    row = next((row for request, row in rows if request.partition(" ")[0] == repository), None)
    if row is None:
        return None, {}
    folder = Path(row["folder"])
    return folder, {folder / name: Recorded.from_json(part) for name, part in row["files"].items()}


def folder_of(name: str) -> Path:
    """Folder of a name that `weights list` shows. Raises WeightsError where it was never fetched."""
    if (family := listed(name)) is not None:
        return family.root / name
    folder, _ = snapshot_of(pipelines()[name]["repository"])
    if folder is None:
        raise WeightsError(f"{name!r} is not here", f"fetch it with `streamt2v weights pull {name}`")
    return folder


def missing(chosen: Family) -> list[str]:
    """Cheap check: one sentence for each file of the family that is absent or of another size than recorded."""
    found = []
    for file in chosen.files:
        if not file.parts:
            found.append(f"{file.path} is not here")
        for name, part in file.parts.items():
            path = chosen.root / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif not part.has_size(path):
                found.append(f"{name} has {path.stat().st_size:,} bytes, {part.bytes:,} are recorded")
    return found


def is_absent(chosen: Family) -> bool:
    """Whether nothing of a family that must be pulled is here."""
    return bool(chosen.sources) and not any(
        (chosen.root / name).exists() for file in chosen.files for name in file.parts
    )


def describe_families() -> list[dict[str, Any]]:
    """One row per family, then per stage-1 model of others: name, state, bytes (0 where unknown), licence, what."""
    rows = [
        {"name": family.name, "state": _state(family), "bytes": family.num_bytes, "licence": family.licence,
         "what": family.title}
        for family in families().values()
    ]  # fmt: skip
    for name, row in pipelines().items():
        parts = snapshot_of(row["repository"])[1]
        here = [part.has_size(path) for path, part in parts.items()]
        size = sum(part.bytes for part in parts.values())
        state = "absent" if not any(here) else "ok" if all(here) else "incomplete"
        what = {"licence": row["licence"], "what": f"{row['what']} (first frames)"}
        rows.append({"name": name, "state": state, "bytes": size, **what})
    return rows


def describe_files(chosen: Family) -> list[dict[str, Any]]:
    """One row per file of a family, then one per published file it is made from: as `describe_families`."""
    rows = []
    for file in chosen.files:
        whole = bool(file.parts) and all(part.has_size(chosen.root / name) for name, part in file.parts.items())
        size = sum(part.bytes for part in file.parts.values())
        state = "ok" if whole else "incomplete" if file.parts else "absent"
        rows.append({"name": file.path, "state": state, "bytes": size, "licence": file.licence, "what": file.what})
    known = home.recorded("sources") if chosen.sources else {}
    for source in chosen.sources:
        size = source.bytes or known.get(source.name, {}).get("bytes", 0)
        what = f"{source.what} (--source {source.choice})" if source.choice else source.what
        row = {"name": source.name, "state": "source", "bytes": size, "licence": source.licence, "what": what}
        rows.append(row)
    return rows


def _state(chosen: Family) -> str:
    if is_absent(chosen):
        return "absent"
    return "incomplete" if missing(chosen) else "ok"


def require(chosen: Family) -> None:
    """Refuse a family whose files are not all here. Raises WeightsError naming the first that is not."""
    if is_absent(chosen):
        pull = f"fetch them with `streamt2v weights pull {chosen.name}`, or use --model demo"
        raise WeightsError(f"the weights of {chosen.name!r} are not here", pull)
    _refuse(chosen, missing(chosen))


def verify(chosen: Family) -> None:
    """Check size and SHA-256 of every file of the family. Raises WeightsError naming the first that differs."""
    require(chosen)
    found = {file.path: {name: Recorded.of(chosen.root / name) for name in file.parts} for file in chosen.files}
    parts = [(name, part, found[file.path][name]) for file in chosen.files for name, part in file.parts.items()]
    _refuse(chosen, [f"{name} is damaged" for name, part, now in parts if now.sha256 != part.sha256])
    if chosen.sources:
        with contextlib.suppress(OutputError):  # where nothing can be written, later looks hash once more
            home.remember("files", {file.path: made_from(file.source, found[file.path]) for file in chosen.files})


def verify_snapshot(name: str) -> int:
    """Check every file of a stage-1 model of others; return how many. Raises WeightsError naming one that differs."""
    folder_of(name)
    _, parts = snapshot_of(pipelines()[name]["repository"])
    for path, part in parts.items():
        if not path.is_file() or home.sha256_of(path) != part.sha256:
            raise WeightsError(f"{path} is not as recorded", f"remove it, then `streamt2v weights pull {name}`")
    return len(parts)


def made_from(source: str, parts: Mapping[str, Recorded]) -> dict[str, Any]:
    """The row of one converted file in the record of the weights home."""
    return {"source": source, "parts": {name: part.to_json() for name, part in parts.items()}}


def _refuse(chosen: Family, problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        message = f"the weights of {chosen.name!r} are not as recorded: {problems[0]}{more}"
        pull = f"run `streamt2v weights pull {chosen.name}`; it replaces what is missing, delete first what is damaged"
        raise WeightsError(message, pull if chosen.sources else _INSTALL)


def record(root: Path = PACKAGE) -> list[str]:
    """Write size and SHA-256 of the files that are present into `weights.toml`; returns the paths whose row changed.

    Everything above the first `[[files]]` row is kept as it stands; rows of absent files keep what they say.
    """
    manifest = _manifest(root)
    text = manifest.read_text("utf-8")
    rows = tomllib.loads(text)["files"]
    changed = []
    for row in rows:
        path = root / _inside(root, row["path"])
        if "bytes" in row and path.is_file():
            new = {"bytes": path.stat().st_size, "sha256": home.sha256_of(path)}
            if new != {key: row[key] for key in new}:
                changed.append(row["path"])
            row |= new
    head = text.partition("[[files]]")[0]
    body = "\n".join("[[files]]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in row.items()) for row in rows)
    if changed:
        files.write_bytes(manifest, (head + body).encode())
    return changed


def _toml(value: str | int | Mapping[str, str | int]) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)  # TOML's basic strings and integers are JSON's


# ------------------------------------------------------------------------------------------------------- one file


class Row(NamedTuple):
    """One tensor in the header of a safetensors file; `start` is its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Row]]:
    """Metadata and tensors by name of any safetensors file; sizes are checked against the file's.

    Raises:
        WeightsError: the file is absent, cut short or no safetensors file.
    """
    hint = "run `streamt2v weights verify`"
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= MAX_HEADER_BYTES:
                raise WeightsError(f"{path} is not a safetensors file", hint)
            raw = stream.read(length)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}", hint) from error
    if len(raw) < length:
        raise WeightsError(f"{path} is cut short: {size:,} bytes, its header alone needs {length + 8:,}", hint)
    try:
        table = json.loads(raw)
        metadata = {str(key): str(value) for key, value in table.pop("__metadata__", {}).items()}
        places = {name: tuple(map(int, row["data_offsets"])) for name, row in table.items()}
        index = {
            name: Row(row["dtype"], tuple(map(int, row["shape"])), 8 + length + places[name][0])
            for name, row in table.items()
        }
        sizes = {name: ITEM_BYTES[row.dtype] * math.prod(row.shape) for name, row in index.items()}
        sound = all(0 <= start <= stop == start + sizes[name] for name, (start, stop) in places.items())
        ends = max((stop for _, stop in places.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise WeightsError(f"{path} is not a safetensors file: its header is damaged", hint) from error
    expected = 8 + length + ends
    if size != expected:
        problem = "is cut short" if size < expected else "has bytes after its end"
        raise WeightsError(f"{path} {problem}: {size:,} bytes, its header says {expected:,}", hint)
    if not sound or sum(sizes.values()) != ends or len(index) > MAX_TENSORS:
        raise WeightsError(f"{path} is damaged: shapes and sizes in its header disagree", hint)
    return metadata, index


def _read_metadata(path: Path, metadata: Mapping[str, str]) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "none")
        raise WeightsError(f"{path} is not a weights file of streamt2v: format {found!r}, expected {FORMAT!r}")
    try:
        config = json.loads(metadata["config"])
        schedule = json.loads(metadata["schedule"]) if "schedule" in metadata else None
        if not isinstance(config, dict) or not isinstance(schedule, dict | None):
            raise ValueError("config and schedule must be tables")
        return metadata["class"], config, schedule
    except (KeyError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has damaged metadata: {error}") from error


def shard_index(path: Path) -> Path:
    """Name of the list of parts of a weights file that is split."""
    return path.with_name(f"{path.name}.index.json")


def _read_parts(path: Path) -> tuple[dict[str, str], dict[Path, dict[str, Row]]]:
    """Metadata of a weights file, and the tensors of each part: the file itself, or what its list of parts names.

    The list of parts is trusted for nothing but names: every part says by itself what it belongs to and holds.
    """
    listed = shard_index(path)
    if path.is_file() or not listed.is_file():
        metadata, index = read_index(path)
        return metadata, {path: index}
    try:
        names = sorted(set(json.loads(listed.read_bytes())["weight_map"].values()))
        plain = bool(names) and all(name == Path(name).name and (path.parent / name) != path for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{listed} is damaged: {error}", "run `streamt2v weights verify`") from error
    if not plain:
        raise WeightsError(f"{listed} names files outside its folder, or none", "run `streamt2v weights verify`")
    indices = {path.parent / name: read_index(path.parent / name) for name in names}
    metadata = indices[path.parent / names[0]][0]
    seen: set[str] = set()
    for part, (own, index) in indices.items():
        if own != metadata or not seen.isdisjoint(index):
            raise WeightsError(f"{part} belongs to another file than {path.parent / names[0]}", "convert both again")
        seen.update(index)
    return metadata, {part: index for part, (_, index) in indices.items()}


def read_header(path: Path) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Class name, config and noise schedule (None when it has none) of a weights file, split or whole; without torch.

    Raises:
        WeightsError: the file is absent, cut short, no safetensors file, or not one of ours.
    """
    return _header(path, (files.stamp(path), files.stamp(shard_index(path))))


@lru_cache(maxsize=64)
def _header(path: Path, _stamps: object) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    return _read_metadata(path, _read_parts(path)[0])


def config_of(module: torch.nn.Module) -> dict[str, Any]:
    """The arguments that build `module` again: its dataclass, or the public part of a library's config."""
    config: Any = module.config
    if hasattr(config, "to_diff_dict"):  # transformers: without what every config of the library carries
        from transformers import PretrainedConfig

        usual = PretrainedConfig().to_dict() | {"model_type": config.model_type, "architectures": config.architectures}
        return {key: value for key, value in config.to_dict().items() if usual.get(key, config) != value}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}  # diffusers


def save_module(path: Path, module: torch.nn.Module, schedule: Mapping[str, Any] | None = None) -> None:
    """Write a network in 16 bit with all that is needed to build it again; the file appears whole or not at all.

    Args:
        path: the safetensors file to write; its folder is made.
        module: a network of one of the classes of `NETWORKS`.
        schedule: JSON-able noise schedule of a denoiser.

    Raises:
        WeightsError: the class is unknown, its `config` describes another network, or a value is not finite in
            16 bit.
        OutputError: the file cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    name = type(module).__name__
    _network(name, path)
    tensors = {}
    for key, value in module.state_dict().items():
        kind = torch.float16 if value.is_floating_point() else value.dtype
        tensor = value.detach().to("cpu", kind).contiguous().clone()
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{key} of {name} has values that are not finite in 16 bit: not saved")
        tensors[key] = tensor
    arguments = config_of(module)
    again = build(path, name, json.loads(json.dumps(arguments)))
    _check_keys(path, name, shapes(again), shapes(module))
    metadata = metadata_of(name, arguments, schedule)
    files.make_directory(path.parent)
    with files.replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
            temporary.chmod(0o644)  # the library makes files that only their owner may read
        except SafetensorError as error:  # what the library makes of a full disk
            raise OutputError(f"cannot write {path}: {error}", "free some space") from error


def metadata_of(name: str, config: Mapping[str, Any], schedule: Mapping[str, Any] | None) -> dict[str, str]:
    """What a weights file says of itself."""
    metadata = {"format": FORMAT, "class": name, "config": json.dumps(dict(config))}
    return metadata if schedule is None else metadata | {"schedule": json.dumps(dict(schedule))}


def _network(name: str, path: Path) -> tuple[str, str, tuple[str, str] | None]:
    if name not in NETWORKS:
        raise WeightsError(f"{path} holds a network of unknown class {name!r}", f"known: {', '.join(NETWORKS)}")
    return NETWORKS[name]


def quiet(package: str) -> None:
    """Turn off what a model library would print while loading: our own checks are stricter than its warnings."""
    logging = importlib.import_module(f"{package}.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def build(path: Path, name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """Construct the network without memory for its parameters; constant buffers are computed as usual.

    A plain meta device would also swallow buffers that no file stores (position numbers, frequency tables). Every layer
    takes the memory of its parameters from `torch.empty`, so sending only that call to the meta device keeps them.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    random = (torch.Tensor.normal_, torch.Tensor.uniform_)

    class ParametersOnMeta(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            named = dict(kwargs or {})
            if func in random or getattr(func, "__module__", "") == "torch.nn.init":
                filled = args[0] if args else named["tensor"]
                if filled.is_meta:  # there is nothing to fill, and torch would import sympy (1.4 s) to find that out
                    return filled
            if func is torch.empty and named.get("device") is None:
                named["device"] = "meta"
            return func(*args, **named)

    module_name, class_name, config_class = _network(name, path)
    package = module_name.split(".")[0]
    if package != "streamt2v":
        quiet(package)
    network = getattr(importlib.import_module(module_name), class_name)
    try:
        if config_class is None:
            arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
            with ParametersOnMeta():
                return typing.cast("torch.nn.Module", network(**arguments))
        built = getattr(importlib.import_module(config_class[0]), config_class[1]).from_dict(dict(config))
        with ParametersOnMeta():
            return typing.cast("torch.nn.Module", network(built))
    except (TypeError, ValueError, KeyError, ConfigError) as error:
        raise WeightsError(f"{path} does not describe a {name}: {error}") from error


def load_module(path: Path, device: str | torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Build the network that a weights file names and give it exactly the file's tensors.

    Returns the network in evaluation mode with gradients off (training switches both back on).

    Args:
        path: a file written by `save_module`, or the name that it would have if it were not split.
        device: where the tensors go.
        dtype: type of all floating-point tensors.

    Raises:
        WeightsError: the file is absent, damaged, of an unknown class, or its tensors are not exactly the network's.
    """
    metadata, parts = _read_parts(path)
    name, config, _ = _read_metadata(path, metadata)
    module = build(path, name, config)
    wanted = shapes(module)
    _check_keys(path, name, wanted, {key: row.shape for index in parts.values() for key, row in index.items()})

    from safetensors import SafetensorError, safe_open

    converted: dict[str, torch.Tensor] = {}
    for part, index in parts.items():
        try:
            with safe_open(part, "pt", str(device)) as file:
                for key in index:
                    with signals_wait():  # inside torch one would become a ValueError
                        tensor = file.get_tensor(key)
                    converted[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{part} cannot be read: {error}", "run `streamt2v weights verify`") from error
    return furnish(module, {key: converted[key] for key in wanted}, device)


def furnish(
    module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], device: str | torch.device
) -> torch.nn.Module:
    """Give a network of `build` its tensors, in evaluation mode with gradients off.

    Raises:
        WeightsError: a buffer is left without values.
    """
    module.load_state_dict(tensors, strict=True, assign=True)
    for key, buffer in module.named_buffers():
        if buffer.is_meta:
            name = type(module).__name__
            raise WeightsError(f"{name} has a buffer {key!r} that no file fills: this is a bug of the network")
    return module.to(device).requires_grad_(False).eval()


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a network."""
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def _check_keys(
    path: Path, name: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    hint = "the file belongs to another version or was damaged: run `streamt2v weights verify`"
    for key, shape in wanted.items():
        if key not in found:
            raise WeightsError(f"{path} lacks the tensor {key!r} of {name}", hint)
        if found[key] != shape:
            raise WeightsError(f"{path}: {key!r} has shape {list(found[key])}, {name} needs {list(shape)}", hint)
    for key in found:
        if key not in wanted:
            raise WeightsError(f"{path} has a tensor {key!r} that {name} does not know", hint)


def load_tokenizer(path: Path, tokens: Mapping[str, str | int] | None = None) -> Any:
    """A fast tokenizer from its `tokenizer.json`; `tokens` names what the file does not carry (pad, begin, end).

    Raises:
        WeightsError: the file is absent or no tokenizer.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing", "install streamt2v again")
    quiet("transformers")
    import transformers

    fast: Any = transformers.PreTrainedTokenizerFast  # the class itself has another name in every major version
    try:
        return fast(tokenizer_file=str(path), **dict(tokens or {}))
    except Exception as error:  # the tokenizers library raises a bare Exception for a file that it cannot read
        raise WeightsError(f"{path} is no tokenizer: {error}", "run `streamt2v weights verify`") from error


def load(chosen: Family, role: str, device: str | torch.device, dtype: torch.dtype) -> Any:
    """The network (or, for a ".tokenizer" role, the tokenizer) that plays `role` in a family.

    Raises:
        WeightsError: the family has no such role, the file's SHA-256 is not the recorded one, or it does not load
            (see `load_module`).
    """
    path = chosen.path(role)
    row = chosen.file(role)
    for name, part in row.parts.items():
        if (chosen.root / name).is_file() and not part.matches(chosen.root / name):
            _refuse(chosen, [f"{name} is damaged: its SHA-256 is not the recorded one"])
    return load_tokenizer(path, row.tokens) if path.suffix == ".json" else load_module(path, device, dtype)
