"""Golden folders of StreamingSVD: networks, one step, whole sampling runs, the streaming loop, blending, tables."""

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLTemporalDecoder
from safetensors.torch import load_file
from torch import Tensor, nn

from streamt2v import chunks
from streamt2v.config import RefineConfig
from streamt2v.diffusion import blend, guidance, solvers
from streamt2v.diffusion.noise import Address
from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig, align_your_steps, precondition
from streamt2v.models.cam import CamConfig, ConditionalAttention
from streamt2v.models.unet3d import TextContext, UNet3D, UNet3DConfig
from streamt2v.stages.picture_stream import (
    Anchor,
    Motion,
    PictureModels,
    PictureNoise,
    PictureSampling,
    PictureStreamer,
    decode_groups,
    sample,
)
from streamt2v.stages.refine import Denoiser, Refiner
from streamt2v.stages.stream import StreamState, continued
from streamt2v.weights import published_svd
from streamt2v.weights.keymaps import KeyMap
from tests.parity.report import COMPONENT, EXACT, TABLE, WHOLE_RUN, Report

Tensors = dict[str, Tensor]

ONE_LEVEL = 1.0
"""Levels of 255 by which a pixel may differ: it is truncated, not rounded, so an error of 1e-7 can cost one."""
BLENDING = 1e-5
"""Largest difference of latents after up to 29 steps of DDIM: 5e-6 was reached; tanh and cos differ with processors."""
WAVES = 1e-6
"""Relative L2 of the three numbers' waves: written down with seven digits."""


def recognises(folder: Path) -> bool:
    """Whether the folder holds goldens of this family."""
    path = folder / "cases.json"
    return path.is_file() and "weights_recipe" in json.loads(path.read_text())


def check(folder: Path) -> Report:
    """Check every file of the folder."""
    report = Report()
    facts = json.loads((folder / "cases.json").read_text())
    kinds = {"unet": networks, "step": one_step, "sampling": sampling_run, "ar": loop}
    known = {"cases.json", "schedule.json"}
    for name, case in facts["cases"].items():
        files = {kind: folder / f"{name}_{kind}.safetensors" for kind in kinds}
        known |= {path.name for path in files.values()} | {f"{name}_keys.json", f"{name}_vae_keys.json"}
        present = {kinds[kind]: path for kind, path in files.items() if path.is_file()}
        if present:
            report.attempt(name, partial(check_case, report, folder, name, case, present))
        for kind, path in files.items():
            if not path.is_file() and (kind != "ar" or "ar" in case):
                report.note(path.name, "not in this folder")
    for name, case in facts.get("blending", {}).items():
        path = folder / f"{name}.safetensors"
        known.add(path.name)
        if path.is_file():
            report.attempt(name, partial(blending, report, name, case, path))
        else:
            report.note(path.name, "not in this folder")
    if (folder / "schedule.json").is_file():
        report.attempt("schedule", partial(tables, report, folder / "schedule.json"))
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            report.note(path.name, "not a file this check knows")
    return report


# ------------------------------------------------------------------------------------------------------- the networks


def make_weight(key: str, shape: tuple[int, ...], salt: int) -> Tensor:
    """Fill one tensor by the folder's recipe: normal numbers seeded by the published key."""
    seed = (zlib.crc32(key.encode()) + salt) % 2**32
    x = np.random.RandomState(seed).standard_normal(math.prod(shape)).reshape(shape)
    if key.endswith("mix_factor"):
        x = 0.5 * x
    elif len(shape) >= 2:
        x = x / math.sqrt(math.prod(shape[1:]))
    elif key.endswith(".weight"):
        x = 1 + 0.1 * x
    else:
        x = 0.05 * x
    return torch.from_numpy(x.astype(np.float32))


def make_weights(path: Path, salt: int) -> Tensors:
    """Fill all tensors that a file of keys and shapes names."""
    return {key: make_weight(key, tuple(shape), salt) for key, shape in json.loads(path.read_text()).items()}


def filled(network: nn.Module, keys: KeyMap, state: Tensors) -> Any:
    """Load a network through its key map, all keys and shapes checked."""
    expected = {key: value.shape for key, value in network.state_dict().items()}
    network.load_state_dict(keys.apply(state, expected))
    return network.eval()


@dataclass(frozen=True)
class Setting:
    """The networks and sizes of a case."""

    name: str
    case: Mapping[str, Any]
    unet: UNet3D
    cam: ConditionalAttention
    vae: Any

    def streamer(
        self, embedding: Tensor, num_steps: int, motion: Motion, anchor: Tensor, noise: Callable[[Any], PictureNoise]
    ) -> PictureStreamer:
        """Return the package's stage with recorded inputs."""
        scales = self.case["guidance"]
        return PictureStreamer(
            PictureModels(self.unet, self.vae, self.cam), Anchor(anchor, embedding), motion,
            PictureSampling(num_steps, scales["min"], scales["max"]), noise,
            decode_groups(self.case["frames"], self.case.get("ar", {}).get("decode_chunk", 8), variant="published"),
        )  # fmt: skip


def load(report: Report, folder: Path, name: str, case: Mapping[str, Any]) -> Setting:
    """Build the networks of a case and load its weights through the published key maps."""
    sizes = case["network"]
    state = make_weights(folder / f"{name}_keys.json", case["salt"])
    for key, (total, first) in case["weight_checks"].items():
        found = torch.tensor([float(state[key].double().sum()), *state[key].flatten()[:3].tolist()])
        report.compare(name, f"weights: {key}", found, torch.tensor([total, *first]), TABLE)
    if sizes["merger_head_dim"] != sizes["num_head_channels"]:
        raise ValueError("mergers with heads of another width than the network's are not supported")
    levels = [2**level in sizes["attention_resolutions"] for level in range(len(sizes["channel_mult"]))]
    config = published_svd.UNET_CONFIG | {
        "in_channels": sizes["in_channels"], "out_channels": sizes["out_channels"],
        "block_out_channels": [sizes["model_channels"] * factor for factor in sizes["channel_mult"]],
        "attention_levels": levels, "layers_per_block": sizes["num_res_blocks"],
        "cross_attention_dim": sizes["context_dim"], "attention_head_dim": sizes["num_head_channels"],
        "pooled_text_dim": sizes["adm_in_channels"],
    }  # fmt: skip
    cam = {"unet": config, "cond_embed_channels": sizes["cond_embedding_channels"], "pixel_norms": True,
           "num_cond_frames": case["cond_frames"]}  # fmt: skip
    depth = (levels, sizes["num_res_blocks"])
    return Setting(
        name, case,
        filled(UNet3D(UNet3DConfig.from_dict(config | {"cam": True})), published_svd.unet(*depth), state),
        filled(ConditionalAttention(CamConfig.from_dict(cam)), published_svd.cam(*depth), state),
        autoencoder(folder, name, case) if "ar" in case else None,
    )  # fmt: skip


def autoencoder(folder: Path, name: str, case: Mapping[str, Any]) -> Any:
    """Build the autoencoder of a case; some of its weights are scaled after the recipe."""
    sizes = case["ar"]["vae"]
    state = make_weights(folder / f"{name}_vae_keys.json", case["salt"])
    rule = re.search(r"([\w.]+)\.weight and \.bias are multiplied by ([\d.]+)", case["ar"].get("extra_rule", ""))
    if rule is not None:
        for end in ("weight", "bias"):
            state[f"{rule[1]}.{end}"] *= float(rule[2])
    widths = tuple(sizes["ch"] * factor for factor in sizes["ch_mult"])
    network = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * len(widths), block_out_channels=widths,
        layers_per_block=sizes["num_res_blocks"], scaling_factor=case["ar"]["scale_factor"],
    )  # fmt: skip
    return filled(network, published_svd.vae(len(widths)), state)


def check_case(report: Report, folder: Path, name: str, case: Mapping[str, Any], files: "Mapping[Kind, Path]") -> None:
    setting = load(report, folder, name, case)
    for kind, path in files.items():
        report.attempt(path.stem, partial(check_file, report, path, kind, setting))


@torch.inference_mode()
def check_file(report: Report, path: Path, kind: "Kind", setting: Setting) -> None:
    kind(report, path.stem, load_file(path), setting)


# ---------------------------------------------------------------------------------------------------------- the files

Kind = Callable[[Report, str, Tensors, Setting], None]


def images(clips: Tensor) -> Tensor:
    """Turn clips [B, C, F, h, w] into images [B * F, C, h, w]."""
    return clips.transpose(1, 2).flatten(0, 1)


def clips(frames: Tensor, batch: int) -> Tensor:
    """Turn images [B * F, C, h, w] into clips [B, C, F, h, w]."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def context(tensors: Tensors) -> TextContext:
    """The picture's token for both branches, and the waves of the three numbers."""
    token = tensors["clip_cond"]
    return TextContext(torch.cat([torch.zeros_like(token), token]), tensors["vector"].expand(2, -1))


def networks(report: Report, file: str, tensors: Tensors, setting: Setting) -> None:
    """One evaluation of the networks, taken apart; of the features whatever is recorded."""
    unet, cam = setting.unet, setting.cam
    latents, level = clips(tensors["unet_input"], 2), tensors["timestep"]  # [2, 8, F, h, w]
    frames, control = latents.shape[2], tensors["ctrl_frames"]
    waves = Motion().waves(tensors["vector"].shape[1])
    report.compare(file, "vector", waves, tensors["vector"], WAVES)

    embedded = cam.embed_frames(control)  # [1, C, K, h, w]
    features = cam(latents[:, :, : control.shape[1]], level, cam.prepare(context(tensors)), embedded)
    conditioning = unet.prepare(context(tensors))
    step = unet.begin(latents, level, conditioning, True, False)
    skips = unet.descend(unet.enter(latents, step), step)
    merged, mid = unet.merge(skips, unet.mid_block(skips[-1], step), frames, features)
    found = {
        "cond_embedding": images(embedded),
        **{f"cam_{index}": images(feature) for index, feature in enumerate(features.down)},
        "cam_mid": images(features.mid),
        **{f"merged_{index}": skip for index, skip in enumerate(merged)},
        "merged_mid": mid,
        "unet_out_plain": images(unet(latents, level, conditioning)),
        "unet_out_cam": images(unet(latents, level, conditioning, features)),
    }
    if "merger1_in" in tensors:
        merger = unet.cam_mergers.down[1]
        found["merger1_out"] = merger(tensors["merger1_in"], frames, clips(tensors["merger1_cond"], 2))
    given = {"unet_input", "timestep", "vector", "ctrl_frames", "clip_cond", "merger1_in", "merger1_cond", "x",
             "image_latent_cond"}  # fmt: skip
    compare_recorded(report, file, found, tensors, given)


def compare_recorded(report: Report, file: str, found: Tensors, tensors: Tensors, given: set[str]) -> None:
    """Compare every recorded output; one that nothing was computed for is a problem."""
    for name in tensors.keys() - given:
        if name in found:
            report.compare(file, name, found[name], tensors[name], COMPONENT)
        else:
            report.problem(file, f"the recorded output {name!r} is not one this check knows")


def recorded_streamer(tensors: Tensors, setting: Setting, num_steps: int) -> tuple[PictureStreamer, Tensor]:
    """Return the stage and the recorded image latents [2, C, 1, h, w]: zeros for the unconditional branch."""
    latents = tensors["image_latent_cond"]
    beside = torch.cat([torch.zeros_like(latents), latents]).unsqueeze(2)
    control = tensors["ctrl_frames"][0]

    def unused(_: Any) -> PictureNoise:
        raise AssertionError("no noise is asked for")

    return setting.streamer(tensors["clip_cond"][:, 0], num_steps, Motion(), control[0], unused), beside


def one_step(report: Report, file: str, tensors: Tensors, setting: Setting) -> None:
    """The denoiser at one noise level, guidance, and one Euler step."""
    rho, following = float(tensors["sigma"]), float(tensors["next_sigma"])
    stage, beside = recorded_streamer(tensors, setting, 1)
    x, control = clips(tensors["x"], 1), tensors["ctrl_frames"]  # [1, C, F, h, w]
    frames, factor = x.shape[2], precondition(rho)
    level = torch.tensor([factor.c_noise])
    given = torch.cat([(factor.c_in * x).expand(2, -1, -1, -1, -1), beside.expand(-1, -1, frames, -1, -1)], dim=1)
    embedded = setting.cam.embed_frames(control)
    features = setting.cam(given[:, :, : control.shape[1]], level, stage.extractor, embedded)
    both = factor.clean(setting.unet(given, level, stage.denoiser, features), x.expand(2, -1, -1, -1, -1))
    scales = guidance.per_frame(setting.case["guidance"]["min"], setting.case["guidance"]["max"], frames)
    guided = stage.estimator(torch.tensor([rho, following]), beside, control[0], frames)(x, 0)
    found = {
        "denoised_uncond_cond": images(both),
        "guidance": scales.flatten()[None],
        "denoised_guided": images(guided),
        "x_next": images(solvers.euler_step(x, guided, rho, following)),
    }
    compare_recorded(
        report, file, found, tensors,
        {"sigma", "next_sigma", "x", "ctrl_frames", "clip_cond", "image_latent_cond", "vector"},
    )  # fmt: skip


def sampling_run(report: Report, file: str, tensors: Tensors, setting: Setting) -> None:
    """All steps of one chunk."""
    rho = align_your_steps(len(tensors["sigmas"]) - 1)
    report.compare(file, "sigmas", rho, tensors["sigmas"], TABLE)
    stage, beside = recorded_streamer(tensors, setting, len(rho) - 1)
    noise = clips(tensors["noise"], 1)
    states: Tensors = {}

    def observe(step: int, _: Tensor, latents: Tensor) -> None:
        states[f"x_{step}"] = images(latents)

    estimate = stage.estimator(rho, beside, tensors["ctrl_frames"][0], noise.shape[2])
    states["final"] = images(sample(estimate, rho, noise, observe))
    given = {"sigmas", "noise", "ctrl_frames", "clip_cond", "image_latent_cond", "vector"}
    compare_recorded(report, file, states, tensors, given)


def loop(report: Report, file: str, tensors: Tensors, setting: Setting) -> None:
    """The streaming loop over as many rounds as there is noise for, decoded and truncated to bytes."""
    case = setting.case["ar"]
    size, overlap = setting.case["frames"], setting.case["cond_frames"]
    first = tensors["first_chunk_u8"].float() / 255 * 2 - 1
    rounds = sum(name.startswith("noise_") for name in tensors)
    motion = Motion(case["fps_id"], case["motion_bucket_id"], case["cond_aug"])

    def noise(chunk: chunks.Chunk) -> PictureNoise:
        number = chunk.index - 1
        return PictureNoise(clips(tensors[f"noise_{number}"], 1), tensors[f"cond_noise_{number}"][0])

    state = StreamState.after_first_chunk(first, overlap, case["anchor"])
    stage = setting.streamer(tensors["clip_embedding"][0], case["steps"], motion, state.anchor, noise)
    latents, denoise = [], stage.chunk_latents

    def recording(*arguments: Any) -> Tensor:
        latents.append(denoise(*arguments))
        return latents[-1]

    stage.chunk_latents = recording  # type: ignore[method-assign]
    plan = chunks.streaming_plan(chunks.length(rounds + 1, size, overlap), size, overlap)
    video = torch.cat([first, *(new for new, _ in continued(stage.new_frames, state, plan[1:]))])
    for number, found in enumerate(latents):
        report.compare(file, f"latents of chunk {number + 1}", images(found), tensors[f"latents_{number}"], WHOLE_RUN)
    found, recorded = ((video + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1), tensors["video_u8"]
    if len(recorded) < len(found):
        report.note(file, f"only the last {len(recorded)} of {len(found)} frames are recorded")
    report.largest(file, "video", found[-len(recorded) :], recorded, ONE_LEVEL)
    if rounds != case["n_autoregressive"]:
        report.note(file, f"only {rounds} of {case['n_autoregressive']} rounds are recorded")


STAND_IN = (
    "uncond = 0.5*tanh(x); cond = tanh(x)*(0.5+0.02*(i+1)) + 0.03*cos(6*f/chunk + i), i = chunk index, "
    "f = frame index inside the chunk (0..chunk-1); v-prediction; CFG = uncond + 9*(cond-uncond)"
)


def stand_in(x: Tensor, index: int, scale: float) -> Tensor:
    """What stands for the enhancer's network, x [1, C, F, h, w] of chunk `index`, with guidance."""
    frame = torch.arange(x.shape[2], dtype=torch.float32)[:, None, None]
    waves = 0.03 * torch.cos(6 * frame / x.shape[2] + index)
    return guidance.combine(0.5 * x.tanh(), x.tanh() * (0.5 + 0.02 * (index + 1)) + waves, scale)


def schedule_of(facts: Mapping[str, Any]) -> NoiseSchedule:
    """Read the enhancer's scheduler; what this package has no counterpart for is refused."""
    kinds = {"squaredcos_cap_v2": "squared_cosine"}
    if facts["type"] != "DDIM" or facts["clip_sample"] or facts["eta"]:
        raise ValueError("only plain DDIM without noise is supported")
    return NoiseSchedule(ScheduleConfig(
        kind=kinds.get(facts["beta_schedule"], facts["beta_schedule"]),
        num_train_timesteps=facts["num_train_timesteps"],
        prediction={"v_prediction": "v"}.get(facts["prediction_type"], facts["prediction_type"]),
        spacing=facts["timestep_spacing"], steps_offset=facts["steps_offset"],
        zero_terminal_snr=facts["rescale_betas_zero_snr"], final_alpha_one=facts["set_alpha_to_one"],
    ))  # fmt: skip


@torch.inference_mode()
def blending(report: Report, file: str, case: Mapping[str, Any], path: Path) -> None:
    """The enhancer's steps over all chunks: outputs composed frame by frame, then one DDIM step of the whole video.

    Which chunk a frame is taken from is exact to the bit, as composing the recorded chunks shows.
    """
    tensors, facts = load_file(path), case["scheduler"]
    if case["model_stub"] != STAND_IN:
        raise ValueError("another stand-in for the network than this check knows")
    schedule, steps = schedule_of(facts), case["num_inference_steps"]
    timesteps, alpha_bars = schedule.ddim_grid(steps)
    begin = steps - int(steps * case["strength"])
    report.same(file, "executed steps", steps - begin, case["executed_steps"])
    report.compare(file, "timesteps", timesteps[begin:], tensors["timesteps"], EXACT)
    plan = chunks.refinement_plan(case["frames_kept"], case["chunk"], case["overlap"])
    report.same(file, "number of chunks", len(plan), case["n_chunks"])
    cuts = tensors["offsets"].tolist()
    if "step0_chunks" in tensors and "latents_after_0" in tensors:
        found = composed(plan, tensors["step0_chunks"].split(1), cuts[0])
        report.compare(file, "recorded chunks composed", found, tensors["latents_after_0"], EXACT)

    def move(output: Tensor, x: Tensor, step: int) -> Tensor:
        x0, epsilon = schedule.to_x0_eps(output, x, int(timesteps[step]))
        return solvers.ddim_step(x0, epsilon, alpha_bars[step], alpha_bars[step + 1])

    x, found = tensors["latents_in"], {}
    for done, step in enumerate(range(begin, steps)):
        seen = [x[:, :, chunk.start : chunk.stop] for chunk in plan]
        outputs = [stand_in(clip, index, case["guidance_scale"]) for index, clip in enumerate(seen)]
        if done == 0:
            found["step0_chunks"] = torch.cat([move(outputs[index], clip, step) for index, clip in enumerate(seen)])
        x = move(composed(plan, outputs, cuts[done]), x, step)
        found[f"latents_after_{done}"] = x
    found["latents_out"] = x
    for quantity in sorted(found.keys() & tensors.keys()):
        report.largest(file, quantity, found[quantity], tensors[quantity], BLENDING)
    found = {
        "latents_out by the refiner": refined(schedule, case, plan, cuts, tensors["latents_in"], timesteps[begin:])
    }
    report.largest(file, *found.popitem(), tensors["latents_out"], BLENDING)


class RecordedCuts:
    """Cuts as they were drawn; no noise."""

    def __init__(self, cuts: Sequence[Sequence[int]]) -> None:
        self.cuts = cuts

    def integer(self, purpose: str, address: Address, low: int, high: int) -> int:
        """Return the cut of (chunk, step)."""
        return self.cuts[address[1]][address[0] - 1]

    def normal(self, purpose: str, address: Address, shape: Sequence[int]) -> Tensor:
        """Return zeros."""
        return torch.zeros(tuple(shape))

    uniform = normal


class Numbered:
    """What tells the stand-in which chunk it sees."""

    def __init__(self, chunk: chunks.Chunk) -> None:
        self.index = chunk.index

    def rows(self, rows: slice) -> "Numbered":
        """Return it for either branch."""
        return self


def refined(
    schedule: NoiseSchedule, case: Mapping[str, Any], plan: Sequence[chunks.Chunk], cuts: Sequence[Sequence[int]],
    noisy: Tensor, timesteps: Tensor,
) -> Tensor:  # fmt: skip
    """Run the refiner of the package, in its own order and coordinates, from noisy latents to clean ones."""
    settings = RefineConfig(
        solver="ddim", stochastic=False, chunk=case["chunk"], overlap=case["overlap"], cut_range="published",
        num_inference_steps=len(timesteps), noise_level=int(timesteps[0]) + 1, guidance_scale=case["guidance_scale"],
        guidance_rescale=0.0,
    )  # fmt: skip

    def run(latents: Tensor, time: Tensor, told: Numbered, *_: None) -> tuple[Tensor, Tensor]:
        branches = [stand_in(clip[None], told.index, scale) for clip, scale in zip(latents, (0, 1), strict=True)]
        return torch.cat(branches), latents

    def encode(number: int) -> Tensor:  # noised without noise, they are at the start
        return noisy[0, :, number] / schedule.alphas[int(timesteps[0])]

    stage = Refiner(Denoiser(run, schedule, Numbered), plan, settings, RecordedCuts(cuts), encode)
    return torch.cat(list(stage.run())).transpose(0, 1)[None]


def composed(plan: Sequence[chunks.Chunk], outputs: Sequence[Tensor], cuts: Sequence[int]) -> Tensor:
    """Take every frame from the chunk that owns it: outputs [1, C, size, h, w] of all chunks -> [1, C, F, h, w]."""
    parts = []
    for chunk, output in zip(plan, outputs, strict=True):
        own = blend.owned(plan, chunk.index, lambda low, high, index: cuts[index - 1], "published")
        parts.append(output[:, :, own.start - chunk.start : own.stop - chunk.start])
    return torch.cat(parts, dim=2)


def tables(report: Report, path: Path) -> None:
    """Noise levels, guidance, the waves of the three numbers, and how many chunks a length takes."""
    facts = json.loads(path.read_text())
    for steps, levels in facts["sigmas"].items():
        expected = torch.tensor(levels, dtype=torch.float64)
        report.compare("schedule", f"sigmas {steps}", align_your_steps(int(steps)), expected, TABLE)
    for frames, scales in facts["guidance"].items():
        found = guidance.per_frame(scales[0], scales[-1], int(frames)).flatten()
        report.compare("schedule", f"guidance {frames}", found, torch.tensor(scales), TABLE)
    for index, row in enumerate(facts["condition_vectors"]):
        found = Motion(row["fps_id"], row["motion_bucket_id"], row["cond_aug"]).waves(len(row["vector"]))
        report.compare("schedule", f"vector {index}", found[0], torch.tensor(row["vector"]), WAVES)
    for row in facts["length_plans"]:
        rounds = chunks.count(row["base_frames"], 25, 7) - 1
        found = (rounds, chunks.length(rounds + 1, 25, 7))
        report.same("schedule", f"chunks of {row['requested']}", found, (row["ar_chunks"], row["generated"]))
