"""A web server for one reader on this machine: pages and bytes of the runs in one folder, read only.

Every address begins with a random token. The name of a run in an address is looked up among those that were found in
the folder, so no path is ever made of what a browser sends; links are not followed. A foreign site can neither guess
the token nor, as only names of this machine are answered, reach the server by a name of its own (DNS rebinding).
"""

from __future__ import annotations

import json
import re
import secrets
import shlex
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np
from markupsafe import Markup

from streamt2v.errors import StreamT2VError
from streamt2v.jobs import run_directory, shown
from streamt2v.jobs.recipe import recipe_of, recorded_run, recorded_timeline
from streamt2v.media import fragments, pages
from streamt2v.timeline import Prompt
from streamt2v.watching import seen
from streamt2v.watching.seen import PLAYED

_HOSTS = {"127.0.0.1", "localhost", "[::1]"}
_PIECE = 1 << 18
_WIDTH = 240  # at least, of the last frames
_RUN = """
<p id="said" role="status">...</p>
<video id="player" class="screen" controls muted autoplay playsinline hidden></video>
<img id="picture" class="screen" alt="the finished video" hidden>
<p id="wait" class="soft small"></p>
<div id="stages"></div>
<h2 id="newest" hidden>Last frames</h2>
<div id="last" class="sheet"></div>
{{ prompts(turns, fps) }}
<div id="resume" hidden>{{ command(resume, "Continue it") }}</div>
{{ command(line) }}
{{ settings(groups, "Settings that differ from the preset") }}
<script nonce="{{ nonce }}">{{ script }}</script>
"""
_FOLDER = """
<p id="said" role="status">...</p>
<table class="cards"><thead><tr><th class="text">video</th><th>state</th><th>progress</th>
<th>frames</th><th>left</th></tr></thead><tbody id="rows"></tbody></table>
<script nonce="{{ nonce }}">{{ script }}</script>
"""


class Server(ThreadingHTTPServer):
    """Serves one output, or all that lie in a folder; `url` is its address. Raises OSError where the port is taken."""

    daemon_threads = True

    def __init__(self, folder: Path, output: Path | None, port: int = 0) -> None:
        """Listen on 127.0.0.1; `output` is the only one to show, None shows the folder."""
        self.folder, self.output = folder, output
        self.token = secrets.token_urlsafe(24)
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """The address with its token."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    @cached_property
    def script(self) -> str:
        """The script of the pages."""
        return Path(__file__).with_name("page.js").read_text("utf-8")

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader who leaves in the middle of an answer is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "streamt2v", ""

    def do_GET(self) -> None:
        """Answer a request; whoever has no token, or asks by another name, learns nothing."""
        host, address = self.headers.get("Host", ""), urlsplit(self.path)
        token, _, rest = address.path.removeprefix("/").partition("/")
        known = secrets.compare_digest(token.encode(), self.server.token.encode())
        if re.sub(r":\d+$", "", host) not in _HOSTS or not known:
            self._fail(HTTPStatus.FORBIDDEN)
        elif self.server.output is not None:
            self._show(self.server.output, rest, parse_qs(address.query))
        elif rest.startswith("of/"):
            name, _, what = rest.removeprefix("of/").partition("/")
            output = seen.outputs(self.server.folder).get(unquote(name))
            if output is None:
                self._fail(HTTPStatus.NOT_FOUND)
            else:
                self._show(output, what, parse_qs(address.query))
        elif rest == "state":
            self._json({"rows": [_row(*each) for each in seen.outputs(self.server.folder).items()]})
        elif rest:
            self._fail(HTTPStatus.NOT_FOUND)
        else:
            self._page(self.server.folder.name or "/", _FOLDER)

    do_HEAD = do_GET

    def _show(self, output: Path, what: str, query: dict[str, list[str]]) -> None:
        """Answer for one output: its page, its state, its bytes, its last frames."""
        run = run_directory.directory_for(output)
        growing = run / run_directory.GROWING
        if not what:
            self._page(output.name, _RUN, **_told(output))
        elif what == "state":
            self._json(seen.as_json(seen.see(output), output))
        elif what == "start":
            frame = "".join(query.get("frame", ["0"]))
            self._json({"at": fragments.measure(growing).before(int(frame[:9]) if frame.isdecimal() else 0)})
        elif what == "last":
            self._json({"last": _last(output)})
        elif what == "growing" and seen.is_inside(growing, run):
            self._bytes(growing, "video/mp4", fragments.measure(growing).size)
        elif what == "finished" and seen.state_of(output) == "finished" and output.suffix.lower() in PLAYED:
            self._bytes(output, PLAYED[output.suffix.lower()], output.stat().st_size)
        else:
            self._fail(HTTPStatus.NOT_FOUND)

    def _page(self, title: str, body: str, **values: object) -> None:
        nonce = secrets.token_urlsafe(16)
        script = Markup(self.server.script)
        self._send(pages.render(title, body, nonce, script=script, **values).encode(errors="replace"), "text/html")

    def _json(self, facts: object) -> None:
        self._send(json.dumps(facts).encode(), "application/json")

    def _fail(self, status: HTTPStatus) -> None:
        self._send(f"{status.value} {status.phrase}\n".encode(), "text/plain", status)

    def _bytes(self, path: Path, kind: str, size: int) -> None:
        """Send the first `size` bytes of a file, or the range of them that is asked for."""
        start, stop = 0, size
        if found := re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", self.headers.get("Range", "")):
            first, last = found.groups()
            start = int(first) if first else max(0, size - int(last or 0))
            stop = min(size, int(last) + 1) if first and last else size
            if start >= stop or not (first or last):
                self._send(b"", "text/plain", HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"*/{size}")
                return
        try:
            with path.open("rb") as file:
                file.seek(start)
                self._head(kind, stop - start, 206 if found else 200, f"{start}-{stop - 1}/{size}" if found else "")
                while self.command == "GET" and start < stop and (piece := file.read(min(_PIECE, stop - start))):
                    self.wfile.write(piece)
                    start += len(piece)
                self.close_connection |= start < stop  # it became shorter: the answer cannot be completed
        except FileNotFoundError:
            self._fail(HTTPStatus.NOT_FOUND)

    def _send(self, data: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, span: str = "") -> None:
        self._head(f"{kind}; charset=utf-8", len(data), status, span)
        if self.command == "GET":
            self.wfile.write(data)

    def _head(self, kind: str, size: int, status: int, span: str) -> None:
        self.send_response(status)
        facts = {"Content-Type": kind, "Content-Length": str(size), "Cache-Control": "no-store"}
        facts |= {"Accept-Ranges": "bytes", **({"Content-Range": f"bytes {span}"} if span else {})}
        facts |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        facts |= {"Content-Security-Policy": "frame-ancestors 'none'", "Cross-Origin-Resource-Policy": "same-origin"}
        for name, value in facts.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *values: object) -> None:
        """Say nothing: the terminal belongs to the user."""


def _row(name: str, output: Path) -> dict[str, object]:
    return {"name": name, "url": f"of/{quote(name, safe='')}/", **seen.as_json(seen.see(output), output)}


def _told(output: Path) -> dict[str, object]:
    """Return what the page of an output says once: prompts, commands, settings."""
    from streamt2v.media import isolated

    recipe, turns, fps = dict[str, object](), tuple[Prompt, ...](), 1.0
    try:
        if seen.state_of(output) == "finished":
            recipe = recipe_of(isolated.probe(output).comment)
        else:
            recipe = run_directory.recorded(run_directory.directory_for(output)).recipe
    except StreamT2VError:
        pass  # it cannot be read, or ends at this moment: what there is to see is shown
    if (known := recorded_run(recipe)) is not None:
        turns, fps = recorded_timeline(recipe, known[0].num_frames), known[0].output.fps
    resume, line = shlex.join(["streamt2v", "resume", str(output)]), shown.command(recipe)
    groups = shown.settings(recipe) if line else {}
    return {"turns": turns, "fps": fps, "resume": resume, "line": line, "groups": groups}


def _last(output: Path) -> list[dict[str, object]]:
    from PIL import Image

    try:
        numbers, images = seen.newest(output)
        known = recorded_run(run_directory.recorded(run_directory.directory_for(output)).recipe)
        fps = 1.0 if known is None else known[0].output.fps
        small = [np.asarray(Image.fromarray(image).reduce(max(1, image.shape[1] // _WIDTH))) for image in images]
        return [still._asdict() for still in pages.sheet(small, numbers, fps)]
    except (StreamT2VError, OSError, ValueError):
        return []
