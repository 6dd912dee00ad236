"""StreamingSVD end to end: pulled in the real layout, tiny and random; any length, resuming, every option."""

import gc
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from streamt2v import config, memory, weights
from streamt2v.jobs import asked, needs
from streamt2v.media import reading, writing
from streamt2v.runs import base
from streamt2v.weights import convert as checkpoints
from streamt2v.weights import header, hub
from tests import checkpoints as published
from tests import crash
from tests.cli.helpers import PROMPT, FolderOf, call, digest, result

MODEL = "streamingsvd"
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SMALL = ["--model", MODEL, "--device", "cpu", "--threads", "1", "--quiet", "--offline"]
SETTINGS = {
    "seed": 7, "output.crf": 1, "stream.height": 32, "stream.width": 64, "stream.num_inference_steps": 1,
    "initialize.num_inference_steps": 1, "refine.model": "own",
}  # fmt: skip
SMALL += [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
# A video's third model: small chunks, two steps.
OTHER = ["--size", "64x32", "--refine-steps", "2", "--chunk", "8", "--overlap", "3"]
REFINED = ["--size", "96x48", "--refine-steps", "1"]
PLAIN = ["--no-refine"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A weights home into which the tiny published files were pulled; no connection is possible."""

    def refuse(asked: socket.socket, address: Any) -> Any:
        if asked.family == socket.AF_UNIX:  # within this machine: a run that is a process of its own
            return super(socket.socket, asked).connect(address)
        raise AssertionError(f"a connection was opened: {address}")

    folder, layouts = tmp_path_factory.mktemp("published"), published.tiny_layouts()
    shapes = published.published_shapes(layouts)
    names = {"model.safetensors": published.STREAMING_SVD}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMT2V_HOME", str(folder / "home"))
        for name in hub.OFFLINE:
            patch.setenv(name, "1")
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        for source in weights.family(MODEL).sources_of():
            state = published.random_state(shapes[names.get(source.path, source.path)])
            if source.path.endswith(".safetensors"):
                save_file(state, folder / source.path)
            else:
                torch.save({"state_dict": state}, folder / source.path)
        sized = (folder / "model.safetensors").stat().st_size
        rows = weights.catalog._manifest(weights.catalog.PACKAGE).read_text("utf-8")
        (folder / "weights.toml").write_text(rows.replace("bytes = 12527386656\n", f"bytes = {sized}\n"))
        patch.setattr(weights.catalog, "_manifest", lambda root: folder / "weights.toml")
        hub.pull(weights.family(MODEL), partial(checkpoints.convert, layouts=layouts), lambda text: None, folder=folder)
        weights.verify(weights.family(MODEL))
        yield folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "start.png"
    Image.fromarray(np.linspace(0, 255, 50 * 70 * 3).astype(np.uint8).reshape(50, 70, 3)).save(path)
    return path


def arguments(path: Path, picture: Path, frames: int, *more: object) -> list[object]:
    return ["generate", PROMPT, "--image", picture, "--init", "own", "--frames", frames, "-o", path, *SMALL, *more]


def make(path: Path, picture: Path, frames: int, *more: object) -> tuple[int, str]:
    assert call(*arguments(path, picture, frames, *more)) == 0
    return digest(path)


@pytest.mark.parametrize("frames", [1, 25, 26, *(pytest.param(n, marks=pytest.mark.slow) for n in (24, 43, 100, 241))])
def test_any_length_is_exact(frames: int, picture: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "out.mp4", picture, frames, *PLAIN)[0] == frames


@pytest.mark.parametrize(
    "frames", [1, 25, 43, *(pytest.param(frames, marks=pytest.mark.slow) for frames in (24, 26, 100, 241))]
)
def test_any_length_is_exact_after_i2vgen_xl(frames: int, picture: Path, tmp_path: Path, folder_of: FolderOf) -> None:
    options = ["--refiner", folder_of("i2vgen"), *OTHER, "--size", "32x16", "--refine-steps", "1"]
    assert make(tmp_path / "out.mp4", picture, frames, *options)[0] == frames


@pytest.mark.parametrize("name", ["svd, sdxl", "svd, picture", "modelscope"])
def test_first_frames_may_come_from_another_model(
    name: str, start: Callable[[str], list[object]], tmp_path: Path
) -> None:
    """A prompt alone is enough where that model draws, or reads it."""
    sizes = ["--set", "initialize.height=32", "--set", "initialize.width=64"]
    given = ["--frames", 30, *SMALL, *PLAIN, *sizes, *start(name)]
    assert call("generate", PROMPT, "-o", tmp_path / "out.mp4", *given) == 0
    assert digest(tmp_path / "out.mp4")[0] == 30


def test_a_refined_video(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(tmp_path / "a.mp4", picture, 26, *REFINED, "--json")
    facts = result(capsys)
    assert (made[0], facts["width"], facts["height"], facts["model"]) == (26, 96, 48, MODEL)
    other = ["generate", "x", *arguments(tmp_path / "b.mp4", picture, 26, *REFINED)[2:]]
    assert call(*other) == 0
    assert digest(tmp_path / "b.mp4") != made


def test_it_is_refined_by_i2vgen_xl_unless_asked_otherwise(
    picture: Path, tmp_path: Path, folder_of: FolderOf, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = asked.resolve(model=MODEL)
    assert (usual.refine.model, usual.refine.chunk, usual.refine.overlap) == ("i2vgen-xl", 38, 12)
    assert (usual.refine.num_inference_steps, usual.refine.noise_level, usual.refine.solver) == (29, 926, "ddim")
    assert asked.resolve(model=MODEL, refiner="own").refine == config.RefineConfig()
    given = ["--frames", 12, "-o", tmp_path / "a.mp4", *SMALL, *OTHER]
    assert call("generate", PROMPT, "--image", picture, "--init", "own", *given, "--refiner", "i2vgen-xl") == 4
    assert "i2vgen-xl" in capsys.readouterr().err
    made = make(tmp_path / "b.mp4", picture, 12, *OTHER, "--refiner", folder_of("i2vgen"))
    assert made[0] == 12
    assert call("rerun", tmp_path / "b.mp4", "--image", picture, "-q") == 2
    assert "--refiner" in capsys.readouterr().err
    assert call("rerun", tmp_path / "b.mp4", "--image", picture, "--refiner", folder_of("i2vgen"), "-q") == 0


def test_any_video_is_refined_by_it_without_files_of_a_family(
    picture: Path, tmp_path: Path, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a.mp4", picture, 12, *PLAIN)
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "empty"))
    given = ["--model", MODEL, "--refiner", folder_of("i2vgen"), *OTHER, "-o", tmp_path / "b.mp4", "-q"]
    assert call("refine", tmp_path / "a.mp4", *given) == 0
    assert digest(tmp_path / "b.mp4")[0] == 12


@pytest.fixture(scope="module")
def plain(picture: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """A video of two chunks; that another run makes the same is seen where one is interrupted."""
    return make(tmp_path_factory.mktemp("plain") / "a.mp4", picture, 43, *PLAIN)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 8), ("initialize.num_inference_steps", 2), ("initialize.image_guidance_scale", 5),
        ("stream.num_inference_steps", 2), ("stream.guidance_scale", 5), ("stream.anchor", 0), ("stream.cam", "false"),
        ("picture.fps", 20), ("picture.motion_bucket_id", 5), ("picture.noise_aug_strength", 0.5),
        ("picture.noise", "normal"), ("picture.min_guidance_scale", 2.5), ("picture.decode_chunk_size", 4),
        ("picture.decode_overlap", 0), ("picture.decode_groups", "published"),
    ],
)  # fmt: skip
def test_every_setting_changes_the_frames(
    key: str, value: object, plain: tuple[int, str], picture: Path, tmp_path: Path
) -> None:
    made = make(tmp_path / "out.mp4", picture, 43, *PLAIN, "--set", f"{key}={value}")
    assert made[0] == plain[0]
    assert made != plain


def test_an_interrupted_run_goes_on_and_gives_the_same_frames(
    plain: tuple[int, str], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "out.mp4"
    with monkeypatch.context() as patch:
        patch.setattr(writing.SegmentWriter, "append", stop)  # when the first chunk is stored
        assert call(*arguments(path, picture, 43, *PLAIN)) == 130
    assert call("resume", path, "-q") == 0
    assert digest(path) == plain


def test_a_killed_run_goes_on_and_gives_the_same_frames(
    folder: Path, picture: Path, tmp_path: Path, folder_of: FolderOf
) -> None:
    frames, more = 26, ["--refiner", folder_of("i2vgen"), *OTHER]
    whole, path = make(tmp_path / "whole.mp4", picture, frames, *more), tmp_path / "out.mp4"
    before = crash.Listed(folder / "weights.toml", crash.Signalled("output", 1))
    child = crash.Run(*arguments(path, picture, frames, *more), log=tmp_path / "log", before=before)
    assert child.wait() == -signal.SIGKILL, child.said
    assert call("resume", path, "-q") == 0
    assert digest(path) == whole


def test_it_extends_any_video(picture: Path, tmp_path: Path) -> None:
    source, path = tmp_path / "in.mp4", tmp_path / "out.mp4"
    make(source, picture, 25, *PLAIN)
    options = [*SMALL, *PLAIN]
    assert call("extend", source, "--frames", 43, "-o", path, *options) == 0
    known, longer = (np.concatenate(list(reading.read_frames(file))) for file in (source, path))
    assert len(longer) == 43
    assert float(np.abs(longer[:25].astype(int) - known).mean()) < 2  # encoded once more
    assert call("extend", source, "--frames", 43, "-o", tmp_path / "b.mp4", *options, "--seed", 8) == 0
    assert digest(tmp_path / "b.mp4") != digest(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--init", "own"], "starts from a picture and reads no text"),
        (["--set", "stream.eta=0.5"], "has no use for it"),
        (["--set", "stream.anchor=25"], "the first chunk ends with frame 24"),
        (["--set", "stream.overlap=8"], "looks at 7 frames"),
        (["--set", "stream.height=36"], "multiples of 8"),
        (["--set", "picture.decode_chunk_size=2"], "decode"),
        (["--no-refine", "--at", "30", "a blue ball"], "a later prompt would change nothing"),
    ],
)
def test_mistakes_are_said_before_anything_loads(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("generate", PROMPT, "--frames", 43, "-o", tmp_path / "out.mp4", *SMALL, *options) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_enough(picture: Path, tmp_path: Path) -> None:
    given = ["--init", "own", "--frames", 2, "-o", tmp_path / "a.mp4", *SMALL, *PLAIN]
    assert call("generate", *given) == 2
    assert call("generate", "--image", picture, *given) == 0


def test_the_refiner_is_only_fetched_for_those_who_refine(
    folder: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "home"))
    tiny = partial(checkpoints.convert, layouts=published.tiny_layouts())
    monkeypatch.setattr(checkpoints, "convert", tiny)
    pulled = ["weights", "pull", MODEL, "--no-refine", "--from", folder, "--offline"]
    assert call(*pulled) == 4  # SVD-XT, which makes the first frames, is not here
    assert "svd" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "home").glob("streamingt2v")] == []
    assert make(tmp_path / "a.mp4", picture, 2, *PLAIN)[0] == 2
    assert call(*arguments(tmp_path / "b.mp4", picture, 2)) == 4
    said = capsys.readouterr().err
    assert "refine/unet.safetensors is not here" in said
    assert f"weights pull {MODEL} --refiner own" in said
    assert call("weights", "verify", MODEL) == 0
    assert {row["name"]: row["state"] for row in weights.describe_families()}[MODEL] == "ok"
    assert call("weights", "pull", MODEL, "--from", folder, "--offline") == 4
    assert [path.name for path in (tmp_path / "home").glob("streamingt2v")] == []
    assert call("weights", "pull", MODEL, "--refiner", "own", "--from", folder, "--offline") == 4
    assert [path.name for path in (tmp_path / "home").glob("streamingt2v")] == ["streamingt2v"]
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "other"))
    assert call("refine", tmp_path / "a.mp4", "--model", MODEL, "-o", tmp_path / "c.mp4", "-q") == 4


def test_other_models_refuse_what_only_this_one_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--frames", 20, "-o", tmp_path / "out.mp4", "--set", "picture.fps=9", "--model", "demo", "-q"]
    assert call("generate", PROMPT, *given) == 2
    assert "has no use for it" in capsys.readouterr().err


def test_a_temporal_decoder_is_counted_with_all_its_frames() -> None:
    run = config.merge(config.preset(MODEL), {"model": MODEL})
    stream, _ = needs.stages(run)
    fewer, _ = needs.stages(config.merge(config.preset(MODEL), {"model": MODEL, "picture.decode_chunk_size": 4}))
    assert stream.frame_values == 2 * fewer.frame_values


def test_files_are_shared_with_the_family_that_made_them_first(folder: Path) -> None:
    """Its refiner is that of the other published family."""
    assert weights.family(MODEL).path("refine.unet") == weights.family("streamingt2v").path("refine.unet")
    assert header.read_header(weights.family(MODEL).path("refine.unet"))[0] == "UNet3D"
    rows = {row["name"]: row["state"] for row in weights.describe_families()}
    assert (rows[MODEL], rows["streamingt2v"]) == ("ok", "incomplete")


def test_what_is_held_does_not_grow_with_the_video(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, store = list[int](), base.Base._store

    def watch(*given: Any) -> Any:
        group = store(*given)
        gc.collect()
        tensors = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
        held.append(sum({part.data_ptr(): part.untyped_storage().nbytes() for part in tensors}.values()))
        return group

    monkeypatch.setattr(base.Base, "_store", watch)
    make(tmp_path / "out.mp4", picture, 25 + 5 * 18, *PLAIN)
    assert len(held) == 6
    assert len(set(held[2:])) == 1  # until then the first chunk waits to be freed
    needed = []
    for frames in (100, 10_000):
        run = config.merge(config.preset(MODEL), {"model": MODEL, "num_frames": frames})
        needed.append(memory.needed(needs.stages(run), memory.ladder("cuda")[0]))
    assert needed[0] == needed[1] > memory.OWN_BYTES
