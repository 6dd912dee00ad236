"""`preview` and `report`: small pictures and one safe page of any video."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageSequence

from streamt2v import config, files
from streamt2v.jobs import run_directory
from streamt2v.media import pictures
from tests import crash
from tests.cli.helpers import PROMPT, TINY, call, generate, made, result

PAYLOADS = [
    "<script>alert(1)</script>", "</title><script>alert(1)</script>", "</style><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>", "\"><img src=x onerror=alert(1)>", "'><svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>", "<iframe src=https://example.org></iframe>", "</td></tr></table><script>x",
    "<a href=javascript:alert(1)>x</a>", "<body onload=alert(1)>", "<link rel=stylesheet href=//example.org/x.css>",
    "<style>@import '//example.org'</style>", "<meta http-equiv=refresh content=0;url=//example.org>",
    "{{ 7 * 7 }}", "{% include '/etc/passwd' %}", "{{ self.__init__.__globals__ }}",
    "&lt;script&gt;alert(1)&lt;/script&gt;", "<!-- --><script>alert(1)</script>", "<base href=//example.org>",
    "<object data=//example.org>", "<form action=//x.org>",
]  # fmt: skip
TAGS = {"html", "head", "body", "meta", "link", "title", "style", "footer", "h1", "h2", "h3", "p", "img", "span", "div"}
TAGS |= {"table", "tr", "th", "td", "figure", "figcaption", "pre", "section", "dl", "dt", "dd", "details", "summary"}
ATTRIBUTES = {
    "lang",
    "charset",
    "http-equiv",
    "content",
    "name",
    "rel",
    "href",
    "id",
    "alt",
    "src",
    "class",
    "data-frame",
}


class Page(HTMLParser):
    """What a browser would see: tags, addresses, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        for name, value in attrs:
            assert name != "src" or (value or "").startswith(("data:image/jpeg;base64,", "data:image/webp;base64,"))
            assert name != "href" or value == "data:,"

    def handle_data(self, data: str) -> None:
        self.text += data


def recipe(**more: object) -> str:
    settings = {**config.to_flat(config.merge({"prompt": "a red ball", "num_frames": 40})), **more}
    return json.dumps({"streamt2v": "1", "command": "generate", "config": settings})


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_report_shows_hostile_text_as_text(payload: str, tmp_path: Path) -> None:
    path = made(tmp_path / f"{payload.replace('/', '_')}.mp4", 40, recipe(prompt=payload, **{"prompts.24": payload}))
    assert call("report", path, "-o", tmp_path / "r.html") == 0
    page = Page((tmp_path / "r.html").read_text())
    assert page.tags <= TAGS
    assert page.attributes <= ATTRIBUTES
    assert page.text.count(payload) >= 2  # in the table of prompts; elsewhere it is quoted


def test_a_report_tells_of_prompts_chunks_and_times(tmp_path: Path) -> None:
    path, page = tmp_path / "out.mp4", tmp_path / "out.html"
    assert generate(path, 40, "--at", 20, "a blue star", "--keep-run") == 0
    assert call("report", path) == 0
    html = page.read_text()
    for said in ("40 frames of 80x48 at 8 fps", PROMPT, "(asked for at 20)", "16 to 31", "16 to 39", ">0:03.0</td>"):
        assert said in html
    assert html.count("<td>-</td>") == 1  # the first chunk took what cannot be told
    assert html.count("<th>seconds</th>") == 1  # of the stream, whose chunks lie in the run's directory
    assert "default-src 'none'" in html
    assert "://" not in html
    assert call("report", path) == 5
    assert call("report", path, "--overwrite") == 0
    assert call("preview", path, "-o", tmp_path / "out.png", "--width", 20) == 0
    assert pictures.read(tmp_path / "out.png").shape == (4 * 16 + 4, 6 * 24 + 4, 3)


def test_a_run_that_was_stopped_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.mp4"
    command = ["generate", PROMPT, "--frames", 72, "-o", path, *TINY, "--no-refine"]
    crash.killed("output", 2, *command, log=tmp_path / "log")
    for named in (path, run_directory.directory_for(path)):
        assert call("report", named, "--overwrite") == 0
        html = (tmp_path / "out.html").read_text()
        assert "out.mp4, unfinished" in html
        assert "data:image/jpeg" in html
        assert call("preview", named, "-o", tmp_path / "out.png", "--overwrite") == 0
        capsys.readouterr()
        assert call("info", named, "--json") == 0
        seen = result(capsys)
        assert seen["unfinished"] == str(run_directory.directory_for(path) / "video.mp4")
        assert (seen["video"]["frames"] < 72, seen["recipe"]["config"]["num_frames"]) == (True, 72)
    (run_directory.directory_for(path) / "video.mp4").unlink()
    files.write_json(run_directory.directory_for(path) / "run.json", {"schema": 1, "recipe": {"config": []}})
    assert call("info", path) == call("report", path, "--overwrite") == 0
    assert "nothing can be seen yet" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize("comment", ["", "hello", recipe(num_frames=10**7), recipe(num_frames="many"), recipe(odd=1)])
def test_a_report_of_any_video(comment: str, tmp_path: Path) -> None:
    path = made(tmp_path / "any.mp4", 3, comment)
    assert call("report", path) == 0
    html = (tmp_path / "any.html").read_text()
    assert "3 frames of 32x16" in html
    assert "Chunks" not in html


def test_previews(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path / "clip.mp4", 200)
    assert call("preview", path) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"clip_preview{kind}") for kind in (".png", ".webp")]
    assert call("preview", path, "-o", tmp_path / "small.gif", "--width", 16) == 0
    with Image.open(tmp_path / "clip_preview.png") as sheet:
        assert sheet.size == (6 * 36 + 4, 4 * 20 + 4)
    for name, size in (("clip_preview.webp", (32, 16)), ("small.gif", (16, 8))):
        with Image.open(tmp_path / name) as moving:
            assert moving.size == size
            # Equal frames are one that stays longer; GIF counts in hundredths of a second.
            lasting = 0
            for shown in ImageSequence.Iterator(moving):
                shown.load()
                lasting += shown.info["duration"]
            assert lasting in (96 * 125, 96 * 120)
    assert call("preview", path) == 5
    assert "exists already" in capsys.readouterr().err
    assert call("preview", path, "-o", tmp_path / "x.avi") == 2
    assert call("preview", tmp_path / "none.mp4", "-o", tmp_path / "x.png") == 3
    assert not (tmp_path / "x.png").exists()
