"""What others wrote stays text: names, prompts, recipes and media may be anything, and lead nowhere."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamt2v import config
from streamt2v.errors import ConfigError, InputError, VideoError, WeightsError
from streamt2v.jobs import asked, prepare
from streamt2v.jobs.job import default_output
from streamt2v.jobs.recipe import inspect_source
from streamt2v.media import pictures, reading
from streamt2v.weights import catalog
from tests.cli.helpers import call, made
from tests.cli.test_terminal import run
from tests.hostile import NAMES, NO_PROMPTS, PROMPTS, RECIPES, TRAVERSALS


@pytest.mark.parametrize("text", TRAVERSALS, ids=range(len(TRAVERSALS)))
def test_names_lead_nowhere_else(text: str, tmp_path: Path) -> None:
    assert len(TRAVERSALS) >= 40
    name = default_output(text, 7)
    assert name.parent == Path()
    assert name.name[0].isdigit()
    assert len(name.name.encode()) <= 150
    try:
        assert catalog._inside(tmp_path, text) == text
    except WeightsError:
        return
    assert (tmp_path / text).resolve().is_relative_to(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_option_and_no_protocol(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made(Path(f"{name}.mp4"), 3)
    assert call("info", "--", f"{name}.mp4") == 0
    assert call("preview", "-o", f"{name}.png", "-o", f"{name}.webp", "--", f"{name}.mp4") == 0
    assert call("report", "-o", f"{name}.html", "--", f"{name}.mp4") == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}{kind}" for kind in (".mp4", ".png", ".webp", ".html")
    }


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_odd_prompts_are_kept_and_shown_as_text(
    prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(PROMPTS) >= 60
    run_config = config.merge({"prompt": prompt, "num_frames": 24, "prompts.16": "x"})
    too_long = len(json.dumps(prompt)) > prepare.MAX_TEXT_BYTES
    if not prompt.strip() or too_long:
        with pytest.raises(ConfigError):
            prepare.check_wishes(run_config)
        return
    prepare.check_wishes(run_config)
    comment = json.dumps({"streamt2v": "1", "command": "generate", "config": config.to_flat(run_config)})
    path = made(tmp_path / "in.mp4", 24, comment)
    assert inspect_source(path).prompts == {0: prompt, 16: "x"}
    assert call("info", path) == 0
    assert call("plan", "--frames", 24, "--at", 16, prompt, "--", "x") == 0
    shown = capsys.readouterr()
    assert not set(shown.out + shown.err) & {"\x1b", "\x07", "\b", "\x7f", "\x9b", "\u202e", "\u2066"}


@pytest.mark.parametrize("prompt", NO_PROMPTS, ids=range(len(NO_PROMPTS)))
def test_what_is_no_prompt_is_refused(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "--", prompt) == 2
    assert call("plan", "--frames", 24, "--at", 16, prompt, "--", "x") == 2
    assert len(capsys.readouterr().err.encode(errors="replace")) < 1000


def test_a_terminal_of_ascii_alone_is_enough(tmp_path: Path) -> None:
    path = made(tmp_path / "in.mp4", 3, json.dumps({"streamt2v": "1", "config": {"prompt": "日本語"}}))
    done = run("info", str(path), PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert r"\u65e5" in done.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_a_recipe_of_others_is_checked_before_it_is_used(recipe: str, tmp_path: Path) -> None:
    path = made(tmp_path / "in.mp4", 3, recipe)
    assert call("info", path) == call("info", path, "--json") == call("report", path) == 0
    assert inspect_source(path).prompts in ({}, {0: "a"})


def test_only_prompts_are_taken_from_a_recipe(tmp_path: Path) -> None:
    settings = {"prompt": "a red ball", "num_frames": 3, "image": "/etc/passwd", "model": "streamingt2v", "seed": 5}
    hub = {"initialize.text_model": "hub:evil/evil", "output.crf": 51}
    path = made(tmp_path / "in.mp4", 3, json.dumps({"streamt2v": "1", "command": "generate", "config": settings | hub}))
    given = dict.fromkeys(("model", "preset", "quality", "config_file", "settings", "size"))
    resolved = asked.resolve(**given, source=inspect_source(path), seed=1)  # type: ignore[arg-type]
    assert resolved == config.merge(config.preset("demo"), {"prompt": "a red ball", "num_frames": 3, "seed": 1})


# --------------------------------------------------------------------------------------------------------------- media


@pytest.fixture
def listening() -> Iterator[tuple[int, list[object]]]:
    """A port of this machine, and everybody who connected to it."""
    seen: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            try:
                while True:
                    seen.append(server.accept())
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], seen


def test_crafted_media_reach_nothing(
    listening: tuple[int, list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, seen = listening
    monkeypatch.chdir(tmp_path)
    url = f"http://127.0.0.1:{port}/x.mp4"
    made(Path("secret.mp4"), 3)
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"
    contents = {
        "concat.mp4": "ffconcat version 1.0\nfile secret.mp4\n",
        "concat_url.mkv": f"ffconcat version 1.0\nfile {url}\n",
        "list.mp4": hls.format("secret.mp4"),
        "list_url.mp4": hls.format(url),
        "list_concat.avi": hls.format("concat:secret.mp4|secret.mp4"),
        "key.m3u8": f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n#EXTINF:3,\n{url}\n#EXT-X-ENDLIST\n',
        "dash.mp4": f'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>{url}</BaseURL></Period></MPD>',
        "session.mp4": f"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n",
        "graph.mp4": "movie=secret.mp4",
        "meta.mp4": ";FFMETADATA1\ntitle=x\n",
        "smil.mp4": f'<smil><body><video src="{url}"/></body></smil>',
        "words.srt": "1\n00:00:00,000 --> 00:00:01,000\nx\n",
        "picture.svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{url}"/></svg>',
        "print.eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    }
    for name, content in contents.items():
        Path(name).write_text(content)
    names = ["secret%d.mp4", "concat:secret.mp4|secret.mp4", "subfile,,start,0,end,0,,:secret.mp4", "data:video/mp4,x"]
    names += [url, f"tcp://127.0.0.1:{port}", f"rtsp://127.0.0.1:{port}/x", "pipe:0", "/dev/zero", "file:secret.mp4"]
    assert len([*contents, *names]) >= 16
    for name in [*contents, *names]:
        with pytest.raises(VideoError):
            reading.probe(Path(name))
        with pytest.raises(InputError):
            pictures.read(Path(name))
    for name in ("list_url.mp4", "dash.mp4", url):
        assert call("info", name) == call("refine", name, "-o", "out.mp4") == 3
    assert seen == []
