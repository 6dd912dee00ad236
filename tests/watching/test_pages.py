"""The pages in a browser: one that plays what grows, and pages that fit a desk and a phone in light and dark."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streamt2v.metrics.evaluation import Settings, Subject, measure
from streamt2v.watching.serve import Server
from tests.cli.helpers import call
from tests.watching import browser
from tests.watching.browser import Browser
from tests.watching.runs import Growing, drawn

pytestmark = pytest.mark.skipif(browser.FOUND is None, reason=f"none of {', '.join(browser.NAMES)} is installed")
SAID = "document.querySelector('#said').textContent"
PROMPTS = {"prompts.48": "a blue star over the city at night", "stream.eta": 0.5}


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as opened:
        opened.size(1280, 900)
        yield opened
        assert opened.complaints == []  # such as of a policy that forbids what the page does


def shoot(page: Browser, name: str, shots: Path) -> None:
    picture = shots / f"{name}.png"
    page.screenshot(picture)
    assert picture.stat().st_size > 1000


def test_it_plays_while_it_grows_and_after_a_kill_and_the_end(page: Browser, tmp_path: Path) -> None:
    output = tmp_path / "ball.mp4"
    server = Server(tmp_path, output)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with Growing(output, 96, **PROMPTS) as run:
            page.go(server.url)
            page.until(f"{SAID}.includes('Running')")
            assert page.ask("player.hidden")
            for _ in range(4):
                run.step()
            page.until("player.currentTime > 0.5 && player.videoWidth === 256")
            page.until("document.querySelectorAll('#last img').length === 6")
            shoot(page, "first", tmp_path)
            for _ in range(4):
                run.step()
            page.until("player.currentTime > 3.5")  # of what had not been made when it began
            assert page.ask("document.querySelectorAll('#stages progress')[1].value") == run.writer.mark.frames
            shoot(page, "later", tmp_path)
            run.kill()
            page.until(f"{SAID}.includes('Stopped')")
            assert not page.ask("document.querySelector('#resume').hidden")
            page.ask("player.currentTime = 1, player.play()")
            page.until("player.currentTime > 1.2")
            shoot(page, "killed", tmp_path)
            while run.step():
                pass
            run.finish(json.dumps({"streamt2v": "1", **run.directory.recipe}))
            page.until(f"{SAID}.startsWith('Finished')")
            page.until("player.currentSrc.endsWith('finished') && player.duration === 12 && player.currentTime > 1.4")
            shoot(page, "finished", tmp_path)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_pages_fit_a_desk_and_a_phone(page: Browser, tmp_path: Path) -> None:
    from streamt2v.metrics import report

    with Growing(tmp_path / "ball.mp4", 96, **PROMPTS) as run:
        while run.step():
            pass
        run.finish(json.dumps({"streamt2v": "1", **run.directory.recipe}))
    assert call("report", tmp_path / "ball.mp4") == 0
    frames = drawn(0, 60)
    cut = np.concatenate([frames[:30], 255 - frames[30:]])
    results = [
        measure(
            iter([images]), Subject(name, 60, 128, 72, 8.0, "x" * 300, (16, 24)), Settings(flow_size=32, clip="none")
        )
        for name, images in (("a.mp4", frames), ("a_very_" * 12 + "long_name.mp4", cut))
    ]
    (tmp_path / "scores.html").write_text(report.as_html(results, Settings()))
    for name in ("ball", "scores"):
        for width, dark in ((1280, False), (390, True)):
            page.size(width, 844, dark)
            page.go(f"file://{tmp_path}/{name}.html")
            assert page.ask("document.documentElement.scrollWidth") == width
            wide = (
                "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
            )
            assert page.ask(f"{wide}.map(e => e.outerHTML.slice(0, 90))") == []
            small = (
                "[...document.querySelectorAll('body *')].filter(e => parseFloat(getComputedStyle(e).fontSize) < 12)"
            )
            assert page.ask(f"{small}.length") == 0
            ground = page.ask("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(19, 22, 26)" if dark else "rgb(255, 255, 255)")
            assert page.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            shoot(page, f"{name}_{width}", tmp_path)
