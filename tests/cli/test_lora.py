"""`--lora`: what it makes is what weights merged by hand make; recipe, resume, rerun, batch, plan; wrong files."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import streamt2v
from streamt2v import config, weights
from streamt2v.errors import ConfigError, WeightsError
from streamt2v.jobs import asked, prepare
from streamt2v.jobs.job import Job
from streamt2v.jobs.prepared import Prepared
from streamt2v.media import reading
from streamt2v.weights import header
from tests import loras
from tests.cli.helpers import PROMPT, TINY, FolderOf, call, digest, generate, made

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

BASE = ["--no-refine", "--set", "output.crf=0"]
UNET = weights.family("demo").path("stream.unet")
SHAPES = {key: row.shape for key, row in header.read_index(UNET)[1].items()}
LAYERS = [name for name in loras.layers(SHAPES) if name.endswith(("to_q", "conv1", "conv2.3"))]
WAN = [
    *("--set", "stream.chunk=17", "--set", "stream.overlap=5", "--set", "stream.height=32", "--set", "stream.width=64"),
    *("--steps", "1", "--set", "output.crf=0", "--seed", "7", "--device", "cpu", "--threads", "1", "-q", "--offline"),
]


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the demo, as kohya's trainer writes them."""
    path = tmp_path_factory.mktemp("secret") / "style.safetensors"
    return loras.written(path, loras.tensors(SHAPES, "kohya", LAYERS))


def pixels(path: Path) -> Any:
    return np.concatenate(list(reading.read_frames(path))).astype(int)


def alike(one: Any, other: Any) -> bool:
    """Whether frames differ in the rounding of a few values alone, which encoding may enlarge."""
    distance = np.abs(one - other)
    return bool(distance.max() <= 3 and (distance > 0).mean() < 0.01)


def merged(monkeypatch: pytest.MonkeyPatch, strength: float) -> None:
    """Let the demo's denoiser be merged by hand."""
    load = weights.load

    def by_hand(family: Any, role: str, *more: Any) -> Any:
        network = load(family, role, *more)
        if role == "stream.unet":
            network.load_state_dict(loras.by_hand(network.state_dict(), strength, LAYERS))
        return network

    monkeypatch.setattr(weights, "load", by_hand)


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A network that is loaded fails the test."""
    monkeypatch.setattr(weights, "load", None)
    yield


def test_frames_are_those_of_weights_merged_by_hand(
    style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, changed, hand = (tmp_path / f"{name}.mp4" for name in ("plain", "lora", "hand"))
    assert generate(plain, 24, *BASE) == 0
    assert generate(changed, 24, *BASE, "--lora", f"{style}:0.7", "--lora", f"{style}:-0.4") == 0
    merged(monkeypatch, 0.3)
    assert generate(hand, 24, *BASE) == 0
    assert alike(pixels(changed), pixels(hand))
    assert (np.abs(pixels(changed) - pixels(plain)).mean(axis=(1, 2, 3)) > 0.3).all()  # of every frame, streamed or not


def test_frames_of_a_base_are_those_of_weights_merged_by_hand(folder_of: FolderOf, tmp_path: Path) -> None:
    """The layers have the names that the authors gave them."""
    from diffusers import WanTransformer3DModel

    folder, hand, path = folder_of("wan"), tmp_path / "hand", tmp_path / "lora.safetensors"
    shutil.copytree(folder, hand)
    network = WanTransformer3DModel.from_pretrained(folder / "transformer")
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict(loras.by_hand(network.state_dict(), 0.5))
    network.save_pretrained(hand / "transformer")
    loras.written(path, loras.tensors(shapes, "kohya", published="wan"))
    given = {"plain": [folder], "lora": [folder, "--lora", f"{path}:0.5"], "hand": [hand]}
    frames = {}
    for name, more in given.items():
        out = tmp_path / f"{name}.mp4"
        assert call("generate", PROMPT, "--frames", 29, "-o", out, *WAN, "--no-refine", "--model", *more) == 0
        frames[name] = pixels(out)
    assert alike(frames["lora"], frames["hand"])
    assert np.abs(frames["lora"] - frames["plain"]).mean() > 2


def test_a_base_refines_with_it_and_draws_first_frames(folder_of: FolderOf, tmp_path: Path) -> None:
    """Each file goes into the network that it fits: another base, or ModelScope."""
    source = made(tmp_path / "in.mp4", 20)
    chunk = ["--chunk", 17, "--overlap", 5, "--refine-steps", 1, "--size", "64x32"]
    start = ["--init", folder_of("modelscope"), "--set", "initialize.height=32", "--set", "initialize.width=32"]
    commands: dict[str, tuple[str, list[object]]] = {
        "wan": ("transformer", ["refine", source, "--refiner", folder_of("wan"), *chunk, "--threads", 1, "-q"]),
        "modelscope": ("unet", ["generate", PROMPT, "--frames", 16, *start, *TINY, *BASE]),
    }
    for name, (part, command) in commands.items():
        index = header.read_index(next((folder_of(name) / part).glob("*.safetensors")))[1]
        values = loras.tensors({key: row.shape for key, row in index.items()}, part)
        path = loras.written(tmp_path / f"{name}.safetensors", values)
        found = []
        for number, more in enumerate(([], ["--lora", path])):
            out = tmp_path / f"{name}{number}.mp4"
            assert call(*command, "-o", out, *more, "--model", "demo", "--seed", 7, "--offline") == 0
            found.append(digest(out))
        assert found[0] != found[1]


def test_a_recipe_has_hash_and_strength_and_makes_the_same_again(
    style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, again = tmp_path / "out.mp4", tmp_path / "again.mp4"
    assert generate(path, 12, *BASE, "--lora", f"{style}:0.5") == 0
    comment = reading.probe(path).comment
    recipe = json.loads(comment)
    capsys.readouterr()
    assert call("info", path) == 0
    assert "generate, model demo, LoRA style.safetensors:0.5, streamt2v" in capsys.readouterr().out
    assert str(style.parent) not in comment
    assert recipe["config"]["loras.1"] == "style.safetensors:0.5"
    assert recipe["loras.1"]["sha256"] == weights.home.sha256_of(style)
    assert call("rerun", path, "-o", again, "-q") == 2
    assert "name it with --lora if you trust it" in capsys.readouterr().err
    assert call("rerun", path, "-o", again, "--lora", style) == 0  # at the strength of the recipe
    assert f"loras.1 = {style}:0.5" in capsys.readouterr().err
    assert digest(again) == digest(path)
    assert call("rerun", path, "-o", again, "-f", "--lora", style, "--lora", style) == 2
    assert "the recipe has no loras.2" in capsys.readouterr().err
    other = changed(style, tmp_path / "style.safetensors")
    assert other.stat().st_size == style.stat().st_size
    assert call("rerun", path, "-o", again, "-f", "--lora", other) == 3
    assert "sha256 was" in capsys.readouterr().err


def changed(path: Path, other: Path) -> Path:
    """The same file but for its last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    return other


def test_a_stopped_run_finds_it_again_or_says_what_changed(
    style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, own = tmp_path / "out.mp4", tmp_path / "place" / "own.safetensors"
    own.parent.mkdir()
    shutil.copy(style, own)
    assert generate(path, 12, *BASE, "--keep-run", "--lora", f"{own}:0.5") == 0
    whole = digest(path)
    path.unlink()  # the run is there, as if it had been stopped
    own.unlink()
    assert call("resume", path, "-q") == 5
    assert f"{own} does not exist" in capsys.readouterr().err
    assert generate(path, 12, *BASE, "--resume", "--lora", f"{own}:0.5") == 4
    changed(style, own)
    assert call("resume", path, "-q") == 5
    assert "has other contents than the run began with" in capsys.readouterr().err
    assert generate(path, 12, *BASE, "--resume", "--lora", f"{own}:0.5") == 5
    assert "was started with loras.1.sha256" in capsys.readouterr().err
    shutil.copy(style, own)
    assert generate(path, 12, *BASE, "--resume", "--lora", f"{own}:0.6") == 5
    assert 'config.loras.1 = "own.safetensors:0.5"' in capsys.readouterr().err
    shutil.move(own, tmp_path / own.name)
    assert call("resume", path, "-q") == 0
    assert digest(path) == whole


def test_rows_have_their_own_and_leave_nothing_behind(style: Path, tmp_path: Path) -> None:
    """The networks stay loaded from row to row, but not what was merged into them."""
    rows = tmp_path / "jobs.jsonl"
    own: dict[str, dict[str, Any]] = {
        "a": {}, "b": {"lora": []}, "c": {"lora": [f"{style}:0"]}, "d": {"lora": str(style)}, "e": {},
    }  # fmt: skip
    rows.write_text("".join(json.dumps({"id": name, "prompt": PROMPT, **more}) + "\n" for name, more in own.items()))
    out = tmp_path / "out"
    assert call("batch", rows, "--out-dir", out, *TINY, *BASE, "--frames", 12, "--lora", f"{style}:0.5") == 0
    found = {name: digest(out / f"{name}.mp4") for name in own}
    assert found["b"] == found["c"]
    assert found["a"] == found["e"]
    assert len(set(found.values())) == 3


def test_from_python(style: Path, tmp_path: Path) -> None:
    small = {"frames": 12, "seed": 7, "steps": 1, "size": "80x48", "no_refine": True, "threads": 1, "model": "demo"}
    base: dict[str, Any] = small | {"stream.height": 24, "stream.width": 40, "device": "cpu"}
    video = streamt2v.generate(PROMPT, tmp_path / "a.mp4", lora={style: 0.5}, **base)
    assert video.recipe["config"]["loras.1"] == "style.safetensors:0.5"
    with pytest.raises(WeightsError, match="No such file"):
        streamt2v.generate(PROMPT, tmp_path / "b.mp4", lora=[f"{tmp_path / 'none'}:0.5"], **base)


def test_a_plan_names_it(style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loads_nothing: None) -> None:
    longer = ["extend", made(tmp_path / "in.mp4", 20), "--frames", 40, "--prompt", PROMPT, "--dry-run"]
    for command in (["plan", PROMPT], longer):
        assert call(*command, "--model", "demo", "--lora", f"{style}:0.5") == 0
        assert f"lora     {style} at 0.5" in capsys.readouterr().out
    assert call("plan", PROMPT, "--model", "demo", "--lora", UNET) == 4


def test_files_and_settings_name_it_and_options_replace_that(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[loras]\n1 = "a:0.5"\n2 = "b"\n')
    given: dict[str, Any] = {"model": "demo", "config_file": file}
    assert asked.resolve(**given).loras == {1: "a:0.5", 2: "b"}
    assert asked.resolve(**given, settings=["loras.2=c:2"]).loras == {1: "a:0.5", 2: "c:2"}
    assert asked.resolve(**given, settings=["loras.3=c"], lora=["d"]).loras == {1: "d"}


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [("a", "a", 1), ("a:0.5", "a", 0.5), ("a:-2", "a", -2), ("C:\\a", "C:\\a", 1), ("C:\\a:0.5", "C:\\a", 0.5),
     ("a:b", "a:b", 1), ("a:b:1e-1", "a:b", 0.1)],
)  # fmt: skip
def test_a_strength_follows_the_last_colon(text: str, path: str, strength: float) -> None:
    assert config.parse_lora(text) == (path, strength)
    assert config.parse_lora(config.at_path("loras.1", text, path)) == (path, strength)


@pytest.mark.parametrize("text", ["", ":1", "a:nan", "a:inf", "a:10.5", "a:-11"])
def test_a_strength_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be FILE or FILE:STRENGTH"):
        config.merge({"loras.1": text})


def test_it_is_said_where_first_frames_come_without_it(
    style: Path, tmp_path: Path, folder_of: FolderOf, start: Callable[[str], list[object]]
) -> None:
    picture = tmp_path / "start.png"
    Image.new("RGB", (80, 48)).save(picture)
    base = {"prompt": PROMPT, "num_frames": 24, "loras.1": str(style)}
    said = {}
    for name, more in {
        "text": {},
        "picture": {"image": str(picture)},
        "ltx": {"initialize.text_model": str(folder_of("ltx"))},
    }.items():
        run = config.merge(config.preset("demo"), base, more)
        known = prepare.check(Prepared(Job("generate", run, tmp_path / "out.mp4", device="cpu")))
        said[name] = [notice for notice in known.notices if "--lora" in notice]
    assert said == {
        "text": [],
        "picture": ["the first frames are made by a network of its own, which no --lora changes"],
        "ltx": [f"the first frames are made by {folder_of('ltx')}, which no --lora changes"],
    }


def test_wrong_files_are_refused_before_anything_loads(
    style: Path, tmp_path: Path, folder_of: FolderOf, capsys: pytest.CaptureFixture[str], loads_nothing: None
) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "style.pt")
    other = {"lora_unet_a.lora_down.weight": torch.ones(2, 2), "lora_unet_a.lora_up.weight": torch.ones(2, 2)}
    loras.written(tmp_path / "other.safetensors", other)
    wan = ["--model", folder_of("wan"), *WAN, "--no-refine"]
    for given, code, said in [
        ([tmp_path / "none.safetensors"], 4, "No such file"),
        ([tmp_path / "style.pt"], 4, "pickled ones (.pt, .bin, .ckpt) are never opened"),
        ([UNET], 4, "is no part of a LoRA"),
        ([tmp_path / "other.safetensors"], 4, "'lora_unet_a.lora_down.weight' fits no layer of UNet3D; 0 of its 1"),
        ([style, *wan], 4, "it fits demo; this run draws by"),
        ([f"{style}:11"], 2, "must lie in -10..10"),
    ]:
        assert call("generate", PROMPT, "--frames", 17, "-o", tmp_path / "x.mp4", "--lora", *given) == code
        assert said in capsys.readouterr().err
    assert call("refine", made(tmp_path / "in.mp4", 20), "--lora", style, "--model", "demo") == 2
    assert "nothing that draws runs here" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.mp4.streamt2v"))
