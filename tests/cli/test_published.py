"""The family of the published networks end to end: pulled from a folder, in the real layouts, tiny and random."""

import socket
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from streamt2v import weights
from streamt2v.media import reading, writing
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


@pytest.fixture(scope="module")
def base(family: Path) -> Path:
    """A base video, not refined."""
    make(family / "base.mp4", "--no-refine", "--init", "own", frames=21)
    return family / "base.mp4"


@pytest.fixture(scope="module")
def refined_plainly(base: Path) -> tuple[int, str]:
    assert call("refine", base, "-o", base.with_name("refined.mp4"), *SMALL) == 0
    return digest(base.with_name("refined.mp4"))


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


def test_every_option_reaches_the_later_stages(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Extending has no first stage, refining only the last one."""
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


@pytest.mark.parametrize(
    "change",
    ["refine.guidance_scale=3", "refine.guidance_stop=1", "refine.posterior=published", "refine.reuse_interval=2"],
)
def test_every_setting_of_a_refiner_that_reads_text_changes_the_frames(
    change: str, base: Path, tmp_path: Path, refined_plainly: tuple[int, str]
) -> None:
    assert call("refine", base, "-o", tmp_path / "changed.mp4", *SMALL, "--set", change) == 0
    assert digest(tmp_path / "changed.mp4") != refined_plainly


def test_the_refiner_follows_a_prompt_over_time(base: Path, tmp_path: Path) -> None:
    """A chunk follows the prompt of its first new frame: 12 for 8..15, which owns frames from its cut on."""
    plain, changed = tmp_path / "plain.mp4", tmp_path / "changed.mp4"
    options = [*SMALL, "--refine-steps", 1, "--chunk", 8, "--overlap", 4, "--set", "output.crf=0"]
    assert call("refine", base, "-o", plain, *options) == 0
    assert call("refine", base, "-o", changed, *options, "--set", "prompts.10=a blue star") == 0
    one, other = (np.concatenate(list(reading.read_frames(path))) for path in (plain, changed))
    assert 8 <= (one != other).any(axis=(1, 2, 3)).argmax() <= 12


def test_a_refined_loop_goes_round(tmp_path: Path) -> None:
    """Its first frames see its last ones, and those of a video that is no loop do not."""
    options = [*SMALL, "--refine-steps", 1, "--chunk", 8, "--overlap", 4, "--set", "output.crf=0", "--prompt", PROMPT]
    equal = []
    for how in ([], ["--loop"]):
        begun = []
        for number, ending in enumerate((0, 200)):
            source, path = tmp_path / f"clip{number}.mp4", tmp_path / f"{number}{len(how)}.mp4"
            writer = writing.SegmentWriter(tmp_path / "growing", 16, 32, Fraction(8), crf=0)
            writer.append(np.repeat([100] * 16 + [ending] * 5, 16 * 32 * 3).astype(np.uint8).reshape(21, 16, 32, 3))
            writer.finish(source, "")
            assert call("refine", source, "-o", path, *options, *how) == 0
            begun.append(np.concatenate(list(reading.read_frames(path)))[:3])
        equal.append(bool((begun[0] == begun[1]).all()))
    assert equal == [True, False]


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
