"""Bases end to end: tiny random networks in the layouts that are published; any length, resuming, every option."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from streamt2v import config, weights
from streamt2v.errors import WeightsError
from streamt2v.families import bases, choose
from streamt2v.media import reading, writing
from streamt2v.media.frames import Frames
from streamt2v.runs import base, output
from streamt2v.weights import folders as lists
from tests import crash, pipelines
from tests.cli.helpers import PROMPT, call, digest, generate, made, result
from tests.hub_server import Hub, point_library_at, serving

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

REFINING = {"wan": pipelines.wan, "wan21": pipelines.wan_from_text, "ltx": pipelines.ltx, "dit": pipelines.dit}
FOLDERS = {**REFINING, "helios": pipelines.helios, "helios-distilled": pipelines.helios_distilled}
SETTINGS = {"output.crf": 1, "seed": 7}
CHUNKS = {
    "stream.chunk": 17, "stream.overlap": 5, "stream.height": 32, "stream.width": 64, "refine.chunk": 17,
    "refine.overlap": 5, "refine.num_inference_steps": 2,
}  # fmt: skip
HELIOS = {"stream.height": 64, "stream.width": 64, "output.height": 0, "output.width": 0}
PLAIN, REFINED = ["--no-refine"], ["--set", "refine.enabled=true", "--size", "96x48"]


def small(folder: Path, steps: bool = True) -> list[object]:
    """Options of a model's tiny runs: which model, sizes, and one step, three where there are three sizes."""
    helios = folder.name.startswith("helios")
    settings = SETTINGS | (HELIOS if helios else CHUNKS)
    if steps:
        settings |= dict.fromkeys(("initialize.num_inference_steps", "stream.num_inference_steps"), 3 if helios else 1)
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["--model", folder, *words, "--device", "cpu", "--threads", "1", "-q", "--offline"]


class Made(dict[str, Path]):
    """Folders or videos by name, each made when it is first asked for."""

    def __init__(self, make: Callable[[str], object], place: Path, ending: str = "") -> None:
        self.make, self.place, self.ending = make, place, ending

    def __missing__(self, name: str) -> Path:
        self[name] = self.place / f"{name}{self.ending}"
        self.make(name)
        return self[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp("bases")
    return Made(lambda name: FOLDERS[name](place / name), place)


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, folders: Made) -> Path:
    return folders[request.param]


@pytest.fixture(params=REFINING)
def refining(request: pytest.FixtureRequest, folders: Made) -> Path:
    return folders[request.param]


def length(name: str) -> int:
    """Frames of two chunks of a model."""
    return 41 if name.startswith("helios") else 29


def make(path: Path, folder: Path, frames: int, *more: object, prompt: str = PROMPT) -> tuple[int, str]:
    assert call("generate", prompt, "--frames", frames, "-o", path, *small(folder), *more) == 0
    return digest(path)


@pytest.fixture(scope="module")
def plain(folders: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A video of two chunks of each; that another run makes the same is seen where one is interrupted."""
    place = tmp_path_factory.mktemp("plain")
    return Made(lambda name: make(place / f"{name}.mp4", folders[name], length(name), *PLAIN), place, ".mp4")


@pytest.fixture(scope="module")
def plainly_refined(folders: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp("refined")
    return Made(lambda name: make(place / f"{name}.mp4", folders[name], 33, *REFINED), place, ".mp4")


# A chunk cut short, a whole one, more than one; longer ones in the deep suite, and here where memory is looked at.
@pytest.mark.parametrize("frames", [1, 17, 33, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 100, 241))])
def test_any_length_is_exact(frames: int, folder: Path, tmp_path: Path) -> None:
    wide = ["--set", "stream.width=128"] if folder.name.startswith("helios") else []  # the others are
    assert make(tmp_path / "out.mp4", folder, frames, *PLAIN, *wide)[0] == frames
    seen = reading.probe(tmp_path / "out.mp4")
    assert seen.width == 2 * seen.height


@pytest.mark.parametrize("frames", [1, 18, 33, pytest.param(100, marks=pytest.mark.slow)])
def test_any_length_is_exact_when_refined(frames: int, refining: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "out.mp4", refining, frames, *REFINED)[0] == frames
    seen = reading.probe(tmp_path / "out.mp4")
    assert (seen.width, seen.height) == (96, 48)


def refined(path: Path, source: Path, folder: Path, *more: object) -> tuple[int, str]:
    assert call("refine", source, "-o", path, *small(folder, steps=False), *REFINED, *more) == 0
    return digest(path)


def test_it_refines_a_clip_of_a_user_of_any_size(refining: Path, tmp_path: Path) -> None:
    source = made(tmp_path / "in.mp4", 24)
    first = refined(tmp_path / "a.mp4", source, refining, "--prompt", PROMPT)
    assert first[0] == 24
    assert refined(tmp_path / "b.mp4", source, refining, "--prompt", "another prompt") != first


def test_it_refines_what_another_family_made(folders: Made, tmp_path: Path) -> None:
    """Its own preset says how; the family's own refiner makes other frames, and so does I2VGen-XL for it."""
    assert generate(tmp_path / "base.mp4", 20, "--no-refine") == 0
    sizes = ["--chunk", 17, "--overlap", 5, "--refine-steps", 2, "--seed", 7, "--threads", 1, "--size", "64x32"]
    found = {}
    for name, refiner in {"wan": folders["wan"], "own": "own", "i2v": pipelines.i2vgen(tmp_path / "i2v")}.items():
        path = tmp_path / f"{name}.mp4"
        how = ["--model", "demo", "--refiner", refiner, *sizes, "-o", path, "-q", "--offline"]
        assert call("refine", tmp_path / "base.mp4", *how) == 0
        found[name] = digest(path)
    assert {frames for frames, _ in found.values()} == {20}
    assert len(set(found.values())) == 3
    usual = config.merge(*choose.usual(config.merge({"refine.model": str(folders["wan"])})))
    assert usual.refine.noise_level == config.merge(config.preset("wan")).refine.noise_level
    assert usual.stream == config.merge(config.preset("demo")).stream


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--chunk", 16], "use 13 or 17"), (["--loop", "--chunk", 17, "--overlap", 5], "refines no loops"),
     (["--set", "refine.posterior=published", "--chunk", 17, "--overlap", 5], "has no use for it")],
)  # fmt: skip
def test_as_a_refiner_it_says_mistakes_before_anything_loads(
    options: list[object], said: str, folders: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", PROMPT, "--model", "demo", "--frames", 40, "-o", tmp_path / "out.mp4"]
    assert call(*given, "--refiner", folders["wan"], "--overlap", 5, *options) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_it_extends_any_video(folder: Path, plain: Made, tmp_path: Path) -> None:
    source, path, frames = plain[folder.name], tmp_path / "out.mp4", length(folder.name)
    assert call("extend", source, "--frames", frames + 9, "-o", path, *small(folder), *PLAIN) == 0
    known, longer = (np.concatenate(list(reading.read_frames(file))) for file in (source, path))
    assert len(longer) == frames + 9
    assert float(np.abs(longer[:frames].astype(int) - known).mean()) < 8  # noise of random networks, encoded once more


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *(("wan", key, value) for key, value in [
            ("seed", 8), ("initialize.num_inference_steps", 2), ("initialize.guidance_scale", 2),
            ("stream.num_inference_steps", 2), ("stream.guidance_scale", 2), ("stream.guidance_rescale", 0.5),
            ("stream.guidance_scale", 1), ("stream.overlap", 9), ("stream.chunk", 21), ("stream.calibrate", "false"),
            ("negative_prompt", "grey"), ("prompts.17", "a blue ball"), ("stream.height", 64),
        ]),
        ("wan21", "seed", 8), ("ltx", "seed", 8), ("ltx", "output.fps", 12), ("ltx", "stream.apm", "false"),
        ("ltx", "stream.anchor", 3), ("dit", "seed", 8), ("dit", "initialize.guidance_scale", 3),
        ("dit", "stream.apm", "false"), ("dit", "stream.anchor", 3), ("dit", "stream.calibrate", "false"),
        ("dit", "stream.chunk", 20), ("dit", "stream.overlap", 8), ("dit", "stream.height", 40),
        ("helios", "seed", 8), ("helios", "stream.num_inference_steps", 4),
        ("helios", "initialize.num_inference_steps", 4), ("helios-distilled", "seed", 8),
        ("helios-distilled", "stream.guidance_scale", 3), ("helios-distilled", "initialize.guidance_scale", 3),
    ],
)  # fmt: skip
def test_every_option_changes_the_frames(
    name: str, key: str, value: object, folders: Made, plain: Made, tmp_path: Path
) -> None:
    other = make(tmp_path / "out.mp4", folders[name], length(name), *PLAIN, "--set", f"{key}={value}")
    assert other[0] == length(name)
    assert other != digest(plain[name])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("refine.noise_level", 600), ("refine.num_inference_steps", 3), ("refine.guidance_scale", 2),
        ("refine.stochastic", "true"), ("refine.overlap", 9), ("refine.chunk", 13),
    ],
)  # fmt: skip
def test_every_option_of_the_refiner_changes_the_frames(
    key: str, value: object, folders: Made, plainly_refined: Made, tmp_path: Path
) -> None:
    other = make(tmp_path / "out.mp4", folders["wan"], 33, *REFINED, "--set", f"{key}={value}")
    assert other[0] == 33
    assert other != digest(plainly_refined["wan"])


def test_a_prompt_changes_what_follows_it(folder: Path, plain: Made, tmp_path: Path) -> None:
    files = plain[folder.name], tmp_path / "b.mp4"
    at, begin = (29, 33) if folder.name.startswith("helios") else (17, 17)  # with the second chunk
    make(files[1], folder, length(folder.name), *PLAIN, "--at", at, "something else")
    first, second = (np.concatenate(list(reading.read_frames(file))).astype(int) for file in files)
    assert np.abs(first[:begin] - second[:begin]).max() <= 3  # compression may look ahead
    assert np.abs(first[begin:] - second[begin:]).mean() > 0.1


def test_a_picture_begins_the_video(folder: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "start.png")
    given = make(tmp_path / "a.mp4", folder, 17, *PLAIN, "--image", tmp_path / "start.png")
    assert given != make(tmp_path / "b.mp4", folder, 17, *PLAIN)


def refuse(*_: object) -> Any:
    raise AssertionError("the text encoder was loaded again")


@pytest.mark.parametrize(
    ("name", "how"), [*((name, PLAIN) for name in FOLDERS), *((name, REFINED) for name in REFINING)]
)
def test_an_interrupted_run_goes_on_and_gives_the_same_frames(
    name: str, how: list[str], folders: Made, plain: Made, plainly_refined: Made, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It does so without the text encoder, whose answers are kept."""
    frames, whole = (length(name), digest(plain[name])) if how is PLAIN else (33, digest(plainly_refined[name]))
    path, append, written = tmp_path / "out.mp4", writing.SegmentWriter.append, list[int]()

    def stop(writer: writing.SegmentWriter, group: Frames) -> writing.SegmentMark:
        if len(written) == (how is REFINED):  # then one group is refined, else the next chunk is yet to be made
            raise KeyboardInterrupt
        written.append(len(group))
        return append(writer, group)

    monkeypatch.setattr(output, "SAVING", 1e9)  # a state after every group
    with monkeypatch.context() as patch:
        patch.setattr(writing.SegmentWriter, "append", stop)
        assert call("generate", PROMPT, "--frames", frames, "-o", path, *small(folders[name]), *how) == 130
    monkeypatch.setattr(bases, "_encoder", refuse)
    assert call("resume", path, "-q") == 0
    assert digest(path) == whole


@pytest.mark.parametrize("name", ["wan", "dit"])
def test_a_killed_run_goes_on_and_gives_the_same_frames(
    name: str, folders: Made, plainly_refined: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two chunks; one of them in a process of its own."""
    path, whole = tmp_path / "out.mp4", digest(plainly_refined[name])
    command = ["generate", PROMPT, "--frames", 33, "-o", path, *small(folders[name]), *REFINED]
    crash.killed("stream", 2, *command, log=tmp_path / "log")
    monkeypatch.setattr(bases, "_encoder", refuse)
    assert call("resume", path, "-q") == 0
    assert digest(path) == whole


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("wan", REFINED), ("dit", REFINED),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in [("wan", PLAIN), ("ltx", REFINED), ("helios", PLAIN)]),
    ],
)  # fmt: skip
def test_what_is_held_does_not_grow_with_the_video(
    name: str, how: list[str], folders: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, store = list[int](), base.Base._store

    def watch(*given: Any) -> Any:
        group = store(*given)
        gc.collect()
        tensors = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
        held.append(sum({part.data_ptr(): part.untyped_storage().nbytes() for part in tensors}.values()))
        return group

    monkeypatch.setattr(base.Base, "_store", watch)
    frames = 9 * 33 if name == "helios" else 17 + 8 * 12
    assert make(tmp_path / "out.mp4", folders[name], frames, *how)[0] == frames
    assert len(held) == 9
    assert max(held[6:]) <= 1.05 * max(held[3:6])  # a few frames more or less wait; a chunk has three times as much


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "stream.overlap=8"], "use 5 or 9"),
        (["--set", "stream.chunk=16"], "use 13 or 17"),
        (["--set", "refine.chunk=24"], "packs 1 frame and then 4"),
        (["--set", "stream.height=40"], "multiples of 32"),
        (["--set", "stream.eta=0.5"], "has no use for it"),
        (["--set", "stream.cam=true"], "has no use for it"),
        (["--set", "refine.reuse_interval=2"], "has no use for it"),
    ],
)
def test_mistakes_are_said_before_anything_loads(
    options: list[str], said: str, folders: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", PROMPT, "--frames", 43, "-o", tmp_path / "out.mp4", *small(folders["wan"])]
    assert call(*given, *options) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [("svd", 2, "transformers that can: WanTransformer3DModel"), ("empty", 4, "is no diffusers pipeline")],
)
def test_a_folder_of_another_kind_is_refused(
    name: str, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, place = tmp_path / "model", tmp_path / "out"
    place.mkdir()
    folder.mkdir()
    if name == "svd":
        pipelines.svd(folder)
    assert call("generate", PROMPT, "--frames", 43, "-o", place / "out.mp4", *small(folder)) == code
    assert said in capsys.readouterr().err
    assert list(place.iterdir()) == []


def test_a_folder_of_ours_is_what_its_index_names(tmp_path: Path) -> None:
    """Other files of a training folder come and go; a file elsewhere is never one of its parts."""
    folder = pipelines.dit(tmp_path / "dit")
    before = lists.fingerprint(folder)
    (folder / "unet.safetensors").write_bytes(b"of another part")
    assert lists.fingerprint(folder) == before
    assert lists.layout(str(folder)) == lists.Layout(1, 4, 8, 8, 24, 2, False)
    (folder / "vae.safetensors").write_bytes((folder / "dit.safetensors").read_bytes())
    assert lists.fingerprint(folder) != before
    index = folder / "model_index.json"
    for outside in ("../dit.safetensors", "/dit.safetensors", "dit.pt"):
        index.write_text(json.dumps(json.loads(index.read_text("utf-8")) | {"transformer": ["streamt2v", outside]}))
        with pytest.raises(WeightsError, match="wants code from"):
            weights.family(str(folder))


def test_what_a_folder_of_ours_lacks_is_said_before_anything_loads(tmp_path: Path) -> None:
    folder = pipelines.dit(tmp_path / "dit")
    (folder / "text.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"has no text\.safetensors"):
        weights.family(str(folder))


def test_a_transformer_that_only_continues_a_picture_is_refused(
    folders: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(folders["wan21"], folder)
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text("utf-8").replace('"in_channels": 8', '"in_channels": 20'), "utf-8")
    assert call("generate", PROMPT, "--frames", 3, "-o", tmp_path / "out.mp4", *small(folder)) == 2
    assert "takes 20 channels, its latents have 8" in capsys.readouterr().err


def test_a_model_without_a_refiner_says_so(folders: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", PROMPT, "--frames", 3, "-o", tmp_path / "out.mp4", *small(folders["helios"])]
    assert call(*given, "--set", "refine.enabled=true") == 2
    assert "has no use for it" in capsys.readouterr().err


def test_it_comes_from_the_hub(
    folders: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the name of a repository, or its short name; a recipe from elsewhere may name neither."""
    folder, path = folders["wan"], tmp_path / "a.mp4"
    parts = {part.relative_to(folder).as_posix(): part for part in folder.rglob("*") if part.is_file()}
    files = {name: part.read_bytes() for name, part in parts.items()}
    listed = weights.pipelines()["wan"]["repository"]
    whole = make(tmp_path / "local.mp4", folder, 18, *PLAIN)
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "home"))
    with serving(Hub({"someone/wan": files, listed: files})) as running:
        point_library_at(running.url, tmp_path / "cache", monkeypatch)
        online = [word for word in small(folder) if word != "--offline"]
        for name, output in (("hub:someone/wan", path), ("wan", tmp_path / "b.mp4")):
            given = [*online, *PLAIN, "--model", name, "--frames", 18, "-o", output]
            assert call("generate", PROMPT, *given) == 0
            assert digest(output) == whole
        assert call("weights", "verify", "wan") == 0
    # From now on without a connection.
    assert call("rerun", path, "-o", tmp_path / "c.mp4", "--offline", "-q") == 2
    assert "name it with --model if you trust it" in capsys.readouterr().err
    assert call("rerun", path, "-o", tmp_path / "c.mp4", "--offline", "-q", "--model", "hub:someone/wan") == 0
    assert call("rerun", tmp_path / "b.mp4", "--offline", "-q") == 0


def test_the_list_of_weights_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in weights.describe_families()}
    assert rows["wan"]["licence"] == "Apache-2.0"
    assert rows["wan"]["state"] == "absent"
    assert call("generate", PROMPT, "--model", "wam", "-q") == 2
    assert "did you mean 'wan'" in capsys.readouterr().err
    assert call("generate", PROMPT, "--model", "hub:nobody", "-q") == 2
    assert "hub:OWNER/NAME" in capsys.readouterr().err


def test_the_result_names_the_model(folders: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "out.mp4", folders["wan"], 2, *PLAIN, "--json")
    facts = result(capsys)
    assert (facts["frames"], facts["width"], facts["height"], facts["fps"]) == (2, 64, 32, 24)
    assert facts["model"] == str(folders["wan"])
