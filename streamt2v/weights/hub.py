"""Weights from the model hub: a family pulled and converted, or a third-party pipeline kept as it is.

The published files of a family are fetched by `fetch`, because interrupted downloads into the library's own cache start
over. Whole pipelines do go to that cache, where other programs share them.
"""

import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamt2v import files
from streamt2v.errors import InputError, WeightsError
from streamt2v.weights import catalog, fetch, header, home, inventory
from streamt2v.weights.catalog import Family, Source
from streamt2v.weights.fetch import Note as Note
from streamt2v.weights.home import Recorded

Convert = Callable[[Path, Path, Note], list[Path]]

OFFLINE = ("STREAMT2V_OFFLINE", "HF_HUB_OFFLINE")
"""Either variable forbids connections; `--offline` sets both, for the library too."""
_PART = re.compile(r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$")


def offline() -> bool:
    """Return whether connections are forbidden."""
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in OFFLINE)


def pull(
    family: Family,
    convert: Convert,
    note: Note,
    choice: str = "",
    folder: Path | None = None,
    stages: Collection[str] | None = None,
) -> None:
    """Complete a family: fetch the missing published files, convert each, record the results.

    A source whose results are here is skipped; converted files that were placed by hand are checked and recorded.

    Args:
        family: a family with sources.
        convert: writes the networks of a published file into a folder and returns the paths.
        note: called with one sentence per step.
        choice: which copy to take if there are several; by default the first.
        folder: where to look for the published files first.
        stages: what to fetch them for, see `Family.used`; by default all.

    Raises:
        ConfigError: the family has no sources, or not this choice.
        InputError: `folder` is not a folder.
        WeightsError: a file cannot be fetched, is damaged, or is not the published one.
        OutputError: the disk is full or cannot be written.
        BusyError: another process is pulling the same file.
    """
    from huggingface_hub.utils import logging

    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder} is not a folder", "give --from the folder with the published files")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its warnings are repeated here in fewer words
    needed = [source for source in family.sources_of(choice, stages) if not _is_made(family, source, choice, note)]
    found = {source: fetch.find(source, folder, note) for source in needed}
    offers = _offers([source for source, path in found.items() if path is None], note)
    for source in needed:
        place = fetch.place(source)
        with home.working_on(place):
            now = catalog.listed(family.name) or family
            if _is_made(now, source, choice, note):  # by another process in the meantime
                continue
            path = found[source] or fetch.find(source, folder, note) or fetch.fetch(source, offers[source], note)
            note(f"converting {path}")
            _remember(family, source.name, convert(path, _folder(family, source), note))
            if path == place:
                with files.output_errors(path):
                    path.unlink()
    inventory.require(catalog.listed(family.name) or family, stages)


def _folder(family: Family, source: Source) -> Path:
    """Return where a source's files go: its first folder, as families share what they make from the same source."""
    return family.root / Path(source.makes[0]).parts[0]


def _offers(absent: Sequence[Source], note: Note) -> dict[Source, fetch.Offer]:
    """Ask the hub for every file that has to be fetched, state the total size, and check the space for it."""
    if absent and offline():
        hint = "allow connections, or give its folder with --from"
        raise WeightsError(f"{absent[0].name} is not here, and no connection is made when offline", hint)
    offers = {source: fetch.ask(source) for source in absent}
    for source, offer in offers.items():
        note(f"{source.name}: {offer.bytes / 1e6:,.1f} MB, {source.licence}: {source.what}")
    if offers:
        total = sum(offer.remaining for offer in offers.values())
        note(f"{total / 1e6:,.1f} MB to fetch into {home.path()}")
        files.require_space(home.path(), total, "the download", fetch.SPACE_HINT)
    return offers


def _is_made(family: Family, source: Source, choice: str, note: Note) -> bool:
    """Return whether all files made from a source are here and as recorded; files placed by hand are recorded first."""
    made = [file for file in family.files if file.path in source.makes]
    if all(file.parts for file in made):
        other = choice and source.choice and any(file.source != source.name for file in made)
        parts = [(family.root / name, part) for file in made for name, part in file.parts.items()]
        return not other and all(part.matches(path) for path, part in parts)
    by_hand = [_parts_on_disk(family.root / file.path) for file in made]
    if any(file.parts for file in made) or not all(by_hand):
        return False
    for file in made:
        if file.path.endswith(".safetensors"):
            header.read_header(family.root / file.path)
    note(f"{', '.join(file.path for file in made)}: found here, recorded")
    _remember(family, "by hand", [path for paths in by_hand for path in paths])
    return True


def _parts_on_disk(path: Path) -> list[Path]:
    index = header.shard_index(path)
    if path.is_file() or not index.is_file():
        return [path] if path.is_file() else []
    return [*sorted(path.parent.glob(f"{path.stem}-?????-of-?????.safetensors")), index]


def _remember(family: Family, source: str, written: Sequence[Path]) -> None:
    """Record converted files under the names that the family lists; a split network has several files."""
    parts: dict[str, dict[str, Recorded]] = {}
    for path in written:
        name = path.relative_to(family.root).as_posix()
        parts.setdefault(_PART.sub(".safetensors", name), {})[name] = Recorded.of(path)
    home.remember("files", {name: inventory.made_from(source, found) for name, found in parts.items()})


def snapshot(repository: str, revision: str | None, patterns: Sequence[str], note: Note = lambda text: None) -> Path:
    """Return the folder of a repository in the library's cache, with the files that match `patterns`.

    It is fetched once and then pinned: commit and files are recorded, and later compared without a connection.

    Args:
        repository: "OWNER/NAME".
        revision: a commit or branch; None means the recorded commit, else the newest.
        patterns: such as "*.json"; nothing else is fetched.
        note: called with the size before anything is fetched.

    Raises:
        WeightsError: the repository cannot be fetched, or a file has changed since it was recorded.
        OutputError: the disk is full or cannot be written.
    """
    request = " ".join([repository, revision or "main", *sorted(patterns)])
    row = home.recorded("snapshots").get(request)
    if row is not None:
        folder = Path(row["folder"])
        if not (wrong := _differing(row)):
            return folder
        if (folder / wrong).exists():
            raise WeightsError(f"{folder / wrong} is not as recorded", "remove it, then run the command again")
    with home.working_on(home.path() / "snapshots" / repository.replace("/", "--")):
        commit = row["commit"] if row is not None else revision
        if not offline():
            commit = _announce(repository, commit, patterns, note)
        taken = _taken(_snapshot(repository, commit, patterns), patterns)
        if row is not None and (wrong := _differing({**row, "folder": taken["folder"]})):
            raise WeightsError(f"{taken['folder']}/{wrong} is not as recorded", "remove it, then run the command again")
        home.remember("snapshots", {request: taken})
    return Path(taken["folder"])


def _differing(row: Mapping[str, Any]) -> str:
    """Return the first file of a recorded snapshot that is missing or has changed, "" if all are as recorded."""
    parts = {name: Recorded.from_json(part) for name, part in row["files"].items()}
    return next((name for name, part in parts.items() if not part.matches(Path(row["folder"]) / name)), "")


def _taken(folder: Path, patterns: Sequence[str]) -> dict[str, Any]:
    """Return the row of a snapshot for the record. The library names its folders by commit."""
    from huggingface_hub.utils import filter_repo_objects

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = filter_repo_objects(names, allow_patterns=list(patterns))
    if not (found := {name: Recorded.of(folder / name).to_json() for name in kept}):
        raise WeightsError(f"{folder} has no files matching {', '.join(patterns)}")
    return {"commit": folder.name, "folder": str(folder), "files": found}


def _snapshot(repository: str, revision: str | None, patterns: Sequence[str], tries: int = fetch.ATTEMPTS) -> Path:
    """Let the library fetch a snapshot, and retry if the connection broke; complete files are kept."""
    from huggingface_hub import snapshot_download

    wanted, local = list(patterns), offline()
    try:
        with fetch.hub_errors(repository), fetch.disk_errors(home.path()):
            return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, local_files_only=local))
    except fetch.Cut as error:
        if local:
            hint = "allow connections once, or give the pipeline's folder instead of its name"
            raise WeightsError(f"{repository} is not here, and no connection is made when offline", hint) from error
        if tries == 1:
            raise
        time.sleep(fetch.PAUSE_SECONDS)
        return _snapshot(repository, revision, patterns, tries - 1)


def _announce(repository: str, revision: str | None, patterns: Sequence[str], note: Note) -> str:
    """State the size of a snapshot, check the space for it, and return its commit."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import filter_repo_objects

    with fetch.hub_errors(repository):
        found = HfApi().model_info(repository, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or []}
    total = sum(sizes[name] for name in filter_repo_objects(sizes, allow_patterns=list(patterns)))
    note(f"{repository}: {total / 1e6:,.1f} MB to fetch, minus what is already in the cache")
    cache = Path(constants.HF_HUB_CACHE)
    files.require_space(cache, total, "the download", "free some space, or set HF_HOME to a folder on a larger disk")
    return str(found.sha)
