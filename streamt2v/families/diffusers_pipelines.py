"""Any pipeline of diffusers as the initializer: a folder becomes a pipeline, which is called with what it knows."""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from streamt2v import devices, weights
from streamt2v.config import RunConfig
from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig
from streamt2v.errors import ConfigError, WeightsError
from streamt2v.families.choose import Chosen
from streamt2v.families.makers import First
from streamt2v.families.networks import Networks, Watching
from streamt2v.media.frames import fill, to_u8
from streamt2v.memory import MemoryPolicy
from streamt2v.weights.folders import ADAPTER, OURS, read_index


def first(networks: Networks, chosen: Chosen) -> First:
    """Return the maker of first frames: a pipeline at its own size, from text, a picture, or a picture drawn first."""

    def pipeline(folder: Path, base: Path | None = None) -> Any:
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        with networks.loading():
            networks.watch.doing(f"loading {folder.name}, {size / 1e9:.1f} GB")
            loaded = load(folder, networks.device.name, base, networks.policy)
        if networks.run.negative_prompt and ignores_negative_prompt(loaded):
            networks.note(f"{type(loaded).__name__} knows no negative prompt", warning=True)
        return loaded

    def make(prompt: str, picture: Tensor | None) -> Tensor:
        run, draws = networks.run, networks.draws
        if chosen.kind == ADAPTER:
            animated = pipeline(chosen.folder, chosen.drawing[0])
            return from_pipeline(animated, run, draws.generator("initialize"), watch=networks.watch)
        if chosen.drawing:
            artists = [pipeline(folder) for folder in chosen.drawing]
            picture = draw_picture(artists, run, draws.generator("initialize.picture"))
            del artists
            devices.release_memory(networks.device)
        at_once = 8 if networks.policy.keep_networks else 2
        generator, whole = draws.generator("initialize"), pipeline(chosen.folder)
        return from_pipeline(whole, run, generator, picture, at_once, networks.watch)

    return make


def load(folder: Path, device: str, base: Path | None = None, policy: MemoryPolicy | None = None) -> Any:
    """Load the pipeline of a folder, ready to be called.

    Args:
        folder: as `save_pretrained` writes it.
        device: where its networks go; 16 bit except on the CPU.
        base: for a motion adapter, the Stable Diffusion folder that it animates.
        policy: where not all networks can stay, each comes to the device only for its part, or layer by layer.

    Raises:
        WeightsError: a part is missing, damaged, no safetensors or unknown to the installed libraries.
    """
    import diffusers

    kind, index = read_index(folder)
    if kind == ADAPTER:
        if base is None:
            raise WeightsError(f"{folder} is a motion adapter: it needs a picture model to animate")
        return _placed(_animated(folder, base, device), device, policy)
    pipeline = getattr(diffusers, kind, None)
    if pipeline is None:
        raise WeightsError(f"the installed diffusers {diffusers.__version__} has no {kind}", "update diffusers")
    dtype = dtype_of(device, index)
    parts: dict[str, Any] = {name: load_part(folder, name, index, dtype) for name in index}
    return _placed(_built(pipeline, parts, folder), device, policy)


def _placed(pipeline: Any, device: str, policy: MemoryPolicy | None) -> Any:
    if device == "cpu" or policy is None or policy.keep_networks:
        return pipeline.to(device)
    (pipeline.enable_sequential_cpu_offload if policy.offload else pipeline.enable_model_cpu_offload)(device=device)
    return pipeline


def _animated(folder: Path, base: Path, device: str) -> Any:
    """Put a motion adapter into a Stable Diffusion 1.x model.

    Motion modules were trained with linear betas, whatever the picture model itself uses. Source: arXiv 2307.04725.
    """
    import diffusers

    kind, index = read_index(base)
    if kind != "StableDiffusionPipeline":
        raise WeightsError(f"{folder} animates Stable Diffusion 1.x models, {base} is a {kind}")
    dtype = dtype_of(device, index)
    needed = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    check_parts(base, index, *needed)
    parts = {name: load_part(base, name, index, dtype) for name in needed}
    ddim: Any = diffusers.DDIMScheduler
    parts["scheduler"] = ddim.from_config(
        parts["scheduler"].config,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="linspace",
        steps_offset=1,
    )
    parts["motion_adapter"] = load_network(diffusers.MotionAdapter, folder, dtype)
    return _built(diffusers.AnimateDiffPipeline, parts, folder)


def _built(pipeline: Any, parts: Mapping[str, Any], folder: Path) -> Any:
    known = inspect.signature(pipeline.__init__).parameters
    try:
        # Parts that a newer or older version of the class does not take are left out, as the library itself does.
        built = pipeline(**{name: part for name, part in parts.items() if name in known})
    except (TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{folder} is no whole {pipeline.__name__}: {error}") from error
    built.set_progress_bar_config(disable=True)
    return built


def dtype_of(device: str, index: Mapping[str, Any]) -> torch.dtype:
    """The CPU computes in float32; transformers overflow float16, the older networks were published in it."""
    import torch

    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if "transformer" in index else torch.float16


def check_parts(folder: Path, index: Mapping[str, Any], *names: str) -> None:
    """Raise WeightsError unless the index of a folder lists all these parts."""
    if absent := [name for name in names if index.get(name, [None])[0] is None]:
        raise WeightsError(f"{folder} lists no {absent[0]}")


def load_part(folder: Path, name: str, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Load one part of a pipeline: a network, a tokenizer, a scheduler, a processor; or pass on a plain setting."""
    value = index[name]
    if not isinstance(value, list):
        return value
    library, class_name = value
    if library is None:
        return None
    if library == OURS:
        path = folder / class_name
        if path.suffix == ".json":
            return weights.load_tokenizer(path, str(index.get("pad", "")))
        return weights.load_module(path, "cpu", dtype)
    for module in (library, f"diffusers.pipelines.{library}", f"diffusers.pipelines.deprecated.{library}"):
        if module.partition(".")[0] in ("diffusers", "transformers") and find_spec(module):
            weights.quiet(module.partition(".")[0])
            found = importlib.import_module(module)
            # What old folders call a feature extractor.
            renamed = class_name.replace("FeatureExtractor", "ImageProcessor")
            part_class = getattr(found, class_name, None) or getattr(found, renamed, None)
            break
    else:
        part_class = None
    if part_class is None:
        raise WeightsError(f"{folder}: the installed libraries have no {library}.{class_name}", "update diffusers")
    place = folder / name
    if not place.is_dir():
        raise WeightsError(
            f"{folder} lacks its part {name!r}", "the folder was copied in part, or a download broke off"
        )
    import torch

    if isinstance(part_class, type) and issubclass(part_class, torch.nn.Module):
        return load_network(part_class, place, dtype)
    if "Tokenizer" in class_name and not _has_vocabulary(place):
        # The library would return a working tokenizer that knows two words.
        raise WeightsError(f"{place} holds no vocabulary")
    try:
        return part_class.from_pretrained(place, local_files_only=True)
    except Exception as error:  # the tokenizers library raises a bare Exception
        raise WeightsError(f"{place} does not load as {class_name}: {error}") from error


def noise_schedule(folder: Path) -> NoiseSchedule:
    """Read the noise schedule of a pipeline's folder. Raises WeightsError where it is of another kind than ours."""
    path = folder / "scheduler" / "scheduler_config.json"
    kinds = {"squaredcos_cap_v2": "squared_cosine"}
    try:
        table = json.loads(path.read_text("utf-8"))
        kind = table.get("beta_schedule", "linear")
        schedule = ScheduleConfig(
            kind=kinds.get(kind, kind),
            beta_start=table.get("beta_start", 0.0001),
            beta_end=table.get("beta_end", 0.02),
            num_train_timesteps=table.get("num_train_timesteps", 1000),
            prediction={"v_prediction": "v"}.get(table.get("prediction_type"), table.get("prediction_type", "epsilon")),
            # The last step always arrives at timestep 0 or at a clean latent; "linspace" visits what "leading" does.
            spacing="trailing" if table.get("timestep_spacing") == "trailing" else "leading",
            steps_offset=table.get("steps_offset", 0),
            zero_terminal_snr=table.get("rescale_betas_zero_snr", False),
            final_alpha_one=table.get("set_alpha_to_one", True),
        )
        return NoiseSchedule(schedule)
    except (OSError, ValueError, TypeError, AttributeError, ConfigError) as error:
        raise WeightsError(f"{path} is no noise schedule that streamt2v knows: {error}") from None


def _has_vocabulary(place: Path) -> bool:
    return any(path.name in ("tokenizer.json", "vocab.json", "vocab.txt") for path in place.iterdir()) or any(
        place.glob("*.model")
    )


def load_network(model_class: Any, place: Path, dtype: torch.dtype) -> Any:
    """Load a network of a library; unlike the library, refuse files that do not hold every parameter."""
    halved = any(place.glob("*.fp16*.safetensors"))
    if not any(place.glob("*.safetensors")):
        raise WeightsError(f"{place} holds no safetensors file", "pickled weights (.bin, .ckpt) are never opened")
    try:
        model, found = model_class.from_pretrained(
            place,
            dtype=dtype,
            variant="fp16" if halved else None,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors raises its own kind, the libraries nearly every other
        # Some networks keep parts in float32, which the library only knows how to do with its helper.
        hint = "" if find_spec("accelerate") else "some networks need `pip install accelerate`"
        raise WeightsError(f"{place} does not load as {model_class.__name__}: {error}", hint) from error
    if wrong := [*found["missing_keys"], *(item[0] for item in found["mismatched_keys"])]:
        raise WeightsError(f"{place} lacks the tensor {min(wrong)!r} of {model_class.__name__}")
    return model.requires_grad_(False).eval()


SIDE = 64  # what both sides of a working size are multiples of: it divides evenly in every network known


def draw_picture(pipelines: Sequence[Any], config: RunConfig, generator: torch.Generator) -> Tensor:
    """Draw a picture by text-to-image pipelines, a prior before its decoder: [3, H, W] in [-1, 1]."""
    wanted, own = _texts(config), config.initialize
    for prior in pipelines[:-1]:
        wanted |= dict(_call(prior, wanted, own.num_inference_steps, own.guidance_scale, generator))
    decoder = pipelines[-1]
    wanted |= _sides(_working_size(decoder, config.stream.size)) | {"output_type": "np"}
    result = _call(decoder, wanted, own.num_inference_steps, own.guidance_scale, generator)
    return _to_frames(result[0])[0]


def from_pipeline(
    pipeline: Any,
    config: RunConfig,
    generator: torch.Generator,
    picture: Tensor | None = None,
    decode_chunk_size: int = 8,
    watch: Watching | None = None,
) -> Tensor:
    """Make the first chunk by a text- or image-to-video pipeline of diffusers: frames [F, 3, H, W] in [-1, 1].

    Args:
        pipeline: its signature decides what it is given.
        config: the settings of the run; zeros leave the choice to the pipeline.
        generator: every random number of the pipeline comes from here.
        picture: [3, h, w] in [-1, 1], for an image-to-video pipeline.
        decode_chunk_size: frames that SVD's temporal decoder sees at once.
        watch: is told of the steps of a pipeline that tells of them.

    Raises:
        ConfigError: the pipeline needs a picture, takes none, or refuses its settings.
    """
    known = inspect.signature(pipeline.__call__).parameters
    name = type(pipeline).__name__
    if picture is not None and "image" not in known:
        raise ConfigError(f"{name} takes no picture", "leave --image out, or use --init svd")
    if picture is None and "image" in known and known["image"].default is inspect.Parameter.empty:
        raise ConfigError(f"{name} starts from a picture", "give one with --image")
    own, num_frames, base = config.initialize, config.stream.chunk, config.stream.size
    wanted = _texts(config) | {
        "num_frames": _num_frames(pipeline, num_frames),
        "decode_chunk_size": decode_chunk_size,
        "output_type": "np",
    }
    if watch is not None:

        def stepped(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            watch.step("stream", 0, step + 1, max(step + 1, getattr(pipeline, "num_timesteps", 0)))
            return tensors

        wanted["callback_on_step_end"] = stepped
    size = own.size or _working_size(pipeline, base)
    wanted |= _sides(size)
    if picture is not None:
        wanted["image"] = Image.fromarray(to_u8(fill(picture[None], size or base))[0])
    scale = own.guidance_scale if picture is None else own.image_guidance_scale
    made = _to_frames(_call(pipeline, wanted, own.num_inference_steps, scale, generator)[0][0])
    if len(made) < num_frames:
        raise ConfigError(f"{name} made {len(made)} frames, the first chunk needs {num_frames}")
    return made[:num_frames]


def ignores_negative_prompt(pipeline: Any) -> bool:
    """Whether a pipeline reads a prompt and yet has no place for a negative one."""
    known = inspect.signature(pipeline.__call__).parameters
    return "prompt" in known and "negative_prompt" not in known


def _texts(config: RunConfig) -> dict[str, Any]:
    """An empty negative prompt is not passed: some pipelines have one of their own."""
    return {"prompt": config.prompt} | ({"negative_prompt": config.negative_prompt} if config.negative_prompt else {})


def _sides(size: tuple[int, int] | None) -> dict[str, int]:
    return {} if size is None else {"height": size[0], "width": size[1]}


def _call(
    pipeline: Any, wanted: dict[str, Any], num_inference_steps: int, guidance_scale: float, generator: torch.Generator
) -> Any:
    """Call a pipeline with what it knows of the wanted arguments, and with steps and guidance by their endings."""
    known = inspect.signature(pipeline.__call__).parameters
    arguments = {name: value for name, value in (wanted | {"generator": generator}).items() if name in known}
    if num_inference_steps:
        arguments |= {name: num_inference_steps for name in known if name.endswith("num_inference_steps")}
    if guidance_scale:
        # SVD's guidance grows along the frames; only its upper end is a matter of taste.
        scales = (name for name in known if name.endswith("guidance_scale") and name != "min_guidance_scale")
        arguments |= dict.fromkeys(scales, guidance_scale)
    devices = [pipeline.device] if pipeline.device.type == "cuda" else []
    # Whatever a pipeline draws past its generator is seeded too, and nobody else's numbers move.
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(generator.initial_seed())
        try:
            return pipeline(**arguments)
        except (TypeError, ValueError, ArithmeticError) as error:
            hint = "another size is --set initialize.height=H --set initialize.width=W"
            raise ConfigError(f"{type(pipeline).__name__} refuses its settings: {error}", hint) from error


def _num_frames(pipeline: Any, wanted: int) -> int:
    """At least `wanted` frames: the number that a network was made for, or the next that its video VAE can pack."""
    for name in ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"):
        ratio = getattr(pipeline, name, None)
        if ratio:
            return int(ratio) * math.ceil((wanted - 1) / int(ratio)) + 1
    made_for = getattr(getattr(getattr(pipeline, "unet", None), "config", None), "num_frames", None) or 0
    return max(wanted, int(made_for))


def _working_size(pipeline: Any, base: tuple[int, int]) -> tuple[int, int] | None:
    """A size (H, W) of the area that the pipeline prefers, in the shape of base frames; None where it says nothing.

    So nothing has to be cropped away afterwards, and no bars are ever drawn.
    """
    known = inspect.signature(pipeline.__call__).parameters
    height, width = (known[name].default if name in known else None for name in ("height", "width"))
    if not (isinstance(height, int) and isinstance(width, int)):
        config = getattr(getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None), "config", None)
        factor = getattr(pipeline, "vae_scale_factor", None) or getattr(pipeline, "vae_scale_factor_spatial", None)
        side = getattr(config, "sample_size", None)
        height, width = getattr(config, "sample_height", None) or side, getattr(config, "sample_width", None) or side
        if not (isinstance(height, int) and isinstance(width, int) and factor):
            return None
        height, width = height * factor, width * factor
    root = math.sqrt(height * width / (base[0] * base[1]))
    rows, columns = (max(SIDE, round(side * root / SIDE) * SIDE) for side in base)
    return rows, columns


def _to_frames(pixels: Any) -> Tensor:
    """Turn a pipeline's arrays [F, H, W, 3] in [0, 1] into frames [F, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.asarray(pixels, dtype=np.float32)).permute(0, 3, 1, 2).mul(2).sub(1).clamp(-1, 1)
