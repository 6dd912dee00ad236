"""Golden folders of the refinement stage: schedule, text, VAE, network, guidance, and whole chains with blending."""

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from streamt2v.chunks import Chunk, refinement_plan
from streamt2v.config import RefineConfig
from streamt2v.diffusion import blend, guidance
from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig, sdedit_grid
from streamt2v.media import frames, shape
from streamt2v.models import encoders
from streamt2v.models.clip import CLIPTextConfig, CLIPTextModel
from streamt2v.models.text import clean_prompt
from streamt2v.models.unet3d import TextContext, UNet3D, UNet3DConfig
from streamt2v.models.vae import AutoencoderConfig, AutoencoderKL
from streamt2v.stages.refine import Denoiser, Refiner
from streamt2v.weights import published
from streamt2v.weights.keymaps import KeyMap
from streamt2v.weights.tokenizer import clip_tokenizer
from tests.parity import official
from tests.parity.report import COMPONENT, TABLE, WHOLE_RUN, Report
from tests.sweep import Sweep

Tensors = dict[str, Tensor]
Facts = dict[str, Any]
GAIN = 0.7
"""The recipe's gain for UNets where a file does not say."""


def recognises(folder: Path) -> bool:
    """Whether the folder holds goldens of this stage."""
    return any(folder.glob(f"{name}*.json") for name in KINDS) and not (folder / "config.json").is_file()


def check(folder: Path) -> Report:
    """Check every file of the folder."""
    report, setting = Report(), Setting(folder)
    for path in sorted(folder.glob("*.json")):
        kind = next((run for name, run in KINDS.items() if path.stem.startswith(name)), None)
        if kind is None:
            report.note(path.name, "not a file this check knows")
            continue
        report.attempt(path.stem, partial(check_file, report, path, kind, setting))
    for path in folder.glob("*.safetensors"):
        if not path.with_suffix(".json").is_file() and "_weights" not in path.stem:
            report.note(path.name, "not a file this check knows")
    return report


def check_file(report: Report, path: Path, kind: "Kind", setting: "Setting") -> None:
    tensors = path.with_suffix(".safetensors")
    with torch.inference_mode():
        kind(report, path.stem, json.loads(path.read_text()), load_file(tensors) if tensors.is_file() else {}, setting)


# ------------------------------------------------------------------------------------------------------- the networks


@dataclass
class Setting:
    """Where weights come from: files of the folder, or the written recipe. Networks are built once."""

    folder: Path
    networks: dict[str, UNet3D] = field(default_factory=dict)

    def unet(self, report: Report, file: str, config: Facts, seed: int, gain: float, sha256: str | None) -> UNet3D:
        """Return the refiner of these sizes with the recipe's weights, whose checksum is verified when one is given."""
        key = json.dumps([config, seed, gain, sha256], sort_keys=True)
        if key not in self.networks:
            weights = official.make_weights(official.unet(config), seed, gain, half=True)
            if sha256 is not None:
                report.same(file, f"sha256 of the weights of seed {seed}", official.checksum(weights), sha256)
            self.networks[key] = build_unet(config, weights)
        return self.networks[key]


def build_unet(config: Facts, weights: Tensors) -> UNet3D:
    """Build the refiner and load official tensors through the published key map."""
    attention = official.attends(config)
    unet = UNet3D(
        UNet3DConfig(
            in_channels=config.get("in_dim", 4),
            out_channels=config.get("out_dim", 4),
            block_out_channels=tuple(config["dim"] * factor for factor in config["dim_mult"]),
            attention_levels=tuple(attention),
            layers_per_block=config["num_res_blocks"],
            cross_attention_dim=config["context_dim"],
            attention_head_dim=config["head_dim"],
            transformer_in_heads=config["num_heads"],
            norm_num_groups=config.get("norm_groups", 32),
            downsample_padding=(2, 1),
        )
    )
    fill(unet, published.refiner_unet(attention, config["num_res_blocks"]), weights)
    return unet


def fill(network: nn.Module, key_map: KeyMap, weights: Tensors) -> None:
    expected = {key: value.shape for key, value in network.state_dict().items()}
    network.load_state_dict(key_map.apply(weights, expected))
    network.eval()


# ----------------------------------------------------------------------------------------------------------- the files


def schedule(report: Report, file: str, facts: Facts, tensors: Tensors, _: Setting) -> None:
    """The training tables and the sampler's grids."""
    made = NoiseSchedule(
        ScheduleConfig(
            kind="cosine_logsnr",
            num_train_timesteps=facts["n"],
            prediction="v",
            spacing="trailing",
            zero_terminal_snr=facts["zero_terminal_snr"],
            logsnr_min=facts["logsnr_min"],
            logsnr_max=facts["logsnr_max"],
            scale_min=facts["scale_min"],
            scale_max=facts["scale_max"],
        )
    )
    report.compare(file, "sigmas", made.sigmas, tensors["sigmas"], TABLE)
    # Towards pure noise alpha hangs on the last digit of float32 sigma, and differs that much between processors.
    report.compare(file, "alphas", made.alphas, tensors["alphas"], 10 * TABLE)
    for case in facts["cases"]:
        start, steps = case["total_noise_levels"], case["steps"]
        timesteps, rho = sdedit_grid(made, start, steps)
        name = f"{start} levels, {steps} steps"
        # Published grids of a few (T', N) have one step too many, by rounding; here N always holds.
        wanted = case["model_t"][:steps]
        report.same(file, f"timesteps of {name}", timesteps.tolist(), wanted)
        recorded = tensors.get(f"sampler_sigmas_{start}_{steps}", torch.tensor(case["sampler_sigmas"]))
        if len(recorded) != steps + 1:
            report.note(file, f"{name}: the published grid has {len(recorded) - 1} steps, compared up to {steps}")
        compare_rho(report, file, name, rho[:steps], recorded[:steps])
        report.same(file, f"last rho of {name}", float(rho[-1]), 0.0)
        for quantity, value in (("alpha_T", made.alphas[start - 1]), ("sigma_T", made.sigmas[start - 1])):
            if quantity in case:
                report.compare(file, f"{quantity} of {name}", value, torch.tensor(case[quantity]), TABLE)


def compare_rho(report: Report, file: str, name: str, found: Tensor, expected: Tensor) -> None:
    """Compare noise levels rho = sigma / alpha, level by level.

    One unit in the last place of float32 sigma moves rho by 1.2e-7 (1 + rho^2) of itself; a quarter of the tolerance is
    granted for each such unit.
    """
    noise = torch.isinf(expected)
    report.same(file, f"pure noise in rho of {name}", torch.isinf(found).tolist(), noise.tolist())
    found, expected = found[~noise].double(), expected[~noise].double()
    error = (found - expected).abs() / expected / (1 + (1 + expected**2) / 4)
    report.compare(file, f"rho of {name}", error.max(), torch.tensor(0.0), TABLE)


def unet_forward(report: Report, file: str, facts: Facts, tensors: Tensors, setting: Setting) -> None:
    """Network outputs for several inputs, one of them with every block's output."""
    for case in facts["cases"]:
        index, model = case["index"], case["model"]
        config, seed = facts[f"{model}_config"], facts[f"{model}_seed"]
        gain = facts.get("weights", {}).get("gain", GAIN)
        unet = setting.unet(report, file, config, seed, gain, facts.get(f"{model}_sha256"))
        stored = setting.folder / f"unet_{model}_weights_fp16.safetensors"
        if stored.is_file():
            made = official.make_weights(official.unet(config), seed, gain, half=True)
            kept = load_file(stored)
            report.same(file, f"keys of {stored.name}", sorted(made), sorted(kept))
            equal = all(torch.equal(made[key], kept[key].float()) for key in made if key in kept)
            report.same(file, f"values of {stored.name}", equal, True)
        latents, timestep, tokens = (tensors[f"{index}.{name}"] for name in ("x", "t", "y"))
        found = unet(latents, timestep, unet.prepare(TextContext(tokens)))
        report.compare(file, f"{index}.out ({model})", found, tensors[f"{index}.out"], COMPONENT)
        recorded = {key: value for key, value in tensors.items() if key.startswith(f"{index}.inter.")}
        if recorded:
            blocks = block_outputs(unet, latents, timestep, tokens)
            for key, value in recorded.items():
                name = key.removeprefix(f"{index}.inter.")
                if name in blocks:
                    report.compare(file, key, blocks[name], value, COMPONENT)
                else:
                    report.problem(file, f"the recorded output {key!r} is not one this check knows")


def block_outputs(unet: UNet3D, latents: Tensor, timestep: Tensor, tokens: Tensor) -> Tensors:
    """Run the network and return every block's output under the published block names."""
    found: Tensors = {}
    step = unet.begin(latents, timestep, unet.prepare(TextContext(tokens)), True, False)
    half = unet.time_embedding.channels // 2
    angles = timestep.float()[:, None] * 10000 ** (-torch.arange(half) / half)
    found["time_embed_in"] = torch.cat([angles.cos(), angles.sin()], dim=1)
    found["time_embed"] = step.embedding
    skips = unet.descend(unet.enter(latents, step), step)
    found |= {f"input_blocks.{index}": skip for index, skip in enumerate(skips)}
    x = found["middle_block"] = unet.mid_block(skips[-1], step)
    number = itertools.count()
    for level in unet.up_blocks:
        for index in range(len(level.resnets)):
            x = level.layer(index, torch.cat([x, skips.pop()], dim=1), step)
            if index == len(level.resnets) - 1:
                for upsample in level.upsamplers:
                    x = upsample(x, skips[-1].shape[-2:])
            found[f"output_blocks.{next(number)}"] = x
    return found


def cfg_step(report: Report, file: str, facts: Facts, tensors: Tensors, setting: Setting) -> None:
    """Both velocities and the guided clean latents of single evaluations."""
    unet = setting.unet(report, file, facts["config"], facts["seed"], facts.get("gain", GAIN), facts.get("sha256"))
    made = NoiseSchedule(ScheduleConfig.from_dict(published.REFINER_SCHEDULE))
    for case in facts["cases"]:
        index, rescale = case["index"], case["guide_rescale"]
        noisy, negative, positive = (tensors[f"{index}.{name}"] for name in ("xt", "ny", "y"))
        timestep = torch.tensor([case["t"]])
        both = unet.prepare(TextContext(torch.cat([negative, positive])))
        unconditional, conditional = unet(torch.cat([noisy, noisy]), timestep, both).chunk(2)
        report.compare(file, f"{index}.v_uncond", unconditional, tensors[f"{index}.v_uncond"], COMPONENT)
        report.compare(file, f"{index}.v_cond", conditional, tensors[f"{index}.v_cond"], COMPONENT)
        plain = guidance.combine(unconditional, conditional, case["guide_scale"])
        ratio = conditional.flatten(1).std(dim=1) / plain.flatten(1).std(dim=1)
        report.compare(file, f"{index}.std_ratio", ratio, torch.tensor(case["std_ratio"]), COMPONENT)
        guided = guidance.combine(unconditional, conditional, case["guide_scale"], rescale or 0.0)
        x0, _ = made.to_x0_eps(guided, noisy, timestep)
        report.compare(file, f"{index}.x0", x0, tensors[f"{index}.x0"], COMPONENT)


@dataclass(frozen=True)
class RecordedDraws:
    """The random numbers of a recorded chain, asked for by address."""

    start: Tensor  # [C, F, h, w]
    steps: Tensor  # [N-1, C, F, h, w]
    cuts: Tensor  # [N, K-1]
    overlap: int

    def normal(self, purpose: str, address: tuple[int, ...], shape: Sequence[int]) -> Tensor:
        """Return the recorded noise of one frame, at the start or of one step."""
        frame, *step = address
        drawn = self.steps[step[0], :, frame] if step else self.start[:, frame]
        assert drawn.shape == tuple(shape), (purpose, address, shape)
        return drawn

    def integer(self, purpose: str, address: tuple[int, ...], low: int, high: int) -> int:
        """Return the recorded cut of (chunk, step)."""
        chunk, step = address
        assert (low, high) == (0, self.overlap - 1), (purpose, low, high)
        return int(self.cuts[step, chunk - 1])


class Watched:
    """A network that keeps its inputs: every chunk-step in the order they ran."""

    def __init__(self, unet: UNet3D) -> None:
        self.unet = unet
        self.inputs: list[tuple[int, Tensor]] = []

    def run(self, latents: Tensor, timestep: int, *rest: Any) -> tuple[Tensor, Tensor]:
        self.inputs.append((timestep, latents[:1].clone()))
        return self.unet.run(latents, timestep, *rest)


def chain(report: Report, file: str, facts: Facts, tensors: Tensors, setting: Setting) -> None:
    """A whole refinement, in both orders of work; intermediate values come from the sweep."""
    gain = facts.get("gain", GAIN)
    seed, sha256 = facts["weights_seed"], facts.get("weights_sha256")
    unet = setting.unet(report, file, facts["config"], seed, gain, sha256)
    made = NoiseSchedule(ScheduleConfig.from_dict(published.REFINER_SCHEDULE))
    start, steps, overlap = facts["total_noise_levels"], facts["steps"], facts["overlap"]
    clean, noise = tensors["z"][0], tensors["init_noise"][0]  # [C, F, h, w]
    count = clean.shape[1]
    plan = refinement_plan(count, facts["chunk"], overlap)
    report.same(file, "number of chunks", len(plan), facts["n_chunks"])
    report.compare(file, "noised", made.add_noise(clean, noise, start - 1), tensors["noised"][0], COMPONENT)
    timesteps, rho = sdedit_grid(made, start, steps)
    recorded = tensors["sampler_sigmas"]
    extra = len(recorded) - len(rho)
    if extra:
        report.note(file, f"the published grid has {extra} step more than asked for; the chain is run on that grid")
    report.same(file, "timesteps", timesteps.tolist(), facts["model_t"][:steps])
    compare_rho(report, file, "the chain", rho[:steps], recorded[:steps])
    if "cuts_step_major" in facts:
        report.same(file, "cuts", tensors["cuts"].tolist(), facts["cuts_step_major"])

    text = unet.prepare(TextContext(torch.cat([tensors["ny"], tensors["y"]])))
    draws = RecordedDraws(noise, tensors["step_noise"][:, 0], tensors["cuts"], overlap)
    for order, kind in (("sweep", SweepingRefiner), ("diagonal", RecordingRefiner)):
        watched = Watched(unet)
        settings = RefineConfig(
            chunk=facts["chunk"], overlap=overlap, num_inference_steps=steps, noise_level=start,
            guidance_scale=facts["guide_scale"], guidance_rescale=facts["guide_rescale"] or 0.0, stochastic=True,
            cut_range="published", start_scale="published",
        )  # fmt: skip
        refiner = kind(
            Denoiser(watched.run, made, lambda _: text), plan, settings, draws,  # type: ignore[arg-type]
            lambda number: clean[:, number],
        )  # fmt: skip
        if extra:
            refiner.timesteps, refiner.rho = torch.tensor(facts["model_t"]), recorded
        out = torch.cat(list(refiner.run())).transpose(0, 1)  # [C, F, h, w]
        report.compare(file, f"out, {order}", out, tensors["out"][0], WHOLE_RUN)
        for row, step in enumerate(facts["recorded_steps"]):
            blended = torch.stack([refiner.blended[frame, step] for frame in range(count)], dim=1)
            report.compare(file, f"x0_pred of step {step}, {order}", blended, tensors["x0_pred"][row, 0], WHOLE_RUN)
            if order == "sweep":
                found = torch.empty_like(clean)
                for chunk, (_, latents) in zip(plan, watched.inputs[step * len(plan) :], strict=False):
                    found[:, chunk.start : chunk.stop] = latents[0]
                report.compare(file, f"model_in of step {step}", found, tensors["model_in"][row, 0], WHOLE_RUN)


class RecordingRefiner(Refiner):
    """The package's refiner, keeping every blended clean estimate."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.blended: dict[tuple[int, int], Tensor] = {}

    def _advance(self, frame: int, step: int) -> None:
        self.blended[frame, step] = self.state.pending[frame]
        super()._advance(frame, step)


class SweepingRefiner(Sweep, RecordingRefiner):
    """The same in the published order of work."""


def ownership(report: Report, file: str, facts: Facts, _: Tensors, __: Setting) -> None:
    """Who owns which frame, for cuts from Python's generator; and that lengths which were trimmed no longer are."""
    for case in facts["ownership"]:
        length, size, overlap = case["frames"], case["chunk"], case["overlap"]
        count = max((length - overlap) // (size - overlap), 0)
        # The published chunks, which leave a tail of misfit lengths unwritten.
        starts = [index * (size - overlap) for index in range(count)]
        plan = [Chunk(index, start, start + size, start) for index, start in enumerate(starts)]
        source = random.Random(case["python_random_seed"])
        found = []
        for recorded in case["owner_chunk_per_frame_for_3_consecutive_steps"]:
            cuts = {chunk.index: source.randint(0, overlap - 1) for chunk in plan[1:]}
            owners = [-1] * len(recorded)
            for chunk in plan:
                for frame in blend.owned(plan, chunk.index, recorded_cut(cuts, overlap), "published"):
                    owners[frame] = chunk.index
            found.append(owners)
        name = f"owners of {length} frames, chunk {size}, overlap {overlap}"
        report.same(file, name, found, case["owner_chunk_per_frame_for_3_consecutive_steps"])
    for case in facts.get("trimming", []):
        made = refinement_plan(case["length"], case["chunk"], case["overlap"])
        name = f"{case['length']} frames, chunk {case['chunk']}, overlap {case['overlap']}"
        report.same(file, f"no frame lost of {name}", made[-1].stop, case["length"])
        if case["dropped"] == 0:
            report.same(file, f"chunks of {name}", len(made), case["n_chunks"])


def recorded_cut(cuts: Mapping[int, int], overlap: int) -> Callable[[int, int, int], int]:
    def draw(low: int, high: int, index: int) -> int:
        assert (low, high) == (0, overlap - 1)
        return cuts[index]

    return draw


def text(report: Report, file: str, facts: Facts, tensors: Tensors, _: Setting) -> None:
    """Tokens, and hidden states of the text tower."""
    tower = facts["tower"]
    names = official.text(tower["width"], tower["layers"], tower["mlp"], tower["vocab"], tower["context"])
    weights = official.make_weights(names, facts["seed"], 1.0, half=False)
    weights["token_embedding.weight"] *= 0.5
    weights["logit_scale"] = torch.tensor(4.6)
    if "sha256_text_keys" in facts:
        report.same(file, "sha256 of the weights", official.checksum(weights), facts["sha256_text_keys"])
    kept = tower["layers"] - 1
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tower["vocab"],
            hidden_size=tower["width"],
            intermediate_size=tower["mlp"],
            num_hidden_layers=kept,
            num_attention_heads=tower["heads"],
            max_position_embeddings=tower["context"],
            hidden_act="gelu",
        )
    )
    fill(encoder, published.open_clip_text(kept), weights)
    tokenizer = clip_tokenizer()
    tokens = [tokenizer.encode(clean_prompt(prompt)).ids for prompt in facts["prompts"]]
    report.same(file, "tokens", tokens, tensors["tokens"].tolist())
    report.same(file, "tokens in both files", tensors["tokens"].tolist(), facts["tokens"])
    hidden = encoder(input_ids=tensors["tokens"][: len(tensors["hidden"])]).last_hidden_state
    report.compare(file, "hidden", hidden, tensors["hidden"], COMPONENT)


def vae_pixels(report: Report, file: str, facts: Facts, tensors: Tensors, _: Setting) -> None:
    """The VAE frame by frame, and pixels on their way in and out."""
    widths = [facts["ch"] * factor for factor in facts.get("ch_mult", [1, 2, 4, 4])]
    layers, latent = facts.get("num_res_blocks", 2), tensors["mean"].shape[1]
    weights = official.make_weights(official.vae(widths, layers, latent), facts["seed"], 1.0, half=False)
    if "sha256" in facts:
        report.same(file, "sha256 of the weights", official.checksum(weights), facts["sha256"])
    vae = AutoencoderKL(
        AutoencoderConfig(
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            latent_channels=latent,
            scaling_factor=facts["scale"],
        )
    )
    fill(vae, published.refiner_vae(len(widths), prefix=""), weights)
    posterior = vae.encode(tensors["image"]).latent_dist
    report.compare(file, "mean", posterior.mean, tensors["mean"], COMPONENT)
    report.compare(file, "logvar", 2 * posterior.std.log(), tensors["logvar"], COMPONENT)
    mean = encoders.encode_frames(vae, tensors["image"])
    report.compare(file, "scaled mean", mean, facts["scale"] * tensors["mean"], COMPONENT)
    report.compare(file, "z", encoders.encode_frames(vae, tensors["image"], tensors["eps"]), tensors["z"], COMPONENT)
    decoded = encoders.decode_latents(vae, tensors["latent"])
    report.compare(file, "decoded, clamped", decoded, tensors["decoded"].clamp(-1, 1), COMPONENT)

    # Bytes were truncated there and are rounded here. Fitting worked on bytes there, and clipped every overshoot
    # between rows and columns, which shows on noise such as this.
    width, height = facts["target_wh"]
    shown = frames.to_u8(tensors["vid_in"][0].transpose(0, 1))
    report.same(file, "bytes are within a level", levels_apart(shown, tensors["vid_bytes"])[0] <= 1, True)
    source = frames.to_float(tensors["src"][None].numpy())
    fit = shape.fit_into(source.shape[-2:], (height, width), "pad")
    report.same(file, "fitted size", [fit.content_height, fit.content_width, 3], facts["fit_shape"])
    fitted = frames.to_u8(frames.resize(source, (fit.content_height, fit.content_width)))
    report.same(file, "fitted pixels: mean below a level", levels_apart(fitted, tensors["fit"][None])[1] < 1, True)
    padded = frames.to_u8(frames.apply_fit(source, fit))
    report.same(file, "padded pixels: mean below a level", levels_apart(padded, tensors["pad"][None])[1] < 1, True)


def levels_apart(found: frames.Frames, expected: Tensor) -> tuple[float, float]:
    """Return the largest and the mean difference of two byte arrays; infinite where their shapes differ."""
    if found.shape != tuple(expected.shape):
        return math.inf, math.inf
    difference = (torch.from_numpy(found).float() - expected.float()).abs()
    return float(difference.max()), float(difference.mean())


Kind = Callable[[Report, str, Facts, Tensors, Setting], None]
KINDS: Mapping[str, Kind] = {
    "schedule": schedule,
    "unet_forward": unet_forward,
    "cfg_step": cfg_step,
    "chain": chain,
    "blending_ownership": ownership,
    "text": text,
    "vae_pixels": vae_pixels,
}
