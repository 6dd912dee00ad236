"""Files from the model hub: found here first, else fetched in pieces that resume, checked, and recorded for ever after.

The library's own cache is read but not written: its downloads start afresh after an interruption. Only whole pipelines
of others go there (`snapshot`), where their users share them.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamt2v import files
from streamt2v.errors import InputError, OutputError, StreamT2VError, WeightsError
from streamt2v.weights import catalog as weights
from streamt2v.weights import home
from streamt2v.weights.catalog import Family, Source
from streamt2v.weights.home import Recorded

Note = Callable[[str], None]
Convert = Callable[[Path, Path, Note], list[Path]]

ATTEMPTS = 3  # connections in a row that bring nothing; the library itself tries several times within each
PAUSE_SECONDS = 1.0
_SPACE = "free some space, or set STREAMT2V_HOME to a folder on a larger disk"
_CHECK = "check the connection; where there is none, place the files by hand (see `streamt2v weights pull --help`)"
_AGAIN = "run the same command again: it goes on where it stopped"
_PART = re.compile(r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$")


OFFLINE = ("STREAMT2V_OFFLINE", "HF_HUB_OFFLINE")
"""Either variable forbids connections; `--offline` sets both, so that the library obeys by itself too."""


def offline() -> bool:
    """Whether no connection may be made."""
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in OFFLINE)


# ------------------------------------------------------------------------------------------------------ a family


def pull(chosen: Family, convert: Convert, note: Note, choice: str = "", folder: Path | None = None) -> None:
    """Make a family complete: fetch the published files that are missing, convert each, record what came out.

    A source whose results are here is skipped; converted files that were put there by hand are checked and recorded.

    Args:
        chosen: a family with sources.
        convert: writes the networks of a published file into a folder and returns the paths.
        note: called with one sentence per step.
        choice: which copy to take where there are several; the default is the family's first.
        folder: where to look for the published files first.

    Raises:
        ConfigError: the family has no sources, or not this choice.
        InputError: `folder` is no folder.
        WeightsError: a file cannot be had, is damaged or is not the published one.
        OutputError: the disk is full or cannot be written.
        BusyError: another process pulls the same file.
    """
    from huggingface_hub.utils import logging

    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder} is not a folder", "give --from the folder with the published files")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what it warns of is said here in fewer words
    needed = [source for source in chosen.sources_of(choice) if not _is_made(chosen, source, choice, note)]
    found = {source: _here(source, folder, note) for source in needed}
    offers = {source: _ask(source) for source, path in found.items() if path is None}
    total = 0
    for source, offer in offers.items():
        note(f"{source.name}: {offer.bytes / 1e6:,.1f} MB, {source.licence}: {source.what}")
        total += offer.bytes - _size(offer.part)
    if offers:
        note(f"{total / 1e6:,.1f} MB to fetch into {home.path()}")
        files.require_space(home.path(), total, "the download", _SPACE)
    for source in needed:
        place = _place(source)
        with home.working_on(place):
            if _is_made(weights.family(chosen.name), source, choice, note):  # by another process, meanwhile
                continue
            path = found[source] or _here(source, folder, note) or _fetch(source, offers[source], note)
            note(f"converting {path}")
            written = convert(path, chosen.root / chosen.name, note)
            _remember(chosen, source.name, written)
            if path == place:
                with files.output_errors(path):
                    path.unlink()
    weights.require(weights.family(chosen.name))


def _is_made(chosen: Family, source: Source, choice: str, note: Note) -> bool:
    """Whether all that a source makes is here and as recorded; what was put there by hand is recorded first."""
    rows = [file for file in chosen.files if file.path in source.makes]
    if all(file.parts for file in rows):
        other = choice and source.choice and any(file.source != source.name for file in rows)
        parts = [(chosen.root / name, part) for file in rows for name, part in file.parts.items()]
        return not other and all(part.matches(path) for path, part in parts)
    by_hand = [_parts_on_disk(chosen.root / file.path) for file in rows]
    if any(file.parts for file in rows) or not all(by_hand):
        return False
    for file in rows:
        if file.path.endswith(".safetensors"):
            weights.read_header(chosen.root / file.path)
    note(f"{', '.join(file.path for file in rows)}: found here, recorded")
    _remember(chosen, "by hand", [path for paths in by_hand for path in paths])
    return True


def _parts_on_disk(path: Path) -> list[Path]:
    index = weights.shard_index(path)
    if path.is_file() or not index.is_file():
        return [path] if path.is_file() else []
    return [*sorted(path.parent.glob(f"{path.stem}-?????-of-?????.safetensors")), index]


def _remember(chosen: Family, source: str, written: Sequence[Path]) -> None:
    """Record converted files under the names that the family lists: several real files where a network is split."""
    parts: dict[str, dict[str, Recorded]] = {}
    for path in written:
        name = path.relative_to(chosen.root).as_posix()
        parts.setdefault(_PART.sub(".safetensors", name), {})[name] = Recorded.of(path)
    home.remember("files", {name: weights.made_from(source, found) for name, found in parts.items()})


# ------------------------------------------------------------------------------------------------------ one file


@dataclass(frozen=True)
class _Offer:
    """What the hub says of a file: its size, the commit it belongs to, its SHA-256 where known, where it grows here."""

    bytes: int
    commit: str
    sha256: str
    part: Path


def _place(source: Source) -> Path:
    return home.path() / "downloads" / source.repository / source.path


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _known(source: Source) -> tuple[int, str, str]:
    """Size, SHA-256 and commit that a source must have: as listed, else as recorded; 0 and "" where unknown."""
    row = home.recorded("sources").get(source.name, {})
    return (
        source.bytes or int(row.get("bytes", 0)), source.sha256 or str(row.get("sha256", "")),
        source.revision or str(row.get("commit", "")),
    )  # fmt: skip


def _here(source: Source, folder: Path | None, note: Note) -> Path | None:
    """Find a published file without the network: in the user's folder, fetched before, or in the library's cache.

    Raises:
        WeightsError: the user's own file is not the recorded one.
    """
    size, sha256, commit = _known(source)
    if folder is not None:
        for path in (folder / source.path, folder / source.repository / source.path):
            if path.is_file():
                if (size and _size(path) != size) or (sha256 and home.sha256_of(path) != sha256):
                    raise WeightsError(f"{path} is not the file that {source.name} is recorded as", "take it away")
                return path
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source.repository, source.path, revision=commit or None)
    for path in (_place(source), *([Path(cached)] if isinstance(cached, str) else [])):
        if path.is_file() and size in (0, _size(path)):
            digest = home.sha256_of(path)
            if sha256 in ("", digest):
                note(f"{source.name}: already at {path}")
                home.remember("sources", {source.name: {"commit": commit, "bytes": _size(path), "sha256": digest}})
                return path
    return None


def _ask(source: Source) -> _Offer:
    """Ask the hub for size, commit and digest of a file, and compare them with what is known.

    Raises:
        WeightsError: no connection is allowed or possible, there is no such file, or it is another one than recorded.
    """
    if offline():
        hint = "allow connections, or give the folder it lies in with --from"
        raise WeightsError(f"{source.name} is not here, and no connection is made when offline", hint)
    from huggingface_hub import get_hf_file_metadata

    size, sha256, commit = _known(source)
    with _hub_errors(source.name):
        found = get_hf_file_metadata(_url(source, commit or "main"))
    if not found.size or not found.commit_hash:
        raise WeightsError(f"the hub does not say how large {source.name} is", "try again later")
    if size and found.size != size:
        raise WeightsError(f"the hub offers {source.name} with {found.size:,} bytes, {size:,} are recorded")
    etag = found.etag or ""  # of a large file, the SHA-256
    claimed = etag if re.fullmatch("[0-9a-f]{64}", etag) else ""
    if sha256 and claimed and sha256 != claimed:
        raise WeightsError(f"the hub offers another {source.name} than the recorded one: its SHA-256 is {claimed}")
    # The name says which version the bytes belong to: another version starts afresh.
    version = hashlib.sha256(f"{etag or found.commit_hash} {found.size}".encode()).hexdigest()[:16]
    place = _place(source)
    return _Offer(found.size, found.commit_hash, sha256 or claimed, place.with_name(f".{place.name}.{version}.part"))


def _url(source: Source, revision: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(source.repository, source.path, revision=revision)


def _fetch(source: Source, offer: _Offer, note: Note) -> Path:
    """Fetch a file, going on where an earlier try stopped; it gets its name when its SHA-256 is the expected one.

    Raises:
        WeightsError: the connection fails for good, or what came is not what was offered.
        OutputError: the disk is full or cannot be written.
    """
    place, part = _place(source), offer.part
    files.make_directory(place.parent)
    with files.output_errors(part):
        for old in place.parent.glob(f".{place.name}.*.part"):
            if old != part:
                old.unlink()
        if _size(part) > offer.bytes:
            part.unlink()
    if _size(part):
        note(f"{source.name}: going on at {_size(part) / 1e6:,.1f} MB")
    _download(source, offer, note)
    digest = home.sha256_of(part)
    with files.output_errors(place):
        if offer.sha256 and digest != offer.sha256:
            part.unlink()
            message = f"{source.name} arrived damaged: its SHA-256 is {digest}, expected {offer.sha256}"
            raise WeightsError(message, "it was removed; pull again")
        files.publish(part, place)
    row = {"commit": offer.commit, "bytes": offer.bytes, "sha256": digest}
    home.remember("sources", {source.name: row})
    return place


def _download(source: Source, offer: _Offer, note: Note) -> None:
    """Let the part grow to its full size, over as many connections as that takes."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = _url(source, offer.commit)  # redirected anew each time: the signed addresses behind it expire
    tries = 0
    while (have := _size(offer.part)) < offer.bytes:
        try:
            with _hub_errors(source.name), _disk_errors(offer.part), offer.part.open("ab") as file:
                http_get(
                    url, file, resume_size=have, headers=build_hf_headers(), expected_size=offer.bytes,
                    displayed_filename=source.path,
                )  # fmt: skip
        except _Cut as error:
            tries = tries + 1 if _size(offer.part) <= have else 0
            at = f"{_size(offer.part) / 1e6:,.1f} of {offer.bytes / 1e6:,.1f} MB"
            if tries == ATTEMPTS:
                raise WeightsError(f"{source.name}: the connection broke at {at} ({error.message})", _AGAIN) from error
            note(f"{source.name}: connection lost at {at}, trying again")
            time.sleep(PAUSE_SECONDS)


class _Cut(WeightsError):
    """A connection failed in a way that another try may mend."""


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Tell a full disk from a failing network, which is an OSError too but has no number of the system."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
            raise
        raise OutputError(files.explain(path, error).message, f"{_SPACE}, then {_AGAIN}") from error


@contextmanager
def _hub_errors(wanted: str) -> Iterator[None]:
    """Turn what the library raises into sentences: for good (WeightsError), or perhaps not (_Cut)."""
    from huggingface_hub import errors

    # The library's HTTP client, whose errors it lets through, depends on its version; this is the base class of them.
    client_error: type[Exception] = vars(errors)["HTTPError"]
    try:
        yield
    except StreamT2VError:
        raise
    except errors.GatedRepoError as error:
        hint = "accept its terms on its page, then log in with `hf auth login`"
        raise WeightsError(f"{wanted} is only given to those who accept its terms", hint) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(f"the hub has no repository for {wanted}, or it is private", "is the name right?") from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"the hub has no such revision of {wanted}") from error
    except errors.LocalEntryNotFoundError as error:  # said when there is no connection and nothing in the cache
        raise _Cut(f"{wanted} is neither here nor to be had: the hub cannot be reached", _CHECK) from error
    except errors.EntryNotFoundError as error:
        raise WeightsError(
            f"the hub has no file {wanted}", "get it elsewhere and give its folder with --from"
        ) from error
    except (client_error, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise _Cut(f"{wanted} cannot be fetched from the hub: {said}", _CHECK) from error


# ------------------------------------------------------------------------------------------------- a pipeline


def snapshot(repository: str, revision: str | None, patterns: Sequence[str], note: Note = lambda text: None) -> Path:
    """Folder of a repository with the files that match `patterns`, in the library's cache; fetched once, then pinned.

    The commit and every file are recorded the first time and compared ever after, without a connection.

    Args:
        repository: "OWNER/NAME".
        revision: a commit or branch; None means the commit recorded before, else the newest.
        patterns: such as "*.json"; nothing else is fetched.
        note: called with the size before anything is fetched.

    Raises:
        WeightsError: it cannot be had, or a file of it has changed since it was recorded.
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
        folder = _snapshot(repository, commit, patterns)
        if row is None:
            home.remember("snapshots", {request: _taken(folder, patterns)})
        elif wrong := _differing(row):
            raise WeightsError(f"{folder / wrong} is not as recorded", "remove it, then run the command again")
    return folder


def _differing(row: Mapping[str, Any]) -> str:
    """The first file of a recorded snapshot that is absent or another one; "" where all are as recorded."""
    parts = {name: Recorded.from_json(part) for name, part in row["files"].items()}
    return next((name for name, part in parts.items() if not part.matches(Path(row["folder"]) / name)), "")


def _taken(folder: Path, patterns: Sequence[str]) -> dict[str, Any]:
    """The row of a snapshot in the record. The library names its folders by commit."""
    from huggingface_hub.utils import filter_repo_objects

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    found = {
        name: Recorded.of(folder / name).to_json() for name in filter_repo_objects(names, allow_patterns=list(patterns))
    }
    if not found:
        raise WeightsError(f"{folder} has no files of the kind that is read here: {', '.join(patterns)}")
    return {"commit": folder.name, "folder": str(folder), "files": found}


def _snapshot(repository: str, revision: str | None, patterns: Sequence[str], tries: int = ATTEMPTS) -> Path:
    """Let the library fetch a snapshot, again where the connection was cut: what is whole is kept."""
    from huggingface_hub import snapshot_download

    try:
        with _hub_errors(repository), _disk_errors(home.path()):
            found = snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), local_files_only=offline()
            )
            return Path(found)
    except _Cut as error:
        if offline():
            hint = "allow connections once, or give the folder of the pipeline instead of its name"
            raise WeightsError(f"{repository} is not here, and no connection is made when offline", hint) from error
        if tries == 1:
            raise
        time.sleep(PAUSE_SECONDS)
        return _snapshot(repository, revision, patterns, tries - 1)


def _announce(repository: str, revision: str | None, patterns: Sequence[str], note: Note) -> str:
    """Say how much a snapshot is, check the space for it, and return its commit."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import filter_repo_objects

    with _hub_errors(repository):
        found = HfApi().model_info(repository, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or []}
    total = sum(sizes[name] for name in filter_repo_objects(sizes, allow_patterns=list(patterns)))
    note(f"{repository}: {total / 1e6:,.1f} MB to fetch, less what is in the cache")
    cache = Path(constants.HF_HUB_CACHE)
    files.require_space(cache, total, "the download", "free some space, or set HF_HOME to a folder on a larger disk")
    return str(found.sha)
