"""Golden folders of the streaming stage: components, one sampled chunk, and the autoregressive loop."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from streamt2v.chunks import Chunk, streaming_plan
from streamt2v.diffusion import guidance, solvers
from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig
from streamt2v.models import encoders
from streamt2v.models.apm import AppearanceTokens
from streamt2v.models.cam import CamConfig, ConditionalAttention
from streamt2v.models.clip import CLIPVisionConfig, CLIPVisionModelWithProjection
from streamt2v.models.unet3d import TextContext, UNet3D, UNet3DConfig
from streamt2v.models.vae import AutoencoderConfig, AutoencoderKL
from streamt2v.stages.denoise import ChunkNoise, Sampling
from streamt2v.stages.stream import Streamer, StreamModels, StreamState, continued
from streamt2v.weights import keymaps, published
from tests.parity.report import COMPONENT, EXACT, WHOLE_RUN, Report

Tensors = dict[str, Tensor]


def recognises(folder: Path) -> bool:
    """Whether the folder holds goldens of this stage."""
    return (folder / "config.json").is_file() and any(folder.glob("weights_*.safetensors"))


def check(folder: Path) -> Report:
    """Check every file of the folder."""
    report = Report()
    try:
        setting = load(folder)
    except Exception as error:
        report.problem("weights", f"{type(error).__name__}: {error}")
        return report
    kinds = {"components": components, "pipeline": pipeline, "loop": loop, "clip_preprocess": preprocessing}
    for path in sorted(folder.glob("*.safetensors")):
        kind = next((run for name, run in kinds.items() if path.stem.startswith(name)), None)
        if kind is not None:
            report.attempt(path.stem, partial(check_file, report, path, kind, setting))
        elif not path.stem.startswith("weights_"):
            report.note(path.name, "not a file this check knows")
    for name in kinds:
        if not any(folder.glob(f"{name}*.safetensors")):
            report.note(name, "not in this folder")
    return report


def check_file(report: Report, path: Path, kind: "Kind", setting: "Setting") -> None:
    with torch.inference_mode():
        kind(report, path.stem, load_file(path), setting)


# ------------------------------------------------------------------------------------------------------- the networks


@dataclass(frozen=True)
class Setting:
    """The networks and sizes of a folder."""

    facts: Mapping[str, Any]
    sizes: Mapping[str, Any]
    models: StreamModels

    @property
    def unet(self) -> UNet3D:
        return self.models.unet

    @property
    def cam(self) -> ConditionalAttention:
        assert self.models.cam is not None
        return self.models.cam

    @property
    def apm(self) -> AppearanceTokens:
        assert self.models.apm is not None
        return self.models.apm

    def sampling(self, num_steps: int, eta: float) -> Sampling:
        return Sampling(num_steps, self.sizes["guidance"], eta=eta, final_noise="published")


def load(folder: Path) -> Setting:
    """Build the networks of `config.json` and load all weights through the published key maps."""
    facts = json.loads((folder / "config.json").read_text())
    sizes = facts["config"]
    state: Tensors = {}
    for path in sorted(folder.glob("weights_*.safetensors")):
        state |= {key: value.float() for key, value in load_file(path).items()}
    present = {name: key_map for name, key_map in published.STREAM.items() if any(map_prefix(key_map, state))}
    keymaps.check_prefixes(state, present.values(), {})

    config = UNet3DConfig(
        in_channels=state["base_model.conv_in.weight"].shape[1],
        out_channels=state["base_model.conv_out.weight"].shape[0],
        block_out_channels=tuple(sizes["block_out_channels"]),
        attention_levels=tuple(kind.startswith("CrossAttn") for kind in sizes["down_block_types"]),
        layers_per_block=sizes["layers_per_block"],
        cross_attention_dim=sizes["cross_attention_dim"],
        attention_head_dim=sizes["attention_head_dim"],
        transformer_in_heads=facts["transformer_in_heads"],
        norm_num_groups=sizes["norm_num_groups"],
        text_tokens=facts["text_tokens"],
        image_tokens=facts["image_tokens"],
        cam=True,
    )
    plain = UNet3DConfig.from_dict(asdict(config) | {"image_tokens": 0, "cam": False})
    hidden, embed = state["resampler.context_embedding.0.weight"].shape

    def fill(name: str, network: nn.Module) -> Any:
        expected = {key: value.shape for key, value in network.state_dict().items()}
        network.load_state_dict(published.STREAM[name].apply(state, expected))
        return network.eval()

    models = StreamModels(
        unet=fill("unet", UNet3D(config)),
        schedule=NoiseSchedule(schedule_config(facts["scheduler"])),
        vae=fill("vae", vae(sizes, facts, state)),
        cam=fill("cam", ConditionalAttention(
            CamConfig(plain, tuple(sizes["cond_embed_channels"]), sizes["num_cond_frames"])
        )),
        apm=fill("apm", AppearanceTokens(embed, hidden, facts["image_tokens"], sizes["cross_attention_dim"])),
        image_encoder=fill("vision", image_encoder(sizes, facts, state)),
    )  # fmt: skip
    return Setting(facts, sizes, models)


def map_prefix(key_map: keymaps.KeyMap, state: Tensors) -> list[str]:
    return [key for key in state if key.startswith(key_map.prefix)]


def schedule_config(facts: Mapping[str, Any]) -> ScheduleConfig:
    """Read the scheduler's facts; what this package has no counterpart for is refused."""
    if facts.get("clip_sample") or facts.get("trained_betas") is not None:
        raise ValueError("the folder's scheduler clips samples or has trained betas, which is not supported")
    return ScheduleConfig(
        kind=facts["beta_schedule"],
        beta_start=facts["beta_start"],
        beta_end=facts["beta_end"],
        num_train_timesteps=facts["num_train_timesteps"],
        prediction={"v_prediction": "v"}.get(facts["prediction_type"], facts["prediction_type"]),
        spacing=facts.get("timestep_spacing", "leading"),
        steps_offset=facts["steps_offset"],
        zero_terminal_snr=facts.get("rescale_betas_zero_snr", False),
        final_alpha_one=facts["set_alpha_to_one"],
    )


def vae(sizes: Mapping[str, Any], facts: Mapping[str, Any], state: Tensors) -> AutoencoderKL:
    widths = sizes["vae"]["block_out_channels"]
    return AutoencoderKL(
        AutoencoderConfig(
            block_out_channels=tuple(widths),
            layers_per_block=sizes["vae"]["layers_per_block"],
            latent_channels=sizes.get("vae_latent_channels", sizes.get("in_channels", 4)),
            norm_num_groups=sizes["vae"]["norm_num_groups"],
            scaling_factor=facts["vae_scaling_factor"],
            mid_block_add_attention=any(key.startswith("vae.encoder.mid_block.attentions") for key in state),
        )
    )


def image_encoder(sizes: Mapping[str, Any], facts: Mapping[str, Any], state: Tensors) -> CLIPVisionModelWithProjection:
    visual = "image_encoder.model.visual."
    width, _, patch, _ = state[f"{visual}conv1.weight"].shape
    blocks = {key.split(".")[5] for key in state if key.startswith(f"{visual}transformer.resblocks.")}
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=state[f"{visual}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            projection_dim=state[f"{visual}proj"].shape[1],
            num_hidden_layers=len(blocks),
            num_attention_heads=width // sizes["clip"]["head_width"],
            image_size=facts["clip_image_size"],
            patch_size=patch,
            hidden_act="gelu",
        )
    )


# ----------------------------------------------------------------------------------------------------------- the files

Kind = Callable[[Report, str, Tensors, Setting], None]


def preprocessing(report: Report, file: str, tensors: Tensors, setting: Setting) -> None:
    """Bytes to CLIP's input."""
    pixels = tensors["in.image_u8"].float() / 127.5 - 1
    found = encoders.clip_pixels(pixels, setting.facts["clip_image_size"])
    report.compare(file, "clip_input", found, tensors["out.clip_input"], COMPONENT)


def components(report: Report, file: str, tensors: Tensors, setting: Setting) -> None:
    """One denoising evaluation, taken apart; every recorded output must be asked for."""
    unet, cam, sizes = setting.unet, setting.cam, setting.sizes
    outputs = {key.removeprefix("out."): value for key, value in tensors.items() if key.startswith("out.")}

    def expect(name: str, found: Tensor) -> None:
        if name in outputs:
            report.compare(file, name, found, outputs.pop(name), COMPONENT)

    text = TextContext(torch.cat([tensors["in.text_negative"], tensors["in.text_positive"]]))  # [2, S, D]
    latents = tensors["in.noisy_latents"].expand(2, -1, -1, -1, -1)  # [2, C, F, h, w]
    frames, timestep = latents.shape[2], tensors["in.timestep"]

    anchors = tensors["in.anchor_frame"][0]  # [n, 3, H, W]
    expect("clip_input", encoders.clip_pixels(anchors, setting.facts["clip_image_size"]))
    embeddings = [
        encoders.embed_image(setting.models.image_encoder, images) for images in (torch.zeros_like(anchors), anchors)
    ]
    tokens = torch.cat([setting.apm(embedding[None]) for embedding in embeddings])  # [2, image tokens, D]
    for row, name in enumerate(("null", "anchor")):
        expect(f"clip_embed.{name}", embeddings[row])
        expect(f"image_tokens.{name}", tokens[row : row + 1])
    expect("context", torch.cat([text.tokens, tokens], dim=1))
    for name, layer in unet.text_attentions():
        expect(f"apm_context.{name}", layer.context(text.tokens, tokens))

    embedded = cam.embed_frames(tensors["in.cond_frames"])  # [1, C, Fc, h, w]
    features = cam(latents[:, :, : embedded.shape[2]], timestep, cam.prepare(text), embedded)
    expect("cam.cond_embedding", embedded[0].transpose(0, 1))
    for index, feature in enumerate(features.down):
        expect(f"cam.down.{index}", feature.transpose(1, 2).flatten(0, 1))
    expect("cam.mid", features.mid.transpose(1, 2).flatten(0, 1))

    conditioning = unet.prepare(text, tokens)
    step = unet.begin(latents, timestep, conditioning, True, False)
    entered = unet.enter(latents, step)
    skips = unet.descend(entered, step)
    merged, mid = unet.merge(skips, unet.mid_block(skips[-1], step), frames, features)
    expect("unet_transformer_in", entered)
    for index, skip in enumerate(merged):
        expect(f"merged.down.{index}", skip.unflatten(0, (2, frames)))
    expect("merged.mid", mid.unflatten(0, (2, frames)))

    output = unet(latents, timestep, conditioning, features)
    silent = copy.deepcopy(unet)
    for _, layer in silent.text_attentions():
        assert layer.apm is not None
        layer.apm.alpha.zero_()
    expect("unet.full", output)
    expect("unet.no_cam", unet(latents, timestep, conditioning))
    expect("unet.alpha0_with_cam", silent(latents, timestep, silent.prepare(text, tokens), features))
    expect("unet.alpha0_no_cam", silent(latents, timestep, silent.prepare(text, tokens)))
    report.compare(
        file, "APM off = alpha 0", unet(latents, timestep, unet.prepare(text)),
        silent(latents, timestep, silent.prepare(text, tokens)), COMPONENT,
    )  # fmt: skip

    guided = guidance.combine(*output.chunk(2), sizes["guidance"])
    expect("step.guided_eps", guided)
    schedule, t = setting.models.schedule, int(timestep)
    following = t - schedule.config.num_train_timesteps // sizes["pipe_steps"]
    alpha_bar_next = schedule.alpha_bars[max(following, 0)] if following >= 0 else schedule.ddim_grid(1)[1][-1]
    x0, epsilon = schedule.to_x0_eps(guided, latents[:1], t)
    noise = tensors["in.step.variance_noise"].transpose(0, 1)[None]  # [1, C, F, h, w]
    for name in [name for name in outputs if name.startswith("step.prev.eta")]:
        eta = float(name.removeprefix("step.prev.eta"))
        expect(name, solvers.ddim_step(x0, epsilon, schedule.alpha_bars[t], alpha_bar_next, eta, noise))
    for name in outputs:
        report.problem(file, f"the recorded output {name!r} is not one this check knows")


def eta_of(setting: Setting, file: str) -> float:
    """Return the share of fresh noise a file was recorded with: written down, in its name, or else 1."""
    named = file.partition("_eta")[2]
    return float(setting.facts.get("eta", {}).get(file, named or 1.0))


def recorded_noise(
    tensors: Tensors, setting: Setting, seed: int, num_steps: int, eta: float
) -> Callable[[], ChunkNoise]:
    """Return the noise of one chunk after the other: the recorded tensors, or the generator they were drawn from."""
    draws = torch.Generator().manual_seed(seed)
    sizes = setting.sizes
    factor = 2 ** (len(sizes["vae"]["block_out_channels"]) - 1)
    frame = (setting.unet.config.out_channels, sizes["height"] // factor, sizes["width"] // factor)
    chunks = iter(range(10**9))

    def per_frame(noise: Tensor) -> Tensor:
        return noise.transpose(0, 1)[None]  # [F, C, h, w] -> [1, C, F, h, w]

    def next_chunk() -> ChunkNoise:
        chunk = next(chunks)
        initial = torch.randn(1, frame[0], sizes["num_frames"], *frame[1:], generator=draws)
        steps = [
            torch.randn(sizes["num_frames"], *frame, generator=draws) if eta else torch.zeros(0)
            for _ in range(num_steps)
        ]
        if "in.init_latents" in tensors:
            initial = tensors["in.init_latents"][chunk : chunk + 1]
        if "in.variance_noise" in tensors:
            recorded = tensors["in.variance_noise"]  # [steps, F, C, h, w], with a leading chunk axis in loops
            steps = list(recorded[chunk] if recorded.ndim == 6 else recorded)
        return ChunkNoise(initial, lambda step: per_frame(steps[step]))

    return next_chunk


def streamer(
    tensors: Tensors, setting: Setting, anchor: Tensor, sampling: Sampling, noise: Callable[[], ChunkNoise]
) -> Streamer:
    """Return the package's streaming stage with the recorded text and noise."""
    text = TextContext(torch.cat([tensors["in.text_negative"], tensors["in.text_positive"]]))
    return Streamer(setting.models, text, anchor, sampling, lambda _: noise())


def pipeline(report: Report, file: str, tensors: Tensors, setting: Setting) -> None:
    """One whole chunk: all steps, then decoding."""
    eta, num_steps = eta_of(setting, file), len(tensors["in.timesteps"])
    noise = recorded_noise(tensors, setting, setting.sizes["pipe_seed"], num_steps, eta)
    sampling = setting.sampling(num_steps, eta)
    stage = streamer(tensors, setting, tensors["in.anchor_frame"][0, 0], sampling, noise)
    conditioning_frames = tensors["in.cond_frames"][0]
    guided, states = [], []

    def observe(_: int, output: Tensor, latents: Tensor) -> None:
        guided.append(output)
        states.append(latents)

    frames, overlap = setting.sizes["num_frames"], len(conditioning_frames)
    latents = stage.chunk_latents(Chunk(1, 0, frames, overlap), conditioning_frames, observe)
    grid = setting.models.schedule.timesteps(num_steps)
    report.compare(file, "timesteps", grid, tensors["in.timesteps"], EXACT)
    report.compare(file, "guided_eps", torch.stack(guided), tensors["out.guided_eps"], WHOLE_RUN)
    report.compare(file, "latents", torch.stack(states), tensors["out.latents"], WHOLE_RUN)
    for step, (found, expected) in enumerate(zip(guided, tensors["out.guided_eps"], strict=True)):
        report.compare(file, f"guided_eps of step {step}", found, expected, WHOLE_RUN)
    for step, (found, expected) in enumerate(zip(states, tensors["out.latents"], strict=True)):
        report.compare(file, f"latents of step {step}", found, expected, WHOLE_RUN)
    decoded = encoders.decode_latents(setting.models.vae, latents[0].transpose(0, 1))
    report.compare(file, "video", (decoded + 1) / 2, tensors["out.video"], WHOLE_RUN)


def loop(report: Report, file: str, tensors: Tensors, setting: Setting) -> None:
    """The autoregressive loop over several chunks."""
    eta, num_steps = eta_of(setting, file), len(tensors["in.timesteps"])
    overlap, size = setting.sizes["num_cond_frames"], setting.sizes["num_frames"]
    first = 2 * tensors["in.first_chunk"] - 1
    expected, finals = tensors["out.video"], tensors["out.final_latents"]
    plan = streaming_plan(len(expected), size, overlap)
    report.same(file, "number of generated chunks", len(plan) - 1, len(finals))
    report.compare(file, "timesteps", setting.models.schedule.timesteps(num_steps), tensors["in.timesteps"], EXACT)
    noise = recorded_noise(tensors, setting, setting.sizes["loop_seed"], num_steps, eta)
    stage = streamer(tensors, setting, first[0], setting.sampling(num_steps, eta), noise)
    found: list[Tensor] = []
    sample = stage.chunk_latents

    def recording(*arguments: Any, **named: Any) -> Tensor:
        found.append(sample(*arguments, **named))
        return found[-1]

    stage.chunk_latents = recording  # type: ignore[method-assign]
    video = [first]
    video += [new for new, _ in continued(stage.new_frames, StreamState.after_first_chunk(first, overlap), plan[1:])]
    for chunk, (latents, wanted) in enumerate(zip(found, finals, strict=False)):
        report.compare(file, f"latents of chunk {chunk + 1}", latents[0], wanted, WHOLE_RUN)
    report.compare(file, "video", (torch.cat(video) + 1) / 2, expected, WHOLE_RUN)
