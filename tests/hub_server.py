"""A model hub on loopback: the endpoints that the hub's library asks, and the ways in which a real one fails."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has and how it behaves; tests change it while it runs.

    `cuts` are bytes after which the connections that come next are cut, None for one that is whole. `damage` may change
    what a file's request sends, while its headers stay true. `hold` stops every download until it is set.
    """

    repositories: dict[str, dict[str, bytes]]
    url: str = ""
    commit: str = COMMIT
    cuts: list[int | None] = field(default_factory=list)
    damage: Callable[[bytes], bytes] = lambda data: data
    ranges: bool = True
    refusal: tuple[int, str] | None = None
    hold: threading.Event | None = None
    asked: list[str] = field(default_factory=list)
    served: list[tuple[str, int, int]] = field(default_factory=list)

    def starts(self, name: str) -> list[int]:
        """The offsets at which downloads of a file began."""
        return [start for path, start, _ in self.served if path == name]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if self.hub.refusal:
            return self._error(*self.hub.refusal)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            return self._describe(found[1], tree=(found[2] or "").startswith("/tree/"))
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not found or found[1] not in self.hub.repositories:
            return self._error(404, "RepoNotFound")
        if found[2] not in ("main", self.hub.commit):
            return self._error(404, "RevisionNotFound")
        data = self.hub.repositories[found[1]].get(found[3])
        if data is None:
            return self._error(404, "EntryNotFound")
        self._send_file(found[3], data, body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _describe(self, repository: str, tree: bool) -> None:
        rows: Any = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.hub.repositories[repository].items()
        ]
        if not tree:
            siblings = [{"rfilename": row["path"], "size": row["size"]} for row in rows]
            rows = {"id": repository, "sha": self.hub.commit, "siblings": siblings}
        text = json.dumps(rows).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _send_file(self, name: str, data: bytes, body: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.hub.ranges else None
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("ETag", '"of the place behind"')
        self.send_header("X-Linked-ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        cut = self.hub.cuts.pop(0) if self.hub.cuts else None
        if self.hub.hold:
            self.wfile.write(self.hub.damage(data)[start : start + 1])
            self.hub.hold.wait(30)
            start += 1
        sent = self.hub.damage(data)[start:][:cut]
        self.hub.served.append((name, start, len(sent)))
        self.wfile.write(sent)
        self.wfile.flush()
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run a hub on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        if hub.hold:
            hub.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()


def point_library_at(url: str, cache: Any, patch: pytest.MonkeyPatch) -> None:
    """Let the hub's library, which reads its variables when it is imported, use another hub, cache and piece size."""
    from huggingface_hub import constants, file_download

    from streamt2v.weights import fetch

    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    patch.setattr(file_download, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    patch.setattr(fetch, "PAUSE_SECONDS", 0)
    for name in ("HF_HUB_OFFLINE", "STREAMT2V_OFFLINE"):
        patch.delenv(name, raising=False)
