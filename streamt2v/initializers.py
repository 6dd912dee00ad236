"""Stage-1 models of others: what a user names becomes a folder, and a folder becomes a pipeline of diffusers.

A name is a row of `weights.toml`, `hub:OWNER/NAME` or a local folder. A folder is data: only safetensors are read, only
classes of diffusers and transformers are built, and every parameter must come from the files. Nothing heavy is imported
with this module: `choose` runs before torch does.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v import config, weights
from streamt2v.errors import ConfigError, WeightsError
from streamt2v.weights import hub

if TYPE_CHECKING:
    import torch

    from streamt2v.config import RunConfig
    from streamt2v.memory import MemoryPolicy
    from streamt2v.stages.initialize import ModelScope

OWN = "own"
MODELSCOPE, ADAPTER = "TextToVideoSDPipeline", "MotionAdapter"
# Of a repository: no copies of the whole model in one file, no pickles, no example pictures.
SMALL_FILES, ALL_WEIGHTS = ("*.json", "*/*.txt", "*/*.model"), "*/*.safetensors"
FINGERPRINTED = (".json", ".txt", ".model", ".safetensors")


@dataclass(frozen=True)
class Chosen:
    """Whose pipeline makes the first frames.

    `kind` is the class that the folder names, `drawing` the text-to-image folders that belong to it: for an
    image-to-video pipeline without a picture those that draw one (a prior before its decoder), for a motion adapter the
    model that it animates.
    """

    name: str
    kind: str
    folder: Path
    drawing: tuple[Path, ...] = ()

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this model from another: names and SHA-256 of its files, hashed into one."""
        parts = [weights.contents(folder, FINGERPRINTED) for folder in (self.folder, *self.drawing)]
        listed = json.dumps(parts, sort_keys=True).encode()
        return {"name": self.name, "class": self.kind, "sha256": hashlib.sha256(listed).hexdigest()}


def named(run: RunConfig) -> str:
    """Return the setting that decides who makes the first frames: `own` is the family itself."""
    return run.initialize.picture_model if run.image else run.initialize.text_model


def choose(run: RunConfig, note: hub.Note = lambda text: None) -> Chosen | None:
    """Find the folders that stage 1 of a run needs; None where the family's own networks make the first frames.

    Args:
        run: names them.
        note: called with the size before anything is fetched.

    Raises:
        ConfigError: a name that means nothing, or a model that cannot start from what is given.
        WeightsError: a folder that is no pipeline, or files that cannot be had.
    """
    name = named(run)
    if name == OWN:
        return None
    folder = locate(name, note)
    kind, _ = read_index(folder)
    adapter = kind == ADAPTER
    if run.image and not takes_picture(kind):
        raise ConfigError(f"{name} ({kind}) makes videos from text alone", "leave --image out, or use --init svd")
    if not adapter and (run.image or not takes_picture(kind)):
        return Chosen(name, kind, folder)
    drawing = run.initialize.text_to_image or ("realistic-vision" if adapter else "sdxl")
    parts = [drawing] if Path(drawing).expanduser().is_dir() else drawing.split("+")
    return Chosen(name, kind, folder, tuple(locate(part, note) for part in parts))


def takes_picture(kind: str) -> bool:
    """Whether a pipeline class starts from a picture, by how diffusers names them: importing takes seconds."""
    return kind == "StableVideoDiffusionPipeline" or any(mark in kind for mark in ("ImageToVideo", "I2V", "Framepack"))


def locate(name: str, note: hub.Note = lambda text: None) -> Path:
    """Find or fetch the folder of a named, hub or local pipeline; `note` is told the size before it is fetched.

    Raises:
        ConfigError: the name means nothing.
        WeightsError: its files cannot be had.
    """
    folder, rows = Path(name).expanduser(), weights.pipelines()
    row = rows.get(name, {})
    repository = row.get("repository", name.removeprefix("hub:"))
    if name.startswith("hub:"):
        if len(repository.split("/")) != 2 or not all(repository.split("/")):
            raise ConfigError(f"{name!r} names no repository", "it must look like hub:OWNER/NAME")
    elif not row:
        if folder.is_dir():
            return folder
        hint = config.nearest(name, [OWN, *sorted(rows), "hub:OWNER/NAME", "the folder of a diffusers pipeline"])
        raise ConfigError(f"there is no initializer and no folder {name!r}", hint)
    return hub.snapshot(repository, row.get("revision"), (*SMALL_FILES, row.get("weights", ALL_WEIGHTS)), note)


def read_index(folder: Path) -> tuple[str, dict[str, Any]]:
    """Read and check the class and the parts that `model_index.json` names, or the config of a lone motion adapter.

    Raises:
        WeightsError: no pipeline, or one that would need code from elsewhere.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        path = folder / "config.json"
    try:
        table = json.loads(path.read_text("utf-8"))
        kind = table["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        hint = "it must hold model_index.json, as `save_pretrained` writes it"
        raise WeightsError(f"{folder} is no diffusers pipeline: {error}", hint) from None
    if not isinstance(kind, str) or not kind.isidentifier() or (path.name == "config.json" and kind != ADAPTER):
        raise WeightsError(f"{folder} is of the class {kind!r}, which is no pipeline of diffusers")
    parts = {} if kind == ADAPTER else {key: value for key, value in table.items() if not key.startswith("_")}
    for name, value in parts.items():
        if isinstance(value, list) and value != [None, None] and not _is_library_class(value):
            raise WeightsError(f"{folder}: {name} wants code from {value}", "only diffusers and transformers are used")
    return kind, parts


def _is_library_class(value: list[Any]) -> bool:
    """Whether [library, class] lies in transformers, diffusers or one of the folders of diffusers' pipelines."""
    if len(value) != 2 or not all(isinstance(item, str) and item.isidentifier() for item in value):
        return False
    if value[0] in ("diffusers", "transformers"):
        return True
    spec = find_spec("diffusers")
    roots = [Path(place) / "pipelines" for place in (spec.submodule_search_locations or [])] if spec else []
    return any((root / inner / value[0]).is_dir() for root in roots for inner in (".", "deprecated"))


# ----------------------------------------------------------------------------------------------------------- loading


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
    dtype = _dtype(device, index)
    parts: dict[str, Any] = {name: _part(folder, name, value, dtype) for name, value in index.items()}
    return _placed(_built(pipeline, parts, folder), device, policy)


def _placed(pipeline: Any, device: str, policy: MemoryPolicy | None) -> Any:
    if device == "cpu" or policy is None or policy.keep_networks:
        return pipeline.to(device)
    (pipeline.enable_sequential_cpu_offload if policy.offload else pipeline.enable_model_cpu_offload)(device=device)
    return pipeline


def load_modelscope(folder: Path, device: str) -> ModelScope:
    """Load the parts of a ModelScope text-to-video folder for our own sampling loop.

    Raises:
        WeightsError: see `load`; or a noise schedule of another kind.
    """
    from streamt2v.diffusion.schedules import NoiseSchedule, ScheduleConfig
    from streamt2v.stages.initialize import ModelScope

    _, index = read_index(folder)
    dtype = _dtype(device, index)
    wanted = ("unet", "vae", "text_encoder", "tokenizer")
    if absent := [name for name in (*wanted, "scheduler") if index.get(name, [None])[0] is None]:
        raise WeightsError(f"{folder} lists no {absent[0]}")
    unet, vae, text_encoder, tokenizer = (_part(folder, name, index[name], dtype) for name in wanted)
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        table = json.loads(path.read_text("utf-8"))
        schedule = ScheduleConfig(
            kind=table.get("beta_schedule", "linear"),
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
        schedules = NoiseSchedule(schedule)
    except (OSError, ValueError, TypeError, AttributeError, ConfigError) as error:
        raise WeightsError(f"{path} is no noise schedule that streamt2v knows: {error}") from None
    return ModelScope(unet.to(device), vae.to(device), text_encoder.to(device), tokenizer, schedules)


def _animated(folder: Path, base: Path, device: str) -> Any:
    """Put a motion adapter into a Stable Diffusion 1.x model.

    Motion modules were trained with linear betas, whatever the picture model itself uses. Source: arXiv 2307.04725.
    """
    import diffusers

    kind, index = read_index(base)
    if kind != "StableDiffusionPipeline":
        raise WeightsError(f"{folder} animates Stable Diffusion 1.x models, {base} is a {kind}")
    dtype = _dtype(device, index)
    needed = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    if absent := [name for name in needed if name not in index]:
        raise WeightsError(f"{base} lists no {absent[0]}")
    parts = {name: _part(base, name, index[name], dtype) for name in needed}
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


def _dtype(device: str, index: Mapping[str, Any]) -> torch.dtype:
    """The CPU computes in float32; transformers overflow float16, the older networks were published in it."""
    import torch

    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if "transformer" in index else torch.float16


def _part(folder: Path, name: str, value: Any, dtype: torch.dtype) -> Any:
    """Load one part of a pipeline: a network, a tokenizer, a scheduler, a processor; or pass on a plain setting."""
    if not isinstance(value, list):
        return value
    library, class_name = value
    if library is None:
        return None
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
            place, dtype=dtype, variant="fp16" if halved else None, use_safetensors=True, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # safetensors raises its own kind, the libraries nearly every other
        # Some networks keep parts in float32, which the library only knows how to do with its helper.
        hint = "" if find_spec("accelerate") else "some networks need `pip install accelerate`"
        raise WeightsError(f"{place} does not load as {model_class.__name__}: {error}", hint) from error
    if wrong := [*found["missing_keys"], *(item[0] for item in found["mismatched_keys"])]:
        raise WeightsError(f"{place} lacks the tensor {min(wrong)!r} of {model_class.__name__}")
    return model.requires_grad_(False).eval()
