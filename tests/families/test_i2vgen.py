"""I2VGen-XL as a refiner: what its network is told is what the published pipeline tells it, and the loop is DDIM's."""
# mypy: disable-error-code="no-untyped-call"

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, I2VGenXLUNet
from diffusers.pipelines.deprecated.i2vgen_xl.pipeline_i2vgen_xl import I2VGenXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamt2v import config, devices, memory
from streamt2v.chunks import Chunk, loop_plan, refinement_plan
from streamt2v.errors import ConfigError, WeightsError
from streamt2v.families import choose, i2vgen
from streamt2v.families.diffusers_pipelines import load_part, noise_schedule
from streamt2v.families.makers import Enlarged
from streamt2v.families.networks import Networks
from streamt2v.jobs import needs
from streamt2v.models.encoders import embed_image
from streamt2v.stages.refine import RefineState
from streamt2v.weights import folders, published
from tests import pipelines

PROMPT, SIZE = "a ball", (16, 24)
SHORT = {"refine.chunk": 6, "refine.overlap": 3}


class Silent:
    """Watches nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.i2vgen(tmp_path_factory.mktemp("i2vgen") / "folder")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Tensor:
    """Eight frames, refined in two chunks."""
    return refined(folder, clip(8), **SHORT)


def networks(folder: Path, **settings: Any) -> Networks:
    asked = {"refine.model": str(folder), "model": "demo", "seed": 3, "refine.num_inference_steps": 3, **settings}
    run = config.merge(config.preset("demo"), config.preset("i2vgen-xl"), asked)
    return Networks(run, [PROMPT], devices.resolve("cpu"), memory.ladder("cpu")[0], {}, Silent())


def enlarged(frames: Tensor, made: Networks, state: dict[str, Tensor] | None = None, loop: bool = False) -> Enlarged:
    settings = made.run.refine

    def source(start: int) -> Iterator[Tensor]:
        return iter(frames[start:].split(1))

    plan: tuple[Chunk, ...] = refinement_plan(len(frames), settings.chunk, settings.overlap)
    if loop:
        plan, around = loop_plan(len(frames), settings.chunk, settings.overlap, len(frames) + 2 * settings.chunk)
        frames = frames[[around.frame(number) for number in range(plan[-1].stop)]]
    return Enlarged(source, SIZE, 1.0, plan, around if loop else None, lambda chunk: PROMPT, state or {})


def refined(folder: Path, frames: Tensor, **settings: Any) -> Tensor:
    made = networks(folder, **settings)
    chosen = choose.refiner(made.run)
    assert chosen is not None
    groups = i2vgen.refiner(made, chosen)(enlarged(frames, made))
    return torch.cat([frame for group in groups for frame in group.frames])


def clip(count: int) -> Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.inference_mode()
def test_one_chunk_is_what_the_library_makes(folder: Path) -> None:
    """Its scheduler, its network and its own way to tell the picture, at the published timesteps."""
    frames, made = clip(5), networks(folder, **{"refine.num_inference_steps": 29})
    found = refined(folder, frames, **{"refine.num_inference_steps": 29})

    vae, unet = (
        kind.from_pretrained(folder / name).eval() for kind, name in ((AutoencoderKL, "vae"), (I2VGenXLUNet, "unet"))
    )
    scheduler: Any = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(30)
    timesteps = scheduler.timesteps[1:]
    assert [int(timesteps[0]), int(timesteps[1]), int(timesteps[-1])] == [925, 892, 1]
    clean = torch.cat([vae.encode(frame).latent_dist.mean for frame in frames.split(1)]) * vae.config.scaling_factor
    noise = torch.stack([made.draws.normal("refine.start", (number,), clean.shape[1:]) for number in range(5)])
    latents = scheduler.add_noise(clean, noise, timesteps[:1]).transpose(0, 1)[None]

    told: Any = SimpleNamespace(vae=vae, do_classifier_free_guidance=False)
    told.vae = SimpleNamespace(
        config=vae.config,
        encode=lambda image: SimpleNamespace(
            latent_dist=SimpleNamespace(sample=lambda: vae.encode(image).latent_dist.mean)
        ),
    )
    picture = I2VGenXLPipeline.prepare_image_latents(told, frames[:1], "cpu", 5, 1)
    chosen = choose.refiner(made.run)
    assert chosen is not None
    _, index = folders.read_index(folder)
    load = load_part
    tokenizer, words, eyes = (
        load(folder, name, index, torch.float32) for name in ("tokenizer", "text_encoder", "image_encoder")
    )
    text = i2vgen.encoded(tokenizer, words, [i2vgen.AVOIDED, f"{PROMPT}. {i2vgen.QUALITY}"])
    square = embed_image(eyes, frames[:1, :, :, 4:20])
    embedding = torch.stack([torch.zeros_like(square), square])
    for timestep in timesteps:
        output = unet(
            latents.repeat(2, 1, 1, 1, 1),
            timestep,
            torch.tensor([38, 38]),
            picture.repeat(2, 1, 1, 1, 1),
            embedding,
            text,
        ).sample
        guided = output[:1] + 9 * (output[1:] - output[:1])
        latents = scheduler.step(guided, timestep, latents).prev_sample
    expected = torch.cat(
        [vae.decode(one / vae.config.scaling_factor).sample for one in latents[0].transpose(0, 1).split(1)]
    )
    assert float((found - expected.clamp(-1, 1)).abs().max()) < 2e-3


@given(st.integers(1, 60))
def test_the_picture_comes_first_and_the_other_planes_say_how_far_it_is(count: int) -> None:
    latents = torch.full((4, 2, 3), 7.0)
    planes = i2vgen.placed(latents, count)
    assert planes.shape == (1, 4, count, 2, 3)
    assert torch.equal(planes[0, :, 0], latents)
    assert [float(plane.unique()) for plane in planes[0].unbind(1)[1:]] == pytest.approx(
        [frame / (count - 1) for frame in range(1, count)]
    )


@pytest.mark.parametrize(("chunk", "overlap"), [(6, 2), (4, 3), (14, 0)])
def test_a_run_continued_from_any_state_gives_the_same_frames(folder: Path, chunk: int, overlap: int) -> None:
    settings = {"refine.chunk": chunk, "refine.overlap": overlap}
    frames, whole, states = clip(14), list[tuple[int, Tensor]](), list[dict[str, Tensor]]()
    made = networks(folder, **settings)
    chosen = choose.refiner(made.run)
    assert chosen is not None
    for group in i2vgen.refiner(made, chosen)(enlarged(frames, made)):
        whole.append((group.start, torch.cat(list(group.frames))))
        states.append({name: tensor.clone() for name, tensor in group.state().items()})
    complete = torch.cat([part for _, part in whole])
    assert len(complete) == 14
    for (start, part), state in zip(whole[:-1], states, strict=False):
        again = i2vgen.refiner(networks(folder, **settings), chosen)(enlarged(frames, made, state))
        rest = torch.cat([frame for group in again for frame in group.frames])
        assert torch.equal(rest, complete[start + len(part) :])
    in_flight = RefineState.from_tensors(states[0])
    assert set(states[0].get("picture_frames", torch.tensor([])).tolist()) == {
        chunk.start
        for chunk in refinement_plan(14, chunk, overlap)
        if in_flight.steps_done[chunk.index] < 3 and chunk.start < in_flight.encoded
    }


@pytest.mark.parametrize(
    "sparing",
    [{"feed_forward_rows": 40}, {"batched_guidance": False}, {"keep_networks": False, "encoders_on_host": True}],
)
def test_every_plan_for_memory_gives_the_same_frames(folder: Path, sparing: dict[str, Any], plain: Tensor) -> None:
    frames, made = clip(8), networks(folder, **SHORT)
    made.policy = replace(made.policy, **sparing)
    chosen = choose.refiner(made.run)
    assert chosen is not None
    groups = i2vgen.refiner(made, chosen)(enlarged(frames, made))
    found = torch.cat([frame for group in groups for frame in group.frames])
    assert torch.allclose(found, plain, atol=1e-3)
    if not made.policy.keep_networks:
        assert folder / "text_encoder" not in made.here


def test_what_is_held_does_not_grow_with_the_video(folder: Path) -> None:
    held = []
    for count in (24, 48):
        made = networks(folder, **{"refine.chunk": 4, "refine.overlap": 2, "refine.num_inference_steps": 2})
        chosen = choose.refiner(made.run)
        assert chosen is not None
        sizes = []
        for group in i2vgen.refiner(made, chosen)(enlarged(clip(count), made)):
            sizes.append(sum(tensor.nbytes for name, tensor in group.state().items() if name != "steps_done"))
        held.append(max(sizes))
    assert held[0] == held[1]


def test_the_sizes_that_are_planned_for_are_the_published_ones() -> None:
    with torch.device("meta"):
        unet, vae = (
            I2VGenXLUNet(),
            AutoencoderKL(**published.CHECKPOINTS["v2-1_512-ema-pruned.ckpt"].parts["refine/vae"].config),
        )
    sizes = needs._foreign_sizes("i2vgen-xl")
    assert sizes.values == sum(part.numel() for network in (unet, vae) for part in network.parameters())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("refine.stochastic", True), ("refine.solver", "dpmpp"), ("refine.noise_level", 300), ("seed", 4),
        ("refine.guidance_scale", 1.0), ("refine.guidance_rescale", 0.5), ("refine.posterior", "published"),
        ("refine.guidance_stop", 0.9), ("refine.cut_range", "published"), ("negative_prompt", "blue"),
    ],
)  # fmt: skip
def test_every_setting_changes_the_frames(folder: Path, key: str, value: object, plain: Tensor) -> None:
    assert not torch.equal(plain, refined(folder, clip(8), **SHORT, **{key: value}))


def test_each_chunk_is_told_its_own_picture(folder: Path) -> None:
    made = networks(folder, **{"refine.chunk": 6, "refine.overlap": 2})
    given = enlarged(clip(14), made)
    _, index = folders.read_index(folder)
    pictures = i2vgen.Pictures(given, load_part(folder, "image_encoder", index, torch.float32), "cpu")
    latents = torch.arange(14.0).view(14, 1, 1, 1).expand(14, 4, 2, 2)
    for number, frame in enumerate(given.frames(0)):
        pictures.look(number, frame, latents[number : number + 1])
    told = [pictures.told(chunk, torch.zeros(2, 3, 8)) for chunk in given.plan]
    assert [float(one.picture[0, 0, 0, 0, 0]) for one in told] == [chunk.start for chunk in given.plan]
    assert not torch.equal(told[0].embedding, told[1].embedding)
    assert float(told[0].embedding[0].abs().max()) == 0
    pictures.left(Chunk(0, 0, 6, 0))
    assert pictures.state()["picture_frames"].tolist() == [4, 8]


@pytest.mark.parametrize("posterior", ["corrected", "published"])
def test_a_loop_is_the_same_in_every_round(posterior: str, folder: Path) -> None:
    settings = {"refine.chunk": 4, "refine.overlap": 2, "refine.num_inference_steps": 2, "refine.posterior": posterior}
    made, frames = networks(folder, **settings), clip(7)
    chosen, given = choose.refiner(made.run), enlarged(frames, made, loop=True)
    assert chosen is not None
    assert given.around is not None
    found = torch.cat([frame for group in i2vgen.refiner(made, chosen)(given) for frame in group.frames])
    lead = given.around.lead
    assert torch.allclose(found[lead - 7 : lead], found[lead : lead + 7], atol=1e-4)
    assert not torch.allclose(found[lead : lead + 7], refined(folder, frames, **settings), atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"refine.model": "modelscope-folder"}, "cannot refine"), ({"refine.reuse_interval": 2}, "no use for it")],
)
def test_what_cannot_be_is_refused(
    folder: Path, settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipelines.modelscope(tmp_path / "modelscope-folder")
    with pytest.raises(ConfigError, match=said):
        choose.refiner(networks(folder, **settings).run)


def test_a_folder_that_lacks_a_part_is_refused(folder: Path, tmp_path: Path) -> None:
    table = json.loads((folder / "model_index.json").read_text())
    table.pop("image_encoder")
    for path in folder.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model_index.json").write_text(json.dumps(table))
    with pytest.raises(WeightsError, match="image_encoder"):
        refined(tmp_path, clip(2))


def test_the_published_schedule_is_read(folder: Path) -> None:
    schedule = noise_schedule(folder)
    scheduler: Any = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert torch.allclose(schedule.alpha_bars, scheduler.alphas_cumprod, atol=1e-6)
