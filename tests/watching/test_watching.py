"""`watch`: what can be seen of a run from outside, and a server that gives away nothing else."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamt2v.cli.app import main
from streamt2v.jobs import run_directory
from streamt2v.media import fragments, reading
from streamt2v.watching import seen
from streamt2v.watching.serve import Server
from tests.cli.helpers import call
from tests.watching.runs import Growing, drawn

SECRET = "not for the browser"


@contextmanager
def serving(folder: Path, output: Path | None) -> Iterator[Server]:
    with Server(folder, output) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Answer:
    """What a server answers to one request, for a path below its token unless that begins with //."""

    def __init__(self, server: Server, path: str, method: str = "GET", **headers: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        whole = path[1:] if path.startswith("//") else f"/{server.token}/{path}"
        connection.request(method, whole, headers=headers)
        answer = connection.getresponse()
        self.status, self.headers, self.body = answer.status, answer.headers, answer.read()
        connection.close()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Growing]:
    with Growing(tmp_path / "out.mp4", 40, "a red <b>ball</b>", **{"prompts.24": "a blue star"}) as growing:
        yield growing


def test_a_growing_file_is_whole_up_to_its_last_fragment(run: Growing) -> None:
    path, ends = run.directory.partial_path, []
    assert fragments.measure(path) == fragments.Growing()
    for _ in range(3):
        run.output_frames()
        ends.append((run.writer.mark.frames, run.writer.mark.size))
    data = path.read_bytes()
    assert re.fullmatch(r"avc1\.[0-9a-f]{6}", fragments.measure(path).codec)
    for cut in {*range(0, len(data), 97), *(end + more for _, end in ends for more in (-1, 0, 1))}:
        path.write_bytes(data[:cut])
        known = fragments.measure(path)
        assert (known.frames, known.size) == max([end for end in ends if end[1] <= cut], default=(0, 0))
        assert len(known.starts) == known.frames // 8
    path.write_bytes(data)
    first, images = fragments.last_frames(path)
    assert first == 16
    exact = np.concatenate(list(reading.read_frames(path)))[16:]
    assert np.abs(images.astype(int) - exact).mean() < 2  # small pictures need no exact edges
    known = fragments.measure(path)
    assert [known.before(frame) for frame in (0, 7, 8, 23, 99)] == [known.starts[i][1] for i in (0, 0, 1, 2, 2)]


@pytest.mark.parametrize("data", [b"", b"\0" * 64, b"\0\0\0\x08moof" * 5, b"\0\0\0\1mdat\0\0\0\0\0\0\0\x09", b"x" * 99])
def test_what_is_no_video_has_no_fragments(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(data)
    assert fragments.measure(tmp_path / "video.mp4").frames == 0
    assert len(fragments.last_frames(tmp_path / "video.mp4")[1]) == 0


def test_a_run_is_seen_to_grow_to_stop_to_go_on_and_to_end(run: Growing, tmp_path: Path) -> None:
    begun = seen.see(run.output)
    assert (begun.state, begun.left, begun.stages) == ("running", None, (("streaming", 0, 40), ("refinement", 0, 40)))
    assert seen.newest(run.output) == ([], [])
    run.base()
    numbers, images = seen.newest(run.output)
    assert numbers == [0, 3, 6, 9, 12, 15]
    assert np.array_equal(images, drawn(0, 16)[numbers])
    run.base()
    run.output_frames()
    now = seen.see(run.output)
    assert (now.stages[0].done, now.stages[1].done, now.frames, now.fps) == (24, 8, 8, 8.0)
    assert now.size == run.directory.partial_path.stat().st_size
    assert seen.newest(run.output)[0] == [0, 1, 2, 4, 5, 7]
    assert begun.run == now.run
    assert begun.last != now.last
    run.kill()
    assert (seen.see(run.output).state, seen.see(run.output).left) == ("stopped", None)
    assert run_directory.RunDirectory.open(run.directory.path, run.directory.recipe, resume=True).resumed
    run.directory.close()
    while run.step():
        pass
    assert seen.see(run.output).stages[1].done == 40
    run.finish()
    assert seen.see(run.output).state == "finished"
    run.output.unlink()
    assert seen.see(run.output).state == "gone"


def test_looking_changes_nothing_and_hinders_nobody(run: Growing) -> None:
    run.step()
    run.kill()
    before = {path: path.stat().st_mtime_ns for path in run.output.parent.rglob("*")}
    damaged = run.directory.path / "state" / "output-000009.safetensors"  # a run that goes on would remove it
    damaged.write_bytes(b"damaged")
    assert seen.see(run.output).state == "stopped"
    after = {path: path.stat().st_mtime_ns for path in run.output.parent.rglob("*") if path != damaged}
    assert {**before, damaged.parent: 0} == {**after, damaged.parent: 0}


def test_the_time_left_falls_with_the_clock_and_follows_the_pace(run: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds a chunk, of which the refiner's part, a chunk behind, counts half of what is left at the end."""
    for step in range(2):
        run.step()
        for path in (run.directory.path / "base").glob(f"{step:06}-*"):
            os.utime(path, (1000 + 10 * step, 1000 + 10 * step))
    monkeypatch.setattr(time, "time", lambda: 1010.0)
    assert seen.see(run.output).left == pytest.approx(20 + 10)  # 16 base frames, then a distance of 16 frames
    monkeypatch.setattr(time, "time", lambda: 1014.0)
    assert seen.see(run.output).left == pytest.approx(26)
    monkeypatch.setattr(time, "time", lambda: 2000.0)
    assert seen.see(run.output).left == 0
    while run.directory.num_base_frames < 40:
        run.step()
    states = sorted((run.directory.path / "state").glob("output-*"))
    for number, path in enumerate(states):
        os.utime(path, (3000 + 8 * number, 3000 + 8 * number))
    monkeypatch.setattr(time, "time", lambda: 3009.0)
    assert seen.see(run.output).left == pytest.approx((40 - run.writer.mark.frames) - 1)  # a second a frame


def test_the_server_knows_nobody_without_the_token_or_by_another_name(run: Growing, tmp_path: Path) -> None:
    run.step()
    with serving(tmp_path, run.output) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert len(server.token) >= 32
        assert Answer(server, "").status == 200
        for path in ("//", "//x/", f"//{server.token[:-1]}/", f"//{server.token}x/state", "//%00/", "//%C3%A9/state"):
            found = Answer(server, path)
            assert (found.status, found.body) == (403, b"403 Forbidden\n")
        for host in ("example.org", f"example.org:{server.server_port}", "127.0.0.1.example.org", "", "localhost:x"):
            assert Answer(server, "state", Host=host).status == 403
        for host in ("localhost", "localhost:9000", "127.0.0.1:1", "[::1]:9000"):  # as through a tunnel
            assert Answer(server, "state", Host=host).status == 200
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert Answer(server, "state", method).status == 501
        with serving(tmp_path, run.output) as another:
            assert another.token != server.token


def test_nothing_outside_of_the_run_is_served(run: Growing, tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_text(SECRET)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "in.mp4").write_bytes(b"")
    run.step()
    paths = [
        "../secret.mp4", "%2e%2e/secret.mp4", "..%2fsecret.mp4", "growing/../../secret.mp4", "/etc/passwd",
        "secret.mp4", "of/..%2fsecret.mp4/finished", "of/secret.mp4/finished", "of/../secret.mp4", "growing/..",
        "run.json", "base/", "finished", "growing%00", "of/", "of//finished", "state/", "..", ".", "%", "last/../../x",
    ]  # fmt: skip
    for folder, output in ((tmp_path, run.output), (tmp_path / "deep", None)):
        with serving(folder, output) as server:
            for path in paths:
                found = Answer(server, path)
                assert found.status == 404, path
                assert SECRET.encode() not in found.body


def test_no_link_is_followed(run: Growing, tmp_path: Path) -> None:
    run.step()
    run.step()
    out = tmp_path / "elsewhere"
    out.mkdir()
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "link.mp4").symlink_to(run.output)
    (videos / "folder").symlink_to(tmp_path)
    (videos / "x.mp4.streamt2v").symlink_to(run.directory.path)
    assert seen.outputs(videos) == {}
    assert seen.state_of(videos / "x.mp4") == "gone"
    growing, chunk = run.directory.partial_path, max((run.directory.path / "base").iterdir())
    (videos / "x.mp4").write_bytes(b"")
    with serving(videos, None) as server:
        for what in ("growing", "last", "finished"):
            assert Answer(server, f"of/x.mp4/{what}").body in (b"404 Not Found\n", b'{"last": []}')
    with serving(tmp_path, run.output) as server:
        assert Answer(server, "growing").status == 200
        for path in (growing, chunk):
            path.rename(out / path.name)
            path.symlink_to(out / path.name)
        assert Answer(server, "growing").status == 404
        assert Answer(server, "last").json == {"last": []}
        assert Answer(server, "state").json["size"] == 0
    run.kill()
    run.output.symlink_to(out / growing.name)
    assert seen.state_of(run.output) == "stopped"


def test_ranges_of_what_grows(run: Growing, tmp_path: Path) -> None:
    with serving(tmp_path, run.output) as server:
        assert (Answer(server, "growing").status, Answer(server, "growing").body) == (200, b"")
        run.output_frames()
        whole = run.directory.partial_path.read_bytes()
        with run.directory.partial_path.open("ab") as file:
            file.write(b"\0\0\0\x20moof, half of it")
        found = Answer(server, "growing")
        assert (found.status, found.body, found.headers["Content-Type"]) == (200, whole, "video/mp4")
        head, size = Answer(server, "growing", "HEAD"), len(whole)
        assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(size))
        ranges = {"0-": (0, size), "5-9": (5, 10), f"5-{size + 9}": (5, size), "-7": (size - 7, size), "0-0": (0, 1)}
        for asked, (start, stop) in ranges.items():
            found = Answer(server, "growing", Range=f"bytes={asked}")
            assert (found.status, found.body) == (206, whole[start:stop])
            assert found.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
        for asked in (f"{size}-", "9-5", "-0", "-"):
            found = Answer(server, "growing", Range=f"bytes={asked}")
            assert (found.status, found.headers["Content-Range"]) == (416, f"bytes */{size}")
        for asked in ("chunks=1-2", "bytes=1-2,5-6", "bytes=a-b"):  # not understood, so all of it
            assert Answer(server, "growing", Range=asked).body == whole
        run.directory.partial_path.write_bytes(whole)
        run.output_frames()
        assert len(Answer(server, "growing", Range=f"bytes={size}-").body) == run.writer.mark.size - size
        starts = fragments.measure(run.directory.partial_path).starts
        assert Answer(server, "start?frame=12").json == {"at": starts[1][1]}
        for odd in ("", "?frame=x", "?frame=-1", "?frame=0"):
            assert Answer(server, f"start{odd}").json == {"at": starts[0][1]}


def test_the_page_lives_through_the_end_of_the_run(run: Growing, tmp_path: Path) -> None:
    comment = json.dumps({"streamt2v": "1", **run.directory.recipe})
    with serving(tmp_path, run.output) as server:
        while run.step():
            state = Answer(server, "state").json
            assert (state["state"], state["frames"]) == ("running", run.writer.mark.frames)
        assert Answer(server, "finished").status == 404
        run.kill()
        assert Answer(server, "state").json["state"] == "stopped"
        page = Answer(server, "").body.decode()
        assert f"streamt2v resume {run.output}" in page
        run.finish(comment)
        assert Answer(server, "state").json["state"] == "finished"
        assert Answer(server, "state").json["kind"] == "video/mp4"
        assert Answer(server, "growing").status == 404
        assert Answer(server, "finished").body == run.output.read_bytes()
        assert "a blue star" in Answer(server, "").body.decode()


def test_the_page_is_safe(run: Growing, tmp_path: Path) -> None:
    with serving(tmp_path, run.output) as server:
        found = Answer(server, "")
        page = found.body.decode()
        assert "a red &lt;b&gt;ball&lt;/b&gt;" in page
        assert "<b>" not in page
        assert "://" not in page
        (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
        nonces = re.findall(r"<script nonce=\"([\w-]{16,})\"", page)
        assert page.count("<script") == len(nonces) == 1
        assert f"script-src 'nonce-{nonces[0]}'" in policy
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert nonces[0] not in Answer(server, "").body.decode()
        assert found.headers["X-Content-Type-Options"] == "nosniff"
        assert found.headers["Referrer-Policy"] == "no-referrer"
        assert found.headers["Cache-Control"] == "no-store"
        assert "frame-ancestors 'none'" in found.headers["Content-Security-Policy"]


def test_a_folder_shows_its_rows(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    (videos / "sub").mkdir(parents=True)
    with Growing(videos / "b.mp4", 24) as one, Growing(videos / "sub" / "ü <b>.mp4", 24) as two:
        while one.step():
            pass
        one.finish()
        two.base()
        (videos / "notes.txt").write_text(SECRET)
        (videos / ".hidden.mp4").write_text(SECRET)
        with serving(videos, None) as server:
            rows = Answer(server, "state").json["rows"]
            assert [(row["name"], row["state"]) for row in rows] == [
                ("b.mp4", "finished"),
                ("sub/ü <b>.mp4", "running"),
            ]
            assert Answer(server, f"{rows[1]['url']}state").json["stages"][0]["done"] == 16
            assert "&lt;b&gt;" in Answer(server, rows[1]["url"]).body.decode()
            assert Answer(server, f"{rows[0]['url']}finished").body == (videos / "b.mp4").read_bytes()
            for name in ("notes.txt", ".hidden.mp4", "sub", "none.mp4", "..%2Fvideos%2Fb.mp4"):
                assert Answer(server, f"of/{name}/finished").status == 404
            two.kill()
            assert Answer(server, "state").json["rows"][1]["state"] == "stopped"


def test_a_file_that_browsers_cannot_show(tmp_path: Path) -> None:
    with Growing(tmp_path / "out.mov", 24) as run:
        run.step()
        run.step()
        assert seen.see(run.output).codec.startswith("avc1.f4")  # every bit kept: no browser plays it
        run.kill()
        run.output.write_bytes(b"")
        assert seen.as_json(seen.see(run.output), run.output)["kind"] == ""


def test_the_command_starts_and_ends(run: Growing, tmp_path: Path) -> None:
    run.step()
    process = subprocess.Popen(
        [sys.executable, "-m", "streamt2v", "watch", str(run.directory.path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/", url)
    assert found
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
    connection.request("GET", f"/{found[2]}/state")
    assert json.loads(connection.getresponse().read())["state"] == "running"
    connection.close()
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in said
    assert "not the run" in said


def test_what_cannot_be_watched_is_said(
    run: Growing, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("watch", tmp_path / "none.mp4") == 3
    assert "no unfinished run" in capsys.readouterr().err
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with serving(tmp_path, run.output) as server:
        assert call("watch", run.output, "--port", server.server_port) == 5
    monkeypatch.setattr(Server, "serve_forever", lambda server: None)
    assert "choose another --port" in capsys.readouterr().err
    assert call("watch", tmp_path, "--open") == 0
    assert opened == capsys.readouterr().out.split()


def test_watching_loads_no_torch() -> None:
    modules = f"{main.__module__}, streamt2v.watching.serve"
    code = f"import sys, {modules}; print([name for name in ('torch', 'av') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
