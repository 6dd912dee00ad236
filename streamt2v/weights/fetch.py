"""One published file: found on this machine or fetched with resuming, then checked and recorded."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamt2v import files
from streamt2v.errors import OutputError, StreamT2VError, WeightsError
from streamt2v.weights import home
from streamt2v.weights.catalog import Source

Note = Callable[[str], None]  # called with one sentence per step

ATTEMPTS = 3  # connections in a row without progress; the library retries several times within each
PAUSE_SECONDS = 1.0
SPACE_HINT = "free some space, or set STREAMT2V_HOME to a folder on a larger disk"
_CHECK = "check the connection; without one, place the files by hand (see `streamt2v weights pull --help`)"
_AGAIN = "repeat the command: it continues where it stopped"


@dataclass(frozen=True)
class Offer:
    """What the hub says about a file (size, commit, SHA-256 if known), and the partial file that it grows in here."""

    bytes: int
    commit: str
    sha256: str
    part: Path

    @property
    def remaining(self) -> int:
        """Bytes still to fetch."""
        return self.bytes - _size(self.part)


class Cut(WeightsError):
    """A connection failed in a way that another attempt may fix."""


def place(source: Source) -> Path:
    """Return where a fetched file is kept until it is converted."""
    return home.path() / "downloads" / source.repository / source.path


def find(source: Source, folder: Path | None, note: Note) -> Path | None:
    """Look for a published file without the network: in the user's folder, among downloads, in the library's cache.

    Raises:
        WeightsError: the file in the user's folder is not the recorded one.
    """
    size, sha256, commit = _known(source)
    if folder is not None:
        for path in (folder / source.path, folder / source.repository / source.path):
            if path.is_file():
                if (size and _size(path) != size) or (sha256 and home.sha256_of(path) != sha256):
                    raise WeightsError(f"{path} is not the recorded {source.name}", "remove it")
                return path
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source.repository, source.path, revision=commit or None)
    for path in (place(source), *([Path(cached)] if isinstance(cached, str) else [])):
        if path.is_file() and size in (0, _size(path)):
            digest = home.sha256_of(path)
            if sha256 in ("", digest):
                note(f"{source.name}: already at {path}")
                _remember(source, commit, _size(path), digest)
                return path
    return None


def ask(source: Source) -> Offer:
    """Ask the hub for size, commit and digest of a file, and compare them with what is known.

    Raises:
        WeightsError: the hub cannot be reached, has no such file, or not the recorded one.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    size, sha256, commit = _known(source)
    with hub_errors(source.name):
        found = get_hf_file_metadata(hf_hub_url(source.repository, source.path, revision=commit or "main"))
    if not found.size or not found.commit_hash:
        raise WeightsError(f"the hub does not say how large {source.name} is", "try again later")
    if size and found.size != size:
        raise WeightsError(f"the hub offers {source.name} with {found.size:,} bytes instead of {size:,}")
    etag = found.etag or ""  # the SHA-256 of a large file
    claimed = etag if re.fullmatch("[0-9a-f]{64}", etag) else ""
    if sha256 and claimed and sha256 != claimed:
        raise WeightsError(f"the hub offers another {source.name} than the recorded one: its SHA-256 is {claimed}")
    # The name identifies the version of the bytes: another version starts afresh.
    version = hashlib.sha256(f"{etag or found.commit_hash} {found.size}".encode()).hexdigest()[:16]
    target = place(source)
    return Offer(found.size, found.commit_hash, sha256 or claimed, target.with_name(f".{target.name}.{version}.part"))


def fetch(source: Source, offer: Offer, note: Note) -> Path:
    """Fetch a file, continuing an earlier attempt; it gets its name once its SHA-256 is as expected.

    Raises:
        WeightsError: the connection fails for good, or the file is not what was offered.
        OutputError: the disk is full or cannot be written.
    """
    target, part = place(source), offer.part
    files.make_directory(target.parent)
    with files.output_errors(part):
        for old in target.parent.glob(f".{target.name}.*.part"):
            if old != part:
                old.unlink()
        if offer.remaining < 0:
            part.unlink()
    if _size(part):
        note(f"{source.name}: continuing at {_size(part) / 1e6:,.1f} MB")
    _download(source, offer, note)
    digest = home.sha256_of(part)
    with files.output_errors(target):
        if offer.sha256 and digest != offer.sha256:
            part.unlink()
            message = f"{source.name} arrived damaged: its SHA-256 is {digest}, expected {offer.sha256}"
            raise WeightsError(message, "it was removed; pull again")
        files.publish(part, target)
    _remember(source, offer.commit, offer.bytes, digest)
    return target


def _known(source: Source) -> tuple[int, str, str]:
    """Return the size, SHA-256 and commit of a source as listed, else as recorded; 0 and "" if unknown."""
    row = {"bytes": 0, "sha256": "", "commit": ""} | home.recorded("sources").get(source.name, {})
    return source.bytes or int(row["bytes"]), source.sha256 or str(row["sha256"]), source.revision or str(row["commit"])


def _remember(source: Source, commit: str, size: int, sha256: str) -> None:
    home.remember("sources", {source.name: {"commit": commit, "bytes": size, "sha256": sha256}})


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _download(source: Source, offer: Offer, note: Note) -> None:
    """Grow the partial file to its full size, over as many connections as it takes."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    # Resolved anew each time, because the signed URLs behind it expire.
    url = hf_hub_url(source.repository, source.path, revision=offer.commit)
    headers, size, name, tries = build_hf_headers(), offer.bytes, source.path, 0
    while (have := _size(offer.part)) < size:
        try:
            with hub_errors(source.name), disk_errors(offer.part), offer.part.open("ab") as file:
                http_get(url, file, resume_size=have, headers=headers, expected_size=size, displayed_filename=name)
        except Cut as error:
            tries = tries + 1 if _size(offer.part) <= have else 0
            at = f"{_size(offer.part) / 1e6:,.1f} of {offer.bytes / 1e6:,.1f} MB"
            if tries == ATTEMPTS:
                raise WeightsError(f"{source.name}: the connection broke at {at} ({error.message})", _AGAIN) from error
            note(f"{source.name}: connection lost at {at}, trying again")
            time.sleep(PAUSE_SECONDS)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Tell a full disk from a failing network, whose errors are OSErrors too, but without an errno."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
            raise
        raise OutputError(files.explain(path, error).message, f"{SPACE_HINT}, then {_AGAIN}") from error


@contextmanager
def hub_errors(wanted: str) -> Iterator[None]:
    """Turn errors of the library into sentences: a WeightsError, or a Cut if it may pass."""
    from huggingface_hub import errors

    # The library passes on errors of its HTTP client, which depends on its version; this is their base class.
    client_error: type[Exception] = vars(errors)["HTTPError"]
    try:
        yield
    except StreamT2VError:
        raise
    except errors.GatedRepoError as error:
        hint = "accept its terms on its page, then log in with `hf auth login`"
        raise WeightsError(f"{wanted} is only available to users who accept its terms", hint) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(f"the hub has no repository for {wanted}, or it is private", "is the name right?") from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"the hub has no such revision of {wanted}") from error
    except errors.LocalEntryNotFoundError as error:  # no connection, and nothing in the cache
        raise Cut(f"{wanted} is not here, and the hub cannot be reached", _CHECK) from error
    except errors.EntryNotFoundError as error:
        hint = "get it elsewhere and give its folder with --from"
        raise WeightsError(f"the hub has no file {wanted}", hint) from error
    except (client_error, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise Cut(f"{wanted} cannot be fetched from the hub: {said}", _CHECK) from error
