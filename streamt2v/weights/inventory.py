"""Which weights are installed, and whether they are as recorded; the tables behind `weights list`."""

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamt2v import config
from streamt2v.errors import ConfigError, OutputError, WeightsError
from streamt2v.weights import catalog, home
from streamt2v.weights.catalog import Family, WeightFile
from streamt2v.weights.home import Recorded

MAX_CPU_VALUES = 500_000_000  # parameters of a family; the published one has 5 billion, the demo 20 million


def missing(family: Family, stages: Collection[str] | None = None) -> list[str]:
    """Return a sentence for each file of a family that is missing or not of the recorded size (a cheap check).

    Only files that some stages use are asked for, by default all.
    """
    found = []
    for file in family.used(stages):
        if not file.parts:
            found.append(f"{file.path} is not here")
        for name, part in file.parts.items():
            path = family.root / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif not part.has_size(path):
                found.append(f"{name} has {path.stat().st_size:,} bytes instead of {part.bytes:,}")
    return found


def is_absent(family: Family) -> bool:
    """Return whether a family has to be pulled and nothing of it is here."""
    parts = [family.root / name for file in family.files for name in file.parts]
    return bool(family.sources) and not any(path.exists() for path in parts)


def fits(family: Family, kind: str) -> bool:
    """Return whether a run takes minutes, not days, on a kind of device: CPUs need small networks."""
    return kind != "cpu" or sum(file.num_values for file in family.files) <= MAX_CPU_VALUES


def default_family(kind: str | None = None, root: Path = catalog.PACKAGE) -> str:
    """Return the name of the best family that is installed and fits a kind of device; None means any device.

    `weights.toml` lists the best first. If none is usable it is the last one, whose check then says what is wrong.
    """
    known = catalog.families(root)
    known = {name: family for name, family in known.items() if not family.refines_only}
    here = {name: family for name, family in known.items() if not missing(family, family.usual_stages)}
    usable = [name for name, family in here.items() if kind is None or fits(family, kind)]
    return usable[0] if usable else list(known)[-1]


def require(family: Family, stages: Collection[str] | None = None) -> None:
    """Raise WeightsError if not all files that some stages use are here, by default all; the first is named."""
    problems = missing(family, stages)
    if problems and is_absent(family):
        hint = f"fetch them with `streamt2v weights pull {family.name}`"
        hint += ", or use --model demo" if family.name in catalog.families() else ""
        raise WeightsError(f"the weights of {family.name!r} are not here", hint)
    unusual = family.usual_stages is not None and "refine" in (stages or ())
    _refuse(family, problems, " --refiner own" if unusual else "")


def interpolator(name: str = "") -> Family:
    """Return the network of a name that interpolates; without one the best that is installed, else the bundled one.

    Raises:
        ConfigError: there is none of that name.
    """
    known = {key: family for key, family in catalog.helpers().items() if family.has("interpolate.flow")}
    if name and name not in known:
        raise ConfigError(f"there is no network {name!r} that interpolates", config.nearest(name, list(known)))
    here = [family for family in known.values() if not missing(family)]
    return known[name] if name else [*here, *known.values()][0 if here else -1]


def require_unchanged(family: Family, file: WeightFile) -> None:
    """Raise WeightsError if a file was damaged or replaced since it was recorded."""
    found = {name: family.root / name for name in file.parts if (family.root / name).is_file()}
    changed = (name for name, path in found.items() if not file.parts[name].matches(path))
    _refuse(family, [f"{name} is damaged: its SHA-256 is not the recorded one" for name in changed])


def verify(family: Family) -> None:
    """Check size and SHA-256 of every file of a family that is here. Raises WeightsError naming the first that differs.

    What its preset does not use need not be here.
    """
    require(family, family.usual_stages)
    files = [file for file in family.files if all((family.root / name).is_file() for name in file.parts)]
    found = {file.path: {name: Recorded.of(family.root / name) for name in file.parts} for file in files}
    parts = [(name, part, found[file.path][name]) for file in files for name, part in file.parts.items()]
    _refuse(family, [f"{name} is damaged" for name, part, now in parts if now.sha256 != part.sha256])
    if family.sources:
        with contextlib.suppress(OutputError):  # without a writable home, hash again next time
            home.remember(
                "files", {file.path: made_from(file.source, found[file.path]) for file in files if file.parts}
            )


def made_from(source: str, parts: Mapping[str, Recorded]) -> dict[str, Any]:
    """Return the row of a converted file for the record of the weights home."""
    return {"source": source, "parts": {name: part.to_json() for name, part in parts.items()}}


def _refuse(family: Family, problems: list[str], option: str = "") -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        hint = "install streamt2v again; after training, record the new files"
        if family.sources:
            hint = f"delete what is damaged, then run `streamt2v weights pull {family.name}{option}`"
        raise WeightsError(f"the weights of {family.name!r} are not as recorded: {problems[0]}{more}", hint)


def snapshot_of(repository: str) -> tuple[Path | None, dict[Path, Recorded]]:
    """Return the folder of a fetched repository and what its files must be; (None, {}) if it was never fetched."""
    rows = home.recorded("snapshots").items()
    row = next((row for request, row in rows if request.partition(" ")[0] == repository), None)
    if row is None:
        return None, {}
    folder = Path(row["folder"])
    return folder, {folder / name: Recorded.from_json(part) for name, part in row["files"].items()}


def contents(folder: Path, suffixes: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 by name of the files with these endings in a pipeline's folder and its subfolders.

    For a fetched pipeline the record counts, as other programs may add to the shared cache. Any other folder is hashed
    once and remembered by path.

    Raises:
        WeightsError: a file cannot be read.
    """
    fetched = [row["files"] for row in home.recorded("snapshots").values() if row["folder"] == str(folder)]
    if fetched:
        return {name: part["sha256"] for row in fetched for name, part in row.items() if name.endswith(tuple(suffixes))}
    # Not rglob, which skips linked folders: a part may lie on another disk.
    paths = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix in suffixes]
    found = {path.relative_to(folder).as_posix(): path for path in paths}
    place = str(folder.absolute())
    known = home.recorded("folders").get(place, {"files": {}})["files"]
    before = {name: Recorded.from_json(known[name]) for name in found if name in known}
    try:
        now = {name: before[name].now(path) if name in before else Recorded.of(path) for name, path in found.items()}
    except OSError as error:
        raise WeightsError(f"{error.filename} cannot be read: {error.strerror}") from error
    if now != before:
        with contextlib.suppress(OutputError):
            home.remember("folders", {place: {"files": {name: part.to_json() for name, part in now.items()}}})
    return {name: part.sha256 for name, part in now.items()}


def folder_of(name: str) -> Path:
    """Return the folder of a name from `weights list`. Raises WeightsError if it was never fetched."""
    if (family := catalog.listed(name)) is not None:
        return family.root / Path(family.files[0].path).parts[0]
    folder, _ = snapshot_of(catalog.pipelines()[name]["repository"])
    if folder is None:
        raise WeightsError(f"{name!r} is not here", f"fetch it with `streamt2v weights pull {name}`")
    return folder


def verify_snapshot(name: str) -> int:
    """Check all files of a third-party pipeline; return their number. Raises WeightsError naming one that differs."""
    folder_of(name)
    _, parts = snapshot_of(catalog.pipelines()[name]["repository"])
    for path, part in parts.items():
        if not path.is_file() or home.sha256_of(path) != part.sha256:
            raise WeightsError(f"{path} is not as recorded", f"remove it, then `streamt2v weights pull {name}`")
    return len(parts)


def describe_families() -> list[dict[str, Any]]:
    """Return a row per family, then per third-party pipeline: name, state, bytes (0 if unknown), licence, what."""
    rows = []
    for family in (catalog.families() | catalog.helpers()).values():
        state = "absent" if is_absent(family) else "incomplete" if missing(family, family.usual_stages) else "ok"
        origin = ", ".join(dict.fromkeys(source.repository for source in family.sources)) or "inside the package"
        size = family.num_bytes or 2 * sum(file.num_values for file in family.files)
        rows.append(_row(family.name, state, size, family.licence, family.title) | {"origin": origin})
    for name, listed in catalog.pipelines().items():
        parts = snapshot_of(listed["repository"])[1]
        here = [part.has_size(path) for path, part in parts.items()]
        state = "absent" if not any(here) else "ok" if all(here) else "incomplete"
        size = _size(parts.values()) or 2 * sum(listed.get("values", {}).values())
        what = listed["what"] if "preset" in listed else f"{listed['what']} ({listed.get('use', 'first frames')})"
        row = _row(name, state, size, listed["licence"], what)
        rows.append(row | {"origin": listed["repository"]})
    return rows


def describe_snapshot(name: str) -> list[dict[str, Any]]:
    """Return a row per file of a third-party pipeline as in `describe_families`, or one for all while it is absent."""
    listed = catalog.pipelines()[name]
    folder, parts = snapshot_of(listed["repository"])
    files = [
        _row(
            str(path.relative_to(folder)),
            "ok" if part.has_size(path) else "incomplete",
            part.bytes,
            listed["licence"],
            "",
        )
        for path, part in parts.items()
        if folder is not None
    ]
    return files or [row for row in describe_families() if row["name"] == name]


def describe_files(family: Family) -> list[dict[str, Any]]:
    """Return a row per file of a family, then per published file it is made from, as in `describe_families`."""
    rows = []
    for file in family.files:
        whole = all(part.has_size(family.root / name) for name, part in file.parts.items())
        state = "absent" if not file.parts else "ok" if whole else "incomplete"
        rows.append(_row(file.path, state, _size(file.parts.values()), file.licence, file.what))
    known = home.recorded("sources") if family.sources else {}
    for source in family.sources:
        size = source.bytes or known.get(source.name, {}).get("bytes", 0)
        what = f"{source.what} (--source {source.choice})" if source.choice else source.what
        rows.append(_row(source.name, "source", size, source.licence, what))
    return rows


def _row(name: str, state: str, size: int, licence: str, what: str) -> dict[str, Any]:
    return {"name": name, "state": state, "bytes": size, "licence": licence, "what": what}


def _size(parts: Iterable[Recorded]) -> int:
    return sum(part.bytes for part in parts)
