"""The family of the published networks end to end: pulled from a folder, in the real layouts, tiny and random."""

import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streamt2v import weights
from streamt2v.weights import convert as checkpoints
from streamt2v.weights import hub
from tests import checkpoints as published
from tests.cli.helpers import PROMPT, STARTS, call, digest, result

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MODEL = "streamingt2v"
SMALL = ["--model", MODEL, "--seed", "7", "--device", "cpu", "--threads", "1", "--quiet", "--offline"]
SMALL += ["--set", "output.crf=1", "--size", "48x40", "--refine-steps", "2"]
BASE = ["--steps", "2", "--set", "stream.height=32", "--set", "stream.width=32"]
START = ["--set", "initialize.height=32", "--set", "initialize.width=32"]


@pytest.fixture(scope="module", autouse=True)
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A weights home into which the tiny published files were pulled; no connection is possible, none is tried."""

    def refuse(*arguments: object, **_: object) -> Any:
        raise AssertionError(f"a connection was opened: {arguments}")

    folder, layouts = tmp_path_factory.mktemp("published"), published.tiny_layouts()
    shapes = published.published_shapes(layouts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMT2V_HOME", str(folder / "home"))
        for name in hub.OFFLINE:
            patch.setenv(name, "1")
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        for source in weights.family(MODEL).sources_of():
            state = published.random_state(shapes[source.path.replace(".fp16.", ".")])
            if source.path.endswith(".safetensors"):
                save_file({key: value.half() for key, value in state.items()}, folder / source.path)
            else:
                torch.save({"state_dict": state}, folder / source.path)
        convert = partial(checkpoints.convert, layouts=layouts)
        hub.pull(weights.family(MODEL), convert, lambda text: None, folder=folder)
        weights.verify(weights.family(MODEL))
        yield folder


def make(path: Path, *more: object, frames: int = 17, prompt: str = PROMPT) -> tuple[int, str]:
    """Generate, refined; return frames and digest."""
    assert call("generate", prompt, "--frames", frames, "-o", path, *SMALL, *BASE, *more) == 0
    return digest(path)


OFTEN = ("own", "modelscope", "svd, sdxl")  # the deep suite takes all; each start alone is tested with the demo


@pytest.mark.parametrize(
    "name", [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in STARTS if name not in OFTEN)]
)
def test_a_refined_video_from_every_start(
    name: str, tmp_path: Path, start: Callable[[str], list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    options: list[object] = ["--init", "own"] if name == "own" else [*START, *start(name)]
    plain = make(tmp_path / "a.mp4", *options, "--json")
    facts = result(capsys)
    assert (facts["frames"], facts["width"], facts["height"], facts["model"]) == (17, 40, 40, MODEL)
    assert plain[0] == 17
    if name in ("own", "modelscope"):  # that every start repeats and obeys its seed is tested where it is cheaper
        assert make(tmp_path / "b.mp4", *options) == plain
        assert make(tmp_path / "c.mp4", *options, "--seed", 8) != plain


def test_every_option_reaches_the_later_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Extending has no first stage, refining only the last one."""
    base = tmp_path / "base.mp4"
    assert make(base, "--no-refine", "--init", "own", frames=21)[0] == 21
    capsys.readouterr()
    changes = {"--seed": 8, "--guidance": 2, "--negative": "fog", "--prompt": "b"}
    extend: list[object] = ["extend", base, "--frames", 29, *SMALL, *BASE, "--no-refine"]
    refine: list[object] = ["refine", base, *SMALL]
    for command, steps in ((extend, "--steps"), (refine, "--refine-steps")):
        made = []
        for number, change in enumerate([(), (), *changes.items(), (steps, 3)]):
            path = tmp_path / f"{command[0]}-{number}.mp4"
            assert call(*command, "-o", path, "--json", *change) == 0
            facts = result(capsys)
            assert (facts["frames"], facts["width"], facts["height"]) == (29 if command is extend else 21, 40, 40)
            made.append(digest(path))
        assert made[0] == made[1]
        assert len(set(made)) == len(made) - 1


def test_entities_in_a_prompt_are_read_as_the_published_tokenizer_does(tmp_path: Path) -> None:
    """Only the refiner's tokenizer does so; the streaming stage takes the prompt as it stands."""
    base = tmp_path / "base.mp4"
    make(base, "--no-refine", "--init", "own")
    made = []
    for number, prompt in enumerate(["cats &amp; dogs", "Cats  & dogs", "cats + dogs"]):
        path = tmp_path / f"{number}.mp4"
        assert call("refine", base, "--prompt", prompt, "-o", path, *SMALL) == 0
        made.append(digest(path))
    assert made[0] == made[1] != made[2]


def test_what_is_not_here_is_said_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published family starts with ModelScope, which was not pulled."""
    assert call("generate", PROMPT, "--frames", 17, "-o", tmp_path / "x.mp4", *SMALL, *BASE) == 4
    assert "no connection is made when offline" in capsys.readouterr().err
    assert call("weights", "pull", "svd", "--offline") == 4
    assert call("plan", PROMPT, "--model", MODEL) == 0
    assert "start    modelscope" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
