"""The catalog, `weights.toml`: model families with their files, roles and sources; third-party pipelines."""

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any

from streamt2v import config, files
from streamt2v.errors import ConfigError, WeightsError
from streamt2v.weights import home
from streamt2v.weights.home import Recorded

PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class WeightFile:
    """A file of a family: its path relative to the family's root, its licence, what it is, and what it must contain.

    `parts` are the actual files by path: usually the file itself, several for a split network, none until the family is
    pulled. `source` is the published file they were converted from. `pad` and `tidy` are for tokenizers: the token
    that fills short texts up, and whether prompts are cleaned first. `values` is the listed number of parameters.
    """

    path: str
    licence: str
    what: str
    parts: Mapping[str, Recorded]
    source: str = ""
    pad: str = ""
    tidy: bool = False
    values: int = 0

    @property
    def num_values(self) -> int:
        """Number of parameters, stored in 16 bit; the listed number before the family is pulled."""
        return sum(part.bytes for part in self.parts.values()) // 2 or self.values


@dataclass(frozen=True)
class Source:
    """A published file that a family is made from; `makes` are the paths of the files converted from it.

    Sources without a `choice` are always needed; of the others, those of one choice are enough. Size, SHA-256 and
    revision are listed if known, else recorded at the first download.
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
        """Repository and path."""
        return f"{self.repository}/{self.path}"


@dataclass(frozen=True)
class Family:
    """A model family: which file plays which role ("stream.unet", "refine.vae", ...), its preset and its vocabulary.

    `root` is the package, or the weights home for a family that is converted from published files (`sources`);
    `builder` names what turns the files into callables, see `families.makers`; `unread` are settings, or beginnings of
    their names, that it has no use for; `pipeline` is the name of the pipeline that it is, which has no files here.
    `footage` names the family that refines videos from elsewhere in its place; one of these makes no frames itself
    where `refines_only` says so.
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
    builder: str = "streamingt2v"
    unread: tuple[str, ...] = ()
    pipeline: str = ""
    footage: str = ""
    refines_only: bool = False

    @property
    def num_bytes(self) -> int:
        """Total size of the files, in bytes; 0 before the family was pulled."""
        return sum(part.bytes for file in self.files for part in file.parts.values())

    def path(self, role: str) -> Path:
        """Absolute path of the file that plays `role`. Raises WeightsError when the family has no such role."""
        if role not in self.components:
            known = ", ".join(sorted(self.components))
            raise WeightsError(f"the model family {self.name!r} has no {role!r}", f"it has: {known}")
        return self.root / self.components[role]

    def file(self, role: str) -> WeightFile:
        """The file that plays `role`; raises as `path` does."""
        wanted = self.path(role)
        return next(file for file in self.files if self.root / file.path == wanted)

    def has(self, role: str) -> bool:
        """Whether the family has a file for `role`; some parts, such as APM, are optional."""
        return role in self.components

    def used(self, stages: Collection[str] | None = None) -> tuple[WeightFile, ...]:
        """The files that some stages use ("initialize", "stream", "refine"), by default all."""
        roles = self.components.items()
        paths = {path for role, path in roles if role.partition(".")[0] in (stages or ())} | {self.vocabulary}
        return tuple(file for file in self.files if stages is None or file.path in paths)

    @property
    def usual_stages(self) -> tuple[str, ...] | None:
        """The stages that its preset uses its files for; None means all. A third-party refiner needs none of them."""
        own = not self.preset or config.preset(self.preset).get("refine.model", "own") == "own"
        return None if own else ("initialize", "stream")

    @property
    def reads_text(self) -> bool:
        """Whether the streaming stage follows a prompt: a network of ours without a text encoder does not."""
        return self.has("stream.text") or not self.has("stream.unet")

    def sources_of(self, choice: str = "", stages: Collection[str] | None = None) -> tuple[Source, ...]:
        """Return what a pull needs: the sources without a choice, and those of one choice, by default the first.

        Of these only what some stages use, by default all.

        Raises:
            ConfigError: there is no such choice, or nothing to pull.
        """
        if not self.sources:
            raise ConfigError(f"the model {self.name!r} is part of streamt2v, there is nothing to pull")
        known = list(dict.fromkeys(source.choice for source in self.sources if source.choice))
        if choice and choice not in known:
            raise ConfigError(f"{self.name} has no source {choice!r}", config.nearest(choice, known))
        taken = choice or next(iter(known), "")
        wanted = {file.path for file in self.used(stages)}
        found = (source for source in self.sources if source.choice in ("", taken))
        return tuple(source for source in found if not wanted.isdisjoint(source.makes))

    def vocabulary_path(self) -> Path | None:
        """Absolute path of the list of words that the family knows, or None if it takes any text."""
        return self.root / self.vocabulary if self.vocabulary else None


@lru_cache(maxsize=8)
def _manifest(root: Path) -> Path:
    """Return the path of `weights.toml`: in the package folder of a wheel, one level above it in a checkout."""
    inside = root / "weights.toml"
    return inside if inside.is_file() else root.parent / "weights.toml"


def _inside(root: Path, path: str) -> str:
    """Return `path` if it stays inside `root`; the catalog may name no other place.

    Only the name is checked: users may link a folder of the weights home to a larger disk.
    """
    seen = PureWindowsPath(path)  # splits at both kinds of slashes
    if seen.anchor or ".." in seen.parts or "\0" in path:
        raise WeightsError(f"weights.toml names {path!r}, which lies outside {root}")
    return path


def _file(row: Mapping[str, Any], root: Path, recorded: Mapping[str, Any] | None) -> WeightFile:
    """Return a file with its parts under `root`, by its row or as recorded when it was converted."""
    own = {key: value for key, value in row.items() if key not in ("bytes", "sha256")}
    if "bytes" in row:
        return WeightFile(**own, parts={_inside(root, row["path"]): Recorded(row["bytes"], row["sha256"])})
    made = {"parts": {}} if recorded is None else recorded
    parts = {_inside(root, name): Recorded.from_json(part) for name, part in made["parts"].items()}
    return WeightFile(**own, parts=parts, source=made.get("source", ""))


def families(root: Path = PACKAGE) -> dict[str, Family]:
    """Return all model families of `weights.toml` by name, best first; `root` is the folder of the bundled files.

    Raises:
        WeightsError: the list is missing, unreadable or of another schema.
    """
    return _tables(root)["families"]


def helpers(root: Path = PACKAGE) -> dict[str, Family]:
    """Return the networks that work beside any family by name, best first. Raises as `families`."""
    return _tables(root)["helpers"]


def _tables(root: Path) -> dict[str, dict[str, Family]]:
    manifest, stamps = _manifest(root), (files.stamp(_manifest(root)), files.stamp(home.record_path()))
    return {kind: dict(table) for kind, table in _read(root, manifest, home.path(), stamps).items()}


@lru_cache(maxsize=8)
def _read(root: Path, manifest: Path, pulled: Path, _stamps: object) -> dict[str, dict[str, Family]]:
    if not manifest.is_file():
        raise WeightsError(f"the list of weights is missing: {manifest}", "install streamt2v again")
    try:
        raw = tomllib.loads(manifest.read_text("utf-8"))
        if raw["schema"] != 1:
            raise WeightsError(f"{manifest} has schema {raw['schema']}, this version reads 1", "update streamt2v")
        rows = {row["path"]: row for row in raw["files"]}
        found: dict[str, dict[str, Family]] = {"families": {}, "helpers": {}}
        tables = [(kind, *row) for kind in found for row in raw.get(kind, {}).items()]
        for kind, name, table in tables:
            roles = config.flatten(table["components"])
            used = dict.fromkeys([*roles.values(), *filter(None, [table["vocabulary"]])])
            known_keys = ("title", "licence", "preset", "vocabulary", "builder", "footage", "refines_only")
            head = {key: table[key] for key in known_keys if key in table}
            head["unread"] = tuple(table.get("unread", ()))
            sources = tuple(Source(**{**row, "makes": tuple(row["makes"])}) for row in table.get("sources", ()))
            folder = pulled if sources else root
            known = home.recorded("files") if sources else {}
            listed = tuple(_file(rows[path], folder, known.get(path)) for path in used)
            if stray := {path for source in sources for path in source.makes}.difference(used):
                raise ValueError(f"{name} does not use {min(stray)!r}")
            found[kind][name] = Family(name=name, components=roles, files=listed, root=folder, sources=sources, **head)
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{manifest} cannot be used: {error}", "install streamt2v again") from error


def family(name: str, root: Path = PACKAGE, also: Sequence[str] = ()) -> Family:
    """Return a family by name. Raises ConfigError naming the known ones, nearest first, and what else there may be."""
    known = families(root)
    if name not in known:
        raise ConfigError(f"there is no model {name!r}", config.nearest(name, [*sorted(known), *also]))
    return known[name]


def listed(name: str) -> Family | None:
    """Return the family or helper of a name from `weights list`; None for a third-party pipeline.

    Raises:
        ConfigError: there is none of that name.
    """
    known, others = families() | helpers(), pipelines()
    if name not in known and name not in others:
        raise ConfigError(f"there is no model {name!r}", config.nearest(name, [*known, *others]))
    return known.get(name)


def pipelines(root: Path = PACKAGE) -> dict[str, dict[str, Any]]:
    """Return the third-party pipelines by name: repository, licence, what; revision if pinned.

    Those with a `preset` are model families too; the others make first frames only.
    """
    manifest = _manifest(root)
    return dict(_rows(manifest, "pipelines", files.stamp(manifest)))


def bases(root: Path = PACKAGE) -> dict[str, dict[str, Any]]:
    """Return the kinds of pipelines that can stream, by preset: builder, features, settings that they leave unread."""
    manifest = _manifest(root)
    return dict(_rows(manifest, "bases", files.stamp(manifest)))


@lru_cache(maxsize=8)
def _rows(manifest: Path, kind: str, _stamp: object) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = tomllib.loads(manifest.read_text("utf-8"))[kind]
    return rows


def record(root: Path = PACKAGE) -> list[str]:
    """Write size and SHA-256 of the bundled files into `weights.toml`; return the paths whose row changed."""
    manifest = _manifest(root)
    text = manifest.read_text("utf-8")
    changed = []
    for row in tomllib.loads(text)["files"]:
        path = root / _inside(root, row["path"])
        if "bytes" in row and path.is_file():
            now = Recorded.of(path)
            if (now.bytes, now.sha256) != (row["bytes"], row["sha256"]):
                changed.append(row["path"])
                before, place, after = text.partition(f'[[files]]\npath = "{row["path"]}"\n')
                after = after.replace(f"bytes = {row['bytes']}\n", f"bytes = {now.bytes}\n", 1)
                after = after.replace(f'sha256 = "{row["sha256"]}"', f'sha256 = "{now.sha256}"', 1)
                text = before + place + after
    if changed:
        files.write_bytes(manifest, text.encode())
    return changed
