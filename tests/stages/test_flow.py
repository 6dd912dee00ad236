"""Bases in one chunk, bit by bit against the pipelines of diffusers; known latents; steps against its schedulers."""
# mypy: disable-error-code="no-untyped-call"

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from streamt2v import weights
from streamt2v.diffusion import solvers
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.diffusion.schedules import FlowSchedule
from streamt2v.errors import VideoError
from streamt2v.families import bases, dit, helios, ltx, wan
from streamt2v.media.frames import to_float
from streamt2v.models.dit import SpacetimeConfig, SpacetimeTransformer
from streamt2v.models.vae import AutoencoderConfig, AutoencoderKL
from streamt2v.stages.denoise import Sampling
from streamt2v.stages.flow import FlowStreamer, Words, sample
from streamt2v.stages.stream import calibrated
from tests import pipelines

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
SIZE = (32, 64)
STEPS = 3


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(length: int = 5) -> Words:
    return Words(normals(2, length, pipelines.WIDTH, seed=1), torch.ones(2, length))


def sampling(steps: int = STEPS, guidance: float = 3.0, batched: bool = False) -> Sampling:
    return Sampling(num_inference_steps=steps, guidance_scale=guidance, batched=batched)


def wan_parts(expand: bool) -> dict[str, Any]:
    torch.manual_seed(3)
    return {
        "transformer": pipelines.wan_transformer().eval(),
        "vae": pipelines.wan_vae(16 if expand else 8).eval(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


def wan_base(expand: bool = True) -> wan.Wan:
    return wan.Wan(wan_parts(expand), {"expand_timesteps": expand})


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_chunk_of_wan_from_a_picture_is_that_of_the_library(guidance: float) -> None:
    base, noise, said = wan_base(), normals(1, 8, 4, 2, 4), words()
    library = diffusers.WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, image_encoder=None, image_processor=None, expand_timesteps=True,
        **wan_parts(True),
    )  # fmt: skip
    library.set_progress_bar_config(disable=True)
    for kind in ("latent", "pt"):
        theirs = library(
            picture(), height=SIZE[0], width=SIZE[1], num_frames=13, num_inference_steps=STEPS, latents=noise,
            guidance_scale=guidance, prompt_embeds=said.tokens[1:], negative_prompt_embeds=said.tokens[:1],
            output_type=kind,
        ).frames  # fmt: skip
        with torch.inference_mode():
            known = base.encode(to_float(np.asarray(picture())[None]))
            ours = sample(base, noise, said, sampling(guidance=guidance), known)
            ours = ours if kind == "latent" else (base.decode(ours)[None] / 2 + 0.5)
        assert float((ours - theirs).abs().max()) == 0.0
        assert float(theirs.std()) > 0.01


@pytest.mark.parametrize("expand", [True, False])
def test_a_chunk_of_wan_from_text_is_that_of_the_library(expand: bool) -> None:
    base, said = wan_base(expand), words()
    noise = normals(1, 8, 4, 2, 4)
    library = diffusers.WanPipeline(tokenizer=None, text_encoder=None, expand_timesteps=expand, **wan_parts(expand))
    library.set_progress_bar_config(disable=True)
    cell = 16 if expand else 8
    theirs = library(
        height=2 * cell, width=4 * cell, num_frames=13, num_inference_steps=STEPS, latents=noise, guidance_scale=3.0,
        prompt_embeds=said.tokens[1:], negative_prompt_embeds=said.tokens[:1], output_type="latent",
    ).frames  # fmt: skip
    ours = sample(base, noise, said, sampling())
    assert float((ours - theirs).abs().max()) == 0.0


def ltx_parts() -> dict[str, Any]:
    torch.manual_seed(4)
    return {name: part.eval() if name != "scheduler" else part for name, part in pipelines.ltx_parts().items()}


def clip(frames: int) -> list[Image.Image]:
    values = np.random.default_rng(1).integers(0, 256, (frames, *SIZE, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in values]


def pixels(images: list[Image.Image]) -> Tensor:
    return to_float(np.stack([np.asarray(image) for image in images]))


@pytest.mark.parametrize("steps", [3, 8])
@pytest.mark.parametrize(("known", "anchored"), [(0, False), (1, False), (5, False), (5, True), (9, True)])
def test_a_chunk_of_ltx_is_that_of_the_library(
    known: int, anchored: bool, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From text, from a picture, from known frames; with a frame before the chunk."""
    from diffusers.pipelines.ltx import pipeline_ltx_condition as module

    base, said, frames = ltx.Ltx(ltx_parts(), {}, 25), words(), clip(known)
    mean = module.retrieve_latents
    # It draws from the posterior, we take its middle.
    monkeypatch.setattr(module, "retrieve_latents", lambda output, generator: mean(output, sample_mode="argmax"))
    library = module.LTXConditionPipeline(tokenizer=None, text_encoder=None, **ltx_parts())
    library.set_progress_bar_config(disable=True)
    conditions = [module.LTXVideoCondition(video=frames, frame_index=0)] if known else []
    if anchored:
        conditions.append(module.LTXVideoCondition(image=picture(), frame_index=-4))
    shape = (1, 8, 4, SIZE[0] // 4, SIZE[1] // 4)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    theirs = library(
        conditions=conditions or None, height=SIZE[0], width=SIZE[1], num_frames=13, frame_rate=25,
        num_inference_steps=steps, generator=torch.Generator().manual_seed(6), guidance_scale=3.0,
        image_cond_noise_scale=0.0, prompt_embeds=said.tokens[1:], prompt_attention_mask=said.mask[1:],
        negative_prompt_embeds=said.tokens[:1], negative_prompt_attention_mask=said.mask[:1], output_type="latent",
        timesteps=list(ltx.DISTILLED) if steps == 8 else None,
    ).frames  # fmt: skip
    with torch.inference_mode():
        held = base.encode(pixels(frames)) if known else None
        anchor = base.encode(pixels([picture()])) if anchored else None
        ours = sample(base, noise, said, sampling(steps, batched=True), held, anchor)
        assert float((ours - theirs).abs().max()) == 0.0
        if anchored:
            without = sample(base, noise, said, sampling(steps, batched=True), held)
            assert not torch.equal(ours, without)


@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_long_call_of_helios_is_one_call_a_chunk(pyramid: bool, chunks: int) -> None:
    torch.manual_seed(5)
    pipeline = helios.make(pipelines.helios_parts(pyramid), {"is_distilled": True} if pyramid else {}, 24)
    said, size = words(), (64, 128) if chunks == 1 else (64, 64)  # a square is half the work
    more: dict[str, Any] = {"num_inference_steps": 3}
    if pyramid:
        more = {"pyramid_num_inference_steps_list": [1, 1, 1], "is_amplify_first_chunk": True}
    theirs = [
        pipeline(
            prompt_embeds=said.tokens[1:], negative_prompt_embeds=said.tokens[:1], height=size[0], width=size[1],
            num_frames=33 * chunks, guidance_scale=2.0, generator=torch.Generator().manual_seed(8), output_type=kind,
            **more,
        ).frames[0]
        for kind in ("latent", "pt")
    ]  # fmt: skip
    generator, known = torch.Generator().manual_seed(8), dict[str, Tensor]()
    for chunk in range(chunks):
        frames, latents = helios.one_chunk(pipeline, said, size, 3, 2.0, known, generator)
        known = helios.remembered(known, latents)
        assert known["history"].shape[2] == min(9 * (chunk + 1), helios.HISTORY)
        assert torch.equal(latents[0], theirs[0][:, 9 * chunk : 9 * chunk + 9])
        last = theirs[1][33 * chunk : 33 * chunk + 33] * 2 - 1  # of three chunks it leaves two frames out
        assert torch.equal(frames[: len(last)], last)
    assert torch.equal(known["first"][0], theirs[0][:, :1])


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("multistep", [True, False])
def test_known_latents_stay_and_decide_what_follows(expand: bool, multistep: bool) -> None:
    base, noise = wan_base(expand), normals(1, 8, 4, 2, 4)
    if multistep:
        base = wan.Wan(wan_parts(expand) | {"scheduler": pipelines.multistep()}, {"expand_timesteps": expand})
        assert base.multistep
    made = [sample(base, noise, words(), sampling(), normals(1, 8, 2, 2, 4, seed=seed)) for seed in (5, 6)]
    for seed, latents in zip((5, 6), made, strict=True):
        assert torch.equal(latents[:, :, :2], normals(1, 8, 2, 2, 4, seed=seed))
        assert torch.isfinite(latents).all()
    assert not torch.equal(made[0][:, :, 2:], made[1][:, :, 2:])


def dit_base() -> dit.Dit:
    torch.manual_seed(5)
    network = SpacetimeTransformer(SpacetimeConfig(width=24, depth=2, heads=2, text_dim=pipelines.WIDTH))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    codec = AutoencoderKL(AutoencoderConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4))
    return dit.Dit({"transformer": network.eval(), "vae": codec.eval()})


@pytest.mark.parametrize(("frames", "size"), [(1, SIZE), (12, SIZE), (33, (40, 24)), (3, (72, 128))])
def test_the_transformer_of_the_demo_takes_any_size_and_length(frames: int, size: tuple[int, int]) -> None:
    """A latent a frame; the frames that it is given come out as the codec has them, and lead the others."""
    stage = FlowStreamer(dit_base(), SeededDraws(1), frames, (4, size[0] // 8, size[1] // 8))
    first = stage.frames(bases.FIRST, None, words(), sampling())
    assert first.shape == (frames, 3, *size)
    known = to_float(np.random.default_rng(0).integers(0, 256, (frames // 2, *size, 3), dtype=np.uint8))
    if not len(known):
        return
    anchor = to_float(np.random.default_rng(1).integers(0, 256, (1, *size, 3), dtype=np.uint8))[0]
    chunk = bases.Chunk(1, frames, frames + 4, frames + 4)
    made = [stage.frames(chunk, known, words(), sampling(), seen) for seen in (None, anchor)]
    with torch.inference_mode():
        again = stage.base.decode(stage.base.encode(known))
    for frames_made in made:
        assert torch.equal(frames_made[: len(known)], again)
    assert not torch.equal(made[0][len(known) :], made[1][len(known) :])
    other = stage.frames(chunk, -known, words(), sampling())
    assert not torch.equal(other[len(known) :], made[0][len(known) :])


def test_known_frames_are_clean_to_the_transformer_of_the_demo() -> None:
    """They are at time 0, the others at that of the step."""
    base, x, said = dit_base(), normals(2, 4, 5, 3, 4), words()
    seen = dict[str, Tensor]()

    def watch(module: Any, given: tuple[Tensor, ...]) -> None:
        seen["sigmas"] = given[1]

    base.transformer.register_forward_pre_hook(watch)
    base.velocity(x, torch.tensor(700.0), 2, said, None)
    torch.testing.assert_close(seen["sigmas"], torch.tensor([[0.0, 0.0, 0.7, 0.7, 0.7]] * 2))


def test_a_chunk_is_addressed_by_its_latents() -> None:
    """A later chunk draws for the latents that it shares what the chunk before it drew for them."""
    stage = FlowStreamer(wan_base(), SeededDraws(1), 17, (8, 2, 4))
    first, second = (stage.noise(bases.FIRST).initial, stage.noise(bases.Chunk(1, 3, 3, 3)).initial)
    assert first.shape == (1, 8, 5, 2, 4)
    assert torch.equal(first[:, :, 3:], second[:, :, :2])


def test_known_frames_begin_the_chunk() -> None:
    stage = FlowStreamer(wan_base(), SeededDraws(1), 17, (8, 2, 4))
    known = to_float(np.random.default_rng(0).integers(0, 256, (5, *SIZE, 3), dtype=np.uint8))
    made = stage.frames(bases.Chunk(1, 12, 29, 17), known, words(), sampling())
    assert made.shape == (17, 3, *SIZE)
    with torch.inference_mode():
        assert torch.equal(made[:5], stage.base.decode(stage.base.encode(known)))


def flow_levels(steps: int, shift: float) -> Tensor:
    times = torch.linspace(1, 1 / steps, steps)
    return torch.cat([shift * times / (1 + (shift - 1) * times), torch.zeros(1)])


@given(st.integers(1, 12), st.floats(1, 12))
def test_euler_steps_are_those_of_the_library(steps: int, shift: float) -> None:
    """x + (sigma' - sigma) v; and the first-order step where x / (1 - sigma) = x_0 + rho n."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    x = normals(2, 3, seed=9)
    sigmas = scheduler.sigmas.double().clamp(max=1 - 1e-9)  # at 1 there is no x / (1 - sigma)
    for step, timestep in enumerate(scheduler.timesteps):
        velocity, before = normals(2, 3, seed=step), x
        x = scheduler.step(velocity, timestep, x).prev_sample
        assert torch.equal(before + (scheduler.sigmas[step + 1] - scheduler.sigmas[step]) * velocity, x)
        clean = before.double() - sigmas[step] * velocity
        in_rho = solvers.flow_step(before.double(), clean, None, sigmas, step)
        torch.testing.assert_close(in_rho.float(), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_multistep_steps_are_those_of_the_library(steps: int) -> None:
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, lower_order_final=False
    )
    scheduler.set_timesteps(steps)
    x = ours = normals(2, 3, seed=9)
    before = None
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = normals(2, 3, seed=step)
        x = scheduler.step(velocity, timestep, x).prev_sample
        clean = ours - scheduler.sigmas[step] * velocity
        ours, before = solvers.flow_step(ours, clean, before, scheduler.sigmas, step), clean
        torch.testing.assert_close(ours, x, atol=1e-6, rtol=1e-6)


@given(st.integers(1, 999), st.integers(1, 30), st.floats(1, 9))
def test_refining_levels_lie_on_the_models_own_path(start: int, steps: int, shift: float) -> None:
    path = flow_levels(1000, shift)
    timesteps, rho = FlowSchedule(path).refining_grid(start, steps)
    assert len(timesteps) == steps == len(rho) - 1
    assert float(timesteps[0]) == start
    assert float(rho[-1]) == 0
    sigmas = rho.double() / (1 + rho.double())
    assert bool((sigmas.diff() < 0).all())
    torch.testing.assert_close(sigmas[:-1] * 1000, timesteps.double(), atol=1e-3, rtol=1e-5)
    # Even steps in the time that the shift bends.
    unbent = sigmas / (shift - (shift - 1) * sigmas)
    torch.testing.assert_close(unbent.diff(), unbent.diff().mean().expand(steps), atol=2e-5, rtol=2e-3)


def test_a_velocity_gives_back_what_it_was_made_of() -> None:
    schedule, clean, noise = FlowSchedule(flow_levels(100, 5.0)), normals(1, 4, seed=1), normals(1, 4, seed=2)
    noisy = schedule.add_noise(clean, noise, 299)
    torch.testing.assert_close(noisy, 0.7 * clean + 0.3 * noise)
    torch.testing.assert_close(schedule.to_x0(noise - clean, noisy, 300.0), clean)
    rho = torch.tensor(0.3 / 0.7)
    torch.testing.assert_close((clean + rho * noise) / schedule.input_scale(rho), noisy)


@given(st.floats(0.92, 1.08), st.floats(-0.08, 0.08), st.integers(0, 9))
def test_calibration_undoes_what_a_chunk_does_to_colours(gain: float, offset: float, seed: int) -> None:
    shown, new = (0.5 * normals(3, 3, 8, 8, seed=seed + part).clamp(-1.5, 1.5) for part in (0, 10))
    wrong = [(frames - offset) / gain for frames in (shown, new)]
    torch.testing.assert_close(calibrated(wrong[1], shown, wrong[0]), new, atol=1e-5, rtol=0)
    torch.testing.assert_close(calibrated(new, shown, shown), new, atol=1e-6, rtol=0)


@given(st.integers(0, 9), st.floats(0, 3), st.floats(-2, 2))
def test_calibration_is_bounded(seed: int, gain: float, offset: float) -> None:
    """Whatever became of the known frames, new ones change little, each channel by itself."""
    shown, new = (0.4 * normals(2, 3, 8, 8, seed=seed + part).clamp(-2, 2) for part in (0, 10))
    lost = gain * shown + offset
    made = calibrated(new, shown, lost)
    assert made.abs().max() <= 1
    assert (made - new).abs().max() <= 0.1 * new.abs().max() + 0.1 + 1e-6
    one = lost.clone()
    one[:, 1:] = shown[:, 1:]
    torch.testing.assert_close(calibrated(new, shown, one)[:, 1:], new[:, 1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("groups", [[(0, 3), (3, 5), (5, 9)], [(0, 9)], [(0, 1), (1, 9)]])
def test_a_growing_video_is_encoded_as_one_whose_beginning_is_in_sight(groups: list[tuple[int, int]]) -> None:
    """As long as a window begins with the video nothing changes; a later one depends on its own frames alone."""
    base, video = wan_base(), normals(33, 3, *SIZE, seed=2).clamp(-1, 1)
    source = bases._Source(base, iter(video[:31].split(1)), 0, 31)
    padded = torch.cat([video[:31], video[30:31].expand(2, -1, -1, -1)])
    with torch.inference_mode():
        whole = base.encode(padded)[0].transpose(0, 1)
        for first, stop in groups:
            made = source.encode(range(first, stop))
            before = min(bases.CONTEXT, first)
            alone = base.encode(padded[4 * (first - before) : 4 * (stop - 1) + 1])[0].transpose(0, 1)[before:]
            assert torch.equal(made, alone)
            if first <= bases.CONTEXT:
                torch.testing.assert_close(made, whole[first:stop], atol=1e-6, rtol=0)  # other sizes round otherwise


def test_a_video_that_ends_early_is_said() -> None:
    source = bases._Source(wan_base(), iter(normals(7, 3, *SIZE).split(1)), 0, 9)
    with pytest.raises(VideoError, match="after 7 of 9 frames"):
        source.encode(range(3))


def test_full_size_networks_load_what_is_published() -> None:
    """The library knows how the keys of Wan's original files become those of its own class: none is left over."""
    from diffusers.loaders import single_file_utils

    with torch.device("meta"):
        network = diffusers.WanTransformer3DModel(
            num_attention_heads=24,
            attention_head_dim=128,
            in_channels=48,
            out_channels=48,
            ffn_dim=14336,
            num_layers=30,
        )
    assert sum(part.numel() for part in network.parameters()) == weights.pipelines()["wan"]["values"]["transformer"]
    state = network.state_dict()
    layers = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k"]
    layers += ["cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2", "norm3"]
    single = [f"{kind}_attn.norm_{side}.weight" for kind in ("self", "cross") for side in "qk"]
    heads = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    heads += ["time_projection.1", "head.head"]
    names = [f"blocks.{block}.{layer}" for block in range(30) for layer in layers] + heads
    published = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    published += [f"blocks.{block}.{name}" for block in range(30) for name in [*single, "modulation"]]
    published.append("head.modulation")
    convert: Any = single_file_utils.convert_wan_transformer_to_diffusers
    converted = convert({name: torch.empty(0, device="meta") for name in published})
    assert set(converted) == set(state)


LTX_13B = {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}


@pytest.mark.parametrize(
    ("name", "part", "kind", "sizes"),
    [
        ("ltx", "transformer", "LTXVideoTransformer3DModel", LTX_13B),
        ("helios", "transformer", "HeliosTransformer3DModel", {}),
        ("helios", "vae", "AutoencoderKLWan", {}),
    ],
)  # fmt: skip
def test_the_counts_in_the_list_are_those_of_the_networks(
    name: str, part: str, kind: str, sizes: dict[str, Any]
) -> None:
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**sizes)
    assert sum(part.numel() for part in network.parameters()) == weights.pipelines()[name]["values"][part]
