"""Folders of others are data: what is incomplete, pickled or wants code of its own is refused by name."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamt2v import config, weights
from streamt2v.chunks import Chunk
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.errors import ConfigError, WeightsError
from streamt2v.families import choose, diffusers_pipelines, modelscope
from streamt2v.stages.denoise import Sampling
from streamt2v.stages.stream import chunk_noise
from streamt2v.weights import home
from tests import pipelines

SIZES = {"stream.height": 24, "stream.width": 40, "initialize.height": 32, "initialize.width": 32}
OPEN = {"initialize.guidance_scale": 0, "initialize.image_guidance_scale": 0}
WISH = config.merge(SIZES, OPEN, {"prompt": "a red ball", "initialize.num_inference_steps": 2})
SAMPLING = Sampling(num_inference_steps=3, guidance_scale=4.0)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.modelscope(tmp_path_factory.mktemp("made") / "modelscope")


@pytest.fixture
def folder(made_once: Path, tmp_path: Path) -> Path:
    """A ModelScope folder to damage."""
    return Path(shutil.copytree(made_once, tmp_path / "modelscope"))


def modelscope_frames(model: modelscope.ModelScope, wish: config.RunConfig = WISH, seed: int = 1) -> torch.Tensor:
    noise = chunk_noise(SeededDraws(seed), wish.stream.chunk, (4, 16, 16))
    return modelscope.from_modelscope(model, wish, SAMPLING, noise)


def test_modelscope_loop_equals_the_library_s_scheduler(folder: Path) -> None:
    from diffusers import DDIMScheduler

    model = modelscope.load_modelscope(folder, "cpu")
    scheduler: Any = DDIMScheduler.from_pretrained(folder / "scheduler")  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(3)
    latents = chunk_noise(SeededDraws(1), 16, (4, 16, 16))(Chunk(0, 0, 16, 0)).initial
    ids = model.tokenizer(["", WISH.prompt], padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.inference_mode():
        text = model.text_encoder(ids).last_hidden_state
        for timestep in scheduler.timesteps:
            low, high = model.unet(latents.expand(2, -1, -1, -1, -1), timestep, text).sample.chunk(2)
            latents = scheduler.step(low + 4.0 * (high - low), timestep, latents).prev_sample
        frames = model.vae.decode(latents[0].transpose(0, 1) / model.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert torch.allclose(modelscope_frames(model), frames, atol=2e-4)  # float32, a dozen layers


def test_modelscope_has_steps_and_guidance_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = modelscope.load_modelscope(folder, "cpu")
    monkeypatch.setattr(modelscope, "MODELSCOPE_STEPS", 3)
    monkeypatch.setattr(modelscope, "MODELSCOPE_GUIDANCE", 4.0)
    noise = chunk_noise(SeededDraws(1), 16, (4, 16, 16))
    frames = modelscope.from_modelscope(model, WISH, Sampling(0, 0.0), noise)
    assert torch.equal(frames, modelscope_frames(model))


def test_a_16_bit_variant_and_both_names_of_a_part_load(folder: Path) -> None:
    whole = modelscope_frames(modelscope.load_modelscope(folder, "cpu"))
    for path in folder.rglob("*.safetensors"):
        tensors = {name: value.half() for name, value in load_file(path).items()}
        save_file(tensors, path.with_name(f"{path.stem}.fp16.safetensors"), {"format": "pt"})
        path.unlink()
    halved = modelscope_frames(modelscope.load_modelscope(folder, "cpu"))
    assert halved.dtype == torch.float32
    assert 0 < (halved - whole).abs().max() < 0.1


def without_a_tensor(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path, {"format": "pt"})


def pickled(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def cut_short(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def index(folder: Path, **change: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_a_tensor, r"unet lacks the tensor 'conv_in\.weight'"),
        (pickled, "vae holds no safetensors"),
        (cut_short, "text_encoder does not load"),
        (lambda folder: shutil.rmtree(folder / "vae"), "lacks its part 'vae'"),
        (lambda folder: [path.unlink() for path in (folder / "tokenizer").glob("vocab.json")], "no vocabulary"),
        (lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text("[]"), "no noise schedule"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "no diffusers pipeline"),
        (lambda folder: index(folder, _class_name=["evil", "Pipeline"]), "no pipeline of diffusers"),
        (lambda folder: index(folder, unet=["my_code", "Network"]), "wants code from"),
        (lambda folder: index(folder, unet=["os", "system"]), "wants code from"),
        (lambda folder: index(folder, unet=["diffusers", "NotInvented"]), "have no diffusers.NotInvented"),
        (lambda folder: index(folder, unet=[None, None]), "lists no unet"),
    ],
)
def test_damaged_and_foreign_folders_are_refused(damage: Any, said: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(WeightsError, match=said):
        modelscope.load_modelscope(folder, "cpu")


def test_an_unknown_pipeline_class_is_named(folder: Path) -> None:
    index(folder, _class_name="NextYearsPipeline")
    with pytest.raises(WeightsError, match="has no NextYearsPipeline"):
        diffusers_pipelines.load(folder, "cpu")


def test_a_prior_feeds_its_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        diffusers_pipelines, "_working_size", lambda *_: (64, 64)
    )  # the library's own is far too slow here
    folders = [pipelines.kandinsky_prior(tmp_path / "prior"), pipelines.kandinsky_decoder(tmp_path / "decoder")]
    run = config.merge(
        {
            "prompt": WISH.prompt,
            "initialize.text_model": str(pipelines.svd(tmp_path / "svd")),
            "initialize.text_to_image": "+".join(map(str, folders)),
        }
    )
    chosen = choose.choose(run)
    assert chosen is not None
    assert list(chosen.drawing) == folders
    artists = [diffusers_pipelines.load(folder, "cpu") for folder in chosen.drawing]
    one, again, other = (
        diffusers_pipelines.draw_picture(artists, WISH, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_numbers_drawn_past_the_generator_are_seeded_and_nobody_else_s_move() -> None:
    class Careless:
        device = torch.device("cpu")

        def __call__(self, prompt: str, num_frames: int, generator: torch.Generator) -> Any:
            return [[torch.rand(num_frames, 8, 8, 3).numpy()]]

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (
        diffusers_pipelines.from_pipeline(Careless(), WISH, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


class Fake:
    """A pipeline that notes what it is asked."""

    device = torch.device("cpu")

    def __init__(self, num_frames: int = 16) -> None:
        self.count = num_frames
        self.asked: dict[str, Any] = {}

    def __call__(
        self, image: Any, height: int = 576, width: int = 1024, num_frames: int = 4, num_inference_steps: int = 25,
        min_guidance_scale: float = 1.0, max_guidance_scale: float = 3.0,
    ) -> Any:  # fmt: skip
        self.asked = {key: value for key, value in locals().items() if key != "self"}
        return [[torch.zeros(self.count, 8, 8, 3).numpy()]]


@pytest.mark.parametrize(
    ("base", "size"), [((256, 256), (768, 768)), ((72, 128), (576, 1024)), ((256, 144), (1024, 576))]
)
def test_a_pipeline_works_at_its_own_area_in_the_shape_of_the_base(
    base: tuple[int, int], size: tuple[int, int]
) -> None:
    fake = Fake()
    wish = config.merge({
        "stream.height": base[0], "stream.width": base[1], "initialize.num_inference_steps": 0,
        "initialize.image_guidance_scale": 2.5,
    })  # fmt: skip
    diffusers_pipelines.from_pipeline(fake, wish, torch.Generator(), torch.zeros(3, 30, 40))
    assert (fake.asked["height"], fake.asked["width"]) == size
    assert fake.asked["image"].size == size[::-1]
    assert (fake.asked["num_inference_steps"], fake.asked["num_frames"]) == (25, 16)
    assert (fake.asked["min_guidance_scale"], fake.asked["max_guidance_scale"]) == (1.0, 2.5)


def test_pipelines_that_cannot_do_it_say_so() -> None:
    with pytest.raises(ConfigError, match="starts from a picture"):
        diffusers_pipelines.from_pipeline(Fake(), WISH, torch.Generator())
    with pytest.raises(ConfigError, match="made 9 frames, the first chunk needs 16"):
        diffusers_pipelines.from_pipeline(Fake(9), WISH, torch.Generator(), torch.zeros(3, 8, 8))


def test_every_named_pipeline_says_where_it_comes_from() -> None:
    rows = weights.pipelines()
    assert {"modelscope", "animatediff", "svd", "sdxl", "realistic-vision"} <= set(rows)
    for row in rows.values():
        assert row["repository"].count("/") == 1
        assert row["licence"]
        assert row["what"]
        assert len(row.get("revision", "0" * 40)) == 40


def test_a_change_behind_a_link_changes_the_fingerprint(tmp_path: Path) -> None:
    """A part of a pipeline may lie on another disk."""
    folder, elsewhere = tmp_path / "pipeline", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
    (elsewhere / "a.safetensors").write_bytes(b"1")
    (folder / "unet").symlink_to(elsewhere)
    chosen = choose.Chosen("x", "Pipeline", folder)
    before = chosen.fingerprint()
    assert chosen.fingerprint() == before
    (elsewhere / "a.safetensors").write_bytes(b"12")
    assert chosen.fingerprint() != before


def test_a_copy_of_the_files_has_the_same_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched again, or on another machine: names and contents count, neither times nor inodes."""
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "home"))
    folder, copy = tmp_path / "pipeline", tmp_path / "copy"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "a.safetensors").write_bytes(b"1")
    (folder / "model_index.json").write_text("{}")
    shutil.copytree(folder, copy)
    os.utime(copy / "unet" / "a.safetensors", (1, 1))
    before, again = (choose.Chosen("x", "Pipeline", place).fingerprint() for place in (folder, copy))
    assert before == again
    (copy / "unet" / "a.safetensors").write_bytes(b"2")  # as long as before
    assert choose.Chosen("x", "Pipeline", copy).fingerprint() != before
    (folder / "unet" / "a.safetensors").rename(folder / "a.safetensors")
    assert choose.Chosen("x", "Pipeline", folder).fingerprint() != before


def test_a_fetched_pipeline_is_known_by_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other programs put into the shared cache does not count, and nothing is hashed again."""
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "home"))
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"1")
    by_hand = choose.Chosen("x", "Pipeline", folder).fingerprint()
    parts = {"a.safetensors": home.Recorded.of(folder / "a.safetensors").to_json()}
    home.remember("snapshots", {"a/b main": {"commit": "1", "folder": str(folder), "files": parts}})
    (folder / "b.safetensors").write_bytes(b"2")
    monkeypatch.setattr(home, "sha256_of", lambda path: pytest.fail("hashed again"))
    assert choose.Chosen("x", "Pipeline", folder).fingerprint() == by_hand


def test_a_local_folder_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "home"))
    folder = tmp_path / "pipeline"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.safetensors").write_text(name)
    before = choose.Chosen("x", "Pipeline", folder).fingerprint()
    hashed: list[str] = []
    real = home.sha256_of
    monkeypatch.setattr(home, "sha256_of", lambda path: [hashed.append(path.name), real(path)][1])
    assert choose.Chosen("x", "Pipeline", folder).fingerprint() == before
    os.utime(folder / "a.safetensors", (1, 1))
    assert choose.Chosen("x", "Pipeline", folder).fingerprint() == before
    assert choose.Chosen("x", "Pipeline", folder).fingerprint() == before
    assert hashed == ["a.safetensors"]
